"""PESSA as a PEFT tuner: compared with an explicitly reparametrised model, and in every operation of PEFT."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import TinyFolder
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pessa_cli.blocks.compact_format import Ragged
from pessa_cli.runtime.buckets import get_backend, set_backend
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut
from pessa_cli.tuning.peft_plugin import register_all
from pessa_cli.tuning.tuner_base import base_weights
from pessa_cli.tuning.tuner_pessa import PessaLayer, PessaTunerConfig


def adapted(base: nn.Module, **options: Any) -> Any:
    """A copy of the model with an adapter that changes it."""
    torch.manual_seed(0)
    options.setdefault("init_weights", False)
    return get_peft_model(copy.deepcopy(base), PessaTunerConfig(**options)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**as_dtype(tiny.inputs(model), model)).logits
    return result


def as_dtype(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def layers(model: nn.Module) -> Iterator[tuple[str, PessaLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, PessaLayer):
            yield name.removeprefix("base_model.model."), module


# --- the reparametrised model ---


def rows_of(base: nn.Module, name: str) -> Tensor:
    """A projection's weight with its bias as one more input: (rows, in + 1)."""
    weight, bias = base_weights(base.get_submodule(name))
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)


def reparametrised(base: nn.Module, model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters of the base with every product as U S' V^T or every factor as Q R', and all S' and R' by module.

    They are computed from dense products, independently of the tuner except for the signs of singular vectors.
    """
    parameters: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}

    def put(name: str, rows: Tensor) -> None:
        module: Any = base.get_submodule(name)
        width = module.weight.shape[1]
        parameters[f"{name}.weight"] = rows[:, :width]
        if module.bias is not None:
            parameters[f"{name}.bias"] = rows[:, width] if rows.shape[1] > width else torch.zeros_like(module.bias)

    for name, layer in layers(model):
        scope, _, leaf = name.rpartition(".")
        heads, d = layer.pessa_shape["default"]
        key = leaf in ("k_proj", "key") and model.config.model_type != "llama"
        own = (base_weights(base.get_submodule(name))[0] if key else rows_of(base, name)).reshape(heads, d, -1).mT
        entries = layer.pessa_entries["default"]
        entries = torch.arange(heads * d * d) if entries is None else entries
        delta = torch.zeros(heads * d * d, dtype=own.dtype)
        delta[entries] = layer.pessa_delta["default"].detach()
        delta = delta.view(heads, d, d)
        left = layer.pessa_left["default"]
        if "default" not in layer.pessa_right:
            q, r = torch.linalg.qr(own)
            signs = r.diagonal(dim1=-2, dim2=-1).sign()
            q, r = q * signs.unsqueeze(-2), r * signs.unsqueeze(-1)
            trained[name] = (r + delta).requires_grad_()
            put(name, (q @ trained[name]).mT.reshape(heads * d, -1))
            continue
        if key:
            other_name = f"{scope}.{'query' if leaf == 'key' else 'q_proj'}"
            other = rows_of(base, other_name).reshape(heads, d, -1).mT
        elif leaf == "value":
            other_name = f"{scope.removesuffix('.self')}.output.dense"
            other = base_weights(base.get_submodule(other_name))[0].mT.reshape(heads, d, -1).mT
        else:
            other_name = f"{scope}.{'o_proj' if model.config.model_type == 'llama' else 'out_proj'}"
            columns = base_weights(base.get_submodule(other_name))[0].mT  # (query heads * d, width)
            group = len(columns) // (heads * d)
            other = columns.reshape(heads, group, d, -1).transpose(2, 3).reshape(heads, -1, d)
        u, s, vh = (
            part[..., :d] if i < 2 else part[..., :d, :] for i, part in enumerate(torch.linalg.svd(own @ other.mT))
        )
        signs = (u * (own @ left)).sum(-2).sign()  # singular vectors are unique up to their signs
        u, vh = u * signs.unsqueeze(-2), vh * signs.unsqueeze(-1)
        trained[name] = (torch.diag_embed(s) + delta).requires_grad_()
        product = trained[name] @ vh  # (heads, d, rows of the other factor)
        put(name, u.mT.reshape(heads * d, -1))
        if key:
            put(other_name, product.reshape(heads * d, -1))
        else:
            o: Any = base.get_submodule(other_name)
            parts = product.reshape(heads, d, -1, o.out_features).transpose(1, 2)  # (heads, group, d, out)
            parameters[f"{other_name}.weight"] = parts.reshape(-1, o.out_features).mT
    return parameters, trained


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("forms", [{}, {"form": "banded", "bandwidth": 2, "qk": "full"}, {"form": "diagonal"}])
def test_equals_the_reparametrised_model(name: str, forms: dict[str, Any]) -> None:
    base = tiny.build(name).double()
    model = adapted(base, **forms)
    parameters, trained = reparametrised(base, model)
    inputs = as_dtype(tiny.inputs(base), base)
    ours = model(**inputs).logits
    theirs = torch.func.functional_call(base, parameters, kwargs=inputs).logits
    assert (ours - theirs).abs().max() < 1e-10
    assert (ours - logits(base)).abs().max() > 1e-2, "the adapter does nothing"
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(2))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for module, layer in layers(model):
        entries = layer.pessa_entries["default"]
        expected = trained[module].grad
        assert expected is not None
        expected = expected.flatten() if entries is None else expected.flatten()[entries]
        found = layer.pessa_delta["default"].grad
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max(), module


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_a_transposed_matrix_changes_the_output(name: str) -> None:
    """Negative control of the test above: the outputs detect a transposed S' or R'."""
    base = tiny.build(name).double()
    model = adapted(base, qk="full")
    for _, layer in layers(model):
        heads, d = layer.pessa_shape["default"]
        parameter = layer.pessa_delta["default"]
        right = parameter.detach().clone()
        parameter.data = right.view(heads, d, d).mT.reshape(-1)
        wrong = logits(model)
        parameter.data = right
        assert (wrong - logits(model)).abs().max() > 1e-4


# --- exactness ---


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_disable_merge_and_unmerge(name: str, dtype: torch.dtype) -> None:
    base = tiny.build(name).to(dtype)
    reference = logits(base)
    assert torch.equal(logits(adapted(base, init_weights=True)), reference)
    model = adapted(base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    changed = logits(model)
    assert not torch.equal(changed, reference)
    assert {p.dtype for _, layer in layers(model) for p in layer.pessa_delta.values()} == {torch.float32}
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
    model.merge_adapter(safe_merge=True)
    near = 1e-5 if dtype == torch.float32 else 0.1
    assert (logits(model) - changed).float().norm() < near * changed.float().norm()
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(model.unload()), reference)


def test_a_merged_model_has_no_pessa_modules(tmp_path: Path) -> None:
    base = tiny.build("llama")
    model = adapted(base)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, PessaLayer) for module in merged.modules())
    merged.save_pretrained(tmp_path)
    assert (logits(tiny.load(tmp_path)) - expected).abs().max() < 1e-5


def test_a_broken_adapter_is_not_merged() -> None:
    model = adapted(tiny.build("llama"))
    layer = next(iter(layers(model)))[1]
    layer.pessa_delta["default"].data[0] = torch.nan
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


def test_zero_directions_keep_gradients_finite() -> None:
    """A head of zeros and a head of less than full rank, as in a dense pruned model."""
    base = tiny.build("whisper")
    attention = base.model.encoder.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight[:8] = 0
        attention.v_proj.bias[:8] = 0
        attention.v_proj.weight[8 + 5 : 16] = 0
        attention.v_proj.bias[8 + 5 : 16] = 0
    model = adapted(base, init_weights=True)
    assert torch.equal(logits(model), logits(base))
    model.train()
    model(**tiny.inputs(base), labels=torch.ones(2, 9, dtype=torch.long)).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)
    assert (logits(adapted(base)) - logits(base)).abs().max() < 100


# --- several adapters ---


def test_several_adapters_are_switched_mixed_merged_and_deleted() -> None:
    base = tiny.build("llama")
    model = adapted(base)
    first = logits(model)
    torch.manual_seed(1)
    model.add_adapter("other", PessaTunerConfig(init_weights=False, form="diagonal"))
    assert torch.equal(logits(model), first), "adding one must not activate it"
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "other" in name]
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    mixed = tiny.inputs(base, batch=3)
    with torch.no_grad():
        batch = model(**mixed, adapter_names=["default", "__base__", "other"]).logits
        for i, name in enumerate(("default", None, "other")):
            if name is not None:
                model.set_adapter(name)
            reference = (model if name else base)(**mixed).logits
            assert (batch[i] - reference[i]).abs().max() < 1e-5
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter()
    assert (logits(model) - both).abs().max() < 1e-5
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    for _, layer in layers(model):
        assert not [name for name in layer.state_dict() if "other" in name]
        assert not [name for name in layer.setting_names if "other" in getattr(layer, name)]


def test_an_adapter_added_while_another_is_merged_starts_from_the_base() -> None:
    base = tiny.build("whisper")
    model = adapted(base, form="diagonal")
    model.merge_adapter()
    torch.manual_seed(5)
    model.add_adapter("late", PessaTunerConfig(init_weights=False))
    model.unmerge_adapter()
    model.set_adapter("late")
    torch.manual_seed(5)
    alone = get_peft_model(copy.deepcopy(base), PessaTunerConfig(init_weights=False)).eval()
    assert torch.equal(logits(model), logits(alone))


# --- files ---


RELOAD = """
import sys
import torch
torch.set_num_threads(1)
import tiny
from peft import PeftConfig, PeftModel
folder = sys.argv[1]
try:
    PeftConfig.from_pretrained(folder)
except KeyError as error:
    unprepared = error.args
import pessa_cli  # here after peft
svd = torch.linalg.svd
def flipped(*args, **kwargs):
    u, s, vh = svd(*args, **kwargs)
    return -u, s, -vh
logits = {}
for lean in (True, False):
    base = tiny.build("whisper")
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=lean).eval()
    with torch.no_grad():
        logits[lean] = model(**tiny.inputs(base)).logits
    torch.linalg.svd = flipped  # what another machine's LAPACK may do
