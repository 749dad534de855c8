"""`python -m securerun.launch`: in place of `python -m torch.distributed.launch`.

The same options, `--use-env` among them, the same `--local-rank` for scripts that want it, and the same warning that
the module is deprecated; and securerun's own options beside them.
"""

from __future__ import annotations

from securerun import aside

if __name__ == "__main__":
    aside.put_working_directory()

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from securerun import run
from securerun.ending import exit_quickly
from securerun.errors import UsageError
from securerun.job import originals
from securerun.job.launchers import Command, Launcher


@dataclass(frozen=True)
class _Command(Command):
    def run(self) -> None:
        """Run the job as `python -m torch.distributed.launch` does."""
        originals.call(originals.LAUNCH, "main", list(self.arguments))


@dataclass(frozen=True)
class _Launcher(Launcher):
    def parse(self, arguments: Sequence[str]) -> Command:
        """Read a command line with torch.distributed.launch's own parser."""
        namespace, _ = self.complete(arguments)
        return _Command(self, namespace, tuple(arguments))


def main(args: Sequence[str] | None = None) -> None:
    """Run a job as `torch.distributed.launch.main` would, its network closed to strangers; see `securerun.run.main`."""
    _start(args, goes_on=True)


def _start(args: Sequence[str] | None, *, goes_on: bool) -> None:
    run.start(args, _Launcher("torch.distributed.launch", _read), recorded=False, goes_on=goes_on)


def _read(arguments: Sequence[str]) -> tuple[argparse.Namespace, Sequence[str]]:
    namespace: argparse.Namespace = originals.call(originals.LAUNCH, "parse_args", arguments)
    if namespace.no_python and not namespace.use_env:
        raise UsageError("--no-python: --local-rank is an argument for Python scripts; write --use-env as well")
    return namespace, ()


if __name__ == "__main__":
    _start(None, goes_on=False)
    exit_quickly()
