"""SORSA, MiLoRA, PiCa, SVFT and LoRA-XS on tiny models: their formulas, and every operation of PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import TinyFolder
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Trainer, TrainingArguments

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.tuning.registry import TUNING_METHODS, attach, build_config, callbacks, needs_data
from pessa_cli.tuning.truncated_svd import triplets
from pessa_cli.tuning.tuner_sorsa import SorsaTrainer, regularizer

TARGETS = ["q_proj", "v_proj"]
# Options of each method of pessa by the name of the test case; PESSA has its own file.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sorsa": ("sorsa", {"rank": 4}),
    "milora": ("milora", {"rank": 4}),
    "pica": ("pica", {"rank": 4, "share": False}),
    "pica-shared": ("pica", {"rank": 4}),
    "svft": ("svft", {}),
    "svft-banded": ("svft", {"pattern": "banded", "band": 2}),
    "svft-random": ("svft", {"pattern": "random"}),
    "svft-top-k": ("svft", {"pattern": "top-k", "rank": 8}),
    "lora-xs": ("lora-xs", {"rank": 4, "alpha": 8.0}),
}
every = pytest.mark.parametrize("case", CASES)


def config(case: str, **more: Any) -> PeftConfig:
    method, options = CASES[case]
    return build_config(method, target_modules=TARGETS, **{**options, **more})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**tiny.inputs(model)).logits
    return result


def trained(case: str, name: str = "llama", **more: Any) -> tuple[Any, Tensor]:
    """A tiny model with an adapter that changes it, and the logits without the adapter."""
    model = tiny.build(name)
    before = logits(model)
    tuned = get_peft_model(model, config(case, **more)).eval()
    shake(tuned)
    return tuned, before


def shake(model: Any, size: float = 0.1) -> None:
    """Add noise to all trained parameters, in place of training."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_is_the_base_model(case: str, dtype: torch.dtype) -> None:
    model = tiny.build("llama").to(dtype)
    before = logits(model)
    tuned = get_peft_model(model, config(case)).eval()
    assert torch.equal(logits(tuned), before)
    shake(tuned)
    assert not torch.equal(logits(tuned), before)


@every
def test_disabled_and_unmerged_are_the_base_model(case: str) -> None:
    tuned, before = trained(case, "llama-biased")
    weights = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    after = logits(tuned)
    assert (after - before).norm() > 1e-3 * before.norm()
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    tuned.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(tuned), after, rtol=1e-4, atol=1e-5)
    tuned.unmerge_adapter()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tuned.state_dict().items())
    torch.testing.assert_close(logits(tuned.merge_and_unload()), after, rtol=1e-4, atol=1e-5)


@every
def test_change_is_that_of_the_weight(case: str) -> None:
    """A layer's `change` of its output and its `delta` of the weight are two formulas of one update."""
    tuned, _ = trained(case)
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer.change("default", x), x @ layer.delta("default").mT, rtol=1e-4, atol=1e-5)


@every
def test_gradients_reach_all_that_is_trained(case: str) -> None:
    tuned = get_peft_model(tiny.build("llama"), config(case)).train()
    tuned.enable_input_require_grads()
    tuned.gradient_checkpointing_enable()
    batch = tiny.inputs(tuned)
    tuned(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder) -> tuple[Path, dict[str, Tensor]]:
    """The adapters of all cases as folders, and their logits."""
    folder = tmp_path_factory.mktemp("adapters")
    outputs = {}
    for case in CASES:
        model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).eval()
        tuned = get_peft_model(model, config(case)).eval()
        shake(tuned)
        tuned.save_pretrained(folder / case)
        outputs[case] = logits(tuned)
    return folder, outputs


