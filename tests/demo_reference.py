"""The demo checkpoint in transformers: model, tokenizer, template and settings of one directory."""

from pathlib import Path
from typing import Any

import torch
import torchvision_shim  # noqa: F401
from PIL import Image
from transformers import (
    AutoTokenizer,
    AutoVideoProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import qwen3vl_jax as q3
from demo import evaluate


def same_tokens(folder: Path, exams: list[evaluate.Exam]) -> list[tuple[list[int], list[int]]]:
    """(our answer's tokens, transformers') for each exam: float32 on both sides, greedy."""
    params, _ = q3.load(folder, dtype="float32")
    proc, theirs = q3.Processor.from_pretrained(folder), Reference(folder)
    pairs = []
    for exam in exams:
        batch = proc(evaluate.conversation(exam))
        limit = evaluate.MAX_NEW_TOKENS[exam.turn.kind]
        out = q3.generate(params, proc.config, batch, max_new_tokens=limit, stop_ids=proc.stop_ids)
        ours = out.tokens[0, : out.lengths[0]].tolist()
        pairs.append((ours, theirs.answer(exam, limit)))
    return pairs


class Reference:
    """transformers on a checkpoint directory, in float32."""

    def __init__(self, folder: Path):
        model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model = model
        self.model.eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor: Any = Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder),
            tokenizer=tokenizer,
            video_processor=AutoVideoProcessor.from_pretrained(folder),
            chat_template=tokenizer.chat_template,
        )

    def answer(self, exam: evaluate.Exam, limit: int) -> list[int]:
        """Greedy tokens, the end token included."""
        messages = evaluate.conversation(exam)
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        pictures = [Image.fromarray(exam.picture.pixels)]
        inputs = self.processor(text=[text], images=pictures, return_tensors="pt")
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        return out[0, inputs["input_ids"].shape[1] :].tolist()
