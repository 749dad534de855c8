"""The launcher: `securerun` in place of `torchrun`.

Start the job exactly as torchrun would, with every port of it closed to all hosts but its own, from before the
first socket opens until its last process has gone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable

from securerun import session
from securerun.console import say, spoken_errors
from securerun.ending import closing_what_frames_hold, exit_quickly, without_collecting
from securerun.errors import UsageError
from securerun.session import Session

if TYPE_CHECKING:
    from argparse import Namespace

    from securerun.job.job import Job
    from securerun.job.launchers import Command, Launcher
    from securerun.options import Options
    from securerun.protection.plan import Plan

Decorator = Callable[[Callable[..., None]], Callable[..., Any]]

# What is to be known before torch's parser is there.
_EARLY = ("run_as", "preflight", "scope", "peers", "public", "firewall", "accept", "key")
# Of the standard library what torch.distributed.run loads, the longest first.
_OF_TORCH = (
    *("asyncio", "importlib.metadata", "unittest.mock", "urllib.request", "multiprocessing.reduction", "tarfile"),
    *("uuid", "pickletools"),
)
_NEED_NO_GUARD = {
    *("-h", "--help", "--dry-run", "--dry_run", "--unprotected"),
    *("--print-completion", "--print_completion"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a distributed job as torchrun would, its network closed to strangers.

    Takes what `torch.distributed.run.main` takes, raises and exits as it does; exits with 2, 77 or 78, and one line
    on standard error, before anything was started, when the launch cannot be understood or guarded.
    """
    start(args)


def command() -> None:
    """Be the command `securerun`: `main`, and a quick end."""
    start(None, goes_on=False)
    exit_quickly()


def run(args: Namespace) -> None:
    """Run the job of a namespace as `torch.distributed.run.run` would, its network closed to strangers.

    The namespace is of this module's `get_args_parser`, which takes securerun's options, or of torch's own. Raises and
    exits as `main` does.
    """
    from securerun import options
    from securerun.job import command_line, originals
    from securerun.job.launchers import LAUNCHERS, Command

    if originals.is_calling(originals.RUN, "run") or originals.is_calling(originals.LAUNCH, "main"):
        originals.own(originals.RUN, "run")(args)  # it was put in torch's place, and the job has its lease by now
        return
    with spoken_errors():
        asked = options.resolve(command_line.taken_from(args), os.environ)
        begun = session.begin(sys.argv, asked, needs_guard=not (asked.dry_run or asked.unprotected))
        _import_torch()
        _carry_out(begun, Command(LAUNCHERS["torchrun"], args, ()), asked)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what a module holds
    """Return what else `torch.distributed.run` has, so that this module can be put in its place."""
    from securerun.job import command_line

    return command_line.named(name)


