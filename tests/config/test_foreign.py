"""Configs of other training programs, as they stand."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest

import ckptstore as cs
from ckptstore import config
from ckptstore.config.loading import _log_once
from tests.config.test_keys import parsed, problem
from tests.config.test_ready import LOG

AUTO = {"auto_generate_checkpoints": True, "train_steps": 1000, "epochs": 3}
FIRST = [0, 17, 35, 52, 70, 87, 105, 122, 140, 157, 175, 192, 210, 227, 245, 262, 280, 297, 315, 333]
SECOND = [334, 336, 340, 348, 364, 396, 460, 588, 666]
THIRD = [667, 669, 673, 681, 697, 729, 793, 921, 1000]


def training(**keys: Any) -> dict[str, Any]:
    """A config with all else that stands in such a one."""
    return {"model": {"layers": 2}, "data": {"batch_size": 8}, "training": {"learning_rate": 0.1, **keys}}


def steps(made: config.Config) -> list[int]:
    assert made.save is not None
    return made.save.steps(length=made.run.length())


def test_generated_schedule_is_the_documented_one() -> None:
    made = parsed(training(**AUTO, subsequent_epochs_spacing="log", log_base=2, linear_interval=None))
    assert steps(made) == [*FIRST, *SECOND, *THIRD]
    assert "the program multiplied the step itself" in " ".join(made.notes)


def test_linear_schedule_is_the_documented_one() -> None:
    made = parsed(training(**AUTO, first_epoch_checkpoints=5, subsequent_epochs_spacing="linear", linear_interval=50))
    assert steps(made) == [0, 83, 166, 249, 333, *range(334, 666, 50), 666, *range(667, 1000, 50), 1000]


@pytest.mark.parametrize(
    ("key", "value"),
    [("subsequent_epochs_spacing", "invalid"), ("log_base", 1), ("log_base", 0), ("log_base", -2), ("log_base", "two"),
     ("linear_interval", 0), ("linear_interval", -5), ("min_checkpoint_interval", 0), ("min_checkpoint_interval", "a"),
     ("first_epoch_checkpoints", "many"), ("auto_generate_checkpoints", "maybe"), ("checkpoint_schedule", 10)],
)  # fmt: skip
def test_s12_what_can_not_be_is_an_error(key: str, value: object) -> None:
    """Also where the schedule isn't generated now."""
    for auto in (True, False):
        with pytest.raises(ValueError, match=rf"config: training\.{key}: "):
            parsed(training(**{**AUTO, "auto_generate_checkpoints": auto, key: value}))


def test_s12_linear_spacing_checks_its_interval() -> None:
    message = problem(training(**AUTO, subsequent_epochs_spacing="linear", linear_interval=0))
    assert message == "config: training.linear_interval: linear_interval=0 must be a whole number of at least 1"


def test_s14_min_interval_is_inert_at_its_default() -> None:
    made = parsed(training(**AUTO, min_checkpoint_interval=100))
    assert steps(made) == [*FIRST, *SECOND, *THIRD]
    assert any("min_checkpoint_interval: 100" in note for note in made.notes)


def test_s14_min_interval_works_at_another_value() -> None:
    found = steps(parsed(training(**AUTO, min_checkpoint_interval=50)))
    forced = {0, 333, 666, 1000}
    assert forced <= set(found)
    gaps = [later - one for one, later in pairwise(found)]
    assert min(gaps) >= 50
    assert len(found) < len([*FIRST, *SECOND, *THIRD])


def test_s15_an_explicit_list_beats_generation() -> None:
    made = parsed(training(**AUTO, checkpoint_schedule=[50, 10, 20, 30, 40]))
    assert steps(made) == [10, 20, 30, 40, 50]
    assert any("checkpoint_schedule governs" in note for note in made.notes)


@pytest.mark.parametrize("schedule", [None, []])
def test_s15_none_and_generation_off_is_no_schedule(schedule: object) -> None:
    made = parsed(training(auto_generate_checkpoints=False, checkpoint_schedule=schedule))
    assert made.save is None
    assert any("ask for no saves" in note for note in made.notes)
    assert steps(parsed(training(**AUTO, checkpoint_schedule=schedule))) == [*FIRST, *SECOND, *THIRD]


def test_s16_steps_per_epoch() -> None:
    """From the total where the data isn't known; else from data, batch and accumulation."""
    assert parsed(training(**AUTO)).run.length().steps_per_epoch == 333
    run = {"epochs": 2, "dataset_size": 1000, "batch_size": 32, "accumulation": 8}
    assert parsed({"run": run}).run.length() == cs.Length(8, 2, 4)
    assert parsed({"run": {"epochs": 2, "fallback_steps_per_epoch": 100}}).run.length().total_steps == 200


def test_negative_first_epoch_is_none_there() -> None:
    made = parsed(training(**AUTO, first_epoch_checkpoints=-1))
    assert steps(made) == [333, *SECOND, *THIRD]
    assert any("-1 is taken as 0" in note for note in made.notes)


