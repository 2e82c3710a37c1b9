"""What a run shows at its end: tables in the terminal, and report.html."""

from opsdc_jax.report.page import write
from opsdc_jax.report.table import claims, table, tables, verdict

__all__ = ["claims", "table", "tables", "verdict", "write"]
