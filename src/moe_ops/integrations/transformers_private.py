# SPDX-License-Identifier: Apache-2.0
"""Names that transformers does not offer as its API, each with the reason why it is needed.

`_weight_conversions`: what renamed the weights of a checkpoint while it was loaded. save_pretrained
    applies it backwards. transformers has no other place to say that some weights keep their names.
`_original_source_patterns`, `_original_target_patterns`: from these a conversion makes its reverse.
    transformers' own FP8 quantizer sets them for the same reason.
`_is_hf_initialized`: keeps transformers from drawing a weight at random that was not missing.
`_global_mapping` of an interface: it has no public way to take a name back. The same holds for the
    two tables of quantizers, which are public but can only grow through their API.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from initialising a module."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def forget(table: Any, name: str, value: object) -> None:
    """Take an entry out of a table of transformers, or of an interface, if it is ours."""
    entries = getattr(table, "_global_mapping", table)
    if entries is not None and entries.get(name) is value:
        entries.pop(name, None)


def keep_names(model: Any, weights: Iterable[str]) -> None:
    """Have save_pretrained save the quantised weights of a model under the names that they have.

    Args:
        model: a PreTrainedModel.
        weights: names of weights of its experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # What save_pretrained takes of a model that was not loaded.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    model._weight_conversions = anchored(conversions, weights)


def anchored(conversions: Iterable[Any], weights: Iterable[str]) -> list[Any]:
    """Return conversions that leave the stored tensors of quantised experts alone, both ways.

    Patterns match any part of a name: "mlp.experts.gate_up_proj" would also take
    "mlp.experts.gate_up_proj.codes" for experts to be split. A `$` says where the name ends.
    """
    weights = list(weights)
    return [_anchored(conversion, weights) for conversion in conversions]


def converts_to(conversion: Any, weights: Iterable[str]) -> bool:
    """Tell whether a conversion is a WeightConverter that makes one of the weights."""
    # A target may repeat what its source matched. It then stands for any name.
    targets = [target.replace(r"\1", ".+") for target in conversion.target_patterns]
    return hasattr(conversion, "operations") and any(
        re.search(target, weight) for target in targets for weight in weights
    )


def source_patterns(conversion: Any) -> list[str]:
    """Return the patterns that a conversion was made with."""
    return list(conversion._original_source_patterns)


def rewritten(
    conversion: Any, sources: list[str], targets: list[str], operations: list[Any]
) -> Any:
    """Return a WeightConverter like another one, with other patterns and operations."""
    new = type(conversion)(source_patterns=sources, target_patterns=targets, operations=operations)
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(conversion, name):
            setattr(new, name, getattr(conversion, name))
    return new


def _anchored(conversion: Any, weights: list[str]) -> Any:
    if not converts_to(conversion, weights):
        return conversion
    sources, targets = source_patterns(conversion), list(conversion._original_target_patterns)
    if any(conversion.compiled_sources.search(weight) for weight in weights):
        # It changes weights in place, such as by transposing them.
        conversion = rewritten(conversion, _ended(sources), targets, conversion.operations)
        conversion._original_source_patterns = sources
    conversion._original_target_patterns = _ended(targets)
    return conversion


def _ended(patterns: list[str]) -> list[str]:
    return [pattern if pattern.endswith("$") else f"{pattern}$" for pattern in patterns]
