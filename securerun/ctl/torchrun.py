"""securerunctl setup torchrun: a command `torchrun` that is securerun, for scripts and launchers that call it by name.

One file, in a directory that comes first in PATH. Whoever could change it would have whoever calls it, root too, run
what they like; so nobody but its owner can, and it has run before it stands there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from securerun.errors import PolicyError, PrivilegeError, UsageError
from securerun.linux import trust
from securerun.text import printable

NAME = "torchrun"
_MODE = 0o755
# By env(1), which says that an interpreter is gone: where the first line names it, execvp(3) then takes the next
# torchrun in PATH, and nobody notices. A shell would drop variables that it cannot name, such as exported functions.
_CALLER = "#!/usr/bin/env "
_MARK = "# Made by `securerunctl setup torchrun`: this is securerun. Whoever wants torchrun back removes this file."
_PROGRAM = f"""\
{_CALLER}PYTHON
{_MARK}
import os
import sys

if sys.path[:1] == [os.path.dirname(os.path.realpath(__file__))]:
    del sys.path[0]  # nothing is imported from what lies beside this file

if __name__ == "__main__":
    try:
        from securerun.linux import prctl
        from securerun.run import command
    except ModuleNotFoundError as error:
        python = f"{{sys.executable}} has no module {{error.name}}"
        sys.exit(f"torchrun: {{python}}; install securerun there with pip, or remove {{__file__}}")
    prctl.set_name("{NAME}")  # as pkill(1) knows it
    command()
"""
_MOST_READ = 4096
# It imports torch, from a file system that may be far away.
_PROOF_SECONDS = 120
# What is written before it stands there, and the age at which nobody waits for its proof any more.
_NEW, _DEAD_SECONDS = f".{NAME}-", 2 * _PROOF_SECONDS


def make(directory: str) -> None:
    """Make the command in a directory, which is made too where its parent is there; print what puts it in PATH.

    Raises UsageError for a place where it cannot be, PrivilegeError for one that others can change or this user
    cannot, and PolicyError where it cannot be written or would not run. Nothing is made or changed then.
    """
    place = _place(directory)
    program = _PROGRAM.replace("PYTHON", _interpreter(), 1)
    _require_own(place)
    there = place / NAME
    stood = _stands(there)
    try:
        with _made(place):
            _put(there, program)
    except OSError as error:
        raise _cannot_write(place, error) from error
    _tell(there, "is made anew" if stood else "is made")


def _place(directory: str) -> Path:
    place = Path(os.path.abspath(directory))  # noqa: PTH100 - without `..`, which PATH would go by another way
    if not directory or not str(place).isprintable() or ":" in str(place):
        raise UsageError(f"'{printable(directory)}' cannot stand in PATH; name a directory without a colon in its path")
    if os.path.lexists(place) and not place.is_dir():
        raise UsageError(f"{place} is no directory; name the one that is to have {NAME} in it")
    if not place.parent.is_dir():
        raise UsageError(f"{place.parent} is no directory; mkdir -p {shlex.quote(str(place))}, then this again")
    return place


def _interpreter() -> str:
    """Return this interpreter's path. Raises PolicyError for one that env(1) would not find."""
    if not sys.executable.isprintable() or "=" in sys.executable:
        raise PolicyError(
            f"'{printable(sys.executable)}' cannot stand in the first line of a script; install Python and securerun "
            "where the path has no = in it and nothing that does not print"
        )
    return sys.executable


def _require_own(place: Path) -> None:
    """Raise PrivilegeError where others than root and this user could put another command in its place."""
    weakness = trust.weak_point(place if place.exists() else place.parent, trust.roots() | {os.geteuid()})
    if weakness is not None:
        raise PrivilegeError(
            f"whoever calls {place / NAME} would run what others put there: {weakness}; chown or chmod go-w it, or "
            "name a directory that only you and root can change"
        )


def _stands(there: Path) -> bool:
    """Return whether a command of ours stands there. Raises UsageError for anything else, which is left as it is."""
    try:
        descriptor = os.open(there, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:  # a link, a socket, a file that is not ours to read
        raise _of_others(there) from None
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        lines = os.read(descriptor, _MOST_READ).decode(errors="replace").split("\n") if is_file else []
    finally:
        os.close(descriptor)
    if len(lines) < 2 or not lines[0].startswith(_CALLER) or lines[1] != _MARK:
        raise _of_others(there)
    return True


def _of_others(there: Path) -> UsageError:
    return UsageError(
        f"{there} is there already and is none of securerun's; name another directory, and have that one first in PATH"
    )


def _cannot_write(place: Path, error: OSError) -> PolicyError | PrivilegeError:
    kind = PrivilegeError if isinstance(error, PermissionError) else PolicyError
    return kind(
        f"no {NAME} can be written in {place}: {error.strerror}; name a directory that takes files of "
        "yours; nothing is changed here"
    )


@contextlib.contextmanager
def _made(place: Path) -> Iterator[None]:
    """Have the directory, for all to search as the command is for all to run; without the block's success it goes."""
    is_new = not place.exists()
    if is_new:
        place.mkdir()
        place.chmod(_MODE)
    try:
        yield
    except BaseException:
        if is_new:
            place.rmdir()
        raise


def _put(there: Path, program: str) -> None:
    """Write the command beside its place, have it run, and move it there."""
    _remove_remains(there.parent)
    descriptor, name = tempfile.mkstemp(prefix=_NEW, dir=there.parent)
    new = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(program)
            os.fchmod(descriptor, _MODE)
        _prove(new)
        new.replace(there)
    except BaseException:
        new.unlink()
        raise


def _remove_remains(place: Path) -> None:
    """Remove what a setup wrote that was killed, and none that may be at work still."""
    for path in place.glob(f"{_NEW}*"):
        with contextlib.suppress(OSError, UsageError):  # gone by now, or of others
            if time.time() - path.lstat().st_mtime > _DEAD_SECONDS and _stands(path):
                path.unlink()


def _prove(command: Path) -> None:
    """Have the command print its help, which takes all that it needs but a guard. Raises PolicyError if it cannot."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SECURERUN_")}
    try:
        done = subprocess.run(  # noqa: S603 - a file of our own
            [command, "--help"],
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROOF_SECONDS,
            check=False,
        )
        words = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        words = f"no answer for {_PROOF_SECONDS} s"
    except OSError as error:
        words = f"{error.strerror}; is it mounted noexec?" if error.errno == errno.EACCES else str(error.strerror)
    if words:
        raise PolicyError(f"a {NAME} in {command.parent} would not run: {printable(words)}; nothing is made there")


def _tell(there: Path, done: str) -> None:
    """Say what was done on standard error; standard output is what a shell is to do, for `eval`."""
    print(f"securerunctl: {there} {done}; it is securerun, run by {sys.executable}", file=sys.stderr)
    if shutil.which(NAME) == str(there):
        print(f"securerunctl: in this PATH it is {NAME} already", file=sys.stderr)
        return
    print(f'export PATH={shlex.quote(str(there.parent))}:"$PATH"')