def start(
    args: Sequence[str] | None, only: Launcher | None = None, *, recorded: bool = True, goes_on: bool = True
) -> None:
    """Do what `main` does for any launcher of torch's. only: this one, whatever the options say.

    recorded: whether what it raises is written to error files (torch.distributed.elastic's `record`). goes_on: whether
    this process may go on after the job.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    with spoken_errors():
        names = {argument.partition("=")[0] for argument in arguments}
        begun = _begin(arguments, needs_guard=not _NEED_NO_GUARD & names, goes_on=goes_on)
        record = _import_torch()
    launch = record(_launch) if recorded else _launch
    launch(begun, arguments, only, as_command=args is None)


def plan(arguments: Sequence[str]) -> Plan:
    """Return the plan of the launch with these arguments of securerun's; nothing is started.

    Raises SecurerunError where the launch would be refused, and SystemExit where torch's own parser refuses it.
    """
    begun = _begin(arguments, needs_guard=False, goes_on=True)
    _import_torch()
    understood, asked = _understand(arguments, None)
    return begun.plan(_job(understood, asked), asked)


def _launch(begun: Session, arguments: Sequence[str], only: Launcher | None, *, as_command: bool) -> None:
    """Do all that torchrun does inside its one `@record`, so that errors leave the same error files."""
    with spoken_errors():
        understood, asked = _understand(arguments, only)
        if as_command:
            sys.argv[1:] = understood.arguments
        _carry_out(begun, understood, asked)


def _carry_out(begun: Session, understood: Command, asked: Options) -> None:
    """Run the job under its lease, or show what would be done."""
    job = _job(understood, asked)
    if asked.dry_run:
        begun.show(job, asked)
        return
    with begun.protect(job, asked), closing_what_frames_hold():
        _run(understood, asked)


def _begin(arguments: Sequence[str], *, needs_guard: bool, goes_on: bool) -> Session:
    """Begin with what matters before torch's parser is there."""
    from securerun import options
    from securerun.job import nodes

    taken = {name: value for key in _EARLY for name, value in options.take_early(arguments, key).items()}
    asked = options.resolve(taken, os.environ)
    several = nodes.several(arguments, os.environ)
    return session.begin(
        [*sys.argv[:1], *arguments],
        asked,
        needs_guard=needs_guard,
        goes_on=goes_on,
        several=several,
        meanwhile=_load_ahead(),
    )


def _load_ahead() -> Iterator[None]:
    """Load, a module a step, what torch is about to load of the standard library, and what starts no thread."""
    for name in _OF_TORCH:
        with contextlib.suppress(ImportError):  # of another Python
            importlib.import_module(name)
        yield


def _run(understood: Command, asked: Options) -> None:
    """Run the job to its end, and seal what it logged."""
    from securerun.job import logs

    log_dir = understood.namespace.log_dir
    with logs.sealed_afterwards(log_dir, say) if log_dir and asked.seal_logs else contextlib.nullcontext():
        understood.run()


def _understand(arguments: Sequence[str], only: Launcher | None) -> tuple[Command, Options]:
    """Read the launcher's part of the command line by its own parser, and securerun's."""
    from securerun import options
    from securerun.job import launchers

    parser = launchers.parser_of_all()
    taken, rest = options.take(arguments, launchers.values_of(parser))
    asked = options.resolve(taken, os.environ)
    if only is not None and asked.launcher not in {"auto", only.name}:
        raise UsageError(f"--launcher {asked.launcher}: this stands in for {only.name}; use the command securerun")
    with without_collecting():  # of torch_npu
        launcher = only or launchers.choose(asked.launcher, parser, rest)
        return _parse(launcher, rest), asked


def _parse(launcher: Launcher, rest: Sequence[str]) -> Command:
    """Have the launcher's own parser read its own part; its help is followed by ours."""
    from securerun.job import command_line

    with command_line.followed_by_ours():
        return launcher.parse(rest)


def _job(understood: Command, asked: Options) -> Job:
    """Describe the job; how many ranks this node has is asked only where somebody needs to know."""
    from securerun.job import launchers

    job = launchers.describe_job(understood.namespace)
    if not asked.hccl_whitelist:
        return job
    from securerun.job import hccl_whitelist

    return replace(job, ranks=hccl_whitelist.ranks_of(understood.namespace.nproc_per_node))


def _import_torch() -> Decorator:
    """Import torch's launcher; return its `record`."""
    try:
        with without_collecting():
            import torch.distributed.run  # noqa: F401
            from torch.distributed.elastic.multiprocessing.errors import record
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{sys.executable} has no module {error.name}; install torch there: pip install torch"
        ) from error
    except RuntimeError as error:
        # torch loads what is installed for a device (torch/__init__.py, _import_device_backends): torch_npu needs CANN.
        cause = str(error.__cause__).partition("\n")[0]
        raise UsageError(
            f"torch cannot be imported: {error} ({cause}); if it is torch_npu, run `source set_env.sh` where "
            "CANN is installed, then this again"
        ) from error
    decorator: Decorator = record
    return decorator
