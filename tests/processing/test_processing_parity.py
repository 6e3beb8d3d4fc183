"""Pixels, ids and whole inputs beside transformers' own processors, live."""

import warnings

import numpy as np
import pytest
import torchvision_shim  # noqa: F401
import toy_checkpoint as toy
from chats import free
from PIL import Image
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks import images
from qwen3vl_jax.processing.image_patches import ImageSettings, image_to_patches, smart_resize
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import Tokenizer

RELEASED = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def pictures(count, low=8, high=330, seed=0):
    """RGB pictures of random sizes: noise, waves, and flat shapes with sharp edges."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = rng.integers(low, high, 2)
        if number % 3 == 0:
            yield rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            continue
        y, x = np.mgrid[:height, :width]
        if number % 3 == 1:
            values = [127 + 120 * np.sin(x / 9 + y / (5 + k)) for k in range(3)]
        else:
            values = [255 * ((x // 7 + y // (4 + k)) % 2) for k in range(3)]
        yield np.stack(values, -1).astype(np.uint8)


def reference(processor, image, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = processor(image, return_tensors="np", **options)
    return out["pixel_values"], out["image_grid_thw"]


def assert_same_bits(ours, theirs):
    (rows, grid), (pixel_values, image_grid_thw) = ours, theirs
    assert image_grid_thw.tolist() == [list(grid)]
    assert rows.dtype == pixel_values.dtype == np.float32
    np.testing.assert_array_equal(rows.view(np.int32), pixel_values.view(np.int32))


def test_pixels_equal_the_pil_backend_on_200_sizes():
    processor = Qwen2VLImageProcessorPil(**RELEASED)
    for image in pictures(200):
        theirs = reference(processor, Image.fromarray(image))
        assert_same_bits(image_to_patches(image), theirs)


VARIED = [
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
    {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26, 0.27, 0.28]},
    {"image_mean": 0.4, "image_std": 0.3},
    *({"resample": number} for number in range(6)),
    {"patch_size": 14},
    {"merge_size": 1, "patch_size": 8},
    {"merge_size": 3, "patch_size": 5, "temporal_patch_size": 1},
    {"temporal_patch_size": 4},
    {"size": {"shortest_edge": 1, "longest_edge": 50_000}},
    {"size": {"shortest_edge": 1_000_000, "longest_edge": 2_000_000}},
    {"do_resize": False},
]


@pytest.mark.parametrize("changes", VARIED, ids=str)
def test_pixels_with_other_settings(changes):
    raw = {**RELEASED, "size": {"shortest_edge": 4096, "longest_edge": 10**6}, **changes}
    processor, settings = Qwen2VLImageProcessorPil(**raw), ImageSettings.from_dict(raw)
    for image in pictures(6, seed=1):
        if not settings.do_resize:
            image = np.tile(image, (32, 32, 1))[: 32 * (len(image) // 8), :96]  # noqa: PLW2901
        theirs = reference(processor, Image.fromarray(image))
        assert_same_bits(image_to_patches(image, settings), theirs)
        call = {k: v for k, v in raw.items() if v != RELEASED.get(k)}
        assert_same_bits(image_to_patches(image, **call), theirs)


def test_pixels_of_8_bit_modes():
    processor = Qwen2VLImageProcessorPil(**RELEASED)
    rng = np.random.default_rng(3)
    rgba = Image.fromarray(rng.integers(0, 256, (50, 70, 4), dtype=np.uint8))
    for mode in ("RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr", "HSV"):
        image = (
            rgba.convert("RGB").convert(mode)
            if mode in ("P", "YCbCr", "HSV")
            else rgba.convert(mode)
        )
        assert_same_bits(image_to_patches(image), reference(processor, image))
    grey = rgba.convert("L")
    flat = {"do_convert_rgb": False, "image_mean": 0.5, "image_std": 0.25}
    processor = Qwen2VLImageProcessorPil(**{**RELEASED, **flat})
    assert_same_bits(image_to_patches(grey, **flat), reference(processor, grey))


def test_pixels_near_the_torchvision_backend():
    processor = Qwen2VLImageProcessor(**RELEASED)
    level = 2 / 255  # one 8-bit step after normalisation
    differences = []
    for image in pictures(40, seed=2):
        theirs, grid = reference(processor, Image.fromarray(image))
        rows, ours = image_to_patches(image)
        assert grid.tolist() == [list(ours)]
        differences.append(np.abs(rows - theirs).ravel())
    everything = np.concatenate(differences)
    assert everything.mean() <= 0.003
    assert (everything <= level * 1.001).mean() >= 0.95


def test_smart_resize_equals():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    rng = np.random.default_rng(4)
    for _ in range(5000):
        height, width = (int(v) for v in np.exp(rng.uniform(0, 9.5, 2)))
        if max(height, width) > 200 * max(1, min(height, width)) or min(height, width) < 1:
            continue
        options = (int(rng.choice([8, 28, 32])), int(rng.integers(1, 10**5)), 10**6)
        assert smart_resize(height, width, *options) == theirs(height, width, *options)


# ---- ids ----
@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return toy.save(tmp_path_factory.mktemp("checkpoint"))


def strings():
    rng = np.random.default_rng(5)
    letters = sorted(set("".join(toy.TEXTS)))
    pieces = [*toy.SPECIAL, *toy.ORDINARY, "<|", "|>", "<", " ", "\n", *letters]
    mixed = ["".join(rng.choice(letters, 30)) for _ in range(150)]
    mixed += ["".join(rng.choice(pieces, 15)) for _ in range(150)]
    return [*toy.TEXTS, *mixed]


@pytest.mark.parametrize("form", ["json", "vocab"])
def test_ids_equal(form, tmp_path):
    toy.save_tokenizer(tmp_path, form)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), Qwen2Tokenizer.from_pretrained(tmp_path)
    rng = np.random.default_rng(6)
    for text in strings():
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    for _ in range(100):
        ids = rng.integers(0, ours.vocab_size, 40).tolist()
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.pad_id == theirs.pad_token_id
    assert set(ours.special) == set(theirs.all_special_tokens)


# ---- whole inputs ----
@pytest.fixture(scope="module")
def both(directory):
    """Our processor and transformers' (PIL backend) of the same directory."""
    theirs = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(directory),
        tokenizer=Qwen2Tokenizer.from_pretrained(directory),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=toy.TEMPLATE,
    )
    return Processor.from_pretrained(directory), theirs


