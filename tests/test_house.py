"""The house: what is installed works outside the clone, and the package keeps to its own rules."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("qwen3vl_jax", "convert", "demo", "benchmarks", "examples", "tests", ".")
    for path in (ROOT / folder).glob("**/*.py" if folder != "." else "*.py")
)
NUMPY_ONLY = (
    "qwen3vl_jax.config",
    "qwen3vl_jax.processing.processor",
    "qwen3vl_jax.processing.media",
    "qwen3vl_jax.storage.hub",
    "qwen3vl_jax.cli.score",
    "qwen3vl_jax.cli.infer_arguments",
    "qwen3vl_jax.cli.convert",
    "qwen3vl_jax.cli.plan",
    "infer",
    "train",
)
# Imported by functions all the same: Pallas where there is a TPU, and what needs jax in modules whose
# other functions run without it.
WITH_JAX = [
    "qwen3vl_jax.checkpoint.digests: qwen3vl_jax.device_mesh.replicated",
    "qwen3vl_jax.model.attention: qwen3vl_jax.model.attention_tpu",
    "qwen3vl_jax.processing.processor: qwen3vl_jax.processing.batch.make_batch",
]
# What each folder may import. A folder's own modules and those of "errors" are open to it.
CONFIG = {"config", "config_checks", "rope_config"}
PURE = {"model", *CONFIG, "storage"}
LIBRARY = {*PURE, "parameters", "device_mesh", "processing", "checkpoint", "inference"}
LIBRARY |= {"training", "runtime", "labels", "scores"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "storage": set(),
    "runtime": set(),
    "scores": set(),
    "config": {*CONFIG, "storage"},
    "labels": CONFIG,
    "model": CONFIG,
    "processing": PURE,
    "device_mesh": {"model", *CONFIG},
    "parameters": {"model", *CONFIG},
    "checkpoint": {*PURE, "device_mesh", "parameters"},
    "inference": {"model", "labels", "processing", *CONFIG},
    "training": LIBRARY,
    "planning": LIBRARY,
    "convert": LIBRARY,
    "loading": LIBRARY,
    "serve": {"inference", "processing", "storage", "runtime"},
    "lora": {"checkpoint"},
    "cli": {*LIBRARY, "planning", "convert", "loading", "serve", "version", "__init__"},
    "__init__": {*LIBRARY, "loading", "version"},
    "__main__": {*LIBRARY, "version"},
}


def in_tests(path: Path) -> bool:
    """Whether a source is a test or a test's helper."""
    return path.is_relative_to(ROOT / "tests")


