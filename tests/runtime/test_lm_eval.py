"""EleutherAI's lm-evaluation-harness on compact models: its `hf` model, offline, with a local task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import NEARLY_ALL, Real, RealPruned, TinyFolder
from transformers import AutoTokenizer
from tuned import with_tokenizer, write_lines

from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model

pytest.importorskip("lm_eval")

# The two lines in the README.
WRAPPER = "import pessa_cli; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
QUESTIONS = (
    ("The capital of France is", " Paris", " Rome"),
    ("Water freezes into", " ice", " sand"),
    ("A week has seven", " days", " tables"),
    ("Grass is", " green", " purple"),
    ("The opposite of hot is", " cold", " loud"),
    ("Two plus two is", " four", " nine"),
)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Write a task whose correct answers alternate between the first and the second."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"asked": asked, "choices": [wrong, right][:: 1 if i % 2 else -1], "right": i % 2}
        for i, (asked, right, wrong) in enumerate(QUESTIONS)
    ]
    config = {
        "task": "facts",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(write_lines(folder / "facts.jsonl", rows))},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "facts.yaml").write_text(json.dumps(config))  # valid, because JSON is a subset of YAML
    return folder


def run(model: Any, reader: Any, task: Path) -> tuple[float, list[float]]:
    """Return the accuracy, and the log-likelihood of every answer."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=reader, batch_size=4),
        tasks=["facts"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        bootstrap_iters=0,
    )
    likelihoods = [answer[0][0] for sample in found["samples"]["facts"] for answer in sample["resps"]]
    return found["results"]["facts"]["acc,none"], likelihoods


def pruned_twice(source: Path, rule: Rule, folder: Path) -> tuple[Path, Path]:
    compact, dense = folder / "compact", folder / "dense"
    prune_model(open_model(source), compact, rule)
    prune_model(open_model(source), dense, rule, layout="dense")
    return compact, dense


@pytest.mark.slow
def test_tiny(tiny_folder: TinyFolder, task: Path, tmp_path: Path) -> None:
    """Compact and dense agree, whether the model object is passed or its folder by the harness's command line."""
    compact, dense = pruned_twice(with_tokenizer(tiny_folder("llama"), tmp_path / "llama"), Rule(ratio=0.4), tmp_path)
    reader = AutoTokenizer.from_pretrained(compact)
    score, likelihoods = run(tiny.load(compact), reader, task)
    dense_score, dense_likelihoods = run(tiny.load(dense), reader, task)
    assert score == dense_score
    assert likelihoods == pytest.approx(dense_likelihoods, abs=1e-4)
    _, whole = run(tiny.load(tmp_path / "llama"), reader, task)
    assert likelihoods != pytest.approx(whole, abs=1e-2)

    options = ["--model", "hf", "--model_args", f"pretrained={compact}", "--device", "cpu", "--tasks", "facts"]
    paths = ["--include_path", str(task), "--output_path", str(tmp_path / "results"), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", WRAPPER, "run", *options, *paths]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    samples = next((tmp_path / "results").rglob("samples_facts_*.jsonl")).read_text().splitlines()
    found = {row["doc_id"]: [float(answer[0][0]) for answer in row["resps"]] for row in map(json.loads, samples)}
    assert [value for key in sorted(found) for value in found[key]] == pytest.approx(likelihoods, abs=1e-4)


def test_smollm2(task: Path, real: Real, real_pruned: RealPruned) -> None:
    source = real("smollm2-135m")
    reader = AutoTokenizer.from_pretrained(source)
    whole, _ = run(tiny.load(source), reader, task)
    assert whole > 0.8
    (compact, likelihoods), (dense, dense_likelihoods) = (
        run(tiny.load(real_pruned("smollm2-135m", NEARLY_ALL, layout)), reader, task) for layout in ("compact", "dense")
    )
    assert compact == dense
    assert likelihoods == pytest.approx(dense_likelihoods, abs=1e-3)
