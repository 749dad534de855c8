"""Where pip puts packages for this interpreter, also where `site` has not run (`python -S`, as the guard)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path


def directories() -> Iterator[Path]:
    """Yield the directories of installed packages, the nearest first; they may not exist."""
    # Before Python 3.14 it takes `site` to make sys.prefix the virtual environment's.
    environment = Path(sys.executable).parent.parent
    if (environment / "pyvenv.cfg").is_file():
        # There as the standard library is below its own prefix, by the version (`posix_prefix`).
        yield environment / sys.platlibdir / Path(os.__file__).parent.name / "site-packages"
        return
    import sysconfig  # reads how this Python was built

    yield Path(sysconfig.get_path("platlib"))
    # Debian's own packages.
    if "deb_system" in sysconfig.get_scheme_names():
        yield Path(sysconfig.get_path("platlib", "deb_system"))


def version(package: str) -> str | None:
    """Return the version of a package that is installed; None where there is none of that name."""
    from importlib import metadata  # reads e-mail headers, which nobody wants to load for less

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
