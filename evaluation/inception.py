"""
The network of the Fréchet Inception Distance: InceptionV3 of December 2015, with its published file's tensor names.

    net = load()                                        # downloads 96 MB once; load("FILE.pth") downloads nothing
    rows = features(net, pictures, "clean", "cpu")      # (B, 2048)

It is torchvision's InceptionV3 but for its average pools, which leave the padding out, a max pool in its last block,
and 1008 classes (the weights and pytorch-fid, Seitzer 2020). How pictures get to 299 px changes the distance as much as
a better model does: say which of RESIZES was used.
"""
import contextlib
import hashlib
import http.client
import os
import pickle
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

SIDE, WIDTH = 299, 2048  # pixels of an input's side, features of a picture
URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # both are the same file
BYTES = 95_628_359

# ---------------------------------------------------------------------------------------------------------------------
# Network

# A step is the name of a pool, a convolution (name, channels, kernel, stride, padding), a fork: a list of branches,
# each of them a list of steps, whose results are concatenated, or a block: (name, fork).
POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max/2": lambda x: F.max_pool2d(x, 3, 2)}


def block_a(pool):
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            ["average", ("branch_pool", pool, 1)]]


def block_b():
    return [[("branch3x3", 384, 3, 2, 0)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2, 0)],
            ["max/2"]]


def block_c(n):
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", n, 1), ("branch7x7_2", n, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", n, 1), ("branch7x7dbl_2", n, (7, 1)), ("branch7x7dbl_3", n, (1, 7)),
             ("branch7x7dbl_4", n, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
            ["average", ("branch_pool", 192, 1)]]


def block_d():
    return [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2, 0)],
            [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
             ("branch7x7x3_4", 192, 3, 2, 0)],
            ["max/2"]]


def block_e(pool):
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [[("branch3x3_2a", 384, (1, 3))], [("branch3x3_2b", 384, (3, 1))]]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [[("branch3x3dbl_3a", 384, (1, 3))], [("branch3x3dbl_3b", 384, (3, 1))]]],
            [pool, ("branch_pool", 192, 1)]]


NETWORK = [
    ("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3), "max/2",      # 73 x 73
    ("Conv2d_3b_1x1", 80, 1), ("Conv2d_4a_3x3", 192, 3, 1, 0), "max/2",                                     # 35 x 35
    ("Mixed_5b", block_a(32)), ("Mixed_5c", block_a(64)), ("Mixed_5d", block_a(64)),
    ("Mixed_6a", block_b()), ("Mixed_6b", block_c(128)), ("Mixed_6c", block_c(160)), ("Mixed_6d", block_c(160)),
    ("Mixed_6e", block_c(192)),                                                                             # 17 x 17
    ("Mixed_7a", block_d()), ("Mixed_7b", block_e("average")), ("Mixed_7c", block_e("max"))]                # 8 x 8


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
        """Add what the steps need -> how many channels they give"""
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
    """images (B,3,299,299), float32 in [-1,1] -> (B,2048), float32"""

    def __init__(self):
        super().__init__(3, NETWORK)
        self.fc = nn.Linear(WIDTH, 1008)  # in the file, of no use for the distance

    @torch.no_grad()
    def forward(self, images):
        if images.dtype != torch.float32 or images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"Inception takes float32 (B,3,{SIDE},{SIDE}), not {images.dtype} {tuple(images.shape)}: "
                             f"resize pictures with one of inception.RESIZES ({', '.join(RESIZES)})")
        with full_precision(images.device):
            return super().forward(images).mean((2, 3))


@contextlib.contextmanager
def full_precision(device):
    """No autocast and no TF32 convolutions within, as published distances were measured without"""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: PIL, RGB, or uint8 (H,W,3), of any size -> float32 (3,299,299). All squash: crop to a square first.


def pixels(picture):
    """uint8 (H,W,3)"""
    if isinstance(picture, Image.Image) and picture.mode != "RGB":
        raise ValueError(f"a picture is {picture.mode}, not RGB: pictures.to_rgb converts it")
    array = np.array(picture)  # a copy, as torch wants it writable
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"a picture must be RGB, uint8 (H,W,3), not {array.dtype} {array.shape}")
    return array


def clean(picture):
    """clean-fid's "clean" (Parmar et al. 2022): PIL's antialiased bicubic without rounding to 8 bit; [-1, 0.9922]"""
    planes = [Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
              for p in np.moveaxis(pixels(picture), 2, 0).astype(np.float32)]
    return (torch.from_numpy(np.stack(planes).clip(0, 255)) - 128) / 128


