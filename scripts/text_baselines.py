"""Cut a LLaMA by published methods without training, to compare with, and score it on texts.

    python scripts/text_baselines.py models/smollm2-135m calibration.txt score.txt [more.txt] --shares 0.9 0.8 0.7

- modegpt: MoDeGPT (Lin et al., arXiv 2408.09632). MLPs (type I): the channels with the largest ridge leverage scores
  stay, the diagonal of C (C + I)^-1, where C is the sum of h h^T over their values h; W_down becomes
  W_down C S (S^T C S)^-1, the Nystrom approximation for the columns S of the identity that stay. Queries and keys (type
  II): the dimensions with the largest product of norms stay; under RoPE these are pairs of dimensions, which rotate
  together, and the heads that share keys have the same. Values and W_O (type III): the product of both is cut to a
  lower rank, weighed by the second moment of the inputs; for heads that share values their W_O side by side. Each of
  the three keeps the share of its layer; what rounding leaves over goes to the MLP. Layer i loses a share in proportion
  to the softmax of -s_i / epsilon, at most MOST, where s_i, the Block Influence, is one minus the mean cosine of the
  layer's inputs and outputs. An infinite epsilon gives all layers the same share.
- modegpt-mlp: the same, of MLPs alone.
- flap: FLAP (An et al., arXiv 2312.11983), with the structure AL-AM of the authors' program. The score of an input of
  W_down is its variance times the squared norm of its column, and of one of W_O the square of that; both are
  standardized in each layer. Key/value heads have the mean of their inputs' scores, and are taken out with their query
  heads. What has the smallest scores in the model goes, until the budget is met; its mean becomes a bias of W_down and
  W_O, which a stock LLaMA has no place for.

All statistics are those of the original model. A share is that of the parameters of the layers, without norms. Printed
for each text are the perplexity relative to the original's and the difference in nats per token, with the interval that
95 % of bootstrap samples of the windows fall into. Models of --models are scored, too, for example those that
`pessa prune` wrote.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.weighted import Weighting, refitted, weighted_transforms
from pessa_cli.evaluation.figures import Figure, ratio
from pessa_cli.evaluation.likelihood import Likelihoods, Passage, likelihoods
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.perplexity import Perplexity
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.surgery.model import open_model

WINDOW = 512
MOST = 0.8  # the largest share of a layer that modegpt takes out
STEPS = 60  # of the bisection for the shares of the layers


@dataclass
class Moments:
    """Sums over tokens of a vector, (N,), and of its products with itself, (N, N), in float64."""

    first: Tensor
    second: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(torch.zeros(width).double(), torch.zeros(width, width).double())

    def add(self, values: Tensor) -> None:
        flat = values.reshape(-1, len(self.first))
        self.first += flat.double().sum(0)
        self.second += (flat.mT @ flat).double()
        self.tokens += len(flat)

    @property
    def mean(self) -> Tensor:
        return self.first / self.tokens

    @property
    def variances(self) -> Tensor:
        return (self.second.diagonal() / self.tokens - self.mean.square()).clamp(min=0)


@dataclass
class LayerMoments:
    """What one layer's attention reads, what W_O reads, what W_down reads, and the sum of the Block Influence."""

    read: Moments
    attended: Moments
    hidden: Moments
    influence: float = 0.0


def _listen(sums: Moments, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    sums.add(args[0])


class Cut(NamedTuple):
    """A cut copy of a model, with zeros for what is taken out, and the share of its layers' parameters that stays."""

    model: Any
    share: float


@torch.inference_mode()
def moments(model: Any, windows: Sequence[Tensor]) -> list[LayerMoments]:
    """Run windows of tokens, (tokens,) each, through a LLaMA, and add up the moments of its layers."""
    found, removers = [], []
    for layer in model.model.layers:
        parts = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj)
        read, attended, hidden = (Moments.empty(part.in_features) for part in parts)
        one = LayerMoments(read, attended, hidden)
        for part, sums in zip(parts, (read, attended, hidden), strict=True):
            removers.append(part.register_forward_pre_hook(partial(_listen, sums)))

        def compare(_module: nn.Module, args: tuple[Tensor, ...], output: Any, one: LayerMoments = one) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            one.influence += float((1 - cosine_similarity(args[0], after, dim=-1)).sum())

        removers.append(layer.register_forward_hook(compare))
        found.append(one)
    for window in windows:
        model.model(input_ids=window[None], use_cache=False)
    for each in removers:
        each.remove()
    return found


def attention_size(layer: Any) -> int:
    return sum(int(each.numel()) for each in layer.self_attn.parameters())


def readers(layer: Any) -> tuple[Any, Any]:
    """W_O and W_down of one layer."""
    return layer.self_attn.o_proj, layer.mlp.down_proj


def size(layer: Any) -> int:
    """The number of parameters of one layer without its norms."""
    return attention_size(layer) + sum(int(each.numel()) for each in layer.mlp.parameters())


