"""Calibration: one pass of real data through the model, collecting what each attention block does with it.

Speech models hear audio files, folders of them, or the clips of JSON lines; text models read text files or JSON lines.
Every input runs alone, so that nothing is padding but what the model itself pads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from pessa_cli.audio import SAMPLE_RATE, load_audio
from pessa_cli.budget import ranks_for
from pessa_cli.errors import PessaError, UsageError
from pessa_cli.heads import read_site
from pessa_cli.model import Model
from pessa_cli.pipeline import Cuts, Progress, Tick, measure, quietly
from pessa_cli.ranks import Rule
from pessa_cli.rope import output_gram, rotated
from pessa_cli.sidebyside import Inputs, from_folder, load, modules_of, output_of, quiet_transformers, read_text
from pessa_cli.sites import Site
from pessa_cli.spool import Spool
from pessa_cli.statistics import NAMES, BlockStatistics, Statistics, fingerprint, save_statistics, shapes_of
from pessa_cli.trials import PASSES, put, try_out
from pessa_cli.writer import sha256_of

AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".opus")
TEXT_TOKENS = 512  # of a window of text, if the model reads so many
TRIED = 8  # inputs that trials are made on, at most
FOLDS = 4  # one of so many parts of the inputs is for trials; the decomposition that is tried is that of the others
QUERIES = 64  # of an input that are looked at one by one: more cost much and say little


@dataclass(frozen=True)
class Item:
    """One file, or one line of JSON lines: a clip with what is said in it, if that is known, or a text."""

    audio: Path | None = None
    text: str | None = None

    @property
    def nbytes(self) -> int:
        return len(self.text or "") if self.audio is None else self.audio.stat().st_size


@contextmanager
def statistics_for(
    model: Model,
    sites: Sequence[Site],
    data: Sequence[Path],
    files: Sequence[Path],
    rule: Rule | None = None,
    progress: Progress = quietly,
    device: str = "cpu",
) -> Iterator[Statistics | None]:
    """What the options --calibrate and --statistics come to: statistics read or collected, or None without either.

    With both, what is collected goes to the one file. With `rule` they are collected in sequence.
    """
    if rule is not None and not data:
        raise UsageError("--sequential depends on the rule", "give it the data itself: --calibrate")
    if not data:
        yield Statistics(*files) if files else None
        return
    if len(files) > 1:
        raise UsageError("--calibrate writes one --statistics", "collect first, and add files up afterwards")
    if files and files[0].exists():
        raise UsageError(f"{files[0]} is there already", "leave out --calibrate to use it, or give another file")
    with tempfile.TemporaryDirectory() as folder:
        path = files[0] if files else Path(folder) / "statistics.safetensors"
        collect(model, sites, data, path, rule, progress, device)
        yield Statistics(path)


def collect(
    model: Model,
    sites: Sequence[Site],
    data: Sequence[Path],
    out: Path,
    rule: Rule | None = None,
    progress: Progress = quietly,
    device: str = "cpu",
) -> None:
    """Run the data through the model and write the statistics of its blocks to `out`.

    Takes a float64 matrix of a block's width for each block, and the attention of one input at a time. Weights that do
    not fit into memory twice are read from disk block by block, at every input, and there are no trials. With `rule`
    each block meets what the blocks before it produce when they are pruned by it: one more pass for each block.
    """
    items, hashes = read_data(data)
    weights = {site.name: fingerprint(read_site(model.reader, site)) for site in sites}
    free = free_memory()
    fits = free is None or 2 * 4 * model.parameters < free  # in float32, and the pruned one of the trials
    if rule is not None and not fits:
        raise PessaError(
            f"--sequential: {4 * model.parameters:,} bytes of weights do not fit twice into {free:,} of free memory",
            "leave it out, or calibrate on a larger machine and use its --statistics here",
        )
    with quiet_transformers(), tempfile.TemporaryDirectory() as offloaded:
        if free is None or fits:
            loaded = load_for_calibration(model).to(device)
        else:
            on_disk = {"device_map": "auto", "max_memory": {"cpu": free // 2}, "offload_folder": offloaded}
            loaded = load_for_calibration(model, **on_disk)
        with torch.inference_mode():
            said = any(not site.spec.kind.startswith("encoder") for site in sites)
            inputs = (given for item in items for given in _windows(model.reader.folder, loaded, item, said))
            total = sum(item.nbytes for item in items)
            samples: list[Inputs] = []
            # In sequence, what the whole model hears is what its decoder goes on with.
            kept = _sampled(inputs, samples) if rule is None else list(_sampled(inputs, samples))
            held_out, others = _listen(model, loaded, sites, kept, progress("calibrating", total, 1), FOLDS)
        found = {site.name: held_out[site.name] + others[site.name] for site in sites}
        if fits:
            few = not any(float(one.frames) for one in others.values())  # of a single input nothing can be held out
            save_statistics(out, found if few else others, weights, hashes)
            with progress("trying out", 0, PASSES) as tick:
                loaded.set_attn_implementation("sdpa")
                found = try_out(model, loaded, sites, on_device(samples, device), found, Statistics(out), tick)
        save_statistics(out, found, weights, hashes)
        if rule is not None:
            _in_sequence(model, loaded, sites, kept, out, rule, found, (weights, hashes), progress)


def _in_sequence(
    model: Model,
    loaded: Any,
    sites: Sequence[Site],
    inputs: Iterable[tuple[Inputs, int]],
    out: Path,
    rule: Rule,
    found: dict[str, BlockStatistics],
    about: tuple[Mapping[str, str], Sequence[str]],
    progress: Progress,
) -> None:
    """Collect the statistics of each block anew, behind those before it as the rule prunes them."""
    spectra = measure(model, list(sites), statistics=Statistics(out))
    plan = ranks_for(list(sites), spectra, rule, model.size)
    loaded.set_attn_implementation("eager")
    for site in sorted(sites, key=_place):
        with torch.inference_mode():
            ticks = progress(f"calibrating {site.name}", sum(nbytes for _, nbytes in inputs), 1)
            anew = _listen(model, loaded, [site], inputs, ticks)[0][site.name]
        before = found[site.name]
        found[site.name] = replace(anew, output=before.output, tried=before.tried, harm=before.harm)
        save_statistics(out, found, *about)
        statistics = Statistics(out)
        with tempfile.TemporaryDirectory() as folder, Spool(Path(folder)) as spool:
            measure(model, [site], spool=spool, statistics=statistics)
            put(loaded, site, Cuts(model, spool, statistics).tensors(site, plan.kept(site)))


def free_memory() -> int | None:
    """Bytes, None where nothing tells or no package could put weights elsewhere."""
    if find_spec("psutil") is None or find_spec("accelerate") is None:
        return None
    import psutil

    return int(psutil.virtual_memory().available)


def _place(site: Site) -> tuple[bool, int, bool]:
    """Where a block stands among those that one input passes through."""
    return not site.spec.kind.startswith("encoder"), site.layer, site.spec.kind.endswith("cross")


def _sampled(inputs: Iterable[tuple[Inputs, int]], samples: list[Inputs]) -> Iterator[tuple[Inputs, int]]:
    """The same inputs, with some of the first of every FOLDS kept on the way, evenly spaced: at most TRIED."""
    every = FOLDS
    for number, (given, nbytes) in enumerate(inputs):
        if number % every == 0:
            samples.append(given)
        if len(samples) > TRIED:
            del samples[1::2]
            every *= 2
        yield given, nbytes


def _windows(folder: Path, model: Any, item: Item, said: bool) -> Iterator[tuple[Inputs, int]]:
    """The inputs of an item, each with its share of the bytes."""
    windows = list(inputs_of(folder, model, item, said))
    for window in windows:
        yield window, item.nbytes // len(windows)


def _listen(
    model: Model,
    loaded: Any,
    sites: Sequence[Site],
    inputs: Iterable[tuple[Inputs, int]],
    progress: AbstractContextManager[Tick],
    every: int = 1,
) -> tuple[dict[str, BlockStatistics], dict[str, BlockStatistics]]:
    """The statistics of the given blocks over the first of `every` so many inputs, and over the others."""
    with ExitStack() as hooks, progress as tick:
        outputs = {site.name: read_site(model.reader, site).o for site in sites}
        first, others = ([Collector(site, loaded, outputs[site.name], hooks) for site in sites] for _ in range(2))
        for number, (given, nbytes) in enumerate(inputs):
            run(loaded, given, others if number % every else first)
            tick(nbytes, 0)
        tick(0, 1)
        names = [site.name for site in sites]
        found = [{name: c.found() for name, c in zip(names, part, strict=True)} for part in (first, others)]
        return found[0], found[1]


def load_for_calibration(model: Model, **placing: Any) -> Any:
    """The model with an attention that gives its weights away.

    Raises UsageError for one in the compact layout, and for attention that hooks on its projections do not understand.
    """
    for site in model.sites:
        if why := _unheard(site):
            raise UsageError(f"{site.name} cannot be calibrated: {why}", "go by the weights alone")
    if any((site.qk_ranks, site.vo_ranks) != (site.full, site.full) for site in model.sites):
        raise UsageError(
            f"{model.reader.folder} is compact: some of its directions are gone",
            "calibrate the original, or what `pessa export --layout dense` makes of this one",
        )
    loaded = load(model, **placing)
    loaded.set_attn_implementation("eager")
    return loaded


def _unheard(site: Site) -> str:
    """Why what the projections of a block give away is not enough; nothing for no such reason."""
    if site.spec.fused:
        return "queries, keys and values come out of one projection"
    if 0 < site.unmerged < site.head_dim:
        return "a part of each head rotates"
    if site.spec.key_bias_stays:
        return "its projections see relative positions, too"
    if not site.spec.compact:
        return "it reads the weights of its projections directly"
    return ""


def read_data(paths: Sequence[Path]) -> tuple[list[Item], list[str]]:
    """The calibration data in files and folders, and the SHA-256 of each file of audio or text, once for equal ones.

    Raises PessaError when there is none.
    """
    found: dict[str, list[Item]] = {}
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO)
            if not files:
                raise PessaError(f"{path} holds no audio", f"it has no file that ends in {', '.join(AUDIO)}")
            found |= {sha256_of(file): [Item(audio=file)] for file in files}
        elif not path.is_file():
            raise PessaError(f"{path} is not there", "give audio or text files, folders of audio, or JSON lines")
        elif path.suffix.lower() in AUDIO:
            found[sha256_of(path)] = [Item(audio=path)]
        elif path.suffix.lower() in (".jsonl", ".json"):
            lines = list(_lines(path))
            found |= {sha256_of(line.audio): [line] for line in lines if line.audio is not None}
            if texts := [line for line in lines if line.audio is None]:
                found[sha256_of(path)] = texts
        else:
            found[sha256_of(path)] = [Item(text=read_text(path, "give audio, UTF-8 text or JSON lines"))]
    return [item for items in found.values() for item in items], list(found)


def _lines(path: Path) -> Iterator[Item]:
    for number, line in enumerate(read_text(path, "give audio, UTF-8 text or JSON lines").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, text = row.get("audio", row.get("file")), row.get("text")
            if not isinstance(audio or text, str) or not isinstance(text or "", str):
                raise ValueError("it has no text and no audio")
        except (ValueError, AttributeError, RecursionError) as error:
            raise PessaError(f"{path}, line {number}: {error}", 'write {"audio": FILE} or {"text": "..."}') from None
        clip = None if audio is None else path.parent / audio
        if clip is not None and not clip.is_file():
            raise PessaError(f"{path}, line {number}: {clip} is not there", "correct the path")
        yield Item(clip, text)


def inputs_of(folder: Path, model: Any, item: Item, said: bool = True) -> Iterator[Inputs]:
    """An item as inputs of batch 1, cut into windows of what the model takes at a time.

    A decoder of speech gets the transcript, or what the model itself hears where there is none; unless `said` it is of
    no interest, and gets next to nothing.
    """
    speech = model.config.model_type == "whisper"
    if not speech and (model.config.is_encoder_decoder or model.main_input_name != "input_ids"):
        raise UsageError(
            f"{folder}: a {model.config.model_type} cannot be calibrated: it takes more than a text",
            "go by the weights alone",
        )
    if speech != (item.audio is not None):
        what = "listens, and there is text" if speech else "reads, and there is audio"
        raise UsageError(f"{folder} {what} in the data", "give audio to speech models and text to text models")
    if item.audio is not None:
        yield from _speech(folder, model, load_audio(item.audio), item.text, said)
        return
    tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer")
    length = min(TEXT_TOKENS, getattr(model.config, "max_position_embeddings", TEXT_TOKENS))
    if not tokenizer.is_fast:
        raise PessaError(f"{folder}: its tokenizer cuts no windows", "add the tokenizer.json of the original model")
    cut = tokenizer(item.text, truncation=True, max_length=length, return_overflowing_tokens=True)
    for ids in cut["input_ids"]:
        window = torch.tensor([ids])
        yield {"input_ids": window, "attention_mask": torch.ones_like(window)}


def _speech(folder: Path, model: Any, samples: NDArray[np.float32], text: str | None, said: bool) -> Iterator[Inputs]:
    processor = from_folder(transformers.AutoProcessor, folder, "preprocessor and tokenizer")
    window = processor.feature_extractor.n_samples
    for start in range(0, len(samples), window):
        part = samples[start : start + window]
        features = processor(part, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"].to(
            device_of(model)
        )
        start_token = torch.full((1, 1), model.config.decoder_start_token_id, device=device_of(model))
        if not said:
            ids = start_token
        elif text is not None and len(samples) <= window:
            ids = processor.tokenizer(text, return_tensors="pt").input_ids[:, :-1]
        else:
            ids = model.generate(input_features=features, do_sample=False, num_beams=1)
            if ids[0, 0] != start_token[0, 0]:
                ids = torch.cat([start_token, ids], dim=1)
        yield {"input_features": features, "decoder_input_ids": ids[:, : model.config.max_target_positions]}


def device_of(model: Any) -> torch.device:
    """Where inputs have to be; weights that are read from disk as they are needed say meta."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def on_device(inputs: Sequence[Inputs], device: str | torch.device) -> list[Inputs]:
    """Copies of the inputs there, which gradients may flow beside."""
    return [{name: tensor.clone().to(device) for name, tensor in given.items()} for given in inputs]


