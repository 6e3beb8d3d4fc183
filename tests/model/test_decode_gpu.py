"""Decode steps by the GPU's kernels, which are interpreted here, beside the plain path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.model import attention, attention_gpu, layers

TOKENS = np.arange(36).reshape(4, 9) % 7 + 1
MASK = np.ones((4, 9), int)
MASK[1, :4] = MASK[2, :8] = 0


@pytest.fixture(scope="module")
def small():
    raw = tiny.config_dict("base")
    raw["text_config"]["num_hidden_layers"] = 1
    raw["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
    cfg = q3.Config.from_hf(raw)
    return jax.jit(functools.partial(q3.init_params, cfg=cfg))(jax.random.key(0)), cfg


def run(small, rows, slots, steps=2):
    """Logits of a prefill, of steps and of an `extend` by one token a row; the first layer's keys."""
    params, cfg = small
    batch = q3.make_batch(cfg, input_ids=TOKENS[:rows], attention_mask=MASK[:rows])
    cache, logits = q3.prefill(params, cfg, batch, slots)
    found = [logits]
    step = jax.jit(lambda p, c, t: q3.decode_step(p, cfg, c, t))
    for i in range(steps):
        cache, logits = step(params, cache, jnp.arange(rows, dtype=jnp.int32) + i + 1)
        found.append(logits)
    more = q3.make_batch(cfg, input_ids=TOKENS[:rows, :1], pad=False)
    cache, logits = jax.jit(lambda p, c, b: q3.extend(p, cfg, c, b))(params, cache, more)
    return [np.asarray(x) for x in (*found, logits)], np.asarray(cache.k[0]), cache.length


@pytest.fixture
def on_gpu(monkeypatch):
    """Calls by kernel, of programs that are traced as on a GPU, but for cuDNN."""
    calls = []
    kernel = attention_gpu.append_and_attend
    refusal = {"cudnn": "not here", "step": ""}

    def asked(dtype, head, name="cudnn"):
        return refusal[name]

    def use():
        jax.clear_caches()
        monkeypatch.setattr(attention, "platform", lambda: "gpu")
        monkeypatch.setattr(attention, "gpu_refusal", asked)
        monkeypatch.setattr(
            attention_gpu, "append_and_attend", lambda *x: calls.append(1) or kernel(*x)
        )
        return calls, refusal

    return use


CASES = [
    (1, 20, None),
    (4, 600, None),
    (2, 40, {"data": 2}),
    (1, 40, {"tensor": 4}),
    (4, 40, {"fsdp": 2, "tensor": 2}),
]


@pytest.mark.parametrize(("rows", "slots", "sizes"), CASES)
def test_steps_are_those_of_the_plain_path(small, on_gpu, rows, slots, sizes):
    """Rows of different lengths, padded left; heads that a mesh copies; small and large caches."""
    want, keys, length = run(small, rows, slots)
    calls, _ = on_gpu()
    if sizes is None:
        got, found, lengths = run(small, rows, slots)
    else:
        count = int(np.prod(list(sizes.values())))
        if len(jax.devices()) < count:
            pytest.skip(f"needs {count} devices")
        devices = jax.devices()[:count]
        with jax.set_mesh(make_mesh(sizes, devices)):
            got, found, lengths = run(small, rows, slots)
    assert calls and (lengths == length).all()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    copies = found.shape[2] // keys.shape[2]
    np.testing.assert_allclose(found[:, :, ::copies], keys, atol=1e-5)


def test_a_kernel_that_does_not_serve_leaves_the_plain_path(small, on_gpu):
    want = run(small, 2, 40)[0]
    calls, refusal = on_gpu()
    refusal["step"] = "no such size"
    got = run(small, 2, 40)[0]
    assert not calls
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_token_past_the_last_slot_is_dropped(small, on_gpu):
    """The cache stays as it is, and the row beside it is right."""
    params, cfg = small
    batch = q3.make_batch(cfg, input_ids=TOKENS[:2], attention_mask=MASK[:2])
    cache, _ = q3.prefill(params, cfg, batch, 9)
    cache = cache.replace(length=jnp.array([cache.slots, 5], jnp.int32))
    want = q3.decode_step(params, cfg, cache, jnp.array([3, 4]))
    on_gpu()
    got = q3.decode_step(params, cfg, cache, jnp.array([3, 4]))
    np.testing.assert_array_equal(got[0].k[0][0], cache.k[0][0])
    np.testing.assert_allclose(got[0].k[0][1], want[0].k[0][1], atol=1e-6)
    np.testing.assert_allclose(got[1][1], want[1][1], atol=1e-5)


@pytest.mark.parametrize("size", ["2b", "8b", "32b", "30b-a3b", "235b-a22b"])
def test_the_kernels_are_lowered_for_a_gpu(size, monkeypatch):
    """The released sizes' decoders have a kernel; a head size of no power of two is refused by itself."""
    monkeypatch.setattr(attention_gpu, "platform", lambda: "gpu")
    c = q3.Config.named(size).text

    def lowered(h, heads=c.num_attention_heads, key_heads=c.num_key_value_heads):
        qkv = (2, 1, key_heads, heads // key_heads + 2, h)
        shapes = (qkv, (h,), (h,), *[(2, 1, 1, h // 2)] * 2, *[(2, 2048, key_heads, h)] * 2)
        args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        slot = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        step = functools.partial(attention_gpu.append_and_attend, 1e-6)
        return jax.jit(step).trace(*args, slot).lower(lowering_platforms=("cuda",))

    assert "xla.gpu.triton" in lowered(c.head_dim).as_text()
    with pytest.raises(ValueError, match="power of 2"):
        lowered(72)


@pytest.mark.parametrize(("name", "rows"), [("cpu", 2), ("gpu", 8), ("tpu", 8)])
def test_one_row_is_several(name, rows, monkeypatch):
    """Of 16 bits, and where no mesh axis would cut them apart again."""
    monkeypatch.setattr(layers, "platform", lambda: name)
    one = jnp.ones((1, 1, 8), jnp.bfloat16)
    assert layers.repeat_one(one).shape == (rows, 1, 8)
    for other in (one.astype(jnp.float32), jnp.repeat(one, 3, axis=0)):
        assert layers.repeat_one(other) is other


@pytest.mark.skipif(len(jax.devices()) < 2, reason="a single device has no mesh to cut rows")
def test_one_row_stays_one_where_a_mesh_cuts_rows():
    one = jnp.ones((1, 1, 8), jnp.bfloat16)
    with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
        assert layers.repeat_one(one) is one
