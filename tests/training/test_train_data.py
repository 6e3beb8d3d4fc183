"""Training data: files to records, and records to samples of which only the answers are learned."""

import dataclasses
import io
import json

import chats
import clips
import numpy as np
import pytest
import qwen_vocabulary
import toy_checkpoint as toy
from chats import calls, result, said, system, user
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.chat_template import ChatTemplate
from qwen3vl_jax.processing.encoded_prompt import EncodedVideo
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.training.data import global_batches, make_samples, records
from qwen3vl_jax.training.data.chat_format import chat_form
from qwen3vl_jax.training.recipe import Data, Pack, Source

PACK = Pack(rows=1, length=2000, vision_rows=2, vision_length=4096)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """A processor with Qwen3's own vocabulary by template."""
    folder = toy.save(
        tmp_path_factory.mktemp("real"), template=None, tokenizer=qwen_vocabulary.tokenizer_json()
    )
    found = Processor.from_pretrained(folder)
    return {
        name: dataclasses.replace(found, template=ChatTemplate({"default": text}))
        for name, text in toy.RELEASED_TEMPLATES.items()
    }


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    """A processor with a small vocabulary."""
    folder = tmp_path_factory.mktemp("toy")
    return Processor.from_pretrained(toy.save(folder, template=toy.RELEASED_TEMPLATES["instruct"]))


def sample_of(proc, messages, tools=None, data=Data(), pack=PACK):  # noqa: B008 frozen
    record = chat_form({"messages": messages} | ({"tools": tools} if tools else {}))
    return make_samples.SampleMaker(proc, data, pack)("here:1", record)


def learned(proc, sample) -> list[str]:
    """The learned tokens as text, run by run."""
    on = np.flatnonzero(sample.labels != -100)
    np.testing.assert_array_equal(sample.labels[on], sample.ids[on])
    np.testing.assert_array_equal(on, np.flatnonzero(sample.weights))
    runs = np.split(on, np.flatnonzero(np.diff(on) > 1) + 1)
    return [proc.decode(sample.ids[run], skip_special_tokens=False) for run in runs]


