"""securerunctl setup key: the file by which the nodes of a user's jobs, or of all jobs of a site, know each other.

Made once, on one node, and copied to the others as an ssh key is. What is there already is never written over: jobs
that run now, and the other nodes, go by it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
from pathlib import Path

from securerun.errors import PolicyError, PrivilegeError
from securerun.guard.program import SITE_KEY
from securerun.host.account import name_of
from securerun.job.key import AUTO, OFF, REQUIRE, USERS
from securerun.linux import trust
from securerun.text import printable

_BYTES = 32
_USERS_MODE, _SITES_MODE = 0o600, 0o400
_DIRECTORY_MODE, _SITES_DIRECTORY_MODE = 0o700, 0o755
_ROOT = 0


def make(file: str | None, *, for_site: bool) -> None:
    """Make a key where `securerun` looks for it, or in another file, and print how the other nodes get it.

    for_site: the one that guards read, for all users. Raises PolicyError where there is a file already, and
    PrivilegeError where none can be made, or somebody else could put another in its place.
    """
    path = _place(file, for_site=for_site)
    mode = _SITES_MODE if for_site else _USERS_MODE
    try:
        if file is not None and path.is_dir():
            raise PolicyError(f"{printable(file)} is a directory; name the file in it that is to be made")
        _make_directory(path.parent, _SITES_DIRECTORY_MODE if for_site else _DIRECTORY_MODE)
        _require_own(path.parent)
        _write(path, mode)
    except FileExistsError as error:
        raise PolicyError(
            f"{printable(str(path))} is there already, and what runs goes by it; copy it to the other nodes, or move "
            "it away on all of them to make a new one"
        ) from error
    except OSError as error:
        raise PrivilegeError(
            f"{printable(str(path))} cannot be made ({error.strerror}); {_otherwise(for_site=for_site)}"
        ) from error
    for line in _told(path, mode, is_named=file is not None, for_site=for_site):
        print(line)


def _place(file: str | None, *, for_site: bool) -> Path:
    if for_site:
        return SITE_KEY
    if file == "":
        raise PolicyError(
            "the name of the file is empty; write one, or none for the key that securerun finds by itself"
        )
    try:
        path = (USERS if file is None else Path(file)).expanduser()
    except RuntimeError as error:  # ~nobody_of_that_name, or a user id that nobody knows, without HOME: of a container
        raise PolicyError(
            f"{USERS if file is None else printable(file)}: {str(error).rstrip('.')}; write the whole path of a file: "
            "securerunctl setup key FILE"
        ) from error
    if file is None and not path.is_absolute():
        raise PolicyError(
            f"HOME is {printable(os.environ.get('HOME', ''))!r}, which is no absolute path; correct it, or write the "
            "path of a file: securerunctl setup key FILE"
        )
    if file is None and os.geteuid() == _ROOT:
        # sudo may leave HOME as it was: the file would be root's, and its user could not read it.
        owner = path.parents[2].stat().st_uid if path.parents[2].exists() else _ROOT
        if owner != _ROOT:
            raise PrivilegeError(
                f"{path.parents[2]} is the home of {name_of(owner)}, and this is root; make it as that user, without "
                "sudo, or with --site for all users of the site"
            )
    return path


def _make_directory(place: Path, mode: int) -> None:
    """Make a directory and those above it that are missing, with no more rights than that, whatever the umask is."""
    if place.is_dir():
        return
    if not place.parent.is_dir():
        _make_directory(place.parent, mode)
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode)


def _require_own(place: Path) -> None:
    """Raise PrivilegeError where others than root and this user could put another key in its place."""
    weakness = trust.weak_point(place, trust.roots() | {os.geteuid()})
    if weakness is not None:
        raise PrivilegeError(
            f"whoever changes the key comes into the job, and others could: {weakness}; chown or chmod go-w it, or "
            "name a file in a directory that only you and root can change"
        )


def _write(path: Path, mode: int) -> None:
    """Make the file, whole or not at all. Raises FileExistsError, with what is there as it was, or OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(partial, flags, mode), "wb") as file:
        try:
            file.write(f"{secrets.token_hex(_BYTES)}\n".encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
            os.link(partial, path)  # which is refused where there is anything
        finally:
            partial.unlink()


def _told(path: Path, mode: int, *, is_named: bool, for_site: bool) -> list[str]:
    # As --key and scp take it for the file that it is.
    is_word = str(path) in (AUTO, OFF, REQUIRE) or str(path).startswith("-")
    written = shlex.quote(f"./{path}" if is_word else str(path))
    lines = [f"{printable(str(path))} is made (mode {mode:04o}). Every node of a job has to have the same one:"]
    if for_site:
        return [
            *lines,
            f"  install -d {path.parent} && scp -p NODE:{path} {path}    # as root, on each other node",
            'Guards read it, no user does: each user has keys of their own by it. site_key = "off" in '
            "/etc/securerun/guard.toml has it not used.",
        ]
    if is_named:
        return [*lines, f"  scp -p {written} NODE:{written}", f"  securerun --key {written} ..."]
    there = ".config/securerun"
    return [
        *lines,
        "  nothing to do where the home is shared between the nodes; else, for each other node:",
        f"  ssh NODE 'umask 077; mkdir -p {there}' && scp -p ~/{there}/key NODE:{there}/key",
        "Whoever reads it can come into your jobs. securerun finds it by itself (--key auto).",
    ]


def _otherwise(*, for_site: bool) -> str:
    return "run as root" if for_site else "name a file that you can make: securerunctl setup key FILE"
