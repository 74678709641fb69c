"""pessa: absorb, decompose, prune and verify the attention of transformer checkpoints.

Importing this package once lets transformers' `from_pretrained` load compact models. It costs nothing until
transformers loads its quantizers: registration waits for that, so the command line need not import torch.
"""

import wrapt

from pessa_cli.errors import PessaError, UsageError

__version__ = "0.1.0"
__all__ = ["PessaError", "UsageError", "__version__"]


@wrapt.when_imported("transformers.quantizers.auto")  # type: ignore[untyped-decorator,unused-ignore]
def _register(_module: object) -> None:
    from pessa_cli.loading import register

    register()
