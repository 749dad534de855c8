"""securerun's own words: the plan of a launch, the lines at its start and at its end. Renders, and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from securerun.firewall.policy import Denial, Policy, opened
from securerun.linux.networks import Network, is_address, listed
from securerun.protection import denials
from securerun.protection.ways import DIRECTLY, OF_NAMESPACE, OUTSIDE
from securerun.text import nodes_guarded, printable, some

if TYPE_CHECKING:  # every launch has something to say, and few have a plan to print
    from securerun.guard.protocol import Guarding, Notice, Released
    from securerun.job.job import Job
    from securerun.job.peers import Peers
    from securerun.protection.plan import Plan

_NETWORKS_NAMED = 4
_SCOPES = {
    "auto": "the shield on every socket of the job; where it cannot be had, each port as it appears",
    "process": "the shield on every socket of the job, whatever its port",
    "namespace": "a network of its own, for a job of one node; no guard",
    "ports": "no shield; each port of the job as it appears, by the port chains",
}


def start(plan: Plan, guarding: Guarding, way: str) -> Iterator[str]:
    """Yield what is closed, by what, and to whom it is open. way: how the guard came by its privilege.

    Of several tasks of a node only the first says so, and those that are less well guarded than by a shield.
    """
    if not plan.task.is_first and guarding.has_shield:
        return
    run = f"run {plan.policy.run_id}: "
    if guarding.is_apart:
        nobody = "nobody can connect, from another host or from this one"
        yield f"{run}in a network of its own; {way}; {nobody}; umask {plan.umask:04o}"
        yield from (f"{run}{line}" for line in (*elsewhere(plan.job), *guarding.notes))
        return
    yield f"{run}open to {open_to(plan)}; umask {plan.umask:04o}; guard started {way}"
    if guarding.fingerprint:
        yield f"{run}{known_by(plan, guarding)}"
    public = plan.policy.public
    if public:
        yield f"{run}public as far as this host's own rules let it be: port {opened(public)}"
    for layer in guarding.layers:
        planned = f"TCP ports {_ports(plan.policy)}" if plan.policy.ports else "every port that is found open"
        what = _shielded(plan) if layer.is_shield else planned
        yield f"{run}{what} closed to all others by {layer}"
    if not guarding.has_shield:
        yield f"{run}scope ports: every other port of this job is closed within 0.2 s of its appearing"
    if plan.task.is_first and plan.task.has_siblings:
        yield f"{run}{siblings(plan)}"
    for line in elsewhere(plan.job):
        yield f"{run}{line}"
    for note in (*_in_silence(plan, guarding), *guarding.notes):
        yield f"{run}{note}"


def known_by(plan: Plan, guarding: Guarding) -> str:
    """Return the key that the nodes know each other by, for people who compare theirs, and what it is for."""
    if plan.goes_by_key:
        what = "whoever opens a connection has to prove that they have it"
    elif plan.key.is_required:
        what = "of the peers, those may connect who prove that they have it"
    else:
        what = "who proves to have it may connect as well"
    source = guarding.key_source or plan.key.source
    besides = f"it is for {plan.key.made_for}, which have to be the same there too"
    return f"key {guarding.fingerprint} of {source}, the same on all nodes: {what}; {besides}"


def key_in_force(plan: Plan, guarding: Guarding | None) -> denials.KeyInForce | None:
    """Return the key that nodes are told by; None where it is by addresses alone."""
    if guarding is None or not guarding.fingerprint:
        return None
    return denials.KeyInForce(guarding.fingerprint, plan.key.is_required)


def nodes(plan: Plan, released: Released | None) -> Iterator[str]:
    """Yield how many of the job's nodes were seen to have its key, and who came or answered without."""
    if released is None or not released.nodes_guarded:
        return
    run = f"run {plan.policy.run_id}: "
    yield f"{run}{nodes_guarded(released.nodes_guarded, plan.nodes)}"
    if released.unguarded:
        yield (
            f"{run}{some(released.unguarded, _NETWORKS_NAMED)} came or answered without the job's key; start securerun "
            "there too, with the same key, and see that nothing between the nodes translates addresses or takes TCP "
            "option 254 away"
        )


def _in_silence(plan: Plan, guarding: Guarding) -> Iterator[str]:
    """Yield that nobody answers the IP version which no peer has, where the endpoint's name may have addresses of it.

    Peers that are named by name have all addresses of their names; where there are port chains they answer.
    """
    version, endpoint = plan.policy.answered_version, plan.job.endpoint
    if version is None or endpoint is None or plan.peers.named or not all(one.is_shield for one in guarding.layers):
        return
    if not is_address(endpoint.host) and not endpoint.is_loopback:
        yield (
            f"no peer has an IPv{version} address, and without port chains nobody answers that: if {endpoint.host} has "
            "one, a node that tries it first waits for its time-out; name the peers by name, or by addresses of both"
        )


