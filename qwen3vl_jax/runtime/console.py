"""What the command lines share: one-line errors, out-of-memory advice, a clock that knows compiling."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from qwen3vl_jax.errors import InputError

EXPECTED = (InputError, OSError, KeyboardInterrupt)  # what `report` takes
_LISTED = 20  # problems printed
GRACE = 3  # seconds
interrupt_heard = threading.Event()  # set by whoever handles SIGINT, see `run_script`


def report(error: BaseException, where: object = "", interrupted: str = "interrupted") -> int:
    """Prints one line on stderr; gives the exit code: 2 for bad input, 130 for Ctrl-C.

    An error's `problems`, if it has several, follow as a list. where: what an OSError without a
    file name is about.
    """
    if isinstance(error, KeyboardInterrupt):
        print(interrupted, file=sys.stderr)
        return 130
    message = str(error)
    if isinstance(error, OSError):
        message = ": ".join(str(x) for x in (error.filename or where, error.strerror or error) if x)
    problems = getattr(error, "problems", ())
    print(f"error: {_folded(message)}", file=sys.stderr)
    if len(problems) > 1:
        for problem in problems[:_LISTED]:
            print(f"  {_folded(problem)}", file=sys.stderr)
        if len(problems) > _LISTED:
            print(f"  ... and {len(problems) - _LISTED} more", file=sys.stderr)
    return 2


def _folded(text: str) -> str:
    return " ".join(text.split())


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are one line on stderr, as those of `report`; exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"error: {_folded(message)} (--help lists the options)\n")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process as `report` says for bad input, a file that cannot be used, and Ctrl-C."""
    try:
        yield
    except EXPECTED as e:
        sys.exit(report(e))


def run_script(main: Callable[[], Any]) -> None:
    """Runs a command line as the whole process: Ctrl-C ends it with one line and exit code 130.

    The usual way out of the interpreter takes apart what threads of JAX still use, and crashes there.
    What does not hear Ctrl-C (XLA while it compiles) is ended GRACE seconds after it.
    """
    pressed = threading.Event()
    reader, writer = socket.socketpair()

    def interrupt(*_: Any) -> None:
        pressed.set()
        interrupt_heard.set()
        raise KeyboardInterrupt

    def end_deaf() -> None:
        presses = 0
        while True:
            presses += reader.recv(16).count(signal.SIGINT)
            if presses and interrupt_heard.wait(GRACE):
                interrupt_heard.clear()
                presses = 0
            elif presses > (signal.getsignal(signal.SIGINT) is not interrupt):  # another: a chat's
                _end_interrupted(told=False)

    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=end_deaf, daemon=True).start()
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        if not pressed.is_set():
            raise
        code = report(KeyboardInterrupt())
    if code == 130:
        _end_interrupted(told=True)
    signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _end_interrupted(told: bool) -> NoReturn:
    """Ends the process now, with what was printed."""
    with contextlib.suppress(OSError, ValueError):
        if not told:
            shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a spinner hides
            print(f"{shown}interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(130)


def end_process(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end, which threads of libraries may still crash."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM that come here are heard at the end of it.

    For the first import of jax: its extensions abort the process where a handler raises in them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        n: signal.signal(n, lambda n, _: came.append(n)) for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            handler = before[signal.Signals(number)]
            handler(number, None) if callable(handler) else signal.raise_signal(number)


class Status:
    """What a command does just now, on stderr: a spinner on a terminal, elsewhere a line a step.

    The line comes when the step is done, or has taken DELAY seconds: bad input is refused in one line.
    """

    DELAY = 5

    def __init__(self) -> None:
        self._spinner: Any = None
        self._line: threading.Timer | None = None

    def show(self, text: str, line: bool = True) -> None:
        """Begins a step; line: whether it is worth one where stderr is no terminal."""
        if self._spinner is None and not sys.stderr.isatty():
            self.stop()
            if line:
                self._line = threading.Timer(self.DELAY, _print_line, [text])
                self._line.daemon = True
                self._line.start()
            return
        from rich.console import Console
        from rich.text import Text

        if self._spinner is None:
            self._spinner = Console(stderr=True).status(Text(text))
            self._spinner.start()
        self._spinner.update(Text(text))

    def stop(self, failed: bool = False) -> None:
        """Ends the step: call it before anything else is printed."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None
        line, self._line = self._line, None
        if line is not None and line.is_alive():
            line.cancel()
            if not failed:
                _print_line(*line.args)

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(failed=error[0] is not None)


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def sigterm_interrupts(seconds: float) -> Iterator[None]:
    """SIGTERM, by which a scheduler takes a machine back, ends what is done here as Ctrl-C does.

    So many seconds after either of them the process ends whatever it does: Python's handlers wait for
    the main thread, which may be in a compilation.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some send it twice
        raise KeyboardInterrupt

    heard, bell = os.pipe()
    os.set_blocking(bell, False)
    threading.Thread(target=_end_after, args=(heard, seconds), daemon=True).start()
    woken = signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(woken)
        os.close(bell)


def _end_after(heard: int, seconds: float) -> None:
    """Ends the process so many seconds after a signal that is to stop it."""
    while number := os.read(heard, 1):
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            time.sleep(seconds)
            os.write(2, b"interrupted: the same command goes on\n")
            os._exit(130)
    os.close(heard)


@contextlib.contextmanager
def memory_advice(parts: Mapping[str, int], advice: str) -> Iterator[None]:
    """Turns a device's out-of-memory error into an InputError with bytes by part and what lowers them."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items())
        raise InputError(f"out of memory: {sizes}; lower it with {advice}") from e


class Clock:
    """Wall seconds by phase, with the time JAX spent on tracing and compiling taken out of each."""

    def __init__(self) -> None:
        import jax

        self.compiling = 0.0
        self._mark = (time.perf_counter(), 0.0)
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self.compiling += duration_secs

    def lap(self) -> float:
        """Seconds since the last lap, without those of compiling."""
        now, (then, compiled) = time.perf_counter(), self._mark
        self._mark = (now, self.compiling)
        return max(now - then - (self.compiling - compiled), 1e-9)


def parts(params: Any, cfg: Any, slots: int, patches: int, note: str) -> dict[str, int]:
    """Bytes of the weights, of a cache of `slots` tokens, and of the tower's work on `patches` patches.

    note: how well slots and patches are known, said beside what follows from them.
    """
    import jax

    t, item = cfg.text, params["norm"].dtype.itemsize  # a norm is never held in 8 bits
    cache = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim * slots
    width = 4 * cfg.vision.hidden_size + cfg.vision.intermediate_size
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    return {"weights": weights, f"cache ({note})": cache * item,
            f"pictures ({note})": patches * width * item}  # fmt: skip


def sizes(params: Any, cfg: Any, batch: Any) -> dict[str, int]:
    """Bytes of the parts a user can do something about."""
    patches = 0 if batch.vision is None else batch.vision.pixels.shape[0]
    return parts(params, cfg, 2 * batch.tokens.shape[1], patches, "about")
