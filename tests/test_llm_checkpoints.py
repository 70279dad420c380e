"""Checkpoints: every tensor accounted for, broken and hostile ones refused in a sentence, little memory beside the weights."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from recsys_moe.errors import UserError
from recsys_moe.llm import checkpoints
from recsys_moe.llm.checkpoints import load
from recsys_moe.llm.generate import logprobs

CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,  # as transformers 4 wrote it
    "torch_dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small random Mixtral."""
    torch.manual_seed(0)
    model = checkpoints.build(CONFIG, torch.float32, tmp_path / "config.json")
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4)
    checkpoints.save(model, CONFIG, tmp_path)
    return tmp_path


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Write the weights again with some of them replaced, added or (None) left out."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file({name: t for name, t in weights.items() if tensors.get(name, t) is not None}, path)


def configure(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | values))


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in safetensors.torch.load_file(path).items()}


def test_shards_are_read_like_one_file(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    checkpoints.save(model, CONFIG, tmp_path / "shards", shard_bytes=5000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    again = load(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_transformers_reads_what_is_written(folder: Path) -> None:
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = load(folder)
    assert torch.equal(theirs.model.layers[1].mlp.experts.down_proj, ours.blocks[1].ffn.experts.weights[1])


def test_precision_is_the_checkpoints_or_what_is_asked_for(folder: Path) -> None:
    assert load(folder).config.dtype == torch.float32
    half = load(folder, torch.bfloat16)
    exact = weights(folder)["model.layers.0.block_sparse_moe.experts.2.w1.weight"]
    assert torch.equal(half.blocks[0].ffn.experts.weights[0][2, :24], exact.bfloat16())
    configure(folder, torch_dtype="float16")
    change(folder, **{name: tensor.half() for name, tensor in weights(folder).items()})
    assert load(folder).config.dtype == torch.float32  # the kernels know no fp16
    with pytest.raises(UserError, match="float16; models run in float32 or bfloat16"):
        load(folder, torch.float16)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("model.norm.weight", None, r"1 tensors are missing .*'model.norm.weight'"),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", None, r"experts\.3\.w2\.weight"),
        ("model.layers.0.block_sparse_moe.experts.4.w2.weight", torch.ones(16, 24), "1 tensors are not the model's"),
        ("model.layers.2.input_layernorm.weight", torch.ones(16), "1 tensors are not the model's"),
        ("model.norm.weight", torch.ones(17), r"'model.norm.weight' is \[17\], not \[16\]"),
        ("lm_head.weight", torch.ones(16, 40), r"is \[16, 40\], not \[40, 16\]"),
        ("lm_head.weight", torch.ones(40, 16, dtype=torch.int8), "is I8; weights must be"),
        ("lm_head.weight", torch.ones(40, 16).to(torch.float8_e4m3fn), "dequantise"),
    ],
)
def test_every_tensor_is_accounted_for(folder: Path, name: str, tensor: Tensor | None, says: str) -> None:
    change(folder, **{name: tensor})
    with pytest.raises(UserError, match=says):
        load(folder)


def test_a_tensor_that_says_again_what_is_known_is_no_stranger(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"not the model's: 'lm_head\.weight'"):
        load(folder)  # tied, says config.json, but the two differ
    change(
        folder,
        **{
            "lm_head.weight": weights(folder)["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        },
    )
    model = load(folder)
    assert model.head.weight is model.embedding


def test_broken_and_hostile_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", pickle.dumps({"a": [1] * 100})):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(UserError, match="not the plain name of a file"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00001\.safetensors, which is not there"):
        load(folder)
    for placed in ('["a"]', "null", "3"):
        index.write_text(f'{{"weight_map": {placed}}}')
        with pytest.raises(UserError, match="'weight_map' is no table"):
            load(folder)
    index.write_text('{"weight_map": {"a": {"b": 1}}}')
    with pytest.raises(UserError, match="not the plain name of a file"):
        load(folder)
    for text in (b"{", b'{"a": "\xff"}', b"[" * 100_000):
        index.write_bytes(text)
        with pytest.raises(UserError, match="can't be read as JSON"):
            load(folder)
    with pytest.raises(UserError, match="not a folder"):
        load(tmp_path / "nowhere")


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    safetensors.torch.save_file({"model.norm.weight": torch.ones(16)}, folder / "more.safetensors")
    with pytest.raises(UserError, match=r"is in model\.safetensors and in more\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "mixtrall"}, "'model_type' is 'mixtrall'; did you mean 'mixtral'"),
        ({"model_type": None}, "'model_type' is None"),
        ({"hidden_size": "16"}, "'hidden_size' is '16'"),
        ({"hidden_size": -16}, "hidden_size is -16"),
        ({"num_attention_heads": 3}, "3 does not divide"),
        ({"num_experts_per_tok": 5}, "k is 5, but there are 4 experts"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide num_attention_heads 4"),
        ({"head_dim": 5}, "has 5 values; it must be an even number"),
        ({"hidden_size": 2**40}, "no memory for a model of these sizes"),
        ({"max_position_embeddings": 10**13}, "no memory for a model of these sizes"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 10000"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'rope_parameters.rope_type' is 'longrope'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "needs original_max_position_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"torch_dtype": "float8"}, "'dtype' is 'float8'"),
    ],
)
def test_a_configuration_that_is_not_built_is_refused(folder: Path, values: dict[str, Any], says: str) -> None:
    configure(folder, **values)
    if "rope_scaling" in values:
        saved = json.loads((folder / "config.json").read_text())
        saved.pop("rope_parameters", None)
        (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=says):
        load(folder)


def test_the_layers_of_speculative_decoding_are_known_and_left(tmp_path: Path) -> None:
    values = {
        **{key: CONFIG[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")},
        "model_type": "deepseek_v3",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
        "num_nextn_predict_layers": 1,
    }
    model = checkpoints.build(values, torch.bfloat16, tmp_path / "config.json")
    assert model.blocks[0].ffn.router.correction_bias.dtype == torch.float32
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.fill_(1)
    checkpoints.save(model, values, tmp_path)
    change(tmp_path, **{"model.layers.1.eh_proj.weight": torch.ones(16, 32)})
    load(tmp_path)
    change(tmp_path, **{"model.layers.2.eh_proj.weight": torch.ones(16, 32)})
    with pytest.raises(UserError, match="not the model's"):
        load(tmp_path)


def test_peak_memory_is_little_more_than_the_weights(tmp_path: Path) -> None:
    values = CONFIG | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 2000}
    model = checkpoints.build(values, torch.float32, tmp_path / "config.json")
    for parameter in model.parameters():
        parameter.fill_(0.5)
    checkpoints.save(model, values, tmp_path)
    program = f"""
import re, torch
from pathlib import Path
from recsys_moe.llm.checkpoints import load
def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = memory("VmRSS")
model = load({str(tmp_path)!r})
size = sum(p.nbytes for p in model.parameters())
print(size, (memory("VmHWM") - before) / size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    size, share = done.stdout.split()
    assert int(size) > 100e6
    assert float(share) < 1.2


def test_experts_are_rounded_to_int8_as_they_are_read(folder: Path) -> None:
    plain, rounded = load(folder), load(folder, int8_experts=True)
    for before, after in zip(plain.blocks, rounded.blocks, strict=True):
        for weight, q, scale in zip(
            before.ffn.experts.weights, after.ffn.experts.weights, after.ffn.experts.weight_scales, strict=True
        ):
            assert q.dtype == torch.int8
            assert bool(((q * scale.unsqueeze(2) - weight).abs() <= 0.5001 * scale.unsqueeze(2)).all())
        assert torch.equal(before.ffn.router.linear.weight, after.ffn.router.linear.weight)
        assert torch.equal(before.attention.qkv.weight, after.attention.qkv.weight)
    ids = list(range(30))
    assert logprobs(rounded, ids) == pytest.approx(logprobs(plain, ids), abs=0.05)
    assert logprobs(rounded, ids) != logprobs(plain, ids)


def test_a_dense_model_has_no_experts_to_round(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    with pytest.raises(UserError, match="a llama model has no sparse experts"):
        load(folder, int8_experts=True)
