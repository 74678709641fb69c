"""The command that scores models: eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pessa_cli.cli import console
from pessa_cli.cli.expand import Only, with_options
from pessa_cli.cli.options import JSON, SourceOptions


@with_options
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models, each given as MODEL or as MODEL+ADAPTER.")
    ],
    source: Annotated[SourceOptions, Only("revision", "allow_pickle", "follow_links")],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="FILES", help="Accuracy on multiple-choice questions: JSON files, or folders with a test.json."
        ),
    ] = "",
    speech: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Word error rate on JSON lines of clips with transcripts.")
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Perplexity on a text or JSON lines.")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Spearman correlation on a CSV file of sentence, sentence, similarity."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter to load into each of the models.")] = None,
    metric: Annotated[
        Literal["likelihood", "generation"],
        typer.Option(
            help="How --tasks are answered. likelihood: the answer with the highest likelihood per token. generation: "
            "the first answer in the generated text."
        ),
    ] = "likelihood",
    window: Annotated[int, typer.Option(help="Tokens of --text in one window, if the model takes as many.")] = 512,
    stride: Annotated[int, typer.Option(help="Tokens from the start of one window to the next.")] = 256,
    language: Annotated[
        str | None, typer.Option(help="Spoken language of --speech, for a multilingual Whisper.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Score only this many questions, clips, windows or pairs; 0 for all.")] = 0,
    batch: Annotated[int, typer.Option(help="Questions, clips or sentences in a batch.")] = 16,
    template: Annotated[Literal["alpaca", "chat"], typer.Option(help="Prompt format for questions.")] = "alpaca",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Dtype to run the models in.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Device to run the models on, e.g. cuda.")] = "cpu",
    kl: Annotated[
        bool,
        typer.Option(
            "--kl/--no-kl",
            help="With several models, measure how far the predictions on --speech and --text are from the first "
            "model's. Both are then in memory at once.",
        ),
    ] = True,
    json: JSON = False,
) -> None:
    """Score models: accuracy on tasks, word error rate on speech, perplexity on text, correlation on pairs.

    On speech and text also the nats per token and the KL divergence from the first model. Intervals are of 95 %, by
    the bootstrap over clips, windows or pairs.

    Example: `pessa eval whisper-tiny.en out/ --speech clips.jsonl`
    """
    from pessa_cli.evaluation.evaluate import EvaluationData, evaluate_models, split_adapter
    from pessa_cli.evaluation.measures import ScoreSettings

    settings = ScoreSettings(metric, limit, batch, template, dtype, device, language, window, stride, kl=kl)
    data = EvaluationData([Path(task.strip()) for task in tasks.split(",") if task.strip()], speech, text, pairs)
    subjects = [split_adapter(name, adapter) for name in models]
    opening = (source.revision, source.allow_pickle, source.follow_links)
    scores = evaluate_models(subjects, data, settings, *opening, progress=console.progress)
    if json:
        files = {file: sha for score in scores for file, sha in score.sources.items()}
        console.show_json({"models": [score.to_dict(scores[0]) for score in scores], "sha256": files})
    else:
        console.show_scores(scores)
