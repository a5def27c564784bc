"""Addresses of object stores that can hold searches, such as s3://BUCKET/FOLDER."""

from __future__ import annotations

from urllib.parse import urlsplit

from orchestrator.errors import BadInput
from orchestrator.utils.text import holds_login

SCHEMES = ("s3", "gs", "abfs", "file")


def is_address(home: str) -> bool:
    """Tell whether ``home`` is the address of a store rather than a folder."""
    return "://" in home


def check_address(url: str, given_as: str) -> None:
    """Check the address of a store; ``given_as`` names the setting that holds it.

    Raises BadInput for an unknown kind of store, for a missing bucket, and for a key in the
    address.
    """
    parts = urlsplit(url)
    if holds_login(url):
        raise BadInput(
            f"{given_as} holds a key, and addresses end up in logs",
            "put it into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, on the nodes",
        )
    if parts.scheme not in SCHEMES:
        raise BadInput(
            f"{given_as} is {url!r}: no store of kind {parts.scheme!r} is known",
            f"name a folder, or an address with {', '.join(f'{scheme}://' for scheme in SCHEMES)}",
        )
    if parts.scheme != "file" and not parts.netloc:
        raise BadInput(
            f"{given_as} is {url!r}, which names no bucket", f"write {parts.scheme}://BUCKET/FOLDER"
        )
