"""The house: each wing imports only from those below it, and what runs as root is a list. See CONTRIBUTING.md.

All of it is read off the source. An import inside of a function counts like any other, and so does one for types alone:
whoever reads a module, or takes one away, meets them all.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from checkout import CHECKOUT

PACKAGE = CHECKOUT / "securerun"
# Top down; what stands in one line is one wing. The first is the door: what `import securerun` offers, and `python -m`.
WINGS = (
    ("securerun", "__main__"),
    ("ctl",),
    ("run", "launch", "slurm"),
    ("session", "ending"),
    ("evidence",),
    ("preflight",),
    ("audit",),
    ("protection",),
    ("job",),
    ("guard",),
    ("host",),
    ("firewall",),
    ("linux",),
    ("options", "help_text", "errors", "text", "console", "finding", "lines", "site_file", "aside"),
)
FLOORS = {name: floor for floor, wing in enumerate(WINGS) for name in wing}

# What those who run as the user may know of the guard: what is said to it, how it is started, what it has written down.
OF_THE_GUARD = {f"securerun.guard.{name}" for name in ("protocol", "documents", "records", "program", "slurm_job")}
# They do the guard's own work, as root, in the process of the command.
AS_ROOT = {
    "securerun.ctl.clean": {"securerun.guard.cleaning"},
    "securerun.preflight.abilities": {"securerun.guard.cgroup", "securerun.guard.keys"},
}

# All of securerun that runs as root, by wing. Who adds a module adds it here, and so says so.
LOADED_BY_THE_GUARD = {
    "guard": "acquire caller cgroup channel containers documents ending exposure inherited job_secret lease limits log "
    "neighbours notices parting place presence program protocol reaper records refusals reserved run_directory server "
    "share sight slurm_job unanswered unasked waiting watch",
    "firewall": "backends chains droplog job_key policy program_steps refusals selftest shield shield_maps "
    "shield_program",
    "linux": "assembler attributes bpf capabilities cgroups file_lock forked libc links local_sockets "
    "namespaces net_cgroups netlink networks nf_tables nflog nfnetlink packages port_ranges prctl proc processes "
    "sent_along sock_diag trust",
    "": "errors lines site_file text",
}
# And this while the launcher imports torch, for `--firewall auto`, and to tell whether something may void a shield.
LOADED_WHILE_WAITING = {"firewall": "dispatcher ipset iptables run_sets", "linux": "commands ip_set kernel_types"}

# And this where an order has a key.
LOADED_WITH_A_KEY = {
    "guard": "answers keyed keys nodes",
    "firewall": "siphash tag tag_maps tag_program tag_proof tag_writer tagging tags",
    "linux": "addresses ring_buffer secret_file",
}

# And this where it is for a job of Slurm's.
LOADED_OF_SLURM = {"guard": "replaced slurm_served unattended", "linux": "slurm"}

MOST_LINES = 549
NO_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}

PROC = "securerun.linux.proc"
# Anything of /proc but what belongs to the system: a process by number, name, pattern or descriptor, and all of them.
OF_A_PROCESS = re.compile(r"/proc(?!\w)(?!/(sys|net)\b)")
# Which kernel numbers mean something only in a message of netlink; and names of theirs, in include/uapi/linux.
OF_MESSAGES = ("securerun.linux.netlink", "securerun.linux.nfnetlink")
# What says no number of a message, for who only has to do with sockets.
OF_SOCKETS = {"NETFILTER", "is_channel", "open_channel"}
OF_NETLINK = re.compile(
    r"_*(AF_NETLINK|SOL_NETLINK|NETLINK_\w+|NLMSG_\w+|NLM_F_\w+|NLA_F_\w+|NFNL\w*_\w+|NFT_MSG_\w+|NFTA_\w+|NFULNL_\w+"
    r"|NFULA_\w+|IPSET_(CMD|ATTR|ERR|FLAG)_\w+|RTM_\w+|RTA_\w+|SOCK_DIAG_\w+|INET_DIAG_\w+)"
)
NETLINK_HEADER = re.compile(r"[@=<>!]?(I(HH|2H)(II|2I))")  # struct nlmsghdr

# Asked of a guard as program.py starts it.
LOAD = """
import sys
sys.path.append(sys.argv[1])
import securerun.guard.server
first = set(sys.modules)
from securerun.firewall import backends
backends.prepare()
from securerun.linux import net_cgroups
net_cgroups.may_void_filters()
second = set(sys.modules)
import securerun.guard.replaced, securerun.guard.slurm_served, securerun.guard.unattended
of_slurm = set(sys.modules)
import securerun.guard.keyed
from securerun.firewall import tag_proof
from securerun.firewall import tag_program, tagging, tags
from securerun.guard import answers, nodes
for name, module in sys.modules.items():
    late = "of Slurm" if name in of_slurm else "with a key"
    when = "at once" if name in first else "while waiting" if name in second else late
    print(name, when, getattr(module, "__file__", None) or "built in", sep="\\t")
