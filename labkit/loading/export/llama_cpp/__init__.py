"""llama.cpp's format: ``NAME.gguf`` for the language model, ``mmproj-NAME.gguf`` for the eye and its projector.

| file | what |
|---|---|
| `rules.py` | which Linears the format's blocks hold exactly |
| `blocks.py` | Q4_0, Q4_1 and Q8_0, and tensors that are not quantized |
| `models.py` | the architectures: names of tensors, order of rows, hyperparameters |
| `tokens.py` | the tokenizer |
| `files.py` | the two files, tensor by tensor |
"""
