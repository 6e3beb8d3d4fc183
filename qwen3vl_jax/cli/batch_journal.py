"""The answers of a batch file, on disk as they come: in OUT.partial, and at the end in order in OUT.

Every line of OUT.partial is a JSON object that ends with a checksum of its other bytes: {"settings",
"checksum"} at each start, {"line", "digest", "error", "result", "checksum"} for each finished line, where
error true means that the next run tries the line again. A killed process leaves at worst a torn line.
Of several processes the first has OUT and OUT.partial, others OUT.partial.1, ..
"""

import contextlib
import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.json_text import read_json, write_json
from qwen3vl_jax.storage.paths import absolute, file_size, is_remote, kind, read_range
from qwen3vl_jax.storage.remote_files import AppendLog, replacing

Result = dict[str, Any]
ERROR = "error"  # key of a result that is no answer: the next process tries its line again
_NAMED = 10  # most damaged lines that are named
_CHECKSUM = b', "checksum": "'
_RESULT = b', "result": '
_BEGIN = b'{"settings": '  # of a log


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input: its number from 1, its first byte, its bytes, and their digest."""

    number: int
    start: int
    size: int
    digest: str

    def read(self, source: Path) -> bytes:
        """Its bytes. Raises InputError where they are no longer those that were counted."""
        text = read_range(source, self.start, self.size)
        if digest_of(text) != self.digest:
            changed = f"line {self.number} changed while it was being answered"
            advice = "put the file back as it was and run the same command again"
            raise InputError(f"--input {source}: {changed}; {advice}")
        return text


def digest_of(text: bytes) -> str:
    """A digest that is equal for two lines that ask the same."""
    return hashlib.blake2b(text.strip(), digest_size=16).hexdigest()


def read_lines(path: Path) -> list[Line]:
    """Every line that is not blank, without its text. Raises InputError for a file without any."""
    found, start = [], 0
    if kind(path) == "folder" or (path.exists() and not path.is_file()):
        found = "is a folder or a pipe"
        raise InputError(f"--input {path}: {found}, expected a file: it is read more than once")
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


class Journal(contextlib.AbstractContextManager):
    """The results so far, in OUT.partial while there is work; a context manager."""

    def __init__(self, out: Path, lines: list[Line], settings: Mapping[str, Any], index: int = 0):
        """Continues the work on `out`, or begins it; `index`: which of several processes this is.

        Raises InputError while another process works on it, and for files that are not of this work.
        """
        self.out, self._place = out, absolute(out)
        self.path = self._place.with_name(f"{self._place.name}.partial" + f".{index}" * bool(index))
        self.lines, self._index, self.errors = lines, index, 0
        self._busy = f"--output {out}: another process is writing it"
        self._afresh = f"delete {self.path.name} and {self._place.name} to start afresh"
        # As it is read back: tuples are lists then.
        text = write_json(settings, "the settings", sort_keys=True)
        self._settings = read_json(text, "")
        self._digests = {one.number: digest_of(f"{one.digest} {text}".encode()) for one in lines}
        # The lines that have a result, by number: its first byte in the log, and how many there are.
        self.done: dict[int, tuple[int, int]] = {}
        try:
            self.log = AppendLog(self.path, self._busy)
        except OSError as e:
            raise InputError(f"--output {out}: cannot be written ({e.strerror})") from e
        try:
            with self._writing():
                self._begin()
        except BaseException:
            if not self.log.size:
                with contextlib.suppress(OSError):
                    self.log.remove()
            self.log.close()
            raise

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.sync()
        except InputError:
            # The block's own error comes first.
            if not kind:
                raise
        finally:
            self.log.close()

    def add(self, line: Line, result: Result) -> None:
        """Keeps a result. Raises InputError where it cannot be written."""
        digest, error = self._digests[line.number], ERROR in result
        entry = {"line": line.number, "digest": digest, "error": error, "result": result}
        self._append(line.number, _line(entry), error)

    def sync(self) -> None:
        """Puts what was added on the disk. Raises InputError."""
        with self._writing():
            self.log.sync()

    def pieces(self, size: int) -> Iterator[str]:
        """The results as text for `absorb`, about `size` bytes at a time."""
        text = bytearray()
        for place in self.done.values():
            text += self.log.read(*place)
            if len(text) >= size:
                yield text.decode()
                text.clear()
        yield text.decode()

    def absorb(self, pieces: list[str]) -> None:
        """Keeps the results of other processes for lines that have none here. Raises InputError."""
        for line in "".join(pieces).encode().splitlines(keepends=True):
            if (entry := _entry(line)) is None:
                raise InputError(f"--output {self.out}: an answer was damaged on its way here")
            if entry["line"] not in self.done:
                self._append(entry["line"], line, entry["error"])

    def finish(self) -> None:
        """Puts OUT in its place and removes OUT.partial if no result is an error. Raises InputError."""
        with self._writing():
            self.log.sync()
            with replacing(self._place) as file:
                for line in self.lines:
                    text = _checked(self.log.read(*self.done[line.number]))
                    if text is None:
                        what = f"the answer of line {line.number} is damaged"
                        raise InputError(f"{self.path}: {what}; the same command gives it again")
                    file.write(text.partition(_RESULT)[2] + b"\n")  # as it was written
            if not self.errors:
                self.log.remove()

    def _begin(self) -> None:
        """Reads the logs that are there. Raises OSError too, so that a full disk is seen at once."""
        siblings, number = self.path.parent, re.compile(rf"{re.escape(self.path.name)}\.\d+")
        found = siblings.iterdir() if not self._index and siblings.is_dir() else ()
        others = sorted(path for path in found if number.fullmatch(path.name))
        self.done = self._read_log(self.log)
        self._check_out(bool(self.log.size) or any(map(AppendLog.has_begun, others)))
        self.log.append(_line({"settings": self._settings}))
        self.log.sync()
        for path in others:
            with contextlib.closing(AppendLog(path, self._busy)) as log:
                for place in self._read_log(log).values():
                    self.absorb([log.read(*place).decode()])
                self.log.sync()
                log.remove()

    def _read_log(self, log: AppendLog) -> dict[int, tuple[int, int]]:
        """Where a log has each line's answer; names damaged lines on stderr, and cuts a torn one off."""
        found: dict[int, tuple[int, int]] = {}
        digests: dict[int, str] = {}
        settings, damaged, text, count = None, [], b"\n", 0
        for count, (start, text) in enumerate(log.lines(), 1):
            if (entry := _entry(text)) is None:
                damaged.append(count)
            elif "settings" in entry:
                settings = entry["settings"]
            elif not entry["error"]:
                number = entry["line"]
                found[number], digests[number] = (start, len(text)), entry["digest"]
        if len(damaged) == count and not _BEGIN.startswith(log.read(0, len(_BEGIN))):
            raise InputError(f"{log.path}: holds no line of this program; {self._afresh}")
        if found:
            self._check_same(log.path, settings, digests)
        if damaged:
            names = ", ".join(map(str, damaged[:_NAMED])) + ", .." * (len(damaged) > _NAMED)
            left_out = f"{log.path}: damaged or cut off, and left out: line {names}"
            print(f"{left_out}; prompts without an answer are answered again", file=sys.stderr)
        if not text.endswith(b"\n"):
            log.cut(start)
        return found

    def _check_same(self, path: Path, settings: Any, digests: Mapping[int, str]) -> None:
        """Raises InputError for a log of other settings (None: its line of them is damaged) or lines."""
        before = self._settings if settings is None else settings
        for name in sorted(before.keys() | self._settings.keys()):
            old, new = before.get(name), self._settings.get(name)
            if old != new:
                then, now = ("none" if x is None else repr(x) for x in (old, new))
                begun = f"was begun with {name} {then}, now it is {now}"
                raise InputError(f"{path}: {begun}; give the same again, or {self._afresh}")
        last = max(self._digests, default=0)
        for number, digest in digests.items():
            if self._digests.get(number) != digest:
                change = "is no longer the one that was answered"
                change += " or the options are others" * (settings is None)
                if number > last:
                    change = f"was answered, which now ends with line {last}"
                what = f"line {number} of the input {change}"
                raise InputError(f"{path}: {what}; put it back, or {self._afresh}")

    def _append(self, number: int, text: bytes, error: bool) -> None:
        with self._writing():
            self.done[number] = self.log.append(text), len(text)
        self.errors += error

    def _check_out(self, begun: bool) -> None:
        """Raises InputError for an `out` that is no file, or not of the work that has begun."""
        found = kind(self._place)
        if found == "folder" or (found and not self._place.is_file()):
            raise InputError(f"--output {self.out}: is no regular file; name another one")
        if begun or self._index:
            return
        old = self._place.with_name(f"{self._place.name}.journal")
        if kind(old):
            what = "is of an earlier version of this program; finish the work with that version"
            afresh = f"delete {old.name} and {self._place.name} to start afresh"
            raise InputError(f"{old}: {what}, or {afresh}")
        if found and file_size(self._place):
            what = f"is there and has no {self.path.name} to go on from"
            why = "it is finished, or another program's; name another file"
            raise InputError(f"--output {self.out}: {what}: {why}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns an error of the disk or the store into an InputError."""
        try:
            yield
        except Exception as e:
            # A store's client has errors of its own.
            if isinstance(e, InputError) or not (isinstance(e, OSError) or is_remote(self.out)):
                raise
            found = f"cannot be written ({getattr(e, 'strerror', None) or e})"
            kept = "what was finished is kept, the same command goes on"
            raise InputError(f"--output {self.out}: {found}; {kept}") from e


def _entry(text: bytes) -> dict[str, Any] | None:
    """A line of a log without its result; None for one that is damaged or torn."""
    line, entry = _checked(text) or b"", {}
    head = line if line.startswith(_BEGIN) else line.partition(_RESULT)[0]
    with contextlib.suppress(InputError):
        entry = read_json(head + b"}", "")
    kinds = {"line": int, "digest": str, "error": bool}
    kinds = {"settings": dict} if "settings" in entry else kinds
    return entry if all(isinstance(entry.get(key), kind) for key, kind in kinds.items()) else None


def _checked(text: bytes) -> bytes | None:
    """A line's bytes before its checksum, if that is right."""
    line, _, checksum = text.rpartition(_CHECKSUM)
    return line if checksum == _checksum(line) else None


def _line(entry: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair, as in the name of a file, becomes a question mark.
    line = write_json(entry, "a result", ensure_ascii=False)[:-1].encode(errors="replace")
    return line + _CHECKSUM + _checksum(line)


def _checksum(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).hexdigest().encode() + b'"}\n'
