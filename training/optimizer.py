"""
The optimizers' step and the moving average of the weights. If a gradient is not finite, neither of them changes, which
is decided on the device. Muon (Jordan et al. 2024) makes the update of each matrix orthogonal. Other than torch's, this
one takes all matrices of a shape as one batch, the experts' three-dimensional weights, and fused matrices apart, and
shares the matrices out among the processes.
"""
import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F

FIRST_SCALE, SCALE_STEPS = 2.0 ** 16, 2000  # float16: the first scale of the loss; it doubles after so many steps
FUSED = {".qkv.": 3, ".kv.": 2}  # parts of names, and how many matrices such a weight holds, one below the other


class AdamW16(torch.optim.Optimizer):
    """AdamW with its averages in bfloat16, in half of the memory. Nothing changes while found_inf is true.

    They are rounded up or down by chance: rounded to the nearest number, they would never move by a thousandth.
    """

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self):
        bad = self.found_inf > 0
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], torch.where(bad, 0.0, group["lr"])
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state |= {key: torch.zeros_like(p, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
                grad = torch.where(bad, 0.0, p.grad)
                state["step"] += torch.where(bad, 0.0, 1.0)
                steps = state["step"].clamp(min=1)
                means = [state["exp_avg"].float().lerp_(grad, torch.where(bad, 0.0, 1 - beta1)),
                         state["exp_avg_sq"].float().lerp_(grad.square(), torch.where(bad, 0.0, 1 - beta2))]
                size = (means[1] / (1 - beta2 ** steps)).sqrt_().add_(group["eps"])
                update = (means[0] * (1 / (1 - beta1 ** steps))).div_(size)
                for key, mean in zip(("exp_avg", "exp_avg_sq"), means):
                    state[key].copy_(rounded_by_chance(mean, p))
                p.mul_(1 - lr * group["weight_decay"]).sub_(update.mul_(lr))

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # which casts the averages to the weights' dtype
        for state in self.state.values():
            state |= {key: state[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")}


def rounded_by_chance(x, source):
    """Round float32 to what bfloat16 holds, up or down. Chance is in the last bits of source, so that runs repeat."""
    noise = source.view(torch.int32) * -1640531535 >> 16 & 0xFFFF  # the upper 16 bits of a product with 2^32 / 1.618
    return (x.view(torch.int32) + noise & -0x10000).view(torch.float32)


class Muon(torch.optim.Optimizer):
    """Takes params of shape (..., rows, columns), or of convolutions, (O,I,h,w), as matrices of O rows.

    pieces: how many matrices each of params holds; empty: one. Updates suit AdamW's lr and weight_decay. Nothing
    changes while found_inf is true, as in the fused AdamW.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, pieces=()):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.pieces = pieces or [1] * len(params)
        self.found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self):
        bad = self.found_inf > 0
        for group in self.param_groups:
            lr, by_shape = group["lr"], {}
            kept = torch.where(bad, 1.0, 1 - lr * group["weight_decay"])
            for p, pieces in zip(group["params"], self.pieces, strict=True):
                if p.grad is not None:
                    rows, columns = (p.shape[0], p[0].numel()) if p.ndim == 4 else p.shape[-2:]
                    by_shape.setdefault((rows // pieces, columns), []).append(p)
            for (rows, columns), params in by_shape.items():
                stacked = torch.cat([self.momentum(p, group["momentum"], bad).reshape(-1, rows, columns)
                                     for p in params])
                updates = orthogonal_by_all(stacked)
                scale = 0.2 * max(rows, columns) ** 0.5  # root mean square 0.2, about that of AdamW's updates
                for p, update in zip(params, updates.split([p.numel() // (rows * columns) for p in params])):
                    p.mul_(kept).sub_(update.reshape(p.shape), alpha=lr * scale)

    def momentum(self, p, decay, bad):
        """Update the momentum and return Nesterov's; zeros if the gradient is not to be used."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"]
        average.lerp_(torch.where(bad, 0.0, p.grad), torch.where(bad, 0.0, 1 - decay))
        return torch.where(bad, 0.0, p.grad.lerp(average, decay))


def orthogonal_by_all(matrices):
    """Return orthogonal(matrices), of which each process makes an equal part. All processes need the same matrices."""
    if not (dist.is_available() and dist.is_initialized()):
        return orthogonal(matrices)
    share = -(-len(matrices) // dist.get_world_size())
    whole = F.pad(matrices, (0, 0, 0, 0, 0, share * dist.get_world_size() - len(matrices)))
    made, mine = torch.empty_like(whole), whole.split(share)[dist.get_rank()]
    dist.all_gather(list(made.split(share)), orthogonal(mine).contiguous())  # NCCL takes no transposed views
    return made[:len(matrices)]


def orthogonal(matrices, steps=5):
    """Return about U V^T of each matrix (n, rows, columns), where U S V^T is its singular value decomposition."""
    # bfloat16 is enough for a direction; a CPU without products in bfloat16 takes 3 to 60 times as long (docs/log.md)
    fast = matrices.device.type != "cpu" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    x, tall = matrices.bfloat16() if fast else matrices, matrices.shape[1] > matrices.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):  # the quintic whose coefficients lift small singular values fastest
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def is_block_matrix(name, parameter):
    """Return whether a parameter of MicroDiT is a matrix of its blocks. Depthwise convolutions are none."""
    return (parameter.ndim in (2, 3) and "modulation" not in name and "router" not in name
            and name.startswith(("mixer.", "blocks.", "caption_block.")))


class Optimizer:
    """Is AdamW or AdamW16, or with kind "muon" Muon where is_matrix(name, parameter) is true and AdamW for all else."""

    def __init__(self, net, kind, lr, *, betas, weight_decay, momentum=0.95, is_matrix=is_block_matrix, float16=False):
        named = dict(net.named_parameters())
        self.device = next(iter(named.values())).device
        matrices = [n for n, p in named.items() if kind == "muon" and is_matrix(n, p)]
        rest = [n for n in named if n not in matrices]
        of_all = {"betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
        adamw = (AdamW16([named[n] for n in rest], lr, **of_all) if kind == "adamw16" else
                 torch.optim.AdamW([named[n] for n in rest], lr, **of_all, fused=self.device.type != "mps"))
        self.parts = [(adamw, rest)]  # [(optimizer, names of its parameters)]
        if matrices:
            pieces = [next((k for part, k in FUSED.items() if part in n), 1) for n in matrices]
            self.parts.append((Muon([named[n] for n in matrices], lr, weight_decay, momentum, pieces), matrices))
        self.skipped, self.skipped_in_a_row = torch.zeros(2, dtype=torch.int64, device=self.device)
        # the scale of the loss, and the steps since it changed; on the device, where nobody waits for it
        self.loss_scale = torch.tensor([FIRST_SCALE, 0.0], device=self.device) if float16 else None

    def scaled(self, loss):
        """Return the loss to call backward() on: in float16 it is scaled up, as far as its gradients still fit."""
        return loss if self.loss_scale is None else loss * self.loss_scale[0]

    def unscale(self):
        """Bring gradients of scaled() losses back to their size. Those that did not fit become infinite."""
        if self.loss_scale is not None:
            grads = [p.grad for o, _ in self.parts for p in o.param_groups[0]["params"] if p.grad is not None]
            torch._foreach_mul_(grads, 1 / self.loss_scale[0])

    def step(self, lr, grad_norm, zero_in_place=False):
        """Update the weights if the gradient's norm is finite, and return whether it is not, as a tensor.

        Gradients are dropped then, or zeroed in place: DDP's are views of its buckets.
        """
        bad = ~grad_norm.isfinite()
        if self.loss_scale is not None:
            scale, since = self.loss_scale
            grow = since + 1 >= SCALE_STEPS
            self.loss_scale = torch.stack([torch.where(bad, scale / 2, torch.where(grow, scale * 2, scale)),
                                           torch.where(bad | grow, 0.0, since + 1)])
        self.skipped = self.skipped + bad
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad
        for optimizer, _ in self.parts:
            optimizer.param_groups[0]["lr"] = lr
            if self.device.type != "mps":
                optimizer.found_inf = bad.float()
            if self.device.type != "mps" or not bad.item():  # AdamW there does not know found_inf
                optimizer.step()
            optimizer.zero_grad(set_to_none=not zero_in_place)
        return bad

    def tensors(self):
        """Return {"exp_avg.NAME OF THE PARAMETER": tensor} of everything that it remembers."""
        found = {f"{key}.{name}": value for o, names in self.parts
                 for name, p in zip(names, o.param_groups[0]["params"]) for key, value in o.state.get(p, {}).items()}
        return found if self.loss_scale is None else found | {"loss_scale": self.loss_scale}

    def load(self, tensors, where="the checkpoint"):
        """Take over what tensors() of an optimizer of the same kind returned; ValueError if they do not fit."""
        by_parameter, scale = {}, tensors.pop("loss_scale", None)
        if self.loss_scale is not None and scale is not None:
            self.loss_scale = scale.to(self.device, copy=True)
        for name, value in tensors.items():
            key, _, parameter = name.partition(".")
            by_parameter.setdefault(parameter, {})[key] = value.clone()  # the file will be deleted
        for optimizer, names in self.parts:
            wanted = {"momentum_buffer"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            state = {}
            for i, (name, p) in enumerate(zip(names, optimizer.param_groups[0]["params"])):
                if name in by_parameter:  # one that never had a gradient has no state
                    state[i] = by_parameter.pop(name)
                    if state[i].keys() != wanted or any(t.shape not in (p.shape, ()) for t in state[i].values()):
                        raise ValueError(f"{where}: the optimizer's state of {name} is damaged, or of another kind")
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name in by_parameter:
            raise ValueError(f"{where}: the optimizer's state is of another network, which has a parameter {name}")


class Average:
    """Keeps the moving average (EMA) of the weights, from step `start` on: w_avg += (1 - decay) (w - w_avg).

    net is None until then, and always with decay 0.
    """

    def __init__(self, decay, start):
        self.decay, self.start, self.net = decay, start, None

    def update(self, net, step, bad):
        """Take in the weights after a step, unless it was a bad one, which only the device knows."""
        if not self.decay or step < self.start:
            return
        if self.net is None:
            self.copy(net)
            return
        weights = [p.detach() for p in net.parameters()]
        share = torch.where(bad, 0.0, 1 - self.decay)
        torch._foreach_lerp_(list(self.net.parameters()), weights, [share] * len(weights))
        for ours, theirs in zip(self.net.buffers(), net.buffers()):
            ours.copy_(theirs)

    def copy(self, net):
        self.net = copy.deepcopy(net).requires_grad_(False)
