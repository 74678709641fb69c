"""Compare ways to share a budget over the attention and the MLPs of a Whisper encoder, on speech.

    python scripts/compare_plans.py models/whisper-tiny.en --calibrate FILE.jsonl --clips FILE.jsonl \
        --statistics FILE [--shares 0.8 0.7 0.6 0.5]

For each share of the encoder's blocks it cuts the decomposed model in memory by each plan that `pessa prune` compares
(`ranks.budget.candidates`), by one width for all layers (`--uniform`), by attention alone and by MLPs alone, and prints
the KL divergence from the original (`scripts/speech_scores.py`). The statistics are collected if the file does not
exist. `scripts/speech_data.py` makes the two files of clips, apart by recording.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from speech_scores import Estimate, prepare, score
from transformers import WhisperForConditionalGeneration

from pessa_cli.blocks.site import Site, count, select
from pessa_cli.calibration.collect import collect
from pessa_cli.calibration.trial_cuts import set_block
from pessa_cli.models.hooks import block_modules
from pessa_cli.ranks.budget import UnmetBudgetError, candidates, ranks_for
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import SavedStatistics
from pessa_cli.surgery.decomposition import Decomposition, decomposition_of
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.run import Run


def plans(model: Model, sites: list[Site], found: Decomposition, share: float) -> Iterator[tuple[str, RankPlan]]:
    """Yield the plans that keep this share of the parameters of all blocks, by what they are."""
    rule = Rule(target_layers=share)
    yield from candidates(sites, found.spectra, rule, model.size).items()
    yield (
        "one width for all layers",
        ranks_for(sites, found.spectra, Rule(target_layers=share, uniform=True), model.size),
    )
    whole = sum(count(site.tensors) for site in sites)
    for name, own in (
        ("attention alone", [site for site in sites if "mlp" not in site.ranks]),
        ("MLPs alone", [site for site in sites if "mlp" in site.ranks]),
    ):
        size = sum(count(site.tensors) for site in own)
        kept = 1 - (1 - share) * whole / size
        if kept <= 0:
            continue
        try:
            plan = ranks_for(own, found.spectra, Rule(target_layers=kept), model.size)
        except UnmetBudgetError:
            continue
        rest = RankPlan.full([site for site in sites if site not in own])
        yield name, RankPlan({**rest.ranks, **plan.ranks}, plan.pairs)


def _text(found: Estimate) -> str:
    return f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, nargs="*", default=[])
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--statistics", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5])
    options = parser.parse_args()
    model = open_model(options.model)
    sites = select(model.sites, ("encoder",))
    if not options.statistics.exists():
        collect(model, sites, options.calibrate, options.statistics)
    _, reference = prepare(options.model, options.clips)
    loaded = WhisperForConditionalGeneration.from_pretrained(options.model, dtype="float32").eval()
    modules, whole = block_modules(sites, loaded), sum(count(site.tensors) for site in sites)
    print("| share | plan | of the blocks | KL, nats per token |\n|---|---|---|---|")
    with decomposition_of(model, Run(), reuse=True) as found:
        found.decompose(sites, SavedStatistics(options.statistics))
        for share in options.shares:
            for name, plan in plans(model, sites, found, share):
                for site in sites:
                    set_block(site, modules[site.name], found.cut(plan.kept(site), "dense"))
                kept = sum(count(plan.kept(site).tensors) for site in sites) / whole
                print(
                    f"| {share} | {name} | {kept:.3f} | {_text(score(loaded, reference, words=False).kl)} |", flush=True
                )


if __name__ == "__main__":
    main()
