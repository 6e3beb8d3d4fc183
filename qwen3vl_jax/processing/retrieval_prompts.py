"""Conversations of Qwen3-VL-Embedding and Qwen3-VL-Reranker, in the form of their training.

Source: the Qwen3-VL-Embedding repository (its two model wrappers), whose limits these are too.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.image_loading import is_image
from qwen3vl_jax.processing.media import STORED, open_source

REPRESENT = "Represent the user's input."
RETRIEVE = "Given a search query, retrieve relevant candidates that answer the query."
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
TOKEN = 32 * 32  # pixels of a token
IMAGE = {"min_pixels": 4 * TOKEN, "max_pixels": 1800 * TOKEN}
VIDEO = {"fps": 1.0, "max_frames": 64}
FRAMES = {"total_pixels": 10 * 768 * TOKEN}
KEYS = ("video", "image", "text")  # the order in which a thing's parts are shown


def embed_conversation(
    thing: Mapping[str, Any], instruction: str | None = None
) -> list[dict[str, Any]]:
    """Messages whose last token represents a thing {text, image, video}, each one or a list.

    instruction says what for; a full stop is added where it ends without punctuation. An empty thing is
    "NULL". Raises InputError for other keys.
    """
    instruction = (instruction or "").strip() or REPRESENT
    if not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    return [
        {"role": "system", "content": [_text(instruction)]},
        {"role": "user", "content": _parts("thing", thing)},
    ]


def rerank_conversation(
    query: Mapping[str, Any], document: Mapping[str, Any], instruction: str | None = None
) -> list[dict[str, Any]]:
    """Messages to which "yes" or "no" says whether a document answers a query, both {text, image, video}.

    Raises InputError for other keys.
    """
    content = [
        _text("<Instruct>: " + (instruction or RETRIEVE)),
        _text("<Query>:"),
        *_parts("query", query),
        _text("\n<Document>:"),
        *_parts("document", document),
    ]
    return [{"role": "system", "content": [_text(JUDGE)]}, {"role": "user", "content": content}]


def document(given: str) -> dict[str, Any]:
    """A thing from a command line: a file of an image or else of a video; other text is text."""
    # Nor is a text too long for a file's name.
    if not STORED.match(given) and not os.path.isfile(given):
        return {"text": given}
    with open_source(given).open() as file:
        return {"image" if is_image(file) else "video": given}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _parts(name: str, thing: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(thing, Mapping) or (unknown := [key for key in thing if key not in KEYS]):
        found = (
            f"key {unknown[0]!r}" if isinstance(thing, Mapping) else f"got {type(thing).__name__}"
        )
        raise InputError(f"{name}: {found}, expected an object with {', '.join(KEYS)}")
    found = []
    for key, limits in zip(KEYS, (VIDEO, IMAGE, {}), strict=True):
        given = thing.get(key)
        given = [] if given is None else given
        several = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
        for one in given if several else [given]:
            is_list = not isinstance(one, (str, bytes, os.PathLike))
            own = FRAMES if key == "video" and is_list else limits
            found.append({"type": key, key: one, **own})
    return found or [_text("NULL")]


def yes_no_ids(tokenizer: Any) -> tuple[int, int]:
    """Ids of the tokens "yes" and "no". Raises InputError where they are not one token each."""
    pair = tuple(tokenizer.encode(word, "") for word in ("yes", "no"))
    if any(len(ids) != 1 for ids in pair):
        raise InputError('the tokenizer has no single tokens "yes" and "no": not a reranker\'s')
    return pair[0][0], pair[1][0]
