"""A signed notice to an address that the settings allow.

In: an address, a secret, bytes. Out: one POST that was answered with 2xx, or an error. The address must be allowed by
name, and what the name resolves to is what is connected to: no other host, no private network unless that is allowed
too, no redirect, no proxy. Knows nothing of what the notice says. Neither errors nor logs show more of the address than
its host: path and query may be secrets.

Headers: X-Curate-Timestamp (seconds since 1970), X-Curate-Signature ("v1=" + hex HMAC-SHA256 of timestamp + "." + body
under the secret), X-Curate-Delivery (the same for the same notice: a receiver may get it twice).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from curate.errors import DeliveryError

_RETRIED = (408, 425, 429)
_MOST_S = 30.0
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Target:
    """Where notices go. allowed_hosts: names, or patterns as *.example.com. private_hosts: those of them that may
    resolve to a private or loopback address; http is for loopback alone. attempts: in all, `first_wait` s after the
    first, then twice as long each time."""

    url: str
    allowed_hosts: Sequence[str]
    private_hosts: Sequence[str] = ()
    timeout: float = 10.0
    attempts: int = 5
    first_wait: float = 1.0


class _Refused(DeliveryError):
    """Not worth another attempt."""


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """``v1=<hex HMAC-SHA256 of timestamp.body>``."""
    return "v1=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def check(target: Target) -> tuple[str, str, int]:
    """(scheme, host, port) of an allowed address; asks no name server.

    Raises:
        DeliveryError: another scheme, credentials in it, a host that is not allowed.
    """
    try:
        parts = urlsplit(target.url)
        scheme, host, port = parts.scheme.lower(), (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise DeliveryError("audit.webhook's address is no URL; give https://host/path") from None
    if scheme not in ("https", "http") or not host:
        raise DeliveryError(f"audit.webhook's address has the scheme {scheme!r}; give https://host/path")
    if parts.username or parts.password:
        raise DeliveryError(f"audit.webhook's address at {host} holds credentials; the signature is what identifies us")
    if not _listed(host, target.allowed_hosts):
        raise DeliveryError(
            f"audit.webhook may not send to {host}: add it to audit.webhook.allowed_hosts "
            f"(now {list(target.allowed_hosts)!r})"
        )
    if scheme == "http" and not _listed(host, target.private_hosts):
        raise DeliveryError(
            f"audit.webhook sends to {host} by https alone; http is for a loopback address that is listed in "
            f"audit.webhook.private_hosts"
        )
    return scheme, host, port or (443 if scheme == "https" else 80)


def _listed(host: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(host, n.lower()) for n in names)


def resolve(target: Target) -> Address:
    """The address to connect to: the first that the name has, all of which must be allowed.

    Raises:
        DeliveryError: the name has no address, or one of a network that is not allowed.
    """
    scheme, host, port = check(target)
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as e:
        raise DeliveryError(f"audit.webhook: the host {host} has no address ({e})") from None
    found = [ipaddress.ip_address(a[4][0].split("%")[0]) for a in answers if isinstance(a[4][0], str)]
    for address in found:
        plain = getattr(address, "ipv4_mapped", None) or address
        if plain.is_link_local or plain.is_multicast or plain.is_unspecified:
            raise _Refused(f"audit.webhook: {host} is at {address}, where no webhook is (metadata services are)")
        if not plain.is_global and not _listed(host, target.private_hosts):
            raise _Refused(
                f"audit.webhook: {host} is at {address}, in a private network; if that is meant, add the host to "
                f"audit.webhook.private_hosts"
            )
        if scheme == "http" and not plain.is_loopback:
            raise _Refused(f"audit.webhook: http is for loopback alone, and {host} is at {address}; use https")
    return found[0]


def deliver(target: Target, secret: bytes, body: bytes, delivery: str, clock: Callable[[], float] = time.time) -> int:
    """POST `body` until it is answered with 2xx; returns the number of attempts.

    Raises:
        DeliveryError: not allowed; refused (4xx, a redirect); or no success in `target.attempts` attempts.
    """
    check(target)
    tried = 0

    def once() -> None:
        nonlocal tried
        tried += 1
        stamp = str(int(clock()))
        own = {"X-Curate-Timestamp": stamp, "X-Curate-Signature": signature(secret, stamp, body)}
        _post(target, body, {**own, "X-Curate-Delivery": delivery, "Content-Type": "application/json"})

    policy = Retrying(
        stop=stop_after_attempt(target.attempts),
        wait=wait_exponential_jitter(initial=target.first_wait, max=_MOST_S, jitter=target.first_wait),
        retry=retry_if_exception(lambda e: isinstance(e, DeliveryError) and not isinstance(e, _Refused)),
        reraise=True,
    )
    try:
        policy(once)
    except DeliveryError as e:
        raise DeliveryError(f"{e} (after {tried} attempt{'s' if tried > 1 else ''})") from None
    return tried


def _distrust(error: BaseException | None) -> str | None:
    """What is wrong with a certificate, if that is what `error` is about."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


def _trusted() -> ssl.SSLContext:
    """The authorities that the environment names, or those of certifi."""
    try:
        return httpx.create_ssl_context()
    except OSError as e:  # ssl.SSLError is one
        named = {name: os.environ[name] for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ}
        said = " and ".join(f"{name}={value!r}" for name, value in named.items()) or "certifi's list"
        raise _Refused(
            f"audit.webhook: the authorities to trust cannot be read from {said} ({e.strerror or e}); name a readable "
            f"file of PEM certificates, or unset it"
        ) from None


def _post(target: Target, body: bytes, headers: dict[str, str]) -> None:
    scheme, host, port = check(target)
    address = resolve(target)
    parts = urlsplit(target.url)
    at = f"[{address}]" if address.version == 6 else str(address)
    url = f"{scheme}://{at}:{port}{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    named = f"[{host}]" if ":" in host else host
    name = named if port in (80, 443) else f"{named}:{port}"
    try:
        # To the address that was checked, under the name that was allowed: a second look-up could answer otherwise.
        # The environment chooses the authorities that are trusted (SSL_CERT_FILE, SSL_CERT_DIR), and no proxy.
        with httpx.Client(verify=_trusted(), follow_redirects=False, trust_env=False, timeout=target.timeout) as client:
            answer = client.post(
                url, content=body, headers={**headers, "Host": name}, extensions={"sni_hostname": host}
            )
    except httpx.HTTPError as e:
        if (why := _distrust(e)) is not None:
            raise _Refused(
                f"audit.webhook: the certificate of {host} is not trusted: {why}. If an authority of your own "
                f"signed it, name its file in SSL_CERT_FILE"
            ) from None
        raise DeliveryError(f"audit.webhook: {host} does not answer ({type(e).__name__})") from None
    if answer.is_success:
        return
    said = f"audit.webhook: {host} answered {answer.status_code}"
    if answer.is_redirect:
        raise _Refused(f"{said}, a redirect, which is not followed; give the address that it leads to")
    if answer.status_code >= 500 or answer.status_code in _RETRIED:
        raise DeliveryError(said)
    raise _Refused(said)
