"""The distillation loop as in published code: the variant ``peer``.

It runs the same algorithm as this project's engine on the same networks, without this project's ops, and has these
properties of the released loops (CPSC_DFKD.py of the paper's authors, DeepInversion, Fast-Datafree):

- it runs eagerly, under autocast, in NCHW, with ``cudnn.benchmark`` and with foreach optimizers, the default;
- a forward hook on each BatchNorm of the teacher computes mean and variance of its input; hooks also read the stages;
- teacher and student are not frozen in a generator step: their weight gradients are computed and dropped;
- the student is in train mode in a generator step, which updates its BatchNorm buffers;
- ``loss.item()`` is called after every step.

It avoids accidental costs of those loops: noise is drawn on the device, optimizers are created once, hooks compute
nothing in student steps, statistics keep autocast's dtype, the teacher runs without a graph in student steps, and the
generator's gate does not promote its features to float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.benchmarks.ops.originals import DeepInversionHook, kldiv
from dfkd_fast.engine import DistillState
from dfkd_fast.models import FeatureModel
from dfkd_fast.nn import HighOrderAttention, SpatialAttention, freeze_spectral_norm
from dfkd_fast.objectives import HighOrderAttentionDistillation, SemanticFeatureContrast

__all__ = ["PeerLoop", "PlainGate", "PlainHighOrderAttention"]


class PlainGate(nn.Module):
    """Spatial attention with PyTorch's pooling and softmax, with the layers of ``gate``, which is over positions."""

    def __init__(self, gate: SpatialAttention) -> None:
        super().__init__()
        if gate.form not in ("spatial", "spatial_mean1"):
            raise ValueError(f"gate.form must be 'spatial' or 'spatial_mean1', got {gate.form!r}")
        self.scale, self.mean1 = gate.scale, gate.form == "spatial_mean1"
        self.encode = nn.Sequential(gate.reduce, gate.encode, gate.encode_norm, nn.ReLU())
        self.bottleneck = nn.Sequential(gate.bottleneck, gate.bottleneck_norm, nn.ReLU())
        self.widen = nn.Sequential(gate.widen, gate.widen_norm, nn.ReLU())
        self.decode = nn.Sequential(gate.decode, gate.decode_norm, nn.ReLU())
        self.expand = gate.expand

    def forward(self, features: Tensor) -> Tensor:
        """Return the gated features, of the same shape (N, C, H, W) as the input."""
        encoded = self.encode(features)
        pooled, indices = F.max_pool2d(encoded, 2, return_indices=True)
        widened = self.widen(self.bottleneck(pooled))
        maps = self.expand(self.decode(F.max_unpool2d(widened, indices, [2, 2], output_size=encoded.shape[-2:])))
        gate = maps.flatten(2).softmax(-1).view_as(maps).to(features.dtype)
        scale = self.scale * (maps.shape[-2] * maps.shape[-1]) if self.mean1 else self.scale
        return features + scale * gate * features


