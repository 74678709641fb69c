"""Model sources other than a plain folder: hub names with a local hub server, openai-whisper names, .pt, GGUF, pickles.

Commands that use the hub run in a separate process, because huggingface_hub reads its environment once, at import.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from harness import (
    PESSA,
    WEIGHTS,
    Pessa,
    Real,
    Result,
    TinyFolder,
    copy_of,
    edit_weights,
    is_refusal,
    raw_tensors,
    snapshot,
)
from hub_server import Hub, commit, hub
from transformers import LlamaForCausalLM, WhisperForConditionalGeneration
from whisper.model import ModelDimensions, Whisper

from pessa_cli.checkpoint.files import source_name
from pessa_cli.sources.hub import repository_of
from pessa_cli.sources.open import open_source

ID = "openai/whisper-tiny.en"
RULE = ("--ratio", "0.3")


# --- the hub


def ask(server: Hub, place: Path, *arguments: object, **env: str) -> Result:
    """Run the command in a separate process, with this hub and a cache under `place`."""
    command = [str(PESSA), *map(str, arguments)]
    more = {"TMPDIR": str(place / "tmp"), **env}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=server.env(place / "home", **more))
    return Result(done.returncode, done.stdout, done.stderr)


def written(out: Path) -> dict[str, Any]:
    """Return the content of a folder without the name of the source in the manifest and the card."""
    manifest = json.loads((out / "pessa.json").read_text())
    manifest.pop("source")
    assert "attention pruned" in (out / "README.md").read_text()
    return snapshot(out) | {"pessa.json": manifest, "README.md": ""}


@pytest.fixture
def repository(tiny_folder: TinyFolder, place: Path) -> Path:
    """Make a typical repository: the model of `tiny_folder` in several formats, and other files."""
    folder = copy_of(tiny_folder("whisper"), place / "repository")
    for name in ("tokenizer.json", "vocab.json", "preprocessor_config.json", "added_tokens.json"):
        (folder / name).write_text(f'{{"name": "{name}"}}')  # the cache stores files of equal content once
    (folder / "merges.txt").write_text("a b")
    (folder / "onnx").mkdir()
    for name in (
        *("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.fp32-00001-of-00002.safetensors"),
        *("onnx/model.onnx", "onnx/config.json", "model.gguf", ".gitattributes", "README.md", "modeling.py"),
        *("model.safetensors.index.fp32.json", "pytorch_model.bin.index.json", "consolidated.safetensors"),
    ):
        (folder / name).write_text("not needed")
    return folder


NEEDED = [
    *("README.md", "added_tokens.json", "config.json", "generation_config.json", "merges.txt", "model.safetensors"),
    *("preprocessor_config.json", "tokenizer.json", "vocab.json"),
]


@pytest.fixture
def expected(repository: Path, pessa: Pessa, place: Path) -> dict[str, Any]:
    """Return the output of pruning the needed files in a local folder."""
    local = place / "local"
    local.mkdir()
    for name in NEEDED:
        shutil.copy(repository / name, local)
    assert pessa("prune", local, *RULE, "-o", place / "expected").code == 0
    return written(place / "expected")


@pytest.mark.slow
def test_a_hub_name_gives_the_same_output_as_a_folder(repository: Path, expected: dict[str, Any], place: Path) -> None:
    """The repository name, then openai-whisper's name offline, give the same bytes; only needed files are requested."""
    with hub({ID: {"main": repository}}) as server:
        result = ask(server, place, "prune", ID, *RULE, "-o", place / "out", "--json")
        assert result.code == 0, result
        assert json.loads(result.out)["source"] == ID
        assert written(place / "out") == expected
        assert server.fetched == NEEDED
        assert server.tokens == {None}
        server.requests.clear()
        result = ask(server, place, "prune", "tiny.en", *RULE, "-o", place / "again", "--json", HF_HUB_OFFLINE="1")
        assert result.code == 0, result
        assert json.loads(result.out)["source"] == "tiny.en"
        assert written(place / "again") == expected
        assert server.requests == []
    # The hub server is stopped: the files come from the cache.
    result = ask(server, place, "inspect", ID, *RULE)
    assert result.code == 0, result
    assert list((place / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_revision_of_a_sharded_model(tiny_folder: TinyFolder, pessa: Pessa, place: Path) -> None:
    sharded = tiny_folder("whisper", max_shard_size="50KB")
    other = copy_of(sharded, place / "other")
    shard = sorted(path.name for path in other.glob("*.safetensors"))[0]
    edit_weights(lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()], shard)(other)
    shutil.copy(tiny_folder("whisper") / "config.json", other / "model-00001-of-00099.safetensors")
    with hub({"a/b": {"main": sharded, "v2": other}}) as server:
        result = ask(server, place, "prune", "a/b", "--revision", "v2", *RULE, "-o", place / "out")
        assert result.code == 0, result
        assert server.fetched == sorted(path.name for path in sharded.iterdir())
        assert any(commit("a/b", "v2") in path for _, path, _ in server.requests)
        assert not any(commit("a/b", "main") in path for _, path, _ in server.requests)
        is_refusal(ask(server, place, "inspect", "a/b", "--revision", "v3"), "a/b has no revision v3")
    (other / "model-00001-of-00099.safetensors").unlink()
    pessa("prune", other, *RULE, "-o", place / "expected")
    assert written(place / "out") == written(place / "expected")


@pytest.mark.slow
def test_a_slow_hub_that_needs_a_token(repository: Path, expected: dict[str, Any], place: Path) -> None:
    with hub({ID: {"main": repository}}, slow=0.01, token="hf_secret") as server:
        result = ask(server, place, "prune", ID, *RULE, "-o", place / "out", HF_TOKEN="hf_secret")
        assert result.code == 0, result
        assert server.tokens == {"Bearer hf_secret"}
    assert written(place / "out") == expected


@pytest.mark.slow
def test_an_interrupted_download_is_resumed(tiny_folder: TinyFolder, pessa: Pessa, place: Path) -> None:
    model = copy_of(tiny_folder("whisper"), place / "model")
    edit_weights(lambda tensors: tensors.update(ballast=torch.ones(4_000_000)))(model)
    with hub({ID: {"main": model}}, breaks=1, after=12_000_000) as server:
        result = ask(server, place, "prune", "whisper-tiny.en", *RULE, "-o", place / "out")
        assert result.code == 0, result
        ranges = [asked for _, path, asked in server.requests if asked and path.endswith(WEIGHTS)]
        assert [int(asked.removeprefix("bytes=").rstrip("-")) >= 10_000_000 for asked in ranges] == [True]
    pessa("prune", model, *RULE, "-o", place / "expected")
    assert written(place / "out") == written(place / "expected")


@pytest.mark.slow
def test_a_download_that_is_always_interrupted_is_an_error(tiny_folder: TinyFolder, place: Path) -> None:
    with hub({ID: {"main": tiny_folder("whisper")}}, breaks=10**6) as server:
        result = ask(server, place, "prune", ID, *RULE, "-o", place / "out")
    assert result.code == 1
    error, hint = result.err.strip().splitlines()[-2:]
    assert error.startswith(f"error: the download of {ID} was interrupted repeatedly"), result.err
    assert hint.startswith("hint: run again")
    assert not (place / "out").exists()
    assert list((place / "tmp").iterdir()) == []


REFUSALS: dict[str, tuple[dict[str, Any], str, dict[str, str], tuple[str, ...]]] = {
    "no such model": ({}, "openai/nothing", {}, ("openai/nothing is neither a local folder nor a model on",)),
    "no token": ({"token": "hf_secret"}, ID, {}, (f"denied access to {ID} (status 401)", "HF_TOKEN")),
    "wrong token": ({"token": "hf_secret"}, ID, {"HF_TOKEN": "hf_other"}, (f"denied access to {ID} (status 401)",)),
    "gated": ({"gated": True}, ID, {}, (f"{ID} is gated", "request access on")),
    "offline": ({}, "tiny.en", {"HF_HUB_OFFLINE": "1"}, (f"does not hold all files of {ID}", "HF_HUB_OFFLINE")),
    "out of reach": ({}, "tiny.en", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ("cannot reach http://127.0.0.1:9", ID)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS)
def test_errors_of_the_hub_are_explained(case: str, tiny_folder: TinyFolder, place: Path) -> None:
    options, name, env, says = REFUSALS[case]
    with hub({ID: {"main": tiny_folder("whisper")}}, **options) as server:
        result = ask(server, place, "inspect", name, **env)
    lines = result.err.strip().splitlines()
    while lines and not lines[0].startswith("error: "):  # a progress bar of huggingface_hub
        lines.pop(0)
    is_refusal(Result(result.code, result.out, "\n".join(lines)), *says)


def test_names() -> None:
    assert repository_of("tiny.en") == ID
    assert repository_of("whisper-large-v3") == repository_of("large") == "openai/whisper-large-v3"
    assert repository_of("turbo") == repository_of("large-v3-turbo") == "openai/whisper-large-v3-turbo"
    assert repository_of("large-v1") == "openai/whisper-large"
    assert repository_of("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert [repository_of(name) for name in ("tiny-en", "a/b/c", "/a/b", "./a", "../a", "a/", "~/a", "")] == [None] * 8


def test_every_name_of_openai_whisper_is_known() -> None:
    import whisper

    assert {repository_of(name) is None for name in whisper.available_models()} == {False}


def test_names_that_are_not_hub_names(pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    is_refusal(pessa("inspect", "whisper-large"), "whisper-large can mean two models", "large-v3", code=2)
    is_refusal(pessa("inspect", "nonsense"), "nonsense does not exist", "owner/name")
    is_refusal(pessa("inspect", tiny_folder("bert"), "--revision", "x"), "--revision is for models on the hub", code=2)
    assert source_name(place / "models--openai--whisper-tiny.en" / "snapshots" / "0123") == ID
    assert source_name(place / "mine") == "mine"


def test_a_folder_takes_precedence_over_a_name(
    pessa: Pessa, tiny_folder: TinyFolder, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(tiny_folder("whisper"), place / "tiny.en")
    monkeypatch.chdir(place)
    assert pessa("inspect", "tiny.en").code == 0


# --- pickled weights


class Code:
    """An object that runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


def pickled(folder: Path, shards: int = 1) -> Path:
    """Save the folder's weights as older transformers did, with tied tensors under both names."""
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    state = model.state_dict()
    assert state["proj_out.weight"].data_ptr() == state["model.decoder.embed_tokens.weight"].data_ptr()
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}-of-{shards}.bin" for i in range(shards)]
    for place, file in enumerate(files):
        torch.save({name: state[name] for name in names[place::shards]}, folder / file)
    if shards > 1:
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_converted_with_allow_pickle(
    shards: int, pessa: Pessa, tiny_folder: TinyFolder, place: Path
) -> None:
    model = pickled(copy_of(tiny_folder("whisper"), place / "model"), shards)
    before = snapshot(model)
    hint = ("--allow-pickle",)
    is_refusal(pessa("prune", model, *RULE, "-o", place / "out"), f"{model} holds pickled weights only", *hint)
    assert not (place / "out").exists()
    assert pessa("prune", model, *RULE, "-o", place / "out", "--allow-pickle", "--layout", "dense").code == 0
    assert pessa("prune", tiny_folder("whisper"), *RULE, "-o", place / "expected", "--layout", "dense").code == 0
    if shards == 1:
        ours, theirs = raw_tensors(place / "out"), raw_tensors(place / "expected")
        assert ours.pop("proj_out.weight") == theirs["model.decoder.embed_tokens.weight"]
        assert ours == theirs
    assert pessa("prune", model, "--rank", "8", "-o", place / "whole", "--allow-pickle").code == 0
    assert pessa("verify", model, place / "whole", "--allow-pickle").code == 0
    assert snapshot(model) == before
    assert list((place / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_hub_model_with_pickles(tiny_folder: TinyFolder, place: Path) -> None:
    model = pickled(copy_of(tiny_folder("whisper"), place / "model"))
    with hub({"a/b": {"main": model}}) as server:
        is_refusal(ask(server, place, "inspect", "a/b"), "a/b holds pickled weights only", "--allow-pickle")
        assert server.fetched == []
        assert ask(server, place, "inspect", "a/b", "--allow-pickle").code == 0
        assert server.fetched == ["config.json", "generation_config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_cannot_run_code(where: str, zipped: bool, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    model = copy_of(tiny_folder("whisper"), place / "model")
    (model / WEIGHTS).unlink()
    if zipped:
        torch.save({"weight": torch.ones(2), "code": Code(place / "ran")}, model / where)
    else:
        (model / where).write_bytes(pickle.dumps({"code": Code(place / "ran")}, protocol=2))
    pickle.loads(pickle.dumps(Code(place / "ran")))
    assert (place / "ran").exists()  # the control: the pickle does run its command
    (place / "ran").unlink()
    before = snapshot(place)
    source = model if where.endswith(".bin") else model / where
    says = (str(model / where), "wants to run code", "posix.system")
    is_refusal(pessa("prune", source, "-o", place / "out", "--allow-pickle"), *says)
    assert snapshot(place) == before


BAD_PICKLES: dict[str, tuple[object, tuple[str, ...]]] = {
    "a list": ([1, 2], ("holds a list",)),
    "numbers": ({"a": 1, "b": torch.ones(2)}, ("a: a int",)),
    "sparse": ({"a": torch.eye(3).to_sparse()}, ("a: torch.float32, torch.sparse_coo",)),
    "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, ("a: torch.complex64",)),
    "nothing": ({}, ("holds no tensors",)),
    "endless": ({"a": torch.ones(1).expand(10**13)}, ("a: shape (10000000000000,) but only 4 bytes",)),
    "garbage": (b"garbage", ("not a readable file of torch.save",)),
    "empty": (b"", ("not a readable file of torch.save",)),
    "half a zip": (None, ("not a readable file of torch.save",)),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_a_bad_pickle_is_refused(case: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    content, says = BAD_PICKLES[case]
    model = copy_of(tiny_folder("whisper"), place / "model")
    (model / WEIGHTS).unlink()
    file = model / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({"a": torch.ones(100)} if content is None else content, file)
        if content is None:
            file.write_bytes(file.read_bytes()[:-300])
    before = snapshot(place)
    result = pessa("prune", model, "-o", place / "out", "--allow-pickle")
    is_refusal(result, str(file), *says)
    assert "weights_only" not in result.err  # torch's message advises to switch the protection off
    assert snapshot(place) == before


# --- openai-whisper's files


def openai_model(**changes: int) -> Whisper:
    torch.manual_seed(0)
    dims: dict[str, int] = {"n_mels": 80, "n_vocab": 51864}
    dims |= {"n_audio_ctx": 50, "n_audio_state": 24, "n_audio_head": 3, "n_audio_layer": 2}
    dims |= {"n_text_ctx": 20, "n_text_state": 24, "n_text_head": 3, "n_text_layer": 3}
    model = Whisper(ModelDimensions(**(dims | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.4 if "attn" in name else 0.1)
    return model.eval()


def save_openai(model: Whisper, path: Path) -> Path:
    torch.save({"dims": vars(model.dims), "model_state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def openai_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_openai(openai_model(), tmp_path_factory.mktemp("openai") / "mine.pt")


@pytest.mark.slow
def test_an_openai_file_is_the_same_model(openai_file: Path, pessa: Pessa, place: Path) -> None:
    model = openai_model()
    assert pessa("prune", openai_file, "--lossless", "-o", place / "out", "--layout", "dense").code == 0
    mel, tokens = torch.randn(2, 80, 100), torch.randint(0, 51864, (2, 7))
    with open_source(str(openai_file)) as folder, torch.no_grad():
        expected = model(mel, tokens)
        for converted, limit in ((folder, 1e-5), (place / "out", 1e-4)):
            loaded = WhisperForConditionalGeneration.from_pretrained(converted).eval()
            logits = loaded(input_features=mel, decoder_input_ids=tokens).logits
            assert (logits - expected).norm() / expected.norm() < limit
        stored = {data for _, _, data in raw_tensors(folder).values()}
        assert stored == {tensor.numpy().tobytes() for tensor in model.state_dict().values()}
        assert (folder / WEIGHTS).stat().st_mtime_ns == openai_file.stat().st_mtime_ns  # for --resume
    assert list((place / "tmp").iterdir()) == []


def test_the_real_tiny_en_as_an_openai_file(real: Real, place: Path) -> None:
    """A round trip keeps the weights bit for bit, and the config, merges, suppressed tokens and alignment heads."""
    from safetensors.torch import load_file

    source = real("whisper-tiny.en")
    ours = load_file(source / WEIGHTS)
    dims = {"n_mels": 80, "n_vocab": 51864, "n_audio_ctx": 1500, "n_text_ctx": 448}
    for side in ("audio", "text"):
        dims |= {f"n_{side}_state": 384, f"n_{side}_head": 6, f"n_{side}_layer": 4}
    path = place / "tiny.en.pt"
    torch.save({"dims": dims, "model_state_dict": {openai_name(name): tensor for name, tensor in ours.items()}}, path)
    with open_source(str(path)) as folder:
        assert raw_tensors(folder) == raw_tensors(source)
        for file in ("config.json", "generation_config.json", "preprocessor_config.json"):
            assert json.loads((folder / file).read_text()) == json.loads((source / file).read_text())
        merges = [json.loads((f / "tokenizer.json").read_text())["model"]["merges"] for f in (folder, source)]
        assert merges[0] == merges[1]
        assert len(merges[0]) == 50_000
        from transformers import AutoTokenizer

        text = "Ever tried? 1,234 Häuser… 日本 <|notimestamps|>"
        ids = [AutoTokenizer.from_pretrained(f)(text).input_ids for f in (folder, source)]
        assert ids[0] == ids[1]


def openai_name(name: str) -> str:
    """Return openai-whisper's name for a Hugging Face tensor, from a separate list of the differences."""
    for ours, theirs in (
        *(("model.", ""), ("layers", "blocks"), ("fc1", "mlp.0"), ("fc2", "mlp.2"), ("final_layer_norm", "mlp_ln")),
        *((".self_attn.q_proj", ".attn.query"), (".self_attn.k_proj", ".attn.key")),
        *((".self_attn.v_proj", ".attn.value"), (".self_attn.out_proj", ".attn.out"), ("self_attn_", "attn_")),
        *((".encoder_attn.q_proj", ".cross_attn.query"), (".encoder_attn.k_proj", ".cross_attn.key")),
        *((".encoder_attn.v_proj", ".cross_attn.value"), (".encoder_attn.out_proj", ".cross_attn.out")),
        *(("encoder_attn_", "cross_attn_"), ("attn_layer_norm", "attn_ln"), ("decoder.layer_norm.", "decoder.ln.")),
        *(("encoder.layer_norm.", "encoder.ln_post."), ("embed_tokens", "token_embedding")),
        ("embed_positions.weight", "positional_embedding"),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.mark.slow
@pytest.mark.parametrize(("size", "languages"), [(51865, 99), (51866, 100)])
def test_a_multilingual_openai_file(size: int, languages: int, place: Path) -> None:
    """A model with the sizes of `tiny` gets its alignment heads; a model of other widths gets none."""
    sizes = {"n_text_layer": 4, "n_audio_layer": 4, "n_text_state": 384, "n_audio_state": 384}
    known = size == 51865
    more = {**sizes, "n_text_head": 6, "n_audio_head": 6} if known else {"n_mels": 128}
    path = save_openai(openai_model(n_vocab=size, **more), place / "m.pt")
    with open_source(str(path)) as folder:
        generation = json.loads((folder / "generation_config.json").read_text())
        assert len(generation["lang_to_id"]) == languages
        assert generation["no_timestamps_token_id"] == size - 1502
        tiny_heads = [[2, 2], [3, 0], [3, 2], [3, 3], [3, 4], [3, 5]]
        assert generation.get("alignment_heads") == (tiny_heads if known else None)
        from transformers import AutoTokenizer

        assert len(AutoTokenizer.from_pretrained(folder)) == size


Change = Callable[[dict[str, Any]], object]
BAD_OPENAI: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no dims": (lambda c: c.pop("dims"), ("no dims and model_state_dict",)),
    "dims a list": (lambda c: c.update(dims=[]), ("no dims and model_state_dict",)),
    "a dim missing": (lambda c: c["dims"].pop("n_text_head"), ("n_text_head: None",)),
    "a dim as text": (lambda c: c["dims"].update(n_mels="80"), ("n_mels: '80'",)),
    "no heads": (lambda c: c["dims"].update(n_text_head=0), ("n_text_head: 0",)),
    "heads that do not divide": (lambda c: c["dims"].update(n_text_head=7), ("3 text layers of 7 heads",)),
    "endless layers": (lambda c: c["dims"].update(n_audio_layer=10**12), ("audio layers of 3 heads",)),
    "other layers": (lambda c: c["dims"].update(n_text_layer=2), ("decoder.blocks.2.attn.key.weight: not part",)),
    "other width": (lambda c: c["dims"].update(n_mels=128), ("encoder.conv1.weight: shape", "(24, 128, 3)")),
    "another vocabulary": (
        lambda c: cut_vocabulary(c, 100),
        ("has 100 tokens, but openai-whisper has no vocabulary of that size",),
    ),
    "a tensor missing": (lambda c: c["model_state_dict"].pop("decoder.ln.bias"), ("decoder.ln.bias: missing",)),
    "a tensor too many": (lambda c: c["model_state_dict"].update(x=torch.ones(1)), ("x: not part of a Whisper",)),
    "no tensor": (lambda c: c["model_state_dict"].update({"decoder.ln.bias": 3}), ("decoder.ln.bias: a int",)),
    "not finite": (
        lambda c: c["model_state_dict"]["decoder.blocks.1.cross_attn.out.weight"].fill_(torch.nan),
        ("model.decoder.layers.1.encoder_attn.out_proj.weight",),
    ),
}


def cut_vocabulary(checkpoint: dict[str, Any], size: int) -> None:
    checkpoint["dims"]["n_vocab"] = size
    state, name = checkpoint["model_state_dict"], "decoder.token_embedding.weight"
    state[name] = state[name][:size].clone()


@pytest.mark.parametrize("case", BAD_OPENAI)
def test_a_bad_openai_file_is_refused(case: str, openai_file: Path, pessa: Pessa, place: Path) -> None:
    change, says = BAD_OPENAI[case]
    checkpoint = torch.load(openai_file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, place / "m.pt")
    before = snapshot(place)
    is_refusal(pessa("prune", place / "m.pt", "-o", place / "out"), "m.pt", *says)
    assert snapshot(place) == before


def test_without_openai_whisper_the_error_names_the_extra(
    openai_file: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "whisper.tokenizer", None)
    is_refusal(pessa("inspect", openai_file), str(openai_file), "openai-whisper", "pip install 'pessa[whisper]'")


# --- GGUF


Type = gguf.GGMLQuantizationType


def gguf_names(layers: int) -> Iterator[tuple[str, str, str]]:
    """Yield llama.cpp's name, Hugging Face's name, and the config key of the heads if llama.cpp permutes their rows."""
    yield from (("token_embd", "model.embed_tokens", ""), ("output_norm", "model.norm", ""), ("output", "lm_head", ""))
    for i in range(layers):
        for theirs, ours, heads in (
            *(("attn_q", "self_attn.q_proj", "num_attention_heads"), ("attn_output", "self_attn.o_proj", "")),
            *(("attn_k", "self_attn.k_proj", "num_key_value_heads"), ("attn_v", "self_attn.v_proj", "")),
            *(("ffn_gate", "mlp.gate_proj", ""), ("ffn_up", "mlp.up_proj", ""), ("ffn_down", "mlp.down_proj", "")),
            *(("attn_norm", "input_layernorm", ""), ("ffn_norm", "post_attention_layernorm", "")),
        ):
            yield f"blk.{i}.{theirs}", f"model.layers.{i}.{ours}", heads


def write_gguf(path: Path, kind: Any = Type.F32, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """Write the tiny LLaMA as llama.cpp stores it; returns its tensors after quantisation and dequantisation."""
    model = tiny.build("llama")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(code) for code in range(0x21, 0x7B)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab", "cd", "ef", "gh", "ij", "kl", "mn"])
    writer.add_token_types([3] * 3 + [1] * 97)
    writer.add_token_merges(["a b", "c d", "e f", "g h", "i j", "k l", "m n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    stored: dict[str, torch.Tensor] = {}
    for theirs, ours, key in gguf_names(config.num_hidden_layers):
        tensor = state[f"{ours}.weight"]
        heads, shape = getattr(config, key) if key else 1, tensor.shape
        split = (heads, 2, shape[0] // heads // 2, *shape[1:])
        array = tensor.reshape(split).transpose(1, 2).reshape(shape).contiguous() if key else tensor
        as_kind = kind if array.ndim == 2 and shape[1] % 32 == 0 else Type.F32
        data = gguf.quants.quantize(array.numpy(), as_kind)
        writer.add_tensor(f"{theirs}.weight", data, raw_dtype=as_kind)
        back = torch.from_numpy(np.array(gguf.quants.dequantize(data, as_kind), dtype=np.float32)).reshape(shape)
        joined = (heads, shape[0] // heads // 2, 2, *shape[1:])
        stored[f"{ours}.weight"] = back.reshape(joined).transpose(1, 2).reshape(shape) if key else back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0], ids=lambda kind: str(kind.name))
def test_a_gguf_file(kind: Any, pessa: Pessa, place: Path) -> None:
    stored = write_gguf(place / "m.gguf", kind)
    reference = tiny.build("llama")
    with open_source(str(place / "m.gguf")) as folder:
        found = raw_tensors(folder)
        assert {name: data for name, (_, _, data) in found.items()} == {
            name: tensor.contiguous().numpy().tobytes() for name, tensor in stored.items()
        }
        loaded = LlamaForCausalLM.from_pretrained(folder).eval()
    reference.load_state_dict(stored)
    sample = tiny.inputs(reference)
    with torch.no_grad():
        assert torch.allclose(loaded(**sample).logits, reference(**sample).logits, rtol=1e-4, atol=1e-4)
    if kind == Type.Q8_0:
        assert pessa("prune", place / "m.gguf", *RULE, "-o", place / "out").code == 0
        assert (place / "out" / "tokenizer.json").exists()
    assert list((place / "tmp").iterdir()) == []


def test_bad_gguf_files_are_refused(pessa: Pessa, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(place / "m.gguf", architecture="mamba")
    is_refusal(pessa("inspect", place / "m.gguf"), "GGUF architecture 'mamba'; supported: llama")
    write_gguf(place / "m.gguf")
    content = (place / "m.gguf").read_bytes()
    for size in (4, 30, 2000, len(content) - 1000):
        (place / "m.gguf").write_bytes(content[:size])
        is_refusal(pessa("inspect", place / "m.gguf"), f"{place / 'm.gguf'} is not a readable GGUF file", "download")
    (place / "m.gguf").write_bytes(content)
    monkeypatch.setitem(sys.modules, "gguf", None)
    is_refusal(pessa("inspect", place / "m.gguf"), "needs gguf, which is not installed", "pip install 'pessa[gguf]'")
    (place / "notes.txt").write_text("hello")
    is_refusal(pessa("inspect", place / "notes.txt"), f"{place / 'notes.txt'} is a file, not a folder")
