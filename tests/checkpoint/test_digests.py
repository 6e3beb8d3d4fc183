"""Digests: what is read is what was saved, in converted checkpoints and in the steps of a run."""

import contextlib
import random
import resource
import shutil
from types import SimpleNamespace

import hf_files as hf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import train_files
from jax.sharding import NamedSharding, PartitionSpec

from qwen3vl_jax import device_mesh
from qwen3vl_jax.checkpoint import digests
from qwen3vl_jax.checkpoint.digests import DamagedError
from qwen3vl_jax.checkpoint.orbax_io import open_tree
from qwen3vl_jax.cli import convert as command
from qwen3vl_jax.convert.to_hf import to_hf
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.loading import load
from qwen3vl_jax.training import checkpoints, recipe, run_dir, train_model
from qwen3vl_jax.training.checkpoints import Checkpoints, restore


@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16, np.int8, np.uint32, ml_dtypes.float8_e4m3fn]
)
def test_a_digest_is_the_same_wherever_an_array_lies(dtype, monkeypatch):
    """In numpy, on a device and over a mesh; one bit of any value, the shape and the dtype change it."""
    x = np.random.default_rng(0).normal(0, 50, (4, 12, 8)).astype(dtype)
    mesh = device_mesh.make_mesh({"data": 2, "tensor": 4})
    where = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    on_mesh = digests.digests({"a": jax.device_put(jnp.asarray(x), where)})
    assert on_mesh == digests.digests({"a": jnp.asarray(x)}) == {"a": digests.digest(x)}
    seen = {
        digests.digest(x),
        digests.digest(x.reshape(4, 96)),
        digests.digest(x.view(f"V{x.itemsize}")),
    }
    bits = np.unpackbits(x.view(np.uint8).ravel())
    for i in range(0, bits.size, 163):
        bits[i] ^= 1
        seen.add(digests.digest(np.packbits(bits).view(dtype).reshape(x.shape)))
        bits[i] ^= 1
    assert len(seen) == 3 + len(range(0, bits.size, 163))
    assert len({digests.digest(np.zeros(s, dtype)) for s in ((), (1,), (0, 3))}) == 3
    monkeypatch.setattr(digests, "_LARGE", 1)  # added by several threads
    assert {"a": digests.digest(x)} == on_mesh


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """A converted checkpoint."""
    folder = tmp_path_factory.mktemp("orbax")
    to_orbax(hf.write(folder / "hf", *hf.small()), folder / "orbax")
    return folder / "orbax"


def test_a_flipped_bit_loads_the_same_weights_or_is_refused(orbax, tmp_path):
    """In any file of an Orbax tree."""
    where, chance, refused = tmp_path / "params", random.Random(0), 0
    shutil.copytree(orbax / "params", where)
    want = {name: leaf.load() for name, leaf in open_tree(where).items()}
    for path in sorted(p for p in where.rglob("*") if p.is_file() and p.stat().st_size):
        data = path.read_bytes()
        for _ in range(12 if path.stat().st_size > 100_000 else 3):
            damaged, at = bytearray(data), chance.randrange(len(data))
            damaged[at] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            try:
                found = {name: leaf.load() for name, leaf in open_tree(where).items()}
            except InputError:
                refused += 1
            else:
                assert found.keys() == want.keys(), (path, at)
                for name, x in want.items():
                    assert x.tobytes() == found[name].tobytes(), (path, at, name)
        path.write_bytes(data)
    assert refused > 12


def test_a_damaged_checkpoint_is_found_by_verify_load_and_the_way_back(orbax, tmp_path, capsys):
    """One line that names the tensor; what is whole, or has no digests, is said too."""
    damaged = tmp_path / "damaged"
    shutil.copytree(orbax, damaged)
    assert command.main(["--verify", str(damaged)]) == 0
    assert "58 tensors" in (out := capsys.readouterr().out) and "as they were saved" in out
    largest = max((damaged / "params").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    assert command.main(["--verify", str(damaged)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is not as it was saved" in said
    for read in (load, lambda d: to_hf(d, tmp_path / "hf")):
        with pytest.raises(DamagedError, match="is not as it was saved"):
            read(damaged)
    assert not (tmp_path / "hf").exists()
    (damaged / "params" / digests.DIGESTS).unlink()
    assert command.main(["--verify", str(damaged)]) == 2
    assert "got no digests" in capsys.readouterr().err
    load(damaged)


def test_a_step_that_is_damaged_is_not_restored(tmp_path, capsys, monkeypatch):
    """Truncated, a bit of its arrays or of its meta: refused; the step before it is whole; --verify too."""
    ckpt = train_files.checkpoint(tmp_path / "ckpt")
    path = train_files.write_recipe(tmp_path / "recipe.toml", ckpt, tmp_path / "none.jsonl")
    settings, out = recipe.read_recipe(path), tmp_path / "run"
    trainable = train_model.prepare(settings, train_model.Config.from_hf(ckpt))
    rule = train_model.build_optimizer(
        settings, train_model.Config.from_hf(ckpt), trainable.weights
    )
    state = train_model.initial_state(settings, rule, trainable.weights)
    kept = Checkpoints(out, keep=2)
    for step in (5, 10):
        kept.save(state.replace(step=jnp.int32(step)), {"data": {"at": step}})
    kept.close()
    assert run_dir.read_meta(out, 10)["data"] == {"at": 10}
    assert int(restore(out, 10, state).step) == 10
    (out / "config.toml").touch()
    assert command.main(["--verify", str(out)]) == 0
    good = out / "checkpoints" / "10"
    files = sorted(good.glob("*/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    meta = good / "meta" / "metadata"

    def flip(data: bytes, at: int) -> bytes:
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    for path, change in (
        (files[-1], lambda data: data[: len(data) // 2]),
        (files[-1], lambda data: flip(data, len(data) // 2)),
        (meta, lambda data: flip(data, data.index(b'"at": ') + 6)),
    ):
        data = path.read_bytes()
        path.write_bytes(change(data))
        with pytest.raises(DamagedError, match="damaged") as error:
            run_dir.read_meta(out, 10)
            restore(out, 10, state)
        assert "\n" not in str(error.value)
        assert int(restore(out, 5, state).step) == 5
        assert command.main(["--verify", str(out)]) == 2
        assert "damaged: checkpoints/10/" in capsys.readouterr().err
        path.write_bytes(data)
    run_dir.set_aside(out, after=5)
    assert run_dir.saved_steps(out) == [5] and (out / "damaged" / "10").is_dir()
    kept = Checkpoints(out, keep=2)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match="1,000,000 bytes free"):
        kept.save(state.replace(step=jnp.int32(20)), {})
    kept.close()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["5"]
    monkeypatch.undo()
    kept, limits = Checkpoints(out, keep=2), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written \(File too large\); make room"):
            kept.save(state.replace(step=jnp.int32(15)), {})
            kept.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with contextlib.suppress(InputError):
            kept.close()
    assert run_dir.saved_steps(out) == [5] and int(restore(out, 5, state).step) == 5
