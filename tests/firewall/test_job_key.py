"""How a job's key comes from what its nodes have in common: as RFC 5869 has it, and told to nobody by accident."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from typing import Any

import pytest

from securerun.firewall import job_key
from securerun.firewall.job_key import JobKey, JobSecret, derive, expand, extract

SOURCE = bytes(range(32))
MEETING = bytes(32)
GOLDEN_USER = ("c73acfe1d1eb7ae29a9b429787bb4cda", "1fa2c8b24fc80f2d080b863d1ddf4c58", "2275b31c")
GOLDEN_SITE = "66596c56"

# RFC 5869, appendix A: the cases of SHA-256.
CASES = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("material", "salt", "info", "key", "output"), CASES)
def test_hkdf_is_that_of_its_reference(material: str, salt: str, info: str, key: str, output: str) -> None:
    extracted = extract(bytes.fromhex(salt), bytes.fromhex(material))
    assert extracted.hex() == key
    assert expand(extracted, bytes.fromhex(info), len(output) // 2).hex() == output


def test_all_nodes_of_every_version_come_to_the_same_key() -> None:
    """Written out, so that no change makes another key on the nodes that have it and on those that have not."""
    key = derive(SOURCE, job_key.OF_USER, MEETING).key()
    assert (key.syn.hex(), key.syn_ack.hex(), key.fingerprint) == GOLDEN_USER
    assert derive(SOURCE, job_key.OF_SITE, MEETING, user=1000).key().fingerprint == GOLDEN_SITE


def test_each_kind_user_and_meeting_has_keys_of_its_own() -> None:
    secrets = [
        derive(source, kind, meeting, user)
        for source in (SOURCE, SOURCE + b"\0")
        for kind in (job_key.OF_USER, job_key.OF_SITE, job_key.OF_SLURM)
        for meeting in (MEETING, bytes([1] * 32))
        for user in (None, 0, 1000, 1001)
    ]
    keys = [secret.key() for secret in secrets]
    found = [
        *(secret.reveal() for secret in secrets),
        *(secret.for_frameworks() for secret in secrets),
        *(key.syn for key in keys),
        *(key.syn_ack for key in keys),
    ]
    assert len(set(found)) == len(found) == 4 * 48
    assert len({key.fingerprint for key in keys}) == 48


SECRET = derive(SOURCE, job_key.OF_USER, MEETING)


@pytest.mark.parametrize("hidden", [SECRET, SECRET.key()], ids=["secret", "key"])
def test_a_key_does_not_get_into_logs_and_files_by_accident(hidden: Any) -> None:  # noqa: ANN401 - either
    bare = [SECRET.reveal(), SECRET.key().syn, SECRET.key().syn_ack, SECRET.for_frameworks()]
    for text in (repr(hidden), str(hidden), f"{hidden}", f"{[hidden]}", f"{ValueError(hidden)!r}"):
        assert not any(secret.hex() in text or repr(secret)[2:-1] in text for secret in bare)
    with pytest.raises(TypeError):
        json.dumps(hidden)
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not to leave this process"):
            leave(hidden)


def test_keys_of_other_lengths_are_none() -> None:
    key = SECRET.key()
    for wrong in (b"", bytes(15), bytes(17)):
        with pytest.raises(ValueError, match="16 bytes"):
            replace(key, syn=wrong)
        with pytest.raises(ValueError, match="16 bytes"):
            replace(key, syn_ack=wrong)
        with pytest.raises(ValueError, match="32 bytes"):
            JobSecret(wrong)
    assert replace(key, fingerprint="00000000") != key == JobKey(key.syn, key.syn_ack, key.fingerprint)
