"""Schemes: how one Linear's weight, and perhaps its activations, are stored and multiplied.

| file | what |
|---|---|
| `scheme.py` | the base class, the registry, options with help texts |
| `affine.py` | the arithmetic: scales and zero points, rounding, packing |
| `linear.py` | the module that stands in a Linear's place |
| `dense.py` | fp32, fp16, bf16 |
| `int8.py`, `int8_dynamic.py`, `int4.py` | the lab's own schemes |
| `gptq.py`, `awq.py` | int4's storage, solved on calibration (`statistics.py`, `range_search.py`) |
| `hqq.py` | int4's storage, fitted without calibration |
| `nf4.py`, `llm_int8.py` | bitsandbytes' schemes |
| `int8_storage.py` | embeddings and convolutions whose weight is stored in 8 bits |
| `kernels/` | the products, chosen by device |
"""

# The order of import is the order in which schemes are listed.
# isort: off
from labkit.quantization import dense as dense
from labkit.quantization import int8 as int8
from labkit.quantization import int8_dynamic as int8_dynamic
from labkit.quantization import int4 as int4
from labkit.quantization import gptq as gptq
from labkit.quantization import awq as awq
from labkit.quantization import hqq as hqq
from labkit.quantization import nf4 as nf4
from labkit.quantization import llm_int8 as llm_int8

# isort: on
from labkit.common.errors import SchemeError
from labkit.quantization.linear import QuantizedLinear
from labkit.quantization.scheme import DTYPES, Scheme, get_scheme, known_schemes, register

__all__ = ["DTYPES", "QuantizedLinear", "Scheme", "SchemeError", "get_scheme", "known_schemes", "register"]
