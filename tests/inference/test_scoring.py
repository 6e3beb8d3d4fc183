"""score, embed and rerank against torch's arithmetic on transformers' outputs."""

import functools

import jax
import numpy as np
import ours
import pytest
import reference
import tiny
import torch

import qwen3vl_jax as q3
from qwen3vl_jax.inference import scoring

ROWS = ("clips_and_picture", "text", "three_pictures")


@pytest.mark.parametrize(("moe", "side"), [(False, "left"), (True, "right")])
@pytest.mark.parametrize("span", [512, 7])
def test_score(moe, side, span, monkeypatch):
    """Log-probabilities of a few labelled tokens of each row, in one span and in several."""
    monkeypatch.setattr(scoring, "SPAN", span)
    ref = reference.build("base", moe)
    params, cfg = ours.build(ref)
    inputs = reference.mixed(ref, side, ROWS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"] > 0
    rng = np.random.default_rng(0)
    chosen = mask & (rng.random(ids.shape) < 0.3)
    chosen[np.arange(len(ids)), mask.argmax(1)] = False  # a row's first token follows nothing
    labels = np.where(chosen, ids, -100)
    batch = q3.make_batch(cfg, **inputs, labels=labels)
    score = jax.jit(functools.partial(q3.score, cfg=cfg))
    got = np.asarray(score(q3.stack_layers(params), batch=batch))
    logits = torch.from_numpy(reference.logits(ref, inputs)[:, :-1])
    expected = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(ids[:, 1:, None]))[..., 0]
    expected = np.pad(expected.numpy(), ((0, 0), (1, 0)))
    width = ids.shape[1]
    assert np.abs(got[:, :width] - expected)[chosen].max() < 1e-4
    assert chosen.sum() > 20 and not got[:, :width][~chosen].any() and not got[:, width:].any()


@pytest.mark.parametrize(("moe", "side"), [(False, "right"), (True, "left")])
def test_embed(moe, side):
    """Cosine with torch's normalised state of the last token, whole and cut."""
    ref = reference.build("base", moe)
    params, cfg = ours.build(ref)
    params = q3.stack_layers(params)
    inputs = reference.mixed(ref, side, ROWS)
    batch = q3.make_batch(cfg, **inputs)
    states = reference.last_hidden(ref, inputs)
    hidden, mask = torch.from_numpy(states), inputs["attention_mask"]
    got = np.asarray(jax.jit(q3.last_hidden_state, static_argnames="cfg")(params, cfg, batch))
    real = mask > 0
    assert ours.worst(got[:, : real.shape[1]][real], states[real]) < 1e-5
    last = mask.shape[1] - 1 - np.flip(mask, 1).argmax(1)
    state = hidden[torch.arange(len(mask)), torch.from_numpy(last)]
    for dims in (None, 17):
        want = torch.nn.functional.normalize(state[:, :dims], dim=-1).numpy()
        got = np.asarray(
            jax.jit(q3.embed, static_argnames=("cfg", "dims"))(params, cfg, batch, dims=dims)
        )
        assert got.shape == want.shape and np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
        assert (got * want).sum(1).min() > 0.99999
    with pytest.raises(q3.InputError, match="dims is 0"):
        q3.embed(params, cfg, batch, dims=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rerank(side):
    """Within 1e-5 of the sigmoid of the difference of two rows of the head."""
    ref = reference.build("base", False)
    params, cfg = ours.build(ref)
    inputs = reference.mixed(ref, side, ROWS)
    mask = inputs["attention_mask"]
    last = mask.shape[1] - 1 - np.flip(mask, 1).argmax(1)
    hidden = torch.from_numpy(reference.last_hidden(ref, inputs))
    state = hidden[torch.arange(len(mask)), torch.from_numpy(last)]
    head = ref.model().lm_head.weight
    yes, no = 5, 11
    want = torch.sigmoid(state @ (head[yes] - head[no])).numpy()
    got = jax.jit(q3.rerank, static_argnames=("cfg", "yes_no"))(
        params, cfg, q3.make_batch(cfg, **inputs), yes_no=(yes, no)
    )
    assert np.abs(np.asarray(got) - want).max() < 1e-5 and np.ptp(want) > 1e-3


def test_embeddings_need_no_head():
    """A base model embeds; scoring says what is missing, and so does a batch without labels."""
    ref = reference.build("base", False)
    params, cfg = ours.build(ref)
    params = q3.stack_layers(params)
    batch = q3.make_batch(cfg, **tiny.inputs(ref.config, "text"))
    bare = {name: value for name, value in params.items() if name != "head"}
    np.testing.assert_array_equal(q3.embed(bare, cfg, batch), q3.embed(params, cfg, batch))
    with pytest.raises(q3.InputError, match="no lm_head"):
        q3.rerank(bare, cfg, batch, (1, 2))
    with pytest.raises(q3.InputError, match=r"yes_no: got .*expected ids in the vocabulary"):
        q3.rerank(params, cfg, batch, (1, 10**6))
    with pytest.raises(ValueError, match="unpack"):
        q3.rerank(params, cfg, batch, (1, 2, 3))
    with pytest.raises(q3.InputError, match="continuations="):
        q3.score(params, cfg, batch)
