"""The launcher: `securerun` in place of `torchrun`.

Start the job exactly as torchrun would, with every port of it closed to all hosts but its own, from before the
first socket opens until its last process has gone.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from securerun.console import say, spoken_errors
from securerun.errors import UsageError
from securerun.host import system, umask
from securerun.preflight import inspection
from securerun.preflight.inspection import Early
from securerun.protection import enclosing, guarded
from securerun.protection.client import Guard
from securerun.protection.enclosing import Enclosing
from securerun.protection.guarded import Launch

if TYPE_CHECKING:
    from securerun.job.job import Job
    from securerun.job.launchers import Command, Launcher
    from securerun.options import Options

Decorator = Callable[[Callable[..., None]], Callable[..., Any]]

_NEED_NO_GUARD = {"-h", "--help", "--dry-run", "--dry_run", "--unprotected"}


@dataclass(frozen=True)
class _Ready:
    """What is ready before torch, which takes its time, has been imported.

    guard: one that waits for its order; None where none is needed. around: the run that this process is in already.
    user: who this process has become, as --run-as says. early: what the preflight knows already. began: when that was,
    in seconds since the epoch.
    """

    guard: Guard | None
    around: Enclosing | None
    user: str | None
    early: Early
    began: float


def main(args: Sequence[str] | None = None) -> None:
    """Run a distributed job as torchrun would, its network closed to strangers.

    Takes what `torch.distributed.run.main` takes, raises and exits as it does; exits with 2, 77 or 78, and one line
    on standard error, before anything was started, when the launch cannot be understood or guarded.
    """
    start(args)


def command() -> None:
    """The command `securerun`: `main`, and a quick end."""
    main()
    exit_quickly()


def exit_quickly() -> NoReturn:
    """End this process with status 0, without taking to pieces first what the kernel takes back at once.

    As at every end of Python, threads are joined, exit handlers called and files written out before. Left out are the
    search for garbage and the destructors of torch's libraries, which take 0.3 s to free memory and have nothing to
    save: in a launcher they have done no work.
    """
    threading._shutdown()  # type: ignore[attr-defined] # as Py_FinalizeEx and multiprocessing do (CPython)
    with suppress(Exception):  # Python 3.9 raises again what it has printed
        atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # a closed pipe, a closed file
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        ctypes.CDLL(None).fflush(None)
        os._exit(0)
    sys.exit(0)


def start(args: Sequence[str] | None, only: Launcher | None = None, *, recorded: bool = True) -> None:
    """`main` for any launcher of torch's. only: this one, whatever the options say.

    recorded: whether what it raises is written to error files (torch.distributed.elastic's `record`).
    """
    as_command = args is None
    arguments = list(sys.argv[1:] if args is None else args)
    began = time.time()
    with spoken_errors():
        system.require_supported()
        shells_umask = umask.current()
        umask.tighten(f"{umask.LEAST:04o}")
        around = enclosing.find(os.environ)
        guard = None if around or _NEED_NO_GUARD.intersection(arguments) else Guard()
        asked = _asked_early(arguments)
        early = inspection.begin(asked, shells_umask, reads_rules=guard is not None)
        ready = _Ready(guard, around, _become_user(asked), early, began)
        record = _import_torch()
    launch = record(_launch) if recorded else _launch
    launch(arguments, ready, as_command, only)


def _launch(arguments: Sequence[str], ready: _Ready, as_command: bool, only: Launcher | None) -> None:
    """All that torchrun does inside its one `@record`, so that errors leave the same error files."""
    with spoken_errors():
        command, asked = _understand(arguments, only)
        _require_same_user(asked, ready.user)
        if as_command:
            sys.argv[1:] = command.arguments
        in_force = umask.tighten(asked.umask, asked.umask_source)
        guarded.forbid_code_in_weights(asked)
        if ready.around is not None:
            guarded.rely_on(ready.around, asked)
            if not asked.dry_run:
                found = inspection.inspect_inner(_job(command), asked, ready.early, command.namespace.log_dir)
                inspection.tell(found)
                _run(command, asked)
                return
        with guarded.reported(asked, [*sys.argv[:1], *arguments], ready.began) as hear:
            launch = guarded.understand(_job(command), asked, in_force, ranks=_ranks(command, asked))
            found = inspection.inspect(launch, ready.early, command.namespace.log_dir, hear)
            if asked.dry_run:
                inspection.tell(found)
                guarded.print_plan(launch)
                return
            with guarded.protected(launch, ready.guard, hear), _closing_what_frames_hold():
                inspection.tell(found)
                _run(command, asked)


def plan(arguments: Sequence[str]) -> Launch:
    """The launch that these arguments of securerun's would be; nothing is started, and looked at only where asked for.

    Raises SecurerunError where the launch would be refused, and SystemExit where torch's own parser refuses it.
    """
    system.require_supported()
    early = Early(umask.current())
    user = _become_user(_asked_early(arguments))
    _import_torch()
    command, asked = _understand(arguments, None)
    _require_same_user(asked, user)
    in_force = umask.tighten(asked.umask, asked.umask_source)
    launch = guarded.understand(_job(command), asked, in_force, ranks=_ranks(command, asked))
    if asked.preflight is not None:
        inspection.tell(inspection.inspect(launch, early, command.namespace.log_dir))
    return launch


def _require_same_user(asked: Options, user: str | None) -> None:
    """Refuse a command line of which torch's parser says, too late, that --run-as is not meant for securerun."""
    if asked.run_as != user:
        raise UsageError(f"--run-as {user}: is it securerun's option or the script's? Write `--` before the script")


def _run(command: Command, asked: Options) -> None:
    """Run the job to its end, and seal what it logged."""
    from securerun.job import logs

    log_dir = command.namespace.log_dir
    with logs.sealed_afterwards(log_dir, say) if log_dir and asked.seal_logs else nullcontext():
        command.run()


def _asked_early(arguments: Sequence[str]) -> Options:
    """What matters before torch's parser is there."""
    from securerun import options

    taken = {**options.take_early(arguments, "run_as"), **options.take_early(arguments, "preflight")}
    return options.resolve(taken, os.environ)


def _become_user(asked: Options) -> str | None:
    """Be the user that --run-as names, before torch, which is not root's business, is imported."""
    from securerun.host import account

    if asked.run_as is not None:
        account.become(account.find_account(asked.run_as, asked.run_as_source))
    return asked.run_as


def _understand(arguments: Sequence[str], only: Launcher | None) -> tuple[Command, Options]:
    """The launcher's part of the command line, read by its own parser, and securerun's."""
    from securerun import options
    from securerun.job import launchers

    parser = launchers.parser_of_all()
    taken, rest = options.take(arguments, launchers.values_of(parser))
    asked = options.resolve(taken, os.environ)
    if only is not None and asked.launcher not in {"auto", only.name}:
        raise UsageError(f"--launcher {asked.launcher}: this stands in for {only.name}; use the command securerun")
    with _without_collecting():  # of torch_npu
        launcher = only or launchers.choose(asked.launcher, parser, rest)
        return _parse(launcher, rest), asked


def _parse(launcher: Launcher, rest: Sequence[str]) -> Command:
    """The launcher's own parser on its own part; its help is followed by ours."""
    from securerun import options

    try:
        return launcher.parse(rest)
    except SystemExit as done:
        if not done.code:
            print("\n" + options.help_text(), end="")
        raise


def _job(command: Command) -> Job:
    from securerun.job import launchers

    return launchers.describe_job(command.namespace)


def _ranks(command: Command, asked: Options) -> int:
    """How many ranks this node has, where somebody asks."""
    if not asked.hccl_whitelist:
        return 0
    from securerun.job import hccl_whitelist

    return hccl_whitelist.ranks_of(command.namespace.nproc_per_node)


def _import_torch() -> Decorator:
    """Import torch's launcher; returns its `record`."""
    try:
        with _without_collecting():
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


@contextmanager
def _without_collecting() -> Iterator[None]:
    """For imports: they make hundreds of thousands of objects that stay.

    To look for garbage among them, now or at the exit, costs time and finds nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


@contextmanager
def _closing_what_frames_hold() -> Iterator[None]:
    """A failed job's traceback holds the agent's listening stores. The traceback still prints without them."""
    try:
        yield
    except BaseException as error:
        held: BaseException | None = error
        while held is not None:
            traceback.clear_frames(held.__traceback__)
            held = held.__cause__ or held.__context__
        raise