"""


@dataclass(frozen=True)
class Import:
    """One module imports another, in this line."""

    importer: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{_path_of(self.importer)}:{self.line} imports {self.imported}"


def test_each_wing_imports_only_from_those_below_it() -> None:
    wrong = [
        f"{one}: {_wing_of(one.importer)} stands below {_wing_of(one.imported)}"
        for one in _imports()
        if _floor_of(one.importer) > _floor_of(one.imported)
    ]
    assert not wrong, _lines("each wing imports only from itself and from those below it", wrong)


def test_each_module_has_its_wing() -> None:
    homeless = sorted(name for name in _modules() if _top_of(name) not in FLOORS)
    assert not homeless, _lines("each module stands in a wing of WINGS", homeless)
    empty = sorted(FLOORS.keys() - {_top_of(name) for name in _modules()})
    assert not empty, _lines("WINGS names what there is", empty)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {name: set() for name in _modules()}
    for one in _imports():
        graph[one.importer].add(one.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]  # from importer to imported
        steps = [one for pair in zip(circle, circle[1:]) for one in _imports() if (one.importer, one.imported) == pair]
        pytest.fail(_lines("imports make no circle, those for types and those inside of functions included", steps))


def test_who_runs_as_the_user_knows_of_the_guard_what_is_said_to_it_and_no_more() -> None:
    wrong = [
        one
        for one in _imports()
        if _top_of(one.imported) == "guard" and _top_of(one.importer) != "guard"
        if one.imported not in OF_THE_GUARD | AS_ROOT.get(one.importer, set())
    ]
    assert not wrong, _lines(f"of the guard, others may import {', '.join(sorted(OF_THE_GUARD))}", wrong)


@pytest.mark.parametrize("module", AS_ROOT)
def test_what_does_the_guards_work_imports_what_is_written_here_and_no_less(module: str) -> None:
    of_guard = {one.imported for one in _imports() if one.importer == module and _top_of(one.imported) == "guard"}
    assert AS_ROOT[module] <= of_guard


def test_what_runs_as_root_is_written_here() -> None:
    loaded = {name: when for name, (when, _) in _loaded_by_the_guard().items() if _is_ours(name)}
    parents = {name.rpartition(".")[0] for name in loaded}
    at_once, later, of_slurm, with_a_key = (
        {name for name in loaded.keys() - parents if loaded[name] == when}
        for when in ("at once", "while waiting", "of Slurm", "with a key")
    )
    assert at_once == _full_names(LOADED_BY_THE_GUARD)
    assert later == _full_names(LOADED_WHILE_WAITING)
    assert of_slurm == _full_names(LOADED_OF_SLURM)
    assert with_a_key == _full_names(LOADED_WITH_A_KEY)


def test_what_runs_as_root_needs_the_standard_library_alone() -> None:
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    foreign = {name: place for name, (_, place) in _loaded_by_the_guard().items() if not _is_ours(name)}
    assert "json" in foreign
    for name, place in foreign.items():
        assert place == "built in" or place.startswith(library), f"{name} of {place} is loaded by the guard"
        assert "site-packages" not in place and "dist-packages" not in place, f"{name} of {place}"


def test_the_package_loads_nothing_and_a_launcher_torch_only_when_it_begins() -> None:
    """Workers that are spawned import the launcher's script again, and who asks for help waits for nothing."""
    show = "import sys, {}; print(*sys.modules)"
    loaded = _printed(["-c", show.format("securerun")]).split()
    assert {name for name in loaded if _is_ours(name)} == {"securerun"}
    loaded = _printed(
        ["-c", show.format("securerun.launch, securerun.run, securerun.session, securerun.ctl.exec")]
    ).split()
    assert "securerun.protection.client" in loaded
    assert not {"torch", "typer", "psutil"}.intersection(loaded)


def test_only_linux_holds_numbers_of_netlink() -> None:
    wrong = [line for name in _modules() if _top_of(name) != "linux" for line in _netlink_in(name)]
    assert not wrong, _lines("the kernel's numbers of netlink stand in securerun/linux/", wrong)


def test_only_one_module_reads_what_proc_says_of_a_process() -> None:
    wrong = [
        f"{_path_of(name)}:{line} has {text!r}"
        for name in _modules()
        if name != PROC
        for line, text in _texts(name)
        if OF_A_PROCESS.search(text)
    ]
    assert not wrong, _lines(f"/proc/PID is read in {PROC}", wrong)


