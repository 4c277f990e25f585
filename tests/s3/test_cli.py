"""Every command on a bucket, with nothing but the usual AWS variables; and how they end where it can't be used."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ckptstore
from ckptstore.cli.main import cli
from tests.cli.conftest import Answer, Run, interrupt, process, started, state
from tests.s3.proxy import Upstream
from tests.s3.seaweed import READER, READER_SECRET, SECRET, Seaweed
from tests.s3.wire import FaultyServer

LOOKING = ("ls", "show", "verify")


@pytest.fixture
def run(aws: None) -> Run:
    """Call the command line in this process; an exception that gets through is the test's failure."""

    def call(*args: str) -> Answer:
        result = CliRunner().invoke(cli, list(args), prog_name="ckptstore")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture
def empty(bucket: str, prefix: str) -> str:
    """A URL with nothing below."""
    return f"s3://{bucket}/{prefix}"


@pytest.fixture
def url(aws: None, empty: str) -> str:
    """A store with checkpoints of steps 10, 20 and 30; step 20 has the best loss."""
    with ckptstore.open(empty) as store:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
            store.save(state(step), step=step, metrics={"val_loss": loss}, reasons=["every 10 steps"])
    return empty


@pytest.fixture
def contents(server: Seaweed) -> Callable[[str], dict[str, Any]]:
    """All objects and unfinished uploads below a URL, seen by a client of its own."""
    client = server.client()

    def look(url: str) -> dict[str, Any]:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        objects = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])
        return {it["Key"]: it.get("ETag") for it in (*objects, *uploads)}

    return look


def test_looking(run: Run, url: str, contents: Callable[[str], dict[str, Any]]) -> None:
    """The answers are those of a store in a folder, and nothing changes."""
    before = contents(url)
    listed = run("ls", url, "--json")
    assert [c["step"] for c in listed.json["checkpoints"]] == [10, 20, 30]
    shown = run("show", url, "best:val_loss", "--json")
    assert shown.json["step"] == 20
    assert run("show", url).exit_code == 0
    assert run("verify", url, "--no-record").stdout.startswith("good: 3 checkpoints")
    assert run("verify", url, "latest", "--sample", "50%", "--no-record").stdout.startswith("good: 1 checkpoint")
    assert contents(url) == before


LEAVING_DATA = {
    "ls": ("commits",),
    "report": ("commits",),
    "watch": ("commits",),
    "show": ("commits", "manifest", "part"),
    "du": ("commits", "manifest", "part"),
}
"""What each command may read, of the objects of checkpoints."""


@pytest.mark.parametrize("command", LEAVING_DATA)
def test_looking_reads_no_tensor_data(
    command: str, run: Run, url: str, server: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen by what stands between the command and a real server."""
    options = {"report": ("-o", str(tmp_path / "report.html")), "watch": ("--once",)}
    with FaultyServer(Upstream(server.endpoint)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        assert run(command, url, *options.get(command, ())).exit_code == 0
    read = [request.key for request in proxy.requests if request.operation == "Get"]
    assert read
    of_checkpoints = [key for key in read if "/commits/" in key or "/checkpoints/" in key]
    assert of_checkpoints
    assert all(any(part in key for part in LEAVING_DATA[command]) for key in of_checkpoints), of_checkpoints


def test_keeping(run: Run, url: str) -> None:
    ids = [c["id"] for c in run("ls", url, "--json").json["checkpoints"]]

    assert run("hold", url, "step:10", "paper").exit_code == 0
    assert run("hold", url, "step:20", "paper").exit_code == 1
    assert run("delete", url, "paper", "--yes").exit_code == 1
    assert run("release", url, "paper").exit_code == 0
    assert run("delete", url, "step:10", "--yes").exit_code == 0
    assert [c["id"] for c in run("ls", url, "--json").json["checkpoints"]] == ids[1:]
    assert run("undelete", url, ids[0]).exit_code == 0
    assert run("delete", url, "step:10", "--yes").exit_code == 0
    assert run("prune", url, "--grace", "0s", "--json").json["reclaimed"] == ids[:1]
    assert run("verify", url).stdout.startswith("good: 2 checkpoints")


def test_damage_is_bad_news(run: Run, url: str, server: Seaweed) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    id = run("ls", url, "--json").json["checkpoints"][2]["id"]
    key = f"{prefix}/checkpoints/{id}/model.safetensors"
    data = bytearray(server.client().get_object(Bucket=bucket, Key=key)["Body"].read())
    data[5000] ^= 1
    server.client().put_object(Bucket=bucket, Key=key, Body=bytes(data))

    answer = run("verify", url)

    assert answer.exit_code == 1
    assert f"DAMAGED block 0 of checkpoints/{id}/model.safetensors" in answer.stdout


# --- doctor and bench ---


def test_doctor_tries_it_beside_a_store(
    run: Run, url: str, contents: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is left as it is, and so is everything else."""
    monkeypatch.setattr("ckptstore.tools.promises.RACES_S", 1.0)
    before = contents(url)
    answer = run("doctor", url, "--size", "20MB", "--json")

    document = answer.json
    assert [it["name"] for it in document["promises"] if not it["holds"]] == []
    assert answer.exit_code == 0
    assert (document["place"], document["kind"], document["direct_io"]) == (url, "s3", "no file system")
    assert (document["checks_writes"], document["consequences"]) == (True, [])
    assert [speed["in_flight"] for speed in document["blocks"]] == [1, 4, 8, 16]
    assert all(speed["write_gb_s"] > 0 and speed["read_gb_s"] > 0 for speed in document["blocks"])
    assert len(document["create"]["seconds"]) == 16
    assert contents(url) == before


def test_doctor_tells_what_follows_where_conditions_are_ignored(
    run: Run, empty: str, monkeypatch: pytest.MonkeyPatch, contents: Callable[[str], dict[str, Any]]
) -> None:
    """The real server, to which no condition is sent, as if it didn't know them."""
    from ckptstore.storage.s3.client import S3Client

    send, dropped = S3Client._call, []

    async def without(self: S3Client, method: str, /, **parameters: Any) -> dict[str, Any]:
        if parameters.pop("IfNoneMatch", None):
            dropped.append(method)
        return await send(self, method, **parameters)

    monkeypatch.setattr(S3Client, "_call", without)
    answer = run("doctor", empty, "--size", "2MB", "--json")

    assert "put_object" in dropped
    assert answer.exit_code == 1
    broken = {it["name"] for it in answer.json["promises"] if not it["holds"]}
    assert broken - {"atomic_create"} == {"exclusive_create", "refuse_existing"}
    assert ["notice late" in answer.json["consequences"][0], "7 days" in answer.json["consequences"][1]] == [True, True]
    assert contents(empty) == {}


@pytest.mark.full
def test_ctrl_c_leaves_no_upload(aws: None, empty: str, contents: Callable[[str], dict[str, Any]]) -> None:
    blocks = lambda: any("/blocks/" in key for key in contents(empty))  # noqa: E731
    with started("doctor", empty, "--size", "500MB", until=blocks) as child:
        assert interrupt(child) == (130, "", "interrupted\n")
    assert contents(empty) == {}


def test_bench_leaves_nothing(run: Run, empty: str, contents: Callable[[str], dict[str, Any]]) -> None:
    answer = run("bench", empty, "--size", "20MB", "--rounds", "1", "--json")

    assert [result["subject"] for result in answer.json["results"]] == ["ckptstore"]
    assert answer.exit_code == 0
    assert contents(empty) == {}


# --- as a process, and where it can't be used ---


def test_a_process_of_its_own(url: str) -> None:
    listed = process("ls", url, "--json")
    assert [c["step"] for c in listed.json["checkpoints"]] == [10, 20, 30]
    assert process("verify", url).stdout.startswith("good: 3 checkpoints")


@pytest.mark.parametrize("command", [*LOOKING, "prune", "doctor", "bench"])
def test_a_bucket_that_is_not_there_is_one_line(run: Run, server: Seaweed, command: str) -> None:
    answer = run(command, "s3://no-such-bucket/runs", "--json")

    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "storage")
    assert f"at {server.endpoint} (us-east-1)" in answer.stderr
    assert "there is no such bucket" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("command", LOOKING)
