"""A small OpenAI-compatible service that answers by rule: what the chat is tested against without a model."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeService(ThreadingHTTPServer):
    """Answers every request with a tap; keeps the requests' bodies in `asked`."""

    daemon_threads = True

    def __init__(
        self, plan="int4", answer='<answer>do(action="Tap", element=[500,500])</answer>', pause_s=0.0
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan, self.answer, self.pause_s = plan, answer, pause_s
        self.asked, self.left = [], 0

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextlib.contextmanager
def serving(**options):
    """A running `FakeService`."""
    service = FakeService(**options)
    thread = threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        known = {
            "/v1/models": {"object": "list", "data": [{"id": "fake", "object": "model", "owned_by": "x"}]},
            "/status": {"model": "pocket", "plan": self.server.plan, "weights_bytes": 21_200_000},
        }
        self._json(200, known[self.path]) if self.path in known else self._json(404, {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        if "refuse" in json.dumps(asked["messages"][-1]):
            error = {"message": "this picture is too large", "type": "invalid_request_error", "code": None}
            self._json(400, {"error": {**error, "param": None}})
            return
        thinking = ["I heard: open it. ", 'Tap "it".'] if asked.get("enable_thinking") else []
        half = len(self.server.answer) // 2
        deltas = [{"role": "assistant"}, *({"reasoning_content": piece} for piece in thinking)]
        deltas += [{"content": self.server.answer[:half]}, {"content": self.server.answer[half:]}]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for delta in deltas:
                self._event({"choices": [{"index": 0, "delta": delta}]})
                time.sleep(self.server.pause_s)
            usage = {"prompt_tokens": 9, "completion_tokens": 17, "total_tokens": 26}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.left += 1

    def _event(self, told):
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "fake", **told}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status, told):
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
