"""The distillation loop as published code writes it: the variant ``peer``.

The same algorithm as this project's engine on the same networks, in plain PyTorch and without any of its ops, with the
traits of the released loops (CPSC_DFKD.py of the paper's authors, DeepInversion, Fast):

- eager, under autocast, NCHW, ``cudnn.benchmark`` on, optimisers with their defaults (foreach);
- a forward hook on each BatchNorm of the teacher computes mean and variance of its input; hooks also read the stages;
- teacher and student are not frozen in a generator step: their weight gradients are computed and dropped;
- the student is in train mode there, so that its BatchNorm buffers move;
- ``loss.item()`` after every step.

It avoids what is needlessly slow in those loops: noise is drawn on the device, optimisers live as long as the run,
hooks compute nothing in student steps, statistics stay in autocast's dtype, the teacher runs without a graph in student
steps, and the generator's gate does not promote its features to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.engine import DistillState
from dfkd_fast.models import FeatureModel
from dfkd_fast.nn import HighOrderAttention, SpatialAttention, freeze_spectral_norm
from dfkd_fast.objectives import HighOrderAttentionDistillation, SemanticFeatureContrast

__all__ = ["PeerLoop", "PlainGate", "PlainHighOrderAttention"]


class PlainGate(nn.Module):
    """Spatial attention with PyTorch's pooling and softmax, over the layers of a gate of form ``spatial``."""

    def __init__(self, gate: SpatialAttention) -> None:
        super().__init__()
        if gate.form != "spatial":
            raise ValueError(f"gate.form must be 'spatial', got {gate.form!r}")
        self.scale = gate.scale
        self.encode = nn.Sequential(gate.reduce, gate.encode, gate.encode_norm, nn.ReLU())
        self.bottleneck = nn.Sequential(gate.bottleneck, gate.bottleneck_norm, nn.ReLU())
        self.widen = nn.Sequential(gate.widen, gate.widen_norm, nn.ReLU())
        self.decode = nn.Sequential(gate.decode, gate.decode_norm, nn.ReLU())
        self.expand = gate.expand

    def forward(self, features: Tensor) -> Tensor:
        """Gate (N, C, H, W)."""
        encoded = self.encode(features)
        pooled, places = F.max_pool2d(encoded, 2, return_indices=True)
        widened = self.widen(self.bottleneck(pooled))
        maps = self.expand(self.decode(F.max_unpool2d(widened, places, [2, 2], output_size=encoded.shape[-2:])))
        gate = maps.flatten(2).softmax(-1).view_as(maps).to(features.dtype)
        return features + self.scale * gate * features


class PlainHighOrderAttention(nn.Module):
    """Mixed high-order attention as its authors released it: a 1 x 1 convolution per factor, with copied weights."""

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
        """The attended features, (N, C, H, W) as x."""
        total: Tensor | None = None
        for order, out in enumerate(self.outs, start=1):
            first = order * (order - 1) // 2
            product = self.factors[first](x)
            for factor in self.factors[first + 1 : first + order]:
                product = product * factor(x)
            term = out(F.relu(product))
            total = term if total is None else total + term
        assert total is not None
        return x * total.sigmoid()


