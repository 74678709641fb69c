"""`pessa tune`: which tokens are learned, training with every method, resuming, and refused data and options."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from characters import tokenizer
from harness import Pessa, Real, is_refusal, snapshot
from peft import PeftModel
from safetensors.torch import load_file
from tuned import history, losses, sums, with_tokenizer, write_lines

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.models.instructions import render
from pessa_cli.surgery.model import open_model
from pessa_cli.tuning import registry as methods
from pessa_cli.tuning.examples import MASKED, collate_text, encode, encode_text, pack
from pessa_cli.tuning.options import DataOptions, Tuning, load_tuning
from pessa_cli.tuning.train import Job, TrainingStep, tune

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("tune-*.toml"))
QUICK = ("--max-steps", 4, "--batch", 4, "--log-steps", 1, "--lr", "1e-2", "--device", "cpu")
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    ("row", "template", "learned"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "alpaca", "4</s>"),
        ({"instruction": "Add.", "input": "2 2", "output": "It is 4"}, "alpaca", "It is 4</s>"),
        ({"instruction": "Add.", "input": "2 2", "output": "It is 4"}, "chat", "It is 4</s>"),
        ({"messages": [*HELLO, *HELLO]}, "alpaca", "Yo</s>Yo</s>"),
        ({"text": "just text"}, "alpaca", "just text</s>"),
    ],
)
def test_only_answers_are_learned(row: dict[str, Any], template: str, learned: str) -> None:
    rendered = render(row, tokenizer(), template)
    found = encode(rendered, tokenizer(), DataOptions())
    assert tokenizer().decode(found["labels"][found["labels"] != MASKED]) == learned
    assert found["input_ids"].tolist().count(1) == rendered.text.count("<s>") + (not rendered.framed)
    whole = encode(rendered, tokenizer(), DataOptions(mask_prompt=False))
    assert (whole["labels"] != MASKED).sum() == len(whole["input_ids"]) - 1


def test_the_alpaca_prompt() -> None:
    with_input = render({"instruction": "Add.", "input": "2 2", "output": "4"}, None, "alpaca").text
    assert "paired with an input" in with_input
    assert with_input.endswith("### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n4")
    assert "Input" not in render({"instruction": "Add.", "output": "4"}, None, "alpaca").text


def test_long_examples_are_truncated_or_left_out() -> None:
    rows = [{"prompt": "x" * 30, "completion": "y"}, {"prompt": "x", "completion": "y" * 30}]
    found = encode_text(Path("data"), rows, tokenizer(), DataOptions(max_length=10))
    assert [len(row["input_ids"]) for row in found] == [10]
    with pytest.raises(PessaError, match="no answer in data begins within 10 tokens"):
        encode_text(Path("data"), rows[:1], tokenizer(), DataOptions(max_length=10))


def test_packed_examples_do_not_attend_to_each_other() -> None:
    model = tiny.build("llama")
    rows = [
        encode(render({"prompt": f"{i}" * n, "completion": "=" * n}, tokenizer(), "alpaca"), tokenizer(), DataOptions())
        for i, n in enumerate((3, 9, 5, 4))
    ]
    packed = pack(rows, 24)
    assert len(packed) < len(rows)
    assert sorted(np.concatenate([row["input_ids"] for row in packed])) == sorted(
        np.concatenate([row["input_ids"] for row in rows])
    )

    def total(batch: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return float(model(**batch, use_cache=False, num_items_in_batch=torch.tensor(1)).loss)

    collate = collate_text(0)
    expected = sum(total(collate([row])) for row in rows)
    assert total(collate(packed)) == pytest.approx(expected, rel=1e-5)
    assert total(collate(rows)) == pytest.approx(expected, rel=1e-5)
    without = [{key: row[key] for key in ("input_ids", "labels")} for row in packed]
    # Negative control: without position_ids examples attend to each other.
    assert abs(total(collate(without)) - expected) > 1e-3 * expected


def test_an_adapter_is_trained(pessa: Pessa, llama: Path, place: Path) -> None:
    before, out = snapshot(llama), place / "adapter"
    data, held_out = sums(place / "sums.jsonl"), sums(place / "held_out.jsonl", 4)
    logs = place / "logs"
    more = ("--eval-data", held_out, "--eval-steps", 2, "--tensorboard", logs, "--max-steps", 8, "--json")
    result = pessa("tune", llama, "--method", "lora", "--data", data, "-o", out, *QUICK, *more)
    assert result.code == 0, result
    record = json.loads(result.out)
    names = {"adapter_config.json", "adapter_model.safetensors", "pessa-tune.json", "history.jsonl", "pessa.json"}
    assert pessa("verify", out).code == 0
    assert {path.name for path in out.iterdir()} == names
    assert record == json.loads((out / "pessa-tune.json").read_text()) | {"out": str(out)}
    assert (
        record["source"] == json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "llama"
    )
    assert record["steps"] == 8
    assert record["trainable_parameters"] == 2 * 8 * (32 + 32 + 32 + 16)
    found = losses(out)
    assert len(found) == 8
    assert sum(found[-2:]) < sum(found[:2])
    evaluated = [step["eval_loss"] for step in history(out) if "eval_loss" in step]
    assert len(evaluated) == 4
    assert record["eval_loss"] == evaluated[-1]
    assert "step 8/8" in result.err
    assert "loss" in result.err
    assert [path for path in logs.iterdir() if "tfevents" in path.name]
    assert snapshot(llama) == before
    assert not (place / ".adapter.partial").exists()
    tuned = PeftModel.from_pretrained(tiny.load(llama), str(out))
    assert not tiny.close(tiny.load(llama), tuned, 1e-3)


@pytest.mark.slow
# EVA repeats its data until its components converge, which they do not with so few and tiny examples.
@pytest.mark.parametrize("method", [method for method in methods.TUNING_METHODS if method != "eva"])
def test_every_method_trains(method: str, llama: Path, tmp_path: Path) -> None:
    data, out = sums(tmp_path / "sums.jsonl"), tmp_path / "adapter"
    targets = {"boft": ("q_proj", "o_proj"), "corda": ("q_proj", "v_proj")}.get(method)
    tuning = Tuning().changed(method=method, targets=targets, rank=4 if method in ("vera", "boft") else None)
    tuning = tuning.changed(max_steps=3, batch=4, log_steps=1, device="cpu", warmup=0.0)
    record = tune(Job(open_model(llama), data, out, tuning, "llama"))
    assert record is not None
    assert record["trainable_parameters"] > 0
    assert all(np.isfinite(losses(out)))
    assert len(set(losses(out))) == 3


def test_training_with_packing(pessa: Pessa, llama: Path, tmp_path: Path) -> None:
    data = sums(tmp_path / "sums.jsonl", 40)
    line = ("tune", llama, "--method", "lora", "--data", data, "--max-length", 64, *QUICK, "--packing", "--json")
    result = pessa(*line, "-o", tmp_path / "adapter", "--gradient-checkpointing", "--micro-batch", 2)
    assert result.code == 0, result
    assert json.loads(result.out)["data"]["rows"] < 12


@pytest.mark.slow
def test_gradient_accumulation_gives_the_same_losses(pessa: Pessa, llama: Path, tmp_path: Path) -> None:
    data = sums(tmp_path / "sums.jsonl")
    line = ("tune", llama, "--method", "lora", "--data", data, *QUICK)
    for name, size in (("whole", 4), ("parts", 1)):
        assert pessa(*line, "-o", tmp_path / name, "--micro-batch", size).code == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize("layout", ["compact", "dense"])
def test_a_pruned_model_is_tuned(layout: str, pessa: Pessa, pruned: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_tokenizer(pruned("llama", layout), tmp_path / "llama")
    line = ("tune", folder, "--method", "lora", "--data", sums(tmp_path / "sums.jsonl"), *QUICK)
    result = pessa(*line, "-o", tmp_path / "adapter")
    assert result.code == 0, result
    assert len(set(losses(tmp_path / "adapter"))) == 4


@pytest.mark.slow
def test_a_stopped_run_resumes(llama: Path, tmp_path: Path) -> None:
    tuning = Tuning().changed(method="lora", max_steps=6, batch=4, log_steps=1, save_steps=2, device="cpu")
    job = Job(open_model(llama), sums(tmp_path / "sums.jsonl"), tmp_path / "whole", tuning, "llama")
    tune(job)
    stopped = replace(job, out=tmp_path / "stopped")

    def interrupt(step: TrainingStep) -> None:
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(replace(stopped, watch=interrupt))
    assert not stopped.out.exists()
    left = tmp_path / ".stopped.partial" / "output"
    assert {path.name for path in left.iterdir()} >= {"checkpoint-2", "checkpoint-4"}
    with pytest.raises(PessaError, match="2 checkpoints of an earlier run") as refused:
        tune(stopped)
    assert "--resume" in str(refused.value.hint)
    other = tuning.changed(learning_rate=1.0)
    with pytest.raises(PessaError, match="another source, options"):
        tune(replace(stopped, tuning=other, resume=True))
    (left / "checkpoint-6").mkdir()  # an incomplete checkpoint, as a killed run leaves it
    tune(replace(stopped, resume=True))
    assert losses(stopped.out) == losses(job.out)[4:]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (stopped.out / name).read_bytes() == (job.out / name).read_bytes()
    assert not left.parent.exists()


def test_a_failed_run_leaves_nothing(pessa: Pessa, llama: Path, place: Path) -> None:
    data = sums(place / "sums.jsonl")
    before = snapshot(place)
    line = ("tune", llama, "--method", "lora", "--data", data, "-o", place / "new" / "adapter", *QUICK)
    result = pessa(*line, "--lr", "1e38")  # after some steps
    assert result.code == 1
    assert "error: the loss is nan at step" in result.err
    assert "hint: give a lower --learning-rate" in result.err
    assert snapshot(place) == before


def test_an_adapter_is_replaced_only_with_force(pessa: Pessa, llama: Path, place: Path) -> None:
    out = place / "adapter"
    line = ("tune", llama, "--method", "lora", "--data", sums(place / "sums.jsonl"), "-o", out, *QUICK)
    assert pessa(*line).code == 0
    first = snapshot(out)
    is_refusal(pessa(*line, "--seed", 1), f"{out} exists", "--force")
    assert snapshot(out) == first
    assert pessa(*line, "--seed", 1, "--force").code == 0
    assert snapshot(out) != first
    (place / "papers").mkdir()
    (place / "papers" / "thesis.txt").write_text("irreplaceable")
    other = [place / "papers" if part == out else part for part in line]
    is_refusal(pessa(*other, "--force"), "was not written by pessa")


@pytest.mark.parametrize(
    ("rows", "culprit"),
    [
        ([{"question": "?", "answer": "!"}], "example 1"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}], "example 2"),
        ([], "is empty"),
        ([{"audio": "clip.wav", "text": "hello"}], "text alone"),
    ],
)
def test_data_that_does_not_fit(
    rows: list[dict[str, Any]], culprit: str, pessa: Pessa, llama: Path, place: Path
) -> None:
    data = write_lines(place / "data.jsonl", rows)
    before = snapshot(place)
    is_refusal(pessa("tune", llama, "--method", "lora", "--data", data, "-o", place / "out"), culprit, "data.jsonl")
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("options", "culprit", "code"),
    [
        ("--method nonsense", "nonsense", 2),
        ("--targets nothing_here", "--targets", 2),
        ("--batch 0", "--batch 0", 2),
        ("--batch 4 --micro-batch 3", "--batch 4", 2),
        ("--lr -1", "--learning-rate -1", 2),
        ("--dtype float16", "--dtype float16 needs an accelerator", 2),
        ("--recipe missing.toml", "missing.toml", 1),
        ("--data missing.jsonl", "missing.jsonl", 1),
    ],
)
def test_invalid_options_are_refused(
    options: str, culprit: str, code: int, pessa: Pessa, llama: Path, place: Path
) -> None:
    data = sums(place / "sums.jsonl")
    before = snapshot(place)
    line = ("tune", llama, "--method", "lora", "--data", data, "-o", place / "out", "--device", "cpu")
    is_refusal(pessa(*line, *options.split()), culprit, code=code)
    assert snapshot(place) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_frozen_weights_have_the_dtype(dtype: str, pessa: Pessa, llama: Path, place: Path) -> None:
    """Products are computed in it, while the adapter and its gradients stay in float32."""
    seen: set[tuple[str, torch.dtype]] = set()

    def note(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            seen.update({("adapter", module.weight.dtype), ("products", output.dtype)})
        elif isinstance(module, torch.nn.Linear):
            seen.update({("weights", module.weight.dtype), ("products", output.dtype)})

    data, hook = sums(place / "sums.jsonl"), torch.nn.modules.module.register_module_forward_hook(note)
    try:
        line = ("tune", llama, "--method", "lora", "--data", data, "-o", place / "out", *QUICK)
        assert pessa(*line, "--dtype", dtype).code == 0
    finally:
        hook.remove()
    wanted = getattr(torch, dtype)
    assert seen == {("adapter", torch.float32), ("weights", wanted), ("products", wanted)}
    saved = load_file(place / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(value.any() for value in saved.values())  # those of lora_B were zero before the training


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_in_configs(recipe: Path) -> None:
    tuning = load_tuning(recipe)
    config = methods.build_config(
        tuning.adapter.method, tuning.adapter.rank, list(tuning.adapter.targets or ()) or None, **tuning.adapter.options
    )
    assert config.target_modules is None or config.target_modules
    assert tuning.train.save_steps


def test_the_recipe_has_the_settings_of_the_paper() -> None:
    tuning = load_tuning(next(path for path in CONFIGS if path.stem == "tune-commonsense"))
    train = tuning.train
    assert (train.learning_rate, train.schedule, train.warmup) == (1e-4, "linear", 100)
    assert (train.epochs, train.batch, train.weight_decay) == (3, 16, 0)
    assert tuning.adapter.targets == ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("[prune]\n", "prune"),
        ("[train]\nlearning_rat = 1\n", "learning_rat"),
        ("[train]\nbatch = 'many'\n", "batch"),
        ("[train]\nbatch = true\n", "batch"),
        ("[train]\nschedule = 'wild'\n", "wild"),
        ("[data]\nmask_prompt = 1\n", "mask_prompt"),
        ("[adapter]\ntargets = [1]\n", "targets"),
    ],
)
def test_invalid_recipes_are_refused(text: str, culprit: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=culprit):
        load_tuning(path)


def test_whisper_learns_from_clips(real: Real, clip: Path, pessa: Pessa, place: Path) -> None:
    whisper = real("whisper-tiny.en")
    data = write_lines(place / "clips.jsonl", [{"audio": str(clip), "text": "Ever tried, ever failed, no matter."}] * 2)
    more = (
        "--targets",
        "q_proj,v_proj",
        "--max-steps",
        3,
        "--batch",
        1,
        "--log-steps",
        1,
        "--lr",
        "1e-3",
        "--warmup",
        0,
        "--device",
        "cpu",
    )
    result = pessa("tune", whisper, "--method", "lora", "--data", data, "-o", place / "adapter", *more)
    assert result.code == 0, result
    found = losses(place / "adapter")
    assert found[-1] < 0.9 * found[0]
    is_refusal(
        pessa("tune", whisper, "--method", "lora", "--data", data, "-o", place / "b", "--packing"), "--packing", code=2
    )
    write_lines(data, [{"audio": "gone.wav", "text": "x"}])
    is_refusal(pessa("tune", whisper, "--method", "lora", "--data", data, "-o", place / "b"), "gone.wav")
