"""Clips beside transformers' video processor, Qwen3VLProcessor and models, live."""

import warnings

import chats
import clips
import numpy as np
import ours
import pytest
import reference
import tiny
import torchvision_shim  # noqa: F401
import toy_checkpoint as toy
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import qwen3vl_jax as q3
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.video_patches import VideoSettings, smart_resize_video, video_to_patches

BOUND = 2e-5  # of the largest magnitude
RELEASED = {
    "size": {"shortest_edge": 4096, "longest_edge": 25165824},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "cap_pixels_per_frame": False,
}


def transformed(frames, metadata, settings, **options):
    """(rows, grid, indices, timestamps) of transformers for frames [T H W 3]."""
    processor = Qwen3VLVideoProcessor(**{**RELEASED, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = processor(
            videos=[frames],
            video_metadata=[dict(metadata)],
            return_tensors="np",
            return_metadata=True,
            **options,
        )
    (used,) = out["video_metadata"]
    indices = [int(i) for i in used.frames_indices]
    times = Qwen3VLProcessor._calculate_timestamps(None, list(indices), used.fps)
    return out["pixel_values_videos"], out["video_grid_thw"][0], indices, times


def test_50_random_clips():
    """Indices, sizes, grids and times equal; pixels as near as PIL's resizing is to torchvision's."""
    rng = np.random.default_rng(0)
    differences, near = [], []
    for number in range(50):
        count = int(rng.integers(2, 70))
        height, width = (int(side) for side in rng.integers(9, 150, 2))
        frames = clips.waves(count, height, width, seed=number)
        metadata = {
            "fps": float(rng.choice([5, 12.5, 23.976, 25, 30, 59.94])),
            "total_num_frames": count,
        }
        options = [
            {},
            {"fps": float(rng.uniform(0.3, 12))},
            {"num_frames": int(rng.integers(2, count + 9))},
            {"do_sample_frames": False},
            {"fps": 3.0, "min_frames": 2, "max_frames": 9},
        ][number % 5]
        budget = {"longest_edge": int(rng.choice([25165824, 40000, 150000])), "shortest_edge": 4096}
        cap = bool(number % 7 == 3)
        theirs = {"size": budget, "cap_pixels_per_frame": cap, "fps": options.get("fps", 2)}
        if "num_frames" in options:
            theirs["fps"] = None
        theirs |= {k: options[k] for k in ("min_frames", "max_frames") if k in options}
        call = {k: options[k] for k in ("num_frames", "do_sample_frames") if k in options}
        if call.get("do_sample_frames") is False:
            metadata["frames_indices"] = list(range(0, 2 * count, 2))
        rows, grid, indices, times = transformed(frames, metadata, theirs, **call)
        settings = VideoSettings().override(size=budget, cap_pixels_per_frame=cap)
        given = [Image.fromarray(frame) for frame in frames] if number % 2 else frames
        ours, found, used = video_to_patches(given, settings, video_metadata=metadata, **options)
        assert found == tuple(grid) and list(used.indices) == indices, (number, options)
        assert [f"{t:.1f}" for t in used.timestamps] == [f"{t:.1f}" for t in times]
        difference = np.abs(ours - rows)
        differences.append(difference.mean())
        near.append((difference <= 2 / 255 + 1e-6).mean())  # one 8-bit level is 2/255 wide
    assert np.mean(differences) <= 0.003 and np.mean(near) >= 0.95


def test_smart_resize_equals():
    from transformers.models.qwen3_vl import video_processing_qwen3_vl as theirs

    rng = np.random.default_rng(1)
    for _ in range(3000):
        count, height, width = int(rng.integers(2, 800)), *map(int, rng.integers(1, 3000, 2))
        limits = (int(rng.integers(1024, 10**5)), int(rng.integers(2 * 10**5, 3 * 10**7)))
        if max(height, width) < 150 * min(height, width) and min(height, width) >= 32:
            expected = theirs.smart_resize(count, height, width, 2, 32, *limits)
            assert smart_resize_video(count, height, width, 32, 2, *limits) == expected


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    directory = toy.save(tmp_path_factory.mktemp("toy"))
    settings = {k: v for k, v in toy.IMAGES.items() if not k.endswith("_type")}
    theirs = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**settings),
        tokenizer=Qwen2Tokenizer.from_pretrained(directory),
        video_processor=Qwen3VLVideoProcessor(**{**RELEASED, "patch_size": settings["patch_size"]}),
        chat_template=toy.TEMPLATE,
    )
    ours = Processor.from_pretrained(directory)
    return Processor(**{**vars(ours), "wrap_clips": True}), theirs


