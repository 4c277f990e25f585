"""``ckptstore plan``: the table, the JSON and the picture say what ``foresee`` says."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptstore as cs
from ckptstore.cli.plantimeline import GOES, STAYS, timeline
from ckptstore.cli.texts import size_text
from ckptstore.policy.text import parse_keep, parse_schedule
from tests.cli.conftest import Run, environment, process, told

TIERS = (
    "--save",
    "every(steps=50) | every(epochs=1)",
    "--keep",
    "last(2) | epochs()",
    "--steps",
    "300",
    "--epochs",
    "3",
)
OURS = """\
save: every(steps=50) | on_best(val_loss)   # often
keep: last(3) | best(val_loss)
checkpoint_size: 1.5GB
run:
  total_steps: 300
  epochs: 3
  step_time: 2s
"""
FOREIGN = """\
# the experiment
training:
  train_steps: 1000
  epochs: 3
  auto_generate_checkpoints: true
  first_epoch_checkpoints: 5
  subsequent_epochs_spacing: linear
  linear_interval: 50
"""
SHOWN = """\
save  every(steps=50) | every(epochs=1)
keep  last(2) | epochs()
run   300 steps, 3 epochs, 07:30:00, 1.50 GB a checkpoint

every 50 steps            ·          ●         ·          ●         ●          ●
epochs                               ●                    ●                    ●
epoch                                1                    2                    3
       6.00 GB                                                      █          █
                                               █          ██████████████████████
                                     ███████████████████████████████████████████
    on storage            ██████████████████████████████████████████████████████
step            0             75              150             225            300
                                           peak 6.00 GB at step 250 ▲

step  epoch      time  why                      goes  there    bytes
  50      0  01:15:00  every 50 steps                     1  1.50 GB
 100      1  02:30:00  every 50 steps, epoch 1            2  3.00 GB
 150      1  03:45:00  every 50 steps           50        2  3.00 GB
 200      2  05:00:00  every 50 steps, epoch 2            3  4.50 GB
 250      2  06:15:00  every 50 steps           150       3  4.50 GB
 300      3  07:30:00  every 50 steps, epoch 3            4  6.00 GB

4 checkpoints stay to the end, 6.00 GB:
step  why
 100  end of epoch 1
 200  end of epoch 2
 250  one of the newest 2
 300  one of the newest 2, end of epoch 3

peak: 6.00 GB, when step 250 is saved
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(OURS)
    return str(path)


def steps(answer: Any) -> list[int]:
    return [save["step"] for save in answer.json["saves"]]


def section(stdout: str, head: str) -> list[str]:
    """The rows of the table whose head begins like that."""
    lines = stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if re.match(head, line))
    return lines[start + 1 : lines.index("", start)]


SAVES = [
    "every(steps=7)",
    "every(epochs=1)",
    "at(0, 13)",
    "every(minutes=1)",
    "on_best(val_loss)",
    "epoch_plan(first=5)",
]
KEEPS = ["last(3)", "epochs()", "every_kept(steps=20)", "within('2m')", "at_most('5GB')", "best(val_loss)"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    save=st.lists(st.sampled_from(SAVES), min_size=1, max_size=3, unique=True).map(" | ".join),
    keep=st.none() | st.lists(st.sampled_from(KEEPS), min_size=1, max_size=3, unique=True).map(" | ".join),
    total=st.integers(40, 250),
)
def test_table_and_json_are_what_is_foreseen(run: Run, save: str, keep: str | None, total: int) -> None:
    args = ["--save", save, "--steps", str(total), "--epochs", "4", "--size", "1GB", "--step-time", "5s"]
    args += [] if keep is None else ["--keep", keep]
    length = cs.Length.of(total, 4, step_s=5.0)
    plan = cs.foresee(parse_schedule(save), keep and parse_keep(keep), length, checkpoint_bytes=10**9)

    told = run("plan", *args, "--json").json
    assert [(it["step"], it["epoch"], it["time_s"], it["reasons"]) for it in told["saves"]] == [
        (moment.step, moment.epoch, moment.time_s, list(moment.reasons)) for moment in plan.moments
    ]
    assert [(it["there"], it["peak_bytes"], it["left_bytes"], it["goes_at"]) for it in told["saves"]] == [
        (moment.count, moment.peak_bytes, moment.left_bytes, moment.goes_at) for moment in plan.moments
    ]
    assert [[(gone["step"], gone["why"]) for gone in it["goes"]] for it in told["saves"]] == [
        [(verdict.step, verdict.why) for verdict in moment.going] for moment in plan.moments
    ]
    assert [(it["step"], it["why"], it["bytes"]) for it in told["final"]] == [
        (verdict.step, verdict.why, verdict.own_bytes) for verdict in plan.final
    ]
    assert (told["peak"]["bytes"], told["peak"]["at_most"]) == (plan.peak_bytes, plan.at_most)
    assert told["peak"]["foreseen_bytes"] == max(moment.peak_bytes for moment in plan.moments)
    assert told["notes"] == plan.notes
    shown = run("plan", *args).stdout
    rows = section(shown, r" *step  epoch")
    if len(plan.moments) <= 40:
        assert [int(row.split()[0]) for row in rows] == [moment.step for moment in plan.moments]
        assert all(
            ", ".join(moment.reasons) in row and f"{moment.count}  {moment.left_bytes / 1e9:.3g}"[:5] in row
            for row, moment in zip(rows, plan.moments, strict=True)
        )
    if keep is not None:
        stay = section(shown, r" *step  why")
        assert [row.split(None, 1) for row in stay] == [[str(it.step), it.why] for it in plan.final]
    assert all(f"note: {text}" in shown for text in plan.notes)


