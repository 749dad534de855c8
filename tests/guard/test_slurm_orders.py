"""What an order says of a job of Slurm's: exactly one of two things, with a cgroup that is Slurm's or none at all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_protocol import ORDER

from securerun.guard import records, slurm_job
from securerun.guard.documents import ProtocolError
from securerun.guard.protocol import decode, encode
from securerun.guard.slurm_job import SlurmJob

CGROUP = "/system.slice/slurmstepd.scope/job_7"
WHOLE = SlurmJob(7, speaks=True, renews=True, user=1000, cgroup=CGROUP, more="login1,10.0.0.0/8")
TASK = SlurmJob(7, speaks=False, renews=True)


@pytest.mark.parametrize("job", [TASK, WHOLE, SlurmJob(2**32 - 1), replace(WHOLE, more="", user=0)])
def test_an_order_for_a_job_of_slurms_survives_the_way(job: SlurmJob) -> None:
    line = encode(replace(ORDER, slurm=job))
    assert decode(line) == replace(ORDER, slurm=job)
    assert "slurm" not in json.loads(encode(ORDER))["order"], "guards from before know nothing of it"


def changed(whole: SlurmJob, /, **changes: object) -> bytes:
    """An order with these fields of the job changed; None takes one away."""
    document = json.loads(encode(replace(ORDER, slurm=whole)))
    said = {**document["order"]["slurm"], **changes}
    document["order"]["slurm"] = {name: value for name, value in said.items() if value is not None}
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "line",
    [
        changed(TASK, job=0),
        changed(TASK, job=-1),
        changed(TASK, job=2**32),
        changed(TASK, job="7"),
        changed(TASK, job="7; reboot"),
        changed(TASK, job=True),
        changed(TASK, speaks=1),
        changed(TASK, renews=None),
        changed(TASK, user=0),
        changed(TASK, more="10.0.0.0/8"),
        changed(WHOLE, cgroup=None),
        changed(WHOLE, user=None),
        changed(WHOLE, user=-1),
        changed(WHOLE, user=2**32 - 1),
        changed(WHOLE, more="a\nb"),
        changed(WHOLE, more="x" * 5000),
        changed(WHOLE, job=8),
        *(
            changed(WHOLE, cgroup=cgroup)
            for cgroup in (
                "",
                "/",
                "job_7",
                "/job_7",
                "/system.slice/job_7",
                "/system.slice/sshd.scope/job_7",
                "/system.slice/slurmstepd.scope/job_77",
                "/system.slice/slurmstepd.scope/job_7/step_0",
                "/system.slice/slurmstepd.scope/../slurmstepd.scope/job_7",
                "/system.slice/slurmstepd.scope/job_7\0",
                "/system.slice/slurmstepd.scope/job_7\n",
                "system.slice/slurmstepd.scope/job_7",
                f"/{'x' * 2000}/slurmstepd.scope/job_7",
            )
        ),
    ],
)
def test_a_job_of_slurms_that_is_not_exactly_one_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line)


@pytest.mark.parametrize(
    ("path", "number", "is_one"),
    [
        (CGROUP, 7, True),
        ("/system.slice/cn1_slurmstepd.scope/job_7", 7, True),
        (CGROUP, 0, False),
        (CGROUP, 8, False),
        ("/system.slice/slurmstepd.scope/job_0", 0, False),
        ("/system.slice/a b_slurmstepd.scope/job_7", 7, False),
    ],
)
def test_a_record_names_the_cgroup_of_its_own_job_alone(path: str, number: int, is_one: bool) -> None:
    """A reaper removes it, and what is below it."""
    assert slurm_job.is_cgroup_of(path, number) is is_one
    fields = {**dict.fromkeys(("launcher", "launcher_start", "guard", "guard_start", "network", "processes"), 1)}
    document = {**fields, "boot_id": "", "user": 0, "started": 0.0, "command": "", "draining": False}
    if is_one:
        assert records._plain_fields({**document, "cgroup": path, "slurm_job": number}, "0" * 12)["cgroup"] == path
        return
    with pytest.raises(ValueError, match="names a cgroup that is not of its run"):
        records._plain_fields({**document, "cgroup": path, "slurm_job": number}, "0" * 12)
