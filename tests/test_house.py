"""The rules of the house: who may import whom, one home for each foreign library, small files, no pickle."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptstore

ROOT = Path(ckptstore.__file__).parent

# A module may import what stands on its own row or above; the pillars share a row and don't know each other.
ROWS = [
    {"errors"},
    {"near", "units"},
    {"storage", "format", "state", "policy"},
    {"engine"},
    {"maintenance"},
    {"view"},
    {"upkeep"},
    {"store"},
    {"opening"},
    {"config"},
    {"trainer", "tools"},
    {"integrations", "cli"},
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}

HOMES = {
    "torch": {"state", "trainer", "integrations", "tools"},
    "pydantic": {"format/records.py", "format/schema.py", "config"},
    "ruamel": {"config"},
    "blake3": {"format/digest.py"},
    "hashlib": {"format/digest.py"},
    "zstandard": {"format/codecs.py"},
    "safetensors": {"tools"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "botocore": {"storage"},
    "aiohttp": {"storage"},
    "tenacity": {"storage", "maintenance"},
    "plotly": {"tools/report.py"},
    "jinja2": {"tools/report.py"},
    "matplotlib": {"tools/planpicture.py", "tools/diffpicture.py"},
    "apprise": {"integrations/apprise.py"},
    "prometheus_client": {"integrations/prometheus.py"},
    "accelerate": {"integrations/accelerate.py", "integrations/huggingface_run.py"},
    "lightning": {"integrations/lightning_io.py"},
    "pytorch_lightning": {"integrations/lightning_io.py"},
    "transformers": {"integrations/huggingface.py", "integrations/huggingface_run.py"},
    "click": {"cli"},
    "rich": {"cli"},
}

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def home(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    """No module imports from a row below its own, or from a neighbour pillar."""
    own = home(path)
    if own == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "ckptstore" or len(parts) == 1 or parts[1] not in RANK:
            continue
        other = parts[1]
        assert other == own or RANK[other] < RANK[own], f"{path.name} ({own}) imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_foreign_libraries_have_one_home(path: Path) -> None:
    """torch lives in state/, zstandard in format/codecs.py, and so on."""
    relative = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or relative in homes or relative.split("/")[0] in homes, f"{relative} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_was_loaded_can_run(path: Path) -> None:
    """No pickle, marshal, yaml, eval, exec or compile anywhere in the library."""
    for name in imports(path):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{path.name} imports {name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{path.name}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno} loads pickles"
            assert called not in {"np.load", "numpy.load", "collections.namedtuple"}, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    """At most 500 lines a file and 60 a function."""
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.body:
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert lines <= 60, f"{path.name}:{node.lineno} {node.name} has {lines} lines"


def test_interrupted_creations_have_one_name() -> None:
    """The storage and the format, which don't know each other, mean the same prefix."""
    from ckptstore.format import layout
    from ckptstore.storage import local

    assert local.TEMPORARY == layout.TEMPORARY


def test_public_names() -> None:
    """The public names are these, each importable from the top and documented."""
    expected = """RNG Checkpoint CheckpointError CommitUnknownError Damage DamageWarning ExistsError FallbackWarning
        FormatError IntegrityError Loaded NoCheckpointError NotFoundError PruneReport SaveFailedError
        StaleWriterError StateError StorageError StorageFullError Store UnavailableError VerifyReport __version__
        Checkpointer Failed Listener Parts Resumed Saved Stats
        SaveHandle TornReadWarning fence open register_type CopyReport Lag at every epoch_plan on_best milestones
        budget last best epochs every_kept within tagged at_most Length Progress Past Costs foresee Plan Verdict
        Judgement DivergedError diverged Verification Usage usage Bisection bisect
        ImportReport Imported import_from report ExportReport export
        average greedy_soup diff Diff examine TensorStats"""
    assert sorted(ckptstore.__all__) == sorted(expected.split())
    for name in ckptstore.__all__:
        thing = getattr(ckptstore, name)
        assert name == "__version__" or thing.__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ckptstore.nonsense  # type: ignore[attr-defined]


def test_looking_needs_no_torch() -> None:
    """Opening, listing and verifying import no torch, and the package itself imports nothing heavy."""
    code = (
        "import sys, ckptstore\n"
        "assert not {'numpy', 'pydantic', 'torch', 'rich'} & set(sys.modules), 'import ckptstore is heavy'\n"
        "store = ckptstore.open('memory://house')\n"
        "assert store.checkpoints() == [] and not {'torch', 'fsspec'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_saving_without_torch_says_what_to_install(tmp_path: Path) -> None:
    """Where torch is missing, saving and loading name it and the way out."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here')")
    code = "import ckptstore; ckptstore.open('memory://house').save({}, step=1)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT.parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'ckptstore[torch]'" in done.stderr


def test_every_module_imports() -> None:
    """No module needs another to be imported first."""
    for path in modules():
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
