"""Several processes answer one file: each its share, all answers in order, whoever was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import infer
import qwen3vl_jax as q3
from qwen3vl_jax.cli.batch import part_of
from qwen3vl_jax.cli.batch_journal import Journal, read_lines

ROOT = Path(infer.__file__).parent
LINES = 30


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """(the file of lines, the environment of a process, what one process answers)."""
    folder = tmp_path_factory.mktemp("replicas")
    lines = [
        {
            "id": f"q{i}",
            "messages": [{"role": "user", "content": f"Say {i}."}],
            "logprobs": i == 3,
            "temperature": float(i % 2),
            "max_new_tokens": 8 + i % 5,
        }
        for i in range(LINES)
    ]
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n")
    env = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return source, env, here(source, folder / "alone.jsonl")


def here(source, out):
    """What this process alone answers."""
    options = ["--input", source, "--rows", 4, "--dtype", "float32", "--output", out]
    with pytest.raises(SystemExit) as end:
        infer.main([*map(str, options)])
    assert end.value.code == 1  # one line could not be used
    return out.read_text()


def start(source, outs, env, *more):
    """Processes that share a file, each with a name for its answers."""
    options = ["--input", source, "--rows", "4", *more]
    return spawned([[*options, "--output", out] for out in outs], env)


def spawned(options, env):
    """infer.py once with each of these options, as processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    many = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(len(options)), "--process"]
    command = [sys.executable, ROOT / "infer.py", "--dtype", "float32"]
    return [
        subprocess.Popen(
            [*command, *given, *([*many, str(i)] if len(options) > 1 else [])],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, given in enumerate(options)
    ]


def ended(children):
    """What each said, once all have ended with the exit code of a line that could not be used."""
    said = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [1] * len(children), said
    return said


def partial(out, index=0):
    return out.with_name(f"{out.name}.partial" + f".{index}" * bool(index))


def answered(path):
    return path.read_bytes().count(b'{"line"') if path.exists() else 0


def until(children, reached):
    """Waits until `reached` gives a true value, while all of them run."""
    while not reached():
        assert all(child.poll() is None for child in children), children[-1].communicate()
        time.sleep(0.005)


def stopped(children, journals):
    """Sends SIGTERM to all while they answer: 130 at once, and what is done is kept."""
    until(children, lambda: all(map(answered, journals)))
    for child in children:
        child.send_signal(signal.SIGTERM)
    since = time.perf_counter()
    said = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [130] * len(children), said
    assert time.perf_counter() - since < 15
    assert all("interrupted: " in text and "the same command goes on" in text for text in said)
    assert 0 < sum(map(answered, journals)) < LINES and "Traceback" not in "".join(said)


def test_sigterm_stops_at_once_and_keeps_the_answers(work, tmp_path):
    """The same command goes on to the answers of a file that nothing stopped."""
    source, env, want = work
    out = tmp_path / "out.jsonl"
    stopped(start(source, [out], env), [partial(out)])
    assert here(source, out) == want


def test_stopped_and_killed_shares_are_taken_up_by_the_next_start(work, tmp_path):
    """Two processes stopped in the middle, two killed, then two again: the answers of one, each once."""
    source, env, want = work
    out = tmp_path / "out.jsonl"
    journals = [partial(out), partial(out, 1)]
    stopped(start(source, [out, out], env), journals)
    there = sum(map(answered, journals))
    children = start(source, [out, out], env)
    # The first takes over what the second left, and each goes on with a half of the others.
    until(children, lambda: answered(journals[0]) >= there and answered(journals[1]) >= 3)
    for child in children[::-1]:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert 3 <= answered(journals[1]) < LINES // 2 + 1
    first, second = ended(start(source, [out, out], env))
    assert "of 2 processes" in first and "1 of them could not be used" in first
    assert "lines" not in second
    # Groups of prompts differ from those of one process, and so does the rounding of log-probabilities.
    assert texts(out.read_text()) == texts(want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.partial"]


def test_disks_that_are_not_shared(work, tmp_path):
    """The others' answers are sent to process 0; each replica is spread over devices of its own."""
    source, env, want = work
    env = {**env, "XLA_FLAGS": env["XLA_FLAGS"].replace("device_count=8", "device_count=2")}
    outs = [tmp_path / name / "out.jsonl" for name in "ab"]
    for out in outs:
        out.parent.mkdir()
    ended(start(source, outs, env, "--mesh", "tp=2"))
    assert texts(outs[0].read_text()) == texts(want)
    assert not list(outs[1].parent.iterdir())


def texts(answers):
    return [(a["id"], a.get("text")) for a in map(json.loads, answers.splitlines())]


def test_one_process_takes_over_what_several_left(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{i}\n" for i in range(6)))
    lines = read_lines(source)
    with Journal(out, lines, {"seed": 0}, 2) as share:
        share.add(lines[3], {"id": 3})
        share.add(lines[4], {"id": 4, "error": "is tried again"})
        with pytest.raises(q3.InputError, match="another process is writing"):
            Journal(out, lines, {"seed": 0})
    with pytest.raises(q3.InputError, match="seed 0, now it is 1"):
        Journal(out, lines, {"seed": 1})
    assert partial(out, 2).exists()
    with Journal(out, lines, {"seed": 0}) as journal:
        assert set(journal.done) == {4} and not partial(out, 2).exists()
        for line in part_of(lines, journal.done, 0, 1):
            journal.add(line, {"id": line.number - 1})
        journal.finish()
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == list(range(6))


def test_parts_are_even_and_have_every_line(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{i}\n" for i in range(11)))
    lines, done = read_lines(source), {2, 3, 5}
    parts = [part_of(lines, done, i, 3) for i in range(3)]
    assert sorted(len(part) for part in parts) == [2, 3, 3]
    assert {line.number for part in parts for line in part} == set(range(1, 12)) - done


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--prompt", "x", "--processes", "2"], "--processes: means something only with --input"),
        (["--input", "in", "--output", "out", "--processes", "2"], "expected --coordinator HOST"),
    ],
)
def test_processes_that_cannot_be(tmp_path, capsys, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    Path("in").write_text("{}\n")
    with pytest.raises(SystemExit) as end:
        infer.main(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and told in line


def test_one_prompt_is_answered_on_the_devices_of_all(work, capsys):
    """--mesh over two processes: the answer of one device, told once; unlike prompts are refused."""
    env = {**work[1], "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")}
    asked = ["--image", ROOT / "demo/pictures/grid.png", "--temperature", "1", "--seed", "3"]
    infer.main([*map(str, asked), "--prompt", "Say 1."])
    want = capsys.readouterr().out

    def said(*prompts):
        mesh = [*asked, "--mesh", "fsdp=2,tp=2", "--prompt"]
        children = spawned([[*mesh, prompt] for prompt in prompts], env)
        told = [child.communicate(timeout=240) for child in children]
        return [child.returncode for child in children], *zip(*told, strict=True)

    codes, answers, rest = said("Say 1.", "Say 1.")
    assert codes == [0, 0] and answers[0].endswith(want), rest
    assert want not in answers[1] and "decode" in rest[0] and "decode" not in rest[1]
    codes, answers, rest = said("Say 1.", "Say 2.")
    assert codes == [2, 2] and all("in process 1 than in process 0" in text for text in rest)
