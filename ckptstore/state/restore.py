"""A snapshot's tree and tensors → state: as plain values, or into live objects. The inverse of ``capture.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ckptstore.errors import CheckpointError, FormatError
from ckptstore.state.decode import Decoder, Maker
from ckptstore.state.pairing import Newcomer, Pairing
from ckptstore.state.report import LoadReport
from ckptstore.state.select import Selection
from ckptstore.state.tensors import Destination, TensorSpec
from ckptstore.state.values import Json


class Restoration:
    """A load that is planned: first the bytes of ``wanted`` must come in, then ``finish`` does the rest.

    Attributes:
        wanted: name → destination of the tensors that must be read, and no others.
        report: how checkpoint and target differ.
    """

    def __init__(
        self, wanted: dict[str, Destination], report: LoadReport, steps: list[Callable[[], Any]], result: Maker
    ) -> None:
        self.wanted = wanted
        self.report = report
        self._steps = steps
        self._result = result

    def finish(self) -> object:
        """Tensors are converted and moved, containers filled, objects loaded, random state set last.

        Returns:
            The plain state, or the target.

        Raises:
            StateError: an object refused what was saved.
            FormatError: a value was malformed.
        """
        try:
            for destination in self.wanted.values():
                if destination.copied:
                    destination.tensor()
            for step in self._steps:
                step()
            return self._result()
        except CheckpointError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise FormatError(f"a value of the checkpoint can't be restored: {error}") from error


def restore_plain(tree: Json, specs: Sequence[TensorSpec], *, only: Sequence[str] | None = None) -> Restoration:
    """Plan to load a state as plain tensors, arrays, values and containers, all on the CPU.

    Args:
        tree: the snapshot's.
        specs: of all stored tensors; their sizes are trusted.
        only: patterns over paths and tensor names; the result has just what they match, and what is in it.

    Raises:
        FormatError: the tree is malformed.
        StateError: a class isn't registered here, or a pattern matches nothing.
    """
    with _Bounded():
        if only is not None:
            tree = Selection(only, whole_statefuls=False).prune(tree)
        decoder = Decoder(specs)
        make = decoder.parse(tree, "")
    return Restoration(decoder.wanted, LoadReport(), [], make)


def restore_into(
    tree: Json,
    specs: Sequence[TensorSpec],
    into: object,
    *,
    only: Sequence[str] | None = None,
    strict: bool | Literal["parts"] = True,
) -> Restoration:
    """Plan to load a state into live objects. Nothing is changed before the bytes come in.

    Args:
        tree: the snapshot's.
        specs: of all stored tensors; their sizes are trusted.
        into: of the same structure as what was saved. Tensors keep their memory, element type and device.
        only: patterns; just what they match is restored, and judged.
        strict: False restores what fits and reports the rest; "parts" restores the entries of two dicts that both
            have, each as with True, and reports the others.

    Raises:
        FormatError: the tree is malformed.
        StateError: something is missing, unexpected or mismatched (all of it is listed), or a pattern matches nothing.
    """
    return Draft(tree, specs, into, only=only, strict=strict).close()


class Draft:
    """What ``restore_into`` would do, before it is judged: other processes may have a say in it.

    Attributes:
        report: how checkpoint and target differ.
        union: the tree is that of several processes, so that others may take what this one doesn't expect.
    """

    def __init__(
        self,
        tree: Json,
        specs: Sequence[TensorSpec],
        into: object,
        *,
        only: Sequence[str] | None,
        strict: bool | Literal["parts"],
        union: bool = False,
        newcomer: Newcomer | None = None,
    ) -> None:
        """As ``restore_into``; ``union`` and ``newcomer`` as in ``Pairing``."""
        with _Bounded():
            selection = None if only is None else Selection(only, whole_statefuls=True)
            pairing = Pairing(Decoder(specs), selection, bool(strict), union=union, newcomer=newcomer)
            if strict == "parts":
                pairing.plan_parts(tree, into)
            else:
                pairing.plan(tree if selection is None else selection.prune(tree), into)
        self._pairing, self._into, self._strict = pairing, into, bool(strict)
        self.report, self.union = pairing.report, union

    @property
    def wanted(self) -> dict[str, Destination]:
        """Where the bytes of the tensors will go that have to be read."""
        return self._pairing.decoder.wanted

    def close(self) -> Restoration:
        """Judge it.

        Raises:
            StateError: something is missing, unexpected or mismatched; all of it is listed.
        """
        pairing = self._pairing
        pairing.report.close(strict=self._strict)
        pairing.report.add_apart(pairing.missing_parts, pairing.unexpected_parts)
        steps = [*pairing.tensors, *pairing.values, *pairing.loads, *pairing.randoms]
        return Restoration(pairing.decoder.wanted, pairing.report, steps, lambda: self._into)


class _Bounded:
    """Turns running out of stack into what it means: a tree that no state has."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RecursionError):
            raise FormatError("the tree is nested deeper than any state that can be saved") from error
