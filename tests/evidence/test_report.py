"""--report: the evidence of a launch, written whole or not at all, true for whatever the launch came to."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import jobs
import plans
import pytest
from checkout import COMMANDS
from hosts import Host, Network, eventually, machine_snapshot
from lacking import Lacking
from probe import reach
from users import PrivateMachine

from securerun.errors import PolicyError, UsageError
from securerun.evidence import report, report_html
from securerun.evidence.report import Ending, Journal
from securerun.finding import Finding
from securerun.firewall.policy import Denial, Layer
from securerun.guard.protocol import Guarding, Notice, Released
from securerun.job.peers import Peers
from securerun.protection.events import Checked, Finished, Gone, Installed, News, Renewed

EXEC = (str(COMMANDS / "securerunctl"), "exec")
ALONE = (*EXEC, "--peers", "localhost")
HOSTILE = "</code></td><script>window.owned=1</script><img src=x onerror='window.owned=1'>\"'&\x1b[2J\u202e\n"
GUARDING = Guarding((Layer("shield", "socket filter on /job"), Layer("iptables", "SECURERUN")), ("a note",))
STRANGER = ipaddress.ip_address("10.77.0.3")

FIELDS: dict[str, Any] = {
    "format": int,
    "securerun": (str, type(None)),
    "torch": (str, type(None)),
    "host": str,
    "user": str,
    "command_line": list,
    "began": str,
    "ended": str,
    "seconds": float,
    "status": int,
    "outcome": str,
    "reason": str,
    "protected": bool,
    "run_id": (str, type(None)),
    "launch": (dict, type(None)),
    "guard": (str, type(None)),
    "layers": list,
    "notes": list,
    "key": (dict, type(None)),
    "nodes": (dict, type(None)),
    "denied": (list, type(None)),
    "preflight": list,
    "permissions": list,
    "timeline": list,
}


OF_HOST = Finding("umask", "the shell's umask is 0022", "what tee writes can be read by everybody", "umask 0027")
OF_FILES = Finding("checkpoint", "/data/model.pt is 0666", "anybody can replace it", "chmod o-w")


def document(*heard: News, status: int = 0, reason: str = "") -> dict[str, Any]:
    """The report of a launch of ten seconds in which these things were heard, one a second."""
    journal = Journal(("securerun", "train.py"), 1000.0)
    journal.heard = [(1001.0 + second, news) for second, news in enumerate(heard)]
    made = report.of_journal(journal, Ending(1010.0, status, reason))
    check(made)
    return made


def check(made: dict[str, Any]) -> None:
    """The document has the fields of the schema and no others, each of its type, and its times are times."""
    assert made.keys() == FIELDS.keys()
    for name, kind in FIELDS.items():
        assert isinstance(made[name], kind), (name, made[name])
    assert made["outcome"] in ("ended well", "failed", "refused")
    for text in (made["began"], made["ended"], *(event["at"] for event in made["timeline"])):
        assert datetime.fromisoformat(text).tzinfo is not None
    for event in made["timeline"]:
        assert {name: type(value) for name, value in event.items()} == {
            "at": str,
            "seconds": float,
            "kind": str,
            "text": str,
        }
    assert [event["seconds"] for event in made["timeline"]] == sorted(event["seconds"] for event in made["timeline"])
    for finding in (*made["preflight"], *made["permissions"]):
        assert finding.keys() == {"name", "what", "why", "mend"}
    json.dumps(made)


def whole(**options: Any) -> tuple[News, ...]:  # noqa: ANN401 - whatever the option holds
    """What is heard in a launch that has everything."""
    denied = (Denial(STRANGER, 29500, 12), Denial(ipaddress.ip_address("fd77::3"), 0, 1))
    return (
        plans.plan(**options),
        Checked((OF_HOST,), (OF_FILES,)),
        Installed(GUARDING, "by sudo"),
        Notice(denied[:1], ("the guard died; another has taken over",)),
        Renewed(Peers((), "--peers"), Peers((), "--peers", fixed=(ipaddress.ip_network("10.77.0.9"),))),
        Finished(failed=False),
        Released(denied),
    )


def texts(made: dict[str, Any]) -> list[str]:
    return [event["text"] for event in made["timeline"]]


def test_a_run_has_all_that_happened_in_its_order() -> None:
    made = document(*whole())
    assert [event["kind"] for event in made["timeline"]] == [
        *("began", "understood", "checked", "guarded", "installed", "installed", "notice"),
        *("blocked", "notice", "renewed", "finished", "released", "ended"),
    ]
    assert "blocked 10.77.0.3 → 29500 (12 attempts)" in texts(made)
    assert "the names of --peers have other addresses: 10.77.0.9 may connect now" in texts(made)
    assert "lease given back; turned away: 13 attempts of 2 hosts" in texts(made)
    assert made["seconds"] == 10.0
    assert (made["outcome"], made["status"], made["protected"]) == ("ended well", 0, True)
    assert (made["run_id"], made["guard"]) == (plans.RUN, "by sudo")
    assert made["layers"][0] == {"backend": "shield", "name": "socket filter on /job"}
    assert made["denied"][0] == {"source": "10.77.0.3", "port": 29500, "packets": 12}
    assert made["launch"]["peers"]["source"] == "--peers"
    assert (made["preflight"][0]["mend"], made["permissions"][0]["name"]) == ("umask 0027", "checkpoint")


def test_a_run_with_a_key_has_its_fingerprint_and_how_many_nodes_were_seen() -> None:
    by_guard = replace(GUARDING, fingerprint="0123abcd", key_source="/etc/securerun/site.key")
    released = Released((), nodes_guarded=1, unguarded=("10.77.0.9",))
    made = document(plans.plan(), Installed(by_guard, "by sudo"), Finished(failed=False), released)
    assert made["key"] == {"fingerprint": "0123abcd", "source": "/etc/securerun/site.key", "required": False}
    assert (made["nodes"]["guarded"], made["nodes"]["unguarded"]) == (1, ["10.77.0.9"])
    page = report_html.render(made)
    assert "0123abcd of /etc/securerun/site.key" in page and "nodes guarded" in page


def test_what_is_not_known_is_null_and_not_nothing() -> None:
    gone = document(plans.plan(), Installed(GUARDING, "directly"), Finished(failed=True), Gone(), status=1)
    assert (gone["denied"], gone["outcome"]) == (None, "failed")
    assert "not known who was turned away" in " ".join(texts(gone))
    unprotected = document(plans.plan(unprotected=True), Finished(failed=False))
    assert (unprotected["protected"], unprotected["denied"], unprotected["guard"]) == (False, None, None)
    refused = document(status=78, reason="peer 'x' cannot be resolved")
    assert (refused["outcome"], refused["launch"], refused["run_id"]) == ("refused", None, None)
    assert texts(refused)[-1] == "ended with status 78: peer 'x' cannot be resolved"


class ChildFailedError(Exception):
    """torch's, as far as a report asks it."""

    def get_first_failure(self) -> tuple[int, Any]:
        class Failure:
            exitcode = 3

        return 1, Failure()


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (None, 0, ""),
        (SystemExit(None), 0, ""),
        (SystemExit(5), 5, "exit with status 5"),
        (SystemExit("words"), 1, "exit with status 1"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PolicyError("peers are missing"), 78, "peers are missing"),
        (ChildFailedError("\n=====\n"), 1, "worker 1 failed first, with exit code 3"),
        (ValueError("first\nsecond"), 1, "first"),
        (ValueError(), 1, "ValueError"),
    ],
)
def test_the_status_is_the_one_that_the_launcher_ends_with(
    tmp_path: Path, raised: BaseException | None, status: int, reason: str
) -> None:
    path = tmp_path / "run.json"
    try:
        with report.kept(str(path), "--report", ["securerun"], 0.0):
            if raised is not None:
                raise raised
    except BaseException as error:
        assert error is raised
    made = json.loads(path.read_text())
    assert (made["status"], made["reason"]) == (status, reason)


