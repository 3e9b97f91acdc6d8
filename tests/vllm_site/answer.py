"""What vLLM answers: run by its own interpreter, ``python answer.py``, with a request in JSON on standard input.

Request: ``{"folder", "prompts": [{"token_ids"} or {"text", "image"}], "tokens", "result"}``. To the file ``result``
it writes for each prompt the token ids that vLLM made of it, the tokens it generated, and for every position the
log-probabilities of its likeliest tokens.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    seeing = any("image" in prompt for prompt in request["prompts"])
    llm = LLM(
        model=request["folder"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        enable_prefix_caching=False,
        **({"limit_mm_per_prompt": {"image": 1, "video": 0}} if seeing else {}),
    )
    settings = SamplingParams(
        temperature=0, max_tokens=request["tokens"], logprobs=5, prompt_logprobs=5, ignore_eos=True
    )
    prompts = [as_vllm(prompt) for prompt in request["prompts"]]
    answers = []
    for done in llm.generate(prompts, settings, use_tqdm=False):
        likeliest = [*(done.prompt_logprobs[1:]), *done.outputs[0].logprobs]
        answers.append(
            {
                "prompt_ids": list(done.prompt_token_ids),
                "token_ids": list(done.outputs[0].token_ids),
                "logprobs": [{token: one.logprob for token, one in place.items()} for place in likeliest],
            }
        )
    Path(request["result"]).write_text(json.dumps(answers))


def as_vllm(prompt: dict) -> dict:
    if "image" not in prompt:
        return {"prompt_token_ids": prompt["token_ids"]}
    from PIL import Image

    return {
        "prompt": prompt["text"],
        "multi_modal_data": {"image": Image.open(prompt["image"]).convert("RGB")},
    }


if __name__ == "__main__":
    main()
