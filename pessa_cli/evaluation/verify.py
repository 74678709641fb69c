"""`pessa verify`: decides whether two models are the same, and locates and measures their differences.

There are three levels, and the files beside the weights are compared on each of them. Weights: the Q-K and V-O
products of every head in float64, without building a model, and all other tensors byte for byte. Blocks: the output of
each block of the candidate on the inputs of the reference. Outputs: logits, transcripts and continuations.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Pair, absorb
from pessa_cli.algebra.channels import ChannelWeights
from pessa_cli.algebra.compare import product_norm, relative_difference
from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.checkpoint.dtypes import FLOATS
from pessa_cli.checkpoint.files import read_json, sha256_of
from pessa_cli.checkpoint.links import visible_files
from pessa_cli.checkpoint.manifest import CARD_FILE, MANIFEST_FILE
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import is_there
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.values import check_device
from pessa_cli.evaluation.compare import run_both
from pessa_cli.evaluation.limits import Level, VerifyOptions
from pessa_cli.evaluation.report import LIMITS, Difference, Limits, Report
from pessa_cli.evaluation.settings import compare_settings
from pessa_cli.evaluation.tensors import compare_tensors
from pessa_cli.surgery.block_io import NotFiniteError, read_site
from pessa_cli.surgery.channel_numbers import all_channels
from pessa_cli.surgery.model import Model


def verify_models(
    reference: Model,
    candidate: Model,
    level: Level = "outputs",
    audio: list[Path] | None = None,
    text: list[Path] | None = None,
    tolerance: float | None = None,
    min_agreement: float | None = None,
    device: str = "cpu",
    architecture: str | None = None,
    progress: Progress = quietly,
) -> Report:
    """Compare two models at one level and those before it; see the module for the levels.

    audio, text: files to transcribe and to continue with both models. tolerance, min_agreement: replace the limits of
    the stored dtype. device: where the models run. architecture: the `model_type` as which both were opened, if not
    that of config.json. Raises UsageError for options that do not fit the level or the models, PessaError when the
    models have different blocks, weights that are not finite, or cannot be run.
    """
    VerifyOptions(level, tolerance, min_agreement, device)  # raises UsageError
    if level != "outputs" and (audio or text):
        raise UsageError(
            f"--audio and --text need --level outputs, not {level}", "leave them out, or leave --level out"
        )
    if level != "weights":
        check_device(device, "float64")
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
                weights += _compare_site(reference, site, candidate, pairs[site.name])
            except NotFiniteError as error:
                faults[error.reader] += error.faults
            tick(sum(reference.reader.header[name].nbytes for name in site.tensors), 1)
        unequal, ignored = compare_tensors(reference, candidate, faults, tick)
    for reader, found in faults.items():
        if found:
            raise NotFiniteError(reader, found)
    report = Report(
        limits=limits,
        parameters=(reference.parameters, candidate.parameters),
        nbytes=(reference.nbytes, candidate.nbytes),
        weights=weights,
        settings=compare_settings(reference, candidate, architecture),
        unequal=unequal,
        ignored=ignored,
    )
    if level == "weights":
        return report
    blocks, outputs, texts = run_both(reference, candidate, level == "outputs", audio or [], text or [], device)
    if not audio and not text and not (tolerance is None and min_agreement is None):
        # Whoever accepts a difference of the outputs has not asked for the same text from the built-in input.
        texts = [replace(written, judged=False) for written in texts]
    differences = [Difference(site.name, blocks[site.name]) for site in reference.sites if site.name in blocks]
    reached = {site.kind for site in reference.sites if site.name in blocks}
    silent = [site for site in reference.sites if site.name not in blocks]
    layers = {_layer(site) for site in reference.sites if site.name in blocks}
    skipped = [
        site.name
        for site in silent
        if not reached or (_layer(site) in layers if isinstance(site, MlpSite) else site.kind in reached)
    ]
    unreached = [site.name for site in silent if site.name not in skipped]
    return replace(report, blocks=differences, skipped=skipped, unreached=unreached, outputs=outputs, texts=texts)


def _layer(site: Site) -> tuple[str, int]:
    """The stack and number of the layer that a block is in; Mllama skips whole layers without an image."""
    return site.kind.rpartition(".")[0], site.layer


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
        shape, other_shape = site.function, other.function
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


def _compare_site(model: Model, site: Site, other_model: Model, other: Site) -> list[Difference]:
    """The relative differences of the weights of one block."""
    if isinstance(site, MlpSite):
        assert isinstance(other, MlpSite)
        return _compare_mlp(model, site, other_model, other)
    assert isinstance(site, AttentionSite)
    assert isinstance(other, AttentionSite)
    return _compare_attention(model.reader, site, other_model.reader, other)


def _compare_mlp(model: Model, site: MlpSite, other_model: Model, other: MlpSite) -> list[Difference]:
    """The relative differences of an MLP: the matrices that write its channels, the one that reads them, and its bias.

    The order of the channels does not matter: each is compared with the one of the same original number. A copy of a
    model may have lost these numbers, so that the order of the files is tried as well.
    """
    stored = [read_site(own.reader, mlp) for own, mlp in ((model, site), (other_model, other))]
    numbers = [
        all_channels(own.channels.get(mlp.name), mlp.width) for own, mlp in ((model, site), (other_model, other))
    ]
    ours, theirs = (weights.restored(torch.tensor(order)) for weights, order in zip(stored, numbers, strict=True))
    found = _channel_differences(site, ours, theirs)
    if numbers[0] == numbers[1]:
        return found
    in_file_order = _channel_differences(site, *stored)
    return min(found, in_file_order, key=lambda each: max(difference.error for difference in each))


def _channel_differences(site: MlpSite, ours: ChannelWeights, theirs: ChannelWeights) -> list[Difference]:
    """The relative differences of two MLPs with their channels in the same order.

    What a channel does is bounded by the product of the norms of its weights, so each difference of its vectors counts
    times the norms of its other vectors, the larger of the two models'. Channels that do nothing then do not count. A
    difference of the output's bias is relative to the bias and the matrix before it together.
    """
    rows, outs = (_rows(ours), _rows(theirs)), (ours.out.double(), theirs.out.double())
    written = torch.stack([each.norm(dim=-1) for each in rows]).amax(0)  # (P, F)
    read = torch.stack([each.norm(dim=0) for each in outs]).amax(0)
    others = torch.stack([torch.cat([written[:part], written[part + 1 :]]).prod(0) for part in range(len(written))])
    by_rows, by_outs = (others * read).unsqueeze(-1), written.prod(0) if site.zero_at_zero else torch.ones_like(read)
    parts = {"input": [each * by_rows for each in rows], "output": [each * by_outs for each in outs]}
    found = [
        Difference(f"{site.name} {what}", float(_relative(one.flatten(), two.flatten())))
        for what, (one, two) in parts.items()
    ]
    if ours.out_bias is not None and theirs.out_bias is not None:
        scale = max(float(each.norm()) for each in parts["output"])
        found.append(Difference(f"{site.name} output bias", _bias_error(ours.out_bias, theirs.out_bias, scale)))
    return found


def _rows(weights: ChannelWeights) -> Tensor:
    """The rows of the matrices that write the channels, with their biases, (P, F, D or D + 1)."""
    rows = weights.into.double()
    return rows if weights.into_bias is None else torch.cat([rows, weights.into_bias.double().unsqueeze(-1)], -1)


def _compare_attention(
    reader: CheckpointReader, site: AttentionSite, other_reader: CheckpointReader, other: AttentionSite
) -> list[Difference]:
    """The relative differences of an attention block: Q-K and V-O of each query head, and the output bias.

    Where RoPE or a norm prevents merging Q and K, their unmerged directions are compared separately.
    """
    weights, other_weights = read_site(reader, site), read_site(other_reader, other)
    ours, theirs = absorb(weights, site), absorb(other_weights, other)
    found: list[Difference] = []
    if ours.qk is not None and theirs.qk is not None:
        qk = _query_heads(ours.qk, site, "left"), _query_heads(theirs.qk, site, "left")
        errors = relative_difference(_with_rows_of(*qk), _with_rows_of(*reversed(qk)))
        found += _by_head(site, "Q-K", errors)
    if site.unmerged:
        for side in "qk":  # RoPE or a norm stands between these directions of Q and K
            found += _by_head(site, side.upper(), _unmerged(weights, other_weights, side, site.unmerged))
    vo = _query_heads(ours.vo, site, "right"), _query_heads(theirs.vo, site, "right")
    errors = relative_difference(_with_rows_of(*vo), _with_rows_of(*reversed(vo)))
    found += _by_head(site, "V-O", errors)
    if ours.o_bias is not None and theirs.o_bias is not None:
        scale = max(float(product_norm(pair).norm()) for pair in vo)
        found.append(Difference(f"{site.name} output bias", _bias_error(ours.o_bias, theirs.o_bias, scale)))
    return found


def _bias_error(ours: Tensor, theirs: Tensor, scale: float) -> float:
    """The difference of the biases of a block's output, relative to the larger bias and the matrix before it together.

    scale: the norm of that matrix. The means of what was cut move into the bias, which may have been zero.
    """
    ours, theirs = ours.double(), theirs.double()
    whole = (scale**2 + max(float(ours.square().sum()), float(theirs.square().sum()))) ** 0.5
    change = float((ours - theirs).norm())
    return change / whole if change else 0.0


def _by_head(site: AttentionSite, what: str, errors: Tensor) -> list[Difference]:
    return [Difference(f"{site.name} head {head} {what}", error) for head, error in enumerate(errors.tolist())]


def _query_heads(pair: Pair, site: AttentionSite, stacked: Literal["left", "right"]) -> Pair:
    """The pair with one batch entry per query head: the stacked factor is split, the other one is repeated."""
    g, m = site.kv_heads, site.group

    def apart(factor: Tensor) -> Tensor:
        return factor.reshape(g * m, -1, factor.shape[-1])

    def repeated(factor: Tensor) -> Tensor:
        return factor.repeat_interleave(m, dim=0)

    if stacked == "left":
        return Pair(apart(pair.left), repeated(pair.right))
    return Pair(repeated(pair.left), apart(pair.right))


def _with_rows_of(pair: Pair, other: Pair) -> Pair:
    """The pair, with a zero row where it has no bias and the other one has, so that both can be compared."""

    def padded(factor: Tensor, like: Tensor) -> Tensor:
        return torch.nn.functional.pad(factor, (0, 0, 0, max(0, like.shape[-2] - factor.shape[-2])))

    return Pair(padded(pair.left, other.left), padded(pair.right, other.right))


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


def verify_folder(folder: Path) -> list[str]:
    """Check an output folder against the SHA-256 in its pessa.json; returns one line per differing file.

    A file differs when it is missing, changed, or not listed. Raises PessaError when the folder has no pessa.json, or
    one without hashes.
    """
    if is_there(folder) and not folder.is_dir():
        raise PessaError(f"{folder} is not a folder", "give the folder that holds its pessa.json")
    manifest = read_json(folder / MANIFEST_FILE)
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict) or not hashes or not all(isinstance(name, str) for name in hashes):
        raise PessaError(
            f"{folder / MANIFEST_FILE} lists no SHA-256 of its files",
            f"compare the folder with its original: pessa verify ORIGINAL {folder}",
        )
    found = visible_files(folder, enter_links=False).keys() - {MANIFEST_FILE, *({CARD_FILE} - hashes.keys())}
    faults = [f"{name}: missing" for name in hashes if name not in found]
    faults += [f"{name}: changed" for name in hashes if name in found and sha256_of(folder / name) != hashes[name]]
    return faults + [f"{name}: not in the manifest" for name in sorted(found - hashes.keys())]
