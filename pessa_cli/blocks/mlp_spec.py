"""The type of the architecture table's rows of MLPs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from pessa_cli.blocks.spec import BlockSpec, Keys


@dataclass(frozen=True, kw_only=True)
class MlpSpec(BlockSpec):
    """One row of the architecture table: the MLP of a layer, whose hidden channels some matrices write and one reads.

    An activation stands between, which acts on each channel alone, so channels can be permuted and removed.

    layer: the module name of the layer, with `{i}` for its number.
    into: the names within the layer of the matrices that write the channels: one, or two whose outputs are multiplied
    (a gated MLP). out: the name of the matrix that reads them. Both are empty if all of the MLP is routed.
    parts: how many blocks of channels each matrix of `into` has, one after the other: 2 if one tensor holds both
    matrices of a gated MLP. Channel c is then the rows c and c + width.
    width: config keys of the number of channels.
    ratio: if none of these exists, the number of channels is this multiple of the width of the input, or the multiple
    in one of these config keys; two_thirds: two thirds of that, rounded up to a multiple of 8.
    beside: name patterns, within the layer, of other tensors beside the matrices, which are copied.
    routed: name patterns, within the layer, of the tensors of routed experts, which are copied: their channels cannot
    be cut yet.
    """

    layer: str
    into: tuple[str, ...] = ()
    out: str = ""
    parts: int = 1
    width: Keys = ()
    ratio: Keys | int = ()
    two_thirds: bool = False
    routed: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What a message calls a block of this kind, such as "encoder.mlp"."""
        return self.kind

    @property
    def modules(self) -> dict[str, str]:
        """The module names of the matrices, with `{i}` for the layer: "into 0", "into 1" and "out"; or none."""
        if not self.out:
            return {}
        names = {f"into {index}": name for index, name in enumerate(self.into)} | {"out": self.out}
        return {side: f"{self.layer}.{name}" for side, name in names.items()}

    @property
    def stem(self) -> str:
        """The name of the list of layers that the blocks are in, with its final dot."""
        return self.layer.partition("{i}")[0]

    def within(self, part: str) -> Self:
        """Return the row for the submodel `part` alone, such as "encoder", whose name is no part of its names."""
        return replace(self, layer=self.layer.removeprefix(f"{part}."))

    @property
    def form(self) -> str:
        """Describe the MLP in words, for tables and messages."""
        if not self.out:
            return "routed experts, which are copied"
        form = "gated" if len(self.into) * self.parts > 1 else "plain"
        fused = " in one tensor" if self.parts > 1 else ""
        return form + fused + (", beside routed experts, which are copied" if self.routed else "")
