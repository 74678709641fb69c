"""What config.json says about the attention blocks of one kind, with the defaults of transformers' config classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pessa_cli.blocks.spec import AttentionSpec, BlockSpec, Keys
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import shortened

MOST_HEADS = 4096
MOST_LAYERS = 100_000


def value(config: Mapping[str, Any], spec: BlockSpec, keys: Keys) -> Any:
    """Return the value of the first key that the row's part of config.json has; None if none exists or all are null."""
    inner = config.get(spec.config) if spec.config else None
    for key in keys:
        found: Any = inner if isinstance(inner, Mapping) else config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def default(config: Mapping[str, Any], spec: BlockSpec, keys: Keys) -> Any:
    """Return transformers' default for the first key that its config class has; None if there is none.

    Configs on the hub leave out values that are equal to the default, most often in the parts of submodels.
    """
    inner = config.get(spec.config) if spec.config else None
    model_type = (inner if isinstance(inner, Mapping) else config).get("model_type")
    known = _defaults(model_type) if isinstance(model_type, str) else None
    return next((found for key in keys if (found := getattr(known, key, None)) is not None), None)


@cache
def _defaults(model_type: str) -> Any:
    """Return a config of transformers with all values at their defaults; None for a type that it does not have."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None


def number(config: Mapping[str, Any], spec: BlockSpec, keys: Keys, what: str, most: int) -> int | None:
    """Return a number from config.json or, if no key exists, transformers' default; None if that has none either.

    what: names the number in messages. Raises PessaError if the value is not an integer from 1 to `most`.
    """
    found = value(config, spec, keys)
    if found is None:
        found = default(config, spec, keys)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= most):
        raise PessaError(
            f"config.json: {in_config(config, spec, keys)} is {shortened(found)}, not a {what} from 1 to {most}"
        )
    return found


def head_counts(config: Mapping[str, Any], spec: AttentionSpec) -> tuple[int, int]:
    """Return the numbers of query heads and of key/value heads.

    Raises PessaError if they are not integers from 1 to MOST_HEADS, or if the first is no multiple of the second.
    """
    heads = number(config, spec, spec.heads, "number of heads", MOST_HEADS)
    if heads is None:
        raise PessaError(
            f"config.json: {in_config(config, spec, spec.heads)} is missing, a number of heads from 1 to {MOST_HEADS}"
        )
    if isinstance(spec.kv_heads, int):
        kv_heads = spec.kv_heads
    else:
        kv_heads = number(config, spec, spec.kv_heads, "number of heads", MOST_HEADS) or heads
    if heads % kv_heads:
        raise PessaError(f"config.json: {heads} heads cannot share {kv_heads} key/value heads evenly")
    return heads, kv_heads


def in_config(config: Mapping[str, Any], spec: BlockSpec, keys: Keys) -> str:
    """Return the name of the first key that exists, or of the first one, as it is written in messages."""
    key = next((key for key in keys if value(config, spec, (key,)) is not None), keys[0])
    return f"{spec.config}.{key}" if isinstance(config.get(spec.config), Mapping) else key


def rotated_directions(config: Mapping[str, Any], spec: AttentionSpec, layer: int, head_dim: int) -> int:
    """Return how many leading directions of each head RoPE rotates in this layer: an even number, or all of them.

    Raises PessaError if config.json has no valid fraction or number of rotated directions.
    """
    rope = spec.rope
    if rope is None or (rope.unless and value(config, spec, (rope.unless,))):
        return 0
    if rope.layers is not None:
        key, turning = rope.layers
        values = value(config, spec, (key,))
        if isinstance(values, list) and layer < len(values) and values[layer] != turning:
            return 0
    share, count = value(config, spec, rope.share), value(config, spec, rope.count)
    share = rope.default if share is None else share
    if not isinstance(share, (int, float)) or not 0 <= share <= 1 or not isinstance(count or 0, int):
        raise PessaError(
            f"config.json: {(*rope.share, *rope.count)[0]} is {shortened(share)}, not a fraction from 0 to 1 of a head"
        )
    turned = int(head_dim * share) if count is None else count
    return min(head_dim, turned + turned % 2)
