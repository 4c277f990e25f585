"""``ckptstore du``."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run, flip


def test_what_a_person_sees(run: Run, url: str, ids: list[str]) -> None:
    """The kinds, roles, components and codecs; with --all each checkpoint."""
    answer = run("du", url)
    assert (answer.exit_code, answer.stderr) == (0, "")
    for expected in ("3 checkpoints: 65.3 kB in memory", "best:val_loss", "every 10 steps", "model", "none", "records"):
        assert expected in answer.stdout
    assert ids[0][:11] not in answer.stdout
    everything = run("du", url, "--all").stdout
    assert all(id[:11] in everything for id in ids)


def test_json_adds_up(run: Run, url: str) -> None:
    run("delete", url, "step:10", "--yes")
    found = run("du", url, "--keep", "last(1) | best(val_loss)", "--json").json

    size = sum(path.stat().st_size for path in Path(url).rglob("*") if path.is_file())
    kinds = ("checkpoint", "trash", "unfinished", "damaged", "record", "foreign")
    assert sum(found[f"{kind}_bytes"] for kind in kinds) == found["total_bytes"] == size
    assert [rule["rule"] for rule in found["keep"]["rules"]] == ["last(1)", "best('val_loss')"]
    assert (found["keep"]["stay"], found["keep"]["go"], found["deleted"]) == (2, 0, 1)


def test_rules_and_their_price(run: Run, url: str, tmp_path: Path) -> None:
    said = run("du", url, "--keep", "last(1) | best(val_loss)").stdout
    assert "last(1)" in said
    assert "2 checkpoints," in said
    assert "1 checkpoint would go, and free" in said
    config = tmp_path / "run.yaml"
    config.write_text(f"storage: {url}\nkeep: last(1) | best(val_loss)\n")
    assert run("du", url, "--config", config).stdout == said
    assert run("du", url, "--config", config, "--keep", "last(1)").exit_code == 2
    assert "did you mean last?" in run("du", url, "--keep", "lst(1)").stderr


def test_damage_is_bad_news(run: Run, url: str, ids: list[str]) -> None:
    flip(Path(url) / "checkpoints" / ids[1] / "part-00000.json", 100)
    answer = run("du", url)
    assert answer.exit_code == 1
    assert f"DAMAGED {ids[1]}" in answer.stdout
    flip(Path(url) / "commits" / f"{ids[0]}.json", 40)
    assert "DAMAGED: of records that can't be read" in run("du", url).stdout
