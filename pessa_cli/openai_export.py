"""A Hugging Face Whisper in openai-whisper's form: its names and dims, and the .pt file that whisper.load_model reads.

The tensors are those of the folder, bit for bit and in its dtype; compact blocks get zeros where directions were cut.
"""

from __future__ import annotations

import base64
import gzip
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pessa_cli.checkpoint import TORCH_DTYPES, read_json
from pessa_cli.errors import PessaError, UsageError, listed
from pessa_cli.heads import read_site, write_site
from pessa_cli.model import Model, open_model
from pessa_cli.openai_whisper import SUFFIXES, tensor_names
from pessa_cli.pipeline import Progress, quietly
from pessa_cli.ragged import shortened
from pessa_cli.sites import in_full

# openai-whisper's dims under the names of a Hugging Face config.
CONFIG_KEYS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
FIXED = {"activation_function": "gelu", "scale_embedding": False}  # what openai-whisper's code does to every model
# By its number of tokens openai-whisper chooses a tokenizer; with any other number it would read wrong words.
VOCABULARIES = (51864, 51865, 51866)
EMBEDDING, PROJECTION = "decoder.embed_tokens.weight", "proj_out.weight"
FEW = "give a checkpoint of the size of one of OpenAI's, or load it with transformers"


@dataclass(frozen=True)
class OpenAIForm:
    """A Whisper checkpoint as openai-whisper sees it.

    `names` maps each of openai-whisper's tensors to the file's. `alignment_heads` are (layer, head) of the
    cross-attention heads that follow time; empty where the generation config lists none.
    """

    model: Model
    dims: dict[str, int]
    names: dict[str, str]
    alignment_heads: list[tuple[int, int]]

    def tensor(self, ours: str) -> torch.Tensor:
        """A tensor that is not attention, by its name in the file. Raises PessaError when it holds NaN."""
        reader = self.model.reader
        info = reader.header[ours]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        return torch.frombuffer(bytearray().join(reader.checked_chunks(ours)), dtype=dtype).reshape(info.shape)

    @cached_property
    def attention(self) -> frozenset[str]:
        """The file's names of all attention tensors."""
        return frozenset(name for site in self.model.sites for name in site.tensors)


def openai_form(model: Model) -> OpenAIForm:
    """The checkpoint's dims and names in openai-whisper. Raises PessaError for what openai-whisper would not compute:

    another architecture or activation, an untied output, tensors missing, too many or of an unusual shape.
    """
    config, header, folder = model.reader.config, model.reader.header, model.reader.folder
    if config.get("model_type") != "whisper":
        raise PessaError(f"{folder} is a {shortened(config.get('model_type'))}, no Whisper", "give a Whisper")
    dims: dict[str, Any] = {theirs: config.get(ours) for theirs, ours in CONFIG_KEYS.items()}
    wrong = [f"{CONFIG_KEYS[name]}: {shortened(value)}" for name, value in dims.items() if type(value) is not int]
    wrong += [f"{key}: {shortened(config.get(key))}" for key, value in FIXED.items() if config.get(key, value) != value]
    if dims["n_vocab"] not in VOCABULARIES:
        wrong.append(f"vocab_size: {shortened(dims['n_vocab'])}, known are {', '.join(map(str, VOCABULARIES))}")
    if not wrong and max(dims["n_audio_layer"], dims["n_text_layer"]) > len(header):
        wrong.append("more layers than tensors")  # seen before any list of that length is made
    if wrong:
        raise PessaError(f"{folder / 'config.json'} is of no model that openai-whisper runs\n{listed(wrong)}", FEW)
    # A base model saved alone has no prefix.
    prefix = "model." if any(name.startswith("model.") for name in header) else ""
    plan = {theirs: (prefix + ours.removeprefix("model."), shape) for theirs, ours, shape in tensor_names(dims)}
    _check_tensors(model, dict(plan.values()), prefix + EMBEDDING)
    return OpenAIForm(model, dims, {theirs: ours for theirs, (ours, _) in plan.items()}, _alignment_heads(folder, dims))


def _check_tensors(model: Model, plan: dict[str, tuple[int, ...]], embedding: str) -> None:
    """Every planned tensor is there in its dense shape, and nothing else but a copy of the tied embedding."""
    reader = model.reader
    shapes = {name: info.shape for name, info in reader.header.items() if name != PROJECTION}
    for site in model.sites:
        shapes |= in_full(site).tensors
    problems = [f"{name}: not part of OpenAI's Whisper" for name in shapes if name not in plan]
    for name, shape in plan.items():
        if name not in shapes:
            problems.append(f"{name}: missing")
        elif shapes[name] != shape:
            problems.append(f"{name}: shape {shapes[name]}, expected {shape}")
    if not problems and PROJECTION in reader.header and not torch.equal(reader.get(PROJECTION), reader.get(embedding)):
        problems.append(f"{PROJECTION}: not the embedding, as it always is in OpenAI's Whisper")
    if problems:
        raise PessaError(f"{reader.folder} is no model that openai-whisper runs\n{listed(sorted(problems))}", FEW)