def test_for_a_person(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody looks, in 80 columns, without colours."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run("plan", *TIERS, "--size", "1.5GB", "--step-time", "90s").stdout == SHOWN


def test_the_readme_shows_just_that() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert f"--size 1.5GB --step-time 90s\n{SHOWN}```" in readme.read_text()


def at_terminal(*args: str, columns: int, terminal: bool = True, **extra: str) -> str:
    """What a terminal of that width shows."""
    if not terminal:
        return process("plan", *args, COLUMNS=str(columns), **extra).stdout
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "ckptstore.cli", "plan", *args]
    variables = environment(TERM="xterm-256color", COLUMNS=str(columns), **extra)
    child = subprocess.Popen(command, stdout=follower, stderr=follower, env=variables)
    os.close(follower)
    seen = told(leader)
    os.close(leader)
    assert child.wait(timeout=60) == 0
    return seen.decode().replace("\r\n", "\n")


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


LONG = ("--save", "every(steps=50)", "--keep", "last(10) | epochs()", "--steps", "100000", "--epochs", "10")


@settings(max_examples=50, deadline=None)
@given(
    save=st.lists(st.sampled_from(SAVES), min_size=1, max_size=4, unique=True).map(" | ".join),
    keep=st.sampled_from(KEEPS),
    total=st.integers(13, 10**6),
    width=st.integers(40, 200),
    size=st.sampled_from([None, 1, 10**9]),
)
def test_any_drawing_fits(save: str, keep: str, total: int, width: int, size: int | None) -> None:
    """With a mark in the column of each save, the bright ones where something stays."""
    length = cs.Length.of(total, 4, step_s=5.0)
    save = save.replace("every(steps=7)", f"every(steps={total // 7})").replace("minutes=1", f"minutes={total / 50}")
    plan = cs.foresee(parse_schedule(save), parse_keep(keep), length, checkpoint_bytes=size or 1)

    lines = [
        line.plain
        for line in timeline(plan, length, width, lambda n: f"{n:,} checkpoints" if size is None else size_text(n))
    ]
    assert all(len(line) <= width for line in lines)
    assert lines[-1].count("▲") == 1
    marks = [line for line in lines if STAYS in line or GOES in line]
    # The ruler begins with step 0.
    columns = width - lines[-2].index("0")
    places = {moment.step * (columns - 1) // total for moment in plan.moments}
    drawn = {place for line in marks for place, mark in enumerate(line[-columns:]) if mark in (STAYS, GOES)}
    assert drawn == places
    bright = {place for line in marks for place, mark in enumerate(line[-columns:]) if mark == STAYS}
    assert bright == {verdict.step * (columns - 1) // total for verdict in plan.final}


@pytest.mark.parametrize("columns", [60, 80, 140])
@pytest.mark.parametrize("args", [TIERS, LONG], ids=["short", "long"])
def test_it_fits_the_terminal(columns: int, args: tuple[str, ...]) -> None:
    """And says the same as where nobody looks, but for where lines break."""
    seen = at_terminal(*args, "--size", "1GB", columns=columns)
    lines = bare(seen).splitlines()
    assert max(map(len, lines)) <= columns
    drawing = lines[: next(number for number, line in enumerate(lines) if "▲" in line) + 1]
    assert (
        drawing[4:]
        == at_terminal(*args, "--size", "1GB", columns=columns, terminal=False).splitlines()[4 : len(drawing)]
    )
    marks = next(line for line in drawing if line.startswith("every 50 steps"))
    # The last step is the last column, and stays.
    assert len(marks) == columns
    assert marks[-1] == STAYS


def test_bright_where_it_stays_and_dim_where_it_goes() -> None:
    args = (*TIERS, "--size", "1GB")
    seen = at_terminal(*args, columns=80)
    assert f"\x1b[1;36m{STAYS}" in seen
    assert f"\x1b[2m{GOES}" in seen
    assert "\x1b[36" not in at_terminal(*args, columns=80, NO_COLOR="1")
    assert bare(at_terminal(*args, columns=80, NO_COLOR="1")) == bare(seen)
    assert "\x1b" not in at_terminal(*args, columns=80, terminal=False)


def test_where_the_locale_has_no_such_marks() -> None:
    answer = process("plan", *TIERS, PYTHONIOENCODING="ascii")
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert "every 50 steps" in answer.stdout


def test_long_plans_are_shortened_in_the_middle(run: Run) -> None:
    rows = section(run("plan", *LONG, "--size", "1GB").stdout, r" *step  epoch")
    assert len(rows) == 25
    assert "1,976 more, --json lists all" in rows[12]
    assert rows[0].split()[0] == "50"
    assert rows[-1].split()[0] == "100000"
    assert len(run("plan", *LONG, "--json").json["saves"]) == 2000


def test_without_a_size_checkpoints_are_counted(run: Run) -> None:
    shown = run("plan", *TIERS).stdout
    assert "peak: 4 checkpoints, when step 250 is saved" in shown
    assert "note: --size 1.5GB, what one checkpoint takes, tells bytes" in shown
    told = run("plan", *TIERS, "--json").json
    assert (told["checkpoint_bytes"], told["peak"]["bytes"], told["peak"]["checkpoints"]) == (None, None, 4)
    assert {save["left_bytes"] for save in told["saves"]} == {None}


def test_what_can_not_be_foreseen(run: Run) -> None:
    save = ("--save", "every(steps=100) | on_best(val_loss)", "--steps", "300", "--size", "1GB")
    assert "peak: at least 3.00 GB, when step 300 is saved" in run("plan", *save).stdout
    kept = run("plan", *save, "--keep", "last(4) | best(val_loss)").stdout
    assert "peak: at most 6.00 GB; foreseen are 3.00 GB, when step 300 is saved" in kept


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--first-epoch 20",
         [0, 17, 35, 52, 70, 87, 105, 122, 140, 157, 175, 192, 210, 227, 245, 262, 280, 297, 315, 333, 334, 336, 340,
          348, 364, 396, 460, 588, 666, 667, 669, 673, 681, 697, 729, 793, 921, 1000]),
        ("--first-epoch 5 --spacing linear --linear-interval 50",
         [0, 83, 166, 249, 333, 334, 384, 434, 484, 534, 584, 634, 666, 667, 717, 767, 817, 867, 917, 967, 1000]),
        ("--first-epoch 0 --spacing log_offset --log-base 3",
         [333, 337, 343, 361, 415, 577, 666, 670, 676, 694, 748, 910, 1000]),
        ("--first-epoch 3 --min-interval 100", [0, 166, 333, 460, 666, 793, 1000]),
        ("--log-base 3 --first-epoch 1", [333, 334, 337, 346, 373, 454, 666, 667, 670, 679, 706, 787, 1000]),
    ],
)  # fmt: skip
def test_the_flags_of_an_epoch_plan(run: Run, args: str, expected: list[int]) -> None:
    assert steps(run("plan", *args.split(), "--steps", "1000", "--epochs", "3", "--json")) == expected


