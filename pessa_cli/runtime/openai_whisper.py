"""openai-whisper's own Whisper on compact weights: decoding, timestamps and caches are its code, unchanged.

Heads are sorted into a few buckets at loading, each as wide as its widest head, with zero rows in the others. So
queries, keys and values fall into heads by reshaping alone, and a cache holds what the ranks need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import Site
from pessa_cli.common.errors import PessaError
from pessa_cli.runtime.bucketed_attention import DECODING, ENCODING
from pessa_cli.runtime.buckets import Bucket, plan
from pessa_cli.runtime.openai_form import OpenAIForm, alignment_mask, openai_form
from pessa_cli.sources.open import open_source
from pessa_cli.surgery.block_io import read_site
from pessa_cli.surgery.model import open_model

try:
    from whisper.model import Linear, ModelDimensions, MultiHeadAttention, ResidualAttentionBlock, Whisper
except ImportError as error:
    raise PessaError(f"openai-whisper cannot be imported: {error}", "pip install 'pessa[whisper]'") from None


JOINING = 15  # microseconds a bucket, from timing a layer of Whisper tiny at decoding


def buckets_of(site: Site) -> Sequence[Bucket]:
    """The block's heads in buckets, all of them; none where openai-whisper's own attention would be as fast.

    Costs are those of transformers' attention, on a CPU for want of others: the kernels are the same. Cutting the
    rows and joining the results is more work a bucket here.
    """
    measured = (ENCODING if site.spec.kind.startswith("encoder") else DECODING)["cpu"]
    cost = replace(measured, call=measured.call + JOINING)
    # A head that gives nothing keeps its scores: it may be one of those that follow time.
    planned = plan(site.qk_ranks, tuple(max(1, rank) for rank in site.vo_ranks), site.head_dim, cost)
    return planned.buckets if planned.cost < planned.original - JOINING else ()


class RaggedAttention(MultiHeadAttention):  # type: ignore[misc]
    """openai-whisper's attention over heads of different widths, those of one bucket after the other."""

    def __init__(self, n_state: int, n_head: int, buckets: Sequence[Bucket]) -> None:
        nn.Module.__init__(self)
        self.n_head = n_head
        self.buckets = buckets
        head_dim = n_state // n_head  # which need not be a multiple of what buckets are rounded up to
        self.scale = head_dim**-0.5  # of the original heads, whatever is left of them
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
        """What the heads read, (B, T, width of values), and their scores, (B, heads, T, F), unless they are fused.

        q: (B, T, width of keys); k, v: (B or 1, F, their width), 1 where the beams of a search share them.
        """
        outputs: list[Tensor] = []
        scores: list[Tensor] = []
        for q_heads, k_heads, v_heads in zip(
            self._heads(q, self.qk_widths), self._heads(k, self.qk_widths), self._heads(v, self.vo_widths), strict=True
        ):
            if MultiHeadAttention.use_sdpa:
                output = self._fused(q_heads, k_heads, v_heads, causal=mask is not None and q.shape[1] > 1)
            else:
                output, score = self._plain(q_heads, k_heads, v_heads, mask)
                scores.append(score)
            outputs.append(output.transpose(1, 2).flatten(start_dim=2))
        return torch.cat(outputs, -1), torch.cat(scores, 1)[:, self.places] if scores else None

    def _heads(self, x: Tensor, widths: list[int]) -> list[Tensor]:
        """(B, T, all of them) -> (B, heads of a bucket, T, width) for each bucket."""
        parts = torch.split(x, widths, dim=-1)
        return [
            part.view(*part.shape[:2], len(bucket.heads), -1).transpose(1, 2)
            for bucket, part in zip(self.buckets, parts, strict=True)
        ]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        width, read = q.shape[-1], v.shape[-1]
        if q.shape[2] > 1 and width != read:  # the fast kernel for many queries wants one width
            most = max(width, read)
            q, k, v = (nn.functional.pad(part, (0, most - part.shape[-1])) for part in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale)[..., :read]

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """As openai-whisper computes it where the scores are wanted, for the timestamps of words."""
        root = self.scale**0.5
        scores = (q * root) @ (k * root).transpose(-1, -2)
        if mask is not None:
            scores = scores + mask[: q.shape[2], : q.shape[2]]
        scores = scores.float()
        return scores.softmax(dim=-1).to(q.dtype) @ v, scores.detach()


def load_whisper(model: str | Path, device: str | torch.device | None = None) -> Whisper:
    """The model as a `whisper.Whisper`, float32 like those of whisper.load_model; `transcribe()` and all else work.

    `model` is a folder, compact or dense, or whatever else the command line takes. A compact block computes with
    its kept directions only; a dense one is openai-whisper's own. The heads that follow time come from
    generation_config.json. Without a `device` it is CUDA where there is one, as in openai-whisper.

    Raises PessaError for a model that openai-whisper would not compute (see `openai_form`).
    """
    with open_source(str(model)) as folder:
        form = openai_form(open_model(folder))
        loaded = _hollow(form)
        others = {theirs: ours for theirs, ours in form.names.items() if ours not in form.attention}
        state = {theirs: form.tensor(ours).float() for theirs, ours in others.items()}
        theirs_of = {ours: theirs for theirs, ours in form.names.items()}
        for site in form.model.sites:
            weights = read_site(form.model.reader, site)
            name = theirs_of[f"{site.q}.weight"].removesuffix(".query.weight")
            buckets = buckets_of(site)
            if buckets:
                with torch.device("meta"):
                    attention = RaggedAttention(site.query_width, site.heads, buckets)
                loaded.set_submodule(name, attention)
            tensors = _in_buckets(weights, buckets or [_whole(site)])
            state |= {f"{name}.{key}": tensor.float() for key, tensor in tensors.items()}
        loaded.load_state_dict(state, assign=True)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.eval().to(chosen)


def _hollow(form: OpenAIForm) -> Whisper:
    """The model with what is large taking no memory yet; some of the rest cannot be made on meta."""
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


def _whole(site: Site) -> Bucket:
    return Bucket(tuple(range(site.heads)), site.head_dim, site.head_dim, site.head_dim)


def _in_buckets(weights: HeadWeights, buckets: Sequence[Bucket]) -> dict[str, Tensor]:
    """The block's tensors under openai-whisper's names, head after head in the order of the buckets.

    The canonical form has zeros in cut directions, so a bucket's heads can all be cut at the same width.
    """

    def rows(tensor: Tensor, side: str) -> Tensor:
        """(heads, d, ...) -> (sum of widths, ...)"""
        cuts = [tensor[list(bucket.heads), : getattr(bucket, side)] for bucket in buckets]
        return torch.cat([cut.flatten(0, 1) for cut in cuts])

    assert weights.q_bias is not None  # openai_form has seen that these are there, and k_bias is not
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
