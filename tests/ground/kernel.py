"""What tests need of the kernel that not every kernel has, which securerun supports: asked of the kernel itself.

    @kernel.needing(kernel.OWNED_TABLES)      # a mark, of tests and of their parameters
    kernel.require(kernel.PIDFDS)             # in a fixture, or in what tests are made with

A test that lacks something is skipped, and the reason is what the kernel answered. None is skipped by a version: the
kernels that distributions ship have of later ones what was brought back to them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import pytest
from cgroups import new_cgroup
from programs import result_of

from securerun.firewall import tags
from securerun.firewall.job_key import JobKey
from securerun.firewall.refusals import ShieldUnavailable
from securerun.firewall.tag_maps import tag_map_shapes
from securerun.linux import net_cgroups, sock_diag
from securerun.linux.assembler import R0, R1, R7, assemble, calculate, leave, load
from securerun.linux.bpf import Map, Program

_CAP_BPF = 39  # include/uapi/linux/capability.h
_IPPROTO_MPTCP = 262  # include/uapi/linux/in.h
# include/uapi/linux/bpf.h: skb_data and skb_data_end in struct bpf_sock_ops
_COMPARING = """
from securerun.linux.assembler import R0, R1, R2, R3, Label, assemble, calculate, jump_if, leave, load
from securerun.linux.bpf import Program, ProgramType
asking = (load(R2, 8, R1, 192), load(R3, 8, R1, 200), calculate(R2, "+=", 20), jump_if(R2, ">", R3, "end"))
Program.load("asked", assemble((*asking, Label("end"), calculate(R0, "=", 1), leave()), {}), ProgramType.SOCK_OPS)
"""


@dataclass(frozen=True)
class Need:
    """Something that the kernel has or not. ask: really does it; raises OSError where it cannot be done."""

    what: str
    ask: Callable[[], object]


def needing(*needs: Need) -> pytest.MarkDecorator:
    """The mark of a test, or of one of its parameters, that needs this of the kernel."""
    return pytest.mark.kernel(*needs)


def require(need: Need) -> None:
    """Skip the test that runs where the kernel lacks this."""
    lack = lack_of(need)
    if lack:
        pytest.skip(lack)


@functools.cache
def lack_of(need: Need) -> str:
    """Why the kernel has not got this, for a person; "" if it has, or where this process is not permitted to ask."""
    try:
        need.ask()
    except PermissionError:  # that is no word about the kernel: the test will say what it lacks
        return ""
    except OSError as error:
        return f"this kernel has no {need.what} ({error.strerror or error})"
    return ""


def _hold_a_process() -> None:
    held = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(held, 0)
    finally:
        os.close(held)


def _own_a_table() -> None:
    # Of `nft` the table goes with the command, and with the namespace in any case.
    command = ["unshare", "--net", "nft", "create table inet asked { flags owner; }"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.strip().partition("\n")[0])


def _run_a_program() -> None:
    with Program.load("asked", assemble((calculate(R0, "=", 1), leave()), {})) as program:
        result_of(program, bytes(12) + b"\x08\x00" + b"\x45" + bytes(59), 1)


def _see_a_socket() -> None:
    seeing = (load(R7, 8, R1, 168), calculate(R0, "=", 1), leave())
    with Program.load("asked", assemble(seeing, {})):
        pass


def _write_options() -> None:
    with contextlib.ExitStack() as stack:
        networks = stack.enter_context(Map.create(tag_map_shapes(1)[0]))
        try:
            stack.enter_context(tags.load_writer({networks.shape.name: networks}, JobKey(bytes(16), bytes(16), "")))
        except ShieldUnavailable as error:
            raise OSError(str(error)) from error


def _know_cap_bpf() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    if last < _CAP_BPF:
        raise OSError(f"the last that it knows is {last}")


def _compare_packets_with_their_end() -> None:
    """For who has CAP_BPF and CAP_NET_ADMIN and no more."""
    with_few = ("setpriv", "--bounding-set=-all,+net_admin,+cap_39", "--inh-caps=-all", "--")
    command = [*with_few, sys.executable, "-c", _COMPARING]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.strip().rpartition("\n")[2])


def _find_cgroup_of_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as made:
        inode = os.fstat(made.fileno()).st_ino
        if next(one for one in sock_diag.listeners() if one.inode == inode).cgroup_id is None:
            raise OSError("INET_DIAG_CGROUP_ID is not in its answer")


def _hold_the_peer() -> None:
    near, far = socket.socketpair()
    with near, far:
        os.close(near.getsockopt(socket.SOL_SOCKET, 77))  # asm-generic/socket.h: SO_PEERPIDFD


def _make_a_multipath_socket() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP).close()


def _file_of_cgroups(name: str) -> Callable[[], None]:
    def ask() -> None:
        with new_cgroup() as cgroup:
            (cgroup.path / name).stat()

    return ask


def _tell_that_filters_stay() -> None:
    if net_cgroups.may_void_filters():
        raise OSError("its BTF, if it has any, does not say so")


PIDFDS = Need("file descriptors of processes (pidfd_open(2))", _hold_a_process)
PEER_PIDFDS = Need("hold on the process of a socket's other end (SO_PEERPIDFD)", _hold_the_peer)
OWNED_TABLES = Need("nf_tables tables that belong to who made them (NFT_TABLE_F_OWNER)", _own_a_table)
TEST_RUNS = Need("runs of a program on packets made by hand (BPF_PROG_TEST_RUN with a device)", _run_a_program)
SOCKETS_IN_PROGRAMS = Need("sockets in programs on a cgroup (struct __sk_buff, sk)", _see_a_socket)
TAGS = Need("programs that write TCP options (BPF_SOCK_OPS_WRITE_HDR_OPT_CB)", _write_options)
CAP_BPF = Need("capability of its own for bpf(2) (CAP_BPF)", _know_cap_bpf)
PACKETS_FOR_CAP_BPF = Need("look at packets for a program of who has CAP_BPF alone", _compare_packets_with_their_end)
CGROUPS_OF_SOCKETS = Need("word on which cgroup a socket belongs to", _find_cgroup_of_listener)
FILTERS_THAT_STAY = Need("word that no net_cls switches filters on cgroups off", _tell_that_filters_stay)
MPTCP = Need("MPTCP", _make_a_multipath_socket)
KILLING_CGROUPS = Need("way to end a cgroup at once (cgroup.kill)", _file_of_cgroups("cgroup.kill"))
FREEZING_CGROUPS = Need("way to freeze a cgroup (cgroup.freeze)", _file_of_cgroups("cgroup.freeze"))

# The backend of a run that has a shield: its tables belong to its guard.
OWNED_NFTABLES = pytest.param("nftables", marks=needing(OWNED_TABLES))
