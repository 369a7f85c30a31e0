"""muon.py against the singular value decomposition and against torch.optim.Muon."""

import pytest
import torch

from training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 6), (1, 5, 30)])
def test_updates_are_about_orthogonal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    out = orthogonal(x)
    lengths = u.mT @ out @ vh.mT  # in the singular vectors' coordinates: diagonal, near 1
    diagonal = lengths.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0.5).all() and (diagonal < 1.35).all()
    assert (lengths - torch.diag_embed(diagonal)).abs().max() < 0.05  # it computes in bfloat16


def test_steps_as_the_library_does():
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(16, 8, generator=g), torch.randn(8, 8, generator=g), torch.randn(16, 8, generator=g)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = (
        Muon(ours, 0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, 0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, s in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - s).norm()  # theirs is in bfloat16


def test_experts_are_matrices_of_their_own():
    g = torch.Generator().manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(4, 6, 8, generator=g))
    alone = [torch.nn.Parameter(w.detach().clone()) for w in stacked]
    stacked.grad = torch.randn(4, 6, 8, generator=g)
    for w, grad in zip(alone, stacked.grad):
        w.grad = grad.clone()
    Muon([stacked], 0.1).step()
    Muon(alone, 0.1).step()
    torch.testing.assert_close(stacked, torch.stack(alone))
