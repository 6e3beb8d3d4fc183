"""The bundled demo: its data, its chat format, its checkpoint, and whether it can read."""

import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

import qwen3vl_jax as q3
from demo import evaluate, examples, files, gallery, pictures, scans, tasks
from qwen3vl_jax.cli.demo_notice import notice

CHECKPOINT = evaluate.CHECKPOINT


@pytest.fixture(scope="module")
def proc():
    """The processor of the bundled checkpoint."""
    return q3.Processor.from_pretrained(CHECKPOINT)


def composed(count=60, part="held_out", **options):
    """Pictures, every other one with scattered digits."""
    rng = np.random.default_rng(3)
    pool = scans.load(part)
    return [pictures.compose(rng, pool, loose=i % 2 == 1, **options) for i in range(count)]


def test_scans_are_split_before_anything_is_composed():
    """Every scan is on one side, 20 % of each digit held out, and no scan is on both."""
    with np.load(scans.FILE) as file:
        data, labels, held_out = file["scans"], file["labels"], file["held_out"]
    assert data.shape == (1797, 8, 8) and data.max() == 16
    assert np.array_equal(held_out, scans.split(labels))
    for digit in range(10):
        assert abs(held_out[labels == digit].mean() - 0.2) < 0.005
    train, kept = ({scan.tobytes() for scan in data[held_out == side]} for side in (False, True))
    assert not train & kept
    sides = [scans.load("train"), scans.load("held_out")]
    assert [len(side.labels) for side in sides] == [(~held_out).sum(), held_out.sum()]
    with pytest.raises(ValueError, match="expected train or held_out"):
        scans.load("test")


