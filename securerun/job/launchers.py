"""What is being launched, and by which of torch's launchers: its command line, read by its own parser, as data.

The rules are those of `torch.distributed.run` from 2.1 to 2.14: `run`, `config_from_args` and
`get_rdzv_endpoint`, and of the rendezvous handlers under `torch/distributed/elastic/rendezvous`; for torch_npu_run,
those of `torch_npu.distributed.run` and `torch_npu.distributed.rendezvous`.
Everything comes from the parsed command line (PET_* variables included, the parser reads them); WORLD_SIZE and RANK
of the environment mean other things under other schedulers and are never looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable

from securerun.errors import UsageError
from securerun.job import completing, originals
from securerun.job.job import C10D, C10D_PORT, ETCD, ETCD_V2, PARALLEL, STATIC, Endpoint, Job, explicit_id
from securerun.options import Arity

if TYPE_CHECKING:
    from securerun.job.elsewhere import Elsewhere

# torch/distributed/elastic/rendezvous/etcd_rendezvous.py and etcd_rendezvous_backend.py, _create_etcd_client
ETCD_PORT = 2379
# torch/distributed/run.py, run(): the port of static rendezvous where the parser has no default for it (2.12)
STATIC_PORT = 29500
# torch/distributed/run.py, get_args_parser(): where the store is if nothing says so.
_MASTER_ADDR = "127.0.0.1"

# The option that torch_npu_run has beside torchrun's: torch_npu 2.1 to 2.13, torch_npu/distributed/run.py.
_TIERED = "enable_tiered_parallel_tcpstore"

_NO_PORT = -1
# argparse.ArgumentParser._negative_number_matcher: such a token is a positional argument, not an option.
_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")


@dataclass(frozen=True)
class Launcher:
    """A command that securerun stands in for.

    complete: the namespace of its command line, as its own parser reads it, and the options that it would fail
        without. Raises SystemExit as argparse does, and UsageError where the launcher is not installed.
    reads_argv: whether it reads its command line once more, from sys.argv, while the job runs.
    """

    name: str
    complete: Callable[[Sequence[str]], tuple[argparse.Namespace, Sequence[str]]]
    reads_argv: bool = False

    def parse(self, arguments: Sequence[str]) -> Command:
        """Read a command line without securerun's own options, as the launcher would."""
        namespace, missing = self.complete(arguments)
        return Command(self, namespace, (*missing, *arguments))


@dataclass(frozen=True)
class Command:
    """A launcher's command line, read and complete. arguments: what it must find in sys.argv after the first word."""

    launcher: Launcher
    namespace: argparse.Namespace
    arguments: tuple[str, ...]

    def run(self) -> None:
        """Run the job to its end, in this process; raises what torch raises."""
        with _command_line(self.arguments) if self.launcher.reads_argv else contextlib.nullcontext():
            originals.call(originals.RUN, "run", self.namespace)


