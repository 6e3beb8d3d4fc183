"""Training batches: composed pictures with conversations about them, as arrays of one fixed shape.

A batch is a pure function of (seed, step), so any number of worker processes give the same run.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer

import qwen3vl_jax as q3
from demo import pictures, scans, tasks
from qwen3vl_jax.errors import InputError

IGNORED = -100  # label of a position that is not learned
PATCH, MERGE, CHANNELS = 16, 2, 3
CHECKPOINT = Path(__file__).with_name("checkpoint")
WINDOW = 256  # patches; a picture has at most as many
KINDS = {  # how often each kind of question is asked of a full grid, and of a loose picture
    True: {"read": 0.25, "count": 0.25, "find": 0.4, "cell": 0.06, "total": 0.04},
    False: {"count": 0.4, "find": 0.55, "total": 0.05},
}
KINDS_FEW = {
    True: {"read": 0.2, "count": 0.15, "find": 0.65},
    False: {"count": 0.2, "find": 0.8},
}
FEW = ((1, 2), (1, 3), (2, 1), (2, 2), (3, 1))  # grids of the first steps, see make_batch
LOOSE, CHAT, SYSTEM = 0.4, 0.02, 0.05  # chances
MORE, MORE_AFTER_READING = 0.9, 0.3  # of a further turn: after a reading, answers need no eyes
SHARED = 2  # rows that talk about the same picture: drawing and encoding it cost once


@dataclass(frozen=True)
class Shape:
    """Static shape of a batch: ``rows`` of ``length`` tokens, ``windows`` of 256 patches."""

    rows: int
    length: int
    windows: int


def make_batch(
    folder: str, part: str, shape: Shape, seed: int, step: int, few: int = 0
) -> q3.Batch:
    """Compose one batch from the scans of ``part`` with the tokenizer and config in ``folder``.

    Pictures are packed into windows, so that attention costs the same whatever their sizes: the
    fields of ``vision`` are [windows, 256, ...] with ranges that count from the window's start, and
    its pixels are uint8 [windows, 256, 3*16*16], one of the two equal frames before normalisation.
    Labels are -100 but on answers and on placeholders (see `_contents`); rows are padded on the
    right. A picture serves SHARED rows.

    Pictures of steps below ``few`` hold at most four digits and are mostly searched. To find a digit
    one must compare each with the one asked for: among few that pays soon, and is kept afterwards;
    among many, taking the next place in reading order pays more for too long.
    """
    rng = np.random.default_rng((seed, step))
    words, config = Words(folder), _config(folder)
    pool = scans.load(part)
    ids = np.full((shape.rows, shape.length), words.pad, np.int32)
    labels = np.full_like(ids, IGNORED)
    mask = np.zeros_like(ids)
    vision_rows = np.full_like(ids, -1)
    windows, grids = Windows(config, shape.windows), []
    picture = start = None
    for i in range(shape.rows):
        if i % SHARED == 0:
            grid = FEW[int(rng.integers(len(FEW)))] if step < few else None
            loose = bool(rng.random() < LOOSE)
            picture = pictures.compose(rng, pool, loose=loose, snap=True, distort=True, grid=grid)
            start = windows.add(to_patches(picture.pixels), grid_of(picture))
        # Without a picture where one is due: rare, the others were large and no window has room.
        if start is None or picture is None or rng.random() < CHAT:
            row = _chat(rng, words)
        else:
            row = make_row(rng, words, picture, shape.length, step < few)
            grids.append(grid_of(picture))
        used = len(row.ids)
        ids[i, :used], labels[i, :used], mask[i, :used] = row.ids, row.labels, 1
        image = ids[i] == words.image
        vision_rows[i, image] = (start or 0) // MERGE**2 + np.arange(image.sum())
    positions, delta = q3.rope_index(config, ids, np.array(grids or np.zeros((0, 3))), None, mask)
    host: list[Any] = [ids, positions, mask, vision_rows, delta]
    return q3.Batch(*host, vision=windows.inputs(), labels=cast(Any, labels))


class Windows:
    """Vision inputs filled picture by picture, each into the first window that has room."""

    def __init__(self, config: q3.Config, count: int):
        self.config, self.used = config, np.zeros(count, int)
        fields = {"pos_index": 4, "pos_weight": 4, "coords": 2, "lo": 0, "hi": 0}
        self.fields = {
            name: np.zeros(
                (count * WINDOW, width) if width else count * WINDOW,
                np.float32 if name == "pos_weight" else np.int32,
            )
            for name, width in fields.items()
        }
        self.pixels = np.zeros((count * WINDOW, CHANNELS * PATCH * PATCH), np.uint8)

    def add(self, patches: np.ndarray, grid: tuple[int, int, int]) -> int | None:
        """Place a picture; its first patch counted over all windows, or None if it does not fit."""
        room = np.flatnonzero(self.used + len(patches) <= WINDOW)
        if not len(room):
            return None
        window, start = int(room[0]), int(self.used[room[0]])
        self.used[window] += len(patches)
        at = window * WINDOW + start
        place = slice(at, at + len(patches))
        self.pixels[place] = patches
        tables = _tables(self.config, grid)
        for name, field in self.fields.items():
            table = getattr(tables, name)
            field[place] = table + start if name in ("lo", "hi") else table
        return at

    def inputs(self) -> q3.VisionInputs:
        """The windows as vision inputs with a leading axis [windows, 256, ...]."""
        cut: dict[str, Any] = {
            name: x.reshape(-1, WINDOW, *x.shape[1:]) for name, x in self.fields.items()
        }
        cut["pixels"] = self.pixels.reshape(-1, WINDOW, self.pixels.shape[1])
        return q3.VisionInputs(**cut)


@lru_cache(256)
def _tables(config: q3.Config, grid: tuple[int, int, int]) -> q3.VisionInputs:
    pixels = np.zeros((int(np.prod(grid)), int(np.prod(config.vision.patch_shape))), np.float32)
    return q3.make_vision(config, pixels, [grid], pad=False)


@dataclass(frozen=True)
class Row:
    """One conversation: tokens and labels [t]."""

    ids: list[int]
    labels: list[int]


class Words:
    """The tokenizer of a checkpoint folder."""

    def __init__(self, folder: str):
        self.tokenizer = _tokenizer(folder)
        ids: dict[str, int] = self.tokenizer.get_vocab()
        self.pad, self.image = ids["<|endoftext|>"], ids["<|image_pad|>"]
        self.nothing = ids["<|vision_pad|>"]
        self.seen = [ids[chr(256 + digit)] for digit in range(10)]  # bytes 0 to 9

    def __call__(self, text: str) -> list[int]:
        return _encode(self.tokenizer, text)


@cache
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


@cache
def _config(folder: str) -> q3.Config:
    return q3.Config.from_hf(folder)


@lru_cache(4096)
def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def make_row(
    rng: np.random.Generator,
    words: Words,
    picture: pictures.Picture,
    length: int,
    few: bool = False,
) -> Row:
    """Make one conversation of several turns about a picture."""
    system = rng.random() < SYSTEM
    ids = words(f"<|im_start|>system\n{tasks.SYSTEM}<|im_end|>\n") if system else []
    ids = ids + words("<|im_start|>user\n<|vision_start|>")
    cells = _contents(words, picture)
    labels = [IGNORED] * len(ids) + cells + [IGNORED]
    ids = ids + [words.image] * len(cells) + words("<|vision_end|>")
    odds, more = dict((KINDS_FEW if few else KINDS)[picture.full]), 1.0
    tries = 0
    while rng.random() < more:
        turn = _turn(rng, picture, odds)
        asked, answered = spoken(words, turn, first=more == 1.0)
        if len(ids) + len(asked) + len(answered) > length:
            if more < 1.0:
                break
            tries += 1  # too many boxes for a row: ask something else
            if tries > 100:
                raise InputError(f"batch.length is {length}, too short to ask about a picture")
            continue
        ids = ids + asked + answered
        labels += [IGNORED] * len(asked) + answered[:-1] + [IGNORED]
        more = MORE
        if turn.kind == "read":
            odds["read"], more = 0.0, MORE_AFTER_READING
    return Row(ids, labels)


def _contents(words: Words, picture: pictures.Picture) -> list[int]:
    """A name for what each placeholder stands for: the digit centred in its cell, or nothing.

    An answer alone says little about where to look, and training on answers alone stays blind for
    thousands of steps. Naming what stands in each 32 x 32 cell opens the eyes first. The names are
    control characters: under a digit's own token, a place would speak its digit wherever one of
    its coordinates is due.
    """
    _, high, wide = grid_of(picture)
    named = np.full((high // MERGE, wide // MERGE), words.nothing)
    for (x, y), digit in zip(pictures.centre_cells(picture), picture.labels, strict=True):
        named[y, x] = words.seen[digit]
    return named.reshape(-1).tolist()


def _turn(
    rng: np.random.Generator, picture: pictures.Picture, odds: dict[str, float]
) -> tasks.Turn:
    ends = np.cumsum(list(odds.values()))
    place = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
    return tasks.ask(rng, picture, list(odds)[place])


def spoken(words: Words, turn: tasks.Turn, first: bool) -> tuple[list[int], list[int]]:
    """Tokens up to the answer, and of the answer: its text, ``<|im_end|>`` and the newline."""
    start = "" if first else "<|im_start|>user\n"
    asked = words(f"{start}{turn.question}<|im_end|>\n<|im_start|>assistant\n")
    return asked, words(f"{turn.answer}<|im_end|>\n")


def _chat(rng: np.random.Generator, words: Words) -> Row:
    question = tasks.HELLO[int(rng.integers(len(tasks.HELLO)))]
    asked = words(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    answered = words(f"{tasks.INTRODUCTION}<|im_end|>\n")
    return Row(asked + answered, [IGNORED] * len(asked) + answered[:-1] + [IGNORED])


def to_patches(pixels: np.ndarray) -> np.ndarray:
    """Cut a picture uint8 [H, W, 3] into rows of 16x16 pixels: uint8 [patches, 3*16*16].

    Rows are in merge order, columns are channel, y, x; sides must be multiples of 32.
    """
    high, wide = (side // (PATCH * MERGE) for side in pixels.shape[:2])
    cut = pixels.reshape(high, MERGE, PATCH, wide, MERGE, PATCH, CHANNELS)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, CHANNELS * PATCH * PATCH)


def grid_of(picture: pictures.Picture) -> tuple[int, int, int]:
    """Frames, rows and columns of a picture's patches."""
    high, wide = picture.pixels.shape[:2]
    return 1, high // PATCH, wide // PATCH
