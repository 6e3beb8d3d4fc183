"""Videos and images in messages as qwen-vl-utils reads them: frames, sizes, tokens, times.

The values are those of qwen-vl-utils (QwenLM/Qwen3-VL at 0.0.14 with the patch size of frame lists
mended), called with image_patch_size=16 on videos of these sizes.
"""

import clips
import numpy as np
import pytest
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.image_patches import ImageSettings, image_to_patches
from qwen3vl_jax.processing.messages import read_conversation
from qwen3vl_jax.processing.qwen_items import VideoItem, with_image_limits
from qwen3vl_jax.processing.video_patches import video_to_patches

TOKEN = 32 * 32


def seen(item):
    """(rows, grid, used) of the one video or image in a message, as the processor reads it."""
    content = [item, {"type": "text", "text": "Describe this."}]
    _, (medium,) = read_conversation([{"role": "user", "content": content}])
    if medium.kind == "image":
        settings = with_image_limits(ImageSettings(), medium.settings)
        return (*image_to_patches(medium.source, settings, **medium.settings), None)
    return video_to_patches(medium.source, **medium.settings)


@pytest.mark.parametrize(
    ("item", "video", "grid", "tokens"),
    [
        # item, (width, height, frames, frames a second), its grid, its tokens
        ({"max_pixels": 360 * 420, "fps": 1.0}, (1280, 720, 300, 10), (15, 18, 32), 2160),
        ({"max_pixels": 360 * 420, "fps": 1.0}, (360, 640, 20, 2), (5, 32, 18), 720),
        (
            {"min_pixels": 4 * TOKEN, "max_pixels": 256 * TOKEN, "total_pixels": 20480 * TOKEN},
            (1280, 720, 300, 10),
            (30, 24, 42),
            7560,
        ),
        (
            {"min_pixels": 4 * TOKEN, "max_pixels": 256 * TOKEN, "total_pixels": 20480 * TOKEN},
            (1280, 720, 200, 1),
            (100, 20, 38),
            19000,
        ),
        ({"total_pixels": 20480 * TOKEN}, (1280, 720, 200, 1), (100, 20, 38), 19000),
        ({"fps": 1.0}, (1280, 720, 75, 5), (7, 40, 72), 5040),
        ({"fps": 1.0}, (1280, 720, 47, 5), (4, 40, 72), 2880),
        ({"nframes": 5}, (1280, 720, 47, 5), (2, 40, 72), 1440),
        ({"nframes": 7}, (64, 48, 47, 5), (4, 20, 28), 560),
        ({"fps": 0.1, "min_frames": 5}, (64, 48, 47, 5), (3, 20, 28), 420),
        ({"fps": 5, "max_frames": 9}, (64, 48, 47, 5), (4, 20, 28), 560),
        ({"fps": 2.0}, (640, 480, 3, 1), (1, 30, 40), 300),
        ({"resized_height": 280, "resized_width": 420}, (640, 480, 47, 5), (9, 18, 26), 1053),
    ],
)
def test_files(item, video, grid, tokens):
    """How many frames, and of what size, by the rules alone."""
    width, height, total, fps = video
    rule = VideoItem.of(item)
    count = rule.frame_count(total, fps, 2.0, 4, 768)
    high, wide = rule.frame_size(count, height, width, 32)
    assert (count // 2, high // 16, wide // 16) == grid
    assert count // 2 * (high // 32) * (wide // 32) == tokens


def test_examples_of_the_readme(tmp_path):
    """Its messages with videos and images, as they are written there, on files of the stated size."""
    file = clips.write(
        tmp_path / "video1.mp4",
        clips.bars(10, 720, 1280),
        1,
        preset="ultrafast",
    )
    image = Image.new("RGB", (2044, 1372), (200, 30, 30))
    image.save(tmp_path / "demo.jpeg")
    frame = Image.new("RGB", (1280, 720))
    paths = [tmp_path / f"frame{number}.jpg" for number in range(1, 5)]
    for path in paths:
        frame.save(path)
    video, frames = {"type": "video", "video": file.as_uri()}, [path.as_uri() for path in paths]
    picture = {"type": "image", "image": (tmp_path / "demo.jpeg").as_uri()}
    limits = {"min_pixels": 4 * TOKEN, "max_pixels": 256 * TOKEN, "total_pixels": 20480 * TOKEN}
    for item, grid, tokens, times in (
        ({"type": "video", "video": frames, "sample_fps": "1"}, (2, 40, 74), 1480, (0.5, 2.5)),
        ({**video, "max_pixels": 360 * 420, "fps": 1.0}, (5, 18, 32), 720, (0.5, 2.5)),
        ({**video, **limits}, (5, 24, 42), 1260, (0.5, 2.5)),
        (picture, (1, 86, 128), 2752, ()),
        ({**picture, "resized_height": 280, "resized_width": 420}, (1, 18, 26), 117, ()),
        ({**picture, "min_pixels": 50176, "max_pixels": 50176}, (1, 10, 16), 40, ()),
        ({"image": Image.new("RGB", (100, 100)), "max_pixels": 100000}, (1, 6, 6), 9, ()),
    ):
        rows, found, used = seen(item)
        assert tuple(found) == grid and len(rows) == 4 * tokens == np.prod(grid)
        assert used is None or used.timestamps[:2] == times


def test_lists_of_frames(caplog):
    """All frames are used, in pairs, sized as images first; times go by sample_fps."""
    frames = [Image.new("RGB", (640, 480))] * 13
    other = [frames[0], Image.new("RGB", (645, 483))]
    turned = [frames[0], Image.new("RGB", (480, 640))]
    for given, options, grid, first, last in (
        (frames, {"sample_fps": 5.0}, (7, 30, 40), 0.1, 2.5),
        (frames[:1], {}, (1, 30, 40), 0.25, 0.25),
        (other, {}, (1, 30, 40), 0.25, 0.25),
        (frames[:3], {"fps": 4}, (2, 30, 40), 0.125, 0.625),
        ([f.resize((70, 40)) for f in frames[:5]], {"sample_fps": 2}, (3, 20, 28), 0.25, 2.25),
        (frames[:5], {"min_pixels": 4096, "max_pixels": 50176}, (3, 12, 16), 0.25, 2.25),
        (frames[:3], {"sample_fps": 1.0, "raw_fps": 30.0}, (2, 30, 40), 1 / 60, 5 / 60),
        (turned, {"resized_height": 280, "resized_width": 420}, (1, 18, 26), 0.25, 0.25),
        (np.array([np.asarray(f) for f in frames[:3]]), {}, (2, 30, 40), 0.25, 1.25),
    ):
        _, found, used = seen({"type": "video", "video": given, **options})
        assert tuple(found) == grid
        assert (used.timestamps[0], used.timestamps[-1]) == pytest.approx((first, last))
    with pytest.raises(InputError, match="frame 1 has 480 x 640 pixels and the first 640 x 480"):
        seen({"type": "video", "video": turned})
    for rate in ("sample_fps", "raw_fps"):
        with pytest.raises(InputError, match="raw_fps describe arrays and lists of frames"):
            seen({"type": "video", "video": "a.mp4", rate: 5})
    assert not caplog.records
    _, found, _ = seen(
        {"type": "video", "video": frames, "sample_fps": 5, "fps": 1, "max_frames": 4}
    )
    assert (
        found[0] == 7 and "frames are used (for video files alone: fps, max_frames)" in caplog.text
    )
    # what says how the frames are to be sampled is another form, transformers'
    item = {"type": "video", "video": frames, "video_metadata": {"fps": 5}}
    _, found, used = seen(item)
    assert (found[0], used.indices) == (3, (0, 3, 6, 9, 12))


def test_cut(tmp_path):
    """video_start and video_end, with an even number of frames."""
    path = clips.write(tmp_path / "a.mp4", clips.bars(47, 480, 640, 4), 5, preset="ultrafast")
    _, grid, used = seen({"video": str(path), "video_start": 2.0, "video_end": 5.0, "fps": 2})
    assert grid == (3, 30, 40) and used.indices == (10, 13, 16, 19, 22, 25)
    assert used.timestamps == pytest.approx((2.3, 3.5, 4.7))
