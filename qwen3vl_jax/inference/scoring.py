"""Numbers in place of text: log-probabilities, vectors, scores, states, attention. Dims: layers.py."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qwen3vl_jax.config import IGNORE_INDEX, Config
from qwen3vl_jax.errors import InputError, not_finite, shown, unexpected
from qwen3vl_jax.labels import label_logprobs, shift_labels
from qwen3vl_jax.model import attention, transformer
from qwen3vl_jax.model.structs import Batch, Features, Params, VisionInputs, check_call
from qwen3vl_jax.model.text import decode_layers
from qwen3vl_jax.model.transformer import full_attention, lm_logits, run_decoder
from qwen3vl_jax.model.vision import embed_patches, run_block

SPAN = 512  # tokens whose logits over the vocabulary are held at once


def score(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """Log-probability of each labelled token after everything before it: float32 [B T].

    batch.labels [B T] holds the tokens to score and -100 elsewhere (Processor's continuations=
    makes them), where the result is 0. Logits exist for 512 positions at a time. Raises InputError for a
    batch without labels and, outside of jit, for a row that is not finite: so do `embed` and `rerank`.
    """
    check_call(params, cfg, batch=batch)
    if batch.labels is None:
        raise InputError("score: the batch has no labels; make it with continuations= or labels=")
    x, labels = _residual(params, cfg, batch, features), shift_labels(batch.labels)
    x, labels, (rows, width) = x[:, :-1], labels[:, :-1], labels[:, :-1].shape
    pad = (0, 0), (0, -width % SPAN if width > SPAN else 0)
    labels = jnp.pad(labels, pad, constant_values=IGNORE_INDEX)
    x, count = jnp.pad(x, (*pad, (0, 0))), max(labels.shape[1] // SPAN, 1)

    def spans(a):
        return jnp.moveaxis(a.reshape(rows, count, -1, *a.shape[2:]), 1, 0)

    def one(span):
        return label_logprobs(lm_logits(params, cfg, span[0]), span[1])[0]

    found = jax.lax.map(one, (spans(x), spans(labels)))
    found = jnp.moveaxis(found, 0, 1).reshape(rows, -1)[:, :width]
    return check_finite("score", jnp.pad(found, ((0, 0), (1, 0))))


def embed(
    params: Params,
    cfg: Config,
    batch: Batch,
    *,
    dims: int | None = None,
    features: Features | None = None,
) -> jax.Array:
    """Unit vectors of whole rows, float32 [B D]: the last token's state after the final norm.

    dims (static) keeps the first of them and normalises again (Matryoshka). Source: Qwen3-VL-Embedding.
    Raises InputError for dims that the model does not have.
    """
    check_call(params, cfg, batch=batch)
    check_dims(cfg, dims)
    x = _residual(params, cfg, batch, features)
    x = transformer.at_last_attended(x, batch.segment_ids)
    x = transformer.final_norm(params, cfg, x).astype(jnp.float32)
    whole = jnp.isfinite(x).all(axis=-1, keepdims=True)  # what dims leaves out too
    x = jnp.where(whole, x, jnp.nan)[:, :dims]
    return check_finite("embed", x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12))


def check_dims(cfg: Config, dims: int | None) -> None:
    """Raises InputError for dims that a vector of `embed` does not have."""
    if dims is not None and not 1 <= dims <= cfg.text.hidden_size:
        raise InputError(f"embed: dims is {dims}, expected 1 to {cfg.text.hidden_size}")


def rerank(
    params: Params,
    cfg: Config,
    batch: Batch,
    yes_no: tuple[int, int],
    *,
    features: Features | None = None,
) -> jax.Array:
    """How well each row's document answers its query, float32 [B] from 0 to 1.

    The sigmoid of the logit of "yes" less that of "no" (token ids) at the end. Source: Qwen3-VL-Reranker.
    """
    check_call(params, cfg, batch=batch)
    if any(isinstance(i, int) and not 0 <= i < cfg.text.vocab_size for i in yes_no):
        raise InputError(f"yes_no: got {yes_no}, expected ids in the vocabulary")
    x = _residual(params, cfg, batch, features)
    logits = lm_logits(params, cfg, transformer.at_last_attended(x, batch.segment_ids))
    yes, no = yes_no
    more = logits[:, yes] - logits[:, no]
    # Infinity is no certainty.
    scores = jnp.where(jnp.isfinite(more), jax.nn.sigmoid(more), jnp.nan)
    return check_finite("rerank", scores)


def check_finite(what: str, found: jax.Array) -> jax.Array:
    """The numbers [B ..] themselves; raises InputError naming a row that is not finite, if not traced."""
    if isinstance(found, Tracer):
        return found
    wrong = ~np.isfinite(np.asarray(found)).reshape(len(found), -1).all(axis=1)
    if wrong.any():
        raise InputError(not_finite(f"{what}, row {int(np.argmax(wrong))}"))
    return found


def _residual(params, cfg, batch, features):
    return run_decoder(params, cfg, batch, features, full_attention(batch))[0]


def hidden_states(
    params: Params,
    cfg: Config,
    batch: Batch,
    *,
    features: Features | None = None,
    intervene: Callable | None = None,
) -> jax.Array:
    """The residual [L+1 B T D]: embeddings with vision features, then after each layer and DeepStack.

    Without the final norm (see `last_hidden_state`), as transformers 4.57.1 returns it. intervene: as in
    `forward`, seen in the states.
    """
    check_call(params, cfg, batch=batch)
    x, deepstack = transformer.embed_tokens(params, cfg, batch, features)
    options = {"deepstack": deepstack, "collect": lambda residual, *_: residual}
    options["intervene"] = intervene
    given = params["layers"], cfg.text, x, batch.positions, full_attention(batch)
    _, after = decode_layers(*given, **options)
    return jnp.concatenate([x[None], jnp.stack(after) if isinstance(after, list) else after])


def last_hidden_state(
    params: Params, cfg: Config, batch: Batch, *, features: Features | None = None
) -> jax.Array:
    """The decoder's output [B T D] after the final norm; values at padding tokens mean nothing."""
    check_call(params, cfg, batch=batch)
    return transformer.final_norm(params, cfg, _residual(params, cfg, batch, features))


