"""Muon: momentum whose update is orthogonalised by Newton-Schulz (Jordan et al. 2024). For matrices only."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Muon"]


class Muon:
    """Momentum whose update is orthogonalised; matrices of one shape are stepped together."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.momentum = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.groups.items()}

    @staticmethod
    def orthogonalise(g: Tensor) -> Tensor:
        x = g.bfloat16()
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        out: Tensor = (x.mT if tall else x).float()
        return out

    @torch.no_grad()
    def step(self, lr: float, beta: float = 0.95, decay: float = 0.01) -> None:
        for shape, ps in self.groups.items():
            g = torch.stack([p.grad for p in ps if p.grad is not None])
            self.momentum[shape].lerp_(g, 1 - beta)
            update = self.orthogonalise(g.lerp(self.momentum[shape], beta)) * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(ps, update, strict=True):
                p.mul_(1 - lr * decay).add_(u, alpha=-lr)
