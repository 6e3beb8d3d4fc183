"""infer.py --profile: a trace that others open, and a table of the device's time by part."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from rich.table import Table

import infer
from qwen3vl_jax.cli import infer_arguments
from qwen3vl_jax.cli.profile import PARTS, op_times, part_of, parts_of, profiled, table
from qwen3vl_jax.errors import InputError

PROMPT = ("--prompt", "How many nines are there?")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows_of(text: str) -> dict[str, tuple[float, float]]:
    """{part: (ms, share in %)} of the table in a text."""
    cells = [
        line.strip("\u2502 ").split("\u2502") for line in text.splitlines() if "\u2502" in line
    ]
    return {part.strip(): (float(ms), float(share.strip(" %"))) for part, ms, share in cells}


def test_the_demo_answers_as_always_and_its_parts_are_named(capsys):
    """Every part of an answer about an image; the trace is in the folder."""
    infer.main([*PROMPT])
    want = capsys.readouterr().out
    infer.main([*PROMPT, "--profile", "traces"])
    out, err = capsys.readouterr()
    rows = rows_of(err)
    assert out == want and list(rows) == [*PARTS, "rest"], err
    assert sum(share for _, share in rows.values()) == pytest.approx(100, abs=0.4)
    assert all(ms >= 0 for ms, _ in rows.values()) and rows["rest"][1] < 20, err
    assert len(list(Path("traces").rglob("*.xplane.pb"))) == 1


def test_a_file_of_prompts_and_an_embedding(capsys):
    """Text alone has no vision, and an embedding chooses no token."""
    line = {"messages": [{"role": "user", "content": "Hi"}], "max_new_tokens": 2}
    Path("in.jsonl").write_text(json.dumps(line) + "\n")
    infer.main(["--input", "in.jsonl", "--output", "out.jsonl", "--profile", "a"])
    assert list(rows_of(capsys.readouterr().err)) == [
        "attention",
        "mlp",
        "head",
        "sampling",
        "rest",
    ]
    infer.main(["--embed", "--prompt", "hi", "--profile", "b"])
    rows = rows_of(capsys.readouterr().err)
    assert {"attention", "mlp"} <= rows.keys() <= {"attention", "mlp", "head", "rest"}


SCOPES = {
    "jit(run_block)/VisionBlock/attn/dot_general": "vision",
    "jit(embed_patches)/vision/PatchEmbed/dot_general": "vision",
    "jit(_merge)/PatchMerger/norm/reduce_sum": "merger",
    "jit(decode_steps)/while/body/Block/attn/dot_general": "attention",
    "jit(start)/scan/body/vmap(Block/mlp)/mul": "mlp",
    "jit(decode_steps)/while/body/head/dot_general": "head",
    "jit(decode_steps)/while/body/sampling/cond/branch_1_fun/lt": "sampling",
    "jit(decode_steps)/while/body/Block/ln1/mul": "rest",
    "jit(header)/heads/mul": "rest",
    "params['head']": "rest",
    "": "rest",
}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_has_one_part_and_an_unknown_one_is_the_rest(scope):
    assert part_of(scope) == SCOPES[scope]


PROGRAM = """HloModule jit_f

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0), metadata={op_name="x"}
  %norm = f32[2]{0} negate(%x), metadata={op_name="jit(f)/head/neg"}
  %dot.1 = f32[2]{0} add(%norm, %x)
  %most = f32[2]{0} negate(%dot.1), metadata={op_name="jit(f)/sampling/neg"}
  %copy.1 = f32[2]{0} copy(%x)
  %mix = f32[2]{0} negate(%copy.1), metadata={op_name="jit(f)/Block/mlp/neg"}
  %copy.2 = f32[2]{0} copy(%x)
  ROOT %sum = f32[2]{0} add(%mix, %copy.2), metadata={op_name="jit(f)/add"}
}
"""


def test_an_op_without_a_scope_has_that_of_its_neighbours():
    """What it reads comes first, then what reads it."""
    parts = parts_of(PROGRAM)
    want = {"dot.1": "head", "most": "sampling", "copy.1": "mlp", "copy.2": "", "sum": "rest"}
    assert {name: parts[name] for name in want} == want


def event(name, start, length, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=length, stats=stats.items())


def plane(**lines):
    named = {name.replace("_", " "): events for name, events in lines.items()}
    return SimpleNamespace(lines=[SimpleNamespace(name=n, events=e) for n, e in named.items()])


def test_a_loop_counts_without_its_body():
    """On a line; events of other kinds count nowhere, and every line and device is added."""
    stats = {"hlo_module": "jit_f", "program_id": 3}
    line = [
        event("call", 0, 500),
        event("while", 10, 100, hlo_op="while.1", **stats),
        event("add", 20, 30, hlo_op="add.1", **stats),
        event("add", 60, 40, hlo_op="add.1", **stats),
        event("mul", 110, 5, hlo_op="mul.1", **stats),
    ]
    once = plane(Stream=line)
    assert op_times([once, once]) == {("jit_f", 3): {"while.1": 60, "add.1": 140, "mul.1": 10}}


def test_a_line_of_programs_names_those_of_ops_without_one():
    """As a TPU's traces have it."""
    runs = [event("jit_f(1)", 0, 50), event("jit_g(2)", 50, 50)]
    ops = [event("%dot.1 = f32[2] dot(..)", 0, 10), event("dot.1", 50, 20)]
    found = op_times([plane(XLA_Modules=runs, XLA_Ops=ops)])
    assert found == {("jit_f", "jit_f(1)"): {"dot.1": 10}, ("jit_g", "jit_g(2)"): {"dot.1": 20}}


