"""Who moves bytes to and from a bucket: plain clients, which check nothing, and those that save a state.

Each makes its connections anew at every call, as a process does that begins.
"""

from __future__ import annotations

import io
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import ckptstore as cs

PART_BYTES = 16 << 20
"""Of all who may choose: ckptstore's own."""


@dataclass(frozen=True)
class Place:
    """Where they move what.

    Attributes:
        options: of s3fs, for the server.
        bucket: on it.
        tensors: the state, which loads overwrite.
        data: as many bytes, for those who move no tensors.
    """

    options: Mapping[str, Any]
    bucket: str
    tensors: dict[str, torch.Tensor] = field(repr=False)
    data: bytes = field(repr=False)

    def parts(self) -> list[tuple[int, int]]:
        """Begin and end of each part of ``data``."""
        size = len(self.data)
        return [(begin, min(begin + PART_BYTES, size)) for begin in range(0, size, PART_BYTES)]

    def s3fs(self) -> Any:
        """A new file system of s3fs."""
        import s3fs

        return s3fs.S3FileSystem(**self.options, skip_instance_cache=True)

    def boto(self) -> Any:
        """A new client of boto3, with its defaults."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.options["endpoint_url"],
            aws_access_key_id=self.options["key"],
            aws_secret_access_key=self.options["secret"],
            region_name="us-east-1",
            config=Config(max_pool_connections=64, s3={"addressing_style": "path"}),
        )


class Client(Protocol):
    """Moves the whole state, or as many bytes; ``in_flight`` is how many requests at a time it is asked for."""

    def save(self, place: Place, name: str, in_flight: int) -> None: ...
    def load(self, place: Place, name: str, in_flight: int) -> None: ...


class BotoWhole:
    """One request for all."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        place.boto().put_object(Bucket=place.bucket, Key=name, Body=place.data)

    def load(self, place: Place, name: str, in_flight: int) -> None:
        body = place.boto().get_object(Bucket=place.bucket, Key=name)["Body"]
        assert len(body.read()) == len(place.data)


class BotoThreads:
    """Parts and ranges by threads of ours."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        client, where, whole = place.boto(), {"Bucket": place.bucket, "Key": name}, memoryview(place.data)
        upload = client.create_multipart_upload(**where)["UploadId"]

        def put(part: tuple[int, tuple[int, int]]) -> dict[str, Any]:
            number, (begin, end) = part
            body = bytes(whole[begin:end])
            sent = client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": sent["ETag"]} | {
                key: sent[key] for key in ("ChecksumCRC32",) if key in sent
            }

        with ThreadPoolExecutor(in_flight) as threads:
            parts = list(threads.map(put, enumerate(place.parts(), start=1)))
        client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})

    def load(self, place: Place, name: str, in_flight: int) -> None:
        client = place.boto()

        def get(part: tuple[int, int]) -> int:
            span = f"bytes={part[0]}-{part[1] - 1}"
            return len(client.get_object(Bucket=place.bucket, Key=name, Range=span)["Body"].read())

        with ThreadPoolExecutor(in_flight) as threads:
            assert sum(threads.map(get, place.parts())) == len(place.data)


class BotoTransfer:
    """boto3's own transfer manager."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        place.boto().upload_fileobj(io.BytesIO(place.data), place.bucket, name, Config=self._config(in_flight))

    def load(self, place: Place, name: str, in_flight: int) -> None:
        target = io.BytesIO()
        place.boto().download_fileobj(place.bucket, name, target, Config=self._config(in_flight))
        assert target.getbuffer().nbytes == len(place.data)

    def _config(self, in_flight: int) -> Any:
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(multipart_chunksize=PART_BYTES, max_concurrency=in_flight)


