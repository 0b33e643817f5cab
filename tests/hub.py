"""A stand-in for the Hub on 127.0.0.1: the files of user/model, whole or in ranges of bytes."""

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

TOKEN = "hf_of_this_test_only"
COMMIT = "a" * 40


class Hub:
    """branches: name -> file -> content. sent: bytes of all answers."""

    def __init__(self):
        self.branches: dict[str, dict[str, bytes]] = {}
        self.address = ""
        self.sent = 0

    def answer(self, path: str) -> tuple[int, object]:
        if found := re.fullmatch(r"/user/model/resolve/main/(.+)", path):
            return (200, files[found[1]]) if found[1] in (files := self.branches["main"]) else (404, {})
        if re.fullmatch(r"/api/models/user/model/tree/main", path):
            sizes = {name: len(content) for name, content in self.branches["main"].items()}
            return 200, [{"type": "file", "path": n, "size": s, "oid": "b" * 40} for n, s in sizes.items()]
        return 404, {"error": f"no such thing: {path}"}


@contextmanager
def running(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            assert self.headers["Authorization"] == f"Bearer {TOKEN}"
            address = urlsplit(self.path)
            status, content = hub.answer(address.path)
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            if asked := re.fullmatch("bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", "")):
                status, text = 206, text[int(asked[1]) : int(asked[2]) + 1]
            self.send_response(status)
            if status == 404 and "/resolve/" in address.path:
                self.send_header("X-Error-Code", "EntryNotFound")
            if isinstance(content, bytes):
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            else:
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                hub.sent += len(text)
                self.wfile.write(text)

        do_GET = do_HEAD = respond

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
