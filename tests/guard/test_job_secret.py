"""What a guard makes of a job's key: a fingerprint for all, a secret in a file for the job's user, and no more."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from attacking import Ground
from checkout import COMMANDS
from conversation import Conversation, guards, log_of, order
from holding import held
from hosts import Host, eventually

from securerun.firewall import job_key
from securerun.firewall.job_key import JobSecret, derive

SECRET = bytes(range(1, 33))
SITE = "0123456789abcdef" * 4
MEETING = "5a" * 32
SITE_KEY, JOBS = "/etc/securerun/site.key", "/run/securerun-jobs"
OF_GUARD = {"required": False, "nodes": 2, "towards": [], "through_any": False, "meeting": MEETING, "in_slurm": False}


def of_launcher(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON's own types
    return {"required": False, "nodes": 2, "towards": [], "through_any": False, "secret": SECRET.hex(), **changes}


def keyed(key: dict[str, Any], **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON's own types
    return order(version=2, key=key, **changes)


def guarding(talk: Conversation, document: dict[str, Any]) -> dict[str, Any]:
    talk.say(document)
    verdict = talk.hear_verdict()
    assert "guarding" in verdict, (verdict, talk.errors())
    found: dict[str, Any] = verdict["guarding"]
    return found


def read_as(ground: Ground, name: str, path: str) -> subprocess.CompletedProcess[str]:
    user = {"alice": ground.alice, "bob": ground.bob}[name]
    return ground.machine.run(ground.node, ["cat", path], user=user)


def may_give_files_away(pid: int) -> bool:
    """Whether a process has CAP_CHOWN, or may have it again."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sets = {name: int(bits, 16) for name, _, bits in (line.partition(":") for line in lines) if name.startswith("Cap")}
    return bool((sets["CapEff"] | sets["CapPrm"]) & 1)


def test_the_jobs_user_alone_reads_its_secret_while_it_runs(ground: Ground) -> None:
    talk = ground.talk(ground.alice, "socket")
    answer = guarding(talk, keyed(of_launcher()))
    path = answer["secret_path"]
    assert answer["fingerprint"] == JobSecret(SECRET).key().fingerprint and "key_source" not in answer
    assert read_as(ground, "alice", path).stdout == JobSecret(SECRET).for_frameworks().hex()
    assert read_as(ground, "bob", path).returncode != 0
    place = ground.machine.place(path)
    found, directory = place.stat(), place.parent.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o400, ground.alice.uid)
    assert (stat.S_IMODE(directory.st_mode) & 0o007, directory.st_uid) == (0, 0)
    talk.release()
    assert eventually(lambda: not ground.machine.place(JOBS).exists(), seconds=5)


def test_what_the_guard_makes_for_a_user_is_no_place_for_more(ground: Ground) -> None:
    """/run is small: whoever filled it would keep the next guards from their records."""
    talk = ground.talk(ground.alice, "socket")
    place = str(Path(guarding(talk, keyed(of_launcher()))["secret_path"]).parent)
    for attempt in (f"touch {place}/more", f"rm -f {place}/secret", f"mkdir {place}/more", f"chmod 777 {place}"):
        assert ground.run(ground.alice, ["sh", "-c", attempt]).returncode != 0, attempt
    talk.release()


def test_bytes_of_the_key_are_nowhere_but_in_the_guard(ground: Ground) -> None:
    talk = ground.talk(ground.alice, "socket")
    answer = guarding(talk, keyed(of_launcher()))
    key = JobSecret(SECRET).key()
    (guard,) = guards(ground.machine)
    run = answer["secret_path"].split("/")[-2]
    record = ground.machine.place(f"/run/securerun/{run}.json").read_bytes()
    texts = [record, log_of(ground.machine).encode(), Path(f"/proc/{guard}/cmdline").read_bytes()]
    texts += [Path(f"/proc/{guard}/environ").read_bytes(), json.dumps(answer).encode()]
    for secret in (SECRET, key.syn, key.syn_ack):
        assert not any(secret in text or secret.hex().encode() in text for text in texts)
    assert json.loads(record)["key"] == key.fingerprint
    (core,) = (line for line in Path(f"/proc/{guard}/limits").read_text().splitlines() if "core" in line)
    assert core.split()[4:6] == ["0", "0"], "it leaves no core"
    talk.release()


def test_a_guard_gives_up_what_only_the_beginning_took(ground: Ground) -> None:
    talk = ground.talk(ground.alice, "socket")
    guarding(talk, keyed(of_launcher()))
    (guard,) = guards(ground.machine)
    assert eventually(lambda: not may_give_files_away(guard), seconds=2)
    talk.release()