@pytest.mark.slow
def test_reloading_in_another_process(
    saved: tuple[Path, dict[str, Tensor]], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Reloading does not depend on the signs of singular vectors; with `low_cpu_mem_usage` none are computed."""
    folder, expected = saved
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / "helpers")!r})
import torch; torch.set_num_threads(1)
import pessa_cli, tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM
svd = torch.linalg.svd
def other(weight, **kwargs):
    assert not low, "the numbers are in the file"
    u, s, v = svd(weight, **kwargs)
    signs = torch.ones_like(s); signs[::2] = -1
    return u * signs, s, signs[:, None] * v
torch.linalg.svd = other
logits = {{}}
for case in {list(CASES)!r}:
    for low in (False, True):
        model = AutoModelForCausalLM.from_pretrained({str(tiny_folder("llama"))!r}).eval()
        tuned = PeftModel.from_pretrained(model, {str(folder)!r} + "/" + case, low_cpu_mem_usage=low).eval()
        with torch.no_grad():
            logits[case, low] = tuned(**tiny.inputs(model)).logits
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    again = torch.load(tmp_path / "logits.pt")
    assert all(torch.equal(again[case, low], expected[case]) for case in CASES for low in (False, True))


@every
def test_files_are_safetensors_with_the_frozen_factors(saved: tuple[Path, dict[str, Tensor]], case: str) -> None:
    folder, _ = saved
    assert (folder / case / "adapter_model.safetensors").is_file()
    stored = json.loads((folder / case / "adapter_config.json").read_text())
    assert stored["peft_type"] == CASES[case][0].replace("-", "").upper()
    assert stored["requires"] == "import pessa_cli"


@every
def test_several_adapters(case: str) -> None:
    tuned, before = trained(case)
    first = logits(tuned)
    tuned.add_adapter("second", config(case))
    assert torch.equal(logits(tuned), first)
    tuned.set_adapter("second")
    assert torch.equal(logits(tuned), before)
    shake(tuned, 0.2)
    second = logits(tuned)
    assert not torch.equal(second, first)
    mixed = tuned(**tiny.inputs(tuned), adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], first[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], before[1], rtol=1e-4, atol=1e-5)
    tuned.delete_adapter("default")
    torch.testing.assert_close(logits(tuned), second)
    assert not [name for name in tuned.state_dict() if "default" in name]


@every
def test_direct_injection(case: str) -> None:
    """Injection as in add_adapter and load_adapter of transformers. PiCa with sharing raises an error with advice."""
    model = tiny.build("llama")
    if case == "pica-shared":
        with pytest.raises(ValueError, match=r"shared state .* use `get_peft_model`"):
            inject_adapter_in_model(config(case), model)
        with pytest.raises(ValueError, match=r"shared state .* use `get_peft_model`"):
            model.add_adapter(config(case))
        return
    before = logits(model)
    model.add_adapter(config(case))
    assert torch.equal(logits(model), before)


def test_sorsa_trains_the_largest_and_milora_the_smallest_triplets() -> None:
    weight = tiny.build("llama").model.layers[0].self_attn.q_proj.weight.detach()
    exact = torch.linalg.svdvals(weight)
    for method, expected in (("sorsa", exact[:4]), ("milora", exact[-4:])):
        layer = get_peft_model(tiny.build("llama"), config(method)).base_model.model.model.layers[0].self_attn.q_proj
        trained = [getattr(layer, name)["default"].detach() for name in layer.adapter_layer_names]
        product = trained[-1] * trained[1] @ trained[0] if method == "sorsa" else trained[1] @ trained[0]
        torch.testing.assert_close(torch.linalg.svdvals(product)[:4], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.linalg.svdvals(weight - product)[:28].sum() + expected.sum(), exact.sum())


def test_sorsa_equals_its_definition() -> None:
    """W_r + B diag(S) A gives the same output and gradients as the difference form."""
    tuned, _ = trained("sorsa")
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    factors = [getattr(layer, name)["default"] for name in layer.adapter_layer_names]
    a0, s0, b0 = (getattr(layer, name)["default"] for name in layer.frozen_names)
    residual = layer.base_layer.weight - b0 * s0 @ a0
    x, out = torch.randn(5, 32), torch.randn(5, 32)
    ours = torch.autograd.grad((layer(x) * out).sum(), factors)
    a, s, b = (factor.detach().requires_grad_() for factor in factors)
    explicit = x @ (residual + b * s @ a).mT
    torch.testing.assert_close(layer(x), explicit, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours, torch.autograd.grad((explicit * out).sum(), (a, s, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_regularizer() -> None:
    model = get_peft_model(tiny.build("llama"), config("sorsa"))
    assert float(regularizer(model)) < 1e-5
    layers = [module for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    for layer in layers:
        layer.sorsa_A["default"].data *= 2  # A A^T - I = 3 I, of norm 3 sqrt(4) for the A, 0 for the B
    assert float(regularizer(model)) == pytest.approx(3.0, rel=1e-5)
    with pytest.raises(PessaError, match="no active SORSA"):
        regularizer(tiny.build("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_sorsa_in_a_trainer(tmp_path: Path, steps: int) -> None:
    """The regulariser enters a step's loss once, times gamma / learning rate, for any number of micro-batches."""

    class Ours(SorsaTrainer, Trainer):  # type: ignore[misc]
        pass

    def losses(kind: type[Trainer], gamma: float) -> float:
        torch.manual_seed(0)
        model = get_peft_model(tiny.build("llama"), config("sorsa", gamma=gamma))
        for module in model.modules():
            if hasattr(module, "sorsa_A"):
                module.sorsa_A["default"].data *= 2
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 90, (4, 9))]
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = kind(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])

    plain = losses(Trainer, 0.0)
    assert losses(Ours, 0.0) == pytest.approx(plain, rel=1e-5)
    assert losses(Ours, 5e-4) == pytest.approx(plain + 0.5 * 3.0, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sorsa", "pica-shared", "svft-banded"])
def test_a_trainer_resumes(case: str, tmp_path: Path) -> None:
    """Four steps, resumed from the checkpoint after two, give the parameters of an uninterrupted run."""

    def train(steps: int, resume: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(tiny.build("llama"), config(case))
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 90, (8, 9))]
        arguments = TrainingArguments(
            str(tmp_path / case),
            per_device_train_batch_size=2,
            max_steps=steps,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            gradient_checkpointing=True,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train(
            resume_from_checkpoint=str(tmp_path / case / "checkpoint-2") if resume else None
        )
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    through, resumed = train(4, resume=False), train(4, resume=True)
    assert through.keys() == resumed.keys()
    for name, parameter in through.items():
        torch.testing.assert_close(resumed[name], parameter)


def test_pica_is_in_the_column_space() -> None:
    tuned, _ = trained("pica")
    layer = tuned.base_model.model.model.layers[1].self_attn.q_proj
    p = layer.pica_P["default"]
    torch.testing.assert_close(p @ p.mT, torch.eye(4))
    _, _, v = torch.linalg.svd(layer.base_layer.weight.detach())
    torch.testing.assert_close((p @ v[:4].mT).abs(), torch.eye(4), rtol=1e-3, atol=1e-4)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer.change("default", x), (x @ p.mT) @ layer.pica_M["default"].mT)


