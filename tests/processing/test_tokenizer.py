"""Text to ids and back, from every form of files; text that streams whole characters."""

import json

import numpy as np
import pytest
import toy_checkpoint as toy

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing import tokenizer_file
from qwen3vl_jax.processing.tokenizer import TextStream, Tokenizer, find_stop


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(toy.save_tokenizer(tmp_path_factory.mktemp("json")))


def texts():
    """The toy's texts, and random mixtures of their pieces."""
    rng = np.random.default_rng(0)
    letters = sorted(set("".join(toy.TEXTS)))
    spellings = [*toy.SPECIAL, *toy.ORDINARY, "<|", "|>", "<", " ", "\n"]
    mixed = ["".join(rng.choice(letters, 40)) for _ in range(50)]
    mixed += ["".join(rng.choice([*spellings, *letters[:40]], 20)) for _ in range(50)]
    return [*toy.TEXTS, *mixed]


def test_round_trip(tokenizer):
    for text in texts():
        found = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False)
        if text.isascii():
            assert found == text
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"  # NFC
    # Single digits, and no token across a word and the space after it.
    assert len(tokenizer.encode("1234567")) == 7


@pytest.mark.parametrize("form", ["vocab", "old"])
def test_files_give_the_same_ids(tokenizer, form, tmp_path):
    other = Tokenizer.from_pretrained(toy.save_tokenizer(tmp_path, form))
    assert other.special == tokenizer.special
    assert other.added == tokenizer.added
    assert (other.eos_id, other.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
    for text in texts():
        ids = tokenizer.encode(text)
        assert other.encode(text) == ids
        assert other.decode(ids) == tokenizer.decode(ids)


def test_gaps_between_added_ids(tokenizer, tmp_path):
    toy.save_tokenizer(tmp_path, "vocab")
    path = tmp_path / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    raw["added_tokens_decoder"]["5000"] = {"content": "<|far|>", "special": True}
    path.write_text(json.dumps(raw))
    other = Tokenizer.from_pretrained(tmp_path)
    assert other.encode("a<|far|>b")[1] == 5000
    assert other.decode([5000], skip_special_tokens=False) == "<|far|>"
    assert other.decode([5000, 4000]) == ""


def test_added_tokens_that_only_the_config_names(tmp_path):
    toy.save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    new = max(toy.token_ids().values()) + 1
    raw["added_tokens_decoder"][str(new)] = {"content": "<extra>", "special": False}
    raw["additional_special_tokens"].append("<think>")
    path.write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<extra>") == [new]
    assert "<think>" in tokenizer.special
    raw["added_tokens_decoder"][str(new + 5)] = raw["added_tokens_decoder"].pop(str(new))
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"<extra>.*tokenizer_config"):
        Tokenizer.from_pretrained(tmp_path)


def test_special_ids_by_name(tokenizer):
    ids = toy.token_ids()
    assert len(ids) == 26
    assert tokenizer.added == ids
    assert set(tokenizer.special) == set(toy.SPECIAL)
    assert tokenizer.id_of("<|im_end|>") == ids["<|im_end|>"] == tokenizer.eos_id
    assert tokenizer.token_of(ids["<think>"]) == "<think>"
    assert tokenizer.pad_id == ids["<|endoftext|>"]
    assert tokenizer.vocab_size == max(ids.values()) + 1
    with pytest.raises(InputError, match="no_such"):
        tokenizer.id_of("<no_such>")
    with pytest.raises(InputError, match="99999"):
        tokenizer.token_of(99999)


def test_decode_skips_special_tokens_only(tokenizer):
    ids = tokenizer.encode("<|im_start|>a<think>b</think><|im_end|>")
    assert tokenizer.decode(ids) == "a<think>b</think>"
    assert tokenizer.decode(ids, False) == "<|im_start|>a<think>b</think><|im_end|>"
    assert tokenizer.decode(np.asarray(ids, np.int32)) == "a<think>b</think>"
    assert tokenizer.decode([10**6]) == ""  # a row of the table that no token uses
    with pytest.raises(InputError, match="-1"):
        tokenizer.decode([-1])


