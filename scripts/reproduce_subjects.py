"""The models, the ways to cut them and the shares of scripts/reproduce.py, which describes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reproduce_data import Fold, Places, pairs, speech, text, text_halves

from pessa_cli.blocks.site import AttentionSite, Site, count
from pessa_cli.ranks.rule import Rule
from pessa_cli.workflow.recipe import Recipe

OF_ATTENTION = ("vanilla", "plain", "calibrated", "in sequence")
OF_LAYERS = ("joint", "same share", "one width", "MLPs alone", "attention alone")
TENS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Subject:
    """A part of a table: a model, its data, the kinds of blocks that are cut, and the shares.

    shares: of attention to prune or, with `layers`, of the layers to keep. first: those that are run before all others.
    sequence: those at which calibration in sequence is run.
    """

    title: str
    model: str
    data: Callable[[Places, Path], list[Fold]]
    kinds: tuple[str, ...] = ("attention",)
    shares: tuple[float, ...] = TENS
    first: tuple[float, ...] = ()
    sequence: tuple[float, ...] = ()
    layers: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        return OF_LAYERS if self.layers else OF_ATTENTION


def _layers(title: str, model: str, data: Callable[[Places, Path], list[Fold]], kinds: tuple[str, ...] = ()) -> Subject:
    shares = (0.9, 0.8, 0.75, 0.7) if model == "minilm" else (0.9, 0.8, 0.7)
    return Subject(f"{title} layers", model, data, kinds, shares, layers=True)


DECODER = ("decoder.self", "decoder.cross")
SUBJECTS = (
    Subject(
        "tiny.en encoder",
        "whisper-tiny.en",
        speech,
        ("encoder.self",),
        (*TENS[:3], 0.35, *TENS[3:]),
        *2 * ((0.35, 0.5),),
    ),
    Subject("tiny.en", "whisper-tiny.en", speech, shares=(*TENS[:2], 0.25, *TENS[2:]), first=(0.25,), sequence=(0.25,)),
    Subject("tiny.en decoder", "whisper-tiny.en", speech, DECODER),
    Subject("MiniLM", "minilm", pairs, first=(0.3,)),
    Subject("SmolLM2", "smollm2-135m", text, shares=(0.1, 0.15, *TENS[1:]), first=(0.15,)),
    _layers("tiny.en encoder", "whisper-tiny.en", speech, ("encoder",)),
    _layers("tiny.en", "whisper-tiny.en", speech),
    _layers("MiniLM", "minilm", pairs),
    _layers("SmolLM2", "smollm2-135m", text_halves),
)
# The allowed loss against the original: points of word error rate, points of correlation, or a share of the perplexity.
TARGETS = (
    ("tiny.en encoder", 0.35, "calibrated", 0.02),
    ("tiny.en encoder", 0.5, "in sequence", 0.1),
    ("tiny.en", 0.25, "calibrated", 0.02),
    ("MiniLM", 0.3, "calibrated", 0.01),
    ("SmolLM2", 0.15, "calibrated", 0.05),
    ("tiny.en encoder layers", 0.8, "joint", 0.005),
    ("tiny.en encoder layers", 0.7, "joint", 0.01),
    ("tiny.en layers", 0.8, "joint", 0.02),
    ("MiniLM layers", 0.75, "joint", 0.01),
    ("SmolLM2 layers", 0.9, "joint", 0.07),
    ("SmolLM2 layers", 0.8, "joint", 0.18),
    ("SmolLM2 layers", 0.7, "joint", 0.4),
)


def recipe(
    method: str, share: float, sites: Sequence[Site], data: Sequence[Path], statistics: Callable[[], Path]
) -> Recipe | None:
    """Return the recipe of `pessa prune` for a method, or None for what cannot be cut.

    sites: the blocks of the subject. statistics: returns the file, and collects them if it is not there.
    """
    kinds, files = tuple(dict.fromkeys(site.kind for site in sites)), tuple(data)
    lost = 1 - share if method in OF_LAYERS else share
    rotates = any(isinstance(site, AttentionSite) and site.spec.rope for site in sites)
    dropped_pairs = lost if rotates else None
    if method == "vanilla":
        return Recipe(Rule(ratio=lost, rope_ratio=dropped_pairs), sites=kinds, method="vanilla")
    if method == "plain":
        return Recipe(Rule(ratio=lost, rope_ratio=dropped_pairs), sites=kinds)
    if method == "calibrated":
        return Recipe(Rule(target_attention=1 - lost), sites=kinds, statistics=(statistics(),))
    if method == "in sequence":
        return Recipe(Rule(target_attention=1 - lost), sites=kinds, calibrate=files, sequential=True)
    if method == "joint":
        return Recipe(Rule(target_layers=share), sites=kinds, calibrate=files)
    if method == "same share":
        return Recipe(
            Rule(ratio=lost, mlp_ratio=lost, rope_ratio=dropped_pairs), sites=kinds, statistics=(statistics(),)
        )
    if method == "one width":
        return Recipe(Rule(target_layers=share, uniform=True), sites=kinds, statistics=(statistics(),))
    mlps = method == "MLPs alone"
    own = [site for site in sites if ("mlp" in site.ranks) is mlps]
    kept = 1 - lost * sum(count(site.tensors) for site in sites) / sum(count(site.tensors) for site in own)
    if kept <= 0:
        return None
    kinds = tuple(dict.fromkeys(site.kind for site in own))
    if mlps:  # the widths are compared by trials
        return Recipe(Rule(target_layers=kept), sites=kinds, calibrate=files)
    return Recipe(Rule(target_layers=kept), sites=kinds, statistics=(statistics(),))


def jobs(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, str, float]]:
    """Yield all runs to make, beginning with those that the targets refer to."""
    for subject in subjects:
        yield subject, "original", 0.0
    for first in (True, False):
        for method in ("calibrated", "in sequence", "plain", "vanilla", *OF_LAYERS):
            for subject in subjects:
                if method in subject.methods:
                    chosen = subject.sequence if method == "in sequence" else subject.shares
                    yield from ((subject, method, share) for share in chosen if (share in subject.first) is first)
