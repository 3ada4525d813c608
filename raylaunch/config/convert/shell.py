"""A batch script as far as it can be read without running it: its #SBATCH words, and its commands.

One scanner knows quotes, `$(…)`, `${…}`, comments, continued lines and heredocs; whatever it cannot follow is an
error with the line. Nothing is expanded here but variables that the caller knows.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_REFERENCE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)([A-Za-z_]\w*)\1")
_OPENS = {"if", "for", "while", "until", "case", "select", "{", "function"}
_CLOSES = {"fi", "done", "esac", "}"}
_WITHIN = {"then", "do", "else", "elif"}


@dataclass(frozen=True)
class Command:
    """One command of a script. `inside`: in an if, a loop or a function, so that nobody knows whether it runs."""

    text: str
    inside: bool = False


@dataclass
class Script:
    """`directives`: the words of #SBATCH lines."""

    directives: list[str] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)


def read(text: str) -> Script:
    """Raises ValueError with the line where the text is no shell script that can be followed."""
    found, depth = Script(), 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#SBATCH"):
            try:
                found.directives += shlex.split(line.removeprefix("#SBATCH"), comments=True)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
        elif line.strip() and not line.startswith("#"):
            break  # below the first command sbatch does not look
    for piece in _split(text, "\n;"):
        command = piece.strip()
        first = command.split(None, 1)[0] if command else ""
        if first in _CLOSES:
            depth = max(0, depth - 1)
            continue
        opens = first in _OPENS or re.match(r"^\w+\s*\(\)", command) is not None
        depth += opens
        if first in _WITHIN:
            command = command[len(first) :].strip()
        if command and not opens:
            found.commands.append(Command(command, inside=depth > 0))
    return found


def words(command: str) -> list[str]:
    """The words of one command as the shell would make them, substitutions left as they stand; without redirections
    and without what follows a pipe."""
    found: list[str] = []
    skip = False
    for raw in _split(command, " \t\n"):
        if not raw:
            continue
        if raw in {"|", "|&", "||", "&"} or raw.startswith("|"):
            break
        if match := re.match(r"^\d*(?:[<>]{1,3}&?|&>{1,2})", raw):
            skip = match.end() == len(raw)  # the file is the next word
            continue
        if skip:
            skip = False
            continue
        found.append(_unquoted(raw))
    return found


def put_in(text: str, variables: Mapping[str, str]) -> str:
    """With the variables that are known, but not inside single quotes."""

    def known(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2], match[0])

    parts = re.split(r"('[^']*')", text)
    return "".join(part if part.startswith("'") else _REFERENCE.sub(known, part) for part in parts)


def _unquoted(raw: str) -> str:
    """Without its quotes and escapes; what stands in `$(…)` and backticks is left alone."""
    out, at, quote = [], 0, ""
    while at < len(raw):
        char = raw[at]
        if quote != "'" and char == "\\" and at + 1 < len(raw):
            out.append(raw[at + 1] if not quote or raw[at + 1] in '"\\$`' else raw[at : at + 2])
            at += 2
            continue
        if quote != "'" and (raw.startswith("$(", at) or char == "`"):
            end = _closed(raw, at)
            out.append(raw[at:end])
            at = end
            continue
        if char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        else:
            out.append(char)
        at += 1
    return "".join(out)


def _closed(text: str, at: int) -> int:
    """Where the substitution that begins at `at` ends."""
    if text[at] == "`":
        end = text.find("`", at + 1)
        return len(text) if end < 0 else end + 1
    depth = 0
    for index in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0 and text[index] == ")":
            return index + 1
    return len(text)


def _split(text: str, separators: str) -> Iterator[str]:
    """Pieces between separators that stand outside of quotes and substitutions; `&&` separates where `;` does."""
    stack: list[str] = []
    piece: list[str] = []
    heredocs: list[str] = []
    line, opened, at, fresh = 1, 0, 0, True
    while at < len(text):
        char, top = text[at], stack[-1] if stack else ""
        two = text[at : at + 2]
        step = 1
        line += char == "\n"
        if top == "'":
            if char == "'":
                stack.pop()
        elif char == "\\":
            if two == "\\\n":
                at += 2
                line += 1
                piece.append(" ")
                continue
            step = 2
        elif char == top:
            stack.pop()
        elif two in {"$(", "${"}:
            stack.append(")" if two == "$(" else "}")
            step = 2
        elif char in '"`' or (char == "'" and top != '"'):
            stack.append(char)
        elif char == "(" and top in {"", ")"}:
            stack.append(")")
        elif char == "#" and not stack and fresh:
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            continue
        elif not stack and two == "<<" and ";" in separators and (match := _HEREDOC.match(text, at)):
            heredocs.append(match[2])
            step = match.end() - at
        elif not stack and (char in separators or (two == "&&" and ";" in separators)):
            yield "".join(piece)
            piece = []
            at += 2 if two == "&&" else 1
            if char == "\n" and heredocs:
                at, line = _past_heredocs(text, at, line, heredocs)
            fresh = True
            continue
        if stack and not opened:
            opened = line
        elif not stack:
            opened = 0
        piece.append(text[at : at + step])
        fresh = char in " \t\n"
        at += step
    if stack:
        raise ValueError(f"line {opened}: {stack[0]!r} is missing: a quote or a bracket is never closed")
    yield "".join(piece)


def _past_heredocs(text: str, at: int, line: int, names: list[str]) -> tuple[int, int]:
    while names and at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if text[at:end].strip() == names[0]:
            names.pop(0)
        at, line = end + 1, line + 1
    names.clear()
    return min(at, len(text)), line
