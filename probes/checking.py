"""Check a run: every byte of it, each defect in a sentence; and put damaged shards aside."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from probes import attributed, elsewhere
from probes import manifest as files
from probes.attempts import QUARANTINE, Attempt, attempt_folder, claimed, hide, quarantine_folder
from probes.careful import is_folder, printable, read_bytes
from probes.digest import FOLDER, Digest, DigestError
from probes.gaps import gaps_of, vanished
from probes.jsonfile import MOST_BYTES, intact, parse_json
from probes.layout import difference
from probes.manifest import Manifest, RunError
from probes.ranks import MANIFEST as RANK
from probes.ranks import rank_folder, ranks_in
from probes.shard import ShardError, UnreadableShard, shard_names, shard_steps
from probes.tokens import read_tokens, token_path, token_steps


@dataclass(frozen=True)
class Defect:
    """What is wrong with one file of a run, in a sentence. `damaged`: it is a shard that can be put aside; `spare`: it can be
    deleted, for it is made anew from the shards."""

    path: Path
    sentence: str
    damaged: bool = False
    spare: bool = False

    def __str__(self) -> str:
        return self.sentence


@dataclass
class Checked:
    """What was found: `defects`, and `notes` on what is missing without any file being wrong."""

    path: Path
    defects: list[Defect] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    others: list[Attempt] = field(default_factory=list)  # what other ranks than 0 wrote in them
    snapshots: int = 0
    size: int = 0  # bytes of shards and snapshots
    attributions: int = 0

    def __str__(self) -> str:
        path = printable(elsewhere.shown(self.path))
        if self.defects:
            said = [f"{path}: {_count(len(self.defects), 'defect')}."]
            said += [f"  {defect}" for defect in self.defects]
        else:
            many = _count(sum(len(attempt.sealed) for attempt in (*self.attempts, *self.others)), "shard")
            many += f" and {_count(self.snapshots, 'token snapshot')}" if self.snapshots else ""
            many += f" of {1 + len({each.rank for each in self.others})} ranks" if self.others else ""
            many += f" in {_count(len(self.attempts), 'attempt')}"
            if self.attributions:
                many += f", {_count(self.attributions, 'attribution')}"
            said = [f"{path}: sound. {many}, {self.size:,} bytes."]
        return "\n".join([*said, *(f"  Note: {note}" for note in self.notes)])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def check(path: Path) -> Checked:
    """Read every byte of the run at `path`. Nothing is changed, and little is kept in memory."""
    elsewhere.look(path)
    found = Checked(path)
    first = _manifest(found, path, files.MANIFEST)
    if first is None:
        return found
    found.attempts.append(Attempt(path, 0, first))
    for number in claimed(path):
        folder = attempt_folder(path, number)
        if not is_folder(folder):
            found.defects.append(Defect(folder, f"{folder.name} is not a folder, and readers pass over it."))
        elif not (folder / files.ATTEMPT).exists():
            found.notes.append(f"{folder.name} was claimed by a writer that never began.")
        elif (begun := _manifest(found, folder, files.ATTEMPT)) is not None:
            if other := difference(first.layout, begun.layout):
                found.defects.append(Defect(folder, f"{folder.name} is of another model: {other}."))
            else:
                found.attempts.append(Attempt(path, number, begun, begun=first.created))
    hide(found.attempts)
    for attempt in found.attempts:
        _attempt(found, attempt)
        for rank in ranks_in(attempt.folder):
            _rank(found, attempt, rank)
    _attributions(found)
    for gap in gaps_of(found.attempts):
        if not any(gap.cause in defect.sentence for defect in found.defects):
            found.notes.append(str(gap))
    return found


def repair(found: Checked) -> list[str]:
    """Move the damaged shards of a checked run into its quarantine, which readers pass over, and delete digests that do not
    fit the shards; a sentence for each.

    No other file is touched. Raises OSError when the disk refuses.
    """
    done = []
    homes = {
        attempt.shards: quarantine_folder(found.path, attempt.number, attempt.rank)
        for attempt in (*found.attempts, *found.others)
    }
    homes[found.path / attributed.FOLDER] = found.path / QUARANTINE / attributed.FOLDER
    for home, quarantine in homes.items():
        for defect in found.defects:
            if defect.damaged and defect.path.parent == home:
                aside = _folders(found.path, quarantine)
                target = aside / defect.path.name
                while target.exists():
                    target = target.with_name(f"again-{target.name}")
                os.rename(defect.path, target)
                done.append(f"{defect.path.name} was put aside: {target.relative_to(found.path)}.")
    for defect in found.defects:
        if defect.spare:
            defect.path.unlink(missing_ok=True)
            done.append(
                f"{defect.path.relative_to(found.path)} was deleted: depthscope compact makes it anew."
            )
    return done


def _folders(run: Path, folder: Path) -> Path:
    """Make a folder below a run, through no link that leads out of it."""
    for part in [*reversed(folder.relative_to(run).parents), folder.relative_to(run)][1:]:
        if not is_folder(run / part):
            (run / part).mkdir()  # FileExistsError where it is a link
    return folder


def _attempt(found: Checked, attempt: Attempt) -> None:
    folder = attempt.shards
    where = folder.relative_to(found.path)
    if not is_folder(folder):
        found.defects.append(
            Defect(attempt.folder, f"{where} is missing or a link, which readers pass over.")
        )
    attempt.refresh(attempt.manifest.layout, None)
    found.size += attempt.size
    for name, (first, last, why) in attempt.broken.items():
        path = folder / name
        sentence = f"Steps {first} to {last} are missing: shard {name} {why}."
        found.defects.append(Defect(path, sentence, name not in attempt.unreadable))
    steps = token_steps(folder)
    for step in steps:
        path = token_path(folder, step)
        try:
            read_tokens(folder, step, attempt.manifest.layout)
            found.snapshots, found.size = found.snapshots + 1, found.size + path.stat().st_size
        except FileNotFoundError:
            continue
        except ShardError as error:
            sentence = f"The token snapshot of step {step} is missing: {path.name} {error}."
            found.defects.append(Defect(path, sentence, not isinstance(error, UnreadableShard)))
    _digests(found, attempt)
    found.defects += [Defect(attempt.folder, str(gap)) for gap in vanished(attempt)]
    signs = attempt.shards if attempt.rank else attempt.folder
    for name in (files.HEARTBEAT, files.END):
        if os.path.lexists(signs / name):
            _small(found, signs / name, attempt.manifest.format)
    known = {token_path(folder, step).name for step in steps}
    known |= {files.HEARTBEAT, files.END, RANK} if attempt.rank else set()
    known |= {FOLDER} if is_folder(folder / FOLDER) else set()
    for name in _names(folder):
        if name not in known and shard_steps(name) is None and not name.startswith("."):
            found.notes.append(f"{where / printable(name)} is no file of a run, and readers pass over it.")


def _rank(found: Checked, attempt: Attempt, rank: int) -> None:
    """What another rank than 0 wrote in an attempt: shards where each recorded its own values, and signs of life."""
    folder = rank_folder(attempt.folder, rank)
    if not rank:
        return
    if not is_folder(folder):
        where = folder.relative_to(found.path)
        found.defects.append(Defect(folder, f"{where} is not a folder, and readers pass over it."))
        return
    manifest = attempt.manifest
    if os.path.lexists(folder / RANK):
        manifest = _manifest(found, folder, RANK)
    if manifest is not None:
        found.others.append(Attempt(found.path, attempt.number, manifest, rank, attempt.begun))
        _attempt(found, found.others[-1])


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder)) if is_folder(folder) else []
    except OSError:
        return []


def _attributions(found: Checked) -> None:
    for name in attributed.attribution_names(found.path):
        path = found.path / attributed.FOLDER / name
        try:
            attributed.read_attribution(found.path, name, found.attempts[0].manifest.layout)
            found.attributions += 1
        except FileNotFoundError:
            continue
        except ShardError as error:
            sentence = f"The attribution {name} {error}."
            found.defects.append(Defect(path, sentence, not isinstance(error, UnreadableShard)))


def _digests(found: Checked, attempt: Attempt) -> None:
    """Every byte of the digests, and whether they are of these shards."""
    folder = attempt.shards / FOLDER
    for name in shard_names(folder):
        try:
            digest = Digest(folder / name, attempt.shards)
            digest.verify()
            wrong = digest.misfit(attempt.about)
            broken = [each for each in digest.names if each in attempt.broken]
            if not wrong and broken:
                wrong = f"covers shard {broken[0]}, which is damaged"
            for shard in digest.shards if not wrong else ():
                # A shard that was sealed since the shards were listed is not known here, and there is nothing to say.
                if attempt.sums.get(shard.name, f"{shard.crc32:08x}") != f"{shard.crc32:08x}":
                    wrong = f"covers another shard {shard.name} than the one that is there"
        except FileNotFoundError:
            continue
        except DigestError as error:
            wrong = str(error)
        if wrong:
            where = (folder / name).relative_to(found.path)
            sentence = f"The digest {where} {wrong}. Nothing is lost: the shards are read instead."
            found.defects.append(Defect(folder / name, sentence, spare=True))


def _manifest(found: Checked, folder: Path, name: str) -> Manifest | None:
    try:
        manifest = Manifest.read(folder, name)
    except RunError as error:
        found.defects.append(Defect(folder / name, str(error)))
        return None
    _small(found, folder / name, manifest.format)
    return manifest


def _small(found: Checked, path: Path, version: int) -> None:
    """A JSON file, which since format 2 ends with a checksum."""
    wrong = ""
    try:
        content = read_bytes(path, MOST_BYTES)
        parse_json(content)
        sound = intact(content)
        if sound is False:
            wrong = "does not match its checksum: it was changed after it was written"
        elif sound is None and version > 1:
            wrong = "has lost its checksum: it was changed after it was written"
    except FileNotFoundError:
        return
    except ValueError as error:
        wrong = f"is unreadable ({printable(error)})"
    except OSError as error:
        wrong = f"cannot be read ({error.strerror or error})"
    if wrong:
        found.defects.append(Defect(path, f"{path.relative_to(found.path)} {wrong}."))
