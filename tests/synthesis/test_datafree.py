"""Steps of a preset against a plain rendering of the loop that its values come from."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.config import GeneratorConfig, LoopConfig, recipe

from .. import tiny
from ..engine.test_engine import eager_engine


class _Statistics:
    """The distance of a BatchNorm's input to its running statistics, by a hook, as DeepInversion computes it."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        norm.register_forward_hook(self)

    def __call__(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        (x,) = inputs
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1).var(1, unbiased=False)
        assert norm.running_var is not None
        assert norm.running_mean is not None
        self.distance = (norm.running_var - var).norm() + (norm.running_mean - mean).norm()


def test_ten_steps_of_dfq_equal_a_plain_loop() -> None:
    """The generative step of DataFree: zju-vipa/CMI, method dfq."""
    published = recipe("dfq")
    generator = GeneratorConfig(name="upsampling", latent_dim=6, options={"width": 8, "normalize_image": True})
    loop = LoopConfig(generator_steps=10, student_steps=1, batch_size=8, student_in_generator_step="update")
    assert published.loop.student_in_generator_step == "update"
    changes = {"objective": published.objective, "optimizer": published.optimizer, "generator": generator}
    state = tiny.state(tiny.config(**changes, **{name: getattr(loop, name) for name in vars(loop)}))
    teacher, student, twin = (
        copy.deepcopy(each) for each in (state.teacher.model, state.student.module.model, state.generator.module)
    )
    hooks = [_Statistics(module) for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3, betas=(0.5, 0.999))
    student.train()
    twin.train()
    random, found = torch.Generator().manual_seed(state.config.seed), []
    state.synthesizer.after_backward = lambda scale: found.append(  # type: ignore[method-assign]
        [parameter.grad.clone() for parameter in state.generator.module.parameters()]
    )
    engine = eager_engine(state)
    engine.start_round()
    for step in range(10):
        z = torch.randn(8, 6, generator=random)
        inputs = twin(z)  # with a mean and deviation of 0.5, normalization is the identity
        t_out, s_out = teacher(inputs), student(inputs)
        loss_bn = torch.stack([hook.distance for hook in hooks]).sum()
        loss_oh = F.cross_entropy(t_out, t_out.max(1)[1])
        p = F.softmax(t_out, dim=1).mean(0)
        loss_balance = (p * torch.log(p)).sum()
        loss_adv = -F.kl_div(F.log_softmax(s_out, 1), F.softmax(t_out, 1), reduction="batchmean")
        optimizer.zero_grad()
        (loss_bn + loss_oh + loss_adv + 20 * loss_balance).backward()
        engine.step()
        expected = {"bn": loss_bn, "one_hot": loss_oh, "balance": loss_balance, "kd": -loss_adv}
        for name, value in zip(state.generator.objective.names, state.trace[step], strict=False):
            torch.testing.assert_close(value, expected[name].detach(), rtol=1e-5, atol=1e-5, msg=f"{step}: {name}")
        gradients = [parameter.grad for parameter in twin.parameters()]
        largest = max(gradient.abs().max() for gradient in gradients)
        for found_gradient, gradient in zip(found[-1], gradients, strict=True):
            torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=float(1e-5 * largest))
        optimizer.step()
        with torch.no_grad():  # Adam amplifies rounding where a gradient is nearly zero
            for mine, theirs in zip(
                twin.state_dict().values(), state.generator.module.state_dict().values(), strict=True
            ):
                torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=2.1e-3)
                mine.copy_(theirs)
    buffers = zip(student.buffers(), state.student.module.model.buffers(), strict=True)
    assert all(torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5) for a, b in buffers)
