"""Conversations with Qwen3's real vocabulary, ids equal to transformers' apply_chat_template."""

import copy
import warnings

import chats
import numpy as np
import pytest
import qwen_vocabulary
import torchvision_shim  # noqa: F401
import toy_checkpoint as toy
from chats import calls, clip, picture, result, said, system, user
from transformers import Qwen2Tokenizer, Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.chat_template import ChatTemplate
from qwen3vl_jax.processing.processor import Processor

TEMPLATES = toy.RELEASED_TEMPLATES
TALL, WIDE, TINY = picture(40, 16), picture(17, 60), picture(8, 8)
FILM, SHORT = clip(7, 33, 47, 3.0), clip(2, 32, 40, 1.0)
REASONED = "<think>\nTwo and two.\n</think>\n\nFour."
TOOLED = [
    user(TALL, "What is on it?"),
    said("I look closer.", tool_calls=calls("crop", x=0.5, y=-2)["tool_calls"]),
    result("part: ", WIDE),
]
# name -> (messages, options of apply_chat_template); OPEN leaves the last message open.
SCRIPTS = "\u8bfb\u51fa \u041f\u0440\u0438 \ud55c\uad6d \U0001f600\U0001f3fd \u0639\u0631\u0628"
FOUND = '[{"bbox_2d": [0, 12, 999, 1000], "label": "caf\u00e9"}]'
OPEN, NUMBERED, TOOLS = (
    {"continue_final_message": True, "add_generation_prompt": False},
    {"add_vision_id": True},
    {"tools": chats.TOOLS},
)
CASES = {
    "text": ([user("What is 17 + 25?")], {}),
    "a string": (
        [{"role": "user", "content": "Fa\u00e7ade, na\u00efve \u2014 caf\u00e9 e\u0301"}],
        {},
    ),
    "no new turn": ([user("hi"), said("hello")], {"add_generation_prompt": False}),
    "system": ([system("Be brief. "), user("Why is the sky blue?")], {}),
    "a later system": ([system("One."), user("a"), said("b"), system("Two."), user("c")], {}),
    "writing systems": ([user(SCRIPTS)], {}),
    "code": ([user("```python\n\tdef f(x):\n        return x**2  # 1,000,000\r\n```\n\n\n")], {}),
    "picture": ([user(TALL, "Describe it.")], {}),
    "pictures": ([user("A: ", TALL, " B: ", WIDE, TINY, "\nWhich?")], {}),
    "numbered": ([user(TALL, WIDE, "?"), said("The first."), user(TINY, FILM, SHORT)], NUMBERED),
    "clip": ([user(FILM, "What happens?")], {}),
    "clips and pictures": ([user(FILM, TALL, " and ", SHORT, WIDE, "?")], {}),
    "spelled times": ([user("<0.3 seconds><12.5 seconds> ", SHORT)], {}),
    "turns": ([user(TALL, "a"), said("b"), user("c"), said("d"), user(WIDE, "e")], {}),
    "boxes": ([user(TALL), said("<|box_start|>(1,2),(3,4)<|box_end|> <|object_ref_start|>x")], {}),
    "json answer": ([user(TALL), said(FOUND), user("More?")], {}),
    "tools": ([user("How large?")], TOOLS),
    "tools and system": ([system("Be exact."), user("How large?")], TOOLS),
    "a call": ([user("?"), calls("crop", x=1, y=[2.5, None, True])], TOOLS),
    "two calls": (
        [
            user("?"),
            said(
                "So:",
                tool_calls=[
                    *calls("crop", s='a "b" \\ \u5b57\n')["tool_calls"],
                    {"name": "crop", "arguments": "{}"},
                ],
            ),
        ],
        TOOLS,
    ),
    "an answer": ([*TOOLED[:2], result("7 \u00b5m")], TOOLS),
    "an answer with a picture": (TOOLED, TOOLS),
    "answers with pictures and a clip": (
        [*TOOLED, result(SHORT, TINY, "end"), said("A cat."), user("Sure?")],
        {**TOOLS, **NUMBERED},
    ),
    "markup by a user": (
        [user("<tool_response>\nx\n</tool_response>"), said("y"), user("<think>")],
        {},
    ),
    "reasoning": ([user("2 + 2?"), said("Four.", reasoning_content="\nTwo and two.\n")], {}),
    "reasoning in the text": ([user("2 + 2?"), said(REASONED), user("And 3 + 3?")], {}),
    "reasoning before a call": (
        [
            user("?"),
            said("", reasoning_content="Crop it.", tool_calls=calls("crop", x=1)["tool_calls"]),
            result("ok"),
        ],
        TOOLS,
    ),
    "open": ([user(TALL, "Tell a story."), said("Once upon a")], OPEN),
    "open after a space": ([user("Tell a story."), said("Once upon ")], OPEN),
    "open item": (
        [user("x"), said("y"), user(FILM), {**user("It shows\n"), "role": "assistant"}],
        OPEN,
    ),
    "open reasoning": ([user("x"), said("<think>\nWell, ")], OPEN),
}

