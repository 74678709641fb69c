"""`pessa verify`: decides whether two models are the same, and locates and measures their differences.

There are three levels. Weights: the Q-K and V-O products of every head in float64, without building a model, and all
other tensors byte for byte. Blocks: the output of each attention block of the candidate on the inputs of the
reference. Outputs: logits, transcripts and continuations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Pair, absorb
from pessa_cli.algebra.compare import relative_difference
from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.dtypes import FLOATS
from pessa_cli.checkpoint.files import read_json, sha256_of, visible_files
from pessa_cli.checkpoint.manifest import CARD_FILE, MANIFEST_FILE
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.progress import Progress, Tick, quietly
from pessa_cli.common.text import badness
from pessa_cli.evaluation.compare import GeneratedText, OutputDifference, run_both
from pessa_cli.evaluation.limits import Level, VerifyOptions
from pessa_cli.surgery.block_io import NotFiniteError, read_site
from pessa_cli.surgery.model import Model


@dataclass(frozen=True)
class Limits:
    """Limits for equivalent models: the largest relative errors, and the least share of equal top-1 predictions."""

    weights: float
    outputs: float
    agreement: float


# By stored dtype: storing factors rounds each product by about the unit roundoff, and the layers amplify that error.
LIMITS = {
    "F64": Limits(1e-6, 1e-4, 0.999),
    "F32": Limits(1e-6, 1e-4, 0.999),
    "F16": Limits(2e-3, 2e-2, 0.98),
    "BF16": Limits(1.6e-2, 1.6e-1, 0.9),
}


@dataclass(frozen=True)
class Difference:
    """A relative error and its place, for example "decoder.cross.2 head 4 Q-K"."""

    where: str
    error: float


@dataclass(frozen=True)
class Check:
    """The result of one comparison with a limit. `badness` sorts the failures of a level."""

    level: str  # weights, blocks, outputs or texts
    where: str
    finding: str
    passed: bool
    badness: float = 0.0


@dataclass(frozen=True)
class Report:
    """All results of `verify`. Errors are relative Frobenius norms."""

    limits: Limits
    parameters: tuple[int, int]  # of the reference and of the candidate
    nbytes: tuple[int, int]  # of the weights, likewise
    weights: list[Difference]
    unequal: list[str]  # tensors outside attention that are missing in one model or differ in a byte
    blocks: list[Difference] = field(default_factory=list)
    outputs: OutputDifference | None = None
    texts: list[GeneratedText] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        """Every comparison with a limit."""
        limits, out = self.limits, self.outputs
        checks = [_within("weights", found.where, found.error, limits.weights) for found in self.weights]
        unequal = f"{len(self.unequal)} are not byte for byte the same: {', '.join(self.unequal[:3])}"
        checks.append(Check("weights", "tensors outside attention", unequal, not self.unequal, float("inf")))
        checks += [_within("blocks", found.where, found.error, limits.outputs) for found in self.blocks]
        if out is not None:
            checks.append(_within("outputs", out.what, out.error, limits.outputs))
            if out.agreement is not None:
                finding = f"agreement {out.agreement:.4f}, at least {limits.agreement:.4f} is needed"
                checks.append(Check("outputs", "top-1", finding, out.agreement >= limits.agreement))
        for text in self.texts:
            finding = f"{text.reference!r} became {text.candidate!r}"
            checks.append(Check("texts", text.name, finding, text.reference == text.candidate))
        return checks

    @property
    def failures(self) -> list[str]:
        """One line for each level with failures: the worst one, and the number of failures."""
        lines, checks = [], self.checks
        for level in ("weights", "blocks", "outputs", "texts"):
            of_level = [check for check in checks if check.level == level]
            failed = [check for check in of_level if not check.passed]
            if failed:
                worst = max(failed, key=lambda check: check.badness)
                others = f" ({len(failed)} of {len(of_level)} checks failed)" if len(of_level) > 1 else ""
                lines.append(f"{level}: {worst.where}: {worst.finding}{others}")
        return lines

    @property
    def same(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The largest error of each measure as text: level, measure, error, limit, place."""
        limits, out = self.limits, self.outputs
        rows: list[tuple[str, str, str, str, str]] = []
        limit = f"{limits.weights:.1e}"
        for side in ("Q-K", "V-O", "Q", "K", "output bias"):
            found = [d for d in self.weights if d.where.endswith(" " + side)]
            if found:
                worst = max(found, key=lambda d: badness(d.error))
                where = worst.where.removesuffix(" " + side)
                rows.append(("weights", f"{side}, relative error", f"{worst.error:.2e}", limit, where))
        equal = f"{len(self.unequal)} differ" if self.unequal else "equal"
        rows.append(("weights", "all other tensors, bytes", equal, "equal", ", ".join(self.unequal[:2])))
        limit = f"{limits.outputs:.1e}"
        if self.blocks:
            worst = max(self.blocks, key=lambda d: badness(d.error))
            rows.append(("blocks", "output, relative error", f"{worst.error:.2e}", limit, worst.where))
        if out is not None:
            rows.append(("outputs", f"{out.what}, relative error", f"{out.error:.2e}", limit, ""))
            rows.append(("outputs", f"{out.what}, largest difference", f"{out.max_difference:.2e}", "", ""))
            rows.append(("outputs", f"{out.what}, mean difference", f"{out.mean_difference:.2e}", "", ""))
            if out.kl is not None and out.agreement is not None:
                rows.append(("outputs", "KL divergence, nats", f"{out.kl:.2e}", "", ""))
                least = f"{limits.agreement:.2%}"
                rows.append(("outputs", "top-1 agreement", f"{out.agreement:.2%}", least, ""))
        return rows

    @property
    def verdict(self) -> str:
        """The result in one line, for the model card."""
        equal = sum(text.reference == text.candidate for text in self.texts)
        texts = f"; {equal} of {len(self.texts)} texts written by both are the same" if self.texts else ""
        return ("the same model within these limits" if self.same else "not the same model") + texts

    @property
    def worst(self) -> Difference:
        """The largest error in the weights."""
        return max(self.weights, key=lambda found: badness(found.error))

    def to_dict(self) -> dict[str, Any]:
        return {"same": self.same, "failures": self.failures, "worst": asdict(self.worst)} | asdict(self)