class Obstore:
    """The client in Rust."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        import obstore

        store = self._store(place)
        obstore.put(store, name, place.data, chunk_size=PART_BYTES, max_concurrency=in_flight)

    def load(self, place: Place, name: str, in_flight: int) -> None:
        import obstore

        store = self._store(place)
        with ThreadPoolExecutor(in_flight) as threads:
            got = threads.map(
                lambda part: len(obstore.get_range(store, name, start=part[0], end=part[1])), place.parts()
            )
            assert sum(got) == len(place.data)

    def _store(self, place: Place) -> Any:
        from obstore.store import S3Store

        return S3Store(
            place.bucket,
            endpoint=place.options["endpoint_url"],
            access_key_id=place.options["key"],
            secret_access_key=place.options["secret"],
            region="us-east-1",
            client_options={"allow_http": True},
        )


class S3fsRanges:
    """``pipe_file`` and ``cat_ranges`` of s3fs."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        place.s3fs().pipe_file(f"{place.bucket}/{name}", place.data, chunksize=PART_BYTES, max_concurrency=in_flight)

    def load(self, place: Place, name: str, in_flight: int) -> None:
        parts = place.parts()
        begins, ends = [begin for begin, _ in parts], [end for _, end in parts]
        got = place.s3fs().cat_ranges([f"{place.bucket}/{name}"] * len(parts), begins, ends, batch_size=in_flight)
        assert sum(map(len, got)) == len(place.data)


class S3fsFile:
    """A file object of s3fs, written and read whole."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        with place.s3fs().open(f"{place.bucket}/{name}", "wb") as file:
            file.write(place.data)

    def load(self, place: Place, name: str, in_flight: int) -> None:
        with place.s3fs().open(f"{place.bucket}/{name}", "rb") as file:
            assert len(file.read()) == len(place.data)


class TorchFile:
    """``torch.save`` into a file object of s3fs, and ``torch.load`` from one."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        with place.s3fs().open(f"{place.bucket}/{name}", "wb") as file:
            torch.save(place.tensors, file)

    def load(self, place: Place, name: str, in_flight: int) -> None:
        with place.s3fs().open(f"{place.bucket}/{name}", "rb") as file:
            assert len(torch.load(file, weights_only=True)) == len(place.tensors)


class Dcp:
    """``torch.distributed.checkpoint`` over fsspec, in one process."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        writer = FsspecWriter(f"s3://{place.bucket}/{name}", **place.options, skip_instance_cache=True)
        with warnings.catch_warnings(action="ignore"):
            dcp.save(place.tensors, storage_writer=writer, no_dist=True)

    def load(self, place: Place, name: str, in_flight: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        reader = FsspecReader(f"s3://{place.bucket}/{name}", **place.options, skip_instance_cache=True)
        with warnings.catch_warnings(action="ignore"):
            dcp.load(place.tensors, storage_reader=reader, no_dist=True)


class Ckptstore:
    """Ours: a new store each time, hashed and verified."""

    def save(self, place: Place, name: str, in_flight: int) -> None:
        with cs.open(f"s3://{place.bucket}/{name}", storage_options=place.options) as store:
            store.save(place.tensors, step=1)

    def load(self, place: Place, name: str, in_flight: int) -> None:
        with cs.open(f"s3://{place.bucket}/{name}", storage_options=place.options, read_only=True) as store:
            store.load(into=place.tensors)


PLAIN: dict[str, Callable[[], Client]] = {
    "boto_whole": BotoWhole,
    "boto_threads": BotoThreads,
    "boto_transfer": BotoTransfer,
    "obstore": Obstore,
    "s3fs_ranges": S3fsRanges,
}
SAVERS: dict[str, Callable[[], Client]] = {
    "ckptstore": Ckptstore,
    "s3fs_file": S3fsFile,
    "torch": TorchFile,
    "dcp": Dcp,
}
CLIENTS = PLAIN | SAVERS
NEEDS_ONE = {"boto_whole", *SAVERS}
"""Those that take no number of requests at a time."""


def fastest_plain(times: Mapping[str, Sequence[float]]) -> str:
    """The plain client with the best median."""
    return min((name for name in times if name in PLAIN), key=lambda name: statistics.median(times[name]))