LEFT_OUT = {
    ("a later system", "instruct"): "a system message after others",
    ("reasoning", "instruct"): "reasoning_content",
    ("reasoning before a call", "instruct"): "reasoning_content",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our processor, with the clips' outer pair as in 5.23, and transformers', by template."""
    folder = tmp_path_factory.mktemp("real")
    toy.save(folder, template=None, tokenizer=qwen_vocabulary.tokenizer_json())
    limits = {"shortest_edge": 4096, "longest_edge": 25165824}
    theirs = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder),
        video_processor=Qwen3VLVideoProcessor(size=limits, patch_size=toy.IMAGES["patch_size"]),
        chat_template=TEMPLATES["instruct"],
    )
    ours = {**vars(Processor.from_pretrained(folder)), "wrap_clips": True}
    made = {name: ChatTemplate({"default": text}) for name, text in TEMPLATES.items()}
    return {name: Processor(**{**ours, "template": it}) for name, it in made.items()}, theirs


def ours_and_theirs(both, template, messages, options):
    """Inputs of one conversation from both processors."""
    options = {"add_generation_prompt": True, **options}
    found = chats.media(messages)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        form = {"tokenize": True, "return_dict": True, "return_tensors": "np", **options}
        form["processor_kwargs"] = {"videos_kwargs": found.get("videos_kwargs", {})}
        given, template_text = [copy.deepcopy(messages)], TEMPLATES[template]
        theirs = both[1].apply_chat_template(given, chat_template=template_text, **form)
    variables = {key: options.pop(key) for key in list(options) if key == "add_vision_id"}
    ours = both[0][template].inputs(
        messages, template_vars=variables, **chats.free(messages), **options
    )
    return ours, theirs


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("case", CASES)
def test_ids_of_conversations(both, case, template):
    """What a template leaves out without a word is refused, and has no ids."""
    if (case, template) in LEFT_OUT:
        with pytest.raises(InputError, match=f"leaves out {LEFT_OUT[case, template]}"):
            ours_and_theirs(both, template, *CASES[case])
        return
    ours, theirs = ours_and_theirs(both, template, *CASES[case])
    for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw"):
        assert (key in ours) == (key in theirs)
        if key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_released_ids(both):
    """Ids that the released tokenizer gives, and the 26 added tokens at their places."""
    tokenizer = both[0]["instruct"].tokenizer
    for text, ids in {
        "user": [872],
        "system": [8948],
        "assistant": [77091],
        "tool": [14172],
        "\n": [198],
        "\n\n": [271],
        "yes": [9693],
        "no": [2152],
        "<think>\n": [151667, 198],
        "<|im_start|>assistant\n": [151644, 77091, 198],
        "<think>\n\n</think>\n\n": [151667, 271, 151668, 271],
        "<0.3 seconds>": [27, 15, 13, 18, 6486, 29],
        "<12.5 seconds>": [27, 16, 17, 13, 20, 6486, 29],
    }.items():
        assert tokenizer.encode(text) == ids == both[1].tokenizer(text)["input_ids"], text
    names = [*toy.SPECIAL, *toy.ORDINARY]
    assert [tokenizer.added[name] for name in names] == list(range(151643, 151669))


def text_of(both, template, case):
    messages, options = CASES[case]
    options = {"add_generation_prompt": True, **options}
    proc = both[0][template]
    return proc.render(messages, **options)


def test_what_the_prompts_say(both):
    """The parts that a model was trained on, spelled out: tools, numbers, reasoning, open ends."""
    answer = text_of(both, "instruct", "answers with pictures and a clip")
    seen, filmed = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert (
        "<|im_start|>user\n<tool_response>\n"
        f"part: Picture 2: {seen}\n</tool_response>\n<tool_response>\n"
        f"Video 1: {filmed}Picture 3: {seen}end\n</tool_response><|im_end|>\n"
    ) in answer
    earlier = text_of(both, "thinking", "reasoning in the text")
    assert "<|im_start|>assistant\nFour.<|im_end|>\n" in earlier and "Two and two" not in earlier
    assert earlier.endswith("<|im_start|>assistant\n<think>\n")
    kept = text_of(both, "thinking", "reasoning before a call")
    assert "<|im_start|>assistant\n<think>\nCrop it.\n</think>\n\n<tool_call>\n" in kept
    for template in TEMPLATES:
        assert text_of(both, template, "open after a space").endswith("Once upon ")
    assert "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>" in text_of(
        both, "thinking", "reasoning"
    )
