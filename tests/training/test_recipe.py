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
        (
            "optimizer.learning_rat=1",
            "optimizer.learning_rat=1: unknown key optimizer.learning_rat; did",
        ),
        ("save_evry=1", "save_evry=1: unknown key save_evry; did you mean save_every?"),
        ("optimiser.b1=0", "optimiser.b1=0: unknown key optimiser; did you mean optimizer?"),
        ("steps=0", "steps is 0, expected a number from 1"),
        ("steps=many", "steps=many: steps is 'many', expected a whole number"),
        ("steps=50", "more than optimizer.warmup (100)"),
        ("optimizer.learning_rate=nan", "expected a finite number"),
        ("optimizer.b2=1.0", "from 0 to below 1"),
        ("step.remat=some", "expected one of none, full, narrow, dots, offload"),
        ("step.gradients=float16", "expected one of float32, bfloat16"),
        ("steps.more=1", "steps is no table"),
        ("data.sources.2.path=x", "no place in a list of 1"),
        (
            "data.sources.0.pth=x",
            "data.sources.0.pth=x: unknown key data.sources.0.pth; did you mean",
        ),
        ("evaluate.sources.1.path=x", "no place in a list of 0"),
        ("steps", "expected key=value"),
        ("data.sources=[{path='x', weigth=2}]", "did you mean data.sources[0].weight?"),
        ("evaluate.every=5", "evaluate.sources is empty"),
        ("lora.base=int4", "lora.base: got int4, expected no such key while lora.rank is 0"),
        ("lora.alpha=4.0", "lora.alpha: got 4.0, expected no such key while lora.rank is 0"),
        ("train.freeze=[1]", "train.freeze[0] is 1, expected a string"),
        ("ckpt=''", "ckpt is empty"),
        ("train.rates.merger=-1.0", "train.rates.merger is -1.0, expected a finite number from 0"),
        ("data.sources.0.weight=nan", "data.sources.0: expected a path and a weight above 0"),
        ("mesh.fsdp=-2", "mesh.fsdp is -2"),
        ("seed=1" + "0" * 400, "expected a number up to"),
        ("seed=1" + "0" * 5000, "expected a whole number"),
        ("seed=9223372036854775808", "seed is 9223372036854775808, expected a number up to"),
        ("pack.rows=10000000000", "pack.rows is 10000000000, expected a number up to"),
        ("pack.length=100000000", "expected at most 268435456"),
        ("mesh.tensor=2000000", "expected at most 1048576 devices"),
    ],
)
def test_what_no_run_can_have_is_named(change, words):
    """One line that names the key, what was found and what was expected."""
    with pytest.raises(InputError, match=re.escape(words)):
        recipe.read_recipe(FIRST, [change])


def test_changes_are_toml_or_bare_words():
    """Numbers, lists, words and places of a list."""
    changes = ["steps=7", "optimizer.warmup=0", "init=normal", "data.sources.0.path=a.jsonl"]
    changes += ["train.freeze=['text']", "optimizer.learning_rate=1", "train.rates.head=0.5"]
    found = recipe.read_recipe(FIRST, changes)
    assert (found.steps, found.init, found.data.sources[0].path) == (7, "normal", "a.jsonl")
    assert found.train.freeze == ("text",) and found.optimizer.learning_rate == 1.0
    assert found.train.rates == {"merger": 2.0, "head": 0.5}


def test_changes_lengthen_lists_and_reach_names_with_dots():
    """One place more than there is, in a list that the file has, or has not."""
    changes = ["evaluate.sources.0.path=a", "evaluate.sources.1.path=b", "report.wandb=7"]
    changes += ["data.sources.1.path=2024", "train.freeze.1=text", "lora.targets.1=vision"]
    changes += ["data.sources.0.options.few=3", "train.rates.layers.attn.*=0.5"]
    found = recipe.read_recipe(FIRST, changes)
    assert [source.path for source in found.evaluate.sources] == ["a", "b"]
    assert found.data.sources[1].path == "2024" and found.train.freeze == ("vision", "text")
    assert found.train.rates["layers.attn.*"] == 0.5 and found.report.wandb == "7"
    assert found.data.sources[0].options == {"few": 3}
    assert found.lora.targets == ("text", "vision")


def test_paths_of_a_recipe(tmp_path, monkeypatch):
    """From the working directory, else from the recipe's own; what looks like a path is no Hub id."""
    (tmp_path / "there" / "models" / "base").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "there" / "r.toml"
    (tmp_path / "there" / "a.jsonl").write_text("")

    def read(*changes):
        path.write_text("ckpt = 'models/base'\nsteps = 1\n[[data.sources]]\npath = 'a.jsonl'\n")
        return recipe.read_recipe(path, changes)

    found = read()
    assert found.ckpt == str(path.parent / "models" / "base")
    assert found.data.sources[0].path == str(path.parent / "a.jsonl")
    (tmp_path / "here" / "models" / "base").mkdir(parents=True)
    assert read().ckpt == "models/base"
    for name in ("models/none", "./x", "../a/b", "~/x", "a/b/c", "/none"):
        with pytest.raises(InputError, match=re.escape(f"ckpt: got {name!r}, expected a folder")):
            read(f"ckpt={name}")
    assert read("ckpt=Qwen/Qwen3-VL-2B-Instruct").ckpt == "Qwen/Qwen3-VL-2B-Instruct"


def test_recipes_by_name(tmp_path, monkeypatch):
    """From anywhere; what is not there is answered with what is."""
    monkeypatch.chdir(tmp_path)
    assert recipe.read_recipe("sft_8b_lora") == recipe.read_recipe(CONFIGS / "sft_8b_lora.toml")
    with pytest.raises(InputError, match=r"sft_9b: no such file; by name there are demo, .*sft_2b"):
        recipe.read_recipe("sft_9b")
    with pytest.raises(InputError, match="no such file"):
        recipe.read_recipe("configs/sft_2b")


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


def test_a_run_without_a_recipe_is_one_line(capsys):
    """--config is asked for, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        train.main([])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--config" in said and said.count("\n") == 1


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


def test_a_metric_is_known_before_a_run_starts(tmp_path):
    """A name, or a function that can be imported, and only where answers are generated."""
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    changes = [f"data.sources.0.path={path}", f"evaluate.sources.0.path={path}"]
    changes += ["evaluate.every=5", "evaluate.generate=2"]

    def check(*more):
        recipe.check_sources(recipe.read_recipe(FIRST, [*changes, *more]))

    check("evaluate.metric=iou@0.5")
    check("evaluate.metric=python:math:dist")
    for wrong in ("iou@5", "python:math:none"):
        with pytest.raises(InputError, match=f"^evaluate.metric: got '{wrong}', expected "):
            check(f"evaluate.metric={wrong}")
    with pytest.raises(InputError, match=r"^evaluate.metric: got 'anls', expected none while"):
        check("evaluate.metric=anls", "evaluate.generate=0")
    check("evaluate.metric=anls", "evaluate.generate=0", "evaluate.every=0")
