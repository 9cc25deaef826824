"""The pictures of the ops' pages: each drawn from what the reference backend computes, when the site is built."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the arrays are small, and a build should not take a whole machine

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dfkd_fast import ops

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.0,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "dfkd_fast",  # the same file from each build
}
COLOURS = ("#00796b", "#e65100", "#3949ab", "#ad1457")


def _figure(*, height: float = 2.9) -> Figure:
    return Figure(figsize=(8.0, height), layout="constrained")


def _lines(axes: Axes, x: Tensor, **curves: Tensor) -> None:
    for (label, y), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(x.numpy(), y.numpy(), label=label.replace("_", " "), color=colour)
    axes.legend()


def _positions(values: Tensor) -> Tensor:
    """Numbers or rows of channels as the positions of a map of one row: (1, C, 1, P)."""
    return values.reshape(len(values), -1).T[None, :, None, :]


def _ones(order: int) -> tuple[Tensor, Tensor]:
    """Weights of one channel at which order r adds max(0, x^r)."""
    return torch.ones(order * (order + 1) // 2, 1, 1), torch.ones(order, 1, 1)


def high_order_attention() -> Figure:
    """The gate of one channel with all weights one, and over the plane of two channels with random weights."""
    figure = _figure()
    left, *planes = figure.subplots(1, 3, width_ratios=[1.35, 1, 1])
    x = torch.linspace(-2, 2, 201)
    gates = {
        f"R = {order}": ops.high_order_attention_map(_positions(x), *_ones(order), backend="reference")[0, 0, 0]
        for order in (1, 2, 3)
    }
    _lines(left, x, **gates)
    left.set(xlabel="x, one channel, all weights 1", ylabel="gate A(x)")

    random = torch.Generator().manual_seed(3)
    side = torch.linspace(-2, 2, 121)
    plane = torch.cartesian_prod(side, side)
    proj, out = torch.randn(6, 4, 2, generator=random), torch.randn(3, 2, 4, generator=random)
    for axes, order in zip(planes, (1, 3), strict=True):
        some = proj[: order * (order + 1) // 2], out[:order]
        gate = ops.high_order_attention_map(_positions(plane), *some, backend="reference")[0, 0, 0]
        drawn = axes.imshow(
            gate.view(121, 121).T.numpy(), origin="lower", extent=(-2, 2, -2, 2), vmin=0, vmax=1, cmap="viridis"
        )
        axes.set(title=f"gate of $x_1$, R = {order}", xlabel="$x_1$", ylabel="$x_2$")
        axes.grid(False)
    figure.colorbar(drawn, ax=planes, shrink=0.8)
    return figure


def high_order_attention_mse() -> Figure:
    """The error of one feature over its value, for three targets, and its gradient."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    values = torch.linspace(-2, 2, 201)
    errors, gradients = {}, {}
    for target in (-0.5, 0.5, 1.5):
        each = [value.view(1, 1, 1, 1).requires_grad_() for value in values]
        losses = [
            ops.high_order_attention_mse(x, *_ones(3), torch.full((1, 1, 1, 1), target), backend="reference")
            for x in each
        ]
        errors[f"target {target}"] = torch.stack(losses).detach()
        gradients[f"target {target}"] = torch.stack(torch.autograd.grad(sum(losses), each)).flatten()  # type: ignore[arg-type]
    _lines(left, values, **errors)
    _lines(right, values, **gradients)
    left.set(xlabel="x, R = 3, all weights 1", ylabel="$(A(x)\\,x - target)^2$")
    right.set(xlabel="x", ylabel="gradient in x")
    return figure


def spatial_attention() -> Figure:
    """What each form adds to features of one, for a narrow map with two bumps."""
    figure = _figure(height=2.5)
    side = torch.linspace(-1, 1, 32)
    v, u = torch.meshgrid(side, side, indexing="ij")
    first = 4 * torch.exp(-((u + 0.4) ** 2 + (v + 0.3) ** 2) / 0.08)
    second = 3 * torch.exp(-((u - 0.45) ** 2 + (v - 0.4) ** 2) / 0.15)
    hidden = torch.stack([first, second])[None]
    features, weight = torch.ones(1, 4, 32, 32), torch.tensor([[1.0, 0.4], [0.2, 1.0], [0.5, 0.5], [-0.5, 0.2]])
    for axes, form in zip(figure.subplots(1, 3), ("spatial", "spatial_mean1", "channel"), strict=True):
        gated = ops.spatial_attention(features, hidden, weight, scale=0.05, form=form, backend="reference")
        drawn = axes.imshow((gated[0, 0] - 1).numpy(), cmap="magma", vmin=0)
        axes.set(title=f"{form}\nmean {float((gated[0, 0] - 1).mean()):.1e}", xticks=[], yticks=[])
        axes.grid(False)
        figure.colorbar(drawn, ax=axes, shrink=0.85, format="%.3g")
    return figure


