"""Compares the Triton kernels of batch_norm_act with the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dfkd_fast import ops
from dfkd_fast.kernels import common
from dfkd_fast.testing import LAYOUTS, MAP_SHAPES, assert_backend_no_worse, assert_close, random, with_layout

from ..ops.table import DTYPES, call_act, norm_act

ACTIVATIONS = ("none", "relu", "leaky_relu")
SHAPES = {**MAP_SHAPES, "vectors": (6, 5), "sequence": (2, 3, 7), "volume": (2, 3, 2, 3, 2)}
# With two values per channel, all normalized values are about 1 or -1 and the gradient of x is rounding error.
SHAPES = {name: shape for name, shape in SHAPES.items() if name not in ("one element", "one position")}
FORMS = [(activation, residual) for residual in (False, True) for activation in ACTIVATIONS]
# The cases cover each shape and each layout with rotating dtype and form; residuals in a different layout; more tiles
# than programs, with and without vector loads; channels that do not fill a block.
CASES = {
    **{
        name: (shape, *FORMS[i % 6], {"dtype": DTYPES[(i + i // 6) % 3]})
        for i, (name, shape) in enumerate(SHAPES.items())
    },
    **{
        f"{layout}, {activation}": (
            *((3, 13, 5, 3), activation, (i + j) % 2 == 0),
            {"dtype": DTYPES[(i + j) % 3], "layout": layout},
        )
        for i, layout in enumerate(LAYOUTS)
        for j, activation in enumerate(ACTIVATIONS)
    },
    **{
        f"{layout} with {other}": ((3, 16, 4, 2), "leaky_relu", True, {"layout": layout, "other_layout": other})
        for layout, other in (
            ("channels_last", "contiguous"),
            ("contiguous", "channels_last"),
            ("offset", "transposed"),
        )
    },
    "more tiles than programs": ((40, 24, 7, 5), "relu", True, {"dtype": torch.bfloat16, "layout": "channels_last"}),
    "more tiles, contiguous": ((5, 8, 24, 24), "leaky_relu", True, {"dtype": torch.bfloat16}),
    "odd channels": ((1, 70, 50, 3), "leaky_relu", False, {"dtype": torch.bfloat16, "layout": "channels_last"}),
    "odd channels, contiguous": ((1, 70, 50, 3), "relu", True, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_float64_reference(kernel_device, case):
    shape, activation, residual, drawn = CASES[case]
    inputs = norm_act(shape, residual=residual, device=kernel_device, **drawn)
    assert_backend_no_worse(partial(call_act, activation=activation), inputs)


@pytest.mark.parametrize("needs_grad", [(0, 1, 2, 5), (0,), (1, 2), (2,), (5,), (1, 5)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_launches_two_kernels_each_way(activation, needs_grad):
    """The first launch of backward is only for sums; the residual needs none."""
    leaves = [t.detach().requires_grad_(i in needs_grad) for i, t in enumerate(norm_act(residual=True)(1))]
    names = []
    with pytest.MonkeyPatch.context() as patch:
        from dfkd_fast.kernels import batch_norm_act, batchnorm_statistics

        for module in (batch_norm_act, batchnorm_statistics):
            patch.setattr(
                module,
                "launch",
                lambda kernel, *a, **k: (names.append(kernel.__name__), common.launch(kernel, *a, **k)),
            )
        y = call_act(*leaves, activation=activation, backend="triton")
        assert names == ["_forward_kernel", "_normalize_kernel"]
        names.clear()
        y.sum().backward()
    if needs_grad == (5,):
        assert names == ([] if activation == "none" else ["_backward_kernel"])
    else:
        assert names == ["_backward_sums_kernel", "_backward_kernel"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("needs_grad", [(0, 1, 2, 5), (1, 2)], ids=str)
def test_grad_output_in_any_layout(kernel_device, layout, needs_grad):
    inputs = norm_act((3, 8, 4, 2), residual=True, layout="channels_last", device=kernel_device, needs_grad=needs_grad)
    inputs = inputs(0)
    dy = random(3, 8, 4, 2, seed=9, device=kernel_device)
    dy = dy[:, :, :1, :1].expand_as(dy) if layout == "expanded" else with_layout(dy, layout)
    found, expected = (
        torch.autograd.grad(
            call_act(*inputs, activation="relu", backend=backend), [t for t in inputs if t.requires_grad], g
        )
        for backend, g in (("triton", dy), ("reference", dy.clone(memory_format=torch.contiguous_format)))
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.large_memory
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_more_than_two_to_the_31_elements(layout):
    memory = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
    x = torch.empty(70, 64, 704, 704, dtype=torch.bfloat16, device="cuda", memory_format=memory)
    assert x.numel() > 2**31
    x.normal_().requires_grad_()
    mean, var = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    y = ops.batch_norm_act(x, None, None, mean, var, momentum=1.0, activation="relu", backend="triton")
    end = x[-1].detach().float()
    assert_close(y[-1], end.relu(), atol=0.05)
    assert_close(mean, 0.0, atol=1e-3)
    assert_close(var, 1.0, atol=1e-3)
    dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    # The means of g and g xhat are 1 / 2 and E[max(xhat, 0)] = 1 / sqrt(2 pi).
    assert_close(dx[-1], (end > 0).float() - 0.5 - end * 0.39894, atol=0.05)
