"""--key: which file a job's key is of, what goes into it besides, and who comes in by it."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from securerun.errors import PolicyError
from securerun.job import key, meeting
from securerun.job.job import C10D, STATIC, Endpoint, Job, explicit_id
from securerun.options import Options, resolve, take

SECRET = "0123456789abcdef" * 4
JOB = Job(STATIC, Endpoint("node0", 29500), 2, 2, 0, ("train.py",))
SLURM = {"SLURM_JOB_ID": "4711"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a key, on a host without one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(key, "SITE_KEY", tmp_path / "site.key")
    return tmp_path


def put(path: Path, content: str = SECRET, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n")
    path.chmod(mode)
    return path


def find(asked: str = "auto", job: Job = JOB, environment: dict[str, str] | None = None) -> key.Key:
    return key.find(Options(key=asked), job, environment or {})


def test_without_any_source_the_guard_is_not_asked(home: Path) -> None:
    assert find() == key.Key()


def test_the_users_key_adds_and_a_named_one_narrows(home: Path) -> None:
    users = put(home / ".config/securerun/key")
    named = put(home / "another", SECRET[::-1])
    found = find()
    assert found.source == str(users) and not found.is_required
    assert find("require").is_required and find("require").fingerprint == found.fingerprint
    of_file = find(str(named))
    assert of_file.is_required and of_file.source == str(named) and of_file.fingerprint != found.fingerprint
    assert find("off") == key.Key()


def test_the_same_file_is_the_same_key_whatever_it_is_called(home: Path) -> None:
    put(home / ".config/securerun/key")
    put(home / "copied", f"{SECRET}\r\n")
    assert find().fingerprint == find(str(home / "copied")).fingerprint == find("~/copied").fingerprint != ""


def test_a_job_of_one_node_has_a_key_only_where_one_is_asked_for(home: Path) -> None:
    put(home / ".config/securerun/key")
    alone = replace(JOB, min_nodes=1, max_nodes=1)
    assert find(job=alone) == key.Key()
    assert find("require", alone).is_required


def test_the_guard_is_asked_where_it_may_have_one(home: Path) -> None:
    of_slurm = find(environment=SLURM).order
    assert of_slurm is not None and of_slurm.in_slurm and not of_slurm.required and of_slurm.secret is None
    put(home / "site.key", mode=0o400)
    of_site = find().order
    assert of_site is not None and not of_site.in_slurm and of_site.secret is None
    asked = find("require").order
    assert asked is not None and asked.required and asked.nodes == 2


def test_a_users_own_key_is_never_passed_over(home: Path) -> None:
    """Whoever made one means it: a launch that went on without would be open to more than they believe."""
    users = put(home / ".config/securerun/key", mode=0o644)
    with pytest.raises(PolicyError, match=r"mode 644.*chmod go-rwx.*--key off"):
        find()
    users.unlink()
    users.mkdir()
    with pytest.raises(PolicyError, match="is a directory"):
        find()
    users.rmdir()
    users.symlink_to("nowhere")
    with pytest.raises(PolicyError, match="symbolic link"):
        find()


def test_a_word_that_is_none_and_no_file_is_refused(home: Path) -> None:
    with pytest.raises(PolicyError, match=r"there is no file requre, nor is it one of auto, off, require"):
        find("requre")
    with pytest.raises(PolicyError, match=r"there is no file /nowhere/key; `securerunctl setup key`"):
        find("/nowhere/key")
    with pytest.raises(PolicyError, match="write the whole path"):
        find("~nobody.of.that.name/key")


@pytest.mark.parametrize("given", [SECRET, SECRET.upper(), "c2VjcmV0IGJ5dGVzIHRoYXQgYXJlIG5vYm9keSBlbHNlJ3M="])
def test_a_key_in_place_of_its_file_is_not_repeated(given: str) -> None:
    with pytest.raises(PolicyError, match="takes the name of a file") as refusal:
        find(given)
    assert given[:12] not in str(refusal.value)


def test_the_option_comes_from_flag_environment_and_site_file(tmp_path: Path) -> None:
    site = tmp_path / "config.toml"
    site.write_text('key = "require"\n')
    assert resolve({}, {}, site).key == "require"
    assert resolve({}, {"SECURERUN_KEY": "off"}, site).key == "off"
    taken, _ = take(["--key", "/etc/keys/one", "train.py"], lambda _: None)
    asked = resolve(taken, {"SECURERUN_KEY": "off"}, site)
    assert (asked.key, asked.key_source) == ("/etc/keys/one", "--key")
    assert resolve({}, {}, tmp_path / "none").key == "auto"


ALIKE: list[tuple[Job, dict[str, str]]] = [
    (JOB, {}),
    (replace(JOB, endpoint=Endpoint("10.0.0.1", 29500), node_rank=1), {}),
    (replace(JOB, endpoint=Endpoint("localhost", 29500), local_address="node0"), {}),
    (replace(JOB, rendezvous_id=explicit_id("none")), {}),
    (replace(JOB, backend=C10D, min_nodes=1, max_nodes=4), {}),
    (JOB, {"SLURM_JOB_ID": " ", "JOB_ID": "7"}),
]
APART: list[tuple[Job, dict[str, str]]] = [
    (JOB, {}),
    (replace(JOB, endpoint=Endpoint("node0", 29501)), {}),
    (replace(JOB, endpoint=None), {}),
    (replace(JOB, rendezvous_id="one"), {}),
    (replace(JOB, rendezvous_id="two"), {}),
    (replace(JOB, rendezvous_id="two\udc80"), {}),
    (replace(JOB, rendezvous_id='two", 29500'), {}),
    (JOB, SLURM),
    (JOB, {"PBS_JOBID": "4711"}),
    (JOB, {"SLURM_JOB_ID": "4712"}),
    (JOB, {"LSB_JOBID": "4711", "LSB_JOBINDEX": "1"}),
    (JOB, {"LSB_JOBID": "4711", "LSB_JOBINDEX": "2"}),
    (JOB, {"LSB_JOBID": "4711", "LSB_JOBINDEX": "0"}),
    (replace(JOB, rendezvous_id="4711"), SLURM),
]


def test_all_nodes_of_a_job_come_to_the_same_meeting_and_no_other_job_does() -> None:
    assert len({key.meeting(job, environment) for job, environment in ALIKE}) == 1
    assert len({key.meeting(job, environment) for job, environment in APART}) == len(APART)
    assert key.meeting(replace(JOB, rendezvous_id="4711"), SLURM) == key.meeting(
        replace(JOB, rendezvous_id="4711"), {}
    ), "an id that was given goes before the batch system's"


def test_parts_of_a_heterogeneous_job_are_one_job() -> None:
    first = {"SLURM_JOB_ID": "100", "SLURM_HET_JOB_ID": "100"}
    second = {"SLURM_JOB_ID": "101", "SLURM_HET_JOB_ID": "100"}
    assert key.meeting(JOB, first) == key.meeting(JOB, second) == key.meeting(JOB, {"SLURM_JOB_ID": "100"})


def test_root_reads_a_users_file_that_a_server_of_nfs_keeps_from_root(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With root squashed the server says no to root, or that the file is nobody's."""
    path = put(home / "key")
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def squashed(*_: object, **__: object) -> int:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "open", squashed)
    with pytest.raises(PolicyError, match="root_squash"):
        find(str(path))


