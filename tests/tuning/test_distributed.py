"""Training in two processes gives the same adapter as training in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PESSA, Pessa, TinyFolder
from safetensors.torch import load_file
from tuned import losses, sums, with_tokenizer

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_learn_as_one(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Losses and adapter are equal at the same total batch size. Only the first process reports and writes."""
    folder = with_tokenizer(tiny_folder("llama"), tmp_path / "llama")
    options = ("--data", sums(tmp_path / "sums.jsonl", 24), "--batch", 4, "--max-steps", 5, "--log-steps", 1)
    line = ("tune", folder, "--method", "pessa", "--lr", "1e-2", "--save-steps", 2, "--device", "cpu", *options)
    assert pessa(*line, "-o", tmp_path / "alone").code == 0
    command = [*LAUNCH, PESSA, *line, "-o", tmp_path / "together", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert done.stderr.count("step 5/5") == 1
    found, expected = (losses(tmp_path / name) for name in ("together", "alone"))
    assert len(found) == 5
    assert found == pytest.approx(expected, rel=1e-4)
    weights, wanted = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("together", "alone"))
    for name, value in wanted.items():
        assert float((value - weights[name]).abs().max()) < 1e-3 * float(value.abs().max()), name
    assert not list(tmp_path.glob(".*.partial"))
