"""securerunctl setup key: a key that its user alone can read, made once, and how the other nodes get it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import COMMANDS
from hosts import environment

from securerun.ctl import key as command
from securerun.errors import PolicyError, PrivilegeError
from securerun.job.key import users_file
from securerun.linux import secret_file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_key_is_where_securerun_looks_and_its_users_alone(home: Path) -> None:
    wide = {"HOME": str(home)}
    done = subprocess.run(
        ["sh", "-c", 'umask 0; exec "$0" setup key', str(COMMANDS / "securerunctl")],
        env=environment(wide),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    path = home / ".config/securerun/key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["key"]
    text = path.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}\n", text) and len(secret_file.read(path, {os.geteuid()})) == 64
    assert text[:8] not in done.stdout + done.stderr, "it is shown to nobody"
    assert "scp -p ~/.config/securerun/key NODE:" in done.stdout


def test_nothing_is_written_over(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.make(None, for_site=False)
    path = home / ".config/securerun/key"
    before = path.read_text()
    with pytest.raises(PolicyError, match="is there already"):
        command.make(None, for_site=False)
    assert path.read_text() == before and os.listdir(path.parent) == ["key"]
    for there in ("a file", "nothing"):
        link = home / there
        link.symlink_to(home / "nowhere" if there == "nothing" else path)
        with pytest.raises(PolicyError, match="is there already"):
            command.make(str(link), for_site=False)
        assert link.is_symlink() and path.read_text() == before
    assert not (home / "nowhere").exists()


def test_of_many_at_once_one_makes_it(home: Path) -> None:
    program = "from securerun.ctl import key; key.make(None, for_site=False)"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]
    assert sorted(process.wait() for process in started) == [0, 1, 1, 1]
    assert os.listdir(home / ".config/securerun") == ["key"]


def test_a_file_by_name_is_made_too_and_its_directory_must_be_ones_own(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.make(str(home / "keys of mine" / "one"), for_site=False)
    assert f"securerun --key '{home}/keys of mine/one' ..." in capsys.readouterr().out
    (home / "open").mkdir()
    (home / "open").chmod(0o777)
    with pytest.raises(PrivilegeError, match="can be written by others"):
        command.make(str(home / "open/key"), for_site=False)
    assert os.listdir(home / "open") == []
    with pytest.raises(PrivilegeError, match="cannot be made"):
        command.make("/proc/key", for_site=False)


def test_the_sites_key_is_roots_to_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SITE_KEY", home / "etc/site.key")
    command.make(None, for_site=True)
    assert stat.S_IMODE((home / "etc/site.key").stat().st_mode) == 0o400


def test_root_by_sudo_makes_no_key_that_its_user_cannot_read(
    home: Path, monkeypatch: pytest.MonkeyPatch, root: None
) -> None:
    os.chown(home, 4711, -1)
    with pytest.raises(PrivilegeError, match="without sudo"):
        command.make(None, for_site=False)
    os.chown(home, 0, -1)
    assert os.listdir(home) == []


def test_a_name_that_no_file_can_have_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for place in (".", "..", "/", "~", f"{home}/"):
        with pytest.raises(PolicyError, match="is a directory; name the file in it"):
            command.make(place, for_site=False)
    with pytest.raises(PolicyError, match="write the whole path"):
        command.make("~nobody-of-that-name/key", for_site=False)
    assert os.listdir(home) == []


def test_no_key_is_made_where_no_launch_would_find_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", "here")
    with pytest.raises(PolicyError, match="'here', which is no absolute path"):
        command.make(None, for_site=False)
    with pytest.raises(PolicyError, match="name of the file is empty"):
        command.make("", for_site=False)  # as of a variable that is not set
    assert os.listdir(home) == []
    found, doubt = users_file()
    assert found is None and "'here', which is no absolute path" in doubt


def test_a_user_id_that_nobody_knows_without_a_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that was given the number of a user."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    with pytest.raises(PolicyError, match=r"~/\.config/securerun/key: .*; write the whole path of a file"):
        command.make(None, for_site=False)


@pytest.mark.parametrize("name", ["auto", "off", "require", "-x"])
def test_what_is_printed_for_a_key_takes_its_name_for_a_files(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(home)
    command.make(name, for_site=False)
    printed = capsys.readouterr().out
    assert f"securerun --key ./{name} ..." in printed and f"scp -p ./{name} NODE:./{name}" in printed
