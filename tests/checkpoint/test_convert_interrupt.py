"""The converter stopped at any point: nothing half-written loads, nothing old is lost, a re-run works."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hf_files as hf
import pytest

import convert.__main__ as convert
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax
from qwen3vl_jax import InputError
from qwen3vl_jax.loading import load
from qwen3vl_jax.storage import atomic_dir

ROOT = Path(__file__).resolve().parents[2]
# Runs a conversion that says when it is half done, then waits to be killed.
CHILD = """
import sys, time
from pathlib import Path
import convert.__main__ as convert
from convert.to_hf import to_hf
from convert.to_orbax import to_orbax

done = 0
def progress(step, total):
    global done
    done += step
    if done > total / 2:
        print("half", flush=True)
        time.sleep(600)

function = {"to_hf": to_hf, "to_orbax": to_orbax}[sys.argv[1]]
function(Path(sys.argv[2]), Path(sys.argv[3]), force=True, progress=progress)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Direction -> a directory to convert from."""
    folder = tmp_path_factory.mktemp("sources")
    source = hf.write(folder / "hf", *hf.small(), 2)
    to_orbax(source, folder / "orbax")
    return {"to_orbax": source, "to_hf": folder / "orbax"}


def contents(directory):
    """Every file's bytes by name."""
    return {
        name: path.read_bytes()
        for name in hf.listing(directory)
        if (path := directory / name).is_file()
    }


@pytest.mark.parametrize("direction", ["to_orbax", "to_hf"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_nothing(direction, error, sources, tmp_path):
    """Whatever is raised half-way: no output, no rest, and an old output untouched."""
    convert = {"to_hf": to_hf, "to_orbax": to_orbax}[direction]
    calls = []

    def progress(step, total):
        calls.append(step)
        if sum(calls) > total / 2:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        convert(sources[direction], tmp_path / "new", progress=progress)
    assert hf.listing(tmp_path) == []
    convert(sources[direction], tmp_path / "new")
    before = contents(tmp_path)
    calls.clear()
    with pytest.raises(error, match="stop"):
        convert(sources[direction], tmp_path / "new", force=True, progress=progress)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("direction", ["to_orbax", "to_hf"])
def test_a_killed_process_leaves_nothing_that_loads(direction, sources, tmp_path):
    """After kill -9 the old output still loads, the rest does not, and a re-run starts clean."""
    convert = {"to_hf": to_hf, "to_orbax": to_orbax}[direction]
    out, rest = tmp_path / "out", tmp_path / ".out.partial"
    convert(sources[direction], out)
    before = contents(out)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, direction, str(sources[direction]), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        with pytest.raises(InputError, match="another process is writing it"):
            convert(sources[direction], out, force=True)
        child.send_signal(signal.SIGKILL)
    assert contents(out) == before
    assert rest.is_dir()
    with pytest.raises(InputError):
        load(rest)
    convert(sources[direction], out, force=True)
    assert not rest.exists()
    if direction == "to_hf":
        assert contents(out) == before
    load(out)


def test_killed_between_the_last_two_steps(sources, tmp_path):
    """The old output has made room and the new one is not there yet: the next run puts it back."""
    out, old = tmp_path / "out", tmp_path / ".out.old"
    to_orbax(sources["to_orbax"], out)
    out.rename(old)
    with pytest.raises(InputError, match="already exists"):
        to_orbax(sources["to_orbax"], out)
    load(out)
    to_orbax(sources["to_orbax"], old)  # killed a step later: both are there
    to_orbax(sources["to_orbax"], out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_writer_at_a_time(sources, tmp_path):
    """A directory that another process fills is left alone; what a dead one left is cleared."""
    rest = tmp_path / ".out.partial"
    (rest / "params").mkdir(parents=True)
    (rest / "config.json").write_text("{}")
    handle = os.open(rest, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is writing it"):
        to_orbax(sources["to_orbax"], tmp_path / "out")
    assert (rest / "params").exists()
    os.close(handle)
    to_orbax(sources["to_orbax"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_at_once_and_leaves_nothing(sent, code, tmp_path):
    """One line for Ctrl-C, and no word of the threads that were still writing."""
    command = [
        sys.executable,
        "-m",
        "convert",
        str(ROOT / "demo" / "checkpoint"),
        str(tmp_path / "o"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(5):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
            while child.poll() is None and not any(tmp_path.glob(".o.partial/params*")):
                time.sleep(0.001)
            child.send_signal(sent)
            said = child.communicate(timeout=60)[1]
        if child.returncode:
            break
        # A busy machine: the conversion was over before the signal.
        shutil.rmtree(tmp_path / "o")
    assert child.returncode == code, said
    lines = [line for line in said.splitlines() if "to Orbax" not in line]
    assert lines == (["interrupted: nothing was written"] if code == 130 else [])
    assert hf.listing(tmp_path) == []


def test_a_writer_that_comes_late_replaces_nothing(tmp_path, monkeypatch):
    """Of two that began at once the first has finished when the second gets the lock."""
    out = tmp_path / "out"

    def finish_first(*args):
        monkeypatch.undo()
        with atomic_dir.atomic_dir(out) as stage:
            (stage / "config.json").write_text("first")
        (tmp_path / ".out.partial").mkdir(exist_ok=True)

    monkeypatch.setattr(
        atomic_dir.shutil, "disk_usage", lambda path: finish_first() or shutil.disk_usage(path)
    )
    with pytest.raises(InputError, match="already exists"), atomic_dir.atomic_dir(out):
        raise AssertionError
    assert (out / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("direction", ["to_orbax", "to_hf"])
def test_a_full_disk_is_one_line(direction, sources, tmp_path, capsys):
    """At several lengths that a file may have; with room again the same command ends."""
    command = [*["--to-hf"][: direction == "to_hf"], str(sources[direction]), str(tmp_path / "out")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (100, 20_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            assert convert.main(command) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "cannot be written (File too large)" in said
        assert hf.listing(tmp_path) == []
    assert convert.main(command) == 0
    load(tmp_path / "out")
