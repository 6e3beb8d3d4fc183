"""Hugging Face -> Orbax -> Hugging Face: every byte back, every layout read, every bad file refused."""

import contextlib
import json
import math

import hf_files as hf
import numpy as np
import orbax.checkpoint as ocp
import pytest
import released
import tiny

from qwen3vl_jax import Config, InputError
from qwen3vl_jax.checkpoint import name_map
from qwen3vl_jax.checkpoint.hf_reader import MismatchError, open_hf
from qwen3vl_jax.cli.convert import main
from qwen3vl_jax.convert.to_hf import to_hf
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.storage import safetensors_files

TEXT = "model.language_model."
KINDS = {
    "dense": ("base", False),
    "moe": ("base", True),
    "tied": ("tied", False),
    "tied_moe": ("tied", True),
    "no_taps": ("no_taps", False),
    "biases": ("attention_bias", False),
    "mha": ("mha", False),
}
# Tensors in the released files (the shapes' sums are tested with the config).
RELEASED = {"2b": 625, "4b": 713, "8b": 750, "32b": 1058, "30b-a3b": 882, "235b-a22b": 1388}


@pytest.fixture(scope="module")
def moe():
    """(config.json, released weights) of a small sparse model."""
    return hf.small(moe=True)


@pytest.mark.parametrize("size", RELEASED)
def test_table_names_every_released_tensor(size):
    """As many tensors as a released checkpoint holds, each of whose axes the tree keeps."""
    rows = name_map.param_specs(Config.named(size))
    parts = [part for row in rows for part in row.parts]
    assert len({part.name for part in parts}) == len(parts) == RELEASED[size]
    for row in rows:
        assert math.prod(row.shape) == sum(math.prod(part.hf_shape) for part in row.parts)


def test_table_agrees_with_independent_names_and_shapes():
    """The names and shapes that the tests write down for themselves."""
    for variant, sparse in KINDS.values():
        raw = tiny.config_dict(variant, sparse)
        parts = [part for row in name_map.param_specs(Config.from_hf(raw)) for part in row.parts]
        assert {part.name: part.hf_shape for part in parts} == tiny.tensor_shapes(raw)


