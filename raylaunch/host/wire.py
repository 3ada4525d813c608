"""The wire protocol of our own connections (agents and head, workers and driver): JSON lines, and a handshake.

Both sides prove that they know a secret: each answers the other's nonce with an HMAC over it (SHA-256). The secret
itself never travels. What the other side sends may be anything: it may be anybody.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

M = TypeVar("M", bound="Message")


class Message(BaseModel):
    """One line. Fields of another version are ignored; what was not given is not sent."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Greeting(Message):
    """What the listening side sends first."""

    nonce: str


def nonce() -> str:
    return secrets.token_hex(16)


def proof(secret: str, *parts: object) -> str:
    """What proves that we know the secret, for these parts."""
    text = "\x1f".join(map(str, parts))
    return hmac.new(secret.encode(), text.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


def proves(given: object, expected: str) -> bool:
    """Whether the other side knows the secret. `given` may be anything that JSON can say."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(errors="surrogatepass"), expected.encode())


def encoded(message: Message) -> bytes:
    return json.dumps(message.model_dump(exclude_unset=True)).encode() + b"\n"


def decoded(line: bytes, kind: type[M]) -> M:
    """ValueError for what is not such a message."""
    try:
        return kind.model_validate(json.loads(line))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
