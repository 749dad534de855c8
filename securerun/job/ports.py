"""The port plan: the TCP ports that a job is known to listen on, each with its purpose.

The random ports of a job (the workers' store, gloo, NCCL) cannot be planned; the shield closes those.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from securerun.errors import PolicyError
from securerun.firewall.policy import FIRST_PORT, LAST_PORT, PortRange, Purpose
from securerun.job.job import C10D, PARALLEL, STATIC, Job
from securerun.job.libraries import Library, Variables

# HCCL_IF_BASE_PORT in the CANN environment variable reference: 1024-65520, 60000 by default, 16 ports from there on
# (CANN 8.0), 32 since CANN 8.3.
HCCL_BASE = "HCCL_IF_BASE_PORT"
HCCL_DEFAULT_BASE = 60000
HCCL_FIRST_BASE, HCCL_LAST_BASE = 1024, 65520
HCCL_PORTS = 16
HCCL_PORTS_SINCE_8_3 = 32
# HCCL_HOST_SOCKET_PORT_RANGE in the same reference: ports and ranges with commas between, or `auto` for random ports;
# it takes precedence over HCCL_IF_BASE_PORT.
HCCL_RANGE = "HCCL_HOST_SOCKET_PORT_RANGE"

_STORES = {
    C10D: Purpose.C10D_STORE,
    STATIC: Purpose.STATIC_STORE,
    PARALLEL: Purpose.PARALLEL_STORE,
}
# CANN's own files say `version=8.3.RC1` or `Version=8.3.0.1.200`; a few hundred bytes each.
_CANN_VERSION = re.compile(r"^version=(\d+)\.(\d+)", re.IGNORECASE | re.MULTILINE)
_CANN_FILE_SIZE = 64 * 1024


def plan_ports(
    job: Job,
    environment: Mapping[str, str],
    extra: str | None,
    source: str = "--ports",
    known: Iterable[PortRange] = (),
    variables: Variables | None = None,
) -> tuple[PortRange, ...]:
    """Return the ports of a job, in ascending order, each range once.

    The endpoint's port is planned on every node, since any of them may turn out to hold the store; HCCL's ports are
    planned on every host, with or without NPUs in sight (their default range gives way to others); so is what the job
    is known to listen on. `extra` is what the user added, in the words of `source`; `known` is what somebody else
    knows, such as a rank table (`securerun.job.peers.Peers.ports`). variables: hears of HCCL's that are passed over.

    Raises PolicyError, with the variable or option that is wrong.
    """
    planned: dict[tuple[int, int], PortRange] = {}
    hccl = _hccl(environment, variables or Variables(environment))
    found = (*_endpoint(job), *hccl, *_added(extra, source), *job.known_ports, *known)
    for ports in sorted(found, key=lambda ports: not ports.is_asked_for):
        planned.setdefault((ports.first, ports.last), ports)
    return tuple(sorted(planned.values()))


def ranges(numbers: Iterable[int], purpose: Purpose) -> tuple[PortRange, ...]:
    """Return ports as ranges, in ascending order; those that follow one another are one range.

    Raises PolicyError for what is no TCP port.
    """
    joined: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if joined and number == joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], number)
        else:
            joined.append((number, number))
    return tuple(PortRange(first, last, purpose) for first, last in joined)


def _endpoint(job: Job) -> Iterator[PortRange]:
    endpoint = job.meeting_point
    if endpoint is not None and endpoint.port:
        yield PortRange(endpoint.port, endpoint.port, _STORES.get(job.backend, Purpose.ENDPOINT))


def _added(extra: str | None, source: str) -> Iterator[PortRange]:
    if extra is not None:
        yield from _parse(extra, Purpose.ADDED, source)


def _hccl(environment: Mapping[str, str], variables: Variables) -> Iterator[PortRange]:
    base, named = None, tuple[PortRange, ...]()
    # Read even where the ranges take precedence: HCCL refuses a wrong one too, only later.
    with variables.of(Library.HCCL):
        base = _hccl_base(environment.get(HCCL_BASE, "").strip())
    ranges = environment.get(HCCL_RANGE, "").strip()
    if ranges == "auto":
        return
    if ranges:
        with variables.of(Library.HCCL):
            named = tuple(_parse(ranges, Purpose.HCCL, HCCL_RANGE))
    if named:
        yield from named
        return
    count = HCCL_PORTS_SINCE_8_3 if _cann_version(environment) >= (8, 3) else HCCL_PORTS
    first, purpose = (HCCL_DEFAULT_BASE, Purpose.HCCL_DEFAULT) if base is None else (base, Purpose.HCCL)
    yield PortRange(first, min(first + count - 1, LAST_PORT), purpose)


def _hccl_base(text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or not HCCL_FIRST_BASE <= int(text) <= HCCL_LAST_BASE:
        raise PolicyError(
            f"{HCCL_BASE}={text} is no port of {HCCL_FIRST_BASE}-{HCCL_LAST_BASE}; "
            f"write export {HCCL_BASE}={HCCL_DEFAULT_BASE}, or unset it"
        )
    return int(text)


def _parse(text: str, purpose: Purpose, source: str) -> Iterator[PortRange]:
    """Yield the ranges in a list such as `7000,8000-8010`."""
    words = [word for word in re.split(r"[,\s]+", re.sub(r"\s*-\s*", "-", text)) if word]
    if not words:
        raise PolicyError(f"{source}: {text!r} names no port; write ports and ranges as in 7000,8000-8010")
    for word in words:
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word)
        if match is None:
            raise PolicyError(f"{source}: {word!r} is no port and no range of ports; write it as in 7000,8000-8010")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if first > last:
            raise PolicyError(f"{source}: the range {word} is crossed; write {last}-{first}")
        if not FIRST_PORT <= first <= last <= LAST_PORT:
            raise PolicyError(
                f"{source}: {word} goes beyond the TCP ports {FIRST_PORT}-{LAST_PORT}; name ports of those"
            )
        yield PortRange(first, last, purpose)


def _cann_version(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the newest CANN that the files under ASCEND_HOME_PATH speak of; (0, 0) if none does.

    Where files disagree the newest counts: sixteen closed ports too many do no harm, too few would.
    """
    home = environment.get("ASCEND_HOME_PATH", "").strip()
    if not home:
        return (0, 0)
    matches = (_CANN_VERSION.search(text) for text in _cann_files(Path(home)))
    return max(((int(match.group(1)), int(match.group(2))) for match in matches if match), default=(0, 0))


def _cann_files(home: Path) -> Iterator[str]:
    """Yield what torch_npu.utils.collect_env and the CANN documentation read to tell the version."""
    architecture = home / f"{os.uname().machine}-linux"
    candidates = (
        *architecture.glob("ascend_*_install.info"),
        *home.glob("ascend_*_install.info"),
        home / "version.info",
        home / "compiler" / "version.info",
    )
    for candidate in candidates:
        try:
            with candidate.open(errors="replace") as file:
                yield file.read(_CANN_FILE_SIZE)
        except OSError:
            continue
