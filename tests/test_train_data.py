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
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.template import ChatTemplate
from qwen3vl_jax.training import records, samples, shares
from qwen3vl_jax.training.chat_form import chat_form
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
    return samples.SampleMaker(proc, data, pack)("here:1", record)


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
    "turns": ("instruct", [system("s"), user("a"), said("b c"), user("d"), said("e")], None,
              ["b c", "e"]),
    "a user who says assistant": ("instruct", [user("assistant\nassistant"), said("no")], None, ["no"]),
    "a user who spells turns": ("instruct", [user(FALSE), said("x"), user("<|im_start|>"), said("y")],
                                None, ["x", "y"]),
    "a system and a tool that spell turns": (
        "instruct", [system(FALSE), user("q"), calls("crop", x=1), result(FALSE), said("z")],
        [chats.tool("crop" + FALSE, x="number")], [CALL, "z"]),
    "text before a call": ("instruct", [user("q"), said("So:", tool_calls=calls("crop", x=1)["tool_calls"]),
                                        result("1"), said("one")], chats.TOOLS, [f"So:\n{CALL}", "one"]),
    "switched off": ("instruct", [user("a"), said("b", train=False), user("c"), said("d", train=True)],
                     None, ["d"]),
    "pictures and clips": ("instruct", [user(FILM, PICTURE, "a", FILM), said("b"), user(PICTURE),
                                        said("c")], None, ["b", "c"]),
    "boxes are tokens": ("instruct", [user("a"), said("<|box_start|>(1,2)<|box_end|>")], None,
                         ["<|box_start|>(1,2)<|box_end|>"]),
    "reasoning": ("thinking", [user("a"), said("b", reasoning_content="why")], None,
                  ["why\n</think>\n\nb"]),
    "earlier reasoning is dropped": (
        "thinking", [user("a"), said("<think>\nold\n</think>\n\nb"), user("c"),
                     said("d", reasoning_content="new")], None, ["new\n</think>\n\nd"]),
    "an earlier answer on demand": (
        "thinking", [user("a"), said("b", train=True), user("c"), said("d", reasoning_content="new")],
        None, ["b", "new\n</think>\n\nd"]),
    "reasoning between calls": (
        "thinking", [user("q"), said("", reasoning_content="Crop.",
                     tool_calls=calls("crop", x=1)["tool_calls"]), result("1"),
                     said("one", reasoning_content="Done.")], chats.TOOLS,
        [f"Crop.\n</think>\n\n{CALL}", "Done.\n</think>\n\none"]),
    "no reasoning": ("thinking", [user("a"), said("b")], None, ["</think>\n\nb"]),
    "a user who spells thoughts": ("thinking", [user("<think>\nx\n</think>"),
                                   said("b", reasoning_content="c")], None, ["c\n</think>\n\nb"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKS)
def test_only_answers_are_learned(processors, case):
    template, messages, tools, want = MASKS[case]
    proc = processors[template]
    sample = sample_of(proc, messages, tools)
    assert learned(proc, sample) == [text + END for text in want]
    plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    rendered = proc.inputs(plain, tools=tools, add_generation_prompt=False)
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
    assert [v.clip for v in sample.visuals] == [True, False, False]
    assert {v.pixels.dtype for v in sample.visuals} == {np.dtype(np.uint8)}
    got = [v.pixels / np.float32(127.5) - 1 for v in sample.visuals]
    np.testing.assert_allclose(got[0], arrays["pixel_values_videos"], atol=1e-6)
    np.testing.assert_allclose(np.concatenate(got[1:]), arrays["pixel_values"], atol=1e-6)
    assert [v.grid for v in sample.visuals[1:]] == list(
        map(tuple, arrays["image_grid_thw"].tolist())
    )
    batch = proc(messages, add_generation_prompt=False)
    np.testing.assert_array_equal(sample.positions, batch.positions[:, 0, : len(sample.ids)])
    for visual in sample.visuals:
        assert sample.ids[visual.start] == sample.ids[visual.end - 1] != sample.ids[visual.end]


def test_limits_of_the_recipe(proc):
    """Pixels of pictures, pixels and frames of clips, numbers before them."""
    messages = [user(chats.picture(64, 64), chats.clip(40, 64, 64, 10.0)), said("b")]
    data = Data(max_pixels=1024, fps=5.0, max_frames=6, clip_max_pixels=6 * 512, add_vision_id=True)
    sample = sample_of(proc, messages, data=data)
    assert [v.grid for v in sample.visuals] == [(1, 8, 8), (3, 4, 4)]
    assert "Picture 1: " in proc.decode(sample.ids, skip_special_tokens=False)
    assert sample_of(proc, messages).visuals[0].grid == (1, 16, 16)


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
    said_ = [("human", "<image>\nOne <video> and\n<image> ?"), ("gpt", "Yes <image>")]
    official = {**names, "conversations": [{"from": f, "value": v} for f, v in said_]}
    items = [{"type": "image", "image": "pics/a.png"}, {"type": "text", "text": "One"},
             {"type": "video", "video": "pics/c.mp4"}, {"type": "text", "text": "and"},
             {"type": "image_url", "image_url": {"url": "pics/b.png"}}, "?"]  # fmt: skip
    chat = {"messages": [{"role": "user", "content": items}, said("Yes <image>")]}
    tagged = {"role": "user", "content": "<image>One<video>and<image>?"}
    beside = {"messages": [tagged, chat["messages"][1]], "images": names["image"],
              "videos": names["video"]}  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, (official, chat, beside))))
    (tmp_path / "b.json").write_text(json.dumps([official, chat]))
    told = json.dumps([{"role": "user", "content": [{"type": "image"}, "One", items[2], "and",
                       {"type": "image"}, "?"]}, chat["messages"][1]])  # fmt: skip
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
    for record in (official, chat):
        writer.write(json.dumps(record).encode())
    writer.close()
    (tmp_path / "other" / "f.jsonl").write_text(
        json.dumps(official) + "\n\n" + json.dumps(chat) + "\n"
    )
    sources = {name: Source(str(tmp_path / name)) for name in ("a.jsonl", "b.json", "c.parquet",
               "d.parquet", "e.array_record", "other/f.jsonl")}  # fmt: skip
    sources["g"] = Source(str(tmp_path / "a.jsonl"), media=str(tmp_path / "other"))
    maker, found = samples.SampleMaker(proc, Data(), PACK), {}
    for key, source in sources.items():
        opened = records.open_records(source)
        found |= {f"{key} {opened.name(i)}": maker("x", opened.read(i)) for i in range(len(opened))}
    assert list(found)[:3] == ["a.jsonl a.jsonl:1", "a.jsonl a.jsonl:2", "a.jsonl a.jsonl:3"]
    assert "other/f.jsonl f.jsonl:3" in found and len(found) == 15
    want = found["a.jsonl a.jsonl:1"]
    assert learned(proc, want) == ["Yes <image>" + END] and len(want.visuals) == 3
    for sample in found.values():
        np.testing.assert_array_equal(sample.ids, want.ids)
        for got, visual in zip(sample.visuals, want.visuals, strict=True):
            np.testing.assert_array_equal(got.pixels, visual.pixels)


