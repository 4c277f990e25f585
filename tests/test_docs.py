"""What the documents claim is executed: README's Python, docstring examples, its commands, the generated schema."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import ckptstore
from ckptstore.format import schema

ROOT = Path(ckptstore.__file__).parent
REPOSITORY = ROOT.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path.name != "__main__.py"
)


# What Lightning warns of itself, and DCP where there is no group.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block in the README runs as it stands."""
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_readme_has_its_examples() -> None:
    """The ten-line example and the resume loop are there."""
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    """Examples in docstrings give what they show."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_schema_is_the_committed_one() -> None:
    """The models and the committed JSON Schema say the same; `make schema` writes it."""
    assert schema.PATH.read_text() == schema.generate()


def test_links_lead_somewhere() -> None:
    """Relative links of README and CONTRIBUTING name files that exist."""
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (REPOSITORY / document).read_text()):
            assert (REPOSITORY / target).exists(), f"{document} links to {target}"


def test_changelog_has_this_version() -> None:
    """The version that is built stands in the changelog."""
    assert f"## {ckptstore.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
