"""Penalties and filters against the processors that transformers' generate builds, in its order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
import torch
from transformers import GenerationConfig, set_seed

import qwen3vl_jax as q3
from qwen3vl_jax.inference.sampling import draw, penalize, restrict

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
OFF |= {"repetition_penalty": 1.0, "min_new_tokens": 0}
COMBINED = [
    {},
    {"temperature": 0.7},
    {"temperature": 1e-3},
    {"temperature": 50.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"min_new_tokens": 9},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.6, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 2.0, "top_k": 3, "top_p": 0.4, "repetition_penalty": 5.0, "min_new_tokens": 6},
    {
        "temperature": 0.9,
        "top_k": 60,
        "min_p": 1e-4,
        "repetition_penalty": 0.9,
        "min_new_tokens": 5,
    },
]
ROWS, VOCAB, STOPS = len(COMBINED), tiny.TEXT["vocab_size"], [7, 300]
PROMPT, ANSWERED = 24, 5  # tokens, of which the first few of some rows are padding


@pytest.fixture
def stable_sort(monkeypatch):
    """Of tied tokens torch.sort may leave any first; here the lowest ids come first, as in ours."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))


@functools.cache
def histories():
    """Ids [B T] of prompts (padded left) and answers so far, and which are not padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (ROWS, PROMPT + ANSWERED))
    ids[:, -1] = STOPS[0]
    mask = np.arange(ids.shape[1]) >= rng.integers(0, 9, ROWS)[:, None]
    return np.where(mask, ids, tiny.PAD), mask


def logits_of(kind):
    """Logits [B V] float32 that are random, in steps, all alike, all on one token, or far apart."""
    rng, token = np.random.default_rng(1), np.arange(VOCAB)
    logits = rng.normal(size=(ROWS, VOCAB)) * 3
    far = rng.choice(
        [-1e30, -1e4, -np.inf, 1e4 - 3, 1e4], logits.shape, p=[0.1, 0.3, 0.3, 0.2, 0.1]
    )
    kinds = {
        "random": logits,
        "ties": np.round(logits),
        "flat": np.where(token < 256, 2, -np.inf),  # shares of 1/256, so that sums are exact
        "one": np.where(token == STOPS[1], 80, -80),
        "extreme": np.where(rng.random(logits.shape) < 0.3, logits, far),
    }
    return np.broadcast_to(kinds[kind], logits.shape).astype(np.float32)


def theirs(model, options, ids, mask, logits):
    """Logits [1 V] after the processors that `generate` builds for these options and stop ids."""
    config = GenerationConfig(do_sample=True, eos_token_id=STOPS, **{**OFF, **options})
    model._prepare_special_tokens(config, device="cpu")
    seen = {"attention_mask": torch.from_numpy(mask[:, :PROMPT].astype(np.int64))}
    chain = model._get_logits_processor(config, PROMPT, device="cpu", model_kwargs=seen)
    return chain(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()


def filtered(sampling, ids, mask, answered, logits):
    """Our logits after penalties and filters; answered: how many of the last ids are the answer's."""
    rows = np.arange(len(ids))[:, None]
    seen = np.zeros((len(ids), VOCAB + 1), bool)
    seen[rows, np.where(mask, ids, VOCAB)] = True
    said = np.zeros_like(seen)
    said[rows, ids[:, ids.shape[1] - answered :]] = True
    count = jnp.full(len(ids), answered, jnp.int32)
    out = penalize(logits, sampling, seen[:, :-1], said[:, :-1], count, jnp.array(STOPS))
    return np.asarray(restrict(out, sampling))


@pytest.mark.parametrize("kind", ["random", "ties", "flat", "one", "extreme"])
def test_each_row_has_its_own_values(kind, stable_sort):
    """20 combinations as the rows of one batch, each equal to transformers' alone."""
    model, logits, (ids, mask) = reference.build().model(), logits_of(kind), histories()
    rows = {name: [{**OFF, **options}[name] for options in COMBINED] for name in OFF}
    got = filtered(q3.Sampling(**rows).rows(ROWS), ids, mask, ANSWERED, logits)
    for b, options in enumerate(COMBINED):
        row = slice(b, b + 1)
        want = theirs(model, options, ids[row], mask[row], logits[row])
        np.testing.assert_allclose(got[row], want, rtol=1e-5, err_msg=str(options))
        alone = q3.Sampling(**{**OFF, **options}).rows(1)
        np.testing.assert_array_equal(
            filtered(alone, ids[row], mask[row], ANSWERED, logits[row]), got[row]
        )


