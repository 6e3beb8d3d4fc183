"""Commands on a disk that is full: ``python -m benchmarks.full_disk [batch ..]``.

Each case runs on a tmpfs, first with room, then with less than it needs: sizes spread over that, and the
last ones page by page. Without room it must end with exit code 2 and one line, and lose nothing that was
finished; with room again the same command must end as the first one did. Mounting needs root, or
`unshare -rm python -m benchmarks.full_disk`. The exit code is 1 if a case does not keep to that.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
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


def spread(fits: Callable[[int], bool], pages: int, count: int) -> None:
    """Tries `count` sizes that do not fit: over `pages`, then below the least that fits."""
    full = {max(1, round(i * pages / (count // 2))) for i in range(count // 2)}
    full = {size for size in sorted(full) if not fits(size)}
    low, high = max(full, default=0), pages
    while not fits(high):
        full.add(high)
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            full.add(middle)
            low = middle
    while len(full) < count and low > 1:
        low -= 1
        if low not in full and not fits(low):
            full.add(low)


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


def tried(name: str, count: int, folder: Path) -> int:
    """Runs a case at so many sizes; gives how often it did not keep to what it must."""
    case, inputs, disk = CASES[name], folder / "inputs", folder / "disk"
    inputs.mkdir()
    disk.mkdir()
    case.prepare(inputs)
    want, result, needed = with_room(case, inputs, disk)
    print(f"{name}: exit code {want.code} with room", flush=True)
    wrong = []

    def fits(pages: int) -> bool:
        ended, *faults = at(case, inputs, disk, PAGE * pages, want.code, result)
        wrong.extend(faults)
        print(f"{name}: {PAGE * pages:,} bytes: {ended}; {'; '.join(faults) or 'ok'}", flush=True)
        return ended == "fits"

    spread(fits, -(-needed // PAGE), count)
    return len(wrong)


def main() -> int:
    """Runs the cases; prints a line for each size."""
    parser = argparse.ArgumentParser(description="Commands on a disk that is full.")
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--places", type=int, default=20, help="sizes of the disk")
    args = parser.parse_args()
    wrong = 0
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            wrong += tried(name, args.places, Path(folder))
    print(f"{wrong} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
