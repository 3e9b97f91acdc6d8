"""A checkpoint that was cut off, changed, or made otherwise is refused, and the message says which file."""

import json
import shutil

import pytest
from checkpoint_models import save_llama
from safetensors.torch import load_file, save_file

from labkit.common.errors import CheckpointError, LabError
from labkit.common.files import sha256_of
from labkit.loading.load import load
from labkit.loading.manifest import Manifest, _digest
from labkit.loading.save import save


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    top = tmp_path_factory.mktemp("made")
    engine = load(save_llama(top / "llama"), "int4", "cpu", progress=False)
    return save(engine, top / "whole", progress=False)


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "copy")


def rewrite(folder, **changes):
    """Change the manifest and give it a fitting hash, as a careful tamperer would."""
    path = folder / "labkit.json"
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(body | {"sha256": _digest(body)}))


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, device="cpu", progress=False)
    assert "\n" not in str(caught.value)


def test_a_whole_copy_loads(folder):
    load(folder, device="cpu", progress=False)


@pytest.mark.parametrize("name", ["packed.safetensors", "tokenizer.json", "config.json", "plan.yaml"])
def test_a_file_that_is_cut_off_missing_or_changed_is_named(folder, name):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    refused(folder, rf"{name} is cut off: [\d,]+ bytes instead of {len(whole):,}")
    path.write_bytes(whole + b" ")
    refused(folder, f"{name} is longer than when it was written")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    refused(folder, rf"{name} has changed since it was written \(its hash differs\)")
    path.unlink()
    with pytest.raises(LabError, match=f"has no {name}"):
        load(folder, device="cpu", progress=False)


def test_a_changed_manifest_is_refused(folder):
    path = folder / "labkit.json"
    text = path.read_text()
    path.write_text(text.replace('"group_size": 64', '"group_size": 32', 1))
    refused(folder, r"labkit\.json has changed since it was written")
    path.write_text(text[: len(text) // 2])
    refused(folder, r"labkit\.json is damaged")
    path.write_text("[]")
    refused(folder, "it does not say 'labkit-checkpoint'")


def test_another_version_of_the_format_is_told(folder):
    rewrite(folder, version=2)
    refused(folder, "version 2 of the format, this lab reads 1: update labkit")


def test_file_names_cannot_leave_the_folder(folder):
    facts = Manifest.read(folder).files
    rewrite(folder, files={**facts, "../../secret": {"bytes": 1, "sha256": ""}})
    refused(folder, r"'\.\./\.\./secret' is no name of a file in the folder")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"scheme": "int5", "options": {}, "rule": 1}, "lm_head: unknown scheme 'int5'"),
        ({"scheme": "int4", "options": {"group_size": 48}, "rule": 1}, "lm_head: group_size 48 does not"),
        ({"scheme": "int4", "options": {"colour": 1}, "rule": 1}, "lm_head: unknown option 'colour'"),
        ({"scheme": "int8", "options": {}, "rule": 1}, "lm_head.packed, which the model has no place for"),
        (
            {"scheme": "int4", "options": {"group_size": 32}, "rule": 1},
            r"scale_zero is \(2, 263, 2\) .*\(4, 263",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused_by_name(folder, facts, message):
    modules = Manifest.read(folder).modules
    rewrite(folder, modules={**modules, "lm_head": facts})
    refused(folder, message)


def test_a_module_of_another_model_is_refused(folder):
    modules = Manifest.read(folder).modules
    rewrite(folder, modules={**modules, "model.layers.9.mlp": modules["lm_head"]})
    refused(
        folder,
        r"quantizes model\.layers\.9\.mlp, which the model .* does not have \(made with transformers 5",
    )


def test_a_missing_or_unknown_tensor_is_named(folder):
    path = folder / "packed.safetensors"
    tensors = load_file(path)
    for name, message in (("model.norm.weight", "lacks 1 tensors"), ("model.new.weight", "no place for")):
        changed = {key: value.clone() for key, value in tensors.items() if key != name}
        if name not in tensors:
            changed[name] = tensors["model.norm.weight"].clone()
        save_file(changed, path)
        facts = Manifest.read(folder).files
        facts[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        rewrite(folder, files=facts)
        refused(folder, message)


def test_the_card_may_be_edited(folder):
    (folder / "README.md").write_text("mine")
    load(folder, device="cpu", progress=False)


def test_a_scheme_that_cannot_run_here_is_named(folder, monkeypatch):
    from labkit.quantization import SchemeError
    from labkit.quantization.int4 import Int4

    def never(self, *_):
        raise SchemeError("int4 does not run here")

    monkeypatch.setattr(Int4, "validate_environment", never)
    refused(folder, r"model\.layers\.0\.self_attn\.q_proj: int4 does not run here")
