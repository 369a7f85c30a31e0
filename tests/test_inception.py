"""inception.py: features and resized pictures against those of pytorch-fid, torch-fidelity and clean-fid (stored)."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_inception_values import kept, pictures, random_state
from PIL import Image

from evaluation import inception

VALUES = Path(__file__).parent / "data/inception_values.npz"
RANGES = {"clean": (-1, 127 / 128), "tensorflow": (-1, 127 / 128), "pytorch": (-1, 1)}


@pytest.fixture(scope="module")
def values():
    with np.load(VALUES) as file:
        return dict(file)


@pytest.fixture(scope="module")
def state():
    with torch.device("meta"):
        net = inception.Inception()
    return random_state({n: t.shape for n, t in net.state_dict().items()})


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    """A random file in the format of the published one, which is older than torch's zip files"""
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file


@pytest.fixture(scope="module")
def net(weights):
    return inception.load(weights)


@pytest.mark.parametrize("project, resize", [("pytorch_fid", "pytorch"), ("torch_fidelity", "tensorflow")])
def test_features_equal_the_published_codes(net, values, project, resize):
    ours = inception.features(net, pictures(), resize, "cpu")
    theirs = values[project]
    assert ours.shape == theirs.shape == (3, 2048) and ours.dtype == np.float32
    assert 0.5 < theirs.std() < 2 and np.abs(theirs - theirs.mean(0)).max() > 0.1  # neither flat nor all the same
    assert np.abs(ours - theirs).max() <= 1e-4


def test_a_pictures_features_do_not_depend_on_the_batch(net):
    together = inception.features(net, pictures(), "clean", "cpu")
    assert np.abs(inception.features(net, pictures()[2:], "clean", "cpu") - together[2:]).max() <= 1e-5
    assert inception.features(net, [], "clean", "cpu").shape == (0, 2048)


# "clean" was equal to the last bit too, but PIL is compiled code, which another processor may round otherwise
@pytest.mark.parametrize("resize, tolerance", [("tensorflow", 0), ("clean", 1e-6)])
def test_resized_pictures_equal_the_published_codes(values, resize, tolerance):
    for picture, theirs in zip(pictures(), values[resize], strict=True):
        ours = inception.RESIZES[resize](picture).flatten()[kept()]
        assert np.abs(ours.numpy() - (theirs - 128) / 128).max() <= tolerance


def test_pytorch_resizes_as_pytorch_fid_does():
    for picture in pictures():
        x = torch.from_numpy(picture.transpose(2, 0, 1).copy()).float().div(255)[None]  # torchvision's ToTensor
        theirs = 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)[0] - 1
        assert torch.equal(inception.RESIZES["pytorch"](picture), theirs)


@pytest.mark.parametrize("resize", inception.RESIZES)
@pytest.mark.parametrize("size", [(1, 1), (512, 512), (299, 299), (40, 700)])
def test_resized_pictures_shapes_ranges_and_kinds(resize, size):
    convert, (low, high) = inception.RESIZES[resize], RANGES[resize]
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    out = convert(picture)
    assert out.shape == (3, 299, 299) and out.dtype == torch.float32
    assert low <= out.min() + 1e-6 and out.max() <= high + 1e-6
    assert torch.equal(out, convert(Image.fromarray(picture)))  # PIL's size is (width, height)
    for level, end in ((0, low), (255, high)):
        assert (convert(np.full_like(picture, level)) - end).abs().max() <= 1e-6


def test_the_resizes_differ():
    # else whoever mixes them up would not be noticed
    a, b, c = (convert(pictures()[2]) for convert in inception.RESIZES.values())
    assert min((a - b).abs().mean(), (b - c).abs().mean(), (a - c).abs().mean()) > 0.01


@pytest.mark.parametrize(
    "picture, message",
    [
        (np.zeros((8, 8), np.uint8), r"uint8 \(H,W,3\), not uint8 \(8, 8\)"),
        (np.zeros((8, 8, 3)), "not float64"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        (Image.new("L", (8, 8)), "is L, not RGB"),
        (Image.new("RGBA", (8, 8)), "is RGBA, not RGB"),
    ],
)
def test_what_is_no_rgb_picture_is_refused(picture, message):
    for convert in inception.RESIZES.values():
        with pytest.raises(ValueError, match=message):
            convert(picture)


def test_wrong_inputs_are_refused(net):
    good = torch.zeros(1, 3, 299, 299)
    for images in (good[:, :, :256, :256], good.half(), good[0]):
        with pytest.raises(ValueError, match="Inception takes float32"):
            net(images)
    with pytest.raises(ValueError, match="'bicubic' is none of clean, tensorflow, pytorch"):
        inception.features(net, pictures(), "bicubic", "cpu")


def test_neither_autocast_nor_tf32_nor_gradients(net, monkeypatch):
    images, seen = inception.pytorch(pictures()[0])[None], []
    pool = inception.POOLS["max"]  # runs once in a pass
    monkeypatch.setitem(inception.POOLS, "max", lambda x: seen.append(torch.backends.cudnn.allow_tf32) or pool(x))
    plain = net(images.clone().requires_grad_())
    for tf32 in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(images), plain)
        assert torch.backends.cudnn.allow_tf32 == tf32
    assert seen == [False] * 3 and not plain.requires_grad and plain.dtype == torch.float32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(ZeroDivisionError), inception.full_precision(torch.device("cpu")):
        1 / 0  # noqa: B018
    assert torch.backends.cudnn.allow_tf32


