"""Comparing the tensors of two checkpoints: names and dtypes of all, and outside the blocks byte for byte."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Tick
from pessa_cli.models.classes import model_class
from pessa_cli.surgery.model import Model

# Buffers that transformers computes, and that old checkpoints store.
COMPUTED = ("position_ids", "rotary_emb.inv_freq", "masked_bias")
PARAMETERS = (".weight", ".bias")  # other tensors may be masks, which hold infinities


def compare_tensors(
    reference: Model, candidate: Model, faults: dict[CheckpointReader, list[str]], tick: Tick
) -> tuple[dict[str, str], list[str]]:
    """Return the tensors that differ, each with how it differs, and those that do not matter.

    Of the tensors of the blocks only names and dtypes are compared. Those that do not matter are stored in one
    checkpoint only: copies of tensors that transformers ties, and buffers that it computes. faults: gets, by reader, a
    line for each tensor that is not finite. tick: is called with the bytes read.
    """
    ours, theirs = reference.reader, candidate.reader
    attention = [{name for site in model.sites for name in site.tensors} for model in (reference, candidate)]
    unequal: dict[str, str] = {}
    ignored: list[str] = []
    for name in sorted(ours.header.keys() | theirs.header.keys()):
        one, other = ours.header.get(name), theirs.header.get(name)
        if one is None or other is None:
            side, model = ("candidate", candidate) if one is None else ("reference", reference)
            if name.endswith(COMPUTED):
                ignored.append(f"{name}: only in the {side}, and computed by transformers")
            elif tied := _tied_to(name, model):
                ignored.append(f"{name}: only in the {side}, a copy of {tied}")
            else:
                unequal[name] = f"only in the {side}"
        elif one.dtype != other.dtype:
            unequal[name] = f"{one.dtype} and {other.dtype}"
        elif all(name in names for names in attention):
            continue  # compared as products, which other factors of another width can also give
        elif one.shape != other.shape:
            unequal[name] = f"{one.shape} and {other.shape}"
        elif how := _difference(name, ours, theirs, faults):
            unequal[name] = how
        tick(0 if one is None else one.nbytes, 0)
    return unequal, ignored


def _difference(
    name: str, ours: CheckpointReader, theirs: CheckpointReader, faults: dict[CheckpointReader, list[str]]
) -> str | None:
    """Compare two tensors of the same dtype and shape; None if all bytes are the same."""
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[ours.header[name].dtype])
    odd = {ours: False, theirs: False}
    alike, differ, most = True, 0, 0.0
    for chunks in zip(ours.chunks(name), theirs.chunks(name), strict=True):
        same = chunks[0] == chunks[1]
        tensors = [torch.frombuffer(chunk, dtype=dtype) for chunk in chunks[: 1 if same else 2]]
        if dtype.is_floating_point:
            for reader, tensor in zip(odd, tensors, strict=False):
                odd[reader] |= _is_odd(name, tensor)
        if not same:
            alike = False
            difference = (tensors[0].double() - tensors[1].double()).abs()
            differ += int((difference != 0).sum())
            most = max(most, float(difference.nan_to_num(math.inf).max()))
    for reader, found in odd.items():
        if found:
            faults[reader].append(f"{name}: NaN or infinite")
    if most:
        return f"{differ} of {ours.header[name].count} entries, by at most {most:.3g}"
    return None if alike else "the signs of zeros"


def _is_odd(name: str, tensor: Tensor) -> bool:
    """Whether a tensor holds NaN, or a parameter an infinity."""
    ends = torch.stack(tensor.aminmax())  # NaN if an entry is
    return bool(ends.isnan().any()) or (name.endswith(PARAMETERS) and bool(ends.isinf().any()))


def _tied_to(name: str, model: Model) -> str | None:
    """The tensor that transformers ties this one to, if the file has both of them and they are equal."""
    from pessa_cli.compat.for_transformers import tied_weights  # which must not be what imports transformers first

    reader = model.reader
    try:
        kind = model_class(model)
        config = kind.config_class.from_pretrained(reader.folder, local_files_only=True)
    except (PessaError, OSError, ValueError):
        return None
    if not config.get_text_config().tie_word_embeddings or not any(re.search(key, name) for key in tied_weights(kind)):
        return None
    info, own = reader.header[name], reader.get(name)
    others = (other for other, at in reader.header.items() if other != name and at == info)
    return next((other for other in others if torch.equal(reader.get(other), own)), None)
