"""What a run tells and refuses: evaluations, answers, refused samples, NaN, other recipes; in process."""

import csv
import json
import os
import signal
import sys
import threading
import tomllib
import types
from unittest import mock

import jax
import numpy as np
import pytest
import train_files

import train
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.scores import metrics
from qwen3vl_jax.training import evaluate, recipe, run_dir, run_setup, train_model
from qwen3vl_jax.training.checkpoints import Checkpoints
from qwen3vl_jax.training.reporting.metrics_table import Table, read_table
from qwen3vl_jax.training.reporting.run_log import RunLogger, described


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a checkpoint, conversations of which one is broken, and a recipe."""
    folder = tmp_path_factory.mktemp("logger")
    ckpt = train_files.checkpoint(folder / "ckpt")
    data = train_files.conversations(folder / "chats.jsonl")
    data.write_text(data.read_text() + '{"messages": [{"role": "user"\n')
    held_out = train_files.conversations(folder / "held_out.jsonl", 4)
    train_files.write_recipe(
        folder / "recipe.toml",
        ckpt,
        data,
        steps=4,
        save_every=2,
        train={"freeze": ["vision", "text"]},
        data={"bad_fraction": 0.2},
        evaluate={
            "every": 2,
            "generate": 2,
            "max_new_tokens": 3,
            "metric": "anls",
            "batches": 1,
            "sources": [{"path": str(held_out)}],
        },
        checkpoints={"keep": 1, "keep_best": 1},
        optimizer={"learning_rate": 1e-3, "warmup": 0},
        report={"every": 2, "tensorboard": True, "profile": [2]},
        step={"remat": "auto"},
    )
    return folder


def run(files, out: str, *changes: str) -> int:
    """train.py's exit code."""
    return train.main(["--config", str(files / "recipe.toml"), "--out", str(files / out), *changes])


@pytest.fixture(scope="module")
def done(files):
    """A whole run's directory."""
    assert run(files, "run") == 0
    return files / "run"


def test_evaluation_by_loss_and_by_generation(done):
    """evaluation.csv, every answer beside what was expected, and the same numbers in TensorBoard."""
    rows = read_table(done / "evaluation.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    lines = (done / "answers" / "step_4.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["question"] for a in answers] == ["say 0", "say 1"]
    assert [a["expected"] for a in answers] == ["0 and 0", "1 and 1"]
    exact = np.mean([a["answer"].strip() == a["expected"] for a in answers])
    assert float(rows[1]["exact"]) == exact
    values = [metrics.anls(a["answer"], a["expected"]) for a in answers]
    assert [a["score"] for a in answers] == values
    assert float(rows[1]["anls"]) == pytest.approx(np.mean(values))
    events = b"".join(p.read_bytes() for p in (done / "tensorboard").iterdir())
    assert b"train/loss" in events and b"evaluation/exact" in events and b"answers" in events


def test_refused_records_traces_and_what_is_saved(done):
    """The broken line is listed; the chosen step is traced; frozen groups are not in a checkpoint."""
    with (done / "refused.csv").open() as file:
        listed = list(csv.reader(file))
    assert len(listed) == 2 and listed[1][0].endswith("chats.jsonl:25")
    assert list((done / "profile").rglob("*.xplane.pb"))
    from qwen3vl_jax.checkpoint.orbax_io import open_tree

    best = run_dir.chosen_step(done, "best")
    assert run_dir.saved_steps(done) == sorted({best, 4})
    names = {str(path[0]) for path in open_tree(done / "checkpoints" / "4" / "weights")}
    left = ("vision.merger", "vision.deepstack", "embed", "head")
    assert names == {n for n in train_model.shapes(_config(done)) if n.startswith(left)}
    row = read_table(done / "metrics.csv")[-1]
    assert float(row["tflops"]) > 0 and not row["mfu"] and "flops" not in row


def _config(out):
    from qwen3vl_jax.config import Config

    return Config.from_hf(out / run_dir.MODEL)


def test_what_other_processes_refuse_is_told(files, monkeypatch):
    """Each process reads its own samples; process 0 hears of all that were refused when it saves."""

    def all_of(value):
        return [value, [["elsewhere.jsonl:7", "torn"]]] if isinstance(value, list) else [value]

    monkeypatch.setattr(distributed, "all_of", all_of)
    fake_step(monkeypatch, lambda number: (1.0, 0.5))
    assert run(files, "others", "evaluate.every=0", "report.profile=[]") == 0
    with (files / "others" / "refused.csv").open() as file:
        assert ["elsewhere.jsonl:7", "torn"] in list(csv.reader(file))


