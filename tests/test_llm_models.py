"""Each family against transformers: a small random model that it saved, read here, gives its logits, tokens and routing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from recsys_moe.experts import MLPExperts
from recsys_moe.llm.batch import BLOCK, KVCache, TokenBatch
from recsys_moe.llm.checkpoints import load
from recsys_moe.llm.engine.load import RELEASE, ExpertLoad
from recsys_moe.llm.layers import CachedStep, Decoder, RMSNorm
from recsys_moe.routing import SparsePlan, TopKRouter, sparse_plan

transformers.logging.set_verbosity_error()
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,  # the default's logits are nearly equal: an argmax would say little
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "beta_fast": 32,
    "beta_slow": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (
        lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True, rope_parameters=LLAMA3),
        transformers.LlamaForCausalLM,
    ),
    "mistral": (lambda: transformers.MistralConfig(**GROUPED, head_dim=16, sliding_window=20), transformers.MistralForCausalLM),
    "mixtral": (
        lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=6, num_experts_per_tok=2, sliding_window=None),
        transformers.MixtralForCausalLM,
    ),
    "mixtral-window": (
        lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
        transformers.MixtralForCausalLM,
    ),
    "qwen2_moe": (
        lambda: transformers.Qwen2MoeConfig(
            **{**GROUPED, "num_hidden_layers": 3},
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=6,
            num_experts_per_tok=3,
            mlp_only_layers=[0],
        ),
        transformers.Qwen2MoeForCausalLM,
    ),
    "qwen2_moe-window": (
        lambda: transformers.Qwen2MoeConfig(
            **GROUPED,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            use_sliding_window=True,
            sliding_window=11,
        ),
        transformers.Qwen2MoeForCausalLM,
    ),
    "olmoe": (
        lambda: transformers.OlmoeConfig(**GROUPED, num_experts=8, num_experts_per_tok=3, clip_qkv=1.5),
        transformers.OlmoeForCausalLM,
    ),
    "deepseek_v2": (
        lambda: transformers.DeepseekV2Config(
            **LATENT,
            n_shared_experts=2,
            q_lora_rank=20,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
            rope_parameters=YARN,
        ),
        transformers.DeepseekV2ForCausalLM,
    ),
    "deepseek_v2-lite": (
        lambda: transformers.DeepseekV2Config(**LATENT, n_shared_experts=1, q_lora_rank=None),
        transformers.DeepseekV2ForCausalLM,
    ),
    "deepseek_v3": (
        lambda: transformers.DeepseekV3Config(
            **LATENT, n_shared_experts=1, q_lora_rank=20, n_group=4, topk_group=2, rope_parameters=YARN
        ),
        transformers.DeepseekV3ForCausalLM,
    ),
}
PROMPT, NEW = 37, 64


@pytest.fixture(scope="module", params=MODELS)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' model of a family, in fp32 and with its biases away from 0, and the folder that it saved."""
    config, kind = MODELS[request.param]
    torch.manual_seed(0)
    model = kind(config()).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                tensor.add_(torch.randn_like(tensor) / 5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def batch(tokens: Tensor, done: int, blocks: Tensor, outputs: Tensor | None = None) -> TokenBatch:
    """The next tokens of one sequence, `done` tokens of which are in the cache."""
    n = len(tokens)
    int32 = torch.int32
    return TokenBatch(
        tokens,
        torch.arange(done, done + n),
        torch.tensor([0, n], dtype=int32),
        torch.tensor([done + n], dtype=int32),
        blocks,
        torch.arange(n) if outputs is None else outputs,
    )


def greedy(model: Decoder, prompt: Tensor, steps: int) -> tuple[list[int], Tensor]:
    """Prefill, then token by token: the tokens, and the logits of the prompt and of each step but the last."""
    blocks = torch.randperm(20)[: (len(prompt) + steps) // BLOCK + 1].int().unsqueeze(0)
    cache = KVCache.allocate(model, 20)
    logits = [model(batch(prompt, 0, blocks), cache)]
    made = [int(logits[0][-1].argmax())]
    while len(made) < steps:
        logits.append(model(batch(torch.tensor(made[-1:]), len(prompt) + len(made) - 1, blocks), cache))
        made.append(int(logits[-1][0].argmax()))
    return made, torch.cat(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_in_one_call_give_the_bits_of_its_operations(
    dtype: torch.dtype, peer: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = load(peer[1], dtype), torch.arange(PROMPT) % SMALL["vocab_size"]
    attend = CachedStep.attend
    calls: list[int] = []

    def counted(step: CachedStep, layer: int, *rest: Any) -> Tensor:
        calls.append(layer)
        return attend(step, layer, *rest)

    monkeypatch.setattr(CachedStep, "attend", counted)
    _, fused = greedy(model, prompt, 3)
    assert calls == []
    monkeypatch.setattr("recsys_moe.llm.layers.fused_layers", lambda device: None)
    _, apart = greedy(model, prompt, 3)
    assert len(calls) == 3 * len(model.blocks)
    assert torch.equal(fused, apart)


def test_logits_tokens_and_routing_are_transformers_own(peer: tuple[Any, Path]) -> None:
    theirs, folder = peer
    model = load(folder)
    prompt = torch.randint(0, SMALL["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(1))
    plans: list[SparsePlan] = []
    for router in model.modules():
        if isinstance(router, TopKRouter):
            router.register_forward_hook(lambda _m, _i, plan: plans.append(plan))
    made, logits = greedy(model, prompt, NEW)
    with torch.no_grad():
        generated = theirs.generate(prompt[None], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0]
        assert made == generated[PROMPT:].tolist()
        chosen: list[Tensor] = []
        hooks = [m for name, m in theirs.named_modules() if name.endswith((".gate", ".router"))]
        for gate in hooks:
            gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
        expected = theirs(generated[None, :-1]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    layers = len(hooks)
    assert len(plans) == layers * NEW
    for layer in range(layers):
        ours = torch.cat([plan.expert_ids for plan in plans[layer::layers]])
        assert torch.equal(ours.sort(1).values.long(), chosen[layer].sort(1).values)


def step_of(model: Decoder, cache: KVCache) -> Tensor:
    prompt = torch.arange(PROMPT) % SMALL["vocab_size"]
    logits: Tensor = model(batch(prompt, 0, torch.arange(3, dtype=torch.int32)[None]), cache)
    return logits


def two(peer: tuple[Any, Path]) -> tuple[Decoder, Decoder]:
    """A model, and one of the same shape with other weights."""
    one, other = load(peer[1]), load(peer[1])
    for parameter in other.parameters():
        parameter.mul_(1.1)
    return one, other


def test_a_cache_runs_the_model_that_it_is_given_to(peer: tuple[Any, Path]) -> None:
    one, other = two(peer)
    cache = KVCache.allocate(one, 3)
    for model in (one, other, one):
        assert torch.equal(step_of(model, cache), step_of(model, KVCache.allocate(model, 3)))


def test_a_cache_of_another_shape_is_refused(peer: tuple[Any, Path]) -> None:
    model = load(peer[1])
    widths = model.cache_widths()
    for wrong in ([*widths, widths[0]], [widths[0] + 2, *widths[1:]]):
        cache = KVCache([torch.zeros(3, BLOCK, width) for width in wrong])
        with pytest.raises(ValueError, match=r"the cache keeps .* values a token in its layers, the model .*; allocate one"):
            step_of(model, cache)
    with pytest.raises(ValueError, match=r"the cache is torch.bfloat16, the model torch.float32; allocate one for it"):
        step_of(model, KVCache.allocate(load(peer[1], torch.bfloat16), 3))


def test_hooks_see_and_change_what_modules_give_whenever_they_come(peer: tuple[Any, Path]) -> None:
    model = load(peer[1])
    cache = KVCache.allocate(model, 3)
    plain = step_of(model, cache)
    seen: list[Tensor] = []
    for module in [m for m in model.blocks.modules() if isinstance(m, TopKRouter | MLPExperts | RMSNorm)]:
        seen.clear()
        with module.register_forward_pre_hook(lambda _m, args: seen.append(args[0])):
            assert torch.equal(step_of(model, cache), plain)
        stack = isinstance(module, MLPExperts) and len(module.weights[0]) > 1  # asked to `combine`, which no hook sees
        assert len(seen) == (not stack)

    def nothing(router: nn.Module, inputs: Any, plan: SparsePlan) -> SparsePlan:
        return sparse_plan(plan.expert_ids, 0 * plan.weights, plan.num_experts)

    for module in [m for m in model.blocks.modules() if isinstance(m, TopKRouter)]:
        inputs: list[Any] = []
        with module.register_forward_hook(lambda _m, args, _plan, kept=inputs: kept.append(args[0])):
            step_of(model, cache)
        with module.register_forward_pre_hook(lambda _m, args, kept=inputs: kept.append(args[0])):
            step_of(model, cache)
        assert torch.equal(*inputs)
        with module.register_forward_hook(nothing):
            assert not torch.equal(step_of(model, cache), plain)
    assert torch.equal(step_of(model, cache), plain)


def test_whoever_is_told_plans_alone_leaves_layers_in_one_call(peer: tuple[Any, Path]) -> None:
    model = load(peer[1])
    load_of_experts, cache = ExpertLoad(model), KVCache.allocate(model, 3)
    step_of(model, cache)
    assert not cache.bound[model].watched  # of routers that no call has, too: they run by themselves
    load_of_experts.ran(RELEASE)
    routers = [m for m in model.modules() if isinstance(m, TopKRouter)]
    assert len(load_of_experts.counts) == len(routers)
    del load_of_experts
    assert not any(router._forward_hooks for router in routers)  # the model is as it was


@pytest.mark.parametrize("peer", ["mixtral-window", "qwen2_moe", "deepseek_v3"], indirect=True)
def test_a_step_compiles_and_exports(peer: tuple[Any, Path]) -> None:
    model = load(peer[1])
    cache = KVCache.allocate(model, 3)
    plain = step_of(model, cache)
    b = batch(torch.arange(PROMPT) % SMALL["vocab_size"], 0, torch.arange(3, dtype=torch.int32)[None])
    fields = (b.tokens, b.positions, b.starts, b.lengths, b.blocks, b.outputs)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, fields: list[Tensor], layers: list[Tensor]) -> Tensor:
            logits: Tensor = self.model(TokenBatch(*fields), KVCache(layers))
            return logits

    layers = KVCache.allocate(model, 3).layers
    torch.compiler.reset()
    assert torch.equal(torch.compile(Step(), fullgraph=True, backend="eager")(list(fields), layers), plain)
    exported = torch.export.export(Step(), (list(fields), layers)).module()
    layers = KVCache.allocate(model, 3).layers
    assert torch.equal(exported(list(fields), layers), plain)
    assert all(torch.equal(kept, mine) for kept, mine in zip(cache.layers, layers, strict=True))
