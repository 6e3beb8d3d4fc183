"""Commands that are killed (-9), and two at once: ``python -m benchmarks.kills [batch ..]``.

Each case is killed at moments spread over its work; the same command must then end as one that was never
killed. A kill that comes once all is in its place does not count: the work is taken to be shorter, and
the moment is tried again. Of two that start at the same time on one output, one must win and the other
end with exit code 2 and one line. The exit code is 1 if a case does not keep to that, or gets fewer
kills than asked.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case, Ended, run, start

DONE = "all was done"


def killed(case: Case, inputs: Path, disk: Path, after: float, want: tuple[int, Any]) -> list[str]:
    """What is wrong with a command killed so many seconds after it began, and started again."""
    code, result = want
    first = run(case, inputs, disk, kill_after=after)
    faults = [] if first.code == -9 else first.faults(code)
    if (kept := case.kept(disk)) < first.kept:
        faults.append(f"lost {first.kept - kept} of {first.kept} that were finished")
    done = first.code != -9 or _is_done(case, disk, result)
    if not done:
        faults += run(case, inputs, disk).faults(code)
    if case.result(disk) != result:
        faults.append("another result")
    return [DONE if done else f"killed, {kept} kept", *faults]


def _is_done(case: Case, disk: Path, result: Any) -> bool:
    """Whether all is in its place, though the process has not ended."""
    try:
        return case.result(disk) == result
    except Exception:  # of what is half there
        return False


def two_at_once(case: Case, inputs: Path, disk: Path, want: tuple[int, Any]) -> list[str]:
    """What is wrong with two commands on one output."""
    code, result = want
    children = [start(case, inputs, disk) for _ in range(2)]
    said = [child.communicate()[1] for child in children]
    ended = [Ended(c.returncode, text, 0.0, 0) for c, text in zip(children, said, strict=True)]
    first, second = sorted(ended, key=lambda one: one.code != code)
    faults = first.faults(code) + second.faults(2)
    return faults + ["another result"] * (case.result(disk) != result)


def spread(seconds: float, count: int, kill: Callable[[float], bool]) -> int:
    """Kills `count` times at moments spread over `seconds`; gives how many came before the end.

    kill(after): whether the work was still going on. Where it was done, all later moments come earlier.
    """
    killed = 0
    for _ in range(3 * count):
        if killed == count:
            break
        after = seconds * killed / count
        if kill(after):
            killed += 1
        else:
            seconds = min(0.9 * seconds, (seconds + after) / 2)
    return killed


def tried(name: str, count: int, folder: Path) -> int:
    """Kills a case so many times; gives how often it did not keep to what it must."""
    case, inputs, wrong = CASES[name], folder / "inputs", 0
    inputs.mkdir()
    case.prepare(inputs)
    numbers = itertools.count()

    def new() -> Path:
        place = folder / str(next(numbers))
        place.mkdir()
        return place

    run(case, inputs, new())  # compiles
    alone = run(case, inputs, disk := new())
    want = alone.code, case.result(disk)
    print(f"{name}: exit code {alone.code}, {alone.seconds:.1f} s of work", flush=True)

    def kill(after: float) -> bool:
        nonlocal wrong
        ended, *faults = killed(case, inputs, new(), after, want)
        wrong += bool(faults)
        print(f"{name}: after {after:.2f} s: {ended}; {'; '.join(faults) or 'ok'}", flush=True)
        return ended != DONE

    real = spread(alone.seconds, count, kill)
    faults = two_at_once(case, inputs, new(), want)
    print(f"{name}: two at once: {'; '.join(faults) or 'ok'}", flush=True)
    print(f"{name}: {real} of {count} kills came before the end", flush=True)
    return wrong + bool(faults) + (real < count)


def main() -> int:
    """Runs the cases; prints a line for each kill."""
    parser = argparse.ArgumentParser(description="Commands that are killed, and two at once.")
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    wrong = 0
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            wrong += tried(name, args.kills, Path(folder))
    print(f"{wrong} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
