"""The block of `--help` that stands beside torch's own, or that of a command which starts another."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from securerun.options import GROUPS, OPTIONS, SITE_CONFIG, Option

_COLUMN = 23


def written(options: Sequence[Option] = OPTIONS, before: str = "the script") -> str:
    """Return the block of `--help` that stands beside torch's own, or that of a command which begins `before` another.

    A line an option, so that all of them are seen at once; docs/options.md has the rest.
    """
    columns = width()
    flags = " and ".join(option.flag for option in OPTIONS if not option.in_file)
    introduction = (
        f"securerun options, before {before}, by their full names; each also as an environment variable "
        f"(SECURERUN_PEERS) and, {flags} aside, as a key in {SITE_CONFIG}. docs/options.md says more of each."
    )
    lines = textwrap.wrap(introduction, columns, break_on_hyphens=False)
    for group in GROUPS:
        lines += ["", f"{group}:"]
        for option in options:
            if option.group == group:
                lines += _lines_of(option, columns)
    return "\n".join(lines) + "\n"


def _lines_of(option: Option, columns: int) -> list[str]:
    name = f"  {option.synopsis}"
    indent = " " * _COLUMN
    return textwrap.wrap(option.summary, columns, initial_indent=name.ljust(_COLUMN), subsequent_indent=indent)


def width() -> int:
    """How wide a help text is to be, in characters."""
    return max(60, min(100, shutil.get_terminal_size().columns - 2))
