"""
How fast the training step is, as ratios that mean something on any machine, all measured in one run, alternating.

    python bench.py                         # Tiny/2: 200.7 M parameters, batch 4, 32x32 latents, 77x1024 captions
    python bench.py --mask_ratio 0

Forward and backward of the loss in float32, against (a) the time that its floating-point operations would take at the
matmul rate measured between the steps, (b) the same step with the experts dispatched by one-hot matrices, as in the
released code. "useful" FLOPs are those of the network with gather and scatter: three times the forward pass.
"""
from configurator import configure

batch_size = 4              # pictures per step
mask_ratio = 0.75           # patches dropped after the mixer
rounds = 5                  # every version is timed so often, in turn; the median counts
keep_memory = True          # have the C library keep freed memory, as train.py does on a CPU
profile = False             # also list the operators that take longest
device = "auto"             # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    settings = configure(globals())

import contextlib
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from machine import keep_freed_memory, pick_device
from model import MicroDiT, MicroDiTConfig, edm_loss, expert_tokens, kept_patches

TINY_2 = MicroDiTConfig(dim=512, depth=16, head_dim=32, mixer_depth=4, mixer_dim=512)


def one_hot_forward(self, x, router_input=None):
    """ExpertChoiceMLP.forward with one-hot dispatch, for comparison"""
    k = expert_tokens(self.capacity, x.shape[1], self.num_experts)
    probs = self.router(x if router_input is None else router_input).float().softmax(-1)
    weight, index = probs.transpose(1, 2).topk(k, dim=-1)                        # (B, E, k)
    one_hot = F.one_hot(index, x.shape[1]).to(x.dtype)                           # (B, E, k, T)
    taken = torch.einsum("bekt,btd->bekd", one_hot, x)
    hidden = F.gelu(torch.einsum("bekd,edh->bekh", taken, self.w1))
    out = torch.einsum("bekh,ehd->bekd", hidden, self.w2)
    return torch.einsum("bekt,bek,bekd->btd", one_hot, weight.to(x.dtype), out)


@contextlib.contextmanager
def one_hot_dispatch():
    ours = model.ExpertChoiceMLP.forward
    model.ExpertChoiceMLP.forward = one_hot_forward
    try:
        yield
    finally:
        model.ExpertChoiceMLP.forward = ours


def batch(config, device):
    """Arguments of edm_loss after the network"""
    shape = (batch_size, config.latent_channels, config.latent_size, config.latent_size)
    ids = None
    if mask_ratio:
        ids = kept_patches(torch.rand(batch_size, config.tokens, device="cpu"), mask_ratio).to(device)
    latents, noise = (torch.randn(shape, device=device) for _ in range(2))
    caption = torch.randn(batch_size, 77, config.caption_dim, device=device)
    return latents, caption, torch.rand(batch_size, device=device) + 0.1, noise, ids


def step_flops(config, context=contextlib.nullcontext):
    """Floating-point operations of one step, counted on the meta device: three times the forward pass"""
    with torch.device("meta"):
        net = MicroDiT(config)
    with FlopCounterMode(display=False) as counter, context():
        edm_loss(net, *batch(config, "meta"))
    return 3 * counter.get_total_flops()


def timed(function, device):
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    where, config = pick_device(device), TINY_2
    if where.type == "cpu" and keep_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    net, arguments = MicroDiT(config).to(where), batch(config, where)
    a = torch.randn(2048, 2048, device=where)

    def step():
        edm_loss(net, *arguments).backward()
        net.zero_grad()

    def one_hot_step():
        with one_hot_dispatch():
            step()

    def matmuls():
        for _ in range(10):
            a @ a

    versions = {"this code": step, "one-hot dispatch": one_hot_step, "matmul 2048": matmuls}
    times = {name: [] for name in versions}
    for i in range(rounds + 1):
        for name, function in versions.items():
            seconds = timed(function, where)
            if i:  # the first round warms up
                times[name].append(seconds)
    median = {name: statistics.median(t) for name, t in times.items()}
    peak = 10 * 2 * 2048 ** 3 / median["matmul 2048"]
    useful, one_hot = step_flops(config), step_flops(config, one_hot_dispatch)
    print(f"{where.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads), "
          f"torch {torch.__version__}, float32; "
          f"Tiny/2, batch {batch_size}, mask ratio {mask_ratio}, median of {rounds}")
    print(f"matmul 2048 x 2048: {peak / 1e9:.0f} GFLOP/s")
    for name, flops in (("this code", useful), ("one-hot dispatch", one_hot)):
        low, high = min(times[name]), max(times[name])
        print(f"{name:17}: {median[name]:.3f} s a step ({low:.3f} to {high:.3f}), {flops / 1e9:.0f} GFLOP, "
              f"useful FLOPs at {100 * useful / median[name] / peak:.0f} % of the matmul rate")
    print(f"one-hot dispatch takes {median['one-hot dispatch'] / median['this code']:.2f} x the time of this code")
    if profile:
        with torch.profiler.profile() as recorded:
            step()
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"bench.py: {error}") from None
