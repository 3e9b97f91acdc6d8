"""gptq exports opened by GPTQModel on the CPU: its logits are the lab's own. Run by `make test-readers`.

``$LABKIT_READERS`` names the interpreter of the readers' environment; without it these tests are skipped. What
compressed-tensors promises is opened by transformers in test_export_transformers.py, and by vLLM in test_export_vllm.py.
GPTQModel multiplies in fp16 and the lab in fp32, so they agree to fp16's rounding and not to the last bit.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_models import save_glm4v, save_llama
from safetensors.torch import load_file

from labkit.loading.export import export
from labkit.loading.load import load
from labkit.loading.save import save
from labkit.plans.plan import QuantizationPlan
from labkit.quantization.affine import sqnr_db

READERS = os.environ.get("LABKIT_READERS")
PROGRAM = Path(__file__).parents[1] / "reader_site" / "gptqmodel_logits.py"
LEAST_DB = 35  # a wrong zero point, or halves in the wrong order, leave less than 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(READERS is None, reason="$LABKIT_READERS is not set: run `make test-readers`"),
    pytest.mark.timeout(600),
]

INT4 = {"scheme": "int4", "symmetric": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return {"llama": save_llama(top / "llama", vocab_size=320), "glm4v": save_glm4v(top / "glm4v")}


@pytest.mark.parametrize(
    ("model", "rules"),
    [
        ("llama", [{"role": "decoder", **INT4}]),
        ("llama", [{"role": "decoder", "scheme": "int4"}]),
        ("llama", [{"role": "decoder", **INT4, "num_bits": 2}]),
        ("llama", [{"role": "decoder", **INT4, "num_bits": 3}]),
        ("llama", [{"role": "decoder", "scheme": "int8"}, {"match": "lm_head", "scheme": "int8"}]),
        (
            "llama",
            [
                {"match": "re:.*mlp.*", "scheme": "int8"},
                {"match": "re:.*layers.0.*o_proj", "scheme": "bf16"},
                {"role": "decoder", **INT4},
            ],
        ),
        ("glm4v", [{"role": "decoder", **INT4}]),
        (
            "glm4v",
            [{"match": "re:.*layers.0.mlp.gate_up_proj", "scheme": "bf16"}, {"role": "decoder", **INT4}],
        ),
        ("glm4v", [{"role": "decoder", "scheme": "int8"}, {"role": "vision", "scheme": "nf4"}]),
    ],
    ids=["w4", "asymmetric", "w2", "w3", "w8-head", "mixed", "glm4v", "glm4v-mixed", "glm4v-auto"],
)
def test_gptqmodel_answers_alike(folders, tmp_path, model, rules):
    plan = QuantizationPlan.from_dict({"name": "p", "rules": rules, "default": "fp32"})
    engine = load(folders[model], plan, "cpu", progress=False)
    made = save(engine, tmp_path / "q", progress=False)
    done = export(made, format="gptq", dequantize=["auto"], progress=False)
    tokens = list(range(40, 64))
    command = [READERS, str(PROGRAM), str(done.folder), ",".join(map(str, tokens)), str(tmp_path / "logits")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        logits = engine.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    assert sqnr_db(logits.float(), load_file(tmp_path / "logits")["logits"]) > LEAST_DB
