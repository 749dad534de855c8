"""A job in a network of its own: the launcher's side. Nothing to install, and nobody with privilege to ask.

The kernel gives every user a network namespace, in which nothing of the host's is: no other process can connect to what
listens there, whatever the port, from this host or another. What leaves goes by a way out (`way_out`), which a keeper
outside starts and ends (`keeper`). It has to be begun before anything else is: by a process of one thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

from securerun.errors import PrivilegeError
from securerun.firewall.policy import NAMESPACE, Layer
from securerun.guard.protocol import RUN_ID_VARIABLE, Guarding, Notice, Order, Released
from securerun.guard.records import Record
from securerun.host import name_servers, proxies
from securerun.linux import capabilities, own_network, proc, seclusion, signals, user_namespaces
from securerun.linux.routes import Routes
from securerun.protection import bars, keeper, way_out, ways
from securerun.protection.bars import Bar
from securerun.protection.way_out import Origin
from securerun.text import some

if TYPE_CHECKING:
    from securerun.linux.networks import Address, Network
    from securerun.linux.own_network import Own
    from securerun.options import Options
    from securerun.protection.way_out import WayOut

Tell = Callable[[Notice], None]

_READY_SECONDS = 20.0
_LOOK_SECONDS = 0.005
_REAP_SECONDS = 5.0
# A host of containers has an interface for each of them.
_MOST_INTERFACES, _MOST_ADDRESSES = 64, 512
_LOOPBACK = "lo"
_NAMED = 4
_KEEPER_GONE = (
    "the keeper of this job's network was killed: there is no way out of it any more, and what the job leaves will not "
    "be ended; nobody can connect to it, as before"
)
# What shows the limit that the kernel refused something by (bash(1)).
_LIMITS = {errno.EFBIG: "-f", errno.EAGAIN: "-u", errno.EMFILE: "-n", errno.ENOMEM: "-v"}


@dataclass(frozen=True)
class Understood:
    """What of this host the job is to find in its own network.

    way: None for a job without a way out, and `without` says why. origin: where the way out gets its addresses; none
    where the default route tells. stand_ins: interfaces that lead nowhere there, with their addresses. here: all
    addresses of this host. unwanted: IP versions whose default route, which the way out brings, leads to nothing here.
    forwarded: ports of this host's loopback that proxies have. unforwarded: proxies that the job cannot reach.
    name_servers: what resolv.conf is to say; "" where it may stay.
    """

    way: WayOut | None
    without: str
    origin: Origin | None
    stand_ins: dict[str, list[Address]]
    here: list[Address]
    unwanted: tuple[int, ...]
    forwarded: tuple[proxies.Proxy, ...]
    unforwarded: tuple[proxies.Proxy, ...]
    name_servers: str


class Barred(PrivilegeError):
    """A network of its own was refused to this process; bar says why."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        super().__init__(f"this job cannot have a network of its own: {bar}")


