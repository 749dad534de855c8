"""What a file or directory is taken for, by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securerun.audit import kinds
from securerun.audit.kinds import BUILT_IN, Kinds, Row, parse_rows, read_rows
from securerun.errors import UsageError
from securerun.host.permissions import Kind

FILES = {
    "key": "server.pem SERVER.PEM a.key id_rsa id_ed25519 ca.crt store.p12 secret.enc x.gpg .env .netrc a.token .key",
    "crypto-tool": "encrypt.py decrypt.sh model_decrypt.py encrypt_ckpt.sh",
    "program": "train.py pretrain.sh libtorch.so libc.so.6 a.pyc",
    "debug": "core core.1234 a.dmp PROF_0001 rank0.pt.trace.json fusion_result.json ge_proto_00001.txt",
    "log": "train.log plog-1234_20240101.log slurm-17.out events.out.tfevents.1699.node0.1.0",
    "archived-log": "train.log.1 train.log.2024-01-01 train.log.gz train.log-20240101",
    "config": "ds.json a.yaml a.toml hostfile hostfile.txt hosts rank_table_8p.json cacert.pem id_rsa.pub",
    "temp": "a.tmp .a.swp model.bin.part",
    "data": "model.pt model.safetensors text_document.bin text_document.idx a.ckpt __0_0.distcp a.npy what ever.42 x",
}
DIRECTORIES = {
    "/": "data",
    "/root": "home",
    "/home/alice": "home",
    "/home/alice/work": "data",
    "/home/alice/.ssh": "key",
    "/srv/certs/old": "key",
    "/srv/keys/logs": "key",
    "/srv/logs": "log",
    "/root/ascend/log/debug/plog": "log",
    "/srv/run/kernel_meta_1234": "debug",
    "/srv/PROF_000001_2024/device_0": "debug",
    "/srv/out/host_ascend_pt": "debug",
    "/opt/venv/lib/python3.11/site-packages/torch": "program",
    "/opt/job/scripts": "program",
    "/root/.cache/torch_extensions/py311": "temp",
    "/opt/tmp/x": "temp",
    "/opt/upgrade/v2": "upgrade",
    "/srv/etc": "config",
    "/srv/logs/checkpoints": "data",
    "/srv/iter_0000100/mp_rank_00": "data",
    "/var/home/bob": "home",
    "/elsewhere/plogs": "log",
    "/elsewhere/plogs/device-0": "log",
}
ENVIRONMENT = {
    "HOME": "/var/home/bob",
    "ASCEND_PROCESS_LOG_PATH": "/elsewhere/plogs",
    "TORCH_EXTENSIONS_DIR": "relative",
}


def table(text: str = "", environment: Mapping[str, str] = ENVIRONMENT, given: str | None = None) -> Kinds:
    rows = (*parse_rows(text, "rows"), *parse_rows(BUILT_IN.read_text(), "built in"))
    return Kinds(rows, environment, Kind(given) if given else None)


def kind_of(known: Kinds, name: str, directory: str = "data") -> str:
    return known.of_file(name.lower(), Kind(directory))[0].value


@pytest.mark.parametrize("kind", FILES)
def test_files_are_known_by_their_names(kind: str) -> None:
    known = table()
    assert {name: kind_of(known, name) for name in FILES[kind].split()} == dict.fromkeys(FILES[kind].split(), kind)


def test_directories_are_known_by_their_names_and_those_above_them() -> None:
    known = table()
    assert {path: known.of_root(path).value for path in DIRECTORIES} == DIRECTORIES


def test_a_file_without_a_row_is_what_its_directory_is() -> None:
    known = table()
    for directory in ("log", "debug", "config", "program", "temp", "upgrade", "data"):
        assert kind_of(known, "nameless", directory) == directory
        assert kind_of(known, "train.py", directory) == "program"
    assert kind_of(known, "nameless", "home") == "data"


def test_all_in_a_directory_of_keys_is_secret() -> None:
    known = table()
    for name, kind in {"README.md": "key", "config": "key", "id_rsa.pub": "key", "renew.sh": "crypto-tool"}.items():
        assert kind_of(known, name, "key") == kind


def test_who_says_what_a_tree_is_is_believed_except_about_keys() -> None:
    known = table(given="log")
    assert known.of_root("/srv/certs") is Kind.LOG
    assert known.of_directory("/srv/logs/checkpoints", Kind.LOG) is Kind.LOG
    assert known.of_directory("/srv/logs/.ssh", Kind.LOG) is Kind.KEY
    for name, kind in {
        "model.pt": "log",
        "train.py": "log",
        "x": "log",
        "a.pem": "key",
        "encrypt.py": "crypto-tool",
    }.items():
        assert kind_of(known, name, "log") == kind


@pytest.mark.parametrize("given", ["home", "temp", "upgrade"])
def test_where_the_row_is_one_of_directories_files_keep_their_names_kinds(given: str) -> None:
    known = table(given=given)
    assert known.of_root("/srv/x") is Kind(given)
    assert [kind_of(known, name, given) for name in ("a.py", "a.log", "nameless")] == ["program", "log", given]


def test_every_row_of_the_table_decides_about_what_it_names() -> None:
    """A row that an earlier one hides would be a mistake of ours."""
    known = table(environment={"HOME": "/var/h", "ASCEND_PROCESS_LOG_PATH": "/var/p", "TORCH_EXTENSIONS_DIR": "/var/t"})
    variables = {"$HOME": "/var/h", "$ASCEND_PROCESS_LOG_PATH": "/var/p", "$TORCH_EXTENSIONS_DIR": "/var/t"}
    for pattern, kind in parse_rows(BUILT_IN.read_text(), "built in"):
        name = re.sub(r"\[0-9\]", "7", pattern.replace("*", "zz"))
        if pattern.endswith("/"):
            name = re.sub(r"^\$\w+", lambda variable: variables[variable.group()], name).rstrip("/")
            assert known.of_directory(name if name.startswith("/") else f"/{name}", Kind.DATA) is kind, pattern
        else:
            assert kind_of(known, name) == kind.value, pattern


def test_a_sites_rows_come_first_and_the_first_that_matches_decides() -> None:
    known = table(
        "*.pem  data\n*_key.pt  key\nPROD*/  key\n/srv/Vault/  key\n*blob*  log\na[0-9]?  debug\nmy file  temp\n"
    )
    names = {
        "a.pem": "data",
        "my_key.pt": "key",
        "other.pt": "data",
        "xBLOBx.py": "log",
        "a1b": "debug",
        "My File": "temp",
    }
    assert {name: kind_of(known, name) for name in names} == names
    assert known.of_root("/x/Production/y") is Kind.KEY
    assert known.of_root("/srv/Vault/y") is Kind.KEY
    assert known.of_root("/srv/vault/y") is Kind.DATA
    assert known.of_root("/other/srv/Vault") is Kind.DATA


PIECES = [
    "a",
    "Z",
    "7",
    ".",
    "_",
    "-",
    "log",
    ".log.",
    ".so.",
    "so",
    "py",
    "pem",
    "pt",
    "core",
    "prof_",
    "id_rsa",
    "bin",
]
SITE = "*secret*  key\n*_x.bin  log\n*.tar.*  debug\nz?  temp\n"


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), st.sampled_from(["", SITE]))
def test_where_the_ending_is_enough_it_gives_the_same_kind_as_the_whole_name(name: str, site: str) -> None:
    known = _TABLES[site]
    name = name.lower()
    dot = name.rfind(".")
    if not known.shortcuts.needs_all_of(name, dot):
        other = f"qqq{name[dot:] if dot >= 0 else ''}"
        assert kind_of(known, name) == kind_of(known, other)


_TABLES = {site: table(site) for site in ("", SITE)}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("*.pem", r"rows, line 2: '\*.pem' stands alone"),
        ("*.pem secret", "rows, line 2: 'secret' is no kind; write one of home, program"),
        ("logs/*.txt log", "rows, line 2: 'logs/.*' is neither a name nor a whole path"),
        ("/etc/shadow key", "rows, line 2: '/etc/shadow' is a path, and only directories"),
        ("$HOME key", "only directories have one"),
    ],
)
def test_a_row_that_cannot_be_understood_is_named(line: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse_rows(f"# ours\n{line}\n", "rows")


@pytest.mark.usefixtures("root")
def test_a_site_file_counts_only_if_nobody_but_root_can_have_written_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "kinds"
    monkeypatch.setattr(kinds, "SITE_FILE", site)
    built_in = read_rows(None)
    site.write_text("*.weights  key\n")
    site.chmod(0o644)
    assert read_rows(None) == (Row("*.weights", Kind.KEY), *built_in)
    other = tmp_path / "other"
    other.write_text("*.blob  data\n")
    assert read_rows(other) == (Row("*.blob", Kind.DATA), *built_in)
    site.chmod(0o646)
    with pytest.raises(UsageError, match="can be written by others .mode 646."):
        read_rows(None)
    site.unlink()
    assert read_rows(None) == built_in
    with pytest.raises(UsageError, match="nowhere cannot be read: No such file"):
        read_rows(tmp_path / "nowhere")
    other.write_bytes(b"\xff data\n")
    with pytest.raises(UsageError, match="it is not UTF-8"):
        read_rows(other)
