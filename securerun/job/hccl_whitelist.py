"""HCCL's own list of who may connect: a second line behind the shield, which needs no privilege (--hccl-whitelist).

With HCCL_WHITELIST_DISABLE=0 HCCL reads the file that HCCL_WHITELIST_FILE names whenever it makes a communicator, and
accepts connections from the addresses in it alone (CANN environment variable reference; topoinfo_detect.cc and
hccl_whitelist.cc of CANN's HCCL). It takes single addresses, and a number of connections of each. Of this host's own
addresses it uses one that is listed, so all are, and it chooses as without the list. Every node has to have a list.

HCCL resolves the path with realpath(3), so the file cannot be one that goes with its process: the name of a memfd, or
of a file that was unlinked, resolves to nothing. It lies in a directory of its own, locked for as long as the launcher
lives, which removes it. What a killed launcher left, the user's next one finds unlocked, and removes when no process is
left that was told of it. The lock also keeps systemd-tmpfiles from taking it for old (tmpfiles.d(5)). XDG_RUNTIME_DIR
and /dev/shm are no places for it: both are emptied when the user logs out, and his job goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from securerun.errors import PolicyError, PrivilegeError
from securerun.host import interfaces
from securerun.linux import proc, processes
from securerun.linux.networks import Network

DISABLE, FILE = "HCCL_WHITELIST_DISABLE", "HCCL_WHITELIST_FILE"
# HOST_SOCKET_CONN_LIMIT in hccl_socket.h
RANKS_AN_ADDRESS = 16

_OPTION = "--hccl-whitelist"
_NAME, _PARTIAL = "hccl-whitelist.json", "hccl-whitelist.json.partial"
_ATTEMPTS = 8


def addresses_of(peers: Iterable[Network], nodes: int = 0, ranks: int = 0) -> tuple[str, ...]:
    """Return the addresses for the list: this host's own, and the peers'.

    peers: who may connect, each by itself. nodes: how many the job may have. ranks: how many each node has.

    Raises PolicyError for peers that are networks, and for a job of which HCCL would turn ranks away.
    """
    own = interfaces.own_addresses()
    others = dict.fromkeys(_single(network) for network in peers)
    _require_room(nodes, ranks, 1 + len(others.keys() - set(own)))
    return tuple(dict.fromkeys((*own, *others)))


def ranks_of(nproc_per_node: str) -> int:
    """Return how many ranks --nproc-per-node stands for on this host; 0 for what torch is going to refuse."""
    from torch.distributed.run import determine_local_world_size

    with contextlib.suppress(ValueError):
        return int(determine_local_world_size(nproc_per_node))
    return 0


def content(addresses: Sequence[str]) -> str:
    """Return the file's text."""
    return json.dumps({"host_ip": list(addresses)})


@contextmanager
def whitelisted(
    addresses: Sequence[str], environment: MutableMapping[str, str], *, may_leave_job: bool = False
) -> Iterator[Whitelist]:
    """Have HCCL accept these addresses only, in every process that gets this environment from now on.

    At the end the environment is as before and the file gone; may_leave_job: but for a block that ends well and leaves
    processes that may still read it. Raises PrivilegeError where no file can be made.
    """
    before = {name: environment.get(name) for name in (DISABLE, FILE)}
    made = Whitelist(addresses)
    is_needed = False
    try:
        environment.update({DISABLE: "0", FILE: str(made.path)})
        yield made
        is_needed = may_leave_job and _somebody_was_told_of(made.path)
    finally:
        made.close() if is_needed else made.remove()
        for name, value in before.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value


class Whitelist:
    """The file, from its making until `remove`. path: where it is.

    Raises PrivilegeError where none can be made.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        place = Path(tempfile.gettempdir())
        try:
            _sweep(place)
            self._place, self._directory = _new_directory(place)
        except OSError as error:
            raise PrivilegeError(_no_file(place, error)) from error
        self.path = self._place / _NAME
        try:
            self.change(addresses)
        except OSError as error:
            self.remove()
            raise PrivilegeError(_no_file(place, error)) from error

    def change(self, addresses: Sequence[str]) -> None:
        """Have HCCL accept these addresses from its next communicator on. Raises OSError; then the old ones stay."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(_PARTIAL, flags, 0o600, dir_fd=self._directory), "w", encoding="ascii") as file:
            file.write(content(addresses))
        os.replace(_PARTIAL, _NAME, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def remove(self) -> None:
        """Remove the file and its directory."""
        _empty(self._directory)
        with contextlib.suppress(OSError):
            self._place.rmdir()
        self.close()

    def close(self) -> None:
        """Leave the file to whoever was told of it, and its removal to the user's next launcher."""
        os.close(self._directory)


def _single(network: Network) -> str:
    if network.prefixlen == network.max_prefixlen:
        return str(network.network_address)
    raise PolicyError(
        f"{_OPTION}: HCCL's list holds single addresses, and {network} is a network; name each node with --peers, or "
        f"leave {_OPTION} out on all nodes"
    )


def _require_room(nodes: int, ranks: int, addresses: int) -> None:
    """Where there are fewer addresses than nodes, as with containers that share one, some address has several nodes."""
    most = ranks * -(-nodes // addresses)
    if most > RANKS_AN_ADDRESS:
        raise PolicyError(
            f"{_OPTION}: HCCL accepts {RANKS_AN_ADDRESS} connections of an address, and this job has {most} ranks on "
            f"one, so it would hang; leave {_OPTION} out on all nodes"
        )


def _prefix() -> str:
    return f"securerun-{os.geteuid()}-"


def _new_directory(place: Path) -> tuple[Path, int]:
    """Make a directory of this user's alone; returns it and a descriptor that holds its lock. Raises OSError."""
    for _ in range(_ATTEMPTS):
        made = Path(tempfile.mkdtemp(prefix=_prefix(), dir=place))
        # The sweep of another launcher may take it between its making and its locking.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            directory = _locked(made)
            if _is_at(made, directory):
                return made, directory
            os.close(directory)
    raise FileNotFoundError(errno.ENOENT, "what is made there is removed at once", str(place))


def _locked(path: Path) -> int:
    """Open a directory with its lock, which goes with the last process that has the descriptor. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(directory)
        raise
    return directory


def _is_at(path: Path, directory: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(directory))
    return False


def _sweep(place: Path) -> None:
    """Remove the directories of this user's launchers that were killed."""
    for left in place.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            directory = _locked(left)
            try:
                status = os.fstat(directory)
                is_ours = (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), 0o700)
                if is_ours and not _somebody_was_told_of(left / _NAME):
                    _empty(directory)
                    left.rmdir()
            finally:
                os.close(directory)


def _somebody_was_told_of(path: Path) -> bool:
    """Return whether a process of this user was started with this list (proc(5), environ); others cannot read it."""
    return bool(processes.started_with(f"{FILE}={path}", proc.of_user(os.geteuid())))


def _empty(directory: int) -> None:
    for name in (_NAME, _PARTIAL):
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)


def _no_file(place: Path, error: OSError) -> str:
    return f"{_OPTION}: no file can be made in {place} ({error.strerror}); set TMPDIR to a directory of your own"
