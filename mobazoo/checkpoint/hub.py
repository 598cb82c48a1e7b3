"""Where a checkpoint lies: a local folder, or a snapshot of a Hub repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mobazoo.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
# Weights as safetensors, configuration, tokenizer, licence: nothing that is code or a pickle.
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
_NOT = ["*/*", "consolidated*"]


def locate(path_or_name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; a Hub id (``org/name``) is downloaded, or found in the cache when offline.

    What looks like a path never reaches the network: ``.``, ``~`` or ``/`` in front, no slash or more than one, or a
    first part that is a local folder.

    Raises:
        InputError: no such folder or repository, no access, no network.
    """
    name = str(path_or_name)
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if isinstance(path_or_name, Path) or not _HUB_ID.fullmatch(name) or local.parent.is_dir() or local.exists():
        hint = "" if _HUB_ID.fullmatch(name) else " (a Hub id looks like org/name)"
        raise InputError(f"{name}: no such folder{hint}")
    at = f"{name}@{revision}" if revision else name
    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT, local_files_only=offline
            )
        )
    except GatedRepoError:
        raise InputError(f"{at}: gated; accept its terms on huggingface.co and log in (`hf auth login`)") from None
    except RepositoryNotFoundError:
        raise InputError(f"{at}: no such folder, and no such Hub repository or no access to it") from None
    except RevisionNotFoundError:
        raise InputError(f"{at}: the Hub repository has no such revision") from None
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached; check the network"
        raise InputError(f"{at}: no such folder, not complete in the Hub cache, and {why}") from None
    except OSError as error:  # the Hub client's own errors and a full disk
        raise InputError(f"{at}: download failed: {' '.join(str(error).split())[:200]}") from None


def provenance_name(folder: Path) -> str:
    """How a checkpoint's origin is written down: Hub id with its commit, or the folder's bare name."""
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        repository = root.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        return f"{repository}@{root.name}"
    return root.name
