"""Secrets in URLs: found, refused, and left out of what is shown.

In: URLs as a person configured them, and texts of other libraries' errors. Out: the same without credentials,
signatures and tokens. A URL ends up in logs, recipes and reports; the environment does not.
"""

from __future__ import annotations

import re

from curate.errors import StorageError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
# "@" belongs to the name of a place in these: abfs://container@account…, hf://datasets/owner/name@revision
_AT_IN_NAME = ("az", "abfs", "abfss", "hf")
_NO_HOST = ("local", "file", "memory")
_PORT = re.compile(r":\d{1,5}$")
_KEYS = (
    r"(?:x-amz-\w[\w-]*|x-goog-\w[\w-]*|sig|signature|se|sv|sp|awsaccesskeyid|googleaccessid|"
    r"[\w.-]*(?:token|secret|password|passwd|api-?_?key|credential)[\w.-]*)="
)
_SECRET_QUERY = re.compile(rf"[?&]{_KEYS}", re.IGNORECASE)
_IN_TEXT = re.compile(rf"([?&]{_KEYS})[^&\s'\"<>)]+", re.IGNORECASE)
_USER_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/:@'\"]*:[^\s@'\"]+@")


def _credentials(kind: str, rest: str) -> bool:
    """Does the part after `kind://` begin with a user, a password or a key? A secret may hold slashes of its own."""
    if kind in _NO_HOST:
        return False
    host = _PORT.sub("", rest.split("/", 1)[0])
    return ":" in host or ("@" in host and kind not in _AT_IN_NAME)


def shown(url: str) -> str:
    """`url` as it may stand in a message: without credentials before the host, and without its query if that holds a
    signature, a key or a token."""
    outer, chained, url = url.rpartition("::") if "::" in url.split("://")[0] else ("", "", url)
    m = _SCHEME.match(url)
    if not m:
        return outer + chained + url
    rest = url[m.end() :]
    if _credentials(m[1].lower(), rest):
        rest = "…@" + rest.rsplit("@", 1)[1] if "@" in rest else "…"
    if q := _SECRET_QUERY.search(rest):
        rest = rest[: q.start()].split("?")[0] + "?…"
    return outer + chained + m[0] + rest


def check_no_secret(url: str) -> None:
    """
    Raises:
        StorageError: the URL holds credentials, or a query with a signature, key or token. It is shown without them.
    """
    m = _SCHEME.match(url)
    if m and _credentials(m[1].lower(), url[m.end() :]):
        raise StorageError(
            f"cannot use {shown(url)}: credentials in a URL end up in logs and recipes; "
            f"set them in the environment instead, for example AWS_ACCESS_KEY_ID."
        )
    if m and _SECRET_QUERY.search(url):
        raise StorageError(
            f"cannot use {shown(url)}: a presigned URL, or one with a key or token in its query, ends up in logs and "
            f"recipes; give the plain URL, and the credentials in the environment."
        )


def without_secrets(text: str) -> str:
    """The text of another library's error, whatever URLs it tells of: no user's password, no signature, no token."""
    return _USER_IN_TEXT.sub(r"\1…@", _IN_TEXT.sub(r"\1…", text))
