"""A stand-in for the Hub's HTTP API on 127.0.0.1: one repository with branches, and uploads by git-lfs's protocol."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_this_test_only"
COMMIT = "a" * 40


class Hub:
    """branches: name -> file -> content. fails: path pattern -> status to answer with. requests: what was asked for.
    sent: bytes of all answers."""

    def __init__(self):
        self.branches: dict[str, dict[str, bytes]] = {}
        self.private = False
        self.fails: dict[str, int] = {}
        self.ignored: set[str] = set()
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.address = ""
        self.sent = 0

    def answer(self, method: str, path: str, query: str, body: bytes) -> tuple[int, object]:
        for pattern, status in self.fails.items():
            if re.search(pattern, path):
                return status, {"error": f"refused with {status}"}
        repository = {"url": f"{self.address}/user/model", "id": "user/model", "private": self.private}
        if found := re.fullmatch(r"/user/model/resolve/main/(.+)", path):
            return (200, files[found[1]]) if found[1] in (files := self.branches["main"]) else (404, {})
        if path == "/api/repos/create":
            asked = json.loads(body)
            if self.branches:
                return 409, repository
            assert (asked["organization"], asked["name"]) == ("user", "model")
            self.private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.branches["main"] = {".gitattributes": b""}
            return 200, repository
        if path == "/api/models/user/model":
            return (200, repository) if self.branches else (404, {"error": "Repository not found"})
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlicense: mit\n")
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/api/models/user/model/branch/(.+)", path):
            self.branches[unquote(found[1])] = dict(self.branches["main"])
            return 200, {}
        if found := re.fullmatch(r"/api/models/user/model/tree/([^/]+)", path):
            files = self.branches[unquote(found[1])]
            sizes = {name: len(content) for name, content in files.items()}
            return 200, [{"type": "file", "path": n, "size": s, "oid": "b" * 40} for n, s in sizes.items()]
        if re.fullmatch(r"/api/models/user/model/preupload/[^/]+", path):
            return 200, {"files": [self.mode(f["path"]) for f in json.loads(body)["files"]]}
        if path == "/user/model.git/info/lfs/objects/batch":
            upload = {n["oid"]: f"{self.address}/store/{n['oid']}" for n in json.loads(body)["objects"]}
            sizes = {n["oid"]: n["size"] for n in json.loads(body)["objects"]}
            return 200, {
                "transfer": "basic",
                "objects": [
                    {"oid": o, "size": sizes[o], "actions": {"upload": {"href": h}}} for o, h in upload.items()
                ],
            }
        if path.startswith("/store/") and method == "PUT":
            self.objects[path.removeprefix("/store/")] = body
            return 200, {}
        if found := re.fullmatch(r"/api/models/user/model/commit/([^/]+)", path):
            return 200, self.commit(unquote(found[1]), "create_pr=1" in query, body)
        return 404, {"error": f"no such thing: {method} {path}"}

    def mode(self, name: str) -> dict[str, object]:
        lfs = name.endswith(".safetensors")
        return {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": name in self.ignored}

    def commit(self, branch: str, create_pr: bool, body: bytes) -> dict[str, str]:
        files = dict(self.branches[branch])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        self.branches["refs/pr/1" if create_pr else branch] = files
        found = {"commitUrl": f"{self.address}/user/model/commit/{COMMIT}", "commitOid": COMMIT}
        return found | ({"pullRequestUrl": f"{self.address}/user/model/discussions/1"} if create_pr else {})


@contextmanager
def running(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            address = urlsplit(self.path)
            hub.requests.append(f"{self.command} {address.path}")
            if not address.path.startswith("/store/"):  # there the URL itself is the credential
                assert self.headers["Authorization"] == f"Bearer {TOKEN}"
            status, content = hub.answer(self.command, address.path, address.query, body)
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

        do_GET = do_HEAD = do_POST = do_PUT = respond

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