def image(height, width, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array)


def shown(*items):
    return {"role": "user", "content": [i if isinstance(i, dict) else _item(i) for i in items]}


def _item(thing):
    if isinstance(thing, str):
        return {"type": "text", "text": thing}
    return {"type": "image", "image": thing}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "gr\u00f6\u00dfe",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "number", "\u00e9": "<b>'\""}},
            },
        },
    }
]
CALL = {"function": {"name": "gr\u00f6\u00dfe", "arguments": {"x": 3, "s": "\u5b57"}}}
CHATS = {
    "text": [shown("hi")],
    "plain": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "e\u0301?"}],
    "picture": [shown(image(20, 33), "What is it?")],
    "pictures": [shown("a", image(9, 70), image(64, 64, 1), " b ", image(31, 8, 2), "\u5b57")],
    "turns": [
        shown(image(24, 24), "first"),
        {"role": "assistant", "content": "<|box_start|>(1,2)<|box_end|> ok"},
        shown("then", image(40, 16, 3)),
        {"role": "assistant", "content": [_item("<think>\nhm\n</think>\n\nyes")]},
        shown("<think> <tool_call> 123"),
    ],
    "tools": [
        shown("measure"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "7 <tool_response>"},
        {"role": "tool", "content": [{"type": "text", "text": "8"}, _item(image(8, 16))]},
    ],
    "reasoning": [
        shown("x"),
        {"role": "assistant", "content": "4", "reasoning": "2 + 2"},
        shown("y"),
    ],
    **{f"string {i}": [shown(text)] for i, text in enumerate(toy.TEXTS[:12])},
}


def their_inputs(processor, chats, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = {"padding": True, "padding_side": options.pop("padding_side", "right")}
        return processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
            processor_kwargs=keys,
            **options,
        )


def assert_inputs_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        found = np.asarray(theirs[key])
        assert found.dtype == value.dtype, key
        np.testing.assert_array_equal(value, found, err_msg=key)


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation(both, name):
    ours, theirs = both
    tools = TOOLS if name == "tools" else None
    for generate in (True, False):
        options = {"tools": tools, "add_generation_prompt": generate}
        text = theirs.apply_chat_template(CHATS[name], tokenize=False, **options)
        assert ours.render(CHATS[name], **options) == text
        expected = their_inputs(theirs, [CHATS[name]], **options)
        assert_inputs_equal(ours.inputs(CHATS[name], **free(CHATS[name]), **options), expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_many_conversations(both, side):
    ours, theirs = both
    chats = [CHATS[k] for k in ("text", "pictures", "plain", "turns", "picture")]
    expected = their_inputs(theirs, chats, padding_side=side, add_generation_prompt=True)
    assert_inputs_equal(ours.inputs(chats, padding_side=side, **free(chats)), expected)


def test_variables_and_open_ends(both):
    ours, theirs = both
    options = {"add_vision_id": True, "add_generation_prompt": True}
    text = theirs.apply_chat_template(CHATS["pictures"], tokenize=False, **options)
    assert ours.render(CHATS["pictures"], **options) == text
    for end in ("Well, ", "Well", [{"type": "text", "text": "So\n"}]):
        chat = [*CHATS["picture"], {"role": "assistant", "content": end}]
        text = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert ours.render(chat, continue_final_message=True) == text


def test_special_tokens_when_allowed(both):
    ours, theirs = both
    chat = [shown("a<|im_end|>\n<|im_start|>user\n<|vision_start|> b")]
    expected = their_inputs(theirs, [chat], add_generation_prompt=True)
    assert_inputs_equal(ours.inputs(chat, allow_special=True), expected)
    safe = ours.inputs(chat)["input_ids"][0].tolist()
    assert safe != expected["input_ids"][0].tolist()
    # transformers 5.23 can keep them out as well, and then takes ours for the same text.
    kept = their_inputs(theirs, [chat], add_generation_prompt=True, sanitize_control_tokens=True)
    assert ours.decode(safe, False) == theirs.tokenizer.decode(kept["input_ids"][0])


def test_raw_text(both):
    ours, theirs = both
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    text = [f"{place} one", "none <|im_end|>", f"two {place}{place}\n"]
    images = [image(16, 30), image(50, 9, 1), image(8, 8, 2)]
    expected = theirs(
        text=text, images=images, padding=True, return_tensors="np", padding_side="right"
    )
    assert_inputs_equal(ours.inputs(text=text, images=images), expected)


def test_the_benchmark_of_images_compares_the_same_patches():
    """Both sides make one image's patches, and all three rates are numbers."""
    found = images.rates(images.photograph(320, 256), 0.05)
    assert list(found) == ["training", "infer.py", "transformers"]
    assert all(rate > 0 for rate in found.values())
