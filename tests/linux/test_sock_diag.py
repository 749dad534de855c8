"""Which listeners there are, who holds them and which cgroup they belong to, against real sockets."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import operator
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import kernel
import pytest
from cgroups import Cgroup, in_child, inside, leave_for_a_new_network, new_cgroup, socket_made_in
from headless import HEADLESS
from hosts import Network, cgroup2_mount
from patience import patient

from securerun.linux import netlink, proc, sock_diag
from securerun.linux.netlink import Channel
from securerun.linux.sock_diag import Listener, SocketDiagnosis, SocketsUnavailable

IPPROTO_MPTCP = 262
IPPROTO_SCTP = 132
MANY = 10_000
TELLS_CGROUPS = kernel.needing(kernel.CGROUPS_OF_SOCKETS)
NOT_WHOLE = "not whole|without its header"


@pytest.fixture
def cgroup(root: None) -> Iterator[Cgroup]:
    with new_cgroup() as made:
        yield made


@pytest.fixture
def diagnosis() -> Iterator[SocketDiagnosis]:
    with contextlib.closing(SocketDiagnosis()) as made:
        yield made


def listener(family: int = socket.AF_INET, address: str = "127.0.0.1", protocol: int = 0) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM, protocol)
    made.bind((address, 0))
    made.listen()
    return made


def found_of(*listening: socket.socket) -> list[Listener]:
    """What is found of these listeners, in their order; raises KeyError if one is not found."""
    found = {one.inode: one for one in sock_diag.listeners()}
    return [found[inode_of(one)] for one in listening]


def inode_of(made: socket.socket) -> int:
    return os.fstat(made.fileno()).st_ino


def port_of(made: socket.socket) -> int:
    return int(made.getsockname()[1])


def outside_of(cgroup: Cgroup, pid: int) -> set[int]:
    """The ports of the process that the job's cgroup does not cover."""
    found = sock_diag.listeners()
    ids = sock_diag.cgroup_ids(cgroup.descriptor)
    return {one.port for one in sock_diag.outside(found, proc.sockets_of([pid]), ids)}


# What listens


@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0"),  # noqa: S104 - what torch's stores do
        (socket.AF_INET6, "::1"),
        (socket.AF_INET6, "::"),
        (socket.AF_INET6, "::ffff:127.0.0.1"),
    ],
)
def test_a_listener_is_found_with_address_port_and_inode(family: int, address: str) -> None:
    with listener(family, address) as made:
        (found,) = found_of(made)
        assert (found.address, found.port) == (ipaddress.ip_address(address), port_of(made))


@kernel.needing(kernel.MPTCP)
def test_an_mptcp_listener_is_found_once_with_the_inode_that_the_process_holds() -> None:
    with listener(protocol=IPPROTO_MPTCP) as made:
        assert [one.inode for one in sock_diag.listeners() if one.port == port_of(made)] == [inode_of(made)]


def test_connections_and_sockets_that_do_not_listen_are_not_found() -> None:
    with listener() as made, socket.create_connection(made.getsockname()) as near, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        far, _ = made.accept()
        with far:
            inodes = {one.inode for one in sock_diag.listeners()}
            assert inode_of(made) in inodes
            assert not inodes & {inode_of(near), inode_of(far), inode_of(bound)}


def test_a_listener_comes_and_goes_between_looks(diagnosis: SocketDiagnosis) -> None:
    before = diagnosis.listeners()
    with listener() as made:
        inode, port = inode_of(made), port_of(made)
        assert [one.port for one in set(diagnosis.listeners()) - set(before) if one.inode == inode] == [port]
    assert inode not in {one.inode for one in diagnosis.listeners()}


def test_a_waiting_connection_makes_no_other_listener(diagnosis: SocketDiagnosis) -> None:
    with listener() as made:
        before = [one for one in diagnosis.listeners() if one.inode == inode_of(made)]
        with socket.create_connection(made.getsockname()):
            assert [one for one in diagnosis.listeners() if one.inode == inode_of(made)] == before


def test_the_network_namespace_is_the_one_in_which_the_diagnosis_was_made(network: Network) -> None:
    node0, node1, _ = network
    with inside(node0):
        made = listener(address=node0.ipv4)
        here = SocketDiagnosis()
    with inside(node1):
        there = SocketDiagnosis()
    with made, contextlib.closing(here), contextlib.closing(there):
        assert [(one.address, one.port) for one in here.listeners()] == [
            (ipaddress.ip_address(node0.ipv4), port_of(made))
        ]
        assert there.listeners() == ()


