"""The generator step and the student step (paper, Eq. 10 and 11), without host synchronization.

A step only queues work on the device and depends on no Python value that changes between steps. The same function can
therefore run eagerly, call compiled networks, or be captured into a CUDA graph. Steps write the values of their loss
terms to row ``state.cursor`` of ``state.trace``, which the loop reads once per round. If a loss or gradient is not
finite, the optimizer skips the step on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dfkd_fast.collectives import average, shard
from dfkd_fast.engine.networks import StepNetworks, eager_networks
from dfkd_fast.engine.state import DistillState, Side
from dfkd_fast.graph import FeatureModel, batchnorm_mode, frozen, preserve_train_mode
from dfkd_fast.nvtx import nvtx_range
from dfkd_fast.objectives import Batch

__all__ = ["generator_step", "student_step", "synthesize"]


@contextmanager
def _unchanged(generator: nn.Module) -> Iterator[None]:
    """Keep the generator bit-identical while it is called inside the context.

    Its BatchNorms use batch statistics, as in training, without updating their buffers. Everything else is in eval
    mode, so that spectral norm does not iterate.
    """
    with torch.no_grad(), preserve_train_mode(generator, False), batchnorm_mode(generator, "batch"):
        yield


@contextmanager
def _deterministic(student: FeatureModel, mode: Literal["batch", "update", "eval"]) -> Iterator[None]:
    """Turn off dropout and stochastic depth, as in eval mode, and set the mode of the BatchNorms."""
    with preserve_train_mode(student, False), batchnorm_mode(student, mode):
        if student.programs:
            student.model.training = True  # selects the program with fused BatchNorms; its modules are in eval mode
        yield


def synthesize(state: DistillState, *inputs: Tensor) -> Tensor:
    """Make images (N, 3, H, W) in [-1, 1] like those of a student step, without changing the generator.

    In a run on several processes, these are the images of this process.

    Args:
        state: the state.
        *inputs: the result of ``state.synthesizer.draw_samples``; noise (N, latent_dim) of the online generator.
    """
    sampler = state.synthesizer.sampler
    with _unchanged(sampler), state.runtime.cast():
        return sampler(*inputs)


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """Return 1 (float32, shape (1,)) if all values are finite, otherwise 0."""
    if tensors[0].is_cuda:
        largest = torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))
        # A comparison takes fewer kernels than isfinite, and is false for NaN.
        return (largest < math.inf).float().view(1)
    found, one = tensors[0].new_zeros(1), tensors[0].new_ones(())  # on the CPU, the norm is 18 times slower
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
    return 1 - found


def _gradients(side: Side[Any]) -> list[Tensor]:
    return [p.grad for group in side.optimizer.param_groups for p in group["params"] if p.grad is not None]


def _backward(side: Side[Any], total: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a side for its loss ``total`` and return the loss and its terms' ``values``.

    In a run on several processes, one collective averages all of them.
    """
    side.scaler.scale(total).backward()
    average([*_gradients(side), total, values])
    return total.detach(), values


def _update(state: DistillState, side: Side[Any], total: Tensor, values: Tensor) -> None:
    """Update a side along its gradients, and write its terms' ``values`` to the trace."""
    optimizer, scaler = side.optimizer, side.scaler
    if side is state.generator:
        state.synthesizer.after_backward(scaler.scale(total.new_ones(())) if scaler.is_enabled() else None)
    with nvtx_range("network", "optimizer"):
        if scaler.is_enabled():
            # A scaler's first gradients may overflow by design; it then skips the step and reduces the scale. The trace
            # still shows a non-finite loss.
            scaler.step(optimizer)
            scaler.update()
            finite = torch.ones_like(values[:1])
        else:
            finite = _all_finite([*_gradients(side), total])
            optimizer.found_inf = 1 - finite[0]  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
        if side is state.generator:
            state.synthesizer.after_step()
        state.trace[:, : len(values)].index_copy_(0, state.cursor, values.unsqueeze(0))
        state.trace[:, -1:].index_copy_(0, state.cursor, finite.unsqueeze(0))
        state.cursor.add_(1)


def generator_step(state: DistillState, networks: StepNetworks | None = None) -> None:
    """Update the generator to minimize ``alpha * L_BN - L_KD`` (Eq. 10).

    Gradients reach the images through the logits of teacher and student, but no weight gradient of either network is
    computed. ``config.loop.student_in_generator_step`` sets the mode of the student's BatchNorms; by default they use
    batch statistics without updating their buffers. The student's dropout and stochastic depth are off.

    Args:
        state: the state to train.
        networks: the functions that the step calls; None uses :func:`eager_networks`.
    """
    call = networks or eager_networks(state).generator_step
    student, objective = state.student.module, state.generator.objective
    needs_student = "student" in objective.needs
    mode = state.config.loop.student_in_generator_step
    synthesizer = state.synthesizer
    drawn = synthesizer.draw(state.config.loop.batch_size)
    state.update_generator_rates()
    with frozen(student), _deterministic(student, mode) if needs_student else nullcontext():
        with state.runtime.cast():
            made = call.generator(*drawn)
            # The backward of a split into one part would copy the gradient.
            inputs, *views = made.chunk(synthesizer.views) if synthesizer.views > 1 else (made,)
            outputs = call.student(inputs) if needs_student else None
            target, *others = [call.teacher(each) for each in (inputs, *views)]
            labels = None if synthesizer.labels is None else shard(synthesizer.labels)
            batch = (Batch(inputs, labels, *others),) if "batch" in objective.needs else ()
            total, values = call.objective(target, outputs, *batch)
        total, values = _backward(state.generator, total, values)
        better = synthesizer.after_forward(total)
        for term in objective.kinds().values():
            term.keep(better)
        _update(state, state.generator, total, values)


def student_step(state: DistillState, networks: StepNetworks | None = None) -> None:
    """Update the student to minimize ``L_KD + beta * L_MHAD + gamma * L_SFCL`` (Eq. 11); the generator does not change.

    Args:
        state: the state to train.
        networks: the functions that the step calls; None uses :func:`eager_networks`.
    """
    call = networks or eager_networks(state).student_step
    drawn = state.synthesizer.draw_samples(state.config.loop.batch_size)
    with state.runtime.cast():
        with _unchanged(state.synthesizer.sampler):
            inputs = call.generator(*drawn)
        with torch.no_grad():
            target = call.teacher(inputs)
        both = target, call.student(inputs)
        if weights := state.synthesizer.sample_weights:
            count = len(weights)
            found = [call.objective(*tree_map(lambda t, i=i: t.chunk(count)[i], both)) for i in range(count)]
            total, values = (
                sum(weight * value for weight, value in zip(weights, each, strict=True)) / count
                for each in zip(*found, strict=True)
            )
        else:
            total, values = call.objective(*both)
    torch.index_select(state.rates, 0, state.cursor, out=state.student_rate.view(1))
    _update(state, state.student, *_backward(state.student, total, values))
