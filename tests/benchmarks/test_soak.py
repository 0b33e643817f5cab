"""The soak test against a mock server: it must detect each kind of problem."""

import http.server
import json
import re
import threading
import time
from types import SimpleNamespace

import pytest

from benchmarks.soak import soak
from ria_vllm.serve.benchmark.server import Server

openai = pytest.importorskip("openai")

LONGEST = 64


class Process:
    """Mock of the server's processes, which grow by `step` bytes each time their memory is read."""

    def __init__(self, step: int = 0):
        self.size, self.step = 10**9, step

    def processes(self) -> list["Process"]:
        return [self]

    def memory_info(self) -> SimpleNamespace:
        self.size += self.step
        return SimpleNamespace(rss=self.size + 10**8, shared=10**8)


class Handler(http.server.BaseHTTPRequestHandler):
    failing = changing = stuck = False
    seen: list[dict] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(f'vllm:num_requests_running{{engine="0"}} {float(self.stuck)}\n'.encode(), "text/plain")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(asked)
        time.sleep(0.005)
        traffic = asked["max_tokens"] <= LONGEST // 4  # and not one of QUESTIONS
        if self.failing and traffic and len(self.seen) % 20 < 2:
            self.send_error(500)
        elif asked.get("stream"):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            chunk = json.dumps({"id": "x", "object": "text_completion", "choices": [{"index": 0, "text": "a"}]})
            for _ in range(asked["max_tokens"]):
                try:
                    self.wfile.write(f"data: {chunk}\n\n".encode())
                except OSError:
                    return  # the client left
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            text = f"answer {len(self.seen)}" if self.changing else "answer"
            choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text}}
            usage = {"completion_tokens": 2, "prompt_tokens": 1, "total_tokens": 3}
            self.answer(json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode(), "application/json")

    def answer(self, body: bytes, kind: str):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def run(process: Process, seconds: float = 2.0, **trouble: bool) -> dict:
    handler = type("Troubled", (Handler,), {"seen": []} | trouble)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as mock_server:
        threading.Thread(target=mock_server.serve_forever, daemon=True).start()
        server = Server(f"http://127.0.0.1:{mock_server.server_address[1]}", "m", process, 0.0)
        found = soak(server, users=4, seconds=seconds, longest=LONGEST, patience=2)
        mock_server.shutdown()
    return found


def test_a_healthy_server_has_no_problems():
    found = run(Process())
    assert found["problems"] == []
    assert set(found["requests"]) == {"chat", "completion", "streamed", "left"}
    assert found["tokens_received"] > found["requests"]["streamed"] > 0


@pytest.mark.parametrize(
    "process, trouble, problem",
    [
        (Process(10**7), {}, "memory grew"),
        (Process(), {"failing": True}, "requests failed: .*500"),
        (Process(), {"changing": True}, "answers changed"),
    ],
)
def test_each_problem_is_found(process, trouble, problem):
    (found,) = run(process, **trouble)["problems"]
    assert re.search(problem, found), found