@pytest.mark.usefixtures("root")
def test_ten_thousand_listeners_are_all_found() -> None:
    def work() -> tuple[set[int], set[int], bool, float]:
        leave_for_a_new_network()
        resource.setrlimit(resource.RLIMIT_NOFILE, (MANY + 100, MANY + 100))
        made = [listener(address="0.0.0.0") for _ in range(MANY)]  # noqa: S104
        with contextlib.closing(SocketDiagnosis()) as diagnosis:
            first = diagnosis.listeners()
            began = time.monotonic()
            second = diagnosis.listeners()
            took = time.monotonic() - began
        same = len(first) == len(second) and all(map(operator.is_, first, second))
        return {one.port for one in first}, {port_of(one) for one in made}, same, took

    found, made, same, took = in_child(work)
    assert found == made
    assert same
    assert took < patient(1)


# What the kernel may answer


WHOLE = netlink.framed(20, b"a" * 72, 0)


@pytest.mark.parametrize(
    "data",
    [
        *(WHOLE[:length] for length in (1, 15, 16, 17, 87)),
        struct.pack("=IHHII", 0, 20, 0, 0, 0),
        netlink.framed(3, b"", 0),
        netlink.framed(2, b"\0\0", 0),
    ],
)
def test_a_list_that_is_not_whole_is_refused(
    data: bytes, diagnosis: SocketDiagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Channel, "receive", lambda _: data)
    with pytest.raises(SocketsUnavailable, match=NOT_WHOLE):
        diagnosis.listeners()
    with pytest.raises(SocketsUnavailable, match=NOT_WHOLE):
        diagnosis.connections(1, 65535)


def test_a_protocol_that_is_not_built_in_is_said_to_be_so(
    diagnosis: SocketDiagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(socket, "IPPROTO_TCP", IPPROTO_SCTP)
        if in_child(_no_sctp):
            with pytest.raises(SocketsUnavailable, match="modprobe tcp_diag"):
                diagnosis.listeners()
    with listener() as made:  # and the same object serves on
        assert inode_of(made) in {one.inode for one in diagnosis.listeners()}


def _no_sctp() -> bool:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.SOCK_DIAG) as channel:
        question = struct.pack("=BBBBI48x", socket.AF_INET, IPPROTO_SCTP, 0, 0, 1 << 10)
        channel.send(netlink.framed(20, question, netlink.REQUEST | netlink.DUMP))
        return bool(struct.unpack_from("=i", channel.recv(65536), 16)[0])


