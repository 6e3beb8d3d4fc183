"""Clips: files of several kinds, frame lists, arrays; sampling, sizes, times; what is refused."""

import base64
import io
import json
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import av
import clips
import numpy as np
import pytest
import toy_checkpoint as toy
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.video_files import open_video
from qwen3vl_jax.processing.video_patches import (
    VideoSettings,
    frame_count,
    smart_resize_video,
    video_to_patches,
)


def numbers(source, places, step=8):
    """Which frame of `bars` stands at each place, told from its brightness."""
    found = open_video(source).read(np.asarray(places))
    return [round(float(np.asarray(frame).mean()) / step) for frame in found]


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.mkv", "ffv1", "bgr0"),
    ],
)
def test_files(tmp_path, name, codec, pixels):
    """Each kind of file: number, rate, size and times of its frames, and the frames themselves."""
    path = clips.write(tmp_path / name, clips.bars(25), 10, codec, pixels)
    clip = open_video(path)
    assert (clip.total, clip.fps, clip.size, clip.times) == (25, 10, (48, 64), None)
    assert numbers(path, [0, 3, 3, 11, 24]) == [0, 3, 3, 11, 24]
    rows, grid, used = video_to_patches(path)
    assert used.indices == (0, 6, 12, 18, 24)
    assert used.timestamps == (0.3, 1.5, 2.4) and grid[0] == 3
    assert rows.shape == (np.prod(grid), 3 * 2 * 16 * 16)
    # the odd last frame fills both places of its patches
    last = rows[-grid[1] * grid[2] :].reshape(-1, 3, 2, 256)
    np.testing.assert_array_equal(last[:, :, 0], last[:, :, 1])


def test_sources(tmp_path):
    """Path, string, file address, bytes and data URI give the same rows."""
    path = clips.write(tmp_path / "a b.mp4", clips.waves(9, 40, 56))
    data = path.read_bytes()
    uri = "data:video/mp4;base64," + base64.b64encode(data).decode()
    expected = video_to_patches(path)
    for source in (str(path), path.as_uri(), data, bytearray(data), uri):
        found = video_to_patches(source)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:] == expected[1:]


def test_frames_and_arrays_are_the_same_clip():
    """Lists of pictures and arrays of either layout, whole numbers of any dtype."""
    frames = clips.waves(7, 40, 70)
    expected = video_to_patches(frames, video_metadata={"fps": 7}, do_sample_frames=False)
    assert expected[1][0] == 4 and expected[2].seconds == tuple(i / 7 for i in range(7))
    typed = (frames.astype(np.float32), frames.astype(np.int64))
    for source in (frames.transpose(0, 3, 1, 2), *typed):
        found = video_to_patches(source, video_metadata={"fps": 7}, do_sample_frames=False)
        np.testing.assert_array_equal(found[0], expected[0])
    for given in ({"sample_fps": 7}, {"video_metadata": {"fps": 7}}):
        listed = [Image.fromarray(frame) for frame in frames]
        found = video_to_patches(listed, do_sample_frames=False, **given)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[2] == expected[2]
    grey = frames[..., :1]
    found = video_to_patches(grey, sample_fps=7)
    np.testing.assert_array_equal(
        found[0], video_to_patches(np.repeat(grey, 3, 3), sample_fps=7)[0]
    )


def test_one_rule_for_every_form_of_the_same_frames(tmp_path):
    """File, array, list, files of frames, folder, pair: 13 frames at 5 a second are sampled to 5."""
    frames = clips.bars(13)
    images = [Image.fromarray(frame) for frame in frames]
    file = clips.write(tmp_path / "a.mkv", frames, 5, "ffv1", "bgr0")
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"frame{number}.png")  # frame10 is behind frame9
    (folder / "notes.txt").write_text("5 frames a second")
    paths = [str(folder / f"frame{number}.png") for number in range(13)]
    held = [base64.b64encode(Path(path).read_bytes()).decode() for path in paths]
    joined = "data:video/png;base64," + ",".join(held)
    rate = {"video_metadata": {"fps": 5.0}}
    expected = video_to_patches(file)
    assert expected[2].indices == (0, 3, 6, 9, 12) and expected[1][0] == 3
    for source, options in (
        (frames, rate),
        (images, rate),
        (images, {"sample_fps": 5}),
        (frames, {"sample_fps": 5}),
        (list(frames), rate),
        (paths, rate),
        (folder, rate),
        (folder.as_uri(), rate),
        (joined, rate),
        ((images, {"fps": 5.0}), {}),
        ((frames, {"fps": 5.0, "total_num_frames": 13}), {}),
    ):
        found = video_to_patches(source, **options)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:] == expected[1:]
    for source in (frames, images, paths, folder, joined):  # and without a rate
        with pytest.raises(InputError, match="frames without times"):
            video_to_patches(source)


