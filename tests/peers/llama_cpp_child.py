"""llama.cpp through `xllamacpp`, asked over pipes. Runs in any Python that has that package; imports nothing else.

    python llama_cpp_child.py MODEL.gguf THREADS CONTEXT

The first line it writes says what it is; then each line read, {"prompt": [token ids], "tokens": n}, is answered by
one: {"text", "prompt_ms", "decode_ms", "tokens"}, by llama.cpp's own clock.
"""

import json
import os
import sys


def main() -> None:
    """Serve until the pipe is closed."""
    out = os.fdopen(os.dup(1), "w", buffering=1)  # llama.cpp writes to 1 as well
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[2])
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = int(sys.argv[3]), 1, 0
    parameters.port = 0  # any that is free: its HTTP server is not used
    server = xllamacpp.Server(parameters)
    told = {"version": xllamacpp.__version__, "system": xllamacpp.get_system_info().strip()}
    out.write(json.dumps(told) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answer = server.handle_completions(
            {
                "prompt": request["prompt"],
                "n_predict": request["tokens"],
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        spent = answer["timings"]
        found = {
            "text": answer["choices"][0]["text"],
            "prompt_ms": spent["prompt_ms"],
            "decode_ms": spent["predicted_ms"],
            "tokens": spent["predicted_n"],
        }
        out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
