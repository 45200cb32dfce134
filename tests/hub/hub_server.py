"""A Hub on loopback for tests: HTTP, access and faults; hub_routes.py and hub_upload.py hold the calls it answers.

    with LoopbackHub(folder, bound_socket) as hub:
        hub.users["hf_alice"] = User("alice")

It has two faces: the Hub itself, and a second origin that serves and takes large files by signed addresses, as the
real one's storage does; a client must never show its token there.
"""

import contextlib
import dataclasses
import hmac
import json
import re
import secrets
import shutil
import socket
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import HubError, Store

LFS_THRESHOLD = 10_000_000  # bytes above which a file goes to LFS whatever its name


@dataclasses.dataclass
class User:
    name: str
    role: str = "write"  # or "read"

    def owns(self, repo):
        return repo.split("/")[0].lower() == self.name.lower()


@dataclasses.dataclass
class Fault:
    """Breaks the next `times` requests whose "METHOD /path" matches."""

    pattern: str
    times: int = 1
    status: int | None = None  # answer with this status,
    drop_after: int | None = None  # or pass this many bytes of the body and close the connection,
    lose_reply: bool = False  # or do the work and close the connection instead of answering,
    action: Callable[[], None] | None = None  # or do this first and answer as usual


class LoopbackHub:
    """The server; `transport` says how weights travel: "lfs", "xet" or "regular" (inside the commit)."""

    def __init__(self, root, hub_socket):
        self.store = Store(root)
        self.transport = "lfs"
        self.users = {}
        self.requests = []
        self.faults = []
        self.fault_lock = threading.Lock()
        self.secret = secrets.token_bytes(16)
        self.xet_tokens = {}
        storage_socket = socket.socket()
        storage_socket.bind(("127.0.0.1", 0))
        self._servers = [_Server(hub_socket, self, "hub"), _Server(storage_socket, self, "storage")]
        # Two host names: clients follow a redirect with their token if it stays on one
        names = ("127.0.0.1", "localhost")
        ports = [server.server_address[1] for server in self._servers]
        self.url, self.storage_url = (f"http://{name}:{port}" for name, port in zip(names, ports, strict=True))

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fault(self, pattern, **what):
        self.faults.append(Fault(pattern, **what))

    def calls(self, pattern):
        """List the requests that match, as "METHOD /path"."""
        lines = (f"{request['method']} {request['path']}" for request in self.requests)
        return [line for line in lines if re.search(pattern, line)]

    def reset(self):
        """Forget repositories, requests and faults; blobs stay, because a client's Xet cache may count on them."""
        with self.store.lock:
            shutil.rmtree(self.store.root / "repos")
            (self.store.root / "repos").mkdir()
        self.requests.clear()
        self.faults.clear()
        self.transport = "lfs"

    def sign(self, *parts):
        return hmac.new(self.secret, "\n".join(parts).encode(), "sha256").hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, bound, hub, face):
        self.hub, self.face, self.open = hub, face, set()
        super().__init__(bound.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = bound
        self.server_activate()

    def process_request(self, request, client_address):
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def server_close(self):
        super().server_close()
        for connection in list(self.open):  # kept-alive connections would go on being served
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Say nothing: dropped connections are what some tests want."""


class _Drop(Exception):
    """Ends the connection without an answer."""


ROUTES = {"hub": [], "storage": []}


def route(method, pattern, face="hub"):
    """Register a call; patterns match the encoded path, so that refs%2Fpr%2F1 stays one segment."""
    pattern = pattern.replace("{repo}", r"(?P<kind>models|datasets)/(?P<name>[^/]+(?:/[^/]+)?)")
    compiled = re.compile(pattern.replace("{revision}", "(?P<revision>[^/]+)") + "$")

    def register(function):
        ROUTES[face].append((method, compiled, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One request; the routes get it as their first argument."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *arguments):
        """Print nothing."""

    @property
    def hub(self):
        return self.server.hub

    @property
    def store(self):
        return self.server.hub.store

    # --- request ----------------------------------------------------------------------------------------------------

    def body_chunks(self):
        """Yield the body, whether it has a length or is chunked."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data = self.rfile.read(size)
                if len(data) < size:
                    raise _Drop
                self.rfile.readline()
                yield data
            while self.rfile.readline().strip():
                pass
        else:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                data = self.rfile.read(min(left, 1 << 20))
                if not data:
                    raise _Drop
                left -= len(data)
                yield data
        self.consumed = True

    def body(self):
        return b"".join(self.body_chunks())

    def json(self):
        return json.loads(self.body() or b"{}")

    # --- answer -----------------------------------------------------------------------------------------------------

    def reply(self, content=None, status=200, headers=None, file=None, span=None):
        if not self.consumed:
            for _ in self.body_chunks():
                pass
        if self.lose_reply:
            raise _Drop
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        start, end = span or (0, file.stat().st_size if file else len(data))
        self.request_log["status"] = status
        self.send_response(status)
        headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        for key, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file is not None:
            with open(file, "rb") as opened:
                opened.seek(start)
                data = opened.read(end - start)
        if self.drop_after is not None:
            self.wfile.write(data[: self.drop_after])
            self.wfile.flush()
            raise _Drop
        self.wfile.write(data)

    def send_file(self, file, headers):
        size, span, status = file.stat().st_size, None, 200
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or size - 1), size - 1)
            if start >= size:
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            span, status = (start, end + 1), 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.reply(None, status, headers, file=file, span=span)

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def handle_any(self):
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.consumed, self.drop_after, self.lose_reply = False, None, False
        authorization = self.headers.get("Authorization")
        self.request_log = {"method": self.command, "path": self.path, "face": self.server.face}
        self.request_log["with_token"] = authorization is not None
        self.hub.requests.append(self.request_log)
        try:
            try:
                self._inject_fault()
                self._route(split.path, authorization)
            except HubError as error:
                headers = {**error.headers, "X-Error-Message": error.message}
                if error.code:
                    headers["X-Error-Code"] = error.code
                self.reply(error.body, error.status, headers)
        except (_Drop, ConnectionError):
            self.close_connection = True
        except Exception:  # a mistake of this server: the fixture fails the test with it
            self.request_log["error"] = traceback.format_exc()
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _route(self, path, authorization):
        for method, pattern, function in ROUTES[self.server.face]:
            same = method == self.command or (method, self.command) == ("GET", "HEAD")
            if same and (match := pattern.match(path)):
                self.user = self._authenticate(authorization)
                function(self, **{key: value and unquote(value) for key, value in match.groupdict().items()})
                return
        raise HubError(404, f"this Hub has no route for {self.command} {path}")

    def _inject_fault(self):
        line = f"{self.command} {self.path}"
        with self.hub.fault_lock:
            fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.pattern, line)), None)
            if fault is None:
                return
            fault.times -= 1
        if fault.action is not None:
            fault.action()
            return
        if fault.status is not None:
            raise HubError(fault.status, "injected fault")
        if fault.lose_reply or self.command in ("GET", "HEAD"):
            self.lose_reply, self.drop_after = fault.lose_reply, fault.drop_after
            return
        self.rfile.read(min(fault.drop_after, int(self.headers.get("Content-Length") or 0)))
        raise _Drop

    # --- access -----------------------------------------------------------------------------------------------------

    def _authenticate(self, authorization):
        if authorization is None or self.server.face == "storage" or self.path.startswith("/xet/"):
            return None
        user = self.hub.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def require_user(self, write=True):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if write and self.user.role != "write":
            raise HubError(403, "You have read access but not the required permissions for this operation")
        return self.user

    def require_repo(self, kind, name, write=False, pull_request=False):
        repo = self.store.find(kind, name) if "/" in name else None
        owns = self.user is not None and self.user.owns(name)
        if repo is None or (repo.state["private"] and not owns):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_user()
            if not owns and not pull_request:
                raise HubError(403, f"You don't have write access to {name}")
        return repo

    def check_signature(self, *parts):
        if not hmac.compare_digest(self.query.get("signature", [""])[0], self.hub.sign(*parts)):
            raise HubError(403, "SignatureDoesNotMatch")
