"""Writes a line into the table of docs/versions.md, in place of the one that is there for this Python and torch.

    scripts/versions_page.py PYTHON TORCH CELL...

scripts/torches.sh calls it. TORCH is a whole version; the table has one line for each 2.N.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/versions.md"
_ROW = re.compile(r"^\| (3\.\d+) \| (\d+\.\d+)[^|]*\|.*\n", re.MULTILINE)
_COLUMNS = 6


def with_row(page: str, python: str, torch: str, cells: list[str], day: str) -> str:
    """Return the page with this line in its table, which is sorted by Python and torch."""
    rows = {match.groups(): match.group() for match in _ROW.finditer(page)}
    begin = next(iter(_ROW.finditer(page))).start() if rows else len(page)
    family = ".".join(re.split(r"[.+]", torch)[:2])
    filled = [python, torch, *cells, *[""] * (_COLUMNS - 3 - len(cells)), day]
    rows[python, family] = f"| {' | '.join(filled)} |\n"
    table = "".join(rows[key] for key in sorted(rows, key=_numbers))
    return page[:begin] + table + _ROW.sub("", page[begin:])


def _numbers(key: tuple[str, ...]) -> list[list[int]]:
    return [[int(number) for number in version.split(".")] for version in key]


def main() -> None:
    python, torch, *cells = sys.argv[1:]
    page = with_row(PAGE.read_text(), python, torch, cells, time.strftime("%Y-%m-%d"))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
