"""Which proxies the environment names, and which name servers are on the host's own loopback."""

from __future__ import annotations

import ipaddress

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