def contrastive_loss() -> Figure:
    """One anchor's loss over its similarity to the positive, and what is in the sum of four."""
    figure = _figure()
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
    random = torch.Generator().manual_seed(0)
    count, dim = 64, 128
    anchors = torch.nn.functional.normalize(torch.randn(count, dim, generator=random))
    others = torch.nn.functional.normalize(torch.randn(count, dim, generator=random))
    across = torch.nn.functional.normalize(others[0] - (others[0] @ anchors[0]) * anchors[0], dim=0)
    cosines = torch.linspace(-1, 1, 81)
    curves = {}
    for temperature in (0.05, 0.1, 0.5):
        losses = []
        for cosine in cosines:
            positives = others.clone()
            positives[0] = cosine * anchors[0] + (1 - cosine**2).clamp_min(0).sqrt() * across
            each = ops.contrastive_loss(
                anchors, positives, temperature=temperature, reduction="none", backend="reference"
            )
            losses.append(each[0])
        curves[f"$\\tau$ = {temperature}"] = torch.stack(losses)
    _lines(left, cosines, **curves)
    left.set(xlabel=f"cosine of anchor and positive, {2 * count - 2} others at random", ylabel="loss of the anchor")

    few = 4
    v = torch.cat([anchors[:few], torch.nn.functional.normalize(anchors[:few] + 0.6 * others[:few])])
    similarity = v[:few] @ v.T
    similarity[range(few), range(few)] = float("nan")
    right.imshow(similarity.numpy(), cmap="viridis", vmin=-0.2, vmax=1)
    for i in range(few):
        right.text(few + i, i, "+", ha="center", va="center", color="black", fontsize=13)
        right.text(i, i, "out", ha="center", va="center", color="0.4", fontsize=8)
    right.set(title="similarities of 4 anchors", xlabel="4 anchors, then 4 positives (+)", ylabel="anchor")
    right.set(xticks=range(2 * few), yticks=range(few))
    right.grid(False)
    return figure


def distillation_kl() -> Figure:
    """Both directions over the student's probability, and the gradient at several temperatures."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    teacher = torch.tensor([2.0, 0.0, -1.0])
    logits = torch.linspace(-4, 8, 241)
    student = torch.stack([logits, torch.zeros_like(logits), torch.full_like(logits, -1.0)], 1)
    both = {
        direction: ops.distillation_kl(
            student, teacher.expand_as(student), direction=direction, reduction="none", backend="reference"
        ).sum(1)
        for direction in ("forward", "reverse")
    }
    _lines(left, logits, **both)
    left.set(xlabel="student's first logit; the teacher's is 2", ylabel="KL, temperature 1")
    gradients = {}
    for temperature in (1.0, 4.0, 20.0):
        free = student.clone().requires_grad_()
        loss = ops.distillation_kl(
            free, teacher.expand_as(free), temperature=temperature, reduction="sum", backend="reference"
        )
        (gradient,) = torch.autograd.grad(loss, free)
        gradients[f"temperature {temperature:g}"] = gradient[:, 0]
    _lines(right, logits, **gradients)
    right.set(xlabel="student's first logit", ylabel="its gradient, forward")
    return figure


def batchnorm_statistics() -> Figure:
    """The three activations, and what the statistics say of a batch that is moved or stretched."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    mean, var = torch.tensor([0.5]), torch.tensor([0.25])
    x = torch.linspace(-2, 5, 141)
    responses = {
        activation: ops.batchnorm_statistics(
            x[:, None], mean, var, None, None, 1e-5, activation=activation, backend="reference"
        )[0][:, 0]
        for activation in ("none", "relu", "relu6")
    }
    _lines(left, x, **responses)
    left.set(xlabel="x; stored mean 0.5, variance 0.25", ylabel="y")

    random = torch.Generator().manual_seed(0)
    batch = torch.randn(4096, 1, generator=random)
    batch = (batch - batch.mean()) / batch.std(correction=0) * var.sqrt() + mean
    moves = torch.linspace(-1, 1, 81)

    def distance(images: Tensor) -> Tensor:
        m, v = ops.channel_statistics(images, backend="reference")
        return (m - mean).norm() + (v - var).norm()

    moved = torch.stack([distance(batch + move) for move in moves])
    stretched = torch.stack([distance((batch - mean) * (1 + move) + mean) for move in moves])
    _lines(right, moves, moved_by_a=moved, stretched_by_1_plus_a=stretched)
    right.set(xlabel="a", ylabel="$\\|m - r_m\\| + \\|v - r_v\\|$")
    return figure