def test_a_config_and_options_that_come_before_it(run: Run, config: str) -> None:
    told = run("plan", config, "--json").json
    assert (told["save"], told["keep"]) == ("every(steps=50) | on_best('val_loss')", "last(3) | best('val_loss')")
    assert (told["checkpoint_bytes"], told["config"], told["length"]["step_s"]) == (1_500_000_000, config, 2.0)
    assert [save["step"] for save in told["saves"]] == [50, 100, 150, 200, 250, 300]
    other = run("plan", config, "--save", "every(steps=100)", "--keep", "last(1)", "--size", "1GB", "--json").json
    assert [save["step"] for save in other["saves"]] == [100, 200, 300]
    assert [it["step"] for it in other["final"]] == [300]
    assert other["checkpoint_bytes"] == 10**9
    assert steps(run("plan", config, "--first-epoch", "3", "--spacing", "linear", "--json")) == [
        0, 50, 100, *range(101, 201, 10), 200, *range(201, 301, 10), 300,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("known", "args", "total", "epochs"),
    [
        ("epochs: 3, dataset_size: 1000, batch_size: 10", "", 300, 3),
        ("epochs: 3, dataset_size: 1000, batch_size: 10", "--epochs 5", 500, 5),
        ("epochs: 3, dataset_size: 1000, batch_size: 10", "--accumulation 2", 150, 3),
        ("epochs: 3, dataset_size: 1000, batch_size: 10", "--steps 250", 250, None),
        ("epochs: 3, dataset_size: 1000, batch_size: 10, total_steps: 250", "--tokens-per-step 9", 250, 3),
        ("epochs: 3, steps_per_epoch: 100", "--dataset-size 100 --batch-size 2", 150, 3),
        ("epochs: 3, total_steps: 300", "--epochs 4", 300, 4),
        ("epochs: 3, total_steps: 300", "--steps 400", 400, 3),
    ],
)
def test_the_length_of_the_run(run: Run, tmp_path: Path, known: str, args: str, total: int, epochs: int | None) -> None:
    """What isn't given as an option is as in the config, or follows from both."""
    path = tmp_path / "run.yaml"
    path.write_text(f"save: every(steps=50)\nrun: {{{known}}}\n")
    length = run("plan", str(path), *args.split(), "--json").json["length"]
    assert (length["total_steps"], length["epochs"]) == (total, epochs)


