"""Pictures: every source and mode, the resizing rule, settings, refusals."""

import contextlib
import dataclasses
import http.server
import io
import json
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.fetching import MediaRules, fetch
from qwen3vl_jax.processing.image_loading import to_rgb
from qwen3vl_jax.processing.image_patches import (
    ImageSettings,
    image_to_patches,
    load_image,
    smart_resize,
)
from qwen3vl_jax.processing.settings import VideoSettings


def picture(height=24, width=40, seed=0):
    """A smooth RGB picture with some noise, [H W 3] uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + k) + np.cos(y / 5 - k) for k in range(3)]
    values = 128 + 50 * np.stack(waves, -1) + rng.normal(0, 5, (height, width, 3))
    return values.clip(0, 255).astype(np.uint8)


def encoded(array, form="PNG", **options):
    """Bytes of a picture file."""
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(file, form, **options)
    return file.getvalue()


def png(width, height, depth, color, rows):
    """A PNG file put together by hand, for what Pillow does not write."""

    def chunk(name, body):
        sealed = name + body
        return struct.pack(">I", len(body)) + sealed + struct.pack(">I", zlib.crc32(sealed))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rgb(source):
    return np.asarray(to_rgb(load_image(source)))


def refused(action, *words):
    """The message of the InputError that an action raises: one line with these words."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ---- the resizing rule ----
GOLDEN = [
    ((1, 1), (256, 256), 64),
    ((224, 224), (256, 256), 64),
    ((336, 504), (320, 512), 160),
    ((480, 640), (480, 640), 300),
    ((720, 1280), (704, 1280), 880),
    ((1080, 1920), (1088, 1920), 2040),
    ((1000, 1000), (992, 992), 961),
    ((368, 1000), (384, 992), 372),
    ((400, 200), (384, 192), 72),
    ((2160, 3840), (2176, 3840), 8160),
    ((5000, 5000), (4096, 4096), 16384),
    ((6000, 8000), (3520, 4704), 16170),
    ((64, 12800), (64, 12800), 800),
    ((32, 6400), (32, 6400), 200),
]


@pytest.mark.parametrize(("size", "expected", "tokens"), GOLDEN)
def test_smart_resize_golden(size, expected, tokens):
    assert smart_resize(*size) == expected
    assert expected[0] * expected[1] // 32**2 == tokens


def test_a_size_of_its_own():
    """resized_height and resized_width of qwen-vl-utils: whole tokens, in place of the limits."""
    picture = np.zeros((100, 300, 3), np.uint8)
    for given, grid in (((80, 50), (1, 4, 4)), ((20, 70), (1, 4, 8)), ((640, 96), (1, 40, 6))):
        sides = {"resized_height": given[0], "resized_width": given[1]}
        assert image_to_patches(picture, max_pixels=4096, **sides)[1] == grid
    refused(lambda: image_to_patches(picture, resized_width=64), "give both resized_height")


def test_smart_resize_keeps_its_promises():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        factor = int(rng.choice([8, 28, 32]))
        low = int(rng.integers(1, 50)) * factor**2
        high = low * int(rng.integers(2, 40))
        height, width = (int(v) for v in np.exp(rng.uniform(0, 8, 2)).astype(int))
        if max(height, width) > 200 * min(height, width):
            continue
        h, w = smart_resize(height, width, factor, low, high)
        assert h % factor == w % factor == 0
        assert h >= factor and w >= factor
        assert h * w >= low
        # One side of a very long picture is held up at one factor, past the limit.
        assert h * w <= high or factor in (h, w) or (height * width < low)


def test_aspect_ratio():
    smart_resize(10, 2000)
    refused(lambda: smart_resize(10, 2001), "2001 x 10", "200 times")
    refused(lambda: image_to_patches(np.zeros((1, 201), np.uint8)), "200 times")
    refused(lambda: smart_resize(0, 5), "0 pixels")


