"""The command `qwen3vl`: its table, its help, and the options and keys that other programs have."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import train
from qwen3vl_jax.cli import convert, main, plan
from qwen3vl_jax.cli.foreign_options import FOREIGN
from qwen3vl_jax.cli.infer_arguments import arguments
from qwen3vl_jax.cli.infer_options import PROGRAMS, parser_of
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training import toml_tables
from qwen3vl_jax.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = json.loads((ROOT / "tests" / "public.json").read_text())
SFT = ROOT / "configs" / "sft_2b.toml"
# Options of a value that have no default: what is not given is not there.
WITHOUT = {"messages", "input", "output", "draw", "image", "video", "stop", "document", "profile"}
WITHOUT |= {"plan", "save", "num_frames", "video_max_pixels", "coordinator", "processes", "process"}


def ends(call, capsys) -> tuple[int, str]:
    """The exit code of a call that ends the process, and its one line on stderr."""
    with pytest.raises(SystemExit) as end:
        call()
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return end.value.code, err


def test_every_command_has_its_module():
    for module, _ in main.COMMANDS.values():
        assert importlib.util.find_spec(f"qwen3vl_jax.cli.{module}"), module
    assert {name.removeprefix("qwen3vl ") for name in PROGRAMS} - {"infer.py"} < set(main.COMMANDS)


def test_help_lists_the_commands_and_imports_none_of_them():
    code = (
        "import sys; from qwen3vl_jax.cli.main import main; main(['--help']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    out, modules = done.stdout.rstrip().rsplit("\n", 1)
    assert done.returncode == 0 and all(f"\n  {name} " in out for name in main.COMMANDS)
    assert out.count("\n  qwen3vl ") == 3
    ours = {name for name in modules.split() if name.startswith("qwen3vl_jax.")}
    assert ours == {"qwen3vl_jax.version", "qwen3vl_jax.cli", "qwen3vl_jax.cli.main"}
    assert not {"jax", "numpy", "PIL", "argparse"} & set(modules.split())


def test_a_command_that_is_none(capsys):
    assert main.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: qwen3vl trian: no such command; did you mean train?\n"
    assert main.main(["zzz"]) == 2
    assert "expected ask, chat, batch, serve" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_in_groups_and_shows_defaults_and_examples(program):
    """--help shows some of what --help-all does, and every option with a value says what it is without."""
    short, (full, _) = parser_of(program)[0].format_help(), parser_of(program)
    full.all = True
    text = full.format_help()
    assert len(short.splitlines()) < len(text.splitlines()) and "--help-all" in short
    assert short.count(f"\n  {program} ") == text.count(f"\n  {program} ") == 3
    for group in full._action_groups:
        for action in group._group_actions:
            shown = action.help or ""
            if action.nargs == 0 or shown == "==SUPPRESS==" or action.dest in WITHOUT:
                continue
            assert "default" in shown + (group.title or ""), action.option_strings
            if action.default not in (None, "", []):
                assert "%(default)" in shown, action.option_strings
    if program == "qwen3vl ask":
        titles = ("model", "question", "answer", "sampling (", "images and videos (", "devices")
        assert all(f"\n{title}" in text for title in titles)
        assert "--input" not in text and "--plan" not in text and "--rows" not in text
    if program == "qwen3vl batch":
        assert "many prompts:" in text and "--prompt" not in text and "--chat " not in text
    if program == "qwen3vl plan":
        assert "--temperature" not in text and "--rows" in text


def test_names_of_other_programs_are_taken_or_answered(capsys):
    """One that means the same sets the same; another is one line that says what to do."""
    parser, _ = parser_of("infer.py")
    ours = {flag: x for x in parser._actions for flag in x.option_strings}
    assert not FOREIGN.keys() & ours.keys()
    same = {name: flag for name, flag in FOREIGN.items() if flag in ours}
    assert {"--max-tokens", "--model", "--temp", "-m", "-p", "--max-model-len"} < same.keys()
    assert {"--num-predict", "--n-predict", "--system-prompt"} < same.keys()
    for name, flag in same.items():
        given = [] if ours[flag].nargs == 0 else [(ours[flag].choices or "7")[0]]
        assert parser.parse_args([name, *given]) == parser.parse_args([flag, *given]), name
    assert arguments(["--max_tokens=7", "--top_k", "3"]).max_new_tokens == 7
    for name in FOREIGN.keys() - same.keys():
        code, err = ends(lambda name=name: arguments([name, "2"]), capsys)
        assert code == 2 and f"{name}: unknown option; " in err and FOREIGN[name] in err
    for name in ("--tp", "--tensor-parallel-size"):
        assert "did you mean --mesh tp=N?" in ends(lambda n=name: arguments([n, "2"]), capsys)[1]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--tempratur", "did you mean --temperature?"),
        ("--max-new", "did you mean --max-new-tokens?"),
        ("--temperat=1", "did you mean --temperature?"),
        ("-z", "--help-all lists the options"),
    ],
)
def test_no_abbreviations_and_the_nearest_name(given, hint, capsys):
    assert ends(lambda: arguments([given, "1"]), capsys)[1].endswith(f"unknown option; {hint}\n")


def test_an_unknown_option_comes_before_one_that_is_missing(capsys):
    """Of train and convert too; what comes after -- and values are no options."""
    for call in (
        lambda: train.main(["--confg", "x"]),
        lambda: train.main(["--config", "sft_2b", "--learning-rate", "1"]),
        lambda: convert.main(["--verfy"]),
    ):
        assert ": unknown option; did you mean " in ends(call, capsys)[1]
    assert arguments(["--prompt=--x", "--seed", "-1"]).prompt == "--x"


def test_commands_have_their_own_options(capsys):
    assert arguments([], "qwen3vl chat").mode == "chat"
    assert arguments(["--mesh", "tp=2"], "qwen3vl ask").mode == "ask"
    for program, given, words in (
        ("qwen3vl chat", ["--prompt", "hi"], "--chat: it asks for the questions itself"),
        ("qwen3vl ask", ["--input", "a", "--output", "b"], "is for qwen3vl batch"),
        ("qwen3vl ask", ["--chat"], "--chat: is for qwen3vl chat"),
        ("qwen3vl batch", ["--rows", "2"], "--input or --output is missing"),
        ("qwen3vl batch", ["--embed"], "is for qwen3vl ask"),
    ):
        with pytest.raises(InputError, match=words):
            arguments(given, program)
    assert "the machine is missing" in ends(lambda: plan.script([], "qwen3vl plan"), capsys)[1]


def test_keys_of_other_trainers_are_answered(tmp_path, monkeypatch):
    """Each hint is a key of the recipe; a recipe by name is found from anywhere, and its paths too."""
    monkeypatch.chdir(tmp_path)
    assert len(toml_tables.FOREIGN) > 60
    for name, hint in toml_tables.FOREIGN.items():
        key = hint.split()[0].split("=")[0]
        table, _, inner = key.partition(".")
        found = PUBLIC["recipe"] if key != "--out" else {"--out": ""}
        assert (inner in found[table]) if inner else (table in found), hint
        if name not in PUBLIC["recipe"]:
            with pytest.raises(InputError) as error:
                read_recipe(SFT, [f"{name}=1"])
            assert str(error.value).endswith(f"unknown key {name}; did you mean {hint}?")
    for given, hint in (("lr", "optimizer.learning_rate"), ("optimizer.lr", "learning_rate")):
        with pytest.raises(InputError, match=f"unknown key {given}; did you mean .*{hint}"):
            read_recipe("sft_8b_lora", [f"{given}=1e-4"])
    assert read_recipe("own_data").ckpt == str(ROOT / "demo" / "checkpoint")
