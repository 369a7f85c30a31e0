"""
Makes tests/data/inception_values.npz: features that pytorch-fid and torch-fidelity give with random weights, and pixels
that clean-fid and torch-fidelity resize.

    pip install --no-deps --target pf pytorch-fid==0.3.0 && pip install --no-deps --target tv torchvision==0.29.2
    pip install --no-deps --target cf clean-fid==0.1.35 && pip install --no-deps --target tf torch-fidelity==0.4.0
    python tests/make_inception_values.py pf tv cf tf tests/data/inception_values.npz

with torch 2.13.0 and pillow 13.0.0. None of them is a test requirement: all need torchvision, of which only the Python
file of InceptionV3 is run here.
"""
import importlib
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.inception import Inception

SEED = 7
SIZES = [(299, 299), (64, 48), (331, 360)]  # height, width: as it is, smaller, larger
KEPT = 1000  # values of each resized picture that are compared


def random_state():
    """Random weights by name: features of about 1 that differ between pictures.

    From numpy's legacy generator, whose stream never changes, in the names' order.
    """
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Inception().state_dict().items()}
    rng, state = np.random.RandomState(SEED), {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.from_numpy(np.array(rng.randint(1, 1000), np.int64))
            continue
        values = rng.standard_normal(shape)
        if len(shape) == 4:  # of the kind of He's initialisation
            values *= (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("running_var"):  # small enough for an epsilon of 1e-3 to show
            values = 0.3 * np.exp(0.3 * values)
        elif name.endswith("bn.weight"):
            values = 0.5 * np.exp(0.3 * values)
        else:
            values *= 0.2
        state[name] = torch.from_numpy(values).float()
    return state


def pictures():
    """uint8 (H,W,3): random squares of random colours under noise"""
    rng, made = np.random.RandomState(SEED), []
    for height, width in SIZES:
        coarse = np.kron(rng.randint(0, 256, (12, 12, 3)), np.ones((31, 31, 1)))[:height, :width]
        made.append((coarse + rng.randint(-60, 61, coarse.shape)).clip(0, 255).astype(np.uint8))
    return made


def kept():
    """Which values of a flat (3,299,299) are stored"""
    return np.sort(np.random.RandomState(SEED).choice(3 * 299 * 299, KEPT, replace=False))


def package(name, **content):
    """A stand-in for a package, which is not run"""
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(content)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def load_torchvision(folder):
    """torchvision.models.inception without torchvision's compiled parts"""
    package("torchvision", __path__=[f"{folder}/torchvision"], __version__="0.29.2")
    package("torchvision.utils", _log_api_usage_once=lambda _: None)
    package("torchvision.transforms", __path__=[])
    package("torchvision.transforms._presets", ImageClassification=object)
    package("torchvision.models", __path__=[f"{folder}/torchvision/models"])
    inception = importlib.import_module("torchvision.models.inception")
    sys.modules["torchvision.models"].inception_v3 = inception.inception_v3


def inputs():
    return [torch.from_numpy(p).permute(2, 0, 1).contiguous()[None] for p in pictures()]


@torch.no_grad()
def pytorch_fid(folder):
    """Features (n,2048): pytorch-fid's resizing and network"""
    sys.path.insert(0, folder)
    module = importlib.import_module("pytorch_fid.inception")
    module.load_state_dict_from_url = lambda *_, **__: random_state()
    net = module.InceptionV3().eval()
    return torch.cat([net(x.float() / 255)[0][:, :, 0, 0] for x in inputs()]).numpy()


@torch.no_grad()
def torch_fidelity(folder):
    """(features (n,2048), pixels (n,KEPT) in [0,255]): torch-fidelity's resizing and network"""
    package("torch_fidelity", __path__=[f"{folder}/torch_fidelity"])
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(random_state(), f"{scratch}/random.pth")
        net = module.FeatureExtractorInceptionV3("random", ["2048"], f"{scratch}/random.pth")
    resize = module.interpolate_bilinear_2d_like_tensorflow1x
    pixels = [resize(x.float(), size=(299, 299), align_corners=False).flatten()[kept()] for x in inputs()]
    return torch.cat([net(x)[0] for x in inputs()]).numpy(), torch.stack(pixels).numpy()


def clean_fid(folder):
    """Pixels (n,KEPT) in [0,255] as clean-fid resizes them"""
    package("cleanfid", __path__=[f"{folder}/cleanfid"])
    resize = importlib.import_module("cleanfid.resize").build_resizer("clean")
    return np.stack([np.moveaxis(resize(p), 2, 0).ravel()[kept()] for p in pictures()])


def main(pf, tv, cf, tf, out):
    load_torchvision(tv)
    fidelity, tensorflow = torch_fidelity(tf)
    np.savez_compressed(out, pytorch_fid=pytorch_fid(pf), torch_fidelity=fidelity, tensorflow=tensorflow,
                        clean=clean_fid(cf))


if __name__ == "__main__":
    main(*sys.argv[1:])
