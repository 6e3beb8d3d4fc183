"""Text to token ids and back: byte-level BPE with added tokens, and streamed text."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen3vl_jax.errors import InputError, shown, unexpected
from qwen3vl_jax.processing.tokenizer_file import WORDS, load_tokenizer_json, panics_are_errors
from qwen3vl_jax.storage.json_text import read_json_file
from qwen3vl_jax.storage.paths import as_path

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# A text that every tokenizer has to encode and decode without loss.
_SAMPLE = "hello, w\u00f6rld 1\nend"
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_Added = list[tuple[int | None, AddedToken]]  # with their ids, where a file gives them


class Tokenizer:
    """A checkpoint's tokenizer. `backend` is the tokenizers.Tokenizer inside."""

    def __init__(self, backend: tokenizers.Tokenizer, eos: str | None, pad: str | None):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        if "ByteLevel" not in repr(backend.decoder):
            raise InputError("tokenizer: its decoder is not byte-level, which this project needs")
        self.backend, added = backend, backend.get_added_tokens_decoder()
        self.added: dict[str, int] = {token.content: i for i, token in added.items()}
        self.special: dict[str, int] = {t.content: i for i, t in added.items() if t.special}
        self._special_ids = frozenset(self.special.values())
        # The same pipeline without the special tokens: their texts are encoded as characters.
        self._textual = tokenizers.Tokenizer(backend.model)
        self._textual.normalizer = backend.normalizer
        self._textual.pre_tokenizer = backend.pre_tokenizer
        self._textual.add_tokens([token for _, token in sorted(added.items()) if not token.special])
        renumbered = self._textual.get_added_tokens_decoder()
        self._real_id = {i: self.added[token.content] for i, token in renumbered.items()}
        # A byte's character in a byte-level vocabulary: its own if it is printable, else one from 256.
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        own = [ord(letter) for letter in letters if ord(letter) < 256]
        self._byte_of = dict(zip(letters, [*own, *sorted({*range(256)} - {*own})]))
        if cut := [b for c, b in self._byte_of.items() if backend.token_to_id(c) is None]:
            raise InputError(f"tokenizer: no token for byte {cut[0]}, it would cut texts")
        back = backend.decode(backend.encode(_SAMPLE, add_special_tokens=False).ids)
        if back.strip() != _SAMPLE:
            raise InputError(f"tokenizer: {_SAMPLE!r} comes back as {shown(back)}, it loses text")
        self.eos_id = None if eos is None else self.id_of(eos)
        self.pad_id = self.eos_id if pad is None else self.id_of(pad)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.json + merges.txt: both give the same ids. Raises InputError.

        Added tokens also come from tokenizer_config.json (added_tokens_decoder) and added_tokens.json.
        """
        directory = as_path(directory)
        config = _read_json(directory / "tokenizer_config.json")
        names = {**_read_json(directory / "special_tokens_map.json"), **config}
        added = _added_tokens(directory, config, names)
        if (directory / "tokenizer.json").is_file():
            backend = load_tokenizer_json(directory / "tokenizer.json")
        else:
            files = ("tokenizer.json", "vocab.json", "merges.txt")
            missing = ", ".join(n for n in files if not (directory / n).is_file())
            if missing != files[0]:
                expected = "expected tokenizer.json, or vocab.json and merges.txt"
                raise InputError(f"{directory}: no tokenizer: {expected}; missing: {missing}")
            backend = _from_vocab(directory, added)
        have = {t.content: t.special for t in backend.get_added_tokens_decoder().values()}
        for i, token in added:
            # A name without an id may be of a token that the vocabulary does not have.
            is_known = i is not None or backend.token_to_id(token.content) is not None
            if is_known and have.get(token.content) not in (True, token.special):
                (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        for i, token in added:
            found = backend.token_to_id(token.content)
            if i is not None and found != i:
                has = f"token {token.content!r} has id {found} in the tokenizer and {i}"
                raise InputError(
                    f"{directory}: {has} in tokenizer_config.json or added_tokens.json"
                )
        eos, pad = (_content(names.get(key)) for key in ("eos_token", "pad_token"))
        return cls(backend, eos, pad)

    @property
    def vocab_size(self) -> int:
        """Ids that are in use, added tokens with them; a model's table may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, mark: str = "") -> list[int]:
        """The ids of a text with the added tokens in it; nothing is put before or after it.

        mark: the character by which `Escape` hid special tokens that are to stay text. Raises InputError
        for text that is not Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InputError(f"text: character {e.start} is half of a surrogate pair") from e
        with panics_are_errors("text"):
            found = self.backend.encode(text, add_special_tokens=False)
        if not mark or mark not in text:
            return found.ids
        ids: list[int] = []
        start = 0
        for token, (left, right) in zip(found.ids, found.offsets):
            if token in self._special_ids:
                ids += [*self._encode_textual(text[start:left].replace(mark, "")), token]
                start = right
        return ids + self._encode_textual(text[start:].replace(mark, ""))

    def _encode_textual(self, text: str) -> list[int]:
        with panics_are_errors("text"):
            found = self._textual.encode(text, add_special_tokens=False).ids
        return [self._real_id.get(i, i) for i in found]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary vanish."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < 2**32]:
            raise unexpected("token ids", wrong[0], "numbers from 0 to 2**32 - 1")
        with panics_are_errors("token ids"):
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int:
        """The id of a token. Raises InputError."""
        if (found := self.backend.token_to_id(token)) is None:
            raise InputError(f"tokenizer: it has no token {token!r}")
        return found

    def token_of(self, token_id: int) -> str:
        """The token of an id (ordinary ones in the byte alphabet). Raises InputError."""
        if (found := self.backend.id_to_token(token_id)) is None:
            raise InputError(f"tokenizer: it has no token with id {token_id}")
        return found

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes of an id; none for special tokens (if skipped) and unknown ids."""
        if skip_special_tokens and token_id in self._special_ids:
            return b""
        token = self.backend.id_to_token(token_id) or ""
        try:
            return bytes(self._byte_of[c] for c in token)
        except KeyError:  # an added token, whose text is not in the byte alphabet
            return token.encode()


