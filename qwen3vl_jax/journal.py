"""A file of answers that outlives its process: each line once, in the order of the questions.

Beside OUT lies OUT.journal while there is work left. Its first line says what was asked for, each
other one holds an answer, written when it was finished and before OUT got it. A process that dies at
any point leaves at worst half a line at the journal's end; the next one drops it and goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qwen3vl_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the questions: its number from 1, where it lies, and a digest of its bytes."""

    number: int
    start: int
    size: int
    digest: str


def read_lines(path: Path) -> list[Line]:
    """Every line that is not blank, without its text. Raises InputError for a file without any."""
    found, start = [], 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    digest = hashlib.blake2b(text.strip(), digest_size=16).hexdigest()
                    found.append(Line(number, start, len(text), digest))
                start += len(text)
    except OSError as e:
        raise InputError(f"--input {path}: cannot be read ({e.strerror})") from e
    if not found:
        raise InputError(f"--input {path}: holds no line, expected one JSON object a line")
    return found


def beside(out: Path) -> Path:
    """Where the journal of `out` lies."""
    return out.with_name(out.name + ".journal")


def complete(out: Path, lines: list[Line]) -> bool:
    """Whether `out` is done: as many answers as there are lines, and no journal beside it."""
    if not out.is_file() or beside(out).exists():
        return False
    with out.open("rb") as file:
        return sum(1 for _ in file) == len(lines)


class Journal:
    """The answers that are there, and the two files that hold them; a context manager."""

    def __init__(self, out: Path, lines: list[Line], settings: Mapping[str, Any]):
        """Takes up the work on `out` where it was left, or begins it.

        Raises InputError while another process works on it, for an `out` that is not of this work,
        and for a journal of other settings or of other lines.
        """
        self.out, self.path = out, beside(out)
        self.lines, self.settings = lines, json.loads(json.dumps(settings))
        self.results: dict[int, Result] = {}
        if out.exists() and not self.path.exists():
            raise InputError(
                f"--output {out}: already exists and has no journal to go on from; name another file"
            )
        try:
            self.journal: BinaryIO = self.path.open("ab+")
        except OSError as e:
            raise InputError(f"--output {out}: cannot be written ({e.strerror})") from e
        try:
            self._lock()
            self._take_up()
            self.file: BinaryIO = out.open("wb")
        except BaseException:
            self.journal.close()
            raise
        self.next = 0  # of self.lines: the first one that `out` lacks
        self._grow()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.journal, self.file):
            file.flush()
            os.fsync(file.fileno())
        if self.next == len(self.lines):
            self.path.unlink()
        self.journal.close()
        self.file.close()

    def missing(self) -> Iterator[Line]:
        """The lines without an answer."""
        return (line for line in self.lines if line.number not in self.results)

    def add(self, line: Line, result: Result) -> None:
        """Keeps a finished answer, and appends to `out` what is now due."""
        entry = {"line": line.number, "digest": line.digest, "result": result}
        self._append(entry)
        self.results[line.number] = result
        self._grow()

    def _append(self, entry: Mapping[str, Any]) -> None:
        self.journal.write(_text(entry))
        self.journal.flush()

    def _grow(self) -> None:
        old = self.next
        while self.next < len(self.lines):
            result = self.results.get(self.lines[self.next].number)
            if result is None:
                break
            self.file.write(_text(result))
            self.next += 1
        if self.next > old:
            self.file.flush()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"--output {self.out}: another process is writing it") from e

    def _take_up(self) -> None:
        self.journal.seek(0)
        whole = self.journal.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self.journal.truncate(len(whole))
        entries = whole.splitlines()
        if not entries:
            self._append({"settings": self.settings})
            return
        try:
            head, *answers = map(json.loads, entries)
            begun = head["settings"]
            found = [(a["line"], a["digest"], a["result"]) for a in answers]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{self.path}: is no journal of this program; {self._afresh}") from e
        for name in sorted(begun.keys() | self.settings.keys()):
            old, new = begun.get(name), self.settings.get(name)
            if old != new:
                raise InputError(
                    f"{self.path}: was begun with {name} {old!r}, now it is {new!r}; give the same "
                    f"again, or {self._afresh}"
                )
        digests = {line.number: line.digest for line in self.lines}
        for number, digest, result in found:
            if digests.get(number) != digest:
                raise InputError(
                    f"{self.path}: line {number} of the input is no longer the one that was answered; "
                    f"put it back, or {self._afresh}"
                )
            self.results[number] = result

    @property
    def _afresh(self) -> str:
        return f"delete {self.path.name} and {self.out.name} to start afresh"


def _text(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
