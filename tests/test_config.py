"""Config.from_hf: what is read, what has a default, what is refused and how."""

import copy
import dataclasses
import functools

import pytest
import tiny

from qwen3vl_jax.config import RELEASED, Config
from qwen3vl_jax.config_checks import warn_once
from qwen3vl_jax.errors import InputError, shown
from qwen3vl_jax.rope_config import ROPE_TYPES


def changed(where="text_config", moe=False, **changes):
    """A config dict with some keys changed, or deleted where the value is `...`."""
    raw = copy.deepcopy(tiny.config_dict("base", moe))
    part = raw[where] if where else raw
    for key, value in changes.items():
        if value is ...:
            del part[key]
        else:
            part[key] = value
    return raw


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes_survive_the_round_trip(size):
    cfg = Config.named(size.upper())
    assert Config.from_hf(cfg.to_hf()) == cfg
    assert (cfg.text.num_experts > 0) == ("a" in size) and hash(cfg) == hash(Config.named(size))


@pytest.mark.parametrize("rope", tiny.ROPES)
@pytest.mark.parametrize("moe", [False, True])
def test_every_rope_survives_the_round_trip(rope, moe):
    cfg = Config.from_hf(tiny.config_dict("base", moe, rope))
    assert Config.from_hf(cfg.to_hf()) == cfg
    assert cfg.text.rope.rope_type in ROPE_TYPES


def test_the_form_of_transformers_5():
    raw = changed(rope_scaling=..., rope_theta=..., moe=True, num_experts=..., num_local_experts=7)
    section = {"mrope_section": [3, 3, 2], "rope_type": "default", "rope_theta": 7000.0}
    raw["text_config"]["rope_parameters"] = section
    raw["text_config"]["tie_word_embeddings"] = True  # transformers 5 writes it; the top level wins
    raw["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    assert Config.from_hf(raw) == Config.from_hf(tiny.config_dict("base", moe=True))


def test_defaults_of_transformers_4_57_1():
    gone = "rope_theta rms_norm_eps hidden_act attention_bias max_position_embeddings"
    gone = dict.fromkeys(f"{gone} num_experts_per_tok".split(), ...)
    raw = changed(**gone, moe=True)
    raw["vision_config"].pop("hidden_act")
    raw.pop("tie_word_embeddings")
    cfg = Config.from_hf(raw)
    assert cfg.text.rope.theta == 5_000_000 and cfg.text.rms_norm_eps == 1e-6
    assert cfg.text.hidden_act == "silu" and not cfg.text.attention_bias
    assert cfg.text.max_position_embeddings == 128_000 and cfg.text.num_experts_per_tok == 4
    assert cfg.vision.hidden_act == "gelu_pytorch_tanh" and not cfg.tie_word_embeddings


def test_null_head_dim_and_kv_heads():
    raw = changed(head_dim=None, num_key_value_heads=None, num_attention_heads=5)
    raw["text_config"]["rope_scaling"]["mrope_section"] = [2, 1, 1]
    text = Config.from_hf(raw).text
    assert (text.head_dim, text.num_key_value_heads) == (8, 5)


def test_keys_that_change_nothing_are_ignored():
    raw = changed(use_sliding_window=True, norm_topk_prob=False, anything={"else": 1})
    assert Config.from_hf(raw) == Config.from_hf(tiny.config_dict())


SHAPES = {
    "text_config": """
        vocab_size hidden_size intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads head_dim
    """.split(),
    "vision_config": """
        depth hidden_size intermediate_size num_heads in_channels
        patch_size temporal_patch_size spatial_merge_size out_hidden_size
        num_position_embeddings deepstack_visual_indexes
    """.split(),
}


@pytest.mark.parametrize(("where", "key"), [(w, k) for w, keys in SHAPES.items() for k in keys])
def test_an_absent_key_that_fixes_a_shape_is_refused(where, key):
    with pytest.raises(InputError, match=rf"{where}\.{key} is absent"):
        Config.from_hf(changed(where, **{key: ...}))


@pytest.mark.parametrize("key", ["num_experts", "moe_intermediate_size"])
def test_an_absent_expert_shape_is_refused(key):
    with pytest.raises(InputError, match=f"{key} is absent"):
        Config.from_hf(changed(moe=True, **{key: ...}))


def scaled(**keys):
    return {"rope_type": "default", "mrope_section": [3, 3, 2], **keys}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (changed(rope_scaling=scaled(rope_type="su")), ["rope_type", "'su'", "yarn"]),
        (
            changed(rope_scaling=scaled(mrope_interleaved=False)),
            ["mrope_interleaved", "False", "true"],
        ),
        (changed(rope_scaling=scaled(mrope_section=[4, 4])), ["mrope_section", "[4, 4]"]),
        (changed(rope_scaling=scaled(rope_type="linear")), ["factor is absent", "linear"]),
        (changed(rope_scaling=scaled(partial_rotary_factor=0.5)), ["partial_rotary_factor", "0.5"]),
        (changed(hidden_act="mish"), ["text_config.hidden_act", "mish", "silu"]),
        (changed("vision_config", hidden_act="mish"), ["vision_config.hidden_act", "mish"]),
        (changed("vision_config", hidden_act=0), ["vision_config.hidden_act: got 0"]),
        (
            changed("vision_config", deepstack_visual_indexes=[1, 1]),
            ["deepstack", "[1, 1]", "increasing"],
        ),
        (changed("vision_config", deepstack_visual_indexes=[2, 1]), ["deepstack", "increasing"]),
        (changed("vision_config", deepstack_visual_indexes=[1, 6]), ["deepstack", "depth - 1 = 5"]),
        (
            changed("vision_config", deepstack_visual_indexes=list(range(6))),
            ["6 taps", "at most", "5"],
        ),
        (
            changed("vision_config", num_position_embeddings=80),
            ["num_position_embeddings", "square"],
        ),
        (changed("vision_config", out_hidden_size=44), ["out_hidden_size", "44", "40"]),
        (changed("vision_config", num_heads=5), ["vision_config.hidden_size", "36"]),
        (changed(num_key_value_heads=4), ["num_attention_heads 6", "num_key_value_heads 4"]),
        (changed(hidden_size=-4), ["hidden_size", "-4"]),
        (changed(hidden_size="40"), ["hidden_size", "'40'"]),
        (changed(moe=True, mlp_only_layers=[0]), ["mlp_only_layers", "[0]"]),
        (changed(moe=True, decoder_sparse_step=2), ["decoder_sparse_step", "2"]),
        (changed(moe=True, num_experts_per_tok=9), ["num_experts_per_tok", "9", "7"]),
        (changed("", model_type="llava"), ["model_type", "llava"]),
        (changed("", text_config=...), ["text_config"]),
    ],
)
def test_what_is_not_implemented_is_refused_with_key_found_and_allowed(raw, words):
    with pytest.raises(InputError) as error:
        Config.from_hf(raw)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def yarn(**keys):
    return changed(rope_scaling=scaled(rope_type="yarn", factor=2.0, **keys))