def test_another_program_s_config(run: Run, tmp_path: Path) -> None:
    """Its own plan is the base of what the flags don't say, and its steps can be written back."""
    path = tmp_path / "experiment.yaml"
    path.write_text(FOREIGN)
    answer = run("plan", str(path), "--json")
    assert steps(answer)[:6] == [0, 83, 166, 249, 333, 334]
    assert answer.stderr == ""
    assert steps(run("plan", str(path), "--first-epoch", "1", "--json"))[:3] == [333, 334, 384]
    assert steps(run("plan", str(path), "--spacing", "log", "--json"))[:8] == [0, 83, 166, 249, 333, 334, 336, 340]
    assert run("plan", str(path), "--write", "--json").json["written"] == str(path)
    assert path.read_text().startswith("# the experiment\n")
    assert steps(run("plan", str(path), "--json")) == steps(answer)


def test_write_to_another_file(run: Run, config: str, tmp_path: Path) -> None:
    output = tmp_path / "written.yaml"
    answer = run("plan", config, "--write", "--output", str(output))
    assert f"the steps went into {output}" in answer.stderr
    assert Path(config).read_text() == OURS
    assert "# often" in output.read_text()
    assert steps(run("plan", str(output), "--json")) == [50, 100, 150, 200, 250, 300]
    # What depends on metrics can't be listed, and is still asked for.
    assert "on_best('val_loss')" in run("plan", str(output), "--json").json["save"]


