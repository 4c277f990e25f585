"""Which URLs are understood, and which are refused without repeating their secrets."""

from __future__ import annotations

import sys
from pathlib import Path
from uuid import uuid4

import pytest
from fsspec.registry import _registry

from ckptstore.errors import NotFoundError, StorageError
from ckptstore.storage import LocalStorage, MemoryStorage, open_storage


def test_a_path_and_its_file_url_are_one_place(tmp_path: Path) -> None:
    folder = tmp_path / "runs with blanks % and ü"
    open_storage(folder).create("a", b"x")
    by_url = open_storage(open_storage(str(folder)).url)

    assert isinstance(by_url, LocalStorage)
    assert by_url.read("a", limit=1) == b"x"
    assert open_storage(f"file://localhost{tmp_path}").list("") != []


def test_opening_creates_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "a/b")

    assert storage.list("") == []
    assert list(tmp_path.iterdir()) == []


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    open_storage("~/runs").create("a", b"x")

    assert (tmp_path / "runs/a").read_bytes() == b"x"


def test_relative_paths_stay_where_they_were_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("runs")
    monkeypatch.chdir("/")

    storage.create("a", b"x")

    assert (tmp_path / "runs/a").read_bytes() == b"x"


def test_memory_storages_share_by_name() -> None:
    name = f"memory://{uuid4().hex}"
    open_storage(name).create("a", b"x")

    assert isinstance(open_storage(name), MemoryStorage)
    assert open_storage(name, read_only=True).read("a", limit=1) == b"x"
    assert open_storage(name + "-other").list("") == []


@pytest.mark.parametrize("scheme", ["nonsense", "zip", "simplecache"])
def test_other_schemes_are_refused_by_name(scheme: str) -> None:
    with pytest.raises(StorageError, match=rf"{scheme}:// .*file:///.*memory://.*\bgs\b"):
        open_storage(f"{scheme}://bucket/x")


@pytest.mark.parametrize(
    ("scheme", "package"),
    [("gs", r"ckptstore\[gcs\]"), ("abfs", r"ckptstore\[azure\]"), ("oci", "ocifs"), ("sftp", "paramiko")],
)
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gcsfs", "adlfs", "ocifs", "paramiko", "fsspec.implementations.sftp"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(_registry, scheme, raising=False)

    with pytest.raises(StorageError, match=f"pip install '?{package}"):
        open_storage(f"{scheme}://bucket/x")


def test_chains_of_file_systems_are_refused() -> None:
    """A cache between the store and its storage would answer from yesterday."""
    with pytest.raises(StorageError, match="simplecache:: is not supported"):
        open_storage("simplecache::s3://bucket/x")


def test_options_belong_to_storage_far_away(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", "memory://options"):
        with pytest.raises(StorageError, match="leave them out"):
            open_storage(url, options={"key": "x"})


@pytest.mark.parametrize("url", ["gs://", "gs:///", "gs://bucket//x", "gs://bucket/../other", "sftp://host/a\nb"])
def test_what_is_no_place_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match="place"):
        open_storage(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:hunter2@bucket/x",
        "file://hunter2@host/x",
        "memory://hunter2@name",
        "s3://bucket/x?X-Amz-Signature=hunter2",
        "file:///x?token=hunter2",
        "file:///x#hunter2",
        "sftp://user:hunter2@host/x",
        "https://user:hunter2@host/x",
        "https://host/x?sig=hunter2",
    ],
)
def test_urls_with_secrets_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_storage(url)

    assert "hunter2" not in repr(caught.value) + str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize("url", ["", "file://host/x", "file://x", "file:/x", "s3:/bucket/x", "memory://", "a\0b"])
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(StorageError):
        open_storage(url)


def test_read_only_needs_something_to_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no-such"):
        open_storage(tmp_path / "no-such", read_only=True)
