"""Training rate beside the peers', in the same minutes: torch-rechub's trainer and a strong eager loop, for the same MMoE.

    make bench          needs the census data (RECSYS_MOE_DATA) and the peers' script (RECSYS_MOE_PEERS)

Rounds of ours, rechub, eager; medians and ratios are printed, and the test AUC of ours against the eager loop's. The peers
run in an environment of their own, .venv-peers, which is made on first use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("RECSYS_MOE_DATA", ROOT.parent / "shared" / "data")) / "census_income"
PEERS = Path(os.environ.get("RECSYS_MOE_PEERS", ROOT.parent / "shared" / "bench")) / "mmoe_training_peers.py"
PEER_PACKAGES = ("torch==2.13.0", "numpy", "pandas==3.1.1", "pyarrow==25.0.1", "scikit-learn", "torch-rechub==0.9.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    for what, path in (("RECSYS_MOE_DATA", DATA), ("RECSYS_MOE_PEERS", PEERS)):
        if not path.exists():
            sys.exit(f"{path} is not there; set {what}")
    python = peer_environment()
    found: dict[str, list[dict[str, Any]]] = {"recsys_moe": [], "rechub": [], "eager": []}
    for number in range(options.rounds):
        found["recsys_moe"].append(ours(options.epochs))
        # The peer's rate does not depend on the epochs, and one takes it ten seconds.
        found["rechub"].append(peer(python, "rechub", 1))
        found["eager"].append(peer(python, "eager", options.epochs))
        rates = "  ".join(f"{name} {runs[-1]['samples_per_s']:,.0f}" for name, runs in found.items())
        print(f"round {number + 1}: {rates} samples/s", file=sys.stderr, flush=True)
    report(found)


def peer_environment() -> Path:
    """The Python of .venv-peers."""
    python = ROOT / ".venv-peers" / "bin" / "python"
    if not (ROOT / ".venv-peers" / ".ready").exists():
        print("Setting up .venv-peers (a minute, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-peers"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True)
        (ROOT / ".venv-peers" / ".ready").touch()
    return python


def ours(epochs: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "recsys_moe", "train", "experiment=peer_bench", f"data.source={DATA}", "--json"]
    done = subprocess.run([*command, f"train.epochs={epochs}"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    auc = {task: metrics["auc"] for task, metrics in summary["test"].items()}
    return {"samples_per_s": summary["train"]["samples_per_s"], "auc": auc}


def peer(python: Path, name: str, epochs: int) -> dict[str, Any]:
    command = [python, PEERS, DATA, "--peers", name, "--epochs", str(epochs)]
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    medians = {name: statistics.median(r["samples_per_s"] for r in runs) for name, runs in found.items()}
    print(f"{'':12s}{'samples/s':>12s}{'min':>12s}{'max':>12s}{'ours is':>10s}   test AUC")
    for name, runs in found.items():
        rates = [r["samples_per_s"] for r in runs]
        # Pair by pair: the machine's speed drifts between the rounds.
        ours = (r["samples_per_s"] for r in found["recsys_moe"])
        ratio = statistics.median(a / b for a, b in zip(ours, rates, strict=True))
        auc = "  ".join(f"{task} {value:.4f}" for task, value in runs[-1].get("auc", {}).items())
        print(f"{name:12s}{medians[name]:12,.0f}{min(rates):12,.0f}{max(rates):12,.0f}{ratio:9.2f}×   {auc}")
    result = {"medians": medians, "runs": found}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
