"""The engine: supervised training, data-free distillation, evaluation and export."""

from dfkd_fast.engine.capture import CaptureError
from dfkd_fast.engine.checkpoint import CheckpointError, Checkpoints
from dfkd_fast.engine.distributed import is_main, join
from dfkd_fast.engine.engines import (
    CompiledEngine,
    EagerEngine,
    Engine,
    GraphEngine,
    create_engine,
    resolve_engine,
)
from dfkd_fast.engine.evaluation import Cost, EvalResult, Measures, Predictions, cost, evaluate, measure, predictions
from dfkd_fast.engine.exporting import ExportError, ExportResult, export
from dfkd_fast.engine.loop import Callback, DistillResult, NonFiniteError, agreement, distill
from dfkd_fast.engine.networks import Networks, StepNetworks
from dfkd_fast.engine.predicting import Prediction, predict, write_predictions
from dfkd_fast.engine.runtime import Runtime, supports_bf16
from dfkd_fast.engine.state import DistillState, Position, Side, build_generator, build_state
from dfkd_fast.engine.steps import generator_step, student_step, synthesize
from dfkd_fast.engine.synthesizing import make_images
from dfkd_fast.engine.trackers import TRACKERS, TrackedRun, Tracker, TrackerError
from dfkd_fast.engine.training import TeachResult, teach

__all__ = [
    "TRACKERS",
    "Callback",
    "CaptureError",
    "CheckpointError",
    "Checkpoints",
    "CompiledEngine",
    "Cost",
    "DistillResult",
    "DistillState",
    "EagerEngine",
    "Engine",
    "EvalResult",
    "ExportError",
    "ExportResult",
    "GraphEngine",
    "Measures",
    "Networks",
    "NonFiniteError",
    "Position",
    "Prediction",
    "Predictions",
    "Runtime",
    "Side",
    "StepNetworks",
    "TeachResult",
    "TrackedRun",
    "Tracker",
    "TrackerError",
    "agreement",
    "build_generator",
    "build_state",
    "cost",
    "create_engine",
    "distill",
    "evaluate",
    "export",
    "generator_step",
    "is_main",
    "join",
    "make_images",
    "measure",
    "predict",
    "predictions",
    "resolve_engine",
    "student_step",
    "supports_bf16",
    "synthesize",
    "teach",
    "write_predictions",
]
