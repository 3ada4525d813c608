"""Text → tokens. `bytes`: a token a byte. Otherwise a Hugging Face `tokenizer.json`, by file or by name.

Without a chat template (`chat`), a conversation becomes, for each message, `<|role|>`, a line break, the content and
another one; the loss counts the contents of the assistant's messages, with their line break, and nothing else.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raylaunch.data.dataset import Tokens
from raylaunch.errors import DataError, UsageError

_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""What tokenizers call the end of a document, the first that a vocabulary has."""


class Tokenizer(Protocol):
    """`separator` ends each document; every token is below `vocab_size`."""

    name: str
    vocab_size: int
    separator: int
    sha256: str

    def encode(self, text: str | bytes) -> Tokens: ...
    def decode(self, tokens: npt.NDArray[Any]) -> str: ...


def load(spec: str) -> Tokenizer:
    """`bytes`, a `tokenizer.json` (or a directory with one), or `hf:NAME` of the Hugging Face hub."""
    if spec == "bytes":
        return Bytes()
    try:
        import tokenizers  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UsageError(f"tokenizer {spec} needs the package tokenizers", "pip install 'raylaunch[hf]'") from error
    try:
        if spec.startswith("hf:"):
            return PretrainedTokenizer(spec, tokenizers.Tokenizer.from_pretrained(spec.removeprefix("hf:")))
        path = Path(spec).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        return PretrainedTokenizer(str(path.absolute()), tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the package raises Exception itself
        raise UsageError(
            f"no tokenizer {spec}: {' '.join(str(error).split())}",
            "Give `bytes`, the path of a tokenizer.json, or hf:NAME (which asks the Hugging Face hub).",
        ) from error


def dtype(tokenizer: Tokenizer) -> str:
    """The smallest type that holds its tokens."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def conversation(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> tuple[Tokens, npt.NDArray[np.uint8]]:
    """The tokens of a conversation without its separator, and 1 where the loss counts."""
    tokens, counts = [], []
    for message in messages:
        answered = message["role"] == "assistant"
        for text, counted in ((f"<|{message['role']}|>\n", False), (f"{message['content']}\n", answered)):
            tokens.append(tokenizer.encode(text))
            counts.append(np.full(len(tokens[-1]), counted, np.uint8))
    return np.concatenate(tokens), np.concatenate(counts)


class Bytes:
    """UTF-8 as it is."""

    name, vocab_size, separator = "bytes", 257, 256
    sha256 = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str | bytes) -> Tokens:
        raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.uint16)

    def decode(self, tokens: npt.NDArray[Any]) -> str:
        return bytes(tokens[tokens < self.separator].astype(np.uint8)).decode(errors="replace")


class PretrainedTokenizer:
    """A tokenizer of the package `tokenizers`."""

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self._inner = name, inner
        inner.encode_special_tokens = True  # a document that spells one out holds text, no token
        self.vocab_size = int(inner.get_vocab_size(with_added_tokens=True))
        known = [inner.token_to_id(end) for end in _ENDS]
        found = [int(id_) for id_ in known if id_ is not None]
        if not found:
            raise DataError(
                f"tokenizer {name} has no token for the end of a document", f"It should have one of {', '.join(_ENDS)}."
            )
        self.separator = found[0]
        self.sha256 = hashlib.sha256(inner.to_str().encode()).hexdigest()
        self._dtype = np.dtype(dtype(self))

    def encode(self, text: str | bytes) -> Tokens:
        """DataError when raw text is not UTF-8."""
        try:
            said = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: byte {error.start}") from error
        return np.array(self._inner.encode(said, add_special_tokens=False).ids, self._dtype)

    @property
    def marks(self) -> list[str]:
        """Its special tokens, as text."""
        return [str(token.content) for token in self._inner.get_added_tokens_decoder().values() if token.special]

    def encode_marked(self, text: str) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Text in which special tokens are meant as such: the tokens, and where in the text each begins."""
        self._inner.encode_special_tokens = False
        found = self._inner.encode(text, add_special_tokens=False)
        self._inner.encode_special_tokens = True
        return np.array(found.ids, self._dtype), np.array([start for start, _ in found.offsets], np.int64)

    def decode(self, tokens: npt.NDArray[Any]) -> str:
        return str(self._inner.decode([int(t) for t in tokens if t != self.separator], skip_special_tokens=False))