def test_a_finished_run_and_another_recipe(files, done, capsys):
    """The same command again changes nothing; keys that would make another run are listed."""
    before = (done / "metrics.csv").read_bytes()
    assert run(files, "run") == 0
    assert "step 4 of 4, done" in capsys.readouterr().out
    assert (done / "metrics.csv").read_bytes() == before
    assert run(files, "run", "optimizer.b2=0.9", "seed=1", "steps=9") == 2
    said = capsys.readouterr().err
    assert "seed was 0, is now 1" in said and "optimizer.b2 was 0.999, is now 0.9" in said
    assert "steps" not in said and "set it back or choose another --out" in said
    assert (done / "metrics.csv").read_bytes() == before


def test_what_a_checkpoint_does_not_fit_is_said():
    """Another recipe, another model: each with its own word and every difference; a mesh may change."""
    now = {"mesh.fsdp": 8, "seed": 1, "steps": 5, "report.every": 1, "data.workers": 2}
    with pytest.raises(InputError, match=r"another recipe: seed was 0, is now 1"):
        run_dir.check_recipe(now, {**now, "seed": 0}, "run")
    other = {**now, "steps": 4, "data.workers": 0, "mesh.fsdp": 1}
    told = ["mesh.fsdp was 1, is now 8", "steps was 4, is now 5", "data.workers was 0, is now 2"]
    assert run_dir.check_recipe(now, other, "run") == told
    with pytest.raises(
        InputError, match=r"another model: text_config.hidden_size was 64, is now 32"
    ):
        run_dir.check_model(
            {"text_config": {"hidden_size": 32}}, {"text_config": {"hidden_size": 64}}, "run"
        )


def test_keys_that_are_younger_than_a_run(files):
    """A run of an earlier version goes on: what it did not know had its default."""
    from qwen3vl_jax.training import environment
    from qwen3vl_jax.training.run_setup import check_fits, plain

    told = recipe.read_recipe(files / "recipe.toml")
    then = plain(recipe.flat(told))
    del then["step.balance_loss"], then["data.allow_special"], then["data.sources"][0]["ignore"]
    meta = {"recipe": then, "machine": environment.describe()}
    assert check_fits(told, meta, files) == []
    other = recipe.read_recipe(files / "recipe.toml", ["step.balance_loss=0.1"])
    with pytest.raises(InputError, match=r"step.balance_loss was 0.0, is now 0.1"):
        check_fits(other, meta, files)


def fake_step(monkeypatch, values):
    """A step that costs nothing: values(number) -> (loss, gradient norm), or raises."""

    def make(recipe, cfg, rule, join, like=None):
        def step(state, frozen, packed):
            loss, norm = values(int(state.step) + 1)
            state = state.replace(step=state.step + 1)
            found = {"loss": loss, "grad_norm": norm, "tokens": packed.batch.tokens.size}
            return state, {n: jax.numpy.float32(x) for n, x in found.items()}

        return step

    monkeypatch.setattr(train_model, "make_step", make)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_loss_that_is_no_number_stops_the_run(files, monkeypatch, capsys, backend):
    """Its samples are in a file; nothing is saved after it, whether or not the host runs behind."""
    fake_step(monkeypatch, lambda number: (1.0 if number < 4 else np.nan, 0.5))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    changes = ["steps=9", "save_every=3", "evaluate.every=0", "report.profile=[]"]
    assert run(files, backend, *changes) == 2
    said = capsys.readouterr().err
    assert "step 4: the loss is nan and the gradient's norm 0.5" in said
    assert "last checkpoint is of step 3" in said and said.count("error:") == 1
    out = files / backend
    names = json.loads((out / "not_finite_step_4.json").read_text())["samples"]
    assert names and all("chats.jsonl:" in name for name in names)
    assert [row["step"] for row in read_table(out / "metrics.csv")] == ["1", "2", "3"]
    assert run_dir.saved_steps(out) == [3]


@pytest.mark.parametrize("part", ["prepare", "init_train_state"])
def test_no_room_for_the_weights(files, monkeypatch, capsys, part):
    """Where a device has no room before the first step, the parts are told as later."""

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(train_model, part, full)
    assert run(files, f"full-{part}") == 2
    said = capsys.readouterr().err
    assert "error: out of memory: " in said and "weights 0.00 GiB" in said
    assert "lower it with pack.rows, step.remat=full" in said


