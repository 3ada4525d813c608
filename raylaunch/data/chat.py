"""Conversations by a tokenizer's own chat template, with the loss on the answers.

The template (Jinja, by transformers) makes one text of a conversation. What it writes between an answer's
prompt and the next message is the answer, its end mark included; that is what the loss counts. A template that
writes earlier messages otherwise when later ones follow cannot be cut so: such a conversation is a bad document.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raylaunch.data.dataset import Tokens
from raylaunch.data.tokenize import PretrainedTokenizer, Tokenizer
from raylaunch.errors import DataError, UsageError

AUTO, PLAIN = "auto", "plain"
_FILES = ("chat_template.jinja", "chat_template.json")
Messages = list[dict[str, str]]


class Template:
    """`text` in Jinja, for the tokenizer in `directory` (or of that name on the hub)."""

    def __init__(self, inner: Any, text: str, specials: list[str]) -> None:
        self._inner, self._text, self._specials = inner, text, specials
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    def encode(self, tokenizer: PretrainedTokenizer, messages: Messages) -> tuple[Tokens, npt.NDArray[np.uint8]]:
        """The tokens, and 1 where the loss counts; DataError for a conversation that cannot be used."""
        for message in messages:
            if spelled := next((mark for mark in self._specials if mark in message["content"]), None):
                raise DataError(f"a message holds {spelled}, which would be read as the mark itself")
        text, answers = self._rendered(messages), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:number], add_generation_prompt=True)
            behind = self._rendered(messages[: number + 1])
            if not (behind.startswith(before) and text.startswith(behind)):
                raise DataError(f"the chat template writes message {number + 1} in more than one way")
            answers.append((len(before), len(behind)))
        tokens, starts = tokenizer.encode_marked(text)
        counts = np.zeros(len(tokens), np.uint8)
        for start, stop in answers:
            counts |= (starts >= start) & (starts < stop)
        return tokens, counts

    def _rendered(self, messages: Messages, **more: Any) -> str:
        if not messages:
            return ""
        import jinja2

        render = self._inner.apply_chat_template
        try:
            return str(render(messages, chat_template=self._text, tokenize=False, **more))
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DataError(f"the chat template refuses it: {error}") from error


def load(spec: str, tokenizer: Tokenizer) -> Template | None:
    """`auto`: the tokenizer's own template, if it has one; `plain`: none; else a file with one. UsageError for what
    cannot be used."""
    if spec == PLAIN or (spec == AUTO and not _has_own(tokenizer)):
        return None
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise UsageError(
            "a chat template needs the tokenizer of a model", "Give --tokenizer as a directory or hf:NAME."
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(
            "chat templates need transformers", "pip install 'raylaunch[hf]', or --chat-template plain"
        ) from error
    try:
        inner = AutoTokenizer.from_pretrained(_place(tokenizer.name))
        text = inner.chat_template if spec == AUTO else Path(spec).expanduser().read_text()
    except (OSError, ValueError) as error:
        raise UsageError(f"no chat template {spec}: {error}", "Give auto, plain, or a file in Jinja.") from error
    if isinstance(text, dict):
        text = text.get("default")
    if not text:
        return None
    return Template(inner, str(text), tokenizer.marks)


def _has_own(tokenizer: Tokenizer) -> bool:
    """Looked up beside a tokenizer.json, without loading transformers; on the hub, that is where it is asked."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        return False
    place = Path(_place(tokenizer.name))
    if tokenizer.name.startswith("hf:"):
        return True
    if any((place / name).exists() for name in _FILES):
        return True
    try:
        return bool(json.loads((place / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError):
        return False


def _place(name: str) -> str:
    return name.removeprefix("hf:") if name.startswith("hf:") else str(Path(name).parent)