def test_what_would_never_come_is_not_written(run: Run, config: str) -> None:
    """A config must load after it was written as before."""
    answer = run("plan", config, "--steps", "600", "--write", "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "other_length")
    assert "is for a run of 300 steps, and step 600 would never come" in answer.stderr
    assert Path(config).read_text() == OURS


def test_what_can_not_be_written_is_told(run: Run, config: str) -> None:
    answer = run("plan", config, "--save", "every(steps=100) | on_best(acc)", "--write")
    assert "on_best('acc') can't be told in steps, and isn't written" in answer.stderr
    assert steps(run("plan", config, "--json")) == [100, 200, 300]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_picture(run: Run, config: str, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"plan.{ending}"
    answer = run("plan", config, "--picture", str(path))
    assert answer.exit_code == 0
    assert f"the picture went into {path}" in answer.stderr
    assert path.read_bytes()[:4] == {"svg": b"<?xm", "png": b"\x89PNG"}[ending]
    assert sorted(tmp_path.iterdir()) == sorted([path, Path(config)])
    assert oct(path.stat().st_mode) == oct(Path(config).stat().st_mode)
    if ending == "svg":
        text = path.read_text()
        assert "save every(steps=50) | on_best('val_loss')" in text
        assert "peak 6 GB at step 200" in text
        assert "at most 7.5 GB, with what can't be foreseen" in text
    assert run("plan", config, "--picture", str(path), "--json").json["picture"] == str(path)


def test_picture_without_matplotlib(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    (folder / "matplotlib.py").write_text('raise ImportError("matplotlib is not here")\n')
    answer = process("plan", *TIERS, "--picture", tmp_path / "plan.svg", "--json", first=str(folder))
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "no_matplotlib")
    assert "pip install 'ckptstore[plot]'" in answer.stderr
    # Nothing else needs it.
    assert process("plan", *TIERS, first=str(folder)).exit_code == 0


def test_a_picture_that_can_not_be_written(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "none" / "plan.svg"
    answer = run("plan", *TIERS, "--picture", str(path))
    assert (answer.exit_code, answer.stdout) == (2, "")
    assert answer.stderr == f"error: {path} can't be written: No such file or directory\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--save", "every(steps=3)"], "give --steps N, or --epochs N with --dataset-size N and --batch-size N"),
        (
            ["--save", "every(steps=3)", "--epochs", "3"],
            "give --steps N, or --dataset-size N and --batch-size N beside",
        ),
        (
            ["--save", "every(steps=3)", "--dataset-size", "9", "--batch-size", "3"],
            "give --epochs N beside the 3 steps",
        ),
        (
            ["--save", "every(epochs=1)", "--steps", "30"],
            "every(epochs=1) needs to know where epochs end: give --epochs",
        ),
        (["--first-epoch", "3", "--steps", "30"], "needs to know where epochs end: give --epochs N"),
        (["--save", "at(3)", "--keep", "at_most('3GB')", "--steps", "9"], "give --size 1.5GB"),
        (["--save", "every(steps=99)", "--steps", "9"], "every(steps=99) would never save"),
        (["--save", "evry(steps=9)", "--steps", "9"], "did you mean every?"),
        (["--save", "at(3)", "--keep", "lst(3)", "--steps", "9"], "did you mean last?"),
        (["--first-epoch", "3", "--log-base", "1", "--steps", "9", "--epochs", "3"], "must be over 1"),
        (["--first-epoch", "3", "--linear-interval", "5", "--steps", "9", "--epochs", "3"], "is for then='linear'"),
        (["--save", "at(3)", "--steps", "9", "--step-time", "0s"], "step_s=0.0 must be"),
        (["--save", "at(3)", "--steps", "9", "--batch-size", "3"], "dataset_size and batch_size go together"),
    ],
)
def test_too_little_or_wrong(run: Run, args: list[str], message: str) -> None:
    answer = run("plan", *args, "--json")
    assert answer.exit_code == 2
    assert set(answer.json) == {"error"}
    assert message in answer.stderr
    assert answer.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--steps", "9"],
        ["--save", "at(3)", "--first-epoch", "3", "--steps", "9"],
        ["--save", "at(3)", "--steps", "9", "--write"],
        ["--save", "at(3)", "--steps", "9", "--output", "x.yaml"],
        ["--save", "at(3)", "--steps", "9", "--picture", "x.pdf"],
        ["--save", "at(3)", "--steps", "0"],
        ["--save", "at(3)", "--steps", "9", "--size", "0B"],
        ["--save", "at(3)", "--steps", "9", "--size", "3"],
        ["--spacing", "cubic", "--steps", "9"],
        ["--linear-interval", "0", "--steps", "9"],
    ],
)
def test_wrong_use(run: Run, args: list[str]) -> None:
    answer = run("plan", *args, "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "usage")


def test_no_config(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "nothing.yaml"
    answer = run("plan", str(path), "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "no_config")
    assert str(path) in answer.stderr


def test_a_config_that_is_wrong_or_says_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sav: every(steps=5)\n")
    answer = run("plan", str(path), "--json")
    assert (answer.exit_code, answer.json["error"]["code"]) == (2, "format")
    path.write_text("keep: last(3)\n")
    assert run("plan", str(path), "--json").json["error"]["code"] == "no_schedule"


def test_a_run_that_saves_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("save: on_best(val_loss)\nfinal: false\nrun: {total_steps: 9}\n")
    answer = run("plan", str(path))
    assert answer.exit_code == 0
    assert "nothing is saved" in answer.stdout
    told = run("plan", str(path), "--json").json
    assert (told["saves"], told["final"], told["peak"]["step"]) == ([], [], None)


def test_names_can_not_obey_the_terminal(run: Run) -> None:
    answer = run("plan", "--save", "at(3)", "--keep", "tagged('\x1b[31m')", "--steps", "9")
    assert "\x1b" not in answer.stdout
