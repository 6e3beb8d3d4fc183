"""load, save_params and resolve: an Orbax directory, a Hugging Face directory, a Hub id, and bad ones."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hf_files as hf
import hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import to_hf

from qwen3vl_jax import Config, InputError, init_params
from qwen3vl_jax.checkpoint import config_files
from qwen3vl_jax.checkpoint.save import save_params
from qwen3vl_jax.cli.convert import main
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.loading import load
from qwen3vl_jax.storage import atomic_dir
from qwen3vl_jax.storage.hub import resolve

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"dense": ("base", False), "moe": ("base", True)}
KINDS |= {"tied": ("tied", False), "no_taps": ("no_taps", False)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(config, weights, Hugging Face directory, Orbax directory) of a small model."""
    raw, tensors = hf.small(*KINDS[request.param])
    folder = tmp_path_factory.mktemp("kind")
    source = hf.write(folder / "hf", raw, tensors, 2)
    to_orbax(source, folder / "orbax")
    return Config.from_hf(raw), tensors, source, folder / "orbax"


@pytest.fixture
def copies(tmp_path):
    """New, small (Hugging Face directory, Orbax directory) that a test may break."""
    source = hf.write(tmp_path / "hf", *hf.small(), 2)
    to_orbax(source, tmp_path / "orbax")
    return source, tmp_path / "orbax"


def test_load_gives_the_tree_of_init_params(kind):
    """Both directories give device arrays with the stored dtypes and values, in init_params's tree."""
    cfg, tensors, source, orbax = kind
    shapes = jax.eval_shape(functools.partial(init_params, cfg=cfg), jax.random.key(0))
    for directory in (source, orbax, str(orbax)):
        params, found = load(directory)
        assert found == cfg
        assert jax.tree.structure(params) == jax.tree.structure(shapes)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, params, shapes))
        hf.assert_same(to_hf(cfg, params), tensors)


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
def test_load_casts(copies, dtype):
    """Every tensor in the dtype asked for, rounded as the device rounds."""
    for directory in copies:
        stored, _ = load(directory)
        params, _ = load(directory, dtype=dtype)
        want = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), stored)
        assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, params, want))
        assert jax.tree.all(
            jax.tree.map(lambda x, y: bool((np.asarray(x) == y).all()), params, want)
        )


@pytest.mark.parametrize("dtype", ["int8", "bogus", bool, "float8_e4m3fn", "complex64"])
def test_load_casts_to_floats_only(copies, dtype):
    """A cast without a scale would leave nothing of the weights."""
    with pytest.raises(InputError, match=r"dtype: got .*expected float32, bfloat16 or float16"):
        load(copies[0], dtype=dtype)


def test_params_do_not_change_with_their_file(copies):
    """What load gives is a copy: a file written over later does not reach it."""
    source, _ = copies
    params, cfg = load(source)
    before = {name: tensor.copy() for name, tensor in to_hf(cfg, params).items()}
    for path in source.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-4000, os.SEEK_END)
            file.write(b"\x11" * 4000)
    hf.assert_same(to_hf(cfg, params), before)


def test_save_params_round_trip(kind, tmp_path):
    """Saved parameters load again, with the tokenizer and all that lay beside the weights."""
    cfg, tensors, source, orbax = kind
    params, _ = load(source)
    for number, (config, files) in enumerate(
        ((cfg, None), (cfg.to_hf(), source), (None, source), (None, orbax))
    ):
        out = tmp_path / str(number)
        save_params(out, params, config, files)
        again, found = load(out)
        assert found == cfg
        hf.assert_same(to_hf(cfg, again), tensors)
        assert all((out / name).is_file() == (files is not None) for name in hf.SIDE_FILES)
        assert not list(out.glob("*.safetensors*"))


