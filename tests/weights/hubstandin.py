"""A local stand-in of the hub's API: makes repositories, takes LFS objects and commits, gives files back."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

TOKEN = "hf_standin"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Listens on 127.0.0.1; what it holds is `repos[name][path]`, in bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.read: list[str] = []
        self.messages: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@contextmanager
def serving(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """The stand-in in the hub's place, with a cache of its own in the folder."""
    server, constants = Hub(), huggingface_hub.constants
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(constants, "ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.address)
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
    patch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Silent."""

    def _answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_PUT(self) -> None:
        """An LFS object."""
        self.server.objects[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        """All that changes something."""
        body, path = self._body(), self.path.partition("?")[0]
        self.server.asked.append(self.path)
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            put = {o["oid"]: {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}} for o in objects}
            self._answer(200, {"objects": [{**o, "actions": put[o["oid"]]} for o in objects]})
        else:
            _, _, _, user, name, verb, _ = path.split("/")
            self._preupload(body) if verb == "preupload" else self._commit(f"{user}/{name}", body)

    def _create(self, asked: dict) -> None:
        user = asked.get("organization") or "me"
        if user != "me":
            self._answer(403, {"error": f"You don't have the rights to create a model under {user}"})
            return
        name = f"{user}/{asked['name']}"
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, {})
        self.server.private.setdefault(name, asked.get("visibility") == "private")
        self._answer(status, {"url": f"{self.server.address}/{name}", "name": name})

    def _preupload(self, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.server.messages.append(value["summary"])
            elif item["key"] == "file":
                self.server.repos[name][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.server.repos[name][value["path"]] = self.server.objects[value["oid"]]
        said = {"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        proposed = {"pullRequestUrl": f"{self.server.address}/{name}/discussions/1"}
        self._answer(200, said | proposed if self.path.endswith("create_pr=1") else said)

    def do_GET(self) -> None:
        """A file, or whether there is a repository."""
        self.server.read.append(self.path)
        if self.path.startswith("/api/models/"):
            name = "/".join(self.path.partition("?")[0].split("/")[3:5])
            if name in self.server.repos:
                self._answer(200, {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
            else:
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        if self.path == "/api/whoami-v2":
            self._answer(200, {"name": "me"})
            return
        _, user, name, _, _, path = self.path.split("/", 5)
        content = self.server.repos.get(f"{user}/{name}", {}).get(path)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        etag = hashlib.sha256(content).hexdigest()
        self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET
