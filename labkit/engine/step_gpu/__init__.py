"""The decoding step on a GPU: a few kernels a layer, captured once and replayed for every token.

decoder.py    what a model's decoder is made of, or why it is not one this knows
products.py   its Linears as products: q, k and v in one, gate and up with their gate
cache.py      keys and values of one conversation in one buffer, in 8 bits or in a window as the plan says
step.py       one token of several rows, by kernels
reference.py  the same in plain torch, row by row: what the kernels are tested against
captured.py   the captured step for `labkit.engine.forward.Forward`
"""
