"""Training language models: gradients of transformers' own models, naive losses, resume to the bit, workers, the whole road."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor

from recsys_moe.checkpoint import Checkpoints
from recsys_moe.errors import UserError
from recsys_moe.llm import checkpoints
from recsys_moe.llm.batch import BLOCK, KVCache, TokenBatch
from recsys_moe.llm.convert import convert
from recsys_moe.llm.layers import Decoder
from recsys_moe.llm.text import TextConfig, byte_tokenizer, prepare_text, read_documents
from recsys_moe.llm.trainer import BalanceConfig, LmTrainConfig, LmTrainer, plans_of, trainable
from recsys_moe.llm.upcycle import split, upcycled
from recsys_moe.pipelines.runs import all_runs, find_run
from recsys_moe.routing import require_invariant
from recsys_moe.typed import dump

transformers.logging.set_verbosity_error()
BASE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LATENT = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_key_value_heads": 4,
}
ROUTED = {**BASE, "model_type": "routed_decoder", "num_experts": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama", "sliding_window": 9},
    "mixtral": {**BASE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**BASE, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.5},
    "qwen2_moe": {
        **BASE,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    },
    "deepseek_v2": {**BASE, **LATENT, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "q_lora_rank": 20},
    "deepseek_v3": {**BASE, **LATENT, "model_type": "deepseek_v3"},
    "switch": {**BASE, "model_type": "switch_decoder", "num_experts": 4, "tie_word_embeddings": True},
    "top_p": {**ROUTED, "router": {"name": "top_p", "p": 0.6}},
    "noisy": {**ROUTED, "router": {"name": "noisy_top_k", "k": 2}},
    "norm": {**ROUTED, "router": {"name": "norm", "k": 2}},
    "gshard": {**ROUTED, "router": {"name": "gshard", "second": "drop"}},
    "hash": {**ROUTED, "router": {"name": "hash"}},
    "biased": {**ROUTED, "router": {"name": "top_k", "k": 2, "scoring": "sigmoid", "correction_bias": True}},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(values: dict[str, Any], scale: float = 1.0) -> Decoder:
    model = trainable(values, torch.float32, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return model


@torch.no_grad()
def served(model: Decoder, tokens_bt: Tensor) -> Tensor:
    """The logits that inference gives, over the paged cache."""
    rows, length = tokens_bt.shape
    blocks = torch.arange(rows * -(-length // BLOCK), dtype=torch.int32).view(rows, -1)
    batch = TokenBatch(
        tokens_bt.flatten(),
        torch.arange(length).repeat(rows),
        torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        torch.full((rows,), length, dtype=torch.int32),
        blocks,
        torch.arange(rows * length),
    )
    model.eval()
    logits = model(batch, KVCache.allocate(model, blocks.numel())).view(rows, length, -1)
    model.train()
    return logits


def some_tokens(rows: int = 3, length: int = 21) -> Tensor:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("values", FAMILIES.values(), ids=FAMILIES)
def test_training_computes_what_inference_does_and_reaches_every_weight(values: dict[str, Any]) -> None:
    model = model_of(values, scale=8.0)
    tokens = some_tokens()
    model.eval()  # routers' noise is for training alone
    logits = model.score(tokens)
    torch.testing.assert_close(logits, served(model, tokens), atol=1e-4, rtol=0)
    model.train()
    F.cross_entropy(model.score(tokens).flatten(0, 1), tokens.flatten()).backward()
    still = ("noise",)  # its gradient is the load loss's
    without = [
        n for n, p in model.named_parameters() if (p.grad is None or not p.grad.any()) and not any(s in n for s in still)
    ]
    assert not [name for name in without if "router.linear" not in name or "hash" not in str(values)]


PEERS: dict[str, tuple[Any, Any]] = {
    "llama": (lambda: transformers.LlamaConfig(**BASE, tie_word_embeddings=True), transformers.LlamaForCausalLM),
    "mixtral": (
        lambda: transformers.MixtralConfig(
            **BASE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.0
        ),
        transformers.MixtralForCausalLM,
    ),
    "olmoe": (
        lambda: transformers.OlmoeConfig(**BASE, num_experts=4, num_experts_per_tok=2),
        transformers.OlmoeForCausalLM,
    ),
}


@pytest.mark.parametrize("family", PEERS)
def test_loss_and_gradients_are_transformers_own(family: str, tmp_path: Path) -> None:
    config, kind = PEERS[family]
    torch.manual_seed(0)
    theirs = kind(config()).train()
    theirs.save_pretrained(tmp_path / "before")
    ours = trainable(checkpoints.read_config(tmp_path / "before"), torch.float32, 0, tmp_path / "before")
    tokens = some_tokens()
    loss = F.cross_entropy(ours.score(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    expected = theirs(tokens, labels=tokens).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    # Gradients by the checkpoint's names: each side's put in the weights' place, and saved by its own road.
    with torch.no_grad():
        for model in (ours, theirs):
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    wanted = trainable(checkpoints.read_config(tmp_path / "before"), torch.float32, 0, tmp_path / "gradients").tensors()
    for name, gradient in ours.tensors().items():
        assert isinstance(gradient, Tensor)
        torch.testing.assert_close(gradient, wanted[name], atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# ---- text


def text_file(folder: Path, size: int = 6000) -> Path:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "naïve", "dog"]
    path = folder / "text.txt"
    path.write_text(" ".join(rng.choice(words, size)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return prepare_text(TextConfig(str(text_file(folder))), folder / "tokens", None)[0]


def test_tokens_of_a_text_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n<|endoftext|>\nsecond übung\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("third, which is the longest of them all", encoding="utf-8")
    assert read_documents(str(tmp_path)) == ["first", "second übung", "third, which is the longest of them all"]
    for kind in ("byte", "bpe"):
        config = TextConfig(str(tmp_path), tokenizer=kind, vocab_size=270, validation=0.2)  # type: ignore[arg-type]
        folder, text = prepare_text(config, tmp_path / kind, None)
        parts = [np.load(folder / f"{part}.npy") for part in ("train", "validation")]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        whole = "".join(theirs.decode(part) for part in parts).replace("<|endoftext|>", "")
        assert whole == "".join(read_documents(str(tmp_path)))
        assert [len(part) for part in parts] == [text.tokens["train"], text.tokens["validation"]]
        assert theirs.eos_token_id == text.eos_id == text.vocab_size - 1
    assert byte_tokenizer().decode(byte_tokenizer().encode("naïve 🙂").ids) == "naïve 🙂"


# ---- balance

MOE = FAMILIES["mixtral"]
SHORT = LmTrainConfig(steps=6, warmup=2, batch_size=4, context=16, lr=1e-2, evaluate_steps=3)


def test_losses_and_the_bias_follow_a_naive_loop(tokens: Path) -> None:
    factors = BalanceConfig(auxiliary=0.3, z=0.1, importance=0.2, entropy=0.05, bias_rate=0.01)
    told: list[dict[str, Any]] = []
    trainer = LmTrainer(tokens, FAMILIES["biased"], replace(SHORT, steps=1, balance=factors), told.append)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    windows = torch.from_numpy(trainer.windows.random((0, 0), 4))
    with torch.no_grad(), plans_of(trainer.model) as plans:
        logits = trainer.model.score(windows[:, :-1])
    layers = list(plans.values())
    naive = dict.fromkeys(("auxiliary", "z", "importance", "entropy"), 0.0)
    biases = []
    for plan in layers:
        scores, chosen = torch.sigmoid(plan.logits), [0] * 4
        probabilities, importance = scores / scores.sum(1, keepdim=True), torch.zeros(4)
        for row in range(64):
            for slot in range(2):
                expert = int(plan.expert_ids[row, slot])
                chosen[expert] += 1
                importance[expert] += plan.weights[row, slot].detach()
        naive["auxiliary"] += sum(4 * chosen[e] / 128 * float(probabilities[:, e].mean()) for e in range(4))
        naive["z"] += float(sum(torch.log(torch.exp(row).sum()) ** 2 for row in plan.logits)) / 64
        naive["importance"] += float(((importance - importance.mean()) ** 2).mean() / importance.mean() ** 2)
        naive["entropy"] += float(sum(-(row * row.log()).sum() for row in probabilities)) / 64
        biases.append([0.01 * np.sign(32 - chosen[e]) for e in range(4)])
    nll = 0.0
    for b in range(4):
        for t in range(16):
            nll -= float(torch.log_softmax(logits[b, t], 0)[windows[b, t + 1]]) / 64
    trainer.fit()
    (step,) = [event for event in told if event["kind"] == "step"]
    assert step["train.loss"] == pytest.approx(nll, abs=1e-5)
    for name, value in naive.items():
        assert step[f"train.{name}_loss"] == pytest.approx(value, abs=1e-4), name
    found = [block.ffn.router.correction_bias.tolist() for block in trainer.model.blocks]  # type: ignore[union-attr]
    np.testing.assert_allclose(found, biases, atol=1e-7)
    assert all(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    (experts,) = [event for event in told if event["kind"] == "experts"]
    loads = [experts["layers"][f"layer {i}"]["load"] for i in range(2)]
    np.testing.assert_allclose(loads, [np.bincount(p.expert_ids.flatten(), minlength=4) / 128 for p in layers], atol=1e-6)


def test_capacity_drops_in_training_alone(tokens: Path) -> None:
    told: list[dict[str, Any]] = []
    LmTrainer(tokens, MOE, replace(SHORT, capacity_factor=0.5), told.append).fit()
    dropped = [e["layers"]["layer 1"]["dropped_share"] for e in told if e["kind"] == "experts"]
    assert len(dropped) == 2
    assert min(dropped) > 0.4
    with pytest.raises(ValueError, match="training mode"):
        require_invariant(trainable(MOE, torch.float32, 0))


@pytest.mark.parametrize("freeze", ["experts", "others"])
def test_what_is_frozen_stays(freeze: str, tokens: Path) -> None:
    trainer = LmTrainer(tokens, MOE, replace(SHORT, freeze=freeze, expert_dropout=0.1))  # type: ignore[arg-type]
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    experts = {n for n in before if ".ffn.experts." in n}
    assert changed == (experts if freeze == "others" else set(before) - experts)


# ---- going on, workers


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_that_went_on_ends_with_the_same_bits(precision: str, tokens: Path, tmp_path: Path) -> None:
    balance = BalanceConfig(load=0.1, auxiliary=0.01)
    values = {**FAMILIES["noisy"], "tie_word_embeddings": True}
    config = replace(SHORT, precision=precision, balance=balance, expert_dropout=0.2, checkpoint_steps=2)  # type: ignore[arg-type]
    whole = LmTrainer(tokens, values, config)
    whole.fit()

    class Stopped(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint" and event["step"] == 4:
            raise Stopped

    with pytest.raises(Stopped):
        LmTrainer(tokens, values, config, stop, Checkpoints(tmp_path / "state")).fit()
    told: list[dict[str, Any]] = []
    second = LmTrainer(tokens, values, config, told.append, Checkpoints(tmp_path / "state"))
    assert told[0] == {"kind": "resume", "step": 4}
    second.fit()
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_of_another_text_is_refused(tokens: Path, tmp_path: Path) -> None:
    config, state = replace(SHORT, checkpoint_steps=2), Checkpoints(tmp_path / "state")
    LmTrainer(tokens, FAMILIES["llama"], config, checkpoints=state).fit()
    (tmp_path / "other.txt").write_text("the cat sat on another mat. " * 200)
    other, _ = prepare_text(TextConfig(source=str(tmp_path / "other.txt")), tmp_path, None)
    with pytest.raises(UserError, match=r"trained on another text than .*other\.txt' is now; restore the text, or train anew"):
        LmTrainer(other, FAMILIES["llama"], config, checkpoints=state)


WORKERS = replace(SHORT, batch_size=5, balance=BalanceConfig(auxiliary=0.3, z=0.1, importance=0.2, bias_rate=0.01))
SECOND = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.llm.trainer import LmTrainConfig, LmTrainer
from recsys_moe.typed import parse

torch.set_num_threads(1)
store, tokens, values, config, state = sys.argv[1:]
dist.init_process_group("gloo", init_method=store, rank=1, world_size=2)
values, config = json.loads(values), parse(LmTrainConfig, json.loads(config), "config")
trainer = LmTrainer(Path(tokens), values, config, checkpoints=Checkpoints(Path(state)))
trainer.fit()
trainer.save(Path("nothing is written here"), values)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("sharing", [1, 2])
def test_two_workers_train_as_one(sharing: int, tokens: Path, tmp_path: Path) -> None:
    """Five sequences, of which the second takes three; each has all experts, or two of the four."""
    values, state = FAMILIES["biased"], tmp_path / "state"
    config = replace(WORKERS, workers=2, expert_parallel=sharing, checkpoint_steps=WORKERS.steps - 1)
    told: dict[str, list[dict[str, Any]]] = {"alone": [], "together": []}
    alone = LmTrainer(tokens, values, WORKERS, told["alone"].append)
    alone_loss = alone.fit().loss
    store = f"file://{tmp_path / 'store'}"
    arguments = [store, str(tokens), json.dumps(values), json.dumps(dump(config)), str(state)]
    second = subprocess.Popen([sys.executable, "-c", SECOND, *arguments], env={**os.environ, "PYTHONSAFEPATH": "1"})
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=2)
    try:
        together = LmTrainer(tokens, values, config, told["together"].append, Checkpoints(state))
        assert {len(p) for name, p in together.model.named_parameters() if "experts" in name} == {4 // sharing}
        assert together.fit().loss == pytest.approx(alone_loss, abs=1e-5)
        together.save(tmp_path / "saved", values)
    finally:
        dist.destroy_process_group()
    assert second.wait(60) == 0
    last = [next(e for e in reversed(events) if e["kind"] == "step") for events in told.values()]
    for name in ("train.loss", "train.gradient_norm", "train.auxiliary_loss", "train.z_loss", "train.importance_loss"):
        assert last[1][name] == pytest.approx(last[0][name], abs=1e-4), name
    loads = [
        [layer["load"] for e in events if e["kind"] == "experts" for layer in e["layers"].values()] for events in told.values()
    ]
    np.testing.assert_allclose(loads[1], loads[0], atol=0.02)
    for (name, a), b in zip(alone.model.named_parameters(), together.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    saved = checkpoints.load(tmp_path / "saved")
    torch.testing.assert_close(dict(saved.named_parameters()), dict(together.model.named_parameters()), atol=0, rtol=0)
    # What they left of the step before the last, one goes on with, who has all experts.
    going_on = LmTrainer(tokens, values, WORKERS, checkpoints=Checkpoints(state))
    assert going_on.step == WORKERS.steps - 1
    assert going_on.fit().loss == pytest.approx(alone_loss, abs=1e-5)


# ---- mixtures of a dense model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "llama"
    values = {k: v for k, v in FAMILIES["llama"].items() if k != "sliding_window"} | {"rope_theta": 5000.0}
    checkpoints.save(model_of(values, 8.0).requires_grad_(False), values, folder)
    return folder


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_upcycled_model_computes_what_the_dense_one_does(k: int, dense: Path, tmp_path: Path) -> None:
    made = convert(dense, tmp_path / "moe", mixture=lambda model: upcycled(model, 4, k))
    again = checkpoints.load(tmp_path / "moe")
    wanted = served(checkpoints.load(dense), some_tokens())
    assert wanted.std() > 0.1
    for model in (made, again):
        torch.testing.assert_close(served(model, some_tokens()), wanted, atol=2e-5, rtol=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_tokens()).logits, wanted, atol=1e-4, rtol=0)


def test_a_model_that_is_split_is_the_dense_one_when_all_its_parts_weigh_alike(dense: Path, tmp_path: Path) -> None:
    def even(model: Decoder) -> Any:
        values, tensors = split(model, 4, 4)
        return values, {name: torch.zeros_like(t) if ".gate." in name else t for name, t in tensors.items()}

    whole = convert(dense, tmp_path / "whole", mixture=even)
    torch.testing.assert_close(served(whole, some_tokens()), served(checkpoints.load(dense), some_tokens()), atol=2e-5, rtol=0)
    half = convert(dense, tmp_path / "half", mixture=lambda model: split(model, 4, 2))
    assert half.blocks[0].ffn.experts.weights[0].shape == (4, 24, 32)  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="5 experts can't share 48 hidden units"):
        convert(dense, tmp_path / "odd", mixture=lambda model: split(model, 5, 2))
    with pytest.raises(UserError, match="made of a dense Llama"):
        convert(tmp_path / "half", tmp_path / "twice", mixture=lambda model: upcycled(model, 4, 2))


# ---- the road


class TrainerHere:
    """Ray's TorchTrainer with one worker, in this process."""

    def __init__(self, worker: Callable[[Any], None], train_loop_config: dict[str, Any], **settings: Any) -> None:
        self.worker, self.config = worker, train_loop_config

    def fit(self) -> None:
        self.worker(self.config)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_moe.pipelines.drive.ray_cluster", lambda *anything: nullcontext())
    monkeypatch.setattr("ray.train.torch.TorchTrainer", TrainerHere)
    for name in ("use_all_cores", "keep_freed_memory"):  # they are for a whole process
        monkeypatch.setattr(f"recsys_moe.pipelines.worker.{name}", lambda *anything: None)


