"""securerunctl exec: any command under a lease, be it deepspeed, accelerate or a shell script that calls torchrun.

What the command starts is guarded as a job of securerun's is, and it learns nothing of it. torch is not imported.
"""

from __future__ import annotations

import errno
import os
import shutil
import textwrap
import time
from collections.abc import Sequence
from typing import NoReturn

from securerun import help_text, options, session
from securerun.console import say, spoken_errors
from securerun.errors import SecurerunError, UsageError
from securerun.guard.protocol import mark_of
from securerun.host import system
from securerun.job import environment, nodes
from securerun.linux import child, processes
from securerun.options import OPTIONS, Options
from securerun.protection import choice, words
from securerun.protection.plan import Plan

_USAGE = "securerunctl exec [OPTIONS] -- COMMAND [ARGUMENTS]"
_HELP = """\
Run any command with its network closed to strangers, as securerun does for torchrun: deepspeed, accelerate, a shell
script that calls torchrun itself, or a shell.

    securerunctl exec --peers node0,node1 -- bash pretrain.sh
    securerunctl exec --peers @hostfile.txt -- deepspeed --no_ssh --node_rank 0 train.py

Run it on every node. What it knows of the job is what the environment says (MASTER_ADDR,
MASTER_PORT, NNODES and PET_* variables; HCCL's; the batch system's list of nodes) and what these options say. Every
port that the command opens is closed to all but the peers, whether it is in the plan or not; those in the plan are
closed before anything listens. A securerun inside of the command takes no lease of its own.

The exit status is the command's own; 126 and 127 if it cannot be run, as in a shell; 2, 77 and 78 as securerun has
them, and then nothing was started. What a command that ends with status 0 leaves running stays guarded until the last
of it has ended; what a failed or killed one leaves is ended.

What the command has others start for it (by srun, mpirun or sbatch, over ssh, by a docker or ray that runs already) is
not its own and is not guarded, and it is said where that is seen. Guard it where it starts:

    srun securerunctl exec -- python train.py"""

# securerun's, but for those of its launcher: the command is one, and its log directory is its own.
_LAUNCHERS = {
    "launcher": "the command is the launcher here; write it after --",
    "seal_logs": "what the command logs is its own; a securerun inside of it seals its logs",
}
_OPTIONS = tuple(option for option in OPTIONS if option.key not in _LAUNCHERS)
_CANNOT_BE_RUN, _NOT_FOUND = 126, 127
# A command's helpers often end by themselves, a moment after it.
_SETTLE_SECONDS = 0.1


