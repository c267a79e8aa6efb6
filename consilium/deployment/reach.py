"""Composition: a hospital's way to the coordinator. In: an address, and whom to believe. Out: findings.

It leads through the proxy that `HTTPS_PROXY` names and `NO_PROXY` does not except, as a node's own connection does.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

Verdict = Literal["good", "doubtful", "bad"]
SKEW = 60.0  # seconds that two clocks may differ: requests are signed with a time
PATIENCE = 10.0  # seconds
SOON = 14 * 86400.0  # seconds before its end in which a certificate is to be replaced


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and where it is not good, what to do."""

    what: str
    verdict: Verdict
    text: str
    remedy: str = ""


def connection(authority: Path, address: str) -> list[Finding]:
    """TLS to the coordinator with the authority that the site believes, and its clock. `address`: host:port."""
    host, _, port = address.rpartition(":")
    proxy = proxy_for(host.strip("[]"))
    by = f" through the proxy {proxy.netloc.rpartition('@')[2]}" if proxy else ""
    try:
        link = _link(host.strip("[]"), int(port), proxy, authority)
        with closing(link):
            link.connect()
            until = str((link.sock.getpeercert() or {}).get("notAfter"))
            link.request("HEAD", "/")
            date = link.getresponse().headers.get("Date")
    except _Unreadable as error:
        return [Finding("connection", "bad", f"{authority} cannot be read: {error}", _AUTHORITY)]
    except ssl.SSLCertVerificationError as error:
        text = f"{address} is not whom keys/{authority.name} vouches for{by}: {error.verify_message}"
        return [Finding("connection", "bad", text, f"{_AUTHORITY}; its certificate must name the address")]
    except (OSError, http.client.HTTPException, ValueError) as error:
        text = f"{address} cannot be reached{by}: {error or type(error).__name__}"
        remedy = "the coordinator starts (consilium coordinator start); open the way out to this one address"
        return [Finding("connection", "bad", text, remedy)]
    text = f"{address}{by}, certificate until {until}"
    if ssl.cert_time_to_seconds(until) - time.time() < SOON:
        return [Finding("connection", "doubtful", text, "the coordinator renews keys/server.pem"), _clock(date)]
    return [Finding("connection", "good", text), _clock(date)]


_AUTHORITY = "ask the coordinator for its ca.crt, and compare by telephone"


class _Unreadable(Exception):
    """The authority's file is missing or none."""


def proxy_for(host: str) -> SplitResult | None:
    """The proxy that leads to a host, as the environment says; ValueError where its port is none."""
    named = getproxies()
    found = named.get("https") or named.get("all")
    if not found or proxy_bypass(host):
        return None
    return urlsplit(found if "://" in found else f"http://{found}")


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment must say, so that parts of this machine speak to each other without a proxy between."""
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [each.strip() for each in given.split(",") if each.strip()]
    hosts += [each for each in ("127.0.0.1", "localhost", "::1") if each not in hosts and "*" not in hosts]
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(hosts))


def _link(host: str, port: int, proxy: SplitResult | None, authority: Path) -> http.client.HTTPSConnection:
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except OSError as error:
        raise _Unreadable(error.strerror or str(error)) from error
    if proxy is None:
        return http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context)
    if proxy.scheme != "http" or not proxy.hostname:
        raise ValueError(f"only a proxy of the form http://host:port can be checked, not {proxy.scheme}://")
    link = http.client.HTTPSConnection(proxy.hostname, proxy.port or 80, timeout=PATIENCE, context=context)
    who = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
    known = {"Proxy-Authorization": f"Basic {base64.b64encode(who).decode()}"} if proxy.username else {}
    link.set_tunnel(host, port, known)
    return link


def _clock(date: str | None) -> Finding:
    if date is None:
        return Finding("clock", "doubtful", "the coordinator does not say what time it is", _TIME)
    try:
        apart = abs((datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds())
    except (TypeError, ValueError):
        return Finding("clock", "doubtful", "the time that the coordinator says is none", _TIME)
    if apart >= SKEW:
        return Finding("clock", "bad", f"{apart:.0f} s from the coordinator's: requests will be refused", _TIME)
    return Finding("clock", "good", f"{apart:.0f} s from the coordinator's")


_TIME = "set both clocks by NTP; more than a minute apart, requests are refused"
