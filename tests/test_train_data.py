"""Training data: files to records, records to masked samples, and the order in which they come."""

import dataclasses
import io
import itertools
import json

import chats
import clips
import jax
import numpy as np
import pytest
import qwen_vocabulary
import toy_checkpoint as toy
from chats import calls, result, said, system, user
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.template import ChatTemplate
from qwen3vl_jax.training import feed as feeds
from qwen3vl_jax.training import records, samples
from qwen3vl_jax.training.recipe import Data, Pack, Source

PACK = Pack(rows=3, length=96, vision_rows=2, vision_length=256, lookahead=6)
WIDE = dataclasses.replace(PACK, length=2000, vision_length=4096)
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


def sample_of(proc, messages, tools=None, data=Data(), pack=WIDE):  # noqa: B008 frozen
    record = records.chat_form({"messages": messages} | ({"tools": tools} if tools else {}))
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
    maker, found = samples.SampleMaker(proc, Data(), WIDE), {}
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


@pytest.mark.parametrize("case", REFUSED)
def test_bad_records_say_why(proc, case):
    record, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        samples.SampleMaker(proc, Data(), WIDE)("x:1", records.chat_form(record))


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
        pack = dataclasses.replace(WIDE, length=length)
        sample = sample_of(proc, messages, data=Data(too_long="cut"), pack=pack)
        assert len(sample.ids) == sizes[kept - 1] and len(sample.visuals) == kept
        assert learned(proc, sample)[-1] == f"answer {kept - 1}{END}"
        assert sample.note == (f"cut to {2 * kept} of 8 messages: {sizes[3]} tokens, pack.length is "
                               f"{length}" if kept < 4 else "")  # fmt: skip
    short = dataclasses.replace(WIDE, length=sizes[0] - 1)
    for data, pack in ((Data(), short), (Data(too_long="cut"), short)):
        with pytest.raises(
            samples.TooLarge, match=f"{sizes[3]} tokens, pack.length is {sizes[0] - 1}"
        ):
            sample_of(proc, messages, data=data, pack=pack)


def test_a_cut_thinking_turn_keeps_its_reasoning(processors):
    """Once it is the last, an answer is rendered anew: as the model would have to write it."""
    proc = processors["thinking"]
    messages = [user("a"), said("b", reasoning_content="why"), user("c " * 400), said("d")]
    pack = dataclasses.replace(WIDE, length=60)
    sample = sample_of(proc, messages, data=Data(too_long="cut"), pack=pack)
    assert learned(proc, sample) == ["why\n</think>\n\nb" + END]


@pytest.mark.parametrize(
    "pack, words",
    [
        (dataclasses.replace(WIDE, vision_length=32), "a picture or frame of 40 patches"),
        (dataclasses.replace(WIDE, vision_rows=0), "pack.vision_rows is 0"),
        (dataclasses.replace(WIDE, vision_rows=1, vision_length=64), "80 patches in its pictures"),
    ],
)
def test_more_patches_than_there_are(proc, pack, words):
    with pytest.raises(samples.TooLarge, match=words):
        sample_of(proc, [user(PICTURE, PICTURE), said("b")], pack=pack)


