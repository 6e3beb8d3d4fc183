"""A file of answers that outlives its process: each line once, in the order of the questions.

Beside OUT lies OUT.journal (a log of kept_lines) while there is work left. Its first line says what
was asked for, each other one holds an answer, written when it was finished and before OUT got it. A
process that dies at any point leaves at worst half a line at the journal's end; the next one drops it
and goes on. Of several processes the first has OUT and its journal, the others OUT.journal.1, ..: see
replicas.py. A remote OUT is put there whole when its process ends; until then the journal alone has
the answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.kept_lines import begun, close_file, open_log, remove
from qwen3vl_jax.paths import file_size, is_remote, kind, read_range
from qwen3vl_jax.writing import Spool

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
        text = read_range(source, self.start, self.size)
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
    if kind(path) == "folder" or (path.exists() and not path.is_file()):
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


class Kept:
    """A journal's log (kept_lines): results that were finished, one a line."""

    def __init__(
        self,
        path: Path,
        out: Path,
        lines: list[Line],
        settings: Mapping[str, Any],
        begin: Callable[[bool], None] = lambda begun: None,
    ):
        """Takes up what is there; begin(whether anything is) may refuse. Raises InputError as Journal."""
        self.path, self.out, self.lines = path, out, lines
        self.settings = json.loads(json.dumps(settings))
        self.found: list[
            tuple[int, Result]
        ] = []  # what was there: answers, by the number of their line
        try:
            begin(begun(path))
            self.log = open_log(path, f"--output {out}: another process is writing it")
        except OSError as e:
            raise InputError(f"--output {out}: cannot be written ({e.strerror})") from e
        try:
            self._take_up(begin)
        except BaseException:
            self.log.close()
            raise

    def append(self, line: Line, result: Result) -> None:
        """Writes one result. Raises OSError."""
        self._write({"line": line.number, "digest": line.digest, "result": result})

    def close(self) -> None:
        """Puts it where it is safe; others may open it then."""
        self.log.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        self.log.write(_text(entry))

    def _take_up(self, begin: Callable[[bool], None]) -> None:
        whole = self.log.read()
        complete = whole[: whole.rfind(b"\n") + 1]
        if whole and not whole.startswith(b'{"settings": '):
            raise InputError(f"{self.path}: is no journal of this program; {self._afresh}")
        try:
            head, *answers = map(json.loads, complete.splitlines() or [b'{"settings": {}}'])
            asked = head["settings"]
            found = [(a["line"], a["digest"], a["result"]) for a in answers]
            found = [entry for entry in found if ERROR not in entry[2]]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{self.path}: is no journal of this program; {self._afresh}") from e
        if not found:  # nothing was answered yet: begin with what is asked for now
            begin(bool(answers))
            self.log.cut(0)
            self._write({"settings": self.settings})
            self.log.sync()  # a place that cannot be written to is told of at once
            return
        self._check_same(asked, found)
        self.log.cut(len(complete))
        self.found = [(number, result) for number, _, result in found]

    def _check_same(self, asked: Mapping[str, Any], found: list[tuple[int, str, Result]]) -> None:
        for name in sorted(asked.keys() | self.settings.keys()):
            old, new = asked.get(name), self.settings.get(name)
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
        self.lines, self.settings = lines, settings
        self.done: set[int] = set()
        self.errors = 0
        self.next = 0  # of self.lines: the first one that `out` lacks
        self._ahead: dict[int, Result] = {}  # finished before their turn
        left = [path for path in _shares(out) if begun(path)]
        self.kept = Kept(
            self.path, out, lines, settings, lambda there: self._check_free(there or left)
        )
        try:
            for number, result in self.kept.found:
                self._have(number, result)
            self.file = Spool(out) if is_remote(out) else out.open("wb")
        except OSError as e:
            self.kept.close()
            raise InputError(f"--output {out}: cannot be written ({e.strerror})") from e
        self._grow()
        try:
            for path in _shares(out):
                self._take_over(path)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.kept.close()
            self.file.close() if isinstance(self.file, Spool) else close_file(self.file)
        except Exception as e:  # a store's client has errors of its own
            raise _unwritable(self.out, e) from e
        if self.next == len(self.lines) and not self.errors:
            remove(self.path)

    def missing(self) -> Iterator[Line]:
        """The lines without a result."""
        return (line for line in self.lines if line.number not in self.done)

    def add(self, line: Line, result: Result) -> None:
        """Keeps a finished result, and appends to `out` what is now due."""
        try:
            self.kept.append(line, result)
            self._have(line.number, result)
            self._grow()
        except OSError as e:
            raise _unwritable(self.out, e) from e

    def absorb(self, found: Iterable[tuple[int, Result]]) -> None:
        """Keeps results of others by the number of their line, but for those that are there."""
        by_number = {line.number: line for line in self.lines}
        for number, result in found:
            if number not in self.done:
                self.add(by_number[number], result)

    def sync(self) -> None:
        """Puts what was added where it is safe."""
        self.kept.log.sync()

    def _take_over(self, path: Path) -> None:
        """What another process left when it, or the first, was killed."""
        left = Kept(path, self.out, self.lines, self.settings)
        self.absorb(left.found)
        self.sync()
        remove(path)
        left.close()

    def _have(self, number: int, result: Result) -> None:
        self.done.add(number)
        self.errors += ERROR in result
        self._ahead[number] = result

    def _grow(self) -> None:
        old = self.next
        while self.next < len(self.lines) and self.lines[self.next].number in self._ahead:
            self.file.write(_text(self._ahead.pop(self.lines[self.next].number)))
            self.next += 1
        if self.next > old:
            self.file.flush()

    def _check_free(self, there: object) -> None:
        if not there and self.out.exists() and file_size(self.out):
            raise InputError(
                f"--output {self.out}: is there and has no journal to go on from: it is finished, or "
                "another program's; name another file"
            )


class Share:
    """The answers of one process of several beside the first, which takes them over."""

    def __init__(self, out: Path, index: int, lines: list[Line], settings: Mapping[str, Any]):
        """Raises InputError as Journal does."""
        self.out, self.path = out, share_path(out, index)
        self.kept = Kept(self.path, out, lines, settings)
        self.done = {number for number, _ in self.kept.found}

    def add(self, line: Line, result: Result) -> None:
        """Keeps a finished result."""
        try:
            self.kept.append(line, result)
        except OSError as e:
            raise _unwritable(self.out, e) from e
        self.done.add(line.number)

    def sync(self) -> None:
        """Puts what was added where it is safe."""
        self.kept.log.sync()

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.close()


def share_path(out: Path, index: int) -> Path:
    """The journal of process `index`, from 1."""
    return out.with_name(f"{out.name}.journal.{index}")


def _shares(out: Path) -> list[Path]:
    start = f"{out.name}.journal."
    there = out.parent.iterdir() if out.parent.is_dir() else ()
    found = [p for p in there if p.name.startswith(start)]
    return sorted(p for p in found if p.name.removeprefix(start).isdecimal())


def _unwritable(out: Path, error: Exception) -> InputError:
    return InputError(
        f"--output {out}: cannot be written ({getattr(error, 'strerror', None) or error}); what was "
        "finished is kept, the same command goes on"
    )


def results_in(text: bytes) -> list[tuple[int, Result]]:
    """(number of its line, result) of the whole lines of a journal, or of a part of one."""
    entries = map(json.loads, text.splitlines())
    return [(e["line"], e["result"]) for e in entries if "line" in e]


def _text(entry: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return json.dumps(entry).encode() + b"\n"
