"""Saved and restored: the same bits, the same answers, without the original weights, whole or not at all."""

import json
import os
import shutil

import pytest
import torch
from checkpoint_models import (
    HELLO,
    PLANS,
    calibration_for,
    logits,
    question,
    save_glm4v,
    save_llama,
    save_pocket,
)
from safetensors.torch import load_file

import labkit
from labkit.common.errors import CheckpointError
from labkit.common.files import sha256_of
from labkit.loading.load import load
from labkit.loading.manifest import Manifest
from labkit.loading.save import save
from labkit.models.checkpoint import Checkpoint
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import weights_bytes

MAKERS = {"llama": save_llama, "glm4v": save_glm4v, "pocket": save_pocket}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return {name: make(top / name) for name, make in MAKERS.items()}


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("which", MAKERS)
@pytest.mark.filterwarnings("ignore:plan ")
def test_every_scheme_is_restored_bit_for_bit(folders, tmp_path, which, plan):
    engine = load(folders[which], PLANS[plan], "cpu", calibration=calibration_for(which), progress=False)
    folder = save(engine, tmp_path / "quantized", progress=False)
    restored = load(folder, device="cpu", progress=False)
    assert torch.equal(logits(restored), logits(engine))
    messages = question(engine)
    answers = [one.generate(messages, max_new_tokens=12).token_ids for one in (restored, engine)]
    assert answers[0] == answers[1]
    assert restored.plan == engine.plan
    assert restored.resolved.schemes == engine.resolved.schemes
    assert restored.resolved.parts == engine.resolved.parts
    assert weights_bytes(restored.model) == engine.resolved.predicted_bytes


def test_saving_what_was_restored_writes_the_same_files(folders, tmp_path):
    first = save(load(folders["glm4v"], "int4", "cpu", progress=False), tmp_path / "same", progress=False)
    second = save(load(first, device="cpu", progress=False), tmp_path / "again" / "same", progress=False)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert sha256_of(first / name) == sha256_of(second / name), name


def test_nothing_but_the_folder_is_needed(tmp_path, monkeypatch):
    original = save_llama(tmp_path / "original")
    engine = load(original, "int4", "cpu", progress=False)
    folder = save(engine, tmp_path / "quantized", progress=False)
    moved = folder.rename(tmp_path / "elsewhere")
    shutil.rmtree(original)
    monkeypatch.setattr(Checkpoint, "weights", lambda *_: pytest.fail("original weights were read"))
    monkeypatch.setattr(
        "labkit.loading.load.fill_", lambda *_, **__: pytest.fail("the model was quantized anew")
    )
    assert torch.equal(logits(labkit.load(moved, device="cpu", progress=False)), logits(engine))


def test_a_tie_stays_a_tie_and_a_cut_one_stays_cut(tmp_path):
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    plan = QuantizationPlan.from_dict({"name": "head", "rules": [{"match": "lm_head", "scheme": "int8"}]})
    for number, (chosen, tied) in enumerate([("int4", True), (plan, False)]):
        engine = load(folder, chosen, "cpu", progress=False)
        made = save(engine, tmp_path / str(number), progress=False)
        restored = load(made, device="cpu", progress=False)
        embedding = restored.model.get_input_embeddings().weight
        assert (restored.model.lm_head.weight is embedding) == tied
        assert ("lm_head.weight" in Manifest.read(made).ties) == tied
        assert torch.equal(logits(restored), logits(engine))
        assert weights_bytes(restored.model) == engine.resolved.predicted_bytes


def test_large_models_are_written_in_shards(folders, tmp_path):
    engine = load(folders["llama"], "int8", "cpu", progress=False)
    folder = save(engine, tmp_path / "shards", shard_bytes=100_000, progress=False)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"packed-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(logits(load(folder, device="cpu", progress=False)), logits(engine))


def test_packed_bytes_lie_in_plain_order_whatever_the_device_likes(folders, tmp_path):
    engine = load(folders["llama"], "int4", "cpu", progress=False)
    stored = tensors_of(save(engine, tmp_path / "plain", progress=False))
    name = "model.layers.0.mlp.gate_proj"
    module = engine.model.get_submodule(name)
    assert torch.equal(stored[f"{name}.packed"], module.relayout(module.packed, module.layout, "plain"))


def test_restored_memory_is_its_own(folders, tmp_path):
    engine = load(folders["llama"], "int8", "cpu", progress=False)
    folder = save(engine, tmp_path / "own", progress=False)
    restored = load(folder, device="cpu", progress=False)
    before = logits(restored).clone()
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(logits(restored), before)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in restored.model.parameters())


def test_the_folder_says_what_it_is_made_of(folders, tmp_path):
    engine = load(folders["llama"], "int4", "cpu", progress=False)
    folder = save(engine, tmp_path / "facts", progress=False)
    manifest = Manifest.read(folder)
    assert manifest.base["name"] == "llama"
    assert manifest.base["source"] == str(folders["llama"])
    assert len(manifest.base["fingerprint"]) == 64
    assert manifest.base["parameters"] == engine.resolved.parameters
    assert manifest.calibration is None
    assert manifest.weights_bytes == engine.resolved.predicted_bytes
    assert manifest.modules["lm_head"]["scheme"] == "int4"
    assert manifest.modules["lm_head"]["options"]["group_size"] == 64
    assert manifest.made_with["packages"]["torch"] == torch.__version__
    assert QuantizationPlan.from_yaml(folder / "plan.yaml") == engine.plan
    card = (folder / "README.md").read_text()
    assert "llama under the plan int4" in card
    assert "| decoder | int4 | 14 |" in card
    assert str(folders["llama"].parent) not in card
    assert (folder / "tokenizer.json").read_bytes() == (folders["llama"] / "tokenizer.json").read_bytes()


