"""securerunctl audit --fix and --undo: bits are only ever taken away, nothing outside is touched, all can be undone."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkout import COMMANDS
from hosts import Host
from terminals import terminal
from test_audit import NET_RAW, NOBODY, put
from users import PrivateMachine

from securerun.audit import fix, undolog, workers
from securerun.audit.fix import Proposal
from securerun.audit.kinds import Kinds, read_rows
from securerun.audit.scan import Directory, Settings
from securerun.audit.tree import open_roots
from securerun.audit.violations import Violation, violations_of
from securerun.ctl.audit import Request, audit, undo
from securerun.errors import SecurerunError, UsageError
from securerun.host import permissions
from securerun.host.permissions import Kind
from securerun.linux.statx import birth_of

SECURERUNCTL = str(COMMANDS / "securerunctl")
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_CURRENT_DIRECTORY = -100
# A hostile user changes the tree without a pause; so often it is mended meanwhile.
_ROUNDS = 150
# Whoever follows links is led out within far fewer.
_NAIVE_ROUNDS = 200_000


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of which everything is too open, and next to it a directory that is none of an audit's business."""
    for name in ("run", "run/logs", "run/keys", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    for name in ("run/model.pt", "run/logs/train.log", "run/logs/model.pt", "run/keys/a.pem", "outside/model.pt"):
        put(tmp_path / name, 0o666)
    put(tmp_path / "run/train.py", 0o4777)
    return tmp_path / "run"


def modes(tree: Path) -> dict[str, int]:
    return {str(path): stat.S_IMODE(path.lstat().st_mode) for path in (tree, *tree.rglob("*"))}


def mended(tree: Path) -> dict[str, int]:
    """What --fix makes of `tree`."""
    return {
        str(tree / name): mode
        for name, mode in {
            "": 0o750, "logs": 0o750, "keys": 0o700, "model.pt": 0o640, "logs/train.log": 0o640, "logs/model.pt": 0o640,
            "keys/a.pem": 0o600, "train.py": 0o550,
        }.items()
    }  # fmt: skip


def request(tree: Path, **more: Any) -> Request:  # noqa: ANN401 - fields of Request
    return Request([tree], fix=True, undo_log=tree.parent / "undo", **more)


@contextlib.contextmanager
def planned(tree: Path) -> Iterator[tuple[Settings, Proposal]]:
    """An audit's plan for a tree, in which something may happen before it is carried out."""
    roots = open_roots([tree])
    settings = Settings(tuple(roots), Kinds(read_rows(None), {}), frozenset({0}), identities=True)
    starts = [Directory(0, "", settings.kinds.of_root(roots[0].path))]
    findings: list[Violation] = []
    for outcome in workers.look(settings, starts, violations_of):
        findings += outcome.found
    try:
        yield settings, fix.propose(findings, settings.owners)
    finally:
        for root in roots:
            os.close(root.descriptor)


def carried_out(settings: Settings, plan: Proposal) -> dict[str, str]:
    """What was left, and why."""
    return {each.change.path: each.why for each in fix.make(settings.roots, plan.changes) if each.why}


def test_all_that_is_too_open_is_closed_and_said_before(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(request(tree)) == 0
    assert modes(tree) == mended(tree)
    said = capsys.readouterr().out
    assert f"{tree}/keys/a.pem: 0666, may be 0600 at most (key); --fix makes it 0600\n" in said
    assert f"{tree}/train.py: runs as its owner (set-user-id); chmod ug-s; --fix makes it 0550\n" in said
    assert said.endswith(f"8 modes fixed; undo with: securerunctl audit --undo {tree.parent}/undo\n")
    assert audit(Request([tree])) == 0


def test_the_undo_log_is_there_before_the_first_change(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    change = os.chmod

    def look_first(path: str, mode: int) -> None:
        log = tree.parent / "undo"
        seen.append((stat.S_IMODE(log.stat().st_mode), len(log.read_text().splitlines())))
        change(path, mode)

    monkeypatch.setattr(os, "chmod", look_first)
    assert audit(request(tree)) == 0
    assert seen == [(0o600, 10)] * 8
    assert [path.name for path in tree.parent.iterdir() if path.name not in ("run", "outside")] == ["undo"]


def test_undo_gives_back_what_was_there(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = modes(tree)
    assert audit(request(tree)) == 0
    capsys.readouterr()
    assert undo(tree.parent / "undo", as_json=False) == 0
    assert modes(tree) == before
    assert capsys.readouterr().out == "8 modes restored of 8\n"
    assert undo(tree.parent / "undo", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"restored": 8, "left": []}


@pytest.mark.usefixtures("root")
def test_undo_changes_only_what_is_still_as_it_was_mended(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = modes(tree)
    assert audit(request(tree)) == 0
    capsys.readouterr()
    (tree / "model.pt").chmod(0o400)
    (tree / "logs/model.pt").unlink()
    put(tree / "logs/model.pt", 0o640)
    (tree / "train.py").unlink()
    os.chown(tree / "keys/a.pem", NOBODY, -1)
    assert undo(tree.parent / "undo", as_json=True) == 1
    document = json.loads(capsys.readouterr().out)
    assert {each["path"]: each["why"] for each in document["left"]} == {
        f"{tree}/model.pt": "it changed meanwhile",
        f"{tree}/logs/model.pt": "it changed meanwhile",
        f"{tree}/train.py": "it is gone",
        f"{tree}/keys/a.pem": "it changed meanwhile",
    }
    assert document["restored"] == 4
    after = modes(tree)
    assert (after[f"{tree}/model.pt"], after[f"{tree}/logs/model.pt"], after[f"{tree}/keys/a.pem"]) == (
        0o400,
        0o640,
        0o600,
    )
    assert all(after[name] == before[name] for name in after if not name.endswith((".pt", ".pem")))


@pytest.mark.parametrize("kind", [kind.value for kind in Kind])
def test_no_mode_is_mended_by_adding_a_bit(kind: str) -> None:
    for mode in range(0o10000):
        for form in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO):
            after = mode & ~permissions.excess(form | mode, kind)
            assert not after & ~mode
            assert permissions.excess(form | after, kind) == 0


@pytest.mark.usefixtures("root")
def test_closed_modes_stay_closed_and_set_group_id_and_sticky_directories_stay_so(tree: Path) -> None:
    (tree / "logs").chmod(0o3777)
    (tree / "keys").chmod(0o100)
    (tree / "model.pt").chmod(0o004)
    (tree / "logs/train.log").chmod(0)
    assert audit(request(tree)) == 0
    after = modes(tree)
    expected = {"logs": 0o3750, "keys": 0o100, "model.pt": 0, "logs/train.log": 0}
    assert {name: after[str(tree / name)] for name in expected} == expected


@pytest.mark.usefixtures("root")
def test_what_has_several_names_or_a_strangers_owner_is_left_and_named(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.link(tree.parent / "outside/model.pt", tree / "logs/theirs.pt")
    os.chown(tree / "model.pt", NOBODY, -1)
    assert audit(request(tree, as_json=True)) == 1
    document = json.loads(capsys.readouterr().out)
    left = {(each["path"], each["problem"]): each["left"] for each in document["findings"] if not each["mended"]}
    assert left == {
        (f"{tree}/logs/theirs.pt", "too-open"): "it has 2 names (hard links), of which some may be elsewhere",
        (f"{tree}/model.pt", "too-open"): "its owner is a stranger here",
        (f"{tree}/model.pt", "foreign-owner"): "only modes are fixed",
    }
    assert (tree.parent / "outside/model.pt").stat().st_mode & 0o777 == 0o666
    assert (tree / "model.pt").stat().st_mode & 0o777 == 0o666
    assert document["undo_log"] == str(tree.parent / "undo")


@pytest.mark.usefixtures("root")
def test_what_is_no_mode_is_left_and_makes_status_1(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.setxattr(tree / "train.py", "security.capability", NET_RAW)
    (tree / "way").symlink_to(tree.parent / "outside")
    assert audit(request(tree)) == 1
    said = capsys.readouterr().out
    assert (
        f"{tree}/way: leads out of the tree, to {tree.parent}/outside; --fix leaves it: only modes are fixed\n" in said
    )
    assert said.endswith("2 findings left\n")
    assert modes(tree.parent / "outside")[f"{tree.parent}/outside/model.pt"] == 0o666


def test_links_are_never_followed(tree: Path) -> None:
    outside = tree.parent / "outside"
    (tree / "file.pt").symlink_to(outside / "model.pt")
    (tree / "way").symlink_to(outside)
    before = modes(outside)
    assert audit(request(tree)) == 1
    assert modes(outside) == before


def test_parents_are_found_and_left(tree: Path) -> None:
    tree.parent.chmod(0o777)
    assert audit(request(tree)) == 1
    assert stat.S_IMODE(tree.parent.stat().st_mode) == 0o777
    assert modes(tree) == mended(tree)


def test_without_anything_to_change_there_is_no_log(tree: Path) -> None:
    assert audit(request(tree)) == 0
    (tree.parent / "undo").unlink()
    assert audit(request(tree)) == 0
    assert not (tree.parent / "undo").exists()


def test_nothing_is_changed_when_the_log_cannot_be_written(tree: Path) -> None:
    before = modes(tree)
    (tree.parent / "undo").touch()
    with pytest.raises(UsageError, match="undo is there already; name another file with --undo-log"):
        audit(request(tree))
    (tree.parent / "undo").unlink()
    (tree.parent / "undo").symlink_to(tree.parent / "elsewhere")
    with pytest.raises(UsageError, match="is there already"):
        audit(request(tree))
    nowhere = Request([tree], fix=True, undo_log=Path("/proc/undo"))
    with pytest.raises(SecurerunError, match="the undo log /proc/undo cannot be written .* so nothing was changed"):
        audit(nowhere)
    assert modes(tree) == before
    assert {path.name for path in tree.parent.iterdir()} == {"run", "outside", "undo"}


# A tree that changes meanwhile ----------------------------------------------------------------------------------------


def _become_link_to_outside(tree: Path) -> None:
    (tree / "logs").rename(tree / "gone")
    (tree / "logs").symlink_to(tree.parent / "outside")


def _become_outside_itself(tree: Path) -> None:
    (tree / "logs").rename(tree / "gone")
    (tree.parent / "outside").rename(tree / "logs")


def _become_link_to_file(tree: Path) -> None:
    (tree / "logs/model.pt").unlink()
    (tree / "logs/model.pt").symlink_to(tree.parent / "outside/model.pt")


def _become_hard_link(tree: Path) -> None:
    (tree / "logs/model.pt").unlink()
    os.link(tree.parent / "outside/model.pt", tree / "logs/model.pt")


def _gain_a_name(tree: Path) -> None:
    os.link(tree / "logs/model.pt", tree.parent / "outside/more.pt")


def _become_another_file(tree: Path) -> None:
    put(tree / "logs/new", 0o666)
    (tree / "logs/new").replace(tree / "logs/model.pt")


def _change_owner(tree: Path) -> None:
    os.chown(tree / "logs/model.pt", NOBODY, NOBODY)


def _be_closed(tree: Path) -> None:
    (tree / "logs/model.pt").chmod(0o200)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("happen", "why"),
    [
        (_become_link_to_outside, "Not a directory"),
        (_become_outside_itself, "it changed meanwhile"),
        (_become_link_to_file, "it changed meanwhile"),
        (_become_hard_link, "it changed meanwhile"),
        (_gain_a_name, "it has 2 names"),
        (_become_another_file, "it changed meanwhile"),
        (_change_owner, "it changed meanwhile"),
        (_be_closed, "it changed meanwhile"),
    ],
)
def test_what_changes_between_look_and_change_is_left(tree: Path, happen: Callable[[Path], None], why: str) -> None:
    with planned(tree) as (settings, plan):
        happen(tree)
        before = modes(tree.parent)
        left = carried_out(settings, plan)
    assert left["logs/model.pt"].startswith(why)
    after = modes(tree.parent)
    changed = {name for name in before if before[name] != after[name]}
    assert not any("outside" in name or name.endswith("logs/model.pt") for name in changed)
    assert f"{tree}/keys/a.pem" in changed


@pytest.mark.usefixtures("root")
def test_a_change_meets_the_file_that_was_judged_whatever_has_its_name_by_then(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = os.chmod

    def swap_first(path: str, mode: int) -> None:
        if mode == 0o640 and (tree / "logs").is_dir():
            (tree / "logs").rename(tree / "gone")
            (tree.parent / "outside").rename(tree / "logs")
        change(path, mode)

    outside = (tree.parent / "outside/model.pt").stat().st_ino
    with planned(tree) as (settings, plan):
        monkeypatch.setattr(os, "chmod", swap_first)
        carried_out(settings, plan)
    assert {path.stat().st_mode & 0o777 for path in tree.rglob("*.pt") if path.stat().st_ino == outside} == {0o666}


def _exchange(one: Path, other: Path) -> None:
    """Swap two names, with no moment between (renameat2)."""
    done = ctypes.CDLL(None, use_errno=True).renameat2(
        _CURRENT_DIRECTORY, os.fsencode(one), _CURRENT_DIRECTORY, os.fsencode(other), _EXCHANGE
    )
    if done != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def _swap_for_ever(tree: Path) -> None:
    """What a user does who wants root to close, or open, the files outside."""
    parent = os.getppid()
    while os.getppid() == parent:
        _exchange(tree / "logs", tree / "trap")
        _exchange(tree / "model.pt", tree / "file")
        _exchange(tree / "logs", tree / "trap")
        _exchange(tree / "model.pt", tree / "file")


class Hostile(NamedTuple):
    """A tree, while a directory and a file of it change places with links to what is outside."""

    tree: Path
    files: dict[int, int]

    def open_again(self) -> None:
        """Make all of the tree as open as it was, by descriptor, since names there may mean something else."""
        for file, mode in self.files.items():
            os.chmod(f"/proc/self/fd/{file}", mode)  # noqa: PTH101

    @property
    def outside_is_untouched(self) -> bool:
        return set(modes(self.tree.parent / "outside").values()) == {0o777, 0o666}


@pytest.fixture
def hostile(tree: Path) -> Iterator[Hostile]:
    files = {os.open(path, os.O_PATH): mode for path, mode in modes(tree).items()}
    (tree / "trap").symlink_to(tree.parent / "outside")
    (tree / "file").symlink_to(tree.parent / "outside/model.pt")
    swapper = multiprocessing.get_context("fork").Process(target=_swap_for_ever, args=(tree,))
    swapper.start()
    try:
        yield Hostile(tree, files)
    finally:
        swapper.kill()
        swapper.join()
        for file in files:
            os.close(file)


@pytest.mark.usefixtures("root")
def test_nothing_outside_is_touched_while_somebody_swaps_directories_and_links(hostile: Hostile) -> None:
    outcomes: set[str] = set()
    for _ in range(_ROUNDS):
        with planned(hostile.tree) as (settings, plan):
            outcomes.update(carried_out(settings, plan).values())
        assert hostile.outside_is_untouched
        hostile.open_again()
    # The swapping was in time more than once.
    assert outcomes & {"Not a directory", "it changed meanwhile", "it is gone"}, outcomes


def test_whoever_followed_names_there_would_be_led_out(hostile: Hostile) -> None:
    """The control to the test above: the swapping is quick enough to catch one."""
    for _ in range(_NAIVE_ROUNDS):
        with contextlib.suppress(OSError):
            (hostile.tree / "logs/model.pt").chmod(0o640)
        if not hostile.outside_is_untouched:
            return
    pytest.fail("nobody was led out")


@pytest.mark.usefixtures("root")
def test_a_look_at_such_a_tree_stays_in_it(hostile: Hostile) -> None:
    put(hostile.tree.parent / "outside/only there.pt", 0o666)
    for _ in range(_ROUNDS):
        with planned(hostile.tree) as (_, plan):
            assert "keys/a.pem" in {change.path for change in plan.changes}
            assert not any("only there" in change.path for change in plan.changes)


# The log --------------------------------------------------------------------------------------------------------------


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def _write(log: Path, lines: list[dict[str, Any]]) -> None:
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "../outside/model.pt"},
        {"path": "/etc/passwd"},
        {"path": "logs//model.pt"},
        {"path": "."},
        {"path": 7},
        {"root": 1},
        {"root": -1},
        {"root": True},
        {"mode": "100640", "to": "666"},
        {"to": "-1"},
        {"to": "177777"},
        {"to": 0o640},
        {"inode": "7"},
        {"owner": None},
    ],
)
def test_a_log_that_says_what_no_log_says_is_refused_whole(tree: Path, changed: dict[str, Any]) -> None:
    assert audit(request(tree)) == 0
    log, before = tree.parent / "undo", modes(tree.parent)
    head, first, *others = _lines(log)
    _write(log, [head, {**first, **changed}, *others])
    with pytest.raises(UsageError, match="undo is no whole undo log of this version"):
        undo(log, as_json=False)
    assert modes(tree.parent) == before


def test_an_inode_that_went_to_another_file_is_another_file(tree: Path) -> None:
    """ext4 gives the number to the next file at once; where a file system does not, the test has nothing to see."""
    assert audit(request(tree)) == 0
    number = (tree / "model.pt").stat().st_ino
    for _ in range(20):
        (tree / "model.pt").unlink()
        put(tree / "model.pt", 0o640)
        if (tree / "model.pt").stat().st_ino == number:
            break
    assert undo(tree.parent / "undo", as_json=False) == 1
    assert (tree / "model.pt").stat().st_mode & 0o777 == 0o640


def test_a_birth_is_known_where_the_system_tells(tree: Path) -> None:
    directory = os.open(tree, os.O_PATH)
    try:
        put(tree / "new.pt", 0o640)
        stat_says = subprocess.run(["stat", "-c", "%W", tree / "new.pt"], capture_output=True, text=True, check=True)
        if stat_says.stdout.strip() in ("0", "-"):
            pytest.skip("this file system does not tell")
        born = birth_of(directory, "new.pt")
        assert born // 10**9 == int(stat_says.stdout)
        assert birth_of(directory, "none") == 0
        (tree / "link").symlink_to("/proc")
        assert birth_of(directory, "link") >= born
    finally:
        os.close(directory)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "no text", "deep"])
def test_a_damaged_log_is_refused_whole(tree: Path, damage: str) -> None:
    assert audit(request(tree)) == 0
    log, before = tree.parent / "undo", modes(tree)
    text = log.read_bytes()
    log.write_bytes(
        {
            "cut": text[: text.rindex(b"\n{") + 1],
            "empty": b"",
            "other": text.replace(b"undo 1", b"undo 2"),
            "no text": b"\xff" + text,
            "deep": b"[" * 100_000,
        }[damage]
    )
    with pytest.raises(UsageError, match="name one that --fix wrote"):
        undo(log, as_json=False)
    assert modes(tree) == before


@pytest.mark.usefixtures("root")
def test_a_log_that_others_could_have_written_is_refused(tree: Path) -> None:
    assert audit(request(tree)) == 0
    log, before = tree.parent / "undo", modes(tree)
    os.chown(log, NOBODY, NOBODY)
    with pytest.raises(UsageError, match=f"can have been written by others .owner {NOBODY}, mode 0600"):
        undo(log, as_json=False)
    os.chown(log, 0, 0)
    log.chmod(0o620)
    with pytest.raises(UsageError, match="can have been written by others"):
        undo(log, as_json=False)
    log.chmod(0o600)
    (tree.parent / "link").symlink_to(log)
    with pytest.raises(UsageError, match="link cannot be read: Too many levels of symbolic links"):
        undo(tree.parent / "link", as_json=False)
    os.mkfifo(tree.parent / "pipe")
    with pytest.raises(UsageError, match="pipe is no file"):
        undo(tree.parent / "pipe", as_json=False)
    assert modes(tree) == before


def test_a_tree_that_is_another_by_now_is_left(tree: Path) -> None:
    assert audit(request(tree)) == 0
    before = modes(tree)
    tree.rename(tree.parent / "moved")
    with pytest.raises(SecurerunError, match="run cannot be looked at .No such file .*; nothing was changed"):
        undo(tree.parent / "undo", as_json=False)
    tree.symlink_to(tree.parent / "moved")
    with pytest.raises(SecurerunError, match="run cannot be looked at"):
        undo(tree.parent / "undo", as_json=False)
    tree.unlink()
    tree.mkdir()
    with pytest.raises(SecurerunError, match="run is not the directory any more that it was; nothing was changed"):
        undo(tree.parent / "undo", as_json=False)
    tree.rmdir()
    (tree.parent / "moved").rename(tree)
    assert modes(tree) == before
    assert undo(tree.parent / "undo", as_json=False) == 0


def test_a_file_system_that_was_mounted_anew_is_still_the_same(tree: Path) -> None:
    """Its device number is another then; that of one mounted in it counts by itself."""
    before = modes(tree)
    assert audit(request(tree)) == 0
    head, *changes, end = _lines(tree.parent / "undo")
    head["roots"][0]["device"] += 1000
    _write(tree.parent / "undo", [head, *({**change, "device": change["device"] + 1000} for change in changes), end])
    assert undo(tree.parent / "undo", as_json=False) == 0
    assert modes(tree) == before


def test_a_single_file_is_mended_and_given_back_alone(tree: Path) -> None:
    before = modes(tree)
    log = tree.parent / "undo"
    # The directory of the file is one of those above it, and everybody's.
    assert audit(Request([tree / "model.pt"], fix=True, undo_log=log)) == 1
    assert modes(tree) == {**before, str(tree / "model.pt"): 0o640}
    assert undo(log, as_json=False) == 0
    assert modes(tree) == before


# People ---------------------------------------------------------------------------------------------------------------


def _answered(tree: Path, answer: str, *words: str) -> tuple[int, str]:
    """Status and output of a --fix by somebody at a terminal."""
    with terminal() as screen:
        arguments = ["audit", "--fix", "--undo-log", str(tree.parent / "undo"), *words, str(tree)]
        screen.type(answer)
        done = subprocess.run(
            [SECURERUNCTL, *arguments], stdin=screen.end, stdout=screen.end, stderr=screen.end, timeout=60, check=False
        )
        return done.returncode, screen.text()


def test_on_a_terminal_somebody_is_asked_after_he_was_shown(tree: Path) -> None:
    before = modes(tree)
    status, said = _answered(tree, "n\n")
    assert status == 1 and modes(tree) == before and not (tree.parent / "undo").exists()
    assert said.index("--fix makes it 0600") < said.index("Take these bits away from 8 files and directories? [y/N]")
    assert "nothing was changed" in said and "9 findings left" in said
    status, said = _answered(tree, "y\n")
    assert status == 0 and modes(tree) == mended(tree)
    assert "8 modes fixed; undo with:" in said


def test_who_has_said_yes_is_not_asked(tree: Path) -> None:
    status, said = _answered(tree, "", "--yes")
    assert (status, "Take these" in said) == (0, False)
    assert modes(tree) == mended(tree)


def test_json_goes_to_a_program_while_somebody_is_asked(tree: Path) -> None:
    with terminal() as screen:
        screen.type("n\n")
        done = subprocess.run(
            [SECURERUNCTL, "audit", "--fix", "--json", str(tree)],
            stdin=screen.end, stdout=subprocess.PIPE, stderr=screen.end, timeout=60, check=False,
        )  # fmt: skip
        assert "Take these bits away" in screen.text()
    document = json.loads(done.stdout)
    assert {each["left"] for each in document["findings"]} == {"it was not wanted"}
    assert document["undo_log"] is None


def test_an_ordinary_user_mends_his_own_and_not_what_is_others(node: Host, root_and_tools: None) -> None:
    with PrivateMachine() as machine:
        alice, bob = machine.add_user("alice"), machine.add_user("bob")
        home = machine.place(alice.home)
        home.chmod(0o755)
        own = machine.write("run/model.pt", "x", owner=alice, mode=0o646)
        bobs = machine.write(f"{alice.home}/run/bobs.pt", "x", mode=0o646)
        os.chown(machine.place(bobs), bob.uid, bob.gid)
        roots = machine.write(f"{alice.home}/run/roots.pt", "x", mode=0o646)
        closed = machine.write(f"{alice.home}/run/closed/model.pt", "x")
        machine.place(closed).parent.chmod(0o700)
        os.chown(machine.place(alice.home) / "run", alice.uid, alice.gid)
        (home / "run").chmod(0o750)

        done = machine.run(node, [SECURERUNCTL, "audit", "--fix", "--json", alice.home], user=alice)
        document = json.loads(done.stdout)
        assert done.returncode == 1, done
        assert {(each["path"], each["problem"]): each["left"] for each in document["findings"]} == {
            (alice.home, "too-open"): None,
            (own, "too-open"): None,
            (bobs, "too-open"): "its owner is a stranger here",
            (bobs, "foreign-owner"): "only modes are fixed",
            (roots, "too-open"): "Operation not permitted",
            (f"{alice.home}/run/closed", "not-looked-at"): "only modes are fixed",
        }
        log = document["undo_log"]
        assert log.startswith(f"{alice.home}/.local/state/securerun/undo/")
        status = machine.place(log).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, alice.uid)
        assert stat.S_IMODE(machine.place(log).parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(machine.place(own).stat().st_mode) == 0o640

        refused = machine.run(node, [SECURERUNCTL, "audit", "--undo", log], user=bob)
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused
        as_root = machine.run(node, [SECURERUNCTL, "audit", "--undo", log])
        assert (as_root.returncode, "can have been written by others" in as_root.stderr) == (2, True), as_root
        undone = machine.run(node, [SECURERUNCTL, "audit", "--undo", log], user=alice)
        # What could not be changed is as it was.
        assert (undone.returncode, undone.stdout) == (0, "3 modes restored of 3\n"), undone
        assert stat.S_IMODE(machine.place(own).stat().st_mode) == 0o646


def test_an_ordinary_users_log_goes_into_his_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    monkeypatch.setenv("HOME", "/home/alice")
    for state, expected in {
        "": "/home/alice/.local/state",
        "relative": "/home/alice/.local/state",
        "/var/s": "/var/s",
    }.items():
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert undolog.default_path().parent == Path(expected) / "securerun/undo"


@pytest.mark.usefixtures("root")
def test_roots_log_goes_where_only_root_looks(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert undolog.default_path().parent == Path("/var/lib/securerun/undo")
    monkeypatch.setattr(undolog, "_ROOTS_DIRECTORY", tree.parent / "state/undo")
    assert audit(Request([tree], fix=True)) == 0
    (log,) = (tree.parent / "state/undo").iterdir()
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    assert undo(log, as_json=False) == 0
