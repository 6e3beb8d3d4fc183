"""Mutated inputs of every kind: ``python -m benchmarks.fuzz --minutes N [--kinds images,chats]``.

Tries as many as it can in warm child processes, and counts for each kind: tried, refused in one line,
answered, tracebacks, hangs (10 s, and more where the machine has other work) and those over 2 GiB. The exit
code is 1 if one of the last three is not 0. What was found is kept as a folder of --out, KIND-NUMBER, which
``--replay FOLDER`` tries again.
"""

import argparse
import collections
import contextlib
import faulthandler
import json
import logging
import os
import queue
import random
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import InputError

SECONDS = 10
PEAK = 2 << 30
DIED = "died.txt"  # of a worker
COLUMNS = ("tried", "refused", "answered", "traceback", "hang", "over 2 GiB")
FAULTS = COLUMNS[3:]


def write_case(kind: str, number: int, folder: Path) -> None:
    """Makes the input of a number, the same each time."""
    from benchmarks.fuzz_kinds import KINDS

    folder.mkdir(parents=True)
    for name, data in KINDS[kind].make(random.Random(f"{kind} {number}")).items():
        (folder / name).write_bytes(data)


def trial(kind: str, folder: Path) -> tuple[str, str]:
    """What comes of an input: (refused, answered or traceback, its text)."""
    from benchmarks.fuzz_kinds import KINDS

    here = Path.cwd()
    os.chdir(folder)
    try:
        KINDS[kind].use(folder)
    except InputError as e:
        text = str(e)
        fine = "\n" not in text and len(text) < 2000
        return ("refused", text) if fine else ("traceback", f"not one short line: {text[:2500]}")
    except OSError as e:
        # The command line makes one line of those that name a file.
        text = traceback.format_exc()
        return ("refused", str(e)) if e.filename else ("traceback", text)
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        os.chdir(here)
    return "answered", ""


def serve(scratch: Path) -> None:
    """Answers lines "kind number" on stdin with a line of JSON on stdout, until stdin is closed."""
    said = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    logging.disable(logging.CRITICAL)
    scratch.mkdir(parents=True, exist_ok=True)
    # What a crash of a library leaves is told by the process that asked.
    faulthandler.enable((scratch / DIED).open("w"))
    for line in sys.stdin:
        kind, number = line.split()
        folder = scratch / f"{kind}-{number}"
        write_case(kind, int(number), folder)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        found = [*trial(kind, folder), _peak()]
        shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(found), file=said, flush=True)


def _peak() -> int:
    """Bytes this process has had at most since clear_refs; 0 where no one counts them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0


class Worker:
    """A warm child, started anew after one that hangs or ends."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.child: Any = None
        self.code = 0  # of a child that ended

    def ask(self, kind: str, number: int) -> tuple[str, str]:
        """The outcome of an input, and what was said."""
        if self.child is None:
            command = [sys.executable, "-m", "benchmarks.fuzz", "--serve", str(self.scratch)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.child = subprocess.Popen(command, **pipes, stderr=subprocess.DEVNULL)
            self._line("journals", 0, 120)  # imports take seconds
            for warm in ("images", "lines", "records", "checkpoints"):
                self._line(warm, 0, 120)
        text = self._line(kind, number, SECONDS)
        if text is None:
            return "hang", f"no answer within {SECONDS} s"
        if not text:
            with contextlib.suppress(OSError):
                text = (self.scratch / DIED).read_text()
            return "traceback", f"the process ended with {self.code}\n{text}"
        outcome, said, peak = json.loads(text)
        return ("over 2 GiB", f"{peak:,} bytes") if peak > PEAK else (outcome, said)

    def _line(self, kind: str, number: int, seconds: float) -> str | None:
        stdin, stdout = self.child.stdin, self.child.stdout
        try:
            stdin.write(f"{kind} {number}\n")
            stdin.flush()
            seconds *= max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
            text = stdout.readline() if select.select([stdout], [], [], seconds)[0] else None
        except BrokenPipeError:
            text = ""
        if not text:
            self.close()
        return text

    def close(self) -> None:
        """Ends the child."""
        if self.child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(timeout=5)
            self.child.kill()
            self.child.communicate()
            self.code = self.child.returncode
            self.child = None


def run(kinds: list[str], minutes: float, first: int, workers: int, out: Path) -> dict[str, Any]:
    """Tries inputs until the time is over; gives counts by kind and keeps what was found in `out`."""
    counts: dict[str, Any] = {kind: collections.Counter() for kind in kinds}
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    end, lock = time.monotonic() + 60 * minutes, threading.Lock()
    numbers = dict.fromkeys(kinds, first)
    seen: set[tuple[str, str, str]] = set()
    for kind in kinds:
        waiting.put(kind)

    def work(index: int) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            worker = Worker(Path(scratch, str(index)))
            while time.monotonic() < end:
                kind = waiting.get()
                waiting.put(kind)
                with lock:
                    number = numbers[kind]
                    numbers[kind] += 1
                outcome, said = worker.ask(kind, number)
                with lock:
                    counts[kind].update(["tried", outcome])
                    last = said.strip().rsplit("\n", 1)[-1][:120]
                    if outcome in FAULTS and (kind, outcome, last) not in seen:
                        seen.add((kind, outcome, last))
                        _keep(kind, number, outcome, said, out)
            worker.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def _keep(kind: str, number: int, outcome: str, said: str, out: Path) -> None:
    folder = out / f"{kind}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    write_case(kind, number, folder)
    (folder / "said.txt").write_text(f"{outcome}\n{said}\n", encoding="utf-8", errors="replace")
    print(f"{folder}: {outcome}: {said.strip().splitlines()[-1][:200]}", flush=True)


def table(counts: dict[str, Any]) -> str:
    """The counts, a kind a line."""
    lines = [f"{'':12}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for kind, found in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        lines.append(f"{kind:12}" + "".join(f"{found[name]:>12,}" for name in COLUMNS))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where something was found."""
    from benchmarks.fuzz_kinds import KINDS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of them, by commas")
    parser.add_argument("--first", type=int, default=1, help="number of the first input")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("fuzz_finds"))
    parser.add_argument("--replay", type=Path, metavar="FOLDER")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve)
        return 0
    if args.replay:
        outcome, said = trial(args.replay.name.split("-")[0], args.replay.resolve())
        print(f"{outcome}\n{said}")
        return int(outcome in FAULTS)
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"--kinds: {', '.join(sorted(unknown))}, expected some of {', '.join(KINDS)}")
    counts = run(kinds, args.minutes, args.first, args.workers, args.out)
    print(table(counts))
    return int(any(found[name] for found in counts.values() for name in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
