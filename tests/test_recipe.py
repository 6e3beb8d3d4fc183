"""Recipes: every key explained once, unknown keys and impossible values refused, changes by key=value."""

import re
import tomllib
from pathlib import Path

import pytest

import train
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training import recipe

CONFIGS = Path(train.__file__).resolve().parent / "configs"
FIRST = CONFIGS / "sft_2b.toml"
SOURCE = ("path", "weight", "media", "options", "boxes", "ignore")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_a_recipe(path):
    """Each file reads, names its model, and has data."""
    found = recipe.read_recipe(path)
    assert found.ckpt and found.data.sources


def test_every_key_is_explained_once():
    """sft_2b.toml holds each key of a recipe and of a source once, with a comment and its default."""
    text = FIRST.read_text()
    keys = {name for name in recipe.flat(recipe.Recipe("x", 1)) if name != "data.sources"}
    keys |= {f"data.sources.{name}" for name in SOURCE}
    table, seen, defaults = "", [], {}
    for line in text.splitlines():
        if header := re.fullmatch(r"\[+([\w.]+)\]+", line):
            table = f"{header[1]}."
        elif entry := re.match(r"(\w+) = [^#]+# (.+)", line):
            seen.append(table + entry[1])
            if entry[2].endswith("]"):
                defaults[seen[-1]] = entry[2].rsplit(" [", 1)[1][:-1]
        assert not re.match(r"\w+ = [^#]*$", line), f"no comment: {line}"
    assert sorted(seen) == sorted(keys)
    plain = recipe.flat(recipe.Recipe("x", 1))
    for name, said in defaults.items():
        if name in plain:
            known = plain[name]
            told = said if isinstance(known, str) and known else tomllib.loads(f"x = {said}")["x"]
            assert (list(known) if isinstance(known, tuple) else known) == told, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer.learning_rat=1", "did you mean optimizer.learning_rate?"),
        ("save_evry=1", "did you mean save_every?"),
        ("steps=0", "steps is 0, expected a number from 1"),
        ("steps=many", "expected a whole number"),
        ("steps=50", "more than optimizer.warmup (100)"),
        ("optimizer.learning_rate=nan", "expected a finite number"),
        ("optimizer.b2=1.0", "from 0 to below 1"),
        ("step.remat=some", "expected one of none, full, dots, offload"),
        ("steps.more=1", "steps is no table"),
        ("data.sources.1.path=x", "no place in a list of 1"),
        ("steps", "expected key=value"),
        ("data.sources=[{path='x', weigth=2}]", "did you mean data.sources[0].weight?"),
        ("evaluate.every=5", "evaluate.sources is empty"),
        ("train.freeze=[1]", "train.freeze[0] is 1, expected a string"),
        ("ckpt=''", "ckpt is empty"),
        ("train.rates.merger=-1.0", "train.rates.merger is -1.0, expected a finite number from 0"),
        ("data.sources.0.weight=nan", "data.sources 1: expected a path and a weight above 0"),
        ("mesh.fsdp=-2", "mesh.fsdp is -2"),
    ],
)
def test_what_no_run_can_have_is_named(change, words):
    """One line that names the key, what was found and what was expected."""
    with pytest.raises(InputError, match=re.escape(words)):
        recipe.read_recipe(FIRST, [change])


def test_changes_are_toml_or_bare_words():
    """Numbers, lists, words and places of a list."""
    changes = ["steps=7", "optimizer.warmup=0", "init=normal", "data.sources.0.path=a.jsonl",
               "train.freeze=['text']", "optimizer.learning_rate=1", "train.rates.head=0.5"]  # fmt: skip
    found = recipe.read_recipe(FIRST, changes)
    assert (found.steps, found.init, found.data.sources[0].path) == (7, "normal", "a.jsonl")
    assert found.train.freeze == ("text",) and found.optimizer.learning_rate == 1.0
    assert found.train.rates == {"merger": 2.0, "head": 0.5}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.sources.0.path=none.jsonl"], "'none.jsonl': no such file"),
        (["data.sources=[]"], "data.sources is empty"),
        (["report.wandb=project"], "wandb is not installed and report.wandb is set"),
        (["ckpt=/", "data.sources.0.path=python:x:Y"], "/config.json: cannot be read"),
    ],
)
def test_the_command_refuses_before_it_starts(changes, words, tmp_path, capsys):
    """Exit code 2 and one line, and nothing is made."""
    out = tmp_path / "run"
    assert train.main(["--config", str(FIRST), *changes, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not out.exists()


def test_out_must_be_a_run_or_new(tmp_path, capsys):
    """Without --out it is asked for; a file, and a folder of other things, are left alone."""
    plans = ["--dry-run", "--plan", "v5e:2x2"]
    for flags, told in (([], "required: --out"), (plans, "--dry-run and --plan: give one of them")):
        with pytest.raises(SystemExit) as end:
            train.main(["--config", str(FIRST), *flags])
        assert end.value.code == 2 and told in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    common = ["--config", str(FIRST), "data.sources.0.path=python:x:Y"]
    assert train.main([*common, "--out", str(tmp_path / "file")]) == 2
    assert train.main([*common, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is a file, expected a directory" in said and "holds files and no config.toml" in said
