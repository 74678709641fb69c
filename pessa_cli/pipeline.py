"""The passes over a checkpoint: measure the spectra, then rewrite it block by block.

Each pass holds one attention block in memory. Ranks are known before the first byte is written, because a
safetensors header needs every shape; what is not attention is copied byte for byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from pessa_cli import __version__
from pessa_cli.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    CheckpointReader,
    TensorInfo,
    read_json,
    write_json,
)
from pessa_cli.errors import PessaError, UsageError, listed
from pessa_cli.factors import (
    Absorbed,
    Factors,
    Pair,
    absorb,
    decompose,
    norm_products,
    recompose,
    singular_values,
    sort_by_norm,
)
from pessa_cli.heads import HeadWeights, Layout, NotFiniteError, read_site, write_site
from pessa_cli.ragged import QUANT_METHOD, Ranks
from pessa_cli.ranks import UNIT_ROUNDOFF, RankPlan, Rule, Spectra, Spectrum, plan_ranks
from pessa_cli.sites import Site, find_sites, ragged_site, specs_of, with_ranks
from pessa_cli.writer import CheckpointWriter, new_folder

Method = Literal["svd", "vanilla"]
Progress = Callable[[list[Site], str], Iterable[Site]]


class Way(NamedTuple):
    """One way to order a head's directions: what each is worth, and the head rewritten in that order."""

    spectrum: Callable[[Pair], torch.Tensor]
    factorise: Callable[[Pair], Factors]


METHODS: dict[Method, Way] = {
    "svd": Way(singular_values, decompose),
    "vanilla": Way(norm_products, sort_by_norm),
}
SPECTRA_FILE = "spectra.safetensors"
MANIFEST_FILE = "pessa.json"
# Weights in other formats: a copy of them in the output would be the unpruned model again.
WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".onnx_data",
}


def quietly(sites: list[Site], _what: str) -> Iterable[Site]:
    """The progress of a library call: none."""
    return sites


@dataclass(frozen=True)
class Rewrite:
    """What one pass writes: which blocks, with how many directions, and how; the rest of the model stays as it is.

    `spectra` are the blocks' spectra before the cut; `rule` says in words where the ranks come from.
    """

    command: str
    sites: list[Site]
    ranks: RankPlan
    spectra: Mapping[str, Spectra]
    rule: str
    method: Method = "svd"
    layout: Layout = "compact"

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of pessa.json but for the source's name."""
        ranks = {
            site.name: {side: " ".join(map(str, plan[site.name])) for side, plan in self.sides.items()}
            for site in self.sites
        }
        return {
            "pessa": __version__,
            "command": self.command,
            "method": self.method,
            "rule": self.rule,
            "layout": self.layout,
            "ranks": ranks,
        }

    @property
    def sides(self) -> dict[str, Mapping[str, Ranks]]:
        return {"qk": self.ranks.qk, "vo": self.ranks.vo}

    def stored(self, site: Site) -> Site:
        """The site as the output will store it; one that was not chosen keeps its layout and bytes."""
        if site.name not in self.ranks.vo:
            return site
        if self.layout == "dense":
            return with_ranks(site, site.full, site.full)
        return with_ranks(site, self.ranks.qk[site.name], self.ranks.vo[site.name])


@dataclass(frozen=True)
class Model:
    """A checkpoint with its attention blocks, and the spectra that an earlier `decompose` or `prune` left there."""

    reader: CheckpointReader
    sites: list[Site]
    spectra: Mapping[str, Spectra]  # by site name; only for blocks that are stored as balanced factors

    @property
    def parameters(self) -> int:
        return sum(info.count for info in self.reader.header.values())

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.reader.header.values())


def open_model(folder: Path, architecture: str | None = None) -> Model:
    """Headers, sites and known spectra of a Hugging Face folder; no weights are read."""
    reader = CheckpointReader(folder)
    try:
        sites = find_sites(specs_of(reader.config, reader.header, architecture), reader.config, reader.header)
    except PessaError as error:  # which knows names and shapes, but not whose they are
        raise type(error)(f"{folder}: {error.message}", error.hint) from None
    return Model(reader, sites, _load_spectra(folder, sites))


def measure(
    model: Model, sites: list[Site], method: Method = "svd", progress: Progress = quietly
) -> dict[str, Spectra]:
    """The spectra of the given sites: those on file, or computed from the weights block by block.

    Raises PessaError with every tensor that is not finite, after having looked at all of them, and when weights
    have changed since their spectra were written.
    """
    spectra: dict[str, Spectra] = {}
    faults: list[str] = []
    for site in progress(sites, "measuring spectra"):
        try:
            absorbed = absorb(read_site(model.reader, site), site)
        except NotFiniteError as error:
            faults += error.faults
            continue
        if site.name in model.spectra and method == "svd":
            spectra[site.name] = model.spectra[site.name]
            _check_spectra(model, site, absorbed)
            continue
        values = METHODS[method].spectrum
        qk = None if absorbed.qk is None else values(absorbed.qk).numpy()
        spectra[site.name] = Spectra(qk, values(absorbed.vo).numpy())
    if faults:
        raise NotFiniteError(model.reader, faults)
    return spectra


