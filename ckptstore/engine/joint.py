"""One save by several ranks: each writes its share, and rank 0 commits what it has read back of all of them.

The ranks talk by messages; what counts is on storage. Whoever waits in vain decides the id's fate in the register, so
that all come to the same end, whichever of them are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ckptstore.engine.borrow import Lender, ReportedFile, is_safe
from ckptstore.engine.commit import condemn, read_fate
from ckptstore.engine.committer import RANK_REQUESTS, Told
from ckptstore.engine.contents import read_sealed
from ckptstore.engine.crew import ranks_text
from ckptstore.engine.saver import Job, Saver
from ckptstore.engine.share import Share, told_outcome
from ckptstore.engine.stage import Stage, StateMoved
from ckptstore.engine.workers import run
from ckptstore.errors import (
    CheckpointError,
    CommitUnknownError,
    FormatError,
    IntegrityError,
    SaveFailedError,
    StorageError,
)
from ckptstore.format import layout
from ckptstore.format.layout import CheckpointId, parse_id
from ckptstore.format.records import (
    PART_LIMIT,
    CommitRecord,
    CondemnedRecord,
    FileEntry,
    PartEntry,
    PartRecord,
    Sealed256,
)


class JointSaver:
    """One rank's part of one save."""

    def __init__(self, saver: Saver, share: Share) -> None:
        self._saver, self._share, self._crew = saver, share, share.crew
        self._storage, self._store = saver.tools.storage, saver.store

    def save(self, id: CheckpointId, job: Job, stage: Stage) -> Lender:
        """Write this rank's share, and see it committed; the new checkpoint, as this rank's next lender.

        On rank 0 the others are not told yet.

        Raises:
            SaveFailedError: certainly not committed, on all ranks; says which of them is to blame.
            CommitUnknownError: nothing was removed.
            StaleWriterError: a newer writer owns the store.
        """
        if self._crew.leads:
            return self._lead(id, job, stage)
        files, _ = self._write(id, job, stage)
        return Lender.of(self._outcome(id), self._store.digest, files)

    def _write(self, id: CheckpointId, job: Job, stage: Stage) -> tuple[list[FileEntry], PartEntry]:
        """Write this rank's files and part, and report it."""
        saver, rank = self._saver, self._crew.rank
        try:
            files = saver.files(id, job, stage)
            part = PartRecord(
                id=str(id),
                rank=rank,
                world_size=self._crew.size,
                plan=self._share.plan,
                files=files,
                tree=job.state.tree,
            )
            entry = saver.committer.put_part(id, part)
            stage.check()
        except BaseException as error:
            failed = self._failed(id, _told(error, stage), [rank])
            self._share.report({"error": str(failed)})
            raise failed from error
        self._share.report(report_of(part, entry, self._via(id, files)))
        return files, entry

    def _via(self, id: CheckpointId, files: Sequence[FileEntry]) -> str | None:
        """The checkpoint by way of which something is borrowed."""
        borrows = any(file.owner != str(id) for file in files)
        return str(self._saver.lender.id) if borrows and self._saver.lender is not None else None

    # -- rank 0 ------------------------------------------------------------------------------------------

    def _lead(self, id: CheckpointId, job: Job, stage: Stage) -> Lender:
        told = Told(job.facts, self._share.parameters, self._share.tensors, self._crew.size, job.watch)
        files: list[ReportedFile] = []
        vias: set[str] = set()
        own: list[FileEntry] = []

        def write() -> Sealed256:
            own.extend(self._write(id, job, stage)[0])
            reports = self._reports(id)
            self._read_back(id, reports)
            vias.update(report["via"] for report in reports.values() if report["via"] is not None)
            files.extend(ReportedFile(*file) for rank in sorted(reports) for file in reports[rank]["files"])
            return self._saver.committer.put_manifest(
                id, self._store.digest, [self._entry(reports[rank], rank) for rank in sorted(reports)]
            )

        record = self._saver.committer.commit(
            id,
            told,
            files,
            write,
            requests=RANK_REQUESTS,
            give_up=lambda error: self._condemn(id, error),
        )
        self._check_borrowed(id, files, vias)
        return Lender.of(record, self._store.digest, own)

    def _reports(self, id: CheckpointId) -> dict[int, Any]:
        """What each rank has written."""
        found = self._crew.reports(self._share.name, bad=lambda message: "error" in message)
        if failed := {rank: message["error"] for rank, message in found.items() if "error" in message}:
            raise SaveFailedError(next(iter(failed.values())), id=str(id), step=id.step)
        if missing := [rank for rank in range(self._crew.size) if rank not in found]:
            within = f"within {self._crew.timeout_s:g} s of rank 0"
            raise self._failed(id, f"it hasn't written its part {within}, or it has ended", missing)
        return found

    @staticmethod
    def _entry(report: dict[str, Any], rank: int) -> PartEntry:
        return PartEntry(rank=rank, size=report["size"], sha256=report["sha256"])

    def _read_back(self, id: CheckpointId, reports: dict[int, Any]) -> None:
        """Nothing, if every rank's part is on storage, as it was reported, and of this save.

        What is in it was agreed upon before anything was written: that the shards make up all tensors, too.
        """

        def read(rank: int) -> None:
            report = reports[rank]
            if (report["world_size"], report["plan"]) != (self._crew.size, self._share.plan):
                ours = f"{self._crew.size} ranks, plan {self._share.plan[:8]}"
                theirs = f"{report['world_size']} ranks, plan {str(report['plan'])[:8]}"
                raise self._failed(id, f"it took part in another save: {theirs}, not {ours}", [rank])
            key = layout.part_key(id, rank)
            try:
                read_sealed(self._storage, key, self._entry(report, rank), str(id), limit=PART_LIMIT)
            except (IntegrityError, FormatError) as error:
                raise self._failed(
                    id, f"its part is not what rank 0 finds, as if they hadn't one storage in common ({error})", [rank]
                ) from error

        run(iter(range(self._crew.size)), read, threads=RANK_REQUESTS)

    def _check_borrowed(self, id: CheckpointId, files: Sequence[ReportedFile], vias: set[str]) -> None:
        """Nothing, if what was borrowed will stay; asked after the commit."""
        borrowed = [file for file in files if file.owner != str(id)]
        for via in map(parse_id, vias):
            if not self._saver.committer.stays(id, partial(is_safe, self._storage, via, borrowed)):
                lost = f"{via}, from which it borrows, was deleted while it was saved"
                self._saver.committer.bury(id, lost)
                raise SaveFailedError(f"{id} was not saved: {lost}; save again", id=str(id), step=id.step)

    def _condemn(self, id: CheckpointId, error: BaseException) -> None:
        # Nobody else shall wait for it, or commit it.
        with suppress(CheckpointError):
            condemn(self._storage, id, self._store.store_id, str(error))

    # -- the others --------------------------------------------------------------------------------------

    def _outcome(self, id: CheckpointId) -> CommitRecord:
        """What rank 0 tells, or else what the register says."""
        outcome = self._crew.outcome(self._share.name)
        if outcome is None:
            return self._decide(id)
        return told_outcome(outcome, id)

    def _decide(self, id: CheckpointId) -> CommitRecord:
        """Rank 0 says nothing: have the save fail for good, unless it is committed already."""
        try:
            missing = self._missing_parts(id)
            condemn(self._storage, id, self._store.store_id, f"rank 0 said nothing to rank {self._crew.rank}")
            fate = read_fate(self._storage, id)
        except (StorageError, IntegrityError, FormatError) as error:
            raise CommitUnknownError(
                f"{id}: rank 0 said nothing, and whether it was committed is unknown ({error}); "
                f"store.resolve({str(id)!r}) tells once the storage answers",
                id=str(id),
                step=id.step,
            ) from error
        if isinstance(fate, CondemnedRecord):
            why = "it has ended, or takes longer than" if not missing else "not all parts were written within"
            raise self._failed(id, f"{why} {self._crew.timeout_s:g} s", missing or [0])
        return fate

    def _missing_parts(self, id: CheckpointId) -> list[int]:
        there = {entry.key for entry in self._storage.list(layout.folder(id))}
        return [rank for rank in range(self._crew.size) if layout.part_key(id, rank) not in there]

    def _failed(self, id: CheckpointId, what: str, ranks: Sequence[int]) -> SaveFailedError:
        return SaveFailedError(
            f"{id} was not saved by any rank, because of {ranks_text(ranks)}: {what}. Older checkpoints are untouched",
            id=str(id),
            step=id.step,
        )


def report_of(part: PartRecord, entry: PartEntry, via: str | None) -> dict[str, Any]:
    """What rank 0 must know of a part; with its digest that spares it to take apart all parts of all ranks.

    ``via``: the checkpoint by way of which something is borrowed.
    """
    return {
        "size": entry.size,
        "sha256": entry.sha256,
        "world_size": part.world_size,
        "plan": part.plan,
        "files": [[file.name, file.owner, file.stored_bytes, file.raw_bytes] for file in part.files],
        "via": via,
    }


def _told(error: BaseException, stage: Stage) -> str:
    if isinstance(error, StateMoved):
        return (
            f"{stage.moved!r} was written to, by something else than an optimizer's step, while it was read in place; "
            "call wait_staged() of the handle before you write by hand, or save with mode='async'"
        )
    return str(error)
