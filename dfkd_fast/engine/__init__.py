"""The engine: training with data, distilling without, evaluating, exporting."""

from dfkd_fast.engine.checkpoint import CheckpointError, Checkpoints
from dfkd_fast.engine.evaluation import EvalResult, evaluate
from dfkd_fast.engine.exporting import ExportError, ExportResult, export
from dfkd_fast.engine.loop import DistillResult, NonFiniteError, agreement, distill
from dfkd_fast.engine.runtime import Runtime
from dfkd_fast.engine.state import DistillState, Position, build_generator, build_state
from dfkd_fast.engine.steps import generator_step, student_step, synthesize
from dfkd_fast.engine.training import TeachResult, teach

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DistillResult",
    "DistillState",
    "EvalResult",
    "ExportError",
    "ExportResult",
    "NonFiniteError",
    "Position",
    "Runtime",
    "TeachResult",
    "agreement",
    "build_generator",
    "build_state",
    "distill",
    "evaluate",
    "export",
    "generator_step",
    "student_step",
    "synthesize",
    "teach",
]