def test_pica_shares_across_layers() -> None:
    tuned = get_peft_model(tiny.build("llama"), config("pica-shared"))
    first, second = (layer.self_attn for layer in tuned.base_model.model.model.layers)
    assert first.q_proj.pica_shared["default"] is second.q_proj.pica_shared["default"]
    assert first.q_proj.pica_shared["default"] is not first.v_proj.pica_shared["default"]
    assert not torch.equal(first.q_proj.pica_P["default"], second.q_proj.pica_P["default"])
    trainable = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trainable == {
        "base_model.pica_bank.default.model-layers-self_attn-q_proj-32x32",
        "base_model.pica_bank.default.model-layers-self_attn-v_proj-16x32",
    }
    tuned.add_adapter("second", config("pica-shared"))
    tuned.set_adapter("second")
    assert not first.q_proj.pica_shared["default"].requires_grad
    assert first.q_proj.pica_shared["second"].requires_grad
    tuned.delete_adapter("default")
    assert list(tuned.base_model.pica_bank) == ["second"]


GEMMA_2B = GemmaConfig(
    vocab_size=256000,
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
FIVE, SEVEN = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], ["o_proj", "gate_proj"]


@pytest.mark.parametrize(
    ("model", "rank", "targets", "count"),
    [
        (GEMMA_2B, 32, FIVE, 671_744),
        (GEMMA_2B, 256, FIVE, 5_373_952),
        (LLAMA_3_8B, 32, FIVE + SEVEN, 1_376_256),
    ],
)
def test_pica_counts_of_the_paper(model: Any, rank: int, targets: list[str], count: int) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model)
    tuned = get_peft_model(base, build_config("pica", rank, targets))
    assert tuned.get_nb_trainable_parameters()[0] == count
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model)
    alone = get_peft_model(base, build_config("pica", rank, targets, share=False))
    assert alone.get_nb_trainable_parameters()[0] == count * model.num_hidden_layers


@pytest.mark.parametrize(("pattern", "entries"), [("plain", 32), ("banded", 154), ("random", 154), ("top-k", 154)])
def test_svft_patterns(pattern: str, entries: int) -> None:
    """The diagonal has 32 entries, and two diagonals on each side have 31 + 31 + 30 + 30 more."""
    tuned = get_peft_model(tiny.build("llama"), build_config("svft", None, ["q_proj"], pattern=pattern, band=2))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    rows, columns = layer.svft_index["default"]
    assert layer.svft_M["default"].shape == (entries,)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == entries
    if pattern == "plain":
        assert torch.equal(rows, columns)
    if pattern == "banded":
        assert int((rows - columns).abs().max()) == 2
    if pattern == "top-k":
        aligned = (layer.svft_U["default"].mT @ layer.svft_V["default"].mT).abs()
        chosen = aligned[rows, columns]
        aligned[rows, columns] = 0
        assert chosen.min() >= aligned.max()
    u, v = layer.svft_U["default"], layer.svft_V["default"]
    layer.svft_M["default"].data.normal_()
    middle = u.mT @ layer.delta("default") @ v.mT
    torch.testing.assert_close(middle[rows, columns], layer.svft_M["default"].detach(), rtol=1e-4, atol=1e-5)
    middle[rows, columns] = 0
    assert middle.abs().max() < 1e-5


