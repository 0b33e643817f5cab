"""A server that answers like vLLM's, with a bigram table for a model and one token per byte."""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch

from ria_vllm.serve.benchmark.server import Server

VOCABULARY, CONTEXT = 256, 64


class StandIn:
    """Attributes:
    logprobs: float32 [previous token, token].
    requests: (path, content) of all that have content.
    models: what it says of its models.
    answer: a function from an answer's content to what is sent instead, or None to send it as it is.
    """

    def __init__(self, seed: int = 0, sharpness: float = 1.0, shift: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.logprobs = (torch.randn(VOCABULARY, VOCABULARY, generator=generator) * sharpness).log_softmax(-1)
        self.shift, self.requests, self.answer = shift, [], None
        self.models = [{"id": "model", "owned_by": "vllm", "parent": None}]

    def tokenize(self, content: dict) -> dict:
        tokens = [(byte + self.shift) % VOCABULARY for byte in content["prompt"].encode()]
        return {"tokens": tokens, "count": len(tokens), "max_model_len": CONTEXT}

    def complete(self, content: dict) -> dict:
        """`prompt_logprobs` as in vLLM: the prompt's token, then the likeliest ones, in one object."""
        prompt, top = content["prompt"], content["prompt_logprobs"]
        positions = [None]
        for previous, token in itertools.pairwise(prompt):
            row = self.logprobs[previous]
            top = min(top, VOCABULARY)
            ids = [token, *row.topk(top).indices.tolist()]
            ranks = [1 + int((row > row[token]).sum()), *range(1, top + 1)]
            entries = zip(ids, ranks)
            positions.append({str(i): {"logprob": float(row[i]), "rank": r, "decoded_token": "?"} for i, r in entries})
        return {"choices": [{"text": "?", "prompt_logprobs": positions}]}


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def listening(handler: type[Quiet]) -> Iterator[str]:
    """The URL of a server whose requests `handler` answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


@contextmanager
def serving(stand_in: StandIn) -> Iterator[Server]:
    class Handler(Quiet):
        def do_GET(self):
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"data": stand_in.models}).encode())

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stand_in.requests.append((self.path, content))
            status, answer = (
                200,
                {"/tokenize": stand_in.tokenize, "/v1/completions": stand_in.complete}[self.path](content),
            )
            if stand_in.answer is not None:
                status, answer = stand_in.answer(self.path, answer)
            if answer is None:  # dies in the middle
                self.connection.close()
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    with listening(Handler) as url:
        yield Server(url, "model", SimpleNamespace(end_of_log=lambda: "The end of its log"), 0.0)
