"""Divergence from the unquantized model, and the replay that makes it cheap: both are exactly what they say."""

import copy
from itertools import chain

import pytest
import tiny_models
import torch
from torch import nn

from labkit import phonetap
from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.measure.probe import Probe, answer_probe, divergence, text_probe
from labkit.measure.search.replay import Replay, blocks_of
from labkit.models.spec import ModelSpec
from labkit.quantization import get_scheme


def sequences(count=3, length=20):
    generator = torch.Generator().manual_seed(4)
    return list(torch.randint(0, 200, (count, 2, length), generator=generator))


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


@pytest.fixture(scope="module")
def pocket_engine():
    model, processor = tiny_models.pocket()
    return Engine(model, processor, spec=ModelSpec("tiny", "tiny"))


@pytest.fixture(scope="module")
def pocket_probe(pocket_engine):
    return answer_probe(
        pocket_engine, phonetap.items("all", count=5, seed=3, part="calibration"), batch_size=3
    )


def coarser(model, name, num_bits=3):
    """A copy of the model with one Linear rounded."""
    model = copy.deepcopy(model)
    parent, _, own = name.rpartition(".")
    linear = model.get_submodule(name)
    setattr(
        model.get_submodule(parent),
        own,
        get_scheme("int4", num_bits=num_bits, group_size=32).quantize_linear(linear),
    )
    return model


def test_divergence_is_the_textbooks(llama):
    probe = text_probe(llama, sequences())
    other = coarser(llama, "model.layers.0.mlp.up_proj")
    with torch.inference_mode():
        p, q = (
            torch.cat([m(ids).logits.flatten(0, 1) for ids in sequences()]).log_softmax(-1)
            for m in (llama, other)
        )
    found = divergence(other, probe)
    assert found.tokens == 3 * 2 * 20
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert divergence(llama, probe).kl < 1e-5 < found.kl
    assert divergence(llama, probe).agreement == 1


def test_fewer_bits_diverge_more(llama):
    probe = text_probe(llama, sequences())
    kls = [
        divergence(coarser(llama, "model.layers.1.mlp.down_proj", bits), probe).kl for bits in (8, 4, 3, 2)
    ]
    assert kls == sorted(kls)
    assert kls[0] < 0.01 * kls[2]


def test_answers_in_a_padded_batch_are_compared_where_each_alone_is(pocket_engine, pocket_probe):
    items = phonetap.items("all", count=5, seed=3, part="calibration")
    alone = answer_probe(pocket_engine, items, batch_size=1)
    lengths = [*chain(*pocket_probe.lengths)]
    assert lengths == [*chain(*alone.lengths)]
    torch.testing.assert_close(
        torch.cat(pocket_probe.log_probs).float(), torch.cat(alone.log_probs).float(), rtol=2e-2, atol=2e-2
    )
    likeliest = torch.cat(pocket_probe.log_probs).argmax(-1).split(lengths)
    for item, tokens in zip(items, likeliest):
        answer = pocket_engine.generate(item.messages(), max_new_tokens=128).token_ids
        assert (tokens == torch.tensor(answer)).float().mean() > 0.98  # greedy: each was the likeliest


def test_a_probe_of_a_broken_model_says_so(llama):
    probe = text_probe(llama, sequences())
    broken = copy.deepcopy(llama)
    broken.lm_head.weight.data[0] = float("nan")
    with pytest.raises(LabError, match="logits are not finite"):
        divergence(broken, probe)


def test_a_probe_holds_probabilities_that_fp16_cannot_write(llama):
    loud = copy.deepcopy(llama)
    loud.lm_head.weight.data *= 1e6
    probe = text_probe(loud, sequences())
    assert all(torch.isfinite(log_probs).all() for log_probs in probe.log_probs)
    assert divergence(loud, probe).kl == pytest.approx(0, abs=1e-3)


def test_a_probe_on_disk_is_the_same(pocket_probe, pocket_engine, tmp_path):
    pocket_probe.save(tmp_path / "probe.safetensors")
    loaded = Probe.load(tmp_path / "probe.safetensors")
    assert loaded.lengths == pocket_probe.lengths
    assert all(torch.equal(a, b) for a, b in zip(loaded.log_probs, pocket_probe.log_probs))
    assert divergence(pocket_engine.model, loaded) == divergence(pocket_engine.model, pocket_probe)
    (tmp_path / "probe.safetensors").write_bytes(b"no")
    with pytest.raises(LabError, match=r"probe\.safetensors is damaged"):
        Probe.load(tmp_path / "probe.safetensors")


def swapped(model, name, module, work):
    parent, _, own = name.rpartition(".")
    holder, before = model.get_submodule(parent), model.get_submodule(name)
    setattr(holder, own, module)
    try:
        return work()
    finally:
        setattr(holder, own, before)


@pytest.mark.parametrize("which", ["llama", "pocket"])
def test_replay_computes_the_same_for_every_linear(which, llama, pocket_engine, pocket_probe):
    model = llama if which == "llama" else pocket_engine.model
    probe = text_probe(llama, sequences()) if which == "llama" else pocket_probe
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    count = len(probe.inputs)
    replay = Replay(model, lambda index: probe.log_probs_of(model, index), count, names)
    for name in names[:: 1 if which == "llama" else 4]:
        module = get_scheme("int8").quantize_linear(model.get_submodule(name))

        def again(name=name):
            with replay.before(name):
                return [replay.run(index) for index in range(count)]

        plain = swapped(model, name, module, lambda: [probe.log_probs_of(model, i) for i in range(count)])
        for a, b in zip(plain, swapped(model, name, module, again)):
            assert torch.equal(a, b), name
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_replay_spares_what_lies_before():
    calls = []

    class Layer(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number, self.fc = number, nn.Linear(4, 4)

        def forward(self, x):
            calls.append(self.number)
            return self.fc(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(map(Layer, range(4)))

        def forward(self, x):
            for layer in (*self.layers, self.layers[0]):  # the first again at the end
                x = layer(x)
            return x

    model, x = Model(), torch.randn(2, 4)
    assert blocks_of(model, ["layers.2.fc"]) == [f"layers.{i}" for i in range(4)]
    with torch.no_grad():
        replay = Replay(model, lambda index: model(x), 1, ["layers.2.fc", "layers.0.fc"])
        calls.clear()
        with replay.before("layers.2.fc"):
            assert torch.equal(replay.run(0), model(x))
        assert calls[:3] == [2, 3, 0]
        model.layers[2].fc.weight.data *= 2
        with replay.before("layers.2.fc"):
            changed = replay.run(0)
        assert torch.equal(changed, model(x))
    assert replay.comes_to("layers.0.fc", 0)
    assert not replay.comes_to("layers.1.fc", 0)
