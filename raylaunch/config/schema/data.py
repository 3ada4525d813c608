"""`data:` what it is trained on."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import NotNegative, Section, Share

STDLIB = "stdlib:"
LEAST_SHARE = 0.001
"""Of a mixture, for any of its parts."""


class DataConfig(Section):
    """`data:` text byte by byte, or what `raylaunch data prepare` made of documents."""

    text: list[str] = Field(default_factory=lambda: [STDLIB], min_length=1)
    """Files, directories, globs, or `stdlib:` for Python's own library source."""
    prepared: str | None = None
    """In place of `text`: a directory that `raylaunch data prepare` made."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """In place of `text`: several such directories, each with its weight; samples are taken in these proportions."""
    validation: str | None = None
    """A prepared directory to validate on. Default: val_fraction of what is trained on, held out."""
    document_mask: bool | None = None
    """Attention stays inside a document, and no document is predicted from the one before. Default: for conversations."""
    seq_len: Annotated[int, Field(ge=2)] = 256
    val_fraction: Share = 0.01
    seed: NotNegative = 0

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