def test_num_frames_above_the_length_repeats_frames(tmp_path):
    """As both versions of transformers do, for a file and for frames."""
    frames = clips.bars(5)
    path = clips.write(tmp_path / "a.mp4", frames)
    for source, options in ((path, {}), (frames, {"sample_fps": 10})):
        used = video_to_patches(source, num_frames=8, **options)[2]
        assert used.indices == (0, 1, 1, 2, 2, 3, 3, 4)


def test_frames_chosen_before_keep_their_times():
    """frames_indices and the source's fps give the times, as after qwen-vl-utils."""
    frames = clips.waves(5, 32, 64)
    metadata = {
        "fps": 30.0,
        "frames_indices": np.array([0, 20, 41, 61, 82]),
        "total_num_frames": 83,
    }
    rows, grid, used = video_to_patches(
        frames, video_metadata=metadata, do_sample_frames=False, do_resize=False
    )
    assert grid == (3, 2, 4) and len(rows) == 24 and used.indices == (0, 20, 41, 61, 82)
    expected = [(0 + 20) / 60, (41 + 61) / 60, 82 / 30]
    assert used.timestamps == pytest.approx(expected)
    assert list(metadata["frames_indices"]) == [0, 20, 41, 61, 82]  # not padded in place


def test_sampling_rules():
    """The reference's golden example, and the limits of each setting."""
    settings = VideoSettings()
    frames = np.zeros((100, 32, 32, 3), np.uint8)
    used = video_to_patches(frames, sample_fps=25)[2]
    assert used.indices == (0, 14, 28, 42, 57, 71, 85, 99)
    for total, fps, changes, count in (
        (10, 25, {}, 4),
        (3, 25, {}, 3),
        (10**5, 25, {}, 768),
        (10**5, 25, {"max_frames": 100}, 100),
        (11, 5, {"num_frames": 3}, 3),
        (11, 5, {"num_frames": 30}, 30),
        (50, 25, {"fps": 0.5, "min_frames": 1}, 1),
        (50, 1e-6, {"fps": 1e6}, 50),
    ):
        assert frame_count(total, fps, settings.override(**changes)) == count
    only = settings.override(num_frames=5)
    assert only.fps is None and only.override(fps=3).num_frames is None


