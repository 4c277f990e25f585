"""What takes up the space: everything that lies there counts once, and what would be free is what prune frees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore as cs
from ckptstore.policy.text import parse_keep
from ckptstore.storage import open_storage
from ckptstore.tools.census import KINDS, take_census

UNFINISHED = "0001-000090-step90-0123456789abcdef"


def save_all(store: cs.Store, steps: range) -> None:
    """Checkpoints whose frozen half lies with the first of them."""
    base = torch.nn.Linear(64, 64)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    model = torch.nn.Sequential(base, torch.nn.Linear(64, 8))
    for step in steps:
        with torch.no_grad():
            model[1].weight.fill_(float(step))
        reasons = ["every 10 steps"] + ([f"epoch {step // 30}"] if step % 30 == 0 else [])
        state = {"model": model, "other": {"x": torch.full((100,), float(step))}}
        metrics = {"val_loss": abs(50.0 - step)}
        store.save(state, step=step, epoch=step // 30, metrics=metrics, reasons=reasons)


@pytest.fixture
def path(store_path: Path) -> Path:
    with cs.open(store_path, compression="zstd") as store:
        save_all(store, range(10, 90, 10))
    return store_path


@pytest.fixture
def store(path: Path) -> Iterator[cs.Store]:
    with cs.open(path) as store:
        yield store


def on_disk(path: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in path.rglob(pattern) if file.is_file())


def kinds_bytes(found: cs.Usage) -> int:
    return (
        found.checkpoint_bytes
        + found.trash_bytes
        + found.unfinished_bytes
        + found.damaged_bytes
        + found.record_bytes
        + found.foreign_bytes
    )


def test_all_that_lies_there_counts_once(path: Path, store: cs.Store) -> None:
    """Seen from each side, the sum is that of the files on the disk."""
    found = cs.usage(store)

    assert found.total_bytes == kinds_bytes(found) == on_disk(path)
    assert found.total_bytes == sum(entry.size for entry in open_storage(path).list(""))
    assert found.checkpoint_bytes == on_disk(path / "checkpoints")
    assert found.checkpoint_bytes == sum(part.bytes for part in found.components)
    assert found.checkpoint_bytes == sum(one.own_bytes for one in found.checkpoints)
    assert sum(codec.bytes for codec in found.codecs) == on_disk(path / "checkpoints", "*.blocks")
    assert found.raw_bytes == sum(c.raw_bytes for c in store.checkpoints())
    assert {part.name for part in found.components} == {"model", "other", "(records)"}
    assert [codec.name for codec in found.codecs] == ["zstd"]
    assert found.spared_bytes == 7 * on_disk(path, "model-frozen.blocks") > 0


def test_what_is_no_checkpoint(path: Path, store: cs.Store) -> None:
    """The trash, what killed saves left, what isn't ours, and files that a deleted one lends."""
    before = cs.usage(store)
    store.delete("step:20")
    store.delete("step:10")
    left = path / "checkpoints" / UNFINISHED / "model.blocks"
    left.parent.mkdir()
    left.write_bytes(b"half")
    (path / "notes.txt").write_text("mine!")
    found = cs.usage(store)

    assert (found.unfinished_bytes, found.foreign_bytes, found.deleted) == (4, 5, 2)
    assert found.total_bytes == kinds_bytes(found) == on_disk(path)
    lent = path / "checkpoints" / before.checkpoints[0].id / "model-frozen.blocks"
    own = sum(on_disk(path / "checkpoints" / one.id) for one in before.checkpoints[:2])
    assert found.trash_bytes == own - lent.stat().st_size
    assert found.checkpoint_bytes == before.checkpoint_bytes - found.trash_bytes


def test_roles_say_what_would_be_free(store: cs.Store) -> None:
    store.hold("step:60", "paper")
    found = cs.usage(store)
    roles = {role.name: role for role in found.roles}

    counts = {"latest": 1, "best:val_loss": 1, "hold paper": 1, "epoch": 2, "every 10 steps": 8}
    assert {name: role.checkpoints for name, role in roles.items()} == counts
    by_step = {one.step: one for one in found.checkpoints}
    assert by_step[60].roles == ["hold paper", "epoch", "every 10 steps"]
    assert roles["hold paper"].only_bytes == by_step[60].only_bytes
    assert roles["hold paper"].bytes == by_step[60].bytes
    assert roles["epoch"].only_bytes == by_step[30].only_bytes + by_step[60].only_bytes
    assert roles["every 10 steps"].only_bytes == roles["every 10 steps"].bytes == found.checkpoint_bytes


def test_reasons_that_differ_in_numbers_are_one_kind(store_path: Path) -> None:
    with cs.open(store_path) as store:
        for step in (1, 2):
            store.save({"x": step}, step=step, reasons=[f"epoch plan, step {step}"])
        store.save({"x": 3}, step=3)
        store.save({"x": 4}, step=4, reasons=["milestone 1B tokens"])
        found = cs.usage(store)
    counts = {"latest": 1, "milestone": 1, "epoch": 0, "epoch plan": 2, "none": 1}
    assert {role.name: role.checkpoints for role in found.roles} == {k: v for k, v in counts.items() if v}


@pytest.mark.parametrize("rules", ["last(2)", "last(2) | best(val_loss)", "epochs() | every_kept(steps=20)"])
def test_what_would_go_is_what_prune_frees(path: Path, store: cs.Store, rules: str) -> None:
    keep = parse_keep(rules)
    found = cs.usage(store, keep).keep
    assert found is not None
    assert found.go > 0
    before = on_disk(path / "checkpoints")

    report = store.prune(grace_s=0, keep=keep, force=True)
    store.prune(grace_s=0)
    assert len(report.retired) == found.go
    assert on_disk(path / "checkpoints") == before - found.freed_bytes == found.stay_bytes
    assert len(store.checkpoints()) == found.stay


