"""Code that is compiled on the machine it runs on: a decoding step of a decoder on the CPU.

| file | what |
|---|---|
| `vectors.h` | vectors of floats with AVX-512, AVX2, or whatever the compiler makes of plain loops |
| `linear.h` | a weight as the lab's modules keep it |
| `model.h` | a decoder and its rows as they are described |
| `inputs.h` | the inputs of a product, in the forms that products take |
| `products.h` | products of a few rows with fp32, fp16, bf16, int8 and int4 weights |
| `pairs.h` | those of bf16 rows where the processor multiplies two inputs at a time |
| `attention.h` | a new token's attention, heads that share keys together |
| `step.cpp` | a whole step: embedding, layers, head |
| `library.py` | compiles them once, keeps the library in the cache folder, and says how to call it |

The compiled code does not use torch. Without a compiler the lab computes the same through torch
(`labkit.engine.forward`), and ``labkit doctor`` reports it.
"""
