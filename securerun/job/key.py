"""The key of a job, as far as its user has a say in it (--key): the file that it comes from, and what it is for.

All nodes of a job come to the same key without having talked: by the same source, and by what each knows of where the
job meets. That is the id of the rendezvous, else the number of the batch job, and the port of the rendezvous; not its
address, which is spelt differently on the node that has it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from securerun.errors import PolicyError
from securerun.firewall import job_key
from securerun.guard.program import SITE_KEY
from securerun.guard.protocol import KeyOrder
from securerun.job import batch
from securerun.job.job import Job
from securerun.linux import secret_file, trust
from securerun.linux.networks import Network
from securerun.linux.secret_file import Unfit
from securerun.options import Options
from securerun.text import printable

AUTO, OFF, REQUIRE = "auto", "off", "require"
USERS = Path("~/.config/securerun/key")
# What somebody writes who takes the option for that of the key itself.
_LOOKS_LIKE_A_KEY = re.compile(r"[0-9A-Fa-f]{40,}|[A-Za-z0-9+/_-]{42,}={0,2}")
_RENDEZVOUS = "rendezvous"
# Of the id of a rendezvous, which may be any text.
_MOST_SHOWN = 64
_HOW = "`securerunctl setup key` makes one"


@dataclass(frozen=True)
class Key:
    """What becomes of a launch's key. order: what the guard is told; None for no key at all.

    source: the file that it is of, in words; "" where the guard has to find one. fingerprint: of the key, if it is
    known here. made_for: what goes into it besides, in words. doubt: what people have to hear where it cannot be told
    whether the user has a key.
    """

    order: KeyOrder | None = None
    source: str = ""
    fingerprint: str = ""
    made_for: str = ""
    doubt: str = ""

    @property
    def is_required(self) -> bool:
        """Whether nobody comes in without a tag."""
        return self.order is not None and self.order.required

    def met_at(self, towards: tuple[Network, ...]) -> Key:
        """Return the same, of a job that meets at these addresses."""
        return self if self.order is None else replace(self, order=replace(self.order, towards=towards))

    def through_any(self) -> Key:
        """Return the same, whose tag counts through any interface: nobody named those of the peers."""
        return self if self.order is None else replace(self, order=replace(self.order, through_any=True))

    def required(self) -> Key:
        """Return the same, as the only way in: nobody is known by address."""
        return self if self.order is None else replace(self, order=replace(self.order, required=True))


def find(asked: Options, job: Job, environment: Mapping[str, str]) -> Key:
    """Return the key that the user asks for.

    By `auto` a job of one node has none, since nobody is to come to it. Nor has one on a host that has no source: then
    the guard is not asked for one, and need not know of keys.
    Nor is the launch ended where the user's own cannot be looked for, as without a ticket for a home of the network:
    many have none. `doubt` says so.
    Raises PolicyError for a file that must not be believed, also for the user's own: it was made to be used.
    """
    if asked.key == OFF:
        return Key()
    if asked.key not in {AUTO, REQUIRE}:
        return _of_file(_named(asked), f"{asked.key_source}: ", job, environment, required=True)
    if asked.key == AUTO and job.max_nodes == 1:
        return Key()
    required = asked.key == REQUIRE
    users, doubt = users_file()
    if doubt and required:
        raise PolicyError(doubt)
    if users is not None:
        return _of_file(users, "", job, environment, required=required)
    if not (required or _may_be_of_guard(environment)):
        return Key(doubt=doubt)
    met = meeting(job, environment)
    order = KeyOrder(required=required, meeting=met, in_slurm=_in_slurm(environment), nodes=_nodes(job, environment))
    return Key(order, made_for=_in_words(job, environment), doubt=doubt)


def is_likely(asked: Options, environment: Mapping[str, str]) -> bool:
    """Return whether a job of several nodes for which this is asked is likely to have a key. Reads none."""
    if asked.key != AUTO:
        return asked.key != OFF
    return users_file()[0] is not None or _may_be_of_guard(environment)


def lack_of(path: Path) -> str:
    """Return why a file of this user's must not be believed to have a key, and what to do; "" if it may be."""
    try:
        secret_file.read(path, trust.roots() | {os.geteuid()})
    except Unfit as error:
        return str(error)
    except FileNotFoundError:
        return "is not there any more"
    return ""


