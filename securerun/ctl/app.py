"""securerunctl: what the people around a job ask for. One module a command, loaded when it is asked for."""

from __future__ import annotations

import io
import sys
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from securerun import console
from securerun.errors import PrivilegeError, SecurerunError, UsageError
from securerun.linux import capabilities

app = typer.Typer(
    name="securerunctl",
    help="Look at and look after the runs of securerun.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes as long as all the rest of a start
)

setup = typer.Typer(
    help="What is installed once: ways to a guard, completion, a torchrun that is securerun.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(setup, name="setup")


class _Unparsed(TyperCommand):
    """A command that reads its arguments itself: all of them, `--` too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, or typer's own copy of it
        ctx.args = args
        return args


# Our own options end where those of the launch begin, with `--` between or without.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


class PlanFormat(str, Enum):
    """The forms of a plan."""

    TABLE, JSON, IPTABLES, NFT, SH = "table", "json", "iptables", "nft", "sh"


# Not as Annotated, which typer does not see in Python 3.9 where annotations are texts.
_PLAN_FORMAT = typer.Option(PlanFormat.TABLE, "--format", help="For people, or to install.")


@app.command(
    context_settings=_PASS_ON,
    short_help="Print the plan of a launch and start nothing.",
    options_metavar="[--format FORMAT] -- [OPTIONS] SCRIPT [ARGUMENTS]",
)
def plan(
    context: typer.Context,
    form: PlanFormat = _PLAN_FORMAT,
) -> None:
    """Print the plan of a launch and start nothing. After `--` come securerun's own options and the script.

    json has the policy and where each part of it comes from. iptables and nft are what the backends load. sh is a
    script for whoever has to close the ports by hand: `sh FILE up` before the job, `sh FILE down` after it.
    """
    from securerun.ctl.plan import print_plan

    print_plan(context.args, form.value)


class MatrixLanguage(str, Enum):
    """The languages of a matrix."""

    EN, ZH = "en", "zh"


class MatrixFormat(str, Enum):
    """The forms of a matrix."""

    TABLE, MD, CSV, JSON = "table", "md", "csv", "json"


_LANGUAGE = typer.Option(MatrixLanguage.EN, "--lang", help="The language of its words.")
_MATRIX_FORMAT = typer.Option(MatrixFormat.TABLE, "--format", help="For a terminal, a document, a sheet or a program.")


@app.command(
    context_settings=_PASS_ON,
    short_help="Print the communication matrix of a launch, or of a job that runs.",
    options_metavar="[OPTIONS] [-- [OPTIONS] SCRIPT [ARGUMENTS]]",
)
def matrix(
    context: typer.Context,
    language: MatrixLanguage = _LANGUAGE,
    form: MatrixFormat = _MATRIX_FORMAT,
    run: str = typer.Option("", "--run", help="The run to look at, where several jobs run here.", metavar="RUN_ID"),
) -> None:
    """Print the communication matrix with the columns of Ascend's security notes: who connects to which port of whom.

    After `--` come securerun's own options and the script of a launch. Without them it is that of the job that runs
    on this host, with every port that its processes listen on now.
    """
    from securerun.ctl.matrix import print_matrix

    print_matrix(context.args, run or None, language.value, form.value)


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


@app.command(short_help="Print the runs of this host as numbers, for Prometheus.")
def metrics(
    output: str = typer.Option(
        "", "--output", metavar="FILE", help="Write them to a file for node_exporter's textfile collector."
    ),
) -> None:
    """Print Prometheus' text: runs by state, their layers, packets turned away, guards that died, and findings.

    FILE ends with .prom, is readable by all, and changes all at once. `setup systemd` has a timer that writes it.
    """
    from securerun.ctl.metrics import write

    write(output or None)


@app.command(short_help="Remove what dead runs left on this host.")
def clean(
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be removed, and change nothing."),
) -> None:
    """Remove what runs left whose launcher and guard were both killed: rules, empty cgroups, records.

    What lives is never touched. Status 1 when something could not be removed.
    """
    from securerun.ctl.clean import clean_host

    raise typer.Exit(clean_host(dry_run=dry_run))


_PATHS = typer.Argument(None, metavar="PATH...", help="Files and directories to look at.", show_default=False)
_OWNERS = typer.Option([], "--owner", metavar="USER", help="A user whose files are in order here too.")


@app.command(short_help="Show what is more open than the permission table allows, and fix it.")
def audit(
    paths: list[str] = _PATHS,
    given: str = typer.Option("", "--as", metavar="KIND", help="What all of it is; by default names tell."),
    fix: bool = typer.Option(False, "--fix", help="Take away the bits that are too many, after showing them."),
    yes: bool = typer.Option(False, "--yes", help="With --fix: do not ask on a terminal."),
    undo: str = typer.Option("", "--undo", metavar="LOG", help="Give back the modes that a --fix changed."),
    undo_log: str = typer.Option(
        "", "--undo-log", metavar="FILE", help="Where --fix writes its log; else it says where."
    ),
    owner: list[str] = _OWNERS,
    one_file_system: bool = typer.Option(False, "--one-file-system", help="Do not go into other file systems."),
    kinds: str = typer.Option(
        "", "--kinds", metavar="FILE", help="Patterns and kinds that go before the built-in ones."
    ),
    print_kinds: bool = typer.Option(False, "--print-kinds", help="Print the built-in patterns and kinds."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON for programs."),
) -> None:
    """Show what is more open than the permission table allows, and what else lets others into a tree.

    KIND is home, program, config, log, archived-log, debug, temp, upgrade, data, key or crypto-tool.

    Status 0 when nothing was found or --fix mended all of it; 1 when something is left.
    """
    from securerun.ctl import audit as command

    if print_kinds:
        command.print_kinds()
        return
    if undo:
        if paths or fix:
            raise UsageError("--undo takes back what its log says; leave PATH and --fix out")
        raise typer.Exit(command.undo(Path(undo), as_json=as_json))
    request = command.Request(
        paths=tuple(map(Path, paths or ())),
        given=command.kind_of(given) if given else None,
        fix=fix,
        yes=yes,
        as_json=as_json,
        owners=tuple(owner),
        kinds=Path(kinds) if kinds else None,
        one_file_system=one_file_system,
        undo_log=Path(undo_log) if undo_log else None,
    )
    raise typer.Exit(command.audit(request))


@app.command(short_help="Look for what to fix on this host, and for what securerun can do here.")
def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON for programs.")) -> None:
    """Look for what is to be mended on this host, and for what securerun can do here; each with the command that helps.

    Changes nothing. Status 0 when there is nothing to mend, 1 when there is.
    """
    from securerun.ctl.doctor import examine

    raise typer.Exit(examine(as_json=as_json))


@setup.command(short_help="Print the sudoers rule.")
def sudoers(
    group: str = typer.Option("securerun", help="The group whose members may have guards."),
    user: str = typer.Option("", help="One user instead of a group."),
) -> None:
    """Print the rule for /etc/sudoers.d/securerun, checked by visudo: members of a group may have guards by sudo."""
    from securerun.ctl.setup import print_sudoers

    print_sudoers(group, user or None)


@setup.command(short_help="Print the systemd units.")
def systemd(
    group: str = typer.Option("securerun", help="The group whose members may connect."),
    textfiles: str = typer.Option(
        "/var/lib/prometheus/node-exporter", metavar="DIR", help="Where node_exporter looks for files of metrics."
    ),
) -> None:
    """Print a socket unit and a service unit: systemd starts a guard for each member of a group who connects.

    And a service unit and a timer unit, by which `securerunctl metrics` is written to DIR/securerun.prom each minute.
    """
    from securerun.ctl.setup import print_systemd

    print_systemd(group, textfiles)


@setup.command(short_help="Print what has Slurm guard its jobs.")
def slurm(
    part: str = typer.Argument("", metavar="[PART]", help="prolog, epilog or task-prolog; none for slurm.conf."),
    peers: str = typer.Option("", help="Who may connect to every job besides its nodes: login nodes. For prolog."),
    ports: str = typer.Option("", help="Ports that the port chains close as well. For prolog."),
    public: str = typer.Option("", help="Ports that are open to every host. For prolog."),
) -> None:
    """Print the lines of slurm.conf, or a script that they name, by which Slurm has its jobs guarded.

    Users change nothing: a plain `srun torchrun train.py` is closed to all but the job's nodes.
    """
    from securerun.ctl.setup_slurm import print_slurm

    print_slurm(part, peers=peers, ports=ports, public=public)


@setup.command(short_help="Print the guard of a cluster's nodes, and a pod.")
def kubernetes(
    image: str = typer.Option("", metavar="IMAGE", help="The guard's, if not that of scripts/image.sh."),
    job_image: str = typer.Option("registry.example/train:latest", metavar="IMAGE", help="The jobs' own."),
    only: str = typer.Option("all", metavar="PART", help="guard or pod, instead of both."),
) -> None:
    """Print a DaemonSet that has a guard on each node of a Kubernetes cluster, and a pod for a job that it guards.

    The guard's pod is privileged; the jobs' need no capability, no root and no privilege, and one directory mounted.
    """
    from securerun.ctl.kubernetes import print_manifests

    print_manifests(only, image, job_image)


@setup.command("oci-hook", short_help="Print a hook of container engines.")
def oci_hook() -> None:
    """Print a hook that has podman or CRI-O hang a shield on a container before its process starts.

    For containers with the annotation securerun.peers: the addresses and networks that may connect. securerun.public
    names ports that are for every host. It goes to /etc/containers/oci/hooks.d/securerun.json.
    """
    from securerun.ctl.oci_hook import print_hook

    print_hook()


@setup.command(short_help="Make a torchrun that is securerun.")
def torchrun(
    directory: str = typer.Argument(..., metavar="DIR", help="Where it is to be; made if its parent is there."),
) -> None:
    """Make a command torchrun in DIR that is securerun, for scripts and launchers that call torchrun by name.

    DIR has to come first in PATH, and what is printed sees to that: eval "$(securerunctl setup torchrun DIR)".
    Options of securerun's are then given by SECURERUN_ variables or /etc/securerun/config.toml.

    Only you and root may be able to change DIR. A torchrun there that is not securerun's is left alone. To have
    torchrun back, remove DIR/torchrun.
    """
    from securerun.ctl.torchrun import make

    make(directory)


@setup.command(short_help="Make the key by which the nodes of your jobs know each other.")
def key(
    file: str = typer.Argument("", metavar="[FILE]", help="Another file than ~/.config/securerun/key."),
    site: bool = typer.Option(False, "--site", help="The site's, /etc/securerun/site.key: for guards, as root."),
) -> None:
    """Make the key by which the nodes of your jobs know each other, on one of them, and say how the others get it.

    A key that is there stays: nothing is written over.
    """
    from securerun.ctl.key import make

    if file and site:
        raise UsageError(f"--site is {file!r} or /etc/securerun/site.key; leave one of them out")
    make(file or None, for_site=site)


@setup.command(short_help="Print what has a shell complete securerun's options.")
def completion(shell: str = typer.Argument(..., help="bash or zsh.")) -> None:
    """Print a script that has bash or zsh complete securerun's options and torchrun's, their values, and files.

    It is made for the torch that is installed, and starts nothing when Tab is pressed. securerunctl itself is
    completed by `securerunctl --install-completion`.
    """
    from securerun.ctl.completion import print_completion

    print_completion(shell)


def main() -> None:
    """Be the command securerunctl."""
    if sys.stdout is None:
        sys.stdout = console.closed_output()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no name or command is lost to a terminal's ASCII
    try:
        try:
            app()
        finally:
            console.finish_output()
    except SecurerunError as error:
        _give_up(str(error), error.status)
    except PermissionError as error:
        _give_up(f"{error}; {capabilities.run_as_root()}", PrivilegeError.status)
    except OSError as error:
        _give_up(str(error), SecurerunError.status)


def _give_up(message: str, status: int) -> NoReturn:
    typer.echo(f"securerunctl: {message}", err=True)
    sys.exit(status)
