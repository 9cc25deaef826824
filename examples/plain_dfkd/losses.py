"""The losses of a typical distillation project, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn


def kldiv(logits, targets, T=1.0, reduction="batchmean"):
    """KL(teacher || student) of the softened probabilities, times T squared."""
    student, teacher = (logits / T).log_softmax(1), (targets / T).log_softmax(1)
    return T**2 * F.kl_div(student, teacher, reduction=reduction, log_target=True)


class DeepInversionHook:
    """Distance between the statistics of a BatchNorm's input and its stored statistics."""

    def __init__(self, module):
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module, given, output):
        mean, var = given[0].mean((0, 2, 3)), given[0].var((0, 2, 3), unbiased=False)
        self.r_feature = (module.running_var - var).norm() + (module.running_mean - mean).norm()


class SupConLoss(nn.Module):
    """Contrastive loss of two unit-length views per image, (N, 2, D), against the views of all other images."""

    def __init__(self, temperature=0.07, base_temperature=0.07):
        super().__init__()
        self.temperature, self.base_temperature = temperature, base_temperature

    def forward(self, features):
        views = torch.cat(features.unbind(1))
        similarity = views @ views.T / self.temperature
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        others = similarity.masked_fill(itself, float("-inf")).logsumexp(1)
        loss = others - similarity.diagonal(len(features)).repeat(2)
        return self.temperature / self.base_temperature * loss.mean()
