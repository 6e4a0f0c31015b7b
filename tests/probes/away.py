"""An S3-compatible server on loopback, behind a port that can be closed and opened again; and runs fetched from there by others
than us, for the reader that knows nothing of ours."""

import contextlib
import os
import selectors
import socket
import threading
import urllib.request
from pathlib import Path

KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
BUCKET = "bucket"


class Port:
    """A port of this machine that leads to another one, while it is open."""

    def __init__(self, target: int):
        self._target = target
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.number = probe.getsockname()[1]
        self._open: list[socket.socket] = []
        self._listening: socket.socket | None = None
        self.open()

    def open(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self.number))
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def close(self) -> None:
        """Whoever calls is refused, and who is connected is cut off."""
        for each in [self._listening, *self._open]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open = []

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as waiting:
            waiting.register(near, selectors.EVENT_READ, far)
            waiting.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in waiting.select():
                    content = key.fileobj.recv(1 << 16)
                    if not content:
                        raise OSError
                    key.data.sendall(content)
        for each in (near, far):
            each.close()


class Server:
    """moto's S3 in this process, with one bucket. `environment` is what leads a process to it, through `port`."""

    def __init__(self):
        from moto.server import ThreadedMotoServer

        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self._direct = self._moto.get_host_and_port()[1]
        self.port = Port(self._direct)
        self.environment = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port.number}"}
        self.make_bucket()

    def files(self):
        """The bucket as it is, past the port."""
        import s3fs

        return s3fs.S3FileSystem(
            key="key",
            secret="secret",
            endpoint_url=f"http://127.0.0.1:{self._direct}",
            use_listings_cache=False,
        )

    def make_bucket(self) -> None:
        self.files().mkdir(BUCKET)

    def forget_everything(self) -> None:
        """As a server without a disk does when it is started again."""
        reset = urllib.request.Request(f"http://127.0.0.1:{self._direct}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()
        self.make_bucket()

    def names(self, run: str) -> list[str]:
        files = self.files()
        files.invalidate_cache()
        return sorted(name.removeprefix(f"{BUCKET}/{run}/") for name in files.find(f"{BUCKET}/{run}"))

    def fetch(self, run: str, to: Path) -> Path:
        """A copy of a run, by its own tools."""
        files = self.files()
        for name in self.names(run):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(files.cat_file(f"{BUCKET}/{run}/{name}"))
        return to

    def stop(self) -> None:
        self.port.close()
        self._moto.stop()


def children(server: Server) -> dict[str, str]:
    """The environment of a process that meets the server."""
    return {**os.environ, **server.environment, "OMP_NUM_THREADS": "1"}
