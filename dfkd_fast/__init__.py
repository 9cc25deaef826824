"""Fast data-free knowledge distillation for fine-grained recognition.

Implements Shao et al., "Data-free Knowledge Distillation for Fine-grained Visual Categorization", ICCV 2023.

Names are imported on first use, so ``import dfkd_fast.ops`` requires only torch.
"""

import getpass
import os
import tempfile
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    **dict.fromkeys(("distill", "teach", "evaluate", "predict", "DistillResult"), "dfkd_fast.engine"),
    **dict.fromkeys(("DistillConfig", "TeachConfig"), "dfkd_fast.config"),
    **dict.fromkeys(("AttentionGenerator", "HighOrderAttention", "ProjectionHead"), "dfkd_fast.nn"),
    **dict.fromkeys(("SemanticFeatureContrast", "SpatialAttention"), "dfkd_fast.nn"),
    **dict.fromkeys(("patch", "unpatch"), "dfkd_fast.graph"),
}

if TYPE_CHECKING:
    from dfkd_fast.config import DistillConfig, TeachConfig
    from dfkd_fast.engine import DistillResult, distill, evaluate, predict, teach
    from dfkd_fast.graph import patch, unpatch
    from dfkd_fast.nn import (
        AttentionGenerator,
        HighOrderAttention,
        ProjectionHead,
        SemanticFeatureContrast,
        SpatialAttention,
    )

__all__ = [
    "AttentionGenerator",
    "DistillConfig",
    "DistillResult",
    "HighOrderAttention",
    "ProjectionHead",
    "SemanticFeatureContrast",
    "SpatialAttention",
    "TeachConfig",
    "__version__",
    "distill",
    "evaluate",
    "patch",
    "predict",
    "teach",
    "unpatch",
]


def _complete_environment() -> None:
    """Set variables for users without a name or a home folder, as in containers, unless they are set."""
    try:
        getpass.getuser()
    except (ImportError, KeyError, OSError):  # importing torch.compile would fail, because its cache has this name
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":  # Triton would write its cache to a folder with this name
        os.environ.setdefault("TRITON_HOME", tempfile.gettempdir())


_complete_environment()


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
