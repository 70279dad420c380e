"""Several workers against one at the same global batch: the loss of each step, and the rate.

    recsys-moe data prepare data=census_full            # prints the folder
    python benchmarks/bench_workers.py runs/prepared/census_full-… --workers 2 --steps 200

Without dropout, whose masks differ with the workers. One thread a worker. Beside them trains one worker whose first weights
are off by their last bit: what becomes of that is what rounding alone does to the losses, with these rates and data.
"""

import argparse
import itertools
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.shards import PreparedData
from recsys_moe.trainer import TrainConfig, Trainer


def losses(rank: int, world: int, off: float, port: int, folder: Path, options: argparse.Namespace, out: Path) -> None:
    """Train some steps and let the first worker write each step's loss and the seconds that all took."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    config = TrainConfig(batch_size=options.batch_size, lr=options.lr, embedding_lr=options.embedding_lr)
    trainer = Trainer(PreparedData(folder), MMoEConfig(dropout=0.0), config)
    trainer.model.train()
    with torch.no_grad():
        trainer.dense[0] *= 1 + off
    found, start = [], time.perf_counter()
    batches = itertools.chain.from_iterable(trainer.batches.epoch(epoch) for epoch in itertools.count())
    for batch in itertools.islice(batches, options.steps):
        found.append(trainer._train_step(batch))
    if rank == 0:
        out.write_text(json.dumps({"losses": found, "seconds": time.perf_counter() - start}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--embedding-lr", type=float, default=TrainConfig.embedding_lr)
    options = parser.parse_args()
    found = {}
    for name, world, off in (("one", 1, 0.0), ("several", options.workers, 0.0), ("one, off by a bit", 1, 2.0**-23)):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "losses.json"
            multiprocessing.spawn(losses, (world, off, port, options.prepared, options, out), nprocs=world)
            result = json.loads(out.read_text())
        rate = options.steps * options.batch_size / result["seconds"]
        found[name] = result["losses"]
        differences = [abs(a - b) for a, b in zip(found["one"], found[name], strict=True)]
        growth = "  ".join(f"{n}: {max(differences[:n]):.1e}" for n in (10, 20, 40, 60, 100, 150, 200) if n <= options.steps)
        print(
            f"{name} ({world} workers): {rate:,.0f} samples/s; largest difference within the first … steps  {growth}",
            flush=True,
        )


if __name__ == "__main__":
    main()
