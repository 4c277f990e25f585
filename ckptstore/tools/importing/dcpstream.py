"""Objects as streams of JSON in a folder of ``torch.distributed.checkpoint``, where its own planners pickle them."""

from __future__ import annotations

import base64
import io

from ckptstore.errors import FormatError
from ckptstore.format.jsontext import compact, parse_json
from ckptstore.state.encode import Encoder
from ckptstore.state.restore import restore_plain
from ckptstore.state.tensors import TensorSpec

STREAM_BEGIN = b'{"ckptstore":1,'
"""How each stream of JSON begins, and no archive of ``torch.save``."""

_LIMIT = 256 << 20


def to_stream(value: object, key: str) -> io.BytesIO:
    """An object as a stream of JSON; the inverse of ``from_stream``."""
    encoder = Encoder()
    tree = encoder.encode(value, key)
    encoder.finish()
    tensors = [[*source.spec, base64.b64encode(source.view(0, source.nbytes)).decode()] for source in encoder.sources]
    return io.BytesIO(compact({"ckptstore": 1, "tree": tree, "tensors": tensors}))


def from_stream(stream: io.BufferedIOBase, key: str) -> object:
    """The object that a stream describes.

    Raises:
        FormatError: the stream is of another kind, as DCP's own pickles, or malformed.
    """
    data = stream.read()
    if not data.startswith(STREAM_BEGIN):
        raise FormatError(
            f"{key!r:.100} is no JSON of CkptStoreSavePlanner: load it with DCP's own planner if you trust it, or take "
            "the checkpoint over with import_dcp"
        )
    fields = parse_json(data, key, limit=_LIMIT)
    try:
        images = {row[0]: base64.b64decode(row[4], validate=True) for row in fields["tensors"]}
        specs = [TensorSpec(name, dtype, tuple(shape), logical) for name, dtype, shape, logical, _ in fields["tensors"]]
        restoration = restore_plain(fields["tree"], specs)
        for name, destination in restoration.wanted.items():
            if len(images[name]) != destination.nbytes:
                raise FormatError(f"{key!r:.100} has a tensor of another size than it says")
            destination.host()[:] = images[name]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FormatError(f"the object {key!r:.100} is malformed: {error}") from error
    return restoration.finish()
