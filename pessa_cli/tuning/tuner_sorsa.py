"""SORSA and MiLoRA: train some singular triplets of a weight and freeze the rest.

The papers write W = W_r + B A, where W_r is the weight without the trained triplets. Here the base keeps its whole
weight, and a layer adds the difference between the trained and the initial triplets, B A - B0 A0. The start is then
exactly the base model, and disabling an adapter restores the base bit for bit. The adapter's file contains both sets of
factors, because recomputed singular vectors may have other signs, or another order where singular values are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pessa_cli.common.errors import PessaError
from pessa_cli.tuning.peft_plugin import TunerMethod
from pessa_cli.tuning.truncated_svd import triplets
from pessa_cli.tuning.tuner_base import AdditiveLayer, Tuner, TunerConfig, option, working_dtype


@dataclass
class SorsaConfig(TunerConfig):
    """SORSA (Cao 2024, arXiv:2409.00055): W = W_r + B diag(S) A, with the r largest triplets."""

    method: ClassVar[str] = "sorsa"

    r: int = option("Number of singular triplets to train, at most all.", 8)
    gamma: float = option("Weight of the orthonormality regulariser; see `SorsaTrainer`.", 4e-4)
    niter: int | None = option("Iterations of a randomised SVD; the default is an exact SVD.")


@dataclass
class MiloraConfig(TunerConfig):
    """MiLoRA (Wang et al. 2024, arXiv:2406.09044): W = W_p + B A, with the r smallest triplets split evenly."""

    method: ClassVar[str] = "milora"

    r: int = option("Number of singular triplets to train, at most all.", 8)


class DifferenceLayer(AdditiveLayer):
    """A layer with dW = product of the trained factors - product of the initial factors, whose names end in 0.

    Factors are ordered from the input to the output. A vector is a diagonal matrix.
    """

    def factors(self, config: Any, weight: Tensor) -> tuple[Tensor, ...]:
        """The initial factors for a weight (out, in)."""
        raise NotImplementedError

    def initial(self, config: Any, weight: Tensor, bias: Tensor | None, **context: Any) -> dict[str, Any]:  # noqa: ARG002
        factors = self.factors(config, weight)
        # PEFT rounds trained parameters to the dtype of the base. Rounding the copies, too, keeps the start exact.
        dtype = self.base_dtype()
        if dtype is not None:
            factors = tuple(factor.to(dtype).to(factor.dtype) for factor in factors)
        noise = 0.0 if config.init_weights else 0.1
        trained = (factor + noise * torch.randn_like(factor) for factor in factors)
        names = self.adapter_layer_names + self.frozen_names
        return dict(zip(names, (*trained, *factors), strict=True))

    def _factors(self, adapter: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """The trained and the initial factors."""
        after, before = (
            [getattr(self, name)[adapter].to(dtype) for name in names]
            for names in (self.adapter_layer_names, self.frozen_names)
        )
        return after, before

    def delta(self, adapter: str) -> Tensor:
        after, before = self._factors(adapter, working_dtype(self.trained(adapter)[0].dtype))
        return _product(after) - _product(before)

    def change(self, adapter: str, x: Tensor) -> Tensor:
        after, before = self._factors(adapter, x.dtype)
        return _through(x, after) - _through(x, before)


class SorsaLayer(DifferenceLayer):
    """A linear layer with SORSA adapters."""

    adapter_layer_names = ("sorsa_A", "sorsa_S", "sorsa_B")  # (r, in), (r,), (out, r)
    frozen_names = ("sorsa_A0", "sorsa_S0", "sorsa_B0")

    def factors(self, config: SorsaConfig, weight: Tensor) -> tuple[Tensor, ...]:
        u, s, v = triplets(weight, config.r, niter=config.niter)
        return v, s, u


class MiloraLayer(DifferenceLayer):
    """A linear layer with MiLoRA adapters."""

    adapter_layer_names = ("milora_A", "milora_B")  # (r, in), (out, r)
    frozen_names = ("milora_A0", "milora_B0")

    def factors(self, config: MiloraConfig, weight: Tensor) -> tuple[Tensor, ...]:
        u, s, v = triplets(weight, config.r, smallest=True)
        return s.sqrt()[:, None] * v, u * s.sqrt()


class SorsaTuner(Tuner):
    """A model with SORSA adapters."""

    prefix = "sorsa_"
    tuner_layer_cls = SorsaLayer


class MiloraTuner(Tuner):
    """A model with MiLoRA adapters."""

    prefix = "milora_"
    tuner_layer_cls = MiloraLayer


METHODS = (TunerMethod("sorsa", SorsaConfig, SorsaTuner), TunerMethod("milora", MiloraConfig, MiloraTuner))


def regularizer(model: nn.Module) -> Tensor:
    """The regulariser of SORSA over all active adapters, a float32 scalar.

    It is the mean over all A and B of the Frobenius norms ||A A^T - I|| and ||B^T B - I||, not squared, as in
    arXiv:2409.00055. Raises PessaError when no SORSA adapter is active.
    """
    norms = []
    for layer in model.modules():
        if isinstance(layer, SorsaLayer):
            for adapter in layer.present(layer.active_adapters):
                norms += [_off_orthonormal(layer.sorsa_A[adapter]), _off_orthonormal(layer.sorsa_B[adapter].mT)]
    if not norms:
        raise PessaError(
            "there is no active SORSA adapter to regularise", "attach one: get_peft_model(model, SorsaConfig())"
        )
    return torch.stack([norm.to(norms[0].device) for norm in norms]).mean()


class SorsaTrainer:
    """A mixin that adds SORSA's regulariser to the loss of a Trainer: `class MyTrainer(SorsaTrainer, Trainer): ...`.

    The paper updates weights by learning_rate * gradient of the loss + gamma * gradient of the regulariser, both on the
    same schedule. An optimizer has one learning rate, so the regulariser enters the loss with the weight
    gamma / learning_rate, which is 13.3 in the paper's runs. Evaluation losses stay unchanged. In your own training
    loop use `loss + gamma / learning_rate * regularizer(model)`.
    """

    args: Any
    model_accepts_loss_kwargs: bool
    current_gradient_accumulation_steps: int

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        if model.training:
            weight = gamma(model) / self.args.learning_rate
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                # In this case the Trainer adds up the losses of a step's micro-batches instead of averaging them.
                weight /= self.current_gradient_accumulation_steps
            loss = loss + weight * regularizer(model)
        return (loss, outputs) if return_outputs else loss


def gamma(model: nn.Module) -> float:
    """The regulariser's weight in the active adapter's configuration. Raises PessaError without a SORSA adapter."""
    for module in model.modules():
        if isinstance(module, SorsaTuner):
            value: float = module.peft_config[module.active_adapters[0]].gamma
            return value
    raise PessaError("there is no SORSA adapter on this model", "attach one: get_peft_model(model, SorsaConfig())")


def _off_orthonormal(rows: Tensor) -> Tensor:
    """||rows rows^T - I||, the Frobenius norm."""
    rows = rows.float()
    norm: Tensor = torch.linalg.matrix_norm(rows @ rows.mT - torch.eye(len(rows), device=rows.device))
    return norm


def _through(x: Tensor, factors: list[Tensor]) -> Tensor:
    """Apply the factors one after the other to x (..., in)."""
    for factor in factors:
        x = x * factor if factor.ndim == 1 else nn.functional.linear(x, factor)
    return x


def _product(factors: list[Tensor]) -> Tensor:
    """The product of the factors, (out, in)."""
    product, *others = factors
    for factor in others:
        product = factor[:, None] * product if factor.ndim == 1 else factor @ product
    return product
