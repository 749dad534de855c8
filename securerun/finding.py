"""What is to be fixed: on a host, of a launch, or among its files."""

from __future__ import annotations

from dataclasses import dataclass

from securerun.text import printable


@dataclass(frozen=True)
class Finding:
    """One thing to fix.

    name: of the check, the same for all that it finds. what: what was found. why: what comes of it. fix: the command.
    """

    name: str
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return printable(f"{self.what}: {self.why}; fix: `{self.fix}`")

    def document(self) -> dict[str, str]:
        """Return the finding as JSON's own types, as reports and `securerunctl doctor --json` have it."""
        return {"name": self.name, "what": self.what, "why": self.why, "mend": self.fix}