class Apart:
    """This process in a network of its own, with all that it starts. Speaks as a guard does (`client.Guard`).

    by_name: whether the user asked for it, or nothing else could be had. has_parted: this process never leaves it.
    """

    has_parted = False

    def __init__(self, *, by_name: bool) -> None:
        self.by_name = by_name
        self._understood = _understood()
        ours, theirs = socket.socketpair()
        self._connection = _beside_standard(ours)
        self._lines = keeper.Lines(self._connection)
        self._released = False
        self._lacking: tuple[str, ...] = ()
        self._stands: socket.socket | None = None
        with theirs:
            self._process = _start_keeper(theirs)
        seclusion.let_go_in_children(self._hang_up)
        try:
            self._enter()
        except BaseException:
            self._hang_up()
            raise

    @property
    def way(self) -> str:
        """By what the job gets out, in words."""
        found = self._understood.way
        return f"out by {found.name}" if found else "without a way out"

    def guard(self, order: Order, tell: Tell) -> Guarding:
        """Have the run known, once the way out is there; `tell` gets the news while it runs.

        From then on the environment names the run. Raises PrivilegeError where the way out cannot be had.
        """
        self.wait_for_way()
        run_id = order.policy.run_id
        guarding = Guarding((Layer(NAMESPACE, self.way),), tuple(_notes(self._understood, self._lacking)))
        self._stand(run_id)
        self._say("record", {"record": self._record(order, guarding).document(), "grace": order.grace})
        os.environ[RUN_ID_VARIABLE] = run_id
        signals.start_deaf_thread(lambda: self._listen(tell), "securerun")
        return guarding

    def change_peers(self, networks: tuple[Network, ...]) -> None:
        """Take note that a job of one node has no peers whose addresses could change."""

    def release(self, failed: bool) -> Released:
        """Say that the job is over; nobody can have been turned away, where nobody can come."""
        self._released = True
        self._say("release", {"failed": failed})
        return Released(())

    def require_kept(self) -> None:
        """Return at once: what closes this network needs nobody to keep it."""

    def _enter(self) -> None:
        found, outside = self._understood, proc.namespace("net")
        try:
            user_namespaces.begin(mounts=bool(found.name_servers))
            self._lacking = own_network.bring_up(found.stand_ins, found.here)
            if found.name_servers:
                _have_name_servers(found.name_servers)
            capabilities.give_up_all()
        except OSError as error:
            barred = Barred(bars.told_by(error))
            if proc.namespace("net") != outside:
                # Half in there, this process is good for nothing: not for a guard either.
                raise PrivilegeError(f"{barred}; nothing was started") from error
            raise barred from error
        # Seen, and not taken for granted: all that is promised hangs on these two.
        if proc.namespace("net") == outside or capabilities.effective():
            raise PrivilegeError(
                "the kernel left this process in its network, or with capabilities; use another kernel"
            )
        # What was there before the way out is: any other interface with a route is its own.
        self._before = frozenset(number for number, _ in socket.if_nameindex())
        ports = sorted({proxy.port for proxy in found.forwarded})  # one may go by several names
        command = found.way.command(found.origin, ports) if found.way else None
        self._say("begin", {"command": command, "unwanted_routes": found.unwanted})

    def wait_for_way(self) -> None:
        """Return when the job's network has all that it will have. Raises PrivilegeError where that cannot be."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_SECONDS)  # the first process has made way for the keeper, no child of ours
        found, deadline = self._understood, time.monotonic() + _READY_SECONDS
        while found.way is not None and not Routes().devices - self._before:
            self._connection.settimeout(_LOOK_SECONDS)
            for kind, body in self._lines.read():
                if kind == "gone":
                    raise PrivilegeError(_no_way_out(found.way, body["words"]))
            if self._lines.closed:
                raise PrivilegeError(
                    "the keeper of this job's network has ended; nothing was started; try again, and where it does so "
                    "again look at how many processes this user may have: ulimit -u"
                )
            if time.monotonic() > deadline:
                raise PrivilegeError(_no_way_out(found.way, f"nothing came of it in {_READY_SECONDS:.0f} s"))
        self._connection.settimeout(None)

    def _stand(self, run_id: str) -> None:
        """Stand where launchers inside find that they are in this run: nobody outside can have this place."""
        self._stands = _beside_standard(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self._stands.bind(keeper.place_of(run_id))
        self._stands.listen()

    def _record(self, order: Order, guarding: Guarding) -> Record:
        return Record(
            policy=order.policy,
            layers=guarding.layers,
            launcher=os.getpid(),
            launcher_start=proc.start_time(os.getpid()),
            guard=0,  # the keeper, which fills itself in
            guard_start=0,
            boot_id=proc.boot_id(),
            network=proc.namespace("net"),
            processes=proc.namespace("pid"),
            times=proc.time_namespace(),
            user=os.getuid(),
            started=time.time(),
            command=order.command,
        )

    def _listen(self, tell: Tell) -> None:
        while not self._lines.closed:
            self._wait()
            for kind, body in self._lines.read():
                if kind == "gone" and self._understood.way is not None:
                    tell(Notice(words=(_gone(self._understood.way, **body),)))
        if not self._released:
            tell(Notice(words=(_KEEPER_GONE,)))

    def _wait(self) -> None:
        """Wait for the keeper's next word; who looks for this run meanwhile has seen enough when it has connected."""
        poller = select.poll()
        for end in (self._connection, self._stands):
            if end is not None:
                poller.register(end, select.POLLIN)
        while self._stands is not None:
            ready = {descriptor for descriptor, _ in poller.poll()}
            if self._stands.fileno() in ready:
                self._let_see(self._stands)
            if self._connection.fileno() in ready:
                return

    def _let_see(self, stands: socket.socket) -> None:
        try:
            stands.accept()[0].close()
        except OSError:  # without a descriptor for a moment: they wait
            time.sleep(_LOOK_SECONDS)

    def _say(self, kind: str, body: object) -> None:
        with contextlib.suppress(OSError):  # nobody is there any more: `_listen` says so
            self._connection.sendall(keeper.encode(kind, body))

    def _hang_up(self) -> None:
        self._connection.close()
        if self._stands is not None:
            self._stands.close()