def _alignment_heads(folder: Path, dims: dict[str, int]) -> list[tuple[int, int]]:
    """What generation_config.json says of the heads that follow time."""
    path = folder / "generation_config.json"
    pairs = (read_json(path) if path.is_file() else {}).get("alignment_heads") or []
    layers, heads = range(dims["n_text_layer"]), range(dims["n_text_head"])
    listing = pairs if isinstance(pairs, list) else []
    known = [(layer, head) for layer in layers for head in heads if [layer, head] in listing]
    if len(known) != len(listing) or (pairs and not known):
        raise PessaError(f"{path}: alignment_heads are not pairs of a layer and a head", "download the file again")
    return known


def alignment_mask(form: OpenAIForm) -> torch.Tensor:
    """Which cross-attention heads follow time, (layers, heads); openai-whisper's guess, the last half, if unknown."""
    layers, heads = form.dims["n_text_layer"], form.dims["n_text_head"]
    mask = torch.zeros(layers, heads, dtype=torch.bool)
    for layer, head in form.alignment_heads:
        mask[layer, head] = True
    if not form.alignment_heads:
        mask[layers // 2 :] = True
    return mask


def export_openai(folder: Path, out: Path, force: bool = False, progress: Progress = quietly) -> None:
    """Write a Whisper folder, dense or compact, as the stock file `out` of openai-whisper: dense, in the same dtype.

    torch.save wants all tensors when it begins, so the dense weights are in memory once, which is a fraction of
    what loading the file takes. The heads that follow time lie beside `dims` under `alignment_heads`, written as
    `Whisper.set_alignment_heads` takes them: whisper.load_model knows them by a model's name only, not by its file.

    Raises PessaError for a model that is none of openai-whisper's (see `openai_form`), for weights with NaN, and as
    `new_file` does.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out} does not end in .pt, as openai-whisper's files do", "name it so")
    with new_file(out, folder, force) as file:
        form = openai_form(open_model(folder))
        reader = form.model.reader
        tensors: dict[str, torch.Tensor] = {}
        with progress("reading", form.model.nbytes, len(form.model.sites)) as tick:
            for site in form.model.sites:
                weights = read_site(reader, site)
                tensors |= write_site(weights, in_full(site), reader.header, "dense")
                tick(sum(reader.header[name].nbytes for name in site.tensors), 1)
            for name in form.names.values():
                if name not in tensors:
                    tensors[name] = form.tensor(name)
                    tick(reader.header[name].nbytes, 0)
        checkpoint: dict[str, object] = {
            "dims": form.dims,
            "model_state_dict": {theirs: tensors[ours] for theirs, ours in form.names.items()},
        }
        if form.alignment_heads:
            packed = gzip.compress(alignment_mask(form).numpy().tobytes(), mtime=0)
            checkpoint["alignment_heads"] = base64.b85encode(packed).decode()
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        reader.check_unchanged()


@contextmanager
def new_file(out: Path, source: Path, force: bool = False) -> Iterator[BinaryIO]:
    """A file beside `out` that is flushed to the disk and renamed to it at the end; nothing stays when this raises.

    `force` lets another file of torch.save give way. Raises PessaError when `out` exists otherwise or lies in
    `source`, which is only read, where nothing can be written, and while another run is writing there.
    """
    import fcntl

    partial = out.parent / f".{out.name}.partial"
    if source.resolve() in out.resolve().parents:
        raise PessaError(f"{out} is inside {source}, which is only read", "give an -o outside of it")
    _check_replaceable(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = f"another run is writing {out} just now"
                raise PessaError(busy, "wait for it, or give another -o") from None
            try:
                file.truncate(0)  # what a killed run has left
                yield file
                file.flush()
                os.fsync(file.fileno())
                _check_replaceable(out, force)
                partial.replace(out)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise PessaError(f"could not write {out}: {error}", "free some space, or give another -o") from error


def _check_replaceable(out: Path, force: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise PessaError(f"{out} exists", "give another -o, or --force to replace it")
    if not out.is_file() or not zipfile.is_zipfile(out):
        raise PessaError(f"{out} is no file of torch.save, so --force does not replace it", "give another -o")
