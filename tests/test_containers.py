"""What a container must be given: each set of capabilities gets the scope that the README says, or a clear no."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, Network, cgroup2_mount, eventually
from probe import reach
from test_faults import Held

HOLDER = Path(__file__).parent / "holder.py"
# docker run's own (moby, oci/caps/defaults.go), which ascend-docker-runtime leaves as they are.
_DEFAULT = (
    "+chown,+dac_override,+fsetid,+fowner,+mknod,+net_raw,+setgid,+setuid,+setfcap,+setpcap,+net_bind_service,"
    "+sys_chroot,+kill,+audit_write"
)
# A cgroup file system is read-only in a container without --privileged. The guard ends with the container's first
# process, so that one gives it time to clean up.
_READ_ONLY = 'mount -o remount,ro,bind "$0"'
_WRITABLE = ":"
_AND_RUN = '; "$@"; status=$?; while ls /run/securerun; do sleep 0.1; done > /dev/null 2>&1; exit $status'


@pytest.fixture
def node(network: Network) -> Iterator[Host]:
    node = network["node0"]
    before = node.snapshot()
    yield node
    assert eventually(lambda: node.snapshot() == before, seconds=2)


def container(capabilities: str, mount: str, *command: str) -> list[str]:
    """`command` as a container runs it: as root of few capabilities, in a pid and a mount namespace."""
    wrap = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", mount + _AND_RUN]
    limited = ["setpriv", f"--bounding-set=-all,{capabilities}", "--inh-caps=-all", *command]
    return [*wrap, str(cgroup2_mount()), *limited]


def test_default_capabilities_are_refused_with_77_and_what_is_missing(node: Host) -> None:
    done = node.run(container(_DEFAULT, _READ_ONLY, sys.executable, str(HOLDER)), timeout=30)
    assert done.returncode == 77, done
    assert "CAP_NET_ADMIN" in done.stdout and "--unprotected" in done.stdout


def test_net_admin_alone_gives_scope_ports(network: Network, node: Host) -> None:
    holder = _held(
        node, container(f"{_DEFAULT},+net_admin", _READ_ONLY, sys.executable, str(HOLDER), "--listen", "7001")
    )
    assert holder.start["guarding"] == ["iptables"]
    assert "no shield" in " ".join(holder.start["notes"])
    target = (node.ipv4, 7001)
    assert eventually(lambda: not reach(network["stranger"], [target])[target], seconds=2)
    holder.let_go()


def test_net_admin_and_bpf_with_a_writable_cgroup_give_the_shield(network: Network, node: Host) -> None:
    command = container(f"{_DEFAULT},+net_admin,+bpf", _WRITABLE, sys.executable, str(HOLDER), "--listen", "7001")
    holder = _held(node, command)
    assert holder.start["guarding"] == ["shield", "iptables"], holder.start
    target = (node.ipv4, 7001)
    assert reach(network["stranger"], [target]) == {target: False}
    assert reach(node, [target]) == {target: True}
    holder.let_go()


def _held(node: Host, command: list[str]) -> Held:
    return Held(node.popen(command, stdin=subprocess.PIPE))
