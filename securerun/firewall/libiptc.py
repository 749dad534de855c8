"""libiptc, which reads and writes legacy tables, by way of python-iptables (the extra `legacy`).

A family's table is read whole, changed in memory and written at once. Rules of others are carried along as they were
read, never decoded: a match that this host's libraries do not know does no harm.

What python-iptables 1.2 would do in a guard that runs as root, and what is done about it here:
- to find four libraries it follows symbolic links in the working directory and starts ldconfig, gcc and ld from
  PATH (0.6 s): it is given the libraries (`_stand_in`);
- to tell a chain from a target it opens every table, which registers nat and with it connection tracking for the
  whole host: its rules are told of the filter table alone (`FilterTable.reading`);
- for IPv6 it compares one bit of each letter of an interface's name, so that `! -i lo` lets bond0 pass by: the
  mask is set anew (`_match_interface`);
- to check a rule it turns standard output, which carries the guard's answers, into a pipe: rules are written
  without that check, which is for words that users typed;
- where a rule has matches as well, NFLOG's prefix, parsed, corrupts memory (the next rule ends the process): it is
  written into the finished rule (`_prefixed`);
- a value that an extension refuses ends in a longjmp across Python's own frames: only values that `Policy` has
  judged are passed on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import os
import re
import shlex
import struct
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Protocol

from securerun.firewall.chains import PortChainsUnavailable, spoken_versions
from securerun.firewall.dispatcher import CHAIN, run_named_by
from securerun.linux import commands, packages, proc

_COMMIT_ATTEMPTS = 10
_MODPROBE_SECONDS = 10.0
# The versions that python-iptables 1.2 knows, newest first.
_SONAMES = {
    "xtables": ("libxtables.so.12", "libxtables.so.11", "libxtables.so.10"),
    "ip4tc": ("libip4tc.so.2", "libip4tc.so.0"),
    "ip6tc": ("libip6tc.so.2", "libip6tc.so.0"),
}
# include/uapi/linux/netfilter/x_tables.h: struct xt_entry_match as user space sees it
_MATCH_HEADER = struct.Struct("=H29sB")
# include/uapi/linux/netfilter/xt_NFLOG.h: struct xt_nflog_info, which ends with the prefix, and ends a rule
_NFLOG_SIZE, _NFLOG_PREFIX, _NFLOG_PREFIX_SIZE = 80, 12, 64
_PREFIX = re.compile(r' --nflog-prefix "([^"]*)"')
_REMEDY = "install it with `pip install 'securerun[legacy]'` or use another --firewall"


class _Extension(Protocol):
    """A match or target of python-iptables."""

    def set_parameter(self, parameter: str, value: list[str]) -> None: ...


class _Rule(Protocol):
    """What is used of python-iptables' Rule and Rule6."""

    src: str
    protocol: str
    in_interface: str
    rule: ctypes.Array[ctypes.c_ubyte]

    def create_match(self, name: str) -> _Extension: ...
    def create_target(self, name: str) -> _Extension: ...
    def get_ip(self) -> ctypes.Structure: ...


class _Table(Protocol):
    """What is used of python-iptables' Table and Table6: libiptc's own functions, with positions counted from 0."""

    _iptc: Any
    _handle: Any

    def refresh(self) -> None: ...
    def commit(self) -> None: ...
    def close(self) -> None: ...
    def strerror(self) -> bytes: ...
    def is_chain(self, chain: str) -> bool: ...
    def create_chain(self, chain: str) -> object: ...
    def flush_entries(self, chain: str) -> None: ...
    def delete_chain(self, chain: str) -> None: ...
    def first_rule(self, chain: str) -> ctypes.Structure: ...
    def next_rule(self, entry: ctypes.Structure) -> ctypes.Structure: ...
    def get_target(self, entry: ctypes.Structure) -> bytes | None: ...
    def append_entry(self, chain: str, entry: ctypes.Array[ctypes.c_ubyte]) -> None: ...
    def insert_entry(self, chain: str, entry: ctypes.Array[ctypes.c_ubyte], position: int) -> None: ...


