"""generate and stream: penalties, seeds, stops, growth, compile counts."""

import jax
import jax.numpy as jnp
import numpy as np
import ours
import pytest
import tiny

import qwen3vl_jax as q3
from qwen3vl_jax.inference import decode_loop
from qwen3vl_jax.model import cache as cache_module
from qwen3vl_jax.model import vision
from qwen3vl_jax.model.attention import DECODE_BLOCK
from qwen3vl_jax.processing.batch import bucket

ROWS = ("one_picture", "text", "three_pictures")


VARIANT = "shallow"  # the one of fewest layers


def model():
    return ours.tiny_model(VARIANT)


def prompt(row, seed=0):
    return tiny.inputs(tiny.config_dict(VARIANT), row, seed)


def batch_of(*rows, side="left"):
    return q3.make_batch(model()[1], **tiny.pad_batch([prompt(r) for r in rows], side))


def generate(batch, count=12, **options):
    return q3.generate(*model(), batch, max_new_tokens=count, **{"stop_ids": (), **options})


def test_penalties_look_at_the_right_tokens():
    """Repetition: prompt and answer; presence: answer only, taken once however often it was said."""
    batch = batch_of("text")
    kept = []

    def watch(logits, state):
        jax.debug.callback(
            lambda *x: kept.append([np.asarray(y) for y in x]),
            logits,
            state.seen,
            state.answered,
            ordered=True,
        )
        return logits

    answer = generate(batch, 4, sampling=q3.Sampling(presence_penalty=2.0), logits_fn=watch)
    jax.effects_barrier()
    raw, _ = ours.prefill(*model(), batch, 64)[1], None
    np.testing.assert_allclose(kept[0][0], raw, atol=1e-5)
    said = answer.tokens[0, :1]
    assert set(np.flatnonzero(kept[0][1][0])) == set(prompt("text")["input_ids"][0])
    assert not kept[0][2].any() and set(np.flatnonzero(kept[1][2][0])) == set(said)
    assert len(set(answer.tokens[0])) >= 3
    cache, before = ours.prefill(*model(), batch, 256)[0], np.array([[3, *range(5, 17)]])
    kept.clear()
    options = {"cache": cache, "max_new_tokens": 1, "stop_ids": (), "logits_fn": watch}
    with pytest.raises(q3.InputError, match=r"before: shape \(1, 12\), .* \(1, 13\)"):
        next(q3.stream(*model(), batch, before=before[:, 1:], **options))
    next(q3.stream(*model(), batch, before=before, **options))
    jax.effects_barrier()
    assert set(np.flatnonzero(kept[0][1][0])) == {*before[0], *prompt("text")["input_ids"][0]}


def test_a_row_depends_on_its_own_seed_alone():
    warm = q3.Sampling(temperature=1.0, top_p=0.95)
    batch = batch_of(*ROWS)
    together = generate(batch, sampling=warm, seed=[5, 6, 7])
    np.testing.assert_array_equal(together.tokens, generate(batch, sampling=warm, seed=5).tokens)
    other = generate(batch, sampling=warm, seed=[9, 6, 11]).tokens
    np.testing.assert_array_equal(other[1], together.tokens[1])
    assert (other[0] != together.tokens[0]).any() and (other[2] != together.tokens[2]).any()
    for b, row in enumerate(ROWS):
        alone = generate(batch_of(row), sampling=warm, seed=5 + b)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])


def test_sampling_of_one_row_leaves_the_greedy_ones():
    greedy = generate(batch_of(*ROWS)).tokens
    mixed = generate(batch_of(*ROWS), sampling=q3.Sampling(temperature=[0.0, 2.0, 0.0])).tokens
    np.testing.assert_array_equal(mixed[[0, 2]], greedy[[0, 2]])
    assert (mixed[1] != greedy[1]).any()


def test_sampled_frequencies():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))

    def four(given, state):
        return jnp.full_like(given, -jnp.inf).at[:, :4].set(logits)

    warm = q3.Sampling(temperature=1.0)
    answer = generate(batch_of("text"), 20, sampling=warm, logits_fn=four, copies=20)
    share = np.bincount(answer.tokens.ravel(), minlength=4) / 400
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.08)


