"""inception.py against values of others in data/inception_values.npz: features that pytorch-fid 0.3.0 and
torch-fidelity 0.4.0 give with random weights, and pixels that clean-fid 0.1.35 and torch-fidelity resize.

tests/make_inception_values.py of commit 95c56be, which runs those packages, has made them.
"""
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from evaluation import inception

VALUES = np.load(Path(__file__).parent / "data/inception_values.npz")
SEED = 7
SIZES = [(299, 299), (64, 48), (331, 360)]  # height, width: as it is, smaller, larger
KEPT = np.sort(np.random.RandomState(SEED).choice(3 * 299 * 299, 1000, replace=False))  # numbers of the stored pixels


@pytest.fixture(scope="module")
def pictures():
    """uint8 (H,W,3): random squares of random colours under noise"""
    rng, made = np.random.RandomState(SEED), []
    for height, width in SIZES:
        coarse = np.kron(rng.randint(0, 256, (12, 12, 3)), np.ones((31, 31, 1)))[:height, :width]
        made.append((coarse + rng.randint(-60, 61, coarse.shape)).clip(0, 255).astype(np.uint8))
    return made


@pytest.fixture(scope="module")
def state():
    """Random weights by name, from numpy's legacy generator, whose stream never changes, in the names' order"""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in inception.Inception().state_dict().items()}
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


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    """A random file in the format of the published one, which is older than torch's zip files"""
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file


@pytest.fixture(scope="module")
def net(weights):
    return inception.load_inception(weights, resize="tensorflow")


def pytorch(picture):
    """The resize of pytorch-fid: PyTorch's bilinear, [-1, 1]"""
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous().float() / 255
    return 2 * F.interpolate(planes, (299, 299), mode="bilinear", antialias=False)[0] - 1


def test_features_equal_the_published_codes(net, pictures):
    for project, resize in (("pytorch_fid", pytorch), ("torch_fidelity", inception.tensorflow)):
        ours, theirs = net.image([resize(picture) for picture in pictures]).numpy(), VALUES[project]
        assert ours.shape == theirs.shape == (3, 2048) and ours.dtype == np.float32
        assert 0.5 < theirs.std() < 2 and np.abs(theirs - theirs.mean(0)).max() > 0.1  # neither flat nor all the same
        assert np.abs(ours - theirs).max() <= 1e-4
    assert sum(p.numel() for p in net.parameters()) == 23_850_960


# "clean" was equal to the last bit too, but PIL is compiled code, which another processor may round otherwise
@pytest.mark.parametrize("resize, tolerance", [("tensorflow", 0), ("clean", 1e-6)])
def test_resized_pictures_equal_the_published_codes(pictures, resize, tolerance):
    for picture, theirs in zip(pictures, VALUES[resize], strict=True):
        ours = inception.RESIZES[resize](picture)
        assert ours.shape == (3, 299, 299) and ours.dtype == torch.float32
        assert np.abs(ours.flatten()[KEPT].numpy() - (theirs - 128) / 128).max() <= tolerance
        assert torch.equal(ours, inception.RESIZES[resize](Image.fromarray(picture)))
    for level, end in ((0, -1), (255, 127 / 128)):
        assert (inception.RESIZES[resize](np.full((40, 7, 3), level, np.uint8)) - end).abs().max() <= 1e-6


def test_foreign_and_damaged_files_are_refused(state, weights, tmp_path):
    file = tmp_path / "x.pth"
    for content, message in ((state | {"fc.bias": torch.zeros(1000)}, "fc.bias"), (Path("x"), "Weights only load"),
                             (weights.read_bytes()[:50_000_000], "")):
        torch.save(content, file)
        if not message:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=f"x.pth cannot be used.*{message}"):
            inception.load_inception(file)


def test_the_download_is_whole_or_nothing_and_is_used_again(tmp_path, weights, monkeypatch):
    """From a file in the place of the address"""
    folder, sha256 = tmp_path / "hub/checkpoints", hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URL", (tmp_path / "w.pth").as_uri())
    with pytest.raises(ValueError, match=f"{folder / 'w.pth'} cannot be used .*Fetch .*--inception FILE"):
        inception.load_inception()
    (tmp_path / "w.pth").symlink_to(weights)  # whole, but not the published file
    with pytest.raises(ValueError, match="hash"):
        inception.load_inception()
    assert not list(folder.iterdir())
    monkeypatch.setattr(inception, "SHA256", sha256)
    for address in (inception.URL, "http://127.0.0.1:9/w.pth"):
        monkeypatch.setattr(inception, "URL", address)
        net = inception.load_inception()
        assert net.name == str(folder / "w.pth") and net.about == {"network_sha256": sha256, "resize": "clean"}


def test_random_weights_are_the_same_everywhere():
    """The numbers of docs/measured.md rest on them."""
    first = inception.load_inception("random").Conv2d_1a_3x3.conv.weight[0, 0, 0]
    assert first.tolist() == pytest.approx([-0.021867, -0.357320, 0.005166], abs=1e-5)
