"""What by_hand.sh becomes: a script in which nothing is left to be filled in, and nothing is filled in twice."""

from __future__ import annotations

import ipaddress
import re

import pytest

from securerun.firewall import script
from securerun.firewall.policy import Policy, PortRange, Purpose

POLICY = Policy(
    "0123456789ab", (PortRange(29500, 29500, Purpose.MASTER_PORT),), (ipaddress.IPv4Network("10.0.0.1/32"),)
)


@pytest.mark.parametrize("backend", ["auto", "iptables", "legacy", "nftables"])
def test_no_word_and_no_aside_of_the_file_is_left(backend: str) -> None:
    text = script.render(POLICY, backend, ["peers 10.0.0.1"])
    assert text.startswith("#!/bin/sh\n# Closes ")
    assert re.findall(r"@\w+@|#@|shellcheck", text) == []
    assert text.count("\nup() {\n") == text.count("\ndown() {\n") == 1


def test_what_is_filled_in_is_not_looked_at_again() -> None:
    about = ["command train.py @RUN@ @ABOUT@", r"\1 \g<0> $0 {chain}"]
    text = script.render(POLICY, "iptables", about)
    assert all(f"\n# {line}\n" in text for line in about)
