"""Local folder or Hub id; every way a download fails is one line. No test reaches the network."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mobazoo.checkpoint import hub
from mobazoo.checkpoint.hub import locate, provenance_name
from mobazoo.errors import InputError


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces the Hub client: records calls, raises or returns what the test says."""
    fake = SimpleNamespace(calls=[], error=None, folder="/snapshot")

    def snapshot_download(name: str, **options: object) -> str:
        fake.calls.append((name, options))
        if fake.error is not None:
            raise fake.error
        return fake.folder

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return fake


@pytest.mark.parametrize("name", ["./a/b", "../a", "/a/b", "~/a", "a", "a/b/c", "a\\b", "org/na me", "runs/model"])
def test_what_looks_like_a_path_stays_off_the_network(
    downloads: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="no such folder"):
        locate(name)
    assert not downloads.calls


def test_a_folder_wins(downloads: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/name") == Path("org/name")
    assert locate(tmp_path) == tmp_path
    assert not downloads.calls


def test_hub_id(downloads: SimpleNamespace) -> None:
    assert locate("org/name-1.5B", "main") == Path("/snapshot")
    ((name, options),) = downloads.calls
    assert (name, options["revision"], options["local_files_only"]) == ("org/name-1.5B", "main", False)
    patterns = options["allow_patterns"]
    assert not any(bad in pattern for pattern in patterns for bad in (".py", ".bin", ".pt", ".pkl"))


def test_offline(downloads: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    locate("org/name")
    assert downloads.calls[0][1]["local_files_only"]
    downloads.error = LocalEntryNotFoundError("many\nlines")
    with pytest.raises(InputError, match="org/name: no such folder, not complete in the Hub cache, and HF_HUB_OFFLINE"):
        locate("org/name")


def test_really_offline_with_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        locate("org/not-there")


def http(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("401 Client Error.\nmany lines",)
    return error


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (LocalEntryNotFoundError("x"), "the Hub cannot be reached; check the network"),
        (http(GatedRepoError), "gated; accept its terms"),
        (http(RepositoryNotFoundError), "no such Hub repository or no access"),
        (http(RevisionNotFoundError), "org/name@v2: the Hub repository has no such revision"),
        (ConnectionError("cut\noff"), "download failed: cut off"),
        (OSError(28, "No space left on device"), "download failed: .*No space left"),
    ],
)
def test_downloads_that_fail(downloads: SimpleNamespace, error: Exception, match: str) -> None:
    downloads.error = error
    with pytest.raises(InputError, match=match) as caught:
        locate("org/name", "v2")
    assert "\n" not in str(caught.value)


def test_provenance_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--na--me" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert provenance_name(snapshot) == "org/na--me@abc"
    assert provenance_name(tmp_path / "model") == "model"
