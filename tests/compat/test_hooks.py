"""The import hooks: whatever another release of a library lacks, the library itself can still be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pessa_cli.compat.for_transformers import LoaderHook, register_loader

# A hook that runs before pessa's own, and deletes a name as another release may have done.
CUT = """
import sys, wrapt
wrapt.register_post_import_hook(lambda _: delattr(sys.modules[{module!r}], {name!r}), {hooked!r})
import pessa_cli
{use}
print("done")
"""
BERT = "hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "hooked", "module", "name", "use"),
    [
        (
            *(
                "transformers",
                "transformers.quantizers.auto",
                "transformers.quantizers.auto",
                "AUTO_QUANTIZATION_CONFIG_MAPPING",
            ),
            f"from transformers import BertConfig, BertModel; BertModel(BertConfig({BERT}))",
        ),
        (
            *("peft", "peft", "peft.utils", "register_peft_method"),
            "import torch, peft; peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), "
            "peft.LoraConfig(target_modules=['0']))",
        ),
    ],
)
def test_a_missing_name_breaks_nothing_but_pessa(library: str, hooked: str, module: str, name: str, use: str) -> None:
    line = CUT.format(hooked=hooked, module=module, name=name, use=use)
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert found.stdout == "done\n", found.stderr
    assert f"does not work with {library}" in found.stderr
    assert name in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["compat.for_peft", "tuning.tuner_base", "tuning.tuner_pica", "tuning.merge", "evaluation.settings"]
)
def test_whichever_module_is_imported_first_all_methods_are_registered(module: str) -> None:
    line = f"import pessa_cli.{module}\nfrom peft import PeftType\nprint(PeftType.PESSA, PeftType.LORAXS)"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", line]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_second_registration_does_nothing() -> None:
    class Other(LoaderHook):
        pass

    register_loader("pessa", dict, Other)
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["pessa"] is not Other
