"""A state whose tensors are made while they are written: larger than memory, or computed from others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from ckptstore.engine.plan import Source
from ckptstore.format.tensorfile import TensorRow


class Computed:
    """A tensor whose bytes ``fill`` makes.

    Args:
        row: full name in the state, stored type and shape.
        fill: writes the bytes from an offset on, of the C-order image, into a buffer; called from several threads, and
            for the same bytes twice where the state is saved anew.
        frozen: it isn't trained, so that the next checkpoint will very likely hold the same bytes.
    """

    def __init__(self, row: TensorRow, fill: Callable[[int, memoryview], None], *, frozen: bool = False) -> None:
        self.row, self.frozen, self.fickle = row, frozen, False
        self.nbytes = row.nbytes
        self._fill = fill

    @property
    def spec(self) -> TensorRow:
        """What it is called, and how it is stored."""
        return self.row

    whole = spec
    region, cuttable, near = None, False, False

    def read_into(self, offset: int, out: memoryview) -> None:
        """Bytes of the image; any thread."""
        if out.nbytes:
            self._fill(offset, out)

    def view(self, offset: int, length: int) -> memoryview:
        """The same, in memory of their own."""
        made = memoryview(bytearray(length))
        self.read_into(offset, made)
        return made

    def moved(self) -> bool:
        """Nobody writes to it."""
        return False

    def rebase(self) -> None:
        """Nothing: it is the same at any time."""

    def release(self) -> None:
        """Nothing is kept."""


class Streamed:
    """A state taken apart, as ``capture`` gives it, of which nothing need be in memory.

    Args:
        tree: all that is no tensor, as JSON; see the format's section on the tree.
        sources: the tensors that it names.
        parameters: number of elements in the parameters of its modules.
    """

    def __init__(self, tree: object, sources: Sequence[Source], parameters: int) -> None:
        self.tree, self.sources, self.parameters = tree, sources, parameters
        self.elements: Mapping[str, int] = {}

    def divided(self, skip: Collection[int], rename: Mapping[str, str], cut: Mapping[str, tuple[int, int]]) -> Streamed:
        """It is written by one process."""
        raise ValueError("a streamed state is written by one process")