def users_file() -> tuple[Path | None, str]:
    """Return the user's own file; None where there is nothing of its name, or no home to have it in.

    And why it cannot be told whether there is one, or "".
    """
    try:
        users = USERS.expanduser()
    except RuntimeError:  # a user id that nobody knows, without HOME: of a container
        return None, ""
    if not users.is_absolute():
        return None, (
            f"HOME is {printable(os.environ.get('HOME', ''))!r}, which is no absolute path, so no key of yours is "
            "looked for; correct it, or write --key off"
        )
    try:
        os.lstat(users)
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError as error:
        return None, (
            f"{printable(str(users))} cannot be looked for ({error.strerror}), so a key that you have there is not "
            "used; see that HOME is your own and that you can read it, or write --key off"
        )
    return users, ""


def _may_be_of_guard(environment: Mapping[str, str]) -> bool:
    """Return whether a guard may have a source of its own."""
    return _in_slurm(environment) or os.path.lexists(SITE_KEY)


def _in_slurm(environment: Mapping[str, str]) -> bool:
    return (batch.job_number(environment) or ("",))[0] == "slurm"


def meeting(job: Job, environment: Mapping[str, str]) -> bytes:
    """Return the digest of what all nodes of a job, and of no other one of the user's, know of where it meets."""
    import hashlib
    import json

    # As ASCII, so that any text is written in one way.
    return hashlib.sha256(json.dumps([*_known(job, environment), _port(job)]).encode("ascii")).digest()


def _known(job: Job, environment: Mapping[str, str]) -> tuple[str, str]:
    if job.rendezvous_id:
        return _RENDEZVOUS, job.rendezvous_id
    return batch.job_number(environment) or ("", "")


def _port(job: Job) -> int:
    return (job.endpoint.port if job.endpoint else None) or 0


def _in_words(job: Job, environment: Mapping[str, str]) -> str:
    """Return the same for people: where it is another on two nodes, the same file makes two keys of it."""
    kind, name = _known(job, environment)
    of = printable(name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}...")
    which = {"": "no --rdzv-id or batch job", _RENDEZVOUS: f"--rdzv-id {of}"}.get(kind, f"job {of} of {kind}")
    return f"{which}, and port {_port(job)}" if _port(job) else f"{which}, and no port"


def _nodes(job: Job, environment: Mapping[str, str]) -> int:
    """Return how many nodes the job has, for people, also where only Slurm says how many run this step; else 0."""
    of_step = environment.get("SLURM_STEP_NUM_NODES", "")
    if job.max_nodes or not re.fullmatch(r"[0-9]{1,6}", of_step, re.ASCII):
        return job.max_nodes
    return int(of_step)


def _named(asked: Options) -> Path:
    """Return the file that was named. Raises PolicyError for what can be none, without saying what may be a key."""
    name = asked.key
    if _LOOKS_LIKE_A_KEY.fullmatch(name) and not os.path.lexists(name):
        raise PolicyError(
            f"{asked.key_source} takes the name of a file with a key in it, and not the key, which all who see the "
            f"command or the environment would know now; {_HOW}"
        )
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~nobody_of_that_name
        raise PolicyError(f"{asked.key_source} {printable(name)}: {error}; write the whole path") from error


def _of_file(path: Path, place: str, job: Job, environment: Mapping[str, str], *, required: bool) -> Key:
    """Return the key of a file. place: what the message begins with that says why it cannot be."""
    shown = printable(str(path))
    try:
        source = secret_file.read(path, trust.roots() | {os.geteuid()})
    except FileNotFoundError as error:
        words = "" if path.parent != Path() else f", nor is it one of {AUTO}, {OFF}, {REQUIRE}"
        raise PolicyError(f"{place}there is no file {shown}{words}; {_HOW}") from error
    except Unfit as error:
        raise PolicyError(f"{place}{shown} {error}; {_HOW}, and --key off goes by addresses alone") from error
    secret = job_key.derive(source, job_key.OF_USER, meeting(job, environment))
    order = KeyOrder(required=required, secret=secret, nodes=_nodes(job, environment))
    return Key(order, shown, secret.key().fingerprint, _in_words(job, environment))
