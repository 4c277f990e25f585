"""Which blocks are encoded: as the user says, or where it makes saving faster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ckptstore.format.codecs import Buffer, Compression, encode

_AUTO = Compression("float-zstd", 1)
_TRIAL_BLOCKS = 2
_MARGIN = 1.1
"""Gain that compressing must promise: the processor's time has other takers."""


class Compressor:
    """Encodes the blocks of one store. With "auto" it measures codec and storage, and does what is faster.

    Args:
        compression: the user's choice.
        threads: that encode at a time, at most as many as there are cores.
    """

    def __init__(self, compression: Compression, threads: int) -> None:
        self.compression, self._threads = compression, threads
        self._auto = compression.codec == "auto"
        self._lock = threading.Lock()
        self._trials = 0
        self._encoding = _Rate()
        self._writing = _Rate()
        self._raw_bytes = self._encoded_bytes = 0
        self._writers = 0
        self._writing_since = 0.0

    @property
    def encodes(self) -> bool:
        """Whether blocks may be encoded, so that their place in the file isn't known before."""
        return self.compression.codec != "none"

    def encode(self, raw: memoryview, segments: Sequence[tuple[str, int]]) -> tuple[str, Buffer]:
        """The codec used and the bytes to store."""
        if not self._auto:
            return encode(raw, self.compression, segments)
        if not self._worth_it():
            return "none", raw
        began = time.thread_time()
        codec, stored = encode(raw, _AUTO, segments)
        with self._lock:
            self._encoding.add(len(raw), time.thread_time() - began)
            self._raw_bytes += len(raw)
            self._encoded_bytes += len(stored)
        return codec, stored

    @contextmanager
    def timed_write(self, length: int) -> Iterator[None]:
        """Around writing ``length`` stored bytes; several at a time count as one stretch."""
        if not self._auto:
            yield
            return
        with self._lock:
            if not self._writers:
                self._writing_since = time.perf_counter()
            self._writers += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                now = time.perf_counter()
                self._writing.add(length, now - self._writing_since)
                self._writing_since = now

    def _worth_it(self) -> bool:
        with self._lock:
            if self._trials < _TRIAL_BLOCKS:
                # Both are measured on real blocks: the first ones are encoded, however fast the storage is.
                self._trials += 1
                return True
            if not self._encoding.seconds or not self._writing.seconds:
                return False
            plain = self._writing.per_second
            ratio = self._encoded_bytes / self._raw_bytes
            encoded = min(self._encoding.per_second * self._threads, plain / ratio)
            return encoded > plain * _MARGIN


class _Rate:
    """Bytes a second, lately: what is long ago counts less and less."""

    _KEPT_S = 5.0

    def __init__(self) -> None:
        self.bytes = 0.0
        self.seconds = 0.0

    def add(self, count: int, seconds: float) -> None:
        self.bytes += count
        self.seconds += seconds
        if self.seconds > self._KEPT_S:
            self.bytes, self.seconds = self.bytes / 2, self.seconds / 2

    @property
    def per_second(self) -> float:
        return self.bytes / self.seconds
