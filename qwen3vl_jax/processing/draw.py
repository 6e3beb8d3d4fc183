"""Draws the boxes and points of an answer on the picture it speaks of."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.chat import read_conversation
from qwen3vl_jax.processing.pictures import load_image

GRID = 1000  # answers count from 0 to 1000 across each side, x before y (reference section 6.10)
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


@dataclasses.dataclass(frozen=True)
class Mark:
    """A box (x1, y1, x2, y2) or a point (x, y) on the 0-1000 grid, and its label."""

    place: tuple[float, ...]
    label: str


def find_marks(text: str) -> list[Mark]:
    """The bbox_2d and point_2d entries of an answer, in order; other text around them is ignored.

    Reads whole JSON (plain or in a code fence) and, of an answer that was cut off, the objects that
    are complete.
    """
    marks = []
    for match in re.finditer(r"\{[^{}]*\}", text):
        try:
            item = json.loads(match[0])
        except ValueError:
            continue
        for key, size in (("bbox_2d", 4), ("point_2d", 2)):
            place = item.get(key)
            if isinstance(place, list) and len(place) == size and all(map(_number, place)):
                marks.append(Mark(tuple(place), str(item.get("label", ""))))
    return marks


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def draw_marks(image: Image.Image, marks: list[Mark]) -> Image.Image:
    """A copy of the picture with every mark drawn, one colour a label."""
    image = image.convert("RGB")
    if min(image.size) < 256:  # small pictures are enlarged, or lines and labels would hide them
        factor = -(-256 // min(image.size))
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    pen, width = ImageDraw.Draw(image), max(2, min(image.size) // 200)
    font = ImageFont.load_default(size=max(12, min(image.size) // 40))
    labels = list(dict.fromkeys(mark.label for mark in marks))
    for mark in marks:
        color = COLORS[labels.index(mark.label) % len(COLORS)]
        x, y = (
            [v / GRID * side for v in mark.place[axis::2]] for axis, side in enumerate(image.size)
        )
        if len(x) == 1:
            r = 3 * width
            pen.ellipse((x[0] - r, y[0] - r, x[0] + r, y[0] + r), fill=color, outline="white")
        else:
            pen.rectangle((min(x), min(y), max(x), max(y)), outline=color, width=width)
        if mark.label:
            corner = (min(x) + width, min(y) + width)
            pen.rectangle(pen.textbbox(corner, mark.label, font=font), fill=color)
            pen.text(corner, mark.label, fill="white", font=font)
    return image


def draw_answer(out: Path, messages: list[dict], text: str, beside: list[str]) -> None:
    """Draws the answer's marks on each picture of the conversation: OUT.png, OUT-2.png, ..

    beside: files of pictures without a source. Raises InputError for a file that cannot be written.
    """
    marks, feed = find_marks(text), iter(beside)
    if not marks:
        print("--draw: the answer holds no bbox_2d or point_2d; nothing is drawn", file=sys.stderr)
        return
    pictures = [m for m in read_conversation(messages)[1] if m.kind == "image"]
    for number, medium in enumerate(pictures, 1):
        name = out if number == 1 else out.with_stem(f"{out.stem}-{number}")
        source = next(feed) if medium.source is None else medium.source
        try:
            _save(draw_marks(load_image(source), marks), name)
        except OSError as e:
            raise InputError(f"--draw {name}: cannot write ({e.strerror or e})") from e
        print(f"drew {len(marks)} marks on {name}", file=sys.stderr)


def _save(image: Image.Image, name: Path) -> None:
    """Writes a picture in the format that its name says."""
    made, format = io.BytesIO(), Image.registered_extensions()[name.suffix.lower()]
    image.save(made, format)
    name.write_bytes(made.getvalue())