def test_save_params_refuses(kind, tmp_path):
    """An output in the way, parameters of another model, and no config at all."""
    cfg, _, source, _ = kind
    params, _ = load(source)
    save_params(tmp_path / "out", params, cfg)
    with pytest.raises(InputError, match="already exists"):
        save_params(tmp_path / "out", params, cfg)
    save_params(tmp_path / "out", params, cfg, force=True)
    with pytest.raises(InputError, match=r"shape of norm: found \[3\], expected \[40\]"):
        save_params(tmp_path / "bad", {**params, "norm": jnp.ones(3)}, cfg)
    with pytest.raises(InputError, match="no config and no files_from"):
        save_params(tmp_path / "bad", params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_base_model_loads_without_a_head(copies, caplog):
    """Params without "head", and a line that says what that means."""
    source, _ = copies
    tensors = hf.read(source)
    del tensors["lm_head.weight"]
    for path in source.glob("*.safetensors*"):
        path.unlink()
    raw = json.loads((source / "config.json").read_text())
    params, _ = load(hf.write(source, raw, tensors))
    assert "head" not in params
    assert "it can embed, not generate" in caplog.text


def _reconfigure(directory, **text):
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw["text_config"] |= text
    path.write_text(json.dumps(raw))


def _unfinished(orbax):
    (orbax / "params").rename(orbax / "params.orbax-checkpoint-tmp")


BAD = {
    "no_config": (lambda d: (d / "config.json").unlink(), "cannot be read", "cannot be read"),
    "other_width": (
        lambda d: _reconfigure(d, intermediate_size=64),
        r"gate_proj.weight in .*: found \[56, 40\], expected \[64, 40\] \(and 5 more\)",
        r"shape of layers.0.mlp.down: found \[40, 56\], expected \[40, 64\] \(and 3 more\)",
    ),
    "more_layers": (lambda d: _reconfigure(d, num_hidden_layers=3), "missing", "missing layers.2."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_directories(name, copies):
    """One line for each, whichever form the checkpoint has."""
    change, *messages = BAD[name]
    for directory, message in zip(copies, messages):
        change(directory)
        with pytest.raises(InputError, match=message) as error:
            load(directory)
        assert "\n" not in str(error.value)


def test_checkpoint_without_weights(copies):
    """No weights, a missing shard, an Orbax checkpoint cut short or damaged."""
    source, orbax = copies
    shard = source / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(InputError, match=f"shard {shard.name} of 2 is missing"):
        load(source)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(InputError, match="no weights found"):
        load(source)
    # How many files hold the arrays is a matter of time: the largest holds some for certain.
    largest = max(orbax.glob("*/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(InputError, match="not a readable Orbax checkpoint") as error:
        load(orbax)
    assert "\n" not in str(error.value)
    _unfinished(orbax)
    with pytest.raises(InputError, match="was never finished"):
        load(orbax)


def test_resolve_names_what_is_no_checkpoint(tmp_path):
    """A file, a name that is no id, and a revision of a directory."""
    (tmp_path / "file").write_text("x")
    for name, revision, message in (
        (tmp_path / "file", None, "is a file, expected a checkpoint directory"),
        (tmp_path / "none", None, "no such directory"),
        ("none", None, "no such directory"),
        (tmp_path, "main", "is a directory; a revision"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(name, revision)
    assert resolve(str(tmp_path)) == tmp_path


def test_only_the_checkpoint_is_positional(tmp_path):
    """A call with the old order fails instead of taking a revision for a dtype."""
    with pytest.raises(TypeError, match="positional"):
        load(tmp_path, "float32")  # pyright: ignore


def test_where_there_is_no_lock(copies, tmp_path, monkeypatch):
    """Without fcntl (Windows) checkpoints are written all the same, with no flush of directories."""
    source, _ = copies
    monkeypatch.setattr(atomic_dir, "fcntl", None)
    monkeypatch.setattr(os, "fsync", None)
    with atomic_dir.atomic_dir(tmp_path / "new") as stage:
        config_files.copy_files(source, stage, names=[Path("config.json")])
    assert (tmp_path / "new" / "config.json").is_file()


def test_command_line_folds_lines(tmp_path, capsys):
    """A message with a line break (of a name, here) is still one line."""
    (tmp_path / "a\nb").write_text("x")
    for name, words in (("a\nb", "a b: is a file"), ("c\nd", "c d: no such directory")):
        assert main([str(tmp_path / name), str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err


# ---- Hub ids, against a server on this machine ----
ASK = """
import sys
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.errors import InputError
assert "jax" not in sys.modules
for line in sys.stdin:
    try:
        print(resolve(*line.split()))
    except InputError as e:
        print("error:", e)
"""


def ask(home: Path, endpoint: str, *questions: str, offline: bool = False) -> list[str]:
    """The answers of resolve in a new process: a path or an error each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment["HF_HUB_OFFLINE"] = str(int(offline))
    command, text = [sys.executable, "-W", "error", "-c", ASK], "\n".join(questions)
    done = subprocess.run(command, input=text, text=True, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_hub_ids(copies, tmp_path):
    """Fetched with and without a revision, then from the cache alone; weights in other forms are not."""
    source, _ = copies
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "tokenizer.json").write_text('{"revision": "v2"}')
    for name in ("pytorch_model.bin", "picture.png"):
        (source / name).write_bytes(b"not asked for")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (pickled / name).write_text("{}")
    home = tmp_path / "home"
    repos = {"Qwen/Tiny": {"main": source, "v2": other}, "Qwen/Old": {"main": pickled}}
    with hub.serve(repos) as server:
        good, bad = ("Qwen/Tiny", "Qwen/Tiny v2"), ("Qwen/Tiny v3", "Qwen/None", "No/../id")
        main, second, *errors, old = ask(home, server.url, *good, *bad, "Qwen/Old")
        assert not any("pytorch_model" in line or "png" in line for line in server.asked)
        commit = server.commit("Qwen/Tiny", "v2")
    assert commit is not None
    assert old.startswith("error: Qwen/Old: holds weights only as a pickle (pytorch_model.bin), ")
    assert errors == [
        "error: Qwen/Tiny at revision v3: the repository has no such revision",
        "error: Qwen/None: no such directory, and no such repository on the Hub",
        "error: No/../id: no such directory (a Hub id looks like Qwen/Qwen3-VL-2B-Instruct)",
    ]
    hf.assert_same(hf.read(Path(main)), hf.read(source))
    assert (Path(main) / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "v2" in (Path(second) / "tokenizer.json").read_text()
    load(main)
    to_orbax(Path(second), tmp_path / "converted")  # the cache holds links, the output files
    assert not any(path.is_symlink() for path in (tmp_path / "converted").rglob("*"))
    for offline in (False, True):  # the server is gone: no network, and no wish for one
        questions = (*good, f"Qwen/Tiny {commit}", "Qwen/Lost")
        *found, lost = ask(home, server.url, *questions, offline=offline)
        assert found == [main, second, second]
        assert lost.startswith("error: Qwen/Lost: no such directory; the Hub is out of reach")


def test_command_line_takes_a_hub_id(copies, tmp_path):
    """python -m convert ID OUT --revision, end to end, with warnings as errors."""
    source, _ = copies
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "convert",
        "Qwen/Tiny",
        "out",
        "--revision",
        "v2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    with hub.serve({"Qwen/Tiny": {"v2": source}}) as server:
        environment |= {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MB/s" in done.stdout
    params, cfg = load(tmp_path / "out")
    hf.assert_same(to_hf(cfg, params), hf.read(source))
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "already exists; choose another directory or pass --force"
    )
