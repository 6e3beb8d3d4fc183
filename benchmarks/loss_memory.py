"""Peak memory of the loss at a vocabulary of 151,936 and 4,096 tokens: the plain way against chunks.

    python -m benchmarks.loss_memory [--tokens 4096] [--vocab 151936] [--hidden 2048] [--dtype bfloat16]

Value and gradients by rows and table, as XLA's compiler plans them for this platform: temporary memory
without arguments and results (the gradient of the table is a result). Nothing is run.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from qwen3vl_jax.config import IGNORE_INDEX
from qwen3vl_jax.labels import label_logprobs
from qwen3vl_jax.model.layers import linear_fp32
from qwen3vl_jax.training.losses import TokenSums, chunked_cross_entropy


def token_sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> TokenSums:
    """What `chunked_cross_entropy` gives, of logits [.. V] that are all held; labels, weights [..]."""
    logprobs, logsumexp = label_logprobs(logits, labels)
    counted, right = labels != IGNORE_INDEX, jnp.argmax(logits, axis=-1) == labels
    weights = jnp.where(counted, weights, 0.0)
    loss, z = jnp.sum(weights * -logprobs), jnp.sum(weights * logsumexp**2)
    return TokenSums(loss, z, jnp.sum(counted), jnp.sum(counted & right))


def plain(x: jax.Array, table: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Cross entropy of all words at once."""
    return token_sums(linear_fp32(x, table), labels, weights).loss


def chunked(x, table, labels, weights, chunk: int) -> jax.Array:
    return chunked_cross_entropy(x, table, labels, weights, chunk).loss


def temp_bytes(
    loss: Callable, tokens: int, vocab: int, hidden: int, dtype: str, table_dtype: str = "float32"
) -> int:
    """Temporary bytes of a loss and its gradients by x and table, x in `dtype`."""
    x = jax.ShapeDtypeStruct((tokens, hidden), dtype)
    table = jax.ShapeDtypeStruct((vocab, hidden), table_dtype)
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    weights = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    stats: Any = grad.lower(x, table, labels, weights).compile().memory_analysis()
    return int(stats.temp_size_in_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, value in (("tokens", 4096), ("vocab", 151936), ("hidden", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--chunks", type=int, nargs="*", default=[16384, 8192, 4096, 2048])
    args = parser.parse_args()
    measure = functools.partial(
        temp_bytes, tokens=args.tokens, vocab=args.vocab, hidden=args.hidden, dtype=args.dtype
    )
    whole = measure(plain)
    title = f"{args.tokens} tokens, vocabulary {args.vocab}, {args.dtype}, {jax.default_backend()}"
    shown = Table("loss", "temporary MiB", "share of plain", title=title)
    shown.add_row("plain", f"{whole / 2**20:,.0f}", "1")
    for chunk in args.chunks:
        part = measure(functools.partial(chunked, chunk=chunk))
        share = f"{part / whole:.4f} = 1/{whole / part:.1f}"
        shown.add_row(f"{chunk} words at a time", f"{part / 2**20:,.0f}", share)
    Console().print(shown)


if __name__ == "__main__":
    main()
