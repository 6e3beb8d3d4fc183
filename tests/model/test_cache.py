"""Prefill in chunks: the same numbers as the whole prompt at once, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.model import cache as cache_module

ROWS = ("clips_and_picture", "text", "three_pictures")


traced = jax.jit(q3.prefill, static_argnames=("cfg", "max_len"))
step = jax.jit(q3.decode_step, static_argnames="cfg")  # both caches are kept


@pytest.mark.parametrize(("moe", "side"), [(False, "left"), (False, "right"), (True, "left")])
def test_chunks_equal_the_whole(moe, side):
    """Rows of different length with pictures and clips cut anywhere, then eight decode steps."""
    params, cfg = ours.tiny_model("shallow", moe)
    rows = [
        tiny.inputs(tiny.config_dict("shallow", moe), row, seed) for seed, row in enumerate(ROWS)
    ]
    batch = q3.make_batch(cfg, **tiny.pad_batch(rows, side))
    cache, want = q3.prefill(params, cfg, batch, 256)
    # One program of all layers, and chunks shorter and longer than the prompts.
    others = [q3.prefill(params, cfg, batch, 256, chunk=chunk) for chunk in (7, 1000)]
    others += [] if moe else [traced(params, cfg, batch, 256)]
    for filled, got in others:
        other = filled
        assert ours.worst(got, want) < 1e-5
        np.testing.assert_array_equal(other.length, cache.length)
        np.testing.assert_array_equal(other.delta, cache.delta)
        for b, length in enumerate(np.asarray(cache.length)):
            for mine, whole in zip([*other.k, *other.v], [*cache.k, *cache.v], strict=True):
                assert ours.worst(mine[b, :length], whole[b, :length]) < 1e-5
        theirs, token = cache, jnp.argmax(want, -1).astype(jnp.int32)
        for _ in range(8):
            theirs, a = step(params, cfg, theirs, token)
            other, b = step(params, cfg, other, token)
            assert ours.worst(b, a) < 1e-5
            token = jnp.argmax(a, -1).astype(jnp.int32)


def test_chunks_of_features_and_embeddings():
    """Kept features, and embeddings in place of tokens."""
    params, cfg = ours.tiny_model("shallow")
    batch = q3.make_batch(cfg, **tiny.inputs(tiny.config_dict("shallow"), "three_pictures"))
    features = q3.vision_encode(params, cfg, batch.vision)
    want = q3.prefill(params, cfg, batch, 128)[1]
    bare = batch.replace(vision=None)
    embedded = bare.replace(embeds=params["embed"][batch.tokens], tokens=batch.tokens * 0)
    for given in (bare, embedded):
        got = q3.prefill(params, cfg, given, 128, features=features, chunk=9)[1]
        assert ours.worst(got, want) < 1e-5
    with pytest.raises(q3.InputError, match="chunk is 0"):
        q3.prefill(params, cfg, batch, 128, chunk=0)


def test_a_filled_cache_goes_on_in_chunks():
    """Rows of different length behind others, pictures cut anywhere: the same cache and logits."""
    params, cfg = ours.tiny_model("shallow")
    batches = []
    for names in (("text", "one_picture"), ("three_pictures", "text")):
        rows = [tiny.inputs(tiny.config_dict("shallow"), name) for name in names]
        batches.append(q3.make_batch(cfg, **tiny.pad_batch(rows)))
    cache, _ = ours.prefill(params, cfg, batches[0], 256)
    run = jax.jit(q3.extend, static_argnames=("cfg", "chunk"))
    want, logits = run(params, cfg, cache, batches[1])
    got, pieces = run(params, cfg, cache, batches[1], chunk=7)
    assert ours.worst(pieces, logits) < 1e-5
    np.testing.assert_array_equal(got.length, want.length)
    np.testing.assert_array_equal(got.delta, want.delta)
    for mine, whole in zip([*got.k, *got.v], [*want.k, *want.v], strict=True):
        assert ours.worst(mine, whole) < 1e-5


def test_a_long_prompt_in_chunks_needs_a_third_of_the_memory():
    """32,768 tokens: the compiled program's temporary bytes, caches (its result) not counted."""
    cfg = q3.Config.from_hf(tiny.config_dict("golden"))
    params = jax.eval_shape(functools.partial(q3.init_params, cfg=cfg), jax.random.key(0))
    width = 32768
    batch = jax.eval_shape(
        lambda: q3.Batch(
            tokens=jnp.zeros((1, width), jnp.int32),
            positions=jnp.zeros((3, 1, width), jnp.int32),
            segment_ids=jnp.ones((1, width), jnp.int32),
            vision_rows=None,
            delta=jnp.zeros(1, jnp.int32),
        )
    )

    def temporary(chunk):
        run = jax.jit(functools.partial(q3.prefill, cfg=cfg, max_len=width, chunk=chunk))
        return run.lower(params, batch=batch).compile().memory_analysis().temp_size_in_bytes

    whole, chunked = temporary(None), temporary(2048)
    print(f"whole {whole / 2**20:.0f} MiB, in chunks of 2,048 {chunked / 2**20:.0f} MiB")
    assert chunked < whole / 3


def test_chunks_fill_a_cache_that_their_program_makes(monkeypatch):
    """No device of a mesh holds all of it at first: nothing is made outside of the program."""
    made, make = [], cache_module.init_cache
    monkeypatch.setattr(cache_module, "init_cache", lambda *x: made.append(make(*x)) or made[-1])
    params, cfg = ours.tiny_model("shallow")
    batch = q3.make_batch(cfg, **tiny.inputs(tiny.config_dict("shallow"), "text"))
    # Slots that no other test has: the program is traced here.
    cache, _ = q3.prefill(params, cfg, batch, 1111, chunk=8)
    assert cache.slots == 1536 and len(made) == 1
    assert all(isinstance(x, jax.core.Tracer) for x in (*made[0].k, *made[0].v))
