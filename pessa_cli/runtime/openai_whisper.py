"""Running compact Whisper models in openai-whisper, whose code for decoding, timestamps and caches is unchanged.

At loading the heads are sorted into a few buckets, each as wide as its widest head, with zero rows in narrower heads.
So queries, keys and values are split into heads by reshaping alone, and caches have the reduced width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.common.errors import PessaError
from pessa_cli.runtime.bucketed_attention import DECODING, ENCODING
from pessa_cli.runtime.buckets import Bucket, plan
from pessa_cli.runtime.openai_form import OpenAIForm, alignment_mask, openai_form
from pessa_cli.sources.open import open_source
from pessa_cli.surgery.block_io import read_site
from pessa_cli.surgery.model import open_model

try:
    from pessa_cli.compat.for_whisper import (
        Linear,
        ModelDimensions,
        MultiHeadAttention,
        ResidualAttentionBlock,
        Whisper,
        uses_fused_attention,
    )
except ImportError as error:
    raise PessaError(f"openai-whisper cannot be imported: {error}", "pip install 'pessa[whisper]'") from error


JOINING = 15  # microseconds per bucket to split rows and join results, measured in a layer of Whisper tiny at decoding


def buckets_of(site: AttentionSite) -> Sequence[Bucket]:
    """Return buckets with all heads of the block, or none if openai-whisper's own attention is as fast.

    The costs are those measured for transformers' attention on a CPU, since both use the same kernels; splitting rows
    and joining results costs more per bucket here.
    """
    measured = (ENCODING if site.kind.startswith("encoder") else DECODING)["cpu"]
    cost = replace(measured, call=measured.call + JOINING)
    # A head with V-O rank 0 must keep its scores, because it may be an alignment head.
    planned = plan(site.qk_ranks, tuple(max(1, rank) for rank in site.vo_ranks), site.head_dim, cost)
    return planned.buckets if planned.cost < planned.original - JOINING else ()


class RaggedAttention(MultiHeadAttention):  # type: ignore[misc]
    """openai-whisper's attention for heads of different widths, ordered bucket by bucket."""

    def __init__(self, n_state: int, n_head: int, buckets: Sequence[Bucket]) -> None:
        nn.Module.__init__(self)
        self.n_head = n_head
        self.buckets = buckets
        head_dim = n_state // n_head  # may not be a multiple of 8, to which widths of buckets are rounded up
        self.scale = head_dim**-0.5  # the scale of the original heads, whatever their ranks are
        self.qk_widths = [len(bucket.heads) * min(bucket.qk, head_dim) for bucket in buckets]
        self.vo_widths = [len(bucket.heads) * min(bucket.vo, head_dim) for bucket in buckets]
        order = [head for bucket in buckets for head in bucket.heads]
        self.places = [order.index(head) for head in range(n_head)]
        self.query = Linear(n_state, sum(self.qk_widths))
        self.key = Linear(n_state, sum(self.qk_widths), bias=False)
        self.value = Linear(n_state, sum(self.vo_widths))
        self.out = Linear(sum(self.vo_widths), n_state)

    def qkv_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of all heads, (B, T, sum of value widths), and the scores, (B, heads, T, F), or None.

        q: (B, T, sum of key widths). k, v: (B or 1, F, sum of key or value widths); the size 1 if the beams of a beam
        search share them. The scores are None with the fused kernel.
        """
        outputs: list[Tensor] = []
        scores: list[Tensor] = []
        for q_heads, k_heads, v_heads in zip(
            self._heads(q, self.qk_widths), self._heads(k, self.qk_widths), self._heads(v, self.vo_widths), strict=True
        ):
            if uses_fused_attention():
                output = self._fused(q_heads, k_heads, v_heads, causal=mask is not None and q.shape[1] > 1)
            else:
                output, score = self._plain(q_heads, k_heads, v_heads, mask)
                scores.append(score)
            outputs.append(output.transpose(1, 2).flatten(start_dim=2))
        return torch.cat(outputs, -1), torch.cat(scores, 1)[:, self.places] if scores else None

    def _heads(self, x: Tensor, widths: list[int]) -> list[Tensor]:
        """Split (B, T, sum of widths) into (B, heads of the bucket, T, width) for each bucket."""
        parts = torch.split(x, widths, dim=-1)
        return [
            part.view(*part.shape[:2], len(bucket.heads), -1).transpose(1, 2)
            for bucket, part in zip(self.buckets, parts, strict=True)
        ]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        width, read = q.shape[-1], v.shape[-1]
        if q.shape[2] > 1 and width != read:  # the fast kernel for many queries needs q, k and v of equal width
            most = max(width, read)
            q, k, v = (nn.functional.pad(part, (0, most - part.shape[-1])) for part in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale)[..., :read]

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute attention with explicit scores, which word timestamps need, as openai-whisper does."""
        root = self.scale**0.5
        scores = (q * root) @ (k * root).transpose(-1, -2)
        if mask is not None:
            scores = scores + mask[: q.shape[2], : q.shape[2]]
        scores = scores.float()
        return scores.softmax(dim=-1).to(q.dtype) @ v, scores.detach()


