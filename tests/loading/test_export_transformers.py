"""Exports opened by transformers with the package compressed-tensors: its logits are the lab's own.

In fp32, so that what differs is the reading of integers and scales and not the rounding of products.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_models import HELLO, logits, picture, question, save_glm4v, save_llama, save_pocket

from labkit.loading.export import export
from labkit.loading.load import load
from labkit.loading.save import save
from labkit.plans.plan import QuantizationPlan
from labkit.quantization import QuantizedLinear
from labkit.quantization.affine import sqnr_db

pytest.importorskip("compressed_tensors", reason="the extra `test` brings it")

ROOT = Path(__file__).resolve().parents[2]
EXACT_WEIGHTS_DB = 45  # an asymmetric zero, zero_point * scale, is rounded to bf16 in the lab
EXACT_DB = 90  # fp32's own rounding
TOKENS_DB = 20  # int8 activations: the package scales a token by its largest value / 127.5, the lab by / 127


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return {
        "llama": save_llama(top / "llama"),
        "tied": save_llama(top / "tied", tie_word_embeddings=True),
        "glm4v": save_glm4v(top / "glm4v"),
    }


def plan_of(*rules):
    return QuantizationPlan.from_dict({"name": "p", "rules": list(rules), "default": "fp32"})


def everything(scheme, **options):
    return {"match": "re:.*", "scheme": scheme, **options}


def made(folder, plan, top, **options):
    engine = load(folder, plan, "cpu", progress=False)
    return engine, export(save(engine, top / "q", progress=False), top / "out", progress=False, **options)


def opened(folder, **options):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if "glm4v" in str(folder) else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def agreement(engine, model, messages=HELLO):
    """Decibels between the logits, once the weights that both multiply by are found to be the same."""
    inputs = engine.prepare(messages)
    with torch.inference_mode():
        answered = model(**inputs).logits[0]  # decompresses its weights
    for name in engine.resolved.schemes:
        ours, theirs = (one.get_submodule(name) for one in (engine.model, model))
        if isinstance(ours, QuantizedLinear):
            assert sqnr_db(ours.dequantize(torch.float32), theirs.weight.float()) > EXACT_WEIGHTS_DB, name
    return sqnr_db(logits(engine, messages), answered)


@pytest.mark.parametrize(
    ("rule", "least_db"),
    [
        (everything("int4", symmetric=True), EXACT_DB),
        (everything("int4", symmetric=True, group_size=32), EXACT_DB),
        (everything("int4", symmetric=True, num_bits=8, group_size=128), EXACT_DB),
        (everything("int4", symmetric=True, num_bits=2), EXACT_DB),
        (everything("int8"), EXACT_DB),
        (everything("int8-dynamic"), TOKENS_DB),
    ],
    ids=["w4", "w4-g32", "w8-g128", "w2", "w8", "w8a8"],
)
def test_a_language_model_answers_alike(folders, tmp_path, rule, least_db):
    engine, done = made(folders["llama"], plan_of(rule), tmp_path)
    assert done.quantized == 15
    assert agreement(engine, opened(done.folder)) > least_db


def test_several_groups_in_one_model(folders, tmp_path):
    rules = (
        {"match": "re:.*mlp.*", "scheme": "int4", "symmetric": True},
        {"match": "re:.*o_proj", "scheme": "int8"},
        {"match": "re:.*layers.0.*", "scheme": "int8-dynamic"},
    )
    engine, done = made(folders["llama"], plan_of(*rules), tmp_path)
    assert agreement(engine, opened(done.folder)) > TOKENS_DB


@pytest.mark.parametrize("head", [None, "int8"])
def test_a_tied_model(folders, tmp_path, head):
    rules = [{"role": "decoder", "scheme": "int4", "symmetric": True}]
    if head:
        rules.append({"match": "lm_head", "scheme": head})
    engine, done = made(folders["tied"], plan_of(*rules), tmp_path)
    assert agreement(engine, opened(done.folder)) > EXACT_DB


@pytest.mark.parametrize("vision", [None, "int8", "int8-dynamic"])
def test_a_vision_language_model_sees_alike(folders, tmp_path, vision):
    rules = [{"role": "decoder", "scheme": "int4", "symmetric": True}]
    if vision:
        rules.append({"role": ["vision", "projector"], "scheme": vision})
    top = tmp_path / "glm4v"
    engine, done = made(folders["glm4v"], plan_of(*rules), top)
    seen = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "?"}]}
    ]
    assert agreement(engine, opened(done.folder), seen) > (
        TOKENS_DB if vision == "int8-dynamic" else EXACT_DB
    )


def test_a_part_written_unquantized_answers_alike(folders, tmp_path):
    top = tmp_path / "glm4v"
    rules = (
        {"role": "decoder", "scheme": "int8"},
        {"role": "vision", "scheme": "nf4", "compute_dtype": "fp32"},
    )
    engine, done = made(folders["glm4v"], plan_of(*rules), top, dequantize=["vision"])
    seen = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    assert agreement(engine, opened(done.folder), seen) > EXACT_DB


def test_asymmetric_weights_load_dequantized_as_the_export_says(folders, tmp_path):
    from transformers import CompressedTensorsConfig

    engine, done = made(folders["llama"], plan_of(everything("int4")), tmp_path)
    assert "transformers 5.23 does only with CompressedTensorsConfig(dequantize=True)" in done.notes[0]
    with pytest.raises(RuntimeError, match="mismatched"):
        opened(done.folder)
    model = opened(done.folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert agreement(engine, model) > 45  # the lab rounds zero_point * scale to bf16


def test_the_pocket_model_loads_where_its_class_is_known(tmp_path):
    from labkit.models.pocket import PocketForConditionalGeneration

    folder = save_pocket(tmp_path / "pocket")
    rules = (
        {"role": "decoder", "scheme": "int4", "symmetric": True},
        {"role": ["vision", "speech", "cross_modal", "projector"], "scheme": "int8"},
    )
    engine, done = made(folder, plan_of(*rules), tmp_path)
    assert "No other engine has the pocket model's architecture" in done.notes[0]
    model = PocketForConditionalGeneration.from_pretrained(done.folder, dtype="auto").eval()
    assert agreement(engine, model, question(engine)) > EXACT_DB


def test_it_loads_where_labkit_is_not(folders, tmp_path):
    engine, done = made(folders["llama"], plan_of(everything("int4", symmetric=True)), tmp_path)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
        "words = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = words('hello', return_tensors='pt')\n"
        "print(*model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist())\n"
        "assert 'labkit' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(done.folder)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    ids = engine.tokenizer("hello", return_tensors="pt")
    expected = engine.model.generate(**ids, max_new_tokens=8, do_sample=False)[0].tolist()
    assert told.stdout.split() == [str(one) for one in expected]