def test_each_rule_has_its_price(store: cs.Store) -> None:
    """What a rule alone keeps is what would be free without it."""
    store.hold("step:20", "paper")
    found = cs.usage(store, parse_keep("last(3) | best(val_loss) | epochs()"))
    size = {one.step: one for one in found.checkpoints}
    assert found.keep is not None
    last, best, epochs = found.keep.rules

    assert (last.checkpoints, best.checkpoints, epochs.checkpoints) == (3, 1, 2)
    # Epoch 2 ended at step 60, which is one of the newest three, so only two and one are theirs alone.
    assert last.only_bytes == size[70].only_bytes
    assert best.only_bytes == size[50].only_bytes
    assert epochs.only_bytes == size[30].only_bytes
    assert best.bytes == size[50].bytes
    # The held one and the first, from which all others borrow.
    assert found.keep.always_bytes == size[20].only_bytes + size[10].only_bytes
    assert (found.keep.stay, found.keep.go) == (7, 1)


def test_a_limit_makes_room(store: cs.Store) -> None:
    found = cs.usage(store, parse_keep("every_kept(steps=10) | at_most('16kB')")).keep
    alone = cs.usage(store, parse_keep("at_most('16kB')")).keep
    assert found is not None
    assert alone is not None
    assert found.rules[1].only_bytes < 0
    assert found.stay_bytes - found.rules[1].only_bytes == cs.usage(store).checkpoint_bytes
    assert alone.rules[0].only_bytes == -alone.freed_bytes < 0


def test_damage_is_told_and_still_counts(path: Path, store: cs.Store) -> None:
    """Of a damaged part nobody knows what it needs, of a damaged record not even whether it is there."""
    ids = [c.id for c in store.checkpoints()]
    (path / "checkpoints" / ids[3] / "part-00000.json").write_text("{}")
    (path / "commits" / f"{ids[5]}.json").write_text("{}")
    with cs.open(path, read_only=True) as fresh:
        found = cs.usage(fresh)
        with pytest.raises(cs.IntegrityError, match="no checkpoint is given up"):
            cs.usage(fresh, cs.last(1))

    assert found.unreadable == [ids[3]]
    assert found.damaged_bytes == on_disk(path / "checkpoints" / ids[5])
    assert found.total_bytes == kinds_bytes(found) == on_disk(path)
    assert len(found.checkpoints) == 7


def test_no_data_file_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in path.rglob("*.blocks"):
        file.write_bytes(bytes(file.stat().st_size))
    seen: list[tuple[int, int]] = []
    with cs.open(path, read_only=True) as store:
        reads: list[str] = []
        opened = store.storage.open_reader

        def noted(key: str, **options: Any) -> Any:
            reads.append(key)
            return opened(key, **options)

        monkeypatch.setattr(store.storage, "open_reader", noted)
        found = cs.usage(store, progress=lambda done, total: seen.append((done, total)))
    assert found.checkpoint_bytes == on_disk(path / "checkpoints")
    assert [key for key in reads if key.endswith(".blocks")] == []
    assert max(seen) == (8, 8)


def test_files_of_several_ranks() -> None:
    """They are the same component, whoever wrote them."""
    path = Path(__file__).parents[1] / "golden" / "ranks1"
    with cs.open(path, read_only=True) as store:
        found = cs.usage(store)
    assert found.total_bytes == kinds_bytes(found) == on_disk(path)
    assert {part.name: part.objects for part in found.components}["model"] == 3


def test_an_empty_store(store_path: Path) -> None:
    with cs.open(store_path) as store:
        store.save({"x": 1}, step=1)
        store.delete("latest")
        found = cs.usage(store, cs.last(1))
    assert (found.checkpoints, found.roles, found.checkpoint_bytes) == ([], [], 0)
    assert found.total_bytes == kinds_bytes(found) == on_disk(store_path)


def test_what_was_saved_meanwhile_is_left_out(store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are not in the listing, and it would look like one without any."""
    listed, count = store.storage.list, 0

    def and_save(prefix: str) -> Any:
        nonlocal count
        found = listed(prefix)
        if prefix == "":
            count += 1
            monkeypatch.setattr(store.storage, "list", listed)
            store.save({"x": 1}, step=99)
        return found

    monkeypatch.setattr(store.storage, "list", and_save)
    census = take_census(store)
    assert count == 1
    assert [c.step for c in store.checkpoints()][-1] == 99
    assert [c.step for c in census.checkpoints][-1] == 80
    assert sum(map(census.total, KINDS)) == sum(census.sizes.values())


def test_what_is_deleted_meanwhile_is_no_damage(path: Path, store: cs.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lets go of old ones is no reason to cry wolf."""
    read, count = store.storage.read, 0
    going = store.checkpoints()[1]

    def and_delete(key: str, *, limit: int) -> bytes:
        nonlocal count
        if key == f"checkpoints/{going.id}/manifest.json" and not count:
            count += 1
            with cs.open(path) as other:
                other.delete(going.id)
            for file in (path / "checkpoints" / going.id).iterdir():
                file.unlink()
        return read(key, limit=limit)

    monkeypatch.setattr(store.storage, "read", and_delete)
    found = cs.usage(store)
    assert count == 1
    assert found.unreadable == []
    assert [one.step for one in found.checkpoints] == [10, *range(30, 90, 10)]
    assert found.total_bytes == kinds_bytes(found)
    assert found.damaged_bytes == 0 < found.trash_bytes
