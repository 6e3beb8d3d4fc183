"""The demo's recipes through train.py: a short packed run learns, and its files answer."""

import csv
from pathlib import Path

import numpy as np
import pytest

import qwen3vl_jax as q3
import train
from demo import files
from qwen3vl_jax.cli.convert import main as convert
from qwen3vl_jax.training.recipe import read_recipe

CONFIGS = Path(train.__file__).parent / "configs"
SMALL = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 1,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}
SHORT = """
    steps=40 save_every=40 data.workers=0 data.sources.0.options.few=100
    data.sources.0.options.clips=0.3 data.sources.0.options.length=192 pack.rows=3
    pack.length=256 pack.vision_rows=3 optimizer.warmup=5 optimizer.learning_rate=4e-3
    step.dtype=float32 step.loss_chunk=768 evaluate.every=0 report.tensorboard=false
    checkpoints.keep_best=0
""".split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with the demo's files and no weights, of a model that compiles in seconds."""
    folder = tmp_path_factory.mktemp("demo") / "small"
    make = files.make_config

    def make_small(tokenizer):
        config = make(tokenizer)
        for part, changes in SMALL.items():
            config[part].update(changes)
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "make_config", make_small)
        files.write(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(small, tmp_path_factory):
    """A short run of the demo's own recipe."""
    out = tmp_path_factory.mktemp("demo") / "run"
    command = ["--config", str(CONFIGS / "demo.toml"), "--out", str(out), f"ckpt={small}", *SHORT]
    assert train.main(command) == 0
    return out


def column(path, name):
    """One column of a table of a run."""
    with path.open() as file:
        return np.array([float(row[name]) for row in csv.DictReader(file)])


def test_a_short_run_of_the_demo_learns(run_dir):
    """Answers and the names of what is seen get better, in rows that are well filled; each step once."""
    metrics = run_dir / "metrics.csv"
    assert np.array_equal(column(metrics, "step"), np.arange(1, 41))
    for name in ("loss", "vision_loss"):
        values = column(metrics, name)
        assert values[-5:].mean() < 0.75 * values[:5].mean(), name
    assert column(metrics, "fill").mean() > 0.8


def test_the_run_becomes_a_checkpoint(run_dir, tmp_path):
    """Hugging Face files of a run that began from nothing: they load, and write an answer."""
    out = tmp_path / "checkpoint"
    assert convert(["--to-hf", str(run_dir), str(out)]) == 0
    assert {path.name for path in out.iterdir()} >= {"config.json", "tokenizer.json"}
    params, cfg = q3.load(out)
    batch = q3.Processor.from_pretrained(out)([{"role": "user", "content": "Hello"}])
    assert q3.generate(params, cfg, batch, max_new_tokens=2).lengths[0] >= 1


def test_the_new_task_is_a_recipe_of_lora():
    """configs/demo_reverse.toml trains and asks different scans; its base may be of 8 bits."""
    recipe = read_recipe(CONFIGS / "demo_reverse.toml", ["lora.base=int8"])
    assert recipe.lora.rank and recipe.lora.base == "int8" and recipe.evaluate.generate >= 100
    trained, asked = recipe.data.sources[0], recipe.evaluate.sources[0]
    assert trained.options["part"] == "train" and asked.options["part"] == "held_out"
