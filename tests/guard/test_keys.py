"""The keys that a guard makes of what only root reads: which file, and for whom; and that nothing else is believed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from securerun.errors import PrivilegeError
from securerun.firewall import job_key
from securerun.firewall.job_key import derive
from securerun.guard import keys, limits
from securerun.guard.keys import Found, find
from securerun.guard.limits import SitePolicy, _understood
from securerun.guard.protocol import KeyOrder

SITE, MUNGE, SLURM = (bytes([first, *range(100, 163)]) for first in range(3))
MEETING = bytes(range(32))
WANTED = KeyOrder(required=False, meeting=MEETING)
IN_SLURM = KeyOrder(required=False, meeting=MEETING, in_slurm=True)


@dataclass(frozen=True)
class Caller:
    """Whom a guard serves, as far as their key goes."""

    user: int = 6001
    is_root: bool = False


@dataclass(frozen=True)
class Files:
    """Where the guard looks, on a host without any of it."""

    site: Path
    configuration: Path
    munge: Path
    slurm: Path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: None) -> Files:
    # The way to pytest's own directories leads through /tmp, which is sticky: root's, and nobody's to change.
    found = Files(*(tmp_path / name for name in ("site.key", "slurm.conf", "munge.key", "slurm.key")))
    monkeypatch.setattr(keys, "SITE_KEY", found.site)
    monkeypatch.setattr(keys, "SLURM_CONFIGURATIONS", (tmp_path / "none.conf", found.configuration))
    monkeypatch.setattr(keys, "MUNGE_KEYS", (tmp_path / "none", found.munge))
    monkeypatch.setattr(keys, "SLURM_KEYS", (found.slurm,))
    monkeypatch.setattr(limits, "read_site_policy", lambda: (SitePolicy(), ""))
    return found


def put(path: Path, content: bytes, mode: int = 0o400) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def asked(wanted: KeyOrder = WANTED, caller: Caller = Caller(), site: SitePolicy = SitePolicy()) -> Found:  # noqa: B008 - frozen
    return find(wanted, caller, site)  # type: ignore[arg-type]


def test_the_launchers_own_secret_is_taken_as_it_is(files: Files) -> None:
    secret = derive(SITE, job_key.OF_USER, MEETING)
    put(files.site, SITE)
    assert asked(KeyOrder(required=True, secret=secret)) == Found(secret)


def test_without_a_source_there_is_no_key_and_nothing_is_wrong(files: Files) -> None:
    for wanted in (WANTED, IN_SLURM):
        found = asked(wanted)
        assert found.secret is None and not found.is_wrong and str(files.site) in found.why


def test_of_the_sites_key_each_user_has_keys_of_their_own(files: Files) -> None:
    put(files.site, SITE)
    found = asked()
    assert found == Found(derive(SITE, job_key.OF_SITE, MEETING, 6001), str(files.site))
    other = asked(caller=Caller(user=6002))
    assert other.secret == derive(SITE, job_key.OF_SITE, MEETING, 6002) != found.secret
    assert asked(caller=Caller(user=0, is_root=True)).secret == derive(SITE, job_key.OF_SITE, MEETING, 0)


def test_root_in_a_container_is_nobody_that_the_site_knows(files: Files) -> None:
    """User id 0 is the root of each container whose tenant may have any number."""
    put(files.site, SITE)
    found = asked(caller=Caller(user=0))
    assert found.secret is None and "container" in found.why


def test_the_site_can_keep_its_key_to_itself(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    put(files.site, SITE)
    off = _understood({"site_key": "off"})
    assert asked(site=off).secret is None and "guard.toml" in asked(site=off).why
    assert asked(site=_understood({"site_key": "auto"})).secret is not None
    root = Caller(user=0, is_root=True)
    monkeypatch.setattr(limits, "read_site_policy", lambda: (off, ""))
    assert asked(caller=root).secret is None, "root, who is under no limit, as well"

    def unreadable() -> tuple[SitePolicy, str]:
        raise PrivilegeError("guard.toml cannot be understood")

    monkeypatch.setattr(limits, "read_site_policy", unreadable)
    assert asked(caller=root).secret is None


@pytest.mark.parametrize("value", [True, False, "on", "", 1, ["off"]])
def test_the_switch_takes_two_words(value: object) -> None:
    with pytest.raises(ValueError, match="site_key"):
        _understood({"site_key": value})


@pytest.mark.parametrize("said", ["", "AuthType=auth/munge", "authtype = AUTH/MUNGE # the default", "AuthType=munge"])
def test_in_a_job_of_slurms_the_key_is_of_munges(files: Files, said: str) -> None:
    put(files.munge, MUNGE)
    put(files.configuration, f"ClusterName=test\n#AuthType=auth/none\n{said}\n".encode(), 0o644)
    assert asked(IN_SLURM) == Found(derive(MUNGE, job_key.OF_SLURM, MEETING, 6001), str(files.munge))
    assert asked(WANTED).secret is None, "a host's munge key outside of Slurm is no source: each host has its own"


def test_in_a_job_of_slurms_the_key_is_of_slurms_own(files: Files) -> None:
    put(files.munge, MUNGE)
    put(files.slurm, SLURM)
    put(files.configuration, b"AuthType=auth/slurm\n", 0o644)
    assert asked(IN_SLURM) == Found(derive(SLURM, job_key.OF_SLURM, MEETING, 6001), str(files.slurm))


def test_without_slurm_or_with_another_way_to_prove_oneself_there_is_none(files: Files) -> None:
    put(files.munge, MUNGE)
    assert asked(IN_SLURM).secret is None, "no slurm.conf"
    put(files.configuration, b"AuthType=auth/none\n", 0o644)
    assert asked(IN_SLURM).secret is None


def test_the_sites_key_goes_before_slurms(files: Files) -> None:
    put(files.site, SITE)
    put(files.munge, MUNGE)
    put(files.configuration, b"", 0o644)
    assert asked(IN_SLURM).source == str(files.site)


def test_munges_key_belongs_to_munge(files: Files) -> None:
    put(files.munge, MUNGE)
    put(files.configuration, b"", 0o644)
    os.chown(files.munge, 4711, -1)
    assert asked(IN_SLURM).secret is not None


def test_a_key_of_the_sites_that_others_know_is_not_used_nor_is_another_in_its_place(files: Files) -> None:
    put(files.munge, MUNGE)
    put(files.configuration, b"", 0o644)
    put(files.site, SITE, 0o444)
    for spoil in (
        "true",
        "chmod 400 site.key; chown 4711 site.key",
        "rm site.key; mkdir site.key",
        "rmdir site.key; mkfifo -m 400 site.key",
        "rm site.key; ln -s munge.key site.key",
        "rm site.key; install -m 400 /dev/null site.key",
        "echo short > site.key",
    ):
        subprocess.run(["sh", "-ec", spoil], cwd=files.site.parent, check=True)
        found = asked(IN_SLURM)
        assert found.secret is None and found.is_wrong and found.why.count(str(files.site)) == 1, found.why
        assert "\n" not in found.why


def test_a_directory_that_others_can_write_to_holds_no_key(files: Files) -> None:
    put(files.site, SITE)
    files.site.parent.chmod(0o777)
    found = asked()
    files.site.parent.chmod(0o700)
    assert found.secret is None and "can be written by others" in found.why