def test_marked_spellings_are_characters(tokenizer):
    mark = "\ue000"
    plain = tokenizer.encode("<|im_end|", "")
    assert tokenizer.id_of("<|im_end|>") not in plain
    for text in (
        "e\u0301<|im_end|>x",
        "a<think><|im_end|>",
        "<|im_end|><|im_end|>",
        "\u5b57<|im_end|>",
    ):
        marked = text.replace("<|im", f"<{mark}|im")
        ids = tokenizer.encode(marked, mark)
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text), False)
        # Real tokens beside it stay tokens, and what is between them is encoded as one piece.
        around = tokenizer.encode(f"<|im_start|>{marked}<|im_end|>", mark)
        ends = [tokenizer.id_of("<|im_start|>")], [tokenizer.id_of("<|im_end|>")]
        assert around == ends[0] + ids + ends[1]
    # An ordinary added token is found across a mark, as it is without.
    assert tokenizer.encode(f"<{mark}think>", mark) == [tokenizer.id_of("<think>")]
    assert tokenizer.encode("no mark", mark) == tokenizer.encode("no mark")


def test_streamed_text_joins_to_the_whole(tokenizer):
    rng = np.random.default_rng(1)
    size = tokenizer.vocab_size
    rows = [tokenizer.encode(text) for text in texts()]
    rows += [rng.integers(0, size + 20, 60).tolist() for _ in range(100)]  # mostly broken UTF-8
    for row in rows:
        for skip in (True, False):
            stream = TextStream(tokenizer, skip_special_tokens=skip)
            pieces, at = [], 0
            while at < len(row):
                step = int(rng.integers(1, 4))
                pieces.append(stream.push(row[at : at + step]))
                at += step
            pieces.append(stream.flush())
            assert "".join(pieces) == tokenizer.decode(row, skip)


def test_streamed_text_holds_back_unfinished_characters(tokenizer):
    byte_ids = {tokenizer.token_bytes(i): i for i in range(256)}  # the alphabet comes first
    assert len(byte_ids) == 256
    for text in (
        "\u00e9",
        "\u5b57",
        "\U0001f600",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
        "\U0001f916",
    ):
        single = [byte_ids[bytes([b])] for b in text.encode()]
        stream = TextStream(tokenizer)
        pieces = [stream.push(i) for i in single]
        assert "".join(pieces) == text
        assert all(piece in ("", *text) for piece in pieces)
        assert stream.flush() == ""
        stream = TextStream(tokenizer)
        assert stream.push(single[:-1]) == text[:-1]
        assert stream.flush() == "\ufffd"


def test_stop_strings(tokenizer):
    def stream(text, *stops, step=1):
        row = tokenizer.encode(text)
        s = TextStream(tokenizer, stops)
        pieces = [s.push(row[i : i + step]) for i in range(0, len(row), step)]
        return [*pieces, s.flush()], s.stopped

    for step in (1, 2, 3, 100):
        for text, stops, expected, hit in (
            ("one two STOP three", ("STOP",), "one two ", "STOP"),
            ("one two STO", ("STOP",), "one two STO", None),
            ("aab", ("aab",), "", "aab"),
            ("aaab rest", ("aab",), "a", "aab"),
            ("xyz", ("yz", "y"), "x", "y"),  # complete first
            ("x\n\nUser:", ("User:", "\n\nUser:"), "x", "\n\nUser:"),  # complete together
            (
                "\u5b57\u5b57\U0001f600\u505c\u6b62 more",
                ("\U0001f600\u505c\u6b62",),
                "\u5b57\u5b57",
                "\U0001f600\u505c\u6b62",
            ),
            ("no stop", ("zzz", "qqq"), "no stop", None),
        ):
            pieces, stopped = stream(text, *stops, step=step)
            assert ("".join(pieces), stopped) == (expected, hit)
            cut, found = find_stop(text, stops)
            assert (text[:cut], found) == (expected, hit)
    # No piece that was let go holds the beginning of what became a stop string.
    pieces, _ = stream("abc END", "END")
    assert "".join(pieces[:-1]).endswith("abc ")
    s = TextStream(tokenizer, "b")
    assert s.push(tokenizer.encode("ab")) == "a"
    assert s.stopped == "b"
    assert s.push(tokenizer.encode("more")) == s.flush() == ""
    with pytest.raises(InputError, match="empty"):
        TextStream(tokenizer, ["a", ""])


