"""Programs that are kept for the next process: where, in whose folder, and how many were found."""

import os
import stat

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import infer
import train
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime import compile_cache
from qwen3vl_jax.runtime.compile_cache import PROGRAMS, VARIABLE, keep_programs

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def fresh():
    """JAX as in a process that has compiled nothing; its settings come back afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled(environ, wanted=True, number=3.0):
    """What is told after one program was compiled, or found, and what it gave."""
    keep_programs(wanted, environ=environ)
    jax.clear_caches()
    out = jax.jit(lambda x: x * number)(np.ones(4, np.float32))
    return str(PROGRAMS), np.asarray(out).tolist()


def test_a_program_is_compiled_once_for_all_processes(fresh, tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    told, first = compiled(environ)
    (folder,) = (tmp_path / "cache/qwen3vl_jax").iterdir()
    assert told == f"programs: 1 compiled, 0 found in {folder}"
    assert folder.name.startswith(f"{jax.__version__}-cpu-") and any(folder.iterdir())
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert compiled(environ) == (f"programs: 0 compiled, 1 found in {folder}", first)


def test_the_variable_and_the_option_decide(fresh, tmp_path):
    told, _ = compiled({"XDG_CACHE_HOME": str(tmp_path), VARIABLE: "/given"})
    assert told.endswith("0 found in /given")
    assert compiled({"XDG_CACHE_HOME": str(tmp_path)}, wanted=False)[0] == (
        "programs: 1 compiled, no compile cache"
    )
    assert not any(tmp_path.iterdir())
    assert compile_cache._base({"XDG_CACHE_HOME": "cache", "HOME": "/home/me"}) == (
        compile_cache._base({"HOME": "/home/me"})
    )


def test_without_a_place_for_it_nothing_is_kept(fresh, capsys):
    told, _ = compiled({"XDG_CACHE_HOME": "/dev/null/cache"})
    assert told == "programs: 1 compiled, no compile cache"
    assert capsys.readouterr().err == "compile cache: /dev/null/cache: Not a directory\n"


def other_user(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)


def link(folder, monkeypatch):
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


UNSAFE = {
    "another user": other_user,
    "0770": lambda folder, _: folder.chmod(0o770),
    "0707": lambda folder, _: folder.chmod(0o707),
    "a link": link,
}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("words", UNSAFE)
def test_a_folder_of_others_is_refused(fresh, tmp_path, monkeypatch, words, inner):
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    keep_programs(True, environ=environ)
    base = tmp_path / "qwen3vl_jax"
    UNSAFE[words](next(base.iterdir()) if inner else base, monkeypatch)
    jax.config.update("jax_compilation_cache_dir", None)
    with pytest.raises(InputError, match=f"{words}.*--no-compile-cache"):
        keep_programs(True, environ=environ)
    assert jax.config.jax_compilation_cache_dir is None


def test_the_commands_refuse_it_in_one_line(fresh, tmp_path, monkeypatch, capsys):
    (tmp_path / "qwen3vl_jax").mkdir()
    (tmp_path / "qwen3vl_jax").chmod(0o777)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        infer.main(["--max-new-tokens", "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: compile cache: got")
    recipe = os.path.join(os.path.dirname(train.__file__), "configs", "demo.toml")
    assert train.main(["--config", recipe, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: compile cache: got") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--plan=h100", "--dry-run"])
def test_it_is_an_option_of_runs(option, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--config", "x.toml", "--no-compile-cache", option])
    assert end.value.code == 2 and "--no-compile-cache" in capsys.readouterr().err
    if option != "--dry-run":
        with pytest.raises(SystemExit) as end:
            infer.main(["--no-compile-cache", option])
        assert end.value.code == 2 and "leave --no-compile-cache out" in capsys.readouterr().err
