"""
The network of the Fréchet Inception Distance: InceptionV3 of December 2015, with its published file's tensor names.

It is torchvision's InceptionV3 but for its average pools, which leave the padding out, a max pool in its last block,
and 1008 classes (Seitzer 2020).
"""
import hashlib
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common.files import read_bytes, reading
from common.tensors import tensors_hash
from encoders.tiny import chain

SIDE, WIDTH = 299, 2048  # pixels of an input's side, features of a picture
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# A step is the name of a pool, a convolution (name, channels, kernel, stride, padding), a fork, which is a list of
# branches, each a list of steps, whose results are concatenated, or a block (name, fork).
POOLS = {"average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
         "max": lambda x: F.max_pool2d(x, 3, 1, 1), "max/2": lambda x: F.max_pool2d(x, 3, 2)}


def block_a(pool):
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            ["average", ("branch_pool", pool, 1)]]


def block_c(n):
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", n, 1), ("branch7x7_2", n, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", n, 1), ("branch7x7dbl_2", n, (7, 1)), ("branch7x7dbl_3", n, (1, 7)),
             ("branch7x7dbl_4", n, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
            ["average", ("branch_pool", 192, 1)]]


def block_e(pool):
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [[("branch3x3_2a", 384, (1, 3))], [("branch3x3_2b", 384, (3, 1))]]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [[("branch3x3dbl_3a", 384, (1, 3))], [("branch3x3dbl_3b", 384, (3, 1))]]],
            [pool, ("branch_pool", 192, 1)]]


BLOCK_B = [[("branch3x3", 384, 3, 2, 0)],
           [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2, 0)],
           ["max/2"]]
BLOCK_D = [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2, 0)],
           [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2, 0)],
           ["max/2"]]
NETWORK = [
    ("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3), "max/2",  # 73 x 73
    ("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1, 0), "max/2",  # 35 x 35
    ("Mixed_5b", block_a(32)), ("Mixed_5c", block_a(64)), ("Mixed_5d", block_a(64)),
    ("Mixed_6a", BLOCK_B), ("Mixed_6b", block_c(128)), ("Mixed_6c", block_c(160)), ("Mixed_6d", block_c(160)),
    ("Mixed_6e", block_c(192)),  # 17 x 17
    ("Mixed_7a", BLOCK_D), ("Mixed_7b", block_e("average")), ("Mixed_7c", block_e("max"))]  # 8 x 8


def convolution(channels, out_channels, kernel, stride=1, padding="same"):
    return chain(conv=nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False),
                 bn=nn.BatchNorm2d(out_channels, eps=1e-3), relu=nn.ReLU(inplace=True))


class Steps(nn.Module):
    """The convolutions and blocks of some steps, by their names"""

    def __init__(self, channels, steps):
        super().__init__()
        self.steps, self.channels = steps, self.build(channels, steps)

    def build(self, channels, steps):
        """Add the modules of the steps, and return how many channels the last one gives."""
        for step in steps:
            if isinstance(step, list):
                channels = sum(self.build(channels, branch) for branch in step)
            elif isinstance(step, tuple):
                name, what, *rest = step
                is_block = isinstance(what, list)
                self.add_module(name, Steps(channels, [what]) if is_block else convolution(channels, what, *rest))
                channels = getattr(self, name).channels if is_block else what
        return channels

    def follow(self, x, steps):
        for step in steps:
            if isinstance(step, str):
                x = POOLS[step](x)
            elif isinstance(step, list):
                x = torch.cat([self.follow(x, branch) for branch in step], 1)
            else:
                x = getattr(self, step[0])(x)
        return x

    def forward(self, x):
        return self.follow(x, self.steps)


class Inception(Steps):
    """The network, with the published file's last layer, unused"""

    def __init__(self):
        super().__init__(3, NETWORK)
        self.fc = nn.Linear(WIDTH, 1008)

    @torch.no_grad()
    def image(self, prepared):
        """Return the features (B,2048) of pictures, float32 (3,299,299) in [-1, 1]."""
        return self(torch.stack(prepared).to(self.fc.weight.device)).mean((2, 3))


# Resizing: an RGB picture (PIL or uint8 (H,W,3)) of any size -> float32 (3,299,299)


def clean(picture):
    """Resize as clean-fid's "clean" (Parmar et al. 2022): PIL's antialiased bicubic, unrounded; [-1, 0.9922]."""
    planes = [Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
              for p in np.moveaxis(np.asarray(picture, np.float32), 2, 0)]
    return (torch.from_numpy(np.stack(planes).clip(0, 255)) - 128) / 128


def tensorflow(picture):
    """Resize as the first FID code (Heusel et al. 2017) and EDM do; [-1, 0.9922]."""
    planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    return (stretch(stretch(planes, 2), 1) - 128) / 128


def stretch(x, axis):
    """Interpolate between two neighbours where TensorFlow 1 looks for them: at target * size / 299."""
    size = x.shape[axis]
    position = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(size / SIDE, dtype=torch.float32)
    low = position.long()
    x0, x1 = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(size - 1))
    return x0 + (x1 - x0) * (position - low).view(SIDE, *[1] * (2 - axis))


RESIZES = {"clean": clean, "tensorflow": tensorflow}


def load_inception(path="", device="cpu", resize="clean"):
    """Return the network with a file's weights, for "" the published ones, for "random" those of seed 0."""
    if path == "random":
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            net, file = Inception(), path
            for p in net.parameters():
                if p.ndim == 4:
                    nn.init.kaiming_normal_(p, nonlinearity="relu")  # torch's own would fade out over so many layers
        digest = tensors_hash(net)
    else:
        net, file = Inception(), path or published_file()
        with reading(file, f": FID's Inception is {URL}"):
            content = read_bytes(file)
            digest = hashlib.sha256(content).hexdigest()
            net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    net.prepare, net.width, net.name = RESIZES[resize], WIDTH, str(file)
    net.about = {"network_sha256": digest, "resize": resize}
    return net.to(device).eval().requires_grad_(False)


def published_file():
    """Return the published file in torch's hub cache, downloaded if need be."""
    file = Path(torch.hub.get_dir(), "checkpoints", URL.rpartition("/")[2])
    if not file.exists():
        print(f"downloading {URL} (96 MB) to {file}")
        file.parent.mkdir(parents=True, exist_ok=True)
        with reading(file, f". Fetch {URL} elsewhere and put it there, or name it with --inception FILE"):
            torch.hub.download_url_to_file(URL, str(file), SHA256)
    return file
