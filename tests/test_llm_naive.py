"""The families that transformers has no decoder for: its MoE block where there is one, and a naive decoder."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from recsys_moe.llm import checkpoints
from recsys_moe.llm.generate import OneSequence, generate, greedy

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
V1 = SMALL | {
    "model_type": "deepseek",
    "num_hidden_layers": 2,
    "moe_intermediate_size": 12,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
SWITCH = SMALL | {"model_type": "switch_decoder", "num_hidden_layers": 3, "num_experts": 4, "decoder_sparse_step": 2}
PROMPT = torch.randint(0, 64, (23,), generator=torch.Generator().manual_seed(3))


def folder_of(values: dict[str, Any], tmp_path: Path) -> Path:
    """A random model of this configuration, written."""
    torch.manual_seed(0)
    model = checkpoints.build(values, torch.float32, tmp_path / "config.json")
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4)
    checkpoints.save(model, values, tmp_path)
    return tmp_path


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x_nhd: Tensor) -> Tensor:
    """Halves turned as complex numbers."""
    n, _, dim = x_nhd.shape
    angles = torch.arange(n).unsqueeze(1) * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    turned = torch.complex(*x_nhd.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat([turned.real, turned.imag], -1).float()


def naive(values: dict[str, Any], w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of all tokens, token by token where there are experts."""
    x, n = w["model.embed_tokens.weight"][tokens], len(tokens)
    for i in range(values["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = rms_norm(x, w[at + "input_layernorm.weight"])
        q, k, v = ((h @ w[f"{at}self_attn.{name}_proj.weight"].T).view(n, -1, 8) for name in "qkv")
        q, k, v = (t.transpose(0, 1) for t in (rotate(q), rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
        scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w[at + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"])
        ffn = deepseek_ffn if values["model_type"] == "deepseek" else switch_ffn
        x = x + torch.stack([ffn(values, {k.removeprefix(at + "mlp."): t for k, t in w.items()}, row) for row in h])
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def swiglu(w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    gate, up, down = (w[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def deepseek_ffn(values: dict[str, Any], w: dict[str, Tensor], x: Tensor) -> Tensor:
    if "gate.weight" not in w:
        return swiglu(w, "", x)
    chances = (w["gate.weight"] @ x).softmax(0)
    best = chances.argsort(descending=True)[: values["num_experts_per_tok"]].tolist()
    return sum((chances[e] * swiglu(w, f"experts.{e}.", x) for e in best), swiglu(w, "shared_experts.", x))


def switch_ffn(values: dict[str, Any], w: dict[str, Tensor], x: Tensor) -> Tensor:
    at, chance = "", torch.tensor(1.0)
    if "router.classifier.weight" in w:
        chances = (w["router.classifier.weight"] @ x).softmax(0)
        at, chance = f"experts.expert_{int(chances.argmax())}.", chances.max()
    return chance * (w[f"{at}wo.weight"] @ (w[f"{at}wi.weight"] @ x).relu())


@pytest.mark.parametrize("values", [V1, SWITCH], ids=["deepseek", "switch"])
def test_logits_and_tokens_are_a_naive_decoders(values: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(values, tmp_path)
    model, weights = checkpoints.load(folder), safetensors.torch.load_file(folder / "model.safetensors")
    made = list(generate(model, PROMPT.tolist(), 32))
    every = torch.tensor([*PROMPT.tolist(), *made])
    expected = naive(values, weights, every)
    assert [greedy(row) for row in expected[len(PROMPT) - 1 : -1]] == made
    sequence = OneSequence(model, len(every))
    logits = torch.cat([sequence.feed(every[:20].tolist(), True), *(sequence.feed([int(t)]) for t in every[20:])])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_deepseek_block_is_transformers_own(tmp_path: Path) -> None:
    # v1's block is V2's with greedy choice and no factor.
    folder = folder_of(V1, tmp_path)
    names = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
    config = transformers.DeepseekV2Config(**{name: V1[name] for name in names}, num_attention_heads=4, topk_method="greedy")
    theirs, ours = DeepseekV2Moe(config).eval(), checkpoints.load(folder).blocks[1].ffn
    theirs.experts.gate_up_proj.copy_(ours.experts.weights[0][:6])
    theirs.experts.down_proj.copy_(ours.experts.weights[1][:6])
    theirs.gate.weight.copy_(ours.router.linear.weight)
    for name, tensor in ours.tensors().items():
        if name.startswith("shared_experts"):
            theirs.get_parameter(name).copy_(tensor.whole())
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x[None])[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_switch_block_is_transformers_own(tmp_path: Path) -> None:
    folder = folder_of(SWITCH, tmp_path)
    config = transformers.SwitchTransformersConfig(d_model=32, d_ff=48, num_experts=4, expert_capacity=1000)
    theirs, ours = SwitchTransformersSparseMLP(config).eval(), checkpoints.load(folder).blocks[1].ffn
    theirs.load_state_dict(ours.tensors())
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x[None])[0], atol=1e-5, rtol=1e-5)
