"""What the command lines share: one-line errors, signals, the status line, memory advice, a clock."""

import argparse
import atexit
import contextlib
import difflib
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from qwen3vl_jax.errors import InputError, one_line

EXPECTED = (InputError, OSError, KeyboardInterrupt)  # what `report` takes
_LISTED = 20  # problems printed
GRACE = 3  # seconds
interrupt_heard = threading.Event()  # set by whoever handles SIGINT, see `run_script`


def report(error: BaseException, where: object = "", interrupted: str = "interrupted") -> int:
    """Prints an error, and its `problems`, on stderr; the exit code: 2 for bad input, 130 for Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        print(interrupted, file=sys.stderr)
        return 130
    message = str(error)
    if isinstance(error, OSError):
        message = ": ".join(str(x) for x in (error.filename or where, error.strerror or error) if x)
    print(f"error: {one_line(message or type(error).__name__)}", file=sys.stderr)
    problems = getattr(error, "problems", ())
    for problem in problems[:_LISTED] if len(problems) > 1 else ():
        print(f"  {one_line(problem)}", file=sys.stderr)
    if len(problems) > _LISTED:
        print(f"  ... and {len(problems) - _LISTED} more", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr and exit code 2, as those of `report`.

    common: names of the options that --help shows; --help-all shows all. foreign: other programs' options,
    each with the option here that means the same, or with what to type or to know instead.
    """

    def __init__(
        self, prog: str, common: str = "", foreign: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, formatter_class=raw, allow_abbrev=False, **options)
        self.common, self.foreign, self.all = common.split(), foreign or {}, not common
        self.idle = set[str]()  # names of options that no help shows
        self.add_argument("--help-all", action="help", help="show all options")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Takes other programs' names, and _ for -; ends for an option that is none, before all else."""
        args = list(sys.argv[1:] if args is None else args)
        self.all |= "--help-all" in args
        known = self._option_string_actions
        same = {name: known[flag] for name, flag in self.foreign.items() if flag in known}
        same |= {f"--{x[2:].replace('-', '_')}": a for x, a in known.items() if x[:2] == "--"}
        known |= same | known
        for word in itertools.takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            unknown = name not in known and (word[:2] not in known or name in self.foreign)
            if unknown and re.fullmatch(r"--?[a-zA-Z][\w-]*", name):
                self.exit(2, f"error: {name}: unknown option; {self._instead_of(name)}\n")
        return super().parse_known_args(args, namespace)

    def _instead_of(self, name: str) -> str:
        name = name.replace("_", "-")
        ours = [flag for action in self._actions for flag in action.option_strings]
        close = [x for x in ours if len(name) > 2 and x.startswith(name)]
        close += [*difflib.get_close_matches(name, ours, 1, 0.7), ""]
        near = self.foreign.get(name, close[0])
        is_option = near.startswith("-")
        return f"did you mean {near}?" if is_option else near or "--help-all lists the options"

    def format_help(self) -> str:
        """All options, or the common ones."""
        common = {*self.common, "help", "help_all"}
        for action in self._actions:
            if action.dest in self.idle or not (self.all or action.dest in common):
                action.help = argparse.SUPPRESS
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)} (--help lists the options)\n")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process by `report` after bad input, a file that cannot be used, or Ctrl-C."""
    try:
        yield
    except EXPECTED as e:
        sys.exit(report(e))


