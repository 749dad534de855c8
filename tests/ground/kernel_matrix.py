"""securerun on the kernels that people have: runs cells, keeps what they came to, writes the page.

    kernel_matrix.py                          every cell of tests/ground/kernel_cells.py, all night; then the page
    kernel_matrix.py '5.10/*' 6.12/arm64/v2   these; * and ? match more
    kernel_matrix.py --missing                those of which there is no result yet
    kernel_matrix.py --parts truth,left CELL  only these parts; results of the others stay as they are
    kernel_matrix.py --kernel DIRECTORY       a kernel of one's own: vmlinuz, release, modules/RELEASE
    kernel_matrix.py --run CELL COMMAND       boots such a machine, runs a command in its checkout; the kernel as a
                                              program, ten times as quick, is KERNEL/um/GROUND
    kernel_matrix.py --page | --list          only writes docs/kernels.md | prints the cells

Needs root. A result is docs/kernels/CELL.json, part by part with date and commit, so that cells can be run one at a
time; docs/kernels.md is made from them. Ends with status 1 if a part was not as it must be.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kernel_lab
import kernel_machine
import kernel_page
import kernel_program
from checkout import CHECKOUT
from kernel_cells import GROUNDS, KERNELS, Cell, all_cells, parse_cell
from kernel_lab import KernelFiles, LabError
from kernel_machine import MachineError

RESULTS = CHECKOUT / "docs/kernels"
PARTS = ("truth", "chains", "one", "two", "kills", "socket", "tests", "net_cls", "left")
ALL_TESTS = ("tests/firewall", "tests/guard", "tests/linux")
_TRIAL = "/srv/site/bin/python3 tests/ground/kernel_trial.py"
# For each of torch's runs and for all tests together, under emulation.
_SECONDS = 3600
_MEMORY_MIB, _MEMORY_FOR_TORCH_MIB = 1536, 3584


@dataclass(frozen=True)
class Trial:
    """What is to be done in a machine. torch: the parts that are torch's own runs. limit: seconds for all of it."""

    parts: Sequence[str] = PARTS
    torch: Sequence[str] = ()
    tests: Sequence[str] = ALL_TESTS
    seconds: int = _SECONDS
    processors: int = 1
    limit: int | None = None

    def of(self, cell: Cell) -> Trial:
        """Without what such a machine has not. One launch of torch is enough for aarch64."""
        parts = [part for part in self.parts if cell.has(part)]
        torch = [part for part in self.torch if part in parts and (part == "one" or cell.architecture == "amd64")]
        return replace(self, parts=parts, torch=torch)

    @property
    def command(self) -> str:
        torch = [word for part in self.torch for word in ("--torch", part)]
        tests = [word for test in self.tests for word in ("--tests", test)]
        return " ".join([_TRIAL, *map(shlex.quote, ["--seconds", str(self.seconds), *torch, *tests, *self.parts])])


def try_cell(cell: Cell, kernel: KernelFiles, trial: Trial) -> tuple[dict[str, Any], str]:
    """What the machine's document says, and its whole output. Raises MachineError where there is none."""
    trial = trial.of(cell)
    long_parts = len(trial.torch) + ("tests" in trial.parts)
    answer = kernel_machine.run(
        cell,
        kernel,
        trial.command,
        torch=bool(trial.torch),
        limit=trial.limit or long_parts * trial.seconds + 240 * len(trial.parts),
        memory_mib=_MEMORY_FOR_TORCH_MIB if trial.torch else _MEMORY_MIB,
        processors=trial.processors,
    )
    if not answer.document:
        raise MachineError(f"{cell}: the trial ended with status {answer.status}:\n{answer.output[-3000:]}")
    document: dict[str, Any] = json.loads(answer.document)
    if "tests" in document["parts"] and tuple(trial.tests) != ALL_TESTS:
        document["parts"]["tests"]["of"] = list(trial.tests)
    return document, answer.output


def kernel_of(cell: Cell, own: dict[str, Path]) -> KernelFiles:
    if cell.kernel in own:
        return kernel_lab.own_kernel(own[cell.kernel], cell.architecture)
    if cell.kernel not in KERNELS:
        raise LabError(f"there is no kernel {cell.kernel}; there are {', '.join(KERNELS)}, and --kernel DIRECTORY")
    if cell.is_program:
        return kernel_program.debian_kernel(cell.kernel)
    return kernel_lab.debian_kernel(cell.kernel, cell.architecture)


def keep(results: Path, cell: Cell, document: dict[str, Any], tried: str) -> None:
    """Write the parts that were tried, beside the others of this cell. tried: the commit."""
    results.mkdir(parents=True, exist_ok=True)
    file = results / cell.file_name
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    when = {"date": datetime.date.today().isoformat(), "commit": tried, "release": document["release"]}
    new = {name: {**part, **when} for name, part in document["parts"].items()}
    parts = {**kept.get("parts", {}), **new}
    whole = {"cell": str(cell), "release": document["release"], "machine": document["machine"]}
    ordered = {name: parts[name] for name in PARTS if name in parts}
    file.write_text(json.dumps({**whole, "parts": ordered}, indent=1, ensure_ascii=False) + "\n")


