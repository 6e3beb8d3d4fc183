"""The feed of a run: order, mixing, workers, what it does with bad records, and going on."""

import dataclasses
import itertools
import json
import pickle
import shutil
import types

import jax
import numpy as np
import pytest
import tiny
import toy_checkpoint as toy
import train_sources
from chats import said, user

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.training.data import loader as loaders
from qwen3vl_jax.training.data import packing, stream
from qwen3vl_jax.training.data.sample import Refusal, Sample
from qwen3vl_jax.training.recipe import Data, Pack, Source

PACK = Pack(rows=3, length=96, vision_rows=2, vision_length=256, lookahead=6)


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    """A processor with a small vocabulary."""
    folder = tmp_path_factory.mktemp("toy")
    return Processor.from_pretrained(toy.save(folder, template=toy.RELEASED_TEMPLATES["instruct"]))


def lines(path, texts) -> Source:
    """A file of short conversations, one a text."""
    kept = [{"messages": [user(text), said(f"to {text}")]} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return Source(str(path))


def take(feed, count):
    return list(itertools.islice(feed, count))


def names_of(drawn) -> list[str]:
    return [name for batch in drawn for row in batch.names for name in row]


def stream_of(feed, count) -> list[str]:
    return [feed._stream[place].name for place in range(count)]


def test_each_sample_once_an_epoch_in_a_new_order(proc, tmp_path):
    """Over two processes; the samples of an epoch that wait are in a later batch, none is lost."""
    data = Data(sources=(lines(tmp_path / "a.jsonl", map(str, range(23))),))
    whole = stream_of(loaders.DataLoader(data, PACK, proc, 7), 92)
    epochs = [whole[i : i + 23] for i in range(0, 92, 23)]
    assert all(set(epoch) == {f"a.jsonl:{i}" for i in range(1, 24)} for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    pack = dataclasses.replace(PACK, length=64)
    for index in range(2):
        feed = loaders.DataLoader(data, pack, proc, 7, process_index=index, process_count=2)
        got = names_of(take(feed, 6))
        got += [drawn.sample.name for drawn in feed._waiting]
        drawn = feed.get_state()["next"]
        assert drawn > 23 and sorted(got) == sorted(whole[index::2][:drawn])
    still = loaders.DataLoader(dataclasses.replace(data, shuffle=False), PACK, proc, 7)
    assert stream_of(still, 46) == [f"a.jsonl:{i}" for i in range(1, 24)] * 2


def test_sources_are_mixed_by_weight(proc, tmp_path):
    a, b = (lines(tmp_path / f"{n}.jsonl", map(str, range(c))) for n, c in (("a", 40), ("b", 9)))
    data = Data(sources=(dataclasses.replace(a, weight=3.0), b))
    names = stream_of(loaders.DataLoader(data, PACK, proc, 0), 240)
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
    return dataclasses.replace(proc, config=Config.from_hf(tiny.config_dict()))


def same(got, want):
    assert [d.names for d in got] == [d.names for d in want]
    for one, other in zip(got, want, strict=True):
        assert one.stats == other.stats
        jax.tree.map(np.testing.assert_array_equal, one.packed, other.packed)


def test_a_feed_goes_on_where_it_stopped_whatever_its_workers(tiny_proc):
    """Killed after any batch, with samples waiting, in process and with two workers: bit for bit."""
    whole = take(loaders.DataLoader(ready(), PACK, tiny_proc, 3), 14)
    stopped, states = loaders.DataLoader(ready(), PACK, tiny_proc, 3), []
    for _ in range(9):
        states.append(json.loads(json.dumps(stopped.get_state())))
        next(stopped)
    assert max(len(state["waiting"]) for state in states) > 1
    for at in (0, 1, 4, 8):
        again = loaders.DataLoader(ready(), PACK, tiny_proc, 3)
        next(again)  # what it did before does not matter
        again.set_state(states[at])
        assert json.loads(json.dumps(again.get_state())) == states[at]
        same(take(again, 3), whole[at : at + 3])
    two = loaders.DataLoader(ready(workers=2), PACK, tiny_proc, 3)
    try:
        two.set_state(states[4])
        same(take(two, 3), whole[4:7])
        state = two.get_state()  # batches that are packed ahead are not in it
    finally:
        two.close()
    again.set_state(state)
    same(take(again, 2), whole[7:9])


def test_a_state_of_other_data_is_refused(proc, tmp_path):
    a, b = (lines(tmp_path / f"{n}.jsonl", "xyz") for n in "ab")
    state = loaders.DataLoader(Data(sources=(a,)), PACK, proc, 0).get_state()
    for data, seed, word in ((Data(sources=(b,)), 0, "sources"), (Data(sources=(a,)), 1, "seed")):
        with pytest.raises(InputError, match=f"data position: {word} is"):
            loaders.DataLoader(data, PACK, proc, seed).set_state(state)


def test_one_pass_for_evaluation(proc, tmp_path):
    """In order, each once, the last batch not full; and the records themselves."""
    sources = tuple(
        lines(tmp_path / f"{n}.jsonl", map(str, range(c))) for n, c in (("a", 9), ("b", 5))
    )
    pack = dataclasses.replace(PACK, length=32)
    feed = loaders.DataLoader(Data(sources=sources), pack, proc, 0, once=True)
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
    feed = loaders.DataLoader(Data(sources=(source,), bad_fraction=0.06), PACK, proc, 0)
    assert not {"a.jsonl:7", "a.jsonl:21"} & set(names_of(take(feed, 30)))
    found = dict(feed.refused)
    assert found.keys() == {"a.jsonl:7", "a.jsonl:21"}
    assert found["a.jsonl:7"].startswith("not JSON") and f"{tmp_path}/no.png" in found["a.jsonl:21"]
    again = loaders.DataLoader(Data(sources=(source,), bad_fraction=0.06), PACK, proc, 0)
    again.set_state(json.loads(json.dumps(feed.get_state())))
    assert again.refused == feed.refused
    strict = loaders.DataLoader(Data(sources=(source,), bad_fraction=0.04), PACK, proc, 0)
    with pytest.raises(InputError, match=r"2 of \d+ records are bad.*: a.jsonl:.*; a.jsonl:"):
        take(strict, 30)


def test_bad_records_below_the_fraction_may_come_early(proc, tmp_path):
    """3 of 400 in the first ten, with 1% allowed; but not half of what is read, however long the file."""
    source = lines(tmp_path / "a.jsonl", map(str, range(400)))
    rows = (tmp_path / "a.jsonl").read_text().splitlines()
    data = Data(sources=(source,), shuffle=False, bad_fraction=0.01)
    (tmp_path / "a.jsonl").write_text("\n".join(["{ ", *rows[:4], "{ ", "{ ", *rows[7:]]))
    feed = loaders.DataLoader(data, PACK, proc, 0)
    assert names_of(take(feed, 2)) and len(feed.refused) == 3
    (tmp_path / "a.jsonl").write_text("\n".join(["{ ", "1"] * 2000))
    with pytest.raises(InputError, match=r"6 of 6 records are bad"):
        take(loaders.DataLoader(data, PACK, proc, 0), 100)


def test_samples_that_are_refused_or_cut_are_listed(proc, tmp_path):
    source = lines(tmp_path / "a.jsonl", [*map(str, range(20)), "long " * 90])
    with open(source.path, "a") as file:
        more = [user("a"), said("b"), user("long " * 90), said("c")]
        file.write(json.dumps({"messages": more}) + "\n")
    feed = loaders.DataLoader(
        Data(sources=(source,), too_long="cut", bad_fraction=0), PACK, proc, 0
    )
    got = names_of(take(feed, 12))
    assert "a.jsonl:22" in got and "a.jsonl:21" not in got
    found = dict(feed.refused)
    assert found["a.jsonl:22"].startswith("cut to 2 of 4 messages: ")
    assert "tokens, pack.length is 96" in found["a.jsonl:21"]
    nothing = loaders.DataLoader(
        Data(sources=(source,)), dataclasses.replace(PACK, length=8), proc, 0
    )
    with pytest.raises(InputError, match="records do not fit a row"):
        next(nothing)


def group_of_samples(config) -> list:
    """Samples of text, pictures and clips, one whose picture another shares, and a refusal."""
    rng = np.random.default_rng(0)
    kinds = train_sources.KINDS
    made = [train_sources.make(config, rng, kind, f"s{i}") for i, kind in enumerate(kinds)]
    seen = next(s for s in made if s.images)
    frames = seen.images[0].patches.reshape(-1, *config.vision.patch_shape)
    frames[:, :, 1] = frames[:, :, 0]  # a picture, whose second frame is its first
    named = np.arange(sum(len(v.patches) for v in seen.images) // 4)
    again = dataclasses.replace(seen, name="again", vision_labels=named, note="cut")
    return [*made, Refusal("bad", "no reason", bad=True), again]


@pytest.mark.parametrize("room", [True, False], ids=["shared memory", "pipe"])
def test_what_workers_send_is_what_comes(tiny_proc, monkeypatch, room):
    """An array, which grain moves through shared memory, or bytes where that has no room: one batch."""
    config, shape = tiny_proc.config, tiny_proc.config.vision.patch_shape
    given = group_of_samples(config)
    usage = types.SimpleNamespace(free=2**30 if room else 2**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    sent, block = pickle.loads(pickle.dumps(stream.SampleBlock.of(shape, given)))
    assert isinstance(block, np.ndarray) == room
    apart = sum(v.patches.nbytes for s in given[:-2] for v in s.images)
    table = 24 * sum(len(s.ids) for s in given if isinstance(s, Sample))
    assert len(block) < table + apart  # a shared picture once, and one frame of it
    got = sent.unpack(block)
    assert got[-2] == given[-2] and got[-1].note == "cut"
    batches = []
    for samples in ([s for s in group if isinstance(s, Sample)] for group in (given, got)):
        waiting = [packing.Pending(0, s) for s in samples]
        pack = dataclasses.replace(PACK, rows=9, vision_rows=9)
        placed, left = packing.choose(pack, waiting, lambda: None)
        assert not left
        batches.append(packing.build(config, pack, placed, np.uint8, True))
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_memory_is_given_out_again_once_no_view_is_left():
    memory = packing.BufferPool()
    first = memory.empty(5000)
    place, view = first.ctypes.data, first[7:9]
    del first
    other = memory.empty(5000)
    assert other.ctypes.data != place
    view[:] = 1
    del view
    assert memory.empty(6000).ctypes.data == place
