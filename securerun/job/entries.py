"""Hosts as people and batch systems write them: addresses, networks and names, in a list or in a host file.

Nothing here asks a name service.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from securerun.errors import PolicyError
from securerun.job import folded, hostfile
from securerun.linux.networks import Address, Network, collapse, within

# Takes one line for the user.
Tell = Callable[[str], None]

# The words of a list that stand for no host of that name.
ANY, SUBNET = "any", "subnet"

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,252}")
# getaddrinfo would read 10.77.1 as 10.77.0.1 and 0x7f000001 as 127.0.0.1 (inet_aton(3)): no host is named like that.
_NUMERIC_LABEL = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?")
_BRACKETED = re.compile(r"\[([^\[\]]+)\](/[0-9]+)?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*@(?=.)")
# The host before it has no colon of its own, or is in brackets: fd00::8 is no fd00: with 8 processes.
_SLOTS = re.compile(r"([^:]+|\[[^\[\]]*:[^\[\]]*\]):[0-9]{1,5}")
# host, slots, queue, processors
_OF_GRID_ENGINE = 4
_SETTING = re.compile(r"[A-Za-z0-9_-]+=\S*")


@dataclass(frozen=True)
class Entry:
    """One host of a list, or one network.

    words: every way to reach it that is known: what the user wrote; from a batch system, a node's name and the address
        that the batch system has for it.
    place: where that stands, for messages. file: the host file, if it stands in one.
    is_keyword: whether it is `any` or `subnet`, as the user may write them; to a batch system those are names.
    """

    words: tuple[str, ...]
    place: str
    file: str = ""
    is_keyword: bool = False

    @property
    def word(self) -> str:
        """What to call it in a message."""
        return self.words[0]


def of_list(text: str, source: str) -> Iterator[Entry]:
    """Yield the entries of a list with commas or white space between, `@FILE` standing for the hosts in that file.

    Folded words stand for all their hosts (`securerun.job.folded`). Raises PolicyError for a file that is no host file.
    """
    room = folded.MOST_NODES
    for word in folded.words(text):
        if word.startswith("@"):
            yield from of_file(word[1:], f"{source} {word}")
        elif folded.is_folded(word):
            names = folded.expand(word, source, room)
            room -= len(names)
            yield from (Entry((name,), source) for name in names)
        else:
            yield Entry((word,), source, is_keyword=word in {ANY, SUBNET})


def of_file(
    name: str, place: str, *, may_be_empty: bool = False, read: Callable[[str], bytes] = hostfile.read
) -> Iterator[Entry]:
    """Yield the hosts in a file, one a line, `#` for comments.

    As people, DeepSpeed, Open MPI and PRRTE (`user@host slots=8`), MPICH and Intel MPI (`host:8`) and Grid Engine
    (sge_pe(5): `host 8 all.q@host UNDEFINED`) write them; a folded word stands for all its hosts.
    may_be_empty: whether it is right that it names none. read: how its content is had.
    Raises PolicyError, which begins with `place`, for a file that is none.
    """
    hosts, room = 0, folded.MOST_NODES
    for number, line in enumerate(_read(name, place, read).splitlines(), 1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if not words:
            continue
        here = f"{place}, line {number}"
        host = _host_of(words, here)
        hosts += 1
        if not folded.is_folded(host):
            yield Entry((host,), here, name)
            continue
        names = folded.expand(host, here, room)
        room -= len(names)
        yield from (Entry((one,), here, name) for one in names)
    if not hosts and not may_be_empty:
        raise PolicyError(f"{place}: the host file names no host; write one host a line")


def literal(word: str, place: str) -> Network | None:
    """Return the network that a word writes out, an address being one of its own; None for a host name.

    Raises PolicyError, which begins with `place`, for what is neither, and for what can be no peer.
    """
    if _NAME.fullmatch(word) and not _NUMERIC_LABEL.fullmatch(word):
        return None
    match = _BRACKETED.fullmatch(word)
    plain = match.group(1) + (match.group(2) or "") if match else word
    try:
        network = _network(plain, word, place) if "/" in plain else single(ipaddress.ip_address(plain))
    except ValueError as error:
        raise PolicyError(f"{place}: {_complaint(word)}") from error
    _refuse_unusable(network, word, place)
    return network


def single(address: Address) -> Network:
    """Return the network of one address; the zone of fe80::1%eth0 is not on the wire and goes."""
    # By number: given an address, Python's networks write it as text and read that again.
    if isinstance(address, ipaddress.IPv4Address):
        return ipaddress.IPv4Network(int(address))
    if address.ipv4_mapped is not None:
        return ipaddress.IPv4Network(int(address.ipv4_mapped))
    return ipaddress.IPv6Network(int(address))


def is_there(path: Path) -> bool:
    """Return whether a file exists, also where it cannot be looked at: reading it says why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def is_host(network: Network) -> bool:
    """Return whether another host can connect from there."""
    start = network.network_address
    nowhere = network.prefixlen == network.max_prefixlen and start.is_unspecified
    return not (nowhere or start.is_loopback or network.is_multicast)


