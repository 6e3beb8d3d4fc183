"""int4 weights: codes and scales of groups, saved and loaded again."""

import hf_files as hf
import jax.numpy as jnp
import numpy as np
import pytest
from released import from_hf
from test_int8 import at_path, bits, is_quantized

from qwen3vl_jax import Config, InputError
from qwen3vl_jax.checkpoint import quantize
from qwen3vl_jax.checkpoint.device_load import Source, weights_bytes
from qwen3vl_jax.checkpoint.name_map import param_specs
from qwen3vl_jax.checkpoint.save import save_params
from qwen3vl_jax.convert.to_hf import to_hf
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.loading import load
from qwen3vl_jax.model.quantized import dequantize


@pytest.mark.parametrize("moe", [False, True])
def test_int4_of_groups_of_input_channels(moe, tmp_path, monkeypatch):
    """Codes to half a step of their group's scale, 16 bits and int8 elsewhere; saved, and loaded again."""
    monkeypatch.setattr(quantize, "GROUP", 8)
    raw, tensors = hf.small(moe=moe)
    source, cfg = hf.write(tmp_path / "hf", raw, tensors), Config.from_hf(raw)
    params, _ = load(source, weights="int4")
    by_path, whole = {row.path: row for row in param_specs(cfg)}, from_hf(cfg, tensors)
    seen = set()
    for path, row in by_path.items():
        w, want = at_path(params, path), np.asarray(at_path(whole, path), np.float32)
        if not is_quantized(w):
            continue
        seen.add(path[0])
        grouped, last = path[0] == "layers", row.summed[-1]
        assert w.values.dtype == ("int4" if grouped else "int8")
        assert w.scale.shape[last] == (want.shape[last] // 8 if grouped else 1)
        step = np.repeat(np.asarray(w.scale), 8, axis=last) if grouped else np.asarray(w.scale)
        assert (np.abs(np.asarray(dequantize(w, jnp.float32)) - want) <= 0.501 * step).all()
    assert {"layers", "embed"} <= seen
    save_params(tmp_path / "saved", params, cfg)
    to_orbax(source, tmp_path / "orbax", weights="int4")
    for again in ("saved", "orbax"):
        assert bits(load(tmp_path / again)[0]) == bits(params)


def test_files_have_no_form_for_it(tmp_path):
    """The way back says so in one line."""
    to_orbax(hf.write(tmp_path / "hf", *hf.small()), tmp_path / "orbax", weights="int4")
    with pytest.raises(InputError, match="got int4 weights, which Hugging Face files cannot hold"):
        to_hf(tmp_path / "orbax", tmp_path / "back")


def test_a_gpu_holds_two_codes_in_a_byte(tmp_path):
    """In the bytes by which a mesh is chosen."""
    source = hf.write(tmp_path / "hf", *hf.small())
    cfg = Config.from_hf(source)
    few, all_of = (weights_bytes(Source(source, cfg, kind)) for kind in ("int4", "int8"))
    layers = [row for row in quantize.quantized_params(cfg).values() if row.path[0] == "layers"]
    codes = sum(int(np.prod(row.shape)) for row in layers)
    more = sum(
        4 * int(np.prod(quantize.scale_shape(row, "int4")) - np.prod(row.channels))
        for row in layers
    )
    assert few == all_of - codes // 2 + more
