"""Speed on the CPU, measured beside others in one run.

| file | what |
|---|---|
| `cli.py` | `labkit bench-cpu` and `labkit bench-streams` |
| `run.py` | a small language model by the lab's plans and by llama.cpp, turn by turn |
| `small_model.py` | the same weights in the lab: a Llama and its tokenizer from a GGUF file |
| `peer.py` | llama.cpp in a process of its own |
| `llama_cpp_child.py` | what runs there; imports nothing of the lab |
| `streams.py` | several answers at a time against one |

Cores that others use too make every absolute figure worthless; ratios of turns that follow one another say something
still. So each round asks every engine once, in changing order, and ratios are taken within a round.
"""
