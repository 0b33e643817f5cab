"""What one parameter of transformers' model holds of a checkpoint's linears."""

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.hf.placement import Placement

NAMES = tuple((f"{expert}.gate", f"{expert}.up") for expert in range(3))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("names", [NAMES, tuple((f"{expert}.down",) for expert in range(3))])
def test_split_gives_back_what_join_has_joined(interleaved, transposed, names):
    draw = torch.Generator().manual_seed(0)
    placement = Placement(names, stacked=True, interleaved=interleaved, transposed=transposed)
    linears = {name: torch.randn(5, 4, generator=draw) for name in placement.names}
    joined = placement.join(linears.__getitem__)
    assert tuple(joined.shape) == ((3, 4, 5 * len(names[0])) if transposed else (3, 5 * len(names[0]), 4))
    found = dict(placement.split(joined))
    assert list(found) == list(linears) and all(torch.equal(found[name], linears[name]) for name in linears)


def test_one_linear():
    weight, placement = torch.randn(5, 4), Placement((("a.b",),))
    assert placement.join({"a.b": weight}.__getitem__) is weight
    assert [(name, part is weight) for name, part in placement.split(weight)] == [("a.b", True)]


@pytest.mark.parametrize("shape", [(2, 10, 4), (10, 4)])
def test_another_number_of_experts(shape):
    with pytest.raises(RiaError, match=r"0.gate and others: .* the checkpoint has 3 experts"):
        list(Placement(NAMES, stacked=True).split(torch.zeros(shape)))


def test_rows_that_do_not_divide():
    with pytest.raises(RiaError, match=r"0.gate: 9 rows are not those of 2 linears"):
        list(Placement(NAMES, stacked=True).split(torch.zeros(3, 9, 4)))