SMALL = ["data.source=text.txt", "train.batch_size=4", "train.context=16", "train.steps=8", "train.warmup=2"]
TINY = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=48", "model.num_key_value_heads=2"]


@pytest.mark.usefixtures("without_ray")
def test_what_the_command_leaves_is_generated_from_upcycled_and_trained_on(cli: Any, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    text_file(tmp_path)

    def run(*arguments: str) -> dict[str, Any]:
        done = cli("llm", *arguments, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    dense = run("train", *SMALL, *TINY, "data.tokenizer=bpe", "data.vocab_size=300")
    assert dense["version"] == "models:/text/1"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(dense["bundle"]).eval()
    words = transformers.AutoTokenizer.from_pretrained(dense["bundle"])("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(words).logits, served(checkpoints.load(dense["bundle"]), words), atol=1e-4, rtol=0)
    assert run("generate", dense["bundle"], "the cat", "--max-tokens", "3")["prompt_tokens"] == words[0].tolist()

    run("convert", dense["bundle"], "moe", "--upcycle", "4")
    going_on = ["data.tokenizer=start", "start=moe", "train.freeze=others", "train.evaluate_steps=4"]
    told = run("train", *SMALL, *going_on)
    folder = find_run(told["run_id"], tmp_path / "runs")
    evaluations = [event["validation.loss"] for event in folder.events() if event["kind"] == "evaluation"]
    assert len(evaluations) == 3
    assert evaluations[0] == pytest.approx(dense["validation"]["loss"], abs=1e-5)
    assert evaluations[-1] == told["validation"]["loss"] < evaluations[0]
    before, after = (checkpoints.load(path) for path in (tmp_path / "moe", told["bundle"]))
    assert torch.equal(before.embedding, after.embedding)

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    metrics = client.get_run(told["run_id"]).data.metrics
    assert metrics["validation.loss"] == pytest.approx(evaluations[-1])
    assert sum(metrics[f"experts.layer_0.load.{e}"] for e in range(4)) == pytest.approx(1, abs=1e-4)
    assert {"experts.layer_0.entropy", "experts.layer_0.dropped_share", "experts.layer_0.dead"} <= metrics.keys()
    assert {f.path for f in client.list_artifacts(told["run_id"], "experts")} == {"experts/load.png", "experts/experts.csv"}

    assert "has finished" in cli("llm", "train", "--resume", told["run_id"], cwd=tmp_path).stderr
    assert "llm train --resume" in cli("train", "--resume", told["run_id"], cwd=tmp_path).stderr


@pytest.mark.usefixtures("without_ray")
def test_a_run_that_was_stopped_goes_on(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(tmp_path)
    given = [*SMALL, *TINY, "model=mixtral", "train.checkpoint_steps=3", "tracking.alias=null"]
    whole = json.loads(cli("llm", "train", *given, "--json", cwd=tmp_path).stdout)
    save = LmTrainer._save

    def save_and_stop(self: LmTrainer) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LmTrainer, "_save", save_and_stop)
        assert cli("llm", "train", *given, cwd=tmp_path).returncode != 0
    (stopped,) = [run for run in all_runs(tmp_path / "runs") if run.record.status == "KILLED"]
    text = (tmp_path / "text.txt").read_bytes()
    (tmp_path / "text.txt").write_bytes(text + b"and more")
    refused = cli("llm", "train", "--resume", stopped.path.name, cwd=tmp_path)
    assert refused.returncode != 0
    assert "was trained on another text than" in refused.stderr
    (tmp_path / "text.txt").write_bytes(text)
    done = cli("llm", "train", "--resume", stopped.path.name, "train.workers=1", "--json", cwd=tmp_path)
    assert "going on from step 3" in done.stderr
    files = [Path(summary["bundle"]) / "model.safetensors" for summary in (whole, json.loads(done.stdout))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "can't change" in cli("llm", "train", "--resume", stopped.path.name, "train.lr=1", cwd=tmp_path).stderr


@pytest.mark.long
def test_two_of_rays_workers_leave_the_loss_that_one_does(tmp_path: Path) -> None:
    text_file(tmp_path)
    command = [sys.executable, "-m", "recsys_moe", "llm", "train", *SMALL, *TINY, "model=mixtral", "--json"]
    losses = []
    for given in (["train.workers=1"], ["train.workers=2"], ["train.workers=2", "train.expert_parallel=2"]):
        done = subprocess.run([*command, *given], cwd=tmp_path, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout)
        losses.append(told["validation"]["loss"])
        assert checkpoints.load(told["bundle"]).blocks[0].ffn.experts.weights[0].shape[0] == 8  # type: ignore[union-attr, index]
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-4)


MISTAKES = {
    "no text": (["data.source=none.txt"], "data.source"),
    "not UTF-8": (["data.source=latin.txt"], "not UTF-8 (byte 2)"),
    "empty": (["data.source=empty.txt"], "has no text in it"),
    "short": (["data.source=short.txt", "train.context=64"], "fewer than train.context + 1 = 65"),
    "long context": (["data.source=text.txt", "train.context=4096"], "the model has 512 positions"),
    "unknown key": (["data.source=text.txt", "model.num_expert=4"], "unknown key 'num_expert'"),
    "many workers": (["data.source=text.txt", "train.batch_size=1", "train.workers=2"], "some would have no sequence"),
    "shares that don't divide": (["data.source=text.txt", "train.workers=2", "train.expert_parallel=3"], "choose a divisor"),
    "shares of nothing": (["data.source=text.txt", "train.workers=2", "train.expert_parallel=2"], "no layer with experts"),
    "empty shares": (
        ["data.source=text.txt", "model=mixtral", "train.workers=16", "train.expert_parallel=16"],
        "a layer has 8 experts; use at most as many",
    ),
    "no bias": (["data.source=text.txt", "model=mixtral", "train.balance.bias_rate=0.1"], "no correction bias"),
    "no logits": (
        ["data.source=text.txt", "model=routed", "model.router={name: hash}"],
        "train.balance.auxiliary can't be used",
    ),
    "dense": (["data.source=text.txt", "train.freeze=experts"], "no layer with experts"),
    "no router": (["data.source=text.txt", "model=routed"], "model.router is missing"),
    "start and model": (["data.source=text.txt", "start=x", "model=mixtral"], "start names the model"),
    "no start": (["data.source=text.txt", "data.tokenizer=start"], "give start=FOLDER"),
}


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("given", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_a_sentence(given: list[str], said: str, cli: Any, tmp_path: Path) -> None:
    text_file(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("too short by far")
    done = cli("llm", "train", *given, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/train/*"))
