"""Hooks on the blocks of loaded models: recording their calls, and replaying them in other blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor, nn

from pessa_cli.blocks.names import module_names
from pessa_cli.blocks.site import Site
from pessa_cli.common.errors import PessaError
from pessa_cli.models.classes import WEIGHTS_ALONE
from pessa_cli.models.inputs import Inputs, fitted


class BlockModules(NamedTuple):
    """The innermost module that contains all modules of a block, these by what they are, and which of them is the last.

    See `blocks.site.Site.modules`.
    """

    block: nn.Module
    projections: Mapping[str, nn.Module]
    last: str

    @property
    def output(self) -> nn.Module:
        """The module that gives the output of the block."""
        return self.projections[self.last]

    @property
    def writers(self) -> list[nn.Module]:
        """The modules of an MLP that write its channels; none for attention."""
        return [module for letter, module in self.projections.items() if letter.startswith("in")]


class Call(NamedTuple):
    """One call of a block: the arguments of its module, and the output of the last of its modules.

    given: of an MLP, the input of the modules that write its channels; None for attention. The innermost module with
    all modules of an MLP may be the whole layer, in which attention computes this input.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    given: Tensor | None = None


def output_of(model: Any, inputs: Inputs) -> tuple[str, Tensor]:
    """Run a model without a cache; returns "logits" or, for a model without a head, "hidden states", and the tensor."""
    extra = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    output = model(**fitted(model, inputs), **extra)
    logits = getattr(output, "logits", None)
    return ("hidden states", output[0]) if logits is None else ("logits", logits)


def block_squares(sites: Sequence[Site], ours: Any, theirs: Any, hooks: ExitStack) -> dict[str, list[float]]:
    """Accumulate, while the first model runs, how far each block of the second one deviates.

    Returns, by block name, two sums over all outputs of the output projection: the squared difference of both models,
    and the square of the first one's output. Both blocks get the inputs of the first model. A block has no entry until
    it runs.
    """
    squares: dict[str, list[float]] = {}
    first, second = block_modules(sites, ours), block_modules(sites, theirs)
    for site in sites:

        def add(call: Call, name: str = site.name, other: BlockModules = second[site.name]) -> None:
            found, expected = replay(other, call).double(), call.output.double()
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0] += float((expected - found).square().sum())
            sums[1] += float(expected.square().sum())

        on_calls(site, first[site.name], add, hooks)
    return squares


def on_calls(site: Site, modules: BlockModules, take: Callable[[Call], None], hooks: ExitStack) -> None:
    """Give `take` every call of a block, when the block is done; `hooks` removes the hooks when it closes.

    Raises PessaError, during the call, when the block does not call its output projection.
    """
    seen: dict[str, Any] = {}

    def entered(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=kwargs)

    def taken(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["given"] = args[0]

    def projected(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen["output"] = output

    def finished(*_: Any) -> None:
        if "output" not in seen:
            raise PessaError(
                f"{site.name} reads the weights of its output projection without calling it, so hooks see no output",
                WEIGHTS_ALONE,
            )
        call = Call(seen["args"], seen["kwargs"], seen["output"], seen.get("given"))
        seen.clear()
        take(call)

    hooks.callback(modules.block.register_forward_pre_hook(entered, with_kwargs=True).remove)
    for writer in modules.writers[:1]:
        hooks.callback(writer.register_forward_pre_hook(taken).remove)
    hooks.callback(modules.output.register_forward_hook(projected).remove)
    hooks.callback(modules.block.register_forward_hook(finished).remove)


def replay(modules: BlockModules, call: Call) -> Tensor:
    """The output of a block's output projection when the block gets the inputs of a call of another one."""
    found: list[Tensor] = []
    with ExitStack() as hooks:
        if call.given is not None:
            for writer in modules.writers:
                hooks.callback(writer.register_forward_pre_hook(lambda _m, _a: (call.given,)).remove)
        hooks.callback(modules.output.register_forward_hook(lambda _m, _a, output: found.append(output)).remove)
        modules.block(*call.args, **call.kwargs)
    return found[-1]


def block_modules(sites: Sequence[Site], model: Any) -> dict[str, BlockModules]:
    """The modules of the given blocks in a loaded model, by block name.

    Raises PessaError when the model has no modules of these names.
    """
    modules = dict(model.named_modules())
    places = module_names(model, [module for site in sites for module in site.modules.values()])
    found = {}
    for site in sites:
        missing = [module for module in site.modules.values() if module not in places]
        if missing:
            raise PessaError(f"{type(model).__name__} has no module named {missing[0]}", "compare with --level weights")
        names = {letter: places[module] for letter, module in site.modules.items()}
        shared = reduce(shared_name, names.values())
        found[site.name] = BlockModules(
            modules[shared], {letter: modules[name] for letter, name in names.items()}, site.last
        )
    return found


def shared_name(name: str, other: str) -> str:
    """The name of the innermost module that contains two others."""
    parts, others = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) and parts[shared] == others[shared]:
        shared += 1
    return ".".join(parts[:shared])
