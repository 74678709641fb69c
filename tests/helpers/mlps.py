"""Tiny models whose MLPs matter, and what is known of their channels without pessa's own code for cutting them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from harness import Tensors, edit_weights
from torch import Tensor

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.surgery.model import Model, open_model

ROUTED = ("mixtral", "gpt_oss")  # all of their MLPs are routed experts, which are copied


def mlps_of(model: Model) -> list[MlpSite]:
    return [site for site in model.sites if isinstance(site, MlpSite)]


def strong(folder: Path) -> Path:
    """Draw the weights and biases of all MLPs of a folder from N(0, 0.4), as those of attention are."""
    names = sorted({name for site in mlps_of(open_model(folder)) for name in site.tensors})
    generator = torch.Generator().manual_seed(3)
    if names:
        edit_weights(lambda tensors: [tensors[name].normal_(0, 0.4, generator=generator) for name in names])(folder)
    return folder


def saved(name: str, folder: Path, **more: Any) -> Path:
    """Save a tiny model of the table with strong MLPs; more: as for `tiny_models.build`."""
    tiny_models.build(name, **more).save_pretrained(folder)
    return strong(folder)


def without_channels(site: MlpSite, channels: Tensor) -> Callable[[Tensors], None]:
    """Return an edit of a file that lets no one read these channels of an MLP, by the layout of its tensors alone."""

    def edit(tensors: Tensors) -> None:
        weight = tensors[f"{site.out}.weight"]
        weight[channels if site.spec.transposed else (slice(None), channels)] = 0.0

    return edit