def losses(influences: Sequence[float], lost: float, epsilon: float) -> list[float]:
    """Return the share that each layer loses by MoDeGPT, at most MOST, so that their mean is `lost`."""
    weights = torch.softmax(-torch.tensor(influences).double() / epsilon, 0)
    low, high = 0.0, MOST / float(weights.min())
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * weights).clamp(max=MOST).mean()) <= lost else (low, middle)
    found: list[float] = (low * weights).clamp(max=MOST).tolist()
    return found


@torch.no_grad()
def modegpt(model: Any, sums: Sequence[LayerMoments], share: float, epsilon: float, attention: bool = True) -> Cut:
    """Cut by MoDeGPT. attention: whether attention is cut, too. Raises ValueError for a share that is too small."""
    new, left = copy.deepcopy(model), 0
    shares = [1 - lost for lost in losses([one.influence / one.read.tokens for one in sums], 1 - share, epsilon)]
    for layer, one, kept in zip(new.model.layers, sums, shares, strict=True):
        whole, channel = attention_size(layer), 3 * layer.mlp.down_proj.out_features
        of_attention = cut_attention(layer.self_attn, one.read.second, kept) if attention else whole
        width = int((kept * size(layer) - of_attention) / channel)
        if width < 1:
            raise ValueError(f"{kept:.3f} of the layers is less than their attention, {whole / size(layer):.3f}")
        cut_mlp(layer.mlp.down_proj.weight, one.hidden.second, min(width, len(one.hidden.first)))
        left += of_attention + channel * min(width, len(one.hidden.first))
    return Cut(new, left / sum(map(size, model.model.layers)))


def leverage(products: Tensor) -> Tensor:
    """Return the ridge leverage scores of channels, the diagonal of C (C + I)^-1 for C, (F, F)."""
    eye = torch.eye(len(products), dtype=products.dtype)
    return 1 - torch.cholesky_inverse(torch.linalg.cholesky(products + eye)).diagonal()


def cut_mlp(down: Tensor, products: Tensor, width: int) -> None:
    """Refit W_down, (D, F), to `width` channels, and write zeros for the others."""
    kept = leverage(products).topk(width).indices
    fitted = refitted(down.double(), products, kept, ridge=0.0)[:, kept]
    down.zero_()
    down[:, kept] = fitted.to(down.dtype)


