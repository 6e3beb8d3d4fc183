"""What is printed of structs, and arguments in another order."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tiny

import qwen3vl_jax as q3


@pytest.fixture(scope="module")
def given():
    """(params, cfg, batch) without values, and a batch with them."""
    cfg = q3.Config.from_hf(tiny.config_dict())
    params = jax.eval_shape(functools.partial(q3.init_params, cfg=cfg), jax.random.key(0))
    return params, cfg, q3.make_batch(cfg, **tiny.inputs(tiny.config_dict(), "one_picture"))


def test_structs_print_as_shapes(given):
    """One line, arrays by dtype and shape, alike ones counted; of traced and other leaves too."""
    _, _, batch = given
    text = str(batch)
    assert text.startswith("Batch(tokens=int32[1,96], positions=int32[3,1,96], ")
    assert "vision=VisionInputs(pixels=float32[384,96], " in text
    assert "labels" not in text and "\n" not in text and len(text) < 400
    traced = []
    jax.eval_shape(lambda batch: traced.append(repr(batch)) or batch, batch)
    assert traced == [text]
    x = jnp.zeros((1, 2, 3, 4), jnp.bfloat16)
    cache = q3.KVCache([x, x], [x, x[0]], batch.delta, batch.delta)
    assert str(cache).startswith(
        "KVCache(k=2 x bfloat16[1,2,3,4], v=[bfloat16[1,2,3,4], bfloat16[2,3,4]]"
    )
    assert str(q3.Features(x, None)) == "Features(merged=bfloat16[1,2,3,4])"
    assert str(jax.tree.map(lambda _: "s", q3.Features(x, x))) == "Features(merged='s', taps='s')"


def test_swapped_arguments_are_named(given):
    """Traced or not, in every public function of (params, cfg, inputs)."""
    params, cfg, batch = given
    key = jax.random.key(0)
    for call in (
        lambda: q3.init_params(cfg, key),
        lambda: jax.jit(lambda k: q3.init_params(cfg, k))(key),
    ):
        with pytest.raises(
            q3.InputError, match=r"cfg: got an array, .*order is \(key, cfg, dtype\)"
        ):
            call()
    with pytest.raises(q3.InputError, match="cache: got an array, expected a KVCache"):
        jax.jit(lambda tokens: q3.decode_step(params, cfg, tokens, None))(jnp.zeros(2, jnp.int32))
    generate = functools.partial(q3.generate, max_new_tokens=1)
    stream = functools.partial(q3.stream, max_new_tokens=1)
    prefill, rerank = (
        functools.partial(q3.prefill, max_len=9),
        functools.partial(q3.rerank, yes_no=(1, 2)),
    )
    of_batch = (
        q3.forward,
        q3.hidden_states,
        q3.last_hidden_state,
        q3.attentions,
        q3.loss_fn,
        q3.score,
        q3.embed,
        rerank,
        prefill,
        generate,
        stream,
    )
    for function in of_batch:
        with pytest.raises(q3.InputError, match=r"params: got Config, .*\(params, cfg, batch"):
            function(cfg, params, batch)
        with pytest.raises(q3.InputError, match="cfg: got Batch, expected a Config"):
            function(params, batch, cfg)
        with pytest.raises(
            q3.InputError, match="batch: got dict, expected a Batch, which make_batch"
        ):
            function(params, cfg, {"input_ids": batch.tokens})
    with pytest.raises(q3.InputError, match="vision: got Batch, expected VisionInputs"):
        q3.vision_encode(params, cfg, batch)
    for call in (
        lambda: q3.extend(params, cfg, batch, batch),
        lambda: q3.decode_step(params, cfg, batch, batch),
    ):
        with pytest.raises(q3.InputError, match="cache: got Batch, expected a KVCache"):
            call()
    with pytest.raises(q3.InputError, match="cfg: got list"):
        next(q3.generate_many(params, [], cfg, stop_ids=()))
