"""A batch file's answers on disks that are full, cut off or damaged: none is lost or changed."""

import contextlib
import errno
import io
import json
import os
import subprocess
from pathlib import Path

import pytest

from qwen3vl_jax.cli.batch import part_of
from qwen3vl_jax.cli.batch_journal import Journal, read_lines
from qwen3vl_jax.errors import InputError

SETTINGS = {"seed": 0, "stop": []}
RESULTS = [
    {"id": 1, "text": "one"},
    {"id": "b", "text": 'zw\u00f6lf", "checksum": "0"}'},
    {"id": {"result": 1, "checksum": "0"}, "logprobs": [{"logprob": -0.5}]},
    {"id": 4, "text": ""},
]
WANT = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in RESULTS).encode()


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f"{i}\n" for i in RESULTS))
    return read_lines(tmp_path / "in.jsonl")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk" / "out.jsonl"


def partial(out):
    return out.with_name("out.jsonl.partial")


def answer(out, lines, results=RESULTS):
    """Adds what is missing, and puts OUT in its place; gives the numbers that were there."""
    with Journal(out, lines, SETTINGS) as journal:
        there = set(journal.done)
        for line in part_of(journal.lines, journal.done, 0, 1):
            journal.add(line, results[line.number - 1])
        journal.finish()
    return there


def names(out):
    return sorted(path.name for path in out.parent.iterdir())


class Full(io.FileIO):
    """A file of a disk with room for `left` bytes more, which a test sets."""

    left = 0

    def write(self, data):
        room = min(len(data), Full.left)
        if data and not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Full.left -= room
        return super().write(memoryview(data)[:room])


@pytest.fixture
def full(monkeypatch):
    """Files of `Full` for everything that is written."""
    usual = Path.open

    def opened(self, mode="r", buffering=-1, **options):
        if not set(mode) & set("wa"):
            return usual(self, mode, buffering, **options)
        raw = Full(self, mode.replace("b", ""))
        return raw if buffering == 0 else io.BufferedWriter(raw)

    monkeypatch.setattr(Path, "open", opened)
    return Full