def _read(name: str, place: str, read: Callable[[str], bytes]) -> str:
    if not name:
        raise PolicyError(f"{place}: no file after the @; write @hostfile.txt")
    try:
        content = read(name)
    except (OSError, RuntimeError, ValueError) as error:  # no such file; no such home directory; a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise PolicyError(
            f"{place}: the host file cannot be read ({reason}); name a file with one host a line"
        ) from error
    if len(content) > hostfile.MOST_BYTES:
        raise PolicyError(f"{place}: the host file is larger than 16 MB; name a file with one host a line")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise PolicyError(f"{place}: the host file is no text; name a file with one host a line")
    return text


def _host_of(words: Sequence[str], here: str) -> str:
    """Return the host of a line, without the user that one logs in as and the number of processes that it is to have.

    Raises PolicyError for a line that is of no known form.
    """
    if not (len(words) == _OF_GRID_ENGINE and words[1].isdecimal()):
        for word in words[1:]:
            if not _SETTING.fullmatch(word):
                raise PolicyError(
                    f"{here}: {folded.shortened(word)!r} after {folded.shortened(words[0])!r} is no name=value; write "
                    "one host a line, and nothing behind it but # comments and settings such as slots=8"
                )
    host = _USER.sub("", words[0], count=1)
    slots = _SLOTS.fullmatch(host)
    if slots is not None:
        host = slots[1]
    if host in {ANY, SUBNET} or host.startswith("@"):
        raise PolicyError(f"{here}: {host!r} is no host; write it in --peers itself")
    return host


def _network(plain: str, word: str, place: str) -> Network:
    if "%" in plain:  # Python takes any text for a zone
        raise ValueError(plain)
    network = ipaddress.ip_network(plain, strict=False)
    # Collapsed, ::ffff:0:0/96 is what it means: every IPv4 address.
    (collapsed,) = collapse([network])
    if collapsed.prefixlen == 0:
        raise PolicyError(f"{place}: peer {word} is every host; write `any` if you mean that")
    address = plain.partition("/")[0]
    if str(network.network_address) != str(ipaddress.ip_address(address)):
        raise PolicyError(f"{place}: {within(word, address, network)}")
    return collapsed


def _refuse_unusable(network: Network, word: str, place: str) -> None:
    if is_host(network):
        return
    if network.network_address.is_loopback:
        raise PolicyError(
            f"{place}: peer {word} is the loopback, which is open to this host and to no other; "
            "write the address that the other node has on the network, or `localhost` alone if there is no other host"
        )
    kind = "multicast" if network.is_multicast else "no address of a host"
    raise PolicyError(f"{place}: peer {word} is {kind}; write the address of the other node")


def _complaint(word: str) -> str:
    if "," in word:  # lists are split there, so it stands in a file or a table
        return f"peer {folded.shortened(word)!r} has commas; write one host a line, without commas"
    user = _USER.match(word)
    if user:
        return f"peer {word!r} is a host with a user, and peers have none; write {word[user.end() :]}"
    host, colon, port = word.rpartition(":")
    if colon and port.isdecimal() and host:
        return f"peer {word!r} is a host with a port, and peers have none; write {host.strip('[]')}"
    return (
        f"peer {word!r} is no address, network or host name; write one like 10.0.0.7, 10.0.0.0/24, fd00::7, node7 or "
        "node[0-3]"
    )