def test_a_flood_of_notices_does_not_fill_the_memory() -> None:
    journal = Journal((), 0.0)
    for _ in range(report._MOST_HEARD + 7):
        journal.hear(Notice(words=("again",)))
    journal.hear(Released(()))
    assert len(journal.heard) == report._MOST_HEARD + 1
    made = report.of_journal(journal, Ending(journal.heard[-1][0], 0))
    assert "7 more notices of the guard are not listed" in texts(made)
    assert made["denied"] == []


@pytest.mark.parametrize("umask", [0o027, 0o077, 0o022])
def test_the_file_is_readable_for_the_group_at_most(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with report.kept(str(tmp_path / "run.json"), "--report", [], 0.0):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run.json").stat().st_mode) == 0o640 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_earlier_report_is_replaced_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("earlier")
    with report.kept(str(tmp_path / "run.json"), "--report", [], 0.0):
        assert (tmp_path / "run.json").read_text() == "earlier"
    check(json.loads((tmp_path / "run.json").read_text()))
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / "link.json").symlink_to("victim")
    with (
        pytest.raises(UsageError, match="no regular file"),
        report.kept(str(tmp_path / "link.json"), "--report", [], 0.0),
    ):
        pass
    with report.kept(str(tmp_path / "late.json"), "--report", [], 0.0):
        (tmp_path / "late.json").symlink_to("victim")
    assert not (tmp_path / "late.json").is_symlink()
    assert (tmp_path / "victim").read_text() == "untouched"


