"""A team shares its checkpoints as docs/troubleshooting.md says: by the directory, and by no umask looser than 0027."""

from __future__ import annotations

import os
from pathlib import Path

from checkout import COMMANDS
from hosts import Network
from users import GUARD, PrivateMachine

JOB = (str(COMMANDS / "securerunctl"), "exec", "--peers", "localhost", "--preflight", "off", "--")
AUDIT = str(COMMANDS / "securerunctl")
REPLACE = "import os, pathlib; pathlib.Path('new').write_text('theirs'); os.replace('new', 'model.pt')"


def test_members_of_a_group_read_and_replace_what_the_others_jobs_wrote_and_nobody_else_does(network: Network) -> None:
    node = network["node0"]
    with PrivateMachine() as machine:
        alice, bob = (machine.add_user(name, groups=["hpc"]) for name in ("alice", "bob"))
        carol = machine.add_user("carol")
        machine.allow_sudo(f"alice ALL=(root) NOPASSWD: {GUARD}")
        place = "/run/home/shared"
        machine.run(node, ["install", "-d", "-m", "2770", "-g", "hpc", place]).check_returncode()
        refused = machine.run(node, [*JOB[:2], "--umask", "0007", *JOB[2:], "true"], user=alice)
        assert refused.returncode == 78 and "umask 0007 would leave new files open" in refused.stderr
        write = f"echo weights > {place}/model.pt; mkdir {place}/step1; stat -c '%a %G' {place}/*"
        done = machine.run(node, [*JOB, "sh", "-c", write], user=alice)
        assert done.stdout == "640 hpc\n2750 hpc\n", done
        assert machine.run(node, ["cat", f"{place}/model.pt"], user=bob).stdout == "weights\n"
        assert machine.run(node, ["sh", "-c", f"echo mine > {place}/model.pt"], user=bob).returncode != 0
        assert machine.run(node, ["sh", "-c", f'cd {place} && python -c "{REPLACE}"'], user=bob).returncode == 0
        assert machine.run(node, ["cat", f"{place}/model.pt"], user=bob).stdout == "theirs"
        assert machine.run(node, ["touch", f"{place}/step1/mine"], user=bob).returncode != 0
        for command in (["cat", f"{place}/model.pt"], ["touch", f"{place}/mine"]):
            assert machine.run(node, command, user=carol).returncode != 0


def test_audit_takes_a_shared_directory_by_a_row_of_its_own(network: Network, tmp_path: Path) -> None:
    shared = tmp_path / "ckpt" / "shared"
    shared.mkdir(parents=True)
    (tmp_path / "ckpt").chmod(0o750)
    os.chown(shared, 0, 1)
    shared.chmod(0o2770)
    (shared / "model.pt").touch(mode=0o640)
    kinds = tmp_path / "kinds"
    kinds.write_text(f"{shared}/   upgrade\n")
    plain, with_row = (
        network["node0"].run([AUDIT, "audit", *more, str(tmp_path / "ckpt")], umask=0o027)
        for more in ([], ["--kinds", str(kinds)])
    )
    assert plain.returncode == 1 and f"{shared}: 2770, may be 0750 at most" in plain.stdout, plain
    assert with_row.returncode == 0, with_row
