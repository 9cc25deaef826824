"""Data-free distillation with fused losses, with images from a generator."""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from dfkd_fast.compat.cpsc import SupConLoss
from dfkd_fast.compat.datafree import DeepInversionHook, kldiv


def network(blocks, classes=100):
    """A ResNet's trunk, from images to features, and its head, from features to logits."""
    net = ResNet(BasicBlock, blocks, num_classes=classes)
    return nn.Sequential(*list(net.children())[:-1], nn.Flatten()), net.fc


def trained_teacher(size):
    """Replace this with your own teacher. It has random weights, and BatchNorm statistics of random images."""
    trunk, head = network([2, 2, 2, 2])
    with torch.no_grad():
        for _ in range(4):
            trunk.train()(torch.randn(16, 3, size, size))
    return trunk.eval().requires_grad_(False), head.requires_grad_(False)


def image_generator(size, latent=64):
    layers = [nn.Linear(latent, 64 * (size // 4) ** 2), nn.Unflatten(1, (64, size // 4, size // 4))]
    for channels in (64, 3):
        layers += [nn.LeakyReLU(0.2), nn.BatchNorm2d(64), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(64, channels, 3, padding=1)]
    return nn.Sequential(*layers, nn.Tanh())


def run(device, steps, size, batch, seed):
    """Return the losses and the time in seconds of each step."""
    torch.manual_seed(seed)
    (t_trunk, t_head), (s_trunk, s_head) = trained_teacher(size), network([1, 1, 1, 1])
    generator = image_generator(size)
    for module in (t_trunk, t_head, s_trunk, s_head, generator):
        module.to(device)
    hooks = [DeepInversionHook(module) for module in t_trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    contrast = SupConLoss(temperature=0.1)
    g_optimizer = torch.optim.SGD(generator.parameters(), lr=0.001)
    s_optimizer = torch.optim.SGD([*s_trunk.parameters(), *s_head.parameters()], lr=0.001)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        images = generator(torch.randn(batch, 64).to(device))
        teacher, student = t_head(t_trunk(images)), s_head(s_trunk(images))
        g_loss = 0.1 * sum(hook.r_feature for hook in hooks) - kldiv(student, teacher, T=4)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        with torch.no_grad():
            images = generator(torch.randn(batch, 64).to(device))
            t_features = t_trunk(images)
        s_features = s_trunk(images)
        views = torch.stack([F.normalize(s_features), F.normalize(t_features)], dim=1)
        s_loss = kldiv(s_head(s_features), t_head(t_features), T=4) + contrast(views)
        s_optimizer.zero_grad()
        s_loss.backward()
        s_optimizer.step()
        losses += [g_loss.item(), s_loss.item()]  # waits for the device
        seconds.append(time.perf_counter() - start)
    return losses, seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    for option, default in {"steps": 5, "size": 32, "batch": 32, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    losses, seconds = run(**vars(parser.parse_args()))
    print(f"last losses {losses[-2]:.5f} (generator), {losses[-1]:.5f} (student); {min(seconds):.3f} s per step")