torch.save({"unprepared": unprepared, "logits": logits}, folder + "/result.pt")
"""


@pytest.mark.slow
def test_reloads_in_a_new_process_to_the_same_bits(tmp_path: Path) -> None:
    """Without pessa_cli PEFT raises an error with the method's name, and the config file says what to import."""
    model = adapted(tiny.build("whisper"))
    model.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, cwd=Path(__file__).parents[1] / "helpers")
    result = torch.load(tmp_path / "result.pt")
    assert all(torch.equal(reloaded, logits(model)) for reloaded in result["logits"].values())
    assert result["unprepared"] == ("PESSA",)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["requires"]) == ("PESSA", "import pessa_cli")


def test_the_trained_entries_depend_on_the_signs_of_the_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: the trained entries alone give another model with other signs."""
    base = tiny.build("whisper")
    model = adapted(base)
    svd = torch.linalg.svd

    def flipped(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = svd(*args)
        signs = torch.tensor([1.0, -1.0] * 4, dtype=u.dtype)
        return u * signs, s, vh * signs.unsqueeze(-1)

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    other = get_peft_model(copy.deepcopy(base), PessaTunerConfig()).eval()
    trained = {key: value for key, value in get_peft_model_state_dict(model).items() if "delta" in key}
    names = {key.replace("pessa_delta", "pessa_delta.default"): value for key, value in trained.items()}
    assert not other.load_state_dict(names, strict=False).unexpected_keys
    assert (logits(other) - logits(model)).abs().max() > 1e-2


def test_registering_again_changes_nothing() -> None:
    before = list(PeftType)
    register_all()
    assert list(PeftType) == before
    assert PeftType("PESSA") is PeftType.PESSA is copy.deepcopy(PeftType.PESSA)


def test_transformers_loads_and_adds_it(tmp_path: Path) -> None:
    base = tiny.build("llama")
    model = adapted(base)
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(base))
    added = copy.deepcopy(base)
    added.add_adapter(PessaTunerConfig())
    assert torch.equal(logits(added), logits(base))


# --- training ---


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(5, 90, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(folder: Path, steps: int, resume: bool = False, **options: Any) -> tuple[Any, list[float]]:
    model = adapted(tiny.build("llama"), init_weights=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=resume)
    return model.eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_trainer_resumes_and_checkpoints_gradients(tmp_path: Path) -> None:
    whole, losses = train(tmp_path / "whole", 6)
    assert losses[-1] < losses[0]
    train(tmp_path / "parts", 3)
    resumed, again = train(tmp_path / "parts", 6, resume=True)
    assert again == losses
    assert torch.equal(logits(resumed), logits(whole))
    thrifty, same = train(tmp_path / "thrifty", 6, gradient_checkpointing=True)
    assert same == losses
    assert torch.equal(logits(thrifty), logits(whole))


def test_autocast() -> None:
    """T - I is computed in float32 under autocast, so that small trained changes are not rounded to zero."""
    base = tiny.build("llama")
    model = adapted(base, init_weights=True).train()
    inputs = tiny.inputs(base)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(**inputs).logits
        assert torch.equal(result, base(**inputs).logits)
        for _, layer in layers(model):
            assert layer.transform("default").dtype == torch.float32
    result.float().square().mean().backward()
    rounded = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad - rounded[name]).norm() < 0.1 * p.grad.norm(), name


# --- pruned models ---


@pytest.fixture
def full_slots() -> Iterator[None]:
    """Use the attention backend of models with adapters for all models, as other kernels round differently."""
    before = get_backend()
    set_backend("scatter")
    yield
    set_backend(before)


@pytest.mark.usefixtures("full_slots")
@pytest.mark.parametrize("name", ["whisper", "llama", "bert"])
def test_a_pruned_model_trains_its_kept_directions(name: str, pruned: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny.load(pruned(name))
    reference = logits(base)
    assert torch.equal(logits(adapted(base, init_weights=True)), reference)
    model = adapted(base)
    expected = logits(model)
    assert not torch.allclose(expected, reference)
    for module, layer in layers(model):
        ragged = layer.get_base_layer()
        if isinstance(ragged, RaggedOut):
            squares = sum(rank * rank for rank in ragged.ragged.ranks)
            assert layer.pessa_delta["default"].numel() == squares, module
    dense = tiny.load(pruned(name, "dense"))
    assert (reference - logits(dense)).abs().max() < 1e-4, "both layouts are the same function"
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.load(pruned(name)), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(tiny.load(tmp_path / "merged")), logits(merged))


def test_a_block_without_any_direction() -> None:
    base = tiny.build("whisper")
    attention = base.model.encoder.layers[0].self_attn
    attention.v_proj = RaggedOut(attention.v_proj, Ragged("rows", 8, (0, 0, 0, 0)))
    attention.out_proj = RaggedIn(attention.out_proj, Ragged("columns", 8, (0, 0, 0, 0)))
    model = adapted(base, target_modules=["encoder.layers.0.self_attn.v_proj"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 0
    assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model.merge_and_unload()), logits(base))


def test_only_kept_directions_change(pruned: Callable[..., Path]) -> None:
    """The slots of dropped directions stay zero with an adapter."""
    model = adapted(tiny.load(pruned("whisper")))
    name, layer = next((n, m) for n, m in layers(model) if isinstance(m.get_base_layer(), RaggedOut))
    base: Any = layer.get_base_layer()
    x = torch.randn(2, 5, base.in_features)
    ragged = base.ragged
    with torch.no_grad():
        heads = layer(x).unflatten(-1, (len(ragged.ranks), ragged.head_dim))
    for head, rank in enumerate(ragged.ranks):
        assert bool((heads[..., head, rank:] == 0).all()), name


# --- which modules, how many parameters ---


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ("llama-2-7b", {"qk": "full"}, 50_331_648),
        ("llama-3.2-3b", {"qk": "full"}, 18_350_080),
        ("llama-3.2-3b", {}, 11_067_392),
    ],
)
def test_counts_of_the_papers(shape: str, options: dict[str, Any], expected: int) -> None:
    """The numbers of trained parameters in the paper and its code: for LLaMA-2-7B with q, k and v, 0.74%."""
    sizes = {
        "llama-2-7b": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        "llama-3.2-3b": {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    }
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**sizes[shape]))
    trainable, total = get_peft_model(base, PessaTunerConfig(**options)).get_nb_trainable_parameters()
    assert trainable == expected
    if shape == "llama-2-7b":
        assert f"{trainable / total:.2%}" == "0.74%"


def test_default_targets() -> None:
    names = {name: {n.rpartition(".")[2] for n, _ in layers(adapted(tiny.build(name)))} for name in tiny.NAMES}
    assert names["whisper"] == {"k_proj", "v_proj"}
    assert names["bert"] == {"key", "value"}
    assert names["llama"] == {"q_proj", "k_proj", "v_proj"}


def test_layers_and_modules_can_be_chosen() -> None:
    base = tiny.build("llama")
    assert len(list(layers(adapted(base, layers_to_transform=[1])))) == 3
    chosen = [
        name
        for name, _ in layers(
            adapted(base, target_modules=["v_proj"], exclude_modules=["model.layers.0.self_attn.v_proj"])
        )
    ]
    assert chosen == ["model.layers.1.self_attn.v_proj"]


def test_other_linear_layers_by_blocks_of_rows() -> None:
    """Linear layers outside attention are adapted in blocks of head_dim rows, including GPT-2's transposed Conv1D."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=40, n_embd=32, n_layer=2, n_head=4)).eval()
    model = adapted(gpt2, target_modules=["c_attn", "c_fc"], head_dim=8)
    changed = logits(model)
    assert (changed - logits(gpt2)).abs().max() > 1e-3
    model.merge_adapter()
    assert (logits(model) - changed).abs().max() < 1e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(gpt2))