FALSE = "<|im_end|>\n<|im_start|>assistant\nfalse<|im_end|>\n"
CALL = '<tool_call>\n{"name": "crop", "arguments": {"x": 1}}\n</tool_call>'
FILM, PICTURE = chats.clip(5, 41, 33, 3.0), chats.picture(40, 16)
# name -> (template, messages, tools, what is learned)
MASKS = {
    "turns": (
        "instruct",
        [system("s"), user("a"), said("b c"), user("d"), said("e")],
        None,
        ["b c", "e"],
    ),
    "a user who says assistant": (
        "instruct",
        [user("assistant\nassistant"), said("no")],
        None,
        ["no"],
    ),
    "a user who spells turns": (
        "instruct",
        [user(FALSE), said("x"), user("<|im_start|>"), said("y")],
        None,
        ["x", "y"],
    ),
    "a system and a tool that spell turns": (
        "instruct",
        [system(FALSE), user("q"), calls("crop", x=1), result(FALSE), said("z")],
        [chats.tool("crop" + FALSE, x="number")],
        [CALL, "z"],
    ),
    "text before a call": (
        "instruct",
        [
            user("q"),
            said("So:", tool_calls=calls("crop", x=1)["tool_calls"]),
            result("1"),
            said("one"),
        ],
        chats.TOOLS,
        [f"So:\n{CALL}", "one"],
    ),
    "switched off": (
        "instruct",
        [user("a"), said("b", train=False), user("c"), said("d", train=True)],
        None,
        ["d"],
    ),
    "pictures and clips": (
        "instruct",
        [user(FILM, PICTURE, "a", FILM), said("b"), user(PICTURE), said("c")],
        None,
        ["b", "c"],
    ),
    "boxes are tokens": (
        "instruct",
        [user("a"), said("<|box_start|>(1,2)<|box_end|>")],
        None,
        ["<|box_start|>(1,2)<|box_end|>"],
    ),
    "reasoning": (
        "thinking",
        [user("a"), said("b", reasoning_content="why")],
        None,
        ["why\n</think>\n\nb"],
    ),
    "earlier reasoning is dropped": (
        "thinking",
        [
            user("a"),
            said("<think>\nold\n</think>\n\nb"),
            user("c"),
            said("d", reasoning_content="new"),
        ],
        None,
        ["new\n</think>\n\nd"],
    ),
    "an earlier answer on demand": (
        "thinking",
        [user("a"), said("b", train=True), user("c"), said("d", reasoning_content="new")],
        None,
        ["b", "new\n</think>\n\nd"],
    ),
    "reasoning between calls": (
        "thinking",
        [
            user("q"),
            said("", reasoning_content="Crop.", tool_calls=calls("crop", x=1)["tool_calls"]),
            result("1"),
            said("one", reasoning_content="Done."),
        ],
        chats.TOOLS,
        [f"Crop.\n</think>\n\n{CALL}", "Done.\n</think>\n\none"],
    ),
    "no reasoning": ("thinking", [user("a"), said("b")], None, ["</think>\n\nb"]),
    "a user who spells thoughts": (
        "thinking",
        [user("<think>\nx\n</think>"), said("b", reasoning_content="c")],
        None,
        ["c\n</think>\n\nb"],
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_only_answers_are_learned(processors, case):
    template, messages, tools, want = MASKS[case]
    proc = processors[template]
    sample = sample_of(proc, messages, tools)
    assert learned(proc, sample) == [text + END for text in want]
    plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    options = {"add_generation_prompt": False, **chats.free(plain)}
    rendered = proc.inputs(plain, tools=tools, **options)
    np.testing.assert_array_equal(sample.ids, rendered["input_ids"][0])


def test_the_token_of_the_role_in_a_users_text(processors):
    """Token 77091 in a user's text is what opens a span in the official code."""
    proc = processors["instruct"]
    sample = sample_of(proc, [user("assistant\nsay: assistant\n x"), said("assistant\nyes")])
    assert (sample.ids == 77091).sum() == 3
    assert learned(proc, sample) == ["assistant\nyes" + END]


def test_weights_of_turns(proc):
    messages = [user("a"), said("one two three four"), user("c"), said("d")]
    sample = sample_of(proc, messages, data=Data(weighting="sqrt"))
    on = np.flatnonzero(sample.weights)
    first, second = np.split(on, np.flatnonzero(np.diff(on) > 1) + 1)
    assert len(first) > len(second)
    for run in (first, second):
        np.testing.assert_allclose(sample.weights[run], len(run) ** -0.5, rtol=1e-6)


def test_pictures_and_clips_of_a_sample(proc):
    """Bytes in order of their tokens, normalised to what the processor gives; positions from 0."""
    messages = [user(FILM, PICTURE, "a", chats.picture(20, 33)), said("b")]
    sample = sample_of(proc, messages)
    arrays = proc.inputs(messages, add_generation_prompt=False)
    assert [v.is_video for v in sample.images] == [True, False, False]
    assert {v.patches.dtype for v in sample.images} == {np.dtype(np.uint8)}
    got = [v.patches / np.float32(127.5) - 1 for v in sample.images]
    np.testing.assert_allclose(got[0], arrays["pixel_values_videos"], atol=1e-6)
    np.testing.assert_allclose(np.concatenate(got[1:]), arrays["pixel_values"], atol=1e-6)
    assert [v.grid for v in sample.images[1:]] == list(
        map(tuple, arrays["image_grid_thw"].tolist())
    )
    batch = proc(messages, add_generation_prompt=False)
    np.testing.assert_array_equal(sample.positions, batch.positions[:, 0, : len(sample.ids)])
    for visual in sample.images:
        assert sample.ids[visual.start] == sample.ids[visual.end - 1] != sample.ids[visual.end]


def test_settings_that_leave_values_as_they_are(proc):
    """A user's processor without rescaling gives float32, alone and in training, as transformers' does."""
    settings = (proc.image_settings, proc.video_settings)
    image, video = (s.override(do_rescale=False, do_normalize=False) for s in settings)
    plain = dataclasses.replace(proc, image_settings=image, video_settings=video)
    messages = [user(FILM, PICTURE, "a"), said("b")]
    (prompt,) = plain.encode([messages], add_generation_prompt=False)
    sample = sample_of(plain, messages)
    for alone, trained in zip(prompt.images, sample.images, strict=True):
        assert alone.patches.dtype == trained.patches.dtype == np.float32
        np.testing.assert_array_equal(alone.patches, trained.patches)
        assert alone.patches.max() > 2


def test_an_image_that_was_normalised_before_is_refused(proc):
    with pytest.raises(InputError, match="images 1: patches are float32, expected uint8"):
        sample_of(proc, [user(proc.look(chats.picture(20, 33)), "a"), said("b")])


def test_limits_of_the_recipe(proc):
    """Pixels of pictures, pixels and frames of clips, numbers before them."""
    messages = [user(chats.picture(64, 64), chats.clip(40, 64, 64, 10.0)), said("b")]
    data = Data(max_pixels=1024, fps=5.0, max_frames=6, clip_max_pixels=6 * 512, add_vision_id=True)
    sample = sample_of(proc, messages, data=data)
    assert [v.grid for v in sample.images] == [(1, 8, 8), (3, 4, 4)]
    assert "Picture 1: " in proc.decode(sample.ids, skip_special_tokens=False)
    assert sample_of(proc, messages).images[0].grid == (1, 16, 16)


def png(size, value) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, 50, 200)).save(out, "PNG")
    return out.getvalue()


