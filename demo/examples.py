"""Conversations about composed images and videos: their tokens, labels and patches, for training."""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from demo import films, pictures, scans, tasks
from demo.films import Film
from demo.pictures import Picture
from qwen3vl_jax.config import IGNORE_INDEX
from qwen3vl_jax.errors import InputError

PATCH, MERGE, CHANNELS, PAIR = 16, 2, 3, 2  # PAIR: frames that share a patch
CHECKPOINT = Path(__file__).with_name("checkpoint")
KINDS = {  # how often each kind of question is asked of a full grid, and of a loose image
    True: {"read": 0.25, "count": 0.25, "find": 0.4, "cell": 0.06, "total": 0.04},
    False: {"count": 0.4, "find": 0.55, "total": 0.05},
}
KINDS_FEW = {
    True: {"read": 0.2, "count": 0.15, "find": 0.65},
    False: {"count": 0.2, "find": 0.8},
}
FEW = ((1, 2), (1, 3), (2, 1), (2, 2), (3, 1))  # grids of the first samples, see make_scene
LOOSE, CHAT, SYSTEM = 0.4, 0.02, 0.05  # chances
MORE, MORE_AFTER_READING = 0.9, 0.3  # of a further turn: after a reading, answers need no eyes
SLOW = 0.5  # chance that a video passes more slowly than those of the evaluation
SLOWEST = 0.8  # frames a second


def make_scene(
    rng: np.random.Generator, pool: scans.Scans, few: bool, clips: float
) -> Picture | Film:
    """An image for training, or with a chance of ``clips`` a video.

    With ``few`` it holds at most four digits and is mostly searched. To find a digit one must compare
    each with the one asked for: among few that pays soon, and is kept afterwards; among many, taking
    the next place in reading order pays more for too long.
    """
    if clips and rng.random() < clips:
        slow = rng.random() < SLOW
        fps = float(rng.uniform(SLOWEST, films.RATE)) if slow else films.RATE
        return films.compose(rng, pool, snap=True, distort=True, fps=fps)
    grid = FEW[int(rng.integers(len(FEW)))] if few else None
    loose = bool(rng.random() < LOOSE)
    return pictures.compose(rng, pool, loose=loose, snap=True, distort=True, grid=grid)


@dataclass(frozen=True)
class Row:
    """One conversation: tokens and labels [t]."""

    ids: list[int]
    labels: list[int]


class Words:
    """The tokenizer of a checkpoint folder; `words_of` keeps one for each."""

    def __init__(self, folder: str):
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        ids: dict[str, int] = self.tokenizer.get_vocab()
        self.image, self.video = ids["<|image_pad|>"], ids["<|video_pad|>"]
        self.nothing = ids["<|vision_pad|>"]
        self.seen = [ids[chr(256 + digit)] for digit in range(10)]  # bytes 0 to 9

    def __call__(self, text: str) -> list[int]:
        return _encode(self.tokenizer, text)


words_of = cache(Words)


@lru_cache(4096)
def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def make_row(
    rng: np.random.Generator,
    words: Words,
    scene: Picture | Film,
    length: int,
    few: bool = False,
) -> Row:
    """Make one conversation of several turns about an image or a video."""
    system = rng.random() < SYSTEM
    ids = words(f"<|im_start|>system\n{tasks.SYSTEM}<|im_end|>\n") if system else []
    ids = ids + words("<|im_start|>user\n")
    row = Row(ids, [IGNORE_INDEX] * len(ids))
    if isinstance(scene, Film):
        return _film_turns(rng, words, scene, _joined(row, _film_seen(words, scene)), length)
    return _turns(rng, words, scene, _joined(row, _seen(words, scene, words.image)), length, few)


def _joined(*rows: Row) -> Row:
    return Row([i for row in rows for i in row.ids], [i for row in rows for i in row.labels])


def _seen(words: Words, image: Picture, placeholder: int) -> Row:
    """The tokens that stand for an image, or for a pair of frames."""
    cells = _contents(words, image)
    ids = [*words("<|vision_start|>"), *[placeholder] * len(cells), *words("<|vision_end|>")]
    return Row(ids, [IGNORE_INDEX, *cells, IGNORE_INDEX])


def _film_seen(words: Words, film: Film) -> Row:
    """The tokens that stand for a video: of each pair of frames its time and its placeholders."""
    rows = []
    for time, pair in zip(films.times(film), film.pairs, strict=True):
        ids = words(f"<{time} seconds>")
        rows += [Row(ids, [IGNORE_INDEX] * len(ids)), _seen(words, pair, words.video)]
    return _joined(*rows)