def _have_name_servers(text: str) -> None:
    from securerun.linux import own_mounts  # where one of them is on this host

    try:
        own_mounts.put_in_place(name_servers.FILE, text)
    except OSError as error:
        raise PrivilegeError(
            f"this job needs a {name_servers.FILE} of its own, since it names a server on this host, and cannot have "
            f"it: {error.strerror} ({_what_helps(error)}); nothing was started"
        ) from error


def _what_helps(error: OSError) -> str:
    """Return the command that helps where a limit of this process is in the way."""
    option = _LIMITS.get(error.errno or 0)
    return f"ulimit {option}, and start it again with more" if option else "securerunctl doctor"


def bar() -> Bar | None:
    """Return why a job is not to be put into a network of its own by itself; None if it is to be."""
    barred = bars.known()
    if barred is not None:
        return barred
    without = way_out.bar()
    return without if without is not None and _leads_anywhere() else None


def _leads_anywhere() -> bool:
    """Return whether this host has any network itself that a job could miss. What cannot be told is believed to be."""
    try:
        return not _is_alone(own_network.addresses(), Routes())
    except OSError:
        return True


def _is_alone(own: dict[str, list[Own]], routes: Routes) -> bool:
    return own.keys() <= {_LOOPBACK} and not any(routes.devices_of_default(version) for version in (4, 6))


def insists(asked: Options) -> str:
    """Return the option that asks for what a network of its own cannot give; "" where there is none."""
    if asked.peers_source == "--peers" and asked.peers not in (None, "localhost"):
        return "--peers"
    if asked.public is not None:
        return asked.public_source
    if asked.firewall not in {"auto", "off"}:
        return asked.origins.get("firewall", "--firewall")
    if asked.accept:
        return asked.origins.get("accept", "--accept")
    return ""


def _understood() -> Understood:
    """Look at this host, from outside. Raises PrivilegeError where it does not tell its addresses."""
    without = way_out.bar()
    try:
        own, routes = own_network.addresses(), Routes()
    except OSError as error:
        raise Barred(Bar(f"this host does not tell its addresses ({error.strerror})", "ip address")) from error
    if _is_alone(own, routes):
        without = Bar("this host has no address but its loopback's, and so no way out either", "ip address")
    way = None if without else way_out.find()
    text = name_servers.configured()
    here = [one.address for addresses in own.values() for one in addresses][:_MOST_ADDRESSES]
    servers = name_servers.forwarded(text, way.name_server, here) if way and name_servers.are_here(text, here) else ""
    copied, origin, unwanted = _copied(own, routes) if way and way.copies_addresses else ("", None, ())
    others = [name for name in own if name not in {copied, _LOOPBACK}][:_MOST_INTERFACES]
    named = proxies.named(os.environ)
    forwarded = tuple(one for one in named if way is not None and way.forwards_ports and one.on_loopback)
    return Understood(
        way=way,
        without=str(without or ""),
        origin=origin,
        stand_ins={name: [one.address for one in own[name]] for name in others},
        here=here,
        # But for a name server that the way out stands for, which is at an address beyond the default route.
        unwanted=() if servers else unwanted,
        forwarded=forwarded,
        unforwarded=tuple(
            one for one in named if one not in forwarded and (_is_here(one.host, here) or _is_here(one.address, here))
        ),
        name_servers=servers,
    )