def load_whisper(model: str | Path, device: str | torch.device | None = None) -> Whisper:
    """Load a model as a `whisper.Whisper` in float32, like whisper.load_model; all methods work.

    `model` is a folder, compact or dense, or any other source that the command line accepts. Compact blocks compute
    with their kept directions only; dense blocks use openai-whisper's own attention. The alignment heads come from
    generation_config.json. The default `device` is CUDA if available, as in openai-whisper.

    Raises PessaError if openai-whisper cannot run the model (see `openai_form`).
    """
    with open_source(str(model)) as folder:
        form = openai_form(open_model(folder))
        loaded = _model_on_meta(form)
        others = {theirs: ours for theirs, ours in form.names.items() if ours not in form.attention}
        state = {theirs: form.tensor(ours).float() for theirs, ours in others.items()}
        theirs_of = {ours: theirs for theirs, ours in form.names.items()}
        for site in form.model.attention:
            weights = read_site(form.model.reader, site)
            name = theirs_of[f"{site.q}.weight"].removesuffix(".query.weight")
            buckets = buckets_of(site)
            if buckets:
                with torch.device("meta"):
                    attention = RaggedAttention(site.query_width, site.heads, buckets)
                loaded.set_submodule(name, attention)
            tensors = _in_buckets(weights, buckets or [_single_bucket(site)])
            state |= {f"{name}.{key}": tensor.float() for key, tensor in tensors.items()}
        for mlp in form.model.sites:
            if isinstance(mlp, MlpSite):
                _narrow(loaded, mlp, theirs_of)
        loaded.load_state_dict(state, assign=True)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.eval().to(chosen)


def _narrow(loaded: Whisper, site: MlpSite, theirs_of: Mapping[str, str]) -> None:
    """Give the linear layers of an MLP the number of channels that the file stores."""
    for module in site.modules.values():
        name = theirs_of[f"{module}.weight"].removesuffix(".weight")
        rows, columns = site.tensors[f"{module}.weight"]
        with torch.device("meta"):
            loaded.set_submodule(name, type(loaded.get_submodule(name))(columns, rows))


def _model_on_meta(form: OpenAIForm) -> Whisper:
    """Return the model with its layers and embedding on the meta device, so that they take no memory yet.

    The other parts are small, and some of them cannot be created on the meta device.
    """
    dims = ModelDimensions(**form.dims)
    model = Whisper(replace(dims, n_vocab=1, n_audio_layer=0, n_text_layer=0))
    model.dims = dims
    with torch.device("meta"):
        model.decoder.token_embedding = nn.Embedding(dims.n_vocab, dims.n_text_state)
        for _ in range(dims.n_audio_layer):
            model.encoder.blocks.append(ResidualAttentionBlock(dims.n_audio_state, dims.n_audio_head))
        for _ in range(dims.n_text_layer):
            model.decoder.blocks.append(ResidualAttentionBlock(dims.n_text_state, dims.n_text_head, True))
    model.register_buffer("alignment_heads", alignment_mask(form).to_sparse(), persistent=False)
    return model


def _single_bucket(site: AttentionSite) -> Bucket:
    """Return a bucket with all heads at their original width."""
    return Bucket(tuple(range(site.heads)), site.head_dim, site.head_dim, site.head_dim)


def _in_buckets(weights: HeadWeights, buckets: Sequence[Bucket]) -> dict[str, Tensor]:
    """Return the block's tensors under openai-whisper's names, with the heads in the order of the buckets.

    The canonical form has zeros in cut directions, so all heads of a bucket can be cut to the same width.
    """

    def rows(tensor: Tensor, side: str) -> Tensor:
        """Cut each head to the width of its bucket: (heads, d, ...) -> (sum of widths, ...)."""
        cuts = [tensor[list(bucket.heads), : getattr(bucket, side)] for bucket in buckets]
        return torch.cat([cut.flatten(0, 1) for cut in cuts])

    assert weights.q_bias is not None  # openai_form has checked that these biases exist, and k_bias does not
    assert weights.v_bias is not None
    assert weights.o_bias is not None
    return {
        "query.weight": rows(weights.q[:, 0], "qk"),
        "query.bias": rows(weights.q_bias[:, 0], "qk"),
        "key.weight": rows(weights.k, "qk"),
        "value.weight": rows(weights.v, "vo"),
        "value.bias": rows(weights.v_bias, "vo"),
        "out.weight": rows(weights.o[:, :, 0].permute(1, 2, 0), "vo").T.contiguous(),
        "out.bias": weights.o_bias,
    }