def test_stop_ids_end_one_row_and_not_the_others():
    free = generate(batch_of(*ROWS), 30)
    stop = int(free.tokens[0, 4])
    want = [r.tolist().index(stop) + 1 if stop in r else 30 for r in free.tokens]
    ended = generate(batch_of(*ROWS), 30, stop_ids=(stop, 319))
    assert ended.lengths.tolist() == want and min(want) < max(want)
    assert ended.finish_reasons == ["stop" if n < 30 else "length" for n in want]
    for row, full, n in zip(ended.tokens, free.tokens, want, strict=True):
        np.testing.assert_array_equal(row[:n], full[:n])
        assert (row[n:] == stop).all()
    later = generate(batch_of(*ROWS), 30, stop_ids=(stop,), sampling=q3.Sampling(min_new_tokens=9))
    assert (later.lengths >= 10).all() and not (later.tokens[:, :9] == stop).any()


def test_stop_strings():
    def decode(tokens):
        return "".join(f"<{t}>" for t in tokens)

    free = generate(batch_of(*ROWS), 20)
    stop = decode(free.tokens[1, 3:5])
    ended = generate(batch_of(*ROWS), 20, stop_strings=["never", stop], decode=decode)
    assert ended.lengths[1] == 5 and ended.finish_reasons[1] == "stop"
    np.testing.assert_array_equal(ended.tokens[1, :5], free.tokens[1, :5])
    single = generate(batch_of(*ROWS), 20, stop_strings=stop, decode=decode)
    np.testing.assert_array_equal(single.tokens, ended.tokens)
    with pytest.raises(q3.InputError, match="decode"):
        generate(batch_of("text"), stop_strings=["x"])


def test_stream_joins_to_generate_for_every_number_of_steps():
    batch = batch_of(*ROWS, side="right")
    want = generate(batch, 23)
    for steps in (1, 5, 16):
        chunks = list(q3.stream(*model(), batch, max_new_tokens=23, stop_ids=(), steps=steps))
        assert all(c.shape[1] <= steps for c in chunks)
        np.testing.assert_array_equal(np.concatenate(chunks, 1), want.tokens)


def test_the_cache_grows_and_nothing_changes():
    batch = batch_of("text", "one_picture")
    long = generate(batch, 180)  # past 256 with the prompts, padded to 96
    cache, logits = ours.prefill(*model(), batch, 512)
    for t in range(180):
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        np.testing.assert_array_equal(token, long.tokens[:, t])
        cache, logits = ours.decode_step(*model(), cache, token)


def test_a_cache_that_grows_is_held_once():
    """Layer by layer: the arrays that it leaves are gone, and its values stay."""
    cache, _ = ours.prefill(*model(), batch_of("text"), 128)
    before, given = jax.tree.map(np.array, cache), [*cache.k, *cache.v]
    grown = decode_loop.grow(cache, slots=256)
    assert grown.slots == 256 and all(x.is_deleted() for x in given)
    for old, new in zip([*before.k, *before.v], [*grown.k, *grown.v], strict=True):
        np.testing.assert_array_equal(new[:, :128], old)
        assert not np.any(new[:, 128:])
    np.testing.assert_array_equal(grown.length, before.length)


def test_packed_rows_are_refused():
    batch = batch_of("text")
    packed = batch.replace(segment_ids=np.where(np.arange(batch.tokens.shape[1]) < 6, 1, 2)[None])
    with pytest.raises(q3.InputError, match="packed"):
        generate(packed)


def test_embeddings_without_tokens():
    """The tokens' answer, and no id that a penalty could have seen."""
    params, cfg = model()
    embeds = np.asarray(params["embed"])[prompt("text")["input_ids"]]
    batch = q3.make_batch(cfg, inputs_embeds=embeds)
    assert (batch.tokens[batch.segment_ids > 0] == cfg.text.vocab_size).all()
    np.testing.assert_array_equal(generate(batch).tokens, generate(batch_of("text")).tokens)


def test_copies_are_the_answers_that_their_seeds_give():
    """Three answers to each of two prompts from one prefill: those of six rows with these seeds."""
    params, cfg = model()
    rows = tiny.pad_batch([prompt([("text", 9)]), prompt("one_picture")])
    batch = q3.make_batch(cfg, **rows)
    options = {"max_new_tokens": 20, "sampling": q3.Sampling(temperature=1.5), "stop_ids": (7,)}
    made = q3.generate(params, cfg, batch, copies=3, seed=range(6), **options)
    assert len({tuple(row) for row in made.tokens}) == 6
    for first in range(3):
        alone = q3.generate(params, cfg, batch, seed=[first, 3 + first], **options)
        for row, copy in ((0, first), (1, 3 + first)):
            length = alone.lengths[row]
            assert made.lengths[copy] == length
            assert made.finish_reasons[copy] == alone.finish_reasons[row]
            np.testing.assert_array_equal(made.tokens[copy, :length], alone.tokens[row, :length])
    with pytest.raises(q3.InputError, match="copies: got 0"):
        q3.generate(params, cfg, batch, copies=0, **options)


