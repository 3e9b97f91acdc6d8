"""GGUF exports opened by llama.cpp on the CPU: its logits and its taps are the lab's own. Run by `make test-llama`.

``$LABKIT_LLAMA`` names the interpreter that has `xllamacpp`; without it these tests are skipped. llama.cpp keeps keys
and values in fp16 and rounds the inputs of quantized products to 8 bits, so that logits agree to these and not to the
last bit.
"""

import base64
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoint_models import save_glm4v, save_llama
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from labkit import phonetap
from labkit.loading.export import export
from labkit.loading.load import load
from labkit.loading.save import save
from labkit.phonetap.scoring import score
from labkit.plans.plan import QuantizationPlan
from labkit.quantization.affine import sqnr_db

LLAMA = os.environ.get("LABKIT_LLAMA")
PROGRAM = Path(__file__).parents[1] / "reader_site" / "llama_cpp_answers.py"
PROMPT = list(range(40, 64))
ITEMS = 30
INT4 = {"match": "re:.*", "scheme": "int4", "group_size": 32}
PLANS = {
    "fp32": QuantizationPlan.preset("fp32"),
    "q4_0": QuantizationPlan.from_dict({"name": "q4_0", "rules": [{**INT4, "symmetric": True}]}),
    "q4_1": QuantizationPlan.from_dict({"name": "q4_1", "rules": [INT4], "default": "fp32"}),
    "q8_0": QuantizationPlan.from_dict(
        {
            "name": "q8_0",
            "rules": [
                {"role": "embedding", "modules": "embedding", "scheme": "int8"},
                {"match": "re:.*", "scheme": "int8"},
            ],
            "default": "fp32",
        }
    ),
}
LEAST_DB = {"fp32": 50, "q4_0": 25, "q4_1": 25, "q8_0": 25}  # rows in the wrong order leave less than 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LLAMA is None, reason="$LABKIT_LLAMA is not set: run `make test-llama`"),
    pytest.mark.timeout(600),
]


def save_qwen(folder, config_class, model_class):
    config = config_class(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
    )  # fmt: skip
    tiny_models.random_model(model_class, config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


MODELS = {
    "llama": lambda folder: save_llama(folder, vocab_size=320),
    "glm4v": save_glm4v,
    "qwen2": lambda folder: save_qwen(folder, Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda folder: save_qwen(folder, Qwen3Config, Qwen3ForCausalLM),
}


def exported(model, plan, folder):
    """The lab's engine under the plan, and its export."""
    engine = load(model, plan, "cpu", progress=False)
    made = save(engine, folder / "q", progress=False)
    return engine, export(made, folder / "out", format="gguf", progress=False).folder


def ask(gguf, requests, mmproj="-"):
    """llama.cpp's answers."""
    questions, answers = gguf.parent / "requests.json", gguf.parent / "answers.json"
    questions.write_text(json.dumps(requests))
    command = [LLAMA, str(PROGRAM), str(gguf), str(mmproj), "16", "210", str(questions), str(answers)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(answers.read_text())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_the_labs(tmp_path, model, plan):
    engine, folder = exported(MODELS[model](tmp_path / "model"), PLANS[plan], tmp_path)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        logits = engine.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
    request = {
        "prompt": PROMPT,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": len(logits),
        "cache_prompt": False,
    }
    [answer] = ask(folder / "out.gguf", [request])
    [token] = answer["choices"][0]["logprobs"]["content"]
    theirs = torch.full_like(logits, -torch.inf)
    for entry in token["top_logprobs"]:
        theirs[entry["id"]] = entry["logprob"]
    assert theirs.isfinite().all()
    assert sqnr_db(logits - logits.mean(), theirs - theirs.mean()) > LEAST_DB[plan]


def chat(item):
    """An item as a request."""
    picture = io.BytesIO()
    item.screen.image.save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": item.instruction}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 64,
        "temperature": 0,
        "reasoning_format": "none",
        "chat_template_kwargs": {"enable_thinking": False},
    }


@pytest.mark.parametrize("plan", [None, "q4_0", "q8_0"])
def test_taps_on_pictures_are_the_labs(tmp_path, plan):
    if plan is None:
        engine = load("pocket-glm4v", "fp32", "cpu", progress=False)
        folder = export("pocket-glm4v", tmp_path / "out", format="gguf", progress=False).folder
    else:
        engine, folder = exported("pocket-glm4v", PLANS[plan], tmp_path)
    items = phonetap.items(split="typed,hard", count=ITEMS, part="test")
    answers = ask(folder / "out.gguf", [chat(item) for item in items], folder / "mmproj-out.gguf")
    alike = successes = 0
    for item, answer in zip(items, answers):
        theirs = answer["choices"][0]["message"]["content"]
        ours = engine.generate(item.messages(), max_new_tokens=64).text
        assert answer["usage"]["prompt_tokens"] == engine.prepare(item.messages())["input_ids"].shape[1]
        alike += ours == theirs
        successes += score(item, ours).success - score(item, theirs).success
    assert alike >= 0.85 * ITEMS
    assert abs(successes) <= 1
