"""Running a model layer by layer: each layer on the outputs of the layers before it, which may have been changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pessa_cli.blocks.names import module_names
from pessa_cli.blocks.site import Site
from pessa_cli.models.hooks import shared_name

NOISE = 1e-2  # of the trial that tells whether layers depend on one another through their hidden states alone
SAME = 1e-4  # the largest relative difference of hidden states that counts as equal in it


class LayerCall(NamedTuple):
    """One call of a layer: its hidden states, (1, positions, width), and all other arguments.

    kwargs: with `hidden_states`, as None, if the layer takes them by this name.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def given(self, hidden: Tensor) -> LayerCall:
        """Return the same call with other hidden states."""
        return LayerCall(hidden, self.args, self.kwargs)

    def of(self, layer: nn.Module) -> Tensor:
        """Return the hidden states that a layer gives for this call."""
        if "hidden_states" in self.kwargs:
            return _hidden(layer(*self.args, **{**self.kwargs, "hidden_states": self.hidden}))
        return _hidden(layer(self.hidden, *self.args, **self.kwargs))


class Layer(NamedTuple):
    """One layer of a loaded model, and the blocks in it in the order in which its input passes through them."""

    module: nn.Module
    sites: list[Site]


def stacks_of(model: Any, sites: Sequence[Site], among: Sequence[Site]) -> list[list[Layer]]:
    """Return the layers that contain the given blocks, by stacks of layers, in the order in which they run.

    among: all blocks of the model; those of one layer tell which module the layer is.
    """
    modules = dict(model.named_modules())
    places = module_names(model, [module for site in among for module in site.modules.values()])
    stacks: dict[str, dict[str, list[Site]]] = {}
    for site in sorted(sites, key=_order):
        beside = [each for each in among if (_stack(each), each.layer) == (_stack(site), site.layer)]
        names = [places[module] for each in beside for module in each.modules.values() if module in places]
        stacks.setdefault(_stack(site), {}).setdefault(_layer(names, modules), []).append(site)
    return [[Layer(modules[name], own) for name, own in layers.items()] for layers in stacks.values()]


def chained(layers: Sequence[nn.Module], run: Callable[[], object]) -> bool:
    """Return whether each of the layers depends on those before it only through the hidden states that it is given.

    run: runs the model on one input. It runs twice, the second time with noise added to the output of the first layer.
    """
    recorded = [calls[0] if len(calls) == 1 else None for calls in record(layers, run)]
    known = [call for call in recorded if call is not None]
    if len(known) < len(layers) or len(set(layers)) < len(layers):
        return False
    hidden = _noisy(known[0].of(layers[0]))
    with ExitStack() as hooks:

        def noisy(_module: nn.Module, _args: Any, output: Any) -> Any:
            changed = _noisy(_hidden(output))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        hooks.callback(layers[0].register_forward_hook(noisy).remove)
        expected = record(layers[-1:], run)[0][0].hidden
    for layer, call in zip(layers[1:-1], known[1:-1], strict=True):
        hidden = call.given(hidden).of(layer)
    if len(layers) == 1:
        return True
    return hidden.shape == expected.shape and float((hidden - expected).norm()) <= SAME * float(expected.norm())


def record(layers: Sequence[nn.Module], run: Callable[[], object]) -> list[list[LayerCall]]:
    """Run a model on one input, and return the calls of each of these layers."""
    calls: list[list[LayerCall]] = [[] for _ in layers]
    with ExitStack() as hooks:
        for layer, own in zip(layers, calls, strict=True):

            def keep(
                _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], own: list[LayerCall] = own
            ) -> None:
                if "hidden_states" in kwargs:
                    own.append(LayerCall(kwargs["hidden_states"], args, {**kwargs, "hidden_states": None}))
                else:
                    own.append(LayerCall(args[0], args[1:], kwargs))

            hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        run()
    return calls


def layer_by_layer(
    layers: Sequence[Layer], runs: Sequence[Callable[[], object]]
) -> Iterator[tuple[Layer, Sequence[Sequence[LayerCall]]]]:
    """Yield each layer with its calls for each input, on the outputs of the layers before it as they are by then.

    runs: each runs the model on one input. The blocks of a layer may be changed after it was yielded. If the layers
    depend on one another through their hidden states alone, the model runs once for all of them. Otherwise it runs once
    for each block, and a layer is yielded once for each of its blocks.
    """
    modules = [layer.module for layer in layers]
    if not chained(modules, runs[0]):
        for layer in layers:
            for site in layer.sites:
                yield Layer(layer.module, [site]), [record([layer.module], run)[0] for run in runs]
        return
    recorded = [_first_hidden([calls[0] for calls in record(modules, run)]) for run in runs]
    for at, layer in enumerate(layers):
        yield layer, [[calls[at]] for calls in recorded]
        for calls in recorded if at + 1 < len(layers) else ():
            calls[at + 1] = calls[at + 1].given(calls[at].of(layer.module))
            calls[at] = calls[at + 1]  # frees its hidden states


def _first_hidden(calls: list[LayerCall]) -> list[LayerCall]:
    """Return the calls of layers one after the other without the hidden states of all but the first, to save memory."""
    return [calls[0], *(call.given(torch.empty(0)) for call in calls[1:])]


def _order(site: Site) -> tuple[bool, int, int]:
    """Return a sort key for the order in which an input passes through the blocks."""
    last = site.kind.rpartition(".")[2]
    return not site.kind.startswith("encoder"), site.layer, (last == "mlp") + (last in ("mlp", "cross"))


def _stack(site: Site) -> str:
    """Return the stack of layers that a block is in: "encoder" for "encoder.self"."""
    return site.kind.rpartition(".")[0]


def _layer(names: Sequence[str], modules: dict[str, nn.Module]) -> str:
    """Return the innermost module that contains all these modules and is an element of a list of modules."""
    shared = reduce(shared_name, names).split(".")
    while shared and (
        isinstance(modules[".".join(shared)], nn.ModuleList)
        or not isinstance(modules[".".join(shared[:-1])], nn.ModuleList)
    ):
        shared = shared[:-1]
    return ".".join(shared)


def _hidden(output: Any) -> Tensor:
    """Return the hidden states among the outputs of a layer."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _noisy(hidden: Tensor) -> Tensor:
    """Return hidden states with noise that is always the same."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden)
    return hidden + NOISE * hidden.square().mean().sqrt() * noise
