"""The public Python API: every name here may be imported from `pessa_cli` directly.

Names that are not listed here may change in any release. The names are imported on first use, because importing torch
takes seconds, and because PEFT is optional.

A model is pruned in three lines:

    from pessa_cli import Rule, prune
    written = prune("openai/whisper-tiny.en", "pruned/", Rule(energy=0.99))
    print(written.totals["model_pruned"])
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from whisper.model import Whisper

    from pessa_cli.common.errors import PessaError, PessaWarning, UsageError
    from pessa_cli.evaluation.bench import BenchSettings
    from pessa_cli.evaluation.limits import VerifyOptions
    from pessa_cli.ranks.rule import Rule
    from pessa_cli.runtime.buckets import get_backend, set_backend
    from pessa_cli.surgery.run import Run
    from pessa_cli.tuning.tuner_lora_xs import LoraXsConfig
    from pessa_cli.tuning.tuner_pessa import PessaTunerConfig
    from pessa_cli.tuning.tuner_pica import PicaConfig
    from pessa_cli.tuning.tuner_sorsa import MiloraConfig, SorsaConfig
    from pessa_cli.tuning.tuner_svft import SvftConfig
    from pessa_cli.workflow.bench import bench
    from pessa_cli.workflow.decompose import decompose
    from pessa_cli.workflow.export import export
    from pessa_cli.workflow.inspect import inspect
    from pessa_cli.workflow.prune import prune
    from pessa_cli.workflow.recipe import Recipe, load_recipe
    from pessa_cli.workflow.verify import verify, verify_files

__all__ = [
    "BenchSettings",
    "LoraXsConfig",
    "MiloraConfig",
    "PessaError",
    "PessaTunerConfig",
    "PessaWarning",
    "PicaConfig",
    "Recipe",
    "Rule",
    "Run",
    "SorsaConfig",
    "SvftConfig",
    "UsageError",
    "VerifyOptions",
    "bench",
    "decompose",
    "export",
    "get_backend",
    "inspect",
    "load_recipe",
    "load_whisper",
    "prune",
    "set_backend",
    "verify",
    "verify_files",
]

# The names by the module that defines them; the imports above are the same for type checkers.
_MODULES = {
    "common.errors": ("PessaError", "PessaWarning", "UsageError"),
    "evaluation.bench": ("BenchSettings",),
    "evaluation.limits": ("VerifyOptions",),
    "ranks.rule": ("Rule",),
    "runtime.buckets": ("get_backend", "set_backend"),
    "surgery.run": ("Run",),
    "tuning.tuner_lora_xs": ("LoraXsConfig",),
    "tuning.tuner_pessa": ("PessaTunerConfig",),
    "tuning.tuner_pica": ("PicaConfig",),
    "tuning.tuner_sorsa": ("MiloraConfig", "SorsaConfig"),
    "tuning.tuner_svft": ("SvftConfig",),
    "workflow.bench": ("bench",),
    "workflow.decompose": ("decompose",),
    "workflow.export": ("export",),
    "workflow.inspect": ("inspect",),
    "workflow.prune": ("prune",),
    "workflow.recipe": ("Recipe", "load_recipe"),
    "workflow.verify": ("verify", "verify_files"),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        module = next((module for module, names in _MODULES.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if module.startswith("tuning."):
            from pessa_cli.common.packages import need

            need("peft")
        return getattr(import_module(f"pessa_cli.{module}"), name)


def load_whisper(model: str | Path, device: str | torch.device | None = None) -> Whisper:
    """Load a Whisper model that pessa wrote, compact or dense, as a model of openai-whisper, for example to transcribe.

    model: a folder, a file, or a name on a hub. device: of the model; by default CUDA if it is available, otherwise the
    CPU.

    Returns a `whisper.Whisper` in float32, whose compact blocks compute with the kept directions only. Raises
    PessaError if openai-whisper is not installed, and for a model that openai-whisper cannot compute.
    """
    from pessa_cli.runtime.openai_whisper import load_whisper as load

    return load(model, device)
