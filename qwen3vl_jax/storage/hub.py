"""Checkpoints by name: a directory, or a Hub id downloaded into huggingface_hub's cache."""

import contextlib
import os
import re
from pathlib import Path

from qwen3vl_jax.errors import InputError, one_line
from qwen3vl_jax.storage.paths import AnyPath, as_path, is_remote, kind
from qwen3vl_jax.storage.safetensors_files import refuse_pickles

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def resolve(ckpt: AnyPath, revision: str | None = None) -> Path:
    """The directory of a checkpoint; a Hub id is downloaded into huggingface_hub's cache first.

    Without network, or with HF_HUB_OFFLINE=1, only the cache is used. Raises InputError.
    """
    if (found := local_directory(ckpt, revision)) is not None:
        return found
    from huggingface_hub import HfApi, errors, snapshot_download

    repo = os.fspath(ckpt)
    at = repo if revision is None else f"{repo} at revision {revision}"
    try:
        found = Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as e:
        said = {
            errors.GatedRepoError: "access is gated; accept its terms and log in to the Hub",
            errors.RevisionNotFoundError: "the repository has no such revision",
            errors.RepositoryNotFoundError: "no such directory, and no such repository on the Hub",
            errors.LocalEntryNotFoundError: "no such directory; the Hub is out of reach, and not all "
            "of the checkpoint in the cache",
            # The errors of its HTTP library change from version to version.
            Exception: f"cannot be fetched from the Hub ({one_line(e)[:200]})",
        }
        why = next(text for kind, text in said.items() if isinstance(e, kind))
        raise InputError(f"{at}: {why}") from e
    if not any(found.glob("*.safetensors")):
        names: list[str] = []
        # The Hub is out of reach.
        with contextlib.suppress(Exception):
            names = HfApi().list_repo_files(repo, revision=found.name)
        refuse_pickles(at, names)
    return found


def local_directory(ckpt: AnyPath, revision: str | None = None) -> Path | None:
    """The path if it is a directory, None if it can be a Hub id. Raises InputError for others."""
    path = as_path(ckpt)
    if (found := kind(path)) == "folder":
        if revision is not None:
            raise InputError(f"{path}: is a directory; a revision ({revision}) is for Hub ids only")
        return path
    if found:
        raise InputError(f"{path}: is a file, expected a checkpoint directory or a Hub id")
    if is_remote(path) or not _HUB_ID.fullmatch(os.fspath(ckpt)):
        hint = "a Hub id looks like Qwen/Qwen3-VL-2B-Instruct"
        raise InputError(f"{path}: no such directory ({hint})")
    return None
