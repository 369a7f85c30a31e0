"""
What a training step takes on a GPU, counted from model.py without one: an estimate, until a GPU measures it.

The step is traced on the meta device under autocast's rules, forward and backward as torch.compile splits them. Matrix
products go by their tiles; everything between two of them is one kernel that reads each input and writes each output
once, as the compiler fuses; memory is what is alive at a time. The figures of the card are at the top.
"""
import math
import operator
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from common.flops import PEAKS, on_meta, random_batch
from model import edm_loss

PEAK = PEAKS["H100"]
PROCESSORS = 132                # of an H100, each with one tile of a product at a time
# tiles of a product's result, and the share of the peak that they are assumed to reach
TILES = ((128, 256, 0.74), (256, 128, 0.74), (128, 128, 0.66), (64, 256, 0.60), (64, 128, 0.50), (64, 64, 0.35))
BANDWIDTH = 2.8e12              # bytes/s that kernels reach, of the 3.35e12 on the datasheet
ATTENTION_BANDWIDTH = 1.8e12    # bytes/s of flash attention at these lengths
LAUNCH = 2e-6                   # seconds that the smallest kernel takes
LINK = 300e9                    # bytes/s that an all-reduce gets between the GPUs of a node

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward")
ALONE = ("topk", "sort", "index_add", "scatter", "scatter_add", "index_put")  # kernels that nothing is fused into
VIEWS = ("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice",
         "select", "split", "split_with_sizes", "as_strided", "alias", "detach", "getitem")


@dataclass
class Step:
    """What a forward and a backward pass of a micro-batch take."""
    products: float = 0.0       # seconds
    elementwise: float = 0.0
    attention: float = 0.0
    flops: float = 0.0          # of the products
    moved: float = 0.0          # bytes that the elementwise kernels read and write
    launches: int = 0
    saved: float = 0.0          # bytes of a picture's tensors that the backward pass waits for
    copies: float = 0.0         # bytes that it keeps once, whatever the number of pictures: weights in bf16
    peak: float = 0.0           # most bytes at a time, beside weights, gradients and the optimizer's state
    wide: Counter = field(default_factory=Counter)  # {shape of a float32 tensor: bytes of it that kernels move}

    @property
    def seconds(self):
        return self.products + self.elementwise + self.attention


class Autocast(TorchFunctionMode):
    """Does to meta tensors what torch.autocast("cuda", torch.bfloat16) does to a GPU's; meta has no autocast."""
    LOW = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.bmm, torch.matmul, torch.Tensor.matmul,
           torch.Tensor.__matmul__, torch.baddbmm, torch.addmm, torch.mm}
    HIGH = {F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.log, torch.Tensor.log, torch.exp,
            torch.Tensor.exp, torch.rsqrt, torch.Tensor.rsqrt, torch.Tensor.sum, torch.Tensor.pow}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        dtype = torch.bfloat16 if function in self.LOW else torch.float32 if function in self.HIGH else None
        if dtype:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t,
                                         (args, kwargs or {}))
        if function is F.scaled_dot_product_attention:  # the kernel that a GPU takes for these heads; meta has no taste
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **(kwargs or {}))[0]
        return function(*args, **(kwargs or {}))


class Loss(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *batch):
        return edm_loss(self.net, *batch)


def graphs(config, pictures, mask_ratio):
    """Return the compiler's forward graph and backward graph of a micro-batch, and how many of the forward graph's
    inputs, the first, are weights and buffers. RuntimeError where model.py depends on data, as nonzero does."""
    from functorch.compile import aot_module, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    found = []

    def keep(graph, inputs):
        found.append(graph.graph)
        return make_boxed_func(graph.forward)
    net = on_meta(config)
    step = aot_module(Loss(net), keep, keep, partition_fn=min_cut_rematerialization_partition,
                      decompositions=select_decomp_table())
    with Autocast():
        loss = step(*random_batch(config, pictures, mask_ratio, "meta"))
    loss.backward()
    return *found, sum(1 for _ in net.parameters()) + sum(1 for _ in net.buffers())


def count(config, pictures, mask_ratio):
    """Return the Step of a micro-batch of so many pictures, without activation checkpointing."""
    step = Step()
    forward, backward, weights = graphs(config, pictures, mask_ratio)
    inputs = [node for node in forward.nodes if node.op == "placeholder"]
    of_data = depends_on(forward, inputs[weights:])
    # after the loss: what the backward pass waits for
    handed_on = [node for node in forward.output_node().args[0][1:] if isinstance(node, torch.fx.Node)]
    handed_on = [node for node in handed_on if base(node).op != "placeholder"]
    for node in dict.fromkeys(map(base, handed_on)):
        if node in of_data:
            step.saved += size(node) / pictures
        else:
            step.copies += size(node)
    waiting = {node.name for node in handed_on}
    run(backward, step, run(forward, step, 0.0, waiting), waiting)
    return step


def depends_on(graph, roots):
    """Return the nodes that are made from any of these."""
    found = set(roots)
    for node in graph.nodes:
        if found & set(node.all_input_nodes):
            found.add(node)
    return found


def kind(node):
    """Return what an operation is: input (or output), view, product, attention, alone or fused."""
    if node.op != "call_function":
        return "input"
    name = node.target.__name__.partition(".")[0]
    if node.target is operator.getitem or name in VIEWS:
        return "view"
    if name in PRODUCTS:
        return "product"
    if "scaled_dot_product" in name:
        return "attention"
    return "alone" if name in ALONE else "fused"


def tensors(node):
    value = node.meta.get("val")
    return [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, torch.Tensor)]