def test_ctrl_c_and_sigterm(files, monkeypatch, capsys):
    """Between steps: what was done is saved; the exit code is 130 and a line, or 0."""
    sent = {3: signal.SIGINT, 5: signal.SIGTERM}

    def asked(number):
        if number in sent:
            os.kill(os.getpid(), sent.pop(number))
        return 1.0, 0.5

    changes = ["steps=9", "save_every=7", "evaluate.every=0", "report.profile=[5,6]"]
    fake_step(monkeypatch, asked)
    assert run(files, "stopped", *changes) == 130
    told = capsys.readouterr()
    assert "interrupted: the same command goes on" in told.err
    assert "step 3 of 9, stopped by Ctrl-C, saved" in told.out
    assert run_dir.saved_steps(files / "stopped") == [3]
    assert run(files, "stopped", *changes) == 0
    told = capsys.readouterr().out
    assert "step 5 of 9, stopped by SIGTERM, saved" in told
    assert told.index("compiling the step ..") < told.index("step 4/9 ")
    assert run_dir.saved_steps(files / "stopped") == [5]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list((files / "stopped" / "profile").rglob("*.xplane.pb"))
    assert run(files, "stopped", *changes) == 0
    steps = [int(row["step"]) for row in read_table(files / "stopped" / "metrics.csv")]
    assert steps == list(range(1, 10))


def test_a_second_ctrl_c_ends_at_once(monkeypatch, capfd):
    """Whatever the main thread does; before the first step one is enough."""
    ended = threading.Event()
    monkeypatch.setattr(run_setup.os, "_exit", lambda code: ended.set() if code == 130 else None)
    with pytest.raises(KeyboardInterrupt), run_setup.catch_signals() as asked:
        assert not asked.asked_at(0)
        signal.raise_signal(signal.SIGINT)
        assert asked.asked == "Ctrl-C" and asked.asked_at(1)
        assert not ended.wait(0.2)
        signal.raise_signal(signal.SIGINT)
        assert ended.wait(10)
    told = capfd.readouterr().err
    assert "Ctrl-C again ends at once" in told and "the same command goes on" in told
    with pytest.raises(KeyboardInterrupt), run_setup.catch_signals() as asked:
        signal.raise_signal(signal.SIGINT)
    assert not asked.asked


def test_the_first_process_decides_what_sigterm_saves(files, monkeypatch):
    """A step may just be on its way to the disk, which each process sees at its own time."""
    saved, save = [], Checkpoints.save

    def asked(number):
        os.kill(os.getpid(), signal.SIGTERM)
        return 1.0, 0.5

    def counted(self, state, *rest):
        saved.append(int(state.step))
        save(self, state, *rest)

    fake_step(monkeypatch, asked)
    monkeypatch.setattr(Checkpoints, "save", counted)
    monkeypatch.setattr(distributed, "from_first", lambda x: False if x is True else x)
    assert run(files, "two", "save_every=1", "evaluate.every=0", "report.profile=[]") == 0
    assert len(saved) == 2 and len(set(saved)) == 1


def fake_scores(monkeypatch, scores):
    """Evaluations that cost nothing: scores[n] is the loss that step n has, or what is raised."""
    numbers = iter(scores)

    def mean_loss(*_):
        score = scores[next(numbers)]
        if isinstance(score, Exception):
            raise score
        return {"loss": score}

    monkeypatch.setattr(evaluate, "mean_loss", mean_loss)


SCORED = ["steps=8", "save_every=2", "evaluate.every=2", "evaluate.generate=0", "report.profile=[]"]
SCORED += ['evaluate.metric=""']


def test_the_best_step_stays_whenever_sigterm_comes(files, monkeypatch):
    """A step is saved before its evaluation then; and a loss that is no number is never the best."""

    def asked(number):
        if number in (4, 8):
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0, 0.5

    out = files / "best"
    fake_step(monkeypatch, asked)
    fake_scores(monkeypatch, {2: 3.0, 4: 1.0, 6: np.nan, 8: 0.5})
    for saved, best in (([2, 4], 2), ([4, 8], 4), ([4, 8], 8)):
        assert run(files, "best", *SCORED) == 0
        assert (run_dir.saved_steps(out), run_dir.chosen_step(out, "best")) == (saved, best)
    assert [row["step"] for row in read_table(out / "evaluation.csv")] == ["2", "4", "6", "8"]


