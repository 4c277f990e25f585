"""The command ``ckptstore``: finds a subcommand's module when it is called, and turns its end into an exit code."""

from __future__ import annotations

import importlib
import os
from typing import Any

import click

from ckptstore import __version__
from ckptstore.cli.outcome import reported
from ckptstore.near import meant

_HOMES = {
    "init": "init",
    "plan": "plan",
    "ls": "ls",
    "show": "show",
    "report": "report",
    "watch": "watch",
    "verify": "verify",
    "du": "du",
    "bisect": "bisect",
    "copy": "copy",
    "import": "import_",
    "export": "export",
    "average": "average",
    "diff": "diff",
    "hold": "hold",
    "release": "hold",
    "delete": "delete",
    "undelete": "delete",
    "rollback": "rollback",
    "prune": "prune",
    "signal": "signal",
    "bench": "bench",
    "doctor": "doctor",
    "completion": "completion",
}
"""The module of each command, in the order in which the help lists them."""


class CommandGroup(click.Group):
    """Imports a command's module on use, and reports every error as one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _HOMES:
            return None
        # Python has the word import for itself.
        name = "import_" if cmd_name == "import" else cmd_name
        command = getattr(importlib.import_module(f"ckptstore.cli.{_HOMES[cmd_name]}"), name)
        assert isinstance(command, click.Command)
        if ctx.resilient_parsing:
            from ckptstore.cli.completing import completed

            return completed(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _HOMES and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"no such command {name!r:.100}{meant(name, _HOMES)}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Looked up here, because a script that misuses an option shall read its error as JSON too.
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            ctx.color = False
        # What stands behind "--" is another command's.
        ctx.meta["json"] = "--json" in (args[: args.index("--")] if "--" in args else args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with reported(as_json=ctx.meta["json"]):
            return super().invoke(ctx)


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Completion in the shell: eval "$(ckptstore completion bash)", or zsh, or fish.',
)
@click.version_option(__version__, prog_name="ckptstore")
def cli() -> None:
    """Look at, prove and keep the checkpoints of training runs.

    URL is a path, file:///path, s3://bucket/prefix, or any other that fsspec knows: gs://, az://, sftp://, https://.
    Looking never disturbs a running job.

    SELECTOR names one checkpoint: latest, best:METRIC (or best:METRIC:max), step:1000, epoch:3,
    milestone:1B, a hold's name, or the beginning of an id.

    \b
      ckptstore ls runs/gpt2                 what is there?
      ckptstore show runs/gpt2 best:val_loss what does the best one hold?
      ckptstore verify runs/gpt2             is every byte as it was saved?

    \b
    Exit codes, the same for all commands:
      0    good
      1    bad news: damage found, no such checkpoint, held and so not deleted
      2    wrong use, no store at URL, or the storage failed
      130  interrupted

    With --json the answer goes to stdout as one JSON document; progress, warnings and errors go to stderr.
    An error is then also on stdout, as {"error": {"code": ..., "message": ...}}.
    """


def main() -> None:
    """Run the command line of this process."""
    if os.environ.get("_CKPTSTORE_COMPLETE"):
        from ckptstore.cli.completing import register

        register()
    cli(prog_name="ckptstore")
