"""What a report says, where it gets that from, and that what anybody named something stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.errors import ExistsError, NotFoundError, StorageError
from ckptstore.format import layout
from ckptstore.policy.text import parse_keep
from ckptstore.storage.memory import MemoryStorage
from ckptstore.tools import report as reporting
from ckptstore.tools.report import MARK, in_script, page, report
from ckptstore.tools.reportdata import document
from ckptstore.tools.survey import survey
from tests.tools.fabricated import HOSTILE, STORE_ID, Fake, fabricate, run, size_file


def shown(root: Path, keep: str | None = None) -> dict[str, Any]:
    with ckptstore.open(root, read_only=True) as store:
        return document(survey(store, keep=parse_keep(keep) if keep else None))


class Reader(HTMLParser):
    """The elements of a page, and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._raw = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            self.scripts.append(data)
        elif not self._raw:
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""


# -- what it says -----------------------------------------------------------------------------------------------


def test_everything_about_each_save_is_there(store_path: Path) -> None:
    lender = "0001-000001-step10-" + "0" * 16
    fakes = [
        Fake(10, 1, 0, 1, {"val_loss": 3.0}, {}, ("every 10 steps", "best val_loss"), timing=(2.0, None)),
        Fake(20, 1, 5, 2, {"val_loss": 2.0, "acc": 0.5}, {"acc": "max"}, ("SIGTERM",), 100, 900, lenders=(lender,)),
        Fake(30, 2, 9, None, {}, {}, (), deleted="deleted by hand"),
    ]
    ids = fabricate(store_path, fakes, hosts={1: "left"}, holds={"paper": 0, "draft": 0})

    made = shown(store_path)
    assert made["store_id"] == STORE_ID
    assert made["url"] == store_path.as_uri()
    first, second, third = made["saves"]
    assert [save["id"] for save in made["saves"]] == ids
    assert [save["status"] for save in made["saves"]] == ["there", "there", "deleted"]
    assert (first["save_s"], first["stall_s"], first["bytes_per_s"]) == (2.0, None, 750_000_000)
    assert first["holds"] == ["draft", "paper"]
    assert second["roles"] == ["latest", "best val_loss", "best acc"]
    assert (second["own_bytes"], second["borrowed_bytes"], second["lenders"]) == (100, 900, [lender])
    assert (second["steps_per_s"], second["save_s"], second["created"]) == (2.0, None, "2026-01-31T12:00:05.000Z")
    assert third["deleted"] == {"created": "2026-01-31T12:00:14.000Z", "reason": "deleted by hand"}
    assert [lane["name"] for lane in made["lanes"]] == [
        "latest", "best by val_loss", "best by acc", "held", "every 10 steps", "best val_loss", "SIGTERM",
        "no reason given",
    ]  # fmt: skip
    assert [lane["saves"] for lane in made["lanes"]] == [[1], [1], [1], [0], [0], [0], [1], [2]]
    assert [(it["number"], it["host"], it["pid"], it["saves"]) for it in made["writers"]] == [
        (1, "left", 1001, 2),
        (2, "node2", 1002, 1),
    ]
    assert made["metrics"][0] == {"name": "val_loss", "mode": "min", "best": ids[1], "step": 20, "value": 2.0}
    summary = made["summary"]
    assert (summary["checkpoints"], summary["deleted"], summary["latest"], summary["step"]) == (2, 1, ids[1], 20)
    assert (summary["stored_bytes"], summary["borrowed_bytes"]) == (1_500_000_100, 900)
    json.dumps(made, allow_nan=False)


def test_an_empty_store_has_a_page(store_path: Path) -> None:
    fabricate(store_path, [])

    made = shown(store_path, "last(3)")
    assert (made["saves"], made["lanes"], made["metrics"], made["summary"]["latest"]) == ([], [], [], None)
    assert "nothing saved yet" in page(made).decode()


