"""A folder behind SFTP keeps the contract, where paramiko and a server to talk to are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.errors import UnavailableError
from ckptstore.storage.generic import GenericStorage
from tests.remote import servers
from tests.storage.contract import StorageContract
from tests.storage.generic.rig import FolderRaw, VanishingContract

pytest.importorskip("paramiko", reason="there is no paramiko: pip install paramiko")
pytest.importorskip("asyncssh", reason="there is no SFTP server: pip install asyncssh")

from tests.remote.sftp_server import PASSWORD, USER

pytestmark = [
    pytest.mark.full,
    # What the clients of others leave open at the end is theirs.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    server = servers.sftp(tmp_path_factory.mktemp("sftp"))
    yield server
    server.stop()


def options(port: int) -> dict[str, Any]:
    return {"port": port, "username": USER, "password": PASSWORD, "look_for_keys": False, "allow_agent": False}


class TestSftp(VanishingContract, StorageContract):
    rounds = 5

    @pytest.fixture
    def reopen(self, server: servers.Server, tmp_path: Path) -> Callable[..., GenericStorage]:
        return lambda **how: GenericStorage("sftp", f"127.0.0.1{tmp_path}", options(server.port), **how)

    @pytest.fixture
    def storage(self, reopen: Callable[..., GenericStorage]) -> GenericStorage:
        return reopen()

    @pytest.fixture
    def raw(self, tmp_path: Path) -> FolderRaw:
        return FolderRaw(tmp_path)


def test_a_store_lives_there(server: servers.Server, tmp_path: Path) -> None:
    values = torch.arange(3_000_000)
    with cs.open(f"sftp://127.0.0.1{tmp_path}/runs", storage_options=options(server.port)) as store:
        for step in (1, 2):
            store.save({"values": values + step}, step=step)
        assert store.verify().ok
        store.delete("step:1")
        assert len(store.prune(grace_s=0).reclaimed) == 1
        assert torch.equal(store.load("latest")["values"], values + 2)
    # The same folder is a store by its path, too.
    assert cs.open(tmp_path / "runs").verify().ok


def test_a_connection_that_is_gone_is_made_again(tmp_path: Path) -> None:
    first = servers.sftp(tmp_path)
    storage = GenericStorage("sftp", f"127.0.0.1{tmp_path}/runs", options(first.port))
    storage.create("a", b"x")
    first.stop()
    second = servers.sftp(tmp_path, first.port)
    try:
        assert storage.read("a", limit=1) == b"x"
        storage.create("b", b"y")
    finally:
        second.stop()
    assert (tmp_path / "runs/b").read_bytes() == b"y"


def test_a_wrong_password_is_no_passing_trouble_and_not_repeated(server: servers.Server, tmp_path: Path) -> None:
    wrong = options(server.port) | {"password": "hunter2"}

    with pytest.raises(UnavailableError) as caught:
        GenericStorage("sftp", f"127.0.0.1{tmp_path}", wrong)

    assert not caught.value.transient
    assert "hunter2" not in f"{caught.value} {caught.value.__cause__!r}"
