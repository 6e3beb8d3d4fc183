"""Conversations with pictures and clips in plain numpy, shared by every reference."""

import copy
from typing import Any

import numpy as np
from PIL import Image

Item = dict[str, Any]
Message = dict[str, Any]


def text(words: str) -> Item:
    """A content item of text."""
    return {"type": "text", "text": words}


def picture(height: int, width: int) -> Item:
    """A content item with a picture of noise."""
    return {"type": "image", "image": Image.fromarray(_noise(height, width))}


def clip(count: int, height: int, width: int, fps: float) -> Item:
    """A content item with decoded frames of noise and what a decoder knows of them."""
    metadata = {"fps": fps, "total_num_frames": count}
    return {"type": "video", "video": _noise(count, height, width), "video_metadata": metadata}


def _noise(*sizes: int) -> np.ndarray:
    return np.random.RandomState(sum(sizes)).randint(0, 256, (*sizes, 3)).astype(np.uint8)


def user(*items: Item | str) -> Message:
    """A user's message; strings are text."""
    return {"role": "user", "content": [text(i) if isinstance(i, str) else i for i in items]}


def system(words: str) -> Message:
    """A system message."""
    return {"role": "system", "content": words}


def said(words: str, **more: Any) -> Message:
    """An assistant's message; more: reasoning_content, tool_calls."""
    return {"role": "assistant", "content": words, **more}


def calls(name: str, **arguments: Any) -> Message:
    """An assistant's message that calls a function and says nothing."""
    function = {"name": name, "arguments": arguments}
    return said("", tool_calls=[{"type": "function", "function": function}])


def result(*items: Item | str) -> Message:
    """A tool's answer."""
    return {**user(*items), "role": "tool"}


def tool(name: str, **parameters: str) -> Item:
    """A function's JSON schema; parameters: name and type of each."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name, "description": f"Does {name}.", "parameters": schema}
    return {"type": "function", "function": function}


def media(chat: list[Message]) -> dict[str, Any]:
    """The pictures and clips of a conversation, as transformers' processors take them."""
    items = [i for m in chat if isinstance(m["content"], list) for i in m["content"]]
    found: dict[str, Any] = {}
    if pictures := [i["image"] for i in items if i["type"] == "image"]:
        found["images"] = pictures
    if films := [i for i in items if i["type"] == "video"]:
        # Copies: transformers 4.57 pads frames_indices in place.
        metadata = [copy.deepcopy(i["video_metadata"]) for i in films]
        found["videos"] = [i["video"] for i in films]
        chosen = any("frames_indices" in m for m in metadata)
        found["videos_kwargs"] = {"video_metadata": metadata, "do_sample_frames": not chosen}
    return found


def tools_of(name: str) -> list[Item] | None:
    """The tools of a conversation of FILMED."""
    return TOOLS if name == "tools" else None


TOOLS = [tool("crop", x="number", y="number"), tool("gr\u00f6\u00dfe", datei="string")]
# Clips of odd lengths and sizes, among pictures and text, in one turn and in several.
FILMED: dict[str, list[Message]] = {
    "odd": [user(clip(5, 41, 33, 3.0), "what is this?")],
    "short": [user("before ", clip(2, 64, 24, 1.0), " after")],
    "sampled": [system("Be brief."), user(clip(61, 24, 40, 23.976), "How many?")],
    "chosen": [
        user(
            {
                **clip(3, 32, 56, 12.5),
                "video_metadata": {
                    "fps": 12.5,
                    "total_num_frames": 90,
                    "frames_indices": [7, 40, 88],
                },
            }
        )
    ],
    "interleaved": [
        user(
            "a",
            clip(5, 40, 33, 4.0),
            picture(20, 33),
            " b ",
            clip(8, 24, 90, 30.0),
            picture(50, 9),
            "\u5b57?",
        ),
    ],
    "turns": [
        user(picture(24, 24), "Look."),
        said("I see <|box_start|>(1,2)<|box_end|>."),
        user("And now? <2.5 seconds>", clip(7, 33, 65, 2.0)),
        said("It moves."),
        user(clip(4, 48, 32, 8.0), clip(9, 32, 32, 6.0), "Which one?"),
    ],
    "tools": [
        user(clip(6, 40, 40, 5.0), "Where is it?"),
        calls("crop", x=1.5, y=2),
        result("here: ", picture(16, 40), clip(3, 32, 48, 2.0)),
        calls("gr\u00f6\u00dfe", datei="\u5b57.png"),
        result("7 <b>"),
        said("At 7."),
        user("Sure?"),
    ],
}


def free(messages: Any) -> dict[str, Any]:
    """What lets answers that spell tokens of boxes have them, as transformers does; others need nothing."""
    return {"allow_special": "assistant"} if "<|box_start|>" in str(messages) else {}