@pytest.mark.parametrize(
    ("raw", "key", "found", "expected"),
    [
        *(
            (changed(rms_norm_eps=v), "text_config.rms_norm_eps", v, ">= 0")
            for v in ("x", -1.0, float("nan"), 10**400, True)
        ),
        *(
            (changed(rope_theta=v), "text_config.rope_theta", v, "> 0")
            for v in ("x", 0, float("inf"))
        ),
        (changed(rope_scaling=scaled(rope_theta="x")), "rope_scaling.rope_theta", "x", "> 0"),
        (changed(initializer_range="x"), "text_config.initializer_range", "x", ">= 0"),
        (changed(rope_scaling="yarn"), "text_config.rope_scaling", "yarn", "an object"),
        (changed(rope_parameters=5), "text_config.rope_parameters", 5, "an object"),
        (changed(rope_scaling=scaled(mrope_section=5)), "mrope_section", 5, "a list"),
        (changed(rope_scaling=scaled(mrope_section=["a", 1, 2])), "mrope_section", "a", "integer"),
        *(
            (changed(rope_scaling=scaled(rope_type="linear", factor=v)), "factor", v, "> 0")
            for v in ("x", 0, -2)
        ),
        (
            yarn(original_max_position_embeddings="x"),
            "original_max_position_embeddings",
            "x",
            ">= 1",
        ),
        (yarn(beta_fast="x"), "rope_scaling.beta_fast", "x", "> 0"),
        (yarn(truncate="no"), "rope_scaling.truncate", "no", "true or false"),
        (
            changed(rope_scaling=scaled(rope_type="longrope", short_factor=5, long_factor=[1])),
            "short_factor",
            5,
            "a list",
        ),
        (changed(attention_bias="no"), "text_config.attention_bias", "no", "true or false"),
        (changed(hidden_size=[[1]]), "text_config.hidden_size", [1], "integer"),
        (changed("", tie_word_embeddings="false"), "tie_word_embeddings", "false", "true or false"),
        *(
            (changed(eos_token_id=v), "eos_token_id", v, "token id")
            for v in (["x"], "x", True, -1, {})
        ),
        (changed("vision_config", deepstack_visual_indexes=5), "deepstack", 5, "a list"),
        (
            changed("vision_config", deepstack_visual_indexes=[True]),
            "deepstack",
            [True],
            "increasing",
        ),
        (
            changed("vision_config", rope_parameters=5),
            "vision_config.rope_parameters",
            5,
            "an object",
        ),
        (changed("vision_config", rope_parameters={"rope_theta": 0}), "rope_theta", 0, "> 0"),
        (
            changed("vision_config", initializer_range=-1),
            "vision_config.initializer_range",
            -1,
            ">= 0",
        ),
    ],
)
def test_malformed_values_are_refused_with_key_found_and_expected(raw, key, found, expected):
    with pytest.raises(InputError) as error:
        Config.from_hf(raw)
    message = str(error.value)
    assert f"{key}" in message and f": got {shown(found)}, expected " in message, message
    assert expected in message.split("expected", 1)[1], message


