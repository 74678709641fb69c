"""The algebra: absorb two projections of a head into their product, decompose it, cut it, and go back.

Everything is batched over the key/value heads (G) and in float64. The D x D product itself is never formed:
thin QR of both factors leaves a d x d core, whose SVD is the SVD of the product (PESSA/CLOVER, arXiv 2411.17426,
section 3; the stacking of a group's query heads makes grouped queries exact).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.errors import PessaError
from pessa_cli.heads import HeadWeights
from pessa_cli.sites import Site

WELL_CONDITIONED = 1e-3
MOST_PRODUCT = 1e150  # whose square is still a number


@dataclass(frozen=True)
class Pair:
    """Two factors that only matter through their product `left @ right.mT`: (G, L, d) and (G, R, d)."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Factors(Pair):
    """The same product with its directions sorted by what they are worth, the spectrum (G, d), descending.

    The spectrum is split evenly over both sides, so that 16-bit numbers keep their range: both columns of a direction
    have the norm sqrt(s). From `decompose` the columns are orthogonal and the spectrum holds the singular values.
    """

    spectrum: Tensor


@dataclass(frozen=True)
class Absorbed:
    """An attention block as its products: Q-K where nothing stands between W_Q and W_K, V-O, and the output bias.

    qk.left stacks the m query heads of a group, each with its bias as one more input row: (G, m (D_q + 1), d).
    qk.right is W_K, (G, D_k, d). vo.left is W_V (G, D_k, d), with the value bias as one more row where it cannot
    move into an output bias; vo.right stacks the outputs of the group, (G, m D_o, d).
    """

    qk: Pair | None
    vo: Pair
    o_bias: Tensor | None


def absorb(weights: HeadWeights, site: Site) -> Absorbed:
    """The block's products in float64, with both bias rules of a plain softmax applied.

    The key bias adds the same number to every key's score of a query, which softmax removes: it is dropped. The
    rows of attention sum to one, so a value bias adds `sum_h b_V,h W_O,h` to the output whatever the input: it
    moves into the output bias, if there is one.
    """
    g, m, d = len(weights.v), site.group, site.head_dim
    qk = None
    if site.merges_qk:
        q = weights.q.double().mT  # (G, M, D_q, d)
        if weights.q_bias is not None:
            q = torch.cat([q, weights.q_bias.double().unsqueeze(2)], dim=2)
        qk = Pair(q.reshape(g, -1, d), weights.k.double().mT)
    v = weights.v.double().mT  # (G, D_k, d)
    o = weights.o.double()  # (D_o, G, M, d)
    o_bias = None if weights.o_bias is None else weights.o_bias.double()
    if weights.v_bias is not None:
        if o_bias is not None:
            each = weights.v_bias.double().unsqueeze(1).expand(g, m, d)  # the same for a group's query heads
            o_bias = o_bias + o.reshape(len(o), -1) @ each.reshape(-1)
        else:
            v = torch.cat([v, weights.v_bias.double().unsqueeze(1)], dim=1)
    return Absorbed(qk, Pair(v, o.permute(1, 2, 0, 3).reshape(g, m * site.output_width, d)), o_bias)


def decompose(pair: Pair) -> Factors:
    """The SVD of each head's product: O(D d^2) for each head, where the dense product takes O(D^3)."""
    left, right = _thin_qr(pair.left), _thin_qr(pair.right)
    u, spectrum, vh = torch.linalg.svd(_core(left, right), full_matrices=False)
    root = spectrum.sqrt().unsqueeze(-2)
    return _padded(Factors(left.times(u * root), right.times(vh.mT * root), spectrum), pair.left.shape[-1])


def singular_values(pair: Pair) -> Tensor:
    """The spectrum of each head's product alone, (G, d), descending; at a third of the cost of `decompose`."""
    values = torch.linalg.svdvals(_core(_thin_qr(pair.left), _thin_qr(pair.right)))
    return torch.nn.functional.pad(values, (0, pair.left.shape[-1] - values.shape[-1]))


def norm_products(pair: Pair) -> Tensor:
    """The L2 norms of each dimension's two columns multiplied, (G, d), descending: what "vanilla" pruning goes by."""
    products: Tensor = pair.left.norm(dim=-2) * pair.right.norm(dim=-2)
    return products.sort(dim=-1, descending=True).values


def sort_by_norm(pair: Pair) -> Factors:
    """The baseline of the paper, "vanilla": the original dimensions, by the product of their L2 norms."""
    left, right = pair.left.norm(dim=-2), pair.right.norm(dim=-2)  # (G, d)
    spectrum, order = (left * right).sort(dim=-1, descending=True, stable=True)

    def columns(factor: Tensor, norms: Tensor) -> Tensor:
        scale = (left * right).sqrt() / norms.where(norms > 0, 1.0)
        balanced: Tensor = factor * scale.unsqueeze(-2)
        return balanced.gather(-1, order.unsqueeze(-2).expand_as(balanced))

    return Factors(columns(pair.left, left), columns(pair.right, right), spectrum)


