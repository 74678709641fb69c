"""What an output takes over from the folder of its source, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from harness import Pessa, TinyFolder, copy_of, edit_json, is_refusal, snapshot
from safetensors.torch import save_file
from tuned import with_tokenizer

from pessa_cli.checkpoint.contents import ADAPTER, COPY, HIDDEN, TRAINING
from pessa_cli.sources.hub import _side_files

MODULES = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
DENSE = "sentence_transformers.models.Dense"


def sentences(folder: Path, weights: str = "model.safetensors") -> Path:
    """Make a model of sentence-transformers with a dense layer of its own from the folder of a BERT."""
    paths = ["", "1_Pooling", "2_Dense"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(zip(paths, [*MODULES, DENSE], strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path, config in (
        ("1_Pooling", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
        ("2_Dense", {"in_features": 32, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}),
    ):
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {"linear.weight": torch.randn(8, 32, generator=generator), "linear.bias": torch.zeros(8)}
    if weights.endswith(".bin"):
        torch.save(tensors, folder / "2_Dense" / weights)
    else:
        save_file(tensors, folder / "2_Dense" / weights, {"format": "pt"})
    return folder


def pickled(folder: Path) -> None:
    torch.save(tiny.load(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture
def model(tiny_folder: TinyFolder, place: Path) -> Path:
    return copy_of(tiny_folder("bert"), place / "model")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["safetensors", "pickled"])
def test_a_dense_layer_behind_the_model(kind: str, weights: str, model: Path, place: Path, pessa: Pessa) -> None:
    name, opening = f"2_Dense/{weights}", ["--allow-pickle"] * (kind == "pickled")
    sentences(model, weights)
    if kind == "pickled":
        pickled(model)
    line = ["prune", model, "-o", place / "out", "--rank", "3", *opening]
    plan = json.loads(pessa(*line, "--dry-run", "--json").out)
    assert name in plan["copied"]
    assert f"{name}  copied" in pessa(*line, "--dry-run").out
    result = pessa(*line, "--json")
    assert result.code == 0, result
    assert json.loads(result.out) == plan
    assert (place / "out" / name).read_bytes() == (model / name).read_bytes()
    manifest = json.loads((place / "out" / "pessa.json").read_text())
    assert manifest["sha256"][name] == manifest["source_sha256"][name] == snapshot(model)[name]
    assert pessa("verify", place / "out").code == 0
    (place / "out" / name).write_bytes(b"")  # negative control
    is_refusal(pessa("verify", place / "out"), name)


@pytest.mark.parametrize(
    "command", ["decompose", "export", "merge", pytest.param("export --to onnx", marks=pytest.mark.slow)]
)
def test_every_command_that_writes_a_model_keeps_it(command: str, model: Path, place: Path, pessa: Pessa) -> None:
    sentences(model)
    source, other = model, []
    if command.startswith("export"):
        source = place / "pruned"
        assert pessa("prune", model, "-o", source, "--rank", "3").code == 0
    if command == "merge":
        from peft import LoraConfig, get_peft_model

        get_peft_model(tiny.load(model), LoraConfig(target_modules=["query"])).save_pretrained(place / "adapter")
        other = [place / "adapter"]
    name, *options = command.split()
    result = pessa(name, source, *other, "-o", place / "out", *options)
    assert result.code == 0, result
    found, before = snapshot(place / "out"), snapshot(model)
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert found[name] == before[name]


def test_a_dense_layer_that_is_missing_is_noticed(model: Path, place: Path, pessa: Pessa) -> None:
    """The folder of a module may be missing where only the files at the top were downloaded."""
    (sentences(model) / "2_Dense" / "model.safetensors").unlink()
    is_refusal(pessa("prune", model, "-o", place / "out"), "2_Dense", DENSE)


def test_a_pruned_model_in_sentence_transformers(tiny_folder: TinyFolder, place: Path, pessa: Pessa) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = sentences(with_tokenizer(tiny_folder("bert"), place / "model"))
    edit_json(lambda config: config.update(architectures=["BertModel"]))(model)
    texts = ["the keeper lit the lamp", "three sails came home"]

    def embedded(folder: Path) -> torch.Tensor:
        model = library.SentenceTransformer(str(folder), device="cpu")
        return torch.from_numpy(model.encode(texts))

    for rank, same in (("8", True), ("3", False)):
        assert pessa("prune", model, "-o", place / f"out{rank}", "--rank", rank).code == 0
        assert embedded(place / f"out{rank}").shape == (2, 8)
        assert torch.allclose(embedded(place / f"out{rank}"), embedded(model), atol=1e-5) == same
    # Without the dense layer the embeddings are those of the transformer.
    modules = json.loads((place / "out8" / "modules.json").read_text())
    (place / "out8" / "modules.json").write_text(json.dumps(modules[:2]))
    assert embedded(place / "out8").shape == (2, 32)


def test_the_hub_gives_all_that_belongs_to_the_model() -> None:
    files = [
        *("config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/config.json"),
        *("2_Dense/model.safetensors", "colbert_linear.pt", "onnx/model.onnx", "onnx/config.json", "optimizer.pt"),
        *("tower/model.safetensors", "tower/config.json", "images/a.png", "docs/notes.txt", "pytorch_model.bin"),
    ]
    assert _side_files(files, ["model.safetensors"]) == [
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "colbert_linear.pt"),
        *("config.json", "modules.json", "tower/config.json", "tower/model.safetensors"),
    ]


def test_heads_beside_pickled_weights(model: Path, place: Path, pessa: Pessa) -> None:
    """As of BGE-M3."""
    pickled(model)
    for name in ("colbert_linear.pt", "sparse_linear.pt"):
        torch.save({"weight": torch.ones(3)}, model / name)
    result = pessa("prune", model, "-o", place / "out", "--rank", "3", "--allow-pickle")
    assert result.code == 0, result
    for name in ("colbert_linear.pt", "sparse_linear.pt"):
        assert (place / "out" / name).read_bytes() == (model / name).read_bytes()


def trained(folder: Path) -> list[str]:
    """Add what Trainer and DeepSpeed leave in a checkpoint; returns the names at the top."""
    for name in ("global_step5/mp_rank_00_model_states.pt", "runs/a/events.out.tfevents.1", "checkpoint-5/config.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("not the model")
    files = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "trainer_state.json"]
    for name in files:
        (folder / name).write_text("not the model")
    return [*files, "global_step5/", "runs/", "checkpoint-5/"]


@pytest.mark.parametrize("kind", ["safetensors", "pickled"])
def test_a_checkpoint_of_a_training_run(kind: str, model: Path, place: Path, pessa: Pessa) -> None:
    state, opening = trained(model), ["--allow-pickle"] * (kind == "pickled")
    (model / "tokenizer.json").write_text("{}")
    (model / ".git").mkdir()
    if kind == "pickled":
        pickled(model)
    line = ["prune", model, "-o", place / "out", "--rank", "3", *opening]
    shown = pessa(*line, "--dry-run")
    if kind == "safetensors":
        plan = json.loads(pessa(*line, "--dry-run", "--json").out)
        assert plan["copied"] == ["tokenizer.json"]
        assert plan["left_out"] == dict.fromkeys(state, TRAINING) | {".git/": HIDDEN}
        assert all(f"{name}  {TRAINING}" in shown.out for name in state)
    result = pessa(*line)
    assert result.code == 0, result
    [told] = [row for row in result.err.splitlines() if TRAINING in row]
    assert f"checkpoint-5/, global_step5/, optimizer.pt, rng_state.pth and 5 more: {TRAINING}" in told
    assert ".git" not in result.err
    out = {path.name for path in (place / "out").iterdir()}
    assert out == {*("config.json", "model.safetensors", "README.md", "pessa.json"), "spectra.safetensors"} | {
        "tokenizer.json"
    }


def test_only_the_state_of_a_training_run_is_no_model(model: Path, pessa: Pessa) -> None:
    (model / "model.safetensors").unlink()
    trained(model)
    is_refusal(pessa("inspect", model), str(model), "training run", "merge-weights")


def test_other_copies_of_the_weights_are_left_out(model: Path, place: Path, pessa: Pessa) -> None:
    for name in ("pytorch_model.bin", "tf_model.h5", "model.onnx", "model-q8.gguf"):
        (model / name).write_text("the model again")
    result = pessa("prune", model, "-o", place / "out", "--rank", "3")
    assert result.code == 0, result
    assert f"model-q8.gguf, model.onnx, pytorch_model.bin, tf_model.h5: {COPY}" in result.err
    assert not [path for path in (place / "out").iterdir() if "again" in path.read_text(errors="ignore")]


def test_weights_that_cannot_be_placed(model: Path, place: Path, pessa: Pessa) -> None:
    (model / "tower").mkdir()
    for name in ("extra.safetensors", "tower/head.pt"):
        (model / name).write_text("of nobody")
    line = ("prune", model, "-o", place / "out", "--rank", "3")
    before = snapshot(place)
    for more in ((), ("--dry-run",)):
        is_refusal(pessa(*line, *more), str(model), "  extra.safetensors", "  tower/head.pt", "--unknown-weights")
    assert snapshot(place) == before
    copied = pessa(*line, "--unknown-weights", "copy")
    assert copied.code == 0, copied
    assert (place / "out" / "extra.safetensors").read_text() == (place / "out/tower/head.pt").read_text() == "of nobody"
    result = pessa(*line[:3], place / "without", *line[4:], "--unknown-weights", "leave-out")
    assert result.code == 0, result
    assert "extra.safetensors, tower/head.pt: unknown weights" in result.err
    assert not (place / "without" / "extra.safetensors").exists()
    assert not (place / "without" / "tower").exists()


def base_logits(folder: Path) -> torch.Tensor:
    from pessa_cli.models.load import load
    from pessa_cli.surgery.model import open_model

    model = load(open_model(folder))
    with torch.no_grad():
        logits: torch.Tensor = model(**tiny.inputs(model)).logits
    return logits


@pytest.mark.parametrize("weights", ["stale", "its own", "none"])
def test_an_adapter_beside_the_weights(weights: str, tiny_folder: TinyFolder, place: Path, pessa: Pessa) -> None:
    """Transformers would add it to the output, or take random numbers for it."""
    from peft import LoraConfig, get_peft_model
    from tuned import disturb

    model = copy_of(tiny_folder("llama"), place / "model")
    adapted = get_peft_model(tiny.load(model), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    disturb(adapted)
    adapted.save_pretrained(model)
    if weights == "stale":
        (model / "adapter_model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    elif weights == "none":
        (model / "adapter_model.safetensors").unlink()
    result = pessa("prune", model, "-o", place / "out", "--rank", "8")
    assert result.code == 0, result
    assert f"adapter_config.json{', adapter_model.safetensors' * (weights != 'none')}: {ADAPTER}" in result.err
    expected = tiny.load(tiny_folder("llama"))
    assert tiny.close(tiny.load(place / "out"), expected, 1e-4)
    # pessa loads the source without its adapter, too; transformers does not.
    assert torch.equal(base_logits(model), base_logits(tiny_folder("llama")))
    assert pessa("verify", model, place / "out").code == (1 if weights == "its own" else 0)
    if weights == "its own":
        assert not tiny.close(tiny.load(model), expected, 1e-4)


def test_an_adapter_alone_is_no_model(tiny_folder: TinyFolder, place: Path, pessa: Pessa) -> None:
    from peft import LoraConfig, get_peft_model

    adapter, base = place / "adapter", tiny_folder("llama")
    model = get_peft_model(tiny.load(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(adapter)
    edit_json(lambda config: config.update(base_model_name_or_path=str(base)), "adapter_config.json")(adapter)
    result = pessa("prune", adapter, "-o", place / "out")
    is_refusal(result, str(adapter), str(base), "pessa merge")
    told = result.err[result.err.index("pessa merge") :].partition(",")[0].split()
    told[told.index("merged")] = str(place / "merged")
    assert pessa(*told[1:]).code == 0
    assert pessa("prune", place / "merged", "-o", place / "out").code == 0


@pytest.mark.parametrize("content", ["[" * 200_000, "[" * 100 + "]" * 100, "[1"], ids=["deep", "deep JSON", "cut off"])
def test_an_unreadable_list_of_modules(content: str, model: Path, place: Path, pessa: Pessa) -> None:
    (model / "modules.json").write_text(content)
    before = snapshot(place)
    is_refusal(pessa("prune", model, "-o", place / "out", "--rank", "3"), "modules.json")
    assert snapshot(place) == before