def test_the_guard_is_told_where_the_job_meets_also_where_no_node_has_that_address(home: Path) -> None:
    """A Service's, or one that a router translates: tags have to be written towards it too."""
    put(home / ".config/securerun/key")
    service = ("203.0.113.7", "2001:db8::7", "fe80::1%eth0")
    job = replace(JOB, endpoint=Endpoint("service", 29500))
    towards = meeting.addresses(job, lambda _: service)
    assert [str(network) for network in towards] == ["203.0.113.7/32", "2001:db8::7/128"]
    order = find().met_at(towards).order
    assert order is not None and order.towards == towards and key.Key().met_at(towards) == key.Key()
    assert meeting.addresses(replace(JOB, endpoint=Endpoint("localhost", 29500))) == ()
    assert len(meeting.addresses(job, lambda _: tuple(f"10.0.{n}.1" for n in range(100)))) == 64


def test_where_the_same_file_makes_another_key_people_can_see_why(home: Path) -> None:
    put(home / ".config/securerun/key")
    named = replace(JOB, rendezvous_id="run\n7")
    elsewhere = replace(JOB, endpoint=Endpoint("node0", 29501))
    found = [
        find(),
        find(job=named),
        find(environment=SLURM),
        find(job=elsewhere),
        find(job=replace(JOB, endpoint=None)),
    ]
    assert [each.made_for for each in found] == [
        "no --rdzv-id or batch job, and port 29500",
        "--rdzv-id run\\n7, and port 29500",
        "job 4711 of slurm, and port 29500",
        "no --rdzv-id or batch job, and port 29501",
        "no --rdzv-id or batch job, and no port",
    ]
    assert len({each.fingerprint for each in found}) == len(found)
    assert len(find(job=replace(JOB, rendezvous_id="7" * 9999)).made_for) < 100


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ELOOP])
def test_where_a_users_key_cannot_be_looked_for_they_hear_of_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A home of the network without a ticket, or of somebody else's: a key may be there."""
    path = put(home / ".config/securerun/key")
    look = os.lstat

    def lstat(name: os.PathLike[str], **how: int) -> os.stat_result:
        if Path(name) == path:
            raise OSError(number, os.strerror(number))
        return look(name, **how)

    monkeypatch.setattr(os, "lstat", lstat)
    found = find()
    assert found.order is None and f"{path} cannot be looked for ({os.strerror(number)})" in found.doubt
    put(home / "site.key")
    found = find()
    assert found.order is not None and "--key off" in found.doubt
    with pytest.raises(PolicyError, match="cannot be looked for"):
        find("require")
    assert find("off") == find(job=replace(JOB, min_nodes=1, max_nodes=1)) == key.Key()
