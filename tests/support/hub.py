"""A stand-in for the Hugging Face hub: an HTTP server with the routes that huggingface_hub takes to upload a folder."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_test"
READ_ONLY = "hf_read"


@dataclass
class Hub:
    """What the hub holds.

    Attributes:
        address: Its endpoint.
        private: Whether each repository is private, by name.
        files: The files of each repository, by name and path.
        objects: Uploads by LFS, by SHA-256.
        requests: Every request, as method and path.
    """

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve a hub on this machine."""
    held = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/models/").split("?")[0]
            if name in held.private:
                self._answer({"id": name, "private": held.private[name], "siblings": [], "tags": [], "sha": "0" * 40})
            else:
                self._answer({"error": "not found"}, 404)

        def do_PUT(self) -> None:
            held.objects[self.path.rpartition("/")[2]] = self._body()
            self._answer({})

        def do_POST(self) -> None:
            body, path = self._body(), self.path.split("?")[0]
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in (TOKEN, READ_ONLY):
                self._answer({"error": "Invalid username or password."}, 401)
            elif token == READ_ONLY:
                self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            elif path == "/api/repos/create":
                self._create(json.loads(body))
            elif path == "/api/validate-yaml":
                self._answer(self._yaml_faults(json.loads(body)["content"]))
            elif path.endswith("/preupload/main"):
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                self._answer({"files": modes})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**one, "actions": {"upload": {"href": f"{held.address}/lfs/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                self._answer({"objects": objects, "transfer": "basic"})
            elif path.endswith("/commit/main"):
                self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
            else:
                self._answer({"error": f"the stand-in has no {path}"}, 404)

        def _create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            found = name in held.private
            held.private.setdefault(name, asked.get("visibility") == "private")
            answer = {"url": f"{held.address}/{name}", "name": name, "id": name}
            self._answer(
                {**answer, **({"error": "You already created this model repo"} if found else {})}, 409 if found else 200
            )

        @staticmethod
        def _yaml_faults(card: str) -> dict[str, Any]:
            """The hub's own rule for base_model, on which adapters of local folders fail."""
            base = yaml.safe_load(card.split("---\n")[1]).get("base_model", "a/b")
            wrong = base.startswith("/") or base in ("minilm", "small-llama")
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return {"errors": [{"message": message}] if wrong else [], "warnings": []}

        def _commit(self, name: str, body: bytes) -> None:
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held.files.setdefault(name, {})[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    held.files.setdefault(name, {})[value["path"]] = held.objects[value["oid"]]
            self._answer(
                {"commitUrl": f"{held.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            )

        def _body(self) -> bytes:
            held.requests.append(f"{self.command} {self.path}")
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, value: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
