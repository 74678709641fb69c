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
NOTHING = 1e-13  # an eigenvalue of a Gram matrix of unit columns that is rounding and no direction
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

    qk.left stacks the m query heads of a group, each with its bias as one more input row: (G, m (D_q + 1), c), for the
    c directions of each head that merge. qk.right is W_K, (G, D_k, c), with a key bias that must stay as one more row.
    vo.left is W_V (G, D_k, d), with the value bias as one more row where it cannot move into an output bias; vo.right
    stacks the outputs of the group, (G, m D_o, d).
    """

    qk: Pair | None
    vo: Pair
    o_bias: Tensor | None


def absorb(weights: HeadWeights, site: Site, dtype: torch.dtype = torch.float64) -> Absorbed:
    """The block's products in `dtype`, with both bias rules of a plain softmax applied where they hold.

    The key bias adds the same number to every key's score of a query, which softmax removes: it is dropped, unless it
    meets something else than queries. The rows of attention sum to one (but with attention sinks), so a value bias
    adds `sum_h b_V,h W_O,h` to the output whatever the input: it moves into the output bias, if there is one, which is
    float64 always.
    """
    g, m, d = len(weights.v), site.group, site.head_dim
    qk = None
    if site.merges_qk:
        q = _with_bias(weights.q.to(dtype), weights.q_bias)[:, :, site.unmerged :]  # (G, M, c, D_q or D_q + 1)
        k = _with_bias(weights.k.to(dtype), weights.k_bias if site.spec.key_bias_stays else None)[:, site.unmerged :]
        qk = Pair(q.mT.reshape(g, -1, d - site.unmerged), k.mT)
    v, o = weights.v.to(dtype), weights.o  # (G, d, D_k) and (D_o, G, M, d)
    o_bias = None if weights.o_bias is None else weights.o_bias.double()
    if o_bias is None or not site.moves_v_bias:
        v = _with_bias(v, weights.v_bias)
    elif weights.v_bias is not None:
        each = weights.v_bias.double().unsqueeze(1).expand(g, m, d)  # the same for a group's query heads
        o_bias = o_bias + o.double().reshape(len(o), -1) @ each.reshape(-1)
    o = o.to(dtype).permute(1, 2, 0, 3).reshape(g, m * site.output_width, d)
    return Absorbed(qk, Pair(v.mT, o), o_bias)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias as one more input."""
    return weight if bias is None else torch.cat([weight, bias.to(weight.dtype).unsqueeze(-1)], dim=-1)


@dataclass(frozen=True)
class Transforms:
    """What makes factors out of a pair, `pair.left @ left` and `pair.right @ right`: (G, d, d) each, and the spectrum.

    They are as small as the heads are narrow, so that one pass can find them and another apply them. `growth`, (G,):
    the numbers that add up to an entry of a factor are so many times larger than its column, and so are their
    rounding errors. Infinite for a head whose columns are nearly dependent: `transformed` starts from its weights.
    """

    left: Tensor
    right: Tensor
    growth: Tensor
    spectrum: Tensor


def transformed(pair: Pair, transforms: Transforms) -> Factors:
    """The factors of a pair whose transforms are known, in the dtype of the pair."""

    def times(factor: Tensor, transform: Tensor) -> Tensor:  # by rows, as files store weights: it is faster, too
        return (transform.to(factor.dtype).mT @ factor.mT).mT

    left, right = times(pair.left, transforms.left), times(pair.right, transforms.right)
    ill = transforms.growth.isinf()
    if ill.any():
        exact = _by_householder(Pair(pair.left[ill].double(), pair.right[ill].double()))
        left[ill], right[ill] = (factor.to(left.dtype) for factor in exact)
    return Factors(left, right, transforms.spectrum)


