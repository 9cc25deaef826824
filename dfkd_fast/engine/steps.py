"""One generator step and one student step (paper, Eq. 10 and 11), without a host synchronisation.

Both write their terms' values into a row of ``state.trace``, on the device; the loop reads all rows once a round. A
step whose loss or gradient is not finite is skipped by its optimiser, on the device too.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dfkd_fast.engine.state import DistillState
from dfkd_fast.models import batchnorm_mode, frozen
from dfkd_fast.nn import spectral_norm_held

__all__ = ["generator_step", "student_step", "synthesize"]


def synthesize(state: DistillState, noise: Tensor) -> Tensor:
    """Images in [-1, 1], (N, 3, H, W), from a generator that is left bit-identical.

    Its BatchNorms use the batch's statistics, as they do while it is trained, without updating their buffers, and its
    spectral norms do not iterate.
    """
    generator = state.generator
    with torch.no_grad(), batchnorm_mode(generator, "batch"), spectral_norm_held(generator), state.runtime.cast():
        return generator(noise)


def _descend(
    state: DistillState,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    total: Tensor,
    values: Tensor,
    row: int,
) -> None:
    scaler.scale(total).backward()
    if scaler.is_enabled():
        # The scaler's first gradients overflow by design: it skips the step and backs off. A loss that is not finite is
        # still told by its value.
        scaler.step(optimizer)
        scaler.update()
        gradient_finite = torch.ones((), device=total.device)
    else:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
        gradient_finite = torch.isfinite(largest).float()
        optimizer.found_inf = 1 - gradient_finite * torch.isfinite(total).float()  # type: ignore[attr-defined]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.trace[row].zero_()
    state.trace[row, : len(values)].copy_(values)
    state.trace[row, -1].copy_(gradient_finite)


def generator_step(state: DistillState, row: int) -> None:
    """The generator descends ``alpha * L_BN - L_KD``; teacher and student stay bit-identical and get no gradient.

    The gradient reaches the images through the teacher's and the student's logits. The student's BatchNorms use the
    batch's statistics without updating their buffers, unless the config says otherwise.
    """
    objective, student = state.generator_objective, state.student
    teacher = state.teacher_statistics if "statistics" in objective.needs else state.teacher
    assert teacher is not None
    needs_student = "student" in objective.needs
    mode = state.config.loop.student_in_generator_step
    with frozen(student), batchnorm_mode(student, mode) if needs_student else nullcontext():
        with state.runtime.cast():
            images = state.generator(state.draw(state.config.loop.batch_size))
            inputs = images.float() * state.scale + state.shift
            total, values = objective(teacher(inputs), student(inputs) if needs_student else None)
        _descend(state, state.generator_optimizer, state.generator_scaler, total, values, row)


def student_step(state: DistillState, row: int) -> None:
    """The student descends ``L_KD + beta * L_MHAD + gamma * L_SFCL``; teacher and generator stay bit-identical."""
    images = synthesize(state, state.draw(state.config.loop.batch_size))
    with state.runtime.cast():
        inputs = images.float() * state.scale + state.shift
        with torch.no_grad():
            target = state.teacher(inputs)
        total, values = state.student_objective(target, state.student(inputs))
    for group in state.student_optimizer.param_groups:
        group["lr"] = state.student_lr()
    _descend(state, state.student_optimizer, state.student_scaler, total, values, row)
    state.student_updates += 1
