"""The wire protocol of our own connections (agents and head, workers and driver): JSON lines, and a handshake.

Both sides prove that they know a secret: each answers the other's nonce with an HMAC over it (SHA-256). The secret
itself never travels. What the other side sends may be anything: it may be anybody.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from typing import Any


def nonce() -> str:
    return secrets.token_hex(16)


def proof(secret: str, *parts: object) -> str:
    """What proves that we know the secret, for these parts."""
    text = "\x1f".join(map(str, parts))
    return hmac.new(secret.encode(), text.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


def proves(given: object, expected: str) -> bool:
    """Whether the other side knows the secret. `given` may be anything that JSON can say."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(errors="surrogatepass"), expected.encode())


def encoded(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def decoded(line: bytes) -> dict[str, Any]:
    """ValueError for what is no JSON object."""
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message
