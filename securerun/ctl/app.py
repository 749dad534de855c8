"""securerunctl: what the people around a job ask for. One module a command, loaded when it is asked for."""

from __future__ import annotations

import io
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from securerun.errors import PrivilegeError, SecurerunError

app = typer.Typer(
    name="securerunctl",
    help="Look at and look after the runs of securerun.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

setup = typer.Typer(help="Print what lets ordinary users have their jobs guarded.", no_args_is_help=True)
app.add_typer(setup, name="setup")


class _Unparsed(TyperCommand):
    """A command that reads its arguments itself: all of them, `--` too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, or typer's own copy of it
        ctx.args = args
        return args


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(
    context_settings=_PASS_ON,
    short_help="Print the plan of a launch and start nothing.",
    options_metavar="-- [OPTIONS] SCRIPT [ARGUMENTS]",
)
def plan(context: typer.Context) -> None:
    """Print the plan of a launch and start nothing: securerunctl plan -- [OPTIONS] SCRIPT [ARGUMENTS]."""
    from securerun.ctl.plan import print_plan

    print_plan(context.args)


@app.command(
    "exec",
    cls=_Unparsed,
    short_help="Run any command with its network closed to strangers.",
    context_settings={"help_option_names": []},
)
def execute(context: typer.Context) -> None:
    """Run any command under a lease: securerunctl exec [OPTIONS] -- COMMAND [ARGUMENTS]."""
    from securerun.ctl.exec import execute

    execute(context.args)


@app.command(short_help="Show the runs of this host: guarding, draining or stale.")
def status(
    as_json: bool = typer.Option(False, "--json", help="Print JSON for programs; with --watch, a line each time."),
    watch: bool = typer.Option(False, "--watch", help="Print again every second, until Ctrl-C."),
) -> None:
    """Show the runs of this host, the layers that guard them, and who was turned away.

    A run is guarding while its job runs, draining while something of it is left, and stale when its guard is gone.
    """
    from securerun.ctl.status import show

    show(as_json=as_json, watch=watch)


@app.command(short_help="Remove what dead runs left on this host.")
def clean(
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be removed, and change nothing."),
) -> None:
    """Remove what runs left whose launcher and guard were both killed: rules, empty cgroups, records.

    What lives is never touched. Status 1 when something could not be removed.
    """
    from securerun.ctl.clean import clean_host

    raise typer.Exit(clean_host(dry_run=dry_run))


@setup.command(short_help="Print the sudoers rule.")
def sudoers(
    group: str = typer.Option("securerun", help="The group whose members may have guards."),
    user: str = typer.Option("", help="One user instead of a group."),
) -> None:
    """Print the rule for /etc/sudoers.d/securerun, checked by visudo: members of a group may have guards by sudo."""
    from securerun.ctl.setup import print_sudoers

    print_sudoers(group, user or None)


@setup.command(short_help="Print the systemd units.")
def systemd(group: str = typer.Option("securerun", help="The group whose members may connect.")) -> None:
    """Print a socket unit and a service unit: systemd starts a guard for each member of a group who connects."""
    from securerun.ctl.setup import print_systemd

    print_systemd(group)


def main() -> None:
    """The command securerunctl."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no name or command is lost to a terminal's ASCII
    try:
        app()
    except SecurerunError as error:
        _give_up(str(error), error.status)
    except PermissionError as error:
        _give_up(f"{error}; run as root", PrivilegeError.status)
    except OSError as error:
        _give_up(str(error), SecurerunError.status)


def _give_up(message: str, status: int) -> NoReturn:
    typer.echo(f"securerunctl: {message}", err=True)
    sys.exit(status)