def commit() -> str:
    """The commit that is here; with a + where something was changed."""
    git = ["git", "-c", f"safe.directory={CHECKOUT}", "-C", str(CHECKOUT)]
    name = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "securerun"], check=False).returncode
    return name.strip() + ("+" if changed else "")


def chosen(patterns: Sequence[str], own: dict[str, Path], architecture: str) -> list[Cell]:
    """The cells that match, in their order."""
    everything = all_cells(tuple(Cell(name, architecture, ground) for name in own for ground in GROUNDS))
    if own and not patterns:
        return [cell for cell in everything if cell.kernel in own]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(str(cell), pattern) for cell in everything):
            raise LabError(f"no cell matches {pattern}; --list prints them")
    return [cell for cell in everything if not patterns or any(fnmatch.fnmatchcase(str(cell), one) for one in patterns)]


def run_cells(cells: Sequence[Cell], own: dict[str, Path], trial: Trial, results: Path) -> int:
    """Try them one after another, and keep each. Returns how many were not as they must be."""
    wrong = 0
    for cell in cells:
        begun, worked, tried = time.monotonic(), _processor_seconds(), commit()
        print(f"{cell} ...", flush=True)
        try:
            document, output = try_cell(cell, kernel_of(cell, own), trial)
        except (LabError, MachineError) as error:
            print(f"{cell}: {error}", flush=True)
            wrong += 1
            if isinstance(error, MachineError) and error.document:
                keep(results, cell, json.loads(error.document), tried)
            continue
        keep(results, cell, document, tried)
        for name, part in document["parts"].items():
            print(f"  {'yes' if part['ok'] else 'NO '} {name}: {part['says']} ({part['seconds']} s)", flush=True)
        if not all(part["ok"] for part in document["parts"].values()):
            wrong += 1
            print(output, flush=True)
        print(f"  {time.monotonic() - begun:.0f} s, {_processor_seconds() - worked:.0f} of a processor", flush=True)
    return wrong


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_command(words: Sequence[str], own: dict[str, Path], seconds: int, processors: int, *, torch: bool) -> int:
    text, *command = words
    cell = parse_cell(text)
    memory = _MEMORY_FOR_TORCH_MIB if torch else _MEMORY_MIB
    answer = kernel_machine.run(
        cell,
        kernel_of(cell, own),
        " ".join(command),
        torch=torch,
        limit=seconds,
        memory_mib=memory,
        processors=processors,
    )
    print(answer.output, end="")
    return answer.status


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tests", action="append", help="a word of pytest's (default: firewall, guard and linux)")
    parser.add_argument("--torch", default="one,two", help="which parts run torch; '' for none (default: one,two)")
    parser.add_argument(
        "--kernel", action="append", default=[], type=Path, help="a directory; its name is the kernel's"
    )
    parser.add_argument("--architecture", default="amd64", help="of kernels of one's own (default: amd64)")
    parser.add_argument("--seconds", type=int, default=_SECONDS, help="for each of torch's runs, and for the tests")
    parser.add_argument("--limit", type=int, help="seconds for a cell; what was done until then is kept")
    parser.add_argument("--processors", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_intermixed_args(arguments)
    _require_sense(parser, options)
    return options


def _require_sense(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End here, before any machine is booted, where something is asked for that there is not."""
    if options.run and len(options.cells) < 2:
        parser.error("--run takes a cell and a command: --run 6.12/amd64/v2 'uname -a'")
    for name in ("parts", "torch"):
        setattr(options, name, tuple(filter(None, getattr(options, name).split(","))))
        unknown = [part for part in getattr(options, name) if part not in PARTS]
        if unknown:
            parser.error(f"--{name}: there is no part {unknown[0]}; there are {', '.join(PARTS)}")
    if not options.parts:
        parser.error(f"--parts: nothing is to be tried; there are {', '.join(PARTS)}")


def main() -> int:
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a machine is in a session of its own, and ends by our hand
    options = parse()
    own = {path.resolve().name.removesuffix(f"-{options.architecture}"): path for path in options.kernel}
    tests = options.tests or ALL_TESTS
    trial = Trial(options.parts, options.torch, tests, options.seconds, options.processors, options.limit)
    status = 0
    try:
        if options.run:
            return run_command(options.cells, own, options.seconds, options.processors, torch=bool(options.torch))
        if not options.page:
            cells = chosen(options.cells, own, options.architecture)
            if options.missing:
                cells = [cell for cell in cells if not (options.results / cell.file_name).exists()]
            if options.list:
                print(*cells, sep="\n")
                return 0
            status = min(run_cells(cells, own, trial, options.results), 1)
    except (LabError, MachineError, ValueError) as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kernels: told to end", file=sys.stderr)
        return 130
    if options.results == RESULTS:
        kernel_page.PAGE.write_text(kernel_page.page(RESULTS))
    return status


if __name__ == "__main__":
    sys.exit(main())