def run(model: Any, inputs: Inputs, collectors: Sequence[Collector]) -> None:
    """One input through the model, with the collectors listening; generating before it does not count."""
    for collector in collectors:
        collector.on = True
    try:
        output_of(model, on_device([inputs], device_of(model))[0])
    finally:
        for collector in collectors:
            collector.on = False


class Collector:
    """Listens to one attention block of a model, and adds up its statistics while `on`; o: as in HeadWeights."""

    def __init__(self, site: Site, model: Any, o: Tensor, hooks: ExitStack) -> None:
        self.on = self._checked = False
        self._site = site
        self._seen: dict[str, Tensor] = {}
        self._sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device_of(model))
            for name, shape in zip(NAMES, shapes_of(site), strict=True)
        }
        block, projections = modules_of(site, model)
        # What stands for W_O where only inner products of outputs matter, (G, M, d, d).
        self._roots = torch.linalg.qr(o.double().permute(1, 2, 0, 3).to(device_of(model)), mode="r").R
        for side in "qkv":
            hooks.callback(projections[side].register_forward_hook(self._heard(side)).remove)
        hooks.callback(projections["o"].register_forward_pre_hook(self._mixed).remove)
        hooks.callback(block.register_forward_hook(self._finished, with_kwargs=True).remove)

    def found(self) -> BlockStatistics:
        return BlockStatistics(**{name: total.cpu() for name, total in self._sums.items()})

    def _heard(self, side: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if self.on:
                self._seen[side] = output

        return hook

    def _mixed(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.on:
            self._seen["o"] = args[0]

    def _finished(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Add up one call of the block. Everything is of batch 1."""
        if not self.on:
            return
        site = self._site
        g, m, d = site.kv_heads, site.group, site.head_dim
        attention = next(
            (t[0] for t in output if isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] == site.heads), None
        )  # (G M, queries, keys)
        if attention is None:
            raise PessaError(f"{site.name} gives no attention weights", "this model cannot be calibrated")
        queries = self._seen["q"][0].double().reshape(-1, g, m, d)
        keys = self._seen["k"][0].double().reshape(-1, g, d)
        values = self._seen["v"][0].double().reshape(-1, g, 1, d).permute(1, 2, 0, 3) @ self._roots.mT
        mixtures = self._seen["o"][0].double().reshape(-1, g * m * d)
        if not self._checked:
            self._check(attention, mixtures)
        self._seen.clear()
        some = torch.linspace(0, len(queries) - 1, min(QUERIES, len(queries)), device=queries.device).round().long()
        falls = attention.reshape(g, m, *attention.shape[1:])  # (G, M, queries, keys)
        more = len(queries) / len(some)
        if site.by_pairs:
            turned, seen_as = self._rotated(queries, keys, kwargs.get("position_embeddings"))
            asked = turned[some].permute(1, 2, 0, 3)  # (G, M, queries, d)
            self._sums["pairs"] += output_gram(asked, seen_as.transpose(0, 1), falls[:, :, some], values) * more
        keys = (keys - keys.mean(0)).transpose(0, 1)  # (G, keys, d); what is common would only cost digits
        if not site.by_pairs:
            self._sums["influence"] += _influence(falls[:, :, some], keys, values) * more
        seen = (falls[:, 0] > 0).to(attention.dtype)
        seen = seen / seen.sum(-1, keepdim=True)  # (G, queries, keys): each query's keys alike, none that is masked
        means = (seen @ keys.to(seen.dtype)).double()  # (G, queries, d)
        flat = queries.permute(1, 2, 0, 3).flatten(1, 2)  # (G, M queries, d)
        self._sums["frames"] += len(mixtures)
        self._sums["queries"] += flat.mT @ flat
        self._sums["keys"] += keys.mT @ (seen.sum(1).double().unsqueeze(-1) * keys) - means.mT @ means
        self._sums["mixtures"] += mixtures.mT @ mixtures
        self._sums["mixture"] += mixtures.sum(0)

    def _check(self, attention: Tensor, mixtures: Tensor) -> None:
        """Raise PessaError where attention times values is not what goes into W_O: then this is something else."""
        site = self._site
        values = self._seen["v"][0].double().reshape(-1, site.kv_heads, 1, site.head_dim).permute(1, 2, 0, 3)
        falls = attention.reshape(site.kv_heads, site.group, *attention.shape[1:]).double()
        fit = falls.shape[-1] == values.shape[-2] and falls[..., 0].numel() * site.head_dim == mixtures.numel()
        expected = (falls @ values).permute(2, 0, 1, 3).reshape(mixtures.shape) if fit else mixtures
        if not fit or not float((expected - mixtures).norm()) <= 1e-3 * float(mixtures.norm()):
            raise PessaError(f"{site.name} mixes values otherwise than by its attention", "go by the weights alone")
        self._checked = True

    def _rotated(self, queries: Tensor, keys: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if rotation is None:
            raise PessaError(f"{self._site.name} is given no rotations", "this model cannot be calibrated")
        cos, sin = (angle[0] for angle in rotation)
        if cos.shape[-1] != self._site.head_dim:
            raise PessaError(f"{self._site.name} is given its rotations in another form", "go by the weights alone")
        return rotated(queries, cos, sin), rotated(keys, cos, sin)


def _influence(attention: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What errors of the keys do to the output, (G, d, d), summed over queries.

    An error e_j of the scores moves what a query gets by sum_j a_j (e_j - mean e) v_j, and where e_j = k_j x by
    C^T x, with C the covariance of keys and values under the query's attention. attention: (G, M, queries, keys); keys:
    (G, keys, d); values behind W_O, or anything of the same inner products: (G, M, keys, w).
    """
    total, dtype = torch.zeros_like(keys.mT @ keys), attention.dtype
    for g, each in enumerate(keys.to(dtype)):  # one query head at a time: keys d w numbers
        for own, v in zip(attention[g], values[g].to(dtype), strict=True):
            joint = (own @ (each.unsqueeze(2) * v.unsqueeze(1)).flatten(1)).reshape(len(own), each.shape[1], -1)
            covariance = joint - (own @ each).unsqueeze(2) * (own @ v).unsqueeze(1)  # (queries, d, w)
            through = covariance.transpose(0, 1).flatten(1)
            total[g] += (through @ through.mT).double()
    return total