# ---- patch rows ----
def test_rows_are_in_merge_order():
    settings = ImageSettings(
        do_resize=False, do_rescale=False, do_normalize=False, patch_size=2, merge_size=2
    )
    array = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    rows, grid = image_to_patches(array, settings)
    assert grid == (1, 4, 6)
    assert rows.shape == (24, 3 * 2 * 2 * 2)
    assert rows.dtype == np.float32
    at = 0
    for block_row in range(2):
        for block_column in range(3):
            for r in range(2):
                for c in range(2):
                    y, x = 2 * (2 * block_row + r), 2 * (2 * block_column + c)
                    patch = array[y : y + 2, x : x + 2].transpose(2, 0, 1)  # [C P P]
                    expected = np.repeat(patch[:, None], 2, axis=1)  # [C Tp P P]
                    np.testing.assert_array_equal(rows[at].reshape(3, 2, 2, 2), expected)
                    at += 1


@pytest.mark.parametrize("change", [{}, {"do_rescale": True}, {"do_normalize": True}])
def test_eight_bits_stay_where_the_settings_leave_values(change):
    """The patches are those in float32, as uint8 only where no value is changed; no call asks for it."""
    settings = ImageSettings(do_rescale=False, do_normalize=False, min_pixels=32 * 32)
    settings = settings.override(**change)
    want, grid = image_to_patches(picture(70, 130), settings)
    of_training = dataclasses.replace(settings, eight_bit=True)
    found, same = image_to_patches(picture(70, 130), of_training)
    assert found.dtype == (np.float32 if change else np.uint8) and grid == same
    assert want.dtype == np.float32
    np.testing.assert_array_equal(found, want)
    refused(lambda: image_to_patches(picture(70, 130), settings, eight_bit=True), "eight_bit")


def test_released_normalisation():
    rows, _ = image_to_patches(np.full((32, 32, 3), 255, np.uint8))
    np.testing.assert_array_equal(rows, 1.0)
    rows, grid = image_to_patches(np.zeros((256, 512, 3), np.uint8))
    np.testing.assert_array_equal(rows, -1.0)
    assert grid == (1, 16, 32)


def test_settings_change_numbers():
    array = picture(64, 96)
    settings = ImageSettings(min_pixels=32 * 32)
    base, _ = image_to_patches(array, settings)
    changes = [
        {"resample": 2, "min_pixels": 256 * 256},
        {"do_rescale": False},
        {"rescale_factor": 1 / 128},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_std": 0.25},
        {"patch_size": 8},
        {"merge_size": 1},
        {"temporal_patch_size": 1},
        {"max_pixels": 48 * 48},
        {"size": {"shortest_edge": 200 * 200, "longest_edge": 300 * 300}},
        {"do_resize": False, "rescale_factor": 0.01},
    ]
    seen = [base.tobytes()]
    for change in changes:
        rows, _ = image_to_patches(array, settings, **change)
        seen.append(rows.tobytes())
    assert len(set(seen)) == len(seen)
    grey = np.asarray(Image.fromarray(array).convert("L"))
    kept, _ = image_to_patches(grey, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    assert kept.shape[1] * 3 == base.shape[1]


def test_settings_files(tmp_path):
    assert ImageSettings.from_dir(tmp_path) == ImageSettings()
    raw = {"size": {"shortest_edge": 100, "longest_edge": 900}, "patch_size": 14, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**raw, "crop_size": None}))
    old = ImageSettings.from_dir(tmp_path)
    assert (old.min_pixels, old.max_pixels, old.patch_size, old.resample) == (100, 900, 14, 2)
    assert old.temporal_patch_size == 2
    # transformers 5 writes one file; where both are there it reads this one.
    new = {"image_processor": {"min_pixels": 5, "max_pixels": 50}, "processor_class": "x"}
    (tmp_path / "processor_config.json").write_text(json.dumps(new))
    assert ImageSettings.from_dir(tmp_path).max_pixels == 50
    (tmp_path / "processor_config.json").write_text("{}")
    assert ImageSettings.from_dir(tmp_path) == old
    both = {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3, "max_pixels": 4}
    assert ImageSettings.from_dict(both).max_pixels == 4
    assert ImageSettings.from_dict({"resample": "lanczos"}).resample == 1
    assert ImageSettings.from_dict({"image_mean": 0.1, "data_format": "x"}).image_mean == 0.1
    (tmp_path / "processor_config.json").write_text("{")
    refused(lambda: ImageSettings.from_dir(tmp_path), "processor_config.json")
    (tmp_path / "processor_config.json").write_text("[]")
    refused(lambda: ImageSettings.from_dir(tmp_path), "list")


