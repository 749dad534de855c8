"""The recipe, once: what stands around a job, from the first step of a command to the end of what it starts.

`begin` is what comes before torch, and its order is the security argument. Each step has its reason there. What follows
goes with the job: `protect` runs it under a lease, in the lease that this process is in already, or under none;
`show` and `plan` say what `protect` would do, and start nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from securerun import aside
from securerun.console import say, write_out
from securerun.errors import PrivilegeError, UsageError
from securerun.host import system, umask
from securerun.preflight import inspection
from securerun.preflight.inspection import Early
from securerun.protection import choice, client, enclosing, guarded
from securerun.protection import plan as plans
from securerun.protection.client import Guard
from securerun.protection.enclosing import Enclosing
from securerun.protection.events import Hear, nobody
from securerun.protection.plan import Plan

if TYPE_CHECKING:
    from securerun.host.account import Account
    from securerun.job.job import Job
    from securerun.options import Options
    from securerun.protection.apart import Apart


@dataclass(frozen=True)
class Session:
    """What is ready before the job is known.

    command: the command line as the user typed it. began: when, in seconds since the epoch. guard: one that waits for
    its order; None where none is needed. around: the run that this process is in already. user: who this process is
    now, as --run-as says. early: what the preflight knows already.
    """

    command: Sequence[str]
    began: float
    guard: Guard | Apart | None
    around: Enclosing | None
    user: str | None
    early: Early

    @contextmanager
    def protect(self, job: Job, asked: Options, *, may_leave_job: bool = False) -> Iterator[Plan | None]:
        """Protect the block, which starts the job; yields its plan, or None inside of a run, which has one.

        may_leave_job: whether a block that ends well may have left the job running, as with nohup. One that raises is
        a job that failed. Raises SecurerunError, with nothing installed, for a job that cannot be protected.
        """
        in_force = self._settle(asked)
        if self.around is not None:
            guarded.require_same_peers(self.around, asked, lambda: plans.understand(job, asked, in_force))
            guarded.rely_on(self.around, asked, job)
            inspection.tell(inspection.inspect_inner(job, asked, self.early))
            yield None
            return
        with self._reported(asked) as hear:
            if self.guard is not None:
                job, asked = choice.require_right(self.guard, job, asked)
            plan = plans.understand(job, asked, in_force)
            found = inspection.inspect(plan, self.early, hear)
            with guarded.protected(plan, self.guard, hear, may_leave_job=may_leave_job):
                inspection.tell(found if plan.task.is_first else ())
                yield plan

    def show(self, job: Job, asked: Options) -> None:
        """Print all that `protect` would do, on standard output. Raises SecurerunError as `protect` does."""
        in_force = self._settle(asked)
        if self.around is not None:
            guarded.rely_on(self.around, asked, job)
        if asked.scope == choice.NAMESPACE:
            job = choice.of_one_node(job)
        plan = plans.understand(job, asked, in_force)
        inspection.tell(inspection.inspect(plan, self.early))
        _print(plan)

    def plan(self, job: Job, asked: Options) -> Plan:
        """Return the plan of a job; the host is looked at only where somebody asks for it by --preflight.

        Raises SecurerunError where the job would be refused.
        """
        plan = plans.understand(job, asked, self._settle(asked))
        if asked.preflight is not None:
            inspection.tell(inspection.inspect(plan, self.early))
        return plan

    def _settle(self, asked: Options) -> int:
        """Put in force what holds for whatever is started; returns the umask. Raises PolicyError or UsageError."""
        if asked.run_as != self.user:  # torch's parser says, too late, that it was not meant for securerun
            raise UsageError(
                f"--run-as {self.user}: is it securerun's option or the script's? Write `--` before the script"
            )
        in_force = umask.tighten(asked.umask, asked.umask_source)
        if asked.weights_only:
            from securerun.job import weights

            weights.forbid_code(os.environ)
        return in_force

    @contextmanager
    def _reported(self, asked: Options) -> Iterator[Hear]:
        """Write a report of the block, if one is asked for. Raises UsageError, before it, for one that cannot be."""
        if asked.report is None:
            yield nobody
            return
        from securerun.evidence import report

        with report.kept(asked.report, asked.report_source, self.command, self.began) as journal:
            yield journal.hear


def begin(
    command: Sequence[str],
    asked: Options,
    *,
    needs_guard: bool,
    goes_on: bool = True,
    several: str = "",
    meanwhile: Iterable[None] = (),
) -> Session:
    """Do what comes before torch. asked: as far as it is known yet. needs_guard: whether anything is to be guarded.

    goes_on: whether this process may go on when the job has ended. several: what says that the job may be of more than
    one node, "" if nothing does. meanwhile: steps of what is to be done anyway, while a guard has not answered yet.
    Raises SecurerunError for a system that is not supported, for a user that this process cannot become, and for a
    process that is still in a run that has ended.
    """
    began = time.time()
    system.require_supported()
    other = _other_user(asked)
    aside.put_back()
    # Before everything else: what stays behind has root's terminal and environment, and waits.
    parent = _go_on_apart(other) if other is not None else 0
    # Before anything is made: no file of the job or of the way to its guard is ever open to others, however it ends.
    shells_umask = umask.current()
    umask.tighten(f"{umask.LEAST:04o}")
    if needs_guard:
        client.require_parted()
    # Before a guard is started: who is in a run already needs none, and must not pay for one.
    around = enclosing.find(os.environ)
    # Before --run-as: a guard gets its privilege from who this process still is, and comes up while torch is imported.
    # And before anything has a thread of its own: a network of the job's own is begun by a process of a single one.
    guard = choice.begin(asked, several, meanwhile, goes_on=goes_on) if needs_guard and around is None else None
    # Before --run-as as well: only root may read the host's rules.
    early = inspection.begin(asked, shells_umask, reads_rules=isinstance(guard, Guard))
    # Before torch, and whatever it loads from places that the user can write: none of that is root's business.
    if other is not None:
        if isinstance(guard, Guard):
            _let_look(guard)
        _become(other, parent)
    return Session(command, began, guard, around, asked.run_as, early)


def _let_look(guard: Guard) -> None:
    """Have a guard look at this process before it becomes another user's, where it could not see into that one."""
    from securerun.linux import capabilities

    if capabilities.SYS_PTRACE not in capabilities.effective():
        guard.can_be_had()


