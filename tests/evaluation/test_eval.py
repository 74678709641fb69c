"""`pessa eval --tasks`: accuracy by likelihood and by generation, with and without adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from characters import tokenizer
from harness import Pessa, TinyFolder, copy_of, edit_json, edit_weights, is_refusal
from peft import PeftModel, get_peft_model
from tuned import disturb

from pessa_cli.evaluation.evaluate import split_adapter
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.multiple_choice import load_tasks
from pessa_cli.models.instructions import render
from pessa_cli.tuning.registry import build_config


def questions(path: Path, answers: str, count: int = 12) -> Path:
    """A file of questions whose correct answers alternate."""
    known = answers.split("/")
    rows = []
    for i in range(count):
        answer = known[i % len(known)]
        asked = f"Which, {'x' * (i % 5)}{i}?\n\nAnswer format: {answers}"
        rows.append({"instruction": asked, "input": "", "output": f"it is {answer}", "answer": answer})
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(tiny.load(llama), build_config("lora", 8, ["q_proj", "v_proj", "o_proj"]))
    disturb(model, 0.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def by_hand(model: Any, row: dict[str, Any], answers: list[str]) -> str:
    """The answer whose response has the highest mean log-likelihood, computed one response at a time."""
    more = render(row, None, "alpaca").text.removesuffix(row["output"])
    scores = []
    for answer in answers:
        response = row["output"].replace(row["answer"], answer)
        ids = torch.tensor([tokenizer()(more + response)["input_ids"]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        scores.append(float(logprobs[-len(response) :].mean()))
    return answers[scores.index(max(scores))]


@pytest.mark.parametrize("answers", ["answer1/answer2/answer3", "true/false", "a/bb/ccc"])
def test_likelihood(answers: str, pessa: Pessa, llama: Path, adapter: Path, tmp_path: Path) -> None:
    file = questions(tmp_path / "task.json", answers)
    result = pessa("eval", llama, f"{llama}+{adapter}", "--tasks", file, "--batch", 5, "--json")
    assert result.code == 0, result
    rows = json.loads(file.read_text())
    models = tiny.load(llama), PeftModel.from_pretrained(tiny.load(llama), str(adapter)).eval()
    chosen = [[by_hand(model, row, answers.split("/")) for row in rows] for model in models]
    expected = [sum(c == row["answer"] for c, row in zip(cs, rows, strict=True)) for cs in chosen]
    scores = json.loads(result.out)["models"]
    assert [score["tasks"]["task"]["right"] for score in scores] == expected
    assert [score["mean"] for score in scores] == [right / len(rows) for right in expected]


def test_generation(llama: Path, tmp_path: Path) -> None:
    """The first possible answer in the generated text counts, whatever the question."""

    class Parrot:
        device = torch.device("cpu")

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            generated = torch.tensor(tokenizer()("oh, bb it is; or a", add_special_tokens=False)["input_ids"])
            return torch.cat([input_ids, generated.expand(len(input_ids), -1)], dim=1)

    settings = ScoreSettings(metric="generation")
    task = load_tasks([questions(tmp_path / "task.json", "a/bb/ccc")], tokenizer(), settings)[0]
    assert task.score(Parrot()).counts["right"] == 4  # bb is the first answer in the text, and right for every third
    assert task.score(tiny.load(llama)).counts["right"] <= 12


def test_the_table(pessa: Pessa, llama: Path, adapter: Path, tmp_path: Path) -> None:
    tasks = (
        f"{questions(tmp_path / 'colours' / 'test.json', 'red/blue').parent},{questions(tmp_path / 'b.json', 'a/b')}"
    )
    result = pessa("eval", llama, "--adapter", adapter, "--tasks", tasks, "--limit", 4)
    assert result.code == 0, result
    assert "colours 4, b 4" in result.out
    assert result.out.count("\n") == 3
    again = pessa("eval", llama, "--tasks", tasks, "--template", "chat", "--metric", "generation")
    assert again.code == 0, again


def test_names(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert split_adapter(str(tmp_path / "a+b"), None) == (str(tmp_path / "a+b"), None)
    assert split_adapter("model+adapter/", None) == ("model", Path("adapter/"))
    assert split_adapter("model", Path("x")) == ("model", Path("x"))


def test_refusals(pessa: Pessa, llama: Path, adapter: Path, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    task = questions(tmp_path / "task.json", "a/b")
    is_refusal(pessa("eval", f"{llama}+{adapter}", "--adapter", adapter, "--tasks", task), "--adapter", code=2)
    is_refusal(pessa("eval", tiny_folder("whisper"), "--tasks", task), "--tasks", "--speech", code=2)
    is_refusal(pessa("eval", tiny_folder("llama"), "--tasks", task), "tokenizer")
    is_refusal(pessa("eval", llama, "--adapter", tmp_path, "--tasks", task), "is not an adapter")
    is_refusal(pessa("eval", llama, "--tasks", tmp_path), "test.json")
    (tmp_path / "odd.json").write_text(json.dumps([{"instruction": "Why?", "output": "because"}]))
    is_refusal(pessa("eval", llama, "--tasks", tmp_path / "odd.json"), "question 1")


def test_an_adapter_that_does_not_fit(pessa: Pessa, llama: Path, adapter: Path, tmp_path: Path) -> None:
    """PEFT passes over weights of modules that the model does not have, so the scores would be those of the base."""
    task = questions(tmp_path / "task.json", "a/b")
    others = copy_of(adapter, tmp_path / "others")
    edit_weights(
        lambda tensors: tensors.update(
            {name.replace("layers.0", "layers.9"): tensors.pop(name) for name in [*tensors]}
        ),
        "adapter_model.safetensors",
    )(others)
    result = pessa("eval", llama, "--adapter", others, "--tasks", task)
    assert result.code == 1
    assert "no place for these weights" in result.err
    assert "layers.9" in result.err
    pattern = copy_of(adapter, tmp_path / "pattern")
    edit_json(lambda config: config.update(target_modules="("), "adapter_config.json")(pattern)
    is_refusal(pessa("eval", llama, "--adapter", pattern, "--tasks", task), str(pattern), "does not fit")
