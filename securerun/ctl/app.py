"""securerunctl: what the people around a job ask for. One module a command, loaded when it is asked for."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="securerunctl",
    help="Look at and look after the runs of securerun.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback()
def _securerunctl() -> None:
    """With one command only, Typer would make it the program itself."""


@app.command(context_settings=_PASS_ON)
def plan(context: typer.Context) -> None:
    """Print the plan of a launch and start nothing: securerunctl plan -- [OPTIONS] SCRIPT [ARGUMENTS]."""
    from securerun.ctl.plan import print_plan

    print_plan(context.args)


def main() -> None:
    """The command securerunctl."""
    app()