def _print(plan: Plan) -> None:
    from securerun.linux import cgroups
    from securerun.protection import ways, words

    for warning in plan.peers.warnings:
        say(warning)
    obstacles = {way.name: way.obstacle for way in ways.ways()}
    origin = words.origin(obstacles, may_leave=cgroups.may_leave_shared())
    otherwise = ""
    if obstacles[ways.DIRECTLY] or plan.options.scope == choice.NAMESPACE:
        otherwise = choice.without_guard(replace(plan.options, dry_run=False), plan.job)
    write_out(words.whole(plan, origin, otherwise))
    if plan.whitelist:
        from securerun.job import hccl_whitelist

        write_out(f"\n# {hccl_whitelist.FILE}\n{hccl_whitelist.content(plan.whitelist)}\n")


def _other_user(asked: Options) -> Account | None:
    """Return whom this process is to become; None where it is to stay who it is.

    Raises UsageError where there is no such user, and PrivilegeError where others have a say in what is imported.
    """
    if asked.run_as is None:
        return None
    from securerun.host import account, imports
    from securerun.linux import proc

    found = account.find_account(asked.run_as, asked.run_as_source)
    if account.is_mine(found):
        return None
    if proc.outer_user(found.user) is None:
        raise PrivilegeError(
            f"{asked.run_as_source} {asked.run_as}: that user has no number in this user namespace, so nobody here can "
            "become them; leave it out, or start securerun outside"
        )
    imports.require_own(f"{asked.run_as_source} {asked.run_as}")
    return found


def _go_on_apart(user: Account) -> int:
    """Go on in a child without a terminal; returns the id of its parent. Raises PrivilegeError where that cannot be."""
    from securerun.linux import child

    try:
        return child.go_on_apart()
    except RuntimeError as error:
        raise PrivilegeError(
            f"--run-as {user.name}: {error}, and only one of a single thread can become another user; use the command "
            "securerun, or call it before anything else is started or imported"
        ) from error
    except OSError as error:
        raise PrivilegeError(f"--run-as {user.name}: no session can be begun for that user: {error}") from error


def _become(user: Account, parent: int) -> None:
    """Be the user that --run-as names, for good, and for as long as the parent lives."""
    from securerun.host import account
    from securerun.linux import child

    account.become(user)
    child.end_with(parent)
