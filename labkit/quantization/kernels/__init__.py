"""Products with quantized weights: each function picks the fastest method on the tensor's device.

| file | product |
|---|---|
| `reference.py` | dequantize a slice of the weight, multiply, next slice: any device, dtype, width |
| `int8.py` | int8 weight: with bf16 activations, and with int8 activations |
| `cpu_int4.py` | torch's packed int4 product on the CPU, its order of bytes, and dequantizing from it |
| `upcast.py` | dense fp16 and bf16 products on a CPU that has no instructions for them |
| `cpu_nf4.py` | bitsandbytes' packed 4-bit product on the CPU, its order of bytes, and undoing it |

The fast products of torch and bitsandbytes used here are private functions: each is tested on a product with a
known result, and not used where it is missing or wrong. They are fast for few rows (decoding) and slow for many
(prefill), where dequantizing and multiplying is faster; the row counts at which the method changes were measured
on two cores with AVX-512 and AMX.
"""
