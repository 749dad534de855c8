"""What a benchmark found, in the one form that all of them write, and the options that all of them take.

    {"benchmark": "connect", "machine": {...}, "findings": [{"name": "connect.shield.10000", "what": "...",
     "unit": "us", "samples": [...], "median": 31.0, "spread": [30.2, 33.1], "ratio": 1.01,
     "against": "connect.none", "goal": 1.03, "goal_of": "ratio", "met": true}, ...]}

Each finding is a line of its own. A finding with a ratio was measured beside what it is compared to, in turns. Goals
are judged by what `goal_of` names: the ratio where there is one, since it says the same on another machine, else the
median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/ground"))

# Of the samples, as `statistics.quantiles` counts them: the middle half lies between.
_QUARTERS = 4


@dataclass(frozen=True)
class Finding:
    """One measured thing.

    name: where it belongs, with dots. what: one sentence. unit: of samples, median and spread. spread: the quartiles
    around the median. ratio: of the median to that of the finding `against`. goal: the most that the ratio (where
    there is one, or else the median) is to be; met: whether it is.
    """

    name: str
    what: str
    unit: str
    samples: tuple[float, ...]
    median: float
    spread: tuple[float, float]
    ratio: float | None = None
    against: str | None = None
    goal: float | None = None
    goal_of: str | None = None
    met: bool | None = None


def finding(
    name: str,
    what: str,
    unit: str,
    samples: Sequence[float],
    *,
    against: Finding | None = None,
    goal: float | None = None,
) -> Finding:
    """A finding with its statistics; `goal` is for the ratio where `against` is given."""
    median = statistics.median(samples)
    quarters = statistics.quantiles(samples, n=_QUARTERS, method="inclusive") if len(samples) > 1 else [median] * 3
    ratio = None if against is None else round(median / against.median, 4)
    judged = median if ratio is None else ratio
    return Finding(
        name=name,
        what=what,
        unit=unit,
        samples=tuple(_short(sample) for sample in samples),
        median=_short(median),
        spread=(_short(quarters[0]), _short(quarters[-1])),
        ratio=ratio,
        against=None if against is None else against.name,
        goal=goal,
        goal_of=None if goal is None else "median" if ratio is None else "ratio",
        met=None if goal is None else judged <= goal,
    )


def _short(number: float) -> float:
    return float(f"{number:.5g}")


def progress(words: str) -> None:
    """One line for whoever waits."""
    print(words, file=sys.stderr, flush=True)


def report(benchmark: str, found: Iterable[Finding], into: str | None) -> None:
    """Write what was found as one JSON text into a file, or to standard output."""
    listed = []
    for each in found:
        progress(_line(each))
        listed.append(asdict(each))
    text = as_text(benchmark, machine(), listed)
    if into is None:
        print(text, end="")
        return
    Path(into).parent.mkdir(parents=True, exist_ok=True)
    Path(into).write_text(text)


def as_text(benchmark: str, measured_on: Mapping[str, object], found: Iterable[Mapping[str, object]]) -> str:
    """Return the JSON text of what was found, a finding a line: a diff shows those that changed and nothing else."""
    head = f'{{"benchmark": {json.dumps(benchmark)}, "machine": {json.dumps(measured_on)}, "findings": ['
    return "\n".join([head, ",\n".join(map(json.dumps, found)), "]}", ""])


def read(path: Path) -> dict[str, Finding]:
    """The findings that a benchmark wrote, by their names."""
    document = json.loads(path.read_text())
    lists = ("samples", "spread")
    found = (Finding(**{**each, **{name: tuple(each[name]) for name in lists}}) for each in document["findings"])
    return {each.name: each for each in found}


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "torch": version("torch"),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def run(
    benchmark: str,
    description: str | None,
    measure: Callable[[argparse.Namespace], Iterable[Finding]],
    *,
    pairs: bool = False,
) -> None:
    """The whole of a benchmark's command line: --quick, --json, and --pairs for one that measures in pairs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: is it right, not how fast is it")
    parser.add_argument("--json", metavar="FILE", help="write there (default: standard output)")
    if pairs:
        parser.add_argument("--pairs", type=int, help="measurements of each kind (default: enough)")
    options = parser.parse_args()
    if pairs and options.pairs is not None and not 1 <= options.pairs <= 1000:
        parser.error("--pairs must be between 1 and 1000")
    report(benchmark, measure(options), options.json)


def _line(found: Finding) -> str:
    ratio = "" if found.ratio is None else f"  {found.ratio:g} of {found.against}"
    goal = "" if found.goal is None else f"  goal {found.goal:g}: {'met' if found.met else 'MISSED'}"
    low, high = found.spread
    return f"{found.name}: {found.median:g} {found.unit} ({low:g} to {high:g}){ratio}{goal}"