def test_an_evaluation_that_cannot_run(files, monkeypatch, capsys):
    """Files that cannot be opened are told at the start; what fails later loses no step."""
    fake_step(monkeypatch, lambda number: (1.0, 0.5))
    typo = "evaluate.sources.0.path=python:train_sources:Redy"
    assert run(files, "typo", *SCORED, typo) == 2
    assert "Redy" in capsys.readouterr().err
    ready = "evaluate.sources=[{path='python:train_sources:Ready', options={count=2}}]"
    assert run(files, "typo", *SCORED, ready, "evaluate.generate=2", "data.bad_fraction=0.9") == 2
    assert "evaluate.generate: evaluate.sources hold no conv" in capsys.readouterr().err
    assert not run_dir.saved_steps(files / "typo")
    changes = [*SCORED, "save_every=8", "checkpoints.keep_best=2"]
    with monkeypatch.context() as patch:
        fake_scores(patch, {2: 1.0, 4: 2.0, 6: InputError("no room")})
        assert run(files, "fails", *changes) == 2
    assert "no room" in capsys.readouterr().err
    assert run_dir.saved_steps(files / "fails") == [2, 4, 6]  # the best two, and what was done
    fake_scores(monkeypatch, {6: 3.0, 8: 4.0})
    monkeypatch.chdir(files)  # what is the same place from another folder is the same model
    assert run(files, "fails", *changes, "ckpt=ckpt") == 0
    assert tomllib.loads((files / "fails" / "config.toml").read_text())["ckpt"] == str(
        files / "ckpt"
    )
    assert run_dir.scores(files / "fails") == {2: 1.0, 4: 2.0, 8: 4.0}
    # What runs no step leaves config.toml as it is.
    config = (files / "fails" / "config.toml").read_bytes()
    assert run(files, "fails", *changes, "optimizer.learning_rate=0.5") == 0
    assert "no step is left, config.toml stays: optimizer.learning_rate" in capsys.readouterr().out
    assert run(files, "fails", *changes, "steps=4") == 2
    assert "steps: got 4, expected at least 8, which" in capsys.readouterr().err
    assert (files / "fails" / "config.toml").read_bytes() == config