def test_every_kind_of_file_gives_the_same_sample(proc, tmp_path):
    """Both shapes; pictures beside the file, in another folder, and in it; a clip; several, in order."""
    import pyarrow
    from array_record.python.array_record_module import ArrayRecordWriter
    from pyarrow import parquet

    first, second = png((24, 16), 10), png((16, 40), 90)
    for folder in (tmp_path / "pics", tmp_path / "other" / "pics"):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(first)
        (folder / "b.png").write_bytes(second)
        clips.write(folder / "c.mp4", clips.bars(6))
    names = {"image": ["pics/a.png", "pics/b.png"], "video": "pics/c.mp4"}
    said_ = [("human", "<image>\nOne <video> and\n<image> ?"), ("gpt", "Yes \\<image>")]
    official = {**names, "conversations": [{"from": f, "value": v} for f, v in said_]}
    items = [{"type": "image", "image": "pics/a.png"}, {"type": "text", "text": "One"}]
    items += [{"type": "video", "video": "pics/c.mp4"}, {"type": "text", "text": "and"}]
    items += [{"type": "image_url", "image_url": {"url": "pics/b.png"}}, "?"]
    told = said("Yes \\<image>")
    plain = chat({"role": "user", "content": items}, told)
    tagged = {"role": "user", "content": "<image>One<video>and<image>?"}
    beside = chat(tagged, told, images=names["image"], videos=names["video"])
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, (official, plain, beside))))
    (tmp_path / "b.json").write_text(json.dumps([official, plain]))
    empty = [{"type": "image"}, "One", items[2], "and", {"type": "image"}, "?"]
    told = json.dumps([{"role": "user", "content": empty}, told])
    rows = [
        {
            "images": [{"bytes": first, "path": None}, {"bytes": second, "path": "x"}],
            "messages": told,
        },
        {"images": [{"bytes": None, "path": p} for p in names["image"]], "messages": told},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=1)
    structs = {
        "image": [first, second],
        "video": ["pics/c.mp4"],
        "conversations": official["conversations"],
    }
    parquet.write_table(pyarrow.Table.from_pylist([structs]), tmp_path / "d.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "e.array_record"), "group_size:1")
    for record in (official, plain):
        writer.write(json.dumps(record).encode())
    writer.close()
    (tmp_path / "other" / "f.jsonl").write_text(
        json.dumps(official) + "\n\n" + json.dumps(plain) + "\n"
    )
    files = "a.jsonl b.json c.parquet d.parquet e.array_record other/f.jsonl".split()
    sources = {name: Source(str(tmp_path / name)) for name in files}
    sources["g"] = Source(str(tmp_path / "a.jsonl"), media=str(tmp_path / "other"))
    maker, found = make_samples.SampleMaker(proc, Data(), PACK), {}
    for key, source in sources.items():
        opened = records.open_records(source)
        found |= {f"{key} {opened.name(i)}": maker("x", opened.read(i)) for i in range(len(opened))}
    assert list(found)[:3] == ["a.jsonl a.jsonl:1", "a.jsonl a.jsonl:2", "a.jsonl a.jsonl:3"]
    assert "other/f.jsonl f.jsonl:3" in found and len(found) == 15
    want = found["a.jsonl a.jsonl:1"]
    assert learned(proc, want) == ["Yes <image>" + END] and len(want.images) == 3
    for sample in found.values():
        np.testing.assert_array_equal(sample.ids, want.ids)
        for got, visual in zip(sample.images, want.images, strict=True):
            np.testing.assert_array_equal(got.patches, visual.patches)


HUMAN, GPT = {"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}
ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALLED = calls("crop", x=1)
PAIR = {"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]}
BESIDE = {"images": [chats.picture(8, 8)["image"]]}


def chat(*messages, **others):
    """A record of messages."""
    return {**others, "messages": list(messages)}


# name -> (a record, words of the refusal)
REFUSED = {
    "no such picture": ({"image": "none.png", "conversations": [HUMAN, GPT]}, "none.png"),
    "a tag too many": ({"conversations": [HUMAN, GPT]}, "1: a place for an image without an image"),
    "a tag without any image": (chat(user("<image>a"), ANSWERED), "without an image left"),
    "a second tag": (
        BESIDE | chat(user("<image>a"), ANSWERED, user("<image>b"), ANSWERED),
        "message 3: a place for an image",
    ),
    "a video's tag": (BESIDE | chat(user("<image><video>"), ANSWERED), "without a video left"),
    "a tag beside an item": (
        BESIDE | chat(user({"type": "image"}, "<image>a"), ANSWERED),
        "message 1: a place for an image",
    ),
    "a tag of the system": (chat(system("<image>"), ASKED, ANSWERED), "message 1: a place"),
    "a system text's tag": (chat(ASKED, ANSWERED, system="<image>"), "message 0: a place"),
    "a tag of a tool": (
        chat(ASKED, CALLED, {"role": "tool", "content": "<image>"}, ANSWERED),
        "message 3: a place",
    ),
    "an answer's tag": (BESIDE | chat(ASKED, said("<image>")), "2: <image> in an assistant"),
    "a sound": (
        chat(user("<audio>What is this?"), ANSWERED),
        "message 1: <audio>: the model takes images and videos alone; a tag that is meant",
    ),
    "sounds": (chat(user("hi"), ANSWERED, audios=["a.wav"]), "unknown key 'audios'"),
    "a thought's tag": (
        chat(ASKED, said("b", reasoning_content="<video>")),
        "2: <video> in an assistant",
    ),
    "an answer's own item": (
        chat(ASKED, {"role": "assistant", "content": [chats.picture(8, 8), "b"]}),
        "0 image placeholder",
    ),
    "a placeholder": (chat(ASKED, said("<|image_pad|>")), "the assistant says <.image_pad"),
    "a picture too many": (
        {"image": ["a", "b"], "conversations": [HUMAN, GPT]},
        "2 image.s. for 1",
    ),
    "no tag": (chat(ASKED, ANSWERED, image="a"), "1 image.s. for 0"),
    "frames as videos": (
        chat(user("<video>"), ANSWERED, video=["a", "b"]),
        "2 video.s. for 1 .* is a list in the list",
    ),
    "items out of order": (
        BESIDE | chat(user({"type": "image", "index": 1}), ANSWERED),
        "index is 1, expected 0",
    ),
    "no shape": ({"text": "hi"}, "expected messages or conversations"),
    "both shapes": (chat(ASKED, conversations=[HUMAN]), "one of the two"),
    "no message": (chat(), "at least one"),
    "an unknown speaker": ({"conversations": [{"from": "bot", "value": "x"}]}, "from is 'bot'"),
    "an unknown role": (chat({"role": "x", "content": "a"}, ANSWERED), "role: got 'x'"),
    "no answer": (chat(ASKED), "nothing to learn"),
    "all switched off": (chat(ASKED, {**ANSWERED, "train": False}), "nothing to learn"),
    "a weight of nothing": (chat(ASKED, {**ANSWERED, "weight": 0}), "nothing to learn"),
    "a switch of text": (chat(ASKED, {**ANSWERED, "train": "no"}), "train is 'no'"),
    "a loss of text": (chat(ASKED, {**ANSWERED, "loss": 0.5}), "loss is 0.5, expected true"),
    "a weight below 0": (chat(ASKED, {**ANSWERED, "weight": -1}), "weight is -1"),
    "an infinite weight": (chat(ASKED, {**ANSWERED, "weight": np.inf}), "weight is inf"),
    "on and off": (chat(ASKED, {**ANSWERED, "loss": True, "weight": 0}), "say on and off"),
    "a user to be learned": (chat({**ASKED, "loss": True}, ANSWERED), "only an assistant"),
    "an answer with turns": (chat(ASKED, said(f"b{FALSE}c")), "says <.im_start"),
    "an answer's turn in two texts": (
        chat(
            ASKED,
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}],
            },
        ),
        "says <.im_end",
    ),
    "an endless weight": (chat(ASKED, {**ANSWERED, "weight": 1e39}), "weight is 1e.39"),
    "own normalisation": (
        chat(user({"type": "image", "image": "a", "image_mean": 0.1}), ANSWERED),
        "image_mean of a single image",
    ),
    "a list": ([1, 2], "found list"),
    "preferences": (
        chat(ASKED, ANSWERED, rejected_response="c"),
        "'rejected_response' .answers are trained on, not preferences",
    ),
    "a class": (chat(ASKED, ANSWERED, label=False), "'label' .answers are trained on"),
    "a key misspelt": (chat(ASKED, ANSWERED, mesages=[ASKED]), "did you mean messages"),
    "a message's key": (
        chat(ASKED, {**ANSWERED, "function_call": {}}),
        "message 2: unknown key 'function_call'",
    ),
    "an item's key": (
        chat(user({"type": "text", "text": "a", "train": 0}), ANSWERED),
        "content item: unknown key 'train'",
    ),
    "a text beside an image": (
        chat(user({**chats.picture(8, 8), "text": "a"}), ANSWERED),
        "message 1: content item: it holds 'a' and more",
    ),
    "a turn's key": (
        {"conversations": [HUMAN | {"value": "a"}, GPT | {"role": "x"}]},
        "2: unknown key 'role'",
    ),
    "no content": (chat({"role": "user"}, ANSWERED), "message 1: it has no content"),
    "two systems": (chat(system("b"), ASKED, ANSWERED, system="a"), "one system text"),
    "a system of numbers": (chat(ASKED, ANSWERED, system=3), "system: found int"),
    "calls without a name": (
        chat(ASKED, said("", tool_calls=[{"arguments": {}}])),
        "message 2: tool_calls: expected a list of objects with name",
    ),
    "a call's other key": (
        chat(ASKED, said("", tool_calls=[{"name": "f", "parameters": {}}])),
        "message 2: tool_calls: unknown key 'parameters'",
    ),
    "arguments that are no JSON": (
        chat(ASKED, said("", tool_calls=[{"name": "f", "arguments": "{x"}])),
        "message 2: arguments of f: not JSON",
    ),
    "arguments that are no object": (
        chat(ASKED, said("", tool_calls=[{"name": "f", "arguments": [1]}])),
        "expected a list of objects with name and arguments",
    ),
    "arguments that are a number's text": (
        chat(ASKED, said("", tool_calls=[{"name": "f", "arguments": "0"}])),
        "2: arguments of f: got 0, expected an object",
    ),
    "a limit in an address": (
        chat(user({"type": "image_url", "image_url": {"url": "a.png", "max_pixels": 9}}), ANSWERED),
        "an object with url, max_pixels, expected",
    ),
    "calls that are no JSON": (
        chat(ASKED, said("", tool_calls="[{")),
        "message 2: tool_calls: not JSON",
    ),
    "a later system": (
        chat(ASKED, ANSWERED, system("s"), ASKED, ANSWERED),
        "message 3: the chat template leaves out a system message after others",
    ),
    "a type that is none": (chat(user({"type": {"a": 1}, "image": "a.png"}), ANSWERED), "type"),
    "from nobody": (
        {"conversations": [{"from": None, "value": "a"}, GPT]},
        "message 1: from is None",
    ),
    "a developer": (
        chat({"role": "developer", "content": "s"}, ASKED, ANSWERED),
        "message 1: the chat template leaves out a developer message",
    ),
    "thoughts": (
        chat(ASKED, said("b", reasoning_content="why")),
        "message 2: the chat template leaves out reasoning_content",
    ),
    "a box without objects": (chat(ASKED, said("<bbox>")), "without an entry of objects.bbox"),
    "an object left": (
        BESIDE | chat(user("<image>"), said("<ref-object>"), objects=PAIR),
        "objects.bbox: 1 more than there are <bbox> tags",
    ),
    "a box outside": (
        BESIDE | chat(user("<image>"), said("<bbox>"), objects={"bbox": [[1, 2, 9, 4]]}),
        "inside 8 x 8 pixels",
    ),
    "a box without end": (
        BESIDE | chat(user("<image>"), said("<bbox>"), objects={"bbox": [[1, 2, 1e308, 4]]}),
        "expected .x1, y1",
    ),
    "a type of boxes": (
        BESIDE
        | chat(
            user("<image>"), said("<bbox>"), objects={"bbox": [[1, 2, 3, 4]], "bbox_type": ["real"]}
        ),
        "bbox_type: got",
    ),
    "width and height": (
        BESIDE | chat(user("<image>"), said("<bbox>"), objects={"bbox": [[4, 4, 2, 2]]}),
        "two corners",
    ),
    "a box of no image": (
        chat(ASKED, said("<bbox>"), objects={"bbox": [[1, 2, 3, 4]]}),
        "which of 0 image",
    ),
    "three numbers": (
        BESIDE | chat(user("<image>"), said("<bbox>"), objects={"bbox": [[1, 2, 3]]}),
        "or .x, y",
    ),
    "an unknown object": (
        BESIDE | chat(user("<image>"), ANSWERED, objects={"mask": []}),
        "objects: found mask",
    ),
}


