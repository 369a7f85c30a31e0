"""
The network of the Fréchet Inception Distance: InceptionV3 of December 2015, with its published file's tensor names.

    net = load()                                            # downloads 96 MB once; load("FILE.pth") downloads nothing
    rows = net.image([net.prepare(p) for p in pictures])    # (B, 2048)

It is torchvision's InceptionV3 but for its average pools, which leave the padding out, a max pool in its last block,
and 1008 classes (the weights and pytorch-fid, Seitzer 2020). How pictures get to 299 px changes the distance as much as
a better model does: say which of RESIZES was used.
"""
import hashlib
import http.client
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common.hashing import tensors_hash

SIDE, WIDTH = 299, 2048  # pixels of an input's side, features of a picture
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# A step is one of four things: the name of a pool; a convolution (name, channels, kernel, stride, padding); a fork,
# which is a list of branches, each a list of steps, whose results are concatenated; or a block (name, fork).
POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max/2": lambda x: F.max_pool2d(x, 3, 2)}


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
    ("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3), "max/2",      # 73 x 73
    ("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1, 0), "max/2",                                     # 35 x 35
    ("Mixed_5b", block_a(32)), ("Mixed_5c", block_a(64)), ("Mixed_5d", block_a(64)),
    ("Mixed_6a", BLOCK_B), ("Mixed_6b", block_c(128)), ("Mixed_6c", block_c(160)), ("Mixed_6d", block_c(160)),
    ("Mixed_6e", block_c(192)),                                                                             # 17 x 17
    ("Mixed_7a", BLOCK_D), ("Mixed_7b", block_e("average")), ("Mixed_7c", block_e("max"))]                    # 8 x 8


class Convolution(nn.Module):
    def __init__(self, channels, out_channels, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Steps(nn.Module):
    """The convolutions and blocks of some steps, by their names"""

    def __init__(self, channels, steps):
        super().__init__()
        self.steps, self.channels = steps, self.build(channels, steps)

    def build(self, channels, steps):
        """Add the modules that the steps need, and return how many channels the last one gives."""
        for step in steps:
            if isinstance(step, list):
                channels = sum(self.build(channels, branch) for branch in step)
            elif isinstance(step, tuple):
                name, what, *rest = step
                block = Steps(channels, [what]) if isinstance(what, list) else Convolution(channels, what, *rest)
                self.add_module(name, block)
                channels = block.channels if isinstance(what, list) else what
        return channels

    def follow(self, x, steps):
        """Apply the steps to x."""
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
    """Images (B,3,299,299), float32 in [-1, 1] -> features (B,2048), float32"""

    def __init__(self):
        super().__init__(3, NETWORK)
        self.fc = nn.Linear(WIDTH, 1008)  # in the file, of no use for the distance

    @torch.no_grad()
    def forward(self, images):
        # published distances were measured without autocast and TF32
        tf32_off = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with tf32_off, torch.autocast(images.device.type, enabled=False):
            return super().forward(images).mean((2, 3))

    def image(self, prepared):
        """Return the features (B,2048) of what prepare() made of pictures."""
        return self(torch.stack(prepared).to(self.fc.weight.device))


# ---------------------------------------------------------------------------------------------------------------------
# Resizing: an RGB picture (PIL or uint8 (H,W,3)) of any size -> float32 (3,299,299). All squash: crop to a square.


def clean(picture):
    """Resize as clean-fid's "clean" (Parmar et al. 2022): PIL's antialiased bicubic, unrounded; [-1, 0.9922]."""
    planes = [Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
              for p in np.moveaxis(np.asarray(picture, np.float32), 2, 0)]
    return (torch.from_numpy(np.stack(planes).clip(0, 255)) - 128) / 128


def tensorflow(picture):
    """Resize as the first FID code (Heusel et al. 2017), so as ADM, EDM, torch-fidelity and clean-fid's
    "legacy_tensorflow": TensorFlow 1's bilinear, no antialiasing, pixels' corners on a grid; [-1, 0.9922]."""
    planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    return (stretch(stretch(planes, 2), 1) - 128) / 128


def stretch(x, axis):
    """Interpolate between two neighbours where TF 1 looks for them: at target * size / 299, without half a pixel."""
    size = x.shape[axis]
    position = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(size / SIDE, dtype=torch.float32)
    low = position.long()
    x0, x1 = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(size - 1))
    return x0 + (x1 - x0) * (position - low).view(SIDE, *[1] * (2 - axis))


def pytorch(picture):
    """Resize as pytorch-fid: PyTorch's bilinear, no antialiasing, half a pixel's offset; [-1, 1]."""
    planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255
    return 2 * F.interpolate(planes[None], (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)[0] - 1


RESIZES = {"clean": clean, "tensorflow": tensorflow, "pytorch": pytorch}

# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(path="", device="cpu", resize="clean"):
    """Return the network with a file's weights, the published file's for "", or the random ones of seed 0 for "random".

    Its .prepare(picture) resizes for it. Distances of random features only order runs of one set among each other.
    """
    if path == "random":
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            net = Inception()
            for p in net.parameters():
                if p.ndim == 4:
                    nn.init.kaiming_normal_(p, nonlinearity="relu")  # torch's own would fade out over so many layers
        return ready(net, "random", {"network_sha256": tensors_hash(net), "published": False}, device, resize)
    file = Path(path) if path else published_file()
    if not file.is_file():
        raise ValueError(f"no file {file} with FID's Inception: it is {URL}")
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if not path and digest != SHA256:
        raise ValueError(f"{file} is not the published file, whose sha256 is {SHA256}. Delete it, and it is downloaded "
                         "again, or name yours with --inception FILE")
    net = Inception()
    try:
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:  # whose advice is to load the file unsafely
        raise ValueError(f"{file} holds more than tensors, or is no file of torch's: FID's Inception is {URL}"
                         ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        reason = "it is TorchScript" if "TorchScript" in str(error) else " ".join(str(error).split())[:300]
        raise ValueError(f"{file} does not hold FID's Inception ({reason}): the file is {URL}") from None
    return ready(net, str(file), {"network_sha256": digest, "published": digest == SHA256}, device, resize)


def ready(net, name, about, device, resize):
    net.prepare, net.width, net.name, net.about = RESIZES[resize], WIDTH, name, about | {"resize": resize}
    return net.to(device).eval().requires_grad_(False)


def published_file():
    """Return the published file's path in torch's hub cache, which pytorch-fid shares, downloaded if need be."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not file.is_file():
        print(f"downloading {URL} (96 MB) to {file}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(file), SHA256)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise ValueError(f"FID's Inception could not be downloaded ({error}). Fetch {URL} elsewhere and put it to "
                             f"{file}, or name it with --inception FILE. Its sha256 is {SHA256}") from None
    return file
