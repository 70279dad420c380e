"""The language models' part of docs/results.md: mixtures against dense models, and what evens out the experts' load.

    python benchmarks/results_llm.py               all runs: ten minutes of one core; what is done is not done again
    python benchmarks/results_llm.py upcycling     the runs of one question

Real texts of the data folder (RECSYS_MOE_DATA): tinyshakespeare for stories260K to go on with, WikiText-2's test part for what
is trained from scratch. `python benchmarks/results.py llm` runs this and puts the section into docs/results.md.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_moe.errors import UserError
from recsys_moe.intervals import seed_interval
from recsys_moe.llm import checkpoints, tokenizer
from recsys_moe.llm.convert import convert
from recsys_moe.llm.estimate import estimate
from recsys_moe.llm.expert_map import expert_map
from recsys_moe.llm.text import TextConfig, Windows, open_text, prepare_text
from recsys_moe.llm.trainer import BalanceConfig, LmTrainConfig, LmTrainer
from recsys_moe.llm.upcycle import upcycled
from recsys_moe.pictures import draw_expert_map, drawing, render

DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA = Path(os.environ.get("RECSYS_MOE_DATA", Path(__file__).resolve().parent.parent / "../shared/data"))
RUNS = Path("runs/results_llm")
SEEDS = 3
UPCYCLING = LmTrainConfig(steps=120, warmup=12, batch_size=8, context=128, lr=1e-3, evaluate_steps=10**6)
SCRATCH = LmTrainConfig(steps=120, warmup=12, batch_size=8, context=64, lr=5e-3, evaluate_steps=10**6)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
SIGMOID = {"name": "top_k", "k": 2, "scoring": "sigmoid", "renormalize": True, "correction_bias": True}
MIXTURE = {**SMALL, "model_type": "routed_decoder", "intermediate_size": 96, "num_experts": 8, "router": SIGMOID}
BALANCES = {
    "nothing": BalanceConfig(),
    "auxiliary loss 0.01": BalanceConfig(auxiliary=0.01),
    "aux-loss-free, rate 0.002": BalanceConfig(bias_rate=0.002),
}
QUESTIONS = ("upcycling", "scratch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", choices=(*QUESTIONS, []))
    asked = parser.parse_args().questions or QUESTIONS
    torch.set_num_threads(1)
    for question in asked:
        {"upcycling": upcycling, "scratch": scratch}[question]()
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))}
    (DOCS / "results/llm.md").write_text(section(found) + "\n")


# ---- runs ----------------------------------------------------------------------------------------------------------------


def text_of(name: str, **settings: Any) -> TextConfig:
    source = DATA / "text" / f"{name}.txt"
    if not source.exists():
        raise UserError(f"no {source}; RECSYS_MOE_DATA names the data folder")
    return TextConfig(str(source), validation=0.05, **settings)


def upcycling() -> None:
    """stories260K goes on with Shakespeare: as it is, and as a mixture of eight copies, for as many operations."""
    dense, mixture = RUNS / "stories260K", RUNS / "stories-8x260K"
    if not dense.exists():
        convert(DATA / "llm/stories260K.bin", dense, DATA / "llm/tok512.bin")
        convert(dense, mixture, mixture=partial(upcycled, experts=8, k=2))
    tokens, _ = prepare_text(text_of("tinyshakespeare", tokenizer="start"), RUNS / "text", dense)
    flops = {folder: _flops(checkpoints.read_config(folder), UPCYCLING.context) for folder in (dense, mixture)}
    longer = round(UPCYCLING.steps * flops[mixture] / flops[dense])
    for seed in range(SEEDS):
        config = replace(UPCYCLING, seed=seed, balance=BalanceConfig(auxiliary=0.01))
        _run("upcycling", "mixture of 8 copies, 2 a token", tokens, checkpoints.read_config(mixture), config, mixture)
        config = replace(UPCYCLING, seed=seed, steps=longer)
        _run("upcycling", "dense, as many operations", tokens, checkpoints.read_config(dense), config, dense)
        config = replace(UPCYCLING, seed=seed)
        _run("upcycling", "dense, as many tokens", tokens, checkpoints.read_config(dense), config, dense)


def scratch() -> None:
    """From nothing: a dense model, and mixtures whose experts in use are as large, balanced in three ways."""
    tokens, text = prepare_text(text_of("wikitext-2.test", tokenizer="bpe", vocab_size=1024), RUNS / "text", None)
    sized = {"vocab_size": text.vocab_size, "eos_token_id": text.eos_id}
    dense = {**SMALL, **sized, "model_type": "llama", "intermediate_size": 192}
    for seed in range(SEEDS):
        _run("scratch", "dense", tokens, dense, replace(SCRATCH, seed=seed))
        for name, balance in BALANCES.items():
            config = replace(SCRATCH, seed=seed, balance=balance)
            trainer = _run("scratch", f"mixture, {name}", tokens, {**MIXTURE, **sized}, config)
            if trainer is not None and seed == 0:
                _draw(name, trainer, tokens)


def _flops(values: dict[str, Any], context: int) -> int:
    """Of a token in the middle of a window."""
    return estimate(values, Path("config.json"), context // 2).flops


def _run(
    question: str, name: str, tokens: Path, values: dict[str, Any], config: LmTrainConfig, start: Path | None = None
) -> LmTrainer | None:
    """Train, and note what came of it; None where that is noted already."""
    target = RUNS / f"{question}-{name.replace(' ', '_').replace(',', '')}-seed{config.seed}.json"
    if target.exists():
        return None
    events: list[dict[str, Any]] = []
    trainer = LmTrainer(tokens, values, config, events.append, start=start)
    found = trainer.fit()
    told: dict[str, Any] = {
        "question": question,
        "name": name,
        "seed": config.seed,
        "steps": config.steps,
        "tokens": trainer.tokens,
        "flops_a_token": _flops(values, config.context),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": round(trainer.seconds, 1),
        "loss_before": events[0]["validation.loss"],
        "loss": found.loss,
        "perplexity": found.perplexity,
    }
    if any(event["kind"] == "experts" for event in events):
        counts = expert_map(trainer.model, Windows(tokens, "validation", config.context)).by_position.sum(2)
        told["busiest"] = float((counts.max(1) / counts.mean(1)).mean())
        told["idlest"] = float((counts.min(1) / counts.mean(1)).mean())
    target.write_text(json.dumps(told, indent=1) + "\n")
    print(f"{target.stem}: loss {found.loss:.4f} in {trainer.seconds:.0f} s", flush=True)
    return trainer


def _draw(name: str, trainer: LmTrainer, tokens: Path) -> None:
    """The experts of a trained mixture."""
    words = tokenizer.load(tokens)
    names = [repr(words.decode([token]))[1:-1] or "<end>" for token in range(open_text(tokens).vocab_size)]
    found = expert_map(trainer.model, Windows(tokens, "validation", trainer.config.context))
    with drawing():
        picture = render(draw_expert_map(found, names))
    (DOCS / f"results/llm-experts-{name.split()[0].rstrip(',')}.png").write_bytes(picture)


# ---- docs/results.md -----------------------------------------------------------------------------------------------------


def section(found: dict[str, Any]) -> str:
    """What the runs say, as Markdown."""
    runs = list(found.values())
    parts = [
        "## Language models: mixtures against dense ones",
        "    python benchmarks/results.py llm",
        f"{SEEDS} seeds each; the loss is of the validation part (a text's last twentieth), in nats a token, with Student's "
        "95 % interval over seeds. Operations are of the forward pass for a token in the middle of a window, times the tokens "
        "trained on. `busiest` and `idlest` are the loads of a layer's most and least chosen expert in even shares, on the "
        "validation part, averaged over layers.",
    ]
    titles = {
        "upcycling": "stories260K goes on with tinyshakespeare: upcycled to 8 experts, 2 a token (auxiliary loss 0.01), and "
        "dense for as many operations and for as many tokens.",
        "scratch": "From scratch on WikiText-2's test part (byte-pair encoding, 1,024 tokens): a dense layer of 192 units "
        "against 2 of 8 experts of 96, sigmoid routers, balanced by nothing, Switch's auxiliary loss or the routers' bias.",
    }
    for question, title in titles.items():
        rows = [
            "| model | parameters | tokens trained on | operations | loss | perplexity | busiest | idlest |",
            "|---" * 8 + "|",
        ]
        for name in dict.fromkeys(run["name"] for run in runs if run["question"] == question):
            same = [run for run in runs if run["name"] == name and run["question"] == question]
            one = same[0]
            loads = [f"{np.mean([run[key] for run in same]):.2f}" if key in one else "–" for key in ("busiest", "idlest")]
            operations = one["flops_a_token"] * one["tokens"]
            figures = [_interval([run["loss"] for run in same], 4), _interval([run["perplexity"] for run in same], 2), *loads]
            rows.append(f"| {name} | {one['parameters']:,} | {one['tokens']:,} | {operations:.2e} | {' | '.join(figures)} |")
        parts += [title, "\n".join(rows)]
    for picture in sorted((DOCS / "results").glob("llm-experts-*.png")):
        balance = picture.stem.removeprefix("llm-experts-")
        parts.append(f"![Tokens and positions that each expert takes, balanced by: {balance}]({picture.relative_to(DOCS)})")
    return "\n\n".join(parts)


def _interval(values: Sequence[float], digits: int) -> str:
    found = seed_interval(values)
    return f"{found.value:.{digits}f} ± {found.high - found.value:.{digits}f}"


if __name__ == "__main__":
    main()
