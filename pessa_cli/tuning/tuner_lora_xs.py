"""LoRA-XS: dW = B R A, where only R (r, r) is trained (Balazy et al. 2024, arXiv:2405.17604).

A = diag(s) V^T and B = U come from the truncated SVD of the weight and are frozen. The adapter's file contains them,
because recomputed singular vectors may have other signs. R starts at zero, so that the start is exactly the base model;
its gradient is not zero there. (The paper starts at random numbers of size 1e-5.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from pessa_cli.tuning.peft_plugin import TunerMethod
from pessa_cli.tuning.truncated_svd import triplets
from pessa_cli.tuning.tuner_base import AdditiveLayer, Tuner, TunerConfig, option, working_dtype


@dataclass
class LoraXsConfig(TunerConfig):
    """The options of LoRA-XS."""

    method: ClassVar[str] = "loraxs"

    r: int = option("Adapter rank, at most that of the weight.", 32)
    alpha: float | None = option("Scales the update by alpha / r, as in LoRA; the default scales by 1.")
    niter: int | None = option("Iterations of a randomised SVD; the default is an exact SVD.")


class LoraXsLayer(AdditiveLayer):
    """A linear layer with LoRA-XS adapters."""

    adapter_layer_names = ("loraxs_R",)  # (r, r)
    frozen_names = ("loraxs_A", "loraxs_B")  # (r, in), (out, r)
    setting_names = ("loraxs_scale",)

    loraxs_R: nn.ParameterDict  # noqa: N815
    loraxs_A: Any  # noqa: N815
    loraxs_B: Any  # noqa: N815
    loraxs_scale: dict[str, float]

    def initial(self, config: LoraXsConfig, weight: Tensor, bias: Tensor | None, **context: Any) -> dict[str, Any]:  # noqa: ARG002
        u, s, v = triplets(weight, config.r, niter=config.niter)
        r = s.new_zeros(len(s), len(s))
        return {
            "loraxs_R": r if config.init_weights else r.normal_(std=0.1),
            "loraxs_A": s[:, None] * v,
            "loraxs_B": u,
            "loraxs_scale": 1.0 if config.alpha is None else config.alpha / config.r,
        }

    def delta(self, adapter: str) -> Tensor:
        dtype = working_dtype(self.loraxs_R[adapter].dtype)
        b, r, a = (factors[adapter].to(dtype) for factors in (self.loraxs_B, self.loraxs_R, self.loraxs_A))
        delta: Tensor = self.loraxs_scale[adapter] * (b @ r @ a)
        return delta

    def change(self, adapter: str, x: Tensor) -> Tensor:
        for factors in (self.loraxs_A, self.loraxs_R, self.loraxs_B):
            x = nn.functional.linear(x, factors[adapter].to(x.dtype))
        return x * self.loraxs_scale[adapter]


class LoraXsTuner(Tuner):
    """A model with LoRA-XS adapters."""

    prefix = "loraxs_"
    tuner_layer_cls = LoraXsLayer


METHODS = (TunerMethod("loraxs", LoraXsConfig, LoraXsTuner),)
