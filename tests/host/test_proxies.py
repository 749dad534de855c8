"""Which proxies the environment names, and which name servers are on the host's own loopback."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from securerun.host import name_servers, proxies


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, []),
        ({"http_proxy": "http://localhost:3128"}, [("http_proxy", "localhost", 3128, True)]),
        ({"HTTPS_PROXY": "http://user:pass@127.0.0.1:8080/"}, [("HTTPS_PROXY", "127.0.0.1", 8080, True)]),
        ({"all_proxy": "socks5h://[::1]"}, [("all_proxy", "::1", 1080, True)]),
        ({"http_proxy": "localhost:3128", "https_proxy": "localhost:3128"}, [("http_proxy", "localhost", 3128, True)]),
        ({"http_proxy": "proxy.example"}, [("http_proxy", "proxy.example", 80, False)]),
        ({"no_proxy": "localhost", "NO_PROXY": "127.0.0.1", "http_proxy": " "}, []),
        ({"http_proxy": "http://localhost:99999"}, []),
        ({"http_proxy": "http://[::1"}, []),
    ],
)
def test_proxies_are_told_by_their_variables(
    variables: dict[str, str], found: list[tuple[str, str, int, bool]]
) -> None:
    named = proxies.named(variables)
    assert [(one.variable, one.host, one.port, one.on_loopback) for one in named] == found


@pytest.mark.parametrize(
    ("text", "forwarded"),
    [
        ("nameserver 192.0.2.1\n", None),
        ("", None),
        ("nameserver 127.0.0.53\noptions edns0\nsearch x\n", "nameserver F\noptions edns0\nsearch x\n"),
        ("# 127.0.0.1\nnameserver ::1\nnameserver 127.0.0.1\n", "# 127.0.0.1\nnameserver F\n\n"),
        ("nameserver 192.0.2.1\nnameserver 0.0.0.0\n", "nameserver 192.0.2.1\nnameserver F\n"),
        ("nameserver fe80::1%eth0\n", None),
        ("nameserver 10.0.0.1\nnameserver 10.0.0.2\n", "nameserver F\nnameserver 10.0.0.2\n"),
        ("nameserver fd00:0::1\n", "nameserver F\n"),
    ],
)
def test_name_servers_of_this_host_are_told_and_replaced(text: str, forwarded: str | None) -> None:
    own = [ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("fd00::1")]
    assert name_servers.are_here(text, own) is (forwarded is not None)
    if forwarded is not None:
        assert name_servers.forwarded(text, "F", own) == forwarded


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("127.0.0.1 localhost Proxy.local # here", True),
        ("::1 ip6-localhost proxy.local", True),
        ("10.0.0.3 proxy.local\n127.0.0.1 proxy.local", False),
        ("#127.0.0.1 proxy.local\n\n127.0.0.1", False),
    ],
)
def test_name_that_the_hosts_file_has_for_the_loopback_is_on_it(tmp_path: Path, line: str, expected: bool) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"# static\n{line}\n")
    (proxy,) = proxies.named({"http_proxy": "http://proxy.local:3128"}, hosts)
    assert (proxy.on_loopback, proxy.host, proxy.port) == (expected, "proxy.local", 3128)


def test_hosts_file_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    (proxy,) = proxies.named({"http_proxy": "http://proxy.local:3128"}, tmp_path / "none")
    assert not proxy.on_loopback
