"""Stands in for vLLM's command line: `serve`, `bench serve` and `bench throughput`, with prepared figures.

Environment variables:
    STAND_IN_SECONDS: what the start of a server, a request and a whole `bench throughput` take.
    STAND_IN_EVENTS: a file that gets a line for each start.
    STAND_IN_BREAK: a word; `bench serve` fails when its arguments have it.
"""

import json
import os
import sys
import time
from argparse import ArgumentParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tqdm import tqdm

SECONDS = float(os.environ.get("STAND_IN_SECONDS", 0))
LATENCIES = dict.fromkeys(("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms"), 2.0)
ANSWER = {"choices": [{"index": 0, "text": "east", "message": {"role": "assistant", "content": "Paris."}}]}


def arguments() -> ArgumentParser:
    parser = ArgumentParser()
    for name in ("num-prompts", "max-concurrency", "num-warmups", "random-output-len", "port"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("result-dir", "result-filename", "output-json", "base-url", "model"):
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
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def bench_serve(given) -> None:
    for heading, count in (
        (f"Warming up with {given.num_warmups} requests...", given.num_warmups),
        ("Starting main benchmark run...", given.num_prompts),
    ):
        print(heading)
        for _ in tqdm(range(count)):
            time.sleep(SECONDS)
    speed = 10.0 * given.max_concurrency
    content = {"completed": given.num_prompts, "failed": 0, "errors": []} | LATENCIES
    content |= {"total_output_tokens": given.num_prompts * given.random_output_len}
    content |= {"output_throughput": speed, "request_throughput": speed / given.random_output_len}
    Path(given.result_dir, given.result_filename).write_text(json.dumps(content))


def bench_throughput(given) -> None:
    time.sleep(SECONDS)
    content = {"num_requests": given.num_prompts, "requests_per_second": 2.0, "tokens_per_second": 9.0}
    Path(given.output_json).write_text(json.dumps(content))


def main(words: list[str]) -> None:
    if "STAND_IN_EVENTS" in os.environ:
        with open(os.environ["STAND_IN_EVENTS"], "a") as file:
            file.write(" ".join(words) + "\n")
    if words[0] == "serve":
        given, _ = arguments().parse_known_args(words[2:])
        serve(words[1], given.port)
    given, _ = arguments().parse_known_args(words[2:])
    if os.environ.get("STAND_IN_BREAK", "\n") in words:
        sys.exit("broken on purpose")
    {"serve": bench_serve, "throughput": bench_throughput}[words[1]](given)


if __name__ == "__main__":
    main(sys.argv[1:])
