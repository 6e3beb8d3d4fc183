"""Prompts with clips in the default form, against what transformers 4.57.1 made of them."""

import chats
import golden_io
import numpy as np
import pytest
import toy_checkpoint as toy

import qwen3vl_jax as q3
from qwen3vl_jax.processing.processor import Processor


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    return Processor.from_pretrained(toy.save(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def golden():
    return golden_io.load_prompts()


@pytest.mark.parametrize("name", chats.FILMED)
def test_ids_grids_and_positions(proc, golden, name):
    """Frames and their times stand where the template's vision_start .. vision_end pair was."""
    kept, tools = golden[name], chats.tools_of(name)
    found = proc.inputs(chats.FILMED[name], tools=tools, **chats.free(chats.FILMED[name]))
    for key in golden_io.PROMPT_KEYS:
        assert (key in found) == (key in kept)
        if key in kept:
            np.testing.assert_array_equal(found[key], kept[key], err_msg=key)
    arrays = [found.get(key) for key in golden_io.PROMPT_KEYS]
    positions, delta = q3.rope_index(proc.config, *arrays)
    np.testing.assert_array_equal(positions, kept["position_ids"])
    np.testing.assert_array_equal(delta, kept["rope_deltas"][:, 0])
    batch = proc(chats.FILMED[name], tools=tools, **chats.free(chats.FILMED[name]))
    np.testing.assert_array_equal(batch.positions[:, :, : positions.shape[2]], positions)
    text = proc.decode(found["input_ids"][0])
    for used in found["video_metadata"]:
        assert "".join(f"<{t:.1f} seconds>" for t in used.timestamps) in text


def test_the_form_of_5_10_has_one_more_pair_a_clip(proc, golden):
    wrapped = Processor(**{**vars(proc), "wrap_clips": True})
    for name, kept in golden.items():
        ids, clips = kept["input_ids"][0], len(kept["video_grid_thw"])
        options = {"tools": chats.tools_of(name), **chats.free(chats.FILMED[name])}
        found = wrapped.inputs(chats.FILMED[name], **options)
        longer = found["input_ids"][0]
        assert len(longer) == len(ids) + 2 * clips
        for token in (proc.config.vision_start_token_id, proc.config.vision_end_token_id):
            assert (longer == token).sum() == (ids == token).sum() + clips
