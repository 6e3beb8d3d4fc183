"""python -m convert --to-hf RUN_DIR: a saved step as Hugging Face files, merged or as an adapter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomli_w
import train_files
from hf_files import assert_same, read

import qwen3vl_jax as q3
from qwen3vl_jax.checkpoint.adapters import attach, merge
from qwen3vl_jax.checkpoint.device_load import weights_bytes
from qwen3vl_jax.checkpoint.peft_io import load_adapter
from qwen3vl_jax.cli import convert as command
from qwen3vl_jax.convert.from_run import run_to_hf
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.loading import source_of
from qwen3vl_jax.training import recipe, run_dir, train_model
from qwen3vl_jax.training.checkpoints import Checkpoints
from qwen3vl_jax.training.lora_targets import adapter_of
from qwen3vl_jax.training.run_dir import open_model, write_model_files
from qwen3vl_jax.training.run_params import SavedStep
from qwen3vl_jax.training.run_setup import plain


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint whose embedding has rows to spare."""
    return train_files.checkpoint(tmp_path_factory.mktemp("export") / "ckpt", spare=8)


def saved(folder, ckpt, change=lambda weights: weights, scores=(None,), **tables):
    """A run's directory with a step for each score (10, 20, ..), its weights changed; no step is run."""
    folder.mkdir()
    path = train_files.write_recipe(folder / "recipe.toml", ckpt, folder / "none.jsonl", **tables)
    settings, out = recipe.read_recipe(path), folder / "run"
    out.mkdir()
    (out / run_dir.CONFIG).write_text(tomli_w.dumps(plain(dataclasses.asdict(settings))))
    write_model_files(settings, out / run_dir.MODEL)
    proc, ids = open_model(settings, out / run_dir.MODEL)
    trainable = train_model.prepare(settings, proc.config, ids)
    rule = train_model.build_optimizer(settings, proc.config, trainable.weights)
    state = train_model.initial_state(settings, rule, trainable.weights)
    kept = Checkpoints(out, keep=len(scores))
    for i, score in enumerate(scores, 1):
        new = state.replace(step=jnp.int32(10 * i), weights=change(state.weights))
        kept.save(new, {}, score)
    kept.close()
    return out, settings


def same_trees(got, want):
    """The same config, structure, dtypes and bytes."""
    assert got[1] == want[1]
    flat = jax.tree.leaves_with_path(got[0])
    for (path, a), (other, b) in zip(flat, jax.tree.leaves_with_path(want[0]), strict=True):
        assert (path, a.dtype, a.tobytes()) == (other, b.dtype, b.tobytes())


def test_what_was_not_changed_is_the_checkpoint_again(tmp_path, ckpt):
    """Frozen and trained tensors, in the dtypes and bytes of the files they came from; the rest too."""
    out, settings = saved(tmp_path / "a", ckpt, train={"freeze": ["vision", "layers.attn.*"]})
    run_to_hf(out, tmp_path / "hf")
    assert_same(read(tmp_path / "hf"), read(ckpt))
    same_trees(q3.load(out), q3.load(ckpt))  # --ckpt RUN_DIR
    # What infer.py asks before it chooses a mesh.
    held = weights_bytes(source_of(out, q3.Config.from_hf(out)), "float32")
    assert held == weights_bytes(source_of(ckpt, q3.Config.from_hf(ckpt)), "float32")
    assert q3.Processor.from_pretrained(out).stop_ids == q3.Processor.from_pretrained(ckpt).stop_ids
    with pytest.raises(InputError, match="holds no adapter"):
        q3.load(ckpt, adapter=out)
    assert command.main([str(out), str(tmp_path / "no")]) == 2
    with pytest.raises(InputError, match="a run of train"):
        write_model_files(dataclasses.replace(settings, ckpt=str(out)), tmp_path / "no")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (ckpt / name).read_bytes()


