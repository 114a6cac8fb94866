"""Only the job itself can run code in its workers; no other user of the machine can."""

import asyncio
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from distributed import Client, LocalCluster, Security
from distributed.core import rpc
from distributed.protocol.pickle import dumps

from extract.job.cluster import _note_if_open, connect
from extract.job.workers import Workers
from store.errors import Note

pytestmark = pytest.mark.slow
HERE = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
REFUSED = (OSError, TimeoutError)  # what distributed raises if a connection is closed
_SECONDS = 1.0


def processes() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def listening() -> set[tuple[str, int]]:
    found = [socket for process in processes() for socket in process.net_connections("inet")]
    return {tuple(socket.laddr) for socket in found if socket.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for temporary files of the cluster of `ports`."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def ports(scratch: Path) -> Iterator[list[int]]:
    """The ports of a running job with two workers."""
    before = listening()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        with connect(Workers(section="extract", count=2, scheduler=None)) as client:
            client.wait_for_workers(2)
            opened = listening() - before
            assert {host for host, _ in opened} == {"127.0.0.1"}
            yield sorted(port for _, port in opened)


def send_touch(file: Path, address: str, security: Security | None = None) -> None:
    """Send a scheduler, nanny or worker the message by which dask runs a function."""

    async def send() -> None:
        arguments = (security or Security()).get_connection_args("client")
        async with rpc(address, timeout=_SECONDS, connection_args=arguments) as server:
            await server.run(function=dumps(partial(Path.touch, file)), wait=True)

    asyncio.run(asyncio.wait_for(send(), 5 * _SECONDS))


def test_code_runs_in_workers_without_certificates(tmp_path: Path) -> None:
    """The message that the other tests expect to be refused does work without certificates."""
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp://", **HERE) as cluster:
        [worker] = cluster.workers.values()
        send_touch(tmp_path / "harm", worker.address)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("own_certificate", [False, True])
def test_no_port_of_a_job_runs_what_a_stranger_sends(ports: list[int], tmp_path: Path, own_certificate: bool) -> None:
    protocol, security = ("tls", Security.temporary()) if own_certificate else ("tcp", None)
    assert len(ports) >= 5  # a scheduler, two nannies, two workers
    for port in ports:
        with pytest.raises(REFUSED):
            send_touch(tmp_path / "harm", f"{protocol}://127.0.0.1:{port}", security)
        with pytest.raises(REFUSED):
            Client(f"{protocol}://127.0.0.1:{port}", security=security, timeout=_SECONDS)
    assert not (tmp_path / "harm").exists()


def test_every_port_of_a_job_asks_for_a_certificate(ports: list[int]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for port in ports:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
            pytest.raises(ssl.SSLError, match=r"(?i)certificate.required|handshake.failure"),
            context.wrap_socket(connection) as secured,
        ):
            secured.recv(1)  # TLS 1.3 reports it after the client's part of the handshake


def test_every_port_of_a_job_closes_a_connection_that_speaks_no_tls(ports: list[int]) -> None:
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, suppress(ConnectionError):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(64))
            answer = connection.recv(1 << 16)
            assert not answer.startswith(b"HTTP"), "web pages and metrics of dask"
            assert connection.recv(1 << 16) == b""


def test_the_key_of_a_job_is_in_no_file_and_no_environment_or_command_line(ports: list[int], scratch: Path) -> None:
    assert ports
    shown = list[object]()
    for process in processes():
        with suppress(psutil.NoSuchProcess):  # one that another test has left may end now
            shown += [*process.environ().items(), *process.cmdline()]
    assert shown
    assert "PRIVATE KEY" not in repr(shown)
    files = [file for file in scratch.rglob("*") if file.is_file()]
    assert not [file for file in files if b"PRIVATE KEY" in file.read_bytes()]
    assert {folder.stat().st_mode & 0o777 for folder in scratch.iterdir()} == {0o700}


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:8786", "ws://10.0.0.1:8786"])
def test_a_scheduler_that_asks_for_no_certificate_is_noted(address: str) -> None:
    with pytest.warns(Note, match=rf"the scheduler {address} asks for no certificate: .*docs/clusters\.md"):
        _note_if_open(address)


def test_a_scheduler_with_tls_is_not(recwarn: pytest.WarningsRecorder) -> None:
    _note_if_open("tls://10.0.0.1:8786")
    assert not recwarn.list