def statistics_distance() -> Figure:
    """The distance over mean and standard deviation of one channel, and its gradient on the way through zero."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    stored_mean, stored_var = torch.tensor([0.5]), torch.tensor([0.25])
    batch = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
    batch = (batch - batch.mean()) / batch.std(correction=0)

    def distance(mean: Tensor, deviation: Tensor) -> Tensor:
        return ops.statistics_distance(batch * deviation + mean, stored_mean, stored_var, backend="reference")

    means, deviations = torch.linspace(-0.5, 1.5, 61), torch.linspace(0, 1, 61)
    plane = torch.stack([torch.stack([distance(m, d) for m in means]) for d in deviations])
    drawn = left.contourf(means.numpy(), deviations.numpy(), plane.numpy(), levels=12, cmap="viridis_r")
    left.plot(0.5, 0.5, "k+", markersize=10)
    left.set(xlabel="mean of the batch", ylabel="standard deviation", xticks=[-0.5, 0, 0.5, 1, 1.5])
    figure.colorbar(drawn, ax=left)

    moved = torch.linspace(-0.5, 1.5, 60).requires_grad_()
    values = torch.stack([distance(m, torch.tensor(0.5)) for m in moved])
    (slopes,) = torch.autograd.grad(values.sum(), moved)
    _lines(right, moved.detach(), distance=values.detach(), its_gradient=slopes)
    right.set(xlabel="mean of the batch; standard deviation 0.5")
    return figure


def max_pool2x2() -> Figure:
    """A map, its maxima with their codes, and the maxima back in their places."""
    figure = _figure(height=2.7)
    random = torch.Generator().manual_seed(1)
    x = torch.randint(-9, 10, (1, 1, 6, 6), generator=random).float()
    x[0, 0, 2:4, 2:4] = torch.tensor([[-3.0, -1.0], [-7.0, -2.0]])
    y, code = ops.max_pool2x2(x, relu=True, backend="reference")
    back = ops.max_unpool2x2(y, code, backend="reference")
    shown = (
        ("x", x, [[f"{v:.0f}" for v in row] for row in x[0, 0]]),
        (
            "max_pool2x2(x, relu=True)",
            y,
            [[f"{v:.0f}  ({c})" for v, c in zip(*rows, strict=True)] for rows in zip(y[0, 0], code[0, 0], strict=True)],
        ),
        ("max_unpool2x2", back, [[f"{v:.0f}" for v in row] for row in back[0, 0]]),
    )
    for axes, (title, values, texts) in zip(figure.subplots(1, 3), shown, strict=True):
        axes.imshow(values[0, 0].numpy(), cmap="BrBG", vmin=-18, vmax=18)
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                axes.text(j, i, text, ha="center", va="center", fontsize=8)
        axes.set(title=title, xticks=[], yticks=[])
        axes.title.set_fontsize(9)
        step = 2 if values is not y else 1
        axes.set_xticks([k - 0.5 for k in range(0, len(texts[0]) + 1, step)], [])
        axes.set_yticks([k - 0.5 for k in range(0, len(texts) + 1, step)], [])
        axes.grid(color="0.3", alpha=1)
        axes.tick_params(length=0)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    each.__name__: each
    for each in (
        high_order_attention,
        high_order_attention_mse,
        spatial_attention,
        contrastive_loss,
        distillation_kl,
        batchnorm_statistics,
        statistics_distance,
        max_pool2x2,
    )
}


def pictures() -> dict[str, bytes]:
    """Each op's picture as SVG, by the op's name."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            file = io.BytesIO()
            draw().savefig(file, format="svg", metadata={"Date": None})
            drawn[name] = file.getvalue()
    return drawn
