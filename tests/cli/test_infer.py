"""infer.py as a person runs it: answers, drawings, and one line with exit code 2 for bad input."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import infer
import qwen3vl_jax as q3
import qwen3vl_jax.__main__ as about
from qwen3vl_jax.checkpoint.adapter_map import Adapter, lora_targets
from qwen3vl_jax.checkpoint.peft_io import save_adapter
from qwen3vl_jax.cli import common
from qwen3vl_jax.cli.draw import Mark, draw_answer, draw_marks, read_marks
from qwen3vl_jax.cli.infer_arguments import arguments, check_media_of_lines
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime.console import memory_advice

DEMO = Path(common.DEMO)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    infer.main([str(a) for a in arguments])
    return capsys.readouterr()


def test_without_arguments_the_demo_answers_and_says_how_long_it_took(capsys):
    out, err = run(capsys)
    rows = [line.split() for line in out.strip().splitlines()]
    assert all(word.isdigit() for row in rows for word in row) and len(rows) >= 2
    for word in ("load", "compile", "prefill", "decode", "total"):
        assert word in err
    first = [line.split(":")[0].split("/")[0] for line in err.splitlines()[:3]]
    assert first == ["loading ", "no --ckpt", "compiling"], err
    assert "demo/pictures/grid.png" in err and common.DEMO_PROMPT in err and "wrong" not in err


def test_the_demo_says_when_it_is_asked_what_it_does_not_know(capsys):
    """An image that is no digits, a question of another kind, both; nothing of it with --ckpt."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save("photo.png")
    few = ("--max-new-tokens", 2)
    for options, words in (
        (("--image", "photo.png"), ("image is none of digits and the question is none",)),
        (
            ("--image", "photo.png", "--prompt", "Count the 7s."),
            ("(the image is none of digits: ",),
        ),
        (("--prompt", "What is a cat?"), ("(the question is none that it has learned: ",)),
        (
            ("--image", common.DEMO_IMAGE, "--prompt", "find every three."),
            ("nothing else, --ckpt",),
        ),
    ):
        err = run(capsys, *options, *few).err
        (line,) = [line for line in err.splitlines() if line.startswith("no --ckpt: ")]
        assert all(word in line for word in words) and "handwritten digits" in line, line
    assert "no --ckpt" not in run(capsys, "--ckpt", DEMO, "--prompt", "Hi", *few).err


def test_no_answer_of_numbers_that_are_none(capsys):
    """A vision tower with NaN: one error, exit code 2, and text alone goes on."""

    def spoil(tensors):
        name = next(name for name in tensors if name.endswith("patch_embed.proj.bias"))
        tensors[name] = np.full_like(tensors[name], np.nan)
        return tensors

    ckpt, name, image, file = checkpoint("broken", spoil)
    ask = (ckpt, name, image, file, "--prompt", common.DEMO_PROMPT)
    for mode in ((), ("--stream",), ("--embed",)):
        with pytest.raises(SystemExit) as stop:
            run(capsys, *ask, *mode)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "", out
        assert err.splitlines()[-1].startswith("error: ") and "--dtype bfloat16" in err, err
    assert run(capsys, ckpt, name, "--prompt", "Hi").out.startswith("I am a very small Qwen3-VL.")


def test_ctrl_c_ends_the_process_cleanly():
    """While it compiles: one line, exit code 130, what was printed is there, and nothing crashes."""
    code = (
        "import os, signal, threading, jax\n"
        "from qwen3vl_jax.runtime import console\n"
        "def main():\n"
        "    print('said', end='')\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    with console.one_line_errors():\n"
        "        {work}\n"
        "    print('never')\n"
        "console.GRACE = 1\n"
        "console.run_script(main)\n"
    )
    deaf = "import ctypes; ctypes.CDLL(None).sleep(99)"  # as XLA is while it compiles
    swallowed = (
        "try: threading.Event().wait(99)\n        except KeyboardInterrupt: raise ValueError"
    )
    for work in ("threading.Event().wait(99)", deaf, swallowed):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{work}", work)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=DEMO.parent.parent,
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "said", "interrupted\n")