def test_sizes():
    """The golden table of transformers' sizes, the small sides of 5.23, and the cap for each frame."""
    for given, expected in (
        ((4, 480, 640), (480, 640)),
        ((8, 720, 1280), (704, 1280)),
        ((16, 1080, 1920), (928, 1664)),
        ((60, 720, 1280), (480, 832)),
        ((240, 1080, 1920), (224, 416)),
        ((768, 720, 1280), (128, 224)),
        ((2, 32, 32), (64, 64)),
        ((5, 100, 100), (96, 96)),
        ((3, 200, 300), (192, 288)),
        ((4, 16, 48), (32, 96)),
    ):
        assert smart_resize_video(*given) == expected
    frames = np.zeros((8, 720, 1280, 3), np.uint8)
    grid = video_to_patches(frames, sample_fps=2, cap_pixels_per_frame=True)[1]
    assert grid == (4, 640 // 16, 1152 // 16)


def test_start_and_end(tmp_path):
    """A part of a clip: times count from the clip's start."""
    path = clips.write(tmp_path / "a.mp4", clips.bars(31))
    used = video_to_patches(path, video_start=1.0, video_end=2.5, fps=4)[2]
    assert used.indices[0] == 10 and used.indices[-1] == 25 and len(used.indices) == 6
    assert used.seconds[0] == 1.0
    assert video_to_patches(path, video_start=2.0, num_frames=3)[2].indices == (20, 25, 30)
    with pytest.raises(InputError, match=r"a\.mp4: no frame from second 7 to 3"):
        video_to_patches(path, video_start=7)
    with pytest.raises(InputError, match="video_end: got -1"):
        video_to_patches(path, video_end=-1)


def test_variable_frame_rate(tmp_path):
    """What is on the screen at moments even in time: the last frame that has begun."""
    # Two seconds at 10 a second, a screen that stands still to 60, two seconds more.
    times = [*np.arange(20) / 10, *(60 + np.arange(20) / 10)]
    path = clips.write(tmp_path / "a.mkv", clips.bars(40, step=6), 10, times=times)
    clip = open_video(path)
    assert clip.times is not None and np.allclose(clip.times, times, atol=2e-3)
    used = video_to_patches(path)[2]
    moments = np.linspace(0, 61.9, 40)
    assert np.allclose(used.seconds, moments, atol=2e-3)
    begun = [max(i for i, t in enumerate(times) if t <= m + 1e-3) for m in moments]
    assert list(used.indices) == begun and begun[1:38] == [15, *[19] * 36]
    assert np.allclose(used.timestamps, moments.reshape(-1, 2).mean(1), atol=2e-3)
    # the still screen alone: its frame began before the cut
    used = video_to_patches(path, video_start=31, video_end=57)[2]
    assert set(used.indices) == {19} and used.seconds[0] == 31 and used.seconds[-1] == 57


def with_matrix(path, numbers):
    """Puts a display matrix into an MP4 file: a, b, c, d of x' = a x + c y, y' = b x + d y."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (number << 16 for number in numbers)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def test_a_turned_or_mirrored_clip_is_upright(tmp_path):
    """All eight display matrices; the corners are those of ffmpeg, which turns by itself."""
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    corners = {(0, 0): 240, (0, 1): 160, (1, 0): 80, (1, 1): 0}
    for (y, x), value in corners.items():
        frames[:, 24 * y : 24 * y + 24, 32 * x : 32 * x + 32] = value
    path = clips.write(tmp_path / "a.mp4", frames)
    for matrix, shown in (
        ((1, 0, 0, 1), [3, 2, 1, 0]),
        ((0, 1, -1, 0), [1, 3, 0, 2]),
        ((-1, 0, 0, -1), [0, 1, 2, 3]),
        ((0, -1, 1, 0), [2, 0, 3, 1]),
        ((-1, 0, 0, 1), [2, 3, 0, 1]),
        ((1, 0, 0, -1), [1, 0, 3, 2]),
        ((0, 1, 1, 0), [3, 1, 2, 0]),
        ((0, -1, -1, 0), [0, 2, 1, 3]),
    ):
        with_matrix(path, matrix)
        clip = open_video(path)
        height, width = clip.size
        assert (height, width) == ((48, 64) if matrix[0] else (64, 48))
        found = np.asarray(next(clip.read(np.array([1]))))
        quarters = found.reshape(2, height // 2, 2, width // 2, 3).mean((1, 3, 4)).reshape(-1)
        assert (quarters / 80).round().tolist() == shown


def test_colours(tmp_path):
    """What the file says of its matrix and range holds, which av before 17 does not read."""
    needs = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (floor,) = (need for need in needs["dependencies"] if need.startswith("av>="))
    assert float(floor.removeprefix("av>=")) >= 17 <= float(av.__version__[:2])
    for name, codec, matrix, full in (
        ("bt709.mp4", "libx264", 1, False),
        ("bt601.mp4", "libx264", 5, False),
        ("full.mp4", "libx264", 1, True),
        ("full601.mp4", "libx264", 5, True),
        ("none.mp4", "libx264", None, False),
        ("motion.avi", "mjpeg", None, True),
    ):
        for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128)):
            path = clips.write_colour(tmp_path / name, colour, codec, matrix, full)
            found = np.asarray(next(open_video(path).read(np.array([1]))))
            assert np.abs(found.mean((0, 1)) - colour).max() <= 3, (name, colour, found[0, 0])


def test_transparency_is_white(tmp_path):
    """Where a frame has an alpha channel, as pictures do."""
    frames = np.zeros((4, 32, 32, 4), np.uint8)
    frames[:, :16, :, 3] = 255
    path = clips.write(tmp_path / "a.mkv", frames, codec="ffv1", pixels="bgra")
    found = np.asarray(next(open_video(path).read(np.array([1]))))
    assert found[:16].max() == 0 and found[16:].min() == 255


def test_what_is_refused(tmp_path):
    """Each with one line that names the clip and says what to do."""
    whole = clips.write(tmp_path / "a.mkv", clips.waves(30, 64, 64))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clips.write(tmp_path / "b.mp4", clips.waves(30, 64, 64)).read_bytes()[:3000])
    strange = tmp_path / "strange.mp4"
    strange.write_bytes((tmp_path / "b.mp4").read_bytes().replace(b"avc1", b"zzz1"))
    text, empty = tmp_path / "text.mp4", tmp_path / "empty.mp4"
    text.write_text("no video")
    empty.touch()
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{whole}\n#EXT-X-ENDLIST\n")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    one = clips.write(tmp_path / "one.mp4", clips.waves(1, 64, 64))
    still = tmp_path / "still.gif"
    Image.fromarray(clips.waves(1, 32, 32)[0]).save(still)
    frames = list(clips.waves(4, 32, 32))
    # A screen of 16,000 x 16,000 pixels that is told in 8 bytes.
    wide = b"GIF89a" + struct.pack("<HH", 16000, 16000) + still.read_bytes()[10:]
    for source, options, words in (
        (tmp_path / "gone.mp4", {}, r"gone\.mp4: cannot read this video: no such file"),
        (nothing, {}, r"nothing: no image in this folder"),
        (cut, {}, r"cut\.mp4: not a video, or its header is cut"),
        (strange, {}, r"strange\.mp4: the codec of this video is unknown"),
        (text, {}, r"text\.mp4: not a video"),
        (empty, {}, r"empty\.mp4: not a video"),
        (playlist, {}, r"list\.m3u8: "),
        (
            clips.write_sound(tmp_path / "a.m4a"),
            {},
            r"a\.m4a: no video in this file, it holds audio",
        ),
        (one, {}, r"one\.mp4: .*1 frame.* as an image"),
        (one, {"do_resize": False}, "1 frame.* as an image"),
        (still, {}, r"still\.gif: .*1 frame.* as an image"),
        (wide, {}, "bomb: 16000 x 16000 pixels, expected at most 50331648 of a video"),
        (whole, {"fps": 2, "num_frames": 4}, "both given"),
        (
            whole,
            {"num_frames": 10**8},
            r"a\.mkv: 100000000 frame.* MiB of patches, expected at most 3072",
        ),
        (whole, {"min_pixels": 10**12}, "MiB of patches, expected at most 3072"),
        (whole, {"patch_size": 10**6}, "MiB of patches, expected at most 3072"),
        (whole, {"temporal_patch_size": 10**9}, "expected at least 1000000000"),
        (whole, {"fps": 0}, "video setting fps: got 0, expected frames a second"),
        (whole, {"fps": 1e308}, r"video setting fps: got 1e\+308, expected frames a second"),
        (whole, {"fps": 10**400}, "video setting fps: got 1000"),
        (whole, {"video_metadata": {"fps": 3}}, "a file has its own"),
        (whole, {"crop_size": 3}, "crop_size: it has no effect"),
        (whole, {"size_divisor": 32}, "no effect"),
        (whole, {"default_to_square": False}, "no effect"),
        (whole, {"do_center_crop": True}, "no effect"),
        (whole, {"frames": 3}, "video setting 'frames' is unknown"),
        (frames, {}, r"frames without times; .*fps"),
        (np.array(frames), {}, r"frames without times"),
        (np.array(frames), {"fps": 2}, r"frames without times"),
        (
            frames,
            {"video_metadata": {"fps": 2, "frames_indices": [1, 2]}},
            "2 frames_indices for 4",
        ),
        (frames, {"video_metadata": {"fps": 2, "frames_indices": [3, 2, 1, 0]}}, "fall"),
        (np.array(frames), {"video_metadata": {"fps": 2, "total_num_frames": 9}}, "9 for 4 frames"),
        (frames, {"video_metadata": {"fps": 2, "total_num_frames": 9}}, "9 for 4 frames"),
        (frames, {"video_metadata": {"fps": 2}, "sample_fps": 2}, "both given"),
        (frames, {"sample_fps": "two"}, "fps: got 'two', expected a number"),
        (frames, {"sample_fps": np.inf}, "fps: got inf, expected a number"),
        (frames, {"sample_fps": 1e308}, r"fps: got 1e\+308, expected frames a second"),
        ((frames, {"fps": 10**5000}), {}, "fps: got a number too long to print"),
        ((frames, {"fps": 2}), {"video_metadata": {"fps": 2}}, "paired with its own"),
        (frames, {"fps": 2}, "frames without times"),
        (
            frames,
            {"video_metadata": {"fps": 2, "total_num_frames": 10**5000}},
            "too long to print for 4",
        ),
        (whole, {"video_start": 10**5000}, "video_start: got a number too long to print"),
        (frames, {"video_metadata": {"fps": 2, "frames_indices": ["a"] * 4}}, "expected integers"),
        (
            frames,
            {"video_metadata": {"fps": 2, "frames_indices": [0, 1, 2, 3.5]}},
            "integers, found 3.5",
        ),
        (
            frames,
            {"video_metadata": {"fps": 2, "frames_indices": [[0], [1, 2]]}},
            "rows of one length",
        ),
        (whole, {"resized_height": 64}, "both resized_height and resized_width"),
        (frames[:1], {"sample_fps": 1}, "as an image"),
        ([], {"sample_fps": 1}, "no frame"),
        ([frames[0], frames[1][:16]], {"sample_fps": 1}, "frame 1 has 32 x 16 pixels"),
        (np.array(frames) / 255, {"sample_fps": 1}, "whole numbers from 0 to 255"),
        (np.array(frames).astype("U3"), {"sample_fps": 1}, "got <U3, expected whole numbers"),
        (np.array(frames)[0], {"sample_fps": 1}, r"shape \[32, 32, 3\]"),
        (np.zeros((4, 32, 6401, 3), np.uint8), {"sample_fps": 1}, "200 times"),
        (7, {}, "got int"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            video_to_patches(source, **options)
        assert "\n" not in str(caught.value)


def test_a_cut_clip_is_what_is_left_of_it(tmp_path, caplog):
    """A file whose end is missing: the frames that are there, and never in silence."""
    for name, options in (("a.mkv", {}), ("a.mp4", {"movflags": "faststart"})):
        path = clips.write(tmp_path / name, clips.waves(60, 64, 96), **options)
        data = path.read_bytes()
        for share in (0.3, 0.6):
            path.write_bytes(data[: int(share * len(data))])
            caplog.clear()
            used = video_to_patches(path, fps=5)[2]
            assert 2 <= len(used.indices) < 30
            assert used.indices[-1] == open_video(path).total - 1 < 40
            assert name in caplog.text and ("cut" in caplog.text or "damaged" in caplog.text)


def test_what_plays_is_sampled(tmp_path, caplog):
    """Cut without encoding anew, begun between key frames: what a player shows, without a word."""
    source = clips.write(tmp_path / "a.mp4", clips.bars(60, step=4), g=20, bf=2)
    for name in ("edit.mp4", "edit.mov"):
        path = clips.copy(source, tmp_path / name, skip=1.7)
        clip = open_video(path)
        assert (clip.total, clip.fps, clip.times) == (43, 10, None)
        assert numbers(path, [0, 10, 42], 4) == [17, 27, 59]
        used = video_to_patches(path)[2]
        assert used.indices == (0, 6, 12, 18, 24, 30, 36, 42) and used.timestamps[0] == 0.3
    stream = clips.copy(source, tmp_path / "a.ts")
    data = stream.read_bytes()
    twice = tmp_path / "twice.ts"  # joined end to end: the clock begins anew
    twice.write_bytes(data + data)
    clip = open_video(twice)
    assert (clip.total, clip.fps, clip.times) == (120, 10, None)
    assert numbers(twice, [59, 60, 119], 4) == [59, 0, 59]
    caplog.clear()
    begun = tmp_path / "begun.ts"
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    begun.write_bytes(b"".join(packets[len(packets) // 3 :]))
    clip = open_video(begun)
    assert (clip.total, clip.fps) == (40, 10) and video_to_patches(begun)[2].indices[-1] == 39
    assert numbers(begun, [0, 39], 4) == [20, 59]
    assert not caplog.records


def test_a_damaged_stretch_loses_its_frames(tmp_path, caplog):
    """And nothing else; the video is named. What holds no frame at all is refused."""
    whole = clips.write(tmp_path / "a.mp4", clips.waves(60, 64, 96), g=10)
    data = bytearray(whole.read_bytes())
    at, length = data.index(b"mdat") + 4, len(data)
    data[at + length // 3 : at + length // 2] = bytes(length // 2 - length // 3)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(data)
    used = video_to_patches(bad)[2]
    assert "bad.mp4: damaged video: the" in caplog.text and len(caplog.records) == 1
    total = open_video(bad).recount().total
    assert 20 < total < 60 and used.indices[-1] == total - 1
    assert used.seconds[0] == 0 and 5.85 < used.seconds[-1] <= 5.9  # at its own time
    found, right = (next(open_video(p).read(np.array([0]))) for p in (bad, whole))
    assert found == right
    data[at : at + 2 * length // 3] = bytes(2 * length // 3)
    bad.write_bytes(data[: at + 2 * length // 3] + bytes(10))
    with pytest.raises(InputError, match=r"bad\.mp4: "):
        video_to_patches(bad)


def test_animated_images(tmp_path):
    """WebP, PNG and GIF: by path, bytes and data URI, whatever the name says."""
    images = [Image.fromarray(frame) for frame in clips.bars(13)]
    expected = video_to_patches(clips.bars(13), video_metadata={"fps": 5})
    for kind in ("WEBP", "PNG", "GIF"):
        file = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        images[0].save(file, kind, save_all=True, append_images=images[1:], duration=200, **options)
        path = tmp_path / f"a.{kind.lower()}"
        path.write_bytes(file.getvalue())
        uri = f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()
        for source in (path, file.getvalue(), uri):
            found = video_to_patches(source)
            np.testing.assert_array_equal(found[0], expected[0])
            assert found[1:] == expected[1:]
    images[0].save(
        path, "WEBP", save_all=True, append_images=images[1:4], duration=[100, 900, 100, 50]
    )
    used = video_to_patches(path, num_frames=5)[2]
    assert used.indices == (0, 1, 1, 1, 3) and np.allclose(used.seconds, np.linspace(0, 1.1, 5))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"a\.gif: "):
        video_to_patches(path)


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    return Processor.from_pretrained(toy.save(tmp_path_factory.mktemp("toy")))


def user(*items):
    return {"role": "user", "content": list(items)}


def test_prompts(proc, tmp_path):
    """A clip beside a picture in one message: text, ids and arrays, in both forms."""
    path = clips.write(tmp_path / "a.mp4", clips.waves(9, 40, 56))
    picture = {"type": "image", "image": clips.waves(1, 32, 64)[0]}
    clip = {"type": "video", "video": str(path), "fps": 4, "max_pixels": 20000}
    chat = [user(picture, {"type": "text", "text": "a"}, clip, {"type": "text", "text": "b"})]
    found = proc.inputs(chat)
    (used,) = found["video_metadata"]
    assert used.indices == (0, 3, 5, 8)  # min_frames of them
    t, h, w = found["video_grid_thw"][0]
    ids, config = found["input_ids"][0], proc.config
    assert (ids == config.video_token_id).sum() == t * h * w // 4
    assert (ids == config.image_token_id).sum() == found["image_grid_thw"][0].prod() // 4
    assert (found["mm_token_type_ids"][0] == 2).sum() == t * h * w // 4
    assert (ids == config.vision_start_token_id).sum() == 1 + t
    text = proc.decode(ids, skip_special_tokens=True)
    for second in used.timestamps:
        assert f"<{second:.1f} seconds>" in text
    wrapped = Processor(**{**vars(proc), "wrap_clips": True})
    assert len(wrapped.inputs(chat)["input_ids"][0]) == len(ids) + 2
    assert proc(chat).vision.pixels.shape[0] >= len(found["pixel_values_videos"])


def test_each_clip_has_its_own_options(proc, tmp_path):
    """Limits, sampling and cuts of one content item, over those of the call."""
    path = str(clips.write(tmp_path / "a.mp4", clips.waves(30, 64, 96)))

    def grid(*options, **call):
        items = [{"type": "video", "video": path, **own} for own in options]
        return proc.inputs([user(*items)], **call)["video_grid_thw"].tolist()

    whole = [3, 16, 24]  # 6 frames in whole cells of 8 x 8 pixels, patches of 4
    assert grid({}) == [whole]
    # of an item a limit bounds a frame, of the call all frames together
    small, large = {"max_pixels": 32 * 48}, {"min_pixels": 128 * 192}
    assert grid({}, small, large) == [whole, [3, 8, 12], [3, 32, 48]]
    call = {"max_pixels": 6 * 32 * 48}
    assert grid({}, {"max_pixels": 16 * 24}, videos_kwargs=call) == [[3, 8, 12], [3, 4, 6]]
    assert grid({"fps": 2.0}, {"fps": 5}, videos_kwargs=call) == [[3, 8, 12], [7, 4, 6]]
    assert grid({}, {"num_frames": 3}, videos_kwargs={"fps": 5}) == [[8, 16, 24], [2, 16, 24]]
    assert grid({}, {"fps": 5, **small}, videos_kwargs={"num_frames": 2}) == [
        [1, 16, 24],
        [7, 8, 12],
    ]
    size = {"size": {"shortest_edge": 64, "longest_edge": 6 * 32 * 48}}
    assert grid(size, {"max_frames": 4, **size}, {"num_frames": 3}) == [
        [3, 8, 12],
        [2, 8, 14],
        [2, 16, 24],
    ]
    assert grid({"nframes": 5, **small}, {"nframes": 7, **small}, videos_kwargs={"fps": 5}) == [
        [2, 8, 12],
        [4, 8, 12],
    ]
    assert grid({"resized_height": 30, "resized_width": 45}) == [[3, 8, 12]]
    assert grid({"total_pixels": 3 * 16 * 24, "min_pixels": 64}) == [[3, 4, 6]]
    cut = {"video_start": 1.0, "video_end": 2.0, "fps": 10}
    (used,) = proc.inputs([user({"video": path, **cut})])["video_metadata"]
    assert used.indices == (10, 11, 12, 13, 14, 16, 17, 18, 19, 20) and used.timestamps[0] == 1.05
    for own, call, words in (
        ({"fps": 2, "num_frames": 4}, {}, "both given"),
        ({}, {"fps": 2, "num_frames": 4}, "both given"),
        ({**large, **small}, {}, "min_pixels 24576 is above max_pixels 1536"),
        ({"max_pixels": 0}, {}, "max_pixels: got 0"),
        ({"min_pixels": 10**12}, {}, "MiB of patches, expected at most 3072"),
        ({"patch_size": 64}, {}, "patch_size, which is the model's; leave it out"),
        ({**small, **size}, {}, "size and a limit of pixels are both given"),
        ({"crop_size": 8}, {}, "crop_size: it has no effect"),
        ({"fps": 1e308}, {}, r"fps: got 1e\+308, expected frames a second"),
        ({"fps": 10**400}, {}, "fps: got 1000"),
        ({"nframes": 99}, {}, "100 frames are asked for .* expected 2 to 30"),
        ({"max_frame": 8}, {}, "max_frame'.* mean max_frames"),
        ({"nframes": 0}, {}, "nframes: got 0"),
        ({"nframes": 4, "num_frames": 4}, {}, "nframes and num_frames"),
        ({}, {"do_center_crop": True}, "do_center_crop: it has no effect"),
    ):
        with pytest.raises(InputError, match=words):
            grid(own, videos_kwargs=call)


def test_released_settings_file(tmp_path):
    """Keys without effect may stand in a file; those that count are taken."""
    raw = dict.fromkeys(("crop_size", "do_center_crop", "size_divisor", "do_pad"))
    raw |= {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "default_to_square": True}
    raw |= {"fps": 3, "max_frames": 99, "return_metadata": False}
    raw["video_processor_type"] = "Qwen3VLVideoProcessor"
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(raw))
    assert VideoSettings.from_dir(tmp_path) == VideoSettings(fps=3, max_frames=99)


def test_clips_beside_the_text(proc):
    """videos=, with options for all and metadata one a clip; raw text too."""
    first, second = clips.waves(4, 32, 64), clips.waves(6, 40, 40)
    kwargs = {"do_sample_frames": False, "video_metadata": [{"fps": 4}, {"fps": 3}]}
    chat = [user({"type": "video"}, {"type": "text", "text": "x"}, {"type": "video"})]
    a = proc.inputs(chat, videos=[first, second], videos_kwargs=kwargs)
    pairs = [(first, {"fps": 4}), (second, {"fps": 3})]
    paired = proc.inputs(chat, videos=pairs, videos_kwargs={"do_sample_frames": False})
    np.testing.assert_array_equal(paired["pixel_values_videos"], a["pixel_values_videos"])
    assert a["video_grid_thw"][:, 0].tolist() == [2, 3]
    assert [used.fps for used in a["video_metadata"]] == [4, 3]
    b = proc.inputs(text=proc.render(chat), videos=[first, second], videos_kwargs=kwargs)
    for key in ("input_ids", "pixel_values_videos", "video_grid_thw"):
        np.testing.assert_array_equal(a[key], b[key])
    listed = [Image.fromarray(frame) for frame in first]
    alone = [user({"type": "video"})]
    for given in (
        listed,
        [listed],
        {"frames": listed, "video_metadata": {"fps": 4}},
        (listed, {"fps": 4}),
    ):
        kwargs = {} if given not in (listed, [listed]) else {"video_metadata": {"fps": 4}}
        one = proc.inputs(alone, videos=given, videos_kwargs=kwargs)
        np.testing.assert_array_equal(
            one["pixel_values_videos"], a["pixel_values_videos"][: len(one["pixel_values_videos"])]
        )
    uneven = [listed[0], listed[1].crop((0, 0, 64, 16))]
    for options, words in (
        ({"videos": [first]}, r"2 video placeholder\(s\) in the prompt for 1 video"),
        ({"videos": [first, second], "videos_kwargs": {"video_metadata": [{}]}}, "1 for 2 video"),
        ({"videos": [first, second]}, "frames without times"),
        (
            {"videos": [uneven, uneven], "videos_kwargs": {"video_metadata": [{"fps": 4}] * 2}},
            "frame 1 has 64 x 16 pixels and the first 64 x 32",
        ),
        ({"videos": [[listed, uneven], first]}, "video: found|expected|frames"),
    ):
        with pytest.raises(InputError, match=words):
            proc.inputs(chat, **options)


def test_users_cannot_smuggle_a_clip_in(proc):
    """A spelled placeholder stays text; raw text means what it says."""
    text = "<|vision_start|><|video_pad|><|vision_end|>"
    ids = proc.inputs([{"role": "user", "content": text}])["input_ids"]
    assert not (ids == proc.config.video_token_id).any()
    with pytest.raises(InputError, match=r"1 video placeholder\(s\) in the prompt for 0 video"):
        proc.inputs(text=text)


LONG = """
import resource, sys
from qwen3vl_jax.processing.video_patches import video_to_patches
rows, grid, used = video_to_patches(sys.argv[1], fps=2, max_pixels=2000000)
print(len(used.indices), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_clip(tmp_path):
    """Ten times the frames, the same limit of pixels: about the same peak (in a process of its own)."""
    peaks = []
    for count in (100, 1000):
        path = clips.write(
            tmp_path / f"{count}.mp4",
            np.broadcast_to(clips.bars(1, 360, 640), (count, 360, 640, 3)),
            preset="ultrafast",
        )
        done = subprocess.run(
            [sys.executable, "-c", LONG, str(path)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        frames, peak = map(int, done.stdout.split())
        assert frames == count // 5
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 60_000  # KiB; the frames are 138 MB
