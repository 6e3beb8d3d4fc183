"""Conversations of Qwen3-VL-Embedding and Qwen3-VL-Reranker, in the form of their training.

Source: the Qwen3-VL-Embedding repository (its two model wrappers), whose limits these are too.
"""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.image_loading import is_image
from qwen3vl_jax.processing.media import STORED, open_source

Thing = Mapping[str, Any]  # {text, image, video}, each one or a list
Items = list[dict[str, Any]]
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


def embed_conversation(thing: Thing, instruction: str | None = None) -> Items:
    """Messages whose last token represents a thing {text, image, video}, each one or a list."""
    instruction = (instruction or "").strip() or REPRESENT
    if not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    return [
        {"role": "system", "content": [_text(instruction)]},
        {"role": "user", "content": _parts("thing", thing)},
    ]


def rerank_conversation(query: Thing, document: Thing, instruction: str | None = None) -> Items:
    """Messages that ask whether a document answers a query, as things {text, image, video}."""
    content = [_text(f"<Instruct>: {instruction or RETRIEVE}"), _text("<Query>:")]
    content += [*_parts("query", query), _text("\n<Document>:"), *_parts("document", document)]
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


def _parts(name: str, thing: Thing) -> Items:
    expected = f"expected an object with {', '.join(KEYS)}"
    if not isinstance(thing, Mapping):
        raise InputError(f"{name}: got {type(thing).__name__}, {expected}")
    if unknown := [key for key in thing if key not in KEYS]:
        raise InputError(f"{name}: key {unknown[0]!r}, {expected}")
    found = []
    for key, limits in zip(KEYS, (VIDEO, IMAGE, {}), strict=True):
        given = [] if thing.get(key) is None else thing[key]
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
