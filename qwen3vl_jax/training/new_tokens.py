"""New tokens: added to the tokenizer's files, with rows of the embedding (and head) to train.

New tokens take the spare rows of the embedding (released: 151,936 rows, 151,669 tokens). The embedding
never grows, so a checkpoint's shapes stay.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.quantized import Quantized
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.storage.json_text import read_json_file, write_json
from qwen3vl_jax.storage.paths import as_path, make_folder

_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def add_tokens(
    directory_in: str | Path, directory_out: str | Path, names: Sequence[str], vocab_size: int
) -> list[int]:
    """Adds tokens to the tokenizer files of directory_out and gives their ids.

    Both directories may be the same. The tokens are ordinary added tokens, as <tool_call> is: matched in
    any text, shown in answers. vocab_size: rows of the embedding. Raises InputError for names that
    cannot be added, and for too few spare rows.
    """
    source, out = as_path(directory_in), as_path(directory_out)
    ids = new_ids(Tokenizer.from_pretrained(source), names, vocab_size)
    entries = [{"content": name, **_FLAGS, "id": i} for name, i in zip(names, ids)]
    make_folder(out)
    for file, content in _changed_files(source, entries).items():
        text = write_json(content, file, indent=2, ensure_ascii=False)
        (out / file).write_text(text + "\n", encoding="utf-8")
    return ids


def new_ids(tokenizer: Tokenizer, names: Sequence[str], vocab_size: int) -> list[int]:
    """The first free ids for new tokens. Raises InputError, see `add_tokens`."""
    for number, name in enumerate(names):
        where = f"train.new_tokens: {name!r}"
        if not name or name != name.strip():
            found = "is no name of a token; expected text without spaces around it"
            raise InputError(f"{where} {found}")
        if name in names[:number]:
            raise InputError(f"{where} is there twice")
        if (known := tokenizer.backend.token_to_id(name)) is not None:
            raise InputError(f"{where} is a token already, with id {known}; leave it out")
    first = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
    spare = max(vocab_size - first, 0)
    if len(names) > spare:
        found = f"the embedding has {vocab_size} rows and its tokenizer uses {first}"
        left = f"there are rows for {spare} more; tables do not grow"
        raise InputError(f"train.new_tokens: {len(names)} tokens, but {found}: {left}")
    return list(range(first, first + len(names)))


def _changed_files(source: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """{file name: content} of the files that list added tokens, with the new ones appended."""
    changed: dict[str, Any] = {}
    for file in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        if not (source / file).is_file():
            continue
        content = read_json_file(source / file)
        if file == "tokenizer.json":
            known = content.get("added_tokens") or []
            changed[file] = content | {"added_tokens": [*known, *entries]}
        elif file == "added_tokens.json":
            changed[file] = content | {e["content"]: e["id"] for e in entries}
        elif (known := content.get("added_tokens_decoder")) is not None:
            new = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
            changed[file] = content | {"added_tokens_decoder": known | new}
    if not changed:
        found = "none of its tokenizer files lists added tokens"
        raise InputError(f"{source}: {found}; expected tokenizer.json")
    return changed


def new_rows(params: Params, ids: Sequence[int]) -> Params:
    """Sets rows `ids` of embedding and head to the mean old row. Raises InputError for 8-bit weights."""
    if not len(ids):
        return params
    new = dict(params)
    for name in ("embed", "head"):
        if isinstance(table := params.get(name), Quantized):
            raise InputError(
                f"train.new_tokens: the weight {name!r} is held in 8 bits; start from a checkpoint "
                "that holds it in 16 or 32"
            )
        if table is not None:
            table = jnp.asarray(table)
            mean = jax.jit(lambda x: jnp.mean(x[: min(ids)].astype(jnp.float32), 0))(table)
            new[name] = table.at[jnp.asarray(ids)].set(mean.astype(table.dtype))
    return new
