"""Quantized checkpoints in the formats of other engines: the same integers and scales in their layout.

| file | what |
|---|---|
| `integers.py` | a quantized Linear as codes, scales and zero points; what is none is refused |
| `packing.py` | codes of 2, 3, 4 or 8 bits as a stream of bits in 32-bit words |
| `compressed_tensors.py` | for transformers and vLLM: each Linear its own width, groups and symmetry |
| `gptq.py` | AutoGPTQ's layout and ``quantize_config.json``, for engines that only read that |
| `write.py` | the folder: tensors, configuration, tokenizer |
| `readme.py` | what its readers must know, and the folder's ``README.md`` |
"""

from labkit.loading.export.write import Exported, export

__all__ = ["Exported", "export"]
