"""Where a model changed, as a map and as a picture: read back, it says what the comparison says."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch

import ckptstore as cs
from ckptstore.errors import FormatError
from ckptstore.tools.diffmap import Map, diff_map, split
from ckptstore.tools.diffpicture import picture

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("h.10.attn.weight", ("h.10", "attn.weight")),
        ("encoder/layers/0/weight", ("encoder/layers/0", "weight")),
        ("0.weight", ("0", "weight")),
        ("head.out.weight", ("head.out", "weight")),
        ("weight", ("", "weight")),
        ("blocks.3", ("blocks", "3")),
        ("h.1.mlp.2.bias", ("h.1", "mlp.2.bias")),
    ],
)
def test_layers_and_kinds(name: str, parts: tuple[str, str]) -> None:
    assert split(name) == parts


def found() -> Map:
    weights = {f"h.{n}.{kind}": torch.ones(4) for n in (0, 2, 10) for kind in ("w", "$b$")}
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with cs.open("memory://maps") as store:
        store.save({"model": weights, "optimizer": optimizer, "rng": cs.RNG()}, step=1)
        changed = {**weights, "h.2.w": weights["h.2.w"] * 1.5, "head.w": torch.ones(1), "h.10.w": torch.ones(3)}
        torch.rand(1)
        store.save({"model": changed, "optimizer": optimizer, "rng": cs.RNG()}, step=2)
        return diff_map(cs.diff(store, "step:1", "step:2"))


def test_a_cell_for_each_weight() -> None:
    made = found()
    assert (list(made.layers), list(made.kinds)) == (["h.0", "h.2", "h.10", "head"], ["$b$", "w"])
    assert made.cells["h.2", "w"] == ("changed", 0.5)
    assert made.cells["h.0", "w"] == (None, 0.0)
    assert made.cells["h.10", "w"] == ("reshaped", None)
    assert made.cells["head", "w"] == ("added", None)
    assert len(made.cells) == 7


def test_the_picture_names_all_and_is_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    made = found()
    drawn = picture(made, "svg", title="from a\nto b")
    root = ET.fromstring(drawn)
    texts = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    for text in (*made.layers, *made.kinds, "0.5", "reshaped", "added", "equal", "from a"):
        assert text in texts
    assert not any("mathdefault" in text for text in texts)
    assert drawn == picture(made, "svg", title="from a\nto b")
    assert picture(made, "png", title="").startswith(b"\x89PNG")


def test_what_can_not_be_drawn_is_told() -> None:
    with pytest.raises(FormatError, match="no format of pictures"):
        picture(found(), "gif", title="")
    with pytest.raises(FormatError, match="no weights"):
        picture(Map([], [], {}), "svg", title="")
    names = [str(n) for n in range(401)]
    with pytest.raises(FormatError, match="401 layers"):
        picture(Map(names, ["w"], dict(found().cells)), "svg", title="")
