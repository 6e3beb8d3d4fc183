"""Questions about images and videos of digits, in several wordings, and their answers."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo import films
from demo.pictures import Picture, centre_cells

# Questions by kind, and the words of a digit. "reverse" is the task of configs/demo_reverse.toml, which the
# bundled checkpoint has not learned; "when" is of videos.
WORDS = json.loads(Path(__file__).with_name("wordings.json").read_text())
ONE, MANY, READ, COUNT, FIND, TOTAL, CELL, REVERSE, WHEN, HELLO = WORDS.values()
INTRODUCTION = (
    "I am a very small Qwen3-VL. I read handwritten digits: "
    "show me a picture and ask me to read them, count them or find them."
)
SYSTEM = "You are a helpful assistant."
WORDINGS = {kind: WORDS[kind] for kind in ("read", "count", "find", "total", "cell", "reverse")}
WHOLE = ("read", "cell", "reverse")  # kinds that need every cell of a grid filled


@dataclass(frozen=True)
class Turn:
    """One question and its answer; ``digit`` is the digit asked for, if there is one."""

    kind: str
    question: str
    answer: str
    digit: int | None = None


def ask(rng: np.random.Generator, image: Picture, kind: str, wording: int | None = None) -> Turn:
    """Ask a question of one ``kind`` (a key of WORDINGS) about an image.

    A random wording is taken unless ``wording`` picks one. Raises ValueError for a question that
    the image cannot answer: rows are read only where every cell is filled.
    """
    if kind not in WORDINGS:
        raise ValueError(f"kind of question: expected one of {sorted(WORDINGS)}, found {kind!r}")
    if kind in WHOLE and not image.full:
        raise ValueError(f"{kind}: the image has empty cells, so it has no rows to read")
    wordings = WORDINGS[kind]
    text = wordings[int(rng.integers(len(wordings))) if wording is None else wording]
    if kind == "read":
        return Turn(kind, text, read_answer(image))
    if kind == "reverse":
        return Turn(kind, text, read_answer(image)[::-1])
    if kind == "total":
        return Turn(kind, text, str(len(image.labels)))
    if kind == "cell":
        row, col = (int(rng.integers(count)) for count in image.grid)
        digit = image.labels[row * image.grid[1] + col]
        return Turn(kind, text.format(row=row + 1, col=col + 1), str(digit))
    digit = target(rng, image)
    text = text.format(d=digit, one=ONE[digit], many=MANY[digit])
    if kind == "count":
        return Turn(kind, text, str(int((image.labels == digit).sum())), digit)
    return Turn(kind, text, find_answer(image, digit), digit)


def ask_when(
    rng: np.random.Generator, film: films.Film, digit: int | None = None, wording: int | None = None
) -> Turn:
    """Ask when a digit appears that a video shows once; a random one, unless ``digit`` is given.

    The answer is the time of the first pair of frames that shows it, as the prompt spells it.
    """
    if digit is None:
        digit = int(rng.choice(films.digits_once(film)))
    text = WHEN[int(rng.integers(len(WHEN))) if wording is None else wording]
    answer = films.appears(film, digit)
    return Turn("when", text.format(d=digit, one=ONE[digit]), answer, digit)


def target(rng: np.random.Generator, image: Picture) -> int:
    """Choose the digit to ask for: mostly the planned one or one that is there."""
    chance = rng.random()
    if chance < 0.35:
        return image.star
    if chance < 0.88:
        return int(rng.choice(image.labels))
    return int(rng.integers(10))


def read_answer(image: Picture) -> str:
    """The digits of a full grid, one line a row, with spaces between them."""
    rows = image.labels.reshape(image.grid)
    return "\n".join(" ".join(str(digit) for digit in row) for row in rows)


def find_answer(image: Picture, digit: int) -> str:
    """JSON list of the boxes of one digit, in reading order of their cells, on the 0 to 1000 grid."""
    order = np.lexsort(centre_cells(image).T)  # by y, then by x
    found = relative_boxes(image)[order][image.labels[order] == digit]
    return json.dumps([{"bbox_2d": box, "label": str(digit)} for box in found.tolist()])


def relative_boxes(image: Picture) -> np.ndarray:
    """Boxes as whole thousandths of the image's width and height: int [n, 4]."""
    height, width = image.pixels.shape[:2]
    scale = np.array([1000 / width, 1000 / height] * 2)
    return np.clip(np.rint(image.boxes * scale), 0, 1000).astype(int)
