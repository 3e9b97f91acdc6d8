"""Exports opened by vLLM's CPU build: its log-probabilities are the lab's own. Run by `make test-vllm`.

Not tried, since that build has no kernels for them: W8A16, and W8A8 in a vision encoder.

``$LABKIT_VLLM`` names the interpreter of vLLM's environment; without it these tests are skipped. Both compute in
bf16, each in its own order, so they agree to bf16's rounding and not to the last bit.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoint_models import picture

from labkit.loading.export import export
from labkit.loading.load import load
from labkit.loading.save import save
from labkit.plans.plan import QuantizationPlan

VLLM = os.environ.get("LABKIT_VLLM")
SITE = Path(__file__).parents[1] / "vllm_site"
VIDEO = ("<|begin_of_video|>", "<|end_of_video|>", "<|video|>")  # vLLM's Glm4v wants them in the tokenizer
LARGEST, MEAN = 0.25, 0.06  # of |log-probability of vLLM - of the lab|

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VLLM is None, reason="$LABKIT_VLLM is not set: run `make test-vllm`"),
    pytest.mark.timeout(900),
]


def tokenizer():
    words = tiny_models.tokenizer()
    words.add_tokens(list(VIDEO), special_tokens=True)
    return words


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models whose sizes its kernels take: output features are multiples of 32."""
    from transformers import Glm4vForConditionalGeneration, LlamaForCausalLM

    top, words = tmp_path_factory.mktemp("models"), tokenizer()
    llama, glm4v = tiny_models.llama_config(), tiny_models.glm4v_config()
    llama.vocab_size = glm4v.text_config.vocab_size = 320
    names = ("video_start_token_id", "video_end_token_id", "video_token_id")
    for name, token in zip(names, VIDEO):
        setattr(glm4v, name, words.convert_tokens_to_ids(token))
    for name, kind, config in (
        ("llama", LlamaForCausalLM, llama),
        ("glm4v", Glm4vForConditionalGeneration, glm4v),
    ):
        tiny_models.random_model(kind, config).to(torch.bfloat16).save_pretrained(top / name)
        words.save_pretrained(top / name)
    tiny_models.image_processor().save_pretrained(top / "glm4v")
    return {name: top / name for name in ("llama", "glm4v")}


def answers_of_vllm(folder, prompts, top):
    request = {"folder": str(folder), "prompts": prompts, "tokens": 8, "result": str(top / "answers.json")}
    environment = {
        **os.environ,
        "PYTHONPATH": str(SITE),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [VLLM, str(SITE / "answer.py")],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((top / "answers.json").read_text())


def check(engine, answer, inputs):
    """Compare every position, prompt and answer, with the lab's log-probabilities of the same tokens."""
    assert answer["prompt_ids"] == inputs["input_ids"][0].tolist()
    ids = torch.tensor([answer["prompt_ids"] + answer["token_ids"][:-1]])
    text = torch.zeros(1, len(answer["token_ids"]) - 1, dtype=torch.long)
    more = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in more:
        more["mm_token_type_ids"] = torch.cat((more["mm_token_type_ids"], text), 1)
    with torch.inference_mode():
        logits = engine.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]
    ours = torch.log_softmax(logits.float(), -1)
    assert len(answer["logprobs"]) == len(ours)
    differences = torch.tensor(
        [
            abs(value - ours[place, int(token)].item())
            for place, likeliest in enumerate(answer["logprobs"])
            for token, value in likeliest.items()
        ]
    )
    print(
        f"|difference| of {len(differences)}: largest {differences.max():.3f}, mean {differences.mean():.4f}"
    )
    assert differences.max() < LARGEST
    assert differences.mean() < MEAN
    for place, token in enumerate(answer["token_ids"], start=len(answer["prompt_ids"]) - 1):
        assert ours[place, token] > ours[place].max() - LARGEST


def plan_of(*rules):
    return QuantizationPlan.from_dict({"name": "p", "rules": list(rules)})


INT4 = {"scheme": "int4", "symmetric": True}


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (
            plan_of(
                {"match": "re:.*mlp.*", **INT4},
                {"match": "re:.*self_attn.*", "scheme": "int8-dynamic"},
                {"match": "lm_head", **INT4, "group_size": 32},
            ),
            {"format": "compressed-tensors"},
        ),
        (plan_of({"role": "decoder", "scheme": "int4"}), {"format": "compressed-tensors"}),
        (plan_of({"role": "decoder", **INT4}), {"format": "gptq"}),
    ],
    ids=["w4a16-w8a8", "asymmetric", "gptq"],
)
def test_a_language_model(folders, tmp_path, plan, options):
    engine = load(folders["llama"], plan, "cpu", progress=False)
    done = export(save(engine, tmp_path / "q", progress=False), progress=False, **options)
    ids = list(range(40, 64))
    [answer] = answers_of_vllm(done.folder, [{"token_ids": ids}], tmp_path)
    check(engine, answer, {"input_ids": torch.tensor([ids])})


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        ([{"role": "decoder", **INT4}], {"format": "compressed-tensors"}),
        (
            [{"role": "decoder", **INT4}, {"role": ["vision", "projector"], **INT4}],
            {"format": "compressed-tensors"},
        ),
        (
            [{"role": "decoder", **INT4}, {"role": "vision", "scheme": "nf4"}],
            {"format": "gptq", "dequantize": ["vision"]},
        ),
    ],
    ids=["decoder", "decoder-and-vision", "gptq"],
)
def test_a_vision_language_model(folders, tmp_path, rules, options):
    engine = load(folders["glm4v"], plan_of(*rules), "cpu", progress=False)
    done = export(save(engine, tmp_path / "q", progress=False), progress=False, **options)
    picture().save(tmp_path / "picture.png")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "where?"}],
        }
    ]
    inputs = engine.prepare(messages)
    text = "<|user|>\n<|begin_of_image|><|image|><|end_of_image|>where?<|assistant|>\n"
    [answer] = answers_of_vllm(
        done.folder, [{"text": text, "image": str(tmp_path / "picture.png")}], tmp_path
    )
    check(engine, answer, inputs)
