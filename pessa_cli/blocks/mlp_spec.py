"""The type of the architecture table's rows for MLPs."""

from __future__ import annotations

from dataclasses import dataclass

from pessa_cli.blocks.spec import Keys


@dataclass(frozen=True)
class MlpSpec:
    """One row of the architecture table: the matrices of one kind of MLP.

    kind: the kind of block, such as "encoder.mlp". into: the module names, with `{i}` for the layer, of the matrices
    that write the channels. out: that of the matrix that reads them. parts: how many matrices one module of `into`
    stacks. transposed: whether weights are stored as (in, out), as transformers' Conv1D does.
    """

    kind: str
    into: tuple[str, ...]
    out: str
    width: Keys = ()
    parts: int = 1
    transposed: bool = False
