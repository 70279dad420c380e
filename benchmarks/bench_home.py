"""HoME trained on the synthetic feed by the trainer, beside the same equations as modules in Python lists.

    make bench-home          needs the peers' scripts (RECSYS_MOE_PEERS)

Ours is `Trainer.fit`: shards read and shuffled, kernels, AdamW, Adagrad in the tables, the experts' health off. The peer is
the `HoME` of experts_peers.py in a plain loop over batches of tensors that are in memory from the start, bf16 by autocast. It
gets what is not its matter from us: the fused tables with their Adagrad, AdamW with the same groups and schedule, the losses;
and both start from the same weights. Rounds alternate and each has a seed of its own, for weights and for the order of the
rows; a ratio is the median over rounds, and the losses (mean over the epoch) are told with their standard deviation over
seeds. Sizes are those of experts_peers.py: 16 tables of 32, 2 experts a group of 256 units, towers of 64, batches of 2,048.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from recsys_moe.batches import ShuffledBatches
from recsys_moe.bench import home_of, load_peer
from recsys_moe.health import HealthConfig
from recsys_moe.losses import task_losses
from recsys_moe.models import settle
from recsys_moe.models.home import HoMEConfig
from recsys_moe.process import keep_freed_memory
from recsys_moe.shards import PreparedData
from recsys_moe.trainer import TrainConfig, Trainer, schedule

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("RECSYS_MOE_PEERS", ROOT.parent / "shared" / "bench"))
TASKS = ("effective_view", "long_view", "like", "comment", "follow", "forward")
MODEL = HoMEConfig(embedding_dim=32, expert_dims=(256,), tower_dims=(64,), norm="none", dropout=0.0)
BATCH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200_000, help="of the feed; 8 of 10 are trained on, once a round")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--compiled", action="store_true", help="the peer under torch.compile as well, which takes minutes")
    options = parser.parse_args()
    if not (PEERS / "experts_peers.py").exists():
        sys.exit(f"{PEERS} holds no experts_peers.py; set RECSYS_MOE_PEERS")
    keep_freed_memory()  # the peer trains in this process and gains as well
    data, peers = feed(options.rows), load_peer(PEERS, "experts_peers")
    found: dict[str, Any] = {}
    for precision in options.precisions:
        names = ["ours", "eager", *(["compiled"] if options.compiled else [])]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for seed in range(options.rounds):
            for name in names:
                trainer, peer = pair(data, peers, seed, precision)
                runs[name].append(ours(trainer) if name == "ours" else theirs(trainer, peer, name == "compiled"))
            told = "  ".join(f"{name} {of[-1]['samples_per_s']:,.0f}" for name, of in runs.items())
            print(f"{precision} round {seed + 1}: {told} samples/s", file=sys.stderr, flush=True)
        found[precision] = report(precision, runs)
    print(json.dumps(found))


def feed(rows: int) -> PreparedData:
    """The synthetic feed, prepared; made on first use."""
    source = ROOT / "runs" / f"feed_{rows}"
    if not source.exists():
        run("data", "synth", str(source), "--rows", str(rows))
    overrides = ("data=feed_synth", f"data.source={source}", f"data.tasks=[{','.join(TASKS)}]")
    found = run("data", "prepare", *overrides, f"runs_dir={ROOT / 'runs'}")
    return PreparedData(Path(found["folder"]), verify=False)


def run(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "recsys_moe", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def pair(data: PreparedData, peers: ModuleType, seed: int, precision: Any) -> tuple[Trainer, Any]:
    """A trainer, and the peer's network with the weights of the trainer's."""
    health = HealthConfig(rows=0)
    config = TrainConfig(seed=seed, epochs=1, batch_size=BATCH, precision=precision, checkpoint_seconds=0, health=health)
    model = settle(MODEL, data.schema)
    trainer = Trainer(data, model, config)
    network: Any = trainer.model.network
    kinds = list(dict.fromkeys(model.categories.values()))
    peer = peers.HoME(
        network.meta_gates.linear.in_features, MODEL.expert_dims[-1], MODEL.experts_per_group, len(TASKS), len(kinds)
    )
    peer.category = [kinds.index(model.categories[task]) for task in data.schema.task_names]
    for tower, start in zip(peer.tower, trainer.heads.start(), strict=True):
        tower[1] = nn.ReLU()  # as our towers
        nn.init.constant_(tower[2].bias, start[0])
    for name, parameter in peer.named_parameters():
        if ".up." in name:
            nn.init.zeros_(parameter)  # feature gates begin at 1
    network.load_state_dict(home_of(peer, torch.float32).state_dict())
    return trainer, peer


def ours(trainer: Trainer) -> dict[str, float]:
    """The trainer's rate and the mean loss of its epoch."""
    losses = []
    trainer.on_event = lambda event: losses.append(event["train.loss"]) if event["kind"] == "epoch" else None
    start = time.perf_counter()
    ShuffledBatches(trainer.data, "train", BATCH, trainer.config.seed)
    reading = time.perf_counter() - start  # so few rows are read when a trainer is made, which its own time leaves out
    seconds = trainer.fit().seconds
    return {"samples_per_s": trainer.rows / (seconds + reading), "loss": losses[-1]}


