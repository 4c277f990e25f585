"""Train, kill inside a save, resume, flip a bit, resume, verify: ``python examples/demo.py runs/demo``.

Every claim is checked; the first that does not hold ends the demo with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import KillInsideSave, flip_bit, unfinished
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import ckptstore as cs

TRAINER = Path(__file__).with_name("train_gpt.py")
MARKER = ".ckptstore-demo"
TRIES = 5
TENSOR = "blocks.1.qkv.weight"
BLOCK_BYTES = 16 << 20


class ClaimError(Exception):
    """Something that the demo was to show is not so."""


@dataclass
class Demo:
    """One showing: where it happens, how large it is, and what it has proven so far."""

    folder: Path
    console: Console
    steps: int = 100
    save_every: int = 10
    model_flags: tuple[str, ...] = ()
    bench_flags: tuple[str, ...] = ("--size", "200MB")
    proven: list[tuple[str, float]] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def say(self, text: str = "", style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def prove(self, claim: bool, sentence: str) -> None:
        """Go on only if ``claim`` holds.

        Raises:
            ClaimError: it doesn't.
        """
        if not claim:
            raise ClaimError(f"NOT so: {sentence}")

    @contextmanager
    def act(self, title: str, result: str) -> Iterator[None]:
        """One part of the showing: its title first, and a row for the summary when it went well."""
        self.say(f"\n{title}", style="bold")
        begin = time.perf_counter()
        yield
        self.proven.append((result, time.perf_counter() - begin))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="everything is written here; an earlier demo's is cleared")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: half a minute")
    args = parser.parse_args()
    console = Console()
    try:
        clear(args.folder)
        show(quick_demo(args.folder, console) if args.quick else Demo(args.folder, console))
    except (ClaimError, cs.CheckpointError) as error:
        console.print(str(error), style="bold red", markup=False, soft_wrap=True)
        return 1
    return 0


def quick_demo(folder: Path, console: Console) -> Demo:
    return Demo(
        folder,
        console,
        steps=24,
        save_every=4,
        model_flags=("--layers", "2", "--context", "32", "--batch", "2"),
        bench_flags=("--size", "20MB", "--rounds", "1"),
    )


def show(demo: Demo) -> None:
    begin = time.perf_counter()
    demo.say(
        "This demo trains a small GPT on the sources of Python's standard library and saves it with ckptstore.\n"
        "It kills the training inside a save, resumes it, flips one bit on disk, resumes again, and checks each time\n"
        "that the losses are those of a run that nothing ever happened to, bit for bit. It takes a minute or two.\n"
        f"The trainer is {TRAINER.name}, a plain loop; everything is written to {demo.folder}."
    )
    reference = train_uninterrupted(demo)
    kill_inside_a_save(demo)
    resume(demo, reference)
    survive_a_flipped_bit(demo, reference)
    verify_and_clean_up(demo)
    look_and_export(demo)
    measure(demo)
    summarize(demo, time.perf_counter() - begin)


def clear(folder: Path) -> None:
    """Make ``folder`` empty and ours.

    Raises:
        ClaimError: it holds something that no demo wrote.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ClaimError(f"{folder} is no folder; name another one")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ClaimError(f"{folder} is not the demo's own; nothing was deleted, name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("examples/demo.py wrote this folder and clears it when it is run again\n")


# -- the acts ------------------------------------------------------------------------------------------------


def train_uninterrupted(demo: Demo) -> dict[int, str]:
    """Losses of the run that nothing happens to, in hex by step."""
    with demo.act("1. A run that nothing happens to, for comparison", f"{demo.steps} steps, never interrupted"):
        train(demo, "reference", demo.folder / "reference", save_every=demo.steps)
        losses = read_losses(demo, "reference")
        demo.prove(list(losses) == list(range(1, demo.steps + 1)), f"the reference run made {demo.steps} steps")
    return losses


def kill_inside_a_save(demo: Demo) -> None:
    with demo.act(
        f"2. The same run, saved every {demo.save_every} steps, and killed inside a save",
        "SIGKILL inside a save: older checkpoints untouched",
    ):
        for attempt in range(1, TRIES + 1):
            # Later attempts resume, so the next save is already one to hit.
            id = train_and_kill(demo, f"killed-{attempt}", after=2 if attempt == 1 else 0)
            if id in unfinished(demo.store):
                break
            demo.say(f"   The kill came after the commit of {id}; trying again at the next save.")
        else:
            raise ClaimError(f"NOT so: one of {TRIES} kills hit a running save")
        demo.say(f"   Killed with SIGKILL while {id} was being written. It left, without a commit record:")
        for file in sorted((demo.store / "checkpoints" / id).iterdir()):
            demo.say(f"     {file.name}  {file.stat().st_size:,} bytes")
        with cs.open(demo.store) as store:
            checkpoints = {c.id: c.step for c in store.checkpoints()}
        demo.say(f"   For the store it does not exist; there are checkpoints of the steps {[*checkpoints.values()]}.")
        demo.prove(bool(checkpoints) and id not in checkpoints, "only whole checkpoints are listed")


def resume(demo: Demo, reference: dict[int, str]) -> None:
    with demo.act("3. Resume in a new process", "resumed: every loss and the final state equal"):
        with cs.open(demo.store) as store:
            newest = store.resolve("latest")
        demo.say(f"   The newest good checkpoint is {newest.id}, step {newest.step}.")
        train(demo, "resumed", demo.store)
        compare(demo, reference, "resumed", after=newest.step)
        with cs.open(demo.store) as store, cs.open(demo.folder / "reference") as other:
            equal = same(comparable(store.load("latest")), comparable(other.load("latest")))
        demo.prove(equal, "the whole state at the end is that of the uninterrupted run")
        demo.say("   So does all state at the end: model, optimizer, scheduler, random numbers, progress.")


def survive_a_flipped_bit(demo: Demo, reference: dict[int, str]) -> None:
    with demo.act("4. Flip one bit on disk and resume again", "a flipped bit: noticed, the checkpoint before taken"):
        with cs.open(demo.store) as store:
            before, newest = store.checkpoints()[-2:]
        file = demo.store / "checkpoints" / newest.id / "model.safetensors"
        offset = flip_bit(file, TENSOR)
        demo.say(f"   Flipped one bit of {TENSOR}: the lowest of byte {offset:,} in {file.relative_to(demo.store)}.")
        output = train(demo, "after-damage", demo.store)
        block = f"block {offset // BLOCK_BYTES} of checkpoints/{newest.id}/{file.name}"
        demo.prove("FallbackWarning" in output and block in output, f"the trainer was warned of {block}")
        compare(demo, reference, "after-damage", after=before.step)


def verify_and_clean_up(demo: Demo) -> None:
    with demo.act("5. Check every byte, from the shell", "verify: damage named; good after delete and prune"):
        with cs.open(demo.store) as store:
            damaged = store.verify().damages
        demo.prove(len(damaged) == 1, "verify finds the flipped bit and nothing else")
        demo.prove(f"model/{TENSOR}" in damaged[0].tensors, f"verify names the damaged tensor {TENSOR}")
        status, output = command(demo, "verify", str(demo.store))
        demo.prove(status == 1 and damaged[0].key in output, "the command verify names the file and exits with 1")
        demo.say("   The damaged checkpoint is deleted by name, and what the kill left is collected:")
        status, _ = command(demo, "delete", str(demo.store), str(damaged[0].id), "--yes")
        demo.prove(status == 0, "the damaged checkpoint can be deleted")
        status, _ = command(demo, "prune", str(demo.store))
        demo.prove(status == 0 and not unfinished(demo.store), "prune collects what the kill left")
        status, _ = command(demo, "verify", str(demo.store))
        demo.prove(status == 0, "verify finds every byte of every checkpoint good")


def look_and_export(demo: Demo) -> None:
    with demo.act("6. Compare, export, and look at all of it", "equal to the reference; torch.load reads its export"):
        store, reference, file = str(demo.store), str(demo.folder / "reference"), demo.folder / "latest.pt"
        status, _ = command(
            demo, "diff", store, "latest", "latest", "--with", reference, "--only", "model/*", "--exit-code"
        )
        demo.prove(status == 0, "the weights are bit for bit those of the run that nothing happened to")
        status, _ = command(demo, "export", store, "latest", "--to", "torch", "-o", str(file))
        demo.prove(status == 0, "the latest checkpoint can be exported")
        exported = torch.load(file, weights_only=True)["model"]
        with cs.open(demo.store) as opened:
            demo.prove(
                same(exported, opened.load("latest", only=["model/*"])["model"]), "torch.load reads what was saved"
            )
        page = demo.folder / "report.html"
        status, _ = command(demo, "report", store, "-o", str(page), "--keep", "last(3) | best('loss')")
        demo.prove(status == 0, "the report can be written")
        demo.say(f"   {page} shows all of it in a browser, without network.")


def measure(demo: Demo) -> None:
    with demo.act("7. How fast this disk takes and gives a checkpoint", "throughput beside torch.save and others"):
        status, _ = command(demo, "bench", str(demo.folder), *demo.bench_flags)
        demo.prove(status == 0, "the benchmark runs")


def summarize(demo: Demo, seconds: float) -> None:
    table = Table(title="What this demo showed", title_justify="left", title_style="bold")
    table.add_column("shown and checked")
    table.add_column("seconds", justify="right")
    for claim, duration in demo.proven:
        table.add_row(claim, f"{duration:.1f}")
    table.add_row("in all", f"{seconds:.1f}", style="bold")
    demo.say()
    demo.console.print(table)
    script = os.path.relpath(Path(sys.executable).with_name("ckptstore"))
    if script.startswith(os.pardir):
        script = os.path.abspath(script)
    demo.say("Try next:")
    demo.say(f"  {script} ls {demo.store}       what is there?")
    demo.say(f"  {script} show {demo.store}     what does the newest one hold?")
    demo.say(f"  {script} verify {demo.store}   is every byte as it was saved?")
    demo.say("  make test   runs the tests; README.md says how to use ckptstore in your own training loop.")


# -- running the trainer -------------------------------------------------------------------------------------


def train(demo: Demo, name: str, store: Path, *, save_every: int | None = None) -> str:
    """Run the trainer to its end and return what it printed; its losses go to ``<name>.jsonl``.

    Raises:
        ClaimError: it failed.
    """
    with start(demo, name, store, save_every or demo.save_every) as process:
        follow(demo, process, name)
    demo.prove(process.returncode == 0, f"the trainer ends well (it exited with {process.returncode})")
    return (demo.folder / f"{name}.txt").read_text()


def train_and_kill(demo: Demo, name: str, *, after: int) -> str:
    """Run the trainer, kill it inside a save and return the id that was being saved.

    Raises:
        ClaimError: it ended before.
    """
    with start(demo, name, demo.store, demo.save_every) as process:
        id = follow(demo, process, name, KillInsideSave(process, demo.store, after=after))
    if id is None:
        raise ClaimError("NOT so: the trainer was caught inside a save; it ended before")
    demo.prove(process.returncode == -signal.SIGKILL, "the trainer was killed with SIGKILL")
    return id


@contextmanager
def start(demo: Demo, name: str, store: Path, save_every: int) -> Iterator[subprocess.Popen[bytes]]:
    """The trainer in a process of its own, which never outlives the demo."""
    (demo.folder / f"{name}.jsonl").touch()
    where = [f"--store={store}", f"--log={demo.folder / name}.jsonl"]
    length = [f"--steps={demo.steps}", f"--save-every={save_every}"]
    with (demo.folder / f"{name}.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(TRAINER), *where, *length, *demo.model_flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            # Threads that wait spin otherwise: measured 3 times slower where other work shares the cores.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def follow(
    demo: Demo, process: subprocess.Popen[bytes], name: str, interrupt: Callable[[], str | None] | None = None
) -> str | None:
    """Show the training until it ends, or until ``interrupt`` gives a text, which is returned."""
    printed, logged = Lines(demo.folder / f"{name}.txt"), Lines(demo.folder / f"{name}.jsonl")
    caught = None
    with step_bar(demo) as show_step:
        while True:
            ended = process.poll() is not None
            if interrupt is not None:
                caught = interrupt()
            for line in printed.new():
                demo.say(f"   | {line}")
            for line in logged.new():
                show_step(json.loads(line))
            if ended or caught is not None:
                return caught
            # A save takes a few dozen milliseconds: to hit one, it must be looked for often.
            time.sleep(0.05 if interrupt is None else 0.0005)


class Lines:
    """A file that another process writes, line by line."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self._rest = path, 0, b""

    def new(self) -> list[str]:
        """The whole lines that were added since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        self._read += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        return [line.decode() for line in lines]


@contextmanager
def step_bar(demo: Demo) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar on a terminal, which takes the log's records; nothing elsewhere."""
    loss = TextColumn("{task.description}")
    columns = (TextColumn("   step"), BarColumn(), MofNCompleteColumn(), loss, TimeElapsedColumn())
    with Progress(*columns, console=demo.console, transient=True, disable=not demo.console.is_terminal) as bar:
        task = bar.add_task("starting", total=demo.steps)
        yield lambda record: bar.update(task, completed=record["step"], description=f"loss {record['loss']:.3f}")


def read_losses(demo: Demo, name: str) -> dict[int, str]:
    """The losses that the trainer logged, in hex by step, oldest first."""
    lines = (demo.folder / f"{name}.jsonl").read_text().splitlines()
    return {record["step"]: record["hex"] for record in map(json.loads, lines)}


def compare(demo: Demo, reference: dict[int, str], name: str, *, after: int) -> None:
    """Prove that the run ``name`` went on after step ``after`` with the reference's losses; show three of them."""
    losses = read_losses(demo, name)
    demo.prove(list(losses) == list(range(after + 1, demo.steps + 1)), f"training went on after step {after}")
    demo.say(f"   {'step':>6}   {'loss, uninterrupted':<24}{'loss, this run':<24}")
    for step in (after + 1, (after + 1 + demo.steps) // 2, demo.steps):
        verdict = "equal" if losses[step] == reference[step] else "DIFFERENT"
        demo.say(f"   {step:>6}   {reference[step]:<24}{losses[step]:<24}{verdict}")
    wrong = [step for step in losses if losses[step] != reference[step]]
    demo.prove(not wrong, f"every loss equals the uninterrupted run's; differing: {wrong}")
    demo.say(f"   All {len(losses)} losses from step {after + 1} on equal those of the uninterrupted run, bit for bit.")


def comparable(state: dict[str, Any]) -> dict[str, Any]:
    """A loaded state without what two runs never share: how long they took, and when they saved."""
    run = state["trainer"]
    progress = {name: value for name, value in run["progress"].items() if name != "elapsed_s"}
    return {**state, "trainer": {"rng": run["rng"], "progress": progress}}


def same(a: Any, b: Any) -> bool:
    """Whether two loaded states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, torch.Generator):
        return isinstance(b, torch.Generator) and torch.equal(a.get_state(), b.get_state())
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor``: as numbers, 0.0 and -0.0 would be equal."""
    return tensor.reshape(-1).view(torch.uint8)


def command(demo: Demo, *arguments: str) -> tuple[int, str]:
    """Run ``ckptstore`` as from the shell, show what it prints, and return its exit code and output."""
    demo.say(f"   $ ckptstore {' '.join(arguments)}")
    ran = subprocess.run(
        [sys.executable, "-m", "ckptstore.cli", *arguments], capture_output=True, text=True, check=False
    )
    output = ran.stdout + ran.stderr
    for line in output.splitlines():
        demo.say(f"   | {line}")
    return ran.returncode, output


if __name__ == "__main__":
    sys.exit(main())