class TextStream:
    """Streams the text of token ids: complete characters only, cut before a stop string.

    `stopped` is the stop string that was complete first (of several, the longest), or None.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), skip_special_tokens: bool = True
    ):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stops = stop_list(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped: str | None = None

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that these ids make certain; empty once a stop string is complete."""
        ids = ids if isinstance(ids, Iterable) else (ids,)
        data = b"".join(self._tokenizer.token_bytes(int(i), self._skip) for i in ids)
        return self._release(self._decoder.decode(data))

    def flush(self) -> str:
        """The rest of the text, after the last id: an unfinished character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        cut, self.stopped = find_stop(text, self._stops)
        if self.stopped is not None:
            self._held = ""
            return text[:cut]
        # The longest end of the text that begins a stop string, which is not complete.
        starts = range(max(0, len(text) - max(map(len, self._stops), default=0)), len(text))
        begins = (at for at in starts if any(s.startswith(text[at:]) for s in self._stops))
        keep = next(begins, len(text))
        self._held = text[keep:]
        return text[:keep]


def stop_list(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; raises InputError for an empty one, which would stop everything."""
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(s and isinstance(s, str) for s in stops):
        raise unexpected("stop", shown(stop), "a string or a list, none empty")
    return tuple(stops)


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, str | None]:
    """Where to cut a text before a stop string, and which: the one complete first, else the end."""
    hits = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(hits)[1:] if hits else (len(text), None)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_file(path) if path.is_file() else {}


def _from_vocab(directory: Path, added: _Added) -> tokenizers.Tokenizer:
    """Qwen2's pipeline over vocab.json and merges.txt."""
    vocab = read_json_file(directory / "vocab.json")
    # A token that the vocabulary holds keeps its id when it is added; others would be numbered on.
    vocab |= {token.content: i for i, token in added if i is not None}
    try:
        lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise InputError(f"{directory / 'merges.txt'}: cannot read this UTF-8 file: {e}") from e
    merges: Any = []
    for number, line in enumerate(lines, 1):
        pair = tuple(line.split(" "))
        if line.strip() and not (number == 1 and line.startswith("#version")):
            if len(pair) != 2:
                raise InputError(f"{directory / 'merges.txt'}: line {number} is not two tokens")
            merges.append(pair)
    with panics_are_errors(f"{directory}: vocab.json and merges.txt do not fit"):
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _added_tokens(directory: Path, config: Mapping[str, Any], names: Mapping[str, Any]) -> _Added:
    """(id, token) of tokenizer_config.json, added_tokens.json and the named tokens, by id."""
    special = {_content(names.get(key)) for key in _NAMED}
    for key in _LISTED:
        listed = names.get(key) or []
        listed = list(listed.values()) if isinstance(listed, Mapping) else listed
        if not isinstance(listed, list):
            raise unexpected(f"{directory}: {key}", repr(listed), "a list of tokens")
        special |= {_content(token) for token in listed}
    found: dict[str, tuple[int | None, AddedToken]] = {}
    path = directory / "added_tokens.json"
    for name, i in _read_json(path).items():
        number = _token_id(i, f"{path}: id of {name!r}")
        found[name] = (number, AddedToken(name, special=name in special, normalized=False))
    where = f"{directory / 'tokenizer_config.json'}: added_tokens_decoder"
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, Mapping):
        raise unexpected(where, repr(entries), "an object")
    for i, raw in entries.items():
        content = raw.get("content") if isinstance(raw, Mapping) else None
        if not isinstance(content, str):
            raise unexpected(f"{where}.{i}", repr(raw), "an object with content")
        number = _token_id(int(i) if i.isdecimal() and len(i) < 11 else i, f"{where}: an id")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        options = {k: bool(raw[k]) for k in flags if k in raw}
        options["special"] = options.get("special", False) or content in special
        found[content] = (number, AddedToken(content, **options))
    for name in sorted(special - {None} - set(found), key=str):
        found[str(name)] = (None, AddedToken(str(name), special=True, normalized=False))
    return sorted(found.values(), key=lambda x: (x[0] is None, x[0] or 0))


def _content(token: Any) -> str | None:
    """The text of a token that a JSON file names as text or as an object."""
    found = token.get("content") if isinstance(token, Mapping) else token
    if found is not None and not isinstance(found, str):
        raise unexpected("tokenizer: a named token", repr(token), "text or an object")
    return found


def _token_id(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise unexpected(where, repr(value), "an integer from 0 to 2**32 - 1")
    return value
