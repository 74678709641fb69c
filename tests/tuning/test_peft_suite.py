"""A quick part of PEFT's own test suite with pessa's methods; `python scripts/peft_tests.py` runs all of it.

The part is one case of each method on PEFT's toy model and on a tiny LLaMA, in every test but those in BESIDE: these
check PEFT's own code, which places, casts and converts the parameters of any method.
"""

from __future__ import annotations

from pathlib import Path

import peft_tests
import pytest

BESIDE = (
    "test_adapter_dtype_autocast",
    "test_add_adapter_no_autocast_adapter_dtype",
    "test_peft_model_device_map",
    "test_inference_safetensors",
    "test_lora_conversion",
)


@pytest.mark.slow
def test_peft_accepts_our_methods() -> None:
    outcome = peft_tests.run(["custom", "decoder"], quick=True, jobs=1, more=["-k", f"not ({' or '.join(BESIDE)})"])
    peft_tests.report(outcome, print)
    assert not outcome.unexplained
    assert len(outcome.passed) > 500
    for method in ("PESSA", "SORSA", "MiLoRA", "PiCa", "PiCa shared", "SVFT", "LoRA-XS"):
        assert len([name for name in outcome.passed if f"[{method} 0 MLP-" in name]) > 35


def test_failures_are_only_explained_by_name(tmp_path: Path) -> None:
    """Negative control: of two failures with the same error, only the one with an explained name is explained."""
    case = '<testcase classname="tests.test_custom_models.TestPeftCustomModel" name="{0}">{1}</testcase>'
    broken = '<failure message="assert False">...</failure>'
    names = ("test_parameters_after_loading_model[SORSA 0 MLP]", "test_parameters_after_loading_model[SVFT 0 MLP]")
    cases = [case.format(name, broken) for name in names] + [case.format("test_merge[SORSA]", "")]
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    outcome = peft_tests.read(report)
    assert list(outcome.explained) == ["test_custom_models.py::test_parameters_after_loading_model[SORSA 0 MLP]"]
    assert list(outcome.unexplained) == ["test_custom_models.py::test_parameters_after_loading_model[SVFT 0 MLP]"]
    assert outcome.passed == ["test_custom_models.py::test_merge[SORSA]"]
    assert len(outcome.stale) == len(peft_tests.EXPLAINED) - 1
