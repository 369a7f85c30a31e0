"""frechet.py against scipy's matrix root, and its files."""
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import frechet


def draw(rng, dim, n, scale=1.0, mean=0.0):
    """n features with spreads from 0.1 to 1 times the scale, turned to a random direction"""
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return rng.standard_normal((n, dim)) * np.geomspace(0.1, 1, dim) @ turn * scale + mean


def scipys(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)  # pytorch-fid's way
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real


def exact(f1, f2):
    """From the features themselves: no covariance is rounded, so it holds for few pictures too"""
    c1, c2 = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (f1, f2))
    root = np.linalg.svd(c1 @ c2.T, compute_uv=False).sum()
    return ((f1.mean(0) - f2.mean(0)) ** 2).sum() + (c1 ** 2).sum() + (c2 ** 2).sum() - 2 * root


@settings(max_examples=20)
@given(st.integers(0, 2 ** 32 - 1), st.integers(2, 40), st.integers(2, 130), st.integers(2, 130),
       st.sampled_from([1e-3, 0.3, 1.0, 30.0]))
def test_equal_to_scipy_for_few_and_many_pictures(seed, dim, n1, n2, scale):
    rng = np.random.default_rng(seed)
    f, g = draw(rng, dim, n1, 1.0, 5.0), draw(rng, dim, n2, scale, 5.1)
    a, b = frechet.gaussian(f), frechet.gaussian(g)
    largest = max(1, scale ** 2)
    assert frechet.distance(*a, *b) == pytest.approx(exact(f, g), rel=1e-6, abs=1e-9 * largest)
    assert frechet.distance(*a, *b) == pytest.approx(frechet.distance(*b, *a), rel=1e-9, abs=1e-12 * largest)
    assert 0 <= frechet.distance(*b, *b) <= 1e-9 * largest
    if min(n1, n2) > 2 * dim:  # elsewhere scipy's root is rounded more
        assert frechet.distance(*a, *b) == pytest.approx(scipys(*a, *b), rel=1e-6)


def test_known_distances():
    zero, eye = np.zeros(3), np.eye(3)
    assert frechet.distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(3)  # (2 - 3)^2, three times
    assert frechet.distance(zero, 0 * eye, [3, 4, 0], 0 * eye) == 25
    assert frechet.distance(zero, np.diag([1.0, 0, 0]), zero, np.diag([0, 1.0, 0])) == pytest.approx(2)
    # a negative distance within what float32 may do to a covariance, and beyond rounding, is not hidden
    bent = zero, np.diag([1, 1, -9e-5])
    assert frechet.distance(*bent, *bent) == pytest.approx(-1.8e-4)


def test_files_of_something_else_and_damaged_ones_are_refused(tmp_path):
    file, zero, eye = tmp_path / "x.npz", np.zeros(4), np.eye(4)
    for mu, sigma, message in (
            (zero, np.eye(3), r"mu \(4,\) and sigma \(3, 3\)"), (zero * np.nan, eye, "not finite"),
            (zero, np.diag([1, 1, 1, -0.5]), "negative eigenvalue, -0.5"),
            (zero, np.array([{}], object), "allow_pickle=False")):
        np.savez(file, mu=mu, sigma=sigma)
        with pytest.raises(ValueError, match=f"x.npz cannot be used .*{message}"):
            frechet.load_statistics(file)
    frechet.save_statistics(file, zero, eye, {})
    for content in (b"text", file.read_bytes()[:-30]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="x.npz cannot be used .*an .npz of mu and sigma"):
            frechet.load_statistics(file)
