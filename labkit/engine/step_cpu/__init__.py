"""The decoding step on the CPU: all of it in the compiled library, from the memory that torch's modules hold.

decoder.py    a model's decoder as the library reads it, or the reason why it cannot be described
compiled.py   the step for `labkit.engine.forward.Forward`: rows, positions, and the call
"""
