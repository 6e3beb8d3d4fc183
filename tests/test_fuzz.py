"""Some mutated inputs of every kind: each is answered, or refused in one line."""

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_kinds import KINDS

COUNTS = {
    "images": 12,
    "videos": 12,
    "chats": 15,
    "lines": 12,
    "records": 20,
    "configs": 10,
    "tokenizers": 10,
    "templates": 5,
    "journals": 10,
    "checkpoints": 6,
}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs_end_in_one_line_or_an_answer(kind, tmp_path):
    outcomes = set()
    for number in range(COUNTS[kind]):
        folder = tmp_path / f"{kind}-{number}"
        fuzz.write_case(kind, number, folder)
        outcome, said = fuzz.trial(kind, folder)
        assert outcome in ("refused", "answered"), said
        outcomes.add(outcome)
    assert outcomes == {"refused", "answered"}


def test_what_is_found_is_counted_and_kept(tmp_path, monkeypatch, capsys):
    """A traceback is the exit code 1, and a folder that gives it again."""

    def fails(folder):
        raise ZeroDivisionError((folder / "image").name)

    monkeypatch.setitem(KINDS, "images", KINDS["images"]._replace(use=fails))
    monkeypatch.setattr(
        fuzz.Worker, "ask", lambda self, kind, number: asked(kind, number, tmp_path)
    )
    options = [
        "--minutes",
        "0.001",
        "--kinds",
        "images",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "f"),
    ]
    assert fuzz.main(options) == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError: image" in out and "traceback" in out
    (kept,) = (tmp_path / "f").iterdir()
    assert fuzz.main(["--replay", str(kept)]) == 1
    assert fuzz.main([*options, "--kinds", "chats"]) == 0


def asked(kind, number, folder):
    """`Worker.ask` without a child."""
    case = folder / f"{kind}-{number}-tried"
    fuzz.write_case(kind, number, case)
    return fuzz.trial(kind, case)
