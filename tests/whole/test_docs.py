"""Every command of README and docs is run as it stands there, and what the pages say twice is the same twice.

A page has its commands in fenced blocks: `sh` blocks are run, all lines of one in one shell; `python` and `toml` blocks
are run and read; `text` blocks are pictures and output. They run on the hosts of `hosts.Network`, in a machine of
`users.PrivateMachine` with the accounts, names and files that the pages speak of.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import second_network
import yaml
from checkout import CHECKOUT, COMMANDS
from containers import DOCKER_CAPABILITIES, READ_ONLY_CGROUPS, WRITABLE_CGROUPS, container
from hosts import Network, eventually, hear, kill_group, machine_snapshot
from pages import DIRECTORY, Block, Stage, blocks_of
from torchless import needs_torch
from users import PrivateMachine

README, CHINESE = CHECKOUT / "README.md", CHECKOUT / "README.zh.md"
DEVELOPERS = (CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "SECURITY.md")
PAGES = (README, CHINESE, *DEVELOPERS, *sorted((CHECKOUT / "docs").glob("*.md")))
# What else is written for whoever reads the code.
TOLD = tuple(CHECKOUT / "docs" / name for name in ("decisions.md", "glossary.md", "how-it-works.md", "threat-model.md"))
LANGUAGES = {"sh", "python", "toml", "yaml", "json", "text"}

# What stands for something that this machine has not, or that would take long.
SUBSTITUTIONS = (
    ("--nproc-per-node 8", "--nproc-per-node 1"),
    ("--nproc-per-node=8", "--nproc-per-node=1"),
    ("--nproc_per_node 8", "--nproc_per_node 1"),
    ("/workspace/train.py", "train.py"),
    ("/data/ckpt", "ckpt"),
)
# Blocks that other tests run: by what they begin with, the file and the test.
ELSEWHERE = {
    "cd examples/slurm && sbatch": (
        "test_examples.py",
        "test_slurm_job_trains_on_both_nodes_and_the_stranger_reaches_nothing",
    ),
    "securerun --nnodes 2 --node-rank $NODE_RANK --master-addr node0 --master-port 6000 train.py": (
        "test_training_by_key.py",
        "test_a_key_that_was_copied_is_all_that_it_takes_and_nobody_else_comes_in",
    ),
    "scripts/quickstart.sh": ("test_docs.py", "test_quickstart_keeps_its_promises"),
}
# And pages all of whose commands another test runs.
PAGES_ELSEWHERE = {
    "launchers.md": ("test_other_launchers.py", "test_stranger_cannot_reach_any_port_of_what_the_page_has_written"),
}
# Commands whose status is 1 where they find something, as on the hosts of the tests.
FINDS = re.compile(r"securerunctl (doctor|audit)\b")
# Scripts of the developers': what they do is what runs all this.
SCRIPTS = re.compile(r"scripts/[\w-]+\.(?:sh|py)")

FILES = {
    "train.py": "print('trained')\n",
    "examples/train.py": "print('trained')\n",
    "pretrain.sh": "echo trained\n",
    "hostfile.txt": "node0\nnode1\n",
    "run/config.yaml": "lr: 0.1\n",
    "ckpt/model.pt": "weights\n",
    "../training/worker.log": "loss 0.1\n",
}
# What docs/troubleshooting.md has its reader look for.
QUOTED = (
    "nothing says which hosts they are",
    "names this host alone",
    "no guard is available to user ",
    "no guard is available in this user namespace",
    "no shield (",
    "would leave new files open",
    "did not show the tag of this job's key",
    "the tag of this job's key",
)
# A variable that a block sets is one that securerun takes.
AND_TAKE_IT = '\nSECURERUN_PEERS="${SECURERUN_PEERS:-node0}" securerunctl exec --dry-run -- true > /dev/null'
STARTS_A_JOB = re.compile(r"securerun |securerunctl exec |python -m securerun|docker run ")
LISTEN = shlex.quote(
    "import socket, time; server = socket.create_server(('', 6000)); print('listening', flush=True); time.sleep(60)"
)
CONNECT = "< /dev/tcp/10.77.0.1/6000"
# A container has a /run of its own.
OWN_RUN = "mount -t tmpfs -o mode=755 tmpfs /run; "


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def different(language: str) -> list[Block]:
    """The blocks of a language, those with the same commands once."""
    return list({block.commands: block for block in reversed(BLOCKS) if block.language == language}.values())[::-1]


def runs_elsewhere(block: Block) -> bool:
    return block.page in PAGES_ELSEWHERE or block.commands[0].startswith(tuple(ELSEWHERE))


@pytest.fixture(autouse=True)
def _nothing_of_securerun_is_left() -> None:
    """In place of conftest's: a job is under way all the while. `stage` looks when it has ended."""


