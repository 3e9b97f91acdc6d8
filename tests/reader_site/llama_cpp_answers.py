"""llama.cpp's answers to requests of its server, through `xllamacpp`. Runs in any Python that has that package.

    python llama_cpp_answers.py MODEL.gguf MMPROJ.gguf|- LEAST MOST REQUESTS.json ANSWERS.json

LEAST and MOST are the image tokens; a request with ``messages`` is a chat, any other a completion. Its answer is the
server's own, or {"error": ...}.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Answer all requests, in order."""
    import xllamacpp

    model, mmproj, least, most, requests, answers = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    if mmproj != "-":
        parameters.mmproj.path = mmproj
        parameters.image_min_tokens, parameters.image_max_tokens = int(least), int(most)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 1024, 1, 0
    parameters.use_jinja = True
    parameters.warmup = False
    parameters.port = 0
    server = xllamacpp.Server(parameters)
    done = []
    for request in json.loads(Path(requests).read_text()):
        handle = server.handle_chat_completions if "messages" in request else server.handle_completions
        done.append(handle(request))
    Path(answers).write_text(json.dumps(done))
    os._exit(0)  # its server's threads would be waited for


if __name__ == "__main__":
    main()
