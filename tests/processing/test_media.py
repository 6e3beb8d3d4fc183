"""The one reader of media: every form through every door, what may be opened, and how much."""

import base64
import functools
import http.server
import io
import os
import random
import socket
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import clips
import numpy as np
import pytest
import toy_checkpoint as toy
from PIL import Image

from qwen3vl_jax.cli import infer_arguments
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing import image_loading
from qwen3vl_jax.processing.fetching import MediaRules, fetch
from qwen3vl_jax.processing.image_loading import is_image, to_rgb
from qwen3vl_jax.processing.image_patches import ImageSettings, image_to_patches, load_image
from qwen3vl_jax.processing.media import open_source
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.video_patches import video_to_patches
from qwen3vl_jax.training.data.chat_format import chat_form
from qwen3vl_jax.training.data.make_samples import SampleMaker
from qwen3vl_jax.training.recipe import Data, Pack, Source

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
SECRET = "token-of-the-bank"


def encoded(array=PIXELS, form="PNG", **more):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **more)
    return file.getvalue()


PNG = encoded()
TEXT = base64.b64encode(PNG).decode()


def refused(action, *words, within=10):
    """The message of the InputError that an action raises, and soon: one line with these words."""
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        action()
    assert time.monotonic() - start < within
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message and len(message) < 500
    for word in words:
        assert word in message, message
    return message


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    return Processor.from_pretrained(toy.save(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("media")
    for name in ("a b.png", "00:01:23.png", "coco:7.png", "QUJD"):
        (found / name).write_bytes(PNG)
    return found


@pytest.fixture(scope="module")
def server(folder):
    """Files of the folder; /to/NAME leads to another address; /secret.png is not an image."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302, SECRET)
                self.send_header("Location", f"http://{self.path[4:]}")
                self.end_headers()
            elif self.path == "/secret.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(SECRET.encode())
            elif self.path == "/broken":
                self.wfile.write(f"{SECRET} 200 OK\r\n\r\n".encode())
            else:
                super().do_GET()

    make = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


# ---- every form, every door ----
FORMS = {
    "relative path": lambda folder, url: "a b.png",
    "path": lambda folder, url: str(folder / "a b.png"),
    "Path": lambda folder, url: folder / "a b.png",
    "relative Path": lambda folder, url: Path("a b.png"),
    "file URL": lambda folder, url: (folder / "a b.png").as_uri(),
    "file URL with host": lambda folder, url: f"file://localhost{folder}/a%20b.png",
    "a time as a name": lambda folder, url: "00:01:23.png",
    "a scheme as a name": lambda folder, url: "coco:7.png",
    "a name that is base64": lambda folder, url: "QUJD",
    "http URL": lambda folder, url: f"{url}/a%20b.png",
    "http URL as typed": lambda folder, url: f"{url}/a b.png",
    "data URI": lambda folder, url: f"data:image/png;base64,{TEXT}",
    "percent data URI": lambda f, u: "data:image/png," + "".join(f"%{b:02x}" for b in PNG),
    "base64": lambda folder, url: TEXT,
    "base64 in lines": lambda folder, url: base64.encodebytes(PNG).decode(),
    "base64 of URLs": lambda folder, url: base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    "bytes": lambda folder, url: PNG,
    "bytearray": lambda folder, url: bytearray(PNG),
    "bytes and path": lambda folder, url: {"bytes": PNG, "path": "gone.png"},
    "path and no bytes": lambda folder, url: {"bytes": None, "path": "a b.png"},
    "bytes as base64": lambda folder, url: {"bytes": TEXT, "path": None},
    "url": lambda folder, url: {"url": f"{url}/a%20b.png"},
    "url of data": lambda folder, url: {"url": f"data:;base64,{TEXT}"},
    "url of a path": lambda folder, url: {"url": "a b.png"},
    "PIL": lambda folder, url: Image.fromarray(PIXELS),
    "array": lambda folder, url: PIXELS,
    "array, channels first": lambda folder, url: PIXELS.transpose(2, 0, 1),
}


def doors(proc, folder, kind, source, **more):
    """Patches of a source by each way into inference and into training."""
    item = {"type": kind, kind: source, **more}
    key = "pixel_values" if kind == "image" else "pixel_values_videos"
    names = {"image": "images", "video": "videos"}
    beside = {names[kind]: [source], **({"videos_kwargs": more} if more else {})}
    ask = [{"role": "user", "content": [item]}]
    empty = [{"role": "user", "content": [{"type": kind}]}]
    yield proc.inputs(ask)[key]
    yield proc.inputs(empty, **beside)[key]
    answer = {"role": "assistant", "content": "yes"}
    turns = [{"from": "human", "value": f"<{kind}>"}, {"from": "gpt", "value": "yes"}]
    maker = SampleMaker(proc, Data(), Pack(length=4000, vision_length=16384))
    pooled = source if not more else {kind: source, **more}
    for record in (
        {"messages": [*ask, answer]},
        {"messages": [*empty, answer], names[kind]: [pooled]},
        {"conversations": turns, names[kind]: [pooled]},
    ):
        (visual,) = maker("x:1", chat_form(record, Source("x.jsonl", media=str(folder)))).images
        yield visual.patches / np.float32(127.5) - 1


@pytest.mark.parametrize("form", FORMS)
def test_every_form_by_every_door(proc, folder, server, monkeypatch, form):
    monkeypatch.chdir(folder)
    expected, _ = image_to_patches(PIXELS, proc.image_settings)
    source = FORMS[form](folder, server)
    for found in doors(proc, folder, "image", source):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_frames_of_every_form(proc, folder, server, monkeypatch):
    monkeypatch.chdir(folder)
    frames = [FORMS[form](folder, server) for form in FORMS]
    alike = list(doors(proc, folder, "video", [PIXELS] * len(frames), sample_fps=2))
    found = list(doors(proc, folder, "video", frames, sample_fps=2))
    for patches, expected in zip(found, alike, strict=True):
        np.testing.assert_allclose(patches, expected, atol=1e-6)
    # Frames in a message are sized as qwen-vl-utils does, in training too.
    for patches in found[2:]:
        np.testing.assert_allclose(patches, found[0], atol=1e-6)


def test_videos_of_every_form(proc, folder, server, monkeypatch):
    monkeypatch.chdir(folder)
    data = clips.write(folder / "a:1.mp4", clips.waves(8, 32, 32)).read_bytes()
    text = base64.b64encode(data).decode()
    expected = next(doors(proc, folder, "video", folder / "a:1.mp4"))
    texts = ("a:1.mp4", data, text, f"data:video/mp4;base64,{text}", (folder / "a:1.mp4").as_uri())
    for source in (*texts, {"url": f"{server}/a:1.mp4"}, {"bytes": data, "path": None}):
        for found in doors(proc, folder, "video", source):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_base64_of_any_length(folder, monkeypatch):
    """Short text is base64 where it names no file and is an image; else it is a name."""
    monkeypatch.chdir(folder)
    tiny = base64.b64encode(encoded(PIXELS[:1, :1], "GIF")).decode()
    assert len(tiny) < 1000
    np.testing.assert_allclose(to_rgb(load_image(tiny)), PIXELS[:1, :1], atol=3)
    refused(lambda: load_image("QUJE"), "QUJE", "no such file")
    Path(TEXT[:200].replace("/", "_")).write_bytes(encoded(PIXELS[:9, :9]))
    assert load_image(TEXT[:200].replace("/", "_")).size == (9, 9)


def test_objects_without_a_source():
    empty = ("", {}, {"bytes": None, "path": ""}, {"link": "a"})
    two = ({"url": "a", "path": "b"}, {"bytes": np.zeros(2), "url": "a"})
    for source in (*empty, *two, {"url": "a", "max_pixels": 9}):
        refused(lambda source=source: load_image(source), "image: got", "expected")


def test_objects_that_hold_an_array():
    for key in ("bytes", "path", "url"):
        held = {key: np.zeros(5, np.uint8)}
        refused(lambda held=held: open_source(held), "image: got ndarray", "one of them")


def test_bytes_are_copied():
    given = bytearray(b"abc")
    source = open_source(given)
    given[:] = b"xyz"
    with source.open() as file:
        assert file.read() == b"abc"


# ---- formats ----
def test_every_format_that_pillow_writes():
    """By Pillow's own list: what it writes and reads back is read here as Pillow reads it."""
    Image.init()
    read = []
    for form in sorted(
        set(Image.SAVE) - {"PDF", "EPS", "MPO", "PALM", "WMF", "BUFR", "GRIB", "HDF5"}
    ):
        for mode in ("RGB", "L", "1", "F"):
            file = io.BytesIO()
            try:
                with warnings.catch_warnings(action="ignore"):
                    Image.fromarray(PIXELS).resize((64, 64)).convert(mode).save(file, form)
            except (OSError, KeyError, ValueError, SystemError):
                continue
            with warnings.catch_warnings(action="ignore"):
                expected = Image.open(io.BytesIO(file.getvalue()))
            if expected.mode == "F":
                refused(lambda file=file: load_image(file.getvalue()), "mode F")
                break
            expected = expected.convert("RGBA").convert("RGB")
            np.testing.assert_array_equal(to_rgb(load_image(file.getvalue())), expected)
            read.append(form)
            break
    assert {"AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "QOI"} <= set(read)


def test_formats_that_start_programs_or_show_nothing(tmp_path):
    eps = io.BytesIO()
    Image.fromarray(PIXELS).save(eps, "EPS")
    for data in (
        eps.getvalue(),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\x00\x00\x01\xba" * 20,
        b"GRIB" * 9,
    ):
        refused(lambda data=data: load_image(data), "not an image")
        assert not is_image(data)


# ---- what is opened ----
def special(folder):
    os.mkfifo(folder / "fifo")
    (folder / "to_fifo").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(folder / "socket"))
    here = {"fifo": "FIFO", "to_fifo": "FIFO", "socket": "socket", ".": "directory"}
    here |= {"/dev/zero": "device", "/dev/tty": "device", "/proc/self/environ": "/proc"}
    return {**here, "/proc/self/fd/0": "", "/sys/kernel/mm/transparent_hugepage/enabled": "/sys"}


def test_only_regular_files_are_opened(proc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, word in special(tmp_path).items():
        for source in (name, Path(name), {"path": name}, f"file://{tmp_path / name}"):
            refused(lambda s=source: load_image(s), "regular file" if word else "", word)
        if name != ".":
            refused(lambda n=name: video_to_patches(n), word)
            refused(lambda n=name: video_to_patches([n, n], sample_fps=1), word)
    with pytest.raises(InputError, match="FIFO"):
        asked = {"role": "user", "content": [{"type": "image", "image": "fifo"}]}
        chat = {"messages": [asked, {"role": "assistant", "content": "a"}]}
        record = chat_form(chat, Source("x", media=str(tmp_path)))
        SampleMaker(proc, Data(), Pack())("x", record)


def test_no_path_leaves_the_root(tmp_path, monkeypatch):
    root, other = tmp_path / "root", tmp_path / "root2"
    for place in (root / "sub", other):
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(PNG)
    (root / "in.png").symlink_to("sub/a.png")
    (root / "out.png").symlink_to(other / "a.png")
    (root / "way").symlink_to(other)
    rules = MediaRules(root=str(root))
    monkeypatch.chdir(other)
    for inside in ("sub/a.png", "in.png", root / "in.png", "sub/../in.png", {"path": "in.png"}):
        np.testing.assert_array_equal(load_image(inside, rules=rules), PIXELS)
    named = ("../root2/a.png", other / "a.png", "out.png", "way/a.png", "/etc/passwd", "..")
    for outside in (*named, f"file://{other}/a.png", {"url": f"{other}/a.png"}, "gs://b/a.png"):
        refused(lambda s=outside: load_image(s, rules=rules), "expected a")
        refused(lambda s=outside: video_to_patches(s, rules=rules), "expected a")
        refused(
            lambda s=outside: video_to_patches([s, s], rules=rules, sample_fps=1),
            "expected",
        )
    refused(lambda: load_image("gone.png", rules=rules), "no such file")
    # A link that is put there after the path was looked at.
    monkeypatch.setattr(MediaRules, "local", lambda *_: str(root / "way" / "a.png"))
    refused(lambda: load_image("a.png", rules=rules), "cannot read")


# ---- hosts ----
def test_hosts_that_are_named(server):
    port = server.rsplit(":", 1)[1]
    url, strict = f"{server}/QUJD", functools.partial(MediaRules, trusted=False)
    assert fetch(url) == PNG
    for hosts in (("127.0.0.1",), ("x", f"127.0.0.1:{port}")):
        assert fetch(url, rules=strict(hosts=hosts)) == PNG
    assert fetch(f"{server}/to/127.0.0.1:{port}/QUJD") == PNG
    for hosts in (("example.org",), ("127.0.0.1:1",), ()):
        refused(lambda h=hosts: fetch(url, rules=MediaRules(hosts=h)), "127.0.0.1", "--allow-hosts")
    refused(lambda: fetch(url, rules=strict()), "private", "--allow-hosts")
    refused(lambda: load_image("gs://b/a.png", rules=MediaRules(hosts=("gs://c",))), "gs://b")


HOSTS = """
    localhost 127.0.0.1 127.1 2130706433 0x7f000001 0x7f.0.0.1 0177.0.0.1 0.0.0.0 [::1] [::]
    [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::7f00:1] [2002:7f00:1::]
    10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 2852039166 100.64.0.1 [fe80::1] [fd00::1]
    [fec0::1] 224.0.0.1 255.255.255.255
"""


@pytest.mark.parametrize("host", HOSTS.split())
def test_private_addresses_in_every_spelling(server, host, monkeypatch):
    """As given, by a redirect from a host that is named, and as what a name stands for."""
    rules, words = MediaRules(trusted=False), ("private", "link-local")
    refused(lambda: load_image(f"http://{host}:9/a.png", rules=rules), *words)
    named = MediaRules(hosts=("127.0.0.1",), trusted=False)
    if host != "127.0.0.1":
        refused(lambda: load_image(f"{server}/to/{host}:9/a.png", rules=named), "--allow-hosts")
        refused(lambda: load_image(f"{server}/to/{host}:9/a.png"), *words)
    look_up = socket.getaddrinfo(host.strip("[]"), 9, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: look_up)
    refused(lambda: load_image("http://cdn.example.org/a.png", rules=rules), *words)


def test_a_proxy_of_https_hears_tls(monkeypatch):
    """Whatever the URL's own scheme is: the first byte that the proxy gets is that of a handshake."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(10)
        heard = []

        def answer():
            with proxy.accept()[0] as peer:
                heard.append(peer.recv(1))

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("http_proxy", f"https://127.0.0.1:{proxy.getsockname()[1]}")
        refused(lambda: load_image("http://127.0.0.1:9/a.png"), "127.0.0.1:9")
        thread.join()
    assert heard == [b"\x16"]


def test_link_local_is_never_meant():
    refused(lambda: load_image("http://169.254.169.254/latest"), "link-local")


def test_options_of_a_batch(tmp_path):
    both = ["--input", "a", "--output", "b"]
    read = lambda *more: infer_arguments.media_rules(infer_arguments.arguments([*both, *more]))  # noqa: E731
    rules = functools.partial(MediaRules, trusted=False, max_batch_bytes=4 * 2**30)
    assert read() == rules()
    found = read("--media-root", str(tmp_path), "--allow-hosts", "a.org, 10.0.0.1")
    assert found == rules(str(tmp_path), ("a.org", "10.0.0.1"))
    refused(lambda: read("--media-root", str(tmp_path / "gone")), "--media-root: got", "exists")
    for hosts in ("a,,b", "https://a.org", "10.0.0.0/8", ""):
        refused(lambda hosts=hosts: read("--allow-hosts", hosts), "--allow-hosts: got")
    alone = ["--prompt", "hi", "--media-root", str(tmp_path)]
    refused(lambda: infer_arguments.arguments(alone), "--media-root", "--input")


def test_no_message_holds_what_is_in_a_file(server, tmp_path):
    """Of this machine or of a server, whatever the file looks like."""
    for start in (
        "",
        "P1 ",
        "P6\n",
        "P5 3 ",
        "/* XPM */\n",
        "#define ",
        "SIMPLE  = ",
        "GIF89a",
        "BM",
    ):
        path = tmp_path / "a"
        path.write_text(f"{start}{SECRET} {SECRET}\n{SECRET}")
        refused(lambda path=path: load_image(path), "image")
        refused(lambda path=path: video_to_patches(path), "video")
    for path in ("secret.png", "broken", f"to/[{SECRET}", f"to/{SECRET}:x/"):
        refused(lambda path=path: fetch_image(f"{server}/{path}"))


def fetch_image(url):
    """An image whose address is not repeated in messages."""
    try:
        load_image(url)
    except InputError as e:
        raise InputError(str(e).replace(url, "")) from None


# ---- limits ----
def test_16_bits_are_scaled_in_strips():
    image = Image.fromarray(np.full((3000, 3000), 40_000, np.uint16))
    see_through = Image.new("RGBA", (3000, 3000), (1, 2, 3, 255))
    tracemalloc.start()
    assert load_image(image).getpixel((2999, 2999)) == 156
    assert to_rgb(load_image(see_through)).getpixel((2999, 2999)) == (1, 2, 3)
    assert load_image(np.ones((3000, 3000), np.float16)).getpixel((9, 9)) == 255
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


def test_decoders_in_python_get_small_images():
    refused(lambda: load_image(b"P3 1500 1500 255 " + b"0 " * 99), "bomb", "PPM")
    refused(lambda: load_image(b"P3 1000 1000 255 " + b"0 " * 99), "truncated")


def test_threads_share_the_limit_of_decoded_bytes():
    found = []
    worker = threading.Thread(target=lambda: found.append(load_image(PNG)))
    with image_loading.decode_memory(image_loading.MAX_IMAGE_BYTES):
        worker.start()
        worker.join(0.1)
        assert not found
    worker.join(5)
    assert found


def test_patches_of_a_call_have_a_limit(proc):
    small = Processor(**{**vars(proc), "media_rules": MediaRules(max_batch_bytes=1 << 19)})
    many = [{"role": "user", "content": [PIXELS] * 40}]
    assert proc.inputs(many)["pixel_values"].nbytes > 1 << 19
    refused(lambda: small.inputs(many), "0 MiB", "max_pixels")


HUGE = {
    "min_pixels": [10**12, 10**40, 10**400, 10**5000, 1e300, 1e12],
    "max_pixels": [0, -1, 10**400, float("nan"), "9", [], {}],
    "patch_size": [10**6, 10**400, 0, 2.5, []],
    "merge_size": [10**5, 10**400],
    "temporal_patch_size": [10**9, 10**400, "2"],
    "resample": [[], {}, [3], "none", 9, 10**400, 1e308, True, float("nan")],
    "rescale_factor": [10**400, 1e308, [], "1"],
    "image_mean": [10**400, [], [[]], [10**400], np.zeros((3, 3)), {}, 1e300],
    "image_std": [1e-320, 0, [0.5, 0, 0.5], 10**400],
    "resized_height": [10**9, 10**400],
    "size": [[], "x", {"shortest_edge": []}, {"longest_edge": 10**400}, {"height": 3}, 3],
    "do_resize": [1, "yes", []],
}


@pytest.mark.parametrize("name", HUGE)
def test_settings_that_cannot_be_meant(proc, name):
    """Refused before anything is allocated, for images and for videos."""
    frames = [PIXELS] * 4
    for value in HUGE[name]:
        more = {"resized_width": 10**6} if name == "resized_height" else {}
        item = {name: value, **more}
        refused(lambda item=item: image_to_patches(PIXELS, ImageSettings(), **item))
        refused(lambda item=item: video_to_patches(frames, None, None, sample_fps=1, **item))
        ask = [{"role": "user", "content": [{"type": "image", "image": PIXELS, **item}]}]
        refused(lambda ask=ask: proc.inputs(ask))
    refused(lambda: proc.inputs(text="x", patch_size=32), "patch_size")


def test_no_memory_is_one_line(proc, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", fail)
    ask = [{"role": "user", "content": [PIXELS]}]
    refused(lambda: proc.inputs(ask), "memory")


def test_a_long_download_says_what_to_do(server):
    refused(
        lambda: fetch(f"{server}/QUJD", MediaRules(max_bytes=99)),
        "99 bytes",
        "download",
        "max_fetch_bytes",
    )


# ---- silence ----
def test_damaged_files_are_errors_and_nothing_is_printed(capfd):
    """libtiff writes to stderr of files that Pillow takes for whole."""
    rng, wrong = random.Random(0), 0
    for compression in ("jpeg", "tiff_lzw", "tiff_adobe_deflate", "zstd", "group4"):
        file = io.BytesIO()
        image = Image.fromarray(PIXELS).resize((200, 150))
        image.convert("1" if compression == "group4" else "RGB").save(
            file, "TIFF", compression=compression
        )
        load_image(file.getvalue())
        for _ in range(30):
            data = bytearray(file.getvalue())
            for _ in range(3):
                data[rng.randrange(8, len(data))] = rng.randrange(256)
            try:
                load_image(bytes(data))
            except InputError as e:
                wrong += 1
                assert "\n" not in str(e)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "") and wrong > 60


def test_open_source_gives_the_file_anew(folder):
    for source in (PNG, folder / "a b.png", TEXT):
        found = open_source(source)
        for _ in range(2):
            with found.open() as file:
                assert file.read() == PNG
