"""A plan as a picture: read back from the SVG, what it says and draws is what the plan tells."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import pytest

from ckptstore import config
from ckptstore.errors import FormatError
from ckptstore.policy.plan import Plan, foresee
from ckptstore.policy.progress import Length
from ckptstore.policy.text import parse_keep, parse_schedule
from ckptstore.tools.planpicture import picture

GB = 10**9
SVG = "{http://www.w3.org/2000/svg}"


def planned(save: str, keep: str | None, length: Length) -> Plan:
    return foresee(parse_schedule(save), keep and parse_keep(keep), length, checkpoint_bytes=GB)


def drawn(plan: Plan, length: Length, title: str = "a title", unit_bytes: int | None = None) -> ET.Element:
    return ET.fromstring(picture(plan, length, "svg", title=title, unit_bytes=unit_bytes))


def texts(root: ET.Element) -> list[str]:
    return ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]


def paths(root: ET.Element, name: str) -> list[ET.Element]:
    """The shapes of one colour, by the name that their group has."""
    return [path for group in root.iter(f"{SVG}g") if group.get("id") == name for path in group.iter(f"{SVG}path")]


def ends(path: ET.Element) -> tuple[float, float]:
    """Where a line begins and ends, from left to right."""
    places = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", path.get("d", ""))]
    return min(places), max(places)


def test_a_line_for_each_checkpoint_from_its_save_to_its_end() -> None:
    length = Length.of(400, 2)
    plan = planned("every(steps=40)", "last(2) | epochs()", length)

    root = drawn(plan, length)
    stay, go = paths(root, "lives-stay"), paths(root, "lives-go")
    assert len(go) == sum(moment.goes_at is not None for moment in plan.moments) == 7
    # The last one has no length, and a dot alone.
    assert len(stay) == len(plan.final) == 3
    right = max(ends(path)[1] for path in stay)
    moments = {moment.step: moment for moment in plan.moments}
    going = [moment for moment in moments.values() if moment.goes_at is not None]
    per_step = (ends(go[1])[0] - ends(go[0])[0]) / 40
    for path, moment in zip(go, going, strict=True):
        first, last = ends(path)
        assert last - first == pytest.approx((moment.goes_at - moment.step) * per_step, abs=0.01)  # type: ignore[operator]
        assert right - last == pytest.approx((400 - moment.goes_at) * per_step, abs=0.01)  # type: ignore[operator]


def test_it_says_what_the_plan_says() -> None:
    length = Length.of(300, 3)
    plan = planned("every(steps=50)", "last(3) | epochs() | best(val_loss)", length)

    said = texts(drawn(plan, length, title="save this\nkeep that"))
    assert {"6 saves, of which 4 stay", "save this", "keep that"} <= set(said)
    assert {"epoch 1", "epoch 2", "epoch 3", "step", "GB on storage"} <= set(said)
    assert {"ends of epochs (3)", "the newest 3 (1)", "goes (2)"} <= set(said)
    assert {"peak 5 GB at step 300", "4 GB at the end", "at most 6 GB, with what can't be foreseen"} <= set(said)


def test_what_is_kept_by_no_rule_is_shown_as_what_it_was_saved_for() -> None:
    length = Length.of(100, 2)
    said = texts(drawn(planned("every(steps=20) | at(33)", None, length), length))
    assert {"6 saves, all stay", "every 20 steps (5)", "named steps (1)"} <= set(said)


def test_without_a_size_checkpoints_are_counted() -> None:
    length = Length.of(100)
    plan = foresee(parse_schedule("every(steps=20)"), None, length, checkpoint_bytes=1)
    said = texts(drawn(plan, length, unit_bytes=1))
    assert {"checkpoints on storage", "peak 5 checkpoints at step 100"} <= set(said)


@pytest.mark.parametrize(("every", "keep"), [(50, "last(10) | epochs()"), (50, None), (10, "last(2)")])
def test_thousands_of_checkpoints(every: int, keep: str | None) -> None:
    """Stay a picture that a browser opens at once, with every one that stays on a line or in a surface."""
    length = Length.of(100_000, 10)
    plan = planned(f"every(steps={every})", keep, length)

    made = picture(plan, length, "svg", title="long", unit_bytes=None)
    assert len(made) < 1_500_000
    root = ET.fromstring(made)
    assert f"{len(plan.moments):,} saves, " in "".join(texts(root))
    if keep is not None:
        assert len(paths(root, "lives-stay")) == len(plan.final)
    assert 0 < len(paths(root, "lives-go" if keep else "lives-stay")) <= 600


def test_the_same_plan_gives_the_same_file() -> None:
    """And nothing that others set for their own drawings changes it, or is changed."""
    length = Length.of(300, 3)
    plan = planned("every(steps=50)", "last(3)", length)
    first = picture(plan, length, "svg", title="t", unit_bytes=None)
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        assert picture(plan, length, "svg", title="t", unit_bytes=None) == first
        assert mpl.rcParams["font.size"] == 30
    assert b"Matplotlib v" not in first


def test_the_readmes_picture_is_this_one() -> None:
    """``ckptstore plan configs/three-tiers.yaml --picture examples/three-tiers.svg`` makes it."""
    root = Path(__file__).parents[2]
    made = config.load(root / "configs" / "three-tiers.yaml", environment={})
    assert made.save is not None
    assert made.checkpoint_bytes is not None
    length = made.run.length()
    plan = foresee(made.save, made.keep, length, checkpoint_bytes=made.checkpoint_bytes, trash_s=made.trash_s)

    # Where numbers stand at an axis is matplotlib's choice.
    now = [text for text in texts(drawn(plan, length, f"save {made.save}\nkeep {made.keep}")) if " " in text]
    assert [text for text in texts(ET.parse(root / "examples" / "three-tiers.svg").getroot()) if " " in text] == now
    assert len(now) > 9


def test_png() -> None:
    length = Length.of(300, 3)
    made = picture(planned("every(steps=50)", None, length), length, "png", title="t", unit_bytes=None)
    assert made.startswith(b"\x89PNG")
    assert made[16:24] == (1500).to_bytes(4) + (960).to_bytes(4)


def test_names_are_no_formulas() -> None:
    """A metric may be called $x_1$."""
    length = Length.of(300)
    said = texts(drawn(planned("every(steps=50)", None, length), length, title="best('$x_1$') <&>"))
    assert "best('$x_1$') <&>" in said


def test_what_can_not_be_drawn() -> None:
    length = Length.of(300)
    plan = planned("every(steps=50)", None, length)
    with pytest.raises(FormatError, match="write svg or png"):
        picture(plan, length, "pdf", title="t", unit_bytes=None)
    nothing = foresee(parse_schedule("on_best(x)"), None, length, checkpoint_bytes=1, final=False)
    with pytest.raises(FormatError, match="saves nothing"):
        picture(nothing, length, "svg", title="t", unit_bytes=None)
