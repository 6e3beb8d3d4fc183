"""train.py: recipes, the packed vision windows, the weighted loss, and that a short run learns."""

import csv
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3vl_jax as q3
import train
from demo import examples, files
from qwen3vl_jax.errors import InputError

RECIPE = Path(train.__file__).parent / "configs" / "demo.toml"
SMALL = {
    "text_config": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 1,
        "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1],
    },
}  # fmt: skip


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A directory with the demo's files, of a model that compiles in seconds."""
    make = files.make_config

    def make_small(tokenizer):
        config = make(tokenizer)
        for part, changes in SMALL.items():
            config[part].update(changes)
        return config

    monkeypatch.setattr(files, "make_config", make_small)
    folder = tmp_path / "small"
    files.write(folder)
    return folder


def test_recipe_takes_changes():
    """Numbers, strings and tables; an int where the recipe has a float."""
    changes = ["steps=7", "dtype=float32", "optimizer.learning_rate=1", "batch.rows=4"]
    recipe = train.read_recipe(RECIPE, changes)
    assert recipe["steps"] == 7 and recipe["dtype"] == "float32" and recipe["batch"]["rows"] == 4
    assert isinstance(recipe["optimizer"]["learning_rate"], float)
    assert train.read_recipe(RECIPE, [])["steps"] > 1000


@pytest.mark.parametrize(
    "change", ["step=7", "optimizer=1", "a.b.c=1", "steps", "steps=many", "steps=1.5", "dtype=1"]
)
def test_recipe_refuses_changes_it_does_not_know(change):
    """Unknown keys, tables and values of another type, by name."""
    with pytest.raises(InputError, match=change.split("=", maxsplit=1)[0]):
        train.read_recipe(RECIPE, [change])