def recompose(weights: HeadWeights, absorbed: Absorbed, qk: Factors | None, vo: Factors, site: Site) -> HeadWeights:
    """The block's weights with its products in factored form: the same function of its inputs, in float64.

    Biases that the algebra has moved elsewhere stay as zeros, since the model's code expects to load them.
    """
    g, m, d = len(weights.v), site.group, site.head_dim
    q, k, q_bias, k_bias = weights.q, weights.k, weights.q_bias, weights.k_bias
    if qk is not None:
        stacked = qk.left.reshape(g, m, -1, d).mT  # (G, M, d, D_q or D_q + 1)
        q, k = stacked[..., : site.query_width], qk.right.mT
        q_bias = None if q_bias is None else stacked[..., site.query_width]
        k_bias = None if k_bias is None else torch.zeros_like(k_bias)
    rows = vo.left.mT  # (G, d, D_k or D_k + 1)
    v_bias = weights.v_bias
    if v_bias is not None:
        v_bias = rows[..., site.key_width] if absorbed.o_bias is None else torch.zeros_like(v_bias)
    return HeadWeights(
        q=q,
        k=k,
        v=rows[..., : site.key_width],
        o=vo.right.reshape(g, m, site.output_width, d).permute(2, 0, 1, 3),
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=absorbed.o_bias,
    )


def relative_difference(reference: Pair, candidate: Pair) -> Tensor:
    """||A B^T - A' B'^T||_F / ||A B^T||_F of each head, (G,), from QR cores of width 2d, without the product.

    A reference product of zero gives 0 where the candidate is zero too, and infinity elsewhere.
    """
    left = torch.linalg.qr(torch.cat([reference.left, candidate.left], dim=-1), mode="r").R
    right = torch.linalg.qr(torch.cat([reference.right, -candidate.right], dim=-1), mode="r").R
    difference = torch.linalg.matrix_norm(left @ right.mT)
    norm = product_norm(reference)
    return torch.where(difference == 0, 0.0, difference / norm)


def product_norm(pair: Pair) -> Tensor:
    """||A B^T||_F of each head, (G,)."""
    left = torch.linalg.qr(pair.left, mode="r").R
    right = torch.linalg.qr(pair.right, mode="r").R
    norm: Tensor = torch.linalg.matrix_norm(left @ right.mT)
    return norm


@dataclass(frozen=True)
class _ThinQR:
    """Q and R of each head, with Q kept as the factor itself where it is `factor @ inverse(R)`."""

    base: Tensor  # (G, L, d): Q where `explicit`, the factor elsewhere
    r: Tensor  # (G, min(L, d), d)
    explicit: Tensor  # (G, 1, 1), bool

    def times(self, u: Tensor) -> Tensor:
        """Q @ u."""
        if self.explicit.all():
            return self.base @ u
        return self.base @ torch.where(self.explicit, u, torch.linalg.solve_triangular(self.r, u, upper=True))


def _core(left: _ThinQR, right: _ThinQR) -> Tensor:
    """The d x d core of each head. Raises PessaError for numbers that only float64 checkpoints can hold."""
    core = left.r @ right.r.mT
    if not (core.abs() < MOST_PRODUCT).all():  # nor NaN
        raise PessaError(
            f"a product of attention weights is too large for float64 ({MOST_PRODUCT:g})",
            "rescale the weights; no float32 checkpoint is that large",
        )
    return core


def _thin_qr(factor: Tensor) -> _ThinQR:
    """QR of each head by the Cholesky factor of its Gram matrix, by Householder where that is not safe.

    Cholesky costs a third, but its error grows with the square of the condition number. R_ii / ||a_i|| is what is
    left of a column once those before it are projected out: above WELL_CONDITIONED the spectrum keeps ten digits.
    """
    length, width = factor.shape[-2:]
    if length < width:
        q, r = torch.linalg.qr(factor)
        return _ThinQR(q, r, torch.ones(len(factor), 1, 1, dtype=torch.bool))
    gram = factor.mT @ factor
    lower, failed = torch.linalg.cholesky_ex(gram)
    left = lower.diagonal(dim1=-2, dim2=-1) / gram.diagonal(dim1=-2, dim2=-1).sqrt()  # (G, d)
    ill = (failed != 0) | ~(left > WELL_CONDITIONED).all(-1)
    base, r = factor, lower.mT
    if ill.any():
        base, r = factor.clone(), r.clone()
        base[ill], r[ill] = torch.linalg.qr(factor[ill])
    return _ThinQR(base, r, ill.reshape(-1, 1, 1))


def _padded(factors: Factors, width: int) -> Factors:
    """Zero directions added where the inputs are narrower than the head, so that there are always d of them."""
    missing = width - factors.spectrum.shape[-1]
    if not missing:
        return factors

    def pad(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, missing))

    return Factors(pad(factors.left), pad(factors.right), pad(factors.spectrum))
