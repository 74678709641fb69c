"""What calibration data makes of each attention block: sums over its frames, in a file that others can be added to.

All of it is second moments of what comes out of projections, d x d for each head, and not of what goes into them,
D x D: for a projection W and inputs of second moment C, `W^T C W` is the second moment of its outputs, and the algebra
needs nothing else of C. Only the mixtures are taken jointly for all heads, (H d x H d), for the refit of W_O.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pessa_cli.errors import PessaError, listed
from pessa_cli.factors import Weighting, scales, traces
from pessa_cli.heads import HeadWeights, live
from pessa_cli.ragged import Ranks
from pessa_cli.ranks import LEVELS, Trials
from pessa_cli.rope import PairWeighting
from pessa_cli.sites import Site

FORMAT = "pessa-statistics-2"
SHRINKAGE = 0.3  # towards the plain rule, however much data there is
NOISE = 1e-10  # of a variance, against the second moment that it is the difference of
RIDGE = 1e-2  # of the refits of W_O and of frequency pairs, likewise
UNIFORM = 0.3  # of the keys' weighting: all keys that a query sees alike, beside what the output makes of them


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over the calibration data for one block, float64.

    frames: (), how many queries there were. queries: (G, d, d), of q q^T over queries and the query heads of a group,
    their bias included. keys: (G, d, d), of the covariance of the keys that each query sees, which leaves out what is
    common to all of them, as softmax does. influence: (G, d, d), of what an error of the keys does to the output, to
    first order: C W_O^T W_O C^T, where C is the covariance of keys and values under a query's own attention; under RoPE
    there is instead `pairs`, the Gram matrix of what frequency pairs add to the output, see `rope.output_gram`. Of the
    two the one that does not apply is (0, d, d).
    mixtures: (H d, H d), of a a^T where a is what goes into W_O, all heads one after the other; mixture: (H d,), of a.
    From trials on some of the data: output, (), squares of what the block puts out; tried: (2, LEVELS), squares of the
    difference with that share of Q-K and of V-O cut; harm: (3,), what a difference does to the model's output (nats,
    or the relative squared error of hidden states), over how many tokens, and the squares of that difference.
    """

    frames: Tensor
    queries: Tensor
    keys: Tensor
    influence: Tensor
    mixtures: Tensor
    mixture: Tensor
    pairs: Tensor
    output: Tensor
    tried: Tensor
    harm: Tensor

    @property
    def trials(self) -> Trials | None:
        """What the trials say, None without any."""
        output, (done, tokens, moved) = float(self.output), self.harm.tolist()
        if output == 0:
            return None
        qk, vo = ((errors / output).tolist() for errors in self.tried)
        # A block that nothing comes of any more, and one that cannot be moved, do no harm.
        return Trials(tuple(qk), tuple(vo), done / tokens * output / moved if tokens and moved else 0.0)

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        return BlockStatistics(*(getattr(self, name) + getattr(other, name) for name in NAMES))

    def to(self, device: str) -> BlockStatistics:
        return BlockStatistics(*(getattr(self, name).to(device) for name in NAMES))


NAMES = tuple(field.name for field in fields(BlockStatistics))


def shapes_of(site: Site) -> tuple[tuple[int, ...], ...]:
    """Of the statistics of a block, in the order of NAMES."""
    g, d, n = site.kv_heads, site.head_dim, site.heads * site.head_dim
    head, none, rope = (g, d, d), (0, d, d), site.by_pairs
    influence, pairs = (none, head) if rope else (head, none)
    return (), head, head, influence, (n, n), (n,), pairs, (), (2, len(LEVELS)), (3,)


@dataclass(frozen=True)
class Weighed:
    """What the statistics of a block say to its decomposition.

    qk and vo: see Weighting; pairs: under RoPE what there is instead of qk. center: (G, d), what is taken for the mean
    of the mixtures before W_O and after the value bias, None where no output bias can give it back. moment:
    (H d, H d), of the mixtures less their center.
    """

    qk: Weighting
    vo: Weighting
    center: Tensor | None
    moment: Tensor
    ridge: float
    pairs: PairWeighting | None


def weigh(found: BlockStatistics, site: Site, v_bias: Tensor | None) -> Weighed:
    """The statistics of a block in the form that `factors` takes them; `v_bias` is (G, d) as in the file."""
    g, m, d = site.kv_heads, site.group, site.head_dim
    frames = found.frames.clamp(min=1)
    mean, moment = found.mixture / frames, found.mixtures / frames
    center = None
    if "v" in site.biases and site.moves_v_bias:
        # A group's query heads share their values, and so the one center that these can be given.
        center = mean.reshape(g, m, d).mean(1)
        shift = center.unsqueeze(1).expand(g, m, d).reshape(-1)
        outer = torch.outer(shift, mean)
        moment = moment - outer - outer.mT + torch.outer(shift, shift)
    heads = torch.arange(g * m)
    if float(moment.trace()) <= NOISE * float(found.mixtures.trace() / frames):
        moment = torch.zeros_like(moment)  # always the same: rounding is no second moment
    own = moment.reshape(g * m, d, g * m, d)[heads, :, heads].reshape(g, m, d, d).mean(1)
    few = d / float(frames)  # as many frames as directions say as much of them as the weights do
    return Weighed(
        qk=Weighting(found.queries / frames, _key_side(found) / (frames * d), SHRINKAGE + few),
        vo=Weighting(own, None, SHRINKAGE + few),
        center=center if center is None or v_bias is None else center - v_bias.double(),
        moment=moment,
        ridge=RIDGE + m * g * few,
        pairs=PairWeighting(found.pairs / (frames * d), RIDGE + few) if site.by_pairs else None,
    )