def tensorflow(picture):
    """TensorFlow 1's bilinear, no antialiasing, pixels' corners on a grid: the first FID code (Heusel et al. 2017), so
    ADM's and EDM's, torch-fidelity's, and clean-fid's "legacy_tensorflow"; [-1, 0.9922]"""
    planes = torch.from_numpy(pixels(picture)).permute(2, 0, 1).float()
    return (stretch(stretch(planes, 2), 1) - 128) / 128


def stretch(x, axis):
    """Between two neighbours where TF 1 looks for them: at target * size / 299, without half a pixel's offset"""
    size = x.shape[axis]
    place = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(size / SIDE, dtype=torch.float32)
    low = place.long()
    x0, x1 = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(size - 1))
    return x0 + (x1 - x0) * (place - low).view(SIDE, *[1] * (2 - axis))


def pytorch(picture):
    """pytorch-fid's: PyTorch's bilinear, no antialiasing, half a pixel's offset; [-1, 1]"""
    planes = torch.from_numpy(pixels(picture)).permute(2, 0, 1).contiguous().float() / 255
    return 2 * F.interpolate(planes[None], (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)[0] - 1


RESIZES = {"clean": clean, "tensorflow": tensorflow, "pytorch": pytorch}


def features(net, images, resize, device):
    """float32 numpy (B,2048) of a list of pictures, all at once. resize: one of RESIZES, by its name."""
    if resize not in RESIZES:
        raise ValueError(f"resize {resize!r} is none of {', '.join(RESIZES)}")
    if not len(images):
        return np.zeros((0, WIDTH), np.float32)
    return net(torch.stack([RESIZES[resize](i) for i in images]).to(device)).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(path="", device="cpu"):
    """The network of the published file, or of another with its tensors; "": from torch's hub cache, or downloaded.

    Its .sha256 is the file's, .published whether that is the published one. ValueError says what is missing or wrong.
    """
    file = Path(path) if path else cached()
    tensors = read(file)
    with torch.device("meta"):
        net = Inception()
    wanted = {n: t.shape for n, t in net.state_dict().items()}
    problems = [f"missing {n}" for n in wanted if n not in tensors]
    problems += [f"left over {n}" for n in tensors if n not in wanted]
    problems += [f"{n} is {tuple(tensors[n].shape)} and not {tuple(s)}" for n, s in wanted.items()
                 if n in tensors and tensors[n].shape != s]
    if problems:
        raise ValueError(f"{file} is not FID's Inception, in {len(problems)} tensors: {'; '.join(problems[:5])}. "
                         f"torchvision's and timm's Inception are others. The file is {URLS[0]}")
    net.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, assign=True)
    net.path, net.sha256 = str(file), sha256(file)
    net.published = net.sha256 == SHA256
    return net.to(device).eval().requires_grad_(False)


def read(file):
    """{name: tensor} of a file, unpickled safely"""
    advice = f"is it damaged, or another kind of file? The file is {URLS[0]}"
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no file {file} with FID's Inception: it is {URLS[0]}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} does not open as PyTorch weights ({(str(error) or 'cut short').splitlines()[0]}): "
                         f"{advice}") from None
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in tensors.items()):
        raise ValueError(f"{file} does not hold named tensors: {advice}")
    return tensors


def sha256(file):
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cached():
    """The published file in torch's hub cache, where pytorch-fid and torch-fidelity look too; downloaded if need be"""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = [folder / url.rpartition("/")[2] for url in URLS]
    file = next((f for f in files if f.is_file()), files[0])
    if not file.is_file():
        download(file)
    elif (found := sha256(file)) != SHA256:
        raise ValueError(f"{file} is not the published file: its sha256 is {found}, not {SHA256}. Delete it, and it is "
                         "downloaded again, or name yours with --inception FILE")
    return file


def download(file):
    """From the first address that has it, whole and right or not at all"""
    # each process of a launch has its own temporary file, and all rename to the same bytes
    temporary, failures = file.with_name(f"{file.name}.{os.getpid()}.tmp"), []
    for url in URLS:
        print(f"downloading {url} to {file}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=30) as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
            if (found := sha256(temporary)) == SHA256:
                os.replace(temporary, file)
                return
            failures.append(f"{url}: {temporary.stat().st_size:,} bytes came with sha256 {found}")
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{url}: {error}")
        finally:
            temporary.unlink(missing_ok=True)
    raise ValueError(f"FID's Inception could not be downloaded ({'; '.join(failures)}). Fetch either file ({BYTES:,} "
                     f"bytes, sha256 {SHA256}) elsewhere and put it to {file}, or name it with --inception FILE")
