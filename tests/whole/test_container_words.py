"""What a container is told: what of its flags is in the way, by name, and what to write instead."""

from __future__ import annotations

import subprocess

import pytest
from conversation import SOCKET, socket_unit
from engines import HOSTS_CGROUPS, IMAGE_USER, Node
from hosts import eventually
from probe import reach

from securerun.protection import ways

EXEC = ("securerunctl", "exec", "--peers", "10.77.0.9")
NET_ADMIN, BPF, SYS_ADMIN = "--cap-add=NET_ADMIN", "--cap-add=BPF", "--cap-add=SYS_ADMIN"
UNCONFINED = "--security-opt=seccomp=unconfined"


@pytest.fixture(scope="module")
def node(container_node: Node) -> Node:
    return container_node


def told(node: Node, *options: str, asked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """What a command of securerun's says in a container of podman's with the host's network."""
    return node.podman().run("--network=host", *options, command=[*EXEC, *asked, "--", "true"])


def test_seccomp_is_not_blamed_on_capabilities(node: Node) -> None:
    """podman's own profile allows bpf(2) with CAP_SYS_ADMIN alone."""
    said = told(node, NET_ADMIN, BPF, *HOSTS_CGROUPS).stderr
    assert "no shield" in said and "a seccomp filter forbids bpf(2)" in said and "CAP_SYS_ADMIN" in said
    assert "run as root" not in said


@pytest.mark.parametrize("more", [(NET_ADMIN, SYS_ADMIN), (NET_ADMIN, BPF, UNCONFINED)], ids=["sys_admin", "bpf"])
def test_what_is_enough_for_the_shield_gives_it(node: Node, more: tuple[str, ...]) -> None:
    assert "by shield" in told(node, *more, *HOSTS_CGROUPS).stderr


def test_cgroups_without_their_namespace_are_told_from_none(node: Node) -> None:
    said = told(node, NET_ADMIN, SYS_ADMIN, HOSTS_CGROUPS[1]).stderr
    assert "no shield" in said and "--cgroupns host" in said and "no cgroup v2" not in said


def test_read_only_root_says_what_to_mount(node: Node) -> None:
    done = told(node, NET_ADMIN, "--read-only", "--read-only-tmpfs=false")
    assert done.returncode == 77 and "--tmpfs /run" in done.stderr and "run as root" not in done.stderr


@pytest.mark.parametrize("who", ["--user=0", "--uidmap=0:100000:65536"], ids=["root", "rootless"])
def test_root_of_a_container_is_not_told_to_be_root(node: Node, who: str) -> None:
    done = told(node, who)
    assert done.returncode == 77 and f"mount {ways.SOCKET.parent} here" in done.stderr
    assert "as root" not in done.stderr and "sudoers" not in done.stderr


def test_rootless_roots_own_network_gives_chains_and_no_advice_to_be_root(node: Node) -> None:
    """In a network of its container's own its capabilities count, and the kernel takes no shield from it."""
    options = ("--uidmap=0:100000:65536", "--network=none", NET_ADMIN)
    done = node.podman().run(*options, command=[*EXEC, "--interface", "any", "--", "true"])
    assert "no shield" in done.stderr and "as root" not in done.stderr, done


def test_refusal_begins_with_its_reason(node: Node) -> None:
    done = told(node, NET_ADMIN, asked=("--firewall", "off"))
    assert done.returncode == 77
    assert "cannot be guarded: no shield" in done.stderr and "reserved" not in done.stderr.split("no shield")[0]


# --- as another user ---

LISTENING = (
    "import os, socket, time; s = socket.create_server(('', 7005)); print(os.getuid(), flush=True); time.sleep(60)"
)


@pytest.mark.parametrize(
    "given",
    [(NET_ADMIN, SYS_ADMIN, *HOSTS_CGROUPS), (NET_ADMIN, "--cap-add=SYS_PTRACE")],
    ids=["shield", "ports"],
)
def test_run_as_another_user_is_closed_to_strangers(node: Node, given: tuple[str, ...]) -> None:
    command = [*EXEC, "--run-as", "nobody", "--", "python", "-c", LISTENING]
    job = node.podman().popen("--network=host", "--name=other", *given, command=command)
    assert job.stdout is not None and job.stdout.readline() == "65534\n", job.stderr and job.stderr.read()
    target = (node.host.ipv4, 7005)
    assert node.stranger is not None
    stranger = node.stranger
    assert eventually(lambda: not reach(stranger, [target])[target], seconds=2)
    node.podman().kill("other")
    job.communicate(timeout=20)


def test_run_as_another_user_is_refused_where_only_looking_into_it_could_close_its_ports(node: Node) -> None:
    done = node.podman().run("--network=host", NET_ADMIN, command=[*EXEC, "--run-as", "nobody", "--", "true"])
    assert done.returncode == 77 and "--cap-add SYS_PTRACE" in done.stderr


# --- by the host's socket ---

MOUNTED = f"--volume={SOCKET}:{SOCKET}"


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ((), ()),
        ((NET_ADMIN, "--read-only", "--read-only-tmpfs=false"), ()),
        ((NET_ADMIN,), ("--scope", "process")),
        ((NET_ADMIN,), ("--firewall", "off")),
    ],
    ids=["no capability", "read-only", "no shield", "no layer"],
)
def test_too_little_privilege_goes_on_to_the_hosts_guard(
    node: Node, given: tuple[str, ...], asked: tuple[str, ...]
) -> None:
    with socket_unit(node, node.host):
        said = told(node, MOUNTED, *given, asked=asked)
    assert said.returncode == 0 and "by shield" in said.stderr, said
    assert "guard started by the socket " in said.stderr


def test_other_refusals_of_a_guard_of_its_own_stay_refusals(node: Node) -> None:
    with socket_unit(node, node.host):
        said = told(node, MOUNTED, NET_ADMIN, asked=("--accept", "--firewall", "nftables"))
    assert said.returncode != 0, said


@pytest.mark.parametrize("uid", [0, IMAGE_USER])
def test_user_id_0_by_the_socket_is_under_the_sites_policy(node: Node, uid: int) -> None:
    """It closed the node's ssh port: a container's root has the number, and nothing else of root's."""
    before = node.host.snapshot()
    with socket_unit(node, node.host):
        said = told(node, MOUNTED, f"--user={uid}", asked=("--ports", "22"))
        all_rights = told(node, MOUNTED, f"--user={uid}", *node.podman().privileged, asked=("--ports", "22"))
    assert said.returncode == 78 and f"port 22 may not be named by user {uid}" in said.stderr
    if uid:
        assert "port 22 may not be named" in all_rights.stderr
    else:  # what root has by itself it needs no socket for
        assert "guard started directly" in all_rights.stderr
    assert eventually(lambda: node.host.snapshot() == before, seconds=2)
