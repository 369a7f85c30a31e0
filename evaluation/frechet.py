"""
The Fréchet distance between two sets of features, each summed up as a Gaussian (Heusel et al. 2017), with numpy alone.

    some = Statistics(2048)
    some.add(features)                                      # (n, 2048), as often as there are batches
    save("ours.npz", some.mu, some.sigma, n=some.n)
    print(distance(some.mu, some.sigma, *load("reference.npz")[:2]))

Files are pytorch-fid's: an .npz of mu and sigma.
"""
import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np


class Statistics:
    """Mean and covariance of features that come in batches, in float64.

    What it keeps is plain sums: n, sum (dim) and outer (dim,dim), the sum of f f^T, so the batches do not matter but
    for rounding. The price is cancellation: sigma loses 2 log10(mean / spread) of its 16 digits, which are 6 for a mean
    1000 times the spread.
    """

    def __init__(self, dim):
        self.n, self.sum, self.outer = 0, np.zeros(dim), np.zeros((dim, dim))

    def add(self, features):
        """features (n,dim) of any kind of number; ValueError for another width or what is not finite"""
        f = np.asarray(features, np.float64)
        if f.ndim != 2 or f.shape[1] != len(self.sum):
            raise ValueError(f"features of shape {f.shape} do not fit statistics of {len(self.sum)}: (n, "
                             f"{len(self.sum)}) is needed, all from one network")
        if not np.isfinite(f).all():
            bad = np.flatnonzero(~np.isfinite(f).all(1))
            raise ValueError(f"features of {len(bad)} of {len(f)} pictures are not finite, the first is number "
                             f"{bad[0]} of its batch: look at that picture, or was the network run in half precision?")
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    @property
    def mu(self):
        """(dim), the mean"""
        if self.n < 1:
            raise ValueError("a mean needs at least 1 picture, and there is none")
        return self.sum / self.n

    @property
    def sigma(self):
        """(dim,dim), the covariance as np.cov has it: divided by n - 1"""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, and there {'is' if self.n else 'are'} {self.n}")
        return (self.outer - self.n * np.outer(self.mu, self.mu)) / (self.n - 1)


def distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): a float; 6 s at 2048 on one core.

    ValueError if the two do not fit together, or one is no mean and covariance.
    """
    mu1, sigma1 = check(mu1, sigma1, "the first statistics")
    mu2, sigma2 = check(mu2, sigma2, "the second statistics")
    if mu1.shape != mu2.shape:
        raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared: they are from "
                         "different networks (Inception has 2048)")
    # With sigma1 = A A^T and sigma2 = B B^T, the root's trace is the sum of A^T B's singular values. Taking them, and
    # not the roots of eigenvalues of a product, keeps 1e-16 of noise from becoming 1e-8, 2048 times.
    singular = np.linalg.svd(factor(sigma1, "first").T @ factor(sigma2, "second"), compute_uv=False)
    total = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2)
    value = float(total - 2 * singular.sum())
    # a little below 0 is rounding, and 0; more comes of a sigma that is not quite a covariance, and is not hidden
    return 0.0 if -1e-9 * total < value < 0 else value


def factor(sigma, which):
    """A (dim,rank) with sigma = A A^T"""
    values, vectors = np.linalg.eigh(sigma)
    # float32 files have negative eigenvalues by rounding, about 1e-6 of the largest
    if values[0] < -1e-4 * abs(values[-1]):
        raise ValueError(f"the {which} statistics' sigma is no covariance: it has a negative eigenvalue, "
                         f"{values[0]:.3g}, where the largest is {values[-1]:.3g}. Make them again")
    real = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps  # the others are noise around 0
    return vectors[:, real] * np.sqrt(values[real])


def check(mu, sigma, whose):
    """mu (dim) and sigma (dim,dim) as float64, or a ValueError that names `whose` they are"""
    try:
        mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{whose}: mu and sigma must be real numbers") from None
    if mu.ndim != 1 or not mu.size or sigma.shape != mu.shape * 2:
        raise ValueError(f"{whose}: mu {mu.shape} and sigma {sigma.shape} must be (dim) and (dim, dim), as those of "
                         "Inception are (2048) and (2048, 2048)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{whose}: mu or sigma has values that are not finite. Make them again")
    if np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max():
        raise ValueError(f"{whose}: sigma is no covariance, as it is not symmetric. Make them again")
    return mu, sigma


def save(path, mu, sigma, **about):
    """Write statistics as pytorch-fid reads them. about: what made them, in words and numbers (kept as JSON)."""
    path = Path(path)
    mu, sigma = check(mu, sigma, f"what was to be written to {path}")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, mu=mu, sigma=sigma, about=np.array(json.dumps(about)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """(mu, sigma, about) of an .npz of this file's or another project's, whose about is {}. Nothing is unpickled."""
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it holds one array without a name")
        with opened as file:
            missing = [n for n in ("mu", "sigma") if n not in file.files]
            if missing:
                raise ValueError(f"it has no {' and no '.join(missing)}, but {', '.join(file.files) or 'nothing'}")
            mu, sigma = file["mu"], file["sigma"]
            about = str(file["about"]) if "about" in file.files else "{}"
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a whole file of statistics ({error}): an .npz of mu and sigma is needed, as "
                         "pytorch-fid --save-stats writes it") from None
    mu, sigma = check(mu, sigma, str(path))
    return mu, sigma, said(about)


def said(text):
    """The dict of a string of JSON; {} for anything else, as another project may use that name for its own"""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
