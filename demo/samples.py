"""The demo's data sources for train.py: endless training samples, and questions about held-out scans.

A recipe names them "python:demo.samples:Train". What stands at an index is a pure function of the seed
and the index, so any number of workers, and a resumed run, see the same.
"""

from functools import cache, lru_cache
from typing import Any

import numpy as np

from demo import examples, films, pictures, scans, tasks
from demo.examples import CHAT, CHECKPOINT, Row
from demo.films import Film
from demo.pictures import Picture
from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.processing.encoded_prompt import EncodedImage, EncodedVideo, grids_of
from qwen3vl_jax.processing.positions import rope_index
from qwen3vl_jax.training.data.sample import Sample

ENDLESS = 2**31  # too long to be shuffled: it is random as it is
LONGEST = 256  # tokens of a conversation
SHARED = 2  # consecutive samples about the same image or video: drawing it costs the most
REVERSED = ((1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (3, 2), (2, 4))  # grids of `Reverse`
Record = dict[str, Any]


class Train:
    """Samples, ready to be packed: several turns about an image or, with a chance of ``clips``, a video.

    SHARED samples in a row talk about the same one. few: how many samples at the start show few digits,
    see `examples.make_scene`. length: of the longest conversation, in tokens. Labels are answers with
    their ``<|im_end|>``; each answer of n tokens weighs sqrt(n) in all, as in Qwen3-VL's own training:
    else a list of boxes drowns out a one-word answer (arXiv 2511.21631). The vision labels name what
    stands in each merged cell.
    """

    vision_labels = True

    def __init__(
        self,
        seed: int = 0,
        few: int = 0,
        clips: float = 0.1,
        part: str = "train",
        length: int = LONGEST,
        folder: str = str(CHECKPOINT),
    ):
        self.seed, self.few, self.clips, self.part = seed, few, clips, part
        self.length, self.folder = length, folder

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Sample:
        number, turn = divmod(index, SHARED)
        rng = np.random.default_rng((self.seed, number, self.part == "held_out", turn + 1))
        words, few = examples.words_of(self.folder), number * SHARED < self.few
        config, name = _config(self.folder), f"{self.part}:{index}"
        if rng.random() < CHAT:
            return _sample(config, name, examples.make_chat(rng, words))
        scene, patches = _drawn(self.part, self.seed, number, few, self.clips)
        row = examples.make_row(rng, words, scene, self.length, few)
        return _sample(config, name, row, scene, patches)


class HeldOut:
    """Chat records about held-out scans: one question each, as `demo.evaluate` asks them."""

    def __init__(self, count: int = 512, seed: int = 1, clips: float = 0.1):
        self.count, self.seed, self.clips = count, seed, clips

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        rng, pool = _rng(self.seed, index, "held_out"), scans.load("held_out")
        if rng.random() < self.clips:
            film = films.compose(rng, pool)
            return record(film, tasks.ask_when(rng, film))
        image = pictures.compose(rng, pool, loose=bool(rng.random() < examples.LOOSE))
        kinds = ("read", "count", "find") if image.full else ("count", "find")
        return record(image, tasks.ask(rng, image, kinds[int(rng.integers(len(kinds)))]))


class Reverse:
    """Chat records of a task that the bundled checkpoint has not learned: reading in reverse.

    part: "train" or "held_out", the scans that images of two to eight digits are composed from.
    """

    def __init__(self, part: str = "train", count: int = 20_000, seed: int = 0):
        self.part, self.count, self.seed = part, count, seed
        scans.load(part)  # refuses another part at once

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        rng, train = _rng(self.seed, index, self.part), self.part == "train"
        grid = REVERSED[int(rng.integers(len(REVERSED)))]
        pool = scans.load(self.part)
        image = pictures.compose(rng, pool, loose=False, distort=train, grid=grid)
        return record(image, tasks.ask(rng, image, "reverse"))


@lru_cache(4)
def _drawn(
    part: str, seed: int, number: int, few: bool, clips: float
) -> tuple[Picture | Film, np.ndarray]:
    """An image or video of training and its patches, uint8 and not to be written to."""
    scene = examples.make_scene(_rng(seed, number, part), scans.load(part), few, clips)
    patches = examples.to_patches(examples.frames_of(scene))
    patches.flags.writeable = False
    return scene, patches


def _rng(seed: int, index: int, part: str) -> np.random.Generator:
    return np.random.default_rng((seed, index, part == "held_out"))


def record(scene: Picture | Film, turn: tasks.Turn) -> Record:
    """One question about an image or video and its answer, as {"messages": [...]}."""
    if isinstance(scene, Picture):
        seen: Record = {"type": "image", "image": scene.pixels}
    else:
        metadata = {"fps": scene.fps}
        seen = {"type": "video", "video": scene.frames, "video_metadata": metadata}
    content = [seen, {"type": "text", "text": turn.question}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": turn.answer},
        ]
    }


def _sample(
    config: Config,
    name: str,
    row: Row,
    scene: Picture | Film | None = None,
    patches: np.ndarray | None = None,
) -> Sample:
    """A row and what it shows as a Sample; the labels of placeholders become vision labels."""
    ids, labels = np.array(row.ids, np.int32), np.array(row.labels, np.int32)
    place = np.flatnonzero((ids == config.image_token_id) | (ids == config.video_token_id))
    seen, labels[place] = labels[place], IGNORE_INDEX
    images: tuple[EncodedImage, ...] = ()
    if scene is not None and patches is not None:
        kind = EncodedVideo if isinstance(scene, Film) else EncodedImage
        images = (kind(patches, examples.grid_of(scene), int(place[0]), int(place[-1]) + 1),)
    positions, _ = rope_index(config, ids[None], **grids_of(images))
    return Sample(name, ids, labels, _weights(labels), positions[:, 0], images, seen)


def _weights(labels: np.ndarray) -> np.ndarray:
    """1 / sqrt(length of its run) where labels [t] are not -100, else 0: float32 [t]."""
    told = np.concatenate(([False], labels != IGNORE_INDEX, [False]))
    edges = np.flatnonzero(told[1:] != told[:-1])
    weights = np.zeros(len(labels), np.float32)
    for start, end in edges.reshape(-1, 2):
        weights[start:end] = (end - start) ** -0.5
    return weights


@cache
def _config(folder: str) -> Config:
    return Config.from_hf(folder)
