"""torchrun's parser and namespace with securerun's options in them, and torch's names once ours stand there."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import types
from collections.abc import Iterator
from typing import Callable

import pytest
import torch.distributed.launch as torchs_launch
import torch.distributed.run as torchrun

import securerun.launch
import securerun.run
from securerun.errors import UsageError
from securerun.job import command_line, launchers, originals
from securerun.job.command_line import PREFIX, taken_from
from securerun.options import OPTIONS
from securerun.run import get_args_parser, parse_args


def test_the_module_has_every_public_name_of_torchs() -> None:
    names = {name for name in vars(torchrun) if not name.startswith("_")}
    assert {"config_from_args", "determine_local_world_size", "get_use_env", "run_script_path"} < names
    for name in names:
        assert hasattr(securerun.run, name), name
    assert securerun.run.config_from_args is torchrun.config_from_args
    with pytest.raises(AttributeError):
        _ = securerun.run.no_such_name


def test_namespace_has_torchs_options_as_torch_reads_them_and_ours_beside_them() -> None:
    ours = ["--peers", "node0,node1", "--dry_run", "--no-seal-logs", "--firewall=off"]
    torchs = ["--nnodes", "2", "--re", "3", "--run-", "train.py", "--peers", "x", "--", "-h"]
    namespace = parse_args([*ours, *torchs])
    found = vars(namespace).copy()
    mine = {key: found.pop(key) for key in list(found) if key.startswith(PREFIX)}
    assert argparse.Namespace(**found) == torchrun.parse_args(torchs)
    assert mine.keys() == {PREFIX + option.key for option in OPTIONS}
    assert taken_from(namespace) == {"peers": "node0,node1", "dry_run": True, "seal_logs": False, "firewall": "off"}


def test_a_namespace_can_be_filtered_by_it_as_accelerate_does() -> None:
    """accelerate 1.15, utils/launch.py: _filter_args, with the script's arguments as one word."""
    own = argparse.Namespace(nnodes="2", interface="ib0", training_script="train.py", training_script_args=["-x"])
    arguments = ["--training_script", "train.py", "--training_script_args", ["-x"]]
    filtered, _ = get_args_parser().parse_known_args(arguments)
    for key, value in vars(own).items():
        if key in vars(filtered):
            setattr(filtered, key, value)
    assert (filtered.nnodes, filtered.training_script_args) == ("2", ["-x"])
    # Its --interface is not ours.
    assert taken_from(filtered) == {}


def test_who_adds_an_option_to_the_parser_adds_it_to_torchs() -> None:
    parser = get_args_parser()
    parser.add_argument("--use-env", action="store_true")
    namespace = parser.parse_args(["--use-env", "--peers", "any", "train.py"])
    assert (namespace.use_env, namespace.securerun_peers) == (True, "any")


def test_mistakes_in_ours_are_told_as_argparse_tells_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(["--peers"])
    assert ended.value.code == 2
    assert "error: --peers needs a value" in capsys.readouterr().err


@pytest.mark.parametrize("value", [["node0", "node1"], 3, True])
def test_what_is_no_value_of_an_option_is_refused_by_its_name(value: object) -> None:
    with pytest.raises(UsageError, match="securerun_peers is"):
        taken_from(argparse.Namespace(securerun_peers=value))


def test_help_of_the_parser_has_both() -> None:
    text = get_args_parser().format_help()
    assert "--nproc-per-node" in text
    assert text.count("--peers LIST") == 1


class _Version(argparse.Action):
    """An option that ends the parser as help does, and says something else."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("something else")
        parser.exit()


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--hel"], ["-mh"], ["--nnodes", "2", "-h", "train.py"]])
def test_our_help_follows_torchs_however_it_is_asked_for(arguments: list[str]) -> None:
    assert printed(arguments).count("--peers LIST") == 1


@pytest.mark.parametrize("arguments", [["--version"], ["train.py", "--help"]])
def test_our_help_follows_nothing_else(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    torchs = torchrun.get_args_parser

    def with_version() -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = torchs()
        parser.add_argument("--version", nargs=0, action=_Version)
        return parser

    monkeypatch.setattr(torchrun, "get_args_parser", with_version)
    assert printed(arguments) == ("something else\n" if arguments == ["--version"] else "")
    assert argparse.ArgumentParser.format_help.__module__ == "argparse"


def of_command(arguments: list[str]) -> object:
    """Read a command line as the command securerun does, once its own options are taken out."""
    return securerun.run._parse(launchers.LAUNCHERS["torchrun"], arguments)


def printed(arguments: list[str], read: Callable[[list[str]], object] = of_command) -> str:
    """What reading this command line prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        read(arguments)
    return output.getvalue()


# torch's script for a shell


