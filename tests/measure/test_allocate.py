"""The integer program finds what trying everything finds, and its answer becomes a plan that fits any height."""

import itertools

import pytest
import torch
from torch import nn

from labkit.common.errors import AllocationError
from labkit.measure.search.allocate import Allocation, Option, Unit, allocate, front, units_of
from labkit.measure.search.plan_writer import plan_of
from labkit.plans.plan import QuantizationPlan


def unit(number, options, role="decoder", kinds=("fc",), depth=None):
    return Unit(role, kinds, depth if depth is not None else number / 10, 100, tuple(options))


def units_at_random(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    units = []
    for number in range(count):
        loss = torch.rand(1, generator=generator).item() * 10 ** (number % 3)
        units.append(
            unit(
                number, [Option("bf16", 200, 0.0), Option("int8", 100, loss / 100), Option("int4", 55, loss)]
            )
        )
    return units


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [335, 500, 700, 1100, 1300])
def test_no_choice_within_the_budget_is_better(seed, budget):
    units = units_at_random(seed=seed)
    found = allocate(units, budget)
    assert found.bytes == sum(option.bytes for option in found.choices) <= budget
    fitting = [
        choice
        for choice in itertools.product(*(one.options for one in units))
        if sum(option.bytes for option in choice) <= budget
    ]
    best = min(sum(option.loss for option in choice) for choice in fitting)
    assert found.loss == pytest.approx(best, rel=1e-5)


def test_of_equally_good_plans_the_smallest_is_taken():
    units = [unit(0, [Option("bf16", 200, 0.0), Option("int8", 100, 0.0)])]
    assert allocate(units, 1000).bytes == 100


@pytest.mark.parametrize("apart", [1, 2, 3])
def test_the_next_best_choice_differs_in_so_many_units(apart):
    units, budget = units_at_random(), 700
    tried = [allocate(units, budget)]
    tried.append(allocate(units, budget, avoid=[tried[0].choices], apart=apart))
    found = allocate(units, budget, avoid=[one.choices for one in tried], apart=apart)

    def fits(choice):
        others = [sum(a != b for a, b in zip(choice, one.choices)) for one in tried]
        return sum(option.bytes for option in choice) <= budget and min(others) >= apart

    allowed = [choice for choice in itertools.product(*(one.options for one in units)) if fits(choice)]
    assert fits(found.choices)
    assert found.loss == pytest.approx(
        min(sum(option.loss for option in choice) for choice in allowed), rel=1e-5
    )


def test_where_nothing_so_different_fits_there_is_no_next_choice():
    units = [unit(0, [Option("bf16", 200, 0.0), Option("int8", 100, 1.0)])]
    both = [units[0].options[:1], units[0].options[1:]]
    with pytest.raises(AllocationError, match="no plan was found"):
        allocate(units, 1000, avoid=both)


def test_a_budget_that_nothing_fits_is_refused_with_what_would():
    with pytest.raises(AllocationError, match=r"take 0\.00 MB, more than .*schemes with fewer bits"):
        allocate(units_at_random(), 100)


def test_weights_move_the_choice():
    units = [
        unit(0, [Option("int8", 100, 1.0), Option("int4", 50, 3.0)], role="vision"),
        unit(1, [Option("int8", 100, 1.0), Option("int4", 50, 2.0)], role="decoder"),
    ]
    assert [option.scheme for option in allocate(units, 150).choices] == ["int8", "int4"]
    weighed = allocate(units, 150, {("decoder", "int4"): 5.0})
    assert [option.scheme for option in weighed.choices] == ["int4", "int8"]
    assert weighed.loss == 4.0


def test_the_front_falls_and_ends_without_loss():
    found = front(units_at_random())
    assert [one.bytes for one in found] == sorted({one.bytes for one in found})
    losses = [one.loss for one in found]
    assert losses == sorted(losses, reverse=True)
    assert found[0].bytes == 6 * 55
    assert losses[-1] == 0


def record(linear, kind, scheme, size, kl, depth=0.25, role="decoder"):
    return {
        "linear": linear, "role": role, "kind": kind, "depth": depth, "scheme": scheme,
        "parameters": 100, "bytes": size, "kl": kl,
    }  # fmt: skip


def test_linears_that_engines_multiply_as_one_are_one_unit():
    records = [
        record(f"layers.0.{kind}", kind, scheme, size, kl)
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj")
        for scheme, size, kl in (("int8", 100, 0.1), ("int4", 50, 0.3))
    ]
    records[1] = {**records[1], "unsupported": "no"}
    del records[1]["kl"], records[1]["bytes"]
    units = units_of(records, "bf16", 2)
    assert [one.kinds for one in units] == [("q_proj", "k_proj", "v_proj"), ("o_proj",)]
    assert [option.scheme for option in units[0].options] == ["bf16", "int8"]  # q cannot take int4
    assert units[0].options[1].loss == pytest.approx(0.3)
    assert units[0].options[0].bytes == 600
    assert [option.scheme for option in units[1].options] == ["bf16", "int8", "int4"]
    alone = units_of(records, "bf16", 2, together=())
    assert [one.kinds for one in alone] == [("q_proj",), ("k_proj",), ("v_proj",), ("o_proj",)]
    assert [len(one.options) for one in alone] == [2, 3, 3, 3]  # only q cannot