def test_one_limit_moves_the_other():
    assert ImageSettings().override(max_pixels=1000).min_pixels == 1000
    assert ImageSettings(max_pixels=10**5).override(min_pixels=10**6).max_pixels == 10**6
    refused(lambda: ImageSettings().override(min_pixels=9, max_pixels=8), "above max_pixels")


def test_limits_of_a_settings_object_must_not_cross():
    settings, image = (
        dataclasses.replace(ImageSettings(), max_pixels=1024),
        Image.new("RGB", (9, 9)),
    )
    words = "min_pixels 65536 is above max_pixels 1024"
    refused(lambda: image_to_patches(image, settings), words)
    refused(lambda: settings.override(do_resize=True), words)
    assert settings.override(min_pixels=512).max_pixels == 1024
    refused(lambda: VideoSettings(max_pixels=1024).override(), "min_pixels 4096 is above")


@pytest.mark.parametrize(
    "change",
    [
        {"min_pixels": 0},
        {"max_pixels": "many"},
        {"patch_size": 1.5},
        {"merge_size": True},
        {"resample": 9},
        {"resample": "sharp"},
        {"resample": []},
        {"resample": 3 + 0j},
        {"max_pixels": 10**400},
        {"do_resize": "yes"},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_mean": ["a"]},
        {"rescale_factor": float("nan")},
        {"size": 448},
        {"size": {"height": 4, "width": 4}},
        {"minpixels": 4},
    ],
)
def test_bad_settings(change):
    refused(lambda: ImageSettings().override(**change), next(iter(change)))


def test_settings_that_do_not_fit_the_picture():
    refused(
        lambda: image_to_patches(np.zeros((40, 64, 3), np.uint8), do_resize=False),
        "multiples",
        "32",
    )
    refused(lambda: image_to_patches(picture(), image_mean=[0.5, 0.5]), "image_mean", "3 channels")


# ---- formats and modes ----
@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG"])
def test_formats(form, tmp_path):
    array = np.asarray(Image.fromarray(picture()).quantize(64).convert("RGB"))
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(array, form, **options)
    path = tmp_path / "picture"  # the name says nothing: the first bytes do
    path.write_bytes(data)
    found = rgb(path)
    if form == "JPEG":
        assert np.abs(found.astype(int) - array).mean() < 8
    else:
        np.testing.assert_array_equal(found, array)


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (10, 200, 90)]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(rgb(data), 10)


def test_alpha_is_laid_on_white():
    values, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([values, values, values, alpha], -1).astype(np.uint8)
    expected = values * (alpha / 255) + 255 * (1 - alpha / 255)
    for source in (encoded(rgba), encoded(rgba, "WEBP", lossless=True, exact=True), rgba):
        assert np.abs(rgb(source)[..., 0] - expected).max() <= 0.5
    grey = Image.fromarray(rgba).convert("LA")
    assert np.abs(rgb(encoded(grey))[..., 0] - expected).max() <= 0.5


def test_palettes():
    array = picture()
    palette = Image.fromarray(array).quantize(16)
    np.testing.assert_array_equal(rgb(encoded(palette)), np.asarray(palette.convert("RGB")))
    # One colour of the palette is transparent.
    see_through = rgb(encoded(palette, transparency=3))
    hole = np.asarray(palette) == 3
    assert hole.any() and (see_through[hole] == 255).all()
    np.testing.assert_array_equal(see_through[~hole], np.asarray(palette.convert("RGB"))[~hole])
    # A grey and an RGB picture with one transparent colour.
    grey = Image.fromarray(np.array([[0, 7, 9]], np.uint8))
    np.testing.assert_array_equal(rgb(encoded(grey, transparency=7))[0, :, 0], [0, 255, 9])
    color = Image.fromarray(np.array([[[0, 0, 0], [1, 2, 3]]], np.uint8))
    found = rgb(encoded(color, transparency=(1, 2, 3)))
    np.testing.assert_array_equal(found, [[[0, 0, 0], [255, 255, 255]]])
    one_bit = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    np.testing.assert_array_equal(rgb(encoded(one_bit))[0, :, 0], [0, 255])


