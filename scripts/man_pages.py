"""Writes docs/man/: securerun(1), securerunctl(1) and securerun-guard(8), from the tables that the commands have.

Run after a change of options, commands or of guard.toml in docs/privilege.md: .venv/bin/python scripts/man_pages.py
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from securerun.ctl.app import app
from securerun.guard import log
from securerun.guard.program import LIMITS_FILE, LISTEN_ARGUMENT, SITE_KEY, SOCKET, SOCKET_ARGUMENT
from securerun.guard.records import DIRECTORY
from securerun.options import GROUPS, OPTIONS, SITE_CONFIG, Option, Options

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = CHECKOUT / "docs/man"
_WITH_ARGUMENTS = {"exec": "[OPTIONS] -- COMMAND [ARGUMENTS]"}

_WHAT = "torchrun, with the job's network closed to everyone but the job"
_STATUSES = {
    "2": "wrong usage",
    "77": "nothing can close the job's ports, or a guard refused to",
    "78": "a policy that cannot be right: unknown peers, a weak umask, a bad port",
}


def render() -> dict[str, str]:
    """The text of each page, by the name of its file."""
    pages = {"securerun.1": _securerun(), "securerunctl.1": _securerunctl(), "securerun-guard.8": _guard()}
    return {name: "\n".join(lines) + "\n" for name, lines in pages.items()}


def _securerun() -> Iterator[str]:
    yield from _head("securerun", 1, _WHAT)
    yield from _section("Synopsis", ".B securerun", _text("[OPTIONS] [torchrun's OPTIONS] SCRIPT [ARGUMENTS]"))
    yield from _section(
        "Description",
        *_paragraphs(
            "securerun starts a distributed PyTorch job exactly as torchrun does. From before its first socket opens "
            "until its last process has gone, no host but the job's own nodes can connect to any TCP port of it.",
            "A guard, a small process of root's, closes the ports and opens them again. It is started directly by "
            "root, by sudo, or by systemd; see securerun-guard(8).",
            "Its options stand before the script, among torchrun's, by their full names. A value comes from the flag, "
            f"else from the environment, else from `{SITE_CONFIG}`. torchrun's own are in `securerun --help`.",
        ),
    )
    for group in GROUPS:
        yield from _section(f"Options: {group}", *_entries(_of_group(group)))
    status = {"the job's own": "the job ran", **_STATUSES}
    yield from _section("Exit status", *_entries(status.items()))
    yield from _section("Files", *_entries({str(SITE_CONFIG): "values of options for all of this host"}.items()))
    yield from _section("See also", ".BR securerunctl (1),", ".BR securerun\\-guard (8)")


def _of_group(group: str) -> Iterator[tuple[str, str]]:
    return ((option.synopsis, f"{option.help} {_place(option)}") for option in OPTIONS if option.group == group)


def _place(option: Option) -> str:
    names = f"`{option.variable}`" + (f", `{option.key}` in the site file" if option.in_file else "")
    value = getattr(Options(), option.key)
    if option.is_flag:
        return f"({names}; {'on' if value else 'off'} by default.)"
    return f"({names}.)" if value is None else f"({names}; default: `{value}`.)"


def _securerunctl() -> Iterator[str]:
    yield from _head("securerunctl", 1, "look at and look after the runs of securerun")
    yield from _section("Synopsis", ".B securerunctl", _text("COMMAND [OPTIONS]"))
    commands = typer.main.get_command(app)
    yield from _section("Commands", *_described(commands, ""))
    yield from _section("Exit status", *_entries({"1": "something was found, or is left", **_STATUSES}.items()))
    yield from _section("See also", ".BR securerun (1),", ".BR securerun\\-guard (8)")


def _described(group: Any, before: str) -> Iterator[str]:  # noqa: ANN401 - click's, or typer's own copy of it
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _described(command, f"{before}{name} ")
            continue
        yield f".SS {_text(' '.join((before + name, _arguments(name, command))).strip())}"
        yield from _paragraphs(*re.split(r"\n\s*\n", textwrap.dedent(command.help or "").strip()))
        yield from _entries((_written(option), option.help or "") for option in command.params if _is_option(option))


def _arguments(name: str, command: Any) -> str:  # noqa: ANN401
    if name in _WITH_ARGUMENTS:
        return _WITH_ARGUMENTS[name]
    if not (command.options_metavar or "").startswith("[OPTIONS]"):
        return str(command.options_metavar or "")
    if command.options_metavar != "[OPTIONS]":
        return str(command.options_metavar)
    return " ".join(one.metavar or one.name.upper() for one in command.params if not _is_option(one))


def _is_option(parameter: Any) -> bool:  # noqa: ANN401
    return bool(parameter.param_type_name == "option") and parameter.name != "help"


def _written(option: Any) -> str:  # noqa: ANN401
    value = "" if option.is_flag else f" {option.metavar or _value(option)}"
    return f"{', '.join(option.opts)}{value}"


def _value(option: Any) -> str:  # noqa: ANN401
    choices = getattr(option.type, "choices", ())
    return "|".join(map(str, choices)) or str(option.name).upper()


def _guard() -> Iterator[str]:
    yield from _head("securerun-guard", 8, "the process of root's that closes the ports of one job")
    yield from _section("Synopsis", ".B securerun\\-guard", _text(f"[{SOCKET_ARGUMENT} | {LISTEN_ARGUMENT} [PATH]]"))
    yield from _section(
        "Description",
        *_paragraphs(
            "securerun has one guard a job started, by sudo or at a socket; nobody starts that by hand. It takes its "
            "orders on standard input, hangs the shield on the job's cgroup, writes the port chains, and removes both "
            "once the job's last process has gone.",
            "`securerunctl setup sudoers` and `securerunctl setup systemd` print what permits it.",
        ),
    )
    options = {
        SOCKET_ARGUMENT: "The caller is at the other end of an accepted socket, which is standard input and output.",
        f"{LISTEN_ARGUMENT} [PATH]": "Listen at a socket, as systemd's unit does where there is none, and begin a "
        f"guard for each who connects, containers of the node among them. PATH is `{SOCKET}` by default.",
    }
    yield from _section("Options", *_entries(options.items()))
    yield from _section(
        str(LIMITS_FILE),
        *_paragraphs("What everybody but root may ask for. It counts if root alone can change it."),
        *(".EX", *map(_line, _limits().splitlines()), ".EE"),
    )
    fields = {
        "RUN_ID": "the run that the line is about",
        "USER": "the user id of who started it",
        "PEERS": f"a network that may connect; the first {log.MOST_VALUES}, each a field",
    }
    yield from _section(
        "Log",
        *_paragraphs(
            "Each guard, refusal and release is a line in systemd's journal (`journalctl -t securerun-guard`), with "
            "the fields below; without one in the system log, else in the file below, else on standard error."
        ),
        *_entries(fields.items()),
    )
    files = {
        str(LIMITS_FILE): "what users may ask for",
        str(SITE_KEY): "the key of the site's jobs, the same on all nodes",
        str(DIRECTORY): "a record a run",
        str(SOCKET): "where launchers look for guards",
        str(log.FILE): "the log, where there is no journal and no system log",
    }
    yield from _section("Files", *_entries(files.items()))
    yield from _section(
        "Exit status", *_entries({"0": "the job is over and nothing of it is left", **_STATUSES}.items())
    )
    yield from _section("See also", ".BR securerun (1),", ".BR securerunctl (1)")


def _limits() -> str:
    """guard.toml as the documentation has it."""
    page = (CHECKOUT / "docs/privilege.md").read_text(encoding="utf-8")
    found = re.search(rf"```toml\n# {re.escape(str(LIMITS_FILE))}\n(.*?)```", page, re.DOTALL)
    if found is None:
        raise ValueError("docs/privilege.md has no block of guard.toml")
    return found[1]


def _head(name: str, section: int, what: str) -> Iterator[str]:
    yield '.\\" Made by scripts/man_pages.py.'
    yield f'.TH {_text(name.upper())} {section} "" securerun'
    yield from _section("Name", f"{_text(name)} \\- {_text(what)}")


def _section(title: str, *lines: str) -> Iterator[str]:
    yield f".SH {_text(title.upper() if not title.startswith('/') else title)}"
    yield from lines


def _paragraphs(*texts: str) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield ".PP"
        yield _line(text)


def _entries(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, text in entries:
        yield ".TP"
        yield f".B {_text(name)}"
        yield _line(text)


def _line(text: str) -> str:
    """Write text that may begin with what roff takes for a request."""
    written = _text(text)
    return f"\\&{written}" if written.startswith((".", "'")) else written


def _text(text: str) -> str:
    """Write one line of text for man(7); what stands between backquotes is bold."""
    escaped = " ".join(text.split("\n")) if "\n" in text else text
    escaped = (
        escaped.replace("\\", "\\e")
        .replace("-", "\\-")
        .replace("'", "\\(aq")
        .replace("~", "\\(ti")
        .replace("^", "\\(ha")
    )
    return re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escaped)


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for name, page in render().items():
        (PAGES / name).write_text(page, encoding="utf-8")