def test_int8_weights_answer(capsys):
    text = run(capsys, "--weights", "int8").out
    assert all(word.isdigit() for word in text.split()) and len(text.split()) > 3


def test_an_adapter_changes_the_answer_and_none_of_the_weights(capsys):
    """One whose B is zero answers as the demo does, to the last token; one with another B does not."""
    cfg = Config.from_hf(DEMO)
    settings = Adapter.uniform(
        {n: (True,) * len(p.modules) for n, p in lora_targets(cfg).items()}, 2, 2
    )
    rng, matrices = np.random.default_rng(0), {}
    for name, place in lora_targets(cfg).items():
        a, b = place.shapes(2)
        matrices |= {f"{name}.a": rng.standard_normal(a).astype(np.float32)}
        matrices |= {f"{name}.b": np.zeros(b, np.float32)}
    save_adapter("zero", cfg, matrices, settings)
    changed = {name: x + name.endswith(".b") for name, x in matrices.items()}
    save_adapter("other", cfg, changed, settings)
    ask = ("--max-new-tokens", 8)
    want = run(capsys, *ask).out
    assert run(capsys, *ask, "--adapter", "zero").out == want
    assert run(capsys, *ask, "--adapter", "other").out != want


def test_streamed_and_whole_answers_are_the_same(capsys):
    options = ("--prompt", "Find every 4.", "--max-new-tokens", 60)
    whole, streamed = run(capsys, *options).out, run(capsys, *options, "--stream").out
    assert whole == streamed and whole.strip()


def test_stop_text_is_cut_off(capsys):
    out = run(capsys).out
    assert run(capsys, "--stop", out[2:5]).out.rstrip("\n") == out[:2]
    empty = run(capsys, "--stop", out[0])
    assert empty.out == "\n" and "the answer is empty\n" in empty.err


def test_seeds_and_sampling(capsys):
    hot = ("--temperature", 5, "--max-new-tokens", 12)
    first, again = (run(capsys, *hot, "--seed", 3).out for _ in range(2))
    assert first == again != run(capsys, *hot, "--seed", 4).out


def test_a_conversation_from_a_file(capsys):
    ask = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(common.DEMO_IMAGE)},
                {"type": "text", "text": common.DEMO_PROMPT},
            ],
        }
    ]
    Path("chat.json").write_text(json.dumps(ask))
    want = run(capsys).out
    assert run(capsys, "--messages", "chat.json").out == want
    ask[0]["content"][0] = {"type": "image"}  # the picture comes beside the file
    Path("chat.json").write_text(json.dumps({"messages": ask, "tools": None}))
    assert run(capsys, "--messages", "chat.json", "--image", common.DEMO_IMAGE).out == want


def test_draw_writes_one_file_a_picture(capsys):
    Image.open(common.DEMO_IMAGE).save("second.png")
    out, err = run(
        capsys, "--image", common.DEMO_IMAGE, "--draw", "out.png", "--prompt", "Find every 4."
    )
    drawn = sorted(p.name for p in Path.cwd().glob("out*.png"))
    assert drawn == (["out.png"] if read_marks(out)[0] else []) and ("drew" in err) == bool(drawn)
    ask = [
        {"role": "user", "content": [{"type": "image", "image": n} for n in ("second.png",) * 2]}
    ]
    text = '[{"bbox_2d": [100, 200, 300, 400], "label": "4"}]'
    draw_answer(Path("two.png"), ask, text, [])
    assert {p.name for p in Path.cwd().glob("two*.png")} == {"two.png", "two-2.png"}


def test_marks_are_read_from_fenced_cut_and_mixed_answers():
    text = 'Here:\n```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"point_2d": [5, 6.5]}, {"bbo'
    assert read_marks(text)[0] == [Mark((1, 2, 3, 4), "a"), Mark((5, 6.5), "")]
    assert not read_marks('{"bbox_2d": [1, 2], "label": 3} {"bbox_2d": ["x", 2, 3, 4]} {bad}')[0]


