"""
Muon (Jordan et al. 2024): momentum whose update is made orthogonal, one matrix at a time, by a Newton-Schulz iteration.

torch.optim.Muon does so one matrix after another, in bfloat16, and refuses the experts' three-dimensional weights. Here
all matrices of one shape go through the iteration as one batch: docs/log.md has the times.
"""
import torch


class Muon(torch.optim.Optimizer):
    """params: weights of shape (..., rows, columns). Updates are scaled to suit AdamW's lr and weight_decay.

    As with torch's fused AdamW, nothing changes in a step when the attribute found_inf is set to a tensor that is true.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        bad = getattr(self, "found_inf", torch.zeros((), device=self.param_groups[0]["params"][0].device)) > 0
        for group in self.param_groups:
            lr, by_shape = group["lr"], {}
            kept = torch.where(bad, 1.0, 1 - lr * group["weight_decay"])
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape[-2:], []).append(p)
            for (rows, columns), params in by_shape.items():
                stacked = torch.cat([self.momentum(p, group["momentum"], bad).view(-1, rows, columns) for p in params])
                updates = orthogonal(stacked)
                scale = 0.2 * max(rows, columns) ** 0.5  # root mean square 0.2, about that of AdamW's updates
                for p, update in zip(params, updates.split([p.numel() // (rows * columns) for p in params])):
                    p.mul_(kept).sub_(update.view_as(p), alpha=lr * scale)

    def momentum(self, p, decay, bad):
        """Nesterov momentum of the gradient; zeros if it is not to be used"""
        average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        average.lerp_(torch.where(bad, 0.0, p.grad), torch.where(bad, 0.0, 1 - decay))
        return torch.where(bad, 0.0, p.grad.lerp(average, decay))


def orthogonal(matrices, steps=5):
    """(n, rows, columns) -> about U V^T of each, where U S V^T is its singular value decomposition"""
    x = matrices.bfloat16() if fast_bfloat16(matrices.device) else matrices  # enough for a direction, as in the original
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):  # the quintic whose coefficients lift small singular values fastest
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def fast_bfloat16(device):
    """Whether products in bfloat16 are faster there: on a CPU without AVX-512 they take 10 to 60 times as long"""
    return device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()
