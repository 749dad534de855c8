"""The report of a launch: what protected it, who was turned away and how it ended, as evidence for an audit.

What is heard while the job runs is kept with its time; at the end it becomes one document, and that one file, written
whole or not at all. Loaded only where --report asks for one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from securerun.console import say
from securerun.errors import UsageError
from securerun.evidence import documents, report_html
from securerun.firewall.policy import Policy
from securerun.guard.documents import denial_document, layer_document
from securerun.guard.protocol import Guarding, Notice, Released
from securerun.host.account import name_of
from securerun.linux import packages
from securerun.protection import denials, words
from securerun.protection.events import Checked, Finished, Gone, Installed, News, Renewed
from securerun.protection.plan import Plan
from securerun.text import count

Kind = TypeVar("Kind")

FORMAT = 1
_MODE = 0o640
_HTML = {".html", ".htm"}
_INTERRUPTED = 130
# Notices that a report keeps: a flood of strangers tells again and again for days.
_MOST_HEARD = 2_000
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass
class Journal:
    """What is heard of one launch, in its order. began: when the launcher started, in seconds since the epoch.

    `hear` is called by the launcher and, while the job runs, by the thread that listens to the guard.
    """

    command: Sequence[str]
    began: float
    heard: list[tuple[float, News]] = field(default_factory=list)
    unheard: int = 0

    def hear(self, news: News) -> None:
        """Take note of something, now."""
        if isinstance(news, Notice) and len(self.heard) >= _MOST_HEARD:
            self.unheard += 1
        else:
            self.heard.append((time.time(), news))


@dataclass(frozen=True)
class Ending:
    """How a launch ended. status: its exit status. reason: why, where it did not end well."""

    at: float
    status: int
    reason: str = ""


@contextlib.contextmanager
def kept(name: str, source: str, command: Sequence[str], began: float) -> Iterator[Journal]:
    """Keep a journal of the block, and write the report when the block is over, however it ends.

    Raises UsageError, before the block, for a report that could not be written.
    """
    place = _Place(name, source)
    journal = Journal(command, began)
    failure: BaseException | None = None
    try:
        yield journal
    except BaseException as error:
        failure = error
        raise
    finally:
        document = of_journal(journal, _ending(failure))
        del failure  # its frames hold what the job listens on
        try:
            place.write(report_html.render(document) if place.is_html else _as_json(document))
        except OSError as error:
            say(f"{source}: the report cannot be written to {name} ({error.strerror}); the job is not affected")
        place.close()


def of_journal(journal: Journal, ending: Ending) -> dict[str, Any]:
    """Return the report as JSON's own types. Every field is always there; what is not known is null.

    `launch` is null for a launch that was refused before it was understood; `guard` for one that never had a guard;
    `denied` where no guard could say who was turned away. `timeline` is in order of time.
    """
    plan = _last(journal, Plan)
    installed = _last(journal, Installed)
    released = _last(journal, Released)
    finished = _last(journal, Finished)
    checked = _last(journal, Checked)
    guarding = installed.guarding if installed else None
    if plan and guarding:
        plan = plan.without(guarding.left_out)
    return {
        "format": FORMAT,
        "securerun": packages.version("securerun"),
        "torch": packages.version("torch"),
        "host": socket.gethostname(),
        "user": name_of(os.geteuid()),
        "command_line": list(journal.command),
        "began": _time(journal.began),
        "ended": _time(ending.at),
        "seconds": round(ending.at - journal.began, 3),
        "status": ending.status,
        "outcome": _outcome(ending, started=finished is not None),
        "reason": ending.reason,
        "protected": guarding is not None,
        "run_id": plan.policy.run_id if plan else None,
        "launch": documents.of_plan(plan) if plan else None,
        "guard": installed.way if installed and not installed.guarding.is_apart else None,
        "layers": [layer_document(layer) for layer in guarding.layers] if guarding else [],
        "notes": list(guarding.notes) if guarding else [],
        "key": _key(plan, guarding),
        "nodes": _nodes(plan, guarding, released),
        "denied": [denial_document(denial) for denial in released.denied] if released else None,
        "preflight": [finding.document() for finding in checked.preflight] if checked else [],
        "permissions": [finding.document() for finding in checked.permissions] if checked else [],
        "timeline": list(_timeline(journal, ending)),
    }


def _key(plan: Plan | None, guarding: Guarding | None) -> dict[str, Any] | None:
    if plan is None or guarding is None or not guarding.fingerprint:
        return None
    source = guarding.key_source or plan.key.source
    return {"fingerprint": guarding.fingerprint, "source": source, "required": plan.key.is_required}


def _nodes(plan: Plan | None, guarding: Guarding | None, released: Released | None) -> dict[str, Any] | None:
    """How many nodes were seen to have the job's key, and the addresses that answered without; null without a key."""
    if plan is None or guarding is None or not guarding.fingerprint or released is None:
        return None
    return {
        "guarded": released.nodes_guarded,
        "of": plan.nodes or None,
        "unguarded": list(released.unguarded),
    }


def _timeline(journal: Journal, ending: Ending) -> Iterator[dict[str, Any]]:
    yield _event(journal.began, journal, "began", "securerun started")
    plan: Plan | None = None
    policy: Policy | None = None
    key: denials.KeyInForce | None = None
    for at, news in journal.heard:
        if isinstance(news, Plan):
            plan, policy = news, news.policy
        elif isinstance(news, Installed) and plan is not None:
            key = words.key_in_force(plan, news.guarding)
        elif isinstance(news, Renewed) and policy is not None:
            policy = replace(policy, peers=news.now.networks)
        for kind, text in _told(news, policy, key):
            yield _event(at, journal, kind, text)
    if journal.unheard:
        yield _event(ending.at, journal, "notice", f"{journal.unheard} more notices of the guard are not listed")
    reason = f": {ending.reason}" if ending.reason else ""
    yield _event(ending.at, journal, "ended", f"ended with status {ending.status}{reason}")


