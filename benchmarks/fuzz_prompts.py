"""What `benchmarks.fuzz` tries of media, conversations and records, and how any input is changed."""

import copy
import functools
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from demo.examples import CHECKPOINT
from qwen3vl_jax.cli.infer_arguments import read_messages
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.parse_reply import parse_reply
from qwen3vl_jax.processing.processor import Processor

Files = dict[str, bytes]
# Values that stand where others are expected.
STRANGE: tuple[Any, ...] = (
    *(None, True, False),
    *(0, 1, -1, 2, 3.5, 1e308, -1e308, 5e-324, 10**39, -(10**39), 2**31, 2**63),
    *("", "x", "a.png", "\u0000", "\ud83d\ude00", "<|im_end|>", "<image>", "<|image_pad|>"),
    *("7", "NaN", "z" * 5000),
    *([], [[]], {}, {"a": 1}, [1, 2], ["x"] * 40, {"type": "image"}),
    *({"url": "file:///etc/passwd"}, {"type": "text", "text": 5}, [None], {"": None}),
    *(float("nan"), float("inf")),
)
TEXTS = (
    *(b"NaN", b"[" * 120, b"1" * 400, b"\xff\xfe", b'"\\ud83d"', b"\x00"),
    *(b'{"a":1,"a":2}', b"}{", b"1e999"),
)


class Kind(NamedTuple):
    """How one kind of input is made, as files by name, and used where those lie."""

    make: Callable[[random.Random], Files]
    use: Callable[[Path], None]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with up to four places flipped, cut, doubled, overwritten or filled in; rarely none."""
    found = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 1, 2, 4, 16, 300)))
        change = rng.randrange(7)
        if change == 0:
            del found[at:]
        elif change == 1:
            del found[at:end]
        elif change == 2:
            found[at:at] = found[at:end]
        elif change == 3:
            found[at:end] = rng.randbytes(end - at)
        elif change == 4:
            found[at:end] = bytes([rng.choice((0, 255, 127, 128))]) * (end - at)
        elif change == 5 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        else:
            found[at:at] = rng.choice(TEXTS)
    return bytes(found)


def changed(rng: random.Random, value: Any) -> Any:
    """JSON data with up to three places given another value, another key, or taken out."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        left = [value]
        while left:
            part = left.pop()
            keys = part.keys() if isinstance(part, dict) else range(len(part))
            for key in keys:
                places.append((part, key))
                if isinstance(part[key], (dict, list)):
                    left.append(part[key])
        if not places:
            return copy.deepcopy(rng.choice(STRANGE))
        part, key = rng.choice(places)
        change = rng.randrange(6)
        if change == 0:
            del part[key]
        elif change == 1 and isinstance(part, dict):
            part[rng.choice(("x", "type", "image", "path", "text", "role", "url"))] = part.pop(key)
        elif change == 2:
            other, name = rng.choice(places)
            taken = other.get(name) if isinstance(other, dict) else other[0] if other else None
            part[key] = json.loads(json.dumps(taken))
        elif change == 3 and isinstance(part, list):
            part += [copy.deepcopy(part[key]) for _ in range(rng.choice((1, 2, 50)))]
        else:
            # A copy: a later change must not reach the table, nor put a value into itself.
            part[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def json_of(rng: random.Random, value: Any) -> bytes:
    """The text of changed data, now and then damaged as text."""
    text = json.dumps(changed(rng, value), ensure_ascii=rng.random() < 0.5)
    data = text.encode("utf-8", "surrogatepass")
    return damaged(rng, data) if rng.random() < 0.15 else data


# ---- what is changed ----
@functools.cache
def images() -> list[bytes]:
    """A small image in many formats."""
    y, x = np.mgrid[:48, :64]
    image = Image.fromarray(np.stack([x * 4 % 256, y * 5 % 256, x * y % 256], -1).astype(np.uint8))
    found = []
    for format in (
        "PNG",
        "JPEG",
        "WEBP",
        "GIF",
        "BMP",
        "TIFF",
        "PPM",
        "TGA",
        "ICO",
        "JPEG2000",
        "AVIF",
    ):
        for mode in ("RGB", "L", "P", "I;16"):
            file = io.BytesIO()
            try:
                image.convert("I" if mode == "I;16" else mode).convert(mode).save(file, format)
            except (OSError, ValueError, KeyError):
                continue
            found.append(file.getvalue())
    return found


@functools.cache
def videos() -> list[bytes]:
    """A second of film in many containers."""
    found = []
    frames = (np.mgrid[:12, :64, :64, :3][0] * 20).astype(np.uint8)
    codecs = {"mp4": "libx264", "matroska": "libx264", "mpegts": "mpeg2video", "avi": "mpeg4"}
    for format, codec in {**codecs, "webm": "libvpx", "mov": "mjpeg"}.items():
        file = io.BytesIO()
        try:
            with av.open(file, "w", format=format) as container:
                stream: Any = container.add_stream(codec, rate=12)
                stream.width = stream.height = 64
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
        except (av.FFmpegError, ValueError):
            continue
        found.append(file.getvalue())
    return found


def conversation() -> dict[str, Any]:
    """Messages of every role, with tools, an image and a video as frames."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, {"y": "z"}]}}}
    items = [
        {"type": "image", "image": "a.png", "min_pixels": 1024, "max_pixels": 65536},
        {"type": "video", "video": ["a.png", "a.png", "a.png"], "fps": 2.0},
        {"type": "text", "text": "What is <this>?"},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": items},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nLook.", "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Thanks"},
    ]
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "array"}}}}
    return {"messages": messages, "tools": [{"type": "function", "function": tool}]}


LINE: dict[str, Any] = {"id": "a", "max_new_tokens": 5, "temperature": 0.7, "top_k": 5}
LINE |= {"top_p": 0.9, "min_p": 0.1, "seed": 3, "stop": ["x", "yz"], "logprobs": True}
LINE |= {"repetition_penalty": 1.1, "presence_penalty": 0.5, "min_new_tokens": 1}


def records() -> list[Any]:
    """Records in every form that training reads."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    chat = [
        {"role": "user", "content": "<image>What?", "weight": 1.0},
        {"role": "assistant", "content": "That.", "train": True},
    ]
    boxes = {"ref": ["cat"], "bbox": [[1, 2, 30, 40]]}
    boxed = [{"role": "user", "content": "<image><ref-object><bbox>"}, chat[1]]
    filmed = [{"role": "user", "content": "<video>What?"}, chat[1]]
    return [
        {"messages": chat, "images": ["a.png"], "system": "Be brief."},
        {"conversations": talk, "image": "a.png", "id": 3},
        {"messages": boxed, "images": ["a.png"], "objects": boxes},
        {"messages": filmed, "videos": [["a.png", "a.png"]]},
        {**conversation(), "messages": [m for m in conversation()["messages"] if len(m) == 2]},
        [{"messages": chat, "images": ["a.png"]}, {"messages": chat[1:], "images": []}],
    ]


