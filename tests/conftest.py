"""Settings that must hold before jax or transformers is imported, in tests and their children."""

import gc
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# XLA's thread pool is as large as the cores. With several fake devices on few cores the threads of
# one collective wait for others that have no thread; a pool of 16 is enough for 8 devices.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A GPU's default for float32 products is TF32, which no parity bound survives.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Most of the time goes into compiling programs that run once: a third less of it. Another jaxlib may
# not know the other flags, and ends the process. The emitters of before 0.11 take two thirds of the newer
# ones' time; many pieces of machine code take longer, on few cores, to split and join than one; the newer
# library of products plans each when it first runs.
FAST = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    FAST += " --xla_cpu_experimental_ynn_fusion_type="
# Eight devices for the tests of meshes; everything else runs on the first.
os.environ.setdefault("XLA_FLAGS", f"{FAST} --xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The processes of a test run share what they compile, an operation of its own too: reading one takes half
# the time of compiling it, and `clear_caches` after each file forgets it.
if "PYTEST_XDIST_WORKER" not in os.environ and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

HAS_TORCH = importlib.util.find_spec("torch") is not None


def _torch_files() -> list[str]:
    """The files of the tests that import torch, transformers, or another such file."""
    names = {"torch", "transformers"}
    imports = {
        path: set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        for path in sorted(Path(__file__).parent.rglob("*.py"))
        if path.name != "conftest.py"
    }
    for _ in imports:
        names |= {path.stem for path, found in imports.items() if found & names}
    return [str(path) for path in imports if path.stem in names]


# torch is an extra, and not built for every Python: without it the tests that compare with it are
# not collected, and the header says so.
collect_ignore = [] if HAS_TORCH else _torch_files()
HAS_BROWSER = importlib.util.find_spec("playwright") and shutil.which("chromium")
if not HAS_BROWSER:
    collect_ignore.append(str(Path(__file__).parent / "serve" / "test_page.py"))


def pytest_configure(config: pytest.Config) -> None:
    """Sets torch up where tests run: the process that starts the others needs none of it."""
    runs = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if HAS_TORCH and runs:
        import torch
        import torchvision_shim  # noqa: F401

        # Two threads on two busy cores wait for each other: minutes in place of a second.
        torch.set_num_threads(1)


# Files that take longest, in that order: the last to start decides when two processes end.
LONG = """
    test_processes.py test_batch_file.py test_replicas.py test_mesh_train.py test_train_run.py
    test_model.py test_parity.py test_benchmarks.py test_train_step.py test_train_watch.py
    test_plan_is_the_run.py test_mesh_infer.py test_splash.py test_lora.py test_convert_kept.py
    test_attention_gpu.py test_generate.py test_train.py test_infer.py test_session.py
    test_train_parity.py test_cache.py test_mesh_engine.py test_int8.py test_decode_gpu.py
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders whole files."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """Python's collector no longer walks what was imported, nor so often: a seventh of all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_end_with_their_file():
    """XLA:CPU maps memory for every program; a process that keeps them all runs out of maps."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_interrupts():
    """Ctrl-C raises KeyboardInterrupt, also in a background job of a shell, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> list[str]:
    """Three lines: with what the model is compared, and whether TPU programs and the page are tried."""
    parity = "torch and transformers are installed, every file is collected"
    if not HAS_TORCH:
        parity = f"torch is not installed, left out: {', '.join(_torch_files())}"
    tpu = "libtpu is installed, TPU programs are compiled"
    if importlib.util.find_spec("libtpu") is None:
        tpu = "libtpu is not installed (the extra tpu), left out: tests that compile TPU programs"
    page = "chromium and playwright are installed, the server's page is tried"
    if not HAS_BROWSER:
        page = "chromium or playwright is not installed, left out: tests of the server's page"
    return [f"parity: {parity}", f"planner: {tpu}", f"page: {page}"]