def test_scores_of_generate():
    """Every step of a sampled answer of transformers' own generate: its logits give its scores."""
    ref, options = reference.build(), COMBINED[18]
    inputs = reference.mixed(ref)
    width = inputs["input_ids"].shape[1]
    set_seed(0)
    asked = {**OFF, **options, "min_new_tokens": 4, "max_new_tokens": 8, "do_sample": True}
    ends = {"eos_token_id": STOPS, "pad_token_id": tiny.PAD}
    shown = dict.fromkeys(("output_logits", "output_scores", "return_dict_in_generate"), True)
    given = {name: torch.from_numpy(a) for name, a in inputs.items()}
    out = ref.model().generate(**given, **asked, **ends, **shown)
    sampling = q3.Sampling(**{**OFF, **options, "min_new_tokens": 4}).rows(4)
    ids = out.sequences.numpy()
    mask = np.pad(inputs["attention_mask"] > 0, ((0, 0), (0, 8)), constant_values=True)
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        upto = slice(None, width + step)
        got = filtered(sampling, ids[:, upto], mask[:, upto], step, logits.numpy())
        np.testing.assert_allclose(got, scores.numpy(), rtol=1e-5)
    assert step == 7


def test_presence_penalty():
    """Once from each token of the answer, before the filters; transformers has none."""
    logits, (ids, mask) = logits_of("random"), histories()
    presence = np.linspace(-2, 2, ROWS)
    got = filtered(
        q3.Sampling(1.0, presence_penalty=presence.tolist()).rows(ROWS), ids, mask, ANSWERED, logits
    )
    want = logits.copy()
    for b in range(ROWS):
        want[b, np.unique(ids[b, PROMPT:])] -= np.float32(presence[b])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_temperature_near_0_is_greedy():
    """Where logits over temperature are beyond float32."""
    logits = logits_of("random")
    keys = jax.vmap(jax.random.key)(jnp.arange(ROWS))
    for temperature in (1e-3, 1e-20, 1.2e-38, 1e-40, 1e-45):
        sampling = q3.Sampling(temperature, top_p=0.9, min_p=0.1).rows(ROWS)
        tokens = draw(10 * logits, sampling, keys, jnp.zeros(ROWS, jnp.int32))
        np.testing.assert_array_equal(tokens, logits.argmax(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"top_p": 0}, ["top_p", "0"]),
        ({"top_p": 1.5}, ["top_p", "1.5"]),
        ({"top_k": -3}, ["top_k", "-3"]),
        ({"top_k": 2.5}, ["top_k", "2.5"]),
        ({"min_p": 2}, ["min_p", "2"]),
        ({"repetition_penalty": 0}, ["repetition_penalty", "0"]),
        ({"presence_penalty": 3}, ["presence_penalty", "3"]),
        ({"top_k": 1e40}, ["top_k", "1e+40", "2^30"]),
        ({"min_new_tokens": -1}, ["min_new_tokens", "-1"]),
        ({"temperature": [1.0, 2.0]}, ["temperature", "2 values"]),
        ({"temperature": "hot"}, ["temperature", "hot"]),
        ({"temperature": "0.5"}, ["temperature", "'0.5'"]),
        ({"top_k": "5"}, ["top_k", "'5'"]),
        ({"top_p": True}, ["top_p", "True"]),
        ({"min_p": [False]}, ["min_p", "False"]),
        ({"min_new_tokens": [1, None]}, ["min_new_tokens", "None"]),
        ({"repetition_penalty": 1e-300}, ["repetition_penalty", "1e-300"]),
        ({"top_k": 10**10}, ["top_k", "10000000000"]),
    ],
)
def test_sampling_values_out_of_range(options, words):
    with pytest.raises(q3.InputError) as error:
        q3.Sampling(**options).rows(1)
    assert all(w in str(error.value) for w in words)
