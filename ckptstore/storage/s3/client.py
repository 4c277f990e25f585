"""Requests to one bucket, tried again as long as that may help.

s3fs makes the client: it knows every way to give credentials, endpoints and encryption. Its retries and botocore's are
switched off, as they don't tell whether an earlier try may have been applied.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import s3fs
from botocore.exceptions import ClientError
from tenacity import RetryCallState

from ckptstore.errors import StorageError
from ckptstore.storage.retrying import Outage, deadline_s, tries
from ckptstore.storage.s3.direct import Direct
from ckptstore.storage.s3.failures import is_never_sent, is_too_much, is_transient, translate, without_secrets
from ckptstore.storage.s3.gate import Gate
from ckptstore.storage.s3.loop import event_loop
from ckptstore.storage.s3.scrub import scrubbed, secrets_in, secrets_of
from ckptstore.storage.s3.signing import Signed, leave_parts_unsigned, signed_get, signed_part

T = TypeVar("T")

REACH_S = 10.0
"""Instead of the deadline, as long as nobody has ever answered: an endpoint that was mistyped shall be told at once."""
_SIGNED_S = 10.0
"""Longer than this no thread waits for a request that it sends itself."""
_CONNECTIONS = 64
_CONFIG: dict[str, Any] = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "max_pool_connections": _CONNECTIONS,
    "retries": {"total_max_attempts": 1},
}


class Call(Protocol):
    """One request by the name of its method in botocore, the bucket given already."""

    def __call__(self, method: str, /, **parameters: Any) -> Awaitable[dict[str, Any]]: ...


class S3Client:
    """A bucket.

    Args:
        bucket: its name.
        prefix: of all keys: "", or what ends in "/".
        options: of ``s3fs.S3FileSystem``; see there. And ``deadline_s``: how long a request is tried again, in seconds.
        patient: for minutes, where ``options`` don't say: a run must not end with its network.

    Raises:
        StorageError: options that s3fs doesn't take.
    """

    def __init__(self, bucket: str, prefix: str, options: Mapping[str, Any], *, patient: bool = False) -> None:
        self.bucket, self.prefix = bucket, prefix
        self._pid = os.getpid()
        options = dict(options)
        self._secrets = secrets_in(options)
        self._deadline_s = _seconds(options.pop("deadline_s", deadline_s(patient=patient)))
        try:
            self._extra = dict(options.get("s3_additional_kwargs") or {})
            config = _CONFIG | dict(options.pop("config_kwargs", None) or {})
            fixed = {"config_kwargs": config, "loop": event_loop(), "asynchronous": False}
            self._fs = s3fs.S3FileSystem(**{**options, **fixed}, skip_instance_cache=True, use_listings_cache=False)
        except (TypeError, ValueError, KeyError) as error:
            said = scrubbed(str(error), self._secrets)
            raise StorageError(f"s3://{bucket}: storage_options that s3fs doesn't take: {said}") from None
        self._gate = Gate(config["max_pool_connections"], is_too_much)
        verify = self._fs.client_kwargs.get("verify")
        self._direct = Direct(config["max_pool_connections"], self._deadline_s, config, verify)
        self._answered = False
        self._outage = Outage(f"s3://{bucket}/{prefix}", self._told, self._deadline_s)
        self._tries = tries(is_transient, self._is_over, self._outage)

    def run(self, work: Callable[[Call], Awaitable[T]], doing: str, key: str, *, settle_s: float = 0.0) -> T:
        """``work``, some requests, from any thread; again as long as what it raises is transient.

        Args:
            settle_s: how long an interrupted caller waits for its end, before it is cancelled.

        Raises:
            CheckpointError: what it raised at last, translated.
        """
        self._check_process()
        try:
            done: T = self._tries(self._once, work, settle_s)
        except Exception as error:
            secrets = self._all_secrets()
            failed = translate(error, doing, self._where(key), key, secrets)
            failed.message = scrubbed(failed.message, secrets)
            failed.args = (failed.message,)
            if scrubbed(str(error), secrets) != str(error):
                # Its traceback would tell all the same.
                raise failed from None
            raise failed from error
        self._outage.over()
        return done

    def direct(self) -> Direct | None:
        """How a thread sends requests of its own; None where it had better not."""
        self._check_process()
        return self._direct if self._gate.is_wide and self._direct.is_on() else None

    def signed(self, path: str) -> Signed | None:
        """A request for an object, to be sent by ``direct``; None where it can't be."""
        return self._sign(lambda client: signed_get(client, **self._complete(client.get_object, Key=path)))

    def signed_part(self, **parameters: Any) -> Signed | None:
        """A request that carries a part, to be sent by ``direct``; None where it can't be."""
        return self._sign(lambda client: signed_part(client, **self._complete(client.upload_part, **parameters)))

    def _sign(self, make: Callable[[Any], Awaitable[Signed]]) -> Signed | None:
        async def sign() -> Signed | None:
            await self._fs.set_session()
            made = await make(await self._fs.get_s3(self.bucket))
            bundle = self._fs.session.get_config_variable("ca_bundle")
            return made if self._direct.suits(made.url, bundle) else None

        running = asyncio.run_coroutine_threadsafe(sign(), self._fs.loop)
        try:
            return running.result(_SIGNED_S)
        except Exception:
            # Whatever it is, the request by the event loop tells it.
            self._direct.failed()
            return None
        finally:
            running.cancel()

    def answered(self) -> None:
        """Note that ``direct`` had a good answer."""
        self._answered = True
        self._outage.over()

    def close(self) -> None:
        """Close connections that aren't in use, but for those of the event loop. Safe to go on after."""
        self._direct.close()

    def _told(self, error: BaseException) -> str:
        secrets = self._all_secrets()
        return scrubbed(str(translate(error, "a request", self._where(""), "", secrets)), secrets)

    def _all_secrets(self) -> set[str]:
        return self._secrets | secrets_of(getattr(self._fs, "_s3", None))

    def _is_over(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        spent_s = state.seconds_since_start or 0.0
        if not self._answered and error is not None and is_never_sent(error):
            return spent_s + state.upcoming_sleep >= min(REACH_S, self._deadline_s)
        return spent_s >= self._deadline_s

    def _once(self, work: Callable[[Call], Awaitable[T]], settle_s: float) -> T:
        async def with_session() -> T:
            await self._fs.set_session()
            async with self._gate.passing():
                return await work(self._call)

        running: Future[T] | None = None
        try:
            running = asyncio.run_coroutine_threadsafe(with_session(), self._fs.loop)
            return running.result()
        except Exception:
            raise
        except BaseException:
            # Interrupted: nothing may go on behind the caller's back.
            if running is not None:
                try:
                    with suppress(Exception):
                        running.result(settle_s)
                finally:
                    running.cancel()
            raise

    async def _call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        client = await self._fs.get_s3(self.bucket)
        if method == "upload_part":
            leave_parts_unsigned(client)
        request = getattr(client, method)
        if "CopySource" in parameters:
            # The key by which a copy is encrypted is that of its source too.
            secret = {f"CopySource{name}": value for name, value in self._extra.items() if "SSECustomer" in name}
            parameters = secret | parameters
        try:
            answer: dict[str, Any] = await request(**self._complete(request, **parameters))
        except ClientError:
            self._answered = True
            raise
        self._answered = True
        return answer

    def _complete(self, request: Any, **parameters: Any) -> dict[str, Any]:
        """``parameters``, and those that the options give to all such requests."""
        complete = self._fs._get_s3_method_kwargs(request, self._fs.req_kw, Bucket=self.bucket, **parameters)
        return dict(complete)

    def _where(self, key: str) -> str:
        client = getattr(self._fs, "_s3", None)
        meta = getattr(client, "meta", None)
        given = self._fs.client_kwargs
        endpoint = meta.endpoint_url if meta else self._fs.endpoint_url or given.get("endpoint_url") or "AWS"
        region = (meta.region_name if meta else given.get("region_name")) or "no region"
        return f"s3://{self.bucket}/{self.prefix}{key} at {without_secrets(str(endpoint))} ({region})"

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StorageError(
                f"s3://{self.bucket} was opened in process {self._pid}; its connections can't be used in the fork "
                f"{os.getpid()}: open it again there"
            )


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise StorageError("storage_options: deadline_s must be a number of seconds over 0")
    return float(value)