class CommandError(SecurerunError):
    """The command cannot be started; the status is a shell's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Failed(Exception):
    """The command ended in another way than with status 0. status: what a shell would say (128 + a signal)."""

    def __init__(self, wait_status: int) -> None:
        self.wait_status = wait_status
        code = os.waitstatus_to_exitcode(wait_status)
        self.status = code if code >= 0 else 128 - code
        super().__init__(f"ended with status {code}" if code >= 0 else f"ended by signal {-code}")


def execute(arguments: Sequence[str]) -> NoReturn:
    """Run the command in `arguments`, after the options there, under a lease, and end as it ends."""
    with spoken_errors():
        status = _execute(arguments)
    child.end_as(status)


def _execute(arguments: Sequence[str]) -> int:
    """Run the command to its end and return its wait status; 0 where none was to be run.

    Does not return inside of a run: no lease has to be held for the command, which takes the place of this process.
    """
    system.require_supported()
    asked, command = _understand(arguments)
    if not command:
        return 0
    by_name = asked.scope == choice.NAMESPACE
    job = environment.describe_job(os.environ, command)
    several = nodes.several_of_command(job, asked.peers, os.environ, by_name=by_name)
    needs_guard = not asked.dry_run and not asked.unprotected
    begun = session.begin(command, asked, needs_guard=needs_guard, goes_on=False, several=several)
    program = _find(command[0])
    job = environment.describe_job(os.environ, command)
    _require_private_stores(command, asked)
    if asked.dry_run:
        begun.show(job, asked)
        return 0
    try:
        with begun.protect(job, asked, may_leave_job=True) as plan:
            if plan is None:
                _become(program, command)
            _run(program, command, plan)
    except _Failed as failed:
        return failed.wait_status
    return 0


def _require_private_stores(command: Sequence[str], asked: Options) -> None:
    """Raise PolicyError where the command says that its job meets at a port that is to be public."""
    if asked.public is None:
        return
    from securerun.job import public, stores

    openings = public.openings(asked.public, asked.public_source)
    public.within(stores.of_command(command, os.environ), openings, asked.public_source)


def _run(program: str, command: Sequence[str], plan: Plan) -> None:
    """Run the command and say what it leaves. Raises _Failed unless it ends with status 0."""
    status = _run_child(program, command)
    if not plan.options.unprotected:
        _tell_what_is_left(plan.policy.run_id, failed=status != 0)
    if status:
        raise _Failed(status)


def _understand(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Return what is asked of securerun, and the command; none after help was asked for."""
    taken, rest = options.take(arguments, lambda _: None)
    if rest and rest[0] in {"-h", "--help"}:
        _print_help()
        return Options(), []
    for key, reason in _LAUNCHERS.items():
        if key in taken:
            raise UsageError(f"--{key.replace('_', '-')}: {reason}")
    if rest and rest[0].startswith("-") and rest[0] != "--":
        raise UsageError(f"there is no option {rest[0]!r} (see securerunctl exec --help); write -- before the command")
    command = rest[1:] if rest and rest[0] == "--" else rest
    if not command or not command[0]:
        raise UsageError(f"there is no command; write {_USAGE}")
    return options.resolve(taken, os.environ), command


def _print_help() -> None:
    width = help_text.width()
    parts = (part if part[0] == " " else textwrap.fill(part, width) for part in _HELP.split("\n\n"))
    print(f"usage: {_USAGE}", *parts, help_text.written(_OPTIONS, "the command"), sep="\n\n", end="")


def _find(name: str) -> str:
    """Return the program of a command's first word, looked for in PATH as a shell does. Raises CommandError."""
    found = shutil.which(name)
    if found is not None:
        return found
    if "/" not in name:
        raise CommandError(f"{name}: no such command in PATH; correct it, or write its path", _NOT_FOUND)
    if not os.path.exists(name):  # noqa: PTH110 - a name that no Path can be made of, too
        raise CommandError(f"{name}: no such file; correct the path of the command", _NOT_FOUND)
    raise CommandError(f"{name} cannot be executed; chmod +x it, or write `bash {name}` for a script", _CANNOT_BE_RUN)


def _become(program: str, command: Sequence[str]) -> NoReturn:
    try:
        child.become(program, command)
    except OSError as error:
        raise _cannot_be_run(program, error) from error


def _run_child(program: str, command: Sequence[str]) -> int:
    try:
        return child.run(program, command)
    except OSError as error:
        raise _cannot_be_run(program, error) from error


def _cannot_be_run(program: str, error: OSError) -> CommandError:
    if error.errno == errno.ENOEXEC:
        reason = f"has no #! line and is no program; write its interpreter, as in `bash {program}`"
        return CommandError(f"{program} {reason}", _CANNOT_BE_RUN)
    if error.errno == errno.ENOENT:
        return CommandError(f"{program}: the interpreter in its first line does not exist; correct it", _NOT_FOUND)
    return CommandError(f"{program} cannot be run: {error.strerror}", _CANNOT_BE_RUN)


def _tell_what_is_left(run_id: str, *, failed: bool) -> None:
    mark = mark_of(run_id)
    if not processes.marked(mark, os.getuid()):
        return
    time.sleep(_SETTLE_SECONDS)
    left = processes.marked(mark, os.getuid())
    if left:
        say(words.left(run_id, len(left), failed=failed))
