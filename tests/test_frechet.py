"""frechet.py against scipy's matrix root and numpy's covariance."""
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import frechet

SEEDS = st.integers(0, 2 ** 32 - 1)
SCALES = st.sampled_from([1e-3, 0.3, 1.0, 30.0])


def draw(rng, dim, n, scale=1.0, mean=0.0):
    """n features with spreads from 0.1 to 1 times the scale, turned to a random direction"""
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return rng.standard_normal((n, dim)) * np.geomspace(0.1, 1, dim) @ turn * scale + mean


def gaussian(features):
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def scipys(mu1, sigma1, mu2, sigma2):
    """pytorch-fid's way; where the root is not finite it adds 1e-6 to the diagonal, which moves distances too much"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular matrices
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            eye = 1e-14 * np.eye(len(mu1))
            root = scipy.linalg.sqrtm((sigma1 + eye) @ (sigma2 + eye))
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real


def exact(f1, f2):
    """From the features themselves: no covariance is rounded, so it holds for few pictures too"""
    c1, c2 = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (f1, f2))
    root = np.linalg.svd(c1 @ c2.T, compute_uv=False).sum()
    return ((f1.mean(0) - f2.mean(0)) ** 2).sum() + (c1 ** 2).sum() + (c2 ** 2).sum() - 2 * root


@settings(max_examples=80, deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(2, 130), st.integers(2, 130), SCALES)
def test_equal_to_scipy_for_few_and_many_pictures(seed, dim, n1, n2, scale):
    rng = np.random.default_rng(seed)
    f, g = draw(rng, dim, n1, 1.0, 5.0), draw(rng, dim, n2, scale, 5.1)
    a, b = gaussian(f), gaussian(g)
    largest = max(1, scale ** 2)
    assert frechet.distance(*a, *b) == pytest.approx(exact(f, g), rel=1e-6, abs=1e-9 * largest)
    assert frechet.distance(*a, *b) == pytest.approx(frechet.distance(*b, *a), rel=1e-9, abs=1e-12 * largest)
    assert 0 <= frechet.distance(*b, *b) <= 1e-9 * largest
    full_rank = min(n1, n2) > 2 * dim  # elsewhere scipy's root is rounded more
    assert frechet.distance(*a, *b) == pytest.approx(scipys(*a, *b), rel=1e-6, abs=0 if full_rank else 1e-4 * largest)


def test_known_distances():
    zero, eye = np.zeros(3), np.eye(3)
    assert frechet.distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(3)  # (2 - 3)^2, three times
    assert frechet.distance(zero, 0 * eye, [3, 4, 0], 0 * eye) == 25
    assert frechet.distance(zero, np.diag([1.0, 0, 0]), zero, np.diag([0, 1.0, 0])) == pytest.approx(2)
    # a negative distance within what float32 may do to a covariance, and beyond rounding, is not hidden
    bent = zero, np.diag([1, 1, -9e-5])
    assert frechet.distance(*bent, *bent) == pytest.approx(-1.8e-4)
    rng = np.random.default_rng(0)
    a, b = gaussian(draw(rng, 64, 40)), gaussian(draw(rng, 64, 40))
    rounded = [x.astype(np.float32) for x in a]
    assert frechet.distance(*rounded, *b) == pytest.approx(frechet.distance(*a, *b), abs=1e-3)
    wide = gaussian(rng.standard_normal((60, 512)) * 3)  # of far fewer pictures than features
    assert frechet.distance(*wide, wide[0] + 1, wide[1]) == pytest.approx(512, abs=1e-6)


@pytest.mark.parametrize("mu, sigma, message", [
    (np.zeros(4), np.eye(3), r"mu \(4,\) and sigma \(3, 3\)"), (np.zeros((1, 4)), np.eye(4), r"mu \(1, 4\)"),
    (np.zeros(0), np.zeros((0, 0)), r"mu \(0,\)"), (np.array([0, 0, 0, np.nan]), np.eye(4), "not finite"),
    (np.zeros(4), np.full((4, 4), np.inf), "not finite"), (np.zeros(4), -np.eye(4), "negative eigenvalue"),
    (np.zeros(4), np.diag([1, 1, 1, -0.5]), "negative eigenvalue, -0.5"),
    (np.zeros(4), np.tril(np.ones((4, 4))), "not symmetric")])
def test_what_is_no_mean_and_covariance_is_refused(tmp_path, mu, sigma, message):
    with pytest.raises(ValueError, match=f"second statistics.*{message}"):
        frechet.distance(np.zeros(4), np.eye(4), mu, sigma)
    np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=f"x.npz.*{message}"):
        frechet.load(tmp_path / "x.npz")


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 20), st.lists(st.integers(0, 30), min_size=1, max_size=6), st.sampled_from([0, 1, 1e3]))
def test_sums_of_float32_equal_numpys_mean_and_covariance(seed, dim, batches, mean):
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal((n, dim)) + mean).astype(np.float32) for n in [2, *batches]]
    whole, sums = np.concatenate(parts).astype(np.float64), frechet.Statistics(dim)
    for part in parts:
        sums.add(part)
    mu, sigma = gaussian(whole)
    assert sums.n == len(whole)
    np.testing.assert_allclose(sums.mu, mu, rtol=1e-12, atol=1e-12)
    assert np.abs(sums.sigma - sigma).max() <= 1e-6 * np.abs(sigma).max()


def test_too_few_or_wrong_features_are_refused():
    with pytest.raises(ValueError, match="statistics of 4 and of 3 features"):
        frechet.distance(np.zeros(4), np.eye(4), np.zeros(3), np.eye(3))
    sums = frechet.Statistics(3)
    sums.add(np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least 2 pictures, not 1"):
        sums.sigma  # noqa: B018
    with pytest.raises(ValueError, match="of 1 of 3 pictures are not finite, first number 2"):
        sums.add(np.array([[1, 1, 1], [1, 1, 1], [1, np.inf, 1]]))


def test_files_go_both_ways(tmp_path):
    mu, sigma = gaussian(draw(np.random.default_rng(0), 16, 40))
    about = {"n": 40, "resize": "clean", "network": "Inception"}
    frechet.save(tmp_path / "ours.npz", mu, sigma, **about)
    assert [f.name for f in tmp_path.iterdir()] == ["ours.npz"]
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch-fid does
        assert np.array_equal(file["mu"][:], mu) and np.array_equal(file["sigma"][:], sigma)
    more = {"arr_0": np.zeros((2, 4, 4, 3)), "mu_s": np.zeros(3), "pickled": np.array([{}], object)}
    np.savez(tmp_path / "others.npz", mu=mu, sigma=sigma, about=np.array("no JSON"))
    np.savez_compressed(tmp_path / "more.npz", mu=mu, sigma=sigma, **more)
    for name, says in (("ours", about), ("others", {}), ("more", {})):
        loaded = frechet.load(str(tmp_path / f"{name}.npz"))
        assert np.array_equal(loaded[0], mu) and np.array_equal(loaded[1], sigma) and loaded[2] == says


def test_other_and_damaged_files_are_refused(tmp_path):
    file = tmp_path / "x.npz"
    frechet.save(file, *gaussian(draw(np.random.default_rng(0), 16, 40)))
    whole = file.read_bytes()
    turned = bytearray(whole)
    turned[1000] ^= 1
    np.save(tmp_path / "array.npy", np.eye(4))
    np.savez(tmp_path / "half.npz", mu=np.zeros(4))
    np.savez(tmp_path / "code.npz", mu=np.zeros(4), sigma=np.array([{}], object))
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as other:
        other.writestr("mu", "text")
        other.writestr("sigma", "text")
    others = [(tmp_path / name).read_bytes() for name in ("array.npy", "half.npz", "code.npz", "text.zip")]
    for content in (b"", b"text", whole[:50], whole[:-30], bytes(turned), *others):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="x.npz is not a whole file"):
            frechet.load(file)


def test_neither_torch_nor_scipy_is_imported():
    code = "import sys; from evaluation import frechet; assert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