def test_no_store_is_one_line(run: Run, empty: str, command: str) -> None:
    answer = run(command, empty, "--json")

    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "no_store")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["ls", "prune", "doctor"])
@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_one_line(
    run: Run, url: str, server: Seaweed, monkeypatch: pytest.MonkeyPatch, command: str, wrong: str
) -> None:
    monkeypatch.setenv(wrong, "mistyped-3c81")
    answer = run(command, url, "--json")

    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "unavailable")
    assert f"at {server.endpoint} (us-east-1)" in answer.stderr
    assert "Give credentials by the environment" in answer.stderr
    assert "mistyped-3c81" not in answer.stdout + answer.stderr
    assert SECRET not in answer.stdout + answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["ls", "doctor"])
def test_no_credentials_are_one_line(run: Run, url: str, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    answer = run(command, url, "--json")

    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "unavailable")
    assert "Unable to locate credentials" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_who_may_only_read_is_told_so(
    run: Run, url: str, monkeypatch: pytest.MonkeyPatch, contents: Callable[[str], dict[str, Any]]
) -> None:
    """Looking works; changing, and the doctor, end with what was refused, not with what couldn't be removed."""
    before = contents(url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)

    assert run("ls", url).exit_code == 0
    assert run("verify", url).exit_code == 0
    for command in (["doctor", url], ["hold", url, "latest", "x"], ["delete", url, "latest", "--yes"], ["prune", url]):
        answer = run(*command)
        assert answer.exit_code == 2
        assert "AccessDenied (403)" in answer.stderr
        assert "Give credentials by the environment" in answer.stderr
        assert answer.stderr.count("\n") == 1
    assert "create failed" in run("doctor", url).stderr
    assert contents(url) == before


@pytest.mark.parametrize("command", ["ls", "doctor"])
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "http://no-such-host.invalid"])
def test_nobody_there_is_one_line(
    run: Run, empty: str, monkeypatch: pytest.MonkeyPatch, command: str, endpoint: str
) -> None:
    """Well before the two minutes for which a server that was there once is tried: only the error tells that here."""
    monkeypatch.setattr("ckptstore.storage.s3.client.REACH_S", 0.5)
    with socket.socket() as reserved:
        # Bound and not listening: whoever connects is refused.
        reserved.bind(("127.0.0.1", 0))
        where = endpoint.format(port=reserved.getsockname()[1])
        monkeypatch.setenv("AWS_ENDPOINT_URL", where)
        answer = run(command, empty, "--json")

    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "unavailable")
    assert f"at {where} (us-east-1)" in answer.stderr
    assert "Could not connect" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_an_endpoint_s_password_is_not_repeated(run: Run, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://me:geheim@127.0.0.1:1", "http://me:geheim@127.0.0.1:1/?token=geheim"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        answer = run("ls", empty)
        assert answer.exit_code == 2
        assert "127.0.0.1:1" in answer.stderr
        assert "geheim" not in answer.stdout + answer.stderr