def test_an_empty_place_is_no_picture():
    """Files that mix records with and without pictures write "" for none."""
    turns = [{"from": "human", "value": "a"}, GPT]
    want = chat_form({"conversations": turns})
    assert chat_form({"image": "", "video": [""], "conversations": turns}) == want
    stored = {"image": {"bytes": None, "path": None}, "videos": [{}], "conversations": turns}
    assert chat_form(stored) == want


@pytest.mark.parametrize("case", REFUSED)
def test_bad_records_say_why(proc, case):
    record, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        make_samples.SampleMaker(proc, Data(), PACK)("x:1", chat_form(record))


IMAGE = chats.picture(20, 40)["image"]
TURNS = [user("<image>a"), said("b")]
OFFICIAL = {"image": IMAGE, "conversations": [HUMAN | {"value": "<image>a"}, GPT]}
# name -> (a record, one that means the same)
MEANS = {
    "a system text": (chat(ASKED, ANSWERED, system="s"), chat(system("s"), ASKED, ANSWERED)),
    "a system text beside conversations": (
        OFFICIAL | {"system": "s"},
        chat(system("s"), user({"type": "image", "image": IMAGE}, "a"), ANSWERED),
    ),
    "no system text": (chat(ASKED, ANSWERED, system=""), chat(ASKED, ANSWERED)),
    "metadata": (chat(ASKED, ANSWERED, id=7, source="x", label=None), chat(ASKED, ANSWERED)),
    "tags of both kinds of text": (
        chat({"role": "user", "content": "<image>a<image>"}, ANSWERED, images=[IMAGE, IMAGE]),
        chat(user("<image>a", "<image>"), ANSWERED, images=[IMAGE, IMAGE]),
    ),
    "a tool's image": (
        chat(ASKED, CALLED, result("<image>"), ANSWERED, images=[IMAGE]),
        chat(ASKED, CALLED, result({"type": "image", "image": IMAGE}), ANSWERED),
    ),
    "numbered items": (
        chat(
            user({"type": "image", "index": 0, "text": None}, {"type": "image", "index": 1}),
            ANSWERED,
            images=[IMAGE, PICTURE["image"]],
        ),
        chat(user({"type": "image", "image": IMAGE}, PICTURE), ANSWERED),
    ),
    "empty places": (
        chat(
            user(
                {**PICTURE, "text": ""}, {"type": "text", "text": "a", "image": "", "video": None}
            ),
            ANSWERED,
        ),
        chat(user(PICTURE, "a"), ANSWERED),
    ),
    "loss": (
        chat(ASKED, {**ANSWERED, "loss": False}, ASKED, {**ANSWERED, "loss": True}),
        chat(ASKED, {**ANSWERED, "train": False}, ASKED, ANSWERED),
    ),
    "weight 0 and 1": (
        chat({**ASKED, "weight": 0}, {**ANSWERED, "weight": 0}, ASKED, {**ANSWERED, "weight": 1}),
        chat(ASKED, {**ANSWERED, "train": False}, ASKED, ANSWERED),
    ),
    "calls of text": (
        chat(ASKED, said("", tool_calls=json.dumps(CALLED["tool_calls"])), result("1"), ANSWERED),
        chat(ASKED, CALLED, result("1"), ANSWERED),
    ),
    "one call": (
        chat(ASKED, said("", tool_calls={"name": "f", "arguments": '{"x": 1}'})),
        chat(ASKED, said("", tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1}'}}])),
    ),
    "a call of nothing": (
        chat(ASKED, said("", tool_calls=[{"name": "f", "arguments": None}])),
        chat(ASKED, said("", tool_calls=[{"name": "f", "arguments": {}}])),
    ),
    "no tools": (chat(ASKED, {**ANSWERED, "tool_calls": ""}, tools=""), chat(ASKED, ANSWERED)),
    "objects": (
        chat(
            user("<image>Where is <ref-object>?"),
            said('{"bbox_2d": <bbox>, "label": "<ref-object>"} <bbox> \\<bbox>'),
            images=[IMAGE],
            objects={"ref": ["a dog", "it"], "bbox": [[4, 5.0, 20, 20], [10, 10]]},
        ),
        chat(
            user({"type": "image", "image": IMAGE}, "Where is a dog?"),
            said('{"bbox_2d": [100, 250, 500, 1000], "label": "it"} [250, 500] \\<bbox>'),
        ),
    ),
    "objects of a second image": (
        chat(
            user("<image><image>"),
            said("<bbox>"),
            images=[PICTURE["image"], IMAGE],
            objects={"bbox": [[4, 10, 8, 10]], "image_id": [1]},
        ),
        chat(user(PICTURE, {"type": "image", "image": IMAGE}), said("[100, 500, 200, 500]")),
    ),
    "objects from 0 to 1": (
        chat(
            user("<image>"),
            said("<bbox>"),
            objects={"bbox": [[0.1, 0.25, 1, 1]], "bbox_type": "norm1"},
            images=[IMAGE],
        ),
        chat(user({"type": "image", "image": IMAGE}), said("[100, 250, 1000, 1000]")),
    ),
}


@pytest.mark.parametrize("case", MEANS)
def test_every_key_of_a_record_means_something(proc, case):
    """The sample is that of a plain record: the same ids, labels, weights and pixels."""
    maker = make_samples.SampleMaker(proc, Data(), PACK)
    got, want = (maker("x:1", chat_form(record)) for record in MEANS[case])
    for name in ("ids", "labels", "weights", "positions"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    for one, other in zip(got.images, want.images, strict=True):
        np.testing.assert_array_equal(one.patches, other.patches)


def test_a_source_says_what_its_boxes_count_and_which_keys_do_not_matter(proc):
    record = chat(user("<image>"), {**said("<bbox>"), "stars": 5}, images=[IMAGE], score=3)
    record["objects"] = {"bbox": [[4, 5, 20, 1000]]}
    source = Source("", boxes="norm1000", ignore=("score", "stars"))
    text = chat_form(record, source)["messages"][1]
    assert text == {"role": "assistant", "content": "[4, 5, 20, 1000]"}


def test_a_tag_with_a_backslash_is_text(proc):
    """In every role's text and in content items; the text is trained as it is meant."""
    record = {"messages": [user("write \\<image>"), said("\\<image> and \\<video>\\<audio>")]}
    sample = sample_of(proc, **record)
    assert learned(proc, sample) == ["<image> and <video><audio>" + END] and not sample.images
    assert "write <image>" in proc.decode(sample.ids)


def test_weights_of_messages(proc):
    messages = [user("a"), {**said("b"), "weight": 0.5}, user("c"), {**said("d"), "weight": 2}]
    weights = sample_of(proc, messages).weights
    assert sorted(set(weights.tolist())) == [0.0, 0.5, 2.0]


def test_special_tokens_of_a_prompt_are_tokens_where_the_recipe_says_so(processors):
    """As in the reference, which knows no other way; what ends a turn stays refused."""
    proc = processors["instruct"]
    asked = [user("<|object_ref_start|>cat<|object_ref_end|>"), said("x")]
    ids = sample_of(proc, asked, data=Data(allow_special=True)).ids
    assert {151646, 151647} <= set(ids.tolist())
    assert not {151646, 151647} & set(sample_of(proc, asked).ids.tolist())
    for token in ("<|im_end|>", "<|image_pad|>"):
        with pytest.raises(InputError, match="the user says"):
            sample_of(proc, [user(f"a{token}"), said("x")], data=Data(allow_special=True))
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    with pytest.raises(InputError, match="tools: they say"):
        sample_of(proc, asked, tools=tools, data=Data(allow_special=True))


def test_videos_of_a_record_may_be_frames(proc, tmp_path):
    """A list in the list, an object with their rate, a folder; beside the file, as in a content item."""
    frames = tmp_path / "frames"
    frames.mkdir()
    names = [f"frames/{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(png((40, 24), 40 * i))
    source, maker = Source("", media=str(tmp_path)), make_samples.SampleMaker(proc, Data(), PACK)

    def sample(item, tag="<video>a", **beside):
        messages = [user(*([item] if item else []), tag), said("b")]
        return maker("x", chat_form({"messages": messages} | beside, source))

    listed = sample({"type": "video", "video": names}, "a")
    rated = sample({"type": "video", "video": names, "sample_fps": 1}, "a")
    assert not np.array_equal(listed.ids, rated.ids)
    for got, want in (
        (sample(None, videos=[names]), listed),
        (sample(None, video=[names]), listed),
        (sample(None, videos=["frames"]), sample({"type": "video", "video": "frames"}, "a")),
        (sample(None, videos=[{"frames": names, "sample_fps": 1}]), rated),
        (sample(None, video={"video": names, "sample_fps": 1}), rated),
        (sample({"type": "video"}, "a", videos=[{"video": names, "sample_fps": 1}]), rated),
    ):
        np.testing.assert_array_equal(got.ids, want.ids)
        (one,), (other,) = got.images, want.images
        np.testing.assert_array_equal(one.patches, other.patches)
    with pytest.raises(InputError, match=r"6 video.s. for 1 .* is a list in the list"):
        sample(None, videos=names)
    with pytest.raises(InputError, match="videos: unknown key 'rate'"):
        sample(None, videos=[{"frames": names, "rate": 1}])


def test_a_record_may_be_a_list_of_records(tmp_path):
    """The packed form of the official code, in JSONL and in a JSON list; each has a name of its own."""
    one, two = ({"messages": [user(x), said(x)]} for x in "ab")
    lines = [[one, two], one, [two], [], "[{"]
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.json").write_text(json.dumps([[one, two], one]))
    found = records.open_records(Source(str(tmp_path / "a.jsonl")))
    names = [found.name(i) for i in range(len(found))]
    assert names == [
        "a.jsonl:1.1",
        "a.jsonl:1.2",
        "a.jsonl:2",
        "a.jsonl:3.1",
        "a.jsonl:4",
        "a.jsonl:5",
    ]
    assert [found.read(i)["messages"][1]["content"] for i in range(4)] == ["a", "b", "a", "b"]
    for index, words in ((4, "found list"), (5, "not JSON")):
        with pytest.raises(InputError, match=words):
            found.read(index)
    found = records.open_records(Source(str(tmp_path / "b.json")))
    assert [found.name(i) for i in range(3)] == ["b.json:1.1", "b.json:1.2", "b.json:2"]
    assert found.read(1)["messages"][1]["content"] == "b"


def test_columns_that_mean_nothing_are_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": json.dumps([user("a"), said("b")]), "label": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="found the columns label, which have no meaning"):
        records.open_records(Source(str(tmp_path / "a.parquet")))
    found = records.open_records(Source(str(tmp_path / "a.parquet"), ignore=("label",)))
    assert found.read(0)["messages"][1]["content"] == "b"


WRONG = {
    "a token without a row": ({"ids": 726}, "token 726 is outside the vocabulary of 726"),
    "a negative token": ({"ids": -3}, "token -3 is outside"),
    "a token of 64 bits": ({"ids": np.int64(2**32 + 5)}, "token 4294967301 is outside"),
    "tokens that are no whole numbers": ({"ids": np.float32}, "expected integers"),
    "a label without a row": ({"labels": 9999}, "9999 is neither -100 nor a token of 726"),
    "a label of another token": ({"labels": 5}, "neither their own token nor -100"),
    "no finite weight": ({"weights": np.nan}, "expected finite numbers from 0"),
    "a weight beyond float32": ({"weights": 1e39}, "expected finite numbers from 0"),
    "a negative weight": ({"weights": -1}, "expected finite numbers from 0"),
    "a negative position": ({"positions": -1}, "positions: expected whole numbers from 0"),
    "a placeholder too many": ({"ids": "image"}, "1 placeholders without an image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_ready_samples_are_checked_as_all_are(proc, case):
    """Ids, labels, weights and positions of a Sample that a class made."""
    changes, words = WRONG[case]
    good = sample_of(proc, [user("a"), said("b")])
    maker, changed = make_samples.SampleMaker(proc, Data(), PACK), {}
    for name, value in changes.items():
        array = getattr(good, name)
        if isinstance(value, type):
            changed[name] = array.astype(value)
            continue
        array = array.astype(np.float64 if isinstance(value, float) else np.int64)
        array[..., -2] = proc.config.image_token_id if value == "image" else value
        changed[name] = array
    if changes.get("ids") == "image":
        changed["labels"] = np.where(good.labels == good.ids[-2], -100, good.labels)
        changed["weights"] = np.where(changed["labels"] == -100, 0, good.weights)
    assert maker("x", good).ids.dtype == np.int32
    with pytest.raises(InputError, match=words):
        maker("x", dataclasses.replace(good, **changed))


def test_pixels_of_a_ready_sample_are_checked(proc):
    """What is normalised, not finite, or lies on other placeholders would be trained on as it is."""
    good = sample_of(proc, [user(PICTURE, FILM, "a"), said("b")])
    maker, (one, other) = make_samples.SampleMaker(proc, Data(), PACK), good.images
    for changed, words in (
        (
            dataclasses.replace(one, patches=one.patches.astype(np.float32)),
            "are float32, expected uint8",
        ),
        (dataclasses.replace(one, patches=one.patches * np.nan), "are float64, expected uint8 or"),
        (dataclasses.replace(one, patches=np.float32(one.patches) * np.nan), "not all finite"),
        (EncodedVideo(**vars(one)), "placeholders of its kind"),
        (dataclasses.replace(one, start=one.start + 1), "placeholders of its kind"),
        (dataclasses.replace(one, patches=one.patches[1:]), "patches have shape"),
    ):
        with pytest.raises(InputError, match=words):
            maker("x", dataclasses.replace(good, images=(changed, other)))
    with pytest.raises(InputError, match="placeholders without an image or video"):
        maker("x", dataclasses.replace(good, images=(one,)))


def test_tokens_that_a_tokenizer_has_beyond_the_embedding_are_refused(proc):
    """As infer.py refuses them: they would be clamped to the last row, and a target would count 0."""
    text = dataclasses.replace(proc.config.text, vocab_size=proc.tokenizer.id_of(END))
    small = dataclasses.replace(proc, config=dataclasses.replace(proc.config, text=text))
    with pytest.raises(InputError, match=f"is outside the vocabulary of {text.vocab_size}"):
        sample_of(small, [user("a"), said("b")])


@pytest.mark.parametrize(
    "path, words",
    [
        ("none.jsonl", "no such file"),
        ("a.txt", "unknown kind of file '.txt'"),
        ("empty.jsonl", "holds no record"),
        ("bad.parquet", "not a parquet file"),
        ("bad.array_record", "not an ArrayRecord file"),
        ("bad.json", "not JSON"),
        ("python:nowhere:Thing", "can be imported"),
        ("python:train_sources:Ready", "options do not fit"),
        ("python:.nowhere:Thing", "can be imported"),
        ("python:json:JSONDecoder", "a class with __len__ and __getitem__"),
    ],
)
def test_sources_that_cannot_be_opened(tmp_path, path, words):
    texts = {"a.txt": "x", "empty.jsonl": "\n\n", "bad.parquet": "x" * 99, "bad.json": "[1,"}
    for name, text in {**texts, "bad.array_record": "x" * 99}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        records.open_records(Source(path if ":" in path else str(tmp_path / path)))


def test_too_long_is_refused_or_cut_between_turns(proc):
    """A cut ends after an answer; a picture is whole or not there."""
    turns = [[user(PICTURE, f"number {i}"), said(f"answer {i}")] for i in range(4)]
    messages = [m for turn in turns for m in turn]
    sizes = [len(sample_of(proc, messages[:n]).ids) for n in (2, 4, 6, 8)]
    for length, kept in ((sizes[3], 4), (sizes[3] - 1, 3), (sizes[1], 2), (sizes[0], 1)):
        pack = dataclasses.replace(PACK, length=length)
        sample = sample_of(proc, messages, data=Data(too_long="cut"), pack=pack)
        assert len(sample.ids) == sizes[kept - 1] and len(sample.images) == kept
        assert learned(proc, sample)[-1] == f"answer {kept - 1}{END}"
        note = f"cut to {2 * kept} of 8 messages: {sizes[3]} tokens, pack.length is {length}"
        assert sample.note == (note if kept < 4 else "")
    short = dataclasses.replace(PACK, length=sizes[0] - 1)
    for data, pack in ((Data(), short), (Data(too_long="cut"), short)):
        with pytest.raises(
            make_samples.TooLarge, match=f"{sizes[3]} tokens, pack.length is {sizes[0] - 1}"
        ):
            sample_of(proc, messages, data=data, pack=pack)


def test_a_cut_thinking_turn_keeps_its_reasoning(processors):
    """Once it is the last, an answer is rendered anew: as the model would have to write it."""
    proc = processors["thinking"]
    messages = [user("a"), said("b", reasoning_content="why"), user("c " * 400), said("d")]
    pack = dataclasses.replace(PACK, length=60)
    sample = sample_of(proc, messages, data=Data(too_long="cut"), pack=pack)
    assert learned(proc, sample) == ["why\n</think>\n\nb" + END]


def test_vision_rows_hold_whole_merged_rows(proc):
    """Else the rows behind the first would show other patches than theirs."""
    pack = dataclasses.replace(PACK, vision_length=34)
    with pytest.raises(InputError, match=r"pack.vision_length is 34, expected a multiple of 4"):
        make_samples.SampleMaker(proc, Data(), pack)
    make_samples.SampleMaker(proc, Data(), dataclasses.replace(pack, vision_rows=0))


@pytest.mark.parametrize(
    "pack, words",
    [
        (dataclasses.replace(PACK, vision_length=32), "40 patches, pack.vision_length is 32; data"),
        (dataclasses.replace(PACK, vision_rows=0), "pack.vision_rows is 0"),
        (dataclasses.replace(PACK, vision_rows=1, vision_length=64), "a batch has 1 rows of 64"),
        (
            global_batches.divided(
                dataclasses.replace(PACK, rows=4, vision_rows=4, vision_length=64), 4
            ),
            "80 patches in its images and videos, each of 4 groups of a batch has 1 rows of 64",
        ),
    ],
)
def test_more_patches_than_there_are(proc, pack, words):
    with pytest.raises(make_samples.TooLarge, match=words):
        sample_of(proc, [user(PICTURE, PICTURE), said("b")], pack=pack)