def size(node):
    return sum(t.numel() * t.element_size() for t in tensors(node))


def run(graph, step, alive, waiting):
    """Add a graph's kernels to the step; return the bytes that are alive at its end, with `alive` before it.

    waiting: names of what the forward pass hands on, which dies in the backward pass.
    """
    group_of, groups = {}, []  # what stands between two products, as far as it can be fused, is a group: one kernel
    for node in graph.nodes:
        if kind(node) == "input":
            continue
        if kind(node) in ("fused", "view") and groups and groups[-1][0] == "fused":
            groups[-1][1].append(node)
        else:
            groups.append((("fused" if kind(node) == "view" else kind(node)), [node]))
        group_of[node] = len(groups) - 1
    last_use = {}
    for i, (_, members) in enumerate(groups):
        for node in members:
            for source in node.all_input_nodes:
                last_use[base(source)] = i
    dying = {}
    for node, i in last_use.items():
        dying.setdefault(i, []).append(node)

    held = {node: size(node) for node in graph.nodes if node.op == "placeholder" and node.name in waiting}
    for i, (sort, members) in enumerate(groups):
        read = dict.fromkeys(s for node in members for s in node.all_input_nodes if group_of.get(s) != i)
        written = [node for node in members if kind(node) != "view" and any(
            group_of.get(user, -1) != i for user in real_users(node))]
        add_kernel(step, sort, members, read, written)
        for node in written:
            held[node] = size(node)
            alive += held[node]
        step.peak = max(step.peak, alive)
        for node in dying.get(i, ()):
            if not any(user.op == "output" for user in real_users(node)):
                alive -= held.pop(node, 0)
    return alive


def base(node):
    """Return the node whose memory this one is a view of."""
    while kind(node) == "view":
        node = node.all_input_nodes[0]
    return node


def real_users(node):
    """Return the nodes that read this one, through views too."""
    found = []
    for user in node.users:
        found += real_users(user) if kind(user) == "view" else [user]
    return found


def add_kernel(step, sort, members, read, written):
    """Add what a group takes; read and written are the nodes outside and inside that it reads and that others read."""
    moved = sum(size(node) for node in read) + sum(size(node) for node in written)
    if sort == "product":
        flops, seconds = product(members[0])
        step.products += seconds
        step.flops += flops
    elif sort == "attention":
        step.attention += max(moved / ATTENTION_BANDWIDTH, LAUNCH)
    elif not written:  # views alone
        return
    else:
        step.elementwise += max(moved / BANDWIDTH, LAUNCH)
        step.moved += moved
        for node in [*read, *written]:
            for t in tensors(node):
                if t.dtype == torch.float32:
                    step.wide[tuple(t.shape)] += t.numel() * 4
    step.launches += 1


def product(node):
    """Return (FLOPs, seconds) of a matrix product or of the patch embedding's convolution."""
    shapes = [tuple(t.shape) for source in node.all_input_nodes for t in tensors(source)]
    if "convolution" in node.target.__name__:
        out = math.prod(tensors(node)[0].shape)
        weight = min(shapes, key=math.prod)
        flops = 2 * out * math.prod(weight[1:])
        return flops, max(flops / (0.3 * PEAK), LAUNCH)  # so small that its share of the peak hardly matters
    a, b = shapes[-2:]
    batch, m, k, n = math.prod(a[:-2]), a[-2], a[-1], b[-1]
    return 2 * batch * m * k * n, product_seconds(batch, m, k, n)


def product_seconds(batch, m, k, n):
    """Return the seconds of (m,k) x (k,n) in bf16: the processors take tiles in rounds, the last one half empty; a
    product of few tiles is also split along k."""
    best = math.inf
    for rows, columns, share in TILES:
        tiles = batch * math.ceil(m / rows) * math.ceil(n / columns)
        split = max(1, min(PROCESSORS // tiles, k // 512))
        rounds = math.ceil(tiles * split / PROCESSORS)
        best = min(best, rounds * 2 * rows * columns * k / split * PROCESSORS / (PEAK * share))
    return max(best, 2 * batch * (m * k + k * n + m * n) / BANDWIDTH) + LAUNCH


@dataclass
class Estimate:
    """What a step of a run takes on one of several GPUs."""
    step: Step
    micros: int                 # micro-batches in it
    seconds: float
    update: float               # of these, for the optimizer and what all GPUs do together
    state: float                # bytes of weights, gradients, moments and average

    @property
    def memory(self):
        return self.state + self.step.peak


def estimate(settings, config, parameters, gpus):
    """Return the Estimate of a GPU's share of a step with train.py's settings.

    What is read and written of each weight: for adding a micro-batch's gradient 12 bytes; for DDP's division 8; for the
    norm and clipping 12; for AdamW 28; for zeroing 4; for an average 12. An all-reduce hides behind the last backward
    pass, but for the part that is longer.
    """
    share = max(1, settings["batch_size"] // gpus)
    micro = min(settings["micro_batch_size"], share)
    step = count(config, micro, settings["mask_ratio"])
    micros, average = share // micro, settings["ema_decay"] > 0
    adding = 12 * parameters / BANDWIDTH
    update = parameters * (28 + 12 + 4 + 12 * average + 8 * (gpus > 1)) / BANDWIDTH
    reduction = 2 * 4 * parameters * (gpus - 1) / gpus / LINK
    update += max(0.0, reduction - 2 / 3 * step.seconds)
    seconds = micros * (step.seconds + adding) + update
    return Estimate(step, micros, seconds, update, parameters * (16 + 4 * average))
