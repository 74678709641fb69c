"""Forward hooks that compare the attention blocks of two loaded models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from pessa_cli.blocks.names import module_names
from pessa_cli.blocks.site import Site
from pessa_cli.common.errors import PessaError
from pessa_cli.models.inputs import Inputs
from pessa_cli.models.load import WEIGHTS_ALONE


def output_of(model: Any, inputs: Inputs) -> tuple[str, Tensor]:
    """Run a model without a cache; returns "logits" or, for a model without a head, "hidden states", and the tensor."""
    extra = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    output = model(**inputs, **extra)
    logits = getattr(output, "logits", None)
    return ("hidden states", output[0]) if logits is None else ("logits", logits)


def block_squares(sites: Sequence[Site], ours: Any, theirs: Any, hooks: ExitStack) -> dict[str, list[float]]:
    """Accumulate, while the first model runs, how far each block of the second one deviates.

    Returns, by block name, two sums over all outputs of the output projection: the squared difference of both models,
    and the square of the first one's output. Both blocks get the inputs of the first model.
    """
    squares = {site.name: [0.0, 0.0] for site in sites}
    for site in sites:

        def add(expected: Tensor, found: Tensor, sums: list[float] = squares[site.name]) -> None:
            expected = expected.double()
            sums[0] += float((expected - found.double()).square().sum())
            sums[1] += float(expected.square().sum())

        compare_block(site, ours, theirs, add, hooks)
    return squares


def compare_block(
    site: Site, ours: Any, theirs: Any, on_outputs: Callable[[Tensor, Tensor], None], hooks: ExitStack
) -> None:
    """At every call of a block in the first model, run that of the second one on the same inputs.

    `on_outputs` gets the outputs of both output projections, first and second model. Raises PessaError, during the
    call, when the block does not call its output projection. `hooks` removes the hooks when it closes.
    """
    (block, ours_at), (other_block, theirs_at) = modules_of(site, ours), modules_of(site, theirs)
    o, other_o = ours_at["o"], theirs_at["o"]
    seen: dict[str, Any] = {}

    def entered(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["args"], seen["kwargs"] = args, kwargs

    def left(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen["expected"] = output

    def finished(*_: Any) -> None:
        if "expected" not in seen:
            raise PessaError(
                f"{site.name} reads the weights of its output projection without calling it, so hooks see no output",
                WEIGHTS_ALONE,
            )
        found: list[Tensor] = []
        handle = other_o.register_forward_hook(lambda _m, _a, output: found.append(output))
        try:
            other_block(*seen["args"], **seen["kwargs"])
        finally:
            handle.remove()
        on_outputs(seen["expected"], found[-1])

    hooks.callback(block.register_forward_pre_hook(entered, with_kwargs=True).remove)
    hooks.callback(o.register_forward_hook(left).remove)
    hooks.callback(block.register_forward_hook(finished).remove)


def modules_of(site: Site, model: Any) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The innermost module that contains the four projections of a block, and the projections by letter.

    Raises PessaError when the model has no modules of these names.
    """
    modules = dict(model.named_modules())
    found = module_names(model, {site.module(side) for side in "qkvo"})
    names = {side: found[site.module(side)] for side in "qkvo" if site.module(side) in found}
    if len(names) < len("qkvo"):
        raise PessaError(f"{type(model).__name__} has no module named {site.q}", "compare with --level weights")
    shared = 0
    q, o = names["q"].split("."), names["o"].split(".")
    while q[shared] == o[shared]:
        shared += 1
    return modules[".".join(q[:shared])], {side: modules[name] for side, name in names.items()}