def cut_attention(attention: Any, products: Tensor, share: float) -> int:
    """Cut queries, keys, values and W_O to a share of each head; returns the number of parameters that stay.

    products: (D, D), of the inputs. What is taken out of queries and keys becomes zero, and values are projected on
    what stays, which is the same function.
    """
    width, heads = attention.head_dim, attention.k_proj.out_features // attention.head_dim
    query, key, value = (
        part.weight.unflatten(0, (heads, -1, width)) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (key/value heads, heads of each, width, D)
    pairs, rank = (max(1, int(share * count)) for count in (width // 2, width))

    norms = [
        torch.einsum("gmdi,ij,gmdj->gd", each.double(), products, each.double()).reshape(heads, 2, -1).sum(1)
        for each in (query, key)
    ]  # squared, of the pairs of dimensions that rotate together: (key/value heads, pairs)
    lost = torch.ones_like(norms[0], dtype=torch.bool).scatter(1, (norms[0] * norms[1]).topk(pairs).indices, False)
    for each in (query, key):
        each.masked_fill_(lost.repeat(1, 2)[:, None, :, None], 0)

    values = value[:, 0].double()  # (heads, width, D)
    out = attention.o_proj.weight.unflatten(1, (heads, -1, width)).permute(1, 2, 0, 3).flatten(1, 2)
    products_of_values = values @ products @ values.mT
    found = weighted_transforms(Pair(values.mT, out.double()), Weighting(products_of_values, None, shrinkage=0.0))
    value[:, 0] = (found.right[..., :rank] @ found.left[..., :rank].mT @ values).to(value.dtype)

    each_pair, each_rank = 2 * (query[0, :, 0].numel() + key[0, :, 0].numel()), value[0, :, 0].numel() + len(out[0])
    return int(heads * (pairs * each_pair + rank * each_rank))


def standardized(scores: Tensor) -> Tensor:
    found: Tensor = (scores - scores.mean()) / scores.std()
    return found


@torch.no_grad()
def flap(model: Any, sums: Sequence[LayerMoments], share: float) -> Cut:
    """Cut by FLAP: take out key/value heads with their query heads, and channels, by one order for all layers."""
    new, layers = copy.deepcopy(model), model.model.layers
    heads, channels = model.config.num_key_value_heads, model.config.intermediate_size
    scores = []
    for layer, one in zip(layers, sums, strict=True):
        of_attention, of_mlp = (
            each.variances * part.weight.double().square().sum(0)
            for part, each in zip(readers(layer), (one.attended, one.hidden), strict=True)
        )
        of_heads = standardized(of_attention.square()).reshape(heads, -1).mean(1)
        scores.append(torch.cat([of_heads, standardized(of_mlp)]))
    prices = torch.full((heads + channels,), 3.0 * model.config.hidden_size)
    prices[:heads] = attention_size(layers[0]) / heads
    biases = sum(part.out_features for layer in layers for part in readers(layer))
    whole = sum(map(size, layers))
    order, all_prices = torch.cat(scores).argsort(descending=True), prices.repeat(len(layers)).double()
    stays = torch.zeros_like(all_prices, dtype=torch.bool)
    stays[order[all_prices[order].cumsum(0) <= share * whole - biases]] = True
    for layer, one, kept in zip(new.model.layers, sums, torch.split(stays, heads + channels), strict=True):
        each_head = len(one.attended.first) // heads
        inputs = (kept[:heads].repeat_interleave(each_head), kept[heads:])
        for part, each, some in zip(readers(layer), (one.attended, one.hidden), inputs, strict=True):
            lost = part.weight[:, ~some].double() @ each.mean[~some]
            part.weight[:, ~some] = 0
            part.bias = nn.Parameter(lost.to(part.weight.dtype))
    return Cut(new, (float(all_prices[stays].sum()) + biases) / whole)


METHODS: dict[str, Callable[[Any, Sequence[LayerMoments], float, float], Cut]] = {
    "modegpt": modegpt,
    "flap": lambda model, sums, share, _: flap(model, sums, share),
    "modegpt-mlp": lambda model, sums, share, epsilon: modegpt(model, sums, share, epsilon, attention=False),
}


def spaced(items: Sequence[Passage], count: int) -> list[Passage]:
    """Return `count` evenly spaced items; all of them for 0 or where there are no more."""
    if not 0 < count < len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def cells(found: Likelihoods, original: Likelihoods) -> Iterator[str]:
    """The perplexity to the original's, and the difference in nats per token, with intervals over the windows."""
    nats = ratio(found.nats - original.nats, original.tokens)
    for figure, form in ((Figure(nats.items, lambda indices: math.exp(nats.of(indices))), ".4f"), (nats, "+.4f")):
        low, high = figure.interval or (math.nan, math.nan)
        yield f"{figure.value:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a LLaMA")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("score", type=Path, nargs="+", help="texts")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="of the layers to keep")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[math.inf, 0.1], help="of modegpt; inf: all equal")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of cut models to score beside them")
    parser.add_argument("--tokens", type=int, default=61_000, help="of the calibration text, from its beginning")
    parser.add_argument("--windows", type=int, default=0, help="of each text, evenly spaced; 0: all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the scored models")
    args = parser.parse_args()
    with quiet_transformers():
        opened = open_model(args.model)
        model, dtype = load(opened), getattr(torch, args.dtype)
        if model.config.model_type != "llama" or any(
            name.endswith("_proj.bias") for name, _ in model.named_parameters()
        ):
            parser.error(f"{args.model} is not a LLaMA without biases")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        settings = ScoreSettings(window=WINDOW, stride=WINDOW)
        measures = [Perplexity.load(path, tokenizer, settings) for path in args.score]
        texts = [(measure.name, spaced(measure.passages(model), args.windows)) for measure in measures]
        heard = Perplexity.load(args.calibration, tokenizer, settings).documents[0][: args.tokens]
        windows = torch.split(heard[: len(heard) // WINDOW * WINDOW], WINDOW)

        def scored(one: Any) -> list[Likelihoods]:
            return [likelihoods(one.to(dtype), passages, None, name) for name, passages in texts]

        def row(*cells: str) -> None:
            print(f"| {' | '.join(cells)} |", flush=True)

        original = scored(copy.deepcopy(model))
        about = [f"{name}, {len(passages)} windows: {what}" for name, passages in texts for what in ("ratio", "nats")]
        row("method", "share", *about)
        print("|---" * (2 + 2 * len(texts)) + "|")
        values = [one.nats_per_token.value for one in original]
        row("the original", "1", *(cell for nats in values for cell in (f"{math.exp(nats):.3f}", f"{nats:.4f}")))

        def show(name: str, share: float, one: Any) -> None:
            found = zip(scored(one), original, strict=True)
            row(name, f"{share:.4f}", *(cell for pair in found for cell in cells(*pair)))

        layers = sum(map(size, model.model.layers))
        for folder in args.models:
            other = open_model(folder)
            show(folder.name, 1 - (opened.parameters - other.parameters) / layers, load(other))
        sums = moments(model, windows) if args.methods else []
        for method in args.methods:
            for epsilon in args.epsilon if method.startswith("modegpt") else [0.0]:
                for share in args.shares:
                    name = f"{method}, epsilon {epsilon:g}" if epsilon else method
                    try:
                        cut = METHODS[method](model, sums, share, epsilon)
                    except ValueError as error:
                        row(f"{name}: {error}")
                        continue
                    show(name, cut.share, cut.model)


if __name__ == "__main__":
    main()
