"""torch.ops.annbatch.load inside compiled graphs: every batch once, in order, as without a compiler.

Batches differ from one another, so a load that is dropped, merged with another or repeated changes the rows.
"""

from __future__ import annotations

import pytest
import torch

from annbatch._core import fakes
from annbatch._core import ops as _ops
from annbatch.nn import CSRLinear
from support.small import N_VAR

op = torch.ops.annbatch

BACKENDS = ["eager", "aot_eager", "inductor"]
N_BATCHES = 7


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def opened(small, seed: int = 7, **fields) -> torch.Tensor:
    state = _ops.open_state(small.config(**fields))
    _ops.start(state, seed)
    return state


def epoch_rows(small, seed: int = 7) -> list[list[int]]:
    state = opened(small, seed)
    return [_ops.load(state)[0].tolist() for _ in range(N_BATCHES + 1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference(small, backend):
    layer = CSRLinear(N_VAR, 4).requires_grad_(False)

    def step(state, scale):
        rows, *x = op.load(state)
        return rows, x, layer(x) * scale

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    state, scale = opened(small), torch.tensor(2.0)
    seen = []
    for _ in range(N_BATCHES + 1):
        rows, x, out = compiled(state, scale)
        seen.append(small.check((rows, *x)))
        torch.testing.assert_close(out, 2 * layer(x))
    assert seen == epoch_rows(small)
    assert seen[-1] == [], "the end of the epoch is a batch like any other to the graph"


@pytest.mark.parametrize("backend", BACKENDS)
def test_training(small, backend):
    def train(step) -> tuple[list[list[int]], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(CSRLinear(N_VAR, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state, seen = opened(small), []
        for _ in range(N_BATCHES):
            optimizer.zero_grad()
            rows, loss = step(model, state)
            loss.backward()
            optimizer.step()
            seen.append(rows.tolist())
        return seen, [p.detach() for p in model.parameters()]

    def step(model, state):
        rows, *x = op.load(state)
        return rows, model(x).square().mean()

    compiled_rows, compiled_parameters = train(torch.compile(step, fullgraph=True, backend=backend))
    eager_rows, eager_parameters = train(step)
    assert compiled_rows == eager_rows == epoch_rows(small)[:N_BATCHES]
    torch.testing.assert_close(compiled_parameters, eager_parameters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_loads_are_two_batches_and_an_unused_one_is_taken(small, backend):
    def step(state):
        first = op.load(state)
        op.load(state)
        third = op.load(state)
        return first[0], third[0], first[3].sum() + third[3].sum()

    state = opened(small)
    first, third, total = torch.compile(step, fullgraph=True, backend=backend)(state)
    expected = epoch_rows(small)
    assert [first.tolist(), third.tolist()] == [expected[0], expected[2]]
    assert float(total) == small.x[expected[0] + expected[2]].sum()
    assert _ops.load(state)[0].tolist() == expected[3]


def test_loads_of_two_states_keep_their_order_in_training(small):
    layer = CSRLinear(N_VAR, 3)

    def step(a, b):
        rows_a, *x_a = op.load(a)
        hidden = layer(x_a).sum()
        rows_b, *x_b = op.load(b)
        return rows_a, rows_b, hidden * layer(x_b).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a, b = opened(small, 7), opened(small, 8)
    pairs = []
    for _ in range(3):
        rows_a, rows_b, out = compiled(a, b)
        out.backward()
        pairs.append((rows_a.tolist(), rows_b.tolist()))
    assert pairs == list(zip(epoch_rows(small, 7), epoch_rows(small, 8), strict=True))[:3]


def counting():
    """A backend that runs graphs as they are, and the list it counts them in."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def test_loaders_in_turn_share_one_graph(small):
    backend, graphs = counting()

    @torch.compile(fullgraph=True, backend=backend)
    def step(state):
        return op.load(state)

    for seed in range(12):
        state = opened(small, seed)
        assert [small.check(step(state)) for _ in range(N_BATCHES)] == epoch_rows(small, seed)[:N_BATCHES]
    assert len(graphs) == 1


def test_each_layout_has_a_graph_of_its_own(small):
    backend, graphs = counting()

    @torch.compile(fullgraph=True, backend=backend)
    def step(state):
        return op.load(state)

    layouts = [("X",), ("obsm/pca",), ("obsm/pca", "X")]
    states = [opened(small, elements=elements) for elements in layouts]
    for _ in range(3):
        batches = [step(state) for state in states]
        assert [len(batch) for batch in batches] == [4, 2, 5]
        rows, pca = batches[1]
        assert torch.equal(pca, torch.from_numpy(small.pca)[rows])
    assert len(graphs) == len(layouts)


def test_without_fullgraph_the_rest_is_compiled(small):
    def step(state, x):
        rows = op.load(state)[0]
        if rows.numel() == 0:
            return x
        return x + len(rows)

    compiled = torch.compile(step, backend="aot_eager")
    state = opened(small)
    assert [int(compiled(state, torch.zeros(()))) for _ in range(N_BATCHES + 1)] == [8] * 6 + [5, 0]


def test_errors_come_through_the_graph(small):
    compiled = torch.compile(lambda state: op.load(state), fullgraph=True, backend="aot_eager")
    state = opened(small)
    small.check(compiled(state))
    with pytest.raises(RuntimeError, match=r"\[annbatch:\w+\]"):
        compiled(state.clone())
    small.check(compiled(state))
    _ops.close(state)
    with pytest.raises(RuntimeError, match="closed"):
        compiled(state)


def test_opcheck(small, monkeypatch):
    # opcheck hands copies of its arguments to the op, and a copied state is refused (test_ops.py): hand on the state
    monkeypatch.setattr("torch.testing._internal.optests.generate_tests.deepcopy_tensors", lambda inputs: inputs)
    # the fourth of its tests runs the op twice and compares: two batches of a stream are never alike
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    state = opened(small, elements=("X", "obsm/pca"), auto_restart=True)
    for kwargs in ({}, {"device": torch.device("cpu")}):
        results = torch.library.opcheck(op.load.default, (state,), kwargs, test_utils=utils)
        assert results == dict.fromkeys(utils, "SUCCESS")


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_refused(small, strict):
    class Model(torch.nn.Module):
        def forward(self, state):
            return op.load(state)[0]

    state = opened(small)
    with pytest.raises(Exception, match=r"load cannot be exported: .* load outside of it"):
        torch.export.export(Model(), (state,), strict=strict)
    assert _ops.load(state)[0].tolist() == epoch_rows(small)[0]


def test_a_torch_without_ordered_effects_refuses_to_compile(small, monkeypatch):
    monkeypatch.setattr(fakes, "_EFFECT_IS_ORDERED", False)
    state = opened(small)
    with pytest.raises(Exception, match="has no ordered effects"):
        torch.compile(lambda state: op.load(state), fullgraph=True, backend="eager")(state)
    small.check(op.load(state))