@pytest.fixture(scope="module")
def stage(root_and_tools: None) -> Iterator[Stage]:
    """The hosts of the pages, with a job under way on node0: there is something to look at."""
    before = machine_snapshot()
    with Network("node0", "node1", "stranger") as network, PrivateMachine() as machine:
        second_network.connect(network)
        nodes = tuple(network)
        machine.add_user("alice", groups=["securerun", "hpc"])
        names = "".join(f"{node.ipv4} {node.name}\n{second_network.address(node)} {node.name}-ib\n" for node in nodes)
        machine.write("/etc/hosts", machine.place("/etc/hosts").read_text() + names)
        for name, text in FILES.items():
            machine.write(f"{DIRECTORY}/{name}", text)
        machine.place("/etc/slurm").mkdir(exist_ok=True)
        stage = Stage(machine, nodes)
        job = stage.start("exec securerunctl exec --peers node0,node1 -- sleep 1000", 0)
        assert "iptables" in hear(job, "iptables"), "the job that is to be looked at did not start"
        yield stage
        kill_group(job)
        assert eventually(lambda: not machine.records() and machine_snapshot() == before)


@pytest.mark.parametrize("block", [one for one in different("sh") if not runs_elsewhere(one)], ids=str)
def test_the_commands_run(stage: Stage, block: Block) -> None:
    script = "\n".join(_as_run_here(command) for command in block.commands)
    if "export " in script:
        script += AND_TAKE_IT
    ranks = (0, 1) if "$NODE_RANK" in script else (0,)
    said = stage.run(*(script.replace("$NODE_RANK", str(rank)) for rank in ranks))
    if any(STARTS_A_JOB.match(command) and "--dry-run" not in command for command in block.commands):
        assert all("trained" in one and "closed to all others by" in one for one in said), said


def test_what_the_readme_shows_is_what_is_said(stage: Stage) -> None:
    (shown,) = (block.text.splitlines() for block in blocks_of(README) if block.language == "text")
    job = stage.start(
        f"unset GLOO_SOCKET_IFNAME; MASTER_PORT=6000 exec securerunctl exec --peers 10.77.0.2 -- python -c {LISTEN}", 0
    )
    said: list[str] = []
    try:
        assert job.stderr is not None and job.stdout is not None
        assert job.stdout.readline() == "listening\n"
        stage.run(*[""] * 2, f"! timeout 1 bash -c {shlex.quote(CONNECT)}")
        while "blocked" not in "".join(said):
            said.append(job.stderr.readline())
            assert said[-1], said
    finally:
        kill_group(job)
    rest = iter(map(_without_chance, said))
    for line in shown:
        assert _without_chance(line) in rest, (line, said)


@pytest.mark.parametrize("block", different("python"), ids=str)
def test_the_python_runs(stage: Stage, block: Block) -> None:
    program = f"def train(): print('trained')\n{block.text}"
    (said,) = stage.run(f"python -c {shlex.quote(program)}")
    assert "trained" in said and "closed to all others by" not in said  # a library does not talk


@pytest.mark.parametrize("block", different("toml"), ids=str)
def test_the_site_files_are_taken(stage: Stage, block: Block) -> None:
    path = block.text.splitlines()[0].removeprefix("# ")
    reader = {
        "/etc/securerun/config.toml": "securerunctl exec --dry-run -- true",
        "/etc/securerun/guard.toml": "python -c 'from securerun.guard import limits; print(limits.read_site_policy())'",
    }[path]
    stage.machine.write(path, block.text)
    try:
        (said,) = stage.run(reader)
    finally:
        stage.machine.place(path).unlink()
    assert "10.0.0.0/" in said or "IPv4Network('10.0.0.0/8')" in said


def test_every_yaml_is_a_mapping() -> None:
    assert all(isinstance(yaml.safe_load(block.text), dict) for block in different("yaml"))


def test_quickstart_takes_nothing_that_only_tests_have_installed() -> None:
    look = "import sys; sys.modules['pytest'] = None; sys.path.insert(0, 'scripts'); import quickstart"
    subprocess.run([sys.executable, "-c", look], cwd=CHECKOUT, check=True)


