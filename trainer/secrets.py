"""Keeps user names, passwords and tokens out of files and output: addresses without them, texts without them.

This module imports nothing of the project, so that any other may use it.
"""

import os
import re
from collections.abc import MutableMapping
from functools import cache
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlencode

_SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)?$|pwd$|token|secret|api_?key|access_?key|credential|signature|^sig$|^auth", re.I
)
"""Query parameters, and variables, that hold a secret by their name."""

_USER_NAME = re.compile(r"user([ _]?(name|id))?|uid", re.I)
"""Query parameters of a database's address that hold a user name."""

_SHORTEST = 6  # characters of a secret that is searched for by itself: a shorter one occurs in any text
_LONG = 8  # characters from which on a secret is also searched for inside words
_NO_WORD = 16  # characters from which on letters alone count as random
_MARK = r"""(?i:pass(?:word|wd|phrase)?|pwd|token|secret)[\s'":=]{1,5}"""
"""What marks the word after it as a secret."""

_IN_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

# Bounded, so that a text of any length is searched in a time that grows with it and no faster.
_SCHEME = r"(?:(?:https?|postgres(?:ql)?|mysql|mssql)(?:\+\w{1,30})?:/{1,3}|[A-Za-z][A-Za-z0-9+.-]{0,30}://)"
"""What is before an authority: not `sqlite:///` or `C:/`, but for a server any number of slashes."""

_USER_INFO = re.compile(
    rf"""(?<![A-Za-z0-9+.-])({_SCHEME})(?=[^/?#\s'"<>|]{{0,1000}}[:@])[^/?#\s'"<>|][^\s'"<>|]{{0,1000}}@""",
    re.I,
)
_SECRET_PARAMETER = re.compile(
    r"""((?:[?&;]|%3B)(?:user(?:name)?|uid|[^\s=&'"?;]{0,60}"""
    r"""(?:pass(?:word|wd|phrase)?|pwd|token|secret|key|credential|sig(?:nature)?))(?:=|%3D))[^\s&'"]+""",
    re.I,
)
_known: set[str] = set()  # secrets of addresses that this process was given


class Address(str):
    """An address as it may be shown and stored; `full` is the one to connect with.

    As text it has no user name and no password, neither before the host nor in its query.
    """

    full: str

    def __new__(cls, text: str) -> Self:
        if isinstance(text, Address):
            return cls._make(str(text), text.full)
        scheme, separator, rest = text.partition("://")
        text = scheme.lower() + separator + rest if separator else text
        return cls._make(_clean(text), text)

    @classmethod
    def _make(cls, clean: str, full: str) -> Self:
        address = super().__new__(cls, clean)
        address.full = full
        return address

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._make, (str(self), self.full)

    @property
    def has_credentials(self) -> bool:
        return self.full != str(self)

    @property
    def user_info(self) -> tuple[str, str] | None:
        """User name and password, decoded; None where the address has no user name."""
        authority = _split(self.full)[1]
        if "@" not in authority:
            return None
        user, _, password = authority.rpartition("@")[0].partition(":")
        return unquote(user), unquote(password)


def _split(text: str) -> tuple[str, str, str]:
    """`scheme://`, authority, and all after it; the first two are empty where there is no such scheme.

    A password with a slash, a question mark or a hash in it is taken whole: the last `@` ends it.
    """
    scheme = re.match(_SCHEME, text, re.I)
    if scheme is None:
        return "", "", text
    rest = text[scheme.end() :]
    end = re.search(r"[/?#]", rest)
    length = end.start() if end else len(rest)
    authority = rest[:length]
    # `user:pa/ss@host`; `host:80/a@b` has the same form, and is treated alike.
    if "@" in rest and (":" in authority or "@" in authority):
        last = rest.rindex("@")
        end = re.search(r"[/?#]", rest[last:])
        length = last + end.start() if end else len(rest)
        authority = rest[:length]
    return scheme[0], authority, rest[length:]


