"""The methods of `pessa tune --method` by name, as configurations of HF PEFT.

`build_config` makes a `PeftConfig`, and `attach` puts an adapter of it on a model. PEFT is imported when the first
configuration is built, not with this module.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pessa_cli.common.errors import PessaError, UsageError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, TrainerCallback


Builder = Callable[..., "PeftConfig"]


def _method(module: str, kind: str, rank_field: str | None = "r", **fixed: Any) -> Builder:
    """A builder of configurations of class `module.kind`.

    rank_field: the field that takes the rank, or None for a method without rank. fixed: defaults that options override.
    """

    def build(rank: int | None, target_modules: list[str] | None, **options: Any) -> PeftConfig:
        config_class = getattr(importlib.import_module(module), kind)
        values = {**fixed, "target_modules": target_modules, **options}
        if rank is not None:
            if rank_field is None:
                raise UsageError(f"{kind} has no rank, but {rank} was given", "leave --rank out")
            values.setdefault(rank_field, rank)
        known = {field.name for field in dataclasses.fields(config_class)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"{kind} has no option {unknown[0]!r}", "give one of " + ", ".join(sorted(known)))
        config: PeftConfig = config_class(**values)
        return config

    return build


def _lora(scale: float, **fixed: Any) -> Builder:
    """A builder of LoraConfig, where `lora_alpha` is `scale` times the rank unless the options give it."""
    build = _method("peft", "LoraConfig", **fixed)

    def scaled(rank: int | None, target_modules: list[str] | None, **options: Any) -> PeftConfig:
        rank = 8 if rank is None else rank
        return build(rank, target_modules, **{"lora_alpha": int(scale * rank), **options})

    return scaled


def _adalora(rank: int | None, target_modules: list[str] | None, **options: Any) -> PeftConfig:
    """The configuration of AdaLoRA, which starts at 1.5 times the final rank. Raises UsageError without total_step."""
    if "total_step" not in options:
        raise UsageError(
            "adalora needs total_step, the number of training steps", "give total_step among the method's options"
        )
    rank = 8 if rank is None else rank
    steps = int(options["total_step"])
    # AdaLoRA (arXiv:2303.10512) prunes ranks between a warm-up and a final phase, here 1/10 and 1/3 of the steps.
    schedule = {"init_r": rank + rank // 2, "target_r": rank, "tinit": steps // 10, "tfinal": steps // 3}
    return _method("peft", "AdaLoraConfig", None)(None, target_modules, **{**schedule, **options})


# As in the papers: LoRA and DoRA scale by 2 (as LLM-Adapters does), methods that start from a decomposition by 1.
TUNING_METHODS: dict[str, Builder] = {
    "pessa": _method("pessa_cli.tuning.tuner_pessa", "PessaTunerConfig", None),
    "sorsa": _method("pessa_cli.tuning.tuner_sorsa", "SorsaConfig"),
    "pica": _method("pessa_cli.tuning.tuner_pica", "PicaConfig"),
    "svft": _method("pessa_cli.tuning.tuner_svft", "SvftConfig"),
    "lora-xs": _method("pessa_cli.tuning.tuner_lora_xs", "LoraXsConfig"),
    "milora": _method("pessa_cli.tuning.tuner_sorsa", "MiloraConfig"),
    "lora": _lora(2),
    "dora": _lora(2, use_dora=True),
    "pissa": _lora(1, init_lora_weights="pissa"),
    "olora": _lora(1, init_lora_weights="olora"),
    "eva": _lora(1, init_lora_weights="eva"),
    "corda": _lora(1, init_lora_weights="corda"),
    "vera": _method("peft", "VeraConfig"),
    "boft": _method("peft", "BOFTConfig", "boft_block_size"),
    "adalora": _adalora,
}


def build_config(
    method: str, rank: int | None = None, target_modules: list[str] | None = None, **options: Any
) -> PeftConfig:
    """Build the configuration of a method by its name.

    rank, target_modules: None uses the defaults of the method, and PEFT's default layers for the type of the model.
    options: fields of the configuration class. Raises UsageError for an unknown method or option, and for the rank of a
    method without one.
    """
    if method not in TUNING_METHODS:
        raise UsageError(f"there is no method {method!r}", "give one of " + ", ".join(TUNING_METHODS))
    return TUNING_METHODS[method](rank, target_modules, **options)


def needs_data(config: PeftConfig) -> bool:
    """Whether this method is initialised from training data, as EVA and CorDA are."""
    return getattr(config, "init_lora_weights", None) in ("eva", "corda")


def attach(model: PreTrainedModel, config: PeftConfig, batches: Iterable[Mapping[str, Any]] | None = None) -> PeftModel:
    """Put a new adapter on a model, initialised from `batches` for EVA and CorDA.

    EVA starts from the principal components of each layer's inputs and distributes ranks by explained variance
    (Paischer et al. 2024, arXiv:2410.07170). CorDA starts from the decomposition of W C, where C is the covariance of
    the inputs (Yang et al. 2024, arXiv:2406.05223). batches: keyword arguments of the model; they are
    moved to its device. Raises UsageError when a method needs data and none are given, PessaError when CorDA lacks a
    package.
    """
    from peft import get_peft_model

    if not needs_data(config):
        return get_peft_model(model, config)
    if batches is None:
        raise UsageError(
            f"{config.init_lora_weights} is initialised from data, but no data are given", "pass batches to attach()"
        )
    given = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]
    if config.init_lora_weights == "eva":
        from peft import initialize_lora_eva_weights

        tuned = get_peft_model(model, config, low_cpu_mem_usage=True)
        initialize_lora_eva_weights(tuned, given)
        return tuned
    import torch

    from pessa_cli.compat.for_peft import corda

    try:
        corda_config, preprocess_corda = corda()
    except ImportError as error:
        raise PessaError(f"CorDA needs a package that PEFT does not install: {error}", "pip install attrs") from error

    @torch.no_grad()
    def run() -> None:
        for batch in given:
            for row in _rows(batch):
                model(**row)

    if config.corda_config is None:
        config.corda_config = corda_config()
    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def _rows(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the inputs of a batch one at a time without padding, because CorDA in PEFT requires a batch size of 1."""
    mask = batch.get("attention_mask")
    for i in range(len(next(iter(batch.values())))):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        if mask is not None:
            kept = mask[i].bool()
            row = {key: value[:, kept] if value.shape[:2] == (1, len(kept)) else value for key, value in row.items()}
        yield row


def callbacks(config: PeftConfig) -> list[TrainerCallback]:
    """The callbacks that a Trainer needs for this method: AdaLoRA reallocates ranks after every optimizer step."""
    from peft import AdaLoraConfig

    return [_adalora_callback()] if isinstance(config, AdaLoraConfig) else []


def _adalora_callback() -> TrainerCallback:
    from transformers import TrainerCallback

    class ReallocateRanks(TrainerCallback):  # type: ignore[misc]
        # At this point the gradients still exist; AdaLoRA scores directions by weight times gradient.
        def on_optimizer_step(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
            kwargs["model"].base_model.update_and_allocate(state.global_step)

    return ReallocateRanks()