def svd_transforms(pair: Pair) -> Transforms:
    """The SVD of each head's product, as transforms: O(D d^2) for each head, where the dense product takes O(D^3)."""
    (left, ill_left), (right, ill_right) = triangular(pair.left), triangular(pair.right)
    u, spectrum, vh = torch.linalg.svd(_core(left, right), full_matrices=False)
    root, ill, width = spectrum.sqrt().unsqueeze(-2), ill_left | ill_right, pair.left.shape[-1]
    spectrum = _padded(spectrum, width)
    if ill.all():
        zero = spectrum.new_zeros(len(spectrum), width, width)
        return Transforms(zero, zero, torch.full_like(spectrum[:, 0], torch.inf), spectrum)

    def transform(r: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        solved = torch.linalg.solve_triangular(r, basis * root, upper=True)
        terms = r.norm(dim=-2).unsqueeze(-1) * solved  # of each column; those of R are as long as those of the factor
        growth = terms.norm(dim=-2) / root.squeeze(-2)
        return solved.masked_fill(ill.reshape(-1, 1, 1), 0), growth.nan_to_num(nan=1).amax(-1)

    (t_left, growth_left), (t_right, growth_right) = transform(left, u), transform(right, vh.mT)
    growth = torch.maximum(growth_left, growth_right).masked_fill(ill, torch.inf)
    return Transforms(t_left, t_right, growth, spectrum)


def decompose(pair: Pair) -> Factors:
    """The factors of a pair by the SVD of each head's product."""
    return transformed(pair, svd_transforms(pair))


def singular_values(pair: Pair) -> Tensor:
    """The spectrum of each head's product alone, (G, d), descending; at a third of the cost of `decompose`."""
    (left, _), (right, _) = triangular(pair.left), triangular(pair.right)
    return _padded(torch.linalg.svdvals(_core(left, right)), pair.left.shape[-1])


@dataclass(frozen=True)
class Weighting:
    """What real inputs make of the two factors of a product, as Gram matrices (G, d, d) that stand for their own.

    `left` is the second moment of `x^T pair.left` over the inputs x that the left factor meets, `A^T E[x x^T] A`: what
    comes out of a projection says all that is needed of what goes into it. `right` is the same for the other side,
    None where what comes out of it counts as it is. Both are mixed with `shrinkage` times the plain Gram matrices,
    brought to the same trace, so that samples too few to fill a head leave the plain rule and not noise.
    """

    left: Tensor
    right: Tensor | None
    shrinkage: float

    def of_heads(self, heads: slice) -> Weighting:
        """The same for some of the key/value heads."""
        return Weighting(self.left[heads], None if self.right is None else self.right[heads], self.shrinkage)


def weighted_transforms(pair: Pair, weighting: Weighting) -> Transforms:
    """The SVD of each head's product as real inputs see it, C_l^(1/2) A B^T C_r^(1/2), as transforms of A and B.

    A root of a Gram matrix is all that an SVD needs of a factor, so the weighted one takes the place of the plain
    one: `R_l^T R_l = A^T C_l A`, `R_l R_r^T = U S V^T`, and the factors are `A R_l^-1 U S^(1/2)`, `B R_r^-1 V S^(1/2)`.
    They make the same product, and by Eckart and Young their first r columns are its best approximation of rank r in
    the weighted norm; what that loses is the norm of the spectrum's tail. Balanced are the plain norms of the columns,
    which is what 16-bit numbers have to hold.
    """
    plain = [factor.mT @ factor for factor in (pair.left, pair.right)]
    grams = [
        shrunk(gram, own, weighting.shrinkage)
        for gram, own in zip((weighting.left, weighting.right), plain, strict=True)
    ]
    (left, inverse_left), (right, inverse_right) = (_roots(gram) for gram in grams)
    u, spectrum, vh = torch.linalg.svd(_core(left, right))
    root = spectrum.sqrt().unsqueeze(-2)
    found = [inverse_left @ (u * root), inverse_right @ (vh.mT * root)]
    norms = [(t * (own @ t)).sum(-2).clamp(min=0).sqrt() for t, own in zip(found, plain, strict=True)]  # (G, d)
    balanced = (norms[0] * norms[1]).sqrt()
    transforms, growth = [], torch.ones_like(spectrum[:, 0])
    for t, own, norm in zip(found, plain, norms, strict=True):
        t = t * (balanced / norm.where(norm > 0, 1.0)).unsqueeze(-2)
        terms = own.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-1) * t
        growth = torch.maximum(growth, (terms.norm(dim=-2) / balanced.where(balanced > 0, torch.inf)).amax(-1))
        transforms.append(t)
    return Transforms(transforms[0], transforms[1], growth, spectrum)


