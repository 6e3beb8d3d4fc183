"""What pyproject.toml declares: every package that our code imports, where an installation gets it."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = [
    *(ROOT / "qwen3vl_jax").rglob("*.py"),
    *(ROOT / "convert").rglob("*.py"),
    ROOT / "infer.py",
    ROOT / "train.py",
]
# Distributions whose name is not that of the module.
DISTRIBUTIONS = {"PIL": "pillow", "orbax": "orbax-checkpoint", "absl": "absl-py"}
OURS = {"qwen3vl_jax"}  # convert and demo are of a clone alone
NOT_FOR_USERS = ("test-base", "test", "dev")


def declared(requirements: list[str]) -> set[str]:
    """The distributions' names, without versions and extras."""
    return {re.split(r"[\[<>=~! ]", each)[0].lower().replace("_", "-") for each in requirements}


@functools.cache
def imported(path: Path) -> set[tuple[str, bool]]:
    """(distribution, whether every use of the module needs it) of a file's imports of others' code."""
    tree, found = ast.parse(path.read_text()), set()
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - OURS:
            found.add(
                (DISTRIBUTIONS.get(name, name).lower().replace("_", "-"), id(node) not in late)
            )
    return found


def test_every_direct_import_is_declared():
    """None is left to what another package brings; outside training/ and serve/ an extra is late."""
    base = declared(PROJECT["dependencies"])
    extras = [
        r for name, r in PROJECT["optional-dependencies"].items() if name not in NOT_FOR_USERS
    ]
    any_extra = base.union(*map(declared, extras))
    missing = []
    for path in FILES:
        folders = (ROOT / "qwen3vl_jax" / name for name in ("training", "serve"))
        of_extra = any(map(path.is_relative_to, folders))
        for name, at_once in imported(path):
            if name not in (base if at_once and not of_extra else any_extra):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def test_every_declared_package_is_imported():
    """No dependency that nothing uses."""
    used = {name for path in FILES for name, _ in imported(path)}
    assert declared(PROJECT["dependencies"]) <= used
