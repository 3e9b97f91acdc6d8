"""Quantized checkpoints in the formats of other engines: the same integers and scales in their layout.

| file | what |
|---|---|
| `integers.py` | a quantized Linear as codes, scales and zero points; refuses other weights |
| `selection.py` | which Linears are written quantized |
| `refusal.py` | what a format cannot express, and the nearest that it can |
| `formats.py` | the formats by name, and what each of them provides |
| `packing.py` | codes of 2, 3, 4 or 8 bits as a bit stream in 32-bit words |
| `compressed_tensors.py` | for transformers and vLLM: width, groups and symmetry per Linear |
| `gptq.py` | AutoGPTQ's layout and ``quantize_config.json``, for engines that read only that |
| `llama_cpp/` | GGUF, for llama.cpp: text model and eye |
| `parts.py` | a model's own tensors, module by module |
| `folder.py` | a folder in transformers' layout: tensors, configuration, tokenizer |
| `write.py` | an export from its checks to its model card |
| `readme.py` | notes for its readers, and the folder's ``README.md`` |
"""

from labkit.loading.export.write import Exported, export

__all__ = ["Exported", "export"]