def shrunk(gram: Tensor | None, plain: Tensor, shrinkage: float) -> Tensor:
    """A weighted Gram matrix with so many times the plain one mixed in, brought to its trace; (G, d, d)."""
    if gram is None:
        return plain
    found, own = traces(gram), traces(plain)
    mixed = gram + shrinkage * found / own.where(own > 0, 1.0) * plain
    return torch.where(found > 0, mixed, plain)  # inputs that were zero always say nothing


def traces(grams: Tensor) -> Tensor:
    """Those of Gram matrices, (G, d, d) -> (G, 1, 1)."""
    return grams.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1, 1, 1)


def scales(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the columns that a Gram matrix is of, (..., d), and one over them, zero for those that are zero."""
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return scale, torch.where(scale > 0, 1 / scale.where(scale > 0, 1.0), 0.0)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^T R = gram, and its pseudo-inverse, (G, d, d) each: for columns of any scale, some of them zero."""
    _check_size(gram)
    scale, inverse = scales(gram)
    values, vectors = torch.linalg.eigh(inverse.unsqueeze(-1) * gram * inverse.unsqueeze(-2))
    there = values > NOTHING * gram.shape[-1]
    root = values.where(there, 0.0).sqrt()
    over = torch.where(there, 1 / root.where(there, 1.0), 0.0)
    return root.unsqueeze(-1) * vectors.mT * scale.unsqueeze(-2), inverse.unsqueeze(-1) * vectors * over.unsqueeze(-2)


def refitted(o: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The output projection of a block, (D_o, N), fitted anew to the directions that are kept, for all heads jointly.

    moment: (N, N), the second moment of what the N directions of all heads carry. Least squares for what the full
    projection makes of them: `O_kept + O_dropped M_dk (M_kk + ridge diag M_kk)^-1`; an infinite ridge changes nothing.
    What is dropped of a head is uncorrelated to what it keeps, but not to what the others keep.
    """
    gone = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
    gone[kept] = False
    inner = moment[kept][:, kept]
    _, inverse = scales(inner)
    unit = inverse.unsqueeze(-1) * inner * inverse  # correlations, so that directions of any size count alike
    unit = unit + (ridge + NOTHING) * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    correction = torch.linalg.solve(unit, inverse.unsqueeze(-1) * moment[kept][:, gone]) * inverse.unsqueeze(-1)
    return o.index_add(1, kept, o[:, gone] @ correction.mT)


def norm_products(pair: Pair) -> Tensor:
    """The L2 norms of each dimension's two columns multiplied, (G, d), descending: what "vanilla" pruning goes by."""
    products: Tensor = pair.left.norm(dim=-2) * pair.right.norm(dim=-2)
    return products.sort(dim=-1, descending=True).values


def norm_transforms(pair: Pair) -> Transforms:
    """The baseline of the paper, "vanilla": the original dimensions in the order of the product of their L2 norms."""
    left, right = pair.left.norm(dim=-2), pair.right.norm(dim=-2)  # (G, d)
    spectrum, order = (left * right).sort(dim=-1, descending=True, stable=True)
    places = torch.nn.functional.one_hot(order, order.shape[-1]).mT  # (G, d, d): one column for each place

    def transform(norms: Tensor) -> Tensor:
        scale = (left * right).sqrt() / norms.where(norms > 0, 1.0)
        weighed: Tensor = scale.unsqueeze(-1) * places
        return weighed

    return Transforms(transform(left), transform(right), torch.ones_like(spectrum[:, 0]), spectrum)


def recompose(
    weights: HeadWeights,
    absorbed: Absorbed,
    qk: Factors | None,
    vo: Factors,
    site: Site,
    mean: Tensor | None = None,
) -> HeadWeights:
    """The block's weights with its products in factored form: the same function of its inputs, in float64.

    Biases that the algebra has moved elsewhere stay as zeros, since the model's code expects to load them. `mean`,
    (G, d), is what the directions of V-O carry on average, for blocks with both biases: the value bias takes it off
    and the output bias gives it back, so that a direction that is cut leaves its mean behind.
    """
    g, m, d = len(weights.v), site.group, site.head_dim
    q, k, q_bias, k_bias = weights.q, weights.k, weights.q_bias, weights.k_bias
    if qk is not None:
        stacked = qk.left.reshape(g, m, -1, d - site.unmerged).mT  # (G, M, c, D_q or D_q + 1)
        keys = qk.right.mT  # (G, c, D_k or D_k + 1)
        q, k = _behind(q, stacked[..., : site.query_width], 2), _behind(k, keys[..., : site.key_width], 1)
        q_bias = None if q_bias is None else _behind(q_bias, stacked[..., site.query_width], 2)
        if k_bias is not None:
            own = keys[..., site.key_width] if site.spec.key_bias_stays else torch.zeros_like(keys[..., 0])
            k_bias = _behind(k_bias, own, 1)
    rows = vo.left.mT  # (G, d, D_k or D_k + 1)
    v_bias, o_bias = weights.v_bias, absorbed.o_bias
    if v_bias is not None:
        v_bias = torch.zeros_like(v_bias) if site.moves_v_bias else rows[..., site.key_width]
    if mean is not None and v_bias is not None and o_bias is not None:
        v_bias = -mean
        o_bias = o_bias + (vo.right.double() @ mean.unsqueeze(-1)).reshape(-1, site.output_width).sum(0)
    return HeadWeights(
        q=q,
        k=k,
        v=rows[..., : site.key_width],
        o=vo.right.reshape(g, m, site.output_width, d).permute(2, 0, 1, 3),
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=o_bias,
    )


def _behind(whole: Tensor, merged: Tensor, axis: int) -> Tensor:
    """The directions of each head that merge in their new form, behind the others as they were."""
    others = whole.narrow(axis, 0, whole.shape[axis] - merged.shape[axis])
    return torch.cat([others.to(merged.dtype), merged], axis) if others.numel() else merged


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


def _core(left: Tensor, right: Tensor) -> Tensor:
    """The d x d core of each head. Raises PessaError for numbers that only float64 checkpoints can hold."""
    core = left @ right.mT
    _check_size(core)
    return core


def _check_size(product: Tensor) -> None:
    if not (product.abs() < MOST_PRODUCT).all():  # nor NaN
        raise PessaError(
            f"a product of attention weights is too large for float64 ({MOST_PRODUCT:g})",
            "rescale the weights; no float32 checkpoint is that large",
        )


def triangular(factor: Tensor) -> tuple[Tensor, Tensor]:
    """R of each head's thin QR, (G, min(L, d), d), and where Q must not be taken as `factor @ inverse(R)`, (G,) bool.

    R is float64. A factor in a smaller dtype is converted head by head: that stays in the cache.

    R is the Cholesky factor of the Gram matrix, and Householder's where that is not safe. Cholesky costs a third, but
    its error grows with the square of the condition number. R_ii / ||a_i|| is what is left of a column once those
    before it are projected out: above WELL_CONDITIONED the spectrum keeps ten digits.
    """
    length, width = factor.shape[-2:]
    if length < width:
        every = torch.ones(len(factor), dtype=torch.bool, device=factor.device)
        return torch.linalg.qr(factor.double(), mode="r").R, every
    if factor.dtype == torch.float64:
        gram = factor.mT @ factor
    else:
        gram = torch.stack([wide.mT @ wide for wide in (head.double() for head in factor)])
    lower, failed = torch.linalg.cholesky_ex(gram)
    left = lower.diagonal(dim1=-2, dim2=-1) / gram.diagonal(dim1=-2, dim2=-1).sqrt()  # (G, d)
    ill = (failed != 0) | ~(left > WELL_CONDITIONED).all(-1)
    r = lower.mT
    if ill.any():
        r = r.clone()
        r[ill] = torch.linalg.qr(factor[ill].double(), mode="r").R
    return r, ill


def _by_householder(pair: Pair) -> tuple[Tensor, Tensor]:
    """The factors of heads of any condition, from the bases of both sides."""
    (q_left, left), (q_right, right) = torch.linalg.qr(pair.left), torch.linalg.qr(pair.right)
    u, spectrum, vh = torch.linalg.svd(_core(left, right), full_matrices=False)
    root, width = spectrum.sqrt().unsqueeze(-2), pair.left.shape[-1]
    return _padded(q_left @ (u * root), width), _padded(q_right @ (vh.mT * root), width)


def _padded(tensor: Tensor, width: int) -> Tensor:
    """Zero directions added where the inputs are narrower than the head, so that there are always d of them."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