def test_of_two_programs_of_a_name_each_has_its_own_parts():
    """And a profile without a name of ours is one line."""
    times = op_times(
        [plane(a=[event("x", 0, 2_000_000, hlo_op=op, hlo_module="f")]) for op in "ab"]
    )
    one, other = {"a": "mlp", "b": "head"}, {"c": "sampling"}
    found = table(times, {"f": [other, one]}, "experts")
    assert isinstance(found, Table)
    assert [list(column.cells) for column in found.columns] == [
        ["experts", "head"],
        ["2.0", "2.0"],
        ["50.0%", "50.0%"],
    ]
    for programs in ({}, {"f": [{"a": "", "b": "rest"}]}):
        assert table(times, programs) == "the profile names no parts"
    assert table({}, {}) == "the profile names no parts"


REFUSED = {
    "a chat": (("--chat",), ["--chat", "leave --profile out"]),
    "a plan": (("--plan", "h100:1"), ["--plan", "leave --profile out"]),
    "a file": ((*PROMPT, "--profile", "file"), ["--profile: got 'file', expected a folder"]),
    "below a file": ((*PROMPT, "--profile", "file/x"), ["--profile: got 'file/x', expected"]),
    "no name": ((*PROMPT, "--profile", ""), ["--profile: got '', expected a folder"]),
    "a store": ((*PROMPT, "--profile", "gs://b/x"), ["--profile: got 'gs://b/x', expected"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_profile_is_one_line_and_code_2(case, capsys):
    options, words = REFUSED[case]
    Path("file").write_text("")
    with pytest.raises(SystemExit) as stop:
        infer.main([*options, *(() if "--profile" in options else ("--profile", "p"))])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not Path("p").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_load(monkeypatch, capsys):
    monkeypatch.setattr(infer_arguments.os, "access", lambda *_: False)
    with pytest.raises(SystemExit) as stop:
        infer.main([*PROMPT, "--profile", "kept"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--profile: got 'kept', expected a folder" in said and "loading" not in said


def test_a_trace_for_which_the_disk_has_no_room_is_one_line(monkeypatch):
    """After the answer, without jax's traceback."""

    def full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    answered = []
    with (
        pytest.raises(InputError, match="--profile kept: not written: RESOURCE_EXHAUSTED") as error,
        profiled("kept", "mlp"),
    ):
        answered.append(1)
    assert answered and "\n" not in str(error.value)
