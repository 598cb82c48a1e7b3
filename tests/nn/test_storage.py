"""Memory of a cache that lies elsewhere."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from mobazoo.errors import InputError
from mobazoo.nn.storage import allocate, check_offload

LIKE = torch.zeros(1, dtype=torch.bfloat16)


def test_a_mapped_file_has_no_name_and_all_its_space(tmp_path: Path) -> None:
    mapped = allocate((3, 1 << 16), LIKE, tmp_path)
    assert mapped.dtype == LIKE.dtype
    assert not mapped.any()
    mapped += 1
    assert mapped.sum() == 3 << 16
    assert not list(tmp_path.iterdir())


def test_a_folder_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(tmp_path, "cache").mkdir()
    check_offload("~/cache")
    assert not allocate((3,), LIKE, "~/cache").any()
    with pytest.raises(InputError, match="got '~/other', which is no folder"):
        check_offload("~/other")


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    """Not a signal at the first write: a limit on the size of files stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(InputError, match=r"offload: .*: no room for a mapped file: .*File too large"):
            allocate((1 << 20,), LIKE, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
