"""CSRLinear against the dense layer it stands for."""

from __future__ import annotations

import pytest
import torch

from annbatch.nn import CSRLinear

N_GENES = 30


def random_csr(
    n_rows: int, *, index_dtype: torch.dtype = torch.int32, dtype: torch.dtype = torch.float32, seed: int = 0
):
    """A dense matrix with every third row empty, and the same as (indptr, indices, data)."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(1, 9, (n_rows, N_GENES), generator=generator)
    dense *= torch.rand(n_rows, N_GENES, generator=generator) < 0.3
    dense[::3] = 0
    row, column = dense.nonzero(as_tuple=True)
    indptr = torch.searchsorted(row, torch.arange(n_rows + 1))
    return dense.to(dtype), (indptr.to(index_dtype), column.to(index_dtype), dense[row, column].to(dtype))


def dense_twin(layer: CSRLinear) -> torch.nn.Linear:
    twin = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        twin.weight.copy_(layer.weight.T)
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_equals_the_dense_layer_with_gradients(bias, index_dtype):
    layer = CSRLinear(N_GENES, 7, bias=bias)
    twin = dense_twin(layer)
    dense, (indptr, indices, data) = random_csr(20, index_dtype=index_dtype)
    data = data.clone().requires_grad_()
    dense.requires_grad_()
    weights = torch.randn(20, 7)

    sparse_out, dense_out = layer((indptr, indices, data)), twin(dense)
    torch.testing.assert_close(sparse_out, dense_out)
    (sparse_out * weights).sum().backward()
    (dense_out * weights).sum().backward()

    torch.testing.assert_close(layer.weight.grad, twin.weight.grad.T)
    if bias:
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
    row = torch.repeat_interleave(torch.arange(20), indptr.diff().long())
    torch.testing.assert_close(data.grad, dense.grad[row, indices.long()])


@pytest.mark.parametrize("n_rows", [0, 1, 3])
def test_batches_without_rows_or_entries(n_rows):
    layer = CSRLinear(N_GENES, 7)
    empty = torch.empty(0, dtype=torch.int32)
    out = layer((torch.zeros(n_rows + 1, dtype=torch.int32), empty, torch.empty(0)))
    assert out.shape == (n_rows, 7)
    torch.testing.assert_close(out, layer.bias.expand(n_rows, 7))
    out.sum().backward()
    assert layer.weight.grad.count_nonzero() == 0


def test_takes_a_csr_tensor():
    layer = CSRLinear(N_GENES, 7)
    dense, parts = random_csr(20)
    csr = torch.sparse_csr_tensor(*parts, size=(20, N_GENES), check_invariants=True)
    torch.testing.assert_close(layer(csr), dense_twin(layer)(dense))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.float64, torch.float16])
def test_data_of_any_dtype(dtype):
    layer = CSRLinear(N_GENES, 7)
    dense, (indptr, indices, data) = random_csr(20)
    out = layer((indptr, indices, data.to(dtype)))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, dense_twin(layer)(dense))


def test_mixed_index_dtypes_and_repeated_columns():
    layer = CSRLinear(N_GENES, 7, bias=False)
    out = layer((torch.tensor([0, 3]), torch.tensor([4, 4, 9], dtype=torch.int32), torch.tensor([1.0, 2.0, 5.0])))
    torch.testing.assert_close(out, (3 * layer.weight[4] + 5 * layer.weight[9])[None])


def test_refusals_say_what_was_given():
    layer = CSRLinear(N_GENES, 7)
    dense, parts = random_csr(20)
    with pytest.raises(TypeError, match=r"not a tensor of layout torch\.strided"):
        layer(dense)
    with pytest.raises(ValueError, match="not 2 tensors"):
        layer(parts[:2])
    with pytest.raises(ValueError, match=r"in_features=30 and was given a tensor of shape \(20, 31\)"):
        layer(torch.sparse_csr_tensor(*parts, size=(20, 31), check_invariants=True))


def test_parameters_are_drawn_as_those_of_linear():
    torch.manual_seed(0)
    layer, linear = CSRLinear(400, 300), torch.nn.Linear(400, 300)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert ours.abs().max() <= 1 / 20
        assert abs(ours.std() / theirs.std() - 1) < 0.1
        assert abs(float(ours.mean().detach())) < 0.005
    assert repr(layer) == "CSRLinear(in_features=400, out_features=300, bias=True)"
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend):
    torch._dynamo.reset()
    layer = CSRLinear(N_GENES, 7)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    twin = dense_twin(layer)
    for seed in range(3):
        dense, parts = random_csr(12 + seed, seed=seed)
        layer.zero_grad()
        twin.zero_grad()
        out = compiled(parts)
        torch.testing.assert_close(out, twin(dense))
        out.square().sum().backward()
        twin(dense).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad.T)
