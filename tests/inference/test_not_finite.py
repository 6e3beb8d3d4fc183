"""Logits that are not finite end an answer with an error, and nothing beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import model, prompt
from tiny import pad_batch

import qwen3vl_jax as q3

OPTIONS = {"max_new_tokens": 20, "stop_ids": ()}


def broken(token):
    """The tiny model with one token that it cannot read."""
    params, cfg = model()
    return {**params, "embed": params["embed"].at[token].set(jnp.nan)}, cfg


@functools.cache
def texts():
    """Three prompts, each with its answer by the sound model."""
    found = [prompt([("text", count)], seed) for seed, count in enumerate((9, 40, 12))]
    answers = [
        q3.generate(*model(), q3.make_batch(model()[1], **one), **OPTIONS).tokens[0]
        for one in found
    ]
    return found, answers


def only(ids, *others):
    """The place of the first of these tokens that is in none of the others."""
    return next(i for i, token in enumerate(np.ravel(ids)) if not any(token in x for x in others))


def test_the_row_ends_and_the_others_go_on():
    """In the prompt and in the middle of an answer, greedy and sampled; stream says it at its end."""
    found, answers = texts()
    asked, other = found[0]["input_ids"][0], (found[1]["input_ids"], answers[1])
    spoken = only(answers[0], asked, *other)
    for token, kept in ((asked[only(asked, *other)], 0), (answers[0][spoken], spoken + 1)):
        params, cfg = broken(token)
        batch = q3.make_batch(cfg, **pad_batch(found[:2]))
        answer = q3.generate(params, cfg, batch, **OPTIONS)
        assert answer.finish_reasons == ["error", "length"] and answer.lengths.tolist() == [
            kept,
            20,
        ]
        assert f"answer token {kept + 1}: got NaN" in answer.errors[0] and answer.errors[1] == ""
        assert "--dtype bfloat16" in answer.errors[0]
        np.testing.assert_array_equal(answer.tokens[1], answers[1])
        np.testing.assert_array_equal(answer.tokens[0, :kept], answers[0][:kept])
        pieces = []
        with pytest.raises(q3.InputError, match="row 0: logits of answer token"):
            pieces.extend(q3.stream(params, cfg, batch, **OPTIONS))
        joined = np.concatenate(pieces, axis=1)
        assert (joined[0] >= 0).sum() == kept and joined.min() >= -1
        np.testing.assert_array_equal(joined[1][joined[1] >= 0], answers[1])
        hot = q3.Sampling(temperature=0.8, top_k=9)
        assert (
            q3.generate(params, cfg, batch, sampling=hot, **OPTIONS).finish_reasons[1] == "length"
        )


def test_an_answer_that_ended_before_is_whole():
    """A stop text in the same dispatch, before the token that breaks."""
    found, answers = texts()
    spoken = only(answers[0], found[0]["input_ids"])
    params, cfg = broken(answers[0][spoken])
    batch = q3.make_batch(cfg, **found[0])
    stop = str(answers[0][spoken])
    one = q3.generate(params, cfg, batch, stop_strings=stop, decode=str, **OPTIONS)
    assert one.finish_reasons == ["stop"] and one.errors == [""]


def test_penalties_and_logits_fn_are_held_to_it_too():
    """NaN, infinity, and a mask that leaves nothing; one that leaves something is what masks are for."""
    batch = q3.make_batch(model()[1], **texts()[0][0])
    bad = (
        {"sampling": q3.Sampling(repetition_penalty=1e-38)},
        {"logits_fn": lambda logits, state: logits.at[:, 5].set(jnp.nan)},
        {
            "logits_fn": lambda logits, state: jnp.full_like(logits, -jnp.inf),
            "sampling": q3.Sampling(temperature=1.0),
        },
    )
    for options in bad:
        one = q3.generate(*model(), batch, **OPTIONS, **options)
        assert one.finish_reasons == ["error"] and "after penalties" in one.errors[0]
    masked = {"logits_fn": lambda logits, state: logits.at[:, 5].set(-jnp.inf)}
    assert q3.generate(*model(), batch, **OPTIONS, **masked).finish_reasons == ["length"]


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_logit_that_is_not_drawn_is_held_to_it_too(value):
    """Infinity of either sign in the head of one token: one of the two is a logit of -infinity."""
    params, cfg = model()
    params = {**params, "head": params["head"].at[5, 0].set(value)}
    batch = q3.make_batch(cfg, **texts()[0][0])
    for sampling in (q3.Sampling(), q3.Sampling(temperature=0.8, top_k=9)):
        one = q3.generate(params, cfg, batch, sampling=sampling, **OPTIONS)
        assert one.finish_reasons == ["error"] and "answer token 1: got NaN" in one.errors[0]


def test_the_engine_goes_on_with_the_same_row():
    """A short answer follows a long prompt that broke, in its row of the cache and beside a long one."""
    found, answers = texts()
    long, wrong = (prompt([("text", 150)], seed) for seed in (7, 8))
    others = [x["input_ids"] for x in (found[0], found[2], long)]
    beside = q3.generate(*model(), q3.make_batch(model()[1], **long), **OPTIONS).tokens[0]
    ids = wrong["input_ids"][0]
    params, cfg = broken(ids[only(ids, *others, *answers, beside)])
    asked = [
        q3.Request(*x, 20) for x in (("long", long), ("wrong", wrong), (0, found[0]), (2, found[2]))
    ]
    done = {one.key: one for one in q3.generate_many(params, cfg, asked, stop_ids=(), rows=2)}
    failed = done.pop("wrong")
    assert failed.finish_reason == "error" and "--dtype bfloat16" in failed.error
    assert failed.tokens == failed.logprobs == []
    for key, want in (("long", beside), (0, answers[0]), (2, answers[2])):
        assert done[key].tokens == want.tolist() and done[key].error == ""
        assert done[key].finish_reason == "length" and np.isfinite(done[key].logprobs).all()


def test_scores_and_vectors():
    """Outside of jit they raise and name the row; inside they are NaN, never a number that looks right."""
    found, _ = texts()
    ids = found[1]["input_ids"][0]
    params, cfg = broken(ids[only(ids, found[0]["input_ids"])])
    params, sound = q3.stack_layers(params), q3.stack_layers(model()[0])
    arrays = pad_batch([found[0], found[1]])
    labels = np.where(arrays["attention_mask"] > 0, arrays["input_ids"], -100)
    batch = q3.make_batch(cfg, **arrays, labels=labels)
    for call in (q3.score, q3.embed, functools.partial(q3.rerank, yes_no=(5, 6))):
        with pytest.raises(q3.InputError, match="row 1: got NaN"):
            call(params, cfg, batch)
    infinite = {**sound, "norm": sound["norm"].at[-1].set(jnp.inf)}
    cut = jax.jit(q3.embed, static_argnames=("cfg", "dims"))(infinite, cfg, batch, dims=4)
    assert np.isnan(cut).all()
    head = {**sound, "head": sound["head"].at[5].set(jnp.inf)}
    ranked = jax.jit(q3.rerank, static_argnames=("cfg", "yes_no"))(head, cfg, batch, (5, 6))
    assert np.isnan(ranked).all()