def theirs(trainer: Trainer, peer: Any, compiled: bool) -> dict[str, float]:
    """The peer's rate, between the tables of a trainer that has not begun and its losses, and the mean loss of the epoch."""
    config, tables = trainer.config, trainer.model
    (rows,) = ShuffledBatches(trainer.data, "train", trainer.rows, config.seed).epoch(0)
    spared = [p for name, p in peer.named_parameters() if "bias" in name or ".norm." in name]
    multiplying = [p for p in peer.parameters() if all(p is not other for other in spared)]
    groups: list[dict[str, Any]] = [{"params": multiplying}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=True)
    network = torch.compile(peer, dynamic=False) if compiled else peer
    tables.train()

    def step(index: Tensor, factor: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor
        tables.set_embedding_lr(config.embedding_lr * factor)
        batch = rows.take(index)
        x = tables.represent(batch.ids_bf, batch.dense_bd, batch.lists)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            outputs = network(x)
        losses_bt = trainer.heads.losses(outputs.float(), batch.labels_bt)
        loss = task_losses(losses_bt, batch.weights_bt, trainer.task_weights_t, batch.weights_bt.sum(0)).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), config.clip_norm)
        optimizer.step()
        return loss.item()

    if compiled:
        before = {name: value.clone() for name, value in peer.state_dict().items()}
        for size in {BATCH, trainer.rows % BATCH} - {0}:
            network(torch.randn(size, peer.meta_shared_gate.in_features)).sum().backward()
        peer.load_state_dict(before)
    total = 0.0
    start = time.perf_counter()
    for number, index in enumerate(torch.arange(trainer.rows).split(BATCH)):
        total += len(index) * step(index, schedule(config.schedule, number / trainer.total_steps))
    return {"samples_per_s": trainer.rows / (time.perf_counter() - start), "loss": total / trainer.rows}


def report(precision: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Rates, ratios and losses of one precision, printed."""
    rates = {name: [run["samples_per_s"] for run in of] for name, of in runs.items()}
    found = {}
    for name, of in runs.items():
        losses = [run["loss"] for run in of]
        # Round by round: the machine's speed drifts.
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        noise = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        found[name] = {"samples_per_s": statistics.median(rates[name]), "ours_is": ratio, "loss": statistics.mean(losses)}
        told = f"{statistics.median(rates[name]):9,.0f} samples/s   ours is {ratio:.2f}×   loss {statistics.mean(losses):.4f}"
        print(f"{precision}  {name:9s}{told} ± {noise:.4f} over {len(losses)} seeds", flush=True)
    return found


if __name__ == "__main__":
    main()