def test_a_list_behind_the_end_is_an_error_under_its_own_name() -> None:
    message = problem(training(train_steps=100, checkpoint_schedule=[50, 101]))
    assert message.startswith("config: training.checkpoint_schedule: at(50, 101): step 101 would never come")
    assert problem(training(train_steps=2, epochs=3, checkpoint_schedule=[1])).startswith("config: training: epochs=3")


def test_older_keys_are_replaced() -> None:
    made = parsed(training(**AUTO, target_checkpoints={"small": 20}, log_steps_first_epoch=True))
    assert steps(made) == [*FIRST, *SECOND, *THIRD]
    for key in ("target_checkpoints", "log_steps_first_epoch"):
        assert any(f"training.{key} is no longer used: first_epoch_checkpoints" in note for note in made.notes)


def test_notes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ckptstore"):
        made = config.parse(training(**AUTO), source="x.yaml", environment={})
        config.parse(training(**AUTO), source="x.yaml", environment={})
    assert [record.getMessage() for record in caplog.records] == [f"x.yaml: {note}" for note in made.notes]
    assert made.notes


def test_the_environment_tells_how_long_the_run_is() -> None:
    made = parsed(
        training(auto_generate_checkpoints=True), CKPTSTORE_RUN__TOTAL_STEPS="1000", CKPTSTORE_RUN__EPOCHS="3"
    )
    assert steps(made) == [*FIRST, *SECOND, *THIRD]


def checkpointing(**keys: Any) -> dict[str, Any]:
    return {"model": "gpt2", "training": {"lr": 1}, "checkpointing": keys}


def test_e01_steps_with_step_0() -> None:
    made = parsed(checkpointing(save_at_steps=[0, 10, 30]), CKPTSTORE_RUN__TOTAL_STEPS="40")
    assert steps(made) == [0, 10, 30]
    assert any("step 0 is saved with all that a run resumes from" in note for note in made.notes)


def test_e02_order_and_repetitions_do_not_matter() -> None:
    assert steps(parsed(checkpointing(save_at_steps=[30, 10, 10, 30]))) == [10, 30]


def test_e03_neither_is_an_error_that_names_both() -> None:
    for data in (checkpointing(), checkpointing(eval_steps=0.1), checkpointing(save_steps=None)):
        message = problem(data)
        assert message.startswith("config: checkpointing: nothing says when to save")
        assert "save_at_steps" in message
        assert "save_steps (an interval)" in message


def test_e03_no_section_is_an_error_where_it_is_clearly_such_a_config() -> None:
    message = problem({"model": "gpt2", "training": {"lr": 1}})
    assert "save_at_steps" in message
    assert "save_steps (an interval)" in message
    assert parsed({"run": {"total_steps": 3}}).save is None


