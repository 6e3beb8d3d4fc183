"""The conversations of the embedding model and the reranker."""

import clips
import pytest
import toy_checkpoint as toy
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.retrieval_prompts import (
    document,
    embed_conversation,
    rerank_conversation,
    yes_no_ids,
)


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    return Processor.from_pretrained(toy.save(tmp_path_factory.mktemp("toy")))


SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
FILM = "<|vision_start|><|video_pad|><|vision_end|>"


def test_embedding_prompts(proc):
    """The rendered text: instruction with its full stop, clips before pictures before text."""
    for thing, instruction, told, shown in (
        ({"text": "a cat"}, None, "Represent the user's input.", "a cat"),
        ({}, "Find cats ", "Find cats.", "NULL"),
        ({"text": ["a", "b"], "image": "x.png"}, "Which?", "Which?", SEEN + "ab"),
        ({"image": ["x", "y"], "video": "z.mp4"}, "\u3002", "\u3002", FILM + SEEN + SEEN),
    ):
        expected = (
            f"<|im_start|>system\n{told}<|im_end|>\n<|im_start|>user\n{shown}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert proc.render(embed_conversation(thing, instruction)) == expected
    (item,) = embed_conversation({"image": "x.png"})[1]["content"]
    assert (item["min_pixels"], item["max_pixels"]) == (4096, 1843200)
    (item,) = embed_conversation({"video": "x.mp4"})[1]["content"]
    assert {k: v for k, v in item.items() if k not in ("type", "video")} == {
        "fps": 1.0,
        "max_frames": 64,
    }
    (item,) = embed_conversation({"video": [["0.png", "1.png"]]})[1]["content"]
    assert item["total_pixels"] == 7864320 and item["video"] == ["0.png", "1.png"]


def test_reranker_prompts(proc):
    judge = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".'
    )
    default = "Given a search query, retrieve relevant candidates that answer the query."
    text = proc.render(rerank_conversation({"text": "q"}, {"image": "d.png", "text": "t"}))
    assert text == (
        f"<|im_start|>system\n{judge}<|im_end|>\n<|im_start|>user\n<Instruct>: {default}<Query>:q\n"
        f"<Document>:{SEEN}t<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "<Instruct>: mine<Query>:NULL\n<Document>:NULL" in proc.render(
        rerank_conversation({}, {}, "mine")
    )
    with pytest.raises(InputError, match="thing: got list, expected an object"):
        embed_conversation(["a"])
    with pytest.raises(InputError, match="document: key 'txt'"):
        rerank_conversation({"text": "q"}, {"txt": "d"})


def test_yes_and_no(proc):
    class Words:
        def encode(self, text, mark):
            return {"yes": [7], "no": [9]}[text]

    assert yes_no_ids(Words()) == (7, 9)
    with pytest.raises(InputError, match="not a reranker"):
        yes_no_ids(proc.tokenizer)


def test_documents(tmp_path):
    """Of a command line: long text is text, and files are told apart by what they hold."""
    long = "a b " * 200
    assert document(long) == {"text": long} and document("x.png") == {"text": "x.png"}
    assert document("a\0b") == {"text": "a\0b"}
    film = str(clips.write(tmp_path / "film.mp4", clips.bars(4)).rename(tmp_path / "film.png"))
    assert document(film) == {"video": film}
    picture = str(tmp_path / "picture.mp4")
    Image.new("L", (9, 9)).save(picture, "PNG")
    assert document(picture) == {"image": picture}