def siblings(plan: Plan) -> str:
    """Return what becomes of the other tasks of a node, which take leases of their own."""
    number = f"{plan.task.of} tasks" if plan.task.of else "several tasks"
    if plan.policy.close_loopback:
        return (
            f"one of {number} of this node, each with a lease of its own, and --loopback job keeps them from each "
            "other; leave it out, or start one task a node: securerun in place of torchrun"
        )
    return f"one of {number} of this node, each with a lease of its own; the others say only what goes wrong"


def elsewhere(job: Job) -> Iterator[str]:
    """Yield what the command has others start, which is not guarded, and what to write instead."""
    for one in job.elsewhere:
        yield f"what {one} starts is not guarded: {one.client.how}; write {one.client.instead}"


def end(
    at_start: Policy,
    now: Policy,
    denied: Sequence[Denial] | None,
    more: int = 0,
    key: denials.KeyInForce | None = None,
) -> Iterator[str]:
    """Who was turned away, how often, and what to do if it should not have been.

    at_start, now: the policy with the peers of either. more: attempts of others than those in `denied`, of whom there
    were too many.
    """
    run = f"run {now.run_id}: "
    if denied is None:
        yield f"{run}the guard was gone at the end, so it is not known who was turned away"
    elif not denied:
        yield f"{run}nobody was turned away"
    else:
        yield from (f"{run}{line}" for line in denials.summary(at_start, now, denied, more, key))


def news(policy: Policy, notice: Notice, key: denials.KeyInForce | None = None) -> Iterator[str]:
    """Yield what happens while the job runs. policy: with the peers of now."""
    yield from (denials.explained(policy, denial, key) for denial in notice.denied)
    if notice.more:
        yield f"blocked {more_sources(notice.more)} in the last minute"
    yield from notice.words


def renewed(before: Peers, now: Peers) -> str:
    """Which addresses of the peers came and went while the job runs."""
    gone = listed(sorted(set(before.listed) - set(now.listed), key=_in_order))
    come = listed(sorted(set(now.listed) - set(before.listed), key=_in_order))
    changes = (f"{gone} may no longer connect" if gone else "", f"{come} may connect now" if come else "")
    what = (
        f"{now.source} has other hosts"
        if now.files != before.files
        else f"the names of {now.source} have other addresses"
    )
    return f"{what}: {'; '.join(filter(None, changes))}"


def whole(plan: Plan, origin: str, otherwise: str = "") -> str:
    """Return the whole plan for a person: what would listen, who may connect, and the text of each layer.

    origin: where the guard would come from. otherwise: what becomes of a job that has none, where it is not refused.
    """
    sections = [*_summary(plan, origin)]
    if otherwise:
        sections.append(_row("", f"without one, {otherwise}"))
    if plan.options.firewall == "nftables":
        sections += ["", nftables_rules(plan.policy_by_key).rstrip()]
    elif plan.options.firewall != "off":
        sections += ["", iptables_rules(plan.policy_by_key).rstrip()]
    if plan.options.scope not in {"ports", "namespace"}:
        from securerun.firewall import description

        sections += ["", "# shield", description.describe(plan.policy_by_key).rstrip()]
    return "\n".join(sections) + "\n"


def iptables_rules(policy: Policy) -> str:
    """Return what iptables-restore and ip6tables-restore are given, on a host where no run has installed anything yet.

    Before it, in ipset's language, the sets that it names, where there are many peers or ports.
    """
    from securerun.firewall import dispatcher, ipset, run_sets

    nothing = dispatcher.Dispatcher(exists=False, rules=(), jumps=(), jumped_to_first=False)
    texts = []
    if run_sets.has_set_of_ports(policy):
        texts.append(f"# ipset restore\n{ipset.render(run_sets.ports_name(policy.run_id), policy.joined_ports())}")
    for version, command in ((4, "iptables-restore"), (6, "ip6tables-restore")):
        if run_sets.has_set(policy, version):
            peers = ipset.render(run_sets.set_name(policy.run_id, version), policy.peers_of(version))
            texts.append(f"# ipset restore\n{peers}")
        rules = dispatcher.render_install(policy, version, nothing)
        texts.append(f"# {command} --noflush   (the first run on a host)\n{rules}")
    return "\n".join(texts)


def nftables_rules(policy: Policy) -> str:
    """Return what libnftables is given. `nft -f` would take it, and own the table only until it ends."""
    from securerun.firewall import nftables

    return f"# nft -f\n{nftables.render(policy, None)}"


def about(plan: Plan) -> list[str]:
    """Return what a plan is for, a line each: the head of a script."""
    lines = [
        _row("command", " ".join(plan.job.command)),
        *_elsewhere_rows(plan.job),
        *_port_rows(plan.policy),
        _row("open to", open_to(plan)),
    ]
    return [printable(line) for line in lines]


