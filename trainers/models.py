"""Which model a config names."""

from __future__ import annotations

from raylaunch.config.schema import Config, ModelConfig
from raylaunch.trainers.language_model import LanguageModel

__all__ = ["LanguageModel", "make", "vocabulary"]


def make(config: Config, stage: tuple[int, int] = (0, 1)) -> LanguageModel:
    """The model, or one of so many parts of it, to be made on the meta device."""
    recompute = config.distributed.activation_checkpointing
    if config.model.hf is not None:
        from raylaunch.trainers.transformers_model import PretrainedModel  # transformers takes its time

        return PretrainedModel(config.model, recompute)
    if config.model.target is not None:
        from raylaunch.trainers.user_model import Own

        return Own(config)
    from raylaunch.trainers.decoder import Decoder

    return Decoder(config.model, recompute, stage)


def vocabulary(model: ModelConfig) -> int:
    """How many tokens it knows."""
    if model.hf is not None:
        from raylaunch.trainers.transformers_model import description

        return int(description(model).vocab_size)
    return model.vocab_size