def test_no_store_is_an_error_and_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError), ckptstore.open(tmp_path / "nothing", read_only=True) as store:
        report(store, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_are_no_numbers(store_path: Path) -> None:
    fabricate(
        store_path, [Fake(1, metrics={"a": float("nan"), "b": float("-inf")}), Fake(2, metrics={"a": float("nan")})]
    )

    made = shown(store_path)
    assert made["saves"][0]["metrics"] == {"a": "nan", "b": "-inf"}
    assert made["metrics"][0] == {"name": "a", "mode": None, "best": None, "step": None, "value": None}
    assert made["metrics"][1]["value"] == "-inf"
    page(made)


def test_rare_reasons_share_a_row(store_path: Path) -> None:
    """However many there are, the timeline has few rows."""
    fabricate(store_path, [Fake(step, reasons=(f"because of {step}", "every 10 steps")) for step in range(60)])

    lanes = shown(store_path)["lanes"]
    assert len(lanes) == 15
    assert [lanes[1]["name"], len(lanes[2]["saves"])] == ["because of 0", 60]
    assert (lanes[-1]["name"], len(lanes[-1]["saves"])) == ("other reasons", 48)


def test_a_roll_back_is_a_branch(store_path: Path) -> None:
    fabricate(store_path, [Fake(10), Fake(20), Fake(30), Fake(20, 2), Fake(30, 2)])

    saves = shown(store_path)["saves"]
    assert [save["parent"] for save in saves] == [None, 0, 1, 0, 3]
    assert [save["abandoned"] for save in saves] == [False, True, True, False, False]


def test_what_was_reclaimed_is_still_a_part_of_the_history(store_path: Path) -> None:
    """Its tombstone has the id, and the id the step."""
    ids = fabricate(store_path, [Fake(10), Fake(20, deleted="not kept by last(1)"), Fake(30)])
    (store_path / "commits" / f"{ids[1]}.json").unlink()

    made = shown(store_path)
    assert [(save["status"], save["step"], save["created"]) for save in made["saves"]][1] == ("gone", 20, None)
    assert [save["parent"] for save in made["saves"]] == [None, 0, 1]
    assert (made["summary"]["deleted"], made["summary"]["gone"]) == (0, 1)
    page(made)


def test_damage_and_unfinished_saves_are_told(store_path: Path) -> None:
    ids = fabricate(store_path, [Fake(10), Fake(20)], holds={"bad": 0}, files=True)
    (store_path / "commits" / f"{ids[1]}.json").write_text("torn")
    (store_path / "holds" / "bad.json").write_text("torn")
    left = layout.new_id(7, 1, 40)
    size_file(store_path / layout.file_key(left, "model.safetensors"), 5000)

    made = shown(store_path, "last(1)")
    assert [save["status"] for save in made["saves"]] == ["there", "damaged"]
    assert [damage["id"] for damage in made["damaged"]] == [ids[1], None]
    (unfinished,) = made["unfinished"]
    assert (unfinished["id"], unfinished["files"], unfinished["stored_bytes"]) == (str(left), 1, 5000)
    assert not unfinished["condemned"]
    assert "no checkpoint is given up" in made["retention"]["problem"]
    text = page(made).decode()
    assert "2 records damaged" in text
    assert "can&#39;t be told" not in text
    assert "can't be told" in text


def test_what_rules_would_give_up(store_path: Path) -> None:
    ids = fabricate(store_path, [Fake(step) for step in (10, 20, 30)], holds={"paper": 0}, files=True)

    made = shown(store_path, "last(1)")
    assert made["retention"]["going"] == [ids[1]]
    assert (made["retention"]["staying"], made["retention"]["going_bytes"]) == (2, 1_500_000_000)
    assert [save["verdict"]["stays"] for save in made["saves"]] == [True, False, True]
    assert shown(store_path)["retention"] is None


def test_backups_and_how_far_they_are_behind(tmp_path: Path) -> None:
    first, second = tmp_path / "store", tmp_path / "copy"
    with ckptstore.open(first, backup=second) as store:
        store.save({"x": 1}, step=1, durable="backup")
    with ckptstore.open(first) as store:
        store.save({"x": 1}, step=2)
        made = document(survey(store))

    (backup,) = made["backups"]
    assert (backup["place"], backup["copied"], backup["behind"]) == (second.as_uri(), 1, 1)
    assert f"backup {second.as_uri()} lacks 1 checkpoint" in page(made).decode()


def test_verifications_the_newest_first(store_path: Path) -> None:
    with ckptstore.open(store_path) as store:
        store.save({"model": {"weight": torch.ones(1000)}}, step=1)
        store.verify()
        (data,) = store_path.glob("checkpoints/*/model.safetensors")
        data.write_bytes(bytes(data.stat().st_size))
        store.verify("latest")
        made = document(survey(store))

    assert [(one["ok"], one["damages"], one["id"] is None) for one in made["verifications"]] == [
        (False, 1, False),
        (True, 0, True),
    ]
    assert "the last verification found damage" in page(made).decode()


def test_what_lies_only_in_a_backup_is_told(tmp_path: Path) -> None:
    first, second = tmp_path / "store", tmp_path / "copy"
    keep = ckptstore.last(1)
    with ckptstore.open(first, backup=second, keep=keep) as store:
        store.save({"x": 1}, step=1, durable="backup")
        store.save({"x": 1}, step=2, durable="backup")
    with ckptstore.open(first, backup=second, read_only=True) as store:
        made = document(survey(store))

    assert [save["only_in"] for save in made["saves"] if save["status"] == "there"] == [second.as_uri(), None]


# -- what it reads ----------------------------------------------------------------------------------------------


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Each request to storage in memory: what was asked, and of what."""
    asked: list[tuple[str, str]] = []
    for name in ("list", "size", "read", "open_reader", "create", "delete", "replace"):
        real = getattr(MemoryStorage, name)

        def counted(
            self: MemoryStorage, key: str, *args: Any, _name: str = name, _real: Any = real, **more: Any
        ) -> Any:
            asked.append((_name, key))
            return _real(self, key, *args, **more)

        monkeypatch.setattr(MemoryStorage, name, counted)
    return asked


def test_only_small_records_are_read_and_each_once(requests: list[tuple[str, str]], tmp_path: Path) -> None:
    """No manifest, no part, no data; nothing is changed."""
    with ckptstore.open("memory://report") as store:
        for step in range(1, 7):
            store.save({"model": {"weight": torch.ones(1000)}}, step=step)
        store.delete("step:2")
        store.hold("step:3", "paper")
    requests.clear()
    with ckptstore.open("memory://report", read_only=True) as store:
        report(store, tmp_path / "report.html", keep=ckptstore.last(2))

    assert {name for name, _ in requests} == {"list", "read"}
    read = [key for name, key in requests if name == "read"]
    kinds = [key.partition("/")[0] for key in read]
    # The hold is asked for once more by whoever judges.
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"store.json": 2, "commits": 6, "trash": 1, "holds": 2, "writers": 1}
    assert len([key for name, key in requests if name == "list"]) <= 14


# -- hostile names ----------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(store_path: Path) -> dict[str, Any]:
    """A store where everything that can have a name has a hostile one."""
    name = HOSTILE[:100]
    fakes = [Fake(step, 1, step, None, {name: 1.0 + step}, {}, (HOSTILE, f"{HOSTILE} {step}")) for step in range(4)]
    fakes[1].deleted = HOSTILE
    ids = fabricate(store_path, fakes, hosts={1: name}, holds={"paper": 2}, files=True)
    (store_path / "commits" / f"{ids[0]}.json").write_text(HOSTILE)
    return shown(store_path, "last(1)")


def test_no_name_becomes_markup(hostile: dict[str, Any]) -> None:
    text = page(hostile).decode()

    assert "<img" not in text.replace("<image", "")
    assert "<script>window.hacked" not in text
    read = Reader(text)
    assert [tag for tag, _ in read.tags].count("script") == 3
    assert not [tag for tag, _ in read.tags if tag in ("img", "iframe", "object", "embed", "form")]
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert HOSTILE[:100] in "".join(read.words)
    assert "{{ 7*7 }}" in text
    assert "49'" not in text


def test_the_data_is_exactly_what_was_given(hostile: dict[str, Any]) -> None:
    """Escaped in a way that reading undoes, and nothing but the scripts' own ends end them."""
    data = Reader(page(hostile).decode()).scripts[0]

    assert not re.search("[<>&\u2028\u2029]", data)
    found = json.loads(data)
    columns = found.pop("saves")
    assert [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] == hostile["saves"]
    assert found == {name: value for name, value in hostile.items() if name != "saves"}


def test_all_characters_survive_in_a_script() -> None:
    text = "".join(map(chr, [*range(0x300), 0x2028, 0x2029, 0xFEFF, 0x1F600])) + "<!--<script></script>-->]]>"

    assert json.loads(in_script([text])) == [text]
    assert in_script(text).isascii()


def test_the_policy_lets_only_these_scripts_run(hostile: dict[str, Any]) -> None:
    read = Reader(page(hostile).decode())
    (policy,) = [found["content"] for _, found in read.tags if found.get("http-equiv") == "Content-Security-Policy"]

    assert policy is not None
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    wanted = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in read.scripts[1:]}
    assert set(rules["script-src"].split()) == {f"'sha256-{digest}'" for digest in wanted}
    assert rules["img-src"] == "data:"
    assert rules.keys() == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}


