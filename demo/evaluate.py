"""How well the demo checkpoint reads held-out digits: ``python -m demo.evaluate``.

500 images are composed from scans that training never saw, asked about in random wordings, and
answered greedily through the project's own processor and generate. With ``--clips`` 300 videos are
shown too, and asked at which second a digit appears.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from demo import films, pictures, scans, tasks
from demo.examples import CHECKPOINT

SEED, LOOSE = 2026, 0.4
CLIPS = 300
ROWS = 50  # questions answered together
MAX_NEW_TOKENS = {"read": 64, "count": 8, "find": 320, "when": 16}
FIGURES = {
    "read": "digits read",
    "count": "counts right",
    "find": "boxes found",
    "when": "appearances timed",
}
BOUNDS = {
    "digits read": 0.97,
    "counts right": 0.90,
    "boxes found": 0.90,
    "appearances timed": 0.90,
}


@dataclass(frozen=True)
class Exam:
    """One question about one held-out image, or about a video that ends with it."""

    picture: pictures.Picture
    turn: tasks.Turn
    film: films.Film | None = None


@dataclass
class Score:
    """Hits out of a number of trials; ``note`` says what else was seen."""

    right: int = 0
    total: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.right / max(self.total, 1)


def compose(count: int, seed: int = SEED) -> list[Exam]:
    """Compose ``count`` images of held-out scans and their questions.

    Each is counted in and searched; those with a full grid are read too. Scans are drawn as they
    are, without the bending that training images get.
    """
    rng = np.random.default_rng(seed)
    exams = []
    for _ in range(count):
        loose = bool(rng.random() < LOOSE)
        image = pictures.compose(rng, scans.load("held_out"), loose=loose)
        kinds = ("read", "count", "find") if image.full else ("count", "find")
        exams += [Exam(image, tasks.ask(rng, image, kind)) for kind in kinds]
    return exams


def compose_clips(count: int, seed: int = SEED) -> list[Exam]:
    """Compose ``count`` videos of held-out scans, and ask each when a digit appears."""
    rng = np.random.default_rng((seed, 1))
    shown = [films.compose(rng, scans.load("held_out")) for _ in range(count)]
    return [Exam(film.pairs[-1], tasks.ask_when(rng, film), film) for film in shown]


def conversation(exam: Exam) -> list[dict[str, Any]]:
    """The exam as one user message: image or video, then question."""
    seen: dict[str, Any] = {"type": "image", "image": exam.picture.pixels}
    if film := exam.film:
        seen = {"type": "video", "video": film.frames, "video_metadata": {"fps": film.fps}}
    content = [seen, {"type": "text", "text": exam.turn.question}]
    return [{"role": "user", "content": content}]


def answer(params, proc, exams: list[Exam], rows: int = ROWS) -> Iterator[tuple[Exam, str]]:
    """Answer exams greedily, ``rows`` at a time, each kind by itself; yields them as they come."""
    import qwen3vl_jax as q3

    for kind, limit in MAX_NEW_TOKENS.items():
        waiting = [exam for exam in exams if exam.turn.kind == kind]
        for start in range(0, len(waiting), rows):
            part = waiting[start : start + rows]
            batch = proc([conversation(exam) for exam in part])
            out = q3.generate(
                params, proc.config, batch, max_new_tokens=limit, stop_ids=proc.stop_ids
            )
            for exam, tokens, length in zip(part, out.tokens, out.lengths, strict=True):
                yield exam, proc.decode(tokens[:length])


def score(answers: list[tuple[Exam, str]]) -> dict[str, Score]:
    """The figures of BOUNDS over answered exams; that of videos only if there are some."""
    kinds = {exam.turn.kind for exam, _ in answers}
    scores = {name: Score() for kind, name in FIGURES.items() if kind in kinds or kind != "when"}
    marks = {"read": read, "count": count, "find": find, "when": count}
    for exam, text in answers:
        right, total = marks[exam.turn.kind](exam, text)
        result = scores[FIGURES[exam.turn.kind]]
        result.right, result.total = result.right + right, result.total + total
        if right < total:
            result.wrong.append(f"{exam.turn.question} {text!r}, not {exam.turn.answer!r}")
    return scores


def read(exam: Exam, text: str) -> tuple[int, int]:
    """Digits that stand in the right row and column of the answer, and digits in the image."""
    rows = [line.split() for line in text.strip().split("\n")]
    truth = exam.picture.labels.reshape(exam.picture.grid)
    right = sum(
        found == str(digit)
        for line, digits in zip(rows, truth, strict=False)
        for found, digit in zip(line, digits, strict=False)
    )
    return right, truth.size


def count(exam: Exam, text: str) -> tuple[int, int]:
    """Whether the answer is the number, or the second, as (0 or 1, 1)."""
    return int(text.strip() == exam.turn.answer), 1


def find(exam: Exam, text: str) -> tuple[int, int]:
    """Digits asked for that some box of the answer covers with IoU over 0.5, and their number.

    A box serves one digit.
    """
    truth = tasks.relative_boxes(exam.picture)[exam.picture.labels == exam.turn.digit]
    try:
        found = [item["bbox_2d"] for item in json.loads(text)]
        boxes = np.array(found, float).reshape(len(found), 4)
    except (ValueError, KeyError, TypeError):
        boxes = np.zeros((0, 4))
    overlap = iou(truth, boxes)
    right = 0
    while overlap.size and overlap.max() > 0.5:
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[i], overlap[:, j] = 0, 0
        right += 1
    return right, len(truth)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x0 y0 x1 y1: [n, 4] and [m, 4] to [n, m]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return both / np.maximum(area_a[:, None] + area_b[None] - both, 1e-9)


def table(scores: dict[str, Score], title: str):
    """The figures against their bounds, as a rich table."""
    from rich.table import Table

    out = Table("figure", "right", "of", "share", "bound", "", title=title)
    for name, result in scores.items():
        bound = BOUNDS[name]
        met = "met" if result.share >= bound else "missed"
        share, bound_text = f"{result.share:.1%}", f"at least {bound:.0%}"
        out.add_row(name, str(result.right), str(result.total), share, bound_text, met)
    return out


def main(arguments: list[str] | None = None) -> int:
    """Compose, ask, score and print; the exit code is 1 if a bound is missed."""
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description="Accuracy of the demo on held-out digits.")
    parser.add_argument("--ckpt", default=str(CHECKPOINT), help="a checkpoint of the demo")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument(
        "--clips", type=int, nargs="?", const=CLIPS, default=0, help="also show so many videos"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--wrong", action="store_true", help="print the answers that were wrong")
    args = parser.parse_args(arguments)
    from qwen3vl_jax.runtime.console import one_line_errors

    with one_line_errors():
        start = time.perf_counter()
        proc, params = load(args.ckpt)
        exams = compose(args.pictures, args.seed) + compose_clips(args.clips, args.seed)
        console = Console()
        told = track(answer(params, proc, exams), "answering", len(exams), console=console)
        scores = score(list(told))
    for result in scores.values() if args.wrong else ():
        for line in result.wrong:
            console.print(line, markup=False, highlight=False)
    seconds = time.perf_counter() - start
    shown = f"{args.pictures} held-out images" + f" and {args.clips} videos" * bool(args.clips)
    title = f"{shown}, {len(exams)} questions, {seconds:.0f} s"
    console.print(table(scores, title))
    return int(any(result.share < BOUNDS[name] for name, result in scores.items()))


def load(ckpt: str | Path):
    """(processor, float32 parameters) of a checkpoint directory."""
    import qwen3vl_jax as q3

    proc = q3.Processor.from_pretrained(ckpt)
    params, _ = q3.load(ckpt, dtype="float32")
    return proc, params


if __name__ == "__main__":
    sys.exit(main())
