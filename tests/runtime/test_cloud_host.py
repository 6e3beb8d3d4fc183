"""Hosts of a cloud: a TPU slice of several, notices that one is taken away, programs kept for all."""

import http.server
import itertools
import signal
import threading
import time

import jax
import pytest

import infer
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime import cloud_host, compile_cache, distributed
from qwen3vl_jax.training import checkpoints, run_dir, run_setup


@pytest.fixture
def server(monkeypatch):
    """The values of a metadata server of this test's own, by key."""
    values = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/")
            known = key in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.send_header("Metadata-Flavor", values.get("flavor", "Google"))
            self.end_headers()
            self.wfile.write(values[key].encode() if known else b"not found")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv(cloud_host.SERVER, f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("JAX_PLATFORMS", "")
        monkeypatch.delenv(cloud_host.HOSTS, raising=False)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        yield values
        server.shutdown()


@pytest.mark.parametrize(
    "key, value, heard",
    [
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", True),
        ("preempted", "TRUE", True),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", False),
    ],
)
def test_a_notice_stops_a_run_as_sigterm_does(server, monkeypatch, capsys, key, value, heard):
    monkeypatch.setattr(cloud_host, "EVERY", 0.01)
    with run_setup.catch_signals() as stop:
        time.sleep(0.1)
        assert not stop.asked
        server[key] = value
        until = time.monotonic() + (10 if heard else 0.3)
        while not stop.asked and time.monotonic() < until:
            time.sleep(0.01)
    assert stop.asked == ("SIGTERM" if heard else "")
    assert capsys.readouterr().err.count(f"{key} {value}: saving") == heard
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_notice_that_is_old_or_late_stops_nothing(server, monkeypatch):
    """One that stands at the start, and one that is read while the run ends."""
    monkeypatch.setattr(cloud_host, "EVERY", 0.01)
    server["preempted"] = "TRUE"
    with run_setup.catch_signals() as stop:
        time.sleep(0.3)
    assert not stop.asked
    told, asked = [], threading.Event()

    def slow() -> str:
        if asked.is_set():
            time.sleep(0.3)
            return "late"
        asked.set()
        return ""

    monkeypatch.setattr(cloud_host, "notice", slow)
    with cloud_host.watched(told.append):
        asked.wait(5)
        time.sleep(0.05)
    time.sleep(0.5)
    assert not told


def test_a_server_that_is_not_there_is_not_waited_for(server, monkeypatch):
    """Nor is one believed that is none of Google's, as the page of a proxy."""
    server["preempted"] = "TRUE"
    assert cloud_host.notice() == "preempted TRUE"
    server["flavor"] = "captive"
    assert cloud_host.notice() == ""
    for address in ("127.0.0.1:9", "127.0.0.1:x", "a b"):
        monkeypatch.setenv(cloud_host.SERVER, address)
        assert cloud_host.notice() == "" and cloud_host.slice_hosts() == 1
    monkeypatch.delenv(cloud_host.SERVER)
    monkeypatch.setattr(cloud_host, "has_tpu", lambda: False)
    monkeypatch.setattr(cloud_host, "metadata", lambda *_: pytest.fail("asked"))
    assert cloud_host.slice_hosts() == 1
    monkeypatch.setattr(cloud_host, "has_tpu", lambda: True)
    assert cloud_host.has_server({}) and not cloud_host.has_server({"TPU_SKIP_MDS_QUERY": "1"})


def test_one_host_of_a_slice_says_so(server, monkeypatch, capsys):
    """From the variable of a TPU VM, or from its metadata server: one line and code 2."""
    server["attributes/worker-network-endpoints"] = "u:1:a,u:2:b,u:3:c,u:4:d"
    assert cloud_host.slice_hosts() == 4
    named = {cloud_host.HOSTS: "a,b"}
    assert cloud_host.slice_hosts(named) == 2
    for alone in ({"JAX_PLATFORMS": "cpu"}, {"TPU_PROCESS_BOUNDS": "1,1,1"}):
        assert cloud_host.slice_hosts(named | alone) == 1
    modes = ([], True), (["--chat", "--mesh", "tp=1"], False), (["--embed"], False)
    for more, may_join in modes:
        with pytest.raises(SystemExit) as ended:
            infer.main(["--prompt", "Hello", *more] if more[:1] != ["--chat"] else more)
        assert ended.value.code == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0 and "one of 4 hosts of a TPU slice" in said
        assert ("--mesh" in said) == may_join


def test_processes_that_have_not_joined_are_refused(monkeypatch):
    distributed.check_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(InputError, match=r"jax sees 4, .*--distributed"):
        distributed.check_joined()


def test_several_processes_keep_programs_in_their_run(monkeypatch, tmp_path):
    """In RUN_DIR/compiled, which others cannot write, but for the usual variable, which wins."""
    changed = {}
    monkeypatch.setattr(jax.config, "update", lambda key, value: changed.update({key: value}))
    shared, key = tmp_path / "compiled", "jax_compilation_cache_dir"

    def kept(where: str, **environ: str) -> dict:
        changed.clear()
        compile_cache.keep_programs(True, where, {**environ, "HOME": str(tmp_path)})
        return dict(changed)

    found = kept(str(shared))
    assert found[key].startswith(f"{shared}/{jax.__version__}-cpu-")
    assert shared.stat().st_mode & 0o777 == 0o700
    assert found["jax_persistent_cache_min_compile_time_secs"] == 0
    assert key not in kept(str(shared), **{compile_cache.VARIABLE: "/x"})
    # A store: XLA's own files cannot be there, and small programs are not worth a request.
    found = kept("gs://bucket/run/compiled")
    assert found[key].startswith("gs://bucket/run/compiled/")
    assert found["jax_persistent_cache_enable_xla_caches"] == "none"
    assert "jax_persistent_cache_min_compile_time_secs" not in found
    shared.chmod(0o777)
    with pytest.raises(InputError, match="which others can write"):
        kept(str(shared))


def test_a_start_that_failed_leaves_a_directory_to_start_in(tmp_path):
    """Programs are kept before the run's first file is written."""
    (tmp_path / "out" / compile_cache.KEPT_PROGRAMS).mkdir(parents=True)
    with run_dir.locked(tmp_path / "out"):
        pass
    (tmp_path / "out" / "notes.txt").touch()
    with (
        pytest.raises(InputError, match=r"holds files and no config\.toml"),
        run_dir.locked(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("later", [3, 30, 0.3], ids=["even", "slower", "faster"])
def test_a_run_saves_by_minutes(monkeypatch, later):
    """At the step at which the minutes have passed, whatever a step takes; anew after a save."""
    now, asked = 0.0, []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    told = checkpoints.distributed.from_first
    first = lambda value: asked.append(value) or told(value)  # noqa: E731
    monkeypatch.setattr(checkpoints.distributed, "from_first", first)
    timer, saved = checkpoints.SaveTimer(10), [0.0]
    for step in range(1, 4000):
        now += 3 if step < 120 else later
        if timer.due(step):
            saved.append(now)
            timer.restart()
    gaps = [b - a for a, b in itertools.pairwise(saved)]
    assert gaps and all(600 <= gap < 600 + 3 * max(later, 3) for gap in gaps[1:]), gaps
    assert gaps[0] < 1200 and len(asked) < 40 * len(gaps)
    never = checkpoints.SaveTimer(0)
    assert not any(never.due(step) for step in range(1, 200))