@contextlib.contextmanager
def signals_in_thread(hear: Callable[[int], None]) -> Iterator[None]:
    """Calls hear(number) in a thread for each handled signal: the main one may be in XLA's compiler."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        with reader:
            while data := reader.recv(64):
                for number in data:
                    hear(number)

    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


def run_script(main: Callable[[], Any]) -> None:
    """Runs a command line as the whole process: Ctrl-C ends it with one line and exit code 130.

    Interpreter shutdown, in which threads of JAX may crash, is skipped. A main thread that does not hear
    Ctrl-C (in XLA's compiler) is ended GRACE seconds later.
    """
    pressed, presses = False, 0

    def interrupt(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        interrupt_heard.set()
        hide_complaints()
        raise KeyboardInterrupt

    def end_if_unheard(number: int) -> None:
        nonlocal presses
        presses += number == signal.SIGINT
        if presses and interrupt_heard.wait(GRACE):
            interrupt_heard.clear()
            presses = 0
        # A handler of a chat's own hears the first press later.
        elif presses > (signal.getsignal(signal.SIGINT) is not interrupt):
            with contextlib.suppress(OSError, ValueError):
                show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
                print(f"{show_cursor}interrupted", file=sys.stderr)
            exit_now(130)

    before = signal.signal(signal.SIGINT, interrupt)
    code: Any = 0
    with signals_in_thread(end_if_unheard):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            if not pressed:
                raise
            code = report(KeyboardInterrupt())
        if code == 130:
            exit_now(130)
    signal.signal(signal.SIGINT, before)
    sys.exit(code)


def hide_complaints() -> None:
    """Hides what Python says of objects that a signal leaves half made: event loops, coroutines."""
    sys.unraisablehook = lambda _: None
    warnings.simplefilter("ignore")


def exit_now(code: int) -> NoReturn:
    """Ends the process without the interpreter's shutdown; what was printed is shown."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def end_process(code: int) -> NoReturn:
    """Ends the process without the interpreter's shutdown, in which threads of libraries may crash."""
    atexit._run_exitfuncs()
    exit_now(code)


@contextlib.contextmanager
def handling(numbers: Iterable[int], handler: Callable[..., None]) -> Iterator[dict[int, Any]]:
    """Sets the handler of signals until the block ends; gives those before. Only the main thread may."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, handler) for n in numbers} if is_main else {}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM to the end of the block.

    For the first import of jax: its extensions abort the process where a handler raises in them.
    """
    came, before = list[int](), dict[int, Any]()
    try:
        with handling((signal.SIGINT, signal.SIGTERM), lambda n, _: came.append(n)) as before:
            yield
    finally:
        for number in came[:1]:
            handler = before[number]
            handler(number, None) if callable(handler) else signal.raise_signal(number)


@contextlib.contextmanager
def sigterm_interrupts(seconds: float) -> Iterator[None]:
    """Makes SIGTERM, a scheduler's notice, act as Ctrl-C; `seconds` after either the process ends."""

    def interrupt(*_: Any) -> None:
        # Some schedulers send it twice.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    def end_later(number: int) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            time.sleep(seconds)
            os.write(2, b"interrupted: the same command goes on\n")
            os._exit(130)

    with contextlib.ExitStack() as scope:
        if scope.enter_context(handling([signal.SIGTERM], interrupt)):
            scope.enter_context(signals_in_thread(end_later))
        yield


class Status(contextlib.AbstractContextManager):
    """What a command is doing, on stderr: a spinner on a terminal, elsewhere a line a step.

    The line is printed when the step is done or after DELAY seconds: bad input prints its one line alone.
    """

    DELAY = 5

    def __init__(self) -> None:
        self._spinner: Any = None
        self._line: threading.Timer | None = None

    def show(self, text: str, line: bool = True) -> None:
        """Begins a step; line: whether to print one where stderr is no terminal."""
        if self._spinner is None and not sys.stderr.isatty():
            self.stop()
            if line:
                options = {"file": sys.stderr, "flush": True}
                self._line = threading.Timer(self.DELAY, print, [text], options)
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
        """Ends the step; call it before anything else is printed."""
        if self._spinner is not None:
            self._spinner.stop()
        if self._line is not None and self._line.is_alive():
            self._line.cancel()
            if not failed:
                print(*self._line.args, **self._line.kwargs)
        self._spinner = self._line = None

    def __exit__(self, *error: object) -> None:
        self.stop(failed=error[0] is not None)


@contextlib.contextmanager
def memory_advice(parts: Mapping[str, int], advice: str) -> Iterator[None]:
    """Turns an out-of-memory error into an InputError with the bytes of `parts` and what lowers them."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items())
        raise InputError(f"out of memory: {sizes}; lower it with {advice}") from e


def memory_parts(params: Any, cfg: Any, slots: int, patches: int, note: str) -> dict[str, int]:
    """Bytes of the weights, of a cache of `slots` tokens, and of the vision tower's activations."""
    import jax

    # A norm is never held in 8 bits.
    t, item = cfg.text, params["norm"].dtype.itemsize
    cache = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim * slots * item
    images = patches * (4 * cfg.vision.hidden_size + cfg.vision.intermediate_size) * item
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    return {"weights": weights, f"cache ({note})": cache, f"images ({note})": images}


def memory_of_batch(params: Any, cfg: Any, batch: Any) -> dict[str, int]:
    """`memory_parts` of a batch."""
    patches = 0 if batch.vision is None else batch.vision.pixels.shape[0]
    return memory_parts(params, cfg, 2 * batch.tokens.shape[1], patches, "about")


class Clock:
    """Wall seconds by phase, without the time that JAX spent on tracing and compiling."""

    def __init__(self) -> None:
        import jax

        self._thread = threading.get_ident()
        self._spans: list[tuple[float, float]] = []
        self._mark = (time.perf_counter(), 0.0)
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Notes when this thread compiled; what it did within that, as to trace, is not counted twice."""
        if event.startswith("/jax/core/compile/") and threading.get_ident() == self._thread:
            end = time.perf_counter()
            while self._spans and self._spans[-1][0] >= end - duration_secs:
                self._spans.pop()
            self._spans.append((end - duration_secs, end))

    @property
    def compiling(self) -> float:
        return sum(end - start for start, end in self._spans)

    def lap(self) -> float:
        """Seconds since the last lap, without those of compiling."""
        now, (then, compiled), compiling = time.perf_counter(), self._mark, self.compiling
        self._mark = (now, compiling)
        return max(now - then - (compiling - compiled), 1e-9)