def test_a_directory_that_is_swapped_meanwhile_gets_nothing(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with report.kept(str(tmp_path / "here/run.json"), "--report", [], 0.0):
        (tmp_path / "here").rename(tmp_path / "moved")
        (tmp_path / "here").mkdir()
    assert (tmp_path / "moved/run.json").exists()
    assert not (tmp_path / "here/run.json").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/run.json", "No such file"),
        ("file/run.json", "Not a directory"),
        ("directory", "no regular file"),
        ("fifo", "no regular file"),
        ("..", "is no regular file"),
        ("/", "names no file"),
        ("a\0b", "null byte"),
        ("/proc/run.json", "cannot be written"),
        (f"{'x' * 300}.json", "too long"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused_at_once(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    path = name if name.startswith("/") else f"{tmp_path}/{name}"
    with pytest.raises(UsageError) as refusal, report.kept(path, "SECURERUN_REPORT", [], 0.0):
        raise AssertionError("the block was entered")
    assert words in str(refusal.value)
    assert str(refusal.value).startswith("SECURERUN_REPORT: ")
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "fifo", "file"]


def test_a_report_that_cannot_be_written_at_the_end_changes_no_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    with report.kept(str(tmp_path / "gone/run.json"), "--report", [], 0.0):
        (tmp_path / "gone").rmdir()
    assert "the report cannot be written" in capsys.readouterr().err


# Ends as the command does, and names what was loaded for a report before that.
LOADED = """
import sys
from securerun.ctl import exec
try:
    exec.execute(sys.argv[1:])
finally:
    wanted = {"securerun.evidence.report", "securerun.evidence.report_html", "securerun.evidence.documents"}
    print(*wanted.intersection(sys.modules))
"""


@pytest.mark.parametrize(("options", "expected"), [((), 0), (("--report", "run.json"), 3)])
def test_what_makes_reports_is_loaded_only_for_one(
    node: Host, tmp_path: Path, options: tuple[str, ...], expected: int
) -> None:
    done = node.run([sys.executable, "-c", LOADED, "--unprotected", *options, "--", "true"], cwd=tmp_path)
    assert (done.returncode, len(done.stdout.split())) == (0, expected), done
    assert (tmp_path / "run.json").exists() == bool(options)


class Checker(HTMLParser):
    """Every element opened is closed in its turn; what is written down is what a browser would see."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def hostile(made: Any) -> Any:  # noqa: ANN401 - JSON's types
    """The same document with hostile text in the place of every text, but for what securerun itself chooses."""
    if isinstance(made, dict):
        kept = ("at", "began", "ended", "outcome", "kind", "mask")
        return {name: value if name in kept else hostile(value) for name, value in made.items()}
    if isinstance(made, list):
        return [hostile(value) for value in made]
    return HOSTILE if isinstance(made, str) else made


def parsed(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


@pytest.mark.parametrize(
    "make",
    [
        lambda: document(*whole()),
        lambda: document(status=78, reason="refused"),
        lambda: document(plans.plan(unprotected=True), Finished(failed=True), status=1),
        lambda: document(plans.plan(()), Installed(Guarding(()), "directly"), Finished(failed=False), Gone()),
    ],
)
def test_the_page_is_whole_and_asks_for_nothing_else(make: Callable[[], dict[str, Any]]) -> None:
    for made in (make(), hostile(make())):
        page = report_html.render(made)
        seen = parsed(page)
        assert not seen.seen & {"script", "link", "img", "iframe", "object", "base", "form", "a"}
        assert not {name for name, _ in seen.attributes} & {"src", "href", "srcset", "onerror", "onclick"}
        assert "url(" not in page
        assert "@import" not in page
        assert "default-src 'none'" in page
        assert "\x1b" not in page
        assert "\u202e" not in page


def test_the_page_shows_what_the_document_has() -> None:
    page = report_html.render(document(*whole()))
    for words in ("run 0123456789ab", "10.77.0.3", "29500", "60000-60015", "SECURERUN", "umask 0027", "10.77.0.2"):
        assert words in page, words
    assert "Files that are more open" in page
    assert "Files that are more open" not in report_html.render(document(plans.plan(), Finished(failed=False)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A usual report, a hostile one and a long one."""
    if browser.program() is None:
        raise Lacking("no chromium; scripts/setup.sh test installs it")
    directory = tmp_path_factory.mktemp("pages")
    peers = [f"fd77:1234:5678:9abc:def0:1234:5678:{number:x}" for number in range(0x1000, 0x1100, 2)]
    denied = tuple(
        Denial(ipaddress.ip_address(f"fdff:ffff:ffff:ffff:ffff:ffff:ffff:{n:x}"), 60000 + n, 10**9) for n in range(200)
    )
    long = (
        plans.with_command(plans.plan(peers), "x" * 500),
        Installed(GUARDING, "by sudo"),
        Notice(denied),
        Finished(failed=True),
        Released(denied),
    )
    made = {"usual": document(*whole()), "hostile": hostile(document(*whole())), "long": document(*long, status=1)}
    paths = {}
    for name, one in made.items():
        paths[name] = directory / f"{name}.html"
        paths[name].write_text(report_html.render(one))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["usual", "hostile", "long"])
def test_the_page_is_good_to_read_in_a_browser_wide_and_narrow(pages: dict[str, Path], name: str, scheme: str) -> None:
    for width, seen in browser.look(pages[name], (1400, 400), scheme).items():
        assert seen["page"] == seen["width"], (width, seen["wide"])
        assert seen["width"] <= width
        assert seen["wide"] == []
        assert seen["contrast"] >= 4.5
        assert seen["alien"] == seen["ran"] == []
        light = sum(map(int, re.findall(r"\d+", seen["back"]))) > 384
        assert light == (scheme == "light")
        for words in ("Time line", "Turned away", "Who may connect", "Ports"):
            assert words in seen["text"]


@pytest.mark.slow
def test_the_page_itself_shows_what_others_wrote_and_runs_none_of_it(pages: dict[str, Path]) -> None:
    shown = browser.dump(pages["hostile"])
    assert "&lt;script&gt;window.owned=1&lt;/script&gt;" in shown
    assert "<script" not in shown
    assert "<img" not in shown


# Listens until the end of its input, and fails.
LISTENER = """
import socket, sys
listener = socket.create_server(("", 7001))
print("listening", flush=True)
sys.stdin.read()
sys.exit(3)
"""


def run(node: Host, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
    done = node.run([*words], **options)
    assert "Traceback" not in done.stderr, done
    return done


def test_exec_reports_a_job_and_the_stranger_that_it_turned_away(network: Network, tmp_path: Path) -> None:
    node0, _, stranger = network
    path = tmp_path / "run.json"
    options = ("--peers", "10.77.0.2", "--ports", "7001", "--report", str(path))
    job = node0.popen([*EXEC, *options, "--", sys.executable, "-c", LISTENER], stdin=subprocess.PIPE)
    assert job.stdout is not None and job.stdin is not None
    assert job.stdout.readline() == "listening\n"
    assert not any(reach(stranger, [(node0.ipv4, 7001)]).values())
    assert not path.exists()
    job.stdin.close()
    assert job.wait(timeout=30) == 3
    made = json.loads(path.read_text())
    check(made)
    assert (made["outcome"], made["status"], made["reason"]) == ("failed", 3, "ended with status 3")
    assert made["protected"]
    assert (stranger.ipv4, 7001) in {(denial["source"], denial["port"]) for denial in made["denied"]}
    assert made["launch"]["policy"]["peers"] == ["10.77.0.2/32"]
    assert [layer["backend"] for layer in made["layers"]] == ["shield", "iptables"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_job_that_a_signal_ends_is_reported_with_a_shells_status(node: Host, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    done = run(node, *ALONE, "--report", str(path), "--", "sh", "-c", "kill -9 $$")
    assert done.returncode == -9
    page = path.read_text()
    parsed(page)
    assert "ended with status 137: ended by signal 9" in page


def test_a_launch_that_is_refused_leaves_a_report_too(node: Host, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    done = run(node, *EXEC, "--report", str(path), "--peers", "10.77.0.0.1", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (78, ""), done
    made = json.loads(path.read_text())
    check(made)
    assert (made["outcome"], made["status"], made["launch"]) == ("refused", 78, None)
    assert "10.77.0.0.1" in made["reason"]


@pytest.mark.parametrize("preflight", ["warn", "off"])
def test_the_report_says_which_of_the_jobs_files_are_too_open(node: Host, tmp_path: Path, preflight: str) -> None:
    opened, closed = tmp_path / "open.sh", tmp_path / "closed.sh"
    for script, mode in ((opened, 0o755), (closed, 0o550)):
        script.write_text("#!/bin/sh\n")
        script.chmod(mode)
    for script in (opened, closed):
        options = ["--peers", "localhost", "--preflight", preflight, "--report", str(tmp_path / "report.json")]
        done = node.run([*EXEC, *options, "--", script])
        assert done.returncode == 0, done
        found = json.loads((tmp_path / "report.json").read_text())["permissions"]
        assert [each["what"] for each in found if each["what"].startswith(f"{tmp_path}/")] == (
            [f"{opened}: 0755, may be 0550 at most (program)"] if script == opened else []
        )


def test_a_place_where_nothing_can_be_written_starts_nothing(node: Host, tmp_path: Path) -> None:
    before, machine = node.snapshot(), machine_snapshot()
    done = run(node, *ALONE, "--report", str(tmp_path / "missing/run.json"), "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "--report" in done.stderr
    assert (node.snapshot(), machine_snapshot()) == (before, machine)


def test_the_user_of_run_as_writes_the_report_and_no_other(node: Host) -> None:
    with PrivateMachine() as machine:
        alice = machine.add_user("alice")
        for place, status in (("/root/run.json", 2), (f"{alice.home}/run.json", 0)):
            done = machine.run(node, [*ALONE, "--run-as", "alice", "--report", place, "--", "true"])
            assert done.returncode == status, done
            assert machine.place(place).exists() == (status == 0)
        path = machine.place(f"{alice.home}/run.json")
        assert json.loads(path.read_text())["user"] == "alice"
        assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (alice.uid, 0o640)


def test_inside_of_a_run_the_report_is_the_business_of_that_run(node: Host, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    done = run(node, *ALONE, "--", *EXEC, "--report", str(path), "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "--report has no effect here" in done.stderr
    assert not path.exists()
    done = run(node, *ALONE, "--", *EXEC, "--", "echo", "ran", env={"SECURERUN_REPORT": str(path)})
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "no effect" not in done.stderr
    assert json.loads(path.read_text())["launch"]["command"][-1] == "ran"


def test_securerun_reports_a_worker_that_failed(node: Host, tmp_path: Path) -> None:
    path, worker = tmp_path / "run.json", tmp_path / "worker.py"
    worker.write_text("import sys; sys.exit(5)")
    done = node.run([jobs.SECURERUN, "--report", str(path), str(worker)])
    assert done.returncode == 1
    made = json.loads(path.read_text())
    check(made)
    assert (made["status"], made["reason"]) == (1, "worker 0 failed first, with exit code 5")
    assert made["outcome"] == "failed"
    assert made["command_line"][1:] == ["--report", str(path), str(worker)]
    assert made["launch"]["command"] == [str(worker)]
    assert eventually(lambda: not node.processes(), seconds=5)
