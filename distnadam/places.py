"""What a user writes for a place, a path or a URL, as what it means everywhere.

Whoever is given a place makes one here, where and when it is given: an absolute path, or a URL as
it was written. What could be taken for either is refused. No file system is asked.
"""

import os
import re
from typing import Any
from urllib.parse import unquote

from distnadam.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_KNOWN = (
    "abfs|abfss|adl|az|dbfs|file|ftp|gcs|gs|hdfs|http|https|local|memory|oci|oss|s3|s3a|sftp|smb"
    "|ssh|wasb|wasbs|webdav|webhdfs"
)
_HALF_URL = re.compile(rf"[^/]*:/|[a-z]:\\|(?:{_KNOWN}):|.*/(?:{_KNOWN}):/", re.I | re.DOTALL)
"""A path that begins as host:/x, s3:/x, s3:x or C:\\x do, or has a scheme inside as /runs/s3:/x."""
_PASSWORD = re.compile(
    r"(?P<user>\b[A-Za-z][A-Za-z0-9+.-]*:/{1,2}[^/?#\s:@\[]*):"
    r"(?:[^/?#\s]*|(?!\d*[/?#])\S*)(?=@)"  # a port is no password; one may have a slash
)
_PARAMETER = re.compile(
    r"(?P<name>[?&;][^=&;#\s]*(?:pass|pwd|secret|token|key|sig|cred|auth|delegation)[^=&;#\s]*=)[^&;#\s'\"]+",
    re.IGNORECASE,
)
_HIDDEN = "***"
_LEAST_SECRET = 4
"""Characters of a secret that is looked for in the words of others."""
_WITH_BUCKET = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"})


def place(given: Any, what: str) -> str:
    """Return the absolute path or the URL that a user means.

    ``~`` is the home directory, a relative path is of the present working directory, and a URL of
    a file is its path.

    Args:
        given: a str, bytes or `os.PathLike`.
        what: the argument's name, which begins the message of an error.

    Raises:
        ConfigError: it names no place, or looks like a URL and is none, or the reverse.
    """
    try:
        text = os.fsdecode(given)
    except TypeError:
        raise ConfigError(
            f"{what} must be a path or a URL, got {type(given).__name__} {given!r}"
        ) from None
    if not text.strip():
        raise ConfigError(f"{what} must be a path or a URL, got the empty {text!r}")
    if "\0" in text:
        raise ConfigError(f"{what}={shown(text)!r}: no path or URL has a NUL character")
    match = _SCHEME.fullmatch(text)
    if match is not None:
        return _url(match[1].lower(), match[2], text, what)
    if "://" in text or _HALF_URL.match(text):
        raise ConfigError(
            f"{what}={shown(text)!r} looks like a URL and is none: write scheme://host/path, as a "
            "str (a pathlib.Path takes a slash from it), or ./... for a path that begins so"
        )
    return _path(text, what)


def local_path(given: Any, what: str) -> str:
    """Return the absolute path that a user means; raise ConfigError, as `place`, also for a URL."""
    path = place(given, what)
    if "://" in path:
        raise ConfigError(f"{what}={shown(path)!r} must be a path of this machine, not a URL")
    return path


def below(path: str, name: str) -> str:
    """Return the place of a name in a place: before the query of a URL."""
    head, separator, query = path.partition("?") if "://" in path else (path, "", "")
    return f"{head.rstrip('/')}/{name}{separator}{query}"


def above(path: str) -> str:
    """Return the place that a place is in."""
    head, separator, query = path.partition("?") if "://" in path else (path, "", "")
    return f"{head.rstrip('/').rpartition('/')[0]}{separator}{query}" or "/"


def shown(text: str) -> str:
    """Return a place, or a text with URLs in it, as people may read it: without what opens it.

    Left out are passwords, and what parameters say that bear a secret's name, such as ``token``.
    """
    if ":/" not in text:
        return text
    return _PARAMETER.sub(rf"\g<name>{_HIDDEN}", _PASSWORD.sub(rf"\g<user>:{_HIDDEN}", text))


def has_secret(path: str) -> bool:
    """Whether `shown` leaves something out."""
    return shown(path) != path


def shown_by_others(text: str, path: str) -> str:
    """Return what others say of a place, as an error of a file system, without the place's secrets.

    They write it in forms of their own.
    """
    secrets = [match[0].removeprefix(f"{match['user']}:") for match in _PASSWORD.finditer(path)]
    secrets += [match[0].removeprefix(match["name"]) for match in _PARAMETER.finditer(path)]
    for secret in {form for each in secrets for form in (each, unquote(each))}:
        if len(secret) >= _LEAST_SECRET:
            text = text.replace(secret, _HIDDEN)
    return shown(text)


def _url(scheme: str, rest: str, text: str, what: str) -> str:
    host, slash, path = rest.partition("/")
    if scheme in ("file", "local"):
        if host not in ("", "localhost") or not slash:
            raise ConfigError(
                f"{what}={shown(text)!r}: a file's URL has three slashes and an absolute path: "
                f"{scheme}:///..."
            )
        return _path(f"/{unquote(path)}" if scheme == "file" else f"/{path}", what)
    if "://" in rest or "::" in rest:
        raise ConfigError(f"{what}={shown(text)!r}: is several URLs, expected one")
    if not rest.strip("/") or (scheme in _WITH_BUCKET and not host):
        raise ConfigError(f"{what}={shown(text)!r}: names no bucket, host or path")
    before, separator, query = rest.partition("?")
    return f"{scheme}://{before.rstrip('/')}{separator}{query}"


def _path(text: str, what: str) -> str:
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ConfigError(
            f"{what}={text!r}: there is no such home directory; write ./{text} for a name with ~"
        )
    try:
        absolute = os.path.abspath(path)
    except OSError as error:
        raise ConfigError(
            f"{what}={text!r} is relative, and the working directory is gone ({error.strerror}): "
            "give an absolute path"
        ) from error
    return f"/{absolute.lstrip('/')}"  # POSIX keeps two slashes at the beginning
