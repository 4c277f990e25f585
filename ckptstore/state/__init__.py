"""Live objects ↔ tensors and JSON, without pickle. torch lives here."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "saving and loading need torch: pip install 'ckptstore[torch]', or any torch from 2.6 on. "
        "Listing, showing and verifying checkpoints do without",
        name="torch",
    ) from error

from ckptstore.state.capture import Snapshot, capture
from ckptstore.state.registry import register_type
from ckptstore.state.report import LoadReport
from ckptstore.state.restore import Restoration, restore_into, restore_plain
from ckptstore.state.rng import RNG
from ckptstore.state.staging import fence
from ckptstore.state.tensors import Destination, TensorSource, TensorSpec
from ckptstore.state.values import Json

__all__ = [
    "RNG",
    "Destination",
    "Json",
    "LoadReport",
    "Restoration",
    "Snapshot",
    "TensorSource",
    "TensorSpec",
    "capture",
    "fence",
    "register_type",
    "restore_into",
    "restore_plain",
]
