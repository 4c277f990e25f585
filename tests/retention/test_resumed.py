"""What a resumed run knows of the one before: milestones that were reached, and the best values."""

from __future__ import annotations

from pathlib import Path

import ckptstore as cs

SAVE = cs.every(steps=10) | cs.milestones("0.1k, 0.25k, 0.4k, 1k", of="tokens") | cs.on_best("val_loss")
LENGTH = cs.Length.of(1000)


def progress(step: int, loss: float | None = None) -> cs.Progress:
    return cs.Progress(step=step, tokens=10 * step, elapsed_s=step, metrics={} if loss is None else {"val_loss": loss})


def train(store: cs.Store, past: cs.Past, first: int, last: int, losses: dict[int, float]) -> cs.Past:
    for step in range(first, last + 1):
        now = progress(step, losses.get(step))
        if reasons := SAVE.due(now, past, LENGTH):
            store.save({"step": step}, step=step, reasons=reasons, metrics=now.metrics)
            past = past.saved(now, reasons)
        past = past.decided(now)
    return past


def reached(store: cs.Store) -> dict[int, list[str]]:
    return {c.step: [reason for reason in c.reasons if not reason.startswith("every")] for c in store.checkpoints()}


def test_nothing_is_saved_twice_after_a_restart(tmp_path: Path) -> None:
    losses = {5: 3.0, 15: 2.0, 25: 2.5, 35: 1.0}
    with cs.open(tmp_path / "one") as store:
        train(store, cs.Past(), 0, 45, losses)
        wanted = reached(store)
    with cs.open(tmp_path / "two") as store:
        train(store, cs.Past(), 0, 22, losses)
        last = store.resolve()
        assert last.step == 20
        past = cs.Past.resumed(progress(20), store.checkpoints())
        assert past.reached == {"milestone 100 tokens"}
        assert past.best == {"val_loss": 2.0}
        train(store, past, 21, 45, losses)
        assert reached(store) == wanted
    assert wanted[25] == ["milestone 250 tokens"], "2.5 is no best one"


def test_what_was_left_behind_is_not_reached(tmp_path: Path) -> None:
    """The run goes back to an earlier checkpoint, and resumes from what was saved after that."""
    with cs.open(tmp_path) as store:
        train(store, cs.Past(), 0, 45, {15: 2.0, 44: 0.5})
        back = [c for c in store.checkpoints() if c.step <= 20]
        past = cs.Past.resumed(progress(20), back)
        train(store, past, 21, 30, {25: 1.5})
        past = cs.Past.resumed(progress(30), store.checkpoints())
        assert past.reached == {"milestone 100 tokens", "milestone 250 tokens"}
        assert past.best == {"val_loss": 1.5}
        assert (past.step, past.tokens) == (30, 300)
