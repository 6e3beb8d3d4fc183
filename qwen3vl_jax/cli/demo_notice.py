"""What the bundled checkpoint says of itself to those who ask it without --ckpt."""

import re
from collections.abc import Sequence

import numpy as np

from qwen3vl_jax.storage.json_text import read_json_file
from qwen3vl_jax.storage.paths import BUNDLED

# At least this share of an image of digits is within so many levels of its paper.
PAPER, NEAR = 0.5, 40


def notice(question: str | None, images: Sequence[np.ndarray] = (), bundled: str = "") -> str:
    """One line: what the checkpoint knows, and whether the question or an image is something else.

    question: None where it is not known yet; images: uint8 [H W 3]; bundled: the name of our own.
    """
    found = []
    if not all(map(shows_digits, images)):
        found.append("the image is none of digits")
    if len(images) > 1:
        found.append(f"it has learned one image a conversation, these are {len(images)}")
    if question is not None and not knows(question):
        found.append("the question is none that it has learned")
    wrong = f" ({' and '.join(found)}: expect a wrong answer)" if found else ""
    asked = f' about {bundled}: "{question}"' if bundled else ""
    return (
        f"no --ckpt: the bundled demo answers{asked}; it knows handwritten digits and nothing else{wrong}, "
        "--ckpt takes a real checkpoint, as Qwen/Qwen3-VL-2B-Instruct"
    )


def shows_digits(image: np.ndarray) -> bool:
    """Whether most of an image has one colour, as the paper of digits has and no photograph."""
    levels = image.reshape(-1, image.shape[-1]).astype(np.int16)
    away = np.abs(levels - np.median(levels, axis=0)).max(axis=1)
    return bool((away < NEAR).mean() >= PAPER)


def knows(question: str) -> bool:
    """Whether it is one of the wordings that the checkpoint was trained on, of any digit."""
    words = read_json_file(BUNDLED / "demo" / "wordings.json", "wordings.json", dict)
    digit = f"(?:{'|'.join(['[0-9]', *words.pop('one'), *words.pop('many')])})"
    del words["reverse"]
    asked = " ".join(question.split()).lower()
    patterns = (re.escape(wording.lower()) for kind in words.values() for wording in kind)
    return any(re.fullmatch(re.sub(r"\\{\w+\\}", digit, x), asked) for x in patterns)
