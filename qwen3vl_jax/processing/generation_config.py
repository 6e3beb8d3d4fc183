"""generation_config.json: the ids that end an answer, and the checkpoint's arguments of sampling."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_jax.errors import shown, unexpected
from qwen3vl_jax.storage.json_text import read_json_file

# Defaults of transformers 4.57.1 for a file that says to sample and leaves these out.
_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_ALWAYS = ("repetition_penalty", "min_new_tokens")
# Other ways to decode, with the value that means "off".
_OTHER = dict.fromkeys(("num_beams", "num_beam_groups", "typical_p"), 1)
_OTHER |= dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"), 0)
_OTHER |= dict.fromkeys(("penalty_alpha", "guidance_scale", "bad_words_ids", "forced_eos_token_id"))
log = logging.getLogger("qwen3vl_jax")


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json as a dict, empty where there is none. Raises InputError."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    found = read_json_file(path)
    if not all(type(i) is int and 0 <= i < 2**31 for i in stop_ids(found)):
        raise unexpected(f"{path}: eos_token_id", shown(found["eos_token_id"]), "token ids")
    for name in (*_SAMPLED, "min_p", *_ALWAYS):
        value = found.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise unexpected(f"{path}: {name}", shown(value), "a number")
    for name, off in _OTHER.items():
        if found.get(name, off) not in (off, None):
            log.warning("%s: %s %r is not implemented and ignored", path, name, found[name])
    return found


def sampling_defaults(raw: Mapping[str, Any]) -> dict[str, float]:
    """Arguments of `Sampling` from a generation_config; without do_sample an answer is greedy."""
    given = {name: raw[name] for name in _ALWAYS if raw.get(name) is not None}
    if raw.get("do_sample"):
        names = (*_SAMPLED, "min_p")
        given |= _SAMPLED | {name: raw[name] for name in names if raw.get(name) is not None}
    return given


def stop_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer, empty where the file names none."""
    eos = raw.get("eos_token_id")
    return tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
