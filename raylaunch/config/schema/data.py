"""`data:` what it is trained on."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import NotNegative, Section, Share

STDLIB = "stdlib:"
LEAST_SHARE = 0.001
"""Of a mixture, for any of its parts."""


class DataConfig(Section):
    """`data:` the training data: plain text, or datasets written by `raylaunch data prepare`."""

    text: list[str] = Field(default_factory=lambda: [STDLIB], min_length=1)
    """Text to train on, byte by byte: files, directories or glob patterns. `stdlib:` is the source code of Python's
    standard library. Example: `["/shared/corpus/*.txt"]`."""
    prepared: str | None = None
    """Train on a dataset that `raylaunch data prepare` wrote, in place of `data.text`. Example: `/shared/tokens`."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Train on several prepared datasets, in proportion to their weights. Example: `{/shared/web: 0.8, /shared/code:
    0.2}`."""
    validation: str | None = None
    """Prepared dataset for validation. Default: hold out `data.val_fraction` of the training data. Example:
    `/shared/tokens-val`."""
    document_mask: bool | None = None
    """Restrict attention to tokens of the same document, and do not predict across document boundaries. Default: true
    for conversations, else false. Example: `true`."""
    seq_len: Annotated[int, Field(ge=2)] = 256
    """Tokens per sample. Example: `4096`."""
    val_fraction: Share = 0.01
    """Fraction of the training data that is held out for validation. Example: `0.005`."""
    seed: NotNegative = 0
    """Seed for the order of samples and for the initial weights. Example: `17`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = {"text": self.text != [STDLIB], "prepared": self.prepared is not None, "mixture": bool(self.mixture)}
        if sum(given.values()) > 1:
            raise ValueError(f"{' and '.join(key for key, is_set in given.items() if is_set)}: give one of them")
        for path, weight in self.mixture.items():
            if weight < LEAST_SHARE * sum(self.mixture.values()):
                raise ValueError(f"mixture: {path} has less than {LEAST_SHARE:.1%} of the weight")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The prepared directories to train on, in order, with their weights; none: `text`."""
        return {self.prepared: 1.0} if self.prepared is not None else dict(sorted(self.mixture.items()))
