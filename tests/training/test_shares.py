"""The batches of a mesh: groups with feeds of their own, the same on any mesh, and their one state."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import tiny
import toy_checkpoint as toy

from qwen3vl_jax import device_mesh
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model import sharding
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.training.data.global_batches import GlobalFeed, divided
from qwen3vl_jax.training.data.loader import DataLoader
from qwen3vl_jax.training.recipe import Data, Pack, Source

GROUPS = 4
DATA = Data(sources=(Source("python:train_sources:Ready", options={"count": 30}),))
PACK = Pack(rows=8, length=64, vision_rows=8, vision_length=64, lookahead=4)


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    """A processor with the tokens of the ready samples."""
    folder = tmp_path_factory.mktemp("toy")
    made = Processor.from_pretrained(toy.save(folder, template=toy.RELEASED_TEMPLATES["instruct"]))
    return dataclasses.replace(made, config=Config.from_hf(tiny.config_dict()))


@pytest.fixture(params=[None, {"fsdp": 4, "tensor": 2}, {"data": 2, "sequence": 4}], ids=str)
def mesh(request):
    return request.param and device_mesh.make_mesh(request.param)


def take(feed, count):
    drawn = itertools.islice(feed, count)
    return [dataclasses.replace(d, packed=jax.tree.map(np.asarray, d.packed)) for d in drawn]


def same(got, want):
    """Equal arrays in every field."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_group_is_the_feed_of_its_number(proc, mesh):
    """Whatever the mesh: tokens, pictures and where they lie are those of a feed for every group."""
    batches = take(GlobalFeed(DATA, PACK, proc, 3, GROUPS, mesh), 3)
    for g in range(GROUPS):
        alone = DataLoader(
            DATA, divided(PACK, GROUPS), proc, 3, process_index=g, process_count=GROUPS
        )
        rows = slice(2 * g, 2 * g + 2)
        for batch, want in zip(batches, take(alone, 3), strict=True):
            got, mine = batch.packed, want.packed
            assert got.batch.groups == GROUPS
            same(got.weights[0, rows], mine.weights)
            same(
                [x[0, rows] for x in jax.tree.leaves(got.batch.vision)],
                jax.tree.leaves(mine.batch.vision),
            )
            for name in ("tokens", "segment_ids", "vision_rows", "labels"):
                same(getattr(got.batch, name)[0, rows], getattr(mine.batch, name))
            same(got.batch.positions[0][:, rows], mine.batch.positions)
            assert batch.names[rows] == want.names
    feeds = [
        DataLoader(DATA, divided(PACK, GROUPS), proc, 3, process_index=g, process_count=GROUPS)
        for g in range(GROUPS)
    ]
    told = [take(feed, 1)[0].stats for feed in feeds]
    assert float(batches[0].stats["samples"]) == sum(t["samples"] for t in told)
    np.testing.assert_allclose(batches[0].stats["fill"], np.mean([t["fill"] for t in told]))


def shares_held(mesh, axes, rows):
    """Which part of the rows each device has: {device: (first, last)} of 1."""
    shape = (rows, 64)
    where = device_mesh.array_sharding(mesh, axes, jax.ShapeDtypeStruct(shape, np.int32))
    found = {d: index[0].indices(rows) for d, index in where.devices_indices_map(shape).items()}
    return {d: (first / rows, last / rows) for d, (first, last, _) in found.items()}


def test_the_patches_of_a_device_are_of_its_rows():
    """On every mesh of eight devices: so a process holds all groups that its devices' pictures are of."""
    meshes = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if np.prod(sizes) == 8]
    assert len(meshes) == 35
    for sizes, rows, vision_rows in itertools.product(meshes, (1, 2), (1, 2, 3, 4, 8)):
        mesh = device_mesh.make_mesh(dict(zip(sharding.AXES, sizes)))
        groups = sharding.max_parts("batch", mesh.shape)
        mine = shares_held(mesh, ("batch", "tokens"), groups * rows)
        seen = shares_held(mesh, ("vision_batch", "patches"), groups * vision_rows)
        assert all(mine[d][0] <= seen[d][0] and seen[d][1] <= mine[d][1] for d in mine), sizes


def test_one_pass_has_each_sample_once(proc, mesh):
    """Groups end one after another; those at their end are padding until the last one is."""
    pack = Pack(rows=4, length=64, vision_rows=4, vision_length=128, lookahead=2)
    drawn = take(GlobalFeed(DATA, pack, proc, 0, GROUPS, mesh, once=True), 99)
    names = sorted(name for batch in drawn for row in batch.names for name in row)
    assert names == sorted(f"ready:{i}" for i in range(30))
    empty = [row for batch in drawn for row in batch.names if not row]
    assert empty  # 30 samples in four groups are not even
    for batch in drawn:
        used = batch.packed.batch.segment_ids[0].any(1)
        assert used.tolist() == [bool(row) for row in batch.names]


def test_the_state_goes_on_on_another_mesh(proc, mesh):
    """JSON data, of all groups; another number of groups is another run."""
    shares = GlobalFeed(DATA, PACK, proc, 3, GROUPS, mesh)
    take(shares, 2)
    state = json.loads(json.dumps(shares.global_state(shares.get_state())))
    assert len(state["groups"]) == GROUPS
    want = take(shares, 2)
    other = GlobalFeed(
        DATA, PACK, proc, 3, GROUPS, device_mesh.make_mesh({"expert": 2, "fsdp": 2, "sequence": 2})
    )
    other.set_state(state)
    for a, b in zip(take(other, 2), want, strict=True):
        same(a.packed, b.packed)
        assert a.names == b.names
    with pytest.raises(InputError, match="4 groups of rows, this start 2"):
        GlobalFeed(DATA, PACK, proc, 3, 2).set_state(state)
    with pytest.raises(InputError, match=r"pack\.rows is 8, expected a multiple of 3"):
        GlobalFeed(DATA, PACK, proc, 3, 3)


def test_a_run_of_one_feed_goes_on_as_one_group(proc):
    """What a run on one device saved is taken on a mesh that does not cut rows."""
    feed = DataLoader(DATA, PACK, proc, 3)
    take(feed, 2)
    state = json.loads(json.dumps(feed.global_state(feed.get_state())))
    shares = GlobalFeed(DATA, PACK, proc, 3, 1, device_mesh.make_mesh({"tensor": 8}))
    shares.set_state(state)
    same(take(shares, 1)[0].packed.batch.tokens[0], take(feed, 1)[0].packed.batch.tokens)
