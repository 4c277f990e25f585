"""Where each save comes from: told by steps, writers and the reason of a roll-back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ckptstore.format.layout import CheckpointId
from ckptstore.tools.lineage import Save, origins, speeds

BEGIN = datetime(2026, 1, 31, tzinfo=UTC)


def saves(
    *steps: int | tuple[int, int], reasons: dict[int, str] | None = None, gone: tuple[int, ...] = ()
) -> list[Save]:
    """Saves of ``steps``, or (step, writer), one each ten seconds; by their places, why, and which are deleted."""
    made = []
    for place, one in enumerate(steps):
        step, writer = one if isinstance(one, tuple) else (one, 1)
        why = tuple(filter(None, [(reasons or {}).get(place)]))
        id = CheckpointId(writer, place, step, f"{place:016x}")
        made.append(Save(id, place not in gone, BEGIN + timedelta(seconds=10 * place), why))
    return made


def parents(made: list[Save]) -> list[int | None]:
    return [origin.parent for origin in origins(made)]


def test_a_run_that_never_went_back_is_one_line() -> None:
    made = saves(0, 10, 20, (30, 2), (30, 2), (40, 3))

    assert parents(made) == [None, 0, 1, 2, 3, 4]
    assert {origin.branch for origin in origins(made)} == {0}
    assert not any(origin.abandoned for origin in origins(made))


def test_where_steps_fall_the_nearest_before_was_continued() -> None:
    made = saves(10, 20, 30, 40, (30, 2), (40, 2), (15, 3), (25, 3))

    assert parents(made) == [None, 0, 1, 2, 1, 4, 0, 6]
    assert [origin.branch for origin in origins(made)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [origin.abandoned for origin in origins(made)] == [False, True, True, True, True, True, False, False]


def test_a_second_roll_back_goes_on_along_its_own_branch() -> None:
    """Not along what the first one left behind."""
    made = saves(10, 20, 30, 40, (25, 2), (35, 2), (28, 3))

    assert parents(made) == [None, 0, 1, 2, 1, 4, 4]


def test_a_roll_back_by_hand_names_what_it_repeats() -> None:
    made = saves(10, 20, 30)
    made += saves(10, 20, 30, 20, 25, reasons={3: f"rollback to {made[1].order}"})[3:]

    assert parents(made) == [None, 0, 1, 1, 3]
    assert [origin.abandoned for origin in origins(made)] == [False, False, True, False, False]


def test_a_roll_back_to_what_nobody_knows_is_told_by_its_step() -> None:
    made = saves(10, 20, 30, 20, reasons={3: "rollback to somewhere"})

    assert parents(made) == [None, 0, 1, 0]


def test_a_fresh_start_continues_nothing() -> None:
    made = saves(10, 20, (0, 2), (10, 2))

    assert parents(made) == [None, 0, None, 2]
    assert [origin.abandoned for origin in origins(made)] == [True, True, False, False]


def test_the_newest_that_exists_tells_what_is_left_behind() -> None:
    """One that was deleted by hand takes what it continued with it."""
    made = saves(10, 20, 30, gone=(1, 2))

    assert [origin.abandoned for origin in origins(made)] == [False, True, True]
    assert all(origin.abandoned for origin in origins(saves(10, 20, gone=(0, 1))))
    assert origins([]) == []


def test_speed_is_told_between_two_saves_of_one_writer() -> None:
    made = saves(0, 20, 50, (60, 2), (80, 2), (70, 3), (70, 3))
    made.append(Save(CheckpointId(3, 9, 90, "9" * 16), there=False))

    assert speeds(made, origins(made)) == [None, 2.0, 3.0, None, 2.0, None, None, None]


def test_a_clock_that_was_set_back_tells_no_speed() -> None:
    made = saves(0, 20)
    made[1] = Save(made[1].order, True, BEGIN - timedelta(hours=1))

    assert speeds(made, origins(made)) == [None, None]


def test_many_roll_backs_are_told_quickly_enough_to_be_told_at_all() -> None:
    """Each is looked for along its own branch, which gets shorter by as much as is passed."""
    made = saves(*((place * 7919) % 10007 for place in range(10_000)))

    assert len({origin.branch for origin in origins(made)}) > 4000