BOX = '"bbox_2d": [1, 2, 3, 4]'
ENTRIES = {
    # labels found, entries that cannot be read
    r'[{%s, "label": "\\frac{a}{b}"}, {%s, "label": "\frac{a}{b} \sqrt{c}"}]': (
        [r"\frac{a}{b}", r"\frac{a}{b} \sqrt{c}"],
        0,
    ),
    '{%s, "label": "a", "attributes": {"colour": {"name": "red"}}}': (["a"], 0),
    '{"objects": [{%s, "label": "a"}], "more": {"left": {%s, "label": "b"}}}': (["a", "b"], 0),
    '```json\n[{%s, "label": "a"}]\n```\nand\n```json\n[{%s}, {%s, "label": null}]\n```': (
        ["a", "", ""],
        0,
    ),
    '[{%s, "label": "a } b"}, {%s, "label": "c {': (["a } b"], 1),
    '[{%s, "label": "a"}, {"bbox_2d": [1, 2, NaN, 4]}, {"bbox_2d": [1, 2, 3, 1e999]}]': (["a"], 2),
    '[{%s, "label": "a\nb"}, {"bbox_2d": [1, 2, 3, "4"]}, {"bbox_2d": null}]': (["a\nb"], 2),
    '{"bbox_2d": [[1, 2, 3, 4], [1, 2, 3, 4]], "label": "a"}': (["a", "a"], 0),
    "{'bbox_2d': [1, 2, 3, 4]} {": ([], 1),
    "{" * 20_000 + "[" * 20_000: ([], 0),
}


@pytest.mark.parametrize("text", ENTRIES, ids=range(len(ENTRIES)))
def test_entries_are_read_as_json(text):
    """Braces in labels, nested objects, several lists; what cannot be read is counted."""
    marks, unread = read_marks(text.replace("%s", BOX))
    assert ([mark.label for mark in marks], unread) == ENTRIES[text]
    assert {mark.place for mark in marks} <= {(1, 2, 3, 4)}


def test_what_is_not_drawn_is_said(capsys, tmp_path):
    """Places far outside the image, and entries that are no JSON: a line each, and no error."""
    text = '{"bbox_2d": [1, 2, NaN, 4]} {"bbox_2d": [-1e308, 2, 1e308, 4], "label": "%s"} {%s}'
    text = text % ("a" * 100_000, BOX)
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    ask = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "a.png")}]}]
    draw_answer(tmp_path / "b.png", ask, text, [])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("--draw: 1 entries") and "1 marks" in lines[1]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_box_is_drawn_where_it_says():
    blank = Image.new("RGB", (400, 300), "white")
    changed = np.any(
        np.asarray(draw_marks(blank, [Mark((250, 500, 750, 1000), "")])) != 255, axis=-1
    )
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert (
        rows[0] in range(148, 152)
        and columns[0] in range(98, 102)
        and columns[-1] in range(298, 302)
    )
    assert not changed[200:250, 150:250].any()
    small = draw_marks(Image.new("L", (30, 50)), [Mark((500, 500), "p")])
    assert min(small.size) >= 256 and small.mode == "RGB"


def checkpoint(name, change=None, drop=()):
    """A copy of the demo checkpoint with changed tensors or without some files."""
    shutil.copytree(DEMO, name, ignore=shutil.ignore_patterns(*drop))
    if change:
        tensors = change(load_file(DEMO / "model.safetensors"))
        save_file(tensors, Path(name) / "model.safetensors", metadata={"format": "pt"})
    return ("--ckpt", name, "--image", common.DEMO_IMAGE)


def picture(name, data):
    Path(name).write_bytes(data)
    return ("--image", name)


def jpeg():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def bomb():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def long_picture():
    file = io.BytesIO()
    Image.new("L", (4020, 20)).save(file, "PNG")
    return file.getvalue()


