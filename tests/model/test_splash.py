"""The TPU's attention, interpreted, against the blocks; and that a model for a TPU holds its kernel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.model import attention, attention_tpu
from qwen3vl_jax.model.attention import _attend_blocks, causal_ranges
from qwen3vl_jax.model.attention_tpu import splash_attend
from qwen3vl_jax.model.cache import init_cache

HEADS, KEY_HEADS = 6, 2


def arrays(b, t, s, h, heads=HEADS, key_heads=KEY_HEADS):
    """Random q, k, v and a cotangent."""
    shapes = ((b, t, heads, h), (b, s, key_heads, h), (b, s, key_heads, h), (b, t, heads, h))
    keys = jax.random.split(jax.random.key(t + s), 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def check(lo, hi, q, k, v, slope=None, most=0):
    """Outputs of the two, zeros of empty ranges included, and their gradients where slope is given."""

    def results(fn, qkv, slope):
        if slope is None:
            return (fn(*qkv),)
        out, back = jax.vjp(fn, *qkv)
        return out, *back(slope)

    kernel = functools.partial(splash_attend, lo=lo, hi=hi, most=most)
    run = jax.jit(results, static_argnums=0)
    got = run(kernel, (q, k, v), slope)
    want = run(lambda q, k, v: _attend_blocks(q, k, v, lo, hi), (q, k, v), slope)
    for a, b in zip(got, want, strict=True):
        assert ours.worst(a, b) < 1e-5


def packed(*rows):
    """Segment ids [B T] from runs (id, length)."""
    return jnp.asarray([np.repeat(*zip(*row, strict=True)) for row in rows], jnp.int32)


ROWS = packed(
    [(1, 100), (2, 80), (3, 50), (0, 26)], [(0, 150), (1, 106)], [(1, 256)], [(1, 1), (0, 255)]
)


def test_packed_and_padded_rows(monkeypatch):
    """Several segments, padding on either side, a row of nearly nothing; G = 3."""
    monkeypatch.setattr(attention_tpu, "BLOCK", 128)
    lo, hi = causal_ranges(ROWS)
    lo = lo.at[1].set(150)  # padding may have any empty range
    hi = hi.at[1].set(jnp.maximum(hi[1], 150))
    check(lo, hi, *arrays(4, 256, 256, 16))


def test_frames_of_the_vision_tower(monkeypatch):
    """Pictures of any size in a row that is no multiple of a block; padding sees nothing."""
    monkeypatch.setattr(attention_tpu, "BLOCK", 128)
    lo, hi = frames([64, 100, 36, 120], 50)
    check(jnp.asarray(lo), jnp.asarray(hi), *arrays(1, 370, 370, 72, 3, 3))


def frames(sizes, padding):
    """lo and hi [1 P] of frames of these sizes, one behind another."""
    ends = np.cumsum(sizes)
    return (np.pad(np.repeat(x, sizes), (0, padding))[None] for x in (ends - sizes, ends))


@pytest.mark.parametrize(
    ("sizes", "padding", "most"), [([64] * 12, 64, 1), ([100] * 8, 0, 3), ([200] * 4 + [90], 6, 4)]
)
def test_no_step_is_made_for_key_blocks_that_none_sees(sizes, padding, most, monkeypatch):
    """Values with tables of `key_blocks`, gradients of one; a table that is too narrow gives no numbers."""
    monkeypatch.setattr(attention_tpu, "BLOCK", 128)
    lo, hi = frames(sizes, padding)
    assert attention_tpu.key_blocks(lo, hi) == most
    lo, hi = jnp.asarray(lo), jnp.asarray(hi)
    x, *rest = arrays(1, lo.shape[1], lo.shape[1], 72, 3, 3)
    check(lo, hi, x, *(rest if most == 4 else rest[:2]), most=most)
    if most > 1:
        narrow = jax.jit(splash_attend, static_argnames="most")(x, x, x, lo, hi, most=most - 1)
        assert np.isnan(np.asarray(narrow)[np.asarray(hi > lo)]).all()


def test_the_vision_tower_steps_over_what_its_host_knows(monkeypatch):
    """Numpy tables are counted on a TPU, traced ones and those of other platforms are not."""
    lo, hi = frames([784] * 32, 0)
    assert attention.host_bound(lo, hi, 32) == 32
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert attention.host_bound(lo, hi, 32) == 5
    assert attention.host_bound(jnp.asarray(lo), jnp.asarray(hi), 32) == 0
    many = [attention_tpu.key_blocks(*frames([512 * n, 512], 0)) for n in (1, 7, 9, 10, 17)]
    assert many == [1, 7, 10, 10, 20]


def test_a_shard_of_a_row(monkeypatch):
    """T < S, the shard's place in the row known on the device only."""
    monkeypatch.setattr(attention_tpu, "BLOCK", 128)
    rows = packed([(1, 200), (2, 300), (0, 12)], [(1, 512)])
    lo, hi = causal_ranges(rows)
    whole = jnp.where(hi > lo, lo + 1, 0)

    def shard(i):
        return (jax.lax.dynamic_slice_in_dim(x, 128 * i, 128, axis=1) for x in (lo, hi))

    q, k, v, _ = arrays(2, 128, 512, 16)

    @jax.jit
    def both(i):
        kernel = splash_attend(q, k, v, *shard(i), key_segments=whole)
        return kernel, _attend_blocks(q, k, v, *shard(i))

    for i in range(4):
        assert ours.worst(*both(i)) < 1e-5


