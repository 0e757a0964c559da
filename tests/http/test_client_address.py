"""The address of a client, also behind proxies."""

from __future__ import annotations

import pytest

from incidentkit import InvalidSettings
from incidentkit.http.client_address import TrustedProxies, client_address

PROXIES = TrustedProxies(["10.0.0.0/8", "192.0.2.7", "2001:db8::/32", " unix "])


def address(peer: str | None, *forwarded: str, proxies: TrustedProxies = PROXIES) -> str | None:
    """Return the client's address of a request from a peer, with these headers."""
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    scope = {"headers": headers, "client": None if peer is None else (peer, 4711)}
    proxies.find_client(scope)
    return client_address(scope)


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("198.51.100.1", [], "198.51.100.1"),
        ("198.51.100.1", ["203.0.113.9"], "198.51.100.1"),
        ("10.1.2.3", [], "10.1.2.3"),
        ("10.1.2.3", ["203.0.113.9"], "203.0.113.9"),
        ("10.1.2.3", ["1.1.1.1, 203.0.113.9"], "203.0.113.9"),
        ("10.1.2.3", ["1.1.1.1", "203.0.113.9,192.0.2.7 , 10.9.9.9"], "203.0.113.9"),
        ("10.1.2.3", ["10.0.0.1, 192.0.2.7"], "10.0.0.1"),
        ("10.1.2.3", ["203.0.113.9, unknown"], "10.1.2.3"),
        ("10.1.2.3", ["203.0.113.9, unknown, 10.0.0.1"], "10.0.0.1"),
        ("10.1.2.3", [""], "10.1.2.3"),
        ("10.1.2.3", ["203.0.113.9:4711"], "203.0.113.9"),
        ("10.1.2.3", ['"[2001:470::9]:4711"'], "2001:470::9"),
        ("10.1.2.3", ["2001:470::9"], "2001:470::9"),
        ("10.1.2.3", ["::ffff:203.0.113.9"], "203.0.113.9"),
        ("::ffff:10.1.2.3", ["203.0.113.9"], "203.0.113.9"),
        ("2001:db8::1", ["203.0.113.9"], "203.0.113.9"),
        ("10.1.2.3", ["fe80::1%eth0"], "fe80::1"),
        ("10.1.2.3", ["\xff"], "10.1.2.3"),
        ("10.1.2.3", ["203.0.113.9, " + ", ".join(["10.0.0.1"] * 30)], "10.0.0.1"),
        (None, ["203.0.113.9"], "203.0.113.9"),
        (None, [], None),
        ("", [], None),
    ],
)
def test_only_trusted_proxies_name_a_client(
    peer: str | None, forwarded: list[str], found: str | None
) -> None:
    """The client is the last address before the trusted proxies, however the header begins."""
    assert address(peer, *forwarded) == found


def test_without_trusted_proxies_the_header_counts_for_nothing() -> None:
    """The header of an untrusted client is ignored."""
    nobody = TrustedProxies()
    assert not nobody
    for peer in ("10.1.2.3", "127.0.0.1", None):
        assert address(peer, "203.0.113.9", proxies=nobody) == peer


@pytest.mark.parametrize("proxy", ["", "localhost", "10.0.0.0/33", "10.0.0.1:80", "*"])
def test_other_proxies_are_refused(proxy: str) -> None:
    """A name could lead anywhere, so only addresses and networks are taken."""
    with pytest.raises(InvalidSettings, match="trusted_proxies must be IP addresses"):
        TrustedProxies([proxy])
