"""SORSA and MiLoRA: some singular triplets of a weight are trained, the rest of it stays.

Both are written W = W_r + B A, with W_r what is left of the weight without its triplets. Here the base keeps its whole
weight, and a layer adds the difference between the triplets as trained and as they were, B A - B0 A0: the start is an
exact no-op, and disabling an adapter gives the base back bit for bit. The file holds both, so that reloading does not
depend on the signs (or the order, where two are equal) of singular vectors computed again.
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
    """SORSA (Cao 2024, arXiv 2409.00055): W = W_r + B diag(S) A with the largest r triplets."""

    method: ClassVar[str] = "sorsa"

    r: int = option("How many singular triplets to train, at most all.", 8)
    gamma: float = option("Weight of the orthonormal regulariser; see `SorsaTrainer`.", 4e-4)
    niter: int | None = option("Iterations of a randomised SVD; by default it is exact.")


@dataclass
class MiloraConfig(TunerConfig):
    """MiLoRA (Wang et al. 2024, arXiv 2406.09044): W = W_p + B A with the smallest r triplets, shared out evenly."""

    method: ClassVar[str] = "milora"

    r: int = option("How many singular triplets to train, at most all.", 8)


class DifferenceLayer(AdditiveLayer):
    """dW = product of the trained factors - product of the same as they were, which are named with a 0 at the end.

    Factors are listed from the input on: matrices, and vectors that scale.
    """

    def factors(self, config: Any, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors at the start."""
        raise NotImplementedError

    def initial(self, config: Any, weight: Tensor, bias: Tensor | None, **context: Any) -> dict[str, Any]:  # noqa: ARG002
        factors = self.factors(config, weight)
        # PEFT rounds what is trained to the dtype of the base: rounding the copies too is what keeps the start exact.
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is not None and dtype.is_floating_point:
            factors = tuple(factor.to(dtype).to(factor.dtype) for factor in factors)
        noise = 0.0 if config.init_weights else 0.1
        trained = (factor + noise * torch.randn_like(factor) for factor in factors)
        names = self.adapter_layer_names + self.frozen_names
        return dict(zip(names, (*trained, *factors), strict=True))

    def _factors(self, adapter: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """The factors as trained and as they were."""
        after, before = (
            [getattr(self, name)[adapter].to(dtype) for name in names]
            for names in (self.adapter_layer_names, self.frozen_names)
        )
        return after, before

    def delta(self, adapter: str) -> Tensor:
        after, before = self._factors(adapter, working_dtype(self._trained(adapter)[0].dtype))
        return _product(after) - _product(before)

    def change(self, adapter: str, x: Tensor) -> Tensor:
        after, before = self._factors(adapter, x.dtype)
        return _through(x, after) - _through(x, before)


class SorsaLayer(DifferenceLayer):
    adapter_layer_names = ("sorsa_A", "sorsa_S", "sorsa_B")  # (r, in), (r,), (out, r)
    frozen_names = ("sorsa_A0", "sorsa_S0", "sorsa_B0")

    def factors(self, config: SorsaConfig, weight: Tensor) -> tuple[Tensor, ...]:
        u, s, v = triplets(weight, config.r, niter=config.niter)
        return v, s, u


class MiloraLayer(DifferenceLayer):
    adapter_layer_names = ("milora_A", "milora_B")  # (r, in), (out, r)
    frozen_names = ("milora_A0", "milora_B0")

    def factors(self, config: MiloraConfig, weight: Tensor) -> tuple[Tensor, ...]:
        u, s, v = triplets(weight, config.r, smallest=True)
        return s.sqrt()[:, None] * v, u * s.sqrt()


class SorsaTuner(Tuner):
    prefix = "sorsa_"
    tuner_layer_cls = SorsaLayer


class MiloraTuner(Tuner):
    prefix = "milora_"
    tuner_layer_cls = MiloraLayer


METHODS = (TunerMethod("sorsa", SorsaConfig, SorsaTuner), TunerMethod("milora", MiloraConfig, MiloraTuner))


def regularizer(model: nn.Module) -> Tensor:
    """How far the active SORSA adapters are from orthonormal, a scalar in float32.

    The mean over all A and B of ||A A^T - I|| and ||B^T B - I||, Frobenius norms and not squared, as in the paper.
    Raises PessaError where there are none.
    """
    norms = []
    for layer in model.modules():
        if isinstance(layer, SorsaLayer):
            for adapter in layer._present(layer.active_adapters):
                norms += [_off_orthonormal(layer.sorsa_A[adapter]), _off_orthonormal(layer.sorsa_B[adapter].mT)]
    if not norms:
        raise PessaError("there is no active SORSA adapter to regularise")
    return torch.stack([norm.to(norms[0].device) for norm in norms]).mean()


class SorsaTrainer:
    """A mixin for a Trainer that adds SORSA's regulariser to the loss: `class MyTrainer(SorsaTrainer, Trainer): ...`.

    The paper moves the weights by learning rate x gradient of the loss + gamma x gradient of the regulariser, both on
    the same schedule. An optimizer has one learning rate, so that the regulariser enters the loss with
    gamma / learning rate (13.3 in the paper's runs). Evaluation is left alone. In a loop of one's own:
    `loss + gamma / learning_rate * regularizer(model)`.
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
                # Then the Trainer sums the losses of a step's batches instead of taking their mean.
                weight /= self.current_gradient_accumulation_steps
            loss = loss + weight * regularizer(model)
        return (loss, outputs) if return_outputs else loss


def gamma(model: nn.Module) -> float:
    """The weight of the regulariser, from the active adapter's configuration."""
    for module in model.modules():
        if isinstance(module, SorsaTuner):
            value: float = module.peft_config[module.active_adapters[0]].gamma
            return value
    raise PessaError("there is no SORSA adapter on this model")


def _off_orthonormal(rows: Tensor) -> Tensor:
    rows = rows.float()
    norm: Tensor = torch.linalg.matrix_norm(rows @ rows.mT - torch.eye(len(rows), device=rows.device))
    return norm


def _through(x: Tensor, factors: list[Tensor]) -> Tensor:
    """What the factors, one after the other, make of x (..., in)."""
    for factor in factors:
        x = x * factor if factor.ndim == 1 else nn.functional.linear(x, factor)
    return x


def _product(factors: list[Tensor]) -> Tensor:
    """The factors as one matrix (out, in)."""
    product, *others = factors
    for factor in others:
        product = factor[:, None] * product if factor.ndim == 1 else factor @ product
    return product
