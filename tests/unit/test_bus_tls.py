"""TLS to the broker, by its URL. The embedded broker has none, so it ends in front of it, as with a TLS proxy."""

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from services.up.broker import Broker
from shared.bus import START, Bus
from shared.connection import BusDown
from shared.messages import Cancel
from shared.readers import Tail
from tests.mesh.harness import free_port


def certify(folder: Path) -> None:
    """A key and a certificate of its own for 127.0.0.1."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    names = ["-subj", "/CN=broker", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *files, *names], check=True, capture_output=True)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
    writer.close()


async def in_front(broker: Broker, folder: Path, port: int) -> asyncio.Server:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection(f"{broker.folder}/broker.sock")
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer), return_exceptions=True)

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return await asyncio.start_server(connected, "127.0.0.1", port, ssl=tls)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_the_broker_is_reached_by_tls_and_must_be_who_it_says(tmp_path: Path) -> None:
    certify(tmp_path)
    broker, port = Broker(), free_port()
    process = await asyncio.create_subprocess_exec(*broker.command)
    server = await in_front(broker, tmp_path, port)
    bus = Bus(f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path}/cert.pem", "test", patience_s=5)
    stranger = Bus(f"rediss://127.0.0.1:{port}", "test", patience_s=0)
    try:
        await bus.append("s", Cancel(request="r", generation=1))
        tail = Tail(bus, {"s": START})
        assert [item.request for _, _, item in await tail.read() if isinstance(item, Cancel)] == ["r"]
        await tail.close()
        with pytest.raises(BusDown, match="certificate verify failed"):
            await stranger.depths(["s"])
    finally:
        await bus.close()
        await stranger.close()
        server.close()
        process.kill()
        await process.wait()
        broker.remove()