def decompose_model(
    model: Model, out: Path, sites: list[Site] | None = None, force: bool = False, progress: Progress = quietly
) -> Rewrite:
    """Write the model with every block as balanced factors at full rank, and its spectra: same names and shapes."""
    sites = model.sites if sites is None else sites
    full = {site.name: site.full for site in sites}
    with new_folder(out, model.reader.folder, force) as folder:
        spectra = measure(model, sites, progress=progress)
        rewrite = Rewrite("decompose", sites, RankPlan(full, full), spectra, "full rank", layout="dense")
        _write(model, folder, rewrite, progress)
    return rewrite


def prune_model(
    model: Model,
    out: Path,
    rule: Rule,
    sites: list[Site] | None = None,
    method: Method = "svd",
    layout: Layout = "compact",
    force: bool = False,
    progress: Progress = quietly,
) -> Rewrite:
    """Write the model with only the directions that the rule keeps, and return what was written.

    Blocks that are stored as balanced factors already (from `decompose` or an earlier `prune`) are sliced; the
    others are decomposed first, with the same bytes as a result.
    """
    sites = model.sites if sites is None else sites
    if method == "vanilla" and any(site.name in model.spectra for site in sites):
        raise UsageError(
            f"{model.reader.folder} is decomposed: its original dimensions are gone",
            "give --method vanilla the original model",
        )
    with new_folder(out, model.reader.folder, force) as folder:
        spectra = measure(model, sites, method, progress)
        rewrite = Rewrite("prune", sites, plan_ranks(sites, spectra, rule), spectra, str(rule), method, layout)
        _write(model, folder, rewrite, progress)
    return rewrite


def export_model(model: Model, out: Path, layout: Layout, force: bool = False, progress: Progress = quietly) -> Rewrite:
    """Rewrite a model that pessa made in the other layout: the same numbers, padded with zeros or without them.

    Raises PessaError for a model that pessa did not write, since its ranks are not known.
    """
    path = model.reader.folder / MANIFEST_FILE
    if not path.exists():
        raise PessaError(
            f"{model.reader.folder} has no {MANIFEST_FILE}: it is not a model that pessa wrote",
            "prune it first; `pessa prune` without a rule removes only what is zero",
        )
    manifest = read_json(path)
    try:
        ranks = {name: (_ranks(sides["qk"]), _ranks(sides["vo"])) for name, sides in manifest["ranks"].items()}
        method, rule = manifest["method"], manifest["rule"]
    except (KeyError, TypeError, ValueError, AttributeError):
        ranks, method, rule = {}, "", ""
    if not ranks or method not in METHODS or not isinstance(rule, str):
        raise PessaError(f"{path} is damaged", "prune the original again")
    sites = [site for site in model.sites if site.name in ranks]
    fits = {site.name: all(_fit(site, side) for side in ranks[site.name]) for site in sites}
    wrong = [name for name in ranks if not fits.get(name)]
    if wrong:
        raise PessaError(f"{path} and the weights disagree about {wrong[0]}", "prune the original again")
    plan = RankPlan({name: qk for name, (qk, _) in ranks.items()}, {name: vo for name, (_, vo) in ranks.items()})
    rewrite = Rewrite("export", sites, plan, model.spectra, rule, method, layout)
    with new_folder(out, model.reader.folder, force) as folder:
        _write(model, folder, rewrite, progress, as_stored=True)
    return rewrite


def _fit(site: Site, ranks: Ranks) -> bool:
    return len(ranks) == site.kv_heads and all(0 <= rank <= site.head_dim for rank in ranks)


def _ranks(text: str) -> Ranks:
    return tuple(int(rank) for rank in text.split())


def _factorised(weights: HeadWeights, site: Site, method: Method) -> HeadWeights:
    """The block in factored form, at full rank."""
    absorbed = absorb(weights, site)
    factorise = METHODS[method].factorise
    qk = None if absorbed.qk is None else factorise(absorbed.qk)
    return recompose(weights, absorbed, qk, factorise(absorbed.vo), site)


