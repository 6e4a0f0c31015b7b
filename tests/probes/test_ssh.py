"""Runs on a machine one can log in to: an SSH server on loopback, met by what stands in ~/.ssh."""

import asyncio
import json
import logging
import threading
from pathlib import Path

import pytest

import probes
from probes import manifest as files
from probes import writer as writers
from probes.remote import uploading
from probes.remote.address import address
from probes.remote.store import Store, Unreachable
from tests.probes import plain_reader
from tests.probes.away import Port
from tests.probes.models import decoder, sgd, train, wait_for

asyncssh = pytest.importorskip("asyncssh", reason="asyncssh, whose server is met here, is not installed")
pytest.importorskip("paramiko", reason="paramiko is not installed")


class Machine:
    """A server of the files below `folder`, behind `port`; `me` and `keys` are what ssh would have in ~/.ssh for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._host, self.me = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
        self._server = self.do(self._listen())
        self.port = Port(self._server.get_port())

    async def _listen(self):
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[self._host],
            authorized_client_keys=asyncssh.import_authorized_keys(self.me.export_public_key().decode()),
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(self.folder).encode()),
        )

    def do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def known(self) -> str:
        return f"[127.0.0.1]:{self.port.number} {self._host.export_public_key().decode()}"

    def stop(self) -> None:
        self.port.close()
        self.do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def machine(tmp_path, apart, monkeypatch):
    """`gpu-box`, as ~/.ssh/config calls it."""
    machine, home = Machine(tmp_path / "disk"), tmp_path / "user" / ".ssh"
    home.mkdir(parents=True)
    machine.me.write_private_key(str(home / "its-key"))
    (home / "known_hosts").write_text(machine.known())
    (home / "config").write_text(
        f"Host gpu-box\n  HostName 127.0.0.1\n  Port {machine.port.number}\n  User me\n  IdentityFile {home / 'its-key'}\n"
        f"Host *\n  IdentityFile {home / 'none'}\n"
    )
    monkeypatch.setenv("HOME", str(home.parent))
    for name, seconds in (("PASS_SECONDS", 0.1), ("BEAT_SECONDS", 0.2), ("_LAST_WAIT", 0.5)):
        monkeypatch.setattr(uploading, name, seconds)
    monkeypatch.setattr(writers, "SEAL_SECONDS", 0.1)
    yield machine
    machine.stop()


def test_a_run_is_recorded_and_read_through_a_cut(machine, caplog):
    where, here = "ssh://gpu-box/~/runs/a", machine.folder / "runs" / "a"
    model = decoder("full", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, where, optimizer=optimizer, every=1):
        train(model, optimizer, 5)
        wait_for(lambda: list(here.glob("rank-00000/*.safetensors")))
        machine.port.close()
        train(model, optimizer, 5, 5)
        wait_for(lambda: "does not take the recording" in caplog.text)
        machine.port.open()
        caplog.clear()
        caplog.set_level(logging.INFO, "depthscope")
        wait_for(lambda: "reaches ssh://gpu-box/~/runs/a again" in caplog.text)
        train(model, optimizer, 5, 10)
    assert "not uploaded" not in caplog.text
    assert [step for step, _ in plain_reader.read(here)["hidden_rms"]] == list(range(15))
    assert not [path for path in here.rglob("*") if path.is_file() and path.name.startswith(".")]
    run = probes.open_run(where)
    assert run.status == "finished" and run.steps("hidden_rms").tolist() == list(range(15))
    # The connection is cut while nobody asks; who asks next does not notice.
    machine.port.close()
    machine.port.open()
    assert len(run["hidden_rms"]) == 15 and run["depth_weight"].shape[0] == 1
    second = probes.record(model, where, optimizer=optimizer, every=1, resume=15)
    train(model, optimizer, 2, 15)
    second.close()
    assert len(plain_reader.attempts(here)) == 2
    with pytest.raises(probes.RunError, match="already holds a run"):
        probes.record(model, where, optimizer=optimizer)


def test_what_is_written_is_whole_or_not_there(machine, monkeypatch):
    store = Store(address("sftp://gpu-box/runs"))
    content = bytes(range(256)) * 5000
    store.write("a/data", content)
    assert (
        store.read("a/data") == content and store.read("a/data", 70_000, 200_000) == content[70_000:200_000]
    )
    assert store.read("a/data", len(content) - 3, len(content) + 10) == content[-3:]
    store.write("a/data", b"other")
    assert store.read("a/data") == b"other"
    # More at once than one connection has channels; and again, when it was cut with all of them.
    written = {f"many/{number}": bytes([number]) * 70_000 for number in range(20)}
    store.together(lambda path: store.write(path, written[path]), written)
    assert store.read_many(written) == written
    machine.port.close()
    machine.port.open()
    wait_for(lambda: not store._files._channels.alive)
    assert store.read_many(written) == written
    store.write("a/run.json", b"first", new=True)
    # Of two that make one file exactly one does, though both saw none.
    exists, saw = store._files.exists, [False]
    with monkeypatch.context() as patch, pytest.raises(FileExistsError):
        patch.setattr(store._files, "exists", lambda path: saw.pop() if saw else exists(path))
        store.write("a/run.json", b"second", new=True)
    assert not saw
    with pytest.raises(FileExistsError):
        store.write("a/run.json", b"second", new=True)
    assert store.read("a/run.json") == b"first"
    assert sorted(each.name for each in store.list("a")) == ["data", "run.json"]
    assert not list(machine.folder.rglob("*.tmp-*"))
    with pytest.raises(FileNotFoundError):
        store.read("a/none")
    (machine.folder / "closed").mkdir()
    store._files.pipe_file = refuses
    with pytest.raises(Unreachable, match="its disk is full"):
        store.write("b", b"third")


def refuses(*arguments, **options):
    raise OSError("its disk is full")


def test_another_machine_than_the_known_one_gets_nothing(machine, tmp_path):
    known = tmp_path / "user" / ".ssh" / "known_hosts"
    known.write_text("")
    with pytest.raises(
        Unreachable, match=r"its key is not in ~/\.ssh/known_hosts: log in there once with ssh"
    ):
        Store(address("ssh://gpu-box/runs"))
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    known.write_text(f"[127.0.0.1]:{machine.port.number} {other}")
    with pytest.raises(Unreachable, match=r"its key is another than the one in ~/\.ssh/known_hosts"):
        Store(address("ssh://gpu-box/runs"))
    known.write_text(machine.known())
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    (tmp_path / "user" / ".ssh" / "its-key").unlink()
    stranger.write_private_key(str(tmp_path / "user" / ".ssh" / "its-key"))
    with pytest.raises(Unreachable, match="it lets nobody in like that"):
        Store(address("ssh://gpu-box/runs"))


def test_what_waits_is_said_when_the_machine_stays_away(machine, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(uploading, "OFFLINE_SECONDS", 0.5)
    machine.port.close()
    model = decoder("prenorm", blocks=1)
    optimizer = sgd(model)
    with probes.record(model, "ssh://gpu-box/runs/late", optimizer=optimizer, every=1):
        train(model, optimizer, 2)
    assert "does not take the recording" in caplog.text and "are not uploaded" in caplog.text
    assert "Traceback" not in caplog.text
    (spool,) = (tmp_path / "home" / "spool").iterdir()
    assert json.loads((spool / "address.json").read_text())["address"] == "ssh://gpu-box/runs/late"
    machine.port.open()
    assert "files sent" in uploading.send(spool)
    assert (machine.folder / "runs" / "late" / files.END).exists() and not spool.exists()
