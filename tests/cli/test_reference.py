"""The README's reference of the command line: every command, argument and option, and none that isn't there."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from ckptstore.cli.main import cli

README = Path(__file__).parents[2] / "README.md"
EVERYWHERE = {"--json", "--help", "--version"}
"""Stand once for all commands, below the table."""


def section() -> str:
    """What stands under "Command line"."""
    return README.read_text().partition("\n### Command line\n")[2].partition("\n##")[0]


def rows() -> dict[str, tuple[str, str]]:
    """Arguments and options of each command, as the table has them.

    A row reads: ``| `name ARGUMENTS` | what it does | `--flag` `--option VALUE` |``.
    """
    found = {}
    for line in section().splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and (call := re.fullmatch(r"`([a-z-]+)(?: ([^`]+))?`", cells[0])) and call[1] != "ckptstore":
            assert call[1] not in found, f"{call[1]} stands twice in the table"
            assert cells[1], f"the table doesn't say what {call[1]} does"
            found[call[1]] = (call[2] or "", cells[2])
    return found


def commands() -> dict[str, click.Command]:
    with click.Context(cli) as ctx:
        found = {name: cli.get_command(ctx, name) for name in cli.list_commands(ctx)}
    return {name: command for name, command in found.items() if command is not None}


def written(option: click.Option) -> str:
    """An option by its long name, with that of its opposite: ``--record/--no-record``."""
    return "/".join([max(option.opts, key=len), *option.secondary_opts])


def test_the_table_has_all_commands_and_no_other() -> None:
    assert list(rows()) == list(commands())


@pytest.mark.parametrize("name", commands())
def test_a_row_has_all_arguments_and_options(name: str) -> None:
    command = commands()[name]
    arguments, options = rows()[name]
    ctx = click.Context(command, info_name=name)
    assert arguments == " ".join(p.make_metavar(ctx) for p in command.params if isinstance(p, click.Argument))
    words = re.findall(r"`([^`]+)`", options)
    known = {written(p): p for p in command.params if isinstance(p, click.Option)}
    assert [word.split()[0] for word in words] == [option for option in known if option not in EVERYWHERE]
    for word in words:
        flag = known[word.split()[0]].is_flag
        assert (len(word.split()) == 1) is flag, f"{word}: {'takes no' if flag else 'lacks its'} value"


def test_what_all_have_in_common_is_told() -> None:
    below = section().partition("Each takes")[2]
    assert all(option in below for option in EVERYWHERE)


@pytest.mark.parametrize("name", commands())
def test_help_is_a_page(name: str) -> None:
    """What it does in a sentence that isn't cut, an example that is a call, exit codes, and every option explained."""
    command = commands()[name]
    text = command.help or ""
    summary, _, more = text.partition("\n\n")
    assert summary.endswith(".")
    blocks = [block.partition("\n\n")[0] for block in text.split("\b\n")[1:]]
    assert any(re.search(rf"^\s*ckptstore {name}\b", block, re.MULTILINE) for block in blocks), "no example"
    assert re.search(r"Exit codes: 0 [^.]+; 2 [^.]+\.$", more.replace("\n", " ").rstrip()), "no exit codes at the end"
    for param in command.params:
        if isinstance(param, click.Option):
            assert (param.help or "").endswith("."), f"{param.opts[0]} isn't explained"
            metavar = param.make_metavar(click.Context(command))
            assert param.is_flag or not re.fullmatch("TEXT|FLOAT|INTEGER.*|[A-Z]+_[A-Z]+", metavar), (
                f"{metavar} tells nothing"
            )
