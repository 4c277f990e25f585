"""``ckptstore completion``: the script by which a shell completes commands, options and selectors."""

from __future__ import annotations

import click

from ckptstore.cli.terminal import emit, json_option


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="bash|zsh|fish")
@json_option
@click.pass_context
def completion(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the script that completes ckptstore's words in a shell.

    Commands, options and their values; and of a store on this machine what selects a checkpoint: latest, best: with
    the metrics that there are, holds, steps and ids. No network is asked.

    For one shell evaluate it; for all to come put it where the shell looks for such scripts.

    \b
      ckptstore completion bash > ~/.local/share/bash-completion/completions/ckptstore
      ckptstore completion zsh > "${fpath[1]}/_ckptstore"
      ckptstore completion fish > ~/.config/fish/completions/ckptstore.fish
      eval "$(ckptstore completion bash)"

    Exit codes: 0 printed; 2 no such shell.
    """
    from click.shell_completion import get_completion_class

    from ckptstore.cli.completing import register

    register()
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "ckptstore", "_CKPTSTORE_COMPLETE").source()
    if as_json:
        emit({"shell": shell, "script": script})
    else:
        click.echo(script, nl=False)
