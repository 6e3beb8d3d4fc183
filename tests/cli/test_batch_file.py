"""Batch files: every answer is the one that its line gets alone, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prompt_lines
import pytest

import infer
import qwen3vl_jax as q3
from demo import evaluate
from qwen3vl_jax.cli.batch_journal import read_lines
from qwen3vl_jax.inference import decode_loop, engine, stores
from qwen3vl_jax.model import cache, vision
from qwen3vl_jax.processing.batch import BUCKETS
from qwen3vl_jax.processing.encoded_prompt import from_hf_arrays
from qwen3vl_jax.storage import json_text

ROOT = Path(infer.__file__).parent
LINES = 72


@pytest.fixture(scope="module")
def demo():
    return evaluate.load(evaluate.CHECKPOINT)


@pytest.fixture(scope="module")
def work(demo, tmp_path_factory):
    """(the file of lines, each line's arrays, each line's answer alone)."""
    proc, params = demo
    folder = tmp_path_factory.mktemp("lines")
    lines = prompt_lines.mixed(folder, LINES)
    arrays = [proc.inputs(line["messages"]) for line in lines]
    alone = [ask(params, proc, a, line["max_new_tokens"]) for a, line in zip(arrays, lines)]
    return prompt_lines.write(folder / "in.jsonl", lines), lines, arrays, alone


def ask(params, proc, arrays, count, **options):
    batch = q3.make_batch(proc.config, **arrays)
    out = q3.generate(
        params, proc.config, batch, max_new_tokens=count, stop_ids=proc.stop_ids, **options
    )
    return out.tokens[0, : out.lengths[0]].tolist(), out.finish_reasons[0]


def answers(path):
    return [json_text.read_json(line, "") for line in path.read_text().splitlines()]


def run(*arguments):
    infer.main([*map(str, arguments), "--dtype", "float32"])


def test_mixed_prompts_answer_as_each_alone(demo, work, monkeypatch):
    """Tokens and reasons equal; rows busy, a picture encoded once, one program a bucket: counted."""
    proc, params = demo
    _, lines, arrays, alone = work
    programs = (vision.run_block.__wrapped__, cache._fill_layer.__wrapped__, engine._insert)
    programs = (*programs, engine._extend, decode_loop.decode_steps)
    fill, extend, touched = engine.prefill_packed, engine._extend, set()
    encode, calls = stores.vision_encode, []

    def encoded(params, cfg, inputs):
        calls.append((len(inputs.pixels), inputs.frames))
        return encode(params, cfg, inputs)

    def filled(params, cfg, batch, *where, features):
        touched.add((batch.tokens.shape[1], features is None, None))
        return fill(params, cfg, batch, *where, features=features)

    def extended(params, cfg, batch, features, prefix):
        touched.add((batch.tokens.shape[1], features is None, prefix.slots))
        return extend(params, cfg, batch, features, prefix)

    monkeypatch.setattr(engine, "prefill_packed", filled)
    monkeypatch.setattr(engine, "_extend", extended)
    monkeypatch.setattr(stores, "vision_encode", encoded)
    for program in programs:
        program.clear_cache()
    stats, requests = engine.Stats(), []
    for i, (a, line) in enumerate(zip(arrays, lines, strict=True)):
        requests.append(q3.Request(i, a, line["max_new_tokens"]))
    found = {
        one.key: one
        for one in q3.generate_many(
            params, proc.config, iter(requests), stop_ids=proc.stop_ids, stats=stats, rows=8
        )
    }
    assert len(found) == len(requests)
    for i, (tokens, reason) in enumerate(alone):
        assert (found[i].tokens, found[i].finish_reason) == (tokens, reason), i
    assert stats.busy >= 0.85, stats
    prompts = [from_hf_arrays(proc.config, a).with_digests() for a in arrays]
    seen = [image for prompt in prompts for image in prompt.images]
    assert stats.shown == len(seen) and stats.encoded == len({v.digest for v in seen})
    assert stats.shown - stats.encoded >= LINES // 6 - 1
    assert stats.reused > 400 and stats.prefixes <= 4, stats
    counts = [program._cache_size() for program in programs]
    # Images of waiting prompts are encoded together, in buckets.
    assert len(calls) <= len(seen) // 3 and {n for n, _ in calls} <= {4 * n for n in BUCKETS}, calls
    assert counts[0] == len(set(calls)) and counts[-1] == 1, (counts, calls)
    # A group's programs: a layer for its bucket and for each prefix's.
    widths = {width for width, *_ in touched} | {behind for *_, behind in touched if behind}
    assert counts[1] <= 2 * len(widths) and max(counts[2:4]) <= len(touched), (counts, touched)
    assert sum(counts) <= 30, (counts, touched)


def test_requests_are_watched_cancelled_and_never_held_back(demo, work):
    """A lone prompt that comes later is answered while a long answer runs, whatever fills a group."""
    proc, params = demo
    _, _, arrays, _ = work
    came, order = {"long": ([], []), "cut": ([], [])}, []

    def watch(key, most):
        def see(tokens, logprobs):
            assert len(tokens) == len(logprobs)
            came[key][0].extend(tokens)
            came[key][1].extend(logprobs)
            return len(came[key][0]) >= most

        return see

    def source():
        yield q3.Request("long", arrays[0], 80, watch=watch("long", 81))
        while not came["long"][0]:
            yield None
        yield q3.Request("gone", arrays[0], 9, watch=lambda *_: True)
        yield q3.Request("late", arrays[1], 5)
        yield None
        while "late" not in order and "long" not in order:
            yield None
        yield q3.Request("cut", arrays[1], 80, watch=watch("cut", 5))

    found = {}
    for one in q3.generate_many(params, proc.config, source(), stop_ids=(), rows=16):
        found[one.key] = one
        order.append(one.key)
    assert order.index("late") < order.index("long"), order
    assert (found["gone"].tokens, found["gone"].finish_reason) == ([], "cancelled")
    assert found["cut"].finish_reason == "cancelled" and 5 <= len(found["cut"].tokens) < 80
    for key, seen in came.items():
        assert seen == (found[key].tokens, found[key].logprobs)
    batch = q3.make_batch(proc.config, **arrays[0])
    alone = q3.generate(params, proc.config, batch, max_new_tokens=80, stop_ids=())
    assert found["long"].tokens == alone.tokens[0].tolist()
    assert found["late"].tokens == found["cut"].tokens[:5]


def test_a_killed_file_has_each_answer_once(work, tmp_path):
    """kill -9 at a random moment, then to the end: all answers, in order, each once."""
    lines, alone = (x[: LINES // 2] for x in (work[1], work[3]))
    source, out = prompt_lines.write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    env = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, ROOT / "infer.py", "--input", source, "--output", out]
    command += ["--dtype", "float32", "--rows", "8"]

    def kept():
        return partial.read_bytes().count(b'{"line"') if partial.exists() else 0

    child = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
    enough = np.random.default_rng().uniform(0.05, 0.8) * len(lines)
    while kept() <= enough and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert partial.exists() and not out.exists(), "it was done before it could be killed"
    there = kept()
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"({there} were there)" in ended.stderr.replace("\n", " ")
    assert [a["id"] for a in answers(out)] == [line["id"] for line in lines]
    proc = q3.Processor.from_pretrained(evaluate.CHECKPOINT)
    for answer, (tokens, reason) in zip(answers(out), alone, strict=True):
        assert answer["text"] == proc.decode(tokens) and answer["finish_reason"] == reason
        assert answer["completion_tokens"] == len(tokens)
    assert not partial.exists()


def message(words, **more):
    return {"messages": [{"role": "user", "content": words}], **more}


def test_bad_lines_are_told_in_their_own_record(demo, tmp_path, capsys):
    """Each kind of bad line, good ones between them, blank lines skipped; ids default to the number."""
    bad = {
        "[1]\n": "expected an object, found list",
        '{"messages": \n': "not JSON",
        "\udcff\n".encode("utf-8", "surrogateescape").decode("latin1"): "not JSON",
        '{"id": NaN, "messages": []}\n': "NaN is not JSON",
        '{"id": -1e999, "messages": []}\n': "the number -1e999 is too large",
        json.dumps(message("hi", id=[[3]], seed=int("9" * 400))) + "\n": "an integer of 400 digits",
        json.dumps(message("hi", id=json.loads("[" * 200 + "]" * 200))) + "\n": "100 deep",
        json.dumps(message("hi", temperature=1e308 * 10)) + "\n": "Infinity is not JSON",
        json.dumps({"messages": "hi"}) + "\n": "a list of messages",
        json.dumps(message("hi", max_tokens=3)) + "\n": "unknown key 'max_tokens'",
        json.dumps(message("hi", max_new_tokens=0)) + "\n": "max_new_tokens: got 0",
        json.dumps(message("hi", temperature="hot")) + "\n": "temperature is 'hot'",
        json.dumps(message("hi", temperature=[0.1, 0.2])) + "\n": "temperature has 2 values",
        json.dumps(message("hi", seed=-1)) + "\n": "seed is -1",
        json.dumps(message("hi", stop=[""])) + "\n": "stop: got [''], expected",
        json.dumps(message("hi", stop=3)) + "\n": "stop: got 3",
        json.dumps(message("hi", logprobs=1)) + "\n": "logprobs is 1",
        json.dumps(message("long " * 4000)) + "\n": "(--max-len)",
        json.dumps(message([{"type": "image", "image": "gone.png"}])) + "\n": "gone.png: ",
        json.dumps(message([{"type": "image", "image": "/dev/zero"}])) + "\n": "it is a device",
        json.dumps(message([{"image_url": "http://127.0.0.1:9/a"}])) + "\n": "a host that is named",
        json.dumps({"messages": [[{"role": "user", "content": "a"}]] * 2}) + "\n": "conversation",
        "[" * 100_000 + "\n": "100 deep",
    }
    lines = [x for text in bad for x in (text, "\n", message("Hi"))]
    source, out = prompt_lines.write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as ended:
        run("--input", source, "--output", out, "--rows", 2, "--max-len", 200)
    assert ended.value.code == 1
    found = answers(out)
    assert len(found) == 2 * len(bad)
    for i, reason in enumerate(bad.values()):
        wrong, right = found[2 * i : 2 * i + 2]
        assert wrong["finish_reason"] == "error" and wrong["id"] == 3 * i + 1
        assert reason in wrong["error"] and wrong["error"].startswith(f"line {3 * i + 1}: ")
        assert right["id"] == 3 * i + 3 and right["text"].startswith("I am a very small")
    assert f"{len(bad)} of them could not be used" in capsys.readouterr().err.replace("\n", " ")
    # A corrected line is taken: only answered ones must stay as they are.
    source.write_text(source.read_text().replace("[1]\n", json.dumps(message("Hi")) + "\n", 1))
    with pytest.raises(SystemExit):
        run("--input", source, "--output", out, "--rows", 2, "--max-len", 200)
    assert answers(out)[0]["text"] == answers(out)[1]["text"] and len(answers(out)) == 2 * len(bad)


def test_each_line_has_its_own_sampling(demo, tmp_path):
    """Sampling keys, seeds, stop strings and log-probabilities of a line, as alone; flags for the rest."""
    proc, params = demo
    hot = {"temperature": 3.0, "top_k": 20, "max_new_tokens": 9}
    lines = [
        message("Hi"),
        message("Hi", **hot, seed=5),
        message("Hi", **hot),
        message("Hi", **hot),
        message("Hi", stop="digits", logprobs=True),
        message("Hi", repetition_penalty=1.7, min_new_tokens=12, max_new_tokens=20),
    ]
    source = prompt_lines.write(tmp_path / "in.jsonl", lines)
    run("--input", source, "--output", tmp_path / "out.jsonl", "--rows", 3, "--seed", 4)
    found = answers(tmp_path / "out.jsonl")
    arrays = proc.inputs(lines[0]["messages"])

    def alone(seed=0, count=1024, **options):
        sampling = q3.Sampling(**options)
        return proc.decode(ask(params, proc, arrays, count, seed=seed, sampling=sampling)[0])

    assert found[0]["text"] == alone()
    for answer, seed in zip(found[1:4], (5, 6, 7)):  # line n takes --seed + n - 1
        assert answer["text"] == alone(seed, 9, temperature=3.0, top_k=20)
    assert len({answer["text"] for answer in found[1:4]}) > 1
    assert found[4]["text"] == found[0]["text"].partition("digits")[0]
    assert found[5]["text"] == alone(count=20, repetition_penalty=1.7, min_new_tokens=12)
    told = found[4]["logprobs"]
    tokens = [one["id"] for one in told]
    ids = np.append(arrays["input_ids"], tokens)[None]
    labels = np.where(np.arange(ids.size) < ids.size - len(tokens), -100, ids)
    score = q3.score(params, proc.config, q3.make_batch(proc.config, input_ids=ids, labels=labels))
    want = np.asarray(score)[0, ids.size - len(tokens) : ids.size]
    np.testing.assert_allclose([one["logprob"] for one in told], want, atol=1e-5)
    assert "".join(one["token"] for one in told) == proc.decode(tokens)
    assert "logprobs" not in found[0] and len(told) == found[4]["completion_tokens"]


def test_long_lines_come_last_in_fewer_rows(demo, tmp_path, monkeypatch):
    """A line that needs much of the cache waits until the others are done; the order stays."""
    from qwen3vl_jax.cli import batch as batch_file

    monkeypatch.setattr(batch_file, "LONG", 60)
    asked = []
    many = engine.generate_many

    def counted(params, cfg, requests, *, rows, **options):
        requests = [r for r in requests if r is not None]
        asked.append((rows, sorted(r.key for r in requests)))
        return many(params, cfg, requests, rows=rows, **options)

    monkeypatch.setattr(engine, "generate_many", counted)
    lines = [message("Hi " * n, max_new_tokens=20) for n in (1, 150, 2, 40, *[3] * 12)]
    source = prompt_lines.write(tmp_path / "in.jsonl", lines)
    run("--input", source, "--output", tmp_path / "out.jsonl", "--rows", 16)
    assert asked == [(16, [1, 3, *range(5, 17)]), (4, [4]), (1, [2])]
    assert [a["id"] for a in answers(tmp_path / "out.jsonl")] == list(range(1, 17))


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_files_that_cannot_be_used_are_refused(tmp_path, capsys):
    """No input, an output that is there or cannot be, lines that change."""
    source = prompt_lines.write(tmp_path / "in.jsonl", [message(f"Hi {i}") for i in range(3)])
    out = tmp_path / "out.jsonl"
    both = ("--input", source, "--output", out)
    assert "give both" in refused(capsys, "--input", source)
    assert "leave --prompt out" in refused(capsys, *both, "--prompt", "Hi")
    assert "cannot be read" in refused(capsys, "--input", tmp_path / "gone", "--output", out)
    prompt_lines.write(tmp_path / "empty", ["\n", "\n"])
    assert "holds no line" in refused(capsys, "--input", tmp_path / "empty", "--output", out)
    assert "is the input itself" in refused(capsys, "--input", source, "--output", source)
    assert "--rows: got 0" in refused(capsys, *both, "--rows", 0)
    assert "--prefill-chunk: got 0" in refused(capsys, *both, "--prefill-chunk", 0)
    assert "a folder or a pipe" in refused(capsys, "--input", tmp_path, "--output", out)
    run(*both, "--rows", 10**9)  # no more than lines
    out.unlink()
    gone = tmp_path / "no" / "where.jsonl"
    assert "cannot be written" in refused(capsys, "--input", source, "--output", gone)

    run(*both)
    assert "is there and has no out.jsonl.partial" in refused(capsys, *both)
    lines = read_lines(source)
    source.write_text(source.read_text().replace("Hi 1", "Ha 1"))
    with pytest.raises(q3.InputError, match="line 2 changed while"):
        lines[1].read(source)


def test_an_answer_that_is_no_answer(demo, tmp_path, monkeypatch, capsys):
    """What the engine ends with an error is one in OUT, and asked again by the same command."""
    source = prompt_lines.write(tmp_path / "in.jsonl", [message("Hi"), message("Ho")])
    many, out = engine.generate_many, tmp_path / "out.jsonl"

    def failing(*given, **options):
        for one in many(*given, **options):
            wrong = {"finish_reason": "error", "error": "logits are not finite"}
            yield SimpleNamespace(**{**vars(one), **(wrong if one.key == 2 else {})})

    monkeypatch.setattr(engine, "generate_many", failing)
    with pytest.raises(SystemExit) as ended:
        run("--input", source, "--output", out)
    assert ended.value.code == 1 and "1 of them could not be used" in capsys.readouterr().err
    said = {"id": 2, "error": "line 2: logits are not finite", "finish_reason": "error"}
    first = answers(out)[0]
    assert answers(out)[1] == said and (tmp_path / "out.jsonl.partial").exists()
    monkeypatch.setattr(engine, "generate_many", many)
    run("--input", source, "--output", out)
    assert answers(out)[0] == first and "text" in answers(out)[1]
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.jsonl"]


BLOCKED = """
import hashlib, sys, threading, time
from qwen3vl_jax.cli.batch_lines import read_ahead
from qwen3vl_jax.runtime.console import one_line_errors, sigterm_interrupts

def hangs(line):
    print("begun", flush=True)
    threading.Event().wait()

with one_line_errors(), sigterm_interrupts(float(sys.argv[1])):
    for _ in read_ahead(hangs, [1]):
        if sys.argv[2] == "compiles":  # nor does this hear of a signal
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        time.sleep(0.01)
"""


@pytest.mark.parametrize(("seconds", "main"), [("60", "waits"), ("0.1", "compiles")])
def test_a_stop_ends_the_process_whatever_hangs(seconds, main):
    """SIGTERM, with worker threads that never return, and a main thread that does not hear of it."""
    command = [sys.executable, "-c", BLOCKED, seconds, main]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        assert child.stdout.readline() == "begun\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
        try:
            assert child.wait(5) == 130
        finally:
            child.kill()
        assert child.stderr.read().startswith("interrupted")