@dataclass(frozen=True)
class Entry:
    """What matters here of a rule in the kernel: its comment ("" for none), and its target or the chain it jumps to."""

    comment: str
    target: str

    @property
    def run_id(self) -> str | None:
        """The run that the comment names, or None when it is not a run's."""
        return run_named_by(self.comment)


class View:
    """One reading of a filter table. Changes stay in memory until they are committed."""

    def __init__(self, table: _Table, new_rule: Callable[[], _Rule]) -> None:
        self._table = table
        self._new_rule = new_rule
        self._templates: dict[str, _Rule] = {}

    @property
    def has_dispatcher(self) -> bool:
        """Whether our chain exists."""
        return self._table.is_chain(CHAIN)

    def entries(self, chain: str) -> list[Entry]:
        """Return the rules of a chain in their order; none where there is no such chain."""
        return list(self._entries(chain)) if self._table.is_chain(chain) else []

    def jumps(self) -> list[int]:
        """Where in INPUT the jumps to our chain stand, counted from 0."""
        return [position for position, entry in enumerate(self.entries("INPUT")) if entry.target == CHAIN]

    def write(self, line: str) -> None:
        """Do what one line of iptables-restore's text says, of those that `dispatcher.render_install` renders."""
        if line.startswith(":"):
            self._table.create_chain(line[1:].split()[0])
        elif line.startswith("-I "):
            _, chain, position, rule = line.split(" ", 3)
            self._table.insert_entry(chain, self._encoded(rule), int(position) - 1)
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            self._table.append_entry(chain, self._encoded(rule))
        elif line not in ("*filter", "COMMIT"):
            raise ValueError(f"not a line that dispatcher.render_install writes: {line}")

    def delete(self, chain: str, positions: list[int]) -> None:
        """Take the rules at these positions, counted from 0, out of a chain."""
        # Table has a method for each function of libiptc but this one. From the end, so that positions stay true.
        delete = self._table._iptc.iptc_delete_num_entry
        for position in sorted(positions, reverse=True):
            if delete(chain.encode(), position, self._table._handle) != 1:
                raise PortChainsUnavailable(f"rule {position + 1} of {chain}: {_words(self._table.strerror())}")

    def delete_dispatcher(self) -> None:
        """Take our chain and the jumps to it away."""
        self.delete("INPUT", self.jumps())
        self._table.flush_entries(CHAIN)
        self._table.delete_chain(CHAIN)

    def commit(self) -> None:
        """Write all changes at once. Raises iptc.IPTCError, with nothing changed."""
        self._table.commit()

    def _entries(self, chain: str) -> Iterator[Entry]:
        raw = self._table.first_rule(chain)
        while raw:
            target = self._table.get_target(raw)
            yield Entry(_comment_of(raw), target.decode(errors="replace") if target else "")  # any bytes name a chain
            raw = self._table.next_rule(raw)

    def _encoded(self, rule: str) -> ctypes.Array[ctypes.c_ubyte]:
        """Return the kernel's form of a rendered rule. Rules that differ in their source alone share one template."""
        prefix = _PREFIX.search(rule)
        if prefix is not None:
            return _prefixed(self._encoded(_PREFIX.sub("", rule)), prefix.group(1))
        source, rest = "", rule
        if rule.startswith("-s "):
            _, source, rest = rule.split(" ", 2)
        if rest not in self._templates:
            self._templates[rest] = _parsed(self._new_rule(), shlex.split(rest))
        template = self._templates[rest]
        if source:
            template.src = source
        return template.rule


