"""Runs that a stranger made: sound ones of every kind, changed at random, some so cleverly that every checksum is right.

    python -m tests.probes.hostile FOLDER COUNT SEED

opens COUNT of them within little memory, and says what was raised that is no explanation. Long counts can be cut by their
seeds: each run is made from its number alone.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import probes
from app import glance
from probes import checking, compacting
from probes import manifest as files
from probes.careful import is_folder
from probes.digest import FOLDER
from probes.jsonfile import write_json
from probes.manifest import Manifest
from probes.ranks import Ranks, rank_folder
from probes.run import Run
from tests.app import made
from tests.probes import digested
from tests.probes.mutations import GOLDEN, changed, other_thing

MEMORY = 512 << 20  # bytes more than an idle reader
SECONDS = 20  # for one run; it takes milliseconds


# What is changed


def two_digests(path: Path) -> None:
    """Two attempts, in digests but for the last shards of each."""
    digested.two_attempts(path, (4, 3), 70)
    digested.compacted(path, whole=False)


def many_ranks(path: Path) -> None:
    """Three processes that recorded each its own rows."""
    digested.begin(path)
    ranks = Ranks(3, "local", (), {"by": "DDP", "data": 3, "meshes": [{"shape": [3], "names": ["dp"]}]})
    told = replace(Manifest(digested.LAYOUT, 1000.0, 1, 3), ranks=ranks).to_json()
    write_json(path / files.MANIFEST, told)
    for rank in range(3):
        folder = rank_folder(path, rank)
        folder.mkdir(exist_ok=True)
        for number in range(2):
            digested.seal(folder, range(40 * number, 40 * number + 40), number, rank=rank)
        if rank:
            write_json(folder / "rank.json", told)
            write_json(folder / files.HEARTBEAT, {"time": 2000.0, "step": 79, "pid": 1, "machine": "x"})
            write_json(folder / files.END, {"time": 2000.0, "status": "finished", "reason": "", "step": 79})


def followed(path: Path) -> None:
    """Token snapshots and attributions."""
    made.run(path, "block", blocks=2, steps=6)
    made.follow(path, (0, 50), tokens=5)
    made.attribution(path, step=50)


KINDS = {
    "format-1": lambda path: shutil.copytree(GOLDEN / "format-1", path, copy_function=shutil.copyfile),
    "format-2": lambda path: shutil.copytree(GOLDEN / "format-2", path, copy_function=shutil.copyfile),
    "digests": two_digests,
    "ranks": many_ranks,
    "followed": followed,
}
OFTEN = ["format-1", "format-2", "format-2", "digests", "digests", "digests", "ranks", "followed", "followed"]


def make(folder: Path) -> dict[str, Path]:
    """A sound run of each kind."""
    for name, begin in KINDS.items():
        begin(folder / name)
    return {name: folder / name for name in KINDS}


def changed_run(sound: dict[str, Path], folder: Path, chance: random.Random) -> tuple[str, bool]:
    """A sound run, changed in a few places: its kind, and whether nothing but digests was changed, without a right checksum."""
    kind, harmless = chance.choice(OFTEN), True
    shutil.copytree(sound[kind], folder, copy_function=shutil.copyfile)
    spare = chance.random() < 0.3
    for _ in range(chance.choice([1, 1, 2, 3])):
        paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.exists())
        digests = [path for path in paths if path.parent.name == FOLDER]
        path = chance.choice(digests if spare and digests else paths)
        clever = False
        if chance.random() < 0.1:
            other_thing(path, chance)
        elif path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20:
            clever = changed(path, chance)
        else:
            continue
        harmless &= path in digests and not clever
    return kind, harmless


# How it is looked at


def numbers(run: Run) -> dict[str, int]:
    """A CRC-32 of the steps and the rows of each metric."""
    return {
        name: zlib.crc32(run[name].tobytes(), zlib.crc32(run.steps(name).tobytes())) for name in run.metrics
    }


def look(folder: Path, aside: Path, thoroughly: bool) -> None:
    """Everything that a reader asks of a run, and a check of it. RunError is an explanation; whatever else is raised is none."""
    for rank in (0, 1) if is_folder(rank_folder(folder, 1)) else (0,):
        try:
            read(Run(folder, rank, cache=aside if thoroughly else None))
        except probes.RunError as error:
            assert explains(str(error))
    with contextlib.suppress(probes.RunError):
        glance.glance(folder, 0)
    if thoroughly:
        assert str(checking.check(folder)).replace("\n", "").isprintable()
        mend(folder)


def explains(text: str) -> bool:
    return text.isprintable() and len(text) < 1500


def read(run: Run) -> None:
    repr(run), run.last_seen, run.created, run.size, run.ranks, run.gaps
    for number, name in enumerate(run.metrics):
        assert len(run.steps(name)) == len(run[name]) and name in run and explains(name)
        if number < 6:  # of the others it would be no other code
            series = run.series(name)
            bins = series.bins(7)
            assert bins.count.sum() == len(series) and len(series.at([0, len(series) - 1])) == 2
            series.bins(3, int(bins.first[-1]), int(bins.last[-1]), columns=[0])
    for step in run.token_steps[:3]:
        try:
            run.tokens(step)
        except probes.RunError as error:
            assert explains(str(error))
    assert all(explains(note) for one in run.attributions() for note in one.about.notes)
    said = [*run.problems, *run.attribution_problems, run.status_reason, repr(run.attempts)]
    assert all(text.isprintable() for text in said)
    [layer.label for layer in (*run.layers, *run.reads, *run.sources)]
    run.manifest.vectors(10), run.manifest.matrices.next(10)
    run.refresh()


def mend(folder: Path) -> None:
    """`depthscope compact` and `depthscope check --repair`."""
    with contextlib.suppress(probes.RunError, OSError):
        run = glance.Unread(folder)
        for attempt in run.attempts:
            into = attempt.shards / FOLDER
            compacting.tidy(attempt, into)
            list(compacting.compact(attempt, run.layout, into))
        checking.repair(checking.check(folder))


def main(folder: Path, count: int, seed: int) -> int:
    def late(number, frame):
        raise TimeoutError(f"longer than {SECONDS} s")

    # In memory, where there is such a place: making and removing small files is most of the work.
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else folder))
    compacting.ROWS, compacting.BYTES = 60, 20_000
    sound = make(folder / "sound")
    wanted = {kind: numbers(Run(path)) for kind, path in sound.items()}
    for path in sound.values():
        shutil.copytree(path, folder / "first")
        look(folder / "first", folder / "cache", True)
        shutil.rmtree(folder / "first")
    signal.signal(signal.SIGALRM, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    warnings.simplefilter("ignore")
    wrong = spare = 0
    for number in range(seed, seed + count):
        place = folder / str(number)
        kind, harmless = changed_run(sound, place, random.Random(number))
        signal.alarm(SECONDS)
        try:
            if harmless:
                spare += 1
                assert numbers(Run(place)) == wanted[kind], "a digest hides what the shards say"
            look(place, folder / "cache", number % 8 == 0)
        except BaseException:
            wrong += 1
            print(f"run {number} of {kind}:", traceback.format_exc(), flush=True)
        finally:
            signal.alarm(0)
        if not wrong:
            shutil.rmtree(place)
            shutil.rmtree(folder / "cache", ignore_errors=True)
        if wrong == 10:
            break
        if (number + 1 - seed) % 1000 == 0:
            print(
                f"{number + 1 - seed} runs from {seed} on, {spare} of them changed in digests only",
                flush=True,
            )
    if not wrong:
        shutil.rmtree(folder)
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
