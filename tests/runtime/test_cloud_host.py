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
from qwen3vl_jax.training import checkpoints, run_setup


@pytest.fixture
def server(monkeypatch):
    """The values of a metadata server of this test's own, by key."""
    values = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/")
            known = key in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(values[key].encode() if known else b"not found")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv(cloud_host.SERVER, f"127.0.0.1:{server.server_port}")
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


def test_a_server_that_is_not_there_is_not_waited_for(monkeypatch):
    monkeypatch.setenv(cloud_host.SERVER, "127.0.0.1:9")
    assert cloud_host.notice() == "" and cloud_host.slice_hosts() == 1
    monkeypatch.delenv(cloud_host.SERVER)
    monkeypatch.setattr(cloud_host, "metadata", lambda *_: pytest.fail("asked"))
    assert cloud_host.slice_hosts() == 1


def test_one_host_of_a_slice_says_so(server, monkeypatch, capsys):
    """From the variable of a TPU VM, or from its metadata server: joined, or one line and code 2."""
    server["attributes/worker-network-endpoints"] = "u:1:a,u:2:b,u:3:c,u:4:d"
    assert cloud_host.slice_hosts() == 4
    assert cloud_host.slice_hosts({cloud_host.HOSTS: "a,b"}) == 2
    with pytest.raises(SystemExit) as ended:
        infer.main(["--prompt", "Hello"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "one of 4 hosts of a TPU slice" in said and "--mesh" in said


def test_processes_that_have_not_joined_are_refused(monkeypatch):
    distributed.check_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(InputError, match=r"jax sees 4, .*--distributed"):
        distributed.check_joined()


def test_several_processes_keep_programs_in_their_run(monkeypatch, tmp_path):
    """In RUN_DIR/compiled, but for the usual variable, which wins."""
    before = jax.config.jax_compilation_cache_dir
    changed = {}
    monkeypatch.setattr(jax.config, "update", lambda key, value: changed.update({key: value}))
    shared = str(tmp_path / "compiled")
    for environ, want in (({}, shared), ({compile_cache.VARIABLE: "/x"}, None)):
        changed.clear()
        compile_cache.keep_programs(True, shared, {**environ, "HOME": str(tmp_path)})
        assert changed.get("jax_compilation_cache_dir") == want
    assert jax.config.jax_compilation_cache_dir == before


def test_a_run_saves_by_minutes(monkeypatch):
    """The step at which the minutes have passed, at the pace of the first steps; anew after a save."""
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    timer, saved = checkpoints.SaveTimer(2), []
    for step in range(1, 200):
        now += 3 if step < 100 else 6
        if timer.due(step):
            saved.append((step, now))
            timer.restart()
    gaps = [b[1] - a[1] for a, b in itertools.pairwise(saved)]
    assert len(saved) == 6 and all(100 <= gap <= 240 for gap in gaps), gaps
    never = checkpoints.SaveTimer(0)
    assert not any(never.due(step) for step in range(1, 200))
