"""Products in float8 (torchao), with a scale for each tensor: `distributed.float8`.

The linear layers inside the blocks whose sizes are multiples of 16, as the hardware wants them; weights stay float32
(or are gathered in bfloat16), and are cast for each product. On a CPU it is emulated: to try a config, not to be quick.
"""

from __future__ import annotations

import torch
from torch import nn

from raylaunch.errors import RunError
from raylaunch.trainers.language_model import LanguageModel

LEAST = (8, 9)
"""The compute capability that has it."""


def convert(model: LanguageModel, device: torch.device) -> None:
    """Exchange the linear layers, before the model is split and sharded; RunError where that cannot be."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise RunError("distributed.float8 needs torchao", "pip install 'raylaunch[float8]'") from error
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST:
        raise RunError(
            f"distributed.float8: {torch.cuda.get_device_name(device)} does not support float8",
            "It needs compute capability 8.9 or newer (L4, H100). Set distributed.float8: false.",
        )
    config = Float8LinearConfig(emulate=device.type != "cuda")
    count = 0

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal count
        one = isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)
        one = one and not name.endswith("router")  # small, and its choices must not jump
        count += one
        return one

    for block in model.layers:
        convert_to_float8_training(block, config=config, module_filter_fn=fits)
    if not count:
        raise RunError(
            "distributed.float8: the blocks have no linear layer with sizes that are multiples of 16",
            "Set distributed.float8: false, or change the shape.",
        )
