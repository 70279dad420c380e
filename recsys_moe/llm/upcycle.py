"""Mixtures made of a dense Llama: Mixtral folders whose experts are its feed-forward layers, copied or cut up.

Shapes: E experts, F the dense layer's hidden units, D the model's width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recsys_moe.errors import UserError
from recsys_moe.llm.layers import Decoder
from recsys_moe.llm.llama import LlamaConfig
from recsys_moe.typed import dump

_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def upcycled(model: Decoder, experts: int, k: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sparse upcycling (Komatsuzaki et al., 2212.05055): E copies of each feed-forward layer, and a fresh router N(0, 0.02).

    The k weights sum to 1, so that the mixture is the dense model to the last bit but rounding, whatever the router says.

    Returns:
        What its `config.json` has in place of the dense one's, and its tensors.

    Raises:
        UserError: a model that is not a plain dense Llama, or k > E.
    """
    return _mixture(model, experts, k, seed, lambda name, weight, layer: [weight] * experts, 1)


def split(model: Decoder, experts: int, k: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LLaMA-MoE (2406.16554): the F hidden units of each layer, shuffled, are shared out among E experts of F/E units.

    Outputs are multiplied by E (in the last matrix), and the k weights sum to 1: k experts of weight 1/k are E/k times their
    sum, as LLaMA-MoE scales it, and all E with equal weights are the dense layer.

    Raises:
        UserError: as `upcycled`; an E that does not divide F.
    """
    hidden = getattr(model.checkpoint, "intermediate_size", 0)
    if hidden % experts:
        raise UserError(f"{experts} experts can't share {hidden} hidden units (intermediate_size) evenly; choose a divisor")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(hidden, generator=generator) for _ in model.blocks]

    def pieces(name: str, weight: Tensor, layer: int) -> list[Tensor]:
        if name == "w2":
            return [piece * experts for piece in weight[:, orders[layer]].chunk(experts, 1)]
        return list(weight[orders[layer]].chunk(experts))

    return _mixture(model, experts, k, seed, pieces, experts)


def _mixture(
    model: Decoder, experts: int, k: int, seed: int, pieces: Callable[[str, Tensor, int], list[Tensor]], parts: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = model.checkpoint
    if not isinstance(config, LlamaConfig) or config.attention_bias or config.mlp_bias:
        raise UserError(f"a mixture is made of a dense Llama without biases, not of this {type(config).__name__}")
    if not 1 <= k <= experts or experts < 2:
        raise UserError(f"top-k is {k} of {experts} experts; choose at least 2 experts and 1 … {experts} of them a token")
    generator = torch.Generator().manual_seed(seed)
    given, tensors = model.tensors(), dict[str, Tensor]()
    for name, tensor in given.items():
        assert isinstance(tensor, Tensor)
        if ".mlp." not in name:
            tensors[name] = tensor
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        router = torch.empty(experts, config.hidden_size).normal_(std=0.02, generator=generator)
        tensors[f"{at}.block_sparse_moe.gate.weight"] = router
        for part, dense in _PARTS.items():
            weight = given[f"{at}.mlp.{dense}.weight"]
            assert isinstance(weight, Tensor)
            for expert, piece in enumerate(pieces(part, weight, layer)):
                tensors[f"{at}.block_sparse_moe.experts.{expert}.{part}.weight"] = piece
    rope = {name: value for name, value in dump(config.rope_parameters).items() if value is not None}
    changes = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": config.intermediate_size // parts,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,  # Mixtral's own defaults are others
        "num_local_experts": experts,
        "num_experts_per_tok": k,
    }
    return changes, tensors
