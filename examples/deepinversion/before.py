"""DeepInversion in plain PyTorch: optimize images until a teacher recognizes their classes.

Yin et al., "Dreaming to Distill", CVPR 2020. The loss matches each BatchNorm's input statistics to its stored ones.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18


class StatisticsHook:
    """Distance between the statistics of a BatchNorm's input and its stored statistics."""

    def __init__(self, module):
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module, given, output):
        mean, var = given[0].mean((0, 2, 3)), given[0].var((0, 2, 3), unbiased=False)
        self.distance = (module.running_var - var).norm() + (module.running_mean - mean).norm()


def trained_teacher(size, classes=100):
    """Replace this with your own teacher. It has random weights, and BatchNorm statistics of random images."""
    teacher = resnet18(num_classes=classes)
    with torch.no_grad():
        for _ in range(4):
            teacher.train()(torch.randn(16, 3, size, size))
    return teacher.eval().requires_grad_(False)


def roughness(images):
    """Mean squared difference of neighboring pixels."""
    return images.diff(dim=2).square().mean() + images.diff(dim=3).square().mean()


def run(device, steps, size, batch, seed):
    """Return the loss and the time in seconds of each step."""
    torch.manual_seed(seed)
    teacher = trained_teacher(size).to(device)
    hooks = [StatisticsHook(module) for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    images = torch.randn(batch, 3, size, size).to(device).requires_grad_()
    targets = torch.arange(batch, device=device) % 100
    optimizer = torch.optim.Adam([images], lr=0.05)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        logits = teacher(images)
        statistics = sum(hook.distance for hook in hooks)
        loss = F.cross_entropy(logits, targets) + 0.1 * statistics + 0.01 * roughness(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return losses, seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    for option, default in {"steps": 5, "size": 32, "batch": 32, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    losses, seconds = run(**vars(parser.parse_args()))
    print(f"last loss {losses[-1]:.5f}; {min(seconds):.3f} s per step")