@needs_torch
def test_quickstart_keeps_its_promises(root_and_tools: None) -> None:
    """What the script does once everything is set up; the setting up is what made this test possible."""
    assert 'python" scripts/quickstart.py' in (CHECKOUT / "scripts/quickstart.sh").read_text()
    done = subprocess.run(
        [COMMANDS / "python", CHECKOUT / "scripts/quickstart.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert re.findall(r"^(yes|NO )", done.stdout, re.MULTILINE) == ["yes"] * 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    assert {block.language for block in blocks_of(page)} <= LANGUAGES
    outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\n\n    \S", outside), "an indented block: fence it, and say its language"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_script_and_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    for name in SCRIPTS.findall(text):
        assert os.access(CHECKOUT / name, os.X_OK if name.endswith(".sh") else os.R_OK), name
    for target in re.findall(r'\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)="([^"]+)"', text):
        (link,) = filter(None, target)
        assert "://" in link or (page.parent / link).exists(), link
    for name, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        headings = re.findall(r"^#+ (.*)", (page.parent / name if name else page).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("page", [*DEVELOPERS, *TOLD], ids=lambda page: page.name)
def test_every_module_and_every_test_that_a_page_names_is_there(page: Path) -> None:
    """Pages for users name scripts of the users' own; these name the house's."""
    places = ("benchmarks", "scripts", "securerun", "tests")
    modules = [f"/{path.relative_to(CHECKOUT)}" for place in places for path in (CHECKOUT / place).rglob("*.py")]
    text = page.read_text()
    named = {*re.findall(r"[\w/]+\.py\b", text), *(f"{name}.py" for name in re.findall(r"`(test_\w+)`", text))}
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in modules)] == []


def test_the_table_of_exposure_has_what_is_in_the_picture() -> None:
    drawn = re.findall(r">(\d+ of \d+) open<", (CHECKOUT / "docs/pictures/exposure.svg").read_text())
    rows = re.findall(r"^\|.*?\| (\d+ of \d+)(?: ports)? \| (\d+ of \d+) \|$", README.read_text(), re.MULTILINE)
    assert [figure for row in rows[:3] for figure in row] == drawn


def test_no_page_is_out_of_the_readers_sight() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", README.read_text()))
    assert {str(page.relative_to(CHECKOUT)) for page in PAGES} - linked <= {"README.md"}


def test_what_other_tests_run_they_do_run() -> None:
    beginnings = {begin for block in different("sh") for begin in ELSEWHERE if block.commands[0].startswith(begin)}
    assert beginnings == set(ELSEWHERE)
    assert {page for page in PAGES_ELSEWHERE if (CHECKOUT / "docs" / page).exists()} == set(PAGES_ELSEWHERE)
    for file, name in (*ELSEWHERE.values(), *PAGES_ELSEWHERE.values()):
        assert f"def {name}(" in (CHECKOUT / "tests/whole" / file).read_text()


def test_both_readmes_say_the_same() -> None:
    english, chinese = README.read_text(), CHINESE.read_text()
    assert [(one.language, one.commands) for one in blocks_of(README)] == [
        (one.language, one.commands) for one in blocks_of(CHINESE)
    ]
    assert [set(_links(part)) for part in _sections(english)] == [set(_links(part)) for part in _sections(chinese)]
    assert [_numbers(part) for part in _sections(english)] == [_numbers(part) for part in _sections(chinese)]
    assert [_named(part) for part in _sections(english)] == [_named(part) for part in _sections(chinese)]


@pytest.mark.parametrize("words", QUOTED)
def test_what_trouble_shooting_quotes_is_what_is_said(words: str) -> None:
    assert words in (CHECKOUT / "docs/troubleshooting.md").read_text()
    assert any(words in re.sub(r'"\s+f?"', "", path.read_text()) for path in (CHECKOUT / "securerun").rglob("*.py"))


def test_the_page_of_options_is_that_of_the_table() -> None:
    render = runpy.run_path(str(CHECKOUT / "scripts/options_page.py"))["render"]
    assert (CHECKOUT / "docs/options.md").read_text() == render(), "run scripts/options_page.py"


def _as_run_here(command: str) -> str:
    """A command of a page with what this machine has in place of what it has not."""
    for theirs, ours in SUBSTITUTIONS:
        command = command.replace(theirs, ours)
    if FINDS.match(command):
        return f"{command} || test $? = 1"
    return _in_container(command) if command.startswith("docker run ") else command


def _in_container(command: str) -> str:
    """`docker run` as `test_containers` has it: a user's own namespaces, and the capabilities that are added."""
    words = shlex.split(command)
    image = words.index("registry.example/train:latest")
    given = list(zip(words[:image], words[1:image]))
    capabilities = [DOCKER_CAPABILITIES, *(f"+{value.lower()}" for flag, value in given if flag == "--cap-add")]
    cgroups = WRITABLE_CGROUPS if ("-v", "/sys/fs/cgroup:/sys/fs/cgroup:rw") in given else READ_ONLY_CGROUPS
    variables = [value for flag, value in given if flag == "-e"]
    inside = container(",".join(capabilities), OWN_RUN + cgroups, "env", *variables, *words[image + 1 :])
    return shlex.join(inside).replace("'--node-rank=$NODE_RANK'", "--node-rank=$NODE_RANK")


def _without_chance(line: str) -> str:
    """A line of securerun's without what is different each time."""
    line = re.sub(r"run [0-9a-f]{12}:|guard started [a-z ]+|\d+ attempts?", "…", line.strip())
    return re.sub(r"\(socket filter on .*", "", line)


def _sections(text: str) -> list[str]:
    """The text from heading to heading."""
    return re.split(r"^#+ ", text, flags=re.MULTILINE)


def _links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "README" not in link]


def _numbers(text: str) -> set[str]:
    """The numbers of a text that are no part of a name."""
    return set(re.findall(r"(?<![\w.:/-])\d+(?:[.,]\d+)*(?![\w.:-])", re.sub(r"(?<=\d)\s*个?端口", " ", text)))


def _named(text: str) -> set[str]:
    """What is set in the type of a program."""
    return set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))
