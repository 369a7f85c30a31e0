"""
Muon (Jordan et al. 2024): momentum whose update is made orthogonal, one matrix at a time, by a Newton-Schulz iteration.

torch.optim.Muon does so one matrix after another, in bfloat16, and refuses the experts' three-dimensional weights. Here
all matrices of one shape go through the iteration as one batch: docs/log.md has the times.
"""
import torch


class Muon(torch.optim.Optimizer):
    """params: weights of shape (..., rows, columns). Updates are scaled to suit AdamW's lr and weight_decay."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape[-2:], []).append(p)
            for (rows, columns), params in by_shape.items():
                stacked = torch.cat([self.momentum(p, group["momentum"]).view(-1, rows, columns) for p in params])
                updates = orthogonal(stacked)
                scale = 0.2 * max(rows, columns) ** 0.5  # root mean square 0.2, about that of AdamW's updates
                for p, update in zip(params, updates.split([p.numel() // (rows * columns) for p in params])):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(p), alpha=group["lr"] * scale)

    def momentum(self, p, decay):
        """Nesterov momentum of the gradient"""
        average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - decay)
        return p.grad.lerp(average, decay)


def orthogonal(matrices, steps=5):
    """(n, rows, columns) -> about U V^T of each, where U S V^T is its singular value decomposition"""
    x = matrices.bfloat16()  # enough for a direction, as in the original
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):  # the quintic whose coefficients lift small singular values fastest
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)
