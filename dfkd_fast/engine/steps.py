"""One generator step and one student step (paper, Eq. 10 and 11), without a host synchronisation.

What a step does is queued on the device and reads nothing of the host that changes from step to step, so that the same
function can be run, compiled piece by piece, or captured into a graph and replayed. Both steps write their terms'
values into the row of ``state.trace`` that ``state.cursor`` points at, on the device; the loop reads all rows once a
round. A step whose loss or gradient is not finite is skipped by its optimiser, on the device too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from dfkd_fast.engine.networks import StepNetworks, plain
from dfkd_fast.engine.state import DistillState
from dfkd_fast.graph import batchnorm_mode, frozen
from dfkd_fast.nn import spectral_norm_held
from dfkd_fast.nvtx import nvtx_range

__all__ = ["generator_step", "student_step", "synthesize"]


@contextmanager
def _untouched(generator: nn.Module) -> Iterator[None]:
    """Inside, forwards of the generator leave it bit-identical.

    Its BatchNorms use the batch's statistics, as they do while it is trained, without updating their buffers, and its
    spectral norms do not iterate.
    """
    with torch.no_grad(), batchnorm_mode(generator, "batch"), spectral_norm_held(generator):
        yield


def synthesize(state: DistillState, noise: Tensor) -> Tensor:
    """Images in [-1, 1], (N, 3, H, W), from a generator that is left bit-identical."""
    with _untouched(state.generator), state.runtime.cast():
        return state.generator(noise)


def _descend(
    state: DistillState, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, total: Tensor, values: Tensor
) -> None:
    scaler.scale(total).backward()
    with nvtx_range("network", "optimizer"):
        if scaler.is_enabled():
            # The scaler's first gradients overflow by design: it skips the step and backs off. A loss that is not
            # finite is still told by its value.
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
    """The generator descends ``alpha * L_BN - L_KD``; teacher and student stay bit-identical and get no gradient.

    The gradient reaches the images through the teacher's and the student's logits. The student's BatchNorms use the
    batch's statistics without updating their buffers, unless the config says otherwise.

    Args:
        state: what is trained.
        networks: what is called; None is the state's own networks as they are.
    """
    call = networks or plain(state).generator_step
    student, needs_student = state.student, "student" in state.generator_objective.needs
    mode = state.config.loop.student_in_generator_step
    noise = state.draw(state.config.loop.batch_size)
    with frozen(student), batchnorm_mode(student, mode) if needs_student else nullcontext():
        with state.runtime.cast():
            inputs = call.generator(noise)
            outputs = call.student(inputs) if needs_student else None
            total, values = call.objective(call.teacher(inputs), outputs)
        _descend(state, state.generator_optimizer, state.generator_scaler, total, values)


def student_step(state: DistillState, networks: StepNetworks | None = None) -> None:
    """The student descends ``L_KD + beta * L_MHAD + gamma * L_SFCL``; teacher and generator stay bit-identical.

    Args:
        state: what is trained.
        networks: what is called; None is the state's own networks as they are.
    """
    call = networks or plain(state).student_step
    noise = state.draw(state.config.loop.batch_size)
    with state.runtime.cast():
        with _untouched(state.generator):
            inputs = call.generator(noise)
        with torch.no_grad():
            target = call.teacher(inputs)
        total, values = call.objective(target, call.student(inputs))
    torch.index_select(state.rates, 0, state.cursor, out=state.student_rate.view(1))
    _descend(state, state.student_optimizer, state.student_scaler, total, values)
