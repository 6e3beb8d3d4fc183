"""Qwen3-VL in one loop: python examples/minimal.py

Loads a checkpoint, encodes an image, runs the prompt through the decoder once (prefill), then
writes the answer one token at a time (decode_step) with greedy decoding. `generate` does the same
faster, several steps a dispatch; here each step is in sight.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

import qwen3vl_jax as q3

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "demo" / "checkpoint"  # or a Hub id, as "Qwen/Qwen3-VL-2B-Instruct"
IMAGE = ROOT / "demo" / "pictures" / "grid.png"
PROMPT = "Read the digits row by row."
MAX_NEW_TOKENS = 64

# The functions are pure and not jitted. The config is static: it is a frozen, hashable dataclass.
# The cache is donated: each step writes into the memory of the cache that it was given.
vision_encode = jax.jit(q3.vision_encode, static_argnames="cfg")
prefill = jax.jit(q3.prefill, static_argnames=("cfg", "max_len"))
decode_step = jax.jit(q3.decode_step, static_argnames="cfg", donate_argnames="cache")


def main() -> str:
    """Prints the answer, and returns it."""
    # params: a nested dict of arrays.
    params, cfg = q3.load(CHECKPOINT, dtype="float32")
    processor = q3.Processor.from_pretrained(CHECKPOINT)

    # On the host, in numpy: chat template, tokens, image patches, position ids.
    content = [{"type": "image", "image": str(IMAGE)}, {"type": "text", "text": PROMPT}]
    batch = processor([{"role": "user", "content": content}])

    # The vision tower: patches [P C] -> image features [R D] and DeepStack features [n R D].
    features = vision_encode(params, cfg, batch.vision)

    # The whole prompt [1 T] fills the cache, and gives the logits [1 V] of the first new token.
    max_len = batch.tokens.shape[1] + MAX_NEW_TOKENS
    cache, logits = prefill(params, cfg, batch.replace(vision=None), max_len, features=features)

    tokens: list[int] = []
    while len(tokens) < MAX_NEW_TOKENS:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if int(token[0]) in processor.stop_ids:
            break
        tokens.append(int(token[0]))
        cache, logits = decode_step(params, cfg, cache, token)

    answer = processor.decode(tokens)
    print(answer)
    return answer


if __name__ == "__main__":
    main()
