"""Comparing what decides, besides the weights, what a model does: its config, tokenizer, preprocessing and generation.

A value that both folders write, and write differently, is a difference. A value or file that only one of them has
counts by what transformers makes of both folders: defaults that are written out change nothing.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from safetensors import SafetensorError, safe_open

from pessa_cli.checkpoint.contents import CARRIED, MODULES_FILE, matched, why_left_out
from pessa_cli.checkpoint.dtypes import loaded_dtype
from pessa_cli.checkpoint.files import ADAPTER_FILE, CONFIG_FILE, sha256_of, source_name
from pessa_cli.checkpoint.links import visible_files
from pessa_cli.checkpoint.manifest import CARD_FILE, MANIFEST_FILE
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import shortened
from pessa_cli.models.classes import LOCAL_ONLY
from pessa_cli.models.load import quiet_transformers
from pessa_cli.surgery.generation import GENERATION_FILE, mended_generation_config
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.spectra_file import SPECTRA_FILE

# Who wrote a file, from where, and how attention is computed. `dtype` is compared as the dtype that is loaded, and the
# `quantization_config` of pessa, which gives the shapes of its tensors, with the weights.
NOT_COMPARED = {
    CONFIG_FILE: (
        *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_commit_hash"),
    ),
    GENERATION_FILE: ("transformers_version", "_from_model_config", "_commit_hash"),
    "tokenizer.json": ("truncation", "padding"),  # transformers sets both anew in each call
    "tokenizer_config.json": (
        *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "normalizer_file"),
        *("backend", "is_local", "local_files_only", "trust_remote_code", "added_tokens_decoder", "use_fast"),
    ),
    "config_sentence_transformers.json": ("__version__",),
}
# Of the options that transformers gives a tokenizer, these are its own and those of a single call.
OF_A_CALL = ("chat_template", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")
TOKENS = "added_tokens_decoder"  # repeats what is in tokenizer.json, and decides without one
ADAPTER_WEIGHTS = "adapter_model.safetensors"
AS_READ = ("tokenizer_class",)  # has several names for one class
# Files that are not compared where both folders have them, in the patterns of `checkpoint.contents`.
NOTES = (
    *(f"/{SPECTRA_FILE}", "*.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "*.pdf", "*.html", "requirements*.txt"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*_results.json", "*_results.txt"),
)
# Files that a model without them lacks, besides those of PARTS: weights beside the transformer, and data of tokenizers
# and of preprocessing. Of other files it is not known whether anything reads them.
NEEDED = (
    *CARRIED,
    *("tekken.json", "dict*.txt", "alphabet.json", "bpe.codes", "entity*.tsv", "special_tokens*.txt", "*.npz", "*.py"),
    *("tokenizer/", "preprocessor/", "processor/", "feature_extractor/", "image_processor/", "speaker_embeddings/"),
)
MOST_PARSED = 64 * 2**20  # bytes of a file whose values are told apart; a larger one is compared as a whole
MOST_VALUES = 20  # of one file that are told one by one; a tokenizer has 100,000
SHOWN = 60  # characters of a value
ABSENT = "(not there)"


Found = tuple[str, str, Any, Any]  # file, key, and both values


class Folder(NamedTuple):
    """A model, the files in its folder, by name, and the `model_type` as which it is treated, if one was given."""

    model: Model
    files: dict[str, Path]
    architecture: str | None

    def document(self, name: str) -> Any:
        """The content of one of the files; ABSENT without it."""
        if name not in self.files:
            return ABSENT
        if name == GENERATION_FILE and (mended := self.mended_generation) is not None:
            return mended
        found = _document(self.files[name])
        return found | self.given if name == CONFIG_FILE else found

    @property
    def mended_generation(self) -> dict[str, Any] | None:
        """What an output of this folder has as its generation config; None if that is the file as it is."""
        try:
            return mended_generation_config(self.model.reader.folder, self.model.reader.config)
        except PessaError:  # the file cannot be read, and is compared as text
            return None

    @property
    def given(self) -> dict[str, str]:
        """What replaces values of config.json."""
        return {} if self.architecture is None else {"model_type": self.architecture}


class Part(NamedTuple):
    """Files that belong together, as patterns of names, and what transformers makes of them, by name of a file.

    read: raises if transformers cannot read them, and for files that it does not read.
    """

    files: tuple[str, ...]
    read: Callable[[Folder], dict[str, Any]]


@dataclass(frozen=True)
class SettingDifference:
    """A value in a file that differs. key: where it is in the file, empty for the file as a whole."""

    file: str
    key: str
    reference: str
    candidate: str

    @property
    def where(self) -> str:
        """The file and the key."""
        return f"{self.file} {self.key}".strip()


@dataclass(frozen=True)
class SettingsComparison:
    """The result of `compare_settings`.

    files: what was compared. differences: what changes what the model does. ignored: what also differs, but changes
    nothing, a line each.
    """

    files: list[str]
    differences: list[SettingDifference]
    ignored: list[str]


def compare_settings(reference: Model, candidate: Model, architecture: str | None = None) -> SettingsComparison:
    """Compare the files that decide what two models do, other than their weights.

    architecture: treat both as this `model_type`. No weights are read, and none of the code in the folders runs.
    """
    ours, theirs = (Folder(model, visible_files(model.reader.folder), architecture) for model in (reference, candidate))
    compared: list[str] = []
    differences: list[SettingDifference] = []
    ignored: list[str] = []
    with quiet_transformers():
        for part in (*PARTS, Part((*MODULES, *_module_files(ours), *_module_files(theirs)), _unread)):
            names = sorted(name for name in ours.files.keys() | theirs.files.keys() if _belongs(name, part))
            compared += names
            differences += _compare_part(part, names, ours, theirs, ignored)
        weights = {*reference.reader.files, *candidate.reader.files, MANIFEST_FILE, CARD_FILE}
        for name in sorted((ours.files.keys() | theirs.files.keys()) - weights - set(compared)):
            in_both = name in ours.files and name in theirs.files
            copied = why_left_out(name) is None and matched(name, NOTES) is None
            if copied and (in_both or (name in ours.files and matched(name, NEEDED) is not None)):
                compared.append(name)
                differences += _compare_part(Part((name,), _unread), [name], ours, theirs, ignored)
            elif not in_both:
                ignored.append(f"{name}: only in the {'reference' if name in ours.files else 'candidate'}")
    differences += _own_adapters(ours, theirs)
    dtypes = [
        loaded_dtype(model.reader.config, (info.dtype for info in model.reader.header.values()))
        for model in (reference, candidate)
    ]
    if dtypes[0] != dtypes[1]:
        differences.append(SettingDifference(CONFIG_FILE, "dtype", *map(str, dtypes)))
    return SettingsComparison(compared, differences, ignored)


def _own_adapters(ours: Folder, theirs: Folder) -> list[SettingDifference]:
    """The differences of adapters that transformers, with PEFT installed, adds to the weights beside them.

    For an adapter of another model it would load that model; pessa loads neither, and such adapters are only listed.
    """
    if not (_adapts_itself(ours) or _adapts_itself(theirs)):
        return []
    hashes = [
        {name: sha256_of(path) for name, path in folder.files.items() if fnmatchcase(name, "adapter_*")}
        for folder in (ours, theirs)
    ]
    names = sorted(name for name in hashes[0].keys() | hashes[1].keys() if hashes[0].get(name) != hashes[1].get(name))
    return [SettingDifference(name, "", *(shortened(found.get(name, "absent")) for found in hashes)) for name in names]


def _adapts_itself(folder: Folder) -> bool:
    """Whether the folder has an adapter, with weights of PEFT, that names the model beside it as its base."""
    config, place = folder.document(ADAPTER_FILE), folder.model.reader.folder
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or (Path(base).resolve() != place.resolve() and base != source_name(place)):
        return False
    if ADAPTER_WEIGHTS not in folder.files:
        return "adapter_model.bin" in folder.files
    try:
        with safe_open(folder.files[ADAPTER_WEIGHTS], "np") as file:
            return any(name.startswith("base_model.model.") for name in file.keys())  # noqa: SIM118  # not a dict
    except SafetensorError:
        return False


def _module_files(folder: Folder) -> tuple[str, ...]:
    """Patterns of the files of the modules that modules.json lists, whatever the names of their folders."""
    modules = folder.document(MODULES_FILE)
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return tuple(f"{glob.escape(path.rstrip('/'))}/*" for path in paths if isinstance(path, str) and path)


def _belongs(name: str, part: Part) -> bool:
    return any(fnmatchcase(name, pattern) and ("/" in pattern) == ("/" in name) for pattern in part.files)


def _compare_part(
    part: Part, names: list[str], ours: Folder, theirs: Folder, ignored: list[str]
) -> list[SettingDifference]:
    """The differences of one part; adds to `ignored` the values that differ without changing anything."""
    written: list[Found] = []
    only_one: list[Found] = []
    tokens_decide = any("tokenizer.json" not in folder.files for folder in (ours, theirs))
    for name in names:
        files = ours.files.get(name), theirs.files.get(name)
        if files[0] is not None and files[1] is not None and sha256_of(files[0]) == sha256_of(files[1]):
            continue
        for key, x, y in _changes(ours.document(name), theirs.document(name)):
            if _is_ignored(name, key) and not (key.startswith(TOKENS) and tokens_decide):
                ignored.append(f"{name} {key}: {_shown(x, y)} and {_shown(y, x)}")
            elif type(x) is type(y) and ABSENT not in (x, y) and key not in AS_READ:
                written.append((name, key, x, y))
            else:
                only_one.append((name, key, x, y))
    if only_one:
        try:
            read = [part.read(folder) for folder in (ours, theirs)]
        except Exception:  # transformers raises many types, and what it cannot read is compared as it is written
            if any(name in ours.files for name in names):
                written += only_one
            else:  # the reference has nothing of this kind, so the candidate cannot do it differently
                ignored += [f"{name}: only in the candidate" for name in names]
        else:
            seen = {(key.rpartition(".")[2], str(x), str(y)) for _, key, x, y in written}
            found = [
                (name, key, x, y)
                for name in read[0].keys() | read[1].keys()
                for key, x, y in _changes(read[0].get(name, {}), read[1].get(name, {}))
                if not _is_ignored(name, key) and (key.rpartition(".")[2], str(x), str(y)) not in seen
            ]
            written += found
            if not found:
                some, more = _first_ones(only_one)
                ignored += [f"{f'{name} {key}'.strip()}: {_shown(x, y)} and {_shown(y, x)}" for name, key, x, y in some]
                ignored += [f"{name}: {count} more values" for name, count in more.items()]
    some, more = _first_ones(written)
    differences = [SettingDifference(name, key, _shown(x, y), _shown(y, x)) for name, key, x, y in some]
    return differences + [
        SettingDifference(name, f"{count} more values", "some", "others") for name, count in more.items()
    ]


def _first_ones(found: list[Found]) -> tuple[list[Found], dict[str, int]]:
    """The first MOST_VALUES of each file in order of their keys, and how many more a file has, by name."""
    some: list[Found] = []
    count = Counter(name for name, *_ in found)
    for name in sorted(count):
        some += sorted((entry for entry in found if entry[0] == name), key=lambda entry: entry[1])[:MOST_VALUES]
    return some, {name: total - MOST_VALUES for name, total in count.items() if total > MOST_VALUES}


def _document(path: Path) -> Any:
    """The content of a JSON or text file; the hash of another one, and of one that is too large to parse."""
    if path.stat().st_size <= MOST_PARSED:
        try:
            text = path.read_text(encoding="utf-8")
            return json.loads(text) if path.suffix == ".json" else text
        except (ValueError, RecursionError):
            pass
    return f"SHA-256 {sha256_of(path)}"


def _changes(ours: Any, theirs: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the place of each value that differs, with both values; ABSENT stands for one that is not there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in sorted(ours.keys() | theirs.keys()):
            place = f"{key}.{name}" if key else name
            yield from _changes(ours.get(name, ABSENT), theirs.get(name, ABSENT), place)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            yield from _changes(x, y, f"{key}[{i}]")
    elif ours != theirs and json.dumps(ours) != json.dumps(theirs):  # NaN is unequal to itself, but not its text
        yield key, ours, theirs


def _is_ignored(file: str, key: str) -> bool:
    """Whether a value changes nothing. In config.json the configs of parts, such as text_config, are like the whole."""
    parts = key.split(".")
    while file == CONFIG_FILE and len(parts) > 1 and parts[0].endswith("_config") and parts[0] != "quantization_config":
        parts = parts[1:]
    return parts[0].partition("[")[0] in NOT_COMPARED.get(file, ())


def _shown(value: Any, other: Any) -> str:
    """A value for a message; of a long text the part where it begins to differ from another one."""
    if value == ABSENT:
        return str(value)
    if isinstance(value, str) and isinstance(other, str) and len(value) > SHOWN:
        start = next((i for i, (x, y) in enumerate(zip(value, other, strict=False)) if x != y), len(other))
        rest = value[max(0, start - 20) :]
        value = f"{'...' if start > 20 else ''}{rest[:SHOWN]}{'...' if len(rest) > SHOWN else ''}"
    return shortened(value)


def _plain(value: Any) -> Any:
    """The same value as JSON has it: keys are strings, tuples are lists, other objects are their texts."""
    return json.loads(json.dumps(value, default=str))


def _read_config(folder: Folder) -> dict[str, Any]:
    config = folder.model.reader.config | folder.given
    config = {key: value for key, value in config.items() if key not in NOT_COMPARED[CONFIG_FILE]}
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    return {CONFIG_FILE: _plain(kind.from_dict(config).to_dict())}


def _read_generation(folder: Folder) -> dict[str, Any]:
    """The settings of `generate`; without a file of their own transformers takes them from config.json."""
    from pessa_cli.compat.for_transformers import generation_defaults, generation_in_config

    place = folder.model.reader.folder
    if GENERATION_FILE in folder.files:
        found = transformers.GenerationConfig.from_pretrained(place, **LOCAL_ONLY)
    else:
        found = generation_in_config(place, CONFIG_FILE, **LOCAL_ONLY)
    defaults = generation_defaults()
    written = found.to_dict() | (folder.mended_generation or {})
    values = {key: defaults.get(key) if value is None else value for key, value in written.items()}
    return {GENERATION_FILE: _plain(values)}


def _read_tokenizer(folder: Folder) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder.model.reader.folder, **LOCAL_ONLY)
    if not tokenizer.is_fast:
        raise ValueError("the state of a slow (pure Python) tokenizer cannot be compared")
    options = {key: value for key, value in tokenizer.init_kwargs.items() if value is not None and key not in OF_A_CALL}
    options |= {key: getattr(tokenizer, key) for key in ("padding_side", "truncation_side", "model_max_length")}
    return {
        "tokenizer.json": json.loads(tokenizer.backend_tokenizer.to_str()),
        "tokenizer_config.json": _plain(options | {"tokenizer_class": type(tokenizer).__name__}),
        "chat template": tokenizer.chat_template,
    }


def _read_processor(folder: Folder) -> dict[str, Any]:
    for kind in (transformers.AutoProcessor, transformers.AutoFeatureExtractor, transformers.AutoImageProcessor):
        try:
            found = kind.from_pretrained(folder.model.reader.folder, **LOCAL_ONLY)
        except Exception:  # transformers raises many types where a folder has no processor of a kind
            continue
        if hasattr(found, "to_dict"):
            return {"preprocessor_config.json": _plain(found.to_dict())}
    raise ValueError("transformers has no class for this processor")


def _unread(folder: Folder) -> dict[str, Any]:
    raise ValueError(f"transformers does not read these files of {folder.model.reader.folder}")


# Of sentence-transformers: its modules behind the model, each in a folder such as 1_Pooling, with their weights.
MODULES = (MODULES_FILE, "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]_*/*")
PARTS = (
    Part((CONFIG_FILE,), _read_config),
    Part((GENERATION_FILE,), _read_generation),
    Part(
        (
            *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
            *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*", "normalizer.json"),
            *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.bpe", "*vocab*", "*.spm"),
        ),
        _read_tokenizer,
    ),
    Part(("preprocessor_config.json", "processor_config.json", "*_preprocessor_config.json"), _read_processor),
    Part(("*.py",), _unread),  # the model's own code
)
