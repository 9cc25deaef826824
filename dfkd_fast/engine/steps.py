"""One generator step and one student step (paper, Eq. 10 and 11), without a host synchronisation.

A step only queues work on the device and reads nothing of the host that changes from step to step, so the same function
can be run, compiled region by region, or captured into a graph and replayed. Both steps write the values of their terms
into the row of ``state.trace`` at ``state.cursor``, on the device; the loop reads all rows once per round. A step whose
loss or gradient is not finite is skipped by its optimizer, on the device too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.engine.networks import StepNetworks, eager_networks
from dfkd_fast.engine.state import DistillState, Side
from dfkd_fast.graph import batchnorm_mode, frozen
from dfkd_fast.nn import freeze_spectral_norm
from dfkd_fast.nvtx import nvtx_range

__all__ = ["generator_step", "student_step", "synthesize"]


@contextmanager
def _unchanged(generator: nn.Module) -> Iterator[None]:
    """Forwards of the generator inside leave it bit-identical.

    Its BatchNorms use the batch's statistics, as in its training, without updating their buffers, and its spectral
    norms do not iterate.
    """
    with torch.no_grad(), batchnorm_mode(generator, "batch"), freeze_spectral_norm(generator):
        yield


def synthesize(state: DistillState, noise: Tensor) -> Tensor:
    """Images in [-1, 1], (N, 3, H, W), from noise (N, latent_dim); the generator stays bit-identical."""
    generator = state.generator.module
    with _unchanged(generator), state.runtime.cast():
        return generator(noise)


def _descend(state: DistillState, side: Side[Any], total: Tensor, values: Tensor) -> None:
    optimizer, scaler = side.optimizer, side.scaler
    scaler.scale(total).backward()
    with nvtx_range("network", "optimizer"):
        if scaler.is_enabled():
            # The scaler's first gradients overflow by design: it skips the step and backs off. A loss that is not
            # finite still shows in its value.
            scaler.step(optimizer)
            scaler.update()
            finite = torch.ones_like(values[:1])
        else:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
            finite = torch.isfinite(largest).float().view(1)
            optimizer.found_inf = 1 - finite[0] * torch.isfinite(total).float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
        row = torch.nn.functional.pad(values, (0, state.trace.shape[1] - 1 - len(values)))
        state.trace.index_copy_(0, state.cursor, torch.cat([row, finite]).unsqueeze(0))
        state.cursor.add_(1)


def generator_step(state: DistillState, networks: StepNetworks | None = None) -> None:
    """The generator minimises ``alpha * L_BN - L_KD``; teacher and student stay bit-identical and get no gradient.

    The gradient reaches the images through the teacher's and the student's logits. The student's BatchNorms use the
    batch's statistics without updating their buffers, unless the config says otherwise.

    Args:
        state: what is trained.
        networks: the calls of the step; None is :func:`eager_networks`.
    """
    call = networks or eager_networks(state).generator_step
    student, needs_student = state.student.module, "student" in state.generator.objective.needs
    mode = state.config.loop.student_in_generator_step
    noise = state.draw(state.config.loop.batch_size)
    with frozen(student), batchnorm_mode(student, mode) if needs_student else nullcontext():
        with state.runtime.cast():
            inputs = call.generator(noise)
            outputs = call.student(inputs) if needs_student else None
            total, values = call.objective(call.teacher(inputs), outputs)
        _descend(state, state.generator, total, values)


def student_step(state: DistillState, networks: StepNetworks | None = None) -> None:
    """The student minimises ``L_KD + beta * L_MHAD + gamma * L_SFCL``; teacher and generator stay bit-identical.

    Args:
        state: what is trained.
        networks: the calls of the step; None is :func:`eager_networks`.
    """
    call = networks or eager_networks(state).student_step
    noise = state.draw(state.config.loop.batch_size)
    with state.runtime.cast():
        with _unchanged(state.generator.module):
            inputs = call.generator(noise)
        with torch.no_grad():
            target = call.teacher(inputs)
        total, values = call.objective(target, call.student(inputs))
    torch.index_select(state.rates, 0, state.cursor, out=state.student_rate.view(1))
    _descend(state, state.student, total, values)