def test_evaluation_records_that_give_no_sample(files, monkeypatch, capsys):
    """Found before the first step, left out by name, and never the end of an evaluation later."""
    held_out = files / "mixed.jsonl"
    lines = (files / "held_out.jsonl").read_text().splitlines()
    off = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    lines[1:1] = [
        json.dumps({"messages": off}),
        '{"messages": [{"role": "user", "content": null}]}',
    ]
    held_out.write_text("\n".join(lines))
    fake_step(monkeypatch, lambda number: (1.0, 0.5))
    changes = [*SCORED, "steps=2", "evaluate.generate=3", f"evaluate.sources.0.path={held_out}"]
    assert run(files, "mixed", *changes) == 2
    said = capsys.readouterr().err
    assert "2 of 3 records are bad, more than data.bad_fraction 0.2 allows" in said
    assert "mixed.jsonl:2: nothing to learn" in said and not run_dir.saved_steps(files / "mixed")
    assert run(files, "mixed", *changes, "data.bad_fraction=0.4") == 0
    with (files / "mixed" / "refused.csv").open() as file:
        named = dict(list(csv.reader(file))[1:])
    assert {"mixed.jsonl:2", "mixed.jsonl:3"} <= named.keys()
    answers = (files / "mixed" / "answers" / "step_2.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in answers] == [f"mixed.jsonl:{i}" for i in (1, 4, 5)]


def test_sigterm_in_an_evaluation(files, monkeypatch):
    """It ends there, and nothing of it is written; the next run evaluates that step anew."""
    batches = []

    def measure(weights, frozen, packed):
        batches.append(packed)
        if len(batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0, 1.0, 1.0, 1.0

    monkeypatch.setattr(evaluate, "make_measure", lambda *_: measure)
    fake_step(monkeypatch, lambda number: (1.0, 0.5))
    changes = [*SCORED, "steps=2", f"evaluate.sources.0.path={files / 'chats.jsonl'}"]
    changes += ["evaluate.batches=3", "pack.rows=1"]
    for seen, steps in ((1, []), (1 + 3, ["2"])):
        assert run(files, "evaluating", *changes) == 0
        assert run_dir.saved_steps(files / "evaluating") == [2] and len(batches) == seen
        rows = read_table(files / "evaluating" / "evaluation.csv")
        assert [row["step"] for row in rows] == steps


def test_sigterm_that_ends_the_workers_too(files, monkeypatch):
    """Reading fails in the middle of a step's draw: that step is not done, and its samples come again."""
    from qwen3vl_jax.training import loop as module

    class Dying(module.DataLoader):
        drawn = 0

        def __next__(self):
            Dying.drawn += 1
            if Dying.drawn == 6:  # the second micro batch of step 3
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("a worker was terminated")
            return super().__next__()

    fake_step(monkeypatch, lambda number: (1.0, 0.5))
    changes = ["steps=6", "evaluate.every=0", "report.profile=[]", "step.accumulate=2"]
    assert run(files, "steady", *changes) == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "DataLoader", Dying)
        assert run(files, "dying", *changes) == 0
    assert run_dir.saved_steps(files / "dying") == [2]
    assert run(files, "dying", *changes) == 0
    seen = [
        [(row["step"], row["samples"], row["fill"], row["patches"]) for row in read_table(path)]
        for path in (files / "steady" / "metrics.csv", files / "dying" / "metrics.csv")
    ]
    assert seen[0] == seen[1] and len(seen[0]) == 6


def test_bad_records_that_stop_a_run_are_listed(files, monkeypatch, capsys):
    """In refused.csv, though nothing was saved yet."""
    fake_step(monkeypatch, lambda number: (1.0, 0.5))
    changes = ["steps=99", "save_every=99", "evaluate.every=0", "report.profile=[]"]
    assert run(files, "bad", *changes, "data.bad_fraction=0.0") == 2
    assert "records are bad" in capsys.readouterr().err
    assert "chats.jsonl:25" in (files / "bad" / "refused.csv").read_text()


def test_loggers_are_told(files, tmp_path, monkeypatch):
    """wandb: one run by that name however often it goes on; TensorBoard: what a killed run wrote goes."""
    import tensorboardX

    calls, boards = [], []
    stub = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda *, exit_code: calls.append({"exit_code": exit_code}),
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **given: calls.append(given) or stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    events = types.SimpleNamespace(_worker=mock.Mock(), _ev_writer=mock.Mock())
    board = mock.Mock(file_writer=types.SimpleNamespace(event_writer=events))
    monkeypatch.setattr(
        tensorboardX, "SummaryWriter", lambda _, purge_step: boards.append(purge_step) or board
    )
    told = recipe.read_recipe(files / "recipe.toml", ["report.wandb=team", "report.every=1"])
    for first in (0, 3):
        with RunLogger(tmp_path, told, first) as logger:
            row = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 7, "fill": 1.0}
            logger.step(first + 1, row)
            logger.evaluation(first + 1, {"loss": 2.0}, [])
    first, (step, values), asked, code, again, *_ = calls
    assert first["project"] == "team" and first["id"] == again["id"] and first["resume"] == "allow"
    assert (step, values["train/loss"], asked[1]) == (1, 1.0, {"evaluation/loss": 2.0})
    assert code == {"exit_code": 0} and boards == [1, 4]
    assert events._worker.stop.call_count == 2 and events.add_event is events._ev_writer.write_event


def test_tables_are_cut_back_and_grow_columns(tmp_path):
    """Rows after the checkpoint and a torn line go; a new column is empty before; floats are exact."""
    path = tmp_path / "t.csv"
    table, value = Table(path), np.float32(0.1)
    table.write(1, {"loss": value})
    table.write(2, {"loss": 2.0, "more": np.array([0.5, 1.25])})
    table.close()
    path.write_text(path.read_text() + "3,0.")
    assert read_table(path)[1] == {"step": "2", "loss": "2", "more": "0.5 1.25"}
    assert np.float32(read_table(path)[0]["loss"]) == value and read_table(path)[0]["more"] == ""
    table = Table(path, first=1)
    table.write(2, {"loss": 3, "more": None})
    table.close()
    assert path.read_text() == "step,loss,more\n1,0.100000001,\n2,3,\n"


def test_the_progress_line():
    """Real tokens' share of the peak, and what the device computed with padding."""
    row = {"loss": 1.5, "lr": 1e-5, "grad_norm": 2.0, "tokens_per_s": 12345.6, "fill": 0.97}
    row |= {"mfu": 0.412, "mfu_padded": 0.44, "memory_gib": 31.25}
    assert described(row, 3725) == (
        "loss 1.5000, lr 1.00e-05, norm 2, 12,346 tokens/s, fill 97%, mfu 41.2% of real tokens, "
        "44.0% with padding, 31.2 GiB, 1:02:05 left"
    )
