"""Download of models from the Hugging Face hub: which files of a repository are needed, and errors for the user.

huggingface_hub does the transfer, and itself reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from pessa_cli.checkpoint.contents import WEIGHT_SUFFIXES, contents_of
from pessa_cli.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_json
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.sources.pickled import PICKLE, PICKLE_INDEX

# The hub repository for each model name of openai-whisper.
SIZES = ("tiny", "tiny.en", "base", "base.en", "small", "small.en", "medium", "medium.en")
WHISPER = {
    **{size: f"openai/whisper-{size}" for size in (*SIZES, "large-v2", "large-v3", "large-v3-turbo")},
    "large-v1": "openai/whisper-large",
    "large": "openai/whisper-large-v3",
    "turbo": "openai/whisper-large-v3-turbo",
}
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CTRANSLATE2 = ("model.bin", "vocabulary.json", "vocabulary.txt")
# Files to download in addition to the weights: configs, tokenizers, processors, licences and what pessa writes into its
# outputs. Code and images are left out.
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
MODULES = "[0-9]_*/config.json"  # the modules of sentence-transformers
Index = Callable[[str], Iterable[str]]  # maps an index file to the shards that it lists
ATTEMPTS = 3
TIMEOUT = 30  # seconds to wait for the first response


def repository_of(name: str) -> str | None:
    """Return the hub repository for a name: `owner/name` as it is, OpenAI's for a name of openai-whisper, else None.

    Raises UsageError for the ambiguous name whisper-large.
    """
    if name == "whisper-large":
        raise UsageError(
            "whisper-large can mean two models: the first large model, and the one that openai-whisper now calls large",
            "give openai/whisper-large for the first, or large-v3 for the other",
        )
    known = WHISPER.get(name.removeprefix("whisper-"))
    return known or (name if REPOSITORY.fullmatch(name) else None)


def _side_files(files: Iterable[str], weights: Iterable[str]) -> list[str]:
    """Return the files to download in addition to the weights that are read.

    These are the known kinds of side files, all other weights that may belong to the model, and the side files in the
    folders of those. Other copies of the weights and the state of training runs are left out, as in every output.
    """
    contents = contents_of(files, set(weights))
    others = [name for name in (*contents.copied, *contents.unknown) if name.endswith(WEIGHT_SUFFIXES)]
    folders = {"", *(name.rpartition("/")[0] for name in others)}
    wanted = [
        name
        for name in contents.copied
        for folder, _, file in [name.rpartition("/")]
        if (folder in folders and any(fnmatch(file, pattern) for pattern in SIDE_FILES)) or fnmatch(name, MODULES)
    ]
    return sorted({*wanted, *others})


def _weight_files(files: list[str], index: Index) -> list[str]:
    """Return one complete set of weight files out of those in a repository, in pessa's order of preference.

    `index` lists the shards of an index file. Returns an empty list if no format is one that pessa reads.
    """
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
    """Raise PessaError if there are no weights that pessa reads, or only pickles and they are not allowed."""
    if weights and weights[0] in (PICKLE, PICKLE_INDEX) and not allow_pickle:
        raise PessaError(
            f"{repository} holds pickled weights only ({weights[0]}), which can run code when they are loaded",
            "look for a --revision with safetensors, or give --allow-pickle, which reads tensors and refuses code",
        )
    gguf = [file for file in files if file.endswith(".gguf")]
    if not weights and gguf:
        raise PessaError(
            f"{repository} holds GGUF files only", f"download one of them, such as {gguf[0]}, and give that file"
        )
    if not weights:
        raise PessaError(
            f"{repository} is not a model: it has neither {SINGLE_FILE} nor {INDEX_FILE}",
            "give the repository that from_pretrained loads",
        )


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    # For an invalid index return no shards: the error is raised when the folder is read.
    return sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []


def _online(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    """Download what is missing in the cache, and return the snapshot's folder."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    siblings = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT).siblings or []
    files = [sibling.rfilename for sibling in siblings]
    weights = _weight_files(files, lambda index: _shards(Path(hf_hub_download(repository, index, revision=revision))))
    _check_weights(repository, files, weights, allow_pickle)
    wanted = [*_side_files(files, weights), *weights]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))