def choose(name: str, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Launcher:
    """Return the launcher of that name; for `auto`, the one that has what the command line asks for.

    parser: `parser_of_all()`.
    """
    if name == "auto":
        name = "torch_npu_run" if _asks_for_torch_npu(parser, arguments) else "torchrun"
    return LAUNCHERS[name]


def parser_of_all() -> argparse.ArgumentParser:
    """Return a parser that knows every launcher's options, to tell which launcher a command line is for."""
    parser: argparse.ArgumentParser = originals.call(originals.RUN, "get_args_parser")
    parser.add_argument(f"--{_TIERED}")
    return parser


def values_of(parser: argparse.ArgumentParser) -> Arity:
    """Return how many values the options of a parser take, for `securerun.options.take`.

    The function that is returned reads a token as argparse does (ArgumentParser._parse_optional): exact names,
    `--name=value`, abbreviations, short options run together. None means a positional argument; an option that the
    parser does not know has no values. Launchers have no options with a variable number of values.
    """
    counts = {spelling: _count(action) for action in parser._actions for spelling in action.option_strings}

    def arity(token: str) -> int | None:
        if len(token) < 2 or not token.startswith("-"):
            return None
        if token in counts:
            return counts[token]
        found = _long(token, counts) if token.startswith("--") else _short(token, counts)
        if found is not None:
            return found
        return None if _NEGATIVE_NUMBER.fullmatch(token) or " " in token else 0

    return arity


def describe_job(namespace: argparse.Namespace) -> Job:
    """Return the job that torch would run for these parsed arguments.

    Raises UsageError, in one line, where torch would raise in the middle of a launch.
    """
    min_nodes, max_nodes = _nodes(namespace.nnodes)
    backend, endpoint = _rendezvous(namespace, max_nodes)
    module = ("-m",) if namespace.module else ()
    return Job(
        backend=backend,
        endpoint=endpoint,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        node_rank=getattr(namespace, "node_rank", 0),  # torch does not ask for it either, but in static rendezvous
        command=(*module, namespace.training_script, *namespace.training_script_args),
        log_dir=namespace.log_dir,
        elsewhere=_elsewhere(namespace),
        local_address=getattr(namespace, "local_addr", None) or None,
        rendezvous_id=explicit_id(getattr(namespace, "rdzv_id", None)),
    )


def _elsewhere(namespace: argparse.Namespace) -> tuple[Elsewhere, ...]:
    """Return what the workers have others start, where they are commands and no Python."""
    if not getattr(namespace, "no_python", False):
        return ()
    from securerun.job import elsewhere

    return elsewhere.of_command([namespace.training_script, *namespace.training_script_args])


def _count(action: argparse.Action) -> int:
    if action.nargs is None:
        return 1
    return action.nargs if isinstance(action.nargs, int) else 0


def _long(token: str, counts: dict[str, int]) -> int | None:
    name, equals, _ = token.partition("=")
    matches = {count for spelling, count in counts.items() if spelling.startswith(name)}
    if not matches:
        return None
    if equals:
        return 0
    # torch spells each option twice (--rdzv-conf, --rdzv_conf), and Pythons differ on whether an abbreviation of both
    # is ambiguous: torch's parser says so if it is. What counts here is that all of them take as many values.
    return matches.pop() if len(matches) == 1 else 0


def _short(token: str, counts: dict[str, int]) -> int | None:
    """`-r3` carries its value, `-mr 3` is `-m -r 3`."""
    if f"-{token[1]}" not in counts:
        return None
    for position, letter in enumerate(token[1:], 1):
        count = counts.get(f"-{letter}", 0)
        if count:
            return count if position == len(token) - 1 else 0
    return 0


def _nodes(nnodes: str) -> tuple[int, int]:
    """torch.distributed.run.parse_min_max_nnodes, and the check in config_from_args."""
    ends = nnodes.split(":")
    try:
        numbers = [int(end) for end in ends]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UsageError(f"--nnodes {nnodes!r} is no number of nodes; write --nnodes 2, or --nnodes 1:4 for a range")
    least, most = numbers[0], numbers[-1]
    if not 0 < least <= most:
        raise UsageError(
            f"--nnodes {nnodes!r} must hold at least one node, the smaller number first; write --nnodes 1:4"
        )
    return least, most


def _rendezvous(namespace: argparse.Namespace, max_nodes: int) -> tuple[str, Endpoint | None]:
    """torch.distributed.run.run, and get_rdzv_endpoint after it."""
    if namespace.standalone:
        return C10D, Endpoint("localhost", 0)
    backend: str = namespace.rdzv_backend
    text: str = namespace.rdzv_endpoint
    if backend == STATIC:
        return _static(namespace, text, max_nodes)
    if backend == C10D:
        return backend, None if _has_file_store(namespace.rdzv_conf) else _parse(text, C10D_PORT)
    if backend in {ETCD, ETCD_V2}:
        return backend, _parse(text, ETCD_PORT)
    if backend == PARALLEL and namespace.master_port is not None:
        # _create_parallel_handler: the store listens there, whatever the endpoint says.
        return backend, _parse(f"{namespace.master_addr}:{namespace.master_port}", _NO_PORT)
    return backend, _parse_of_plugin(text)


def _static(namespace: argparse.Namespace, text: str, max_nodes: int) -> tuple[str, Endpoint]:
    if text:
        endpoint = _parse(text, _NO_PORT)
        if endpoint.port == _NO_PORT:
            raise UsageError(
                f"--rdzv-endpoint {text!r} has no port, and static rendezvous needs one; write {text}:29500"
            )
        return STATIC, endpoint
    port = namespace.master_port
    # From torch 2.12 the parser has no default port, and one node without one turns to c10d on a random port.
    if port is None and max_nodes == 1:
        return C10D, Endpoint("localhost", 0)
    return STATIC, _parse(f"{namespace.master_addr}:{STATIC_PORT if port is None else port}", _NO_PORT)


def _parse(text: str, default_port: int) -> Endpoint:
    # Imported here: what a job is can be told without torch, only torch's way to write an endpoint cannot.
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        return Endpoint(*parse_rendezvous_endpoint(text, default_port))
    except ValueError as error:
        raise UsageError(
            f"rendezvous endpoint {text!r} is no HOST:PORT with a port below 65536; write node0:29400"
        ) from error


def _parse_of_plugin(text: str) -> Endpoint | None:
    """Read a plug-in's endpoint, whose meaning is the plug-in's own.

    What looks like a host and a port is taken for that.
    """
    if not text.strip():
        return None
    try:
        endpoint = _parse(text, 0)
    except UsageError:
        return None
    return endpoint


def _has_file_store(rdzv_conf: str) -> bool:
    """c10d_rendezvous_backend.create_backend; a configuration that is badly written is for torch to refuse."""
    return any(value == "file" for value in _settings(rdzv_conf, "store_type"))


def _settings(rdzv_conf: str, name: str) -> Iterable[str]:
    for setting in rdzv_conf.split(","):
        key, _, value = setting.partition("=")
        if key.strip() == name:
            yield value.strip().lower()


def _torchrun(arguments: Sequence[str]) -> tuple[argparse.Namespace, Sequence[str]]:
    """torch.distributed.run.main, up to its `run`."""
    parser: argparse.ArgumentParser = originals.call(originals.RUN, "get_args_parser")
    if completing.is_asked_for(arguments):
        completing.prepare(parser)
    return parser.parse_args(arguments), ()


def _torch_npu_run(arguments: Sequence[str]) -> tuple[argparse.Namespace, Sequence[str]]:
    """torch_npu.distributed.run._main, up to its `run`, and made to work without --master-port."""
    namespace: argparse.Namespace = _import_torch_npu().parse_args(arguments)
    namespace.rdzv_backend = PARALLEL
    if namespace.standalone:  # torch's run() turns to c10d on a random port
        return namespace, ()
    missing = _missing_of_torch_npu(namespace)
    if not namespace.rdzv_endpoint:
        namespace.rdzv_endpoint = f"{namespace.master_addr}:{namespace.master_port}"
    return namespace, missing


def _missing_of_torch_npu(namespace: argparse.Namespace) -> Sequence[str]:
    """Return what torch_npu_run needs beside torch 2.12 and newer, whose parser has no default for --master-port.

    It listens at --master-addr and --master-port even if an endpoint is given, and tells its workers the endpoint;
    without a port it would try to listen at `127.0.0.1:None`. So an endpoint stands for what is not given.
    """
    if namespace.master_port is not None:
        return ()
    if not namespace.rdzv_endpoint:
        namespace.master_port = STATIC_PORT
        return ("--master-port", str(STATIC_PORT))
    endpoint = _parse(namespace.rdzv_endpoint, STATIC_PORT)
    host = endpoint.written_host
    if namespace.master_addr == _MASTER_ADDR:
        namespace.master_addr = host
    namespace.master_port = endpoint.port
    namespace.rdzv_endpoint = f"{host}:{endpoint.port}"
    return ("--master-addr", namespace.master_addr, "--master-port", str(endpoint.port))


def _import_torch_npu() -> Any:  # noqa: ANN401 - a module
    """torch_npu's launcher; importing it also makes the `parallel` rendezvous known to torch."""
    import torch

    try:
        return importlib.import_module("torch_npu.distributed.run")
    except Exception as error:  # of torch_npu's own (_cann_package_check) if a variable of set_env.sh is missing
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            version = torch.__version__.partition("+")[0]
            raise UsageError(
                f"torch_npu_run is asked for and {sys.executable} has no module torch_npu; install it there: "
                f"pip install 'torch-npu=={version}.*'"
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UsageError(
            f"torch_npu_run is asked for and torch_npu cannot be imported ({reason}); run `source set_env.sh` in the "
            "directory where CANN is installed, then this again"
        ) from error


def _asks_for_torch_npu(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> bool:
    """Return whether the rendezvous is torch_npu's own, or an option is that torchrun does not have."""
    if os.environ.get(f"PET_{_TIERED.upper()}", "").lower() == "true":
        return True
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # Options that no launcher has are for the chosen one to refuse.
            namespace, _ = parser.parse_known_args(arguments)
    except SystemExit:  # --help, or what no parser can read: torchrun answers it
        return False
    return namespace.rdzv_backend == PARALLEL or getattr(namespace, _TIERED) is not None


@contextlib.contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [*before[:1], *arguments]
    try:
        yield
    finally:
        sys.argv = before


LAUNCHERS = {
    launcher.name: launcher
    for launcher in (Launcher("torchrun", _torchrun), Launcher("torch_npu_run", _torch_npu_run, reads_argv=True))
}