@pytest.fixture
def unsynced(monkeypatch):
    """Nothing waits for the disk, in tests of a thousand files."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def test_a_disk_that_is_full_at_any_byte(out, lines, full, unsynced):
    """One line says so, every answer that was kept is there, and the same call goes on with room."""
    full.left = 10**6
    answer(out, lines)
    needed = 10**6 - full.left
    assert out.read_bytes() == WANT and names(out) == ["out.jsonl"]
    end = needed - len(WANT) - 20
    for room in (*range(0, end, 7), *range(end, needed + 1)):
        out.unlink()
        full.left, kept = room, set()
        with contextlib.ExitStack() as scope:
            if room < needed:
                scope.enter_context(pytest.raises(InputError, match="No space left on device"))
            with Journal(out, lines, SETTINGS) as journal:
                for line in lines:
                    journal.add(line, RESULTS[line.number - 1])
                    kept.add(line.number)
                journal.finish()
        assert out.exists() == (room == needed) and set(names(out)) <= {out.name, partial(out).name}
        if room < needed:
            full.left = 10**6
            assert answer(out, lines) == kept
        assert out.read_bytes() == WANT and names(out) == ["out.jsonl"]


def test_a_disk_that_cannot_keep_what_it_took(out, lines, monkeypatch):
    """fsync fails, on some disks the first to tell of a lack of room: nothing has gone by then."""
    for fails in range(1, 6):
        calls = iter(range(1, 100))

        def sync(file, fails=fails, calls=calls):
            if next(calls) == fails:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        monkeypatch.setattr(os, "fsync", sync)
        with pytest.raises(InputError, match=r"cannot be written .*; what was finished is kept"):
            answer(out, lines)
        # OUT.partial and its folder come first, then all answers, then OUT and its folder.
        assert out.exists() == (fails == 5) and partial(out).exists()
        assert answer(out, lines) == ({1, 2, 3, 4} if fails > 2 else set())
        assert out.read_bytes() == WANT and names(out) == ["out.jsonl"]
        out.unlink()


def test_a_small_disk(out, lines):
    """The same on a tmpfs, page by page."""
    pages = [{"id": one["id"], "text": "x" * 3000} for one in RESULTS]
    for size in range(4096, 10 * 4096, 4096):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out.parent]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mount is not permitted here")
        try:
            try:
                answer(out, lines, pages)
            except InputError as e:
                assert "No space left on device" in str(e) and size < 9 * 4096
                kept = partial(out).read_bytes().count(b'{"line"') if partial(out).exists() else 0
                subprocess.run(["mount", "-o", "remount,size=1m", out.parent], check=True)
                assert len(answer(out, lines, pages)) == kept >= min(size // 4096, 5) - 1
            assert [json.loads(text) for text in out.read_text().splitlines()] == pages
            assert names(out) == ["out.jsonl"]
        finally:
            subprocess.run(["umount", out.parent], check=True)


def kept_of(out, lines):
    """OUT.partial of all results but the last."""
    with Journal(out, lines, SETTINGS) as journal:
        for line in lines[:-1]:
            journal.add(line, RESULTS[line.number - 1])
    return partial(out).read_bytes()


def test_any_damaged_byte_is_noticed(out, lines, capsys, unsynced):
    """Its line is named and answered again, or the file is refused; no answer is another one."""
    whole = kept_of(out, lines)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        partial(out).write_bytes(damaged)
        there, number = answer(out, lines), whole[:at].count(b"\n")
        said = capsys.readouterr().err
        assert f"out.jsonl.partial: damaged or cut off, and left out: line {number + 1}" in said
        # Without its end a line is one with the next.
        assert there >= {1, 2, 3} - {number, number + (whole[at] == ord("\n"))}
        assert out.read_bytes() == WANT
        out.unlink()


def test_a_file_that_ends_anywhere_goes_on(out, lines, capsys, unsynced):
    """What a kill at any moment can leave: whole lines and a piece of one."""
    whole = kept_of(out, lines)
    for size in range(len(whole)):
        partial(out).write_bytes(whole[:size])
        torn = whole[:size].rpartition(b"\n")[2]
        count = whole[:size].count(b"\n")
        assert answer(out, lines) == set(range(1, count))
        assert (f"left out: line {count + 1};" in capsys.readouterr().err) == bool(torn)
        assert out.read_bytes() == WANT and names(out) == ["out.jsonl"]
        out.unlink()


def test_an_answer_that_is_damaged_while_others_are_made(out, lines):
    """What is put in its place is checked once more."""
    with Journal(out, lines, SETTINGS) as journal:
        for line in lines:
            journal.add(line, RESULTS[line.number - 1])
        text = partial(out).read_bytes()
        partial(out).write_bytes(text.replace(b"one", b"two"))
        with pytest.raises(InputError, match=r"the answer of line 1 is damaged"):
            journal.finish()
    assert names(out) == ["out.jsonl.partial"]
    assert answer(out, lines) == {2, 3, 4} and out.read_bytes() == WANT


def test_errors_are_in_out_and_tried_again(out, lines):
    """OUT.partial stays beside an OUT with errors, which stays until a better one is whole."""
    wrong = [*RESULTS[:2], {"id": 3, "error": "no network"}, RESULTS[3]]
    assert answer(out, lines, wrong) == set() and names(out) == ["out.jsonl", "out.jsonl.partial"]
    first = out.read_bytes()
    assert json.loads(first.splitlines()[2]) == wrong[2]
    with Journal(out, lines, SETTINGS) as journal:
        left = part_of(journal.lines, journal.done, 0, 1)
        assert [line.number for line in left] == [3] and out.read_bytes() == first
    assert answer(out, lines) == {1, 2, 4}
    assert out.read_bytes() == WANT and names(out) == ["out.jsonl"]


def test_what_is_not_of_this_work_is_refused(out, lines, capsys):
    """Other settings and lines, another process or program, a finished OUT: one line, nothing changed."""

    def refused(match, lines=lines, settings=SETTINGS):
        before = {path.name: path.read_bytes() for path in out.parent.iterdir() if path.is_file()}
        with pytest.raises(InputError, match=match) as told:
            Journal(out, lines, settings)
        assert "\n" not in str(told.value)
        assert before == {p.name: p.read_bytes() for p in out.parent.iterdir() if p.is_file()}

    whole = kept_of(out, lines)
    refused("begun with seed 0, now it is 1", settings={**SETTINGS, "seed": 1})
    refused("line 2 of the input is no longer", lines=[lines[0], *lines[2:]])
    refused("line 2 of the input was answered, which now ends with line 1", lines=lines[:1])
    # Without the line of the settings an answer still knows what it was made with.
    partial(out).write_bytes(b"x" + whole)
    refused("line 1 of the input is no longer the one .* or the options", settings={"seed": 1})
    with Journal(out, lines, SETTINGS) as journal:
        assert set(journal.done) == {1, 2, 3}
        refused("another process is writing it")
    for text in (b"no lines of ours\n", b"something else, without an end", b'{"line": 3}\n'):
        partial(out).write_bytes(text)
        refused("holds no line of this program; delete out.jsonl.partial and out.jsonl to start")
    partial(out).unlink()
    out.write_bytes(WANT)
    refused("is there and has no out.jsonl.partial to go on from: it is finished, or another")
    out.with_name("out.jsonl.journal").write_text("{}\n")
    refused("journal: is of an earlier version of this program; finish the work with that version")
    out.with_name("out.jsonl.journal").unlink()
    out.unlink()
    out.mkdir()
    refused("is no regular file; name another one")
    assert capsys.readouterr().err.count("\n") == 1


def test_settings_are_free_until_something_is_answered(out, lines):
    with Journal(out, lines, {"seed": 7}) as journal:
        journal.add(lines[0], {"id": 1, "error": "no network"})
    assert answer(out, lines) == set() and out.read_bytes() == WANT


def test_any_name_comes_back(out, lines):
    """As deep as the input may have it."""
    deep = {"id": json.loads("[" * 99 + "]" * 99), "text": ""}
    with Journal(out, lines, SETTINGS) as journal:
        journal.add(lines[3], deep)
    assert answer(out, lines) == {4}
    assert json.loads(out.read_text().splitlines()[3]) == deep


def test_an_output_by_two_names_is_one(out, lines):
    """A link is followed, and stays, as do the rights of what was there."""
    out.touch(0o600)
    link = out.with_name("link")
    link.symlink_to(out)
    with Journal(out, lines, SETTINGS), pytest.raises(InputError, match="another process is"):
        Journal(link, lines, SETTINGS)
    answer(link, lines)
    assert link.is_symlink() and out.read_bytes() == WANT and out.stat().st_mode & 0o777 == 0o600


def test_a_result_that_is_no_json_is_refused(out, lines):
    with Journal(out, lines, SETTINGS) as journal, pytest.raises(InputError, match="as JSON"):
        journal.add(lines[0], {"id": 1, "logprob": float("nan")})
    assert b"NaN" not in partial(out).read_bytes()
