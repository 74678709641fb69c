"""The file spectra.safetensors, which holds the spectra of a decomposed or pruned model beside its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch

from pessa_cli.algebra.channels import ChannelWeights, Weights, channel_norms
from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.seam import Seam
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.checkpoint.dtypes import UNDERFLOW, UNIT_ROUNDOFF
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.spectra import LEVELS, Spectra, Trials

SPECTRA_FILE = "spectra.safetensors"
CALIBRATED = "calibrated"  # the key of the metadata that lists calibrated blocks
DELETE = "delete it, and the model is decomposed again"


def save_spectra(folder: Path, spectra: Mapping[str, Spectra]) -> None:
    """Write spectra.safetensors for the given spectra by site name.

    Tensors are float64: "<site>.<seam>", (G, d), for each seam that has a spectrum; "<site>.trials", with LEVELS errors
    for each seam in their order and the harm of the trial cuts, if there are any; and "<site>.norms" of calibrated
    MLPs. The metadata list calibrated blocks.
    """
    from safetensors.torch import save

    tensors = {
        f"{name}.{seam}": torch.from_numpy(each) for name, s in spectra.items() for seam, each in s.seams.items()
    }
    tensors |= {
        f"{name}.trials": torch.tensor([*chain(*s.trials.errors.values()), s.trials.harm], dtype=torch.float64)
        for name, s in spectra.items()
        if s.trials is not None
    }
    tensors |= {f"{name}.norms": torch.from_numpy(s.norms) for name, s in spectra.items() if s.norms is not None}
    # Written as bytes, because save_file of safetensors creates files that only their owner can read.
    calibrated = " ".join(sorted(name for name, s in spectra.items() if s.calibrated))
    about = {CALIBRATED: calibrated} if calibrated else None
    ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    (folder / SPECTRA_FILE).write_bytes(save(ordered, about))


def load_spectra(folder: Path, sites: Sequence[Site]) -> dict[str, Spectra]:
    """Load the spectra of the given sites from the folder of the weights; blocks without spectra are left out.

    Raises PessaError when the file cannot be read, or when its shapes or values do not fit the sites.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / SPECTRA_FILE
    if not path.is_file():
        return {}
    wanted = [f"{site.name}.{part}" for site in sites for part in (*site.ranks, "trials", "norms")]
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            calibrated = (file.metadata() or {}).get(CALIBRATED, "").split()
            tensors = {name: file.get_tensor(name) for name in wanted if name in there}
    except (SafetensorError, OSError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise PessaError(f"{path} is not a spectra file: {reason}", DELETE) from error
    spectra: dict[str, Spectra] = {}
    for site in sites:
        found = {seam.name: tensors.get(f"{site.name}.{seam.name}") for seam in site.seams}
        if not any(each is not None for each in found.values()):
            continue
        for seam in site.seams:
            each, expected = found[seam.name], seam.symmetry in ("linear", "permutation")
            if (each is not None) != expected or (each is not None and not _plausible(each, seam)):
                raise PessaError(
                    f"{path}: the spectra of {site.name} do not fit its {seam.title} of {len(seam.ranks)} x "
                    f"{seam.width} directions",
                    DELETE,
                )
        trials = tensors.get(f"{site.name}.trials")
        if trials is not None and not _plausible_trials(trials, site):
            raise PessaError(f"{path}: the results of the trial cuts of {site.name} are damaged", DELETE)
        norms = tensors.get(f"{site.name}.norms")
        needed = isinstance(site, MlpSite) and site.name in calibrated
        if (norms is not None) != needed or (norms is not None and tuple(norms.shape) != (site.seams[0].width,)):
            raise PessaError(f"{path}: the norms of the channels of {site.name} are damaged", DELETE)
        spectra[site.name] = Spectra(
            {name: each.numpy() for name, each in found.items() if each is not None},
            site.name in calibrated,
            None if trials is None else _trials(trials.tolist(), site),
            norms=None if norms is None else norms.numpy(),
        )
    return spectra


def _trials(numbers: list[float], site: Site) -> Trials:
    levels = len(LEVELS)
    errors = {seam: tuple(numbers[at * levels : (at + 1) * levels]) for at, seam in enumerate(site.ranks)}
    return Trials(errors, numbers[-1])


def _plausible_trials(numbers: torch.Tensor, site: Site) -> bool:
    """Return whether the results of trial cuts are float64, of the right number, finite and not negative."""
    return (
        numbers.dtype == torch.float64
        and tuple(numbers.shape) == (len(site.ranks) * len(LEVELS) + 1,)
        and bool(numbers.isfinite().all() and (numbers >= 0).all())
    )


def _plausible(spectrum: torch.Tensor, seam: Seam) -> bool:
    """Return whether a spectrum is float64, (G, width), finite, not negative and descending."""
    return (
        spectrum.dtype == torch.float64
        and tuple(spectrum.shape) == (len(seam.ranks), seam.width - seam.always_kept)
        and bool(spectrum.isfinite().all() and (spectrum >= 0).all() and (spectrum.diff(dim=-1) <= 0).all())
    )


def check_spectra(folder: Path, known: Spectra, site: Site, weights: Weights) -> None:
    """Raise PessaError when the stored spectra do not belong to the weights of the block.

    In balanced factors, both vectors of a direction have the norm sqrt(s) for its singular value s, so that changed
    weights are found without an SVD. The values of a calibrated spectrum are not norms, but both vectors of a direction
    still have the same norm.
    """
    if isinstance(weights, ChannelWeights):
        assert isinstance(site, MlpSite)
        _check_channels(folder, known, site, weights)
        return
    assert isinstance(site, AttentionSite)
    # Rounding changes the norm of a vector by far less than the roundoff of its largest entries, except where entries
    # underflow. Where the dtype is finer than the errors of the algebra, these errors decide.
    roundoff = max(UNIT_ROUNDOFF[site.dtype], 2.0**-40)
    longest = site.group * max(site.query_width, site.key_width, site.output_width) + site.group
    least = UNDERFLOW[site.dtype] * longest**0.5
    found = {
        side: norms[:, site.unmerged :] if side in "qk" else norms
        for side, norms in _norms(weights, site, "qk" in known.seams)
    }
    for side, norms in found.items():
        other = found[{"q": "k", "k": "q", "v": "o", "o": "v"}[side]]
        spectrum = torch.from_numpy(known.seams["qk" if side in "qk" else "vo"])
        roots = other if known.calibrated else spectrum.sqrt()  # (G, d)
        allowed = 4 * roundoff * roots.amax(dim=-1, keepdim=True) + least
        if ((norms - roots).abs() > allowed).any():
            raise PessaError(
                f"{folder / SPECTRA_FILE} does not belong to these weights: {site.name} has changed since it was "
                "decomposed",
                DELETE,
            )


def _check_channels(folder: Path, known: Spectra, site: MlpSite, weights: ChannelWeights) -> None:
    """Raise PessaError when the norms of the channels are not those that were stored with their order.

    Ordering does not round, so they agree to the errors of the sums.
    """
    stored = torch.from_numpy(known.seams["mlp"][0] if known.norms is None else known.norms)
    found = channel_norms(weights).cpu()
    if not torch.allclose(found, stored, rtol=1e-9, atol=1e-12 * float(stored.max())):
        raise PessaError(
            f"{folder / SPECTRA_FILE} does not belong to these weights: {site.name} has changed since it was ordered",
            DELETE,
        )


def _norms(weights: HeadWeights, site: AttentionSite, merged_qk: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield, for each projection, the norms (G, d) of the directions over inputs, bias and query heads of a group."""
    rows = {"v": None if site.moves_v_bias else weights.v_bias}  # a bias that moved into the output bias is zero
    if merged_qk:
        rows |= {"q": weights.q_bias, "k": weights.k_bias if site.spec.key_bias_stays else None}
    squares: dict[str, list[torch.Tensor]] = {}
    for part in weights.parts():
        for side in rows:
            weight: torch.Tensor = getattr(part, side)
            each = torch.linalg.vector_norm(weight.double(), dim=-1).square()  # (G, [M,] d)
            squares.setdefault(side, []).append(each.sum(dim=1) if each.dim() == 3 else each)
        squares.setdefault("o", []).append(part.o.double().square().sum(dim=0).sum(dim=1))
    for side, parts in squares.items():
        total, bias = torch.cat(parts), rows.get(side)
        if bias is not None:
            total = total + bias.double().square().reshape(len(total), -1, total.shape[1]).sum(dim=1)
        yield side, total.sqrt().cpu()
