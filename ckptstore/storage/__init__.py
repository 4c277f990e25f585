"""Bytes at keys. Knows nothing of tensors and checkpoints."""

from ckptstore.storage.base import Capabilities, Entry, ObjectReader, ObjectWriter, Slot, Storage
from ckptstore.storage.local import LocalStorage
from ckptstore.storage.memory import MemoryStorage
from ckptstore.storage.urls import open_storage

__all__ = [
    "Capabilities",
    "Entry",
    "LocalStorage",
    "MemoryStorage",
    "ObjectReader",
    "ObjectWriter",
    "Slot",
    "Storage",
    "open_storage",
]
