"""From one layout to another: llama2.c's binary files and Hugging Face folders, in fp32 or bf16."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recsys_moe.errors import UserError
from recsys_moe.llm import checkpoints, llama2c
from recsys_moe.llm.layers import Decoder

# What a folder holds beside weights and config.json.
_BESIDE = ("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


Mixture = Callable[[Decoder], tuple[dict[str, Any], dict[str, torch.Tensor]]]
"""Makes a mixture of a dense model: the changes in its `config.json`, and its tensors (`recsys_moe.llm.upcycle`)."""


def convert(
    source: str | Path,
    target: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    mixture: Mixture | None = None,
) -> Decoder:
    """Write `source` as `target`; each is a Hugging Face folder or a llama2.c file (`*.bin`).

    Args:
        tokenizer: llama2.c's tokenizer file, for a folder made from its model.
        dtype: of the weights that are written; None: as they are.
        mixture: what is written is a mixture made of the source.

    Raises:
        UserError: what `target` is to be is there already, or can't hold the model; a source that can't be read.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise UserError(f"{target} is there already; give another name or remove it")
    if source.is_file():
        values, tensors = llama2c.read(source)
        model = _filled(values, tensors, dtype or torch.float32, source)
    else:
        values, model = checkpoints.read_config(source), checkpoints.load(source, dtype)
    if mixture is not None:
        changes, tensors = mixture(model)
        values = {name: value for name, value in values.items() if name not in ("attention_bias", "mlp_bias")} | changes
        model = _filled(values, tensors, model.config.dtype, source)
    if target.suffix == ".bin":
        llama2c.write(model, target)
        return model
    checkpoints.save(model, values, target)
    if tokenizer is not None:
        llama2c.tokenizer(tokenizer).save(str(target / "tokenizer.json"))
    elif source.is_dir():
        copy_beside(source, target)
    return model


def _filled(values: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype, where: Path) -> Decoder:
    model = checkpoints.build(values, dtype, where)
    for name, place in model.tensors().items():
        assert isinstance(place, torch.Tensor)
        place.copy_(tensors[name])
    return model


def copy_beside(source: Path, target: Path) -> None:
    """Copy a checkpoint's tokenizer and settings of generation."""
    for path in sorted({path for pattern in _BESIDE for path in source.glob(pattern)}):
        shutil.copyfile(path, target / path.name)