def test_no_file_is_longer_than_a_reader_remembers() -> None:
    lengths = {_path_of(name): len(_source(name).splitlines()) for name in _modules()}
    assert not {path: lines for path, lines in lengths.items() if lines > MOST_LINES}


def test_no_module_is_named_after_nothing() -> None:
    assert not [name for name in _modules() if NO_NAMES.intersection(name.split("."))]


def test_tests_stand_in_the_wing_of_what_they_try() -> None:
    tests = CHECKOUT / "tests"
    rooms = {path.relative_to(tests).parts[0] for path in tests.rglob("*/test_*.py")}
    wings = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == wings | {"ground", "whole"}


def test_the_picture_of_the_wings_shows_them_in_this_order() -> None:
    page = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.search(r"^ wing .*?\n ─+ .*?\n(.*?)\n ─+\n(.*)", page, re.DOTALL | re.MULTILINE)
    assert rows, "the picture has a line below its heads, and one above the last floor"
    first_column = [re.findall(r"\w+", row[:14]) for row in rows[1].splitlines()]
    assert [name for names in first_column for name in names] == [name for wing in WINGS[1:-1] for name in wing]
    assert tuple(re.findall(r"\w+", rows[2].partition("  ")[0])) == WINGS[-1]


def _lines(rule: str, found: list[Import] | list[str]) -> str:
    return "\n  ".join([rule, *map(str, found)])


@cache
def _modules() -> dict[str, Path]:
    """The modules of securerun, by name; a package is the module of its `__init__.py`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(CHECKOUT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _full_names(by_wing: dict[str, str]) -> set[str]:
    return {
        ".".join(filter(None, ("securerun", wing, name))) for wing, names in by_wing.items() for name in names.split()
    }


def _path_of(module: str) -> str:
    return str(_modules()[module].relative_to(CHECKOUT))


def _source(module: str) -> str:
    return _modules()[module].read_text(encoding="utf-8")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "securerun"


def _top_of(module: str) -> str:
    """What a module is below `securerun`: the name of a wing, or its own."""
    return (module.split(".") + module.split("."))[1] if "." in module else module


def _floor_of(module: str) -> int:
    return FLOORS[_top_of(module)]


def _wing_of(module: str) -> str:
    return ", ".join(WINGS[_floor_of(module)])


@cache
def _imports() -> tuple[Import, ...]:
    return tuple(
        Import(module, line, imported)
        for module in _modules()
        for line, imported in _imported_by(module)
        if imported != module
    )


def _imported_by(module: str) -> Iterator[tuple[int, str]]:
    """Each module of securerun that this one imports, wherever it does, or names for `importlib.import_module`."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{_path_of(module)}:{node.lineno} says no full name"
            if _is_ours(node.module):
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    yield node.lineno, below if below in _modules() else node.module
        elif isinstance(node, ast.Constant) and node.value in _modules() and node.value != "securerun":
            yield node.lineno, str(node.value)


def _texts(module: str) -> Iterator[tuple[int, str]]:
    """Each text of a module that is not documentation, with its line; {} stands for what an f-string fills in."""
    documentation, parts = set(), set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Expr):
            documentation.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation | parts:
            yield node.lineno, node.value


def _netlink_in(module: str) -> Iterator[str]:
    """Where a module names what is netlink's own, packs its header, or has a say in what stands in a message."""
    path = _path_of(module)
    for node in ast.walk(_tree(module)):
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        if isinstance(name, str) and OF_NETLINK.fullmatch(name):
            yield f"{path}:{node.lineno} names {name}"  # type: ignore[attr-defined]
    for line, text in _texts(module):
        if NETLINK_HEADER.fullmatch(text):
            yield f"{path}:{line} packs {text}"
    for line, name in _used_of(module, OF_MESSAGES):
        if name not in OF_SOCKETS:
            yield f"{path}:{line} uses {name}"


def _used_of(module: str, others: Collection[str]) -> Iterator[tuple[int, str]]:
    """What a module uses of others, by name."""
    own_names = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom):
            own_names |= {alias.asname or alias.name for alias in node.names if f"{node.module}.{alias.name}" in others}
            if node.module in others:
                yield from ((node.lineno, alias.name) for alias in node.names)
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {*own_names, *others}:
            yield node.lineno, node.attr


@cache
def _loaded_by_the_guard() -> dict[str, tuple[str, str]]:
    """By name, the modules of a guard that has its order: whether it had it from the start or later, and its file."""
    fields = [line.split("\t") for line in _printed(["-I", "-S", "-c", LOAD, str(CHECKOUT)]).splitlines()]
    return {name: (when, place) for name, when, place in fields if name != "__main__"}


def _printed(arguments: Sequence[str]) -> str:
    """What this Python prints with these arguments."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout
