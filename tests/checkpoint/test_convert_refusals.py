"""What the converter refuses, each in one line, with exit code 2 and nothing written."""

import json
import re
import shutil

import hf_files as hf
import numpy as np
import pytest

from qwen3vl_jax import Config, InputError
from qwen3vl_jax.checkpoint.hf_reader import MismatchError, open_hf
from qwen3vl_jax.cli import convert as command
from qwen3vl_jax.cli.convert import main
from qwen3vl_jax.convert.to_hf import to_hf
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.storage import safetensors_files

NORM, Q = (f"model.language_model.{n}.weight" for n in ("norm", "layers.0.self_attn.q_proj"))


@pytest.fixture(scope="module")
def dense():
    """(config.json, weights) of a small dense model."""
    return hf.small()


@pytest.fixture(scope="module")
def sound(dense, tmp_path_factory):
    """A sound directory of two shards, to copy and to break."""
    raw, tensors = dense
    return hf.write(tmp_path_factory.mktemp("sound") / "hf", raw, tensors, shards=2)


def refused(capsys, tmp_path, *arguments) -> str:
    """The one line (and the list, if any) of a command that must fail and write nothing."""
    before = hf.listing(tmp_path)
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert out == ""
    assert hf.listing(tmp_path) == before
    return err


TENSORS = {
    "missing": (lambda t: t.pop(NORM), r"missing model.language_model.norm.weight \[40\]"),
    "unknown": (lambda t: t.update({"mtp.x": np.ones(3, np.float32)}), "unknown mtp.x in model"),
    "misshapen": (
        lambda t: t.update({Q: t[Q][:-1].copy()}),
        r"shape of .*q_proj.weight in model.safetensors: found \[95, 40\], expected \[96, 40\]",
    ),
    "transposed": (
        lambda t: t.update({Q: t[Q].T.copy()}),
        r"found \[40, 96\], expected \[96, 40\]",
    ),
    "duplicated": (
        lambda t: t.update({NORM.removeprefix("model."): t[NORM]}),
        "duplicated model.language_model.norm.weight: .* in model.safetensors and .* in model.s",
    ),
    "three_times": (
        lambda t: t.update({f"{n}norm.weight": t[NORM] for n in ("language_model.", "model.")}),
        "duplicated .*norm.weight: .* in model.safetensors and .* in .* and .* in .*",
    ),
    "integers": (
        lambda t: t.update({NORM: np.ones(40, np.int8)}),
        "dtype of .*norm.weight in .*: found I8, expected F64, F32, BF16, F16",
    ),
    "parts": (
        lambda t: t.update({Q: t[Q].astype(np.float32)}),
        "dtype of layers.0.attn.qkv: .*q_proj.weight float32, .*k_proj.* expected one for all parts",
    ),
    "scales": (
        lambda t: t.update({f"{Q}_scale_inv": np.ones(1, np.float32)}),
        r"scales .*q_proj.weight_scale_inv in .* that is BF16, expected F8_E4M3; take both from one",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit(kind, dense, tmp_path):
    """Each kind of problem names the tensor, what was found and what was expected."""
    raw, tensors = dense
    tensors = dict(tensors)
    change, message = TENSORS[kind]
    change(tensors)
    source = hf.write(tmp_path / "hf", raw, tensors)
    with pytest.raises(InputError, match=message) as error:
        to_orbax(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_all_problems_are_listed_at_once(dense, tmp_path, capsys):
    """One line with the first and the count, then a list of at most twenty."""
    raw, tensors = dense
    tensors = {f"strange.{i}": np.ones(1, np.float32) for i in range(30)} | tensors
    del tensors[NORM]
    source = hf.write(tmp_path / "hf", raw, tensors)
    lines = refused(capsys, tmp_path, source, tmp_path / "out").splitlines()
    assert lines[0].endswith("(and 30 more)")
    assert sum(line.startswith("  ") for line in lines) == 21
    assert lines[-1] == "  ... and 11 more"


def test_experts_that_do_not_fit(tmp_path):
    """A lost expert and a half-turned layer are named."""
    raw, tensors = hf.small(moe=True)
    cfg = Config.from_hf(raw)
    single = hf.one_by_one(tensors)
    lost = "model.language_model.layers.1.mlp.experts.3.up_proj.weight"
    del single[lost]
    with pytest.raises(MismatchError, match=f"missing {lost}") as error:
        open_hf(hf.write(tmp_path / "a", raw, single), cfg)
    assert len(error.value.problems) == 1
    half = dict(hf.turned(tensors))
    down = "model.language_model.layers.0.mlp.experts.down_proj"
    half[down] = tensors[down]
    with pytest.raises(MismatchError, match=rf"shape of {down} .* expected \[7, 40, 24\]") as error:
        open_hf(hf.write(tmp_path / "b", raw, half), cfg)
    assert len(error.value.problems) == 1


def _truncate(directory, keep=-1):
    path = next(directory.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:keep])


def _header(directory, change):
    path = next(directory.glob("model-00001*"))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _entry(directory, **changes):
    def change(text):
        header = json.loads(text)
        name = next(name for name in header if name != "__metadata__")
        header[name] |= changes
        return json.dumps(header).encode()

    _header(directory, change)


def _index(directory, text):
    (directory / safetensors_files.INDEX).write_text(text)


def _config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _only(directory, *names):
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    for name in names:
        (directory / name).write_bytes(b"x")


FILES = {
    "truncated": (_truncate, "model-00002-of-00002.safetensors: truncated: "),
    "truncated_header": (lambda d: _truncate(d, 100), "truncated or no safetensors file"),
    "empty_file": (lambda d: _truncate(d, 0), "truncated or no safetensors file"),
    "short_file": (
        lambda d: _truncate(d, 5),
        r"no safetensors file \(5 bytes, its header alone should have 5\)",
    ),
    "missing_shard": (
        lambda d: (d / "model-00001-of-00002.safetensors").unlink(),
        "shard model-00001-of-00002.safetensors of 2 is missing",
    ),
    "header_no_json": (lambda d: _header(d, lambda t: b"x" + t), "safetensors header: not JSON"),
    "header_no_object": (lambda d: _header(d, lambda t: b"[1]"), "header is no object"),
    "bad_offsets": (lambda d: _entry(d, data_offsets=[0, 1]), "contradicts itself"),
    "bad_shape": (lambda d: _entry(d, shape=[3, -1]), "contradicts itself"),
    "fp8_size": (lambda d: _entry(d, dtype="F8_E4M3"), "contradicts itself"),
    "other_fp8": (lambda d: _entry(d, dtype="F8_E5M2"), "found F8_E5M2, expected F64, .*, F8_E4M3"),
    "index_no_json": (lambda d: _index(d, "{"), "index.json: not JSON"),
    "index_no_map": (lambda d: _index(d, "{}"), "not a safetensors index"),
    "index_outside": (lambda d: _index(d, '{"weight_map": {"a": "../b"}}'), "a file outside"),
    "no_weights": (_only, "no weights found, expected model.safetensors"),
    "pickle": (lambda d: _only(d, "pytorch_model.bin"), "reading a pickle runs the code in it"),
    "adapter": (lambda d: _only(d, "adapter_model.safetensors"), "expected a whole model"),
    "no_config": (lambda d: (d / "config.json").unlink(), "config.json: cannot be read"),
    "quantised": (
        lambda d: _config(d, quantization_config={"quant_method": "awq"}),
        "quant_method: got 'awq', expected 'fp8'; take the bf16 release",
    ),
    "params_inside": (lambda d: (d / "params").mkdir(), "holds 'params'"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_cannot_be_read(kind, sound, tmp_path, capsys):
    """Each broken directory: one line that names the file and what to do, nothing written."""
    source = tmp_path / "hf"
    shutil.copytree(sound, source)
    change, message = FILES[kind]
    change(source)
    err = refused(capsys, tmp_path, source, tmp_path / "out")
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert re.search(message, line), line


def test_directories_that_are_in_the_way(sound, tmp_path, capsys):
    """An existing output, one inside the source (or around it), and one that is no checkpoint."""
    source = tmp_path / "a" / "hf"
    shutil.copytree(sound, source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for out, options, message in (
        (tmp_path / "full", [], "already exists; choose another directory or pass --force"),
        (tmp_path / "full", ["--force"], "--force replaces checkpoints only"),
        (tmp_path / "file", ["--force"], "got a file, expected a directory"),
        (source, ["--force"], "is inside"),
        (source / "inside", [], "is inside"),
        (tmp_path / "a", ["--force"], "or holds it"),
        (tmp_path / "file" / "x", [], "cannot be written"),
    ):
        assert message in refused(capsys, tmp_path, source, out, *options)
    missing = tmp_path / "none"
    assert "no such directory" in refused(capsys, tmp_path, missing, tmp_path / "out")
    assert "expected an Orbax checkpoint" in refused(
        capsys, tmp_path, "--to-hf", source, tmp_path / "out"
    )


def test_full_disk_is_refused_before_writing(sound, tmp_path, capsys, monkeypatch):
    """The space that the output needs is compared with what is free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    assert "1,000 bytes free" in refused(capsys, tmp_path, sound, tmp_path / "out")


def test_orbax_that_does_not_fit_its_config(sound, tmp_path, capsys):
    """--to-hf compares with the config too, and reports damage as one line."""
    orbax = tmp_path / "orbax"
    to_orbax(sound, orbax)
    raw = json.loads((orbax / "config.json").read_text())
    _config(orbax, text_config=raw["text_config"] | {"num_hidden_layers": 3})
    assert "missing layers.2." in refused(capsys, tmp_path, "--to-hf", orbax, tmp_path / "out")
    _config(orbax, text_config=raw["text_config"] | {"vocab_size": 321})
    err = refused(capsys, tmp_path, "--to-hf", orbax, tmp_path / "out")
    assert "shape of embed: found [320, 40], expected [321, 40]" in err
    _config(orbax, text_config=raw["text_config"])
    for path in (orbax / "params" / "ocdbt.process_0" / "d").iterdir():
        path.unlink()
    for path in (orbax / "params" / "d").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="not a readable Orbax checkpoint"):
        to_hf(orbax, tmp_path / "out")
    shutil.rmtree(orbax / "params")
    assert "holds no params" in refused(capsys, tmp_path, "--to-hf", orbax, tmp_path / "out")


def test_the_exit_code_of_what_ends_the_command_is_kept(sound, tmp_path, monkeypatch):
    def end(*_):
        raise SystemExit(3)

    monkeypatch.setattr(command, "_run", end)
    assert main([str(sound), str(tmp_path / "out")]) == 3