def lines(path, texts) -> Source:
    """A file of short conversations, one a text."""
    kept = [{"messages": [user(text), said(f"to {text}")]} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return Source(str(path))


def take(feed, count):
    return list(itertools.islice(feed, count))


def names_of(drawn) -> list[str]:
    return [name for batch in drawn for row in batch.names for name in row]


def test_each_sample_once_an_epoch_in_a_new_order(proc, tmp_path):
    """Over two processes; the samples of an epoch that wait are in a later batch, none is lost."""
    source = lines(tmp_path / "a.jsonl", map(str, range(23)))
    parts = []
    for index in range(2):
        data, pack = Data(sources=(source,)), dataclasses.replace(PACK, length=64)
        feed = feeds.Feed(data, pack, proc, 7, process_index=index, process_count=2)
        got = names_of(take(feed, 12))
        waiting = [s.name for s in feed._waiting]
        assert feed.get_state()["next"] == len(got) + len(waiting)
        parts.append(got + waiting)
    order = [name for pair in zip(*parts) for name in pair]
    whole = {f"a.jsonl:{i}" for i in range(1, 24)}
    placed = [parts[0], parts[1]]
    epochs = [feed_order(proc, source, 7, epoch) for epoch in (0, 1)]
    assert set(epochs[0]) == set(epochs[1]) == whole and epochs[0] != epochs[1]
    assert len(order) > 46
    for index, part in enumerate(placed):  # what a process got is its stride of the epochs
        due = [*epochs[0], *epochs[1]][index::2]
        assert sorted(due) == sorted(set_of_first(part, due))


def feed_order(proc, source, seed, epoch):
    """The order of an epoch in one process, by a stream of the same seed."""
    feed = feeds.Feed(Data(sources=(source,)), PACK, proc, seed)
    return [feed._stream[23 * epoch + i].name for i in range(23)]


def set_of_first(part, due):
    """As many of the names of `part` as are due, counted with their repeats."""
    left, found = list(part), []
    for name in due:
        left.remove(name)  # raises where a due sample never came
        found.append(name)
    return found


def test_sources_are_mixed_by_weight(proc, tmp_path):
    a, b = (lines(tmp_path / f"{n}.jsonl", map(str, range(c))) for n, c in (("a", 40), ("b", 9)))
    data = Data(sources=(dataclasses.replace(a, weight=3.0), b))
    feed = feeds.Feed(data, PACK, proc, 0)
    names = [feed._stream[i].name for i in range(240)]
    assert sum(name.startswith("a") for name in names) == 180
    short = [name for name in names if name.startswith("b")]
    assert all(len(set(short[i : i + 9])) == 9 for i in range(0, 54, 9))
    long = [name for name in names if name.startswith("a")]
    assert all(len(set(long[i : i + 40])) == 40 for i in range(0, 160, 40))


def ready(workers=0, **options) -> Data:
    """Two endless sources of ready samples with pictures and clips."""

    def of(seed, count, weight):
        return Source("python:train_sources:Ready", weight, options={"count": count, "seed": seed})

    return Data(sources=(of(0, 23, 1.0), of(1, 11, 2.0)), workers=workers, **options)


@pytest.fixture(scope="module")
def tiny_proc(proc):
    """The small processor with the tokens of the ready samples."""
    import tiny

    from qwen3vl_jax.config import Config

    return dataclasses.replace(proc, config=Config.from_hf(tiny.config_dict()))


def same(got, want):
    assert [d.names for d in got] == [d.names for d in want]
    for one, other in zip(got, want, strict=True):
        assert one.stats == other.stats
        jax.tree.map(np.testing.assert_array_equal, one.packed, other.packed)


def test_a_feed_goes_on_where_it_stopped_whatever_its_workers(tiny_proc):
    """Killed after any batch, with samples waiting, in process and with two workers: bit for bit."""
    whole = take(feeds.Feed(ready(), PACK, tiny_proc, 3), 14)
    stopped, states = feeds.Feed(ready(), PACK, tiny_proc, 3), []
    for _ in range(9):
        states.append(json.loads(json.dumps(stopped.get_state())))
        next(stopped)
    assert max(len(state["waiting"]) for state in states) > 1
    for at in (0, 1, 4, 8):
        again = feeds.Feed(ready(), PACK, tiny_proc, 3)
        next(again)  # what it did before does not matter
        again.set_state(states[at])
        assert json.loads(json.dumps(again.get_state())) == states[at]
        same(take(again, 3), whole[at : at + 3])
    two = feeds.Feed(ready(workers=2), PACK, tiny_proc, 3)
    try:
        two.set_state(states[4])
        same(take(two, 4), whole[4:8])
        state = two.get_state()
    finally:
        two.close()
    again.set_state(state)
    same(take(again, 2), whole[8:10])


def test_a_state_of_other_data_is_refused(proc, tmp_path):
    a, b = (lines(tmp_path / f"{n}.jsonl", "xyz") for n in "ab")
    state = feeds.Feed(Data(sources=(a,)), PACK, proc, 0).get_state()
    for data, seed, word in ((Data(sources=(b,)), 0, "sources"), (Data(sources=(a,)), 1, "seed")):
        with pytest.raises(InputError, match=f"data position: {word} is"):
            feeds.Feed(data, PACK, proc, seed).set_state(state)


def test_one_pass_for_evaluation(proc, tmp_path):
    """In order, each once, the last batch not full; and the records themselves."""
    sources = tuple(
        lines(tmp_path / f"{n}.jsonl", map(str, range(c))) for n, c in (("a", 9), ("b", 5))
    )
    pack = dataclasses.replace(PACK, length=32)
    feed = feeds.Feed(Data(sources=sources), pack, proc, 0, once=True)
    drawn = list(feed)
    want = [f"a.jsonl:{i}" for i in range(1, 10)] + [f"b.jsonl:{i}" for i in range(1, 6)]
    assert sorted(names_of(drawn)) == sorted(want) and names_of(drawn[:1])[0] == "a.jsonl:1"
    shapes = {
        jax.tree.map(np.shape, d.packed) == jax.tree.map(np.shape, drawn[0].packed) for d in drawn
    }
    assert shapes == {True} and len(drawn) > 1 and drawn[-1].stats["samples"] < 14
    assert [name for name, _ in feed.records(11)] == want[:11]
    assert feed.records(1)[0][1]["messages"][-1]["content"] == "to 0"
    assert drawn[0].packed.batch.vision is not None  # of text alone: one shape whatever comes


def test_bad_records_are_named_and_stop_the_run_past_a_fraction(proc, tmp_path):
    source = lines(tmp_path / "a.jsonl", map(str, range(40)))
    rows = (tmp_path / "a.jsonl").read_text().splitlines()
    rows[6], rows[20] = (
        '{"messages": [',
        '{"image": "no.png", "conversations": [{"from": "human", "value": "<image>"}]}',
    )
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    feed = feeds.Feed(Data(sources=(source,), bad_fraction=0.06), PACK, proc, 0)
    assert not {"a.jsonl:7", "a.jsonl:21"} & set(names_of(take(feed, 30)))
    found = dict(feed.refused)
    assert found.keys() == {"a.jsonl:7", "a.jsonl:21"}
    assert found["a.jsonl:7"].startswith("not JSON") and f"{tmp_path}/no.png" in found["a.jsonl:21"]
    again = feeds.Feed(Data(sources=(source,), bad_fraction=0.06), PACK, proc, 0)
    again.set_state(json.loads(json.dumps(feed.get_state())))
    assert again.refused == feed.refused
    strict = feeds.Feed(Data(sources=(source,), bad_fraction=0.04), PACK, proc, 0)
    with pytest.raises(
        InputError, match=r"2 of \d+ records are bad.*\n  a.jsonl:\d+: .*\n  a.jsonl:"
    ):
        take(strict, 30)


def test_samples_that_are_refused_or_cut_are_listed(proc, tmp_path):
    source = lines(tmp_path / "a.jsonl", [*map(str, range(20)), "long " * 90])
    with open(source.path, "a") as file:
        more = [user("a"), said("b"), user("long " * 90), said("c")]
        file.write(json.dumps({"messages": more}) + "\n")
    feed = feeds.Feed(Data(sources=(source,), too_long="cut", bad_fraction=0), PACK, proc, 0)
    got = names_of(take(feed, 12))
    assert "a.jsonl:22" in got and "a.jsonl:21" not in got
    found = dict(feed.refused)
    assert found["a.jsonl:22"].startswith("cut to 2 of 4 messages: ")
    assert "tokens, pack.length is 96" in found["a.jsonl:21"]
    nothing = feeds.Feed(Data(sources=(source,)), dataclasses.replace(PACK, length=8), proc, 0)
    with pytest.raises(InputError, match="records do not fit a row"):
        next(nothing)
