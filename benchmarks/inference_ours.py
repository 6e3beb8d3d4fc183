"""What benchmarks.inference runs of this project, in a process of its own: a line of JSON a figure."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qwen3vl_jax as q3
from benchmarks.scaling_cases import config, random_weights
from benchmarks.work import Figure, Work, prompt_arrays
from qwen3vl_jax.config import Config
from qwen3vl_jax.inference.decode_loop import cache_slots, decode_steps, first_token
from qwen3vl_jax.inference.requests import STEPS, GenerationOptions
from qwen3vl_jax.model.cache import init_cache
from qwen3vl_jax.runtime.compile_cache import VARIABLE, keep_programs

DISPATCHES = 4  # of STEPS decode steps, timed together
REPEATS = 5


def ceilings(model: str) -> dict[str, float]:
    """Rates measured here: of a bf16 product (FLOP/s), and of moving memory (byte/s).

    Memory is read by sums of rows, and read and written by a negation: the faster of the two counts.
    Beside the small shape, model "tiny", they are of small arrays and mean nothing.
    """
    on_cpu = jax.default_backend() == "cpu"
    n, size, many = (1024, 1 << 26, 2) if on_cpu else (8192, 1 << 31, 20)
    if model == "tiny":
        n, size = 128, 1 << 16
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) / n**0.5 for i in range(2))

    @jax.jit
    def products(a, b):
        # A CPU is three times slower where the product itself rounds to 16 bits.
        def product(_, x):
            return jnp.dot(x, b, preferred_element_type=jnp.float32).astype(x.dtype)

        return jax.lax.fori_loop(0, many, product, a)

    x = jax.random.normal(jax.random.key(2), (size // 4096, 4096), jnp.bfloat16)
    passes = (
        (jax.jit(lambda x: jnp.sum(x, axis=1, dtype=jnp.float32)), 1),
        (jax.jit(jnp.negative), 2),
    )

    def repeated(run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        # One result is held at a time.
        out = run(x)
        for _ in range(many - 1):
            out = run(x)
        return out

    rates = [
        count * x.nbytes * many / min(timed(functools.partial(repeated, run)))
        for run, count in passes
    ]
    matmul = min(timed(lambda: products(a, b))) / many
    return {"matmul": 2.0 * n**3 / matmul, "read": max(rates)}


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(cfg: Config, params: Any, work: Work) -> Figure:
    """The seconds of one work; of a decode, those of a step."""
    run = {"vision": _vision, "prefill": _prefill, "decode": _decode}[work.kind]
    start = time.perf_counter()
    call, divisor = run(cfg, params, work)
    jax.block_until_ready(call())
    first = time.perf_counter() - start
    seconds = [each / divisor for each in timed(call)]
    stats = jax.devices()[0].memory_stats() or {}
    return Figure(work.name, seconds, first, stats.get("peak_bytes_in_use", 0))


def _vision(cfg: Config, params: Any, work: Work):
    given = prompt_arrays(cfg, work)
    vision = q3.make_vision(cfg, given["pixel_values"], given["image_grid_thw"])
    vision = jax.tree.map(jnp.asarray, vision)
    return lambda: q3.vision_encode(params, cfg, vision), 1


def _prefill(cfg: Config, params: Any, work: Work):
    batch = jax.tree.map(jnp.asarray, q3.make_batch(cfg, **prompt_arrays(cfg, work)))
    slots = cache_slots(batch.tokens.shape[1] + STEPS)
    return lambda: q3.prefill(params, cfg, batch, slots), 1


def _decode(cfg: Config, params: Any, work: Work):
    """Greedy steps by the programs of `generate`, from a cache with so many tokens in each row."""
    rows = GenerationOptions(1 << 20, stop_ids=()).of_rows(cfg, work.rows)
    count = DISPATCHES * STEPS
    slots = cache_slots(work.filled + count)
    filled = jnp.full(work.rows, work.filled, jnp.int32)

    @jax.jit
    def begin():
        cache = init_cache(cfg, work.rows, slots, jnp.bfloat16)
        # Rows of their own: equal ones would ask for the same experts.
        logits = jax.random.normal(jax.random.key(1), (work.rows, cfg.text.vocab_size))
        prompt = jnp.full((work.rows, 1), 7)
        return first_token(cache.replace(length=filled), logits, prompt, rows)

    state, none = begin(), np.zeros(work.rows, bool)

    def call():
        nonlocal state
        state = state.replace(cache=state.cache.replace(length=jnp.array(filled)))
        for _ in range(DISPATCHES):
            state, tokens, _ = decode_steps(params, cfg, state, none, rows, STEPS, work.rows)
        return tokens

    return call, count


def run(size: str, works: Sequence[Work]) -> None:
    """Prints the ceilings, then a line for each work."""
    cfg = config(size)
    device = jax.devices()[0].device_kind
    emit({"device": device, "versions": f"jax {jax.__version__}", "ceilings": ceilings(size)})
    held, params = None, None
    for work in sorted(works, key=lambda work: work.weights):
        if held != work.weights:
            params = None
            params = jax.block_until_ready(random_weights(cfg, work.weights or None))
            held = work.weights
        try:
            emit(measure(cfg, params, work).to_json())
        except Exception as e:  # the other works go on, and the table names this one
            emit(Figure(work.name, [], error=f"{type(e).__name__}: {e}"[:400]).to_json())


def emit(line: dict[str, Any]) -> None:
    """A line of JSON on stdout."""
    print(json.dumps(line), flush=True)


def first_answer(size: str, work: Work, began: float) -> None:
    """Seconds from the start of the process to the first token, less those of making weights."""
    cfg = config(size)
    start = time.perf_counter()
    params = jax.block_until_ready(random_weights(cfg))
    making = time.perf_counter() - start
    batch = q3.make_batch(cfg, **prompt_arrays(cfg, work))
    tokens = q3.stream(params, cfg, batch, max_new_tokens=64, stop_ids=())
    next(tokens)
    first = time.time() - began - making
    rest = sum(1 for _ in tokens)
    whole = time.time() - began - making
    emit({"work": work.name, "first": first, "answer": whole, "chunks": rest})


def answer_requests(size: str, count: int, rows: int, began: float) -> None:
    """Seconds of a process that answers the mixed requests, less those of making weights."""
    from benchmarks.requests import mixed_requests

    cfg = config(size)
    start = time.perf_counter()
    params = jax.block_until_ready(random_weights(cfg))
    making = time.perf_counter() - start
    stats = q3.Stats()
    asked = (
        q3.Request(i, arrays, tokens)
        for i, (arrays, tokens) in enumerate(mixed_requests(cfg, count))
    )
    done = list(q3.generate_many(params, cfg, asked, stop_ids=(), rows=rows, stats=stats))
    found = {"seconds": time.time() - began - making, "tokens": stats.tokens, "busy": stats.busy}
    emit(found | {"answers": len(done), "weights": making})


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    # As infer.py does; where no folder is named, nothing is kept.
    keep_programs(VARIABLE in os.environ)
    if asked["what"] == "works":
        run(asked["size"], [Work(**work) for work in asked["works"]])
    elif asked["what"] == "first":
        first_answer(asked["size"], Work(**asked["work"]), asked["began"])
    else:
        answer_requests(asked["size"], asked["count"], asked["rows"], asked["began"])
