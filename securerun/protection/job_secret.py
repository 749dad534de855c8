"""The secret of a job's own programs: the same on all nodes of a job that has a key, and nobody else's.

For what frameworks ask for and nobody gives them: a token, a key for HMAC. The guard makes it of the job's key, from
which nobody gets back to that, and keeps it in a file for as long as the job runs.
"""

from __future__ import annotations

import os
from pathlib import Path

from securerun.errors import PolicyError
from securerun.guard.protocol import SECRET_PATH_VARIABLE
from securerun.linux import secret_file, trust
from securerun.linux.secret_file import Unfit


def job_secret() -> bytes:
    """Return the secret of the job that this process is in: 64 hexadecimal digits, as its file has them.

    Raises PolicyError, in one line, where the job has none: never another secret in its place.
    """
    name = os.environ.get(SECRET_PATH_VARIABLE, "")
    if not name:
        raise PolicyError(
            f"this job has no secret ({SECRET_PATH_VARIABLE} is not set): its nodes have no key in common; see "
            "`securerunctl setup key`, and start the job by securerun"
        )
    try:
        return secret_file.read(Path(name), trust.roots() | {os.geteuid()})
    except FileNotFoundError as error:
        raise PolicyError(
            f"{SECRET_PATH_VARIABLE}: there is no {name}: its job has ended, or is on another host"
        ) from error
    except Unfit as error:
        raise PolicyError(f"{SECRET_PATH_VARIABLE}: {name} {error}") from error