MISPLACED = {
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 262144,
    },
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 3.0},
    "rope_theta": 1e6,
    "max_position_embeddings": 1_000_000,
    "hidden_size": 64,
}


@pytest.mark.parametrize("key", MISPLACED)
def test_settings_of_the_decoder_at_the_top_are_said(caplog, key):
    """As in transformers they are not used; a warning says where they belong, once."""
    warn_once.cache_clear()
    raw = changed("", **{key: MISPLACED[key]})
    assert Config.from_hf(raw) == Config.from_hf(raw) == Config.from_hf(changed(""))
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"{key} " in line and "top of config.json" in line and "text_config" in line
    caplog.clear()
    Config.from_hf(changed("", vocab_size=320, rope_scaling=None))
    assert not caplog.records


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"factor": 2.0}, "factor"),
        ({"rope_type": "yarn", "orginal_max_position_embeddings": 8}, "orginal_max"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}, None),
    ],
)
def test_keys_of_a_rope_that_change_nothing_are_said(caplog, keys, named):
    warn_once.cache_clear()
    Config.from_hf(changed(rope_scaling=scaled(**keys)))
    assert [named in r.getMessage() for r in caplog.records] == [True] * (named is not None)


# Values that no key may have, or that only some may: none ends in a traceback.
STRANGE = (
    None,
    True,
    -1,
    0,
    1.5,
    10**39,
    1e308,
    5e-324,
    "x",
    [],
    [[]],
    {},
    {"a": 1},
    ["x"] * 10_000,
)


@pytest.mark.parametrize("rope", ["yarn", "longrope", "llama3"])
def test_strange_values_are_one_short_line_whatever_the_key(rope):
    base = tiny.config_dict("base", rope == "yarn", rope)
    places = [((), key) for key in base]
    places += [((part,), key) for part in ("text_config", "vision_config") for key in base[part]]
    places += [(("text_config", "rope_scaling"), k) for k in base["text_config"]["rope_scaling"]]
    for path, key in places:
        for value in STRANGE:
            raw = copy.deepcopy(base)
            part = functools.reduce(lambda d, k: d[k], path, raw)
            part[key] = value
            try:
                hash(Config.from_hf(raw))
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 300


@pytest.mark.parametrize("key", ["num_hidden_layers", "depth", "num_experts"])
def test_layers_without_end_are_refused(key):
    """Before anything lists their parameters."""
    raw = changed("vision_config" if key == "depth" else "text_config", moe=True, **{key: 10**9})
    with pytest.raises(InputError, match=f"{key}: got 1000000000, expected at most"):
        Config.from_hf(raw)


def test_rope_scaling_counts_whole_where_rope_parameters_is_there_too():
    # As transformers 5.23 does: nothing of rope_parameters is mixed in, and an empty one is none.
    other = scaled(rope_type="linear", factor=3.0, rope_theta=7.0, beta_fast=5.0)
    both = yarn()
    both["text_config"]["rope_parameters"] = other
    assert Config.from_hf(both) == Config.from_hf(yarn())
    empty = Config.from_hf(changed(rope_scaling={}, rope_parameters=other, rope_theta=11.0))
    assert (empty.text.rope.rope_type, empty.text.rope.theta) == ("linear", 7.0)
    inside = Config.from_hf(changed(rope_scaling=scaled(rope_theta=3.0), rope_theta=11.0))
    assert inside.text.rope.theta == 3.0


def test_initializer_range_of_both_towers():
    assert Config.named("2b").vision.initializer_range == 0.02
    raw = changed("vision_config", initializer_range=0.5)
    raw["text_config"]["initializer_range"] = 0.25
    cfg = Config.from_hf(raw)
    assert (cfg.vision.initializer_range, cfg.text.initializer_range) == (0.5, 0.25)
    assert Config.from_hf(cfg.to_hf()) == cfg
    assert cfg.to_hf()["vision_config"]["initializer_range"] == 0.5


def test_files(tmp_path):
    for name, content in (("missing", None), ("broken", "{"), ("list", "[]")):
        path = tmp_path / name
        path.mkdir()
        if content is not None:
            (path / "config.json").write_text(content)
        with pytest.raises(InputError, match="config"):
            Config.from_hf(path)
    with pytest.raises(InputError, match=r"9b.*released sizes: 2b, 4b"):
        Config.named("9b")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.named("2b").text.vocab_size = 1  # pyright: ignore
