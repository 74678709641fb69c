"""The sites of MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from pessa_cli.blocks.compact_format import PairRuns, Ragged, Ranks
from pessa_cli.blocks.mlp_spec import MlpSpec
from pessa_cli.blocks.seam import Seam
from pessa_cli.blocks.site import Site


@dataclass(frozen=True)
class MlpSite(Site):
    """One MLP of one checkpoint, whose channels are written by `into` and read by `out`.

    into, out: module names as in the file. width: the original number of channels; kept: how many the file stores.
    input_width, output_width: the sizes of the input of `into` and of the output of `out`. biases: the names of the
    modules that have a bias. zero_at_zero: whether the activation of zero is zero, so that a channel does nothing if
    the weights and biases that write it are zero.
    """

    spec: MlpSpec
    layer: int
    into: tuple[str, ...]
    out: str
    width: int
    input_width: int
    output_width: int
    kept: int
    biases: frozenset[str]
    dtype: str  # of the weights and biases; if they differ, the coarsest
    zero_at_zero: bool = True

    @property
    def modules(self) -> Mapping[str, str]:
        return {f"in{number}": module for number, module in enumerate(self.into)} | {"out": self.out}

    @property
    def last(self) -> str:
        return "out"

    @property
    def seams(self) -> tuple[Seam, ...]:
        return (Seam("mlp", self.width, (self.kept,), "permutation"),)

    @property
    def gated(self) -> bool:
        """Whether each channel is the product of two matrices' outputs."""
        return len(self.into) * self.spec.parts > 1

    @property
    def function(self) -> str:
        gated = " (gated)" if self.gated else ""
        return f"{self.width} channels{gated}, {self.input_width} -> {self.output_width}"

    def shapes(self, ranks: Mapping[str, Ranks]) -> dict[str, tuple[int, ...]]:
        (kept,) = ranks["mlp"]
        shapes: dict[str, tuple[int, ...]] = {}
        for module in (*self.into, self.out):
            rows, columns = self.spec.parts * kept, self.input_width
            if module == self.out:
                rows, columns = self.output_width, kept
            shapes[f"{module}.weight"] = (columns, rows) if self.spec.transposed else (rows, columns)
            if module in self.biases:
                shapes[f"{module}.bias"] = (rows,)
        return shapes

    def keeping(self, ranks: Mapping[str, Ranks], pairs: tuple[PairRuns, ...] | None = None) -> Self:  # noqa: ARG002
        return replace(self, kept=ranks["mlp"][0])

    def ragged(self) -> dict[str, Ragged]:
        if self.kept == self.width:
            return {}
        writers = {module: Ragged("channel rows", self.width, (self.kept,) * self.spec.parts) for module in self.into}
        return writers | {self.out: Ragged("channel columns", self.width, (self.kept,))}