def test_svft_with_an_unknown_pattern() -> None:
    with pytest.raises(UsageError, match="no pattern 'checkered'"):
        build_config("svft", pattern="checkered")


def test_lora_xs_trains_r_by_r() -> None:
    tuned, _ = trained("lora-xs")
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    weight, r = layer.base_layer.weight.detach(), layer.loraxs_R["default"].detach()
    assert r.shape == (4, 4)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    signs = (u[:, :4] * layer.loraxs_B["default"]).sum(0).round()
    explicit = u[:, :4] @ (signs[:, None] * r * signs) @ (s[:4, None] * v[:4]) * 2  # alpha / r = 8 / 4
    torch.testing.assert_close(layer.delta("default").detach(), explicit, rtol=1e-4, atol=1e-4)


def test_ranks_are_at_most_those_of_the_weight() -> None:
    for case in ("sorsa", "milora", "pica", "lora-xs"):
        tuned = get_peft_model(tiny.build("llama"), config(case, rank=1000))
        shapes = {tuple(p.shape) for name, p in tuned.named_parameters() if p.requires_grad and "v_proj" in name}
        assert all(max(shape) <= 32 and min(shape) <= 16 for shape in shapes)


@pytest.mark.parametrize("niter", [None, 4])
def test_triplets(niter: int | None) -> None:
    """The randomised SVD is close for a decaying spectrum, and its basis is orthonormal."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(40, 30)).Q for _ in range(2))
    weight = u * 0.5 ** torch.arange(30.0) @ v.mT
    left, s, right = triplets(weight, 5, niter=niter)
    torch.testing.assert_close(s, 0.5 ** torch.arange(5.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(left * s @ right, u[:, :5] * s @ v[:, :5].mT, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(left.mT @ left, torch.eye(5))


def test_half_precision_rounds_the_start_alike() -> None:
    """Negative control: if the initial copies are not rounded as PEFT rounds parameters, the start is not exact."""
    model = tiny.build("llama").to(torch.bfloat16)
    before = logits(model)
    tuned = get_peft_model(model, config("sorsa")).eval()
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    u, _, _ = triplets(layer.base_layer.weight.float(), 4)
    layer.sorsa_B0["default"] = u
    assert not torch.equal(logits(tuned), before)


@pytest.mark.parametrize("method", TUNING_METHODS)
def test_every_method_by_name(method: str) -> None:
    """Each method is built, attached and gets gradients, and its start does not change the logits."""
    options: dict[str, Any] = {"adalora": {"total_step": 30}, "boft": {"boft_block_size": 4}}.get(method, {})
    rank = None if method in ("pessa", "svft", "boft") else 4
    model = tiny.build("llama")
    before = logits(model)
    built = build_config(method, rank, TARGETS, **options)
    tuned = attach(model, built, [tiny.inputs(model)] if needs_data(built) else None).eval()
    torch.testing.assert_close(logits(tuned), before, rtol=1e-3, atol=1e-3)
    batch = tiny.inputs(tuned)
    tuned.train()(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert len(callbacks(built)) == (method == "adalora")


def test_bad_methods_and_options() -> None:
    with pytest.raises(UsageError, match="no method 'lora2'"):
        build_config("lora2")
    with pytest.raises(UsageError, match="SorsaConfig has no option 'gama'"):
        build_config("sorsa", 4, gama=1.0)
    with pytest.raises(UsageError, match="has no rank"):
        build_config("pessa", 4)
    with pytest.raises(UsageError, match="total_step"):
        build_config("adalora", 4)
    with pytest.raises(UsageError, match="initialised from data"):
        attach(tiny.build("llama"), build_config("eva", 4, TARGETS))


@pytest.mark.slow
def test_without_pessa_the_error_names_the_method(saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = saved
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(folder / 'pica')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "PICA" in done.stderr


@pytest.mark.slow
def test_a_tuner_may_be_imported_first() -> None:
    """Importing a tuner imports PEFT before the tuner is complete, and all methods are registered afterwards."""
    code = "import pessa_cli.tuning.tuner_pica; from peft import PeftType; PeftType('PICA'), PeftType('PESSA')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reloaded_adapter_can_be_trained_on(saved: tuple[Path, dict[str, Tensor]], tiny_folder: TinyFolder) -> None:
    folder, expected = saved
    for case in ("sorsa", "pica-shared"):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).eval()
        tuned = PeftModel.from_pretrained(model, folder / case, is_trainable=True).eval()
        assert torch.equal(logits(tuned), expected[case])
        shake(tuned)
        assert not torch.equal(logits(tuned), expected[case])