def test_trained_weights_average_and_new_tokens(tmp_path, ckpt, capsys):
    """The command: the average by default, the weights by --raw; new tokens are in the tokenizer."""
    tables = {"train": {"new_tokens": ["<new>"]}, "optimizer": {"ema": 0.5}}
    out, settings = saved(
        tmp_path / "b", ckpt, lambda w: {n: x + 1 for n, x in w.items()}, **tables
    )
    assert command.main(["--to-hf", str(out), str(tmp_path / "mean")]) == 0
    assert "step 10, averaged weights" in capsys.readouterr().out
    assert command.main(["--to-hf", "--raw", str(out), str(tmp_path / "raw")]) == 0
    first = train_model.prepare(settings, q3.Config.from_hf(ckpt), [_id(out)]).weights
    same_trees(q3.load(out), q3.load(tmp_path / "mean"))
    for folder, more in (("mean", 0), ("raw", 1)):
        params, _ = q3.load(tmp_path / folder)
        for name in ("embed", "norm"):
            want = (first[name] + more).astype(params[name].dtype)
            assert np.array_equal(params[name], want), (folder, name)
    rows = np.asarray(first["embed"])
    assert np.allclose(rows[_id(out)], rows[: _id(out)].mean(0), atol=1e-6)
    proc = q3.Processor.from_pretrained(tmp_path / "raw")
    assert proc.tokenizer.encode("a<new>b").count(_id(out)) == 1


def _id(out) -> int:
    return q3.Processor.from_pretrained(out / "model").tokenizer.id_of("<new>")


def test_step_is_best_last_or_a_number(tmp_path, ckpt, capsys):
    """Best is the lowest evaluation loss, and the default where there is one."""
    out, _ = saved(
        tmp_path / "c", ckpt, scores=(3.0, 1.0, 2.0), train={"freeze": ["vision", "text"]}
    )
    for step, number in ((None, 20), ("best", 20), ("last", 30), ("10", 10)):
        asked = ["--step", step] if step else []
        target = tmp_path / f"out_{step}"
        assert command.main(["--to-hf", *asked, str(out), str(target)]) == 0
        assert f"step {number}, " in capsys.readouterr().out
    refused = {
        "--step=7": "expected best, last or one of 10, 20, 30",
        "--adapter": "lora.rank is 0",
    }
    for option, words in refused.items():
        assert command.main(["--to-hf", option, str(out), str(tmp_path / "no")]) == 2
        assert words in capsys.readouterr().err
    assert command.main(["--to-hf", "--step=1", str(ckpt), str(tmp_path / "no")]) == 2
    assert "are for --to-hf and a run's directory" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["float32", "int8"])
def test_lora_is_merged_or_written_as_an_adapter(tmp_path, ckpt, base):
    """Merged: the released base plus the adapter in fp32; --adapter: the matrices that PEFT loads."""

    def grown(weights):
        return {
            n: x + 0.1 * jax.random.normal(jax.random.key(i), x.shape)
            for i, (n, x) in enumerate(weights.items())
        }

    lora = {"rank": 2, "base": base, "targets": ["text", "merger"]}
    out, settings = saved(tmp_path / "d", ckpt, grown, lora=lora, optimizer={"ema": 0.0})
    cfg = q3.Config.from_hf(ckpt)
    run_to_hf(out, tmp_path / "hf")
    assert (
        run_to_hf(out, tmp_path / "peft", SavedStep(adapter=True))[2] == "step 10, PEFT adapter, "
    )
    weights, adapter = load_adapter(tmp_path / "peft", cfg)
    trainable = train_model.prepare(settings, cfg)
    for name, x in grown(trainable.weights).items():
        np.testing.assert_array_equal(weights[name], x)
    assert adapter == adapter_of(settings, cfg)
    plain_base, _ = q3.load(ckpt, dtype="float32")
    want = q3.unstack_layers(merge(attach(q3.stack_layers(plain_base), cfg, weights, adapter)))
    got, _ = q3.load(tmp_path / "hf")
    same_trees(q3.load(out), (got, cfg))  # --ckpt RUN_DIR and --adapter RUN_DIR
    same_trees(q3.load(ckpt, adapter=out), q3.load(ckpt, adapter=tmp_path / "peft"))
    flat = jax.tree.leaves_with_path(got)
    for (path, a), b in zip(flat, jax.tree.leaves(want)):
        # the base is bf16 there and sums are rounded to it: 8 bits
        np.testing.assert_allclose(
            a.astype(np.float32), b, rtol=2**-7, atol=2**-9, err_msg=str(path)
        )


def test_a_run_without_a_step_is_refused(tmp_path, ckpt):
    """One line that says what was expected."""
    out, _ = saved(tmp_path / "e", ckpt, scores=())
    with pytest.raises(InputError, match="found no step in checkpoints/"):
        run_to_hf(out, tmp_path / "hf")
