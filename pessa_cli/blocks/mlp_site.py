"""Sites of MLPs: the MLPs of a checkpoint with their module names, widths and stored channels."""

from __future__ import annotations

from dataclasses import dataclass

from pessa_cli.blocks.compact_format import Ragged
from pessa_cli.blocks.mlp_spec import MlpSpec


@dataclass(frozen=True)
class MlpSite:
    """One MLP of one checkpoint.

    into: the module names, as in the file, of the matrices that write the hidden channels; out: of the one that reads
    them.
    width: the original number of channels; kept: how many the file stores, fewer than that in a compact file.
    input_width, output_width: the sizes of the input of the MLP and of its output.
    """

    spec: MlpSpec
    layer: int
    into: tuple[str, ...]
    out: str
    width: int
    input_width: int
    output_width: int
    kept: int
    biases: frozenset[str]  # the names of the modules that have a bias
    dtype: str  # of the weights and biases; if they differ, the coarsest

    @property
    def name(self) -> str:
        """The MLP's unique name within the model, such as "encoder.mlp.3"."""
        return f"{self.spec.kind}.{self.layer}"

    @property
    def modules(self) -> tuple[str, ...]:
        """The module names of all of its matrices."""
        return *self.into, self.out

    def shapes(self, kept: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of this MLP's tensors if this number of channels were stored."""
        sides = dict.fromkeys(self.into, (self.spec.parts * kept, self.input_width))
        sides[self.out] = (self.output_width, kept)
        shapes: dict[str, tuple[int, ...]] = {}
        for module, shape in sides.items():
            shapes[f"{module}.weight"] = shape[::-1] if self.spec.transposed else shape
            if module in self.biases:
                shapes[f"{module}.bias"] = shape[:1]
        return shapes

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of this MLP's tensors in the file."""
        return self.shapes(self.kept)


def ragged_mlp(site: MlpSite) -> dict[str, Ragged]:
    """Return the entries of `quantization_config` for one MLP by module name; with all channels there are none."""
    if site.kept == site.width:
        return {}
    rows = Ragged("rows", site.width, (site.kept,) * site.spec.parts)
    return dict.fromkeys(site.into, rows) | {site.out: Ragged("columns", site.width, (site.kept,))}