class Stack(nn.Module):
    def __init__(self, layers, more=False):
        super().__init__()
        kinds = ("up", "down", "gate") if more else ("up", "down")
        self.layers = nn.ModuleList(
            nn.ModuleDict({kind: nn.Linear(64, 64) for kind in kinds}) for _ in range(layers)
        )
        self.down = nn.Linear(64, 64)  # of a kind that also stands in the layers


SCHEMES = {"up": ["int8", "int8", "int4-3bit", "int4-3bit"], "down": ["int4-3bit", "int8", "int8", "bf16"]}


def written(outside):
    units, choices = [], []
    for kind, schemes in SCHEMES.items():
        for number, scheme in enumerate(schemes):
            units.append(Unit("decoder", (kind,), (number + 0.5) / 4, 100, ()))
            choices.append(Option(scheme, 0, 0.0))
    units.append(Unit("decoder", ("down",), None, 100, ()))
    choices.append(Option(outside, 0, 0.0))
    return plan_of(units, Allocation(tuple(choices), 0, 0.0), "found")


def schemes_of(plan, model):
    roles = {name: "decoder" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    resolved = plan.resolve(model, roles)
    return {name: resolved.schemes[name].name if name in resolved.schemes else "bf16" for name in roles}


@pytest.mark.parametrize("outside", ["int8", "int4-3bit", "bf16"])
def test_a_written_plan_gives_every_linear_its_choice(outside, tmp_path):
    plan = written(outside)
    found = schemes_of(plan, Stack(4))
    for kind, schemes in SCHEMES.items():
        for number, scheme in enumerate(schemes):
            assert found[f"layers.{number}.{kind}"] == scheme.removesuffix("-3bit")
    assert found["down"] == outside.removesuffix("-3bit")
    plan.to_yaml(tmp_path / "found.yaml")
    assert QuantizationPlan.from_yaml(tmp_path / "found.yaml") == plan


def test_a_written_plan_fits_a_model_of_another_height_with_other_linears():
    plan = written("int8")
    found = schemes_of(plan, Stack(12, more=True))
    for number in range(12):
        for kind, schemes in SCHEMES.items():
            assert found[f"layers.{number}.{kind}"] == schemes[number // 3].removesuffix("-3bit")
        assert found[f"layers.{number}.gate"] == "int8"  # what most of the part gets


def test_a_part_of_one_scheme_is_one_rule():
    units = [Unit("vision", (kind,), depth, 10, ()) for kind in ("a", "b") for depth in (0.25, 0.75)]
    choices = tuple(Option("int8", 0, 0.0) for _ in units)
    plan = plan_of(units, Allocation(choices, 0, 0.0), "found")
    assert [str(rule) for rule in plan.rules] == ["(role vision -> int8)"]
    nothing = plan_of(units, Allocation(tuple(Option("bf16", 0, 0.0) for _ in units), 0, 0.0), "found")
    assert nothing.rules == ()


def test_embeddings_and_convolutions_are_units_of_a_part_and_rules_of_their_own():
    records = [
        {**record(name, "conv", "int8", 100, 0.1, depth=None, role="speech"), "module": "conv"}
        for name in ("speech.layers.0.conv", "speech.layers.1.conv")
    ]
    records.append({**record("embed", "embed", "int8", 100, 0.2, None, "embedding"), "module": "embedding"})
    records.append({**record("fc", "fc", "int8", 100, 0.1, None, "speech"), "module": "linear"})
    units = units_of(records, "bf16", 2)
    assert [(one.role, one.module, one.parameters) for one in units] == [
        ("speech", "conv", 200), ("embedding", "embedding", 100), ("speech", "linear", 100),
    ]  # fmt: skip
    eight = tuple(Option("int8", 0, 0.0) for _ in units)
    plan = plan_of(units, Allocation(eight, 0, 0.0), "found")
    assert {(rule.roles, rule.modules, rule.scheme.name) for rule in plan.rules} == {
        (("speech",), ("conv",), "int8"), (("speech",), ("linear",), "int8"),
        (("embedding",), ("embedding",), "int8"),
    }  # fmt: skip
    left = (Option("bf16", 0, 0.0), Option("bf16", 0, 0.0), Option("int8", 0, 0.0))
    assert len(plan_of(units, Allocation(left, 0, 0.0), "found").rules) == 1
