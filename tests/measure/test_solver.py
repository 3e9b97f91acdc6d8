"""The rounds of a search, with an evaluator that says what a test wants to hear."""

import itertools

import pytest

from labkit.common.errors import LabError
from labkit.measure.search import solver
from labkit.measure.search.goal import Goal
from labkit.measure.search.sensitivity import Sensitivity
from labkit.measure.search.solver import Solver

ROOM = 900
COSTS = {"int4": (50, 4.0), "int8": (100, 0.25)}  # bytes, and divergence of the first layer


class FakeEvaluator:
    """Divergences of whole plans come from ``kls``, of dtypes and of single parts from ``others``."""

    def __init__(self, kls, others=()):
        self.kls, self.others = iter(kls), {"nothing quantized, bf16": 0.5, **dict(others)}
        self.records, self.validated = {}, []
        self.prepared = self

    def predicted_bytes(self, plan):
        return 10 * 200 + 64

    def measure(self, plan, predicted=None, *, validated=True):
        key = str(plan.to_dict())
        if key not in self.records:
            kl = next(self.kls) if plan.name == "found" else self.others[plan.name]
            if isinstance(kl, Exception):
                raise kl
            self.records[key] = {"plan": plan, "kl": kl, "predicted_kl": predicted, "bytes": 900}
        if validated:
            self.validated.append(self.records[key])
        return self.records[key]


def solver_with(evaluator, rounds=8, dtype="bf16"):
    linears = [
        {
            "linear": f"layers.{layer}.up_proj", "module": "linear", "role": "decoder", "kind": "up_proj",
            "depth": layer / 10, "scheme": scheme, "parameters": 100, "bytes": size, "kl": kl * (1 + layer / 7),
        }
        for layer, (scheme, (size, kl)) in itertools.product(range(10), COSTS.items())
    ]  # fmt: skip
    made = Solver(evaluator, Sensitivity({}, linears), "found", lambda text: None, rounds)
    made.settle_dtype(dtype)
    return made


def whole_plans(evaluator):
    return [one for one in evaluator.records.values() if one["plan"].name == "found"]


@pytest.fixture
def no_corrections(monkeypatch):
    monkeypatch.setattr(solver, "CORRECTIONS", 0)


def test_the_best_of_the_plans_measured_is_kept_and_validated(no_corrections):
    """Even if it is not the one predicted best, nor the last; three that are no better end the search."""
    evaluator = FakeEvaluator([5.0, 3.0, 1.0, 4.0, 2.0, 6.0, 0.1])
    made = solver_with(evaluator)
    record = made.best(ROOM)
    assert [one["kl"] for one in whole_plans(evaluator)] == [5.0, 3.0, 1.0, 4.0, 2.0, 6.0]
    assert record["kl"] == 1.0
    assert evaluator.validated == [record]
    assert [(one["round"], one["kl"]) for one in made.measured] == [
        *enumerate([5.0, 3.0, 1.0, 4.0, 2.0, 6.0], 1)
    ]
    assert made.measured[2]["predicted_kl"] == record["predicted_kl"]


def test_no_more_rounds_are_measured_than_allowed_and_no_plan_twice(no_corrections):
    evaluator = FakeEvaluator([float(number) for number in range(9, 0, -1)])
    assert solver_with(evaluator, rounds=4).best(ROOM)["kl"] == 6.0
    predicted = [one["predicted_kl"] for one in whole_plans(evaluator)]
    assert len(predicted) == 4
    assert predicted == sorted(predicted)  # the best guesses first
    assert solver_with(evaluator, rounds=5).best(ROOM)["kl"] == 5.0
    assert len(whole_plans(evaluator)) == 5  # of which the first four were measured before


def test_a_search_ends_where_no_other_plan_fits(no_corrections):
    evaluator = FakeEvaluator([2.0, 1.0])
    assert solver_with(evaluator).best(500)["kl"] == 2.0
    assert len(whole_plans(evaluator)) == 1


def test_parts_are_measured_where_a_plan_is_not_as_predicted(monkeypatch):
    monkeypatch.setattr(solver, "CORRECTIONS", 1)
    evaluator = FakeEvaluator([100.0] * 8, {"found: decoder": 50.5})
    made = solver_with(evaluator)
    made.best(ROOM)
    first = whole_plans(evaluator)[0]["predicted_kl"] - 0.5
    assert made.weights["decoder", "int8"] == pytest.approx(50 / first)
    agreeing = FakeEvaluator([first + 0.5] * 8)
    made = solver_with(agreeing, rounds=1)
    made.best(ROOM)
    assert made.weights == {}


@pytest.mark.parametrize(
    ("fp16", "wanted", "taken"),
    [
        (0.01, "auto", "fp16"),
        (0.4, "auto", "bf16"),  # better, but hardly
        (LabError("not finite"), "auto", "bf16"),
        (RuntimeError("not implemented for 'Half'"), "auto", "bf16"),
        (0.01, "bf16", "bf16"),
        (0.9, "fp16", "fp16"),
    ],
)
def test_the_dtype_of_the_rest_is_the_one_that_measures_much_better(fp16, wanted, taken, no_corrections):
    evaluator = FakeEvaluator([1.0], {"nothing quantized, fp16": fp16})
    made = solver_with(evaluator, rounds=1, dtype=wanted)
    record = made.best(1800)
    assert record["plan"].default == taken
    assert {option.scheme for unit in made.units for option in unit.options} == {taken, *COSTS}
    alone = 0.5 if taken == "bf16" else fp16
    units = made.room(Goal.of(2000, None, None))
    assert units == 2000 - 64
    assert record["predicted_kl"] >= alone