def test_an_answer_about_a_socket_that_is_cut_short_is_refused_and_the_next_is_right(
    diagnosis: SocketDiagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(Channel, "listed", lambda *_: [b"\2\n" + b"\0" * 69])
        with pytest.raises(SocketsUnavailable, match="not whole"):
            diagnosis.listeners()
    with listener() as made:
        assert inode_of(made) in {one.inode for one in diagnosis.listeners()}


def test_a_kernel_that_does_not_tell_the_cgroup_accuses_nobody(
    diagnosis: SocketDiagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = struct.pack("=BBBB", socket.AF_INET, 10, 0, 0) + struct.pack("!H", 6000) + b"\0" * 62
    answers = iter([[answer + struct.pack("=I", 77)], []])
    monkeypatch.setattr(Channel, "listed", lambda *_: next(answers))
    found = diagnosis.listeners()
    assert found == (Listener(ipaddress.ip_address("0.0.0.0"), 6000, 0, 77, None),)  # noqa: S104
    assert sock_diag.held(found, {77: 1}) == found
    assert sock_diag.outside(found, {77: 1}, {5}) == ()


def test_an_answer_about_a_socket_in_another_state_is_passed_over(
    diagnosis: SocketDiagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    established = struct.pack("=BB70x", socket.AF_INET, 1)
    monkeypatch.setattr(Channel, "listed", lambda *_: [established])
    assert diagnosis.listeners() == ()


def test_no_look_leaves_a_descriptor_behind(cgroup: Cgroup) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        sock_diag.listeners()
        proc.sockets_of([os.getpid()])
        sock_diag.cgroup_ids(cgroup.descriptor)
    assert os.listdir("/proc/self/fd") == before


# Who holds it


def test_the_sockets_of_a_process_are_found_by_inode() -> None:
    with listener() as made, socket.socketpair()[0] as other:
        holders = proc.sockets_of([os.getpid()])
        assert holders[inode_of(made)] == os.getpid()
        assert inode_of(other) in holders
        assert [one.port for one in sock_diag.held(found_of(made), holders)] == [port_of(made)]
        assert sock_diag.held(found_of(made), proc.sockets_of([1])) == ()


def test_a_process_that_is_gone_holds_nothing_and_hides_no_other() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with listener() as made:
        assert inode_of(made) in proc.sockets_of([gone.pid, os.getpid()])
        assert proc.sockets_of([gone.pid]) == {}


def test_a_process_that_waits_to_be_reaped_holds_nothing() -> None:
    ended = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert proc.sockets_of([ended.pid]) == {}
    finally:
        ended.wait()


def test_descriptors_are_found_after_the_first_thread_has_exited() -> None:
    with listener() as made:
        made.set_inheritable(True)
        child = subprocess.Popen([sys.executable, "-c", HEADLESS], pass_fds=[made.fileno()], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            assert inode_of(made) in proc.sockets_of([child.pid])
        finally:
            child.kill()
            child.communicate()


# Which cgroup it belongs to


@TELLS_CGROUPS
def test_a_listener_carries_the_number_of_its_cgroup(cgroup: Cgroup) -> None:
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")):
        with socket_made_in(cgroup, lambda family=family, address=address: listener(family, address)) as made:  # type: ignore[misc]
            assert found_of(made)[0].cgroup_id == sock_diag.cgroup_id(cgroup.descriptor)


@TELLS_CGROUPS
@kernel.needing(kernel.MPTCP)
def test_an_mptcp_listener_carries_the_number_of_its_cgroup(cgroup: Cgroup) -> None:
    with socket_made_in(cgroup, lambda: listener(protocol=IPPROTO_MPTCP)) as made:
        assert found_of(made)[0].cgroup_id == sock_diag.cgroup_id(cgroup.descriptor)


def test_the_number_is_the_one_that_the_kernel_opens_the_directory_by(cgroup: Cgroup) -> None:
    """name_to_handle_at gives the kernfs id itself, all 64 bits of it (fs/kernfs/mount.c: kernfs_encode_fh)."""
    handle = ctypes.create_string_buffer(struct.pack("=Ii8x", 8, 0), 16)
    mount = ctypes.c_int()
    library = ctypes.CDLL(None, use_errno=True)
    empty_path = 0x1000
    assert library.name_to_handle_at(cgroup.descriptor, b"", handle, ctypes.byref(mount), empty_path) == 0
    assert struct.unpack_from("=Q", handle, 8)[0] == sock_diag.cgroup_id(cgroup.descriptor)


@TELLS_CGROUPS
def test_cgroups_below_count_as_the_jobs(cgroup: Cgroup) -> None:
    with new_cgroup(cgroup) as below, new_cgroup(below) as deepest, new_cgroup() as foreign:
        ids = sock_diag.cgroup_ids(cgroup.descriptor)
        assert ids == {sock_diag.cgroup_id(one.descriptor) for one in (cgroup, below, deepest)}
        with socket_made_in(deepest, listener) as inner, socket_made_in(foreign, listener) as other:
            holders = proc.sockets_of([os.getpid()])
            assert sock_diag.outside(found_of(inner, other), holders, ids) == tuple(found_of(other))


@TELLS_CGROUPS
def test_a_socket_outlives_the_directory_of_its_cgroup_and_keeps_its_number(cgroup: Cgroup) -> None:
    with new_cgroup(cgroup) as below:
        ids = sock_diag.cgroup_ids(cgroup.descriptor)
        made = socket_made_in(below, listener)
    with made:
        assert found_of(made)[0].cgroup_id in ids
        assert found_of(made)[0].cgroup_id not in sock_diag.cgroup_ids(cgroup.descriptor)


def test_cgroups_nested_deeper_than_a_path_can_name_do_no_harm(cgroup: Cgroup) -> None:
    name, depth = "d" * 100, 60
    descriptors = [os.open(cgroup.path, os.O_RDONLY)]
    try:
        for _ in range(depth):
            os.mkdir(name, dir_fd=descriptors[-1])
            descriptors.append(os.open(name, os.O_RDONLY, dir_fd=descriptors[-1]))
        found = sock_diag.cgroup_ids(cgroup.descriptor)
        assert {sock_diag.cgroup_id(descriptor) for descriptor in descriptors[:30]} <= found
    finally:
        while len(descriptors) > 1:
            os.close(descriptors.pop())
            os.rmdir(name, dir_fd=descriptors[-1])
        os.close(descriptors.pop())


def test_made_inside_then_moved_out_is_covered(cgroup: Cgroup) -> None:
    mount = cgroup2_mount()
    assert mount is not None
    with socket_made_in(cgroup, listener, leave_to=mount) as made:
        assert found_of(made)[0].inode in proc.sockets_of([os.getpid()])
        assert port_of(made) not in outside_of(cgroup, os.getpid())


@TELLS_CGROUPS
def test_made_before_joining_is_outside(cgroup: Cgroup) -> None:
    def work() -> tuple[set[int], int, int]:
        with listener() as before:
            cgroup.enter()
            with listener() as after:
                return outside_of(cgroup, os.getpid()), port_of(before), port_of(after)

    reported, before, after = in_child(work)
    assert before in reported
    assert after not in reported


@TELLS_CGROUPS
def test_received_from_outside_is_outside(cgroup: Cgroup) -> None:
    near, far = socket.socketpair()

    def work() -> set[int]:
        near.close()
        cgroup.enter()
        assert select.select([far], [], [], 10)[0]
        _, (received,), _, _ = socket.recv_fds(far, 1, 1)
        with socket.socket(fileno=received):
            return outside_of(cgroup, os.getpid())

    with near, far:
        made = listener()
        port = port_of(made)
        socket.send_fds(near, [b"!"], [made.fileno()])
        made.close()  # from here on only the message, then only the job's process, holds it
        assert in_child(work) == {port}


def test_nobody_elses_listener_is_outside(cgroup: Cgroup) -> None:
    def work() -> set[int]:
        cgroup.enter()
        with listener():
            return outside_of(cgroup, os.getpid())

    with listener() as foreign:
        foreign_port = port_of(foreign)
        process = subprocess.Popen(["sleep", "60"], pass_fds=[foreign.fileno()])
        foreign.close()
        try:
            assert foreign_port in {one.port for one in sock_diag.listeners()}
            assert in_child(work) == set()
        finally:
            process.kill()
            process.wait()


def knocking(address: str) -> socket.socket:
    """A socket whose connection is being opened; nobody is there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family)
    made.setblocking(False)
    made.connect_ex((address, 4000))
    return made


def test_connections_that_are_being_opened_are_found_by_how_often_their_syn_went_out_again(network: Network) -> None:
    node = network["node0"]
    with inside(node), contextlib.closing(SocketDiagnosis()) as diagnosis, contextlib.ExitStack() as kept:
        nobody = ("10.77.0.200", "fd77::200", "::ffff:10.77.0.201")
        inodes = [inode_of(kept.enter_context(knocking(address))) for address in nobody]
        found = {one.inode: one for one in diagnosis.attempts(0)}
        assert [(str(found[inode].source), str(found[inode].target)) for inode in inodes] == [
            (node.ipv4, "10.77.0.200"),
            (node.ipv6, "fd77::200"),
            (node.ipv4, "10.77.0.201"),
        ]
        assert {one.port for one in found.values()} == {4000}
        assert {one.user for one in found.values()} == {os.geteuid()}
        assert diagnosis.attempts(1) == ()
        time.sleep(1.3)
        assert {one.inode for one in diagnosis.attempts(1)} == set(inodes)


def test_of_connections_without_end_some_are_looked_at(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sock_diag, "_MOST_ATTEMPTS", 20)
    with inside(network["node0"]), contextlib.closing(SocketDiagnosis()) as diagnosis, contextlib.ExitStack() as kept:
        for _ in range(300):
            kept.enter_context(knocking("10.77.0.200"))
        assert [len(diagnosis.attempts(0)) for _ in range(3)] == [20] * 3