def test_e04_save_at_steps_governs() -> None:
    made = parsed(checkpointing(save_at_steps=[5], save_steps=2))
    assert steps(made) == [5]
    assert any("save_at_steps governs" in note for note in made.notes)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["10", -3, 1e9], ["'10'): that is no step; write it without quotes: 10", "at(-3)", "write 1000000000"]),
        ([], ["the list is empty"]),
        ("10", ["must be a list of steps"]),
        ([True], ["that is no step"]),
        ([[1]], ["that is no step"]),
    ],
)
def test_e05_steps_that_can_not_be(given: object, parts: list[str]) -> None:
    message = problem(checkpointing(save_at_steps=given))
    assert message.startswith("config: checkpointing.save_at_steps: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("given", ["500", -1, 0, 1.5, True, 0.0, [5]])
@pytest.mark.parametrize("key", ["save_steps", "eval_steps"])
def test_e05_intervals_that_can_not_be(key: str, given: object) -> None:
    message = problem(checkpointing(**{"save_steps": 5, key: given}))
    assert message.startswith(f"config: checkpointing.{key}: ")
    assert "is no interval" in message


def test_e06_shares_of_the_run() -> None:
    made = parsed(checkpointing(save_steps=0.005, eval_steps=0.25), CKPTSTORE_RUN__TOTAL_STEPS="328146")
    assert made.save is not None
    assert made.evaluate is not None
    assert steps(made)[:3] == [1641, 3282, 4923]
    assert made.evaluate.steps(length=made.run.length())[0] == 82037
    assert steps(parsed(checkpointing(save_steps=500.0), CKPTSTORE_RUN__TOTAL_STEPS="1000")) == [500, 1000]


def test_e07_the_long_list_verbatim() -> None:
    """That list leaves out 4000; each other step of the segments is in it."""
    long = [step for step in LOG if step != 4000]
    made = parsed(checkpointing(save_at_steps=long), CKPTSTORE_RUN__TOTAL_STEPS="328146")
    assert steps(made) == long
    assert len(long) == 62


def test_d04_resume() -> None:
    def resume(value: object) -> bool | str:
        return parsed({"resume_from_checkpoint": value, "save_total_limit": 3}).resume

    assert resume(True) is True
    assert resume(False) is False
    assert resume("latest") == "latest"
    assert resume("output/checkpoints/checkpoint-500") == "step:500"
    assert resume("checkpoint-0/") == "step:0"
    assert resume("no") is False
    for wrong in ("output/final", "best:", 3):
        assert "resume_from_checkpoint: " in problem({"resume_from_checkpoint": wrong})


def test_flags_of_saving_and_restoring() -> None:
    flags = {"save_optimizer_state": False, "restore_scheduler_state": False, "restore_optimizer_state": True}
    made = parsed({"training": {**flags, "lr": 1}, "save_scheduler_state": True, "model": {}})
    assert made.save_parts == config.Parts(optimizer=False)
    assert made.restore == config.Parts(scheduler=False)
    assert "training.save_optimizer_state: 3 must be true or false" in problem(
        {"training": {"save_optimizer_state": 3}}
    )


@pytest.mark.parametrize(("limit", "keep"), [(3, cs.last(3)), (1, cs.last(1)), (None, None)])
def test_d09_d10_limit_is_the_newest(limit: int | None, keep: object) -> None:
    assert parsed({"save_total_limit": limit, "resume_from_checkpoint": True}).keep == keep


@pytest.mark.parametrize("limit", [0, -1, "3", 2.5])
def test_d10_a_limit_that_would_keep_nothing_is_an_error(limit: object) -> None:
    assert "save_total_limit: " in problem({"save_total_limit": limit})


def growing(counts: object, **more: Any) -> dict[str, Any]:
    return {"progressive_checkpoints": {"enabled": True, "milestones": counts, **more}, "model": {}}


def test_m01_milestones() -> None:
    made = parsed(growing([1000000000, 5000000000, 1e10, 30000000000], save_dir="./progressive_checkpoints"))
    assert made.save == cs.milestones("1B,5B,10B,30B")
    assert made.storage == "./progressive_checkpoints"
    assert any("save_dir" in note for note in made.notes)
    assert parsed(growing("1,5,10,30")).save == made.save
    assert parsed(growing("500M,1B,3B")).save == cs.milestones([500_000_000, 10**9, 3 * 10**9])


def test_m02_m03_m04_m05_ways_to_write_them() -> None:
    assert parsed(growing("1b, 5b")).save == cs.milestones("1B,5B")
    assert parsed(growing("30,1,10,5,1")).save == cs.milestones("1B,5B,10B,30B")
    assert parsed(growing("0.5B,1e3")).save == cs.milestones([1000, 500_000_000])
    assert parsed(growing("999,1000")).save == cs.milestones([1000, 999 * 10**9])


@pytest.mark.parametrize("given", ["", "1,,5", "abc", "1T", "1GB", "nan", "inf", "-1", "0", [], [0], [-5], None, 5, {}])
def test_m06_what_is_no_milestone(given: object) -> None:
    assert problem(growing(given)).startswith("config: progressive_checkpoints.milestones: ")


def test_milestones_are_off_where_they_are_disabled() -> None:
    made = parsed({"progressive_checkpoints": {"enabled": False, "milestones": "x", "save_dir": "y"}})
    assert (made.save, made.storage) == (None, None)


def test_a_limit_leaves_milestones_alone() -> None:
    made = parsed({**growing("1B"), "save_total_limit": 2, "training": {"checkpoint_schedule": [5]}})
    assert made.keep == cs.last(2) | cs.milestones()
    assert made.save == cs.at(5) | cs.milestones("1B")


def test_words_of_older_yaml_are_true_and_false() -> None:
    assert parsed(training(**{**AUTO, "auto_generate_checkpoints": "yes"})).save == cs.epoch_plan()
    assert parsed(training(auto_generate_checkpoints="off", train_steps=5)).save is None


def test_sections_that_are_none() -> None:
    assert "checkpointing: must be a section of keys" in problem({"checkpointing": 5})
    assert "training: must be a section of keys" in problem({"training": [1], "save_total_limit": 2})


@pytest.mark.parametrize(
    "data",
    [
        {"training": {"checkpoint_schedule": [1]}, "run": {"total_steps": 5}},
        {"checkpointing": {"save_steps": 5}, "storage": "runs/a"},
        {"save_total_limit": 3, "keep": "last(3)"},
        {"progressive_checkpoints": {"milestones": "1B"}, "save": "every(steps=5)"},
    ],
)
def test_both_kinds_of_keys_in_one_file_are_an_error(data: dict[str, Any]) -> None:
    message = problem(data)
    assert "is understood only in another program's config" in message


def test_elsewhere_foreign_keys_are_unknown() -> None:
    assert "model: unknown key" in problem({"model": {}, "keep": "last(1)"})
    assert "model: unknown key" in problem({"model": {}})
