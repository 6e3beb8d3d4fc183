"""Renders chat templates as transformers does, in a child process with limits of time and memory.

A checkpoint's template is untrusted code. Jinja's sandbox keeps it from files and from the objects
of Python; the child process, one for all templates, bounds its time and memory.
"""

import atexit
import contextlib
import datetime
import functools
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen3vl_jax.errors import InputError, one_line
from qwen3vl_jax.storage.json_text import write_json

if TYPE_CHECKING:
    import jinja2

SECONDS = 1  # of computing, for one prompt
MEMORY = 1 << 29
LENGTH = 1 << 24  # characters of a prompt
_ERROR = 2000  # characters of a template's own message
_HEAD = struct.Struct("<?Q")


class _Server:
    """The child process, which ends with this one; one thread at a time may ask it."""

    def __init__(self) -> None:
        self.lock, self.pid = threading.Lock(), 0
        self.process: Any = None

    def _start(self) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        pipes["stderr"] = subprocess.DEVNULL
        process: Any = subprocess.Popen([sys.executable, "-c", code], **pipes)
        started = False
        try:
            started = process.stdout.read(1) == b"!"
        finally:
            if not started:
                process.kill()
                process.communicate()
        if not started:
            raise InputError("chat template: the process that renders it does not start")
        # Only a process that answers is asked.
        self.process, self.pid = process, os.getpid()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text of a template with plain data. Raises InputError, with the template's own message."""
        with self.lock:
            done, text = self._ask(pickle.dumps((template, dict(variables))))
        if not done:
            raise InputError(text)
        return text

    def _ask(self, data: bytes) -> tuple[bool, str]:
        if self.pid != os.getpid() or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(_HEAD.pack(True, len(data)) + data)
            self.process.stdin.flush()
            done, size = _HEAD.unpack(self.process.stdout.read(_HEAD.size))
            return done, self.process.stdout.read(size).decode("utf-8", "surrogatepass")
        except BaseException as e:
            # Also where an answer was not waited for: the next one would be taken for it.
            code = self.close()
            if not isinstance(e, (OSError, struct.error)):
                raise
            ends = {-getattr(signal, "SIGPROF", 0): f"it does not end within {SECONDS} s"}
            raise InputError(ends.get(code, "it needs too much memory, or is too deep")) from None

    def close(self) -> int:
        """Ends the process, if it is this one's; gives its exit code."""
        if self.pid != os.getpid():
            return 0
        try:
            self.process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


_SERVER = _Server()
render = _SERVER.render
atexit.register(_SERVER.close)
if hasattr(os, "register_at_fork"):  # another thread may hold the lock
    os.register_at_fork(after_in_child=lambda: setattr(_SERVER, "lock", threading.Lock()))


# ---- in the child ----
def serve() -> None:
    """Answers the requests on stdin until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    timer = getattr(signal, "setitimer", lambda *_: None)
    which = getattr(signal, "ITIMER_PROF", 0)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _compiled("")
    answers.write(b"!")
    answers.flush()
    while head := requests.read(_HEAD.size):
        data = requests.read(_HEAD.unpack(head)[1])
        timer(which, SECONDS)  # whose signal ends the process
        done, text = _rendered(data)
        timer(which, 0)
        answers.write(_HEAD.pack(done, len(text)) + text)
        answers.flush()


def _rendered(data: bytes) -> tuple[bool, bytes]:
    """Whether a request is rendered, and its text, else the error's."""
    try:
        template, variables = pickle.loads(data)
        text = _compiled(template).render(**variables)
        if len(text) > LENGTH:
            raise ValueError(f"it writes {len(text):,} characters, at most {LENGTH:,} are taken")
        return True, text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return False, b"it needs too much memory"
    except RecursionError:
        return False, b"it is nested too deep, or calls itself without end"
    except Exception as e:
        return False, one_line(e)[:_ERROR].encode("utf-8", "replace")


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> "jinja2.Template":
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """Accepts the block that marks assistant text for training, and renders what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which a model never saw in training.
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return write_json(value, "tojson", ensure_ascii=ensure_ascii, **options)
