"""A training script with its real recorder, to be killed and troubled; and a nursery that starts many, forking from one
process that has torch imported already.

    python -m tests.probes.crashes kill FOLDER COUNT SEED SEAL_SECONDS LONGEST
    unshare --mount python -m tests.probes.crashes trouble FOLDER
"""

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import torch
import torch._dynamo  # here once, not in each child

import probes
import probes.recording
from probes import compacting, manifest, writer
from tests.probes.models import decoder, train, wait_for

STEPS = 60
PREEMPTED = 5  # kills that one run suffers


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


# Killed


def job(folder: Path, steps: int = 10**6) -> None:
    """Train from the last checkpoint on, as a preempted job does; tell in `told` what was sealed and when a step was done."""
    told = os.open(folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(*words) -> None:
        os.write(told, (" ".join(map(str, words)) + "\n").encode())

    def seal(path, tensors, about) -> None:
        sound(path, tensors, about)
        tell("sealed", path.relative_to(folder), zlib.crc32(path.read_bytes()))

    sound, writer.write_shard = writer.write_shard, seal
    model = decoder("full", blocks=1)
    optimizer, start, checkpoint = adam(model), 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    with probes.record(
        model, folder / "run", optimizer=optimizer, every=1, matrices_every=5, resume=start
    ) as recorder:
        for step in range(start, steps):
            train(model, optimizer, 1, step, after=lambda loss: recorder.log(loss=loss))
            tell("step", step, time.monotonic())
            if step % 5 == 4:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, folder / "new.pt")
                os.replace(folder / "new.pt", checkpoint)


