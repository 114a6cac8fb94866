"""Runs an S3 server over HTTP on this machine: moto, behind a gate that counts requests and injects faults.

Faults depend on the request and on how often it was made before, not on time or order, so that the same job meets the
same faults however its requests overlap.
"""

import hashlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock, Thread
from typing import Any, Literal

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
# A server error or a broken connection, before the request is executed or after it; a late or a truncated response.
Fault = Literal["error", "drop", "error after", "drop after", "slow", "cut"]
FAULTS: tuple[Fault, ...] = ("error", "drop", "error after", "drop after", "slow", "cut")
Refusal = tuple[str, str]  # "403 Forbidden" and S3's own code for it


@dataclass(frozen=True)
class Request:
    """One request; `attempt` numbers equal requests from 0."""

    method: str
    key: str  # below the bucket
    byte_range: str
    condition: str  # If-Match or If-None-Match
    attempt: int = 0


@dataclass
class Server:
    """The server; `spoil` chooses the fault of a request, `refuse` an error response instead of moto's."""

    url: str = ""
    spoil: Callable[[Request], Fault | None] = lambda _: None
    refuse: Callable[[Request], Refusal | None] = lambda _: None
    ignores_conditions: bool = False

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.n_faults = 0
        self._asked: Counter[Request] = Counter()
        self._mutex, self._writing = Lock(), Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)

    def client(self) -> Any:
        """A client of boto3."""
        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
        )

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix except the log, by its key after the prefix; read by boto3."""
        client, found = self.client(), {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(f"{prefix}/")
                if not key.startswith("_log/"):
                    found[key] = client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()
        return found

    def count(self, method: str, containing: str = "") -> int:
        """The number of requests of a method for keys with a text."""
        return sum(request.method == method and containing in request.key for request in self.requests)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a WSGI request."""
        request = self._note(environ)
        if refusal := self.refuse(request):
            _drain(environ)
            return _answer(start, *refusal)
        fault = self.spoil(request)
        self.n_faults += fault is not None
        if fault in ("error", "drop"):
            _drain(environ)
            return self._fail(fault, environ, start)
        if self.ignores_conditions and request.method == "PUT":
            environ = {k: v for k, v in environ.items() if k not in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")}
        if fault == "slow":
            time.sleep(0.05)
        if fault == "cut":
            return _cut(self._moto(environ, start), environ["werkzeug.socket"])
        if fault is None or fault == "slow":
            if request.method != "PUT":
                return self._moto(environ, start)
            with self._writing:  # S3 writes an object in one moment; moto fails where two requests write one at once
                return list(self._moto(environ, start))
        b"".join(self._moto(environ, lambda *_: None))
        return self._fail(fault, environ, start)

    def _note(self, environ: dict[str, Any]) -> Request:
        key = environ["PATH_INFO"].removeprefix(f"/{BUCKET}/")
        condition = environ.get("HTTP_IF_MATCH", "") or environ.get("HTTP_IF_NONE_MATCH", "")
        same = Request(environ["REQUEST_METHOD"], key, environ.get("HTTP_RANGE", ""), condition)
        with self._mutex:
            request = Request(same.method, key, same.byte_range, condition, self._asked[same])
            self._asked[same] += 1
            self.requests.append(request)
        return request

    def _fail(self, fault: Fault, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if fault.startswith("error"):
            return _answer(start, "500 Internal Server Error", "InternalError")
        _break(environ["werkzeug.socket"])
        return _answer(start, "200 OK", "NobodyHearsThis")


class _Quiet(WSGIRequestHandler):
    """Keeps connections open, as S3 does; logs nothing."""

    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def serve() -> Iterator[Server]:
    """Run a server with one empty bucket."""
    server = Server()
    running = make_server("127.0.0.1", 0, server, threaded=True, request_handler=_Quiet)
    running.daemon_threads = True
    thread = Thread(target=running.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{running.port}"
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    server.requests.clear()
    try:
        yield server
    finally:
        server.spoil = server.refuse = lambda _: None
        for page in client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET
        ):  # moto keeps it for the process's lifetime
            for item in page.get("Contents", ()):
                client.delete_object(Bucket=BUCKET, Key=item["Key"])
        client.delete_bucket(Bucket=BUCKET)
        client.close()
        running.shutdown()
        running.server_close()
        thread.join()


def now_and_then(
    seed: int, faults: tuple[Fault, ...] = FAULTS, share: float = 0.2
) -> Callable[[Request], Fault | None]:
    """Choose faults for a share of the requests, the same ones for the same seed.

    After three faults of equal requests in a row the next is answered: a client that retries often enough succeeds,
    however many requests a slow machine takes.
    """

    def draw(request: Request) -> Fault | None:
        digest = hashlib.blake2b(f"{seed} {request}".encode(), digest_size=8).digest()
        return faults[digest[0] % len(faults)] if int.from_bytes(digest[1:]) / 2**56 < share else None

    def spoil(request: Request) -> Fault | None:
        before = [draw(replace(request, attempt=request.attempt - k)) for k in (1, 2, 3) if request.attempt >= k]
        return None if len(before) == 3 and all(before) else draw(request)

    return spoil


def _drain(environ: dict[str, Any]) -> None:
    """Read the request's body, so that the connection can be used again."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def _answer(start: Callable[..., Any], status: str, code: str) -> list[bytes]:
    body = f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>".encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _cut(body: Iterable[bytes], connection: socket.socket) -> Iterator[bytes]:
    whole = b"".join(body)
    yield whole[: len(whole) // 2]
    _break(connection)


def _break(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)