def test_files_get_ordinary_permissions(folders, tmp_path):
    old = os.umask(0o027)
    try:
        engine = load(folders["llama"], "int8", "cpu", progress=False)
        folder = save(engine, tmp_path / "modes", progress=False)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


def test_other_libraries_refuse_the_folder(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save(load(folders["llama"], "int4", "cpu", progress=False), tmp_path / "q", progress=False)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_another_plan_is_refused_and_the_same_is_not(folders, tmp_path):
    folder = save(load(folders["llama"], "int4", "cpu", progress=False), tmp_path / "q4", progress=False)
    assert load(folder, "int4", "cpu", progress=False).plan.name == "int4"
    with pytest.raises(CheckpointError, match=r"q4 is quantized already, by the plan int4; .* under int8"):
        load(folder, "int8", "cpu")
    other = QuantizationPlan.from_dict({**QuantizationPlan.preset("int8").to_dict(), "name": "int4"})
    with pytest.raises(CheckpointError, match="under int4, of that name but another content: load llama"):
        load(folder, other, "cpu")
    with pytest.raises(CheckpointError, match="stored in bf16, not in fp32"):
        load(folder, dtype="fp32", device="cpu")
    with pytest.raises(CheckpointError, match="takes no calibration"):
        load(folder, calibration=[], device="cpu")


def test_other_folders_are_never_replaced(folders, tmp_path):
    engine = load(folders["llama"], "int8", "cpu", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="holds other files, which are never deleted"):
            save(engine, tmp_path / "mine", force=force, progress=False)
    with pytest.raises(CheckpointError, match="is a file or a link"):
        save(engine, tmp_path / "mine/letter.txt", progress=False)
    with pytest.raises(CheckpointError, match="cannot be made"):
        save(engine, tmp_path / "mine/letter.txt/below", progress=False)
    (tmp_path / "empty").mkdir()
    folder = save(engine, tmp_path / "empty", progress=False)
    with pytest.raises(CheckpointError, match="is there already: give another folder, or --force"):
        save(engine, folder, progress=False)
    smaller = load(folders["llama"], "int4", "cpu", progress=False)
    save(smaller, folder, force=True, progress=False)
    assert Manifest.read(folder).plan["name"] == "int4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


@pytest.mark.parametrize("there_before", [False, True])
def test_an_error_while_writing_leaves_what_was_there(folders, tmp_path, monkeypatch, there_before):
    engine = load(folders["llama"], "int8", "cpu", progress=False)
    folder = tmp_path / "target"
    if there_before:
        save(engine, folder, progress=False)
    before = {path.name: sha256_of(path) for path in folder.iterdir()} if there_before else None

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("labkit.loading.tensors.save_file", full)
    with pytest.raises(CheckpointError, match="target cannot be written: No space left on device"):
        save(engine, folder, force=True, progress=False)
    now = {path.name: sha256_of(path) for path in folder.iterdir()} if folder.exists() else None
    assert now == before
    assert len(list(tmp_path.iterdir())) == there_before


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(folders, tmp_path, monkeypatch):
    engine = load(folders["llama"], "int8", "cpu", progress=False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB of disk"):
        save(engine, tmp_path / "target", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_are_removed_and_an_old_folder_comes_back(folders, tmp_path):
    engine = load(folders["llama"], "int8", "cpu", progress=False)
    folder = save(engine, tmp_path / "target", progress=False)
    dead = 2**22 + 1  # above the largest process id
    folder.rename(tmp_path / f".target.{dead}.old")
    (tmp_path / f".target.{dead}.tmp").mkdir()
    (tmp_path / ".target.notes").mkdir()
    with pytest.raises(CheckpointError, match=r"no labkit\.json"):
        Manifest.read(folder)
    save(engine, folder, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.notes", "target"]


def test_a_generation_config_is_restored(tmp_path):
    original = save_llama(tmp_path / "original")
    settings = {"eos_token_id": [256, 257], "max_new_tokens": 7}
    (original / "generation_config.json").write_text(json.dumps(settings))
    engine = load(original, "int8", "cpu", progress=False)
    restored = load(save(engine, tmp_path / "q", progress=False), device="cpu", progress=False)
    assert restored.model.generation_config.eos_token_id == [256, 257]
    assert restored.end_token_ids == engine.end_token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.filterwarnings("ignore:plan ")
def test_a_file_made_on_one_device_loads_on_the_other(folders, tmp_path, plan):
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        engine = load(
            folders["llama"], PLANS[plan], here, calibration=calibration_for("llama"), progress=False
        )
        folder = save(engine, tmp_path / here, progress=False)
        moved = load(folder, device=there, progress=False)
        assert moved.device.type == there
        again = save(moved, tmp_path / f"{here}-{there}", progress=False)
        kept, back = tensors_of(folder), tensors_of(again)
        assert all(torch.equal(kept[name], back[name]) for name in kept)
        assert moved.generate(HELLO, max_new_tokens=3).completion_tokens == 3