def _told(news: News, policy: Policy | None, key: denials.KeyInForce | None) -> Iterator[tuple[str, str]]:
    """Yield what there is to say of something heard: its kind and a line, or several. policy, key: of then."""
    if isinstance(news, Plan):
        yield "understood", f"launch understood: {news.job.nodes}; open to {words.open_to(news)}"
        yield from (("notice", line) for line in words.elsewhere(news.job))
    elif isinstance(news, Checked):
        yield "checked", f"checked: findings on this host: {len(news.preflight)}, on files: {len(news.permissions)}"
    elif isinstance(news, Installed):
        apart = news.guarding.is_apart
        yield "guarded", f"in a network of its own; {news.way}" if apart else f"guard started {news.way}"
        for layer in news.guarding.layers:
            yield "installed", f"closed by {layer}"
        yield from (("notice", note) for note in news.guarding.notes)
    elif isinstance(news, Notice):
        for denial in news.denied:
            yield "blocked", denials.with_rule(policy, denial, key) if policy else denials.blocked(denial)
        if news.more:
            yield "blocked", f"blocked {words.more_sources(news.more)} in a minute"
        yield from (("notice", line) for line in news.words)
    elif isinstance(news, Renewed):
        yield "renewed", words.renewed(news.before, news.now)
    elif isinstance(news, Finished):
        yield "finished", "the job failed; what it left is to be ended" if news.failed else "the job ended well"
    elif isinstance(news, Released):
        yield "released", f"lease given back; {_turned_away(news)}"
    elif isinstance(news, Gone):
        yield "released", "no guard answered at the end, so it is not known who was turned away"


def _turned_away(released: Released) -> str:
    if not released.denied:
        return "nobody was turned away"
    sources = len({denial.source for denial in released.denied})
    packets = sum(denial.packets for denial in released.denied)
    others = f", and {count(released.more, 'attempt')} of still others" if released.more else ""
    return f"turned away: {count(packets, 'attempt')} of {count(sources, 'host')}{others}"


def _event(at: float, journal: Journal, kind: str, text: str) -> dict[str, Any]:
    return {"at": _time(at), "seconds": round(at - journal.began, 3), "kind": kind, "text": text}


def _ending(failure: BaseException | None) -> Ending:
    """Return the exit status that a launch is about to have, and why."""
    now = time.time()
    if failure is None:
        return Ending(now, 0)
    if isinstance(failure, SystemExit):
        code = failure.code
        status = code if isinstance(code, int) else int(code is not None)
        return Ending(now, status, "" if status == 0 else f"exit with status {status}")
    if isinstance(failure, KeyboardInterrupt):
        return Ending(now, _INTERRUPTED, "interrupted")
    reason = _of_workers(failure) or str(failure).strip().partition("\n")[0] or type(failure).__name__
    # SecurerunError, and what `securerunctl exec` raises for a command that failed.
    status = getattr(failure, "status", 1)
    return Ending(now, status if isinstance(status, int) else 1, reason)


def _of_workers(failure: BaseException) -> str:
    """Return which worker failed first, where that is what torch's ChildFailedError says."""
    with contextlib.suppress(Exception):
        rank, first = failure.get_first_failure()  # type: ignore[attr-defined]
        return f"worker {rank} failed first, with exit code {first.exitcode}"
    return ""


def _outcome(ending: Ending, *, started: bool) -> str:
    if ending.status == 0:
        return "ended well"
    return "failed" if started else "refused"


def _last(journal: Journal, kind: type[Kind]) -> Kind | None:
    """Return the last thing of a kind that was heard."""
    found = [news for _, news in journal.heard if isinstance(news, kind)]
    return found[-1] if found else None


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def _as_json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


class _Place:
    """Where a report goes: a directory held open, so that nothing on the way can be put in its place meanwhile.

    Raises UsageError where nothing can be written, tried by writing.
    """

    def __init__(self, name: str, source: str) -> None:
        path = Path(name)
        self._name = path.name
        self._partial = f".{path.name[:200]}.{os.getpid()}.partial"
        self.is_html = path.suffix.lower() in _HTML
        try:
            self._directory = os.open(path.parent, _DIRECTORY_FLAGS)
        except (OSError, ValueError) as error:
            raise _unwritable(name, source, error) from error
        try:
            self._require_file(name, source)
            self._write_partial(b"")
            os.unlink(self._partial, dir_fd=self._directory)
        except (OSError, ValueError) as error:
            self.close()
            raise _unwritable(name, source, error) from error
        except UsageError:
            self.close()
            raise

    def write(self, text: str) -> None:
        """Write the report in place of any before it, whole or not at all. Raises OSError."""
        try:
            self._write_partial(text.encode("utf-8", "backslashreplace"))
            os.replace(self._partial, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:  # a second Ctrl-C, too
            with contextlib.suppress(OSError):
                os.unlink(self._partial, dir_fd=self._directory)
            raise

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._directory)

    def _require_file(self, name: str, source: str) -> None:
        if not self._name:
            raise UsageError(f"{source}: {name!r} names no file; write {source} run.json, or run.html")
        try:
            found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{source}: {name} is there and is no regular file; name another, such as run.json")

    def _write_partial(self, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._partial, flags, _MODE, dir_fd=self._directory)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _unwritable(name: str, source: str, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or str(error)
    return UsageError(f"{source}: {name} cannot be written ({reason}); name a file in a directory that you may write")