def _turns(
    rng: np.random.Generator, words: Words, image: Picture, row: Row, length: int, few: bool
) -> Row:
    """Append questions about an image and their answers to a row."""
    odds, more = dict((KINDS_FEW if few else KINDS)[image.full]), 1.0
    tries = 0
    while rng.random() < more:
        turn = _turn(rng, image, odds)
        longer = _joined(row, spoken_row(words, turn, first=more == 1.0))
        if len(longer.ids) > length:
            if more < 1.0:
                break
            tries += 1  # too many boxes for a row: ask something else
            if tries > 100:
                raise InputError(f"length is {length}, too short to ask about an image")
            continue
        row, more = longer, MORE
        if turn.kind == "read":
            odds["read"], more = 0.0, MORE_AFTER_READING
    return row


def _film_turns(rng: np.random.Generator, words: Words, film: Film, row: Row, length: int) -> Row:
    """Append a question about each digit that a video shows once, as long as there is room."""
    for number, digit in enumerate(rng.permutation(films.digits_once(film))):
        turn = tasks.ask_when(rng, film, int(digit))
        longer = _joined(row, spoken_row(words, turn, first=number == 0))
        if len(longer.ids) > length and number == 0:
            raise InputError(f"length is {length}, too short to ask about a video")
        if len(longer.ids) > length:
            break
        row = longer
    return row


def _contents(words: Words, image: Picture) -> list[int]:
    """A name for what each placeholder stands for: the digit centred in its cell, or nothing.

    An answer alone says little about where to look, and training on answers alone stays blind for
    thousands of steps. Naming what stands in each 32 x 32 cell opens the eyes first. The names are
    control characters: under a digit's own token, a place would speak its digit wherever one of
    its coordinates is due.
    """
    _, high, wide = grid_of(image)
    named = np.full((high // MERGE, wide // MERGE), words.nothing)
    for (x, y), digit in zip(pictures.centre_cells(image), image.labels, strict=True):
        named[y, x] = words.seen[digit]
    return named.reshape(-1).tolist()


def _turn(rng: np.random.Generator, image: Picture, odds: dict[str, float]) -> tasks.Turn:
    ends = np.cumsum(list(odds.values()))
    place = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
    return tasks.ask(rng, image, list(odds)[place])


def spoken(words: Words, turn: tasks.Turn, first: bool) -> tuple[list[int], list[int]]:
    """Tokens up to the answer, and of the answer: its text, ``<|im_end|>`` and the newline."""
    start = "" if first else "<|im_start|>user\n"
    asked = words(f"{start}{turn.question}<|im_end|>\n<|im_start|>assistant\n")
    return asked, words(f"{turn.answer}<|im_end|>\n")


def spoken_row(words: Words, turn: tasks.Turn, first: bool) -> Row:
    """The tokens of a turn; its answer is learned, up to ``<|im_end|>``."""
    return _learned(*spoken(words, turn, first))


def _learned(asked: list[int], answered: list[int]) -> Row:
    return Row(asked + answered, [IGNORE_INDEX] * len(asked) + answered[:-1] + [IGNORE_INDEX])


def make_chat(rng: np.random.Generator, words: Words) -> Row:
    """Make a greeting and its answer, without an image."""
    question = tasks.HELLO[int(rng.integers(len(tasks.HELLO)))]
    asked = words(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    answered = words(f"{tasks.INTRODUCTION}<|im_end|>\n")
    return _learned(asked, answered)


def frames_of(scene: Picture | Film) -> np.ndarray:
    """The frames of a video, or an image twice: uint8 [2 * pairs, H, W, 3]."""
    return scene.frames if isinstance(scene, Film) else np.stack([scene.pixels] * PAIR)


def to_patches(frames: np.ndarray) -> np.ndarray:
    """Cut frames uint8 [2 * pairs, H, W, 3] into rows of 2x16x16 pixels: uint8 [patches, 3*2*16*16].

    Rows are in merge order, columns are channel, frame, y, x; sides must be multiples of 32.
    """
    high, wide = (side // (PATCH * MERGE) for side in frames.shape[1:3])
    cut = frames.reshape(-1, PAIR, high, MERGE, PATCH, wide, MERGE, PATCH, CHANNELS)
    return cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, CHANNELS * PAIR * PATCH * PATCH)


def grid_of(scene: Picture | Film) -> tuple[int, int, int]:
    """Pairs of frames, rows and columns of the patches of an image or video."""
    pairs = scene.pairs if isinstance(scene, Film) else (scene,)
    high, wide = pairs[0].pixels.shape[:2]
    return len(pairs), high // PATCH, wide // PATCH
