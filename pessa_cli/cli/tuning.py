"""The commands about fine-tuning: tune, merge and eval. Parse, call, show, as in `app`, which takes them in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pessa_cli.cli import console
from pessa_cli.cli.options import ALLOW_PICKLE, AS, FORCE, JSON, MODEL, OUT, RESUME, REVISION, SHARD_SIZE, run_of


def tune(
    model: MODEL,
    data: Annotated[Path, typer.Option(help="JSON or JSONL: instructions, completions, conversations, or audio.")],
    out: OUT,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file, as configs/tune-*.toml; options here win.")] = None,
    method: Annotated[str | None, typer.Option(help="pessa (the default), sorsa, pica, svft, lora, dora, ...")] = None,
    rank: Annotated[int | None, typer.Option(help="Of methods that have one.")] = None,
    targets: Annotated[str | None, typer.Option(metavar="NAMES", help="Modules to tune, as q_proj,v_proj.")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Examples that are only looked at, while training.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="At its highest.")] = None,
    schedule: Annotated[
        Literal["linear", "cosine", "constant", "constant_with_warmup"] | None, typer.Option(help="How it falls.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Steps, or below 1 the share of all steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times through the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples a step, over all processes.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Examples at a time in a process; less needs less.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an example; the end of longer ones goes.")] = None,
    template: Annotated[Literal["alpaca", "chat"] | None, typer.Option(help="How instructions are put.")] = None,
    packing: Annotated[bool | None, typer.Option("--packing", help="Several examples in a row of max-length.")] = None,
    language: Annotated[str | None, typer.Option(help="Spoken language, for a multilingual Whisper.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of the data and the start of the adapter.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, typer.Option(help="Of the frozen weights.")
    ] = None,
    device: Annotated[Literal["auto", "cpu"] | None, typer.Option(help="auto: an accelerator if there is one.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = None,
    log_steps: Annotated[int | None, typer.Option(help="Steps between reports.")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between looks at --eval-data; 0: each epoch.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints for --resume; 0 for none.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="A folder for TensorBoard's logs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last checkpoint of a stopped run.")] = False,
    force: FORCE = False,
    json: JSON = False,
    architecture: AS = None,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Train an adapter: a model stays as it is, and what is learned goes into a small folder that PEFT loads.

    Example: `pessa tune smollm2-135m --method pessa --data train.jsonl -o adapter/`
    """
    from pessa_cli.tuning.options import Tuning, load_tuning

    tuning = (Tuning() if recipe is None else load_tuning(recipe)).changed(
        method=method,
        rank=rank,
        targets=None if targets is None else tuple(name.strip() for name in targets.split(",")),
        template=template,
        max_length=max_length,
        packing=packing,
        language=language,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        epochs=epochs,
        max_steps=max_steps,
        batch=batch,
        micro_batch=micro_batch,
        seed=seed,
        dtype=dtype,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        log_steps=log_steps,
        eval_steps=eval_steps,
        save_steps=save_steps,
    )
    name = run_of(model).source or model
    from pessa_cli.common.packages import need

    need("peft", "accelerate")
    from pessa_cli.sources.open import open_source
    from pessa_cli.surgery.model import open_model
    from pessa_cli.tuning.train import Job
    from pessa_cli.tuning.train import tune as train

    with open_source(model, revision, allow_pickle) as folder, console.training() as watch:
        job = Job(
            open_model(folder, architecture), data, out, tuning, name, eval_data, force, resume, tensorboard, watch
        )
        record = train(job)
    if record is None:  # another process tells
        return
    if json:
        console.show_json(record | {"out": str(out)})
        return
    console.show_tuned(record)
    console.note(f"{out} written; merge it with: pessa merge {model} {out} -o merged/")


def merge(
    model: MODEL,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of an adapter, of any PEFT method.")],
    out: OUT,
    resume: RESUME = False,
    max_shard_size: SHARD_SIZE = "5GB",
    force: FORCE = False,
    json: JSON = False,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Put an adapter into the weights and write the model: same names and shapes, no cost when it is used.

    Example: `pessa merge smollm2-135m adapter/ -o merged/`
    """
    from pessa_cli.common.packages import need

    need("peft")
    from pessa_cli.sources.open import open_source
    from pessa_cli.surgery.model import open_model
    from pessa_cli.tuning.merge import merge_adapter

    run = run_of(model, force, resume, max_shard_size=max_shard_size)
    with open_source(model, revision, allow_pickle) as folder:
        written = merge_adapter(open_model(folder), adapter, out, run)
    if json:
        console.show_json(written | {"out": str(out)})
        return
    console.note(
        f"{out} written, {written['changed']} tensors changed; check it with: pessa eval {out}, pessa verify {out}"
    )


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models, each alone or as MODEL+ADAPTER.")],
    tasks: Annotated[
        str, typer.Option(metavar="FILES", help="JSON files of questions, or folders with a test.json, with commas.")
    ] = "",
    speech: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines of clips with what is said: word error rate.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text, or JSON lines of texts: perplexity.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV of sentence, sentence, similarity: Spearman correlation.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter to put on each model.")] = None,
    metric: Annotated[
        Literal["likelihood", "generation"],
        typer.Option(help="likelihood: the likeliest answer by token. generation: the first answer that is written."),
    ] = "likelihood",
    window: Annotated[int, typer.Option(help="Tokens of --text that the model sees at a time, if it can.")] = 512,
    stride: Annotated[int, typer.Option(help="Tokens from one window to the next.")] = 256,
    language: Annotated[str | None, typer.Option(help="Of --speech, for a multilingual Whisper.")] = None,
    limit: Annotated[int, typer.Option(help="Only the first questions, clips, windows or pairs; 0 for all.")] = 0,
    batch: Annotated[int, typer.Option(help="Questions, clips or sentences at a time.")] = 16,
    template: Annotated[Literal["alpaca", "chat"], typer.Option(help="How questions are put.")] = "alpaca",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where it runs, as cuda.")] = "cpu",
    json: JSON = False,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Score models: accuracy on tasks, word error rate on speech, perplexity on text, correlation on pairs.

    Example: `pessa eval whisper-tiny.en out/ --speech clips.jsonl`
    """
    from pessa_cli.evaluation.evaluate import EvaluationData, evaluate_models, split_adapter
    from pessa_cli.evaluation.measures import ScoreSettings

    settings = ScoreSettings(metric, limit, batch, template, dtype, device, language, window, stride)
    data = EvaluationData([Path(task.strip()) for task in tasks.split(",") if task.strip()], speech, text, pairs)
    subjects = [split_adapter(name, adapter) for name in models]
    scores = evaluate_models(subjects, data, settings, revision, allow_pickle, console.progress)
    if json:
        files = {file: sha for score in scores for file, sha in score.sources.items()}
        console.show_json({"models": [score.to_dict() for score in scores], "sha256": files})
    else:
        console.show_scores(scores)
