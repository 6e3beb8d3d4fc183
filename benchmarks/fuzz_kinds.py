"""What `benchmarks.fuzz` tries: for each kind of input a way to make a mutated one and a way to use it."""

import functools
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_prompts import (
    PROMPT_KINDS,
    Files,
    Kind,
    changed,
    conversation,
    damaged,
    json_of,
    processor,
)
from demo.examples import CHECKPOINT
from qwen3vl_jax.config import Config
from qwen3vl_jax.processing.chat_template import ChatTemplate
from qwen3vl_jax.processing.processor import (
    Processor,
    read_generation_config,
    sampling_defaults,
    stop_ids,
)
from qwen3vl_jax.processing.tokenizer import Tokenizer

JINJA = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.pop() }}",
    "{{ raise_exception('no\nmore') }}",
    "{{ messages | tojson(indent=9) }}",
    "{% if",
    "}}",
    "{{ 1 // 0 }}",
    "{{ messages[99].x.y }}",
    "{{ '%99999999d' % 1 }}",
    "{% generation %}",
    "{{ strftime_now('%\ud800') }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{% include 'x' %}",
    "{{ self }}",
    "{{ 7 ** 99999999 }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ lipsum(99) }}",
)


def _use_config(folder: Path) -> None:
    from qwen3vl_jax.inference.sampling import Sampling

    cfg = Config.from_hf(folder)
    hash(Config.from_hf(cfg.to_hf()))
    raw = read_generation_config(folder)
    Sampling(**sampling_defaults(raw)).rows(1)
    np.asarray(stop_ids(raw), np.int32)
    mine = folder / "whole"
    mine.mkdir()
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path if not (folder / path.name).exists() else folder / path.name, mine)
    Processor.from_pretrained(mine).inputs([{"role": "user", "content": "hi"}])


def _use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    text = "Hello, w\u00f6rld \u5b57 123 <|im_end|><think>\n\n  x"
    tokenizer.decode(tokenizer.encode(text), False)


def _make_template(rng: random.Random) -> Files:
    pieces = re.split(
        r"(\{[{%#].*?[}%#]\})", (CHECKPOINT / "chat_template.jinja").read_text(), flags=re.S
    )
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, change = rng.randrange(len(pieces)), rng.randrange(5)
        if change == 0:
            del pieces[at]
        elif change == 1:
            pieces[at] = rng.choice(pieces)
        elif change == 2:
            pieces[at:at] = pieces[at : at + 9]
        elif change == 3:
            pieces.insert(at, rng.choice(JINJA))
        else:
            text = pieces[at].encode()
            pieces[at] = damaged(rng, text).decode(errors="replace")
    return {"chat_template.jinja": "".join(pieces).encode("utf-8", "surrogatepass")}


def _use_template(folder: Path) -> None:
    found = conversation()
    template = ChatTemplate.from_dir(folder)
    Processor(**{**vars(processor()), "template": template}).inputs(
        [m for m in found["messages"] if isinstance(m["content"], str)], tools=found["tools"]
    )


ANSWERS = {n: {"id": n, "text": f"answer {n} \u00e9"} for n in (1, 2, 3)}


@functools.cache
def journal() -> bytes:
    import tempfile

    from qwen3vl_jax.cli.batch_journal import Journal, read_lines

    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "in.jsonl")
        source.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n')
        with Journal(Path(name, "out.jsonl"), lines := read_lines(source), {"seed": 1}) as kept:
            for line in lines[:2]:
                kept.add(line, ANSWERS[line.number])
        return Path(name, "out.jsonl.partial").read_bytes()


def _use_journal(folder: Path) -> None:
    from qwen3vl_jax.cli.batch import part_of
    from qwen3vl_jax.cli.batch_journal import Journal, read_lines

    out = folder / "out.jsonl"
    with Journal(out, read_lines(folder / "in.jsonl"), {"seed": 1}) as kept:
        for line in part_of(kept.lines, set(kept.done), 0, 1):
            kept.add(line, ANSWERS[line.number])
        kept.finish()
    found = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    if found != list(ANSWERS.values()):
        raise RuntimeError(f"answers were changed: {found}")


@functools.cache
def weights() -> bytes:
    return (CHECKPOINT / "model.safetensors").read_bytes()


def _make_checkpoint(rng: random.Random) -> Files:
    data = weights()
    length = int.from_bytes(data[:8], "little")
    raw = json.loads(data[8 : 8 + length])
    config = json.loads((CHECKPOINT / "config.json").read_text())
    if rng.random() < 0.3:
        return {"model.safetensors": data, "config.json": json_of(rng, config)}
    if rng.random() < 0.3:
        cut = damaged(rng, data[: 8 + length])
        return {
            "model.safetensors": cut + data[8 + length :],
            "config.json": json.dumps(config).encode(),
        }
    index = {"metadata": {}, "weight_map": dict.fromkeys(raw, "model.safetensors")}
    header = json_of(rng, raw)
    header = len(header).to_bytes(8, "little") + header
    files = {
        "model.safetensors": header + data[8 + length :],
        "config.json": json.dumps(config).encode(),
    }
    if rng.random() < 0.3:
        files |= {"model.safetensors": data, "model.safetensors.index.json": json_of(rng, index)}
    return files


def _use_checkpoint(folder: Path) -> None:
    from qwen3vl_jax.loading import load

    load(folder)


def _file(name: str) -> Any:
    return json.loads((CHECKPOINT / name).read_text(encoding="utf-8"))


def _make_config(rng: random.Random) -> Files:
    names = ("", "", "generation_", "preprocessor_", "video_preprocessor_")
    chosen = f"{rng.choice(names)}config.json"
    files = {name: (CHECKPOINT / name).read_bytes() for name in ("config.json",)}
    return files | {chosen: json_of(rng, _file(chosen))}


def _make_tokenizer(rng: random.Random) -> Files:
    files = {n: (CHECKPOINT / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")}
    chosen = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    raw = _file(chosen)
    if chosen == "tokenizer.json" and rng.random() < 0.7:
        # Most of the file is vocabulary; what is few is changed more often.
        model = {k: v for k, v in raw["model"].items() if k not in ("vocab", "merges")}
        few = changed(rng, {**raw, "model": model, "added_tokens": raw["added_tokens"][:3]})
        if isinstance(few, dict) and isinstance(few.get("model"), dict):
            few["model"] = {**{k: raw["model"][k] for k in ("vocab", "merges")}, **few["model"]}
        return files | {chosen: json.dumps(few).encode("utf-8", "surrogatepass")}
    return files | {chosen: json_of(rng, raw)}


KINDS = {
    **PROMPT_KINDS,
    "configs": Kind(_make_config, _use_config),
    "tokenizers": Kind(_make_tokenizer, _use_tokenizer),
    "templates": Kind(_make_template, _use_template),
    "journals": Kind(
        lambda rng: {
            "in.jsonl": b'{"a": 1}\n{"a": 2}\n{"a": 3}\n',
            "out.jsonl.partial": damaged(rng, journal()),
        },
        _use_journal,
    ),
    "checkpoints": Kind(_make_checkpoint, _use_checkpoint),
}
