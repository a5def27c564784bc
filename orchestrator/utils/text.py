"""Texts for people: the one line of an error that matters, the word that was meant, no secrets."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_LINE = 300  # characters of an error that stand in a message of ours

HIDDEN = "***"

# scheme://user:password@. As in SQLAlchemy, a database's password may hold any character but @.
DATABASE_LOGIN = re.compile(
    r"((?:postgres|postgresql|mysql|mariadb|mssql|oracle)(?:\+\w+)?://)[^:/@\s]*:[^@\s]*@",
    re.IGNORECASE,
)
# The same for other schemes, with a / in the password; digits after the colon count as a port.
SLASHED_LOGIN = re.compile(r"(://)[^/?#\s:@\[]*:(?!\d+(?:[/?#\s]|$))[^\s@]*@")
LOGIN = re.compile(r"(://)[^/?#\s]*@")

PARAMETER = re.compile(r"([?&;#])([^=&?#;\s/]+)=([^&\s]*)")
# password=... without an address around it, as in the connection string of a database driver.
PASSWORD = re.compile(r"(\b(?:ssl)?(?:password|passwd|pwd)=)[^&;\s'\"]+", re.IGNORECASE)
NAME_IN_VALUE = re.compile(r"([\w.-]+)\s*=")

SECRET_NAME = re.compile(
    r"(?:password|passwd|passphrase|passcode|pwd|token|secret|credentials?|signature"
    r"|apikey|accesskey|accesskeyid)$"
    r"|(?:^|[_.-])(?:pass|key|key_id|sig)$",
    re.IGNORECASE,
)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
SHORTEST_SECRET = 8  # characters; shorter values of secret variables may be common words
KEY_FILE = re.compile(r"^ssl[_-]?key$", re.IGNORECASE)  # the path of a key file, not a key
USER_NAME = re.compile(r"^(?:user|username|uid|user_?id|login)$", re.IGNORECASE)


def first_line(error: BaseException | str, with_type: bool = False) -> str:
    """Return the first line of an error's message, shortened and without secrets.

    An error without a message is named by its type. ``with_type`` puts the type in front of every
    message: ``ValueError: no such file``.
    """
    return _one_line(error, 0, with_type)


def last_line(error: BaseException | str) -> str:
    """Return the last line of an error's message, as ``first_line`` returns the first."""
    return _one_line(error, -1, with_type=False)


def _one_line(error: BaseException | str, index: int, with_type: bool) -> str:
    lines = str(error).strip().splitlines()
    line = lines[index].strip() if lines else ""
    if isinstance(error, BaseException) and (with_type or not line):
        name = type(error).__name__
        line = f"{name}: {line}" if line else name
    return mask_secrets(line)[:MAX_LINE]  # a secret cut in two would not be recognised


def first_fault(error: ValidationError) -> str:
    """Return the first fault that pydantic found, after the dotted key of its place."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def nearest(word: str, words: Iterable[str]) -> str:
    """Return the one of ``words`` that ``word`` probably stands for; empty when none is near."""
    lowered = {candidate.lower(): candidate for candidate in words}
    matches = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else ""


def mask_secrets(text: str) -> str:
    """Hide logins and secret query parameters in the addresses of a text.

    This covers ``scheme://user:password@host``, ``scheme://host?password=...``, and also tokens and
    keys. Masking a masked text again changes nothing.
    """
    text = DATABASE_LOGIN.sub(rf"\1{HIDDEN}@", text)
    text = SLASHED_LOGIN.sub(rf"\1{HIDDEN}@", text)
    text = LOGIN.sub(rf"\1{HIDDEN}@", text)
    text = PARAMETER.sub(_masked_parameter, text)
    return PASSWORD.sub(rf"\1{HIDDEN}", text)


def hide_secrets(text: str) -> str:
    """Hide the secrets of addresses, tokens of the hub, and values of secret variables.

    For texts that are published: a variable of the environment whose name says that it is a secret
    must not appear in them.
    """
    text = HUB_TOKEN.sub(HIDDEN, mask_secrets(text))
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and _is_secret(name):
            text = text.replace(value, HIDDEN)
    return text


def holds_login(url: str) -> bool:
    """Tell whether an address holds a user name, a password, a token or a key anywhere."""
    if mask_secrets(url) != url or LOGIN.search(url):
        return True
    return any(
        USER_NAME.search(_decoded(name)) for _, name, value in PARAMETER.findall(url) if value
    )


def _masked_parameter(parameter: re.Match[str]) -> str:
    separator, name, value = parameter.groups()
    if value and (_is_secret(_decoded(name)) or _holds_secret(_decoded(value))):
        return f"{separator}{name}={HIDDEN}"
    return parameter[0]


def _is_secret(name: str) -> bool:
    return bool(SECRET_NAME.search(name)) and not KEY_FILE.search(name)


def _holds_secret(value: str) -> bool:
    """Tell whether a value, as a connection string or an address of its own, holds a secret."""
    return bool(LOGIN.search(value)) or any(map(_is_secret, NAME_IN_VALUE.findall(value)))


def _decoded(text: str) -> str:
    return unquote_plus(text)
