"""Problems: where they come from, and which ones belong to a step."""

from opsdc_jax.data.loading import fingerprint
from opsdc_jax.data.sources import (
    Evaluation,
    Example,
    Source,
    TableSource,
    evaluation_examples,
    open_source,
    tiny_evaluation,
)

__all__ = [
    "Evaluation",
    "Example",
    "Source",
    "TableSource",
    "evaluation_examples",
    "fingerprint",
    "open_source",
    "tiny_evaluation",
]