def test_a_piece_of_a_prompt_on_a_filled_cache():
    """lo None; a row that has nothing yet."""
    hi = jnp.stack([jnp.arange(130) + 5, jnp.arange(130) + 900, jnp.zeros(130, jnp.int32)])
    check(None, hi, *arrays(3, 130, 1024, 16)[:3])


def test_half_precision():
    """bf16 in and out, sums in fp32."""
    half = [x.astype(jnp.bfloat16) for x in arrays(4, 256, 256, 16)[:3]]
    got = jax.jit(splash_attend)(*half, *causal_ranges(ROWS))
    want = _attend_blocks(*(x.astype(jnp.float32) for x in half), *causal_ranges(ROWS))
    assert got.dtype == jnp.bfloat16 and ours.worst(got, want) < 0.01


@pytest.mark.parametrize(("heads", "key_heads", "rows"), [(6, 2, 5), (4, 1, 8), (32, 8, 4)])
def test_a_decode_step_reads_what_is_filled(heads, key_heads, rows, monkeypatch):
    """Rows of no, one, any and all slots; NaN in the blocks behind the last filled slot."""
    monkeypatch.setattr(attention_tpu, "STEP_BYTES", 4 * 256 * key_heads * 128 * 4)
    q, k, v, _ = arrays(rows, 1, 768, 128, heads, key_heads)
    hi = jnp.array([[0], [1], [256], [768], [300], [257], [40], [2]])[:rows]
    want = _attend_blocks(q, k, v, None, hi)
    behind = jnp.arange(768)[None, :, None, None] >= (-(-hi // 256) * 256)[..., None, None]
    k, v = (jnp.where(behind, jnp.nan, x) for x in (k, v))
    step = jax.jit(attention_tpu.attend_step)
    assert ours.worst(step(q, k, v, hi), want) < 1e-5
    half = step(*(x.astype(jnp.bfloat16) for x in (q, k, v)), hi)
    assert half.dtype == jnp.bfloat16 and ours.worst(half, want) < 0.01


def test_blocks_outside_every_range_are_not_visited():
    """Whatever stands in keys that no query of a block sees, no number is read from there."""
    lo, hi = causal_ranges(packed([(1, 512), (2, 512), (0, 512)]))
    empty = hi <= lo
    first, end = jnp.where(empty, 1536, lo), jnp.where(empty, 0, hi)
    seen = attention_tpu._seen(first, end, 512, 256, 1536)
    np.testing.assert_array_equal(
        seen[0].astype(int), [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    )
    steps = attention_tpu._steps(jnp.concatenate([seen, seen]), 0)[0]
    row = np.array([[0, 1, 1, 1, 1, 1], [2, 3, 3, 3, 3, 3], [0] * 6])
    np.testing.assert_array_equal(steps[0], np.concatenate([row, row + 6]))


def test_block_sizes_divide_padded_lengths():
    """Multiples of 128 up to 512, and less than a block of 128 more for every block."""
    for length in (128, 129, 640, 4096, 4100, 65536):
        block = attention_tpu._block(length)
        count = -(-length // block)
        assert block % 128 == 0 and block <= 512 and count * block - length < 128 * count
    assert [attention_tpu._block(n) for n in (128, 640, 1152, 4096)] == [128, 384, 384, 512]


def test_what_is_refused():
    """Few queries, and queries of a part of a row whose segments are not known."""

    def served(queries, keys, with_lo, segments=None):
        shape = jax.ShapeDtypeStruct
        q, k = (shape((1, n, 2, 128), jnp.bfloat16) for n in (queries, keys))
        hi = shape((1, queries), jnp.int32)
        given = (q, k, k, hi if with_lo else None, hi, segments)
        return jax.eval_shape(attention_tpu.attend, *given) is not None

    assert not served(1, 300, False) and served(1, 512, False)
    assert not served(64, 512, False) and served(256, 512, False)
    assert not served(256, 512, True) and served(256, 256, True)
    assert served(256, 512, True, jax.ShapeDtypeStruct((1, 512), jnp.int32))


@functools.cache
def model():
    """A small sparse model, and a batch whose tokens and patches are more than a block."""
    config = tiny.config_dict("base", moe=True)
    config["text_config"]["num_hidden_layers"] = 1
    config["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
    cfg = q3.Config.from_hf(config)
    params = jax.jit(functools.partial(q3.init_params, cfg=cfg))(jax.random.key(0))
    row = tiny.inputs(config, [("text", 70), ("image", (1, 6, 8)), ("text", 30)])
    return params, cfg, q3.make_batch(cfg, **row)


def test_the_model_is_the_same_on_the_kernel(monkeypatch):
    """A picture and padding in rows that are no multiple of a block."""
    params, cfg, batch = model()
    want = jax.jit(lambda p: q3.forward(p, cfg, batch, logits_to_keep=1))(params)
    calls = []

    def interpreted(q, *args, **kwargs):
        calls.append(q.shape[1])
        return splash_attend(q, *args, **kwargs)

    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention_tpu, "splash_attend", interpreted)
    jax.clear_caches()
    got = jax.jit(lambda p: q3.forward(p, cfg, batch, logits_to_keep=1))(params)
    assert ours.worst(got, want) < 1e-5
    assert calls == [batch.vision.lo.shape[0], batch.tokens.shape[1]]


def kernels(fn, *args) -> tuple[int, set[str]]:
    """How often the program for a TPU calls a kernel, and which; no TPU is needed to write it."""
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert "ragged_dot" in text
    calls = re.findall(r'call @_splash|kernel_name = "_step_kernel', text)
    return len(calls), set(re.findall(r"splash_mha_[a-z]+|_step_kernel", text))


def test_a_program_for_a_tpu_holds_the_kernels():
    """One a layer of both towers, three with gradients, one for a piece of a prompt and a decode step."""
    params, cfg, batch = model()

    def loss(params):
        return jnp.sum(q3.forward(params, cfg, batch))

    assert kernels(loss, params) == (2, {"splash_mha_fwd"})
    passes = {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"}
    assert kernels(jax.grad(loss), params)[1] == passes
    pieces = functools.partial(q3.prefill, cfg=cfg, batch=batch, max_len=300, chunk=128)
    assert kernels(pieces, params) == (2, {"splash_mha_fwd"})
    cache = init_cache(cfg, 1, 256, jnp.float32)
    step = functools.partial(q3.decode_step, cfg=cfg)
    tokens = jnp.zeros(1, jnp.int32)
    found = kernels(lambda *x: step(x[0], cache=x[1], tokens=x[2]), params, cache, tokens)
    assert found == (1, {"_step_kernel"})
