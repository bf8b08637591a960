"""
The optimizers: AdamW, and Muon (K. Jordan et al., 2024) for the blocks' matrices.

In the gradient of a matrix, a few directions with large singular values drown all others, which may
matter as much. Muon averages the gradients (momentum) and brings all singular values of the average
near one. The result is its step.
"""

import math
from collections import defaultdict

import torch

from lib.device import has_bfloat16


def make_optimizers(model, config):
    """Return the optimizers: Muon for the blocks' matrices (unless config.muon is False), AdamW for
    the rest. Each group of parameters keeps its peak learning rate as "peak_lr"."""
    blocks = [p for p in model.h.parameters() if p.ndim == 2]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and name[:2] != "h."]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decayed = embeddings if config.muon else embeddings + blocks
    groups = [dict(params=decayed, weight_decay=config.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, fused=True,
                                    betas=(config.beta1, config.beta2))]
    if config.muon:
        optimizers.append(Muon(blocks, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class Muon(torch.optim.Optimizer):
    """Computes what torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does, but for all matrices of
    one shape in one batch: one by one, they take a GPU more than a third of an iteration."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, of_shape = group["lr"], group["momentum"], defaultdict(list)
            for p in group["params"]:
                of_shape[p.shape].append(p)
            for shape, matrices in of_shape.items():
                gradient = torch.stack([p.grad for p in matrices])                 # (N, m, n)
                state = self.state[matrices[0]]
                if "average" not in state:
                    state["average"] = torch.zeros_like(gradient)
                average = state["average"].lerp_(gradient, 1 - momentum)
                steps = orthogonalize(gradient.lerp(average, momentum))    # Nesterov momentum
                # of root mean square 0.2, as AdamW's steps are (arXiv 2502.16982, sec. 2.2)
                size = 0.2 * math.sqrt(max(shape))
                for p, step in zip(matrices, steps):
                    p.mul_(1 - lr * group["weight_decay"]).add_(step, alpha=-lr * size)


def orthogonalize(matrices):
    """Return matrices (N, m, n) with the same singular vectors and with singular values of 0.7 to
    1.2, except for those that were nearly zero. Five steps of a Newton-Schulz iteration,
    x <- a x + b (x x^T) x + c (x x^T)^2 x, in bfloat16 where the device has units for it."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(torch.bfloat16 if has_bfloat16(x.device) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above one
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
