"""The launcher: `securerun` in place of `torchrun`.

Start the job exactly as torchrun would, with every port of it closed to all hosts but its own, from before the
first socket opens until its last process has gone.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable

from securerun.errors import SecurerunError, UsageError
from securerun.firewall.policy import Policy
from securerun.guard.client import Guard
from securerun.guard.protocol import Notice, Order, printable
from securerun.host import interfaces, system, umask

if TYPE_CHECKING:
    from securerun.job.launchers import Command, Job, Launcher
    from securerun.job.peers import Peers
    from securerun.options import Options

Decorator = Callable[[Callable[..., None]], Callable[..., Any]]

_NEED_NO_GUARD = {"-h", "--help", "--dry-run", "--dry_run", "--unprotected"}
_HELD_BACK = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


@dataclass(frozen=True)
class Launch:
    """One launch, understood: what torch will run, what the user asked of securerun, and the policy of both."""

    command: Command
    options: Options
    job: Job
    peers: Peers
    policy: Policy
    umask: int
    grace: float


def main(args: Sequence[str] | None = None) -> None:
    """Run a distributed job as torchrun would, its network closed to strangers.

    Takes what `torch.distributed.run.main` takes, raises and exits as it does; exits with 2, 77 or 78, and one line
    on standard error, before anything was started, when the launch cannot be understood or guarded.
    """
    as_command = args is None
    arguments = list(sys.argv[1:] if args is None else args)
    with _spoken_errors():
        system.require_supported()
        umask.tighten(f"{umask.LEAST:04o}")
        guard = None if _NEED_NO_GUARD.intersection(arguments) else Guard()
        user = _become_user(arguments)
        record = _import_torch()
    record(_launch)(arguments, guard, as_command, user)
    if as_command:
        _exit_quickly()


def _launch(arguments: Sequence[str], guard: Guard | None, as_command: bool, user: str | None) -> None:
    """All that torchrun does inside its one `@record`, so that errors leave the same error files."""
    with _spoken_errors():
        launch = _understand(arguments, as_command)
        if launch.options.run_as != user:
            raise UsageError(f"--run-as {user}: is it securerun's option or the script's? Write `--` before the script")
        if launch.options.dry_run:
            _print_plan(launch)
            return
        for warning in launch.peers.warnings:
            _say(warning)
        with _unprotected() if launch.options.unprotected else _guarded(guard or Guard(), launch):
            _warn_of_root()
            launch.command.run()


def _become_user(arguments: Sequence[str]) -> str | None:
    """Be the user that --run-as names, before torch, which is not root's business, is imported."""
    from securerun import options
    from securerun.host import account

    asked = options.resolve(options.take_early(arguments, "run_as"), os.environ)
    if asked.run_as is not None:
        account.become(account.find_account(asked.run_as, asked.run_as_source))
    return asked.run_as


def _warn_of_root() -> None:
    if os.geteuid() == 0:
        _say("running as root, and so are the workers; --run-as USER has them run as an ordinary user")


def _understand(arguments: Sequence[str], as_command: bool) -> Launch:
    """Arguments → job → policy. Any doubt is an error here, before anything was started."""
    from securerun import options
    from securerun.job import launchers, peers, ports

    parser = launchers.parser_of_all()
    taken, rest = options.take(arguments, launchers.values_of(parser))
    asked = options.resolve(taken, os.environ)
    with _without_collecting():  # of torch_npu
        command = _parse(launchers.choose(asked.launcher, parser, rest), rest)
    if as_command:
        sys.argv[1:] = command.arguments
    mask = umask.tighten(asked.umask, asked.umask_source)
    job = launchers.describe_job(command.namespace)
    entered = interfaces.require(interfaces.parse(asked.interface), asked.interface_source)
    planned = ports.plan_ports(job, os.environ, asked.ports, asked.ports_source)
    found = peers.find_peers(asked, job)
    policy = Policy(
        secrets.token_hex(6), planned, found.networks, entered, asked.accept, close_loopback=asked.loopback == "job"
    )
    grace = options.seconds(asked.grace, asked.grace_source)
    return Launch(command, asked, job, found, policy, mask, grace)


def _parse(launcher: Launcher, rest: Sequence[str]) -> Command:
    """The launcher's own parser on its own part; its help is followed by ours."""
    from securerun import options

    try:
        return launcher.parse(rest)
    except SystemExit as done:
        if not done.code:
            print("\n" + options.help_text(), end="")
        raise


@contextmanager
def _guarded(guard: Guard, launch: Launch) -> Iterator[None]:
    """Have this process guarded; let the guard go when the job is over, and say who was turned away."""
    from securerun import words

    policy, asked = launch.policy, launch.options
    command = printable(" ".join(launch.job.command)[:1000])
    guarding = guard.guard(Order(policy, asked.firewall, asked.scope, launch.grace, command), _tell)
    for line in words.start(policy, launch.peers, guarding, launch.umask, guard.way):
        _say(line)
    failed = True
    try:
        yield
        failed = False
    except BaseException as error:
        _close_what_frames_hold(error)
        raise
    finally:
        # A second Ctrl-C would end the farewell in its middle: the guard needs none, but the user misses the summary.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        _say_farewell(guard, policy, failed)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _unprotected() -> Iterator[None]:
    """Warn before and after, so that it stands at both ends of a long log."""
    from securerun import words

    _say(words.unprotected())
    try:
        yield
    finally:
        _say(words.unprotected())


def _tell(notice: Notice) -> None:
    """News from the guard, while the job runs."""
    from securerun import words

    for line in words.news(notice):
        _say(line)


def _say_farewell(guard: Guard, policy: Policy, failed: bool) -> None:
    from securerun import words

    released = guard.release(failed)
    for line in words.end(policy, released.denied if released else None):
        _say(line)


def _print_plan(launch: Launch) -> None:
    from securerun import words
    from securerun.guard import cgroup, ways

    obstacles = {way.name: way.obstacle for way in ways.ways()}
    origin = words.origin(obstacles, may_leave=cgroup.may_leave_shared_cgroups())
    print(words.plan(launch.job, launch.policy, launch.peers, launch.options, launch.umask, origin), end="")


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


def _exit_quickly() -> None:
    """Exit handlers and destructors still run; only the search for cycles among what is about to go is left out."""
    gc.freeze()
    gc.disable()


def _close_what_frames_hold(error: BaseException | None) -> None:
    """A failed job's traceback holds the agent's listening stores. The traceback still prints without them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextmanager
def _spoken_errors() -> Iterator[None]:
    """One line and a status for what a person can mend; anything else is a defect and keeps its traceback."""
    try:
        yield
    except SecurerunError as error:
        _say(str(error))
        sys.exit(error.status)


def _say(words: str) -> None:
    for line in words.splitlines():
        print(f"securerun: {line}", file=sys.stderr, flush=True)
