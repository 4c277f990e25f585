"""What a config says, as values that the rest of the package understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ckptstore.errors import FormatError
from ckptstore.policy.progress import Length
from ckptstore.policy.retention import Keep
from ckptstore.policy.schedule import Schedule

if TYPE_CHECKING:
    from ckptstore.store import Store


@dataclass(frozen=True)
class Parts:
    """Which parts of the state, besides the model, are meant."""

    optimizer: bool = True
    scheduler: bool = True
    rng: bool = True
    data: bool = True


@dataclass(frozen=True)
class Run:
    """What is known of the run; each of them may be missing. See ``Length.of``."""

    total_steps: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    dataset_size: int | None = None
    batch_size: int | None = None
    accumulation: int = 1
    fallback_steps_per_epoch: int | None = None
    tokens_per_step: int | None = None
    step_s: float | None = None

    def length(self) -> Length:
        """How long the run is, as far as it is known.

        Raises:
            FormatError: two of the numbers contradict each other.
        """
        return Length.of(**vars(self))


@dataclass(frozen=True)
class Config:
    """Made by ``load`` and ``parse``; don't instantiate.

    Attributes:
        storage: where checkpoints lie, None where it wasn't said.
        storage_options: for it, as ``ckptstore.open`` takes them.
        backup: where they are copied to.
        backup_options: for these.
        durable: when a save is done: as soon as it is durable there, or in every backup.
        compression: as ``ckptstore.open`` takes it.
        save: when to save.
        keep: what stays; None keeps all.
        evaluate: when to evaluate.
        trash_s: how long what was let go can be brought back, in seconds.
        final: whether the end of the run is saved in any case.
        resume: True for the latest checkpoint or else a fresh start, False for a fresh start, or a selector.
        restore: what is restored when a run resumes.
        save_parts: what is saved.
        run: what is known of the run.
        checkpoint_bytes: how large one checkpoint is, None where nothing tells.
        notes: what was corrected, replaced or left out, for people.
        source: where it comes from, for messages.
    """

    storage: str | None = None
    # Not shown: what the environment put there may be secret.
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    backup: Sequence[str] = ()
    backup_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    durable: Literal["primary", "backup"] = "primary"
    compression: str = "none"
    save: Schedule | None = None
    keep: Keep | None = None
    evaluate: Schedule | None = None
    trash_s: float = 0.0
    final: bool = True
    resume: bool | str = True
    restore: Parts = Parts()
    save_parts: Parts = Parts()
    run: Run = Run()
    checkpoint_bytes: int | None = None
    notes: Sequence[str] = ()
    source: str = "config"

    def open(self, *, read_only: bool = False) -> Store:
        """The store that it describes, with its backups, its rules and its compression.

        Raises:
            FormatError: it doesn't say where.
            StorageError, NotFoundError: as ``ckptstore.open``.
        """
        from ckptstore.opening import open

        if self.storage is None:
            raise FormatError(f"{self.source} doesn't say where checkpoints lie: give it a line as storage: runs/gpt2")
        return open(
            self.storage,
            storage_options=self.storage_options or None,
            backup=self.backup,
            backup_options=self.backup_options or None,
            durable=self.durable,
            keep=self.keep,
            # With a backup what goes lies there, and without rules nothing goes.
            trash=self.trash_s if self.trash_s and self.keep is not None and not self.backup else None,
            read_only=read_only,
            compression=self.compression,
        )