def _copied(own: dict[str, list[Own]], routes: Routes) -> tuple[str, Origin | None, tuple[int, ...]]:
    """Return the interface whose addresses the job gets by the way out, and what that has to be told of it.

    pasta takes that of the default route, and of no interface an IP version that has no gateway there. So where there
    is none, it is told one: any other address of the same network does, since it answers for all of them. A host
    that reaches nothing beyond this network asks nobody in vain, and nor is the job to: the third is whose default
    route is unwanted. Where it does reach more, by another interface, address or route, that one leads there.
    """
    names = dict(socket.if_nameindex())
    gateways = {version: {names.get(one, "") for one in routes.devices_to_gateways(version)} for version in (4, 6)}
    by_default = [name for name in own if name in gateways[4]] or [name for name in own if name in gateways[6]]
    copied = next(iter(by_default), "") or next((name for name in own if name != _LOOPBACK), "")
    if not copied:
        return "", None, ()
    lacking = {one.address.version for one in own[copied]} - {one for one in gateways if copied in gateways[one]}
    main = _main(own[copied])
    near = [main[version].network for version in lacking]
    unwanted = tuple(version for version in sorted(lacking) if not routes.lead_beyond(near, version))
    several = sum(one.address.version == 4 for one in own[copied]) > 1
    if not lacking and len(by_default) == 1 and not several:
        return copied, None, ()
    made_up = {version: _another(main[version], own[copied]) for version in sorted(lacking)}
    gateways_to_name = tuple(one for one in made_up.values() if one is not None)
    return copied, Origin(copied, gateways_to_name, main[4] if several else None), unwanted


def _main(own: list[Own]) -> dict[int, Own]:
    """Return the address of each IP version by which the job is to leave: as the host does, or else the first."""
    source = own_network.source()
    by_preference = sorted(own, key=lambda one: one.address != source)
    return {one.address.version: one for one in reversed(by_preference)}


def _another(main: Own, own: Sequence[Own]) -> Address | None:
    """Return an address of the same network that is not this host's."""
    ours = {one.address for one in own}
    return next((address for address in main.network.hosts() if address not in ours), None)


def _beside_standard(end: socket.socket) -> socket.socket:
    return socket.socket(fileno=ways.beside_standard(end.detach()))


def _is_here(host: str, own: Sequence[Address]) -> bool:
    names = {"localhost", socket.gethostname().lower()}
    return host.lower() in names or host.startswith("127.") or host in {"::1", *map(str, own)}


def _start_keeper(connection: socket.socket) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    try:
        return subprocess.Popen(  # noqa: S603 - this interpreter, arguments of ours
            keeper.command(os.getpid()),
            stdin=connection.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise Barred(Bar(f"its keeper cannot be started ({error.strerror})", _what_helps(error))) from error


def _notes(found: Understood, lacking: Sequence[str]) -> Iterator[str]:
    """Yield what is different in there, where it matters to this job."""
    if found.way is None:
        yield f"this job has no way out of its network: {found.without}"
    if lacking:
        yield f"in there is no {some(lacking, _NAMED)}, since this kernel can make none; the loopback has its addresses"
    for proxy in found.forwarded:
        yield f"{proxy.host}:{proxy.port}, which {proxy.variable} names, leads to that port of this host's loopback"
    for proxy in found.unforwarded:
        yield (
            f"{proxy.variable}: {proxy.host}:{proxy.port} is on this host, which cannot be reached from in there; have "
            "the proxy listen on another host, or forward it to this host's localhost, with pasta installed"
        )


def _no_way_out(way: WayOut, words: str) -> str:
    return (
        f"this job's network has no way out, so nothing was started: {way.name} says {words!r}; have a guard "
        "in place of such a network: securerunctl doctor says what gives one"
    )


def _gone(way: WayOut, words: str, again: bool) -> str:
    now = (
        "another was started, and connections through it have to be opened anew" if again else "the job has no way out"
    )
    return f"{way.name} has ended ({words}); {now}; nobody can connect to the job, as before"
