"""A file of answers that outlives its process: each line once, in the order of the questions.

Beside OUT lies OUT.journal while there is work left. Its first line says what was asked for, each
other one holds an answer, written when it was finished and before OUT got it. A process that dies at
any point leaves at worst half a line at the journal's end; the next one drops it and goes on.
"""

from __future__ import annotations

import contextlib
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
ERROR = "error"  # key of a result that is no answer: it is tried again by the next process


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the questions: its number from 1, where it lies, and a digest of its bytes."""

    number: int
    start: int
    size: int
    digest: str

    def read(self, source: Path) -> bytes:
        """Its bytes. Raises InputError where they are no longer those that were counted."""
        with source.open("rb") as file:
            file.seek(self.start)
            text = file.read(self.size)
        if digest_of(text) != self.digest:
            raise InputError(
                f"--input {source}: line {self.number} changed while it was being answered; put the "
                "file back as it was and run the same command again"
            )
        return text


def digest_of(text: bytes) -> str:
    """What two lines share that ask the same."""
    return hashlib.blake2b(text.strip(), digest_size=16).hexdigest()


def read_lines(path: Path) -> list[Line]:
    """Every line that is not blank, without its text. Raises InputError for a file without any."""
    found, start = [], 0
    if path.exists() and not path.is_file():
        raise InputError(f"--input {path}: is no file that can be read again, save it as one first")
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    found.append(Line(number, start, len(text), digest_of(text)))
                start += len(text)
    except OSError as e:
        raise InputError(f"--input {path}: cannot be read ({e.strerror})") from e
    if not found:
        raise InputError(f"--input {path}: holds no line, expected one JSON object a line")
    return found


class Journal:
    """The answers that are there, and the two files that hold them; a context manager.

    When it is left with an answer to every line the journal is removed; while there are errors it stays,
    and the next process tries those lines again.
    """

    def __init__(self, out: Path, lines: list[Line], settings: Mapping[str, Any]):
        """Takes up the work on `out` where it was left, or begins it.

        Raises InputError while another process works on it, for an `out` that is not of this work,
        and for a journal of other settings or of other lines.
        """
        self.out, self.path = out, out.with_name(out.name + ".journal")
        self.lines, self.settings = lines, json.loads(json.dumps(settings))
        self.done: set[int] = set()
        self.errors = 0
        self.next = 0  # of self.lines: the first one that `out` lacks
        self._ahead: dict[int, Result] = {}  # finished before their turn
        try:
            self._check_free(self.path.exists() and self.path.stat().st_size > 0)
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
        self._grow()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.file, self.journal):
            with contextlib.suppress(OSError):  # a full disk was told before
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(OSError):
                file.close()
        if self.next == len(self.lines) and not self.errors:
            self.path.unlink()

    def missing(self) -> Iterator[Line]:
        """The lines without a result."""
        return (line for line in self.lines if line.number not in self.done)

    def add(self, line: Line, result: Result) -> None:
        """Keeps a finished result, and appends to `out` what is now due."""
        try:
            self._append({"line": line.number, "digest": line.digest, "result": result})
            self._have(line.number, result)
            self._grow()
        except OSError as e:
            raise InputError(
                f"--output {self.out}: cannot be written ({e.strerror}); what was finished is kept, the "
                "same command goes on"
            ) from e

    def _have(self, number: int, result: Result) -> None:
        self.done.add(number)
        self.errors += ERROR in result
        self._ahead[number] = result

    def _append(self, entry: Mapping[str, Any]) -> None:
        self.journal.write(_text(entry))
        self.journal.flush()

    def _grow(self) -> None:
        old = self.next
        while self.next < len(self.lines) and self.lines[self.next].number in self._ahead:
            self.file.write(_text(self._ahead.pop(self.lines[self.next].number)))
            self.next += 1
        if self.next > old:
            self.file.flush()

    def _check_free(self, begun: bool) -> None:
        if self.out.exists() and self.out.stat().st_size and not begun:
            raise InputError(
                f"--output {self.out}: is there and has no journal to go on from: it is finished, or "
                "another program's; name another file"
            )

    def _lock(self) -> None:
        if fcntl is None:
            return
        busy = f"--output {self.out}: another process is writing it"
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(busy) from e
        # The other one may have ended, and removed what we opened, just before.
        if not self.path.exists() or not os.path.samestat(
            os.fstat(self.journal.fileno()), self.path.stat()
        ):
            raise InputError(busy)

    def _take_up(self) -> None:
        self.journal.seek(0)
        whole = self.journal.read()
        complete = whole[: whole.rfind(b"\n") + 1]
        if whole and not whole.startswith(b'{"settings": '):
            raise InputError(f"{self.path}: is no journal of this program; {self._afresh}")
        try:
            head, *answers = map(json.loads, complete.splitlines() or [b'{"settings": {}}'])
            begun = head["settings"]
            found = [(a["line"], a["digest"], a["result"]) for a in answers]
            found = [entry for entry in found if ERROR not in entry[2]]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{self.path}: is no journal of this program; {self._afresh}") from e
        if not found:  # nothing was answered yet: begin with what is asked for now
            self._check_free(begun=bool(answers))
            self.journal.truncate(0)
            self._append({"settings": self.settings})
            return
        self._check_same(begun, found)
        self.journal.truncate(len(complete))
        for number, _, result in found:
            self._have(number, result)

    def _check_same(self, begun: Mapping[str, Any], found: list[tuple[int, str, Result]]) -> None:
        for name in sorted(begun.keys() | self.settings.keys()):
            old, new = begun.get(name), self.settings.get(name)
            if old != new:
                raise InputError(
                    f"{self.path}: was begun with {name} {old!r}, now it is {new!r}; give the same "
                    f"again, or {self._afresh}"
                )
        digests = {line.number: line.digest for line in self.lines}
        for number, digest, _ in found:
            if digests.get(number) != digest:
                raise InputError(
                    f"{self.path}: line {number} of the input is no longer the one that was answered; "
                    f"put it back, or {self._afresh}"
                )

    @property
    def _afresh(self) -> str:
        return f"delete {self.path.name} and {self.out.name} to start afresh"


def _text(entry: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return json.dumps(entry).encode() + b"\n"