def test_cmyk():
    inks = np.array(
        [[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8
    )
    expected = [[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    image = Image.fromarray(np.repeat(np.repeat(inks, 16, 0), 16, 1), "CMYK")
    found = rgb(encoded(image, "TIFF"))
    np.testing.assert_array_equal(found[8, 8::16], expected)
    found = rgb(encoded(image, "JPEG", quality=95, subsampling=0))  # Adobe's, stored inverted
    assert np.abs(found[8, 8::16].astype(int) - expected).max() <= 6


def test_16_bit_is_scaled():
    grey = np.array([[0, 128, 257, 4660, 32768, 40000, 65535]], np.uint16)
    expected = np.round(grey / 257).astype(int)
    for source in (encoded(grey), encoded(grey, "TIFF"), grey, Image.fromarray(grey)):
        np.testing.assert_array_equal(rgb(source)[..., 1], expected)
    wide = Image.fromarray(grey.astype(np.int32))  # mode I
    np.testing.assert_array_equal(rgb(wide)[..., 1], expected)
    color = np.array([[[0, 257, 65535], [32768, 4660, 40000]]], np.uint16)
    rows = b"\0" + color.astype(">u2").tobytes()
    found = rgb(png(2, 1, 16, 2, rows)).astype(int)
    assert np.abs(found - color / 257).max() <= 1
    refused(lambda: load_image(Image.fromarray(np.array([[70000]], np.int32))), "70000")
    refused(lambda: load_image(Image.fromarray(np.zeros((2, 2), np.float32))), "mode F")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    upright = picture(16, 24)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("PNG", "TIFF"):
        data = encoded(np.ascontiguousarray(turned), form, exif=exif)
        np.testing.assert_array_equal(rgb(data), upright)
    grey = (upright[..., 0].astype(np.uint16) * 257) if orientation == 1 else None
    if grey is not None:
        np.testing.assert_array_equal(rgb(encoded(grey, exif=exif))[..., 0], upright[..., 0])
    jpeg = rgb(encoded(np.ascontiguousarray(turned), "JPEG", quality=95, exif=exif))
    assert np.abs(jpeg.astype(int) - upright).mean() < 6


def test_16_bit_with_rotation():
    grey = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(np.ascontiguousarray(np.rot90(grey)), exif=exif)
    np.testing.assert_array_equal(rgb(data)[..., 0], np.round(grey / 257))


def test_arrays():
    array = picture()
    same = [array, array.transpose(2, 0, 1), Image.fromarray(array), array / 255.0]
    same.append((array / 255).astype(np.float32))
    for source in same:
        np.testing.assert_array_equal(rgb(source), array)
    for grey in (array[..., 0], array[..., :1], array[..., 0][None]):
        np.testing.assert_array_equal(rgb(grey), np.repeat(array[..., :1], 3, 2))
    np.testing.assert_array_equal(rgb(np.eye(4, dtype=bool))[..., 0], np.eye(4) * 255)

    class Tensor:  # what torch and jax arrays are to numpy
        def __array__(self, dtype=None, copy=None):
            return array

    np.testing.assert_array_equal(rgb(Tensor()), array)
    np.testing.assert_array_equal(rgb(np.zeros((3, 5, 3), np.uint8)).shape, (3, 5, 3))
    for bad in (np.zeros((5, 5, 2), np.uint8), np.zeros(3, np.uint8), np.zeros((0, 4), np.uint8)):
        refused(lambda bad=bad: load_image(bad), "shape")
    refused(lambda: load_image(np.full((2, 2), 3.0)), "0 to 1")
    refused(lambda: load_image(np.full((2, 2), np.nan)), "nan")
    refused(lambda: load_image(np.zeros((2, 2), np.int64)), "int64")
    refused(lambda: load_image(7), "int")


# ---- sources ----
def test_files_that_are_no_pictures(tmp_path):
    refused(lambda: load_image(tmp_path / "gone.png"), "gone.png", "no such file")
    refused(lambda: load_image("no/such/picture"), "no such file")
    refused(lambda: load_image("a\0b"), "image")
    refused(lambda: load_image("x" * 5000), "image")
    refused(lambda: load_image(tmp_path), "directory")
    text = tmp_path / "notes.png"
    text.write_text("these are\nwords")
    refused(lambda: load_image(text), "notes.png", "not an image")
    text.write_text("")
    refused(lambda: load_image(text), "empty")
    (tmp_path / "new\nline.png").write_text("words")
    refused(lambda: load_image(tmp_path / "new\nline.png"), "not an image")
    refused(lambda: load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "not an image")
    refused(lambda: load_image("data:image/png;base64"), "comma")
    refused(lambda: load_image("data:image/png;base64,!!"), "base64")
    refused(lambda: load_image("data:text/plain,hello"), "not an image")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files(form, tmp_path):
    data = encoded(picture(64, 64), form)
    path = tmp_path / "cut"
    for part in (0.5, 0.9):
        path.write_bytes(data[: int(len(data) * part)])
        refused(lambda: load_image(path), "cut")
    lazy = Image.open(io.BytesIO(data))  # opened by the caller, read only now
    lazy.fp = io.BytesIO(data[: len(data) // 2])
    if form != "WEBP":  # which Pillow reads when it opens
        refused(lambda: load_image(lazy), "truncated image")


def test_decompression_bombs(tmp_path):
    path = tmp_path / "bomb.png"
    for side in (50_000, 13_500):  # Pillow refuses the first itself, and only warns of the second
        path.write_bytes(png(side, side, 8, 2, b""))
        refused(lambda: load_image(path), "bomb.png", "decompression bomb")


# ---- http ----
@pytest.fixture(scope="module")
def server():
    """A local server whose paths misbehave in the ways that matter; yields its address."""
    data = encoded(picture())

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, *args):
            pass

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            with contextlib.suppress(ConnectionError):  # the client had enough
                self.route(self.path)

        def route(self, path):
            if path == "/ok.png":
                self.answer(200, data, Content_Length=str(len(data)))
            elif path == "/moved":
                self.answer(302, Location="/ok.png")
            elif path == "/to-file":
                self.answer(302, Location="file:///picture.png")
            elif path == "/to-ftp":
                self.answer(302, Location="ftp://127.0.0.1/picture.png")
            elif path == "/loop":
                self.answer(302, Location="/loop")
            elif path == "/text":
                self.answer(200, b"<html>no picture</html>", Content_Type="image/png")
            elif path == "/short":
                self.answer(200, data[:100], Content_Length=str(len(data)))
            elif path == "/endless":
                self.answer(200)
                for _ in range(200):
                    self.wfile.write(bytes(1 << 16))
            elif path == "/drip":
                self.answer(200)
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
            elif path == "/silent":
                time.sleep(4)
            else:
                self.answer(404)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_http_pictures(server, no_proxy):
    for path in ("/ok.png", "/moved"):
        np.testing.assert_array_equal(rgb(server + path), picture())
    np.testing.assert_array_equal(rgb(server.replace("http", "HTTP") + "/ok.png"), picture())


def test_http_refusals(server, no_proxy):
    refused(lambda: load_image(f"{server}/gone"), "/gone", "404")
    refused(lambda: load_image(f"{server}/text"), "/text", "not an image")
    refused(lambda: load_image(f"{server}/to-file"), "away from http(s)")
    refused(lambda: load_image(f"{server}/to-ftp"), "away from http(s)")
    refused(lambda: load_image(f"{server}/loop"), "/loop")
    refused(lambda: load_image(f"{server}/short"), "/short")
    refused(lambda: load_image(f"{server}/endless", MediaRules(max_bytes=200_000)), "200000 bytes")
    refused(lambda: load_image(f"{server}/ok.png", MediaRules(max_bytes=100)), "100 bytes")
    refused(lambda: load_image("http://127.0.0.1:9/x.png"), "cannot be fetched")
    refused(lambda: load_image("https://[bad/x.png"), "cannot be fetched")


@pytest.mark.parametrize("path", ["/drip", "/silent"])
def test_http_time_limit(server, no_proxy, path):
    start = time.monotonic()
    refused(lambda: fetch(server + path, MediaRules(seconds=0.3)), path, "0.3 seconds")
    assert time.monotonic() - start < 3
