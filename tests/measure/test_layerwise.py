"""One module at a time is replaced, its cost taken down, and the model left as it was."""

import pytest
import tiny_models
import torch

from labkit import phonetap
from labkit.engine.engine import Engine
from labkit.measure.probe import answer_probe, divergence
from labkit.measure.search.layerwise import LayerwiseEvaluator, measurable_linears, measurable_others
from labkit.models.families import find_roles
from labkit.models.spec import ModelSpec
from labkit.quantization.shorthand import parse_candidates


@pytest.fixture(scope="module")
def engine():
    model, processor = tiny_models.pocket()
    return Engine(model, processor, spec=ModelSpec("tiny", "tiny"), roles=find_roles(model))


def test_embeddings_and_convolutions_are_measured_as_a_plan_would_store_them(engine):
    probe = answer_probe(engine, phonetap.items("all", count=3, part="calibration"))
    others = measurable_others(engine.model)
    assert {"model.language_model.embed_tokens", "model.visual.patch_embed.proj"} <= set(others)
    evaluator = LayerwiseEvaluator(engine.model, engine.roles, probe, [], others)
    state = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    records = list(evaluator.measure(parse_candidates("int8,gptq-4bit")))
    assert [one["linear"] for one in records] == others  # gptq stores Linears alone
    assert {one["module"] for one in records} == {"embedding", "conv"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in engine.model.state_dict().items())
    for one in records:
        assert one["sqnr_db"] > 25
        assert one["bytes"] < 1.3 * one["parameters"]
        assert one["depth"] is None
    patches = next(one for one in records if one["linear"] == "model.visual.patch_embed.proj")
    assert patches["kl"] > 0  # its weight is read, it is never called
    done = [(one["linear"], one["scheme"]) for one in records[1:]]
    assert len(list(evaluator.measure(parse_candidates("int8"), done))) == 1
    assert divergence(engine.model, probe).kl == pytest.approx(0, abs=1e-6)


def test_linears_and_others_are_different_modules(engine):
    assert not set(measurable_linears(engine.model)) & set(measurable_others(engine.model))
