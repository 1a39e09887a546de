"""A local server that imitates the Hugging Face hub."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/([\w.-]+)")


class FakeHub:
    """A local hub with a few models; use it in a `with` statement.

    Attributes:
      models: The content of the files by model id and file name.
      revisions: The names of the only commit, `COMMIT`, of all models.
      errors: (status, headers) instead of the files of a model, by model id.
      cut_after: The number of bytes after which each answer with a large file is cut off; None
        for complete answers.
      cuts: The number of answers that will still be cut off.
      requests: "METHOD path" of all requests.
      url: The address of the server.
    """

    def __init__(self):
        self.models: dict[str, dict[str, bytes]] = {}
        self.revisions = {"main", "v1", COMMIT}
        self.errors: dict[str, tuple[int, dict[str, str]]] = {}
        self.cut_after: int | None = None
        self.cuts = 0
        self.requests: list[str] = []

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer(has_body=False)

    def do_GET(self):
        self._answer(has_body=True)

    def _answer(self, has_body):
        self.hub.requests.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        if path == "/api/models":
            search = urllib.parse.parse_qs(query)
            names = [
                {"id": name}
                for name in self.hub.models
                if name.startswith(search["author"][0] + "/") and search["search"][0] in name
            ]
            self._send(200, {}, json.dumps(names).encode(), has_body)
        elif match := _FILE.fullmatch(path):
            self._send_file(*match.groups(), has_body)
        else:
            self._send(404, {}, b"", has_body)

    def _send_file(self, model, revision, name, has_body):
        hub = self.hub
        if model in hub.errors:
            status, headers = hub.errors[model]
            self._send(status, headers, b"{}", has_body)
        elif model not in hub.models:
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"{}", has_body)
        elif revision not in hub.revisions:
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", has_body)
        elif name not in hub.models[model]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, headers, b"{}", has_body)
        else:
            content = hub.models[model][name]
            is_large = name.endswith(".safetensors")
            digest = hashlib.sha256 if is_large else hashlib.sha1
            headers = {
                "ETag": f'"{digest(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            start = int(re.search(r"\d+", self.headers.get("Range") or "0")[0])
            if start:
                end = f"bytes {start}-{len(content) - 1}/{len(content)}"
                headers["Content-Range"] = end
            is_cut = is_large and has_body and hub.cut_after is not None and hub.cuts > 0
            hub.cuts -= is_cut
            self._send(
                206 if start else 200,
                headers,
                content[start:],
                has_body,
                sent=max(hub.cut_after - start, 0) if is_cut else None,
            )

    def _send(self, status, headers, body, has_body, sent=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True
