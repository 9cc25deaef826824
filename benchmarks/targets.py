"""What is aimed at on an H200, in microseconds, by op, case and pass (bf16, cold L2); and notes on what misses it."""

from __future__ import annotations

__all__ = ["DEVICE", "NOTES", "TARGETS"]

DEVICE = "H200"
"""Part of the name of the device that the targets are for."""

_BOTH_WAYS: dict[str, dict[str, tuple[float, float | None]]] = {
    "high_order_attention": {
        "64x64x56x56": (18, 35),
        "64x128x28x28": (11, 30),
        "64x256x14x14": (10, 30),
        "64x512x7x7": (12, 35),
    },
    "spatial_attention": {
        "64x256x28x28": (16, 38),
        "64x128x56x56": (31, 75),
        "64x64x112x112": (62, 150),
        "64x64x224x224": (250, 600),
    },
    "contrastive_loss": {
        "128x128": (6, 8),
        "8192x128": (20, 55),
        "65536x128": (1_100, 3_200),
        "131072x128": (4_300, 12_800),
    },
    "distillation_kl": {
        "64x200": (3, 3),
        "4096x1000": (6, 10),
    },
    "batchnorm_statistics": {
        "resnet34 batch 64": (300, None),
        "resnet34 batch 64 with residuals": (350, 520),
    },
}

TARGETS: dict[tuple[str, str, str], float] = {
    (op, case, which): microseconds
    for op, cases in _BOTH_WAYS.items()
    for case, both in cases.items()
    for which, microseconds in zip(("forward", "backward"), both, strict=True)
    if microseconds is not None
}

NOTES: dict[tuple[str, str, str], str] = {}
"""For a case and pass that misses its target: what limits it, and what was tried. Written by hand."""