class FilterTable:
    """The legacy filter table of one address family."""

    def __init__(self, version: int, iptc: ModuleType) -> None:
        self.version = version
        self._open = iptc.Table if version == 4 else iptc.Table6
        self._rule = iptc.Rule if version == 4 else iptc.Rule6
        self._errors = (iptc.IPTCError, iptc.XTablesError)

    def change(self, work: Callable[[View], None]) -> None:
        """Read the table, have `work` change it, write it; all of it again when somebody wrote in between.

        Raises PortChainsUnavailable when the table cannot be read or written, or is written to all the time.
        """
        for _ in range(_COMMIT_ATTEMPTS):
            with self.reading() as view:
                work(view)
                if self._committed(view):
                    return
        raise PortChainsUnavailable(f"others keep writing the legacy IPv{self.version} filter table; try again")

    @contextlib.contextmanager
    def reading(self) -> Iterator[View]:
        """Hold the table as it is now, for the length of the block.

        Raises PortChainsUnavailable for whatever libiptc refuses within the block.
        """
        table: _Table | None = None
        try:
            table = self._open("filter", False)
            table.refresh()
            # python-iptables asks each table in `tables` whether a target is the name of a chain.
            yield View(table, type("FilterRule", (self._rule,), {"tables": (table,)}))
        except self._errors as error:
            raise PortChainsUnavailable(f"legacy IPv{self.version} filter table: {_words(error)}") from error
        finally:
            # python-iptables keeps the object for good; closed, it holds neither a copy of the table nor a socket.
            if table is not None:
                table.close()

    def _committed(self, view: View) -> bool:
        """Write the changes; False, with nothing changed, when somebody else wrote since the table was read.

        The lock does not keep everybody away: other programs that use libiptc do not take it.
        """
        try:
            view.commit()
        except self._errors as error:
            if os.strerror(errno.EAGAIN) in str(error):
                return False
            raise
        return True


def filter_tables() -> tuple[FilterTable, ...]:
    """Return the filter table of every address family that this kernel speaks.

    Raises PortChainsUnavailable where python-iptables or the libraries of iptables are missing.
    """
    iptc = _load()
    return tuple(FilterTable(version, iptc) for version in spoken_versions())


def _comment_of(raw: ctypes.Structure) -> str:
    """Return the text of the comment match in a rule as libiptc holds it (struct ipt_entry or ip6t_entry)."""
    data = ctypes.string_at(ctypes.addressof(raw), raw.target_offset)
    offset = ctypes.sizeof(raw)
    while offset < len(data):
        size, name, _ = _MATCH_HEADER.unpack_from(data, offset)
        if _until_nul(name) == b"comment":
            text = data[offset + _MATCH_HEADER.size : offset + size]
            return _until_nul(text).decode(errors="replace")
        offset += size
    return ""


def _until_nul(text: bytes) -> bytes:
    return text.partition(b"\0")[0]


def _parsed(rule: _Rule, words: list[str]) -> _Rule:
    """`rule`, made to what these words of a rendered rule say."""
    extension: _Extension | None = None
    while words:
        word = words.pop(0)
        if word == "!" and words[0] == "-i":
            del words[0]
            _match_interface(rule, words.pop(0), negated=True)
        elif word == "-i":
            _match_interface(rule, words.pop(0), negated=False)
        elif word == "-p":
            rule.protocol = words.pop(0)
        elif word == "-m":
            extension = rule.create_match(words.pop(0))
        elif word == "-j":
            extension = rule.create_target(words.pop(0))
        elif word.startswith("--") and extension is not None:
            extension.set_parameter(word[2:], _values(words))
        else:
            raise ValueError(f"not a word that dispatcher.render_install writes: {word}")
    return rule


def _prefixed(rule: ctypes.Array[ctypes.c_ubyte], prefix: str) -> ctypes.Array[ctypes.c_ubyte]:
    """Return a rule that ends with the target NFLOG, with a prefix for what it logs."""
    written = prefix.encode("ascii")[: _NFLOG_PREFIX_SIZE - 1]
    begin = len(rule) - _NFLOG_SIZE + _NFLOG_PREFIX
    rule[begin : begin + len(written)] = list(written)
    return rule


