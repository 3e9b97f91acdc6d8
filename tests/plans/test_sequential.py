"""Passes side by side: each batch runs once, halts where it should, and nothing is left behind."""

import threading

import pytest
import torch
from torch import nn

from labkit.common.errors import LabError
from labkit.plans.batches import checked_batches, run_model
from labkit.plans.sequential import SequentialRun


class Branches(nn.Module):
    """Batches with ``b`` take a way through another layer before they meet the others again."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4, bias=False)  # defined first, called last
        self.first = nn.Linear(4, 4, bias=False)
        self.side = nn.Linear(4, 4, bias=False)
        self.calls = 0

    def forward(self, a, b=None):
        self.calls += 1
        hidden = self.first(a)
        if b is not None:
            hidden = hidden + self.side(b)
        return self.last(hidden.relu())


def watched(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def rows(seed, count=3):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def passes_alive():
    return [thread for thread in threading.enumerate() if thread.name == "labkit-pass"]


def doubled(linear):
    other = nn.Linear(4, 4, bias=False)
    other.weight.data = 2 * linear.weight.data
    return other


def run(model, layers, batches, visit):
    with SequentialRun(model, layers, batches) as run:
        run.find_order()
        run.visit_all(visit)


def test_every_layer_is_visited_once_with_what_the_replaced_ones_before_it_answer():
    model = Branches()
    layers, seen = watched(model), {}
    batches = [{"a": rows(0)}, {"a": rows(1), "b": rows(2)}, {"a": rows(3)}, {"a": rows(4), "b": rows(5)}]

    def visit(name, inputs, references):
        assert references is None
        seen[name] = inputs
        return doubled(layers[name])

    with SequentialRun(model, layers, batches) as run:
        assert run.find_order() == []
        model.calls = 0
        run.visit_all(visit)
    assert list(seen) == ["first", "side", "last"]  # the side way is waited for
    assert model.calls == len(batches)
    assert [len(inputs) for inputs in seen.values()] == [4, 2, 4]
    hidden = 2 * layers["first"](rows(1)) + 2 * layers["side"](rows(2))
    torch.testing.assert_close(seen["last"][1], hidden.relu())
    assert not passes_alive()
    assert all("forward" not in layer.__dict__ for layer in layers.values())


def test_references_have_the_inputs_of_the_model_as_it_was():
    model = Branches()
    layers, seen = watched(model), {}
    batch = {"a": rows(0), "b": rows(1)}

    def visit(name, inputs, references):
        seen[name] = inputs[0], references[0]
        return doubled(layers[name])

    with SequentialRun(model, layers, [batch], references=True) as run:
        run.find_order()
        run.visit_all(visit)
    assert seen["first"][0] is seen["first"][1] or torch.equal(*seen["first"])
    hidden = (layers["first"](rows(0)) + layers["side"](rows(1))).relu()
    torch.testing.assert_close(seen["last"][1], hidden)
    torch.testing.assert_close(seen["last"][0], 2 * hidden)
    assert not passes_alive()


class Chooses(nn.Module):
    """Goes on to the expert that its first layer's answer points to."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.head(self.experts[int(self.gate(x).sum(0).argmax())](x))


def test_a_reference_that_takes_another_way_is_released():
    model = Chooses()
    model.gate.weight.data = torch.tensor([[1.0] * 4, [-1.0] * 4])
    layers, seen = watched(model), {}
    opposite = nn.Linear(4, 2, bias=False)
    opposite.weight.data = -model.gate.weight.data

    def visit(name, inputs, references):
        seen[name] = inputs, references
        return opposite if name == "gate" else doubled(layers[name])

    with SequentialRun(model, layers, [torch.ones(2, 4)], references=True) as run:
        assert run.find_order() == ["experts.1"]
        run.visit_all(visit)
    assert list(seen) == ["gate", "experts.1", "head"]
    assert seen["head"][1][0] is seen["head"][0][0]
    assert not passes_alive()


def test_what_no_batch_comes_to_is_found_out_first():
    model = Branches()
    with SequentialRun(model, watched(model), [{"a": rows(0)}, {"a": rows(1), "b": None}]) as run:
        assert run.find_order() == ["side"]
    assert not passes_alive()


def test_a_layer_called_again_is_visited_once():
    layer = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    visits = []

    def visit(name, inputs, references):
        visits.append(name)
        return doubled(layer)

    with SequentialRun(model, watched(model), [rows(0)]) as run:
        run.find_order()
        run.visit_all(visit)
    assert visits == ["0"]


@pytest.mark.parametrize("reason", [KeyboardInterrupt, ValueError])
def test_an_interruption_ends_all_passes(reason):
    model = Branches()

    def visit(name, inputs, references):
        raise reason("now")

    with pytest.raises(reason, match="now"):
        run(model, watched(model), [rows(0), rows(1)], visit)
    assert not passes_alive()
    assert model(rows(0)).shape == (3, 4)


def test_a_batch_that_does_not_run_is_named():
    model = Branches()
    for batches, message in (
        ([rows(0), torch.ones(2, 5)], r"batch 1 does not run .*shapes cannot be multiplied \(2x5 and 4x4\)"),
        ([{"c": rows(0)}], r"batch 0 does not run .*unexpected keyword argument 'c'"),
    ):
        layers = watched(model)
        del layers["side"]  # so that not every batch is run beforehand
        with pytest.raises(LabError, match=message):
            run(model, layers, batches, lambda name, inputs, references: doubled(model.first))
        assert not passes_alive()


def test_batches_are_checked_before_anything_runs():
    assert checked_batches(iter([rows(0)]))[0].shape == (3, 4)
    for wrong, message in (
        ([], "there are no calibration batches"),
        (rows(0), "put it in a list"),
        ({"a": rows(0)}, "put it in a list"),
        ([rows(0), "text"], "calibration batch 1 is of type str"),
    ):
        with pytest.raises(LabError, match=message):
            checked_batches(wrong)


def test_batches_are_passed_as_what_they_are():
    model = Branches()
    both = run_model(model, (rows(0), rows(1)))
    torch.testing.assert_close(run_model(model, {"a": rows(0), "b": rows(1)}), both)
    assert not torch.equal(run_model(model, rows(0)), both)


def test_a_gpu_without_a_number_is_the_one_of_the_thread_that_asks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert SequentialRun(nn.Linear(2, 2), {}, [], "cuda").device == torch.device("cuda:1")
    assert SequentialRun(nn.Linear(2, 2), {}, [], "cuda:0").device == "cuda:0"
    assert SequentialRun(nn.Linear(2, 2), {}, [], "cpu").device == "cpu"
    assert SequentialRun(nn.Linear(2, 2), {}, []).device is None
