"""Problems: where they come from, and which ones belong to a step."""

from opsdc_jax.data.sources import (
    Evaluation,
    Example,
    Source,
    TableSource,
    evaluation_examples,
    open_source,
)

__all__ = [
    "Evaluation",
    "Example",
    "Source",
    "TableSource",
    "evaluation_examples",
    "open_source",
]
