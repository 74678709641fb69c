"""The decomposition of one block of either kind: an attention block into factors, an MLP into ordered channels.

`decompose_block` computes the spectra and what turns the block's weights into the form that the spectra belong to.
`factored` applies that at full width. `cut` adapts the rest to the kept directions and channels, and
`surgery.block_io.write_site` then drops the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.channels import ChannelWeights, Weights
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.statistics.sums import AttentionStatistics, BlockStatistics, MlpStatistics
from pessa_cli.surgery.attention_block import (
    BlockTransforms,
    attention_factors,
    attention_spectra,
    cut_attention,
    decompose_attention,
)
from pessa_cli.surgery.mlp_block import ChannelOrder, cut_mlp, decompose_mlp, ordered_channels
from pessa_cli.surgery.rewrite import Ranking

Form = BlockTransforms | ChannelOrder  # what turns the weights of a block into factors, or into ordered channels


@dataclass(frozen=True)
class DecomposedBlock:
    """The spectra of a block, and what turns its weights into the form that the spectra belong to.

    form: None if the checkpoint already stores the block in this form.
    """

    spectra: Spectra
    form: Form | None


def form_of(site: Site, tensors: Mapping[str, Tensor]) -> Form:
    """Rebuild the form of a block from its tensors."""
    return ChannelOrder.of(tensors) if isinstance(site, MlpSite) else BlockTransforms.of(tensors)


def spectra_of(weights: Weights, site: Site, ranking: Ranking) -> Spectra:
    """Compute the spectra of a block from its weights alone; of attention this is a third of the whole work."""
    if isinstance(weights, ChannelWeights):
        return decompose_mlp(weights)[0]
    assert isinstance(site, AttentionSite)
    return attention_spectra(weights, site, ranking)


def decompose_block(
    weights: Weights, site: Site, ranking: Ranking, found: BlockStatistics | None = None
) -> DecomposedBlock:
    """Decompose a block in float64.

    found: the calibration statistics of the block, by which directions and channels are weighed; None to use the
    weights alone. Raises PessaError if the moments of an MLP's statistics are not those of any data.
    """
    if isinstance(weights, ChannelWeights):
        assert found is None or isinstance(found, MlpStatistics)
        try:
            return DecomposedBlock(*decompose_mlp(weights, found))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise PessaError(
                f"the statistics of {site.name} are damaged: a second moment has negative eigenvalues",
                "collect them again",
            ) from error
    assert isinstance(site, AttentionSite)
    assert found is None or isinstance(found, AttentionStatistics)
    return DecomposedBlock(*decompose_attention(weights, site, ranking, found))


def factored(weights: Weights, site: Site, form: Form) -> Weights:
    """Return the block in the given form at full width, in the dtypes of `weights`: the same function of its inputs."""
    if isinstance(weights, ChannelWeights):
        assert isinstance(form, ChannelOrder)
        return ordered_channels(weights, form)
    assert isinstance(site, AttentionSite)
    assert isinstance(form, BlockTransforms)
    return attention_factors(weights, site, form)


def cut(weights: Weights, kept: Site, form: Form) -> Weights:
    """Refit a block in the given form to what `kept` keeps; without calibration, return it unchanged."""
    if isinstance(weights, ChannelWeights):
        assert isinstance(kept, MlpSite)
        assert isinstance(form, ChannelOrder)
        return cut_mlp(weights, kept, form)
    assert isinstance(kept, AttentionSite)
    assert isinstance(form, BlockTransforms)
    return cut_attention(weights, kept, form)