def test_blocks_wider_than_the_input() -> None:
    """R is not square then, and only as many directions can be trained as there are inputs."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 16))
    model = get_peft_model(copy.deepcopy(base), PessaTunerConfig(target_modules=["0"], head_dim=8, init_weights=False))
    x = torch.randn(5, 3)
    result = model(x)
    assert not torch.allclose(result, base(x))
    assert (model.merge_and_unload()(x) - result).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("whisper", {"target_modules": ["q_proj", "v_proj"]}, "target .*k_proj"),
        ("llama", {"target_modules": ["up_proj"]}, "head_dim"),
        ("llama", {"target_modules": ["up_proj"], "head_dim": 7}, "multiple"),
        ("llama", {"form": "triangular"}, "full, diagonal, banded"),
        ("llama", {"qk": "diagonal"}, "triangular, full"),
        ("llama", {"bandwidth": -1}, "at least 0"),
        ("llama", {"target_modules": ".*v_proj", "layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_errors_say_what_to_do(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(tiny.build(name), **options)


def test_other_kinds_of_layer_are_refused() -> None:
    with pytest.raises(TypeError, match="linear"):
        adapted(tiny.build("llama"), target_modules=["embed_tokens"], head_dim=4)


def test_the_config_survives_its_file(tmp_path: Path) -> None:
    config = PessaTunerConfig(form="banded", bandwidth=3, qk="full", target_modules=["v_proj"], head_dim=4)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_generation_with_a_cache_and_an_adapter(tiny_folder: TinyFolder) -> None:
    model = adapted(tiny.load(tiny_folder("llama")))
    ids = tiny.inputs(model, batch=1)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))
