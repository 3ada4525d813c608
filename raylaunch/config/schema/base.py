"""What all sections share, and the types of their values."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.functional_validators import AfterValidator, BeforeValidator

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(value: str) -> str:
    """A name becomes a directory, a job name and part of a socket path: keep it plain."""
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError("a name has 1 to 63 letters, digits, '.', '_' or '-', and starts with a letter or digit")
    return value


def parse_nodes(value: object) -> str:
    """`4` or `2:8` (Slurm's own `2-8` is understood too), at least one, as the canonical text."""
    text = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"([0-9]+)(?:[:-]([0-9]+))?", text)
    if match is None:
        raise ValueError("nodes is a number (4) or a range (2:8)")
    low = int(match[1])
    high = int(match[2]) if match[2] else low
    if low < 1:
        raise ValueError("nodes must be at least 1")
    if high < low:
        raise ValueError(f"invalid range {low}:{high}: the minimum exceeds the maximum")
    return str(low) if low == high else f"{low}:{high}"


TIME_PATTERN = re.compile(
    r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE", re.IGNORECASE | re.ASCII
)


def parse_time(value: object) -> str:
    """Slurm's time formats, as text; a number is minutes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and TIME_PATTERN.fullmatch(value.strip()):
        return value.strip()
    raise ValueError("time is minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]]")


def check_line(value: str) -> str:
    """What becomes part of one line of the script: an empty one or a second line would break it."""
    if not value.strip() or not value.isprintable():
        raise ValueError("must be one line of text, not empty and without control characters")
    return value


def check_variable(name: str) -> str:
    """An environment variable's name; anything else would be code in the script's `export` line."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("a variable's name has letters, digits and '_', and starts with no digit")
    return name


def check_environment_value(value: str) -> str:
    """The kernel ends a variable's value at a NUL byte."""
    if "\0" in value:
        raise ValueError("must be text without NUL bytes")
    return value


URL_PATTERN = re.compile(r"https?://[!-~]+")


def check_address(value: SecretStr) -> SecretStr:
    """A webhook's address, or where it is found. What is wrong with it is said without it."""
    text = value.get_secret_value()
    if not (URL_PATTERN.fullmatch(text) or re.fullmatch(r"env:[A-Za-z_]\w*|file:.+", text)):
        raise ValueError("must be an address (https://...), env:NAME or file:PATH")
    return value


Name = Annotated[str, AfterValidator(check_name)]
Address = Annotated[SecretStr, AfterValidator(check_address)]
Line = Annotated[str, AfterValidator(check_line)]
Environment = dict[
    Annotated[str, AfterValidator(check_variable)], Annotated[str, AfterValidator(check_environment_value)]
]


Nodes = Annotated[str, BeforeValidator(parse_nodes)]
SlurmTime = Annotated[str, BeforeValidator(parse_time)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """What all sections share: unknown keys refused, values immutable, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    shorthand: ClassVar[str | None] = None
    """The key that a plain value in place of the section stands for."""
