"""The upload over HTTP: huggingface_hub's own client, and a server that answers as the Hub does.

The server knows the four calls of an upload whose files are small enough for the commit itself; how
the Hub takes large ones is left out.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

REPO = "me/Llama-small"
PUSH = """
import sys
from pathlib import Path
from pipeline.errors import UserError
from pipeline.export.hub import push
try:
    print(push(Path(sys.argv[1]), sys.argv[2]))
except UserError as error:
    print(error)
"""


class Hub(ThreadingHTTPServer):
    """On this machine, on any port; keeps what it was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.created, self.tokens, self.files = [], set(), {}

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def commit_url(self):
        return f"{self.endpoint}/{REPO}/commit/1"


class Handler(BaseHTTPRequestHandler):
    """`/api/models/{repo}/...` asks how to send each file, then brings a commit, line by line."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.endpoint}/{REPO}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            ways = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer({"files": ways})
        elif self.path == f"/api/models/{REPO}/commit/main":
            parts = [json.loads(line) for line in body.splitlines()]
            sent = [part["value"] for part in parts if part["key"] == "file"]
            self.server.files |= {f["path"]: base64.b64decode(f["content"]) for f in sent}
            self.answer({"commitUrl": self.server.commit_url, "commitOid": "1"})
        else:
            self.answer({"error": "You are not allowed to write here."}, status=403)

    def answer(self, values, status=200):
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def pushed(server, folder, repo):
    """What `push` returns, or the message it raises, in a process that takes this server's Hub."""
    environment = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "mine", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(folder), repo],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.removesuffix("\n")


def test_an_export_arrives_whole_in_a_private_repository(server, tmp_path):
    files = {"README.md": b"---\nlicense: llama3.2\n---\n", "model.safetensors": bytes(range(256))}
    files["config.json"] = b"{}"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert pushed(server, tmp_path, REPO) == server.commit_url
    assert server.files == files
    (created,) = server.created
    assert (created["name"], created["organization"]) == ("Llama-small", "me")
    assert created["visibility"] == "private"
    assert server.tokens == {"Bearer mine"}


def test_a_refusal_is_one_message_that_says_where_the_export_is(server, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    message = pushed(server, tmp_path, "you/Llama-small")
    assert message.startswith("export.push_to_hub: 'you/Llama-small': the Hub did not take it (")
    assert "403" in message
    assert f"the export is whole in {tmp_path}: check the name, HF_TOKEN" in message
    assert "\n" not in message
    assert server.files == {}
