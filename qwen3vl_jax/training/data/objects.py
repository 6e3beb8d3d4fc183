"""Grounding: fills the tags <ref-object> and <bbox> of a record's texts from its "objects".

{"objects": {"ref": [..], "bbox": [..]}}, as in ms-swift: each <ref-object> is the next name, each <bbox>
the next box. Boxes are written in Qwen3-VL's form, [x1, y1, x2, y2] from 0 to 1000 over the image; two
numbers are a point.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.messages import MediaSource, read_item

_TAG = re.compile(r"(?<!\\)<(ref-object|bbox)>")
_LITERAL = re.compile(r"\\(<(?:ref-object|bbox)>)")
_TEXTS = ("content", "reasoning_content", "thinking", "reasoning")
_KEYS = {"ref-object": "ref", "bbox": "bbox"}
_TYPES = {"real": "pixels", "norm1": "norm1", "norm1000": "norm1000"}
_TOP = 1000


def with_objects(
    messages: Sequence[dict[str, Any]], objects: Any, boxes: str
) -> list[dict[str, Any]]:
    """Messages with filled tags. boxes: "pixels" or "norm1000", if objects has no bbox_type.

    Images whose size is needed are read, once. Raises InputError for tags without an object, objects
    without a tag, and boxes that are not two or four numbers inside their image.
    """
    objects = {} if objects is None else objects
    known = ("ref", "bbox", "bbox_type", "image_id")
    if not isinstance(objects, Mapping) or not set(objects) <= set(known):
        found = ", ".join(objects) if isinstance(objects, Mapping) else type(objects).__name__
        raise InputError(f"objects: found {found}, expected an object of {', '.join(known)}")
    refs, messages = _listed(objects, "ref"), [dict(message) for message in messages]
    if not all(isinstance(ref, str) for ref in refs):
        raise InputError(f"objects.ref: got {refs!r}, expected a list of texts")
    left = {"ref-object": refs, "bbox": _box_texts(messages, objects, boxes)}

    def fill(found: re.Match[str]) -> str:
        if left[found[1]]:
            return left[found[1]].pop(0)
        raise InputError(
            f"a {found[0]} without an entry of objects.{_KEYS[found[1]]} left for it; a tag that is "
            f"meant as text has a backslash in front of it: \\{found[0]}"
        )

    def filled(given: Any) -> Any:
        """A text, the texts of a list of content items, or anything else as it is."""
        if isinstance(given, str):
            return _LITERAL.sub(r"\1", _TAG.sub(fill, given))
        if isinstance(given, list):
            return [filled(item) for item in given]
        has_text = isinstance(given, Mapping) and "text" in given
        return {**given, "text": filled(given["text"])} if has_text else given

    for message in messages:
        message |= {key: filled(message[key]) for key in _TEXTS if key in message}
    for tag, rest in left.items():
        if rest:
            raise InputError(f"objects.{_KEYS[tag]}: {len(rest)} more than there are <{tag}> tags")
    return messages


def _listed(objects: Mapping[str, Any], name: str) -> list[Any]:
    given = objects.get(name) or []
    if not isinstance(given, (list, tuple)):
        raise InputError(f"objects.{name}: got {type(given).__name__}, expected a list")
    return list(given)


def _box_texts(
    messages: Sequence[dict[str, Any]], objects: Mapping[str, Any], boxes: str
) -> list[str]:
    """Each box in Qwen3-VL's form. An image read for its size replaces its path in the messages."""
    given, ids = _listed(objects, "bbox"), _listed(objects, "image_id")
    kind = objects.get("bbox_type") or next(k for k, v in _TYPES.items() if v == boxes)
    if not isinstance(kind, str) or kind not in _TYPES:
        raise InputError(f"objects.bbox_type: got {kind!r}, expected {', '.join(_TYPES)}")
    ids += [0] * (len(given) - len(ids))
    contents = {
        f"message {number}": content
        for number, message in enumerate(messages, 1)
        if isinstance(content := message.get("content"), list)
    }
    # (content, index in it, image)
    places: list[tuple[list[Any], int, MediaSource]] = []
    for where, items in contents.items() if given or ids else ():
        for i, item in enumerate(items):
            found: list[MediaSource] = []
            read_item(item, found, where)
            places += [(items, i, image) for image in found if image.kind == "image"]
    sizes: dict[int, tuple[int, int]] = {}
    for number, at in enumerate(ids, 1):
        if type(at) is not int or not 0 <= at < len(places) or number > len(given):
            raise InputError(
                f"objects.image_id: got {ids}, expected for each of {len(given)} boxes which of "
                f"{len(places)} image(s) it lies in, from 0"
            )
        if _TYPES[kind] == "pixels" and at not in sizes:
            items, i, image = places[at]
            picture = load_image(image.source)
            items[i] = {**image.settings, "type": "image", "image": picture}
            sizes[at] = picture.size
    fixed = (1, 1) if kind == "norm1" else (_TOP, _TOP)
    return [_box(box, sizes.get(at, fixed), kind) for box, at in zip(given, ids, strict=True)]


def _box(box: Any, size: tuple[int, int], kind: str) -> str:
    numbers = list(box) if isinstance(box, (list, tuple)) else []
    plain = all(type(x) in (int, float) and abs(x) <= 1e9 for x in numbers)
    if len(numbers) not in (2, 4) or not plain:
        raise InputError(f"objects.bbox: got {box!r}, expected [x1, y1, x2, y2] or [x, y]")
    out = [round(x / size[i % 2] * _TOP) for i, x in enumerate(numbers)]
    if min(out) < 0 or max(out) > _TOP or (len(out) == 4 and (out[0] > out[2] or out[1] > out[3])):
        inside = f"{size[0]} x {size[1]} pixels" if _TYPES[kind] == "pixels" else f"0 to {size[0]}"
        raise InputError(
            f"objects.bbox: got {box!r}, expected two corners inside {inside}; the source's boxes (or "
            "bbox_type) says what they count"
        )
    return str(out)