def test_whoever_names_another_users_meeting_gets_a_key_of_their_own(ground: Ground) -> None:
    ground.machine.write(SITE_KEY, SITE, mode=0o400)
    found = {}
    for user in (ground.alice, ground.bob):
        talk = ground.talk(user, "sudo" if user is ground.bob else "socket")
        answer = guarding(talk, keyed(OF_GUARD))
        found[user.name] = answer["fingerprint"]
        expected = derive(SITE.encode(), job_key.OF_SITE, bytes.fromhex(MEETING), user.uid)
        assert (answer["fingerprint"], answer["key_source"]) == (expected.key().fingerprint, SITE_KEY)
        talk.release()
    assert found["alice"] != found["bob"]
    ground.machine.place(SITE_KEY).unlink()


def test_a_job_that_is_to_have_a_key_and_has_none_is_not_started(ground: Ground) -> None:
    said = ground.refusal(ground.alice, keyed({**OF_GUARD, "required": True}))
    assert "securerunctl setup key" in said and "\n" not in said
    ground.machine.write(SITE_KEY, SITE, mode=0o444)
    said = ground.refusal(ground.alice, keyed({**OF_GUARD, "required": True}))
    assert "mode 444" in said and SITE[:8] not in said
    ground.machine.place(SITE_KEY).unlink()


def test_a_key_that_only_adds_is_gone_without_where_it_cannot_be_had(ground: Ground) -> None:
    ground.machine.write(SITE_KEY, SITE, mode=0o444)
    talk = ground.talk(ground.alice, "socket")
    answer = guarding(talk, keyed(OF_GUARD))
    assert "fingerprint" not in answer and any("no key" in note and "mode 444" in note for note in answer["notes"])
    talk.release()
    ground.machine.place(SITE_KEY).unlink()
    talk = ground.talk(ground.alice, "socket")
    answer = guarding(talk, keyed(OF_GUARD))
    assert not any("key" in note for note in answer["notes"]), "nothing is wrong where there is nothing"
    talk.release()


def test_without_a_shield_there_is_nobody_to_ask_for_a_tag(ground: Ground) -> None:
    talk = ground.talk(ground.alice, "socket")
    answer = guarding(talk, keyed(of_launcher(), scope="ports", peers=[ground.peer.ipv4]))
    assert "fingerprint" not in answer and any("no key" in note for note in answer["notes"])
    talk.release()
    assert "only the shield" in ground.refusal(ground.alice, keyed(of_launcher(required=True), scope="ports"))


def test_status_has_the_fingerprint_for_people_who_compare_nodes(ground: Ground) -> None:
    talk = ground.talk(ground.alice, "socket")
    answer = guarding(talk, keyed(of_launcher()))
    words = ground.run(ground.alice, [str(COMMANDS / "securerunctl"), "status"]).stdout
    assert f"{answer['fingerprint']}; 1 of 2 nodes guarded" in words
    assert "whoever has the job's key" in words
    (run,) = json.loads(ground.run(ground.alice, [str(COMMANDS / "securerunctl"), "status", "--json"]).stdout)["runs"]
    assert run["key"] == {"fingerprint": answer["fingerprint"], "source": None}
    assert (run["nodes_guarded"], run["nodes"]) == (1, 2)
    talk.release()


@pytest.mark.parametrize("also_launcher", [False, True], ids=["the guard", "launcher and guard"])
def test_the_secret_goes_with_the_job_whoever_is_killed(node: Host, also_launcher: bool) -> None:
    with held(node, "--key", SECRET.hex()) as holder:
        path = Path(holder.start["secret"])
        assert path.read_text() == JobSecret(SECRET).for_frameworks().hex()
        guard = int(json.loads(Path(f"/run/securerun/{holder.run_id}.json").read_text())["guard"])
        if also_launcher:
            os.kill(holder.process.pid, signal.SIGSTOP)
        os.kill(guard, signal.SIGKILL)
        if not also_launcher:
            holder.hear_of("another has taken over")
            assert path.read_text() == JobSecret(SECRET).for_frameworks().hex()
            holder.let_go()
        else:
            holder.process.kill()
            holder.process.wait()
            assert eventually(lambda: node.run([str(COMMANDS / "securerunctl"), "clean"]).returncode == 0, seconds=5)
        assert eventually(lambda: not path.exists(), seconds=5)
    assert not path.parent.parent.exists()
