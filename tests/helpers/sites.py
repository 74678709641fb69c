"""An attention block of two heads of width 4, for tests of ranks."""

from __future__ import annotations

from pessa_cli.blocks.site import Site
from pessa_cli.blocks.table import ARCHITECTURES

SITE = Site(
    spec=ARCHITECTURES["whisper"][0],
    layer=0,
    q="q",
    k="k",
    v="v",
    o="o",
    heads=2,
    kv_heads=2,
    head_dim=4,
    query_width=8,
    key_width=8,
    output_width=8,
    biases=frozenset(),
    dtype="F32",
    qk_ranks=(4, 4),
    vo_ranks=(4, 4),
)