# ---- using them ----
@functools.cache
def processor() -> Processor:
    return Processor.from_pretrained(CHECKPOINT)


def _asked(kind: str, path: Path) -> None:
    processor().inputs([{"role": "user", "content": [{"type": kind, kind: str(path)}]}])


def _use_chat(folder: Path) -> None:
    messages, tools = read_messages(folder / "chat.json")
    text = json.dumps(messages)
    parse_reply(text.replace("</think>", ""))
    processor().inputs(messages, tools=tools)


def _make_line(rng: random.Random) -> Files:
    text = json_of(rng, {**LINE, **conversation()}).replace(b"\n", b" ")
    return {"in.jsonl": text + b"\n", "a.png": images()[0]}


def _use_line(folder: Path) -> None:
    from qwen3vl_jax.cli import batch_lines
    from qwen3vl_jax.cli.batch_journal import read_lines

    settings = batch_lines.Settings({}, 5, 0, (), 4096, {})
    for line in read_lines(folder / "in.jsonl"):
        found = batch_lines.read_line(processor(), folder / "in.jsonl", line, settings)
        if isinstance(found, tuple):
            error = found[1]["error"]
            if re.match(r"line \d+: \w+(Error|Exception|Exit|Interrupt): ", error):
                raise RuntimeError(error)
            raise InputError(error)


def _use_record(folder: Path) -> None:
    from qwen3vl_jax.training.data.make_samples import SampleMaker
    from qwen3vl_jax.training.data.records import open_records
    from qwen3vl_jax.training.recipe import Data, Pack, Source

    found = open_records(Source(str(folder / "records.jsonl")))
    maker = SampleMaker(
        processor(), Data(), Pack(rows=1, length=2000, vision_rows=2, vision_length=4096)
    )
    for index in range(len(found)):
        maker(found.name(index), found.read(index))


def _with_image(
    name: str, make: Callable[[random.Random], Any]
) -> Callable[[random.Random], Files]:
    return lambda rng: {name: json_of(rng, make(rng)), "a.png": images()[0]}


PROMPT_KINDS = {
    "images": Kind(
        lambda rng: {"image": damaged(rng, rng.choice(images()))},
        lambda folder: _asked("image", folder / "image"),
    ),
    "videos": Kind(
        lambda rng: {"video": damaged(rng, rng.choice(videos()))},
        lambda folder: _asked("video", folder / "video"),
    ),
    "chats": Kind(_with_image("chat.json", lambda rng: conversation()), _use_chat),
    "lines": Kind(_make_line, _use_line),
    "records": Kind(_with_image("records.jsonl", lambda rng: rng.choice(records())), _use_record),
}
