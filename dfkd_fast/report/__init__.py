"""Image grids, curves, tables, and result files with their environment.

Drawing libraries are imported on first use.
"""

from dfkd_fast.report.pictures import save_beside, save_curves, save_image_grid
from dfkd_fast.report.results import (
    device_slug,
    environment,
    read_results,
    source_digest,
    timestamp,
    write_results,
)
from dfkd_fast.report.tables import markdown_table, result_table

__all__ = [
    "device_slug",
    "environment",
    "markdown_table",
    "read_results",
    "result_table",
    "save_beside",
    "save_curves",
    "save_image_grid",
    "source_digest",
    "timestamp",
    "write_results",
]
