"""New tokens: the same ids here and in transformers, rows that start from the mean."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import toy_checkpoint as toy
from transformers import Qwen2Tokenizer

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.quantized import Quantized
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.training.new_tokens import add_tokens, new_rows

NAMES = ["<point>", "</point>", "<|north|>"]


@pytest.mark.parametrize("form", ["json", "vocab", "old"])
def test_ids_are_the_first_free_ones_in_transformers_too(tmp_path, form):
    """Old tokens keep their ids; text with the new ones is cut alike on both sides."""
    toy.save_tokenizer(tmp_path / "old", form)
    used = toy.config()["text_config"]["vocab_size"]
    ids = add_tokens(tmp_path / "old", tmp_path / "new", NAMES, used + 5)
    assert ids == [used, used + 1, used + 2]
    written = {path.name for path in (tmp_path / "new").iterdir()}
    for path in (tmp_path / "old").iterdir():
        if path.name not in written:
            (tmp_path / "new" / path.name).write_bytes(path.read_bytes())
    before, ours = (Tokenizer.from_pretrained(tmp_path / n) for n in ("old", "new"))
    theirs = Qwen2Tokenizer.from_pretrained(tmp_path / "new")
    assert [ours.id_of(n) for n in NAMES] == ids == theirs.convert_tokens_to_ids(NAMES)
    text = "a <point>3, 4</point><|im_end|> b <|north|><tool_call>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text.replace("<|im_end|>", "")
    assert before.added.items() < ours.added.items()
    again = tmp_path / "new"
    assert add_tokens(again, again, ["<again>"], used + 5) == [used + 3]  # in place, behind


@pytest.mark.parametrize(
    ("names", "rows", "words"),
    [
        (["<a>", "<a>"], 9, "twice"),
        ([""], 9, "no name"),
        ([" <a>"], 9, "no name"),
        (["<|im_end|>"], 9, "token already"),
        (["<a>", "<b>"], 1, "rows for 1 more"),
    ],
)
def test_names_that_cannot_be_added(tmp_path, names, rows, words):
    toy.save_tokenizer(tmp_path / "old")
    used = toy.config()["text_config"]["vocab_size"]
    with pytest.raises(InputError, match=f"train.new_tokens.*{words}"):
        add_tokens(tmp_path / "old", tmp_path / "new", names, used + rows)
    assert not (tmp_path / "new").exists()


def test_no_file_lists_added_tokens(tmp_path):
    """A vocabulary without any list of added tokens is refused by name."""
    toy.save_tokenizer(tmp_path, "vocab")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": settings["tokenizer_class"]})
    )
    with pytest.raises(InputError, match="lists added tokens"):
        add_tokens(tmp_path, tmp_path / "new", ["<a>"], 10_000)


def test_rows_start_from_the_mean_of_those_in_use():
    """Embedding and head each from its own; spare rows before and behind stay as they are."""
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(10, 4)), jnp.bfloat16) for n in ("embed", "head")}
    new = new_rows({**params, "norm": jnp.ones(4)}, [6, 7])
    for name, table in params.items():
        old, got = (np.asarray(x, np.float32) for x in (table, new[name]))
        np.testing.assert_allclose(got[6:8], np.tile(old[:6].mean(0), (2, 1)), rtol=2**-8)
        np.testing.assert_array_equal(np.delete(got, [6, 7], 0), np.delete(old, [6, 7], 0))
    assert new["embed"].dtype == jnp.bfloat16 and new_rows(params, []) is params
    eight = Quantized(jnp.ones((10, 4), jnp.int8), jnp.ones((10, 1)))
    with pytest.raises(InputError, match=r"embed.*8 bits"):
        new_rows({"embed": eight}, [6])
