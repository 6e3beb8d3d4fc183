"""The references themselves: used as their own generate() does, the same from release to release."""

import golden_io
import numpy as np
import pytest
import reference
import tiny
import torch

KINDS = [pytest.param(False, id="dense"), pytest.param(True, id="moe")]


@pytest.mark.parametrize("moe", KINDS)
def test_greedy_loop_is_generate(moe):
    """Explicit positions give what transformers' generate gives for a mixed, left-padded batch."""
    ref = reference.build("base", moe)
    inputs = reference.mixed(ref)
    tokens, logits = reference.greedy(ref, inputs, 12)
    out = ref.model().generate(
        **{name: torch.from_numpy(a) for name, a in inputs.items()},
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=-1,
        pad_token_id=tiny.PAD,
        output_logits=True,
        return_dict_in_generate=True,
    )
    np.testing.assert_array_equal(tokens, out.sequences[:, inputs["input_ids"].shape[1] :])
    np.testing.assert_allclose(logits, torch.stack(out.logits, 1), atol=1e-4)


@pytest.mark.parametrize("rope", [name for name in tiny.ROPES if name not in ("default", "plain")])
def test_rope_types_matter_and_their_limit_lies_between_the_prompts(rope):
    """Scaled ropes answer otherwise than the default one; "short" ends below the limit."""
    scaled, plain = reference.build("base", False, rope), reference.build("base", False, "plain")
    for row, above in (("short", False), ("long", True)):
        inputs = tiny.inputs(scaled.config, row)
        assert (reference.positions(scaled, inputs)[0].max() >= tiny.ROPE_LIMIT) == above
        same = np.allclose(
            reference.logits(scaled, inputs), reference.logits(plain, inputs), atol=1e-3
        )
        assert same == (rope == "dynamic" and not above)


@pytest.mark.parametrize("name", golden_io.FILES)
def test_transformers_4_and_5_agree(name):
    """The kept outputs of 4.57.1 are those of the installed release, where they mean the same."""
    golden = golden_io.load(name)
    ref = reference.build("golden", golden_io.FILES[name], seed=golden_io.SEED)
    real = golden.inputs["attention_mask"].astype(bool)
    found = reference.logits(ref, golden.inputs)
    np.testing.assert_allclose(found[real], golden.outputs["logits"][real], atol=1e-4)
    positions, _ = reference.positions(ref, golden.inputs)
    np.testing.assert_array_equal(positions[:, real], golden.outputs["position_ids"][:, real])
    np.testing.assert_array_equal(
        reference.greedy(ref, golden.inputs, 32)[0], golden.outputs["greedy"]
    )


@pytest.mark.parametrize("layout", ["released", "v5"])
@pytest.mark.parametrize("moe", KINDS)
def test_saved_directories_open_in_transformers(layout, moe, tmp_path):
    """Both layouts that save writes are the same model to transformers."""
    ref = reference.build("base", moe)
    opened = reference.open_hf(reference.save(ref, tmp_path / "hf", layout), moe)
    kept = ref.model().state_dict()
    for name, tensor in opened.state_dict().items():
        torch.testing.assert_close(tensor, kept[name], rtol=0, atol=0)
