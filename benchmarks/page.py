"""Writes what the benchmarks found and what their goals were, from benchmarks/results/*.json to docs/benchmarks.md.

python benchmarks/page.py [--results DIRECTORY] [--into FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import findings
from findings import Finding
from pictures import CHECKOUT, PICTURES

# In the order of benchmarks/README.md.
BENCHMARKS = (
    "exposure",
    "launch",
    "layers",
    "connect",
    "tags",
    "traffic",
    "ending",
    "guard",
    "start",
    "peers",
    "audit",
)
_PICTURE_OF = {benchmark: picture for picture, (benchmark, _) in PICTURES.items()}
_HEAD = """\
# What was measured

Written by `scripts/bench.sh`, which measures all of it anew; [benchmarks/README.md](../benchmarks/README.md) says
what each benchmark does, and why some goals are missed. A ratio is that of two medians from one run, in turns; where
there is one, the goal is for it. The middle half of the samples stands in parentheses.
"""


def page(results: Path) -> str:
    """The whole page, with a section for each benchmark whose results there are."""
    found = [(name, results / f"{name}.json") for name in BENCHMARKS]
    sections = ["\n".join(_section(name, path)) for name, path in found if path.exists()]
    return "\n".join([_HEAD, *sections])


def _section(name: str, path: Path) -> Iterator[str]:
    yield from (
        f"## {name}",
        "",
        f"{_machine(path)}; all samples: [{path.name}](../benchmarks/results/{path.name})",
        "",
    )
    if name in _PICTURE_OF:
        drawn = f"pictures/{_PICTURE_OF[name]}.svg"
        yield from (f'<img src="{drawn}" width="720" alt="Drawn from the same results as the table below.">', "")
    yield from ("| what | median | ratio | goal | |", "|---|---|---|---|---|")
    yield from map(_row, _worth_a_row(findings.read(path)))
    yield ""


def _machine(path: Path) -> str:
    machine = json.loads(path.read_text())["machine"]
    versions = f"Linux {machine['kernel']}, Python {machine['python']}, torch {machine['torch']}"
    return f"{machine['cpus']} processors, {versions}"


def _worth_a_row(found: dict[str, Finding]) -> Iterable[Finding]:
    """What has a goal, and what that is compared to."""
    compared = {each.against for each in found.values() if each.goal is not None}
    return (each for each in found.values() if each.goal is not None or each.name in compared)


def _row(found: Finding) -> str:
    low, high = (_short(end) for end in found.spread)
    ratio = "" if found.ratio is None else f"{found.ratio:.2f}" if found.ratio < 1 else f"{found.ratio:.3f}"
    goal = "" if found.goal is None else f"≤ {found.goal:g}" + (f" {found.unit}" if found.goal_of == "median" else "")
    verdict = {None: "", True: "met", False: "**missed**"}[found.met]
    return f"| {found.what} | {_short(found.median)} {found.unit} ({low} to {high}) | {ratio} | {goal} | {verdict} |"


def _short(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks/results")
    parser.add_argument("--into", type=Path, default=CHECKOUT / "docs/benchmarks.md")
    options = parser.parse_args()
    options.into.write_text(page(options.results))


if __name__ == "__main__":
    main()
