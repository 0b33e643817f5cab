"""Stands in for vLLM's command line: `serve` and `bench serve`, with prepared figures.

Like vLLM, `serve` asks for the key in VLLM_API_KEY, and `bench serve` sends the one in OPENAI_API_KEY.

STAND_IN_SECONDS is what the start of a server takes.
"""

import json
import os
import sys
import time
from argparse import ArgumentParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

SECONDS = float(os.environ.get("STAND_IN_SECONDS", 0))
LATENCIES = dict.fromkeys(("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms"), 2.0)
ANSWER = {"choices": [{"index": 0, "text": "east"}]}


def arguments() -> ArgumentParser:
    parser = ArgumentParser()
    for name in ("num-prompts", "max-concurrency", "random-output-len", "port"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("result-dir", "result-filename", "base-url"):
        parser.add_argument(f"--{name}")
    return parser


def serve(model: str, port: int) -> None:
    ready = time.monotonic() + SECONDS

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/health":
                time.sleep(max(0.0, ready - time.monotonic()))
            self.answer({"data": [{"id": model}]})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(ANSWER)

        def answer(self, content):
            key = os.environ.get("VLLM_API_KEY")
            refused = key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {key}"
            self.send_response(401 if refused else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def bench_serve(given) -> None:
    key = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    build_opener(ProxyHandler({})).open(Request(f"{given.base_url}/v1/models", headers=key)).close()
    speed = 10.0 * given.max_concurrency
    content = {"completed": given.num_prompts, "failed": 0, "errors": []} | LATENCIES
    content |= {"total_output_tokens": given.num_prompts * given.random_output_len}
    content |= {"output_throughput": speed, "request_throughput": speed / given.random_output_len}
    Path(given.result_dir, given.result_filename).write_text(json.dumps(content))


def main(words: list[str]) -> None:
    if words[0] == "serve":
        given, _ = arguments().parse_known_args(words[2:])
        serve(words[1], given.port)
    given, _ = arguments().parse_known_args(words[2:])
    bench_serve(given)


if __name__ == "__main__":
    main(sys.argv[1:])
