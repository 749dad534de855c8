"""The guard as it is installed: how its program is started, and where root says what it may do for whom.

It is started with an interpreter that nothing but root's own files has a say in.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from securerun.errors import UsageError

NAME = "securerun-guard"
# Of a process of a guard's that only waits for it.
WAITING_NAME = "securerun-waits"
SOCKET_ARGUMENT, LISTEN_ARGUMENT = "--socket", "--listen"
# Of a guard that a launcher starts itself, and is likely to order with a key.
KEY_ARGUMENT = "--key"
# Of a launcher's end of a socket. Those of the release before have none, and take no field that they do not know.
_LAUNCHER_ADDRESS = "\0securerun-launcher-"
# And so ends the address of one that is likely to order with a key.
_OF_KEY_TO_COME = "-key"
# Where launchers look for guards. In a directory: a socket that is mounted by itself goes stale with its listener.
SOCKET = Path("/run/securerun.d/guard.sock")
# Of securerun.guard.limits.
LIMITS_FILE = Path("/etc/securerun/guard.toml")
# Of securerun.guard.keys: root's, the same on all nodes.
SITE_KEY = Path("/etc/securerun/site.key")
# All of securerun: what a guard runs is found in it.
PACKAGE = Path(__file__).parent.parent
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
# -I: a `socket.py` in the working directory, PYTHONPATH and the user's site-packages are not for the guard.
# -S: it needs the standard library alone, and site-packages' start-up files take longer than all of its own.
# The package's directory comes last on the path, so that nothing beside it can stand in for the standard library.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); from securerun.{module} import main; {end}(main(sys.argv[1:]))"
)
# Nothing of it is taken apart first: what others sent along on its sockets is for the kernel to close (sent_along.py).
_AT_ONCE = "__import__('os')._exit"
_USAGE = (
    "securerun starts this, by sudo or systemd, see securerunctl setup; for the containers of a node root "
    f"starts {NAME} {LISTEN_ARGUMENT} [SOCKET]"
)
# sudo says in it who called; nothing else of the environment is for the guard.
_KEPT = ("SUDO_UID",)


def command(*arguments: str) -> list[str]:
    """Return the command line of a guard with this interpreter and this package."""
    return _command("guard.server", arguments, _AT_ONCE)


def of_slurm(*arguments: str) -> list[str]:
    """Return the command line of what Slurm starts, with this interpreter and this package, as a guard is started."""
    return _command("slurm", arguments)


def _command(module: str, arguments: Sequence[str], end: str = "sys.exit") -> list[str]:
    return [sys.executable, "-I", "-S", "-c", _PROGRAM.format(module=module, end=end), _PACKAGE_PARENT, *arguments]


def listening(place: str) -> list[str]:
    """Return the command line of what starts a guard for each who connects to a socket."""
    return _command("guard.listener", (place,), _AT_ONCE)


def hook() -> list[str]:
    """Return the command line of the hook of container engines."""
    return _command("guard.container_hook", ())


def launcher_address(*, brings_key: bool = False) -> str:
    """Return an abstract address for a launcher's end of a socket: who is there reads which versions a guard speaks.

    brings_key: whether an order with a key is likely to come.
    """
    return f"{_LAUNCHER_ADDRESS}{os.urandom(8).hex()}{_OF_KEY_TO_COME * brings_key}"


def reads_versions(address: bytes | str) -> bool:
    """Return whether whoever has this address does; it is their own word, and nothing is granted by it."""
    return _name(address).startswith(_LAUNCHER_ADDRESS)


def brings_key(address: bytes | str) -> bool:
    """Return whether whoever has this address is likely to order with a key; likewise."""
    return reads_versions(address) and _name(address).endswith(_OF_KEY_TO_COME)


def _name(address: bytes | str) -> str:
    return address.decode("utf-8", "replace") if isinstance(address, bytes) else address


def say(words: str) -> None:
    """Say something to whoever started this by hand; sudo opens a closed standard error so that it takes nothing."""
    with contextlib.suppress(OSError):
        os.write(2, f"{NAME}: {words}\n".encode(errors="backslashreplace"))


def main() -> NoReturn:
    """Be the command securerun-guard: the same guard, begun anew without what the caller's environment may have loaded.

    Exits with 2 for wrong usage.
    """
    arguments = sys.argv[1:]
    listens = len(arguments) in (1, 2) and arguments[0] == LISTEN_ARGUMENT
    if not listens and not _is_right(arguments):
        say(_USAGE)
        sys.exit(UsageError.status)
    if listens:
        place = arguments[1] if len(arguments) > 1 else str(SOCKET)
        os.execve(sys.executable, listening(place), {})  # noqa: S606 - likewise
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    os.execve(sys.executable, command(*arguments), environment)  # noqa: S606 - that is the point: no shell


def _is_right(arguments: Sequence[str]) -> bool:
    return list(arguments) in ([], [SOCKET_ARGUMENT]) and all(map(_is_of_a_launcher, (0, 1)))


def _is_of_a_launcher(descriptor: int) -> bool:
    """Return whether a launcher may be at the other end: there is one, as of pipes and sockets alone."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # it is closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
