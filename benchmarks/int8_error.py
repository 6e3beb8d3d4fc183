"""How much int8 weights change a checkpoint's logits: python -m benchmarks.int8_error CKPT.

One layer is in memory at a time.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3vl_jax.checkpoint.device_load import Source, as_structs
from qwen3vl_jax.checkpoint.lazy_tensor import LazyTensor
from qwen3vl_jax.checkpoint.param_paths import TreePath, nest
from qwen3vl_jax.checkpoint.quantize import quantize_leaves
from qwen3vl_jax.config import Config
from qwen3vl_jax.model.layers import linear_fp32, rms_norm
from qwen3vl_jax.model.quantized import embedding_lookup
from qwen3vl_jax.model.structs import Batch
from qwen3vl_jax.model.text import decode_layers
from qwen3vl_jax.model.transformer import full_attention
from qwen3vl_jax.storage.hub import resolve

_TOKENS = 64
_ROWS = 8192  # of the head, multiplied at a time
# What stands at a place of a parameter tree (None: nothing), read when asked for.
Read = Callable[[TreePath], Any]


@dataclasses.dataclass(frozen=True)
class LogitError:
    """Differences of logits (of final hidden states, for a model without a head)."""

    rms: float  # of the difference, relative to the original's
    largest: float  # difference, relative to the original's largest magnitude
    agreeing: int | None  # tokens whose likeliest successor is the same; None without a head
    tokens: int

    def __str__(self) -> str:
        what = "final hidden states" if self.agreeing is None else "logits"
        text = f"{what} differ by {self.rms:.2%} rms ({self.largest:.2%} of the largest at most)"
        if self.agreeing is None:
            return text
        return f"{text}, the likeliest token agrees at {self.agreeing} of {self.tokens} places"


def subtree(leaves: Mapping[TreePath, LazyTensor], path: TreePath) -> Any:
    """The loaded values at a path: an array, a tree of arrays, or None."""
    if path in leaves:
        return leaves[path].load()
    depth = len(path)
    found = [(p[depth:], leaf.load()) for p, leaf in leaves.items() if p[:depth] == path]
    return nest(found) if found else None


def logit_error(cfg: Config, original: Read, changed: Read) -> LogitError:
    """Runs 64 fixed random tokens through both decoders, in float32, layer by layer."""
    batch = _row_of_text(cfg.text.vocab_size)
    mix = full_attention(batch)
    reads = [lambda path, read=read: as_structs(read(path)) for read in (original, changed)]

    @jax.jit
    def run(layer, x):
        return decode_layers([layer], cfg.text, x, batch.positions, mix)[0]

    with jax.default_matmul_precision("highest"):
        streams = [embedding_lookup(read(("embed",)), batch.tokens, jnp.float32) for read in reads]
        for i in range(cfg.text.num_hidden_layers):
            # The second waits for the first, or both would have their layer on the device.
            pairs = zip(reads, streams, strict=True)
            streams = [run(read(("layers", i)), x).block_until_ready() for read, x in pairs]
        want, got = (_end(cfg, read, x[0]) for read, x in zip(reads, streams, strict=True))
    difference = np.abs(got - want)
    rms = np.sqrt(np.mean(np.square(difference)) / np.mean(np.square(want)))
    largest = difference.max() / np.abs(want).max()
    same = (
        int(np.sum(want.argmax(1) == got.argmax(1)))
        if want.shape[1] == cfg.text.vocab_size
        else None
    )
    return LogitError(float(rms), float(largest), same, _TOKENS)


def _row_of_text(vocab_size: int) -> Batch:
    """Random tokens of any kind, each at its own position: nobody looks for images among them."""
    positions = np.broadcast_to(np.arange(_TOKENS, dtype=np.int32), (3, 1, _TOKENS))
    tokens: Any = np.random.default_rng(0).integers(vocab_size, size=(1, _TOKENS))
    ones: Any = np.ones((1, _TOKENS), np.int32)
    return Batch(
        tokens, jnp.asarray(positions), ones, vision_rows=None, delta=jnp.zeros(1, jnp.int32)
    )


def _end(cfg: Config, read: Read, x: jax.Array) -> np.ndarray:
    """Logits [T V] of the stream [T D]; for a model without a head the stream after its norm."""
    x = rms_norm(x, jnp.asarray(read(("norm",))), cfg.text.rms_norm_eps)
    table, parts = read(("embed",) if cfg.tie_word_embeddings else ("head",)), []
    if table is None:
        return np.asarray(x)
    for start in range(0, cfg.text.vocab_size, _ROWS):
        rows = jax.tree.map(lambda w, at=start: jnp.asarray(w[at : at + _ROWS]), table)
        parts.append(np.asarray(linear_fp32(x, rows)))
    return np.concatenate(parts, axis=1)


def main(ckpt: str, kind: str = "int8") -> None:
    """Prints the error of one checkpoint in a 16-bit form, rounded to int8 or int4."""
    source = Source(resolve(ckpt), Config.from_hf(resolve(ckpt)))
    leaves = source.stored()
    rounded = quantize_leaves(source.cfg, leaves, kind)
    print(logit_error(source.cfg, *(functools.partial(subtree, x) for x in (leaves, rounded))))


if __name__ == "__main__":
    main(*sys.argv[1:])