@pytest.mark.parametrize(
    ("change", "words"),
    [("steps=0", "steps is 0"), ("steps=9", "optimizer.warmup"), ("batch.rows=0", "batch.rows is 0"),
     ("report.every=0", "report.every is 0"), ("clips=1.5", "clips is 1.5"),
     ("workers=-1", "workers is -1"), ("dtype=int7", "int7")],
)  # fmt: skip
def test_numbers_that_no_run_can_have(tmp_path, capsys, change, words):
    """One line and exit code 2, before anything is written."""
    out = tmp_path / "out"
    assert train.main(["--config", str(RECIPE), "--out", str(out), change]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert words in line and not out.exists()


def test_a_row_too_short_to_ask_in_is_named():
    shape = examples.Shape(rows=4, length=64, windows=2)
    with pytest.raises(InputError, match=r"batch\.length is 64"):
        for step in range(20):
            examples.make_batch(str(examples.CHECKPOINT), "train", shape, 0, step)


def test_command_line_ends_with_one_line(tmp_path, capsys):
    """No recipe, and a directory that is in the way: exit code 2, one line, nothing written."""
    out = tmp_path / "out"
    assert train.main(["--config", str(tmp_path / "none.toml"), "--out", str(out)]) == 2
    assert not out.exists()
    (tmp_path / "kept.txt").write_text("kept")
    assert train.main(["--config", str(RECIPE), "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 2 and "none.toml" in lines[0] and "--force" in lines[1]


@pytest.mark.parametrize("clips", [0.0, 0.5])
def test_windows_encode_as_pictures_alone(small, clips):
    """Packed uint8 windows give the features, and the logits, of the ordinary path."""
    cfg = q3.Config.from_hf(small)
    params = jax.jit(functools.partial(train.init, cfg=cfg))(jax.random.key(0))
    shape = examples.Shape(rows=6, length=160, windows=4)
    batch = examples.make_batch(str(small), "train", shape, 0, 2, clips=clips)
    seen = np.isin(batch.tokens, [cfg.image_token_id, cfg.video_token_id])
    assert (batch.vision_rows[seen] >= 0).all() and (batch.vision_rows[~seen] == -1).all()

    @jax.jit
    def run(batch):
        features = train.encode_windows(params, cfg, batch.vision)
        return q3.forward(params, cfg, batch.replace(vision=None), features=features)

    packed = run(batch)
    pixels, grids = {False: [], True: []}, {False: [], True: []}
    vision, used = batch.vision, batch.segment_ids > 0
    assert vision is not None
    for row, tokens in zip(batch.vision_rows, batch.tokens, strict=True):
        if (row >= 0).any():
            clip = bool((tokens == cfg.video_token_id).any())
            first, count = 4 * int(row.max() + 1 - (row >= 0).sum()), 4 * int((row >= 0).sum())
            window, start = divmod(first, examples.WINDOW)
            place = (window, slice(start, start + count))
            pixels[clip].append(vision.pixels[place] / np.float32(127.5) - 1)
            high, wide = vision.coords[place].max(0) + 1
            grids[clip].append([count // (high * wide), high, wide])
    assert all(t == 1 for t, _, _ in grids[False]) and all(t > 1 for t, _, _ in grids[True])
    assert bool(grids[True]) == (clips > 0) and grids[False]
    arrays = {"pixel_values": pixels[False], "pixel_values_videos": pixels[True]}
    arrays = {name: np.concatenate(x) for name, x in arrays.items() if x}
    plain = q3.make_batch(
        cfg, input_ids=batch.tokens, attention_mask=batch.segment_ids, pad=False, **arrays,
        image_grid_thw=grids[False] or None, video_grid_thw=grids[True] or None,
    )  # fmt: skip
    assert np.array_equal(plain.positions, batch.positions)
    alone = jax.jit(functools.partial(q3.forward, params, cfg))(plain)
    scale = np.abs(alone[used]).max()
    assert np.abs(packed - alone)[used].max() < 1e-5 * scale


def test_batches_follow_from_seed_and_step():
    """The same step twice is the same; another step, seed or part is not."""
    shape = examples.Shape(rows=4, length=256, windows=3)
    folder = str(examples.CHECKPOINT)
    batch, again, other, held_out = (
        examples.make_batch(folder, part, shape, seed, 5, clips=0.5)
        for part, seed in (("train", 0), ("train", 0), ("train", 1), ("held_out", 0))
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, batch, again))
    for x in (other, held_out):
        assert not np.array_equal(batch.vision.pixels, x.vision.pixels)
    # Labels are the token of their own place, and on placeholders what the model should see there.
    cell, answer = batch.vision_rows >= 0, train.answer_labels(batch) >= 0
    words = examples.Words(folder)
    assert np.array_equal(batch.labels >= 0, cell | answer) and not (cell & answer).any()
    assert np.array_equal(batch.labels[answer], batch.tokens[answer])
    assert set(batch.labels[cell]) <= {*words.seen, words.nothing}


def test_answers_weigh_by_the_root_of_their_length():
    """Each run of n labels weighs sqrt(n) in all; right answers are runs without a miss."""
    counted = np.array([[0, 1, 1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 1, 1]], bool)
    weights = np.asarray(train.answer_weights(jnp.asarray(counted)))
    root = 0.5**0.5
    assert np.allclose(weights, [[0, 0.5, 0.5, 0.5, 0.5, 0, 1, 0], [1, 0, 0, 0, 0, 0, root, root]])
    labels = np.where(np.pad(counted, ((0, 0), (1, 0))), 1, examples.IGNORED)
    right = counted.copy()
    assert train.answers_right(labels, right) == [True] * 4
    right[0, 3] = right[1, 6] = False
    assert train.answers_right(labels, right) == [False, True, True, False]


def test_short_run_learns_and_leaves_a_checkpoint(small, tmp_path):
    """Some steps of a shrunk recipe lower the loss, held out too; the result loads and answers."""
    changes = [
        "steps=40", "few=20", "clips=0.3", "dtype=float32", "workers=1", "batch.rows=4",
        "batch.length=192", "batch.windows=2", "optimizer.warmup=5", "report.every=10",
        "report.evaluate_every=20", "report.evaluate_batches=1",
    ]  # fmt: skip
    out = tmp_path / "run"
    assert train.main(["--config", str(RECIPE), "--out", str(out), *changes]) == 0
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    assert float(rows[-1]["loss"]) < 0.75 * float(rows[0]["loss"])
    held_out = [float(row["held_out_loss"]) for row in rows if row["held_out_loss"]]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    params, cfg = q3.load(out)
    assert params["embed"].dtype == jnp.bfloat16
    proc = q3.Processor.from_pretrained(out)
    batch = proc([{"role": "user", "content": "Hello"}])
    assert q3.generate(params, cfg, batch, max_new_tokens=2).lengths[0] >= 1
