"""The files beside the weights: which of them an output takes over from its source, and their copying."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from pessa_cli.checkpoint.contents import CHOSEN, HIDDEN, MODULES_FILE, WEIGHT_SUFFIXES, Contents, contents_of
from pessa_cli.checkpoint.files import CONFIG_FILE, INDEX_FILE, read_json_value
from pessa_cli.checkpoint.links import hidden_files, visible_files
from pessa_cli.checkpoint.manifest import CARD_FILE, MANIFEST_FILE
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.surgery.card import ORIGINAL_FILE, is_card, read_card
from pessa_cli.surgery.spectra_file import SPECTRA_FILE

UnknownWeights = Literal["refuse", "copy", "leave-out"]
OWN = (CONFIG_FILE, MANIFEST_FILE, CARD_FILE, SPECTRA_FILE)  # files of which an output has its own
WITH_WEIGHTS = (".Dense", ".LayerNorm", ".CNN", ".LSTM")  # classes of sentence-transformers, at the end of their names


def output_contents(reader: CheckpointReader, unknown: UnknownWeights = "refuse") -> Contents:
    """Return which files of a model's folder an output copies, and which it leaves out; only names are read.

    unknown: what is done with weights that may or may not belong to the model. Raises PessaError if there are some and
    they are refused, and if the weights of a module of sentence-transformers are missing.
    """
    names = visible_files(reader.folder).keys()
    found = contents_of(names, {*reader.files, INDEX_FILE, *OWN})
    if missing := _modules_without_weights(reader.folder, names):
        raise PessaError(
            f"{reader.folder}: {MODULES_FILE} lists modules of which there are no weights\n{listed(missing)}",
            "download the folder again, with the folders in it",
        )
    if found.unknown and unknown == "refuse":
        raise PessaError(
            f"{reader.folder} has weights beside those of the model, which may belong to it or not\n"
            f"{listed(found.unknown)}",
            "give --unknown-weights copy to have them in the output unchanged, or --unknown-weights leave-out",
        )
    hidden = dict.fromkeys(hidden_files(reader.folder), HIDDEN)
    if unknown == "copy":
        return Contents(sorted(found.copied + found.unknown), found.left_out | hidden)
    return Contents(found.copied, found.left_out | dict.fromkeys(found.unknown, CHOSEN) | hidden)


def _modules_without_weights(folder: Path, names: Collection[str]) -> list[str]:
    """Return the modules with weights of a sentence-transformers model that have none among the files.

    Raises PessaError if their list cannot be read.
    """
    if MODULES_FILE not in names:
        return []
    modules = read_json_value(folder / MODULES_FILE)
    try:
        listed_there = [(str(module.get("path") or ""), str(module.get("type"))) for module in modules]
    except (TypeError, AttributeError):  # another program's file of this name
        return []
    return [
        f"{path}, {kind}"
        for path, kind in listed_there
        if path and kind.endswith(WITH_WEIGHTS)
        if not any(name.startswith(f"{path}/") and name.endswith(WEIGHT_SUFFIXES) for name in names)
    ]


def copy_side_files(source: Path, folder: Path, names: Iterable[str], card: bool = True) -> dict[str, str]:
    """Copy files of the source into an output; returns the names of the copies by the names of their sources.

    card: also copy a model card that pessa did not write, as README.original.md.
    """
    copied = {name: name for name in names}
    if card and (source / CARD_FILE).is_file() and not is_card(read_card(source)):
        copied[CARD_FILE] = ORIGINAL_FILE
    for name, copy in copied.items():
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / copy)
    return copied