def _write(model: Model, folder: Path, rewrite: Rewrite, progress: Progress, as_stored: bool = False) -> None:
    """The rewriting pass. `as_stored`: the blocks are in factored form already, whatever is known of their spectra."""
    reader = model.reader
    stored = [rewrite.stored(site) for site in model.sites]
    shapes = {name: shape for site in stored for name, shape in site.tensors.items()}
    rewritten = {name for site in rewrite.sites for name in site.tensors}
    files: dict[str, dict[str, TensorInfo]] = {file: {} for file in reader.files}
    for name, info in reader.header.items():
        files[reader.file_of(name)][name] = replace(info, shape=shapes.get(name, info.shape))
    with CheckpointWriter(folder, files, reader.metadata) as writer:
        for name in reader.header:
            if name not in rewritten:
                writer.copy(name, reader)
        for site in progress(rewrite.sites, "writing blocks"):
            weights = read_site(reader, site)
            ranks = rewrite.ranks.qk[site.name], rewrite.ranks.vo[site.name]
            if as_stored:
                _check_nothing_lost(reader, weights, site, *ranks)
            elif site.name not in model.spectra:
                weights = _factorised(weights, site, rewrite.method)
            for name, tensor in write_site(weights, site, *ranks, reader.header, rewrite.layout).items():
                writer.put(name, tensor)
    _copy_side_files(reader.folder, folder)
    _write_config(reader.config, stored, folder)
    if rewrite.method == "svd":
        save_spectra(folder, dict(model.spectra) | _cut(rewrite))
    write_json(folder / MANIFEST_FILE, {"source": reader.folder.name} | rewrite.manifest)


def _check_spectra(model: Model, site: Site, absorbed: Absorbed) -> None:
    """In balanced factors both columns of a direction have the norm sqrt(s): spectra of other weights show."""
    known = model.spectra[site.name]
    for pair, spectrum in ((absorbed.qk, known.qk), (absorbed.vo, known.vo)):
        if pair is None or spectrum is None:
            continue
        roots = torch.from_numpy(spectrum).sqrt()  # (G, d)
        # Rounding a column moves its norm by far less than the roundoff of its largest entries.
        allowed = 4 * UNIT_ROUNDOFF[site.dtype] * roots.amax(dim=-1, keepdim=True)
        if any(((factor.norm(dim=-2) - roots).abs() > allowed).any() for factor in (pair.left, pair.right)):
            raise PessaError(
                f"{model.reader.folder / SPECTRA_FILE} is not of these weights: {site.name} has changed since",
                "delete it, and the model will be decomposed anew",
            )


def _check_nothing_lost(
    reader: CheckpointReader, weights: HeadWeights, site: Site, qk_ranks: Ranks, vo_ranks: Ranks
) -> None:
    """What another layout leaves out must be zero in this one."""
    whole = write_site(weights, site, site.full, site.full, reader.header, "dense")
    kept = write_site(weights, site, qk_ranks, vo_ranks, reader.header, "dense")
    lost = [name for name, tensor in whole.items() if not torch.equal(tensor, kept[name])]
    if lost:
        raise PessaError(
            f"{reader.folder / MANIFEST_FILE} gives {site.name} ranks that would cut weights off\n{listed(lost)}",
            "the weights were changed after pruning; prune this folder instead",
        )


def _write_config(config: dict[str, Any], stored: list[Site], folder: Path) -> None:
    modules = {name: str(ragged) for site in stored for name, ragged in ragged_site(site).items()}
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if modules:
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "modules": modules}
    write_json(folder / CONFIG_FILE, config)


def _copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation config and whatever else the source has, but no weights and nothing we write anew."""
    ours = {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        skipped = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json") or str(relative) in ours
        if path.is_file() and not skipped and not any(part.startswith(".") for part in relative.parts):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)


def _cut(rewrite: Rewrite) -> dict[str, Spectra]:
    """The spectra after pruning: zero from each head's rank on."""

    def cut(spectrum: Spectrum, ranks: Ranks) -> Spectrum:
        return np.where(np.arange(spectrum.shape[1]) < np.array(ranks)[:, None], spectrum, 0.0)

    plan = rewrite.ranks
    return {
        name: Spectra(None if known.qk is None else cut(known.qk, plan.qk[name]), cut(known.vo, plan.vo[name]))
        for name, known in rewrite.spectra.items()
        if name in plan.vo
    }


def save_spectra(folder: Path, spectra: Mapping[str, Spectra]) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}.vo": torch.from_numpy(s.vo) for name, s in spectra.items()}
    tensors |= {f"{name}.qk": torch.from_numpy(s.qk) for name, s in spectra.items() if s.qk is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SPECTRA_FILE)


def _load_spectra(folder: Path, sites: list[Site]) -> dict[str, Spectra]:
    """The spectra beside the weights, if there are any. Raises PessaError when they are not those of the sites."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / SPECTRA_FILE
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PessaError(f"{path} is not a complete safetensors file: {error}", "decompose the model again") from None
    spectra: dict[str, Spectra] = {}
    for site in sites:
        vo, qk = tensors.get(f"{site.name}.vo"), tensors.get(f"{site.name}.qk")
        if vo is None:
            continue
        expected = (site.kv_heads, site.head_dim)
        if (qk is None) == site.merges_qk or any(t is not None and tuple(t.shape) != expected for t in (qk, vo)):
            raise PessaError(f"{path} does not fit the weights at {site.name}", "decompose the model again")
        spectra[site.name] = Spectra(None if qk is None else qk.numpy(), vo.numpy())
    return spectra
