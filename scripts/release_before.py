#!/usr/bin/env python3
"""Write tests/ground/release_before.zip: the launcher's side of a lease as a release had it, and no other module of it.

    scripts/release_before.py v0.1.0

Guards serve launchers of the release before, since images and environments are of any age; tests have that one speak to
today's guard. Kept as it was, since a clone may have no history. To be written once a release is made.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PLACE = TOP / "tests" / "ground" / "release_before.zip"
# What of it is asked for; the rest is what that imports.
_LOAD = "import sys; sys.path.insert(0, sys.argv[1]); import securerun.protection.client; print(*sys.modules)"
_AGE = (1980, 1, 1, 0, 0, 0)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory, "release.tar")
        subprocess.run(["git", "-C", TOP, "archive", f"--output={archive}", sys.argv[1], "securerun"], check=True)  # noqa: S607
        with tarfile.open(archive) as packed:
            packed.extractall(directory, filter="data")
        words = [sys.executable, "-I", "-S", "-c", _LOAD, directory]
        loaded = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
        with zipfile.ZipFile(PLACE, "w", zipfile.ZIP_DEFLATED) as written:
            for module in sorted(name for name in loaded if name.partition(".")[0] == "securerun"):
                path = Path(*module.split("."))
                path = path / "__init__.py" if Path(directory, path).is_dir() else path.with_suffix(".py")
                entry = zipfile.ZipInfo(str(path), _AGE)
                written.writestr(entry, Path(directory, path).read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
