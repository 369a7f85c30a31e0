"""inception.py: features and resized pictures against those of pytorch-fid, torch-fidelity and clean-fid (stored)."""
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from make_inception_values import kept, pictures, random_state
from PIL import Image

from evaluation import features, inception

VALUES = Path(__file__).parent / "data/inception_values.npz"
RANGES = {"clean": (-1, 127 / 128), "tensorflow": (-1, 127 / 128), "pytorch": (-1, 1)}


@pytest.fixture(scope="module")
def values():
    with np.load(VALUES) as file:
        return dict(file)


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    """A random file in the format of the published one, which is older than torch's zip files"""
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file


@pytest.fixture(scope="module")
def net(weights):
    return inception.load(weights, resize="tensorflow")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("project, resize", [("pytorch_fid", "pytorch"), ("torch_fidelity", "tensorflow")])
def test_features_equal_the_published_codes(net, values, project, resize):
    ours = net.image([inception.RESIZES[resize](image) for image in pictures()]).numpy()
    theirs = values[project]
    assert ours.shape == theirs.shape == (3, 2048) and ours.dtype == np.float32
    assert 0.5 < theirs.std() < 2 and np.abs(theirs - theirs.mean(0)).max() > 0.1  # neither flat nor all the same
    assert np.abs(ours - theirs).max() <= 1e-4
    alone = net.image([inception.RESIZES[resize](pictures()[2])]).numpy()
    assert np.abs(alone - ours[2:]).max() <= 1e-5  # whatever the batch


def test_features_of_files(net, values, tmp_path):
    """As eval_fid.py takes them, with the resize that the network was loaded with"""
    Image.fromarray(pictures()[0]).save(tmp_path / "0.png")
    sums = features.measure({"fid": net}, [(tmp_path / "0.png", None)], 299, 0, 2, "test")
    assert np.abs(sums.statistics["fid"].mu - values["torch_fidelity"][0]).max() <= 1e-4


# "clean" was equal to the last bit too, but PIL is compiled code, which another processor may round otherwise
@pytest.mark.parametrize("resize, tolerance", [("tensorflow", 0), ("clean", 1e-6)])
def test_resized_pictures_equal_the_published_codes(values, resize, tolerance):
    for picture, theirs in zip(pictures(), values[resize], strict=True):
        ours = inception.RESIZES[resize](picture).flatten()[kept()]
        assert np.abs(ours.numpy() - (theirs - 128) / 128).max() <= tolerance


@pytest.mark.parametrize("resize", inception.RESIZES)
def test_resized_pictures_shapes_ranges_and_kinds(resize):
    convert, (low, high) = inception.RESIZES[resize], RANGES[resize]
    for size in ((1, 1), (512, 512), (299, 299), (40, 700)):
        picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        out = convert(picture)
        assert out.shape == (3, 299, 299) and out.dtype == torch.float32
        assert low <= out.min() + 1e-6 and out.max() <= high + 1e-6
        assert torch.equal(out, convert(Image.fromarray(picture)))  # PIL's size is (width, height)
        for level, end in ((0, low), (255, high)):
            assert (convert(np.full_like(picture, level)) - end).abs().max() <= 1e-6


def test_neither_autocast_nor_tf32_nor_gradients(net, monkeypatch):
    images, seen = inception.pytorch(pictures()[0])[None], []
    pool = inception.POOLS["max"]  # runs once in a pass
    monkeypatch.setitem(inception.POOLS, "max", lambda x: seen.append(torch.backends.cudnn.allow_tf32) or pool(x))
    plain = net(images.clone().requires_grad_())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(images), plain)
    assert torch.backends.cudnn.allow_tf32 and seen == [False] * 2
    assert not plain.requires_grad and plain.dtype == torch.float32


def test_the_network_is_the_published_files(net, weights):
    # 94 convolutions, each with 4 tensors and a count of its batch norm, and fc
    assert len(net.state_dict()) == 94 * 6 + 2 == 566
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.about == {"network_sha256": sha256(weights), "published": False, "resize": "tensorflow"}
    # the published file of 95,628,359 bytes has some kB more than its tensors: names and sizes
    size = sum(t.nbytes for t in net.state_dict().values())
    assert 0 < 95_628_359 - size < 200_000 and abs(weights.stat().st_size - 95_628_359) < 100_000


@pytest.mark.parametrize("kind, message", [
    ("torchvision's", "AuxLogits.*fc.bias"), ("part", "Missing key.*Mixed_7c"), ("a list", "list"), ("code", "x.pth"),
    ("cut", "x.pth"), ("text", "x.pth"), ("nothing", "no file"), ("TorchScript", "it is TorchScript"),
    ("a picture", "no file of torch's")])
def test_foreign_and_damaged_files_are_refused(state, weights, tmp_path, kind, message):
    file = tmp_path / "x.pth"
    foreign = {
        "torchvision's": state | {"AuxLogits.conv0.conv.weight": state["fc.bias"], "fc.bias": torch.zeros(1000)},
        "part": {n: t for n, t in state.items() if "Mixed_7c" not in n}, "a list": [torch.zeros(1)], "code": Path("x")}
    if kind in foreign:
        torch.save(foreign[kind], file)
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), file)
    elif kind == "a picture":
        Image.new("RGB", (8, 8)).save(file, "PNG")
    elif kind != "nothing":
        file.write_bytes(weights.read_bytes()[:50_000_000] if kind == "cut" else b"<html>not found</html>")
    with pytest.raises(ValueError, match=message) as error:
        inception.load(file)
    assert "x.pth" in str(error.value) and inception.URL in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice is to unpickle unsafely


def test_the_download_is_whole_or_nothing_and_is_used_again(tmp_path, weights, monkeypatch):
    """From a file in the place of the address"""
    folder = tmp_path / "hub/checkpoints"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URL", (tmp_path / "w.pth").as_uri())
    with pytest.raises(ValueError, match="could not be downloaded") as error:
        inception.load()
    for part in (inception.URL, inception.SHA256, str(folder / "w.pth"), "--inception FILE"):
        assert part in str(error.value)
    (tmp_path / "w.pth").write_bytes(weights.read_bytes())  # whole, but not the published file
    with pytest.raises(ValueError, match="hash"):
        inception.load()
    assert not list(folder.iterdir())
    monkeypatch.setattr(inception, "SHA256", sha256(weights))
    assert inception.load().about["published"] and [f.name for f in folder.iterdir()] == ["w.pth"]
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/w.pth")
    assert inception.load().about["published"]
    (folder / "w.pth").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is not the published file.*Delete it"):
        inception.load()


def test_random_weights_are_the_same_everywhere():
    nets = [inception.load("random") for _ in range(2)]
    assert nets[0].about == nets[1].about and not nets[0].about["published"] and nets[0].about["resize"] == "clean"
    features = nets[0].image([nets[0].prepare(Image.new("RGB", (64, 64), color)) for color in ("red", "blue")])
    assert 0.01 < features.std() < 100 and (features[0] - features[1]).abs().mean() > 0.01