class _Watched:
    """A network with hooks on its stages, its last linear layer and, with ``statistics``, its BatchNorms."""

    def __init__(self, network: FeatureModel, *, statistics: bool) -> None:
        self.model = network.model
        self.features: dict[str, Tensor] = {}
        self.penultimate: Tensor | None = None
        self.distance: Tensor | None = None
        self._stages = network.stages
        for path in self._stages:
            self.model.get_submodule(path).register_forward_hook(self._keep(path))
        classifiers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        classifiers[-1].register_forward_pre_hook(self._keep_penultimate)
        if statistics:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.register_forward_hook(self._compare)

    def _keep(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.features[path] = output

        return hook

    def _keep_penultimate(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.penultimate = inputs[0]

    def _compare(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        assert isinstance(module, nn.BatchNorm2d)
        assert module.running_mean is not None
        assert module.running_var is not None
        (x,) = inputs
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        distance = torch.norm(mean - module.running_mean, 2) + torch.norm(var - module.running_var, 2)
        self.distance = distance if self.distance is None else self.distance + distance

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        self.distance = None
        logits = self.model(x)
        assert self.penultimate is not None
        return logits, [self.features[path] for path in self._stages], self.penultimate


class PeerLoop:
    """Generator and student steps of the preset ``dfkd-fgvc``, with their optimisers.

    The loop uses the networks, heads, loss weights and noise of ``state``: its networks get hooks, its generator's
    gates are replaced by plain ones over the same layers, and the weights of its attention modules are copied.
    ``mean`` and ``std`` are those of the teacher's input.

    Raises:
        ValueError: terms that this loop does not have.
    """

    def __init__(self, state: DistillState, *, mean: Sequence[float], std: Sequence[float]) -> None:
        config, runtime = state.config, state.runtime
        self.config, self.device, self.cast, self.noise = config, runtime.device, runtime.cast, state.noise
        self.teacher = _Watched(state.teacher, statistics=True)
        self.student = _Watched(state.student.module, statistics=False)
        self.generator = generator = state.generator.module
        self.generator_weights = state.generator.objective.weights
        self.student_weights = state.student.objective.weights
        if set(self.generator_weights) != {"bn", "kd"} or set(self.student_weights) != {"kd", "mhad", "sfcl"}:
            found = f"{sorted(self.generator_weights)} and {sorted(self.student_weights)}"
            raise ValueError(f"the plain loop has the terms of the preset 'dfkd-fgvc', got {found}")
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

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() * 0.5 + 0.5 - self.mean) / self.std

    @staticmethod
    def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="batchmean")

    def _contrast(self, anchors: Tensor, positives: Tensor) -> Tensor:
        count = len(anchors)
        vectors = F.normalize(torch.cat([anchors, positives]))
        similarity = vectors[:count] @ vectors.T / self.contrast_temperature
        itself = torch.eye(count, 2 * count, dtype=torch.bool, device=similarity.device)
        targets = torch.arange(count, 2 * count, device=similarity.device)
        return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), targets)

    def generator_step(self) -> tuple[float, dict[str, Tensor]]:
        """One step of the generator: its loss, read back, and the terms, left on the device."""
        self.student.model.train()
        with self.cast():
            images = self._normalise(self.generator(self._draw()))
            t_logits, _, _ = self.teacher(images)
            s_logits, _, _ = self.student(images)
            statistics = self.teacher.distance
            assert statistics is not None
            divergence = self._divergence(s_logits, t_logits)
            loss = self.generator_weights["bn"] * statistics + self.generator_weights["kd"] * divergence
        for network in (self.teacher.model, self.student.model):
            network.zero_grad()
        self.optimizer_g.zero_grad()
        loss.backward()
        self.optimizer_g.step()
        return loss.item(), {"bn": statistics.detach(), "kd": divergence.detach()}

    def student_step(self) -> tuple[float, dict[str, Tensor]]:
        """One step of the student: its loss, read back, and the terms, left on the device."""
        self.student.model.train()
        with self.cast():
            # Without an iteration of the spectral norm, which would make it another algorithm.
            with torch.no_grad(), freeze_spectral_norm(self.generator):
                images = self._normalise(self.generator(self._draw()))
                t_logits, t_features, t_penultimate = self.teacher(images)
            s_logits, s_features, s_penultimate = self.student(images)
            divergence = self._divergence(s_logits, t_logits)
            attention = torch.zeros((), device=self.device)
            for t, s, adapter, t_module, s_module in zip(
                t_features, s_features, self.adapters, self.teacher_attention, self.student_attention, strict=True
            ):
                size = (min(t.shape[-2], s.shape[-2]), min(t.shape[-1], s.shape[-1]))
                with torch.no_grad():
                    target = t_module(t if t.shape[-2:] == size else F.adaptive_avg_pool2d(t, size))
                given = adapter(s if s.shape[-2:] == size else F.adaptive_avg_pool2d(s, size))
                attention = attention + F.mse_loss(s_module(given), target)
            contrast = self._contrast(self.teacher_head(t_penultimate), self.student_head(s_penultimate))
            weights = self.student_weights
            loss = weights["kd"] * divergence + weights["mhad"] * attention + weights["sfcl"] * contrast
        self.optimizer_s.zero_grad()
        loss.backward()
        self.optimizer_s.step()
        self.scheduler_s.step()
        return loss.item(), {"kd": divergence.detach(), "mhad": attention.detach(), "sfcl": contrast.detach()}
