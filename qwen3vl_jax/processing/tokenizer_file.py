"""tokenizer.json, checked before the tokenizers library sees it: some files abort the process there."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qwen3vl_jax.errors import InputError, shown, unexpected
from qwen3vl_jax.storage.json_text import read_json_file

# How Qwen2's vocabulary cuts text before it merges bytes: contractions, words, single digits,
# punctuation, line ends, spaces. It belongs to the vocabulary; vocab.json does not hold it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SIMPLE = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel", "Digits")
_SECONDS = 10
# The test of a pipeline that is not Qwen's, in a process of its own.
_TRIAL = """
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
except (ImportError, ValueError):
    pass
import tokenizers
backend = tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
backend.no_truncation()
backend.no_padding()
words = ["Hello, world! it's 12345 \\u00e9\\u5b57\\U0001f600\\n\\n  end", "", "<|im_start|>"]
for text in words + [piece * 3000 + "!" for piece in ("a", "ab ", " ", "\\n", "1", "'", "\\u0301")]:
    backend.decode(backend.encode(text, add_special_tokens=False).ids)
"""


def load_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json; one unlike Qwen's is tried in a child. Raises InputError."""
    raw = read_json_file(path)
    if not isinstance(model := raw.get("model"), Mapping):
        raise unexpected(f"{path}: model", shown(model), "an object")
    if model.get("type", "BPE") != "BPE":
        raise unexpected(f"{path}: model type", shown(model["type"]), "BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise unexpected(f"{path}: model {key}", shown(model[key]), "null")
    data = path.read_bytes()
    if not all(_is_known(raw.get(part)) for part in _PARTS):
        command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}{_TRIAL}"]
        try:
            done = subprocess.run(command, input=data, capture_output=True, timeout=_SECONDS)
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            reason = lines[-1][:300] if done.returncode == 1 and lines else "the library aborts"
            is_taken = done.returncode == 0
        except subprocess.TimeoutExpired:
            is_taken, reason = False, f"it does not end on a short text within {_SECONDS} s"
        if not is_taken:
            raise InputError(f"{path}: cannot read this tokenizer: {reason}")
    with panics_are_errors(f"{path}: cannot read this tokenizer"):
        backend = tokenizers.Tokenizer.from_buffer(data)
    for token in raw.get("added_tokens") or []:
        found, given = backend.token_to_id(token["content"]), token["id"]
        if found != given:
            has = f"added token {shown(token['content'])} has id {found} in the tokenizer"
            raise InputError(f"{path}: {has} and {given} in added_tokens")
    return backend


@contextlib.contextmanager
def panics_are_errors(what: str) -> Iterator[None]:
    """Turns exceptions of the tokenizers library, panics of its Rust code too, into an InputError."""
    try:
        yield
    except BaseException as e:
        # A panic is no Exception, so that nothing takes it by accident.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {' '.join(str(e).split())[:300]}") from e


def _is_known(part: Any) -> bool:
    """Whether a part of the pipeline is one that cannot fail or hang."""
    if part is None:
        return True
    if not isinstance(part, Mapping):
        return False
    for key in ("normalizers", "pretokenizers"):
        if part.get("type") == "Sequence" and isinstance(part.get(key), list):
            return all(isinstance(x, Mapping) and _is_known(x) for x in part[key])
    if part.get("type") == "Split":
        return part.get("pattern") == {"Regex": WORDS} and part.get("behavior") == "Isolated"
    return part.get("type") in _SIMPLE
