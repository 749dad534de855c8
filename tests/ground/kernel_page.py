"""What the kernel matrix came to, as a page: docs/kernels.md from docs/kernels/*.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkout import CHECKOUT
from kernel_cells import ARCHITECTURES, Cell, all_cells, parse_cell

PAGE = CHECKOUT / "docs/kernels.md"
_COLUMNS = {
    "truth": "doctor is right",
    "chains": "port chains",
    "one": "one node",
    "two": "two nodes",
    "kills": "kill -9",
    "socket": "socket unit",
    "tests": "tests",
    "net_cls": "net_cls meanwhile",
    "left": "nothing left",
}
_GROUNDS = {
    "v2": "version 2",
    "hybrid": "hybrid",
    "v1": "version 1 alone",
    "systemd-v2": "systemd, version 2",
    "systemd-v1": "systemd, version 1 alone",
}
# Why a kernel or a machine cannot have something, where the product or a test says only that it has not.
_WHY = {
    r"net_cls or net_prio": "The kernel has version 1's net_cls and net_prio in use and not the fix 8520e224f547, so "
    "filters on a cgroup do not run for new sockets ([backends.md](backends.md)).",
    r"was switched off and the scope was ports": "The kernel has not the fix 8520e224f547. From then on the port "
    "chains close each port once it is seen: within 0.2 s on a machine that is not emulated.",
    r"flags owner|owner.*5\.12": "A table that belongs to its guard needs Linux 5.12; iptables is as good.",
    r"and then \d+ s were over": "The tests were cut short: emulated they take more than an hour.",
}
_HEAD = """\
# Kernels that it was tried on

Written by `scripts/kernels.sh` from what each cell came to (`docs/kernels/`); run any of them again:

```text
scripts/kernels.sh --list
scripts/kernels.sh 5.10/arm64/v1
scripts/kernels.sh --kernel DIRECTORY      a kernel of your own
```

Each row is a machine that QEMU emulates: Debian's kernel (but the two `-void`: 5.10.262 without a fix, one of them
held to what 4.19 knows of BPF), and cgroups as an init mounts them, or systemd itself. In it

- **doctor is right**: what `securerunctl doctor` says of the shield is what a stranger in another network namespace
  finds, who tries the random ports of a guarded process; **port chains**: likewise of each backend by itself;
- **one node**, **two nodes**: a run's status and output are its command's, and the stranger reaches no port; *torch*
  where torch trained, else light jobs behind `securerunctl exec`;
- **kill -9** of the guard, after which another takes over, and of the launcher, after which nothing of the job runs on;
- **socket unit**: an ordinary user's run by the units that `securerunctl setup systemd` prints;
- **tests**: those of the shield, the port chains, the guard and the kernel's interfaces, without torch; a test that the
  kernel lacks something for is skipped, and says what;
- **net_cls meanwhile**: version 1's net_cls comes into use in the middle of a job, beside it and in it, as when Docker
  starts a container: before the kernel's fix 8520e224f547 that switches filters on cgroups off;
- **nothing left**: no rule, cgroup, record, reserved port or guard, when all that is done.

A number is that of an explanation below the table; - does not apply: a socket unit takes systemd, and net_cls the
hierarchies of version 1.

What more of the suite ran in such machines, what did not, and which kernels are not Debian's:
[kernels/suite.md](kernels/suite.md).
"""


def page(results: Path) -> str:
    found = _results(results)
    notes: list[str] = []
    rows = [_row(cell, document, notes) for cell, document in found]
    missing = [cell for cell in all_cells() if cell not in dict(found)]
    head = ["kernel", "processor", "cgroups", "shield", *_COLUMNS.values(), "tried"]
    table = [_line(head), _line(["---"] * len(head)), *rows]
    parts = [_HEAD, "\n".join(table), ""]
    if notes:
        parts += ["## Every no, and what was skipped", "", *_numbered(notes), ""]
    if missing:
        parts += ["## Not run yet", "", ", ".join(f"`{cell}`" for cell in missing), ""]
    return "\n".join(parts)


def _results(results: Path) -> list[tuple[Cell, dict[str, Any]]]:
    """In the order of the cells; kernels of one's own come last."""
    documents = {
        parse_cell(document["cell"]): document
        for document in (json.loads(file.read_text()) for file in sorted(results.glob("*.json")))
    }
    known = [cell for cell in all_cells() if cell in documents]
    return [(cell, documents[cell]) for cell in (*known, *(cell for cell in documents if cell not in known))]


def _row(cell: Cell, document: dict[str, Any], notes: list[str]) -> str:
    parts = document["parts"]
    tried = sorted({f"{part['date']} {part['commit']}" for part in parts.values()})
    kernel = f"{cell.kernel}<br>{document['release']}"
    shield = _shield(parts.get("truth"), notes)
    words = [_word(name, parts.get(name), notes) if cell.has(name) else "-" for name in _COLUMNS]
    return _line([kernel, ARCHITECTURES[cell.architecture], _GROUNDS[cell.ground], shield, *words, "<br>".join(tried)])


def _shield(truth: dict[str, Any] | None, notes: list[str]) -> str:
    if truth is None:
        return "not yet"
    if truth["ok"] and truth["says"].startswith("shield"):
        return "yes"
    return f"no {_reference(truth['says'], notes)}"


def _word(name: str, part: dict[str, Any] | None, notes: list[str]) -> str:
    if part is None:
        return "not yet"
    if not part["ok"]:
        return f"**no** {_reference(part['says'], notes)}"
    if name == "chains":
        return str(part["says"])
    if name == "tests":
        figures, _, skips = part["says"].partition("; ")
        if "of" in part:
            notes_of = "Only " + ", ".join(f"`{test}`" for test in part["of"]) + "."
            figures = f"{figures}, of some {_reference(notes_of, notes)}"
        return f"{figures} {_reference(skips, notes)}" if skips else str(figures)
    if name == "net_cls" and "switched off" in part["says"]:
        return f"yes, by the port chains {_reference(part['says'], notes)}"
    torch = " (torch)" if part["says"].startswith("torch") else ""
    return f"yes{torch}"


def _reference(says: str, notes: list[str]) -> str:
    """The number of the note with these words; one for all that say the same."""
    if says not in notes:
        notes.append(says)
    return f"[{notes.index(says) + 1}]"


def _numbered(notes: Sequence[str]) -> Iterator[str]:
    for number, says in enumerate(notes, 1):
        why = " ".join(text for pattern, text in _WHY.items() if re.search(pattern, says))
        words = says.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
        yield f"{number}. {words}{' ' if why else ''}{why}"


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"
