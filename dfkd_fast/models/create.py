"""Networks by name: timm's, torchvision's, a factory in another module, and the built-in ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from dfkd_fast.config import ModelConfig
from dfkd_fast.graph import FeatureModel, unwrap
from dfkd_fast.graph.tracing import first_line
from dfkd_fast.models.resnets import CifarResNet, WideResNet
from dfkd_fast.models.weights import load_weights
from dfkd_fast.registry import import_factory

__all__ = ["create_model", "names", "normalization"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_WIDE_X4 = (32, 64, 128, 256)
_BUILT_IN = (
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4"),
    *("wrn_10_1", "wrn_16_1", "wrn_16_2", "wrn_28_10", "wrn_40_1", "wrn_40_2"),
)


def names() -> list[str]:
    """Names of the built-in networks. ``wrn_<depth>_<width>`` also accepts other sizes."""
    return list(_BUILT_IN)


def _unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=5)
    if close:
        return ValueError(f"ModelConfig.name: no {kind} named {name!r}; did you mean {', '.join(map(repr, close))}?")
    listed = ", ".join(known[:20]) + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
    return ValueError(f"ModelConfig.name: no {kind} named {name!r}; there are {listed}")


def _create_built_in(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    if match := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        depth, width = int(match[1]), int(match[2])
        if width < 1:
            raise ValueError(f"ModelConfig.name: the second number of {name!r}, the width, must be at least 1")
        return WideResNet(depth, width, num_classes=num_classes, **options)
    if name in _BUILT_IN:
        if name.endswith("x4"):
            options = {"widths": _WIDE_X4, **options}
        depth = int(name.removeprefix("resnet").removesuffix("x4"))
        return CifarResNet(depth, num_classes=num_classes, **options)
    error = _unknown("built-in network", name, _BUILT_IN)
    raise ValueError(
        f"{error} Other networks have a prefix: 'timm:{name}', 'torchvision:{name}', 'package.module:factory'"
    )


def _create_timm(name: str, num_classes: int, options: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise _unknown("timm model", name, timm.list_models())
    if not pretrained:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes, **options)
    except Exception as error:  # of the hub, the network or the cache
        raise ValueError(
            f"ModelConfig.pretrained: cannot load the pretrained weights of 'timm:{name}' ({first_line(error)}): "
            "connect to the network once to download them, or set ModelConfig.weights to a file"
        ) from error


def _create_torchvision(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)  # only classifiers
    if name not in known:
        raise _unknown("torchvision classifier", name, known)
    if name in ("googlenet", "inception_v3"):
        # By default these return a tuple in training mode and warn about their initialization.
        options = {"aux_logits": False, "init_weights": True, **options}
    return models.get_model(name, weights=None, num_classes=num_classes, **options)


def _create_from_module(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    model = import_factory(name, "ModelConfig.name")(num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"ModelConfig.name: {name!r} must return a torch.nn.Module, got a {type(model).__name__}")
    return model


def _head(model: nn.Module, num_classes: int) -> str:
    """The path of the last linear layer or 1 x 1 convolution with ``num_classes`` outputs."""
    found = None
    for path, module in model.named_modules():
        if (isinstance(module, nn.Linear) and module.out_features == num_classes) or (
            isinstance(module, nn.Conv2d) and module.out_channels == num_classes and module.kernel_size == (1, 1)
        ):
            found = path
    if found is None:
        raise ValueError(f"new_head: {type(model).__name__} has no layer with {num_classes} outputs")
    return found


def create_model(config: ModelConfig, *, num_classes: int, new_head: bool = False) -> nn.Module:
    """Build a classifier and load its weights if the config names a file.

    Nothing is downloaded unless ``config.pretrained`` is set. New weights are drawn from torch's global generator.

    Args:
        config: name, weights and options; ``config.stages`` is for :func:`dfkd_fast.models.extract`.
        num_classes: number of classes.
        new_head: like ``config.new_head``; one of them is enough.

    Returns:
        A float32 module in training mode that maps images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        ValueError: unknown name (the message lists similar ones), wrong options, weights that do not fit, or pretrained
            weights that are not available.
        TypeError: a factory does not return a module or does not accept the options.
        FileNotFoundError: the weights file does not exist.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if not config.name:
        raise ValueError("ModelConfig.name is required")
    options = dict(config.options)
    for name in ("pretrained", "weights", "num_classes", "checkpoint_path"):  # timm reads the last one as a pickle
        if name in options:
            raise ValueError(
                f"ModelConfig.options must not contain {name!r}: the data determines the classes and "
                "ModelConfig.weights or ModelConfig.pretrained the weights"
            )
    source, colon, name = config.name.partition(":")
    pretrained = config.pretrained and config.weights is None
    if pretrained and source != "timm":
        raise ValueError(
            f"ModelConfig.pretrained needs a network of timm, got {config.name!r}: set ModelConfig.weights"
        )
    if not colon:
        model = _create_built_in(config.name, num_classes, options)
    elif source == "timm":
        model = _create_timm(name, num_classes, options, pretrained=pretrained)
    elif source == "torchvision":
        model = _create_torchvision(name, num_classes, options)
    else:
        model = _create_from_module(config.name, num_classes, options)
    if config.weights is not None:
        load_weights(model, config.weights, skip=[_head(model, num_classes)] if new_head or config.new_head else [])
    return model


def normalization(model: nn.Module) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel (RGB, pixels in [0, 1]) of a network's input images.

    timm's networks store both. torchvision's networks use those of ImageNet. For all others, both are 0.5.
    """
    model = unwrap(model)
    if isinstance(model, FeatureModel):
        model = unwrap(model.model)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if config is not None:
        values = config if isinstance(config, dict) else vars(config)
        mean, std = values.get("mean"), values.get("std")
        if mean is not None and std is not None and len(mean) == len(std) == 3:
            return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
    if type(model).__module__.startswith("torchvision."):
        return _IMAGENET
    return _HALF
