"""Decode of the 8B with fused and with separate projections: ms a step, side by side in one process.

    python -m benchmarks.fused [--batch 1] [--tiny]

36 decoder layers and the head in bf16, random weights, a cache of 2,048 slots, 64 steps in one dispatch.
Needs a GPU with 40 GB; --tiny runs a small shape anywhere, to see that it runs.
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from qwen3vl_jax.model.layers import linear, rms_norm


@dataclasses.dataclass(frozen=True)
class Shape:
    d: int = 4096
    layers: int = 36
    kv: int = 8
    group: int = 4
    h: int = 128
    f: int = 12288
    vocab: int = 151936
    slots: int = 2048
    steps: int = 64


TINY = Shape(64, 2, 2, 4, 16, 96, 512, 128, 4)


def weights(key, s: Shape, fused: bool):
    """The projections of one layer, both ways of the same size."""
    n = s.kv * s.group
    shapes = {"o": (s.d, n, s.h), "down": (s.d, s.f)}
    if fused:
        shapes |= {"qkv": (s.kv, s.group + 2, s.h, s.d), "gate_up": (2, s.f, s.d)}
    else:
        shapes |= {"q": (n, s.h, s.d), "k": (s.kv, s.h, s.d), "v": (s.kv, s.h, s.d)}
        shapes |= {"gate": (s.f, s.d), "up": (s.f, s.d)}
    keys = jax.random.split(key, len(shapes))
    made = {
        name: jax.random.normal(k, shape, jnp.bfloat16) * 0.02
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return made | {"ln": jnp.ones(s.d, jnp.bfloat16)}


def layer(p, s: Shape, x, k_cache, v_cache, slot):
    """x [B D] through attention over the cache and the MLP; returns it and the written cache."""
    y = rms_norm(x, p["ln"], 1e-6)
    if "qkv" in p:
        qkv = linear(y, p["qkv"])
        q, k, v = qkv[:, :, : s.group], qkv[:, :, s.group], qkv[:, :, s.group + 1]
    else:
        q = linear(y, p["q"]).reshape(-1, s.kv, s.group, s.h)
        k, v = linear(y, p["k"]), linear(y, p["v"])
    k_cache = jax.lax.dynamic_update_slice(k_cache, k[:, None], (0, slot, 0, 0))
    v_cache = jax.lax.dynamic_update_slice(v_cache, v[:, None], (0, slot, 0, 0))
    scores = jnp.einsum("bkgh,bskh->bkgs", q, k_cache, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.arange(s.slots) <= slot, scores * s.h**-0.5, -1e30)
    probs = jax.nn.softmax(scores, -1).astype(x.dtype)
    mixed = jnp.einsum("bkgs,bskh->bkgh", probs, v_cache).reshape(len(x), -1, s.h)
    x = x + linear(mixed, p["o"], in_dims=2)
    y = rms_norm(x, p["ln"], 1e-6)
    if "gate_up" in p:
        gate, up = jnp.moveaxis(linear(y, p["gate_up"]), 1, 0)
    else:
        gate, up = linear(y, p["gate"]), linear(y, p["up"])
    return x + linear(jax.nn.silu(gate) * up, p["down"]), k_cache, v_cache


def decode(s: Shape, params, tokens, caches):
    """`steps` greedy tokens in one program."""

    def step(i, carry):
        tokens, caches = carry
        x, slot = params["embed"][tokens], s.slots - s.steps + i
        new = []
        for p, (k, v) in zip(params["layers"], caches, strict=True):
            x, *written = layer(p, s, x, k, v, slot)
            new.append(written)
        return jnp.argmax(linear(x, params["embed"]), -1).astype(jnp.int32), new

    return jax.lax.fori_loop(0, s.steps, step, (tokens, caches))


def measure(s: Shape, batch: int, fused: bool, repeats: int = 5) -> float:
    """Median ms a step."""
    keys = jax.random.split(jax.random.key(0), s.layers + 1)
    make = jax.jit(functools.partial(weights, s=s, fused=fused))
    embed = jax.random.normal(keys[-1], (s.vocab, s.d), jnp.bfloat16)
    params = {"layers": [make(k) for k in keys[:-1]], "embed": embed}
    shape = (batch, s.slots, s.kv, s.h)
    caches = [[jnp.zeros(shape, jnp.bfloat16) for _ in range(2)] for _ in range(s.layers)]
    run, times = jax.jit(functools.partial(decode, s), donate_argnums=2), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        _, caches = jax.block_until_ready(run(params, jnp.arange(batch), caches))
        times.append((time.perf_counter() - start) * 1000 / s.steps)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    s = TINY if args.tiny else Shape()
    table = Table("projections", "ms a step", "second run", title=f"decode, batch {args.batch}")
    rows = {"separate": False, "fused": True}
    first = {name: measure(s, args.batch, fused) for name, fused in rows.items()}
    again = {name: measure(s, args.batch, fused) for name, fused in rows.items()}
    for name in rows:
        table.add_row(name, f"{first[name]:.3f}", f"{again[name]:.3f}")
    Console().print(table)
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}")


if __name__ == "__main__":
    main()