def test_logits_fn_decides():
    def only_even(logits, state):
        return jnp.where(jnp.arange(logits.shape[1]) % 2 == 0, logits, -jnp.inf)

    assert (generate(batch_of(*ROWS), logits_fn=only_even).tokens % 2 == 0).all()


def test_lengths_out_of_range():
    for options, words in (
        ({"max_len": 20}, "the prompt has 13 tokens.*20"),
        ({"count": 0}, "max_new_tokens: got 0"),
        ({"count": 2.5}, "max_new_tokens: got 2.5"),
        ({"count": 10**12}, "max_new_tokens: got 1000000000000, expected .* to 2147483647"),
        ({"max_len": "20"}, "max_len: got '20'"),
        ({"prefill_chunk": 2.0}, "prefill_chunk: got 2.0"),
        ({"steps": 17}, "steps: got 17, expected a whole number from 1 to 16"),
        ({"seed": [1, 2, 3]}, "seed has 3"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"stop_ids": (-1,)}, r"stop_ids: got \(-1,\), expected ids in the vocabulary"),
        ({"stop_ids": [1.7]}, "stop_ids: got .1.7"),
        ({"stop_ids": 10**30}, "stop_ids: got 10"),
        ({"sampling": q3.Sampling(top_p=1.5)}, "top_p is 1.5"),
        ({"sampling": {"top_p": 0.5}}, "sampling: got .*, expected a Sampling"),
        ({"stop_strings": [""], "decode": str}, "empty"),
    ):
        with pytest.raises(q3.InputError, match=words):
            generate(batch_of("text"), **options)


def test_twenty_sizes_compile_once_a_bucket_and_twenty_more_nothing():
    params, cfg = model()
    sizes = [(h, w) for h in range(2, 12) for w in range(2, 14)]
    rng = np.random.default_rng(0)
    # A picture and a prompt of the second bucket, a prompt alone, and others.
    first = [(9, 12), (8, 12), *(sizes[i] for i in rng.choice(len(sizes), 18, replace=False))]

    def places(h, w):
        row = prompt([("text", 3), ("image", (1, h, w)), ("text", 4)])
        return row, (bucket(row["input_ids"].shape[1]), bucket(h * w))

    def run(shapes):
        touched = set()
        for row, at in (places(*shape) for shape in shapes):
            touched.add(at)
            q3.generate(params, cfg, q3.make_batch(cfg, **row), max_new_tokens=3, stop_ids=())
        return touched

    programs = (vision._run_block.__wrapped__, cache_module._embed_prompt)
    programs += (cache_module._fill_layer.__wrapped__, decode_loop.decode_steps)
    for program in programs:
        program.clear_cache()
    touched = run(first)
    assert len({v for _, v in touched}) == 2 and len(touched) >= 3, touched
    counts = [program._cache_size() for program in programs]
    assert counts[0] == len({v for _, v in touched}), (counts, touched)
    assert counts[1] == len(touched), (counts, touched)
    assert counts[2] <= len({t for t, _ in touched}), counts
    assert counts[3] <= len(touched), counts
    second = [s for s in sizes if s not in first and places(*s)[1] in touched]
    compiled = []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(second[i] for i in rng.choice(len(second), 20, replace=False))
        assert not compiled
        jax.jit(lambda x: x + len(second))(1)  # one that is new is heard
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_decode_step_reads_what_is_filled_not_what_is_allowed():
    """NaN behind the last filled block would reach every logit that is computed from it."""
    params, cfg = model()
    cache, _ = ours.prefill(params, cfg, q3.make_batch(cfg, **prompt([("text", 500)])), 4096)
    block = -(-501 // DECODE_BLOCK) * DECODE_BLOCK
    k, v = ([x.at[:, block:].set(jnp.nan) for x in part] for part in (cache.k, cache.v))
    poisoned = jax.tree.map(jnp.copy, cache).replace(k=k, v=v)
    token = jnp.array([5], jnp.int32)
    _, want = ours.decode_step(params, cfg, cache, token)
    _, got = ours.decode_step(params, cfg, poisoned, token)
    np.testing.assert_array_equal(got, want)