def test_boxes_surround_ink_and_only_their_digit():
    """Inside the picture, in reading order, and the pixels outside all boxes show no ink."""
    for picture in composed():
        height, width = picture.pixels.shape[:2]
        boxes = picture.boxes
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [width, height]).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 3).all()
        assert len(picture.labels) == len(picture.cell) == len(boxes)
        order = picture.cell[:, 0] * picture.grid[1] + picture.cell[:, 1]
        assert (np.diff(order) > 0).all()
        grey = picture.pixels.astype(float).mean(-1)
        outside = np.ones_like(grey, bool)
        for x0, y0, x1, y1 in boxes.astype(int):
            outside[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = False
            inside = grey[y0:y1, x0:x1]
            assert inside.max() - inside.min() > 40
        assert np.ptp(grey[outside]) < 110  # paper: grain and shade alone


def test_training_pictures_have_the_processors_sizes():
    """Sides are multiples of 32, the area has at most 256 patches, and a seed gives one picture."""
    for a, b in zip(*(composed(part="train", snap=True, distort=True) for _ in range(2))):
        height, width = a.pixels.shape[:2]
        assert height % 32 == 0 and width % 32 == 0 and height * width <= 256 * 16 * 16
        assert np.array_equal(a.pixels, b.pixels)


def test_answers_say_what_was_composed():
    """Every wording is asked; readings, counts, totals, cells and boxes follow from the picture."""
    rng = np.random.default_rng(0)
    for picture in composed():
        height, width = picture.pixels.shape[:2]
        for kind, wordings in tasks.WORDINGS.items():
            if kind in tasks.WHOLE and not picture.full:
                with pytest.raises(ValueError, match="empty cells"):
                    tasks.ask(rng, picture, kind)
                continue
            for wording in range(len(wordings)):
                turn = tasks.ask(rng, picture, kind, wording)
                assert "{" not in turn.question
                if kind == "reverse":
                    digits = np.array(turn.answer.split(), int)
                    assert np.array_equal(digits[::-1], picture.labels)
                    assert turn.answer.count("\n") == picture.grid[0] - 1
                elif kind == "read":
                    rows = [line.split() for line in turn.answer.split("\n")]
                    assert np.array_equal(np.array(rows, int).ravel(), picture.labels)
                    assert np.shape(rows) == picture.grid
                elif kind == "total":
                    assert turn.answer == str(len(picture.labels))
                elif kind == "cell":
                    row, col = (
                        int(w.strip(",.?")) for w in turn.question.split() if w[0].isdigit()
                    )
                    at = (picture.cell == [row - 1, col - 1]).all(1)
                    assert turn.answer == str(picture.labels[at][0])
                elif kind == "count":
                    assert int(turn.answer) == (picture.labels == turn.digit).sum()
                else:
                    found = json.loads(turn.answer)
                    assert all(item["label"] == str(turn.digit) for item in found)
                    cells = pictures.centre_cells(picture)
                    order = sorted(range(len(cells)), key=lambda i: (*cells[i][::-1], i))
                    true = picture.boxes[[i for i in order if picture.labels[i] == turn.digit]]
                    scale = np.array([width, height] * 2) / 1000
                    boxes = np.array([item["bbox_2d"] for item in found]).reshape(-1, 4)
                    assert np.allclose(boxes * scale, true, atol=0.51 * scale.max())
    asked = {*tasks.READ, *tasks.COUNT, *tasks.FIND}
    assert {"Read the digits row by row.", "How many {many} are there?", "Find every {d}."} <= asked


def test_training_rows_are_what_the_processor_makes(proc):
    """A picture and a question give the tokens and patches in training that they give in use."""
    words = examples.Words(str(CHECKPOINT))
    rng = np.random.default_rng(1)
    for picture in composed(12, snap=True):
        row = examples.make_row(rng, words, picture, 256)
        turn = tasks.Turn("count", "How many sevens are there?", "2", 7)
        exam = evaluate.Exam(picture, turn)
        made = proc.inputs(evaluate.conversation(exam))
        ids = made["input_ids"][0].tolist()
        start, asked = ids.index(words.image), examples.spoken(words, turn, first=True)[0]
        count = ids.count(words.image)
        assert ids[start + count + 1 :] == asked
        assert made["image_grid_thw"][0].tolist() == list(examples.grid_of(picture))
        patches = examples.to_patches(examples.frames_of(picture)) / np.float32(127.5) - 1
        assert np.abs(made["pixel_values"] - patches).max() < 1e-6
        # labels: placeholders name what stands in their cell, then answers end their turns
        place = row.ids.index(words.image)
        named = row.labels[place : place + count]
        digits = [name for name in named if name != words.nothing]
        assert set(digits) <= set(words.seen) and row.labels[place + count] == examples.IGNORE_INDEX
        assert len(digits) == len({tuple(cell) for cell in pictures.centre_cells(picture)})
        learned = [b for a, b in zip(row.ids, row.labels) if b != examples.IGNORE_INDEX and a == b]
        assert learned and proc.tokenizer.eos_id in learned


def test_tokenizer_round_trip_and_special_tokens(proc):
    """Any text survives; digits are one token each; Qwen's 26 added tokens have their flags."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    texts = [
        "Find every 4.",
        "3 5 1\n7 7 2",
        "caf\u00e9 \u4f60\u597d \U0001f600\tx\r\n ",
        '[{"a": -1.5}]',
    ]
    for text in [*texts, *tasks.READ, tasks.INTRODUCTION]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids  # NFC
    for digits in ("7", "1797", "0123456789"):
        assert tokenizer.encode(digits).tokens == list(digits)
    added = tokenizer.get_added_tokens_decoder()
    assert [added[i].content for i in sorted(added)] == [*files.SPECIAL, *files.ADDED]
    assert sorted(added) == list(range(min(added), min(added) + 26))
    assert {t.content for t in added.values() if t.special} == set(files.SPECIAL)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == tokenizer.get_vocab_size()
    for key, name in (("image_token_id", "image_pad"), ("video_token_id", "video_pad")):
        assert tokenizer.id_to_token(config[key]) == f"<|{name}|>"
    for key in ("vision_start", "vision_end"):
        assert tokenizer.id_to_token(config[f"{key}_token_id"]) == f"<|{key}|>"
    assert proc.tokenizer.eos_id == tokenizer.token_to_id("<|im_end|>")


USER = "<|im_start|>user\n"
END = "<|im_end|>\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"where": "\u00e9"}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"where": "here"}}\n</tool_call>'


def said(role, content, **more):
    """One message."""
    return {"role": role, "content": content, **more}


TEMPLATE_CASES = {
    "no default system prompt": ([said("user", "Hi")], f"{USER}Hi{END}"),
    "system text": (
        [said("system", "Be brief."), said("user", "Hi")],
        f"<|im_start|>system\nBe brief.{END}{USER}Hi{END}",
    ),
    "system items": (
        [said("system", [{"type": "text", "text": "Be brief."}]), said("user", "Hi")],
        f"<|im_start|>system\nBe brief.{END}{USER}Hi{END}",
    ),
    "later system text is dropped": (
        [said("user", "Hi"), said("system", "Be brief.")],
        f"{USER}Hi{END}",
    ),
    "items in order, nothing between": (
        [
            said(
                "user",
                [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}],
            )
        ],
        f"{USER}A{PICTURE}B{END}",
    ),
    "two turns": (
        [said("user", "Hi"), said("assistant", "Hello."), said("user", "Bye")],
        f"{USER}Hi{END}<|im_start|>assistant\nHello.{END}{USER}Bye{END}",
    ),
    "tool calls": (
        [
            said("user", "Hi"),
            said(
                "assistant",
                "Let me look.",
                tool_calls=[
                    {"function": {"name": "look", "arguments": {"where": "here"}}},
                    {"name": "look", "arguments": '{"where": "here"}'},
                ],
            ),
            said("tool", "nothing"),
            said("tool", [{"type": "image"}]),
            said(
                "assistant",
                "",
                tool_calls=[
                    {"name": "look", "arguments": {"where": "here"}},
                ],
            ),
        ],
        f"{USER}Hi{END}<|im_start|>assistant\nLet me look.\n{CALL}\n{CALL}{END}"
        "<|im_start|>user\n<tool_response>\nnothing\n</tool_response>"
        f"\n<tool_response>\n{PICTURE}\n</tool_response>{END}<|im_start|>assistant\n{CALL}{END}",
    ),
}


@pytest.mark.parametrize("case", TEMPLATE_CASES)
def test_template(proc, case):
    """The chat format of Qwen3-VL Instruct, with and without a generation prompt."""
    messages, expected = TEMPLATE_CASES[case]
    assert proc.template.render(messages, None, False, False, {}) == expected
    opened = expected + "<|im_start|>assistant\n"
    assert proc.template.render(messages, None, True, False, {}) == opened


def test_template_numbers_pictures_and_clips(proc):
    """add_vision_id counts pictures and clips apart, over the whole conversation."""
    media = [{"type": "image"}, {"image_url": "x"}, {"type": "video"}, {"image": "x"}]
    messages = [said("user", media), said("assistant", "Yes."), said("user", media[:1])]
    got = proc.template.render(messages, None, False, False, {"add_vision_id": True})
    assert got == (
        f"{USER}Picture 1: {PICTURE}Picture 2: {PICTURE}Video 1: {CLIP}Picture 3: {PICTURE}{END}"
        f"<|im_start|>assistant\nYes.{END}{USER}Picture 4: {PICTURE}{END}"
    )


def test_template_lists_tools(proc):
    """Tools make a system turn, behind the system text if there is one, one JSON a line."""
    alone, after = (
        proc.template.render([*system, said("user", "Hi")], [TOOL, TOOL], False, False, {})
        for system in ([], [said("system", "Be brief.")])
    )
    line = json.dumps(TOOL, ensure_ascii=False)
    assert f"<tools>\n{line}\n{line}\n</tools>" in alone
    assert alone.startswith("<|im_start|>system\n# ") and alone.endswith(f"{END}{USER}Hi{END}")
    assert after == alone.replace("system\n# ", "system\nBe brief.\n\n# ", 1)


def test_checkpoint_is_small_and_complete():
    """At most 8 MB, the files of a release, bfloat16, and side files as `demo.files` writes them."""
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert sum((CHECKPOINT / name).stat().st_size for name in names) <= 8_000_000
    configs = ("", "generation_", "preprocessor_", "video_preprocessor_", "tokenizer_")
    wanted = {f"{name}config.json" for name in configs}
    assert names == wanted | {"model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (CHECKPOINT / "chat_template.jinja").read_bytes() == files.TEMPLATE.read_bytes()
    params, cfg = q3.load(CHECKPOINT)
    assert params["embed"].dtype == "bfloat16"
    assert len(cfg.vision.deepstack_visual_indexes) >= 2
    assert cfg.text.num_key_value_heads < cfg.text.num_attention_heads
    assert (cfg.vision.patch_size, cfg.vision.temporal_patch_size) == (16, 2)


def test_files_are_made_again(tmp_path):
    """The recipe's side files are those of the bundled checkpoint."""
    files.write(tmp_path)
    for path in tmp_path.iterdir():
        made, bundled = path.read_text(), (CHECKPOINT / path.name).read_text()
        if path.name == "tokenizer.json":  # its layout is the tokenizers library's
            made, bundled = (json.loads(text)["model"]["vocab"] for text in (made, bundled))
        assert made == bundled, path.name


def test_bundled_pictures_are_composed_from_held_out_scans():
    """demo/pictures holds what `demo.gallery` composes."""
    assert {path.name for path in gallery.FOLDER.iterdir()} == set(gallery.PICTURES)
    for name in gallery.PICTURES:
        with Image.open(gallery.FOLDER / name) as image:
            difference = np.asarray(image).astype(int) - gallery.compose(name).pixels
            assert np.abs(difference).max() <= 1  # another numpy may round otherwise


def test_figures_count_what_they_say():
    """Reading by place, counting by number, boxes by IoU over 0.5, one box a digit."""
    picture = next(p for p in composed() if p.full and len(p.labels) >= 4 and p.grid[0] > 1)
    digit = int(picture.labels[0])
    truth = (picture.labels == digit).sum()
    exam = evaluate.Exam(picture, tasks.Turn("find", "", "", digit))
    answer = tasks.find_answer(picture, digit)
    assert evaluate.find(exam, answer) == (truth, truth)
    doubled = json.dumps(json.loads(answer)[:1] * 3)
    assert evaluate.find(exam, doubled) == (1, truth)
    for nonsense in ("", "[]", "{}", "[1]", '[{"bbox_2d": [1, 2]}]', '[{"bbox_2d": [0, 0, 1, 1]}]'):
        assert evaluate.find(exam, nonsense) == (0, truth)
    size = picture.labels.size
    text = tasks.read_answer(picture)
    assert evaluate.read(exam, text) == (size, size)
    assert evaluate.read(exam, text.replace("\n", " ")) == (picture.grid[1], size)
    assert evaluate.read(exam, "") == (0, size)
    unit = np.array([[0, 0, 10, 10]])
    other = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    assert np.allclose(evaluate.iou(unit, other), [[1, 1 / 3, 0]])


def test_held_out_pictures_are_read(proc):
    """24 held-out pictures through processor and generate: digits, counts and boxes."""
    params, _ = q3.load(CHECKPOINT, dtype="float32")
    exams = evaluate.compose(24, seed=1)
    scores = evaluate.score(list(evaluate.answer(params, proc, exams, rows=24)))
    shares = {name: score.share for name, score in scores.items()}
    assert shares["digits read"] >= 0.95, shares
    assert shares["counts right"] >= 0.8, shares
    assert shares["boxes found"] >= 0.85, shares


def test_several_images_are_none_of_what_it_learned():
    """Each alone says nothing; together the answer is said to be wrong."""
    paper = np.full((8, 8, 3), 250, np.uint8)
    question = "Read the digits row by row."
    assert "expect a wrong answer" not in notice(question, [paper])
    assert "these are 2: expect a wrong answer" in notice(question, [paper, paper])
