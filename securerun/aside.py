"""`python -m` looks into the working directory first, for what the standard library has as well: not while we begin.

Imports nothing but what is built in, so that nothing is looked for there before.
"""

import sys

_put_aside: list[str] = []


def put_working_directory() -> None:
    """Import nothing from the working directory until `put_back`: for modules that `python -m` starts.

    Until it is known who is to be whom: root may be about to start a job for another, where that one may write.
    """
    # -P and -I put nothing there (Python 3.11, 3.4).
    if not (_put_aside or getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
        _put_aside.extend(sys.path[:1])
        del sys.path[:1]


def put_back() -> None:
    """Have the path as it was; a script's own modules may be there."""
    sys.path[:0] = _put_aside
    _put_aside.clear()


def whole_path() -> list[str]:
    """Return the path as Python made it."""
    return [*_put_aside, *sys.path]
