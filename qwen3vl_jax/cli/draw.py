"""--draw: draws the boxes and points of an answer on its images."""

import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.media import load_image
from qwen3vl_jax.processing.messages import read_conversation
from qwen3vl_jax.storage.json_text import read_json_at

GRID = 1000  # coordinates are from 0 to 1000 across each side, x before y
SIZES = {"bbox_2d": 4, "point_2d": 2}
LABEL = 80  # most characters of a label that are drawn
_KEY = re.compile(r"""["'](?:bbox|point)_2d["']\s*:""")
_BACKSLASH = re.compile(r'(\\["\\/nrt]|\\u[0-9a-fA-F]{4})|\\')
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


@dataclasses.dataclass(frozen=True)
class Mark:
    """A box (x1, y1, x2, y2) or a point (x, y) on the 0-1000 grid, and its label."""

    place: tuple[float, ...]
    label: str


def read_marks(text: str) -> tuple[list[Mark], int]:
    """The bbox_2d and point_2d entries of an answer, in order, and how many could not be read.

    Reads the JSON in a text, plain or in a code fence; of an answer cut off, the complete objects.
    """
    # Labels in TeX have backslashes that JSON does not know.
    text = _BACKSLASH.sub(lambda found: found[1] or r"\\", text)
    marks: list[Mark] = []
    at, unread = 0, 0
    while at < len(text):
        begin = text.find("{", at)
        begin = len(text) if begin < 0 else begin
        unread += len(_KEY.findall(text, at, begin))
        try:
            found, at = read_json_at(text, begin)
        except InputError:
            at = begin + 1
            continue
        for place, label in _entries(found):
            marks += [Mark(tuple(p), label) for p in place or ()]
            unread += not place
    return marks, unread


def _entries(found: Any) -> Iterator[tuple[list[list[float]] | None, str]]:
    """(places, label) of each entry in JSON data; None for places that cannot be read."""
    if isinstance(found, list):
        for each in found:
            yield from _entries(each)
    elif isinstance(found, dict):
        label = "" if (given := found.get("label")) is None else str(given)
        for key, value in found.items():
            if key not in SIZES:
                yield from _entries(value)
                continue
            is_list = isinstance(value, list) and value and isinstance(value[0], list)
            several = value if is_list else [value]
            lists = all(isinstance(p, list) and len(p) == SIZES[key] for p in several)
            is_right = lists and all(type(x) in (int, float) for p in several for x in p)
            yield several if is_right else None, label


def draw_marks(image: Image.Image, marks: list[Mark]) -> Image.Image:
    """A copy of the image with all marks, one colour a label."""
    image = image.convert("RGB")
    # Small images are enlarged, or lines and labels would hide them.
    factor = -(-256 // min(image.size))
    if factor > 1:
        image = ImageOps.scale(image, factor, Image.Resampling.NEAREST)
    pen, width = ImageDraw.Draw(image), max(2, min(image.size) // 200)
    font = ImageFont.load_default(size=max(12, min(image.size) // 40))
    labels = {label: n for n, label in enumerate(dict.fromkeys(mark.label for mark in marks))}
    for mark in marks:
        color = COLORS[labels[mark.label] % len(COLORS)]
        place = [min(max(v, -GRID), 2 * GRID) / GRID for v in mark.place]
        x, y = ([v * side for v in place[axis::2]] for axis, side in enumerate(image.size))
        if len(x) == 1:
            r = 3 * width
            pen.ellipse((x[0] - r, y[0] - r, x[0] + r, y[0] + r), fill=color, outline="white")
        else:
            pen.rectangle((min(x), min(y), max(x), max(y)), outline=color, width=width)
        if label := mark.label[:LABEL]:
            corner = (min(x) + width, min(y) + width)
            pen.rectangle(pen.textbbox(corner, label, font=font), fill=color)
            pen.text(corner, label, fill="white", font=font)
    return image


def images_of(messages: list[dict], beside: list[str]) -> list[Image.Image]:
    """The images of a conversation; beside: files, for content items without a source."""
    feed = iter(beside)
    media = [m for m in read_conversation(messages)[1] if m.kind == "image"]
    return [load_image(next(feed) if m.source is None else m.source) for m in media]


def pixel_marks(text: str, image: Image.Image) -> list[dict[str, Any]]:
    """The boxes and points of an answer in an image's pixels: {"bbox_2d" or "point_2d", "label"}."""
    names = {size: name for name, size in SIZES.items()}
    sides = [side / GRID for side in image.size * 2]
    return [
        {names[len(m.place)]: [round(v * k, 2) for v, k in zip(m.place, sides)], "label": m.label}
        for m in read_marks(text)[0]
    ]


def draw_answer(out: Path, messages: list[dict], text: str, beside: list[str]) -> None:
    """Draws the answer's marks on each image: OUT.png, OUT-2.png, ..; beside: files without a source."""
    marks, unread = read_marks(text)
    outside = sum(not all(0 <= v <= GRID for v in mark.place) for mark in marks)
    notes = []
    if unread:
        why = "not JSON, cut off, or no numbers"
        notes += [f"{unread} entries of the answer cannot be read ({why}); they are not drawn"]
    if outside:
        notes += [f"{outside} marks reach outside the image, expected coordinates from 0 to {GRID}"]
    if not marks:
        notes += ["the answer holds no bbox_2d or point_2d; nothing is drawn"]
    for note in notes:
        print(f"--draw: {note}", file=sys.stderr)
    if not marks:
        return
    for number, image in enumerate(images_of(messages, beside), 1):
        name = out if number == 1 else out.with_stem(f"{out.stem}-{number}")
        try:
            made, form = io.BytesIO(), Image.registered_extensions()[name.suffix.lower()]
            draw_marks(image, marks).save(made, form)
            name.write_bytes(made.getvalue())
        except OSError as e:
            raise InputError(f"--draw {name}: cannot write ({e.strerror or e})") from e
        print(f"drew {len(marks)} marks on {name}", file=sys.stderr)