def run(*command: str, cwd: Path = ROOT) -> str:
    """The output of a Python child with warnings as errors; its stderr is the failure's message."""
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without the network from a copy, so that the clone stays clean, and unpacked."""
    out = tmp_path_factory.mktemp("wheel")
    copy = out / "copy"
    names = ["pyproject.toml", "README.md", "LICENSE", "NOTICE"]
    names += [str(path.relative_to(ROOT)) for path in SOURCES if not in_tests(path)]
    names += ["qwen3vl_jax/py.typed", "demo/wordings.json", "demo/pictures/grid.png"]
    for folder in ("configs", "demo/checkpoint"):
        names += [str(path.relative_to(ROOT)) for path in (ROOT / folder).iterdir()]
    for name in names:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out)]
    run("-m", "pip", "wheel", *options, str(copy))
    with zipfile.ZipFile(next(out.glob("*.whl"))) as file:
        file.extractall(out / "site")
    return out / "site"


def test_wheel_imports_outside_the_clone(wheel, tmp_path):
    """Installed elsewhere, the wheel gives one package, its command, its version and its licence."""
    assert (wheel / "qwen3vl_jax" / "py.typed").exists()
    assert [path.name for path in wheel.iterdir() if path.suffix != ".dist-info"] == ["qwen3vl_jax"]
    (info,) = wheel.glob("*.dist-info")
    assert "qwen3vl = qwen3vl_jax.cli.main:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    code = "import qwen3vl_jax as q, qwen3vl_jax.processing; print(q.__file__, q.__version__)"
    path, version = run(
        "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {code}", cwd=tmp_path
    ).split()
    assert path.startswith(str(wheel))
    assert f"Version: {version}\n" in metadata


def test_wheel_answers_outside_the_clone(wheel, tmp_path, monkeypatch):
    """`qwen3vl ask` in an empty folder answers as the README says, and its recipes are found by name."""
    monkeypatch.setenv("PYTHONPATH", str(wheel))
    answer = run("-m", "qwen3vl_jax.cli.main", "ask", cwd=tmp_path)
    assert f"```\n{answer}```" in (ROOT / "README.md").read_text() and answer.count("\n") == 3
    bundled = wheel / "qwen3vl_jax" / "bundled"
    recipes = {path.name for path in (ROOT / "configs").iterdir()}
    own = {name for name in recipes if "python:demo" in (ROOT / "configs" / name).read_text()}
    assert {path.name for path in (bundled / "configs").iterdir()} == recipes - own
    code = (
        "from qwen3vl_jax.training.recipe import read_recipe; print(read_recipe('own_data').ckpt)"
    )
    assert run("-c", code, cwd=tmp_path).strip() == str(bundled / "demo" / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_convert_of_a_clone_is_that_of_the_package():
    """`from convert.to_orbax import to_orbax` goes on, as `python -m convert` does."""
    spec = importlib.util.find_spec("convert.to_orbax")
    assert spec and spec.origin == str(ROOT / "qwen3vl_jax" / "convert" / "to_orbax.py")
    assert importlib.import_module("convert").SHARD_SIZE == 5_000_000_000


def test_report_names_versions_devices_and_back_ends():
    """`python -m qwen3vl_jax` has all four parts, with no warning."""
    out = run("-W", "error", "-m", "qwen3vl_jax")
    for part in ("python", "jaxlib", "orbax-checkpoint", "tokamax", "GiB", "attention back ends"):
        assert part in out


@pytest.mark.parametrize("module", NUMPY_ONLY)
def test_checks_do_not_wait_for_jax(module):
    """Files and arguments are checked by modules that do not import jax."""
    code = f"import sys, {module}; print([m for m in ('jax', 'torch', 'flax') if m in sys.modules])"
    assert run("-W", "error", "-c", code).strip() == "[]"


def test_the_package_lists_and_explains_its_functions():
    """dir and completion without jax; help with signatures and docstrings, one for each name."""
    code = "import sys, qwen3vl_jax as q; print('jax' in sys.modules, *dir(q)); help(q)"
    names, text = run("-c", code).split("\n", 1)
    assert names.startswith("False ")
    public = importlib.import_module("qwen3vl_jax").__all__
    assert set(public) < set(names.split())
    assert not {"importlib", "TYPE_CHECKING", "_HOME", "_MODULE"} & set(names.split())
    for line in (
        "forward(params:",
        "Logits [B T V] in fp32",
        "load(",
        "class Processor(",
        "class Batch(",
    ):
        assert line in text, line
    assert all(name in text for name in public)


def test_sources_are_ascii_and_leaf_linen():
    """ASCII only, Linen modules as leaves only, and transformers only in the tests."""
    for path in SOURCES:
        text = path.read_text()
        assert text.isascii(), path
        if not in_tests(path):
            assert not re.search(r"\bnnx\b|\bnn\.(scan|remat|vmap|jit)\b", text), path
            assert "transformers" not in re.findall(r"^\s*(?:import|from) (\w+)", text, re.M), path


def own_imports(path: Path) -> list[tuple[str, bool]]:
    """(module of the package, whether a function imports it) of a source's imports."""
    tree, found = ast.parse(path.read_text()), []
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        ours = [name for name in names if name.split(".")[0] == "qwen3vl_jax"]
        found += [(name, id(node) in inside) for name in ours]
    return found


def module_of(name: str) -> str:
    """The module's file that an imported name is, or is in."""
    parts = name.split(".")
    while parts and not any((ROOT / Path(*parts)).glob("__init__.py")):
        if (ROOT / Path(*parts)).with_suffix(".py").exists():
            break
        parts.pop()
    return ".".join(parts) or name.split(".", maxsplit=1)[0]


def folder_of(module: str) -> str:
    """The folder of a module of the package, or its name where it lies at the top."""
    inner = module.split(".")[1:]
    name = inner[0] if inner else "__init__"
    return "config" if name in CONFIG else name


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    paths = (path for path in SOURCES if path.is_relative_to(ROOT / "qwen3vl_jax"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def test_folders_import_downwards():
    """The table of imports: whoever reads a folder reads nothing above it."""
    wrong = []
    for name, path in modules().items():
        own = folder_of(name.removesuffix(".__init__"))
        for imported, _ in own_imports(path):
            target = folder_of(module_of(imported))
            if target not in MAY_IMPORT[own] | {own, "errors"}:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_no_circle():
    """Each module can be put above all that it imports."""
    graph = {
        name: {module_of(imported) for imported, _ in own_imports(path)} - {name}
        for name, path in modules().items()
    }
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, sorted(graph)


def test_imports_stand_at_the_top():
    """Functions import nothing of our own, but in cli/, which answers a bad option before jax is there."""
    late = {
        f"{name}: {imported}"
        for name, path in modules().items()
        if folder_of(name) not in ("cli", "__main__")
        for imported, inside in own_imports(path)
        if inside
    }
    assert sorted(late) == WITH_JAX