class _PrintCompletion(argparse.Action):
    """As torch 2.14 has it (torch/distributed/run.py, _PrintCompletionAction)."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, values: object, option: str | None = None) -> None:
        import shtab  # type: ignore[import-not-found]

        parser.prog = "torchrun"
        print(shtab.complete(parser, shell=values))
        parser.exit()


@pytest.fixture
def of_torch_2_14(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A parser with the option, and the package that writes the script."""
    torchs = torchrun.get_args_parser

    def get_args_parser() -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = torchs()
        if "--print-completion" not in parser._option_string_actions:
            spellings = ("--print-completion", "--print_completion")
            parser.add_argument(*spellings, action=_PrintCompletion, choices=["bash", "zsh"])
        return parser

    def complete(parser: argparse.ArgumentParser, shell: str) -> str:
        known = sorted(parser._option_string_actions)
        files = [action.dest for action in parser._actions if getattr(action, "complete", None) is shtab.FILE]
        return f"{shell} {parser.prog} {files} {known}"

    shtab = types.ModuleType("shtab")
    vars(shtab).update(FILE={}, complete=complete)
    monkeypatch.setitem(sys.modules, "shtab", shtab)
    monkeypatch.setattr(torchrun, "get_args_parser", get_args_parser)
    return shtab


@pytest.mark.usefixtures("of_torch_2_14")
@pytest.mark.parametrize("called", ["securerun", "torchrun", "__main__.py"])
@pytest.mark.parametrize("asked", [["--print-completion", "bash"], ["--print_completion=bash"], ["--print-c", "bash"]])
def test_torchs_script_for_a_shell_is_for_what_was_called_and_has_our_options(
    monkeypatch: pytest.MonkeyPatch, called: str, asked: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{called}", *asked])
    command = "torchrun" if called == "torchrun" else "securerun"
    for said in (printed(asked), printed(asked, parse_args)):
        (line,) = said.splitlines()  # and no help behind it
        assert line.startswith(f"bash {command} ['report'] ")
        for spelling in ("--nproc-per-node", *(option.flag for option in OPTIONS), "--no-seal-logs"):
            assert f"'{spelling}'" in line


@pytest.mark.usefixtures("of_torch_2_14")
def test_without_the_package_that_writes_the_script_it_is_said_what_does_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        parse_args(["--print-completion", "zsh"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install shtab" in line and "securerunctl setup completion" in line


@pytest.mark.usefixtures("of_torch_2_14")
def test_the_option_is_torchs_where_no_script_is_asked_for() -> None:
    assert taken_from(parse_args(["--peers", "any", "train.py", "--print-completion", "bash"])) == {"peers": "any"}
    assert "--print-completion" in printed(["--help"])


# Ours in torch's place


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ours in the place of all that torch has of both modules, and a wrapper around one."""
    monkeypatch.setattr(torchrun, "run", securerun.run.run)
    monkeypatch.setattr(torchrun, "main", securerun.run.main)
    monkeypatch.setattr(torchrun, "parse_args", parse_args)
    monkeypatch.setattr(torchrun, "get_args_parser", lambda: get_args_parser())
    monkeypatch.setattr(torchs_launch, "get_args_parser", get_args_parser)
    monkeypatch.setattr(torchs_launch, "main", securerun.launch.main)
    originals._made_anew.cache_clear()
    yield
    originals._made_anew.cache_clear()


@pytest.mark.usefixtures("put")
def test_what_securerun_calls_is_torchs_own_whatever_stands_there() -> None:
    run = originals.own(originals.RUN, "run")
    assert (run.__module__, run.__code__.co_filename) == (torchrun.__name__, torchrun.__file__)
    # What is sent to workers by its name is what they find by it.
    assert run.__globals__["run_script_path"] is torchrun.run_script_path
    main = originals.own(originals.LAUNCH, "main")
    assert main.__module__ == torchs_launch.__name__
    assert launchers.parser_of_all().parse_args(["--nnodes", "2", "train.py"]).nnodes == "2"
    assert torchrun.parse_args(["--peers", "any", "train.py"]).securerun_peers == "any"
    assert get_args_parser().format_help().count("--peers LIST") == 1
    assert printed(["--help"]).count("--peers LIST") == 1


def test_the_whole_module_may_stand_in_torchs_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, originals.RUN, securerun.run)
    originals._made_anew.cache_clear()
    try:
        made = originals.own(originals.RUN, "run")
        assert made.__module__ == originals.RUN
        assert made is not securerun.run.run
        assert securerun.run.config_from_args is made.__globals__["config_from_args"]
        assert parse_args(["--peers", "any", "train.py"]).securerun_peers == "any"
    finally:
        originals._made_anew.cache_clear()


def test_what_others_put_there_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have a reason, as torch_npu may."""
    monkeypatch.setattr(torchrun, "run", lambda namespace: ("theirs", namespace))
    assert originals.call(originals.RUN, "run", "x") == ("theirs", "x")


def test_a_thread_and_a_process_call_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(_: object) -> None:
        seen.append(originals.is_calling(originals.RUN, "run"))
        pid = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        seen.append(originals.is_calling(originals.RUN, "run"))
        monkeypatch.undo()

    monkeypatch.setattr(torchrun, "run", look)
    originals.call(originals.RUN, "run", None)
    assert seen == [True, False]
    assert not originals.is_calling(originals.RUN, "run")


def test_names_that_any_module_is_asked_for_do_not_load_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "attribute", None)
    assert not hasattr(securerun.run, "__path__")
    assert not hasattr(command_line, "_get_logs_specs_class")