class PlainHighOrderAttention(nn.Module):
    """Mixed high-order attention as released by its authors: a 1 x 1 convolution per factor, with copied weights."""

    def __init__(self, like: HighOrderAttention) -> None:
        super().__init__()
        if like.mode != "joint":
            raise ValueError(f"like.mode must be 'joint', got {like.mode!r}")
        self.order = like.order
        self.factors = nn.ModuleList(self._convolution(weight) for weight in like.proj_weight)
        self.outs = nn.ModuleList(self._convolution(weight) for weight in like.out_weight)
        self.requires_grad_(like.proj_weight.requires_grad)

    @staticmethod
    def _convolution(weight: Tensor) -> nn.Conv2d:
        made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
        made.weight.data = weight.detach().clone()[:, :, None, None]
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended features, of the same shape (N, C, H, W) as x."""
        terms = []
        for order, out in enumerate(self.outs, start=1):
            first = order * (order - 1) // 2
            factors = (factor(x) for factor in self.factors[first : first + order])
            terms.append(out(F.relu(functools.reduce(torch.mul, factors))))
        return x * functools.reduce(torch.add, terms).sigmoid()


class _StatisticsHook(DeepInversionHook):
    """Computes nothing in student steps, where the teacher runs under ``torch.no_grad``."""

    def read(self, module: Any, x: Tensor) -> None:
        if torch.is_grad_enabled():
            super().read(module, x)


class _HookedModel:
    """A network with hooks on its stages, its last linear layer and, with ``statistics``, its BatchNorms."""

    def __init__(self, network: FeatureModel, *, statistics: bool) -> None:
        self.model, self.hooks = network.model, list[_StatisticsHook]()
        self.features: dict[str, Any] = dict.fromkeys(network.stages)
        for path in network.stages:
            self.model.get_submodule(path).register_forward_hook(functools.partial(self._keep, path))
        classifier = [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1]
        classifier.register_forward_pre_hook(lambda module, inputs: self._keep("penultimate", module, inputs, *inputs))
        if statistics:
            self.hooks = [_StatisticsHook(m) for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]

    def _keep(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], value: Tensor) -> None:
        self.features[name] = value

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        logits = self.model(x)
        *features, penultimate = self.features.values()
        return logits, features, penultimate


class PeerLoop:
    """Generator and student steps of the preset ``dfkd-fgvc``, with their optimizers.

    The loop uses the networks, heads, loss weights and noise of ``state``. It adds hooks to the networks, replaces the
    generator's gates by plain ones with the same layers, and copies the weights of the attention modules. ``mean`` and
    ``std`` normalize the teacher's input.

    Raises:
        ValueError: the objectives have terms that this loop does not support.
    """

    def __init__(self, state: DistillState, *, mean: Sequence[float], std: Sequence[float]) -> None:
        config, runtime = state.config, state.runtime
        self.config, self.device, self.cast, self.noise = config, runtime.device, runtime.cast, state.noise
        self.teacher = _HookedModel(state.teacher, statistics=True)
        self.student = _HookedModel(state.student.module, statistics=False)
        self.generator = generator = state.generator.module
        self.generator_weights = state.generator.objective.weights
        self.student_weights = state.student.objective.weights
        if set(self.generator_weights) != {"bn", "kd"} or set(self.student_weights) != {"kd", "mhad", "sfcl"}:
            found = f"{sorted(self.generator_weights)} and {sorted(self.student_weights)}"
            raise ValueError(f"PeerLoop supports the terms of the preset 'dfkd-fgvc', got {found}")
        for block in generator.blocks:
            if isinstance(block.attention, SpatialAttention):
                block.attention = PlainGate(block.attention)
        mhad, contrast = (state.student.objective.terms[name] for name in ("mhad", "sfcl"))
        assert isinstance(mhad, HighOrderAttentionDistillation)
        assert isinstance(contrast, SemanticFeatureContrast)
        self.adapters = mhad.adapters
        self.student_attention = self._attention(mhad.student_attention)
        self.teacher_attention = self._attention(mhad.teacher_attention)
        self.teacher_head, self.student_head = contrast.teacher_head, contrast.student_head
        self.contrast_temperature = contrast.config.temperature
        helpers = (self.adapters, self.student_attention, self.teacher_head, self.student_head)
        trained = [*self.student.model.parameters(), *(p for module in helpers for p in module.parameters())]
        rates, loop = config.optimizer, config.loop
        self.optimizer_g = torch.optim.Adam(generator.parameters(), lr=rates.generator_lr, betas=rates.generator_betas)
        self.optimizer_s = torch.optim.SGD(
            trained, lr=rates.student_lr, momentum=rates.student_momentum, weight_decay=rates.student_weight_decay
        )
        self.scheduler_s = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer_s, loop.epochs * loop.rounds_per_epoch * loop.student_steps
        )
        self.mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)

    def _attention(self, modules: nn.ModuleList) -> nn.ModuleList:
        return nn.ModuleList(PlainHighOrderAttention(module) for module in modules).to(self.device)  # type: ignore[arg-type]

    def _draw(self) -> Tensor:
        batch = self.config.loop.batch_size
        return torch.randn(batch, self.generator.latent_dim, device=self.device, generator=self.noise)

    def _normalize(self, images: Tensor) -> Tensor:
        return (images.float() * 0.5 + 0.5 - self.mean) / self.std

    def _contrast(self, anchors: Tensor, positives: Tensor) -> Tensor:
        count = len(anchors)
        vectors = F.normalize(torch.cat([anchors, positives]))
        similarity = vectors[:count] @ vectors.T / self.contrast_temperature
        itself = torch.eye(count, 2 * count, dtype=torch.bool, device=similarity.device)
        targets = torch.arange(count, 2 * count, device=similarity.device)
        return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), targets)

    def _images(self) -> Tensor:
        with ops.backend("reference"):  # F.batch_norm and activations in the generator's blocks
            return self._normalize(self.generator(self._draw()))

    def generator_step(self) -> tuple[float, dict[str, Tensor]]:
        """Run one generator step. Return its loss as a float and its terms as tensors on the device."""
        self.student.model.train()
        with self.cast():
            images = self._images()
            t_logits, _, _ = self.teacher(images)
            s_logits, _, _ = self.student(images)
            statistics = functools.reduce(torch.add, [hook.r_feature for hook in self.teacher.hooks])
            divergence = kldiv(s_logits, t_logits)
            loss = self.generator_weights["bn"] * statistics + self.generator_weights["kd"] * divergence
        for network in (self.teacher.model, self.student.model):
            network.zero_grad()
        self.optimizer_g.zero_grad()
        loss.backward()
        self.optimizer_g.step()
        return loss.item(), {"bn": statistics.detach(), "kd": divergence.detach()}

    def student_step(self) -> tuple[float, dict[str, Tensor]]:
        """Run one student step. Return its loss as a float and its terms as tensors on the device."""
        self.student.model.train()
        with self.cast():
            # As in the engine, only generator steps run the power iteration of the spectral norm.
            with torch.no_grad(), freeze_spectral_norm(self.generator):
                images = self._images()
                t_logits, t_features, t_penultimate = self.teacher(images)
            s_logits, s_features, s_penultimate = self.student(images)
            divergence = kldiv(s_logits, t_logits)
            attention = torch.zeros((), device=self.device)
            for t, s, adapter, t_module, s_module in zip(
                t_features, s_features, self.adapters, self.teacher_attention, self.student_attention, strict=True
            ):
                size = (min(t.shape[-2], s.shape[-2]), min(t.shape[-1], s.shape[-1]))
                t, s = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (t, s))
                with torch.no_grad():
                    target = t_module(t)
                attention = attention + F.mse_loss(s_module(adapter(s)), target)
            contrast = self._contrast(self.teacher_head(t_penultimate), self.student_head(s_penultimate))
            weights = self.student_weights
            loss = weights["kd"] * divergence + weights["mhad"] * attention + weights["sfcl"] * contrast
        self.optimizer_s.zero_grad()
        loss.backward()
        self.optimizer_s.step()
        self.scheduler_s.step()
        return loss.item(), {"kd": divergence.detach(), "mhad": attention.detach(), "sfcl": contrast.detach()}