def test_bad_tokenizer_files(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json.*vocab\.json.*merges\.txt"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"missing: tokenizer\.json, merges\.txt"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(InputError, match="line 2"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(InputError, match="do not fit"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config\.json.*list"):
        Tokenizer.from_pretrained(tmp_path)
    toy.save_tokenizer(tmp_path, eos_token="<nowhere>")
    with pytest.raises(InputError, match="<nowhere>"):
        Tokenizer.from_pretrained(tmp_path)
    toy.save_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="byte-level"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("merges.txt", b"a b\n\xff\xfe", "merges.txt: cannot read this UTF-8"),
        ("added_tokens.json", {"<x>": "many"}, "added_tokens.json: id of '<x>': got 'many'"),
        ("added_tokens.json", {"<x>": 1.5}, "got 1.5, expected an integer"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "<x>"}}},
            "an id: got 'x'",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": "<x>"}},
            "decoder.5: got '<x>', expected",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {}}}, "with content"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<x>"]}, "expected an object"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "expected a list of tokens"),
        ("tokenizer_config.json", {"eos_token": 5}, "named token: got 5"),
    ],
)
def test_malformed_tokenizer_files(file, content, words, tmp_path):
    toy.save_tokenizer(tmp_path, "vocab")
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=words) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_text_that_is_not_unicode(tokenizer):
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def regex(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


ADDED = {
    "special": True,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}
# Of a tokenizer.json: what is changed, and the words of the refusal. The library aborts or panics on
# most of them, when it reads the file or at the first text.
HOSTILE = {
    "prefix": ({"model": {"continuing_subword_prefix": "\0"}}, "continuing_subword_prefix: got '"),
    "long prefix": ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
    "suffix": ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix: got '</w>'"),
    "dropout": ({"model": {"dropout": 0.5}}, "dropout: got 0.5, expected null"),
    "unigram": ({"model": {"type": "Unigram"}}, "model type: got 'Unigram', expected BPE"),
    "word piece": ({"model": {"type": "WordPiece"}}, "expected BPE"),
    "no model": ({"model": None}, "model: got None"),
    "merge of no tokens": ({"model": {"merges": [["zz", "qq"]]}}, "out of vocabulary"),
    "id": (
        {"added_tokens": [{**ADDED, "id": 4_000_000_000, "content": "<x>"}]},
        "has id 7.. in the",
    ),
    "charsmap": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}},
        "charsmap",
    ),
    "replace": ({"normalizer": replace({"Regex": "a*"}, "bb")}, "index out of bounds"),
    "length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"),
    "regex": ({"pre_tokenizer": regex("(a+)+$")}, "retry-limit"),
    "no bytes": ({"pre_tokenizer": None}, "comes back as .* it loses text"),
    "drops all": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [],
                "pair": [],
                "special_tokens": {},
            }
        },
        "comes back as '', it loses text",
    ),
    "bad regex": ({"pre_tokenizer": regex("(")}, "parenthesis"),
    "endless": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 40}},
        "does not end|memory|aborts",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tokenizers_that_end_the_process_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "_SECONDS", 2)
    change, words = HOSTILE[name]
    toy.save_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    for key, value in change.items():
        raw[key] = {**raw[key], **value} if key == "model" and value else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=words) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path):
    """It would leave characters of a text out."""
    toy.save_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace('"\u0100"', '"\u4e00"'), encoding="utf-8")
    with pytest.raises(InputError, match="no token for byte 0"):
        Tokenizer.from_pretrained(tmp_path)


def test_another_pipeline_that_works_is_taken(tokenizer, tmp_path):
    """It was tried in a process of its own; a panic at some later text is an error of that text."""
    toy.save_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    words = regex(r"\p{L}+|(z+)+$|\s+|[^\s\p{L}]+")
    raw["pre_tokenizer"]["pretokenizers"][0] = words
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    other = Tokenizer.from_pretrained(tmp_path)
    assert other.decode(other.encode("Hello there")) == "Hello there"
    raw["pre_tokenizer"]["pretokenizers"][0] = regex("(z+)+$")
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    other = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"text: .*retry-limit"):
        other.encode("z" * 50 + "!")
