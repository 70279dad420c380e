"""Several workers against one at the same global batch: the loss of each step, and the rate.

    recsys-moe data prepare data=census_full            # prints the folder
    python benchmarks/bench_workers.py runs/prepared/census_full-… --workers 2 --steps 200

Without dropout, whose masks differ with the workers. One thread a worker.
"""

import argparse
import itertools
import json
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.shards import PreparedData
from recsys_moe.trainer import TrainConfig, Trainer


def losses(rank: int, world: int, port: int, folder: Path, steps: int, batch_size: int, out: Path) -> None:
    """Train some steps and let the first worker write each step's loss and the seconds that all took."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    trainer = Trainer(PreparedData(folder), MMoEConfig(dropout=0.0), TrainConfig(batch_size=batch_size))
    trainer.model.train()
    found, start = [], time.perf_counter()
    batches = itertools.chain.from_iterable(trainer.batches.epoch(epoch) for epoch in itertools.count())
    for batch in itertools.islice(batches, steps):
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
    options = parser.parse_args()
    results = []
    for world in (1, options.workers):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        out = options.prepared.with_name(f".losses-{os.getpid()}.json")
        arguments = (world, port, options.prepared, options.steps, options.batch_size, out)
        multiprocessing.spawn(losses, arguments, nprocs=world)
        results.append(json.loads(out.read_text()))
        out.unlink()
        rate = options.steps * options.batch_size / results[-1]["seconds"]
        print(f"{world} workers: {rate:,.0f} samples/s, last loss {results[-1]['losses'][-1]:.6f}", flush=True)
    differences = [abs(a - b) for a, b in zip(*(r["losses"] for r in results), strict=True)]
    print(json.dumps({"steps": options.steps, "workers": options.workers, "largest_difference": max(differences)}))


if __name__ == "__main__":
    main()
