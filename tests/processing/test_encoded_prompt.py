"""Encoded prompts: their images, what two of them share, and Hugging Face's arrays of them."""

import dataclasses

import chats
import numpy as np
import pytest
import toy_checkpoint as toy
from PIL import Image

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.encoded_prompt import (
    EncodedPrompt,
    from_hf_arrays,
    place_images,
    shared_start,
    to_hf_arrays,
)
from qwen3vl_jax.processing.processor import Processor

IMAGE, VIDEO = chats.picture(40, 70), chats.clip(5, 64, 96, 4.0)


@pytest.fixture(scope="module")
def proc(tmp_path_factory):
    return Processor.from_pretrained(toy.save(tmp_path_factory.mktemp("toy")))


def user(*items):
    content = [{"type": "text", "text": x} if isinstance(x, str) else x for x in items]
    return [{"role": "user", "content": content}]


def test_images_have_their_placeholders_and_patches(proc):
    (prompt,) = proc.encode(user("a", VIDEO, "b", IMAGE, "c"))
    assert [x.is_video for x in prompt.images] == [True, False]
    unit = proc.config.vision.merge_unit
    for x in prompt.images:
        token = proc.config.video_token_id if x.is_video else proc.config.image_token_id
        inside = prompt.ids[x.start : x.end]
        assert inside[0] == inside[-1] == token and (inside == token).sum() * unit == len(x.patches)
        assert len(x.patches) == np.prod(x.grid)
    assert (prompt.images[0].grid[0] > 1) and prompt.images[0].frames.timestamps


def test_arrays_of_transformers_and_back(proc):
    prompts = proc.encode([user(IMAGE, "a"), user("b", VIDEO, IMAGE)])
    for prompt in prompts:
        arrays = to_hf_arrays(proc.config, [prompt])
        back = from_hf_arrays(proc.config, arrays)
        np.testing.assert_array_equal(back.ids, prompt.ids)
        for x, y in zip(back.images, prompt.images, strict=True):
            assert (type(x), x.grid, x.start, x.end) == (type(y), y.grid, y.start, y.end)
            np.testing.assert_array_equal(x.patches, y.patches)
    joined = to_hf_arrays(proc.config, prompts)["pixel_values"]
    images = [x.patches for p in prompts for x in p.images if not x.is_video]
    np.testing.assert_array_equal(joined, np.concatenate(images))
    with pytest.raises(InputError, match=r"got .* image placeholders, expected 0"):
        place_images(proc.config, prompts[0].ids, [])
    wrong = {**to_hf_arrays(proc.config, prompts[:1]), "pixel_values": np.zeros((3, 8))}
    with pytest.raises(InputError, match="pixel_values: got 3 patches, expected"):
        from_hf_arrays(proc.config, wrong)


def test_what_two_prompts_share_ends_before_an_image_that_differs(proc):
    other = chats.picture(70, 40)
    a, b, c = (
        proc.encode(user("x", image, end))[0].with_digests()
        for image, end in ((IMAGE, "one"), (IMAGE, "two"), (other, "one"))
    )
    assert shared_start(a, b) > a.images[0].end and shared_start(a, c) == a.images[0].start
    first = a.first(a.images[0].end).without_patches()
    assert shared_start(b, first, all_of_b=True) == len(first.ids)
    assert shared_start(b, first) == first.images[0].start
    rest = a.rest(a.images[0].end)
    assert not rest.images and len(rest.ids) + len(first.ids) == len(a.ids)
    changed = dataclasses.replace(a.images[0], patches=a.images[0].patches + 1, digest=b"")
    changed = EncodedPrompt(a.ids, (changed,)).with_digests()
    assert shared_start(a, changed) == a.images[0].start


def test_an_image_of_a_file_is_decoded_once(proc, tmp_path, monkeypatch):
    """Also where the item is kept for several calls."""
    path, opened, count = tmp_path / "a.png", Image.open, []
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(path)
    monkeypatch.setattr(Image, "open", lambda *a, **k: count.append(1) or opened(*a, **k))
    item = proc.look({"type": "image", "image": str(path)})
    for _ in range(2):
        (prompt,) = proc.encode(user(item, "a"))
    assert len(count) == 1 and prompt.images[0].digest == item["image"].digest
