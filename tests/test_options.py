"""What the user said: the command line cut in two, and the order in which flag, environment and site file count."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

from securerun.errors import UsageError
from securerun.help_text import written
from securerun.job.launchers import values_of
from securerun.options import GROUPS, OPTIONS, Arity, Options, of_site, resolve, take

PARSER = get_args_parser()
ARITY = values_of(PARSER)
NOWHERE = Path("/nonexistent/securerun.toml")

TORCH = [
    ["--nnodes", "2"],
    ["--nnodes=1:2"],
    ["--nproc-per-node", "2"],
    ["--nproc_per_node=3"],
    ["--nproc-per", "4"],
    ["--standalone"],
    ["--stand"],
    ["-m"],
    ["-r", "3"],
    ["-r3"],
    ["-mr", "3"],
    ["-mt3"],
    ["-t", "0:1"],
    ["--rdzv-backend", "c10d"],
    ["--rdzv_end", "node0:29400"],
    ["--rdzv-conf", "is_host=1,timeout=30"],
    ["--max-r", "1"],
    ["--node_rank", "1"],
    ["--master-port", "-1"],
    ["--log-dir", "-"],
    ["--role", "train.py"],
    ["--role", ""],
    ["--role", "-a role"],
    ["--role=--peers"],
    ["--no-python"],
]
TORCH_WORDS = [word for chunk in TORCH for word in chunk]
OURS: list[tuple[list[str], str, str | bool]] = [
    (["--peers", "node1,node2"], "peers", "node1,node2"),
    (["--peers=node3"], "peers", "node3"),
    (["--peers=a=b"], "peers", "a=b"),
    (["--ports", "7000"], "ports", "7000"),
    (["--interface", "eth0"], "interface", "eth0"),
    (["--firewall", "off"], "firewall", "off"),
    (["--umask", "0077"], "umask", "0077"),
    (["--accept"], "accept", True),
    (["--unprotected"], "unprotected", True),
    (["--dry-run"], "dry_run", True),
    (["--dry_run"], "dry_run", True),
]
SCRIPT_WORDS = ["--peers", "x", "--", "--help", "--dry-run", "-m", "--nnodes=3", "--peers=y", "-1", ""]


@settings(deadline=None)
@given(
    chunks=st.lists(st.one_of(st.sampled_from(TORCH), st.sampled_from(OURS)), max_size=12),
    separator=st.sampled_from([[], ["--"]]),
    script=st.sampled_from(["train.py", "-", "-5", "a b"]),
    words=st.lists(st.sampled_from(SCRIPT_WORDS), max_size=5),
)
def test_torch_sees_the_command_line_as_if_ours_had_not_been_there(
    chunks: list[list[str] | tuple[list[str], str, str | bool]], separator: list[str], script: str, words: list[str]
) -> None:
    arguments: list[str] = []
    without: list[str] = []
    expected: dict[str, str | bool] = {}
    for chunk in chunks:
        if isinstance(chunk, tuple):
            tokens, key, value = chunk
            arguments += tokens
            expected[key] = value
        else:
            arguments += chunk
            without += chunk
    tail = [*separator, script, *words]
    taken, rest = take([*arguments, *tail], ARITY)
    assert taken == expected
    assert rest == [*without, *tail]
    assert PARSER.parse_args(rest) == PARSER.parse_args([*without, *tail])


@settings(deadline=None)
@given(st.lists(st.sampled_from([*TORCH_WORDS, "--bogus", "--rdzv", "--peer", "-x", "--", "t.py"]), max_size=10))
def test_a_command_line_without_ours_is_left_alone_however_wrong_it_is(arguments: list[str]) -> None:
    assert take(arguments, ARITY) == ({}, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "--peers", "b"],
        ["--nnodes", "2", "train.py", "--dry-run", "--help"],
        ["--", "train.py", "--", "--dry-run"],
        ["--help"],
        ["-h", "train.py", "--peers", "b"],
        ["--peer", "a", "--dry-run", "train.py"],  # no abbreviations of ours: torch refuses --peer
        ["--log-dir", "--peers", "a", "train.py"],  # torch says that --log-dir has no value
        ["-m", "package.train", "--umask", "0"],
        [],
    ],
)
def test_nothing_is_taken_from(arguments: list[str]) -> None:
    assert take(arguments, ARITY) == ({}, arguments)


def test_the_last_of_the_same_option_wins_as_in_argparse() -> None:
    assert take(["--peers", "a", "--nnodes", "2", "--peers", "b", "t.py"], ARITY) == (
        {"peers": "b"},
        ["--nnodes", "2", "t.py"],
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers"], ["--peers needs a value", "node1,node2", "@hostfile.txt"]),
        (["--peers", "--dry-run", "t.py"], ["--peers needs a value"]),
        (["--peers", "", "t.py"], ["--peers needs a value"]),
        (["--ports=", "t.py"], ["--ports needs a value", "7000"]),
        (["--dry-run=yes", "t.py"], ["--dry-run takes no value", "'--dry-run=yes'"]),
    ],
)
def test_a_command_line_that_cannot_be_read_says_what_to_write(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        take(arguments, ARITY)
    assert error.value.status == 2
    assert_line_with(str(error.value), words)


@pytest.mark.parametrize("arity", [ARITY, lambda _: None], ids=["securerun", "exec"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--peers", "node0,", "node1", "train.py"],
            ["--peers node0,:", "ends in a comma", "'node1' would be what is"],
        ),
        (["--peers=node0,", "node1", "train.py"], ["--peers node0,:", "ends in a comma", "'node1'"]),
        (["--peers", "node0", ",node1", "train.py"], ["--peers node0:", "goes on behind a space", "',node1'"]),
        (["--peers", "node0", ",", "node1", "train.py"], ["--peers node0:", "goes on behind a space"]),
        (["--peers", "node0,node1,", "--dry-run", "train.py"], ["--peers node0,node1,:", "ends in a comma; write"]),
        (["--peers", "node[0,", "1]", "train.py"], ["--peers node[0,:", "'1]'"]),
        (["--peers", "node0, "], ["ends in a comma; write"]),
        (["--interface", "eth0,", "ib0", "train.py"], ["--interface eth0,:", "'ib0'", "as in --interface eth0"]),
        (["--ports=7000,", "7001", "train.py"], ["--ports 7000,:", "'7001'", "as in --ports 7000,8000-8010"]),
    ],
)
def test_a_list_that_goes_on_behind_a_space_is_refused_before_a_host_becomes_the_script(
    arguments: list[str], words: list[str], arity: Arity
) -> None:
    with pytest.raises(UsageError) as error:
        take(arguments, arity)
    assert error.value.status == 2
    assert_line_with(str(error.value), ["write it without spaces", "or in quotes", *words])


def test_a_list_in_quotes_and_one_of_the_environment_may_have_spaces() -> None:
    assert take(["--peers", "node0, node1", "t.py"], ARITY) == ({"peers": "node0, node1"}, ["t.py"])
    assert resolve({}, {"SECURERUN_PEERS": "node0, node1, "}, NOWHERE).peers == "node0, node1,"
    assert take(["t.py", "--peers", "node0,", "node1"], ARITY) == ({}, ["t.py", "--peers", "node0,", "node1"])


def test_defaults() -> None:
    assert resolve({}, {}, NOWHERE) == Options()
    assert Options().umask == "0027"
    assert Options().firewall == "auto"


def test_flag_then_environment_then_site_file(tmp_path: Path) -> None:
    site = tmp_path / "config.toml"
    site.write_text('peers = ["node1", "node2"]\nports = [7000, "8000-8010"]\numask = "0077"\naccept = true\n')
    options = resolve({"peers": "a"}, {"SECURERUN_PEERS": "b", "SECURERUN_PORTS": "9000"}, site)
    assert (options.peers, options.peers_source) == ("a", "--peers")
    assert (options.ports, options.ports_source) == ("9000", "SECURERUN_PORTS")
    assert (options.umask, options.umask_source) == ("0077", str(site))
    assert options.accept is True
    options = resolve({}, {"SECURERUN_ACCEPT": "off"}, site)
    assert (options.peers, options.peers_source) == ("node1,node2", str(site))
    assert (options.ports, options.accept) == ("7000,8000-8010", False)


@pytest.mark.parametrize("written", ['"8080=10.0.0.0/8,10.1.0.0/16; 9100"', '["8080=10.0.0.0/8,10.1.0.0/16", 9100]'])
def test_public_ports_of_the_site_file_are_a_text_or_a_list_of_its_parts(tmp_path: Path, written: str) -> None:
    site = tmp_path / "config.toml"
    site.write_text(f"public = {written}\n")
    found = resolve({}, {}, site)
    assert (found.public or "").replace(" ", "") == "8080=10.0.0.0/8,10.1.0.0/16;9100"
    assert found.public_source == str(site)
    assert resolve({}, {"SECURERUN_PUBLIC": "9090"}, site).public == "9090"
    for wrong in ("true", "[8080.5]", '";"'):
        site.write_text(f"public = {wrong}\n")
        with pytest.raises(UsageError, match="8080=10.0.0.0/8;9100"):
            resolve({}, {}, site)


@pytest.mark.parametrize("text", ["1", "true", "YES", "on"])
def test_a_flag_can_be_set_by_its_variable(text: str) -> None:
    assert resolve({}, {"SECURERUN_DRY_RUN": text}, NOWHERE).dry_run is True


@pytest.mark.parametrize("text", ["0", "False", "no", "off", "", " "])
def test_a_flag_can_be_left_unset_by_its_variable(text: str) -> None:
    assert resolve({}, {"SECURERUN_DRY_RUN": text}, NOWHERE).dry_run is False


def test_an_empty_variable_is_an_unset_one() -> None:
    assert resolve({}, {"SECURERUN_PEERS": "", "SECURERUN_FIREWALL": ""}, NOWHERE) == Options()


def test_variables_that_are_not_options_are_nothing_to_us() -> None:
    assert resolve({}, {"SECURERUN_RUN_ID": "0" * 12, "SECURERUN_NEXT_YEAR": "?"}, NOWHERE) == Options()


@pytest.mark.parametrize(
    ("taken", "environment", "words"),
    [
        ({}, {"SECURERUN_ACCEPT": "maybe"}, ["SECURERUN_ACCEPT=maybe", "write 1, true"]),
        ({}, {"SECURERUN_FIREWALL": "nft"}, ["SECURERUN_FIREWALL", "'nft'", "auto, iptables, nftables, legacy, off"]),
        ({"firewall": "ufw"}, {}, ["--firewall", "'ufw'", "auto, iptables, nftables, legacy, off"]),
    ],
)
def test_a_value_that_no_option_takes_is_named(
    taken: dict[str, str | bool], environment: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        resolve(taken, environment, NOWHERE)
    assert_line_with(str(error.value), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('peers = "a"\nports = = 1\n', ["line 2"]),
        ('peers = "a"\n\nports = [\n', ["line 3"]),
        ("umask = 0027\n", ["line 1"]),
        ('peers = "a"\npeers = "b"\n', ["line 2", "overwrite"]),
        ('# ours\npeer = "a"\n', ["line 2", "'peer'", "the keys are peers, interface"]),
        ('peers = "a"\n[peers2]\nx = 1\n', ["line 2", "'peers2'"]),
        ('\n"pe ers".x = 1\n', ["line 2", "'pe ers'"]),
        ("dry-run = true\n", ["line 1", "'dry-run'"]),
        ("dry_run = true\n", ["line 1", "'dry_run'"]),
        ('\naccept = "yes"\n', ["line 2", "accept", "write accept = true"]),
        ("umask = 27\n", ["line 1", 'write umask = "0027"']),
        ("peers = 7\n", ["line 1", "peers", 'write peers = "node1,node2"']),
        ("peers = [1]\n", ["line 1", "peers"]),
        ("peers = []\n", ["line 1", "peers"]),
        ('peers = ""\n', ["line 1", "peers"]),
        ("ports = [true]\n", ["line 1", "ports"]),
        ("ports = 7.5\n", ["line 1", "ports"]),
        ('firewall = "nft"\n', ["line 1", "'nft'", "auto, iptables, nftables, legacy, off"]),
        ('firewall = ["off"]\n', ["line 1", "firewall"]),
    ],
)
def test_a_wrong_site_file_is_named_with_its_line(tmp_path: Path, text: str, words: list[str]) -> None:
    site = tmp_path / "config.toml"
    site.write_text(text)
    with pytest.raises(UsageError) as error:
        resolve({}, {}, site)
    assert_line_with(str(error.value), [str(site), *words])


def test_a_site_file_that_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    site = tmp_path / "config.toml"
    site.write_bytes(b'peers = "a"\n# \xff\xfe\n')
    with pytest.raises(UsageError, match="line 2: not UTF-8"):
        resolve({}, {}, site)
    with pytest.raises(UsageError, match="cannot be read"):
        resolve({}, {}, tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "too long", "too deep", "too many digits"])
def test_whatever_stands_in_the_place_of_the_site_file_a_launch_neither_waits_nor_fills_its_memory(
    tmp_path: Path, kind: str
) -> None:
    site = tmp_path / "config.toml"
    if kind == "pipe":
        os.mkfifo(site)
    elif kind == "device":
        site.symlink_to("/dev/zero")
    elif kind == "too long":
        site.write_text(f'peers = "{"a" * (1024 * 1024)}"\n')
    elif kind == "too deep":
        site.write_text(f"peers = {'[' * 100_000}{']' * 100_000}\n")
    else:
        site.write_text(f"umask = {'9' * 100_000}\n")
    look = "import sys, pathlib, securerun.options as o; o.resolve({}, {}, pathlib.Path(sys.argv[1]))"
    limited = ["sh", "-c", 'ulimit -v 1000000; exec "$@"', "sh", sys.executable, "-c", look, str(site)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=20, check=False)
    assert done.stderr.splitlines()[-1].startswith("securerun.errors.UsageError: "), done.stderr
    assert str(site) in done.stderr.splitlines()[-1]


def test_one_port_in_the_site_file_may_be_a_number(tmp_path: Path) -> None:
    site = tmp_path / "config.toml"
    site.write_text("ports = 7000\ninterface = ['eth0', 'eth1']\n")
    options = resolve({}, {}, site)
    assert (options.ports, options.interface) == ("7000", "eth0,eth1")


def test_help_names_every_option_and_every_choice() -> None:
    text = written()
    for option in OPTIONS:
        assert option.synopsis in text

        assert option.synopsis in text
        assert all(choice in text for choice in option.choices)
    assert "/etc/securerun/config.toml" in text


def test_help_fits_a_screen_and_has_every_option_in_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = written().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) < 80
    assert [line[:-1] for line in lines if line.endswith(":")] == list(GROUPS)
    for option in OPTIONS:
        (line,) = (line for line in lines if line.startswith(f"  {option.synopsis} "))
        heading = next(above for above in reversed(lines[: lines.index(line)]) if above.endswith(":"))
        assert heading == f"{option.group}:"


@pytest.mark.parametrize(
    ("arguments", "text", "site", "expected"),
    [
        ([], "", "", True),
        (["--no-seal-logs"], "1", "seal_logs = true", False),
        (["--no_seal_logs"], "", "", False),
        (["--no-seal-logs", "--seal-logs"], "0", "", True),
        ([], "no", "", False),
        ([], "", "seal_logs = false", False),
    ],
)
def test_a_flag_that_is_on_by_default_can_be_taken_back(
    tmp_path: Path, arguments: list[str], text: str, site: str, expected: bool
) -> None:
    (tmp_path / "config.toml").write_text(site)
    taken, rest = take([*arguments, "train.py", "--no-seal-logs"], ARITY)
    assert rest == ["train.py", "--no-seal-logs"]
    assert resolve(taken, {"SECURERUN_SEAL_LOGS": text}, tmp_path / "config.toml").seal_logs is expected


def test_a_flag_that_is_taken_back_takes_no_value_either() -> None:
    with pytest.raises(UsageError, match="--no-seal-logs takes no value"):
        take(["--no-seal-logs=1", "train.py"], ARITY)


def test_every_option_has_its_place_in_options() -> None:
    assert all(hasattr(Options(), option.key) for option in OPTIONS)


def assert_line_with(message: str, words: list[str]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message


def test_site_file_says_where_guards_are_and_no_launch_minds(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('socket = "/srv/guard.sock"\npeers = "10.0.0.1"\n')
    assert of_site("socket", path) == "/srv/guard.sock"
    assert of_site("socket", tmp_path / "none.toml") == ""
    assert resolve({}, {}, path).peers == "10.0.0.1"
    path.write_text("socket = 7\n")
    with pytest.raises(UsageError, match="the key socket has no text"):
        of_site("socket", path)
