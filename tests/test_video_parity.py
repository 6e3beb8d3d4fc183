"""Clips beside transformers' video processor and Qwen3VLProcessor, live."""

import warnings

import clips
import numpy as np
import pytest
import torchvision_shim  # noqa: F401
import toy_checkpoint as toy
from PIL import Image
from transformers import (
    Qwen2Tokenizer,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.videos import VideoSettings, preprocess_video, smart_resize

RELEASED = {
    "size": {"shortest_edge": 4096, "longest_edge": 25165824},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "cap_pixels_per_frame": False,
}


def reference(frames, metadata, settings, **options):
    """(rows, grid, indices, timestamps) of transformers for frames [T H W 3]."""
    processor = Qwen3VLVideoProcessor(**{**RELEASED, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = processor(
            videos=[frames], video_metadata=[dict(metadata)], return_tensors="np",
            return_metadata=True, **options,
        )  # fmt: skip
    (used,) = out["video_metadata"]
    indices = [int(i) for i in used.frames_indices]
    times = Qwen3VLProcessor._calculate_timestamps(None, list(indices), used.fps)
    return out["pixel_values_videos"], out["video_grid_thw"][0], indices, times


def test_100_random_clips():
    """Indices, sizes, grids and times equal; pixels as near as PIL's resizing is to torchvision's."""
    rng = np.random.default_rng(0)
    differences, near = [], []
    for number in range(100):
        count = int(rng.integers(2, 70))
        height, width = (int(side) for side in rng.integers(9, 150, 2))
        frames = clips.waves(count, height, width, seed=number)
        metadata = {
            "fps": float(rng.choice([5, 12.5, 23.976, 25, 30, 59.94])),
            "total_num_frames": count,
        }
        options = [
            {}, {"fps": float(rng.uniform(0.3, 12))}, {"num_frames": int(rng.integers(2, count + 1))},
            {"do_sample_frames": False}, {"fps": 3.0, "min_frames": 2, "max_frames": 9},
        ][number % 5]  # fmt: skip
        budget = {"longest_edge": int(rng.choice([25165824, 40000, 150000])), "shortest_edge": 4096}
        cap = bool(number % 7 == 3)
        theirs = {"size": budget, "cap_pixels_per_frame": cap, "fps": options.get("fps", 2)}
        if "num_frames" in options:
            theirs["fps"] = None
        theirs |= {k: options[k] for k in ("min_frames", "max_frames") if k in options}
        call = {k: options[k] for k in ("num_frames", "do_sample_frames") if k in options}
        if call.get("do_sample_frames") is False:
            metadata["frames_indices"] = list(range(0, 2 * count, 2))
        rows, grid, indices, times = reference(frames, metadata, theirs, **call)
        settings = VideoSettings().override(size=budget, cap_pixels_per_frame=cap)
        ours, found, used = preprocess_video(frames, settings, video_metadata=metadata, **options)
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
            assert smart_resize(count, height, width, 32, 2, *limits) == expected


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


def test_clips_and_pictures_in_one_message(both):
    """Ids, kinds and grids of mixed messages and of a batch, in the form of 5.10 and later."""
    ours, theirs = both
    rng = np.random.default_rng(3)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (20 + 9 * i, 50 - 7 * i, 3), dtype=np.uint8))
        for i in range(3)
    ]
    films = [clips.waves(5, 40, 33), clips.waves(8, 24, 90, 1), clips.waves(2, 64, 64, 2)]
    metadata = [{"fps": fps, "total_num_frames": len(f)} for fps, f in zip((4.0, 30.0, 7.0), films)]
    image, clip = {"type": "image"}, {"type": "video"}
    text = [{"type": "text", "text": t} for t in ("look:(", "and then ", "<0.5 seconds>?")]
    chats = [
        [{"role": "user", "content": [image, text[0], clip, image, clip, text[1]]}],
        [
            {"role": "user", "content": [clip, text[2]]},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [text[0], image]},
        ],
    ]
    for rows in (chats[:1], chats[1:], chats):
        n_images = sum(
            i == image for chat in rows for m in chat for i in m["content"] if m["role"] == "user"
        )
        n_clips = sum(
            i == clip for chat in rows for m in chat for i in m["content"] if m["role"] == "user"
        )
        shown, filmed = pictures[:n_images], films[:n_clips]
        prompts = [ours.render(chat) for chat in rows]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(
                text=prompts, images=shown, videos=filmed, padding=True, padding_side="right",
                return_tensors="np",
                videos_kwargs={"video_metadata": [dict(m) for m in metadata[:n_clips]]},
            )  # fmt: skip
        kwargs = {"video_metadata": metadata[:n_clips]}
        found = ours.inputs(rows, images=shown, videos=filmed, videos_kwargs=kwargs)
        for key in (
            "input_ids",
            "attention_mask",
            "mm_token_type_ids",
            "image_grid_thw",
            "video_grid_thw",
        ):
            np.testing.assert_array_equal(found[key], np.asarray(expected[key]), err_msg=key)
        assert np.abs(found["pixel_values_videos"] - expected["pixel_values_videos"]).mean() < 0.003