def _values(words: list[str]) -> list[str]:
    """Take the words up to the next option out of `words`."""
    values = []
    while words and not words[0].startswith(("-", "!")):
        values.append(words.pop(0))
    return values


def _match_interface(rule: _Rule, interface: str, *, negated: bool) -> None:
    rule.in_interface = f"!{interface}" if negated else interface
    # All bits of each letter, and of the NUL behind the last one; Rule6 sets only the lowest bit of each.
    rule.get_ip().iniface_mask = b"\xff" * (len(interface) + 1)


def _words(error: object) -> str:
    """Return an error of libiptc's in its own words; python-iptables shows them as bytes."""
    text = error.decode(errors="replace") if isinstance(error, bytes) else str(error)
    return re.sub(r"b'([^']*)'", r"\1", text)


def _load() -> ModuleType:
    """python-iptables, from where pip puts packages for this interpreter.

    The guard's interpreter is started without `site` (-S), so that directory is not on its path.
    Raises PortChainsUnavailable where python-iptables or the libraries of iptables are missing.
    """
    if "iptc" in sys.modules:
        return sys.modules["iptc"]
    directory = next((path for path in packages.directories() if (path / "iptc" / "__init__.py").is_file()), None)
    if directory is None:
        raise PortChainsUnavailable(f"no python-iptables for {sys.executable}; {_REMEDY}")
    sys.modules["iptc.util"] = _stand_in(directory)
    # Would have it ask for a file name in place of a library's.
    os.environ.pop("PYTHON_IPTABLES_XTABLES_VERSION", None)
    # On the path only while it is loaded: nothing else is to be found there. Last: nothing is to be hidden by it.
    sys.path.append(str(directory))
    try:
        return importlib.import_module("iptc")
    except Exception as error:
        # Loading runs code of many hosts' libraries, and whatever it raises means the same: no python-iptables.
        _forget()
        raise PortChainsUnavailable(f"python-iptables in {directory} does not load ({error}); {_REMEDY}") from error
    finally:
        sys.path.pop()


def _forget() -> None:
    """Unload a half-loaded python-iptables, which must not look like a loaded one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "iptc"]:
        del sys.modules[name]


def _stand_in(directory: Path) -> ModuleType:
    """Return a module with what python-iptables takes from its own `iptc.util`.

    Its wrapper of longjmp is in `directory`.
    """

    def find_library(*names: str) -> tuple[ctypes.CDLL, int]:
        if "xtwrapper" in names:
            return ctypes.CDLL(str(directory / f"libxtwrapper{sysconfig.get_config_var('EXT_SUFFIX')}")), 0
        found = _loaded([soname for name in names for soname in _SONAMES.get(name, ())])
        if "xtables" in names:
            os.environ["XTABLES_LIBDIR"] = str(_extensions())
        return found

    module = ModuleType("iptc.util")
    module.__dict__.update(
        find_library=find_library, find_libc=lambda: ctypes.CDLL("libc.so.6"), load_kernel=_load_kernel_module
    )
    return module


def _loaded(sonames: list[str]) -> tuple[ctypes.CDLL, int]:
    """Return the first of these libraries that the loader finds in the system's directories, and its version."""
    for soname in sonames:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(soname, mode=ctypes.RTLD_GLOBAL), int(soname.rpartition(".")[2])
    raise OSError(f"no {' or '.join(sonames)} on this host; its iptables package has them")


def _extensions() -> Path:
    """Return the directory of iptables' extensions, beside the libxtables that has been loaded."""
    for library in proc.own_mapped_files():
        if "/libxtables.so." in str(library):
            return library.parent / "xtables"
    raise OSError("libxtables is not mapped")


def _load_kernel_module(name: str) -> None:
    """ip_tables and ip6_tables, as iptables' commands load them: the kernel does not do it by itself."""
    if Path(f"/proc/net/{name}_names").exists():
        return
    with contextlib.suppress(OSError):
        commands.run([["/sbin/modprobe", "-q", name]], [""], {}, _MODPROBE_SECONDS)
