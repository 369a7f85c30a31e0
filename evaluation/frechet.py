"""
The Fréchet distance between two sets of features, each described by a Gaussian (Heusel et al. 2017), with numpy alone.

    ours = Statistics(2048)
    ours.add(features)                                      # (n, 2048), once for each batch
    save("ours.npz", ours.mu, ours.sigma, pictures=ours.n)
    print(distance(ours.mu, ours.sigma, *load("reference.npz")[:2]))

The files are pytorch-fid's: an .npz with mu and sigma.
"""
import json
import pickle
import zipfile
import zlib

import numpy as np

from common.files import write_atomic


class Statistics:
    """The mean and covariance of features that come in batches, in float64.

    It keeps plain sums, n, sum (dim) and outer (dim,dim) = sum of f f^T, so batches only matter for rounding. The price
    is cancellation: sigma loses 2 log10(mean / spread) of its 16 digits, which are 6 for a mean 1000 times the spread.
    """

    def __init__(self, dim):
        self.n, self.sum, self.outer = 0, np.zeros(dim), np.zeros((dim, dim))

    def add(self, features):
        """Add features (n,dim) of any kind of number. Refuse values that are not finite."""
        f = np.asarray(features, np.float64)
        bad = np.flatnonzero(~np.isfinite(f).all(1))
        if len(bad):
            raise ValueError(f"features of {len(bad)} of {len(f)} pictures are not finite, first number {bad[0]}: look "
                             "at that picture, or was the network run in half precision?")
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    @property
    def mu(self):
        """Return the mean, (dim)."""
        return self.sum / self.n

    @property
    def sigma(self):
        """Return the covariance, (dim,dim), divided by n - 1 as in np.cov."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, not {self.n}")
        return (self.outer - self.n * np.outer(self.mu, self.mu)) / (self.n - 1)


def distance(mu1, sigma1, mu2, sigma2):
    """Return |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). It takes 6 s at 2048 on one core."""
    mu1, sigma1, root1 = checked(mu1, sigma1, "the first statistics")
    mu2, sigma2, root2 = checked(mu2, sigma2, "the second statistics")
    if mu1.shape != mu2.shape:
        raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features are of different networks")
    # With sigma1 = A A^T and sigma2 = B B^T, the root's trace is the sum of A^T B's singular values. Taking them, and
    # not the roots of eigenvalues of a product, keeps 1e-16 of noise from becoming 1e-8, 2048 times.
    singular = np.linalg.svd(root1.T @ root2, compute_uv=False)
    total = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2)
    value = float(total - 2 * singular.sum())
    # A little below 0 is rounding, and becomes 0. More comes of a sigma that is not quite a covariance, and stays.
    return 0.0 if -1e-9 * total < value < 0 else value


def checked(mu, sigma, source):
    """Return mu (dim), sigma (dim,dim) and A (dim,rank) with sigma = A A^T, in float64. `source` is for the errors."""
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or not mu.size or sigma.shape != mu.shape * 2:
        raise ValueError(f"{source}: mu {mu.shape} and sigma {sigma.shape} must be (dim) and (dim, dim)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{source}: mu or sigma has values that are not finite")
    if np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max():
        raise ValueError(f"{source}: sigma is no covariance, as it is not symmetric")
    values, vectors = np.linalg.eigh(sigma)
    # float32 files have negative eigenvalues by rounding, about 1e-6 of the largest
    if values[0] < -1e-4 * abs(values[-1]):
        raise ValueError(f"{source}: sigma is no covariance, as it has a negative eigenvalue, {values[0]:.3g}")
    real = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps  # the others are noise around 0
    return mu, sigma, vectors[:, real] * np.sqrt(values[real])


def save(path, mu, sigma, **about):
    """Write statistics as pytorch-fid reads them. `about` says how they were made and is kept as JSON."""
    write_atomic(path, lambda file: np.savez(file, mu=mu, sigma=sigma, about=np.array(json.dumps(about))))


def load(path):
    """Return (mu, sigma, about) of an .npz. `about` is {} in another project's file. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma, _ = checked(file["mu"], file["sigma"], str(path))
            about = str(file["about"]) if "about" in file.files else ""
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error,
            pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a whole file of statistics ({error}): make it again, as an .npz of mu and "
                         "sigma") from None
    # another project may use that name for something else
    return mu, sigma, json.loads(about) if about.startswith("{") else {}