def _clean(text: str) -> str:
    scheme, authority, rest = _split(text)
    if "@" in authority:
        info, _, authority = authority.rpartition("@")
        _remember(*info.split(":", 1)[-1:])
    head, mark, query = rest.partition("?")
    if mark and scheme:
        pairs = parse_qsl(query, keep_blank_values=True)
        is_database = not scheme.startswith(("sqlite", "http"))
        shown = [_shown(name, value, is_database) for name, value in pairs]
        if shown != pairs:
            query = urlencode([pair for pair in shown if pair is not None])
            rest = f"{head}?{query}" if query else head
    return scheme + authority + rest


def _shown(name: str, value: str, is_database: bool) -> tuple[str, str] | None:
    """A query parameter as it may be shown; None for one that may not."""
    if _SECRET_NAME.search(name):
        _remember(value)
        return None
    if is_database and _USER_NAME.fullmatch(name):
        return None
    if name.lower() != "odbc_connect":
        return name, value
    # `DRIVER={...};UID=user;PWD=password`, or `PWD={pass;word}`
    parts = re.findall(r"[^;={}]+=(?:\{(?:[^}]|\}\})*\}|[^;]*)", value)
    split = [part.strip().partition("=") for part in parts]
    kept = [f"{key}={inner}" for key, _, inner in split if _shown(key, inner.strip("{}"), is_database)]
    return name, value if len(kept) == len(parts) else ";".join(kept)


def _remember(*secrets: str) -> None:
    for secret in secrets:
        _known.update(form for form in (secret, unquote(secret)) if len(form) >= _SHORTEST)


def redacted(text: str) -> str:
    """A text in which no address has a user name or a password, and no secret of this process occurs.

    A secret that is a word, as `mlflow`, stays where nothing marks it as one: it would be taken out of paths
    and sentences, and the gaps would reveal it.
    """
    text = _SECRET_PARAMETER.sub(r"\1***", _USER_INFO.sub(r"\1", text))
    own = [os.environ[name] for name in _IN_VARIABLES if len(os.environ.get(name, "")) >= _SHORTEST]
    for secret in sorted({*_known, *own}, key=len, reverse=True):
        text = _occurrences(secret).sub(r"\1***", text)
    return text


@cache
def _occurrences(secret: str) -> re.Pattern[str]:
    """Where a secret is replaced, after a group 1 that stays: the likelier it occurs by chance, the less."""
    found = re.escape(secret)
    is_word = secret.isdecimal() or (
        secret.isalpha() and secret in (secret.lower(), secret.title(), secret.upper())
    )
    if is_word and len(secret) < _LONG:  # `user:secret@host`, `password 'secret'`
        return re.compile(rf"(:(?={found}@)|{_MARK}){found}(?!\w)")
    if is_word and len(secret) < _NO_WORD:  # not in `/data/secret/x`, `secret.json`, `secret://`
        return re.compile(rf"(?<![\w/\\.-])(){found}(?![\w/\\-]|\.\w|://)")
    if len(secret) < _LONG:
        return re.compile(rf"(?<!\w)(){found}(?!\w)")
    return re.compile(rf"(){found}")


def set_mlflow_credentials(address: Address, variables: MutableMapping[str, str] = os.environ) -> None:
    """Put a server's user name and password into MLflow's own variables, in this process alone."""
    info = address.user_info
    if info is not None and address.startswith(("http://", "https://")):
        variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"] = info


def set_job_credentials(uri: str | None, variables: MutableMapping[str, str] = os.environ) -> None:
    """Put an address's credentials into the variables of processes that are started from here on.

    Their command has the address without them. Those of a database are found in MLFLOW_TRACKING_URI.
    """
    address = Address(uri or "")
    if address.has_credentials:
        set_mlflow_credentials(address, variables)
        if not address.startswith(("http://", "https://")):
            variables["MLFLOW_TRACKING_URI"] = address.full


def with_credentials(address: Address, variables: MutableMapping[str, str] = os.environ) -> Address:
    """The address with the credentials that MLFLOW_TRACKING_URI has for it, where it has none itself."""
    given = Address(variables.get("MLFLOW_TRACKING_URI", ""))
    return given if not address.has_credentials and str(given) == str(address) else address
