"""Loads a gptq export by GPTQModel and writes its logits. Run by its own interpreter: see `make test-readers`.

Arguments: the folder, the prompt's tokens separated by commas, the file of logits.
"""

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file

folder, tokens, result = sys.argv[1:]
loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
ids = torch.tensor([[int(token) for token in tokens.split(",")]])
with torch.inference_mode():
    logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
save_file({"logits": logits.float().contiguous()}, result)
