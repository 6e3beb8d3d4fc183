"""Commands on a disk that is full: ``python -m benchmarks.full_disk [batch ..]``.

Each case runs on a tmpfs, first with room, then with less and less: spread over what it needs, and the last
pages one by one. Without room it must end with exit code 2 and one line, and lose nothing that was
finished; with room again the same command must end as the first one did. Mounting needs root, or
`unshare -rm python -m benchmarks.full_disk`. The exit code is 1 if a case does not keep to that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.cases import CASES, Case, Ended, run

PAGE = os.sysconf("SC_PAGE_SIZE")
ROOM = "4g"


def mount(disk: Path, size: int | str, again: bool = False) -> None:
    """A tmpfs of a size, or that size for the one that is there."""
    options = f"{'remount,' * again}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)


def used(disk: Path) -> int:
    """Bytes of a file system that are taken."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def places(needed: int, count: int) -> list[int]:
    """Sizes below what is needed: half of them the last pages, the others spread evenly."""
    pages = needed // PAGE
    last = range(max(pages - count // 2, 1), pages)
    before = max(last.start - 1, 1)
    spread = {1 + round(i * before / (count - len(last))) for i in range(count - len(last))}
    return [PAGE * n for n in sorted(spread | set(last))]


def with_room(case: Case, inputs: Path, disk: Path) -> tuple[Ended, object, int]:
    """How the command ends with room, what it leaves, and the bytes that it needed at most."""
    mount(disk, ROOM)
    try:
        most = [0]
        ended = run(case, inputs, disk, watch=lambda: most.append(max(most.pop(), used(disk))))
        return ended, case.result(disk), max(most.pop(), used(disk))
    finally:
        subprocess.run(["umount", disk], check=True)


def at(case: Case, inputs: Path, disk: Path, size: int, code: int, result: object) -> list[str]:
    """What is wrong where the disk holds `size` bytes; first the word for how it ended."""
    mount(disk, size)
    try:
        full = run(case, inputs, disk)
        if full.code == code:
            return ["fits"] + ["another result"] * (case.result(disk) != result)
        faults = full.faults(2)
        if case.kept(disk) < full.kept:
            faults.append(f"lost {full.kept - case.kept(disk)} of {full.kept} that were finished")
        mount(disk, ROOM, again=True)
        faults += run(case, inputs, disk).faults(code)
        return ["full"] + faults + ["another result"] * (case.result(disk) != result)
    finally:
        subprocess.run(["umount", disk], check=True)


def main() -> int:
    """Runs the cases; prints a line for each size."""
    parser = argparse.ArgumentParser(description="Commands on a disk that is full.")
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--places", type=int, default=20, help="sizes of the disk")
    args = parser.parse_args()
    wrong = 0
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            inputs, disk = Path(folder, "inputs"), Path(folder, "disk")
            inputs.mkdir()
            disk.mkdir()
            CASES[name].prepare(inputs)
            want, result, needed = with_room(CASES[name], inputs, disk)
            print(f"{name}: exit code {want.code}, needs {needed:,} bytes", flush=True)
            for size in places(needed, args.places):
                ended, *faults = at(CASES[name], inputs, disk, size, want.code, result)
                wrong += bool(faults)
                print(f"{name}: {size:,} bytes: {ended}; {'; '.join(faults) or 'ok'}", flush=True)
    print(f"{wrong} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