def origin(obstacles: Mapping[str, str], *, may_leave: bool) -> str:
    """Where the guard of a launch comes from. obstacles: why each way cannot be tried, "" if it can."""
    way = next((way for way, obstacle in obstacles.items() if not obstacle), None)
    if way is None:
        outside = f"; start it outside: {OUTSIDE}" if obstacles.get(DIRECTLY) == OF_NAMESPACE else ""
        return f"none is available: {'; '.join(obstacles.values())}{outside}"
    if way != DIRECTLY:
        return f"started {way}, if that permits it to you"
    return "started directly" + (
        "" if may_leave else "; it cannot leave this cgroup: a batch system ends it with the job"
    )


def relying(run_id: str, without_effect: Sequence[str]) -> str:
    """Return what a launcher says that finds itself inside of a run."""
    if not without_effect:
        return f"run {run_id} guards this process already, so no second lease is taken"
    has = "has" if len(without_effect) == 1 else "have"
    return (
        f"run {run_id} guards this process already, so no second lease is taken, and {_listed(without_effect)} {has} "
        "no effect here; give what that run is to have where it is started"
    )


def left(run_id: str, processes: int, *, failed: bool) -> str:
    """Return what becomes of the processes that a command left running."""
    number = "1 process" if processes == 1 else f"{processes} processes"
    fate = "to be ended, since it failed" if failed else "guarded until the last of them ends"
    return f"run {run_id}: the command left {number} running, {fate}"


def unprotected() -> str:
    """Return the warning of a run that nothing protects."""
    return "--unprotected: every TCP port of this job is open to every host; the umask is all that was set"


def _summary(plan: Plan, origin: str) -> Iterator[str]:
    job, policy, options = plan.job, plan.policy, plan.options
    meeting = f"{job.backend} at {job.endpoint}" if job.endpoint else job.backend
    rank = f"; this is node {job.node_rank}" if job.max_nodes else ""
    yield _row("rendezvous", f"{meeting}; {job.nodes}{rank}")
    yield _row("command", " ".join(job.command))
    yield from _elsewhere_rows(job)
    yield from _port_rows(policy)
    closed = "closed when they appear" if options.scope == "ports" else "closed by the shield"
    yield _row("" if policy.ports else "ports", f"{'any other':<12} chosen at random by gloo, NCCL or torch: {closed}")
    if policy.public:
        yield _row("public", f"port {opened(policy.public)}")
    label = "peers"
    for network in policy.peers:
        yield _row(label, str(network))
        label = ""
    if plan.goes_by_key:
        yield _row(label, plan.peers.source)
    elif not policy.peers:
        yield _row(label, "none: no other host may connect")
    if not plan.goes_by_key:
        yield _row("", f"named by {plan.peers.source}")
    yield _row("key", _key(plan))
    yield _row("interfaces", str(plan.entrance))
    yield _row("umask", f"{plan.umask:04o}")
    yield _row("scope", f"{options.scope}: {_SCOPES[options.scope]}")
    yield _row("loopback", "only the job's own processes" if policy.close_loopback else "any process of this host")
    chains = (
        "none (--firewall off)" if options.firewall == "off" else f"{options.firewall}; peers get {_target(policy)}"
    )
    yield _row("port chains", chains)
    yield _row("guard", origin)


def _key(plan: Plan) -> str:
    key = plan.key
    if key.order is None:
        return "none: who may connect is told by addresses"
    if not key.fingerprint:
        return "one that the guard has to find: the site's, or Slurm's in a job of Slurm's"
    return f"{key.fingerprint}, of {key.source}, for {key.made_for}"


def _elsewhere_rows(job: Job) -> Iterator[str]:
    for number, line in enumerate(elsewhere(job)):
        yield _row("" if number else "not guarded", line)


def _port_rows(policy: Policy) -> Iterator[str]:
    for number, port in enumerate(policy.ports):
        yield _row("" if number else "ports", f"{port!s:<12} {port.purpose}")


def more_sources(number: int) -> str:
    """How many sources were turned away that are not named."""
    return f"{number:,} more {'source' if number == 1 else 'sources'}"


def _shielded(plan: Plan) -> str:
    """Return what the shield closes: all that is of the job, unless some of it is started by others."""
    every = "every other TCP port" if plan.policy.public else "every TCP port"
    return f"{every} of the command's own processes" if plan.job.elsewhere else f"{every} of this job"


def _row(label: str, text: str) -> str:
    return f"{label:<12} {text}".rstrip()


def _target(policy: Policy) -> str:
    return "ACCEPT" if policy.accept else "RETURN, to the host's own rules"


def open_to(plan: Plan) -> str:
    """Who may connect, the first few of many, who said so, and through what."""
    through = f" through {plan.entrance}" if plan.entrance.names else ""
    if plan.goes_by_key:
        return f"{plan.peers.source}{through}"
    if not plan.policy.peers:
        return f"no other host ({plan.peers.source})"
    return f"{listed(plan.policy.peers)} ({plan.peers.source}){through}"


def _in_order(network: Network) -> tuple[int, int]:
    return network.version, int(network.network_address)


def _ports(policy: Policy) -> str:
    return _listed(str(port) for port in policy.ports)


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)