def attentions(
    params: Params,
    cfg: Config,
    batch: Batch,
    *,
    features: Features | None = None,
    layers: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
) -> jax.Array:
    """Attention probabilities [L B N T T] of every layer, in the dtype of the parameters.

    layers: indices of those to give, negative ones from the last. queries: indices [m] of the tokens that
    attend, for [L B N m T]. The other queries' are never held, nor, of per-layer lists, the other layers'.
    Raises InputError for an index that there is not.
    """
    check_call(params, cfg, batch=batch)
    count, (lo, hi) = cfg.text.num_hidden_layers, attention.causal_ranges(batch.segment_ids)
    wanted = _indices("layers", layers, count)
    at = np.array(_indices("queries", queries, lo.shape[1]))
    attend_fn = full_attention(batch)

    def attend_and_keep(i, q, k, v):
        kept = None
        if not isinstance(i, int) or i in wanted:
            kept = attention_probs(q[:, at], k, lo[:, at], hi[:, at])
        return attend_fn(i, q, k, v)[0], kept

    _, probs = run_decoder(params, cfg, batch, features, attend_and_keep)
    return jnp.stack([probs[i] for i in wanted])


def _indices(name: str, given: Sequence[int] | None, count: int) -> list[int]:
    """Indices from 0 to count - 1, all of them for None. Raises InputError."""
    found = list(range(count)) if given is None else [int(i) for i in given]
    if not found or not all(-count <= i < count for i in found):
        raise unexpected(name, shown(given), f"indices from {-count} to {count - 1}")
    return [i % count for i in found]


def vision_states(params: Params, cfg: Config, vision: VisionInputs) -> jax.Array:
    """The vision tower's residual [depth+1 W P Dv]: embedded patches, then after each block.

    Before any merger; `vision_encode` gives what comes behind them. W is 1 for one row of patches.
    """
    check_call(params, cfg, vision=vision)
    p, c = params.get("vision", params), cfg.vision
    dtype, blocks = p["patch"]["weight"].dtype.name, p["blocks"]
    if not isinstance(blocks, (list, tuple)):
        blocks = [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(c.depth)]
    x, *given = embed_patches({**p, "blocks": None}, c, vision, dtype)
    segments, states = attention.host_bound(vision.lo, vision.hi, vision.frames), [x]
    for layer in blocks:
        states.append(run_block(c, segments, layer, states[-1], *given))
    return jnp.stack(states)


def attention_probs(q: jax.Array, k: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Attention probabilities [B N T S] of keys [B S K H], in the dtype of q; `attend` never holds them."""
    grouped = attention.group_heads(q, k.shape[2])
    scores = attention.attention_scores(grouped, k.swapaxes(1, 2))
    visible = attention.visible_keys(lo, hi, jnp.arange(k.shape[1]))
    scores = jnp.where(visible, scores, attention.NEG)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return probs.reshape(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
