"""JSON that is read and written: what is refused, in one line, and what is taken."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest

from qwen3vl_jax.checkpoint.config_files import read_config
from qwen3vl_jax.cli.infer_arguments import read_messages
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.chat_template import ChatTemplate
from qwen3vl_jax.processing.image_patches import ImageSettings
from qwen3vl_jax.processing.processor import read_generation_config
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.storage.json_text import read_json, read_json_at, read_json_file, write_json

ROOT = Path(__file__).resolve().parents[2]
DEEP = "[" * 100_000
REFUSED = {
    DEEP: "nested",
    "[" * 101 + "]" * 101: "nested more than 100 deep",
    '{"a":' * 101 + "1" + "}" * 101: "nested more than 100 deep",
    "[NaN]": "NaN",
    "[-Infinity]": "-Infinity",
    "[1e400]": "1e400",
    "[" + "7" * 400 + "]": "an integer of 400 digits",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "the key 'c' is there twice",
    '["\\ud83d"]': "half of a surrogate pair",
    '{"\\uDE00": 1}': "half of a surrogate pair",
    '["\ud83d"]': "half of a surrogate pair",
    b'["\xff"]': "byte 2 is not UTF-8",
    '{"a": 1}'.encode("utf-16"): "byte 0 is not UTF-8",
    '{"a": 1\n "b"}': "line 2, column 2",
    "": "not JSON",
    "[1] 2": "not JSON",
    '["a\tb"]': "Invalid control character",
    "[" + "0," * 10_000_000 + "0]": "more than 10,000,000 values",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_refusals_are_one_line_that_names_the_source(text):
    with pytest.raises(InputError, match=re.escape(REFUSED[text])) as e:
        read_json(text, "where it stood")
    assert str(e.value).startswith("where it stood: ") and "\n" not in str(e.value)
    assert len(str(e.value)) < 200


def test_what_json_allows_is_read():
    """Up to 100 levels, 64-bit numbers, a byte order mark, pairs of surrogates, prose full of commas."""
    assert read_json('\ufeff{"a": [1, -2.5e3, true, null]}', "x") == {"a": [1, -2500.0, True, None]}
    assert read_json("\ufeff[18446744073709551615]".encode(), "x") == [2**64 - 1]
    assert read_json('["\\ud83d\\ude00"]', "x") == ["\U0001f600"]
    assert read_json('["\\\\ud83d"]', "x") == ["\\ud83d"]
    deep = read_json("[" * 100 + "]" * 100, "x")
    assert write_json(deep, "x") == "[" * 100 + "]" * 100
    assert read_json_at('see {"a": "b\n\tc"} there', 4) == ({"a": "b\n\tc"}, 17)
    told = {"[NaN]": "NaN is not JSON", '["\\ud83d"]': "half of a surrogate pair in a text"}
    told |= {DEEP: "^JSON nested more than 100 deep$", "[1": "not JSON .*, character 2"}
    for text, why in told.items():
        with pytest.raises(InputError, match=why):
            read_json_at(text, 0)


def test_nan_is_never_written():
    for value in (float("nan"), [float("inf")], {"a": {1, 2}}):
        with pytest.raises(InputError, match="answer: cannot be written as JSON"):
            write_json(value, "answer")


@pytest.mark.parametrize("text", [DEEP, '{"a": NaN}', '{"a": ' + "1" * 400 + "}", "[]", "\xff"])
def test_every_file_of_a_checkpoint_is_read_so(tmp_path, text):
    """One line for a damaged file, whichever it is."""
    readers = {
        "config.json": [Config.from_hf, read_config],
        "generation_config.json": [read_generation_config],
        "preprocessor_config.json": [ImageSettings.from_dir],
        "chat_template.json": [ChatTemplate.from_dir],
        "tokenizer.json": [Tokenizer.from_pretrained],
        "messages.json": [lambda directory: read_messages(directory / "messages.json")],
    }
    for name, calls in readers.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text, encoding="latin1")
        for call in calls:
            if name == "messages.json" and text == "[]":
                continue
            with pytest.raises(InputError, match=re.escape(name)) as e:
                call(folder)
            assert "\n" not in str(e.value)


def test_an_error_is_one_line_however_long_what_it_quotes():
    assert str(InputError("a: got b,\n  expected c")) == "a: got b, expected c"
    error = pickle.loads(pickle.dumps(InputError(f"a: got {'b' * 9999}, expected c")))
    assert str(error).startswith("a: got bbb") and str(error).endswith("bbb, expected c")
    assert len(str(error)) < 1300


def test_only_regular_files_are_opened(tmp_path):
    """A pipe would be waited for without end."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config\.json: cannot be read \(it is no regular file\)"):
        read_json_file(tmp_path / "config.json")
    with pytest.raises(InputError, match="does not exist"):
        read_json_file(tmp_path / "none.json")


def test_no_other_module_reads_json():
    """One reader: the transport between processes alone speaks to itself."""
    own = {
        "json_text.py",
        "distributed.py",
        "batch_journal.py",
        "batch_lines.py",
        "make_samples.py",
    }
    for folder in ("qwen3vl_jax", "convert"):
        for path in (ROOT / folder).rglob("*.py"):
            imports = re.search(r"^\s*(import|from) json\b", path.read_text(), re.M)
            assert not imports or path.name in own, path
    assert json.loads(write_json({"a": "\u00e9"}, "x")) == {"a": "\u00e9"}