def _within(level: str, where: str, error: float, limit: float) -> Check:
    finding = f"relative error {error:.3g}, limit {limit:.3g}"
    return Check(level, where, finding, error <= limit, badness(error))


def verify_models(
    reference: Model,
    candidate: Model,
    level: Level = "outputs",
    audio: list[Path] | None = None,
    text: list[Path] | None = None,
    tolerance: float | None = None,
    min_agreement: float | None = None,
    progress: Progress = quietly,
) -> Report:
    """Compare two models at one level and those before it; see the module for the levels.

    audio, text: files to transcribe and to continue with both models. tolerance, min_agreement: replace the limits of
    the stored dtype. Raises UsageError for options that do not fit the level or the models, PessaError when the models
    have different blocks, weights that are not finite, or cannot be run.
    """
    VerifyOptions(level, tolerance, min_agreement)  # raises UsageError
    if level != "outputs" and (audio or text):
        raise UsageError(
            f"--audio and --text need --level outputs, not {level}", "leave them out, or leave --level out"
        )
    dtype = max((site.dtype for model in (reference, candidate) for site in model.sites), key=FLOATS.index)
    limits = LIMITS[dtype]
    limits = Limits(
        weights=limits.weights if tolerance is None else tolerance,
        outputs=limits.outputs if tolerance is None else tolerance,
        agreement=limits.agreement if min_agreement is None else min_agreement,
    )
    pairs = _paired(reference, candidate)
    weights: list[Difference] = []
    faults: dict[CheckpointReader, list[str]] = {reference.reader: [], candidate.reader: []}
    with progress("comparing weights", reference.nbytes, len(reference.sites)) as tick:
        for site in reference.sites:
            try:
                weights += _compare_site(reference.reader, site, candidate.reader, pairs[site.name])
            except NotFiniteError as error:
                faults[error.reader] += error.faults
            tick(sum(reference.reader.header[name].nbytes for name in site.tensors), 1)
        unequal = _unequal(reference, candidate, tick)
    for reader, found in faults.items():
        if found:
            raise NotFiniteError(reader, found)
    report = Report(
        limits=limits,
        parameters=(reference.parameters, candidate.parameters),
        nbytes=(reference.nbytes, candidate.nbytes),
        weights=weights,
        unequal=unequal,
    )
    if level == "weights":
        return report
    blocks, outputs, texts = run_both(reference, candidate, level == "outputs", audio or [], text or [])
    differences = [Difference(name, error) for name, error in blocks]
    return replace(report, blocks=differences, outputs=outputs, texts=texts)


def _paired(reference: Model, candidate: Model) -> dict[str, Site]:
    """The sites of the candidate by name. Raises PessaError unless both models have the same blocks."""
    others = {site.name: site for site in candidate.sites}
    for site in reference.sites:
        other = others.get(site.name)
        if other is None:
            raise PessaError(
                f"{candidate.reader.folder} has no block {site.name}, but {reference.reader.folder} has one",
                "compare a model with the one that it was made from",
            )
        shape, other_shape = _function(site), _function(other)
        if shape != other_shape:
            raise PessaError(
                f"{site.name} has {shape} in {reference.reader.folder} and {other_shape} in {candidate.reader.folder}",
                "compare a model with the one that it was made from",
            )
    if len(others) > len(reference.sites):
        extra = next(name for name in others if name not in {site.name for site in reference.sites})
        raise PessaError(
            f"{reference.reader.folder} has no block {extra}, but {candidate.reader.folder} has one",
            "compare a model with the one that it was made from",
        )
    return others


def _function(site: Site) -> str:
    """The heads and widths of a block, which pruning does not change."""
    widths = f"{site.query_width}, {site.key_width} -> {site.output_width}"
    return f"{site.heads} heads of {site.head_dim} ({site.kv_heads} for keys and values), {widths}"


