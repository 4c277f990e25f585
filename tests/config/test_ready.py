"""The ready configs, and the schema by which editors complete them."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptstore as cs
from ckptstore import config
from ckptstore.config import foreign, schema, template
from ckptstore.config.environment import variables
from ckptstore.config.model import LEVELS, names

CONFIGS = Path(cs.__file__).parents[1] / "configs"
FIRST_LINE = "# yaml-language-server: $schema=../ckptstore/config/schema.json\n"
LOG = [0, 10, 30, 60, 100, 200, 300, 500, 700, 1000, *range(2000, 10000, 1000), *range(10000, 60000, 3000),
       *range(60000, 320001, 10000), 328146]  # fmt: skip


def planned(name: str) -> tuple[config.Config, cs.Plan]:
    made = config.load(CONFIGS / name, environment={})
    assert made.save is not None
    size = 1 if made.checkpoint_bytes is None else made.checkpoint_bytes
    length = made.run.length()
    return made, cs.foresee(made.save, made.keep, length, checkpoint_bytes=size, trash_s=made.trash_s, final=made.final)


def test_all_ready_configs_are_tried_here() -> None:
    here = {"first-run.yaml", "three-tiers.yaml", "research-log.yaml", "milestones.yaml", "spot-s3.yaml"}
    assert {path.name for path in CONFIGS.iterdir()} == here


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_ready_configs_load_and_editors_know_them(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(FIRST_LINE)
    assert (CONFIGS / FIRST_LINE.split("=")[1].strip()).resolve() == schema.SCHEMA.resolve()
    made, plan = planned(path.name)
    assert made.notes == []
    assert plan.moments[-1].step == made.run.length().total_steps
    assert made.storage is not None


def test_first_run() -> None:
    _, plan = planned("first-run.yaml")
    assert [moment.step for moment in plan.moments] == list(range(250, 10001, 250))
    assert plan.moments[-1].there == [9500, 9750, 10000]


def test_three_tiers() -> None:
    made, plan = planned("three-tiers.yaml")
    assert [moment.step for moment in plan.moments] == list(range(250, 7501, 250))
    assert plan.moments[9].reasons == ["every 250 steps", "epoch 1"]
    assert plan.moments[-1].there == [2500, 5000, *range(5250, 7501, 250)]
    assert made.checkpoint_bytes == 1_488_000_000


def test_e07_research_log_saves_63_steps() -> None:
    _, plan = planned("research-log.yaml")
    assert [moment.step for moment in plan.moments] == LOG
    assert len(LOG) == 63
    assert [verdict.stays for verdict in plan.final] == [True] * 63


def test_e06_research_log_evaluates_every_1641_steps() -> None:
    made, _ = planned("research-log.yaml")
    assert made.evaluate is not None
    assert made.evaluate.steps(length=made.run.length())[:2] == [1641, 3282]


def test_milestones() -> None:
    made, plan = planned("milestones.yaml")
    assert "milestones('1B,5B,10B,30B')" in str(made.save)
    assert plan.notes == ["milestones('1B,5B,10B,30B') depends on how the model grows"]


def test_spot_s3() -> None:
    made, plan = planned("spot-s3.yaml")
    assert (made.backup, made.keep) == (["s3://my-bucket/gpt2"], cs.last(2))
    assert [moment.step for moment in plan.moments] == [20000, 40000, 60000]
    assert any("budget" in each for each in plan.notes)


def test_schema_is_the_committed_one() -> None:
    """`make schema` writes it anew."""
    assert schema.SCHEMA.read_text() == schema.generate()


def test_schema_has_all_keys_and_no_other() -> None:
    import json

    written = json.loads(schema.SCHEMA.read_text())
    assert written["additionalProperties"] is False
    assert sorted(written["properties"]) == sorted(names())
    for level, model in LEVELS.items():
        if level:
            assert sorted(written["$defs"][model.__name__]["properties"]) == sorted(names(level))
            assert written["$defs"][model.__name__]["additionalProperties"] is False


def test_a_draft_loads_and_names_a_schema_that_is_there(tmp_path: Path) -> None:
    data = {
        "storage": "runs/x: y # z",
        "save": "every(steps=5) | milestones('1B')",
        "keep": "last(2) | best('a # b')",
        "backup": "true",
        "resume": False,
        "run": {"total_steps": 10, "epochs": 2},
    }
    path = tmp_path / "draft.yaml"
    path.write_text(template.draft(data))

    made = config.load(path, environment={})

    assert (made.storage, made.backup, made.resume) == (data["storage"], ["true"], False)
    assert (str(made.save), str(made.keep)) == (data["save"], data["keep"])
    assert made.run.length() == cs.Length(10, 2, 5)
    place = path.read_text().partition("$schema=")[2].partition("\n")[0]
    assert Path(place.removeprefix("file://")).is_file()


def test_the_readme_names_every_key_and_variable() -> None:
    section = (CONFIGS.parent / "README.md").read_text().partition("## Configuration")[2].partition("\n## ")[0]
    table = section.partition("| key |")[2].partition("\n\n")[0]
    missing = [name for level in LEVELS for name in names(level) if f"`{name}`" not in table]
    missing += [name for name in variables() if name not in section]
    missing += [name for name in (*foreign.TRAINING, *foreign.SECTIONS) if name not in section]
    assert missing == []