def _cached(repository: str, revision: str | None, allow_pickle: bool) -> Path | None:
    """Return the folder of the cached snapshot, or None if the cache does not hold all needed files."""
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
    except LocalEntryNotFoundError:  # the snapshot, or one of these files, is not in the cache
        return None
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    weights = _weight_files(files, lambda index: _shards(folder / index))
    if not weights or not set(weights) <= set(files):
        return None
    _check_weights(repository, files, weights, allow_pickle)
    return folder


def download(repository: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Download the needed files of a repository into the hub's cache, and return the snapshot's folder.

    Files in the cache are not downloaded again. If the hub cannot be reached, or with HF_HUB_OFFLINE=1, the cached
    snapshot is used if it is complete. Raises PessaError if the repository or revision does not exist, the user has no
    access to it, it holds no weights that pessa reads, or the download fails.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _online(repository, revision, allow_pickle)
        except PessaError:
            raise
        except Exception as error:  # raised by huggingface_hub, httpx or the operating system
            if _transport_error(error) == "ReadError" and attempt < ATTEMPTS:
                continue  # a reset connection, the one failure that huggingface_hub does not retry itself
            found = _cached(repository, revision, allow_pickle) if _unreachable(error) else None
            if found is not None:
                return found
            raise _explained(error, repository, revision) from error
    raise AssertionError("the last attempt returns or raises")


def _transport_error(error: BaseException) -> str:
    """Return the class name of an error of httpx or of a package in its place; empty for any other error."""
    return type(error).__name__ if type(error).__module__.startswith("httpx") else ""


def _unreachable(error: Exception) -> bool:
    """Return whether an error means that the hub could not be reached, or that offline mode is on."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)) or bool(_transport_error(error))


def _explained(error: Exception, repository: str, revision: str | None) -> PessaError:
    """Return the PessaError for a failed download: what went wrong, and what the user can do."""
    from huggingface_hub import constants, errors

    place = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    last = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return PessaError(
            f"{repository} is gated: {place} gives it only to users with granted access",
            f"request access on {place}/{repository}, then set HF_TOKEN or run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return PessaError(f"{repository} has no revision {revision or 'main'}", "give a branch, a tag or a commit")
    if isinstance(error, errors.RepositoryNotFoundError) and status != 401:
        return PessaError(
            f"{repository} is neither a local folder nor a model on {place}",
            "check the name; a private model needs HF_TOKEN",
        )
    if status in (401, 403):
        return PessaError(
            f"{place} denied access to {repository} (status {status}): it is private, or does not exist",
            "check the name; for a private model set HF_TOKEN or run: hf auth login",
        )
    if status is not None:
        return PessaError(f"{place} answered with status {status} for {repository}: {last}", "try again later")
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return PessaError(
            f"the cache {constants.HF_HUB_CACHE} does not hold all files of {repository}, and HF_HUB_OFFLINE is set",
            "run once without HF_HUB_OFFLINE, or give a folder",
        )
    if _transport_error(error) == "ConnectError" or isinstance(error, errors.LocalEntryNotFoundError):
        return PessaError(
            f"cannot reach {place} for {repository}, and the cache does not hold all of its files: {last}",
            "check the connection and HF_ENDPOINT, or give a folder",
        )
    if _transport_error(error):
        return PessaError(
            f"the download of {repository} was interrupted repeatedly: {last}",
            "run again when the connection is better; completed files are kept",
        )
    return PessaError(
        f"could not download {repository}: {last}", f"check the free space and permissions of {constants.HF_HUB_CACHE}"
    )