def _compare_site(
    reader: CheckpointReader, site: Site, other_reader: CheckpointReader, other: Site
) -> list[Difference]:
    """The relative differences of one block: Q-K and V-O of each query head, and the output bias.

    Where RoPE or a norm prevents merging Q and K, their unmerged directions are compared separately.
    """
    weights, other_weights = read_site(reader, site), read_site(other_reader, other)
    ours, theirs = absorb(weights, site), absorb(other_weights, other)
    found: list[Difference] = []
    if ours.qk is not None and theirs.qk is not None:
        errors = relative_difference(_query_heads(ours.qk, site, "left"), _query_heads(theirs.qk, site, "left"))
        found += _by_head(site, "Q-K", errors)
    if site.unmerged:
        for side in "qk":  # RoPE or a norm stands between these directions of Q and K
            found += _by_head(site, side.upper(), _unmerged(weights, other_weights, side, site.unmerged))
    vo = _matched_rows(ours.vo, site), _matched_rows(theirs.vo, other)
    errors = relative_difference(_query_heads(vo[0], site, "right"), _query_heads(vo[1], site, "right"))
    found += _by_head(site, "V-O", errors)
    if ours.o_bias is not None and theirs.o_bias is not None:
        found.append(Difference(f"{site.name} output bias", float(_relative(ours.o_bias, theirs.o_bias))))
    return found


def _by_head(site: Site, what: str, errors: Tensor) -> list[Difference]:
    return [Difference(f"{site.name} head {head} {what}", error) for head, error in enumerate(errors.tolist())]


def _query_heads(pair: Pair, site: Site, stacked: Literal["left", "right"]) -> Pair:
    """The pair with one batch entry per query head: the stacked factor is split, the other one is repeated."""
    g, m = site.kv_heads, site.group

    def apart(factor: Tensor) -> Tensor:
        return factor.reshape(g * m, -1, factor.shape[-1])

    def repeated(factor: Tensor) -> Tensor:
        return factor.repeat_interleave(m, dim=0)

    if stacked == "left":
        return Pair(apart(pair.left), repeated(pair.right))
    return Pair(repeated(pair.left), apart(pair.right))


def _matched_rows(pair: Pair, site: Site) -> Pair:
    """V-O, with a zero row where there is no value bias, so that models with and without one can be compared."""
    missing = site.key_width + 1 - pair.left.shape[1]
    return Pair(torch.nn.functional.pad(pair.left, (0, 0, 0, missing)), pair.right)


def _unmerged(ours: HeadWeights, theirs: HeadWeights, side: str, count: int) -> Tensor:
    """The relative difference of W_Q or W_K with its bias, per head, in the first `count` directions."""

    def rows(weights: HeadWeights) -> Tensor:
        weight: Tensor = getattr(weights, side).double().flatten(0, -3)  # (heads, d, D)
        bias: Tensor | None = getattr(weights, f"{side}_bias")
        column = weight.new_zeros(weight.shape[:2]) if bias is None else bias.double().flatten(0, -2)
        return torch.cat([weight, column.unsqueeze(-1)], dim=-1)[:, :count].flatten(1)

    return _relative(rows(ours), rows(theirs))


def _relative(reference: Tensor, candidate: Tensor) -> Tensor:
    """The relative L2 difference along the last axis; 0 where both are zero."""
    difference = (reference - candidate).norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / reference.norm(dim=-1))


def _unequal(reference: Model, candidate: Model, tick: Tick) -> list[str]:
    """The tensors outside attention that are missing in one of the models or differ in a byte."""
    ours, theirs = reference.reader, candidate.reader
    skip = {name for model in (reference, candidate) for site in model.sites for name in site.tensors}
    found: list[str] = []
    for name in sorted((ours.header.keys() | theirs.header.keys()) - skip):
        info = ours.header.get(name)
        if info is None or info != theirs.header.get(name) or any(a != b for a, b in _chunks(ours, theirs, name)):
            found.append(name)
        tick(0 if info is None else info.nbytes, 0)
    return found


def _chunks(ours: CheckpointReader, theirs: CheckpointReader, name: str) -> Iterator[tuple[object, object]]:
    return zip_longest(ours.chunks(name), theirs.chunks(name))


def verify_folder(folder: Path) -> list[str]:
    """Check an output folder against the SHA-256 in its pessa.json; returns one line per differing file.

    A file differs when it is missing, changed, or not listed. Raises PessaError when the folder has no pessa.json, or
    one without hashes.
    """
    manifest = read_json(folder / MANIFEST_FILE)
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict) or not hashes or not all(isinstance(name, str) for name in hashes):
        raise PessaError(
            f"{folder / MANIFEST_FILE} lists no SHA-256 of its files",
            f"compare the folder with its original: pessa verify ORIGINAL {folder}",
        )
    found = visible_files(folder).keys() - {MANIFEST_FILE, *({CARD_FILE} - hashes.keys())}
    faults = [f"{name}: missing" for name in hashes if name not in found]
    faults += [f"{name}: changed" for name in hashes if name in found and sha256_of(folder / name) != hashes[name]]
    return faults + [f"{name}: not in the manifest" for name in sorted(found - hashes.keys())]