def sources() -> Iterator[tuple[str, str]]:
    for file in resources.files("ckptstore.tools").joinpath("reportpage").iterdir():
        yield file.name, file.read_text()


def test_our_scripts_make_no_markup_of_text_and_ask_for_nothing() -> None:
    found = dict(sources())

    assert len(found) == 8
    for name, text in found.items():
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "fetch(",
            "XMLHttp",
            "import(",
        ):
            assert word not in text, f"{name} uses {word}"
        assert not re.search(r"https?://", text), name
        assert "</script" not in text or name == "page.html"


# -- where it goes ----------------------------------------------------------------------------------------------


@pytest.fixture
def store(store_path: Path) -> Iterator[ckptstore.Store]:
    fabricate(store_path, run(5, rollbacks=0))
    with ckptstore.open(store_path, read_only=True) as opened:
        yield opened


def test_an_older_report_is_replaced_and_its_rights_are_those_of_any_file(
    store: ckptstore.Store, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    before = set(tmp_path.iterdir())
    made = report(store, path)
    first = path.read_bytes()
    assert report(store, str(path))["saves"] == made["saves"]

    assert MARK.encode() in first
    assert first.index(MARK.encode()) < 200
    assert set(tmp_path.iterdir()) - before == {path}
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_no_report_is_not_replaced(store: ckptstore.Store, tmp_path: Path) -> None:
    path = tmp_path / "thesis.html"
    path.write_text("<p>mine")

    with pytest.raises(ExistsError, match="no report of ckptstore"):
        report(store, path)
    assert path.read_text() == "<p>mine"
    report(store, path, force=True)
    assert MARK in path.read_text()


def test_a_folder_is_no_place_and_a_missing_one_neither(store: ckptstore.Store, tmp_path: Path) -> None:
    with pytest.raises(ExistsError, match="no file"):
        report(store, tmp_path, force=True)
    with pytest.raises(StorageError, match="there is no folder"):
        report(store, tmp_path / "missing" / "report.html")


def test_a_link_stays_a_link(store: ckptstore.Store, tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    report(store, tmp_path / "link.html")

    assert (tmp_path / "link.html").is_symlink()
    assert MARK in (tmp_path / "real.html").read_text()


def test_a_write_that_fails_leaves_the_old_report(
    store: ckptstore.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    report(store, path)
    before, there = path.read_bytes(), set(tmp_path.iterdir())
    failed = []

    def full(handle: int) -> None:
        failed.append(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"report\.html can't be written: No space left on device"):
        report(store, path)
    assert failed
    assert path.read_bytes() == before
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize("missing", ["plotly", "jinja2"])
def test_what_is_missing_is_named_with_the_way_out(
    store: ckptstore.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'ckptstore\[report\]'"):
        report(store, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_report_can_be_made_of_a_store_in_use(store_path: Path) -> None:
    """A look from the run itself claims nothing and disturbs nothing."""
    with ckptstore.open(store_path) as own:
        own.save({"x": 1}, step=1, metrics={"loss": 2.0})
        made = report(own, store_path.parent / "report.html")
        own.save({"x": 1}, step=2)
    assert [save["step"] for save in made["saves"]] == [1]
    assert datetime.fromisoformat(made["made"]) <= datetime.now(UTC)


def test_the_page_is_the_same_for_the_same_data(store: ckptstore.Store) -> None:
    made = document(survey(store))

    assert page(made) == page(json.loads(json.dumps(made)))
    assert reporting.problems(made) == []