def test_one_part_is_a_view_and_split_undoes_assemble():
    """A single tensor is reshaped without a copy; fused ones come apart as they were."""
    raw, tensors = hf.small()
    cfg = Config.from_hf(raw)
    for row in name_map.param_specs(cfg):
        parts = [tensors[part.name] for part in row.parts]
        whole = row.assemble(parts)
        assert whole.shape == row.shape
        assert np.shares_memory(whole, parts[0]) == (len(parts) == 1)
    hf.assert_same(released.to_hf(cfg, released.from_hf(cfg, tensors)), tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip(kind, shards, tmp_path):
    """Every tensor's bytes, in three dtypes, from one file and several, and every other file."""
    raw, tensors = hf.small(*KINDS[kind])
    source = hf.write(tmp_path / "hf", raw, tensors, shards)
    (source / "pytorch_model.bin").write_bytes(b"a pickle beside safetensors is not needed")
    total = sum(tensor.nbytes for tensor in tensors.values())
    count, done = to_orbax(source, tmp_path / "orbax")
    assert done == total
    assert count < len(tensors)
    to_hf(tmp_path / "orbax", tmp_path / "back", shard_size=total // shards + 1000)
    back = tmp_path / "back"
    hf.assert_same(hf.read(back), tensors)
    for directory in (tmp_path / "orbax", back):
        for name in ("config.json", *hf.SIDE_FILES):
            assert (directory / name).read_bytes() == (source / name).read_bytes()
    weights = [p.name for p in back.iterdir() if safetensors_files.is_weight_file(p.name)]
    if shards == 1:
        assert weights == ["model.safetensors"]
        assert (back / weights[0]).read_bytes() == (source / weights[0]).read_bytes()
        return
    index = json.loads((back / safetensors_files.INDEX).read_text())
    assert index["metadata"] == {"total_size": total}
    assert index["weight_map"].keys() == tensors.keys()
    assert {*index["weight_map"].values(), safetensors_files.INDEX} == set(weights)


def test_orbax_restores_without_this_package(tmp_path):
    """The stock StandardCheckpointer gives the tree, layers as lists in order (more than ten)."""
    raw, tensors = hf.small(num_hidden_layers=12)
    to_orbax(hf.write(tmp_path / "hf", raw, tensors), tmp_path / "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "orbax" / "params")
    assert isinstance(tree["layers"], list)
    hf.assert_same(released.to_hf(Config.from_hf(raw), tree), tensors)


@pytest.mark.parametrize("layout", [hf.turned, hf.one_by_one])
def test_other_expert_layouts_give_the_released_one(layout, moe, tmp_path):
    """transformers 5's memory layout and matrices of their own are told apart by shape and name."""
    raw, tensors = moe
    to_orbax(hf.write(tmp_path / "hf", raw, layout(tensors), 2), tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(hf.read(tmp_path / "back"), tensors)


def test_ambiguous_experts_need_the_flag(tmp_path, capsys):
    """Where hidden_size is twice moe_intermediate_size a shape tells nothing: the flag decides."""
    raw, tensors = hf.small(moe=True, moe_intermediate_size=tiny.TEXT["hidden_size"] // 2)
    for name, held in (("released", tensors), ("transformers5", hf.turned(tensors))):
        source = hf.write(tmp_path / name, raw, held)
        assert main([str(source), str(tmp_path / "out")]) == 2
        assert "--expert-layout released or transformers5" in capsys.readouterr().err
        out = tmp_path / f"{name}.orbax"
        assert main([str(source), str(out), "--expert-layout", name]) == 0
        to_hf(out, tmp_path / f"{name}.back")
        hf.assert_same(hf.read(tmp_path / f"{name}.back"), tensors)
    with pytest.raises(MismatchError, match=r"found \[7, 40, 20\], expected \[7, 20, 40\]"):
        open_hf(tmp_path / "transformers5", Config.from_hf(raw), "released")


def test_square_down_projection_follows_gate_up(tmp_path):
    """Where moe_intermediate_size is hidden_size, gate_up alone tells how down lies."""
    raw, tensors = hf.small(moe=True, moe_intermediate_size=tiny.TEXT["hidden_size"])
    cfg = Config.from_hf(raw)
    for name, held in (("a", tensors), ("b", hf.turned(tensors))):
        leaves = open_hf(hf.write(tmp_path / name, raw, held), cfg)
        tree = name_map.tree_of(cfg, {path: leaf.load() for path, leaf in leaves.items()})
        hf.assert_same(released.to_hf(cfg, tree), tensors)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.language_model.", "model.").replace(
            "model.visual", "visual"
        ),
        lambda name: name.replace("model.language_model.", "language_model.model."),
        lambda name: name.removeprefix("model.").removeprefix("language_model."),
        lambda name: f"model.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("lm_head", "language_model.lm_head"),
    ],
    ids=["no_outer_model", "text_as_model", "llava", "bare", "twice", "wrapped", "head_inside"],
)
def test_prefixes_of_re_exports(rename, tmp_path):
    """Every re-export's names become the released ones; rotary buffers are left out."""
    raw, tensors = hf.small()
    held = {rename(name): tensor for name, tensor in tensors.items()}
    held["model.visual.rotary_pos_emb.inv_freq"] = np.ones(4, np.float32)
    held["language_model.rotary_emb.original_inv_freq"] = np.ones(4, np.float32)
    cfg = Config.from_hf(raw)
    leaves = open_hf(hf.write(tmp_path, raw, held), cfg)
    tree = name_map.tree_of(cfg, {path: leaf.load() for path, leaf in leaves.items()})
    hf.assert_same(released.to_hf(cfg, tree), tensors)


def test_tied_file_may_repeat_its_embedding(tmp_path):
    """An equal lm_head is dropped, one that differs is an error that says what to do."""
    raw, tensors = hf.small("tied")
    head = tensors[TEXT + "embed_tokens.weight"].copy()
    source = hf.write(tmp_path / "hf", raw, {**tensors, "lm_head.weight": head})
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(hf.read(tmp_path / "back"), tensors)
    head[-1, -1] += 1
    hf.write(source, raw, {**tensors, "lm_head.weight": head})
    with pytest.raises(InputError, match="set tie_word_embeddings to false"):
        to_orbax(source, tmp_path / "other")


def test_base_model_has_no_head(tmp_path, caplog):
    """An untied base model converts, with one line that says what it lacks, and comes back as it was."""
    raw, tensors = hf.small()
    del tensors["lm_head.weight"]
    to_orbax(hf.write(tmp_path / "hf", raw, tensors), tmp_path / "orbax")
    assert "no lm_head.weight" in caplog.text
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(hf.read(tmp_path / "back"), tensors)


def test_index_and_header_by_other_hands(tmp_path):
    """Shards without an index, an unaligned file, and a tensor of another dtype are read as they are."""
    raw, tensors = hf.small()
    source = hf.write(tmp_path / "hf", raw, tensors, 2)
    (source / safetensors_files.INDEX).unlink()
    for path in source.glob("*.safetensors"):  # one space more: every tensor now lies unaligned
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        path.write_bytes(
            (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
        )
    to_orbax(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    hf.assert_same(hf.read(tmp_path / "back"), tensors)


def test_command_line(tmp_path, capsys):
    """Both directions print tensors, bytes and speed; sizes are written in the usual ways."""
    raw, tensors = hf.small()
    source = hf.write(tmp_path / "hf", raw, tensors)
    assert main([str(source), str(tmp_path / "orbax")]) == 0
    arguments = ["--to-hf", str(tmp_path / "orbax"), str(tmp_path / "back")]
    assert main([*arguments, "--max-shard-size", "50KB"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "MB/s)" in out
    assert "to Orbax" in err
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 5
    hf.assert_same(hf.read(tmp_path / "back"), tensors)
    for bad in ("0", "5 parrots", "-1GB"):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, f"--max-shard-size={bad}"])
        assert stop.value.code == 2
    for given, words in (
        ([*arguments[1:], "--max-shard-size=5GB", "--force"], None),
        (
            [*arguments[1:], "--max-shard-size=5MB"],
            "--max-shard-size: means nothing without --to-hf",
        ),
        ([*arguments, "--expert-layout=released"], "--expert-layout: means nothing with --to-hf"),
        (["--verify", *arguments[1:]], "OUT_DIR: means nothing with --verify"),
        (["--verify", "x", "--force"], "--force: means nothing with --verify"),
        (["x"], "OUT_DIR is missing"),
        ([], "required: source"),
    ):
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            assert main(given) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and (words or "error: ") in said
