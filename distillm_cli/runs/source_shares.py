"""Turn the sources of a mixture (``data.sources``) into numbers of rows, and describe them."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from distillm_cli.config.schema import DataConfig, SourceConfig
from distillm_cli.data.batching import Examples, MixedOrder, Order
from distillm_cli.utils.text import redact


def wanted_rows(sources: SequenceOf[SourceConfig], sizes: SequenceOf[int]) -> list[float]:
    """Return the number of rows of each source in an epoch, before it is rounded. sizes: examples of each source.

    With weights, an epoch has as many rows as all sources together.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        return [weight / sum(weights) * sum(sizes) for weight in weights]
    return [float(source.rows or size) for source, size in zip(sources, sizes, strict=True)]


def source_figures(data: DataConfig, examples: Examples, order: Order) -> tuple[dict[str, Any], ...]:
    """Return for each source of a mixture its name, its examples, and its share of the rows of an epoch."""
    if not isinstance(order, MixedOrder):
        return ()
    total = sum(order.counts)
    return tuple(
        {
            "source": redact(source.source),
            "rows": size,
            "rows_per_epoch": count,
            "share": round(count / total, 4),
            **({} if source.template is None else {"template": source.template}),
        }
        for source, size, count in zip(data.sources, examples.part_sizes, order.counts, strict=True)
    )
