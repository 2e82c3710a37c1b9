"""What a run shows at its end."""

from opsdc_jax.report.table import SYSTEM_NAMES, claims, plot, table, tables, verdict

__all__ = ["SYSTEM_NAMES", "claims", "plot", "table", "tables", "verdict"]
