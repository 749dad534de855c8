"""The proof that tags work, at each launch: on a real cgroup, and where something keeps them from working."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import kernel
import pytest
from cgroups import in_child, inside, leave_for_a_new_network
from hosts import Network
from lacking import Lacking
from shield_field import INGRESS
from tag_field import TagField, shielded, tag_field

from securerun.errors import Obstacle
from securerun.firewall import selftest
from securerun.firewall.refusals import ShieldUnavailable
from securerun.firewall.tag_proof import require_tags
from securerun.linux.bpf import AttachType, attached

SOCK_OPS = AttachType.CGROUP_SOCK_OPS


@pytest.fixture
def field(network: Network) -> Iterator[TagField]:
    kernel.require(kernel.TAGS)
    with tag_field(network) as made:
        yield made


def programs_on(field: TagField) -> int:
    return sum(len(attached(field.job.descriptor, kind).program_ids) for kind in (INGRESS, SOCK_OPS))


def test_tags_are_proven_and_the_proof_leaves_nothing_there(field: TagField) -> None:
    with inside(field.host):
        require_tags(field.job.descriptor)
        assert programs_on(field) == 0
        assert not (field.job.path / "cgroup.procs").read_text()
        with shielded(field.job) as held:
            assert held.tags is not None


def test_a_host_without_ipv4_loopback_is_proven_over_ipv6(field: TagField) -> None:
    field.host.run(["ip", "address", "delete", "127.0.0.1/8", "dev", "lo"], check=True)
    with inside(field.host):
        require_tags(field.job.descriptor)


def test_loopback_that_delivers_late_is_proven(field: TagField) -> None:
    """As of a processor that is busy: the connection that is turned away had gone by then, and nobody was judged."""
    slow = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "8kbit", "burst", "300", "limit", "3000"]
    if field.host.run(slow).returncode:
        raise Lacking("this kernel has no queue that holds packets back (tc-tbf)")
    with inside(field.host):
        require_tags(field.job.descriptor)


def test_what_strips_the_option_is_no_proof(field: TagField) -> None:
    rule = (
        "table inet t { chain i { type filter hook output priority 0; tcp option 254 exists reset tcp option 254; }; }"
    )
    stripped = field.host.run(["nft", rule])
    if stripped.returncode:  # nft before 1.0.2, or a kernel before 5.18
        drop = "table inet t { chain i { type filter hook input priority 0; tcp option 254 exists drop; }; }"
        field.host.run(["nft", drop], check=True)
    with inside(field.host), pytest.raises(ShieldUnavailable, match="should carry a tag was not let in") as refused:
        require_tags(field.job.descriptor)
    assert refused.value.obstacle is Obstacle.NOT_PROVEN
    assert programs_on(field) == 0


def test_programs_that_do_not_run_are_no_proof(field: TagField, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where sockets count as another cgroup's."""
    # A processor that is busy lets it in later than it is looked at; then nobody has turned it away.
    no_proof = "carried no tag (was let in|did not arrive, and nobody turned it away)"
    started = selftest.started

    def elsewhere(_cgroup: int, *words: object) -> contextlib.AbstractContextManager[selftest.Sender]:
        return started(field.elsewhere.descriptor, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(selftest, "started", elsewhere)
    with inside(field.host), pytest.raises(ShieldUnavailable, match=no_proof):
        require_tags(field.job.descriptor)
    assert programs_on(field) == 0


def test_without_loopback_nothing_is_proven(field: TagField) -> None:
    def work() -> None:
        leave_for_a_new_network()
        with pytest.raises(ShieldUnavailable, match="ip link set lo up"):
            require_tags(field.job.descriptor)

    in_child(work)
    assert programs_on(field) == 0
