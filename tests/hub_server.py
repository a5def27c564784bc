"""A stand-in for the Hugging Face hub: the part of its API that uploading a folder calls.

A real HTTP server on a loopback port, so that the hub's own client runs unchanged. It keeps
repositories with their files, asks for a token, stores large files by LFS and checks a card's
metadata by the hub's rules for the keys that we write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from huggingface_hub.repocard_data import ModelCardData
from huggingface_hub.utils import validate_repo_id

TOKEN = "hf_standinstandinstandinstandin"
READ_TOKEN = "hf_readonlyreadonlyreadonly"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """A repository: its files by path, and whether it is private."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class Hub:
    """The server, and everything that clients have sent to it."""

    def __init__(self, large_files: bool = True) -> None:
        """Start the server. With ``large_files``, safetensors files are stored by LFS."""
        self.repositories: dict[str, Repository] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        """Metadata of models, which ``model_info`` answers with."""
        self.failing: dict[str, int] = {}
        """Statuses that a kind of request is answered with: info, create, validate, commit."""
        self.requests: list[str] = []
        self.large_files = large_files
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_POST = do_PUT = do_GET

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a request, after reading its body."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.split("?")[0]
        self.requests.append(f"{request.command} {path}")
        status, document, headers = self._answered(request, path, body)
        content = json.dumps(document).encode()
        with suppress(ConnectionError):
            request.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(content)

    def _answered(
        self, request: BaseHTTPRequestHandler, path: str, body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        kind, handler = self._handler(request.command, path)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if kind != "object" and token and token not in (TOKEN, READ_TOKEN):
            message = "Invalid credentials in Authorization header"
            return 401, {"error": message}, {"X-Error-Message": message}
        if token == READ_TOKEN and kind in ("create", "commit"):
            return 403, {"error": "You don't have the rights to create a model"}, {}
        if kind in self.failing:
            return self.failing[kind], {"error": f"{kind} fails"}, {}
        return handler(body)

    def _handler(
        self, method: str, path: str
    ) -> tuple[str, Callable[[bytes], tuple[int, Any, dict[str, str]]]]:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return "create", self._create
        if path == "/api/validate-yaml":
            return "validate", self._validate
        if parts[0] == "objects":
            return "object", lambda body: self._store(parts[1], body)
        if path.endswith("/info/lfs/objects/batch"):
            return "batch", self._batch
        name = "/".join(parts[2:4])
        if method == "GET":
            return "info", lambda body: self._info(name)
        if parts[4] == "preupload":
            return "preupload", self._preupload
        return "commit", lambda body: self._commit(name, body)

    def _info(self, name: str) -> tuple[int, Any, dict[str, str]]:
        if name not in self.repositories and name not in self.cards:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        document = {"id": name, "sha": COMMIT, "cardData": self.cards.get(name, {})}
        return 200, document, {}

    def _create(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo"}, {}
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        return 200, {"url": f"{self.address}/{name}"}, {}

    def _validate(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        errors = metadata_faults(json.loads(body)["content"])
        document = {"errors": [{"message": text} for text in errors], "warnings": []}
        return (400 if errors else 200), document, {}

    def _preupload(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if self._is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": modes}, {}

    def _is_large(self, path: str) -> bool:
        return self.large_files and path.endswith(".safetensors")

    def _batch(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        objects = [
            {**it, "actions": {"upload": {"href": f"{self.address}/objects/{it['oid']}"}}}
            for it in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _store(self, digest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != digest:
            return 400, {"error": "the digest is another one"}, {}
        self.objects[digest] = body
        return 200, {}, {}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        files = self.repositories[name].files
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.objects[line["value"]["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}, {}


def metadata_faults(content: str) -> list[str]:
    """List what the hub refuses in a card's metadata, of the keys that we write."""
    from huggingface_hub import ModelCard

    data: ModelCardData = ModelCard(content).data
    faults = []
    for name in [data.base_model, *(data.datasets or [])]:
        try:
            validate_repo_id(name)
        except ValueError as error:
            faults.append(str(error))
    texts = [data.library_name, data.pipeline_tag, *(data.tags or [])]
    faults += [f"{text!r} is no text" for text in texts if not (isinstance(text, str) and text)]
    for result in data.eval_results or []:
        named = (result.task_type, result.dataset_type, result.dataset_name, result.metric_type)
        faults += [f"{text!r} is no text" for text in named if not isinstance(text, str)]
        if not isinstance(result.metric_value, int | float):
            faults.append(f"{result.metric_value!r} is no number")
    return faults
