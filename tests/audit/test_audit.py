"""securerunctl audit: what is found in a tree, and what is not; how it is said; and several processes at it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from checkout import CHECKOUT, COMMANDS, GROUND
from hosts import eventually, is_alive
from terminals import terminal

from securerun.audit import scan, workers
from securerun.audit.kinds import BUILT_IN, Kinds, read_rows
from securerun.audit.scan import Directory, Settings
from securerun.audit.tree import open_roots
from securerun.audit.violations import Batch, Problem
from securerun.ctl import app
from securerun.ctl.audit import Request, audit
from securerun.errors import SecurerunError

SECURERUNCTL = str(COMMANDS / "securerunctl")
NOBODY = 65534
NO_ACCOUNT = 4_000_000
FIELDS: dict[str, Any] = {
    "path": str,
    "type": str,
    "kind": str,
    "problem": str,
    "mode": str,
    "maximum": (str, type(None)),
    "owner": int,
    "group": int,
    "detail": str,
}
# vfs_cap_data of <linux/capability.h>, revision 2: CAP_NET_RAW, permitted and effective.
NET_RAW = struct.pack("<5I", 0x0200_0001, 1 << 13, 0, 0, 0)
Audit = Callable[..., "dict[str, Any]"]


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Audit:
    """An audit's document, with its status."""

    def run(*paths: Path, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - fields of Request
        status = audit(Request(paths, as_json=True, **more))
        return {"status": status, **json.loads(capsys.readouterr().out)}

    return run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree in which there is nothing to find, though there is something of everything."""
    top = tmp_path / "run"
    for name in ("logs", "certs", "bin", "shared"):
        (top / name).mkdir(parents=True)
    put(top / "model.pt", 0o640)
    put(top / "logs/train.log", 0o640)
    put(top / "logs/train.log.1", 0o440)
    put(top / "certs/server.pem", 0o600)
    put(top / "bin/tool", 0o550)
    (top / "latest").symlink_to("model.pt")
    (top / "logs/up").symlink_to("../certs/../model.pt")
    (top / "logs/nowhere").symlink_to("not/there")
    for name, mode in {".": 0o750, "logs": 0o750, "certs": 0o700, "bin": 0o550, "shared": 0o3750}.items():
        (top / name).chmod(mode)
    return top


def put(path: Path, mode: int, text: str = "x") -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def problems(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(each["path"], each["problem"]) for each in document["findings"]}


def test_nothing_is_found_where_nothing_is_wrong(tree: Path, look: Audit) -> None:
    assert look(tree) == {
        "status": 0,
        "findings": [],
        "seen": 13,
        "summary": [
            {"kind": "program", "files": 1, "directories": 1, "findings": 0},
            {"kind": "log", "files": 3, "directories": 1, "findings": 0},
            {"kind": "archived-log", "files": 1, "directories": 0, "findings": 0},
            {"kind": "temp", "files": 1, "directories": 2, "findings": 0},
            {"kind": "data", "files": 1, "directories": 0, "findings": 0},
            {"kind": "key", "files": 1, "directories": 1, "findings": 0},
        ],
        "undo_log": None,
    }


@pytest.mark.usefixtures("root")
def test_json_says_all_about_a_finding(tree: Path, look: Audit) -> None:
    (tree / "model.pt").chmod(0o664)
    os.chown(tree / "model.pt", -1, 6)
    (finding,) = look(tree)["findings"]
    assert finding == {
        "path": str(tree / "model.pt"),
        "type": "file",
        "kind": "data",
        "problem": "too-open",
        "mode": "0664",
        "maximum": "0640",
        "owner": 0,
        "group": 6,
        "detail": "",
    }


@pytest.mark.usefixtures("root")
def test_every_finding_has_the_fields_and_a_problem_of_the_page(tree: Path, look: Audit) -> None:
    (tree / "model.pt").chmod(0o664)
    (tree / "bin/tool").chmod(0o6555)
    os.setxattr(tree / "bin/tool", "security.capability", NET_RAW)
    (tree / "way").symlink_to("/etc")
    os.mknod(tree / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.chown(tree / "logs/train.log", NOBODY, NO_ACCOUNT)
    tree.parent.chmod(0o707)
    page = (CHECKOUT / "docs/permissions.md").read_text()
    findings = look(tree)["findings"]
    for finding in findings:
        assert list(finding) == list(FIELDS)
        assert all(isinstance(finding[name], kind) for name, kind in FIELDS.items())
        assert f"`{finding['problem']}`" in page and all(f"`{name}`" in page for name in finding)
    assert {each["problem"] for each in findings} == {each.value for each in Problem} - {"not-looked-at"}


def test_what_an_access_control_list_allows_others_shows_in_its_mask(tree: Path, look: Audit) -> None:
    # posix_acl_xattr_entry of <linux/posix_acl_xattr.h>, tag, permissions and id: user::rw-, user:nobody:rw-,
    # group::r--, mask::rw-, other::---.
    entries = ((1, 6, -1), (2, 6, NOBODY), (4, 4, -1), (16, 6, -1), (32, 0, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(tree / "model.pt", "system.posix_acl_access", acl)
    except OSError as error:
        pytest.skip(f"this file system has no access control lists ({error})")
    (finding,) = look(tree)["findings"]
    assert (finding["problem"], finding["mode"]) == ("too-open", "0660")


def test_files_and_directories_more_open_than_their_row_are_found(tree: Path, look: Audit) -> None:
    (tree / "logs").chmod(0o755)
    (tree / "logs/train.log.1").chmod(0o640)
    (tree / "certs/server.pem").chmod(0o640)
    (tree / "bin").chmod(0o750)
    found = look(tree)
    assert found["status"] == 1
    assert {(each["path"], each["kind"], each["mode"], each["maximum"]) for each in found["findings"]} == {
        (str(tree / "logs"), "log", "0755", "0750"),
        (str(tree / "logs/train.log.1"), "archived-log", "0640", "0440"),
        (str(tree / "certs/server.pem"), "key", "0640", "0600"),
        (str(tree / "bin"), "program", "0750", "0550"),
    }


def test_a_directory_that_holds_key_material_is_one_of_key_material(tree: Path, look: Audit) -> None:
    put(tree / "client.key", 0o600)
    (finding,) = look(tree)["findings"]
    assert (finding["path"], finding["kind"], finding["maximum"]) == (str(tree), "key", "0700")
    assert finding["detail"] == "it holds client.key"
    tree.chmod(0o700)
    assert look(tree)["findings"] == []


def test_an_executable_without_a_row_is_a_program_if_it_begins_as_one(tree: Path, look: Audit) -> None:
    put(tree / "launch", 0o550, "#!/bin/sh\n")
    put(tree / "compiled", 0o550, "\x7fELF")
    put(tree / "notes", 0o550, "notes")
    put(tree / "silent", 0o440, "#!/bin/sh\n")
    (finding,) = look(tree)["findings"]
    assert (finding["path"], finding["maximum"]) == (str(tree / "notes"), "0640")


@pytest.mark.parametrize(
    ("bits", "words"), [(0o4000, "set-user-id"), (0o2000, "set-group-id"), (0o6000, "set-user-id and set-group-id")]
)
def test_set_id_bits_are_found(tree: Path, look: Audit, bits: int, words: str) -> None:
    (tree / "bin/tool").chmod(0o550 | bits)
    (finding,) = look(tree)["findings"]
    assert (finding["path"], finding["problem"], finding["detail"]) == (str(tree / "bin/tool"), "set-id", words)


@pytest.mark.usefixtures("root")
def test_file_capabilities_are_found_where_they_work(tree: Path, look: Audit) -> None:
    for name in ("bin/tool", "model.pt"):
        os.setxattr(tree / name, "security.capability", NET_RAW)
    # What cannot be executed gives nobody capabilities.
    assert problems(look(tree)) == {(str(tree / "bin/tool"), "capabilities")}
    os.removexattr(tree / "bin/tool", "security.capability")
    assert look(tree)["findings"] == []


@pytest.mark.usefixtures("root")
def test_foreign_and_missing_owners_are_found(tree: Path, look: Audit) -> None:
    os.chown(tree / "model.pt", NOBODY, -1)
    os.chown(tree / "logs", NO_ACCOUNT, -1)
    os.chown(tree / "bin/tool", -1, NO_ACCOUNT)
    os.chown(tree / "latest", NOBODY, -1, follow_symlinks=False)
    found = look(tree)
    assert {(each["path"], each["problem"], each["detail"]) for each in found["findings"]} == {
        (str(tree / "model.pt"), "foreign-owner", "nobody"),
        (str(tree / "latest"), "foreign-owner", "nobody"),
        (str(tree / "logs"), "missing-owner", f"user {NO_ACCOUNT}"),
        (str(tree / "bin/tool"), "missing-owner", f"group {NO_ACCOUNT}"),
    }
    assert problems(look(tree, owners=("nobody",))) == problems(found) - {
        (str(tree / name), "foreign-owner") for name in ("model.pt", "latest")
    }


@pytest.mark.usefixtures("root")
def test_for_root_the_owner_of_what_is_named_is_no_stranger_in_it(tree: Path, look: Audit) -> None:
    for path in (tree, *tree.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.chown(tree / "model.pt", 0, 0)
    assert look(tree)["findings"] == []
    # Who may own a file that is root's may not own the directory that it is in.
    assert problems(look(tree / "model.pt")) == {(str(tree), "foreign-owner")}
    os.chown(tree / "logs/train.log", 1, 1)
    assert problems(look(tree)) == {(str(tree / "logs/train.log"), "foreign-owner")}


@pytest.mark.parametrize(
    ("target", "leaves"),
    [
        ("/etc/passwd", True),
        ("../../elsewhere", True),
        ("../../run/model.pt", False),
        ("../../run2/model.pt", True),
        ("../model.pt", False),
        ("..", False),
        ("../..", True),
        ("{tree}/model.pt", False),
        ("{tree}", False),
        ("{tree}/../x", True),
        ("deep/../../../x", True),
        ("/proc/self/cwd", True),
    ],
)
def test_links_that_leave_the_tree_are_found(tree: Path, look: Audit, target: str, leaves: bool) -> None:
    (tree / "logs/link").symlink_to(target.format(tree=tree))
    found = look(tree)
    assert problems(found) == ({(str(tree / "logs/link"), "leaves-tree")} if leaves else set())
    assert [each["detail"] for each in found["findings"]] == [target.format(tree=tree)] * leaves


def test_a_link_from_one_named_tree_into_another_leaves_none(tree: Path, look: Audit) -> None:
    other = tree.parent / "other"
    other.mkdir(mode=0o750)
    (other / "link").symlink_to(tree / "model.pt")
    assert look(tree, other)["findings"] == []
    assert problems(look(other)) == {(str(other / "link"), "leaves-tree")}


def test_links_are_not_followed(tree: Path, look: Audit) -> None:
    outside = tree.parent / "outside"
    outside.mkdir()
    put(outside / "open.pt", 0o666)
    (tree / "way").symlink_to(outside)
    (tree / "file").symlink_to(outside / "open.pt")
    assert problems(look(tree)) == {(str(tree / name), "leaves-tree") for name in ("way", "file")}


@pytest.mark.usefixtures("root")
def test_devices_are_found_and_sockets_and_pipes_held_to_a_files_mode(tree: Path, look: Audit) -> None:
    os.mknod(tree / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(tree / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    os.mkfifo(tree / "pipe")
    (tree / "pipe").chmod(0o666)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "socket"))
        (tree / "socket").chmod(0o640)
        found = look(tree)
    assert problems(found) == {
        (str(tree / "null"), "device"),
        (str(tree / "disk"), "device"),
        (str(tree / "pipe"), "too-open"),
    }
    assert {each["type"] for each in found["findings"]} == {"character device", "block device", "pipe"}


def test_world_writable_parents_are_found_up_to_the_root(tree: Path, look: Audit) -> None:
    above = tree.parent
    deep = above / "a/b/c"
    deep.mkdir(parents=True)
    for path in (above / "a", above / "a/b", deep):
        path.chmod(0o750)
    put(deep / "model.pt", 0o640)
    assert look(deep)["findings"] == []
    (above / "a").chmod(0o777)
    (above / "a/b").chmod(0o1777)  # sticky: nobody can put another directory in the place of one of ours
    (finding,) = look(deep)["findings"]
    assert (finding["path"], finding["problem"], finding["maximum"]) == (str(above / "a"), "open-parent", "0775")
    assert problems(look(deep / "model.pt")) == {(str(above / "a"), "open-parent")}
    # The same directory as part of what is named is too open for its row.
    assert problems(look(above / "a")) == {(str(above / "a"), "too-open"), (str(above / "a/b"), "too-open")}


@pytest.mark.usefixtures("root")
def test_parents_of_a_link_that_is_named_count_too(tree: Path, look: Audit) -> None:
    weak = tree.parent / "weak"
    weak.mkdir()
    (weak / "current").symlink_to(tree)
    weak.chmod(0o757)
    assert problems(look(weak / "current")) == {(str(weak), "open-parent")}
    weak.chmod(0o755)
    os.chown(weak, NOBODY, -1)
    assert problems(look(weak / "current")) == {(str(weak), "foreign-owner")}


def test_one_file_is_looked_at_alone(tree: Path, look: Audit) -> None:
    put(tree / "open.pt", 0o666)
    (tree / "model.pt").chmod(0o644)
    found = look(tree / "model.pt")
    assert (problems(found), found["seen"]) == ({(str(tree / "model.pt"), "too-open")}, 1)


def test_what_is_named_twice_is_looked_at_once(tree: Path, look: Audit) -> None:
    (tree / "model.pt").chmod(0o644)
    (tree.parent / "again").symlink_to(tree)
    found = look(tree / "logs", tree, tree / "model.pt", tree.parent / "again")
    assert (len(found["findings"]), found["seen"]) == (1, 13)


@pytest.mark.usefixtures("root")
def test_other_file_systems_are_looked_at_unless_told_otherwise(tree: Path, look: Audit) -> None:
    mounted = tree / "mounted"
    mounted.mkdir(mode=0o750)
    # In a mount namespace of this test's child: nothing is mounted where others see it.
    script = "mount -t tmpfs -o mode=777 tmpfs $0 && exec securerunctl audit --json $1 $2"
    for option, expected in (("--json", {str(mounted)}), ("--one-file-system", set())):
        command = ["unshare", "--mount", "sh", "-c", script, str(mounted), option, str(tree)]
        environment = {**os.environ, "PATH": f"{COMMANDS}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert {each["path"] for each in json.loads(done.stdout)["findings"]} == expected, done


def test_a_tree_deeper_than_any_is_not_believed_in_order(
    tree: Path, look: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_DEEPEST", 100)
    deep = tree
    for _ in range(103):
        deep = deep / "d"
        deep.mkdir(mode=0o750)
    put(deep / "model.pt", 0o666)
    (finding,) = look(tree)["findings"]
    assert (finding["problem"], finding["path"].count("/d")) == ("not-looked-at", 101)
    monkeypatch.setattr(scan, "_DEEPEST", 4096)
    assert problems(look(tree)) == {(str(deep / "model.pt"), "too-open")}


def test_names_that_steer_terminals_are_told_apart_and_do_no_harm(
    tree: Path, look: Audit, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a\nb.pt", "\x1b[31m.pt", os.fsdecode(b"\xff\xfe.pt"), "ü.pt", "[red].pt"]
    for name in names:
        put(tree / name, 0o644)
    assert {each["path"] for each in look(tree)["findings"]} == {str(tree / name) for name in names}
    assert audit(Request([tree])) == 1
    text = capsys.readouterr().out
    assert not set(text) & {"\x1b", "\udcff"}
    assert [line for line in text.splitlines() if "0640" in line] == [
        f"{tree}/{name}: 0644, may be 0640 at most (data)"
        for name in ("\\x1b[31m.pt", "[red].pt", "a\\nb.pt", "ü.pt", "\\udcff\\udcfe.pt")
    ]


def test_a_person_reads_what_is_wrong_what_may_be_and_a_summary_by_row(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "model.pt").chmod(0o644)
    put(tree / "a.key", 0o640)
    (tree / "way").symlink_to("/etc")
    assert audit(Request([tree])) == 1
    assert (
        capsys.readouterr().out
        == f"""\
{tree}: 0750, may be 0700 at most (key: it holds a.key)
{tree}/a.key: 0640, may be 0600 at most (key)
{tree}/model.pt: 0644, may be 0640 at most (data)
{tree}/way: leads out of the tree, to /etc

kind          files  directories  findings
program           1            1         0
log               3            1         0
archived-log      1            0         0
temp              2            1         1
data              1            0         1
key               2            2         2
4 findings in 15 files and directories
"""
    )


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["audit", "{tree}"], 0, ""),
        (["audit", "--as", "program", "{tree}"], 1, ""),
        (["audit"], 2, "no PATH to look at; name files or directories"),
        (["audit", "{tree}/none"], 2, "none cannot be looked at: No such file or directory; name a file or directory"),
        (["audit", "{tree}/logs/nowhere"], 2, "nowhere cannot be looked at: No such file"),
        (["audit", "--as", "secret", "{tree}"], 2, "--as: 'secret' is no kind; name one of home, program"),
        (["audit", "--owner", "no such", "{tree}"], 2, "--owner: there is no user 'no such'"),
        (["audit", "--kinds", "{tree}/none", "{tree}"], 2, "none cannot be read"),
        (["audit", "--undo", "{tree}/none"], 2, "none cannot be read"),
        (["audit", "--undo", "{tree}/none", "{tree}"], 2, "leave PATH and --fix out"),
        (["audit", "--undo", "{tree}/none", "--fix"], 2, "leave PATH and --fix out"),
        (["audit", "--nonsense"], 2, "No such option"),
    ],
)
def test_status_is_0_for_clean_1_for_findings_and_2_for_wrong_usage(
    words: list[str],
    status: int,
    complaint: str,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["securerunctl", *(word.format(tree=tree) for word in words)])
    with pytest.raises(SystemExit) as end:
        app.main()
    said = capsys.readouterr().err
    assert (end.value.code, complaint in said, "Traceback" in said) == (status, True, False), said


def test_the_built_in_patterns_are_printed_for_who_wants_others(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["securerunctl", "audit", "--print-kinds"])
    with pytest.raises(SystemExit):
        app.main()
    printed = tree.parent / "kinds"
    printed.write_text(capsys.readouterr().out)
    assert read_rows(printed)[: len(read_rows(None)) // 2] == read_rows(None)[: len(read_rows(None)) // 2]
    assert len(read_rows(printed)) == 2 * len(read_rows(None))


def test_options_that_the_built_in_patterns_speak_of_exist() -> None:
    command: Any = typer.main.get_command(app.app)
    options = {spelling for option in command.commands["audit"].params for spelling in option.opts}
    spoken_of = set(re.findall(r"--[\w-]+", BUILT_IN.read_text(encoding="utf-8")))
    assert spoken_of == {"--kinds"} and spoken_of <= options


def test_the_command_starts_without_torch(tree: Path) -> None:
    script = (
        "import sys; from securerun.ctl import app\n"
        "try: app.main()\n"
        "finally: print('torch' in sys.modules, 'multiprocessing' in sys.modules, file=sys.stderr)"
    )
    for words in (["--help"], [str(tree)]):
        done = subprocess.run(
            [sys.executable, "-c", script, "audit", *words], capture_output=True, text=True, check=True
        )
        assert done.stderr == "False False\n"


def test_who_has_read_enough_ends_it_quietly(tree: Path) -> None:
    for number in range(3000):
        put(tree / f"{number}.pt", 0o644)
    process = subprocess.Popen(
        [SECURERUNCTL, "audit", str(tree)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 1)


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that is large for the budget that there is, with a finding in every directory."""
    monkeypatch.setattr(workers, "_BUDGET", 5)
    for number in range(40):
        directory = tree / f"{number % 7}/{number}/x"
        directory.mkdir(parents=True)
        put(directory / "model.pt", 0o640)
        put(directory / f"{number}.pt", 0o646)
    for path in tree.rglob("*"):
        if path.is_dir() and path.name not in ("certs", "bin"):
            path.chmod(0o750)
    return tree


def settings_of(tree: Path) -> Settings:
    return Settings(tuple(open_roots([tree])), Kinds(read_rows(None), {}), frozenset())


def starts(settings: Settings) -> list[Directory]:
    return [Directory(0, "", settings.kinds.of_root(settings.roots[0].path))]


def paths_of(batch: Batch) -> list[str]:
    return [batch.below(name) for name, *_ in batch.entries]


def worker_processes() -> set[int]:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return set(map(int, children.split()))


@pytest.mark.parametrize("processors", [{0}, {0, 1}])
def test_several_processes_find_what_one_finds(
    many: Path, processors: set[int], look: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors)
    before = worker_processes()
    found = look(many)
    assert problems(found) == {(str(path), "too-open") for path in many.rglob("*.pt") if path.name != "model.pt"}
    assert len(found["findings"]) == 40
    assert found["seen"] == 1 + sum(1 for _ in many.rglob("*"))
    assert sum(row["findings"] for row in found["summary"]) == 40
    assert worker_processes() == before


def test_a_worker_that_is_killed_ends_the_audit_with_a_word(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    settings, before = settings_of(many), worker_processes()
    outcomes = workers.look(settings, starts(settings), paths_of)
    next(outcomes), next(outcomes)
    for process in worker_processes() - before:
        os.kill(process, signal.SIGKILL)
    with pytest.raises(SecurerunError, match="a process of the audit was killed"):
        list(outcomes)
    assert worker_processes() == before


def test_workers_end_when_the_audit_is_killed(many: Path) -> None:
    script = (
        "import sys, os, time\n"
        "sys.path[:0] = [os.path.dirname(sys.argv[1]), sys.argv[3]]\n"
        "import test_audit as t; from securerun.audit import workers; from pathlib import Path\n"
        "workers._BUDGET = 5; os.sched_getaffinity = lambda _: {0, 1, 2}\n"
        "settings = t.settings_of(Path(sys.argv[2]))\n"
        "outcomes = workers.look(settings, t.starts(settings), t.paths_of)\n"
        "next(outcomes), next(outcomes)\n"
        "print(*t.worker_processes(), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, __file__, str(many), str(GROUND)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        assert len(children) == 3 and all(map(is_alive, children))
        process.kill()
    assert eventually(lambda: not any(map(is_alive, children)), seconds=10)


# Terminals ------------------------------------------------------------------------------------------------------------

IMPATIENT = "from securerun.audit import workers; workers._BUDGET = 5; from securerun.ctl import app; app.main()"

# Where tests run on a console, that is a dumb one.
WITH_A_SCREEN = {**os.environ, "TERM": "xterm"}


def test_a_bar_shows_on_a_terminal_that_a_long_audit_goes_on(many: Path) -> None:
    with terminal() as screen:
        done = subprocess.run(
            [sys.executable, "-c", IMPATIENT, "audit", str(many)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=screen.end,
            env=WITH_A_SCREEN,
            text=True,
            timeout=60,
            check=False,
        )
        said = screen.text()
    assert "files and directories looked at" in said
    assert "looked at" not in done.stdout and "40 findings" in done.stdout


def test_findings_and_bar_do_not_mix_on_one_terminal(many: Path) -> None:
    with terminal() as screen:
        command = [sys.executable, "-c", IMPATIENT, "audit", str(many)]
        done = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=screen.end, stderr=screen.end, env=WITH_A_SCREEN
        )
        done.wait(timeout=60)
        said = screen.text()
    assert said.rindex("looked at") < said.index("0646, may be 0640")
    assert said.count("0646, may be 0640") == 40


def test_no_bar_where_there_is_no_terminal(many: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, "audit", str(many)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "looked at" not in done.stdout
