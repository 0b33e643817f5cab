"""Half-stored matrices against dense ones in float64."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ria_vllm.offline.calibration.statistics import GramSum
from ria_vllm.offline.pruning import admm
from ria_vllm.offline.pruning.admm import admm_solver, output_error
from ria_vllm.offline.pruning.masks import mask
from ria_vllm.offline.pruning.symmetric import BLOCK, SymmetricMatrix

WIDTHS = (1, 7, 256, 300, 777)


def gram_of(width, seed=0):
    """A Gram matrix of correlated channels, dense in float64 and half-stored in float32."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(width + 50, width, generator=draw)
    X += X.roll(1, dims=1)  # neighbours are correlated, across blocks too
    total = GramSum(width, X.device)
    total.add(X)
    return X.double().T @ X.double(), total.finish()


def close(found, expected, rtol=1e-5):
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).norm() <= rtol * expected.norm()


def permutation(width):
    return torch.randperm(width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("width", WIDTHS)
def test_dense_is_the_whole_matrix(width):
    S, half = gram_of(width)
    p = permutation(width)
    close(half.dense(), S)
    assert torch.equal(half.dense(p), half.dense()[p][:, p])
    assert torch.equal(half.diagonal(), half.dense().diagonal())
    assert half.width == width
    assert sum(block.numel() for block in half.blocks) <= width * (width + BLOCK) / 2
    again = SymmetricMatrix.of(half.dense())
    assert all(torch.equal(one, other) for one, other in zip(again.blocks, half.blocks, strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_product(width):
    S, half = gram_of(width)
    rows = torch.randn(5, width)
    before = rows.clone()
    close(rows @ half, rows.double() @ S)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("width", WIDTHS)
def test_some_rows(width):
    _, half = gram_of(width)
    channels = permutation(width)[: max(1, width // 3)]
    assert torch.equal(half.rows(channels), half.dense()[channels])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("permuted", [False, True])
def test_a_copy_in_another_order(width, permuted):
    _, half = gram_of(width)
    order, before = permutation(width) if permuted else None, half.dense()
    copy = half.copy(order)
    close(copy.dense(), before.double() if order is None else before.double()[order][:, order])
    for start, stop, _ in half.spans():
        middle = (start + stop) // 2
        for part in (start, middle), (middle, stop), (start, stop):
            assert torch.equal(copy.neighbours(*part), copy.dense()[slice(*part)])
    copy.add_to_diagonal(torch.ones(width))
    assert torch.equal(half.dense(), before)


@pytest.mark.parametrize("width", WIDTHS)
def test_normalised_is_a_copy(width):
    S, half = gram_of(width)
    scale = torch.rand(width) + 0.5
    before = half.dense()
    normalised = half.normalised(scale)
    normalised.add_to_diagonal(scale)
    close(normalised.dense(), S / scale[:, None] / scale + torch.diag(scale))
    assert torch.equal(half.dense(), before)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_inverse(width, dead):
    S, half = gram_of(width)
    scale = S.diagonal().sqrt()
    if dead:
        j = width // 2
        S[j], S[:, j] = 0, 0
        half = SymmetricMatrix.of(S.float())
    system = half.normalised(scale.float())
    system.add_to_diagonal(torch.full((width,), 0.1))
    expected = torch.linalg.inv(S / scale[:, None] / scale + 0.1 * torch.eye(width))
    rows = torch.randn(5, width)
    before = rows.clone()
    inverse = system.into_inverse()
    close(rows @ inverse, rows.double() @ expected, rtol=1e-4)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("place", [3, 290])
def test_an_indefinite_matrix_has_no_inverse(place):
    half = SymmetricMatrix.of(torch.eye(300))
    half.add_to_diagonal(-2 * (torch.arange(300) == place).float())
    with pytest.raises(torch.linalg.LinAlgError):
        half.into_inverse()


@pytest.fixture
def problem(request):
    """A weight, the Gram matrix of its input, and a function that chooses masks. One channel is dead."""
    width = request.param
    draw = torch.Generator().manual_seed(3)
    X = torch.randn(2 * width, width, generator=draw)
    X = (X + X.roll(1, dims=1)) * torch.randn(width, generator=draw).mul(0.5).exp()
    X[:, width // 3] = 0
    W = torch.randn(150, width, generator=draw)
    norm = X.norm(dim=0)
    return W, SymmetricMatrix.of(X.T @ X), lambda rows: mask(rows.abs() * norm)


@pytest.mark.parametrize("problem", [4, 256, 516, 776], indirect=True)
def test_wide_reconstruction_equals_the_narrow_one(problem, monkeypatch):
    W, gram, choose = problem
    narrow, expected = admm_solver(gram).solve(W, choose(W), choose=choose)
    monkeypatch.setattr(admm, "DENSE_WIDTH", 0)
    wide, kept = admm_solver(gram).solve(W, choose(W), choose=choose)
    # If two weights of a group have the same score up to rounding, either may be kept.
    same = (kept == expected).all(dim=1)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(wide[same], narrow[same], rtol=1e-3, atol=1e-4)
    assert output_error(W, wide, gram) == pytest.approx(output_error(W, narrow, gram), rel=1e-4)


class Peak(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes, and of all those alive at once, without those in `given`."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.alive = {}
        self.largest = self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), len(storage))
                self.largest = max(self.largest, len(storage))
        self.alive = {at: one for at, one in self.alive.items() if not one[0].expired()}
        self.total = max(self.total, sum(size for _, size in self.alive.values()))
        return made


def test_wide_matrices_are_never_dense():
    width, rows = admm.DENSE_WIDTH + 500, 8
    half, block, weight = 4 * width * (width + BLOCK) / 2, 4 * BLOCK * width, 4 * rows * width
    X, W = torch.randn(64, width), torch.randn(rows, width)
    keep = mask(W.abs())
    with Peak(X) as gathering:
        total = GramSum(width, X.device)
        total.add(X)
        gram = total.finish()
    # The float64 sums, and for one block what is added to it or made from it.
    assert gathering.largest <= 2 * block and gathering.total <= 2 * half + 2 * block
    with Peak(*gram.blocks) as preparing:
        solver = admm_solver(gram)
    assert preparing.largest <= block and preparing.total <= half + block + 10 * weight
    with Peak(*gram.blocks, *solver.inverse.blocks, W, keep) as solving:
        V, _ = solver.solve(W, keep)
        output_error(W, V, gram)
    assert solving.total <= 12 * weight
