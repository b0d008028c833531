"""Programs of others that our tests speak to: started on loopback with a configuration of their
own, ended by their process id. A test skips, with the program's name, where one is missing.
"""

import datetime
import ipaddress
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

START_TIMEOUT_S = 30.0
"""The slowest machine that our tests run on starts nginx in one second."""


def needs(program: str, *others: str, package: str) -> str:
    """The program's path; skips the test where it is not installed. others: further names."""
    for name in (program, *others):
        # Debian puts servers where a user's PATH does not look.
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
        if found:
            return found
    pytest.skip(f"needs {program}: apt-get install {package}")


def free_port() -> int:
    """A port that was free a moment ago; programs that cannot be given an open socket need one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Authority:
    """A certificate authority of our own, and one server certificate by it."""

    ca_file: Path
    certificate_file: Path
    """For localhost, 127.0.0.1 and registry.test."""
    key_file: Path

    def server_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate_file, self.key_file)
        return context


def make_authority(folder: Path) -> Authority:
    """Write ca.pem, server.pem and server.key into a folder."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("a test's own CA"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    constraints = x509.BasicConstraints(ca=True, path_length=None)
    ca = (
        builder("a test's own CA", ca_key.public_key())
        .add_extension(constraints, critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName(
        [
            x509.DNSName("localhost"),
            x509.DNSName("registry.test"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
    )
    certificate = (
        builder("server", key.public_key())
        .add_extension(names, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    made = Authority(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    pem = serialization.Encoding.PEM
    made.ca_file.write_bytes(ca.public_bytes(pem))
    made.certificate_file.write_bytes(certificate.public_bytes(pem))
    made.key_file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return made


@asynccontextmanager
async def docker_registry(
    folder: Path, *, user: str | None = None, password: str = ""
) -> AsyncIterator[str]:
    """Debian's docker-registry with its data in folder; gives its host:port.

    user: who alone may use it, by HTTP basic authentication.
    """
    program = needs("docker-registry", "registry", package="docker-registry")
    port = free_port()
    login = ""
    if user is not None:
        htpasswd = needs("htpasswd", package="apache2-utils")
        entry = await trio.run_process(
            [htpasswd, "-nbB", user, password], capture_stdout=True, capture_stderr=True
        )
        (folder / "htpasswd").write_bytes(entry.stdout)
        login = f"auth: {{htpasswd: {{realm: tests, path: '{folder}/htpasswd'}}}}\n"
    config = folder / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{folder}/registry'}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n{login}"
    )
    async with _running([program, "serve", str(config)], port, folder / "registry.log"):
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def nginx(folder: Path, servers: str, *, port: int) -> AsyncIterator[None]:
    """nginx with these `server { … }` blocks, one of which listens on 127.0.0.1:port."""
    program = needs("nginx", package="nginx-light")
    config = folder / "nginx.conf"
    scratch = "\n".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid;\n"
        f"error_log {folder}/nginx-error.log warn; events {{ worker_connections 64; }}\n"
        f"http {{ access_log {folder}/nginx-access.log; {scratch}\n{servers}\n}}\n"
    )
    command = [program, "-p", str(folder), "-c", str(config), "-e", f"{folder}/nginx-error.log"]
    async with _running(command, port, folder / "nginx.log"):
        yield


@asynccontextmanager
async def _running(command: Sequence[str], port: int, log: Path) -> AsyncIterator[None]:
    """A server process for as long as the block is open; it answers on port when the block
    begins.
    """
    with log.open("wb") as output:
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    list(command),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
            )
            try:
                await _answers(process, port, log)
                yield
            finally:
                # Sends SIGTERM to this one process, and SIGKILL if it has not ended 5 s later.
                nursery.cancel_scope.cancel()


async def _answers(process: trio.Process, port: int, log: Path) -> None:
    with trio.fail_after(START_TIMEOUT_S):
        while process.poll() is None:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                # There is no event to wait for: another program's port opens when it opens.
                await trio.sleep(0.02)
            else:
                await stream.aclose()
                return
    said = await trio.Path(log).read_text()
    pytest.fail(f"{process.args} ended with {process.returncode}: {said}")
