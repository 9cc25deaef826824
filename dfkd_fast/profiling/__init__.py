"""Where a step's time goes: a torch.profiler trace of some steps, taken apart by network and op, gaps shown."""

from dfkd_fast.profiling.anatomy import anatomy, events_of, summary_table, table
from dfkd_fast.profiling.classes import GAP, op_class
from dfkd_fast.profiling.figure import save_anatomy
from dfkd_fast.profiling.run import ProfileResult, profile, record
from dfkd_fast.profiling.timeline import Activity, Timeline, attribute_by_order, read_trace, timeline

__all__ = [
    "GAP",
    "Activity",
    "ProfileResult",
    "Timeline",
    "anatomy",
    "attribute_by_order",
    "events_of",
    "op_class",
    "profile",
    "read_trace",
    "record",
    "save_anatomy",
    "summary_table",
    "table",
    "timeline",
]
