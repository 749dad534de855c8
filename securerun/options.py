"""securerun's own options: one table, from which the command line, the environment and the site file are read.

The options are taken out of the command line by exact name, before torch's own parser sees the rest, so that every
option, abbreviation and default of the installed torch works as it does under torchrun. A value comes from the flag,
else from the environment, else from the site file.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Optional, Union

from securerun import site_file
from securerun.errors import UsageError

SITE_CONFIG = Path("/etc/securerun/config.toml")
# Of the site alone, or of SECURERUN_NAME: no option of a launch. socket: where guards are, securerun.protection.ways.
SITE_KEYS = ("socket",)

Value = Union[str, bool]
# How many of the tokens after an option are its values; None for a token that is no option but a positional argument.
Arity = Callable[[str], Optional[int]]

_DAY_SECONDS = 86400
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


# The groups of `--help` and of docs/options.md, in their order there.
WHO, CLOSED, PRIVILEGE, HARDENING, MORE = GROUPS = (
    "who may connect",
    "what is closed",
    "privilege",
    "hardening",
    "more",
)


@dataclass(frozen=True)
class Option:
    """One option: `--name` on the command line, SECURERUN_NAME in the environment, `name` in the site file.

    help: one sentence for `--help`, and behind it what docs/options.md says besides.
    metavar: what stands for the value in `--help`; an option without one is a flag.
    choices: the values that it takes, where they are few.
    example: a right value, for error messages.
    listed: what stands between the parts of a value that the site file may hold as a list of strings as well; of
    numbers too, if `numbers`.
    in_file: whether the site file may set it.
    group: where `--help` has it, one of GROUPS. reversible: a flag that `--no-name` takes back.
    """

    name: str
    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    example: str = ""
    listed: str = ""
    numbers: bool = False
    in_file: bool = True
    group: str = MORE
    reversible: bool = False

    @property
    def is_flag(self) -> bool:
        return not self.metavar

    @property
    def synopsis(self) -> str:
        """How `--help` writes it: `--peers LIST`, `--[no-]seal-logs`."""
        return f"--[no-]{self.name}" if self.reversible else f"{self.flag} {self.metavar}".rstrip()

    @property
    def summary(self) -> str:
        """What `--help` says of it: the first sentence, and the values that it takes."""
        sentence = self.help.partition(". ")[0].rstrip(".")
        return f"{sentence}: {', '.join(self.choices)}." if self.choices else f"{sentence}."

    @property
    def key(self) -> str:
        """The name in the site file and in `Options`."""
        return self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def variable(self) -> str:
        return f"SECURERUN_{self.key.upper()}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """With dashes or with underscores, as torchrun takes its own options."""
        return (self.flag, f"--{self.key}", *self.reversals)

    @property
    def reversals(self) -> tuple[str, ...]:
        """The spellings that take a flag back."""
        return (f"--no-{self.name}", f"--no_{self.key}") if self.reversible else ()


OPTIONS: tuple[Option, ...] = (
    Option(
        "peers",
        "The other nodes: names, addresses, networks, @FILE. The only hosts that may connect to the job, with commas "
        "between; `node[0-3]` stands for four, @FILE is a host file with one host a line, `subnet` stands for the "
        "networks of the interface, `any` for every host, and `localhost` alone says that all nodes are on this one. "
        "Without it they come from the batch system, where there is one.",
        metavar="LIST",
        example="--peers node1,node2 or --peers @hostfile.txt",
        listed=",",
        group=WHO,
    ),
    Option(
        "interface",
        "The network interfaces that peers come in through. With commas between; `any` for all. Without it: those that "
        "HCCL_IF_IP, HCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name, with those that lead to a "
        "peer; any where none of these is set.",
        metavar="NAMES",
        example="--interface eth0",
        listed=",",
        group=WHO,
    ),
    Option(
        "key",
        "What the nodes of a job prove themselves with: auto, off, require or a file. Who opens a connection shows, in "
        "the packet that opens it, a tag made with a key that all nodes of the job have. `auto` looks for the key in "
        "`~/.config/securerun/key` (`securerunctl setup key` makes it); then the guard does in "
        "`/etc/securerun/site.key` and, in a Slurm job, in munge's or Slurm's own. A tag lets in besides the peers, "
        "and where nobody names them it is the only way in. `require` and a file's name close the job to whoever has "
        "no tag; with `--peers` to whoever is not both. `off` goes by addresses alone.",
        metavar="KEY",
        example="--key require",
        group=WHO,
    ),
    Option(
        "loopback",
        "Who may connect over the loopback. `any` process of this host, or only those of the `job`.",
        metavar="WHO",
        choices=("any", "job"),
        example="--loopback job",
        group=WHO,
    ),
    Option(
        "accept",
        "Let peers past the rest of the host's firewall. They get ACCEPT, instead of being handed on to its own rules. "
        "With iptables or `legacy`: no table of nftables accepts past another.",
        group=WHO,
    ),
    Option(
        "ports",
        "More TCP ports that the job listens on: 7000,8000-8010. Beside those of the rendezvous and of HCCL, which "
        "are known; the port chains close these before anything listens.",
        metavar="LIST",
        example="--ports 7000,8000-8010",
        listed=",",
        numbers=True,
        group=CLOSED,
    ),
    Option(
        "public",
        "Ports of the job for others: 8080,9090=10.0.0.0/8;9100. Metrics, HTTP or probes, left open to these networks, "
        "or to every host where none are named, while all else stays closed. What the host's own rules close, and what "
        "only the job's nodes may reach, is never opened.",
        metavar="PORTS",
        example="--public '8080=10.0.0.0/8;9100'",
        listed=";",
        numbers=True,
        group=CLOSED,
    ),
    Option(
        "firewall",
        "Where the port chains are. `auto` takes iptables where the host has it, else nftables; a name "
        "insists on that backend (`legacy` is for hosts whose rules are in legacy tables); `off` leaves the host's "
        "firewall alone, and the shield on the job's processes stays.",
        metavar="BACKEND",
        choices=("auto", "iptables", "nftables", "legacy", "off"),
        example="--firewall auto",
        group=CLOSED,
    ),
    Option(
        "scope",
        "Every port, or each as it appears. `process` closes every port of the job's processes, by the shield; `ports` "
        "each port as it appears, by the port chains, for hosts that permit no shield; `namespace` puts a job of one "
        "node into a network of its own, for which nobody with privilege is needed. `auto` takes the strongest that a "
        "guard can give, and `namespace` where no guard is available.",
        metavar="SCOPE",
        choices=("auto", "process", "ports", "namespace"),
        example="--scope auto",
        group=CLOSED,
    ),
    Option(
        "unprotected",
        "Close nothing: every port stays open to every host. For a host where nothing can be installed; the umask is "
        "set all the same.",
        group=CLOSED,
    ),
    Option(
        "run-as",
        "For root: the user that the job is to be. securerun becomes this user, with their groups and no privilege, "
        "before anything of the job is loaded; the guard stays root's. The job has no terminal, and of root's "
        "environment what docs/privilege.md lists and SECURERUN_KEEP_ENV names.",
        metavar="USER",
        example="--run-as USER",
        group=PRIVILEGE,
    ),
    Option(
        "umask",
        "The least umask of launcher and workers, in octal. 0027 by default; a stricter one of your own stays.",
        metavar="MASK",
        example="--umask 0027",
        group=HARDENING,
    ),
    Option(
        "hccl-whitelist",
        "Have HCCL itself accept the job's nodes alone. HCCL_WHITELIST_DISABLE=0, and a list of the nodes' addresses "
        "for HCCL_WHITELIST_FILE. A second line that needs no privilege; off by default. All nodes of a job must have "
        "it or none, or HCCL hangs. Not for peers that are networks, or more than 16 ranks an address.",
        group=HARDENING,
    ),
    Option(
        "preflight",
        "What is done about flaws of this host. What departs from the hardening advice, or would keep the job from "
        "running, is looked for before anything is started: `warn` says so in a line each (the default), `strict` "
        "starts nothing then (status 78), `off` does not look.",
        metavar="MODE",
        choices=("warn", "strict", "off"),
        example="--preflight strict",
        group=HARDENING,
    ),
    Option(
        "seal-logs",
        "Logs become read-only when the job is over. What it wrote below --log-dir is 440 then, its directories 750. "
        "On by default; --no-seal-logs leaves it writable.",
        reversible=True,
        group=HARDENING,
    ),
    Option(
        "weights-only",
        "torch.load in the workers takes weights, never code. By TORCH_FORCE_WEIGHTS_ONLY_LOAD=1.",
        group=HARDENING,
    ),
    Option(
        "grace",
        "Seconds from SIGTERM to SIGKILL for what is left. What a failed or killed job leaves behind is ended so (10 "
        "by default); what its processes start in their handlers, to save their work, is not sent SIGTERM.",
        metavar="SECONDS",
        example="--grace 10",
        numbers=True,
    ),
    Option(
        "launcher",
        "Which command of torch's this stands in for. `torchrun`, or `torch_npu_run` for Ascend NPUs; `auto` is "
        "torch_npu_run where its rendezvous backend `parallel` or --enable_tiered_parallel_tcpstore is asked for.",
        metavar="COMMAND",
        choices=("auto", "torchrun", "torch_npu_run"),
        example="--launcher auto",
    ),
    Option(
        "report",
        "A file for what protected the job and how it ended. Written when the job has ended, with who was turned away: "
        "JSON, or a page for people where the name ends in .html.",
        metavar="FILE",
        example="--report run.html",
        in_file=False,
    ),
    Option(
        "dry-run",
        "Print the whole plan and start nothing. It needs no privilege.",
        in_file=False,
    ),
)

_BY_SPELLING: Mapping[str, Option] = {spelling: option for option in OPTIONS for spelling in option.spellings}


@dataclass(frozen=True)
class Options:
    """What the user asked of securerun, with the place it came from where a message names it.

    origins: for every key that is not left at its default, where its value stands: a flag, a variable, a file.
    """

    peers: str | None = None
    peers_source: str = "--peers"
    key: str = "auto"
    key_source: str = "--key"
    interface: str | None = None
    interface_source: str = "--interface"
    ports: str | None = None
    ports_source: str = "--ports"
    public: str | None = None
    public_source: str = "--public"
    firewall: str = "auto"
    scope: str = "auto"
    scope_source: str = "--scope"
    loopback: str = "any"
    grace: str = "10"
    grace_source: str = "--grace"
    umask: str = "0027"
    umask_source: str = "--umask"
    run_as: str | None = None
    run_as_source: str = "--run-as"
    hccl_whitelist: bool = False
    preflight: str | None = None
    seal_logs: bool = True
    weights_only: bool = False
    launcher: str = "auto"
    accept: bool = False
    unprotected: bool = False
    report: str | None = None
    report_source: str = "--report"
    dry_run: bool = False
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)


def take(arguments: Sequence[str], values_of: Arity) -> tuple[dict[str, Value], list[str]]:
    """Split a command line into securerun's options, by their key, and everything else in its order.

    Only the part before the script is read: up to the first positional argument or `--`. `values_of` knows torch's
    options (`securerun.job.launchers.values_of`), so that the 2 of `--nnodes 2` is not taken for the script.

    Raises UsageError for an option without its value, or a flag with one.
    """
    taken: dict[str, Value] = {}
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        spelling, equals, attached = argument.partition("=")
        option = _BY_SPELLING.get(spelling)
        if option is None:
            arity = None if argument == "--" else values_of(argument)
            if arity is None:
                break
            rest.extend(arguments[position : position + 1 + arity])
            position += 1 + arity
            continue
        position += 1
        if option.is_flag:
            if equals:
                raise UsageError(f"{spelling} takes no value, and {argument!r} gives one; write {spelling} alone")
            taken[option.key] = spelling not in option.reversals
            continue
        if not equals:
            attached = arguments[position] if position < len(arguments) else ""
            position += 1
            # No value of ours begins with a dash, so what does is the next option; argparse sees it the same way.
            attached = "" if attached.startswith("-") else attached
        if option.listed:
            _require_in_one_piece(option, attached, arguments[position] if position < len(arguments) else "")
        if not attached.strip():
            raise UsageError(f"{option.flag} needs a value: write {option.example}")
        taken[option.key] = attached
    return taken, [*rest, *arguments[position:]]


def _require_in_one_piece(option: Option, value: str, following: str) -> None:
    """Refuse a list that goes on behind a space, as in `--peers node0, node1 train.py`: node1 would be the script."""
    if value.rstrip().endswith(","):
        what = "ends in a comma"
    elif value.strip() and following.startswith(","):
        what = "goes on behind a space"
    else:
        return
    script = f", and {following!r} would be what is started" if following and not following.startswith("-") else ""
    raise UsageError(
        f"{option.flag} {value}: the list {what}{script}; write it without spaces, as in {option.example}, or in quotes"
    )


def take_early(arguments: Sequence[str], key: str) -> dict[str, Value]:
    """One option's value, as far as can be told without torch's parser: `take` has the last word on it.

    Where it stands may be a matter of torch's options, so this looks as far as the script can be, which is `--`.
    """
    option = next(option for option in OPTIONS if option.key == key)
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for position, argument in enumerate(before):
        spelling, equals, attached = argument.partition("=")
        if spelling in option.spellings:
            following = before[position + 1] if position + 1 < len(before) else ""
            if option.is_flag:
                return {key: True}
            value = attached if equals else following
            if value.startswith("-") or (option.choices and value not in option.choices):
                return {}  # one of the script's, or one that `take` refuses
            return {key: value} if value else {}
    return {}


def resolve(taken: Mapping[str, Value], environment: Mapping[str, str], config_path: Path = SITE_CONFIG) -> Options:
    """Return the options in force: flag, then environment, then site file.

    Raises UsageError for a value that an option does not take, and for a site file that cannot be read.
    """
    in_file = _read_site_file(config_path)
    sourced = {known.name for known in fields(Options)}
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in OPTIONS:
        found = _from_flag(option, taken) or _from_environment(option, environment) or in_file.get(option.key)
        if found is None:
            continue
        settings[option.key] = found.value
        origins[option.key] = found.source
        if f"{option.key}_source" in sourced:
            settings[f"{option.key}_source"] = found.source
    return Options(**settings, origins=origins)


def seconds(text: str, source: str) -> float:
    """Return the seconds that an option's text stands for.

    Raises UsageError for what is no number of seconds up to a day.
    """
    if re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", text) and float(text) <= _DAY_SECONDS:
        return float(text)
    raise UsageError(f"{source}: {text!r} is no number of seconds up to {_DAY_SECONDS}; write 10, or 0.5")


@dataclass(frozen=True)
class _Found:
    """A value and the place it came from."""

    value: Value
    source: str


def _from_flag(option: Option, taken: Mapping[str, Value]) -> _Found | None:
    value = taken.get(option.key)
    if value is None:
        return None
    return _Found(_checked(option, value, option.flag), option.flag)


def _from_environment(option: Option, environment: Mapping[str, str]) -> _Found | None:
    text = environment.get(option.variable, "").strip()
    # `export SECURERUN_PEERS=` is how a shell script takes a setting back.
    if not text:
        return None
    if not option.is_flag:
        return _Found(_checked(option, text, option.variable), option.variable)
    if text.lower() in _TRUE:
        return _Found(True, option.variable)
    if text.lower() in _FALSE:
        return _Found(False, option.variable)
    raise UsageError(f"{option.variable}={text} is neither yes nor no; write 1, true, yes, on, or 0, false, no, off")


def _checked(option: Option, value: Value, place: str) -> Value:
    if option.choices and value not in option.choices:
        raise UsageError(f"{place}: {value!r} is not one of {', '.join(option.choices)}; write {option.example}")
    return value


def _read_site_file(path: Path) -> dict[str, _Found]:
    """Return the settings of the site file by key; none where there is no such file."""
    try:
        content = site_file.content(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read ({reason}); make it a file that you can read, or remove it") from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    return _read_site_text(text, path)


def of_site(key: str, path: Path = SITE_CONFIG) -> str:
    """Return what the site file has under a key of SITE_KEYS, "" without it. Raises UsageError as `resolve` does."""
    found = _read_site_file(path).get(key)
    return str(found.value) if found is not None else ""


def _read_site_text(text: str, path: Path) -> dict[str, _Found]:
    # Imported only where a site file exists: most launches have none, and a launch is measured in milliseconds.
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        document: dict[str, object] = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise UsageError(f"{path}, {_toml_complaint(str(error), text)}; correct that line") from error
    except (ValueError, RecursionError) as error:  # what Python cannot hold: numbers of 5,000 digits, lists in lists
        raise UsageError(f"{path} cannot be understood ({type(error).__name__}: {error}); correct it") from error
    options = {option.key: option for option in OPTIONS if option.in_file}
    settings: dict[str, _Found] = {}
    for key, value in document.items():
        place = f"{path}, line {_line_of(key, text)}"
        if key in SITE_KEYS and isinstance(value, str):
            settings[key] = _Found(value, str(path))
            continue
        if key not in options:
            what = f"the key {key} has no text" if key in SITE_KEYS else f"there is no key {key!r}"
            raise UsageError(f"{place}: {what}; the keys are {', '.join((*options, *SITE_KEYS))}")
        option = options[key]
        settings[key] = _Found(_checked(option, _from_toml(option, value, place), place), str(path))
    return settings


def _from_toml(option: Option, value: object, place: str) -> Value:
    if option.is_flag:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{place}: {option.key} is neither true nor false; write {option.key} = true")
    items = value if option.listed and isinstance(value, list) else [value]
    words = [_toml_word(option, item) for item in items]
    joined = option.listed.join(word for word in words if word is not None)
    if None in words or not joined.strip(",; "):
        right = option.example.split()[1].strip("'")
        raise UsageError(f'{place}: {option.key} is no text of the right kind; write {option.key} = "{right}"')
    return joined


def _toml_word(option: Option, item: object) -> str | None:
    if isinstance(item, str):
        return item
    if option.numbers and isinstance(item, int) and not isinstance(item, bool):
        return str(item)
    return None


def _toml_complaint(message: str, text: str) -> str:
    """Return the parser's message with its line first.

    "Invalid value (at line 3, column 9)", "... (at end of document)".
    """
    where = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)", message)
    what = message[: where.start()] if where else message
    line = where.group(1) if where and where.group(1) else str(len(text.splitlines()) or 1)
    return f"line {line}: {what[:1].lower()}{what[1:]}"


def _line_of(key: str, text: str) -> int:
    """Return the line that sets a key of the document's top level, or opens the table of that name."""
    quoted = rf"[\"']?{re.escape(key)}[\"']?"
    pattern = re.compile(rf"\s*(?:{quoted}\s*[.=]|\[+\s*{quoted}\s*[].])")
    lines = (number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line))
    return next(lines, 1)
