"""The Fréchet distance between two sets of features, each described by a Gaussian (Heusel et al. 2017)."""
import io
import json

import numpy as np

from common.files import read_bytes, reading, whole


def gaussian(features):
    """Return the mean (dim) and the covariance (dim,dim) of features (n,dim), in float64."""
    return features.mean(0, dtype=np.float64), np.cov(features, rowvar=False)


def distance(mu1, sigma1, mu2, sigma2):
    """Return |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))."""
    mu1, sigma1, root1 = checked(mu1, sigma1)
    mu2, sigma2, root2 = checked(mu2, sigma2)
    # With sigma1 = A A^T and sigma2 = B B^T, the root's trace is the sum of A^T B's singular values. Taking them, and
    # not the roots of eigenvalues of a product, keeps 1e-16 of noise from becoming 1e-8, 2048 times.
    singular = np.linalg.svd(root1.T @ root2, compute_uv=False)
    total = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2)
    value = float(total - 2 * singular.sum())
    # A little below 0 is rounding, and becomes 0. More comes of a sigma that is not quite a covariance, and stays.
    return 0.0 if -1e-9 * total < value < 0 else value


def checked(mu, sigma):
    """Return mu (dim), sigma (dim,dim) and A (dim,rank) with sigma = A A^T, in float64."""
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or not mu.size or sigma.shape != mu.shape * 2:
        raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} must be (dim) and (dim, dim)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("mu or sigma is not finite, as of damaged weights, or of a single picture")
    values, vectors = np.linalg.eigh(sigma)
    if values[0] < -1e-4 * abs(values[-1]):  # in files of float32, rounding makes it -1e-6 of the largest
        raise ValueError(f"sigma has a negative eigenvalue, {values[0]:.3g}")
    real = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps  # the others are noise around 0
    return mu, sigma, vectors[:, real] * np.sqrt(values[real])


def save_statistics(path, mu, sigma, about):
    """Write an .npz as pytorch-fid reads it, and how it was made besides."""
    with whole(path) as temporary:
        np.savez(temporary, mu=mu, sigma=sigma, about=np.array(json.dumps(about)))


def load_statistics(path):
    """Return (mu, sigma, how they were made) of an .npz; pytorch-fid's does not say that."""
    with reading(path, ": statistics are an .npz of mu and sigma"):
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
            mu, sigma, _ = checked(file["mu"], file["sigma"])
            return mu, sigma, dict(json.loads(str(file["about"]))) if "about" in file else {}