def their_inputs(theirs, *names):
    """What transformers makes of conversations of FILMED, padded left."""
    rows = [chats.FILMED[name] for name in names]
    prompts = [
        theirs.apply_chat_template(
            row, tools=chats.tools_of(name), tokenize=False, add_generation_prompt=True
        )
        for name, row in zip(names, rows)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs(
            text=prompts,
            padding=True,
            padding_side="left",
            return_tensors="np",
            return_metadata=True,
            **chats.media([message for row in rows for message in row]),
        )


KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")


@pytest.mark.parametrize("name", chats.FILMED)
def test_prompts(both, name):
    """Ids, kinds, grids and times of each conversation, in the form of 5.10 and later."""
    proc, theirs = both
    options = {"tools": chats.tools_of(name), **chats.free(chats.FILMED[name])}
    found = proc.inputs(chats.FILMED[name], **options)
    expected = their_inputs(theirs, name)
    for key in KEYS:
        assert (key in found) == (key in expected)
        if key in found:
            np.testing.assert_array_equal(found[key], np.asarray(expected[key]), err_msg=key)
    assert np.abs(found["pixel_values_videos"] - expected["pixel_values_videos"]).mean() < 0.003
    for used, metadata in zip(found["video_metadata"], expected["video_metadata"], strict=True):
        assert list(used.indices) == list(metadata.frames_indices)[: len(used.indices)]
        times = theirs._calculate_timestamps(list(used.indices), metadata.fps)
        np.testing.assert_allclose(used.timestamps, times, rtol=1e-12)


def test_a_batch_of_prompts(both):
    """Rows without tools, together: padded left, pictures and clips in the order of the rows."""
    proc, theirs = both
    names = ["turns", "short", "interleaved", "odd"]
    rows = [chats.FILMED[name] for name in names]
    found = proc.inputs(rows, padding_side="left", **chats.free(rows))
    expected = their_inputs(theirs, *names)
    for key in KEYS:
        np.testing.assert_array_equal(found[key], np.asarray(expected[key]), err_msg=key)


# The kind has no part in the form of a prompt.
@pytest.mark.parametrize(("form", "moe"), [("5.10", False), ("4.57", True)])
def test_models_on_clips(both, form, moe):
    """Both fed the same pixels: positions, logits of whole prompts, 64 greedy tokens and their logits.

    Positions are those of every conversation; the models see all but the two that are long by text.
    """
    config = toy.config(moe)
    ref = reference.Reference(config, tiny.weights(config, 2), 2, moe)
    params, cfg = ours.build(ref)
    if form == "5.10":
        rows = {name: dict(their_inputs(both[1], name)) for name in chats.FILMED}
    else:
        proc = Processor(**{**vars(both[0]), "wrap_clips": False})
        rows = {
            name: proc.inputs(chat, tools=chats.tools_of(name), **chats.free(chat))
            for name, chat in chats.FILMED.items()
        }
    for row in rows.values():
        del row["video_metadata"]
    for names in (rows, rows.keys() - {"turns", "tools"}):
        inputs = tiny.pad_batch([rows[name] for name in sorted(names)], "left")
        mask = inputs["attention_mask"] > 0
        batch = q3.make_batch(cfg, **inputs)
        positions, delta = reference.positions(ref, inputs)
        np.testing.assert_array_equal(batch.positions[:, :, : mask.shape[1]], positions)
        np.testing.assert_array_equal(batch.delta, delta[:, 0])
    logits = np.asarray(ours.forward(params, cfg, batch))[:, : mask.shape[1]]
    assert ours.worst(logits[mask], reference.logits(ref, inputs)[mask]) < BOUND
    want, chosen = reference.greedy(ref, inputs, 64)
    assert min(len(set(row)) for row in want.tolist()) > 20
    top = np.sort(chosen, -1)
    assert (top[..., -1] - top[..., -2]).min() > 1e-4
    blank, _ = reference.greedy(ref, tiny.blank(inputs), 16)
    assert (blank != want[:, :16]).any(1).all()
    tokens, steps = ours.greedy(params, cfg, batch, 64, slots=512)
    np.testing.assert_array_equal(tokens, want)
    assert max(ours.worst(steps[:, t], chosen[:, t]) for t in range(64)) < BOUND
