"""What `recsys-moe train` costs beyond Ray itself: start to exit on a tiny data set against a trivial `TorchTrainer.fit`.

    python benchmarks/bench_startup.py

Rounds of both, whole processes. `first` starts from an empty folder: MLflow's database is made, the data is prepared.
`again` finds both. The median of the differences is the figure.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRIVIAL = """
import logging, sys
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def work():
    import ray.train
    ray.train.report({"loss": 0.0})

ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
TorchTrainer(work, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=sys.argv[1])).fit()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    differences: dict[str, list[float]] = {"first": [], "again": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recsys = [sys.executable, "-m", "recsys_moe"]
        subprocess.run([*recsys, "data", "synth", str(folder / "feed"), "--rows", "5000"], check=True, capture_output=True)
        for number in range(options.rounds):
            runs = folder / f"runs{number}"
            train = [*recsys, "train", "data=feed_synth", f"data.source={folder / 'feed'}", f"runs_dir={runs}"]
            train += ["train.epochs=1", "data.tasks=[effective_view,like]"]
            trivial = seconds([sys.executable, "-c", TRIVIAL, str(folder / "ray")])
            line = f"round {number + 1}: trivial {trivial:.1f} s"
            for which, found in differences.items():
                ours = seconds(train)
                found.append(ours - trivial)
                line += f"  train, {which} {ours:.1f} s"
            print(line, flush=True)
    for which, found in differences.items():
        print(f"{which}: {statistics.median(found):+.1f} s over the trivial fit (min {min(found):+.1f}, max {max(found):+.1f})")


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