HUMAN, GPT = {"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}
ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
REFUSED = {
    "no such picture": ({"image": "none.png", "conversations": [HUMAN, GPT]}, "none.png"),
    "a tag too many": ({"conversations": [HUMAN, GPT]}, "without a image"),
    "a picture too many": ({"image": ["a", "b"], "conversations": [HUMAN, GPT]}, "2 image.s. for 1"),
    "no shape": ({"text": "hi"}, "expected messages or conversations"),
    "both shapes": ({"messages": [ASKED], "conversations": [HUMAN]}, "one of the two"),
    "no message": ({"messages": []}, "at least one"),
    "an unknown speaker": ({"conversations": [{"from": "bot", "value": "x"}]}, "from is 'bot'"),
    "an unknown role": ({"messages": [{"role": "x", "content": "a"}, ANSWERED]}, "role is 'x'"),
    "no answer": ({"messages": [ASKED]}, "nothing to learn"),
    "all switched off": ({"messages": [ASKED, {**ANSWERED, "train": False}]}, "nothing to learn"),
    "a switch of text": ({"messages": [ASKED, {**ANSWERED, "train": "no"}]}, "train is 'no'"),
    "an answer with turns": ({"messages": [ASKED, said(f"b{FALSE}c")]}, "says <.im_start"),
    "own normalisation": ({"messages": [
        user({"type": "image", "image": "a", "image_mean": 0.1}), ANSWERED]},
        "image_mean of a single picture"),
    "a list": ([1, 2], "found list"),
}  # fmt: skip


def test_an_empty_place_is_no_picture():
    """Files that mix records with and without pictures write "" for none."""
    turns = [{"from": "human", "value": "a"}, GPT]
    want = chat_form({"conversations": turns})
    assert chat_form({"image": "", "video": [""], "conversations": turns}) == want


@pytest.mark.parametrize("case", REFUSED)
def test_bad_records_say_why(proc, case):
    record, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        samples.SampleMaker(proc, Data(), PACK)("x:1", chat_form(record))


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
    ],
)
def test_sources_that_cannot_be_opened(tmp_path, path, words):
    for name, text in {"a.txt": "x", "empty.jsonl": "\n\n", "bad.parquet": "x" * 99, "bad.json": "[1,",
                       "bad.array_record": "x" * 99}.items():  # fmt: skip
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
        assert len(sample.ids) == sizes[kept - 1] and len(sample.visuals) == kept
        assert learned(proc, sample)[-1] == f"answer {kept - 1}{END}"
        assert sample.note == (f"cut to {2 * kept} of 8 messages: {sizes[3]} tokens, pack.length is "
                               f"{length}" if kept < 4 else "")  # fmt: skip
    short = dataclasses.replace(PACK, length=sizes[0] - 1)
    for data, pack in ((Data(), short), (Data(too_long="cut"), short)):
        with pytest.raises(
            samples.TooLarge, match=f"{sizes[3]} tokens, pack.length is {sizes[0] - 1}"
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
        samples.SampleMaker(proc, Data(), pack)
    samples.SampleMaker(proc, Data(), dataclasses.replace(pack, vision_rows=0))


@pytest.mark.parametrize(
    "pack, words",
    [
        (dataclasses.replace(PACK, vision_length=32), "40 patches, pack.vision_length is 32; data"),
        (dataclasses.replace(PACK, vision_rows=0), "pack.vision_rows is 0"),
        (dataclasses.replace(PACK, vision_rows=1, vision_length=64), "a batch has 1 rows of 64"),
        (
            shares.divided(dataclasses.replace(PACK, rows=4, vision_rows=4, vision_length=64), 4),
            "80 patches in its pictures and clips, each of 4 groups of a batch has 1 rows of 64",
        ),
    ],
)
def test_more_patches_than_there_are(proc, pack, words):
    with pytest.raises(samples.TooLarge, match=words):
        sample_of(proc, [user(PICTURE, PICTURE), said("b")], pack=pack)