def test_the_network_is_the_published_files(net, weights):
    # 94 convolutions, each with 4 tensors and a count of its batch norm, and fc
    assert len(net.state_dict()) == 94 * 6 + 2 == 566
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest() and net.published is False
    assert net.path == str(weights)
    # the published file has some kB more than its tensors: names and sizes
    size = sum(t.nbytes for t in net.state_dict().values())
    assert 0 < inception.BYTES - size < 200_000 and abs(weights.stat().st_size - inception.BYTES) < 100_000


def foreign(state, kind):
    """(what a file holds, what the error says)"""
    fc = {n: t for n, t in state.items() if n.startswith("fc.")}
    match kind:
        case "torchvision's":
            return state | {"AuxLogits.conv0.conv.weight": fc["fc.bias"], "fc.bias": torch.zeros(1000)}, (
                "in 2 tensors: left over AuxLogits.conv0.conv.weight; fc.bias is \\(1000,\\) and not \\(1008,\\)"
            )
        case "part":
            return {n: t for n, t in state.items() if "Mixed_7c" not in n}, "in 54 tensors: missing Mixed_7c.branch1x1"
        case "another":
            return {"weight": torch.zeros(1)}, "in 567 tensors: missing Conv2d_1a_3x3.conv.weight"
        case "numbers":
            return {"fc.weight": 1}, "does not hold named tensors"
        case "a list":
            return [torch.zeros(1)], "does not hold named tensors"
        case "code":
            return Path("x"), "does not open as PyTorch weights"


@pytest.mark.parametrize("kind", ["torchvision's", "part", "another", "numbers", "a list", "code"])
def test_foreign_files_are_refused(state, tmp_path, kind):
    content, message = foreign(state, kind)
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message) as error:
        inception.load(tmp_path / "x.pth")
    assert "x.pth" in str(error.value) and inception.URLS[0] in str(error.value)


def test_damaged_files_are_refused(weights, tmp_path):
    file = tmp_path / "x.pth"
    whole = weights.read_bytes()
    for content in (b"", b"<html>not found</html>", whole[:100], whole[: len(whole) // 2], b"PK\x03\x04" + bytes(100)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="does not open as PyTorch weights"):
            inception.load(file)
    with pytest.raises(ValueError, match="no file .*nothing.pth"):
        inception.load(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="does not open"):
        inception.load(tmp_path)


def test_half_precision_weights_become_float32(state, tmp_path):
    half = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    torch.save(half, tmp_path / "half.pth")
    tensors = inception.load(tmp_path / "half.pth").state_dict().values()
    assert {t.dtype for t in tensors} == {torch.float32, torch.int64}


# ---------------------------------------------------------------------------------------------------------------------
# The download, from files in the place of addresses


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache folder, for addresses where nothing is"""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URLS", tuple((tmp_path / name / "w.pth").as_uri() for name in ("first", "second")))
    return tmp_path / "hub/checkpoints"


def offer(tmp_path, name, content):
    (tmp_path / name).mkdir()
    (tmp_path / name / "w.pth").write_bytes(content)


def test_without_a_network_the_error_says_what_to_do(hub):
    with pytest.raises(ValueError, match="could not be downloaded") as error:
        inception.load()
    for part in (*inception.URLS, inception.SHA256, str(hub / "w.pth"), "--inception FILE", "95,628,359 bytes"):
        assert part in str(error.value)
    assert not list(hub.iterdir())


def test_a_download_is_kept_and_used_again(hub, tmp_path, weights, monkeypatch):
    monkeypatch.setattr(inception, "SHA256", inception.sha256(weights))
    offer(tmp_path, "first", b"<html>sign in</html>")  # so the second is asked
    offer(tmp_path, "second", weights.read_bytes())
    net = inception.load()
    assert net.published and net.path == str(hub / "w.pth") and [f.name for f in hub.iterdir()] == ["w.pth"]
    monkeypatch.setattr(inception, "URLS", ("http://127.0.0.1:9/w.pth",) * 2)
    assert inception.load().published


def test_what_came_damaged_is_not_kept(hub, tmp_path, weights):
    offer(tmp_path, "first", weights.read_bytes())  # whole, but not the published file
    with pytest.raises(ValueError, match=f"came with sha256 {inception.sha256(weights)}"):
        inception.load()
    assert not list(hub.iterdir())
    (hub / "w.pth").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is not the published file.*Delete it"):
        inception.load()


def test_torch_fidelitys_copy_in_the_cache_is_found(hub, weights, monkeypatch):
    monkeypatch.setattr(inception, "URLS", ("http://127.0.0.1:9/pt.pth", "http://127.0.0.1:9/weights.pth"))
    monkeypatch.setattr(inception, "SHA256", inception.sha256(weights))
    hub.mkdir(parents=True)
    (hub / "weights.pth").symlink_to(weights)
    assert inception.load().path == str(hub / "weights.pth")


def test_the_addresses_file_names_carry_the_hash():
    for url in inception.URLS:
        assert inception.SHA256[:8] in url and url.startswith("https://github.com/")
    assert len(inception.SHA256) == 64
