"""What guards of this checkout wrote of themselves on this machine, where neither journal nor system log hears them."""

from __future__ import annotations

from pathlib import Path

from checkout import CHECKOUT

from securerun.guard import log

# Of a guard that ended by an error which nobody had thought of: another takes over, so that hardly a test would notice.
_DEFECT = "a defect of securerun's"


class GuardsLog:
    """Reads on from where the log ended at first. Tests beside these, and other checkouts', write to it too."""

    def __init__(self, path: Path = log.FILE) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def defects(self) -> list[str]:
        """The lines since that tell of a defect of this checkout's, or of one whose place tells no checkout."""
        return [line for line in self._more().splitlines() if _DEFECT in line and _may_be_ours(line)]

    def _more(self) -> str:
        if not self._path.exists():
            return ""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            said = file.read()
        self._offset += len(said)
        return said.decode(errors="replace")


def _may_be_ours(line: str) -> bool:
    return f"{CHECKOUT}/securerun/" in line or "/securerun/" not in line