def forked(work) -> int:
    """A child that does `work` and ends."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def kill(folder: Path, count: int, seed: int, seal_seconds: float, longest: float) -> None:
    """Kill `count` jobs at random moments, several in each folder; then let the last job of each folder finish."""
    writer.SEAL_SECONDS = seal_seconds
    compacting.ROWS = 1  # a digest of each shard, so that many are killed while they make one
    moments = random.Random(seed)
    for number in range(count):
        place = folder / f"{number // PREEMPTED:03d}"
        place.mkdir(exist_ok=True)
        child = forked(lambda place=place: job(place))
        time.sleep(moments.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it died by itself"
        with open(place / "told", "a") as told:
            told.write(f"killed {time.monotonic()}\n")
        shutil.copytree(place, folder / f"after {number:03d}", symlinks=True)
    places = sorted(folder.glob("0*"))
    reached = {place: max(reached_by(place), default=0) for place in places}
    for place in places:
        child = forked(lambda place=place: job(place, reached[place] + 10))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    os.waitpid(forked(lambda: job(undisturbed, max(reached.values()) + 10)), 0)


def reached_by(place: Path) -> list[int]:
    """The steps that a job has completed."""
    told = (place / "told").read_text().splitlines()
    return [int(line.split()[1]) for line in told if line.startswith("step")]


# Troubled


class Full:
    """A disk of a few hundred kilobytes that somebody else has filled."""

    def __init__(self, place: Path):
        self.run, self._ballast = place / "run", place / "ballast"
        mount("-t", "tmpfs", "-o", "size=400k", "tmpfs", place)

    def strike(self) -> None:
        with open(self._ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def heal(self) -> None:
        self._ballast.unlink()


class ReadOnly:
    def __init__(self, place: Path):
        self.run, self._place = place / "run", place
        mount("-t", "tmpfs", "tmpfs", place)

    def strike(self) -> None:
        mount("-o", "remount,ro", self._place)

    def heal(self) -> None:
        mount("-o", "remount,rw", self._place)


class Unmounted:
    """A disk that goes and comes back."""

    def __init__(self, place: Path):
        self._store, self._place = place / "store", place / "mounted"
        self.run = self._place / "run"
        self._store.mkdir()
        self._place.mkdir()
        mount("-t", "tmpfs", "tmpfs", self._store)
        self.heal()

    def strike(self) -> None:
        subprocess.run(["umount", self._place], check=True)

    def heal(self) -> None:
        mount("--bind", self._store, self._place)


class Deleted:
    def __init__(self, place: Path):
        self.run = place / "run"

    def strike(self) -> None:
        self.run.rename(self.run.with_name("doomed"))  # at once: the writer is at work
        shutil.rmtree(self.run.with_name("doomed"))

    def heal(self) -> None:
        pass


class Revoked:
    """A user who may no longer write into his own folder."""

    def __init__(self, place: Path):
        self.run = place / "run"
        os.chown(place, 65534, 65534)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    def strike(self) -> None:
        for path in (self.run / manifest.RANK_FOLDER, self.run):
            path.chmod(0)

    def heal(self) -> None:
        for path in (self.run, self.run / manifest.RANK_FOLDER):
            path.chmod(0o700)


class Limited:
    """Files may not grow beyond a hundred bytes: a quota, for a user without any rights."""

    def __init__(self, place: Path):
        self.run = place / "run"
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def strike(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, self._limits[1]))

    def heal(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


class Forgetful(Limited):
    """The same, with a writer that keeps little."""

    def __init__(self, place: Path):
        super().__init__(place)
        writer._MOST_BYTES = 40_000


class Lasting(Limited):
    """The same, for ever."""

    def heal(self) -> None:
        pass


class Unprobed:
    run = None

    def __init__(self, place: Path):
        pass


TROUBLES = {
    each.__name__.lower(): each
    for each in (Unprobed, Limited, Forgetful, Lasting, Deleted, Revoked, Full, ReadOnly, Unmounted)
}
PRIVILEGED = {"revoked", "full", "readonly", "unmounted"}  # root's, who may mount and become another


def mount(*arguments) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount. Start it with `unshare --mount`, so that nobody else sees what it does."""
    try:
        mount("-t", "tmpfs", "tmpfs", folder)
        subprocess.run(["umount", folder], check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.sentences = []

    def emit(self, record) -> None:
        self.sentences.append(f"{record.levelname}: {record.getMessage()}")


def troubled(name: str, place: Path) -> None:
    """Train; trouble at step 20, over at step 40. Leaves what was said and the weights, and a copy of the run."""
    heard = Heard()
    logging.getLogger("depthscope").addHandler(heard)
    logging.getLogger("depthscope").setLevel(logging.INFO)
    writer.SEAL_SECONDS = 0.02
    compacting.ROWS, compacting._ROOM = 10, 0
    manifest.HEARTBEAT_SECONDS = 0.1
    trouble = TROUBLES[name](place)
    model = decoder("full", blocks=1)
    optimizer, while_training = adam(model), 0
    if trouble.run is None:
        train(model, optimizer, STEPS)
    else:
        with probes.record(model, trouble.run, optimizer=optimizer, every=1, matrices_every=5) as recorder:
            log = lambda loss: recorder.log(loss=loss)  # noqa: E731
            train(model, optimizer, 20, after=log)
            wait_for(lambda: recorder._writer._shards, 100)
            trouble.strike()
            train(model, optimizer, 20, 20, after=log)
            wait_for(lambda: any("WARNING" in sentence for sentence in heard.sentences), 100)
            trouble.heal()
            train(model, optimizer, 20, 40, after=log)
            while_training = len(heard.sentences)
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    if trouble.run is not None and trouble.run != place / "run":
        shutil.copytree(trouble.run, place / "run")
    said, ended = heard.sentences[:while_training], heard.sentences[while_training:]
    print(json.dumps({"name": name, "weights": weights, "said": said, "ended": ended}), flush=True)


def trouble(folder: Path) -> None:
    folder.chmod(0o755)
    able = os.geteuid() == 0 and may_mount(folder)
    for name in TROUBLES:
        if name in PRIVILEGED and not able:
            print(json.dumps({"name": name, "unable": True}), flush=True)
            continue
        place = folder / name
        place.mkdir()
        child = forked(lambda name=name, place=place: troubled(name, place))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"{name}: training failed"
        if able and os.path.ismount(place):
            # Out of the name space, where the test can read it.
            shutil.copytree(place / "run", folder / f"{name}.run")
            subprocess.run(["umount", place], check=True)
            shutil.copytree(folder / f"{name}.run", place / "run")


if __name__ == "__main__":
    what, folder, *numbers = sys.argv[1:]
    if what == "kill":
        count, seed, seal_seconds, longest = numbers
        kill(Path(folder), int(count), int(seed), float(seal_seconds), float(longest))
    else:
        trouble(Path(folder))
