"""Models from a hub by name: which files a repository must give, and what can go wrong on the way.

huggingface_hub does the transfer, and reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from pessa_cli.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_json
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.sources.pickled import PICKLE, PICKLE_INDEX

# openai-whisper's names, and the repository of each.
SIZES = ("tiny", "tiny.en", "base", "base.en", "small", "small.en", "medium", "medium.en")
WHISPER = {
    **{size: f"openai/whisper-{size}" for size in (*SIZES, "large-v2", "large-v3", "large-v3-turbo")},
    "large-v1": "openai/whisper-large",
    "large": "openai/whisper-large-v3",
    "turbo": "openai/whisper-large-v3-turbo",
}
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CTRANSLATE2 = ("model.bin", "vocabulary.json", "vocabulary.txt")
# Beside the weights: configs, tokenizers and processors, licences, what pessa leaves in its own outputs, and the
# modules of sentence-transformers. Code and pictures are not among them.
SIDE_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "LICEN[CS]E*",
    "NOTICE*",
    "spectra.safetensors",
    "README.md",
)
MODULES = "[0-9]_*/config.json"
Index = Callable[[str], Iterable[str]]
ATTEMPTS = 3
TIMEOUT = 30  # seconds, for the first answer


def repository_of(name: str) -> str | None:
    """The repository that a name means: `owner/name` itself, or openai's for openai-whisper's names; else None."""
    if name == "whisper-large":
        raise UsageError(
            "whisper-large is two models: the first large one, and openai-whisper's present large",
            "give openai/whisper-large for the first, large-v3 for the other",
        )
    known = WHISPER.get(name.removeprefix("whisper-"))
    return known or (name if REPOSITORY.fullmatch(name) else None)


def _side_files(files: Iterable[str]) -> list[str]:
    """What stands beside the weights; not the indexes of weights in whatever format."""
    return [
        file
        for file in files
        if ("/" not in file and any(fnmatch(file, pattern) for pattern in SIDE_FILES) and ".index." not in file)
        or fnmatch(file, MODULES)
    ]


def _weight_files(files: list[str], index: Index) -> list[str]:
    """One complete set of weights out of all that a repository has; `index` lists the shards of an index file."""
    if SINGLE_FILE in files:
        return [SINGLE_FILE]
    if INDEX_FILE in files:
        return [INDEX_FILE, *index(INDEX_FILE)]
    if CTRANSLATE2[0] in files and any(file in files for file in CTRANSLATE2[1:]):
        return [file for file in CTRANSLATE2 if file in files]
    if PICKLE in files:
        return [PICKLE]
    if PICKLE_INDEX in files:
        return [PICKLE_INDEX, *index(PICKLE_INDEX)]
    return []


def _check_weights(repository: str, files: list[str], weights: list[str], allow_pickle: bool) -> None:
    if weights and weights[0] in (PICKLE, PICKLE_INDEX) and not allow_pickle:
        raise PessaError(
            f"{repository} holds pickled weights only ({weights[0]}), which can run code when they are loaded",
            "look for a --revision with safetensors, or give --allow-pickle, which takes tensors and refuses code",
        )
    gguf = [file for file in files if file.endswith(".gguf")]
    if not weights and gguf:
        raise PessaError(f"{repository} holds GGUF files only", f"download one, as {gguf[0]}, and give that file")
    if not weights:
        raise PessaError(
            f"{repository} is no model: it has neither {SINGLE_FILE} nor {INDEX_FILE}",
            "give the repository that from_pretrained loads",
        )


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    # An index of anything else gives no shards here, and its error when the folder is read.
    return sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []


def _online(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    siblings = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT).siblings or []
    files = [sibling.rfilename for sibling in siblings]
    weights = _weight_files(files, lambda index: _shards(Path(hf_hub_download(repository, index, revision=revision))))
    _check_weights(repository, files, weights, allow_pickle)
    return Path(snapshot_download(repository, revision=revision, allow_patterns=[*_side_files(files), *weights]))


def _cached(repository: str, revision: str | None, allow_pickle: bool) -> Path | None:
    """The snapshot in the cache, if everything needed is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(SIDE_FILES),
                ignore_patterns=["*/*", "*.index.*"],
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:  # not there, or some of these files are not
        return None
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    weights = _weight_files(files, lambda index: _shards(folder / index))
    if not weights or not set(weights) <= set(files):
        return None
    _check_weights(repository, files, weights, allow_pickle)
    return folder


def download(repository: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder of the cache with what is needed of a repository, downloaded as far as it is not there.

    Where the hub is out of reach or HF_HUB_OFFLINE=1, what is in the cache is taken, if it is complete. Raises
    PessaError for a name or revision that is not there, a model that one may not read, and failing downloads.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _online(repository, revision, allow_pickle)
        except PessaError:
            raise
        except Exception as error:  # of huggingface_hub, httpx or the system: all are told to the user in one way
            if _kind(error) == "ReadError" and attempt < ATTEMPTS:
                continue  # a reset connection, the one fault that huggingface_hub does not try again after
            found = _cached(repository, revision, allow_pickle) if _out_of_reach(error) else None
            if found is not None:
                return found
            raise _explained(error, repository, revision) from error
    raise AssertionError("the last attempt returns or raises")


def _kind(error: BaseException) -> str:
    """The name of a transport error: httpx's, or those of what huggingface_hub has in its place."""
    return type(error).__name__ if type(error).__module__.startswith("httpx") else ""


def _out_of_reach(error: Exception) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)) or bool(_kind(error))


def _explained(error: Exception, repository: str, revision: str | None) -> PessaError:
    """What went wrong in a download, and what to do."""
    from huggingface_hub import constants, errors

    place = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    last = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return PessaError(
            f"{repository} is gated: {place} gives it only to those who asked",
            f"ask for access on {place}/{repository}, then set HF_TOKEN or run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return PessaError(f"{repository} has no revision {revision or 'main'}", "give a branch, a tag or a commit")
    if isinstance(error, errors.RepositoryNotFoundError) and status != 401:
        return PessaError(
            f"{repository} is neither a folder here nor a model on {place}",
            "check the name; a private model needs HF_TOKEN",
        )
    if status in (401, 403):
        return PessaError(
            f"{place} does not give {repository} to you ({status}): it is private, or there is no such model",
            "check the name; for a private model set HF_TOKEN or run: hf auth login",
        )
    if status is not None:
        return PessaError(f"{place} answered {status} for {repository}: {last}", "try again later")
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return PessaError(
            f"{repository} is not, or not whole, in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set",
            "run once without HF_HUB_OFFLINE, or give a folder",
        )
    if _kind(error) == "ConnectError" or isinstance(error, errors.LocalEntryNotFoundError):
        return PessaError(
            f"cannot reach {place} for {repository}, and it is not, or not whole, in the cache: {last}",
            "check the connection and HF_ENDPOINT, or give a folder",
        )
    if _kind(error):
        return PessaError(
            f"the download of {repository} broke off again and again: {last}",
            "run again when the connection is better: files that are complete are kept",
        )
    return PessaError(
        f"could not download {repository}: {last}", f"look at the space and the rights in {constants.HF_HUB_CACHE}"
    )
