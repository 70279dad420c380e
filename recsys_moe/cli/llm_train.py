"""`recsys-moe llm train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from recsys_moe.cli.settings import Json
from recsys_moe.errors import UserError

EXAMPLES = """Examples:

    recsys-moe llm train data.source=book.txt

    recsys-moe llm train data.source=stories/ data.tokenizer=bpe data.vocab_size=2048 model=mixtral train.steps=5000

    recsys-moe llm train data.source=book.txt model=deepseek_v3 train.balance.auxiliary=0 train.balance.bias_rate=0.001

    recsys-moe llm train data.source=book.txt model=routed 'model.router={name: top_p, p: 0.5}' train.balance.entropy=0.01

    recsys-moe llm train data.source=book.txt model=mixtral train.workers=4 train.expert_parallel=2

    recsys-moe llm train data.source=book.txt data.tokenizer=start start=stories-8x260K train.freeze=others

    recsys-moe llm train --resume 20261126-101500-text-mixtral-seed0-1a2b3c"""


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Configuration overrides: model=NAME or section.key=value.", show_default=False),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a run that was stopped or lost: its folder, its name or MLflow's run id.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a language model on text, track the run in MLflow, leave a Hugging Face folder.

    model= is llama, mixtral, olmoe, qwen2_moe, deepseek, deepseek_v2, deepseek_v3, switch or routed (any router); start= goes
    on from a checkpoint. With --resume the settings are the run's own; `train.workers`,
    `train.expert_parallel`, `train.max_failures`, `train.checkpoint_…` and `ray.…` may differ.
    """
    from recsys_moe.config import changes, compose, lm_conf_dir
    from recsys_moe.console import PhaseProgress, print_json, progress, stderr, stdout
    from recsys_moe.typed import parse

    given = overrides or []
    # A run that goes on has its text already.
    config = compose(given if resume is None else ["data.source=the-run's", *given], folder=lm_conf_dir())
    changed = {} if resume is None else changes(given, config)
    if config["start"] is not None:
        if touched := [override for override in given if override.startswith(("model=", "model."))]:
            raise UserError(f"start names the model, and {touched[0]!r} another; leave one of them out")
        config["model"] = {}
    from recsys_moe.pipelines import train_lm

    with progress() as display:
        phases = PhaseProgress(display)

        def on_event(event: dict[str, Any]) -> None:
            phases.training(event, "tokens")
            if event["kind"] == "evaluation":
                figures = f"loss {event['validation.loss']:.4f}  perplexity {event['validation.perplexity']:.3f}"
                stderr.print(f"step {event['step']:,}: validation {figures}", soft_wrap=True)

        if resume is None:
            job = parse(train_lm.LmJob, config, "configuration")
            summary = train_lm.train(job, on_event, phases)
        else:
            summary = train_lm.resume(resume, Path(config["runs_dir"]).absolute(), changed, on_event, phases)
    if json:
        print_json(summary)
        return
    found = summary["validation"]
    stdout.print(f"validation  loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}", soft_wrap=True)
    for name, key in (("model", "bundle"), ("registered", "version"), ("run", "run_id")):
        stdout.print(f"{name:10s}  {summary[key]}", soft_wrap=True)