def _key_side(found: BlockStatistics) -> Tensor:
    """What the keys are weighed by: mostly by what comes of their errors in the output, and so in part are the heads.

    The trace is the geometric mean of those of `keys` and of `influence`, brought to the same sum over the heads.
    """
    if not len(found.influence):
        return found.keys
    seen, counts = traces(found.keys), traces(found.influence)
    if not bool((counts > 0).any()):
        return found.keys
    trace = (seen * counts * (seen.sum() / counts.sum())).sqrt()
    keys, influence = (
        moment / own.where(own > 0, 1.0) for moment, own in ((found.keys, seen), (found.influence, counts))
    )
    return trace * (UNIFORM * keys + (1 - UNIFORM) * influence)


class Statistics:
    """The statistics in one or more files of one model, added up; a block is read when it is asked for.

    Raises PessaError for files that are no statistics, of other models, or of the same data twice.
    """

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self._about = [_about(path) for path in paths]
        self.data = sorted(digest for about in self._about for digest in about["data"])
        if len(set(self.data)) < len(self.data):
            named = listed([str(path) for path in paths])
            raise PessaError(f"these have data in common\n{named}", "give each part of the data once")

    @property
    def sha256(self) -> str:
        """Of the data: the same for the same files in whatever order."""
        return hashlib.sha256("".join(self.data).encode()).hexdigest()

    def of(self, site: Site, weights: HeadWeights | None = None) -> BlockStatistics:
        """The sums of a block. Raises PessaError when there are none, or when they are of other weights."""
        from safetensors import safe_open

        total: BlockStatistics | None = None
        for path, about in zip(self.paths, self._about, strict=True):
            with safe_open(path, framework="pt") as file:
                there = set(file.keys())
                if not {f"{site.name}.{name}" for name in NAMES} <= there:
                    raise PessaError(f"{path} has no statistics of {site.name}", "collect them anew with --calibrate")
                found = BlockStatistics(*(file.get_tensor(f"{site.name}.{name}") for name in NAMES))
            if not _plausible(found, site):
                raise PessaError(f"{path} does not fit {site.name}", "collect it anew with --calibrate")
            if weights is not None and about["weights"].get(site.name) != fingerprint(weights):
                raise PessaError(
                    f"{path} is of other weights than {site.name} has", "collect it anew on this model: --calibrate"
                )
            total = found if total is None else total + found
        assert total is not None
        return total

    def warnings(self, sites: Sequence[Site]) -> list[str]:
        """What is too little to go by: blocks without trials, or with fewer independent frames than dimensions."""
        few = []
        for site in sites:
            found = self.of(site)
            wide = int((found.mixtures.diagonal() > 0).sum())
            count = min(int(found.frames), independent(found.mixtures))
            if count < wide:
                few.append(f"{site.name}: {count:,} independent frames for {wide:,} dimensions")
            elif found.trials is None:
                few.append(f"{site.name}: no trials, since the model did not fit into memory")
        return few


def independent(moment: Tensor) -> int:
    """How many directions a sum of outer products has, at most as many as it had independent terms."""
    _, inverse = scales(moment)
    values = torch.linalg.eigvalsh(inverse.unsqueeze(-1) * moment * inverse)
    return int((values > 1e-10 * values[-1]).sum())


def save_statistics(
    path: Path, blocks: Mapping[str, BlockStatistics], weights: Mapping[str, str], data: Sequence[str]
) -> None:
    """Write the sums of all blocks, by site name, with the fingerprints of their weights and the hashes of the data."""
    from safetensors.torch import save

    tensors = {f"{s}.{name}": getattr(found, name).contiguous() for s, found in blocks.items() for name in NAMES}
    about = {"format": FORMAT, "weights": json.dumps(dict(weights)), "data": json.dumps(sorted(data))}
    path.write_bytes(save(tensors, about))


def fingerprint(weights: HeadWeights) -> str:
    """A hash of a block's weights, of their bytes in the canonical form."""
    digest = hashlib.sha256()
    for name, tensor in vars(weights).items():
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refit_moment(weighed: Weighed, transform: Tensor, site: Site) -> Tensor:
    """The second moment of what the new directions of V-O carry, (H d, H d), for their `transform`, (G, d, d)."""
    h, d = site.heads, site.head_dim
    each = transform.repeat_interleave(site.group, 0)  # (H, d, d)
    moment = weighed.moment.reshape(h, d, h * d)
    moment = (each.mT @ moment).reshape(h * d, h, d).transpose(0, 1)  # (H, H d, d)
    return (moment @ each).transpose(0, 1).reshape(h * d, h * d)


def kept_directions(site: Site, ranks: Ranks) -> Tensor:
    """Where the kept directions of V-O stand among the inputs of W_O."""
    return live(ranks, site.head_dim, site.group)


def _about(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError("it has another format")
        read = {"weights": json.loads(about["weights"]), "data": json.loads(about["data"])}
        if not isinstance(read["weights"], dict) or not isinstance(read["data"], list):
            raise ValueError("its metadata is damaged")
        return read
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise PessaError(f"{path} is not a file of statistics: {reason}", "write one with --calibrate DATA") from None


def _plausible(found: BlockStatistics, site: Site) -> bool:
    """Float64, of the site's shapes, and finite."""
    tensors = [getattr(found, name) for name in NAMES]
    return all(
        tensor.dtype == torch.float64 and tuple(tensor.shape) == shape and bool(tensor.isfinite().all())
        for tensor, shape in zip(tensors, shapes_of(site), strict=True)
    )
