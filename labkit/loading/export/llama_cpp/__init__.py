"""llama.cpp's format: one file for the language model, one for the eye and its projector.

The files are ``NAME.gguf`` and ``mmproj-NAME.gguf``.

| file | what |
|---|---|
| `rules.py` | which Linears the format's blocks hold exactly |
| `blocks.py` | Q4_0, Q4_1 and Q8_0, and tensors that are not quantized |
| `models.py` | the architectures: names of tensors, order of rows, hyperparameters |
| `tokens.py` | the tokenizer |
| `files.py` | the two files, tensor by tensor |
"""