def missing_shard():
    options = checkpoint("shards")
    names = list(load_file(DEMO / "model.safetensors"))
    weight_map = {n: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, n in enumerate(names)}
    Path("shards/model.safetensors").rename("shards/model-00001-of-00002.safetensors")
    Path("shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return options


def wrong_shape():
    def cut(tensors):
        name = "model.language_model.layers.0.self_attn.q_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])
        return tensors

    return checkpoint("shape", cut)


def messages(content):
    Path("chat.json").write_text(json.dumps([{"role": "user", "content": content}]))
    return ("--messages", "chat.json")


def lines(*conversation):
    Path("in.jsonl").write_text(json.dumps({"messages": conversation}) + "\n")
    return ("--input", "in.jsonl", "--output", "out.jsonl")


def test_settings_of_media_that_lines_may_have(tmp_path):
    """A word of a video's item is enough, also one that is escaped; the rest is seen line by line."""
    path, asked = tmp_path / "in.jsonl", ["--fps", "2", "--output", "o", "--input"]
    for text, fine in (("frames", True), ("video", True), ("\\u0076ideo", True), ("image", False)):
        path.write_text(f'{{"a": 1}}\n{{"b": "{text}"}}\n')
        args = arguments([*asked, str(path)])
        with (
            contextlib.nullcontext() if fine else pytest.raises(InputError, match="--fps: no line")
        ):
            check_media_of_lines(args)

    def one_line():
        yield b'{"video": "a"}'
        pytest.fail("read on after the first video")

    opened = lambda mode: contextlib.nullcontext(one_line())  # noqa: E731
    args.input = SimpleNamespace(is_file=lambda: True, open=opened)
    check_media_of_lines(args)


ASK = ("--image", common.DEMO_IMAGE, "--prompt", "hi")
BAD = {
    "no such picture": (lambda: ("--image", "nowhere.png"), ["nowhere.png"]),
    "truncated jpeg": (lambda: picture("cut.jpg", jpeg()[:700]), ["cut.jpg"]),
    "decompression bomb": (lambda: picture("bomb.png", bomb()), ["bomb.png"]),
    "aspect ratio": (lambda: picture("long.png", long_picture()), ["200"]),
    "text file as picture": (lambda: picture("note.txt", b"hello"), ["note.txt"]),
    "no weights": (lambda: checkpoint("bare", drop=["*.safetensors"]), ["bare"]),
    "missing shard": (missing_shard, ["model-00002-of-00002.safetensors"]),
    "wrong shape": (wrong_shape, ["q_proj"]),
    "no such checkpoint": (lambda: ("--ckpt", "nowhere", *ASK), ["nowhere"]),
    "no template": (lambda: checkpoint("mute", drop=["chat_template*"]), ["template"]),
    "prompt longer than the cache": (lambda: (*ASK, "--max-len", 8), ["prompt has", "8"]),
    "a cache of nothing": (
        lambda: (*ASK, "--max-len", 0),
        ["--max-len: got 0, expected a whole number"],
    ),
    "placeholder without a picture": (lambda: messages([{"type": "image"}]), ["placeholder"]),
    "picture without a placeholder": (
        lambda: (*messages("hi"), "--image", common.DEMO_IMAGE),
        ["placeholder"],
    ),
    "hub id without network": (lambda: ("--ckpt", "Qwen/Qwen3-VL-2B-Instruct", *ASK), ["Qwen/"]),
    "temperature": (lambda: (*ASK, "--temperature", -1), ["temperature", "-1"]),
    "top-p": (lambda: (*ASK, "--top-p", 1.5), ["top_p", "1.5"]),
    "new tokens": (lambda: (*ASK, "--max-new-tokens", 0), ["--max-new-tokens: got 0"]),
    "messages are no json": (lambda: ("--messages", DEMO / "chat_template.jinja"), ["--messages"]),
    "messages and prompt": (lambda: (*messages("hi"), "--prompt", "x"), ["--prompt"]),
    "pixels": (lambda: (*ASK, "--max-pixels", -5), ["max_pixels", "-5"]),
    "empty prompt": (lambda: ("--prompt", " "), ["--prompt is empty"]),
    "empty checkpoint": (lambda: ("--ckpt", "", "--prompt", "hi"), ["--ckpt is empty"]),
    "draw onto the picture": (
        lambda: (*picture("own.png", jpeg()), "--draw", "own.png"),
        ["own.png", "itself"],
    ),
    "messages with another key": (
        lambda: (
            Path("chat.json").write_text('{"messages": [], "tool": []}'),
            "--messages",
            "chat.json",
        )[1:],
        ["unknown key 'tool', expected messages and tools"],
    ),
    "messages of another shape": (
        lambda: (Path("chat.json").write_text('{"messages": null}'), "--messages", "chat.json")[1:],
        ["chat.json", "list of messages"],
    ),
    "no such clip": (lambda: ("--video", "gone.mp4", "--prompt", "hi"), ["gone.mp4"]),
    "picture as clip": (lambda: ("--video", common.DEMO_IMAGE), ["grid.png", "picture"]),
    "fps and number": (
        lambda: ("--video", "x.mp4", "--fps", 2, "--num-frames", 3),
        ["fps", "num_frames"],
    ),
    "chat and a prompt": (lambda: ("--chat", "--prompt", "hi"), ["--chat", "--prompt"]),
    "rerank nothing": (lambda: ("--rerank", "--prompt", "hi"), ["--document"]),
    "embed nothing": (lambda: ("--embed",), ["--embed", "--prompt"]),
    "two at once": (lambda: ("--embed", "--rerank"), ["one of them"]),
    "embed and stop": (lambda: ("--embed", *ASK, "--stop", "9"), ["--embed", "leave --stop out"]),
    "embed and system": (lambda: ("--embed", *ASK, "--system", "s"), ["leave --system out"]),
    "rerank and dims": (
        lambda: ("--rerank", *ASK, "--document", "x", "--dims", 3),
        ["--dims", "only with --embed"],
    ),
    "chat and answers": (lambda: ("--chat", "--answers", 2), ["--chat", "leave --answers out"]),
    "rows alone": (lambda: (*ASK, "--rows", 2), ["--rows", "only with --input"]),
    "instruction alone": (lambda: (*ASK, "--instruction", "x"), ["--embed or --rerank"]),
    "chat about no file": (lambda: ("--chat", "--image", "gone.png"), ["gone.png: ", "no such"]),
    "chat about no clip": (lambda: ("--chat", "--video", "gone.mp4"), ["gone.mp4: ", "no such"]),
    "no number": (lambda: (*ASK, "--temperature", "abc"), ["--temperature", "'abc'"]),
    "no choice": (lambda: (*ASK, "--dtype", "x"), ["--dtype", "'x'", "float16"]),
    "no option": (lambda: (*ASK, "--nosuch"), ["--nosuch", "--help"]),
    "nothing to ask of no checkpoint": (lambda: ("--ckpt", "./gone"), ["gone: no such directory"]),
    "too many dims": (lambda: ("--embed", "--prompt", "hi", "--dims", 999), ["dims is 999", "192"]),
    "no reranker": (lambda: ("--rerank", "--prompt", "a", "--document", "b"), ["yes", "no"]),
    "no fp8 weights": (lambda: (*ASK, "--weights", "fp8"), ["no FP8 weights", "int8"]),
    "no adapter": (lambda: (*ASK, "--adapter", DEMO), ["PEFT", "adapter_config.json"]),
    "empty adapter": (lambda: (*ASK, "--adapter", ""), ["--adapter is empty"]),
    "chunk": (lambda: (*ASK, "--prefill-chunk", 0), ["chunk", "0"]),
    "draw on no image": (
        lambda: ("--ckpt", DEMO, "--prompt", "hi", "--draw", "out.png"),
        ["--draw: the conversation has no image"],
    ),
    "fps without a video": (lambda: (*ASK, "--fps", 2), ["--fps", "only with --video"]),
    "fps of a conversation without a video": (
        lambda: (*messages("a video"), "--fps", 2),
        ["--fps: the conversation has no video"],
    ),
    "max pixels of lines without an image": (
        lambda: (*lines({"role": "user", "content": "hi"}), "--max-pixels", 4096),
        ["--max-pixels: no line of in.jsonl has images"],
    ),
    "frames of documents without a video": (
        lambda: ("--rerank", "--prompt", "hi", "--document", "a", "--num-frames", 4),
        ["--num-frames: there is no video"],
    ),
    "min pixels of no image": (
        lambda: ("--video", "x.mp4", "--min-pixels", 9),
        ["--min-pixels", "only with --image"],
    ),
    "second image too thin": (
        lambda: (*ASK[:2], *picture("long.png", long_picture())),
        ["image 2: ", "200 times"],
    ),
    "image too large": (
        lambda: (*ASK, "--min-pixels", 2**30),
        ["error: an image of 3", " MiB of patches, expected"],
    ),
    "image without a place": (
        lambda: (*messages("hi"), "--image", common.DEMO_IMAGE),
        ["0 image placeholder(s)", "{type: image}", "(--image)"],
    ),
    "message with an image beside its content": (
        lambda: (
            Path("chat.json").write_text('[{"role": "user", "content": "hi", "image": "a.png"}]'),
            "--messages",
            "chat.json",
        )[1:],
        ["message 1: unknown key 'image' (an image or video is an item of the content"],
    ),
    "empty folder": (
        lambda: (Path("none").mkdir(), *ASK, "--ckpt", "none")[1:],
        ["none: no checkpoint and no run in this folder"],
    ),
    "draw to a text file": (lambda: (*ASK, "--draw", "out.txt"), ["out.txt"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(case, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(Path.cwd() / "empty"))
    make, words = BAD[case]
    options = [str(option) for option in make()]
    if not {"--draw", "--embed", "--rerank", "--chat", "--input"}.intersection(options):
        options += ["--draw", "drawn.png"]
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        infer.main(options)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert sorted(Path.cwd().rglob("*")) == before


def test_an_unknown_size_is_one_line_and_a_known_one_a_table(capsys):
    with pytest.raises(SystemExit) as stop:
        about.main(["9b"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "9b" in err and "8b" in err
    assert about.main(["2b"]) == 0
    assert "2,127,532,032" in capsys.readouterr().out


def test_out_of_memory_is_one_line_with_bytes_and_the_option_that_helps():
    with (
        pytest.raises(
            InputError, match=r"weights 2\.00 GiB, cache 0\.50 GiB; lower it with --dtype"
        ),
        memory_advice({"weights": 2**31, "cache": 2**29}, "--dtype"),
    ):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
    with pytest.raises(RuntimeError, match="other"), memory_advice({}, ""):
        raise RuntimeError("other")


@pytest.mark.parametrize("mode", ["", "--chat", "--embed", "--input"])
def test_weights_without_room_are_one_line(mode, capsys, monkeypatch):
    """Whatever is asked of them."""

    def full(*_, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(common.q3, "load", full)
    Path("in.jsonl").write_text('{"messages": []}')
    options = {"--embed": ["--prompt", "hi"], "--input": ["in.jsonl", "--output", "out.jsonl"]}
    with pytest.raises(SystemExit) as stop:
        infer.main([*filter(None, [mode]), *options.get(mode, [])])
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert err[-1].startswith("error: out of memory: checkpoint on disk 0.01 GiB; lower it with")


def test_work_without_room_is_told_by_part(capsys, monkeypatch):
    """A batch file's rows and pictures, an embedding's pictures."""

    def full(params, cfg, batch, dims=None, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr("qwen3vl_jax.inference.engine.generate_many", full)
    monkeypatch.setattr(q3, "embed", full)
    Path("in.jsonl").write_text('{"messages": []}')
    for options, words in (
        (["--input", "in.jsonl", "--output", "out.jsonl"], "cache (at most) 0.16 GiB, images"),
        (["--embed", "--image", str(common.DEMO_IMAGE)], "images (about) 0.00 GiB"),
    ):
        with pytest.raises(SystemExit) as stop:
            infer.main(options)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "error: out of memory: weights 0.0" in err, err
        assert words in err, err


def test_embed_prints_a_unit_vector(capsys):
    """Of a text and a picture, whole and cut: what the function gives."""
    for dims in (192, 7):
        infer.main(
            ["--embed", "--prompt", "hi", "--image", str(common.DEMO_IMAGE), "--dims", str(dims)]
        )
        vector = np.array(json.loads(capsys.readouterr().out))
        assert vector.shape == (dims,) and abs(np.linalg.norm(vector) - 1) < 1e-5


def test_a_length_beyond_the_positions_is_said(capsys):
    text = SimpleNamespace(max_position_embeddings=4096)
    model = SimpleNamespace(config=SimpleNamespace(text=text))
    for length, said in ((None, False), (4096, False), (4097, True)):
        found = common.max_length(SimpleNamespace(max_len=length), model)
        err = capsys.readouterr().err
        assert found == (length or 4096) and ("--max-len 4097: the model has 4096" in err) == said
