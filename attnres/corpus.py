"""Real text without a download: bytes as tokens, split by file, the same batches for every model."""

import hashlib
import platform
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from attnres.checks import check_count

VALIDATION_SHARE = 20
"""One file in this many is validation; of a single file, its last one in this many bytes."""

NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


class Corpus:
    """Training and validation text as bytes, and batches of it.

    `files` maps relative paths to contents. The split is by file, by a hash of the path, so that it does not
    change when other files come and go; of a single file the last 5 % is validation. ValueError where there
    is no text.
    """

    def __init__(self, name: str, files: dict[str, bytes]):
        if not isinstance(files, dict) or not all(isinstance(text, bytes) for text in files.values()):
            raise ValueError("files must map paths to bytes, such as {'a.txt': b'text'}.")
        self.name = name
        self.paths = sorted(path for path, content in files.items() if content)
        if not self.paths:
            raise ValueError(f"The corpus {name!r} has no text in it.")
        self.validation_paths = _validation_paths(self.paths)
        self.sha256 = _fingerprint(files, self.paths)
        self._sizes = {path: len(files[path]) for path in self.paths}
        self.train, self.validation = self._split(files)

    @classmethod
    def standard_library(cls) -> "Corpus":
        """The Python standard library's own source, without tests: about 10 MB."""
        return cls(*_library())

    @classmethod
    def from_path(cls, path: str | Path) -> "Corpus":
        """One file, or all in a folder or a .zip file but hidden ones, links and binary ones (with a zero byte).

        ValueError where there is nothing to read.
        """
        if not isinstance(path, str | Path):
            raise ValueError(f"path must be that of a file or folder, not {path!r}.")
        path = Path(path)
        if path.is_file() and path.suffix == ".zip":
            name, files = _unpacked(path)
            return cls(name, _texts(files))
        if path.is_file():
            return cls(path.name, _read_all(path.parent, [path]))
        if not path.is_dir():
            raise ValueError(f"There is no file or folder {str(path)!r} to take text from.")
        files = _read_all(path, (p for p in path.rglob("*") if _is_visible_file(p, path)))
        return cls(path.resolve().name, _texts(files))

    def train_batch(self, step: int, batch: int, context: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [B, T] int64 each: the same for the same (seed, step), whatever came before."""
        check_count("batch", batch)
        windows = self._windows("training", self.train, context)
        # A hash, so that neighbouring seeds and steps share nothing.
        digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        return _cut(windows, torch.randint(len(windows), (batch,), generator=generator))

    def validation_batches(self, batches: int, batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
        """Fixed pairs of inputs and targets, [B, T] int64 each, spread evenly over the validation text."""
        check_count("batches", batches)
        check_count("batch", batch)
        windows = self._windows("validation", self.validation, context)
        starts = torch.linspace(0, len(windows) - 1, batches * batch, dtype=torch.float64).long()
        return [_cut(windows, part) for part in starts.split(batch)]

    def composition(self) -> dict[str, int]:
        """Bytes by top-level folder, the largest first; files that lie in none are under "."."""
        found: dict[str, int] = {}
        for path in self.paths:
            folder, inside, _ = path.partition("/")
            part = folder if inside else "."
            found[part] = found.get(part, 0) + self._sizes[path]
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def describe(self) -> dict:
        """What this text is, fit to be written down: name, files, bytes and sha256 of all of it."""
        size = len(self.train) + len(self.validation)
        return {"name": self.name, "files": len(self.paths), "bytes": size, "sha256": self.sha256}

    def _split(self, files: dict[str, bytes]) -> tuple[Tensor, Tensor]:
        if len(self.paths) == 1:
            text = files[self.paths[0]]
            cut = len(text) - len(text) // VALIDATION_SHARE
            return _tokens([text[:cut]]), _tokens([text[cut:]])
        train = [files[path] for path in self.paths if path not in self.validation_paths]
        return _tokens(train), _tokens([files[path] for path in self.paths if path in self.validation_paths])

    def _windows(self, part: str, tokens: Tensor, context: int) -> Tensor:
        """Every window of context + 1 tokens, as a view."""
        check_count("context", context)
        if len(tokens) <= context:
            raise ValueError(
                f"The corpus {self.name!r} is too small: a context of {context} needs {context + 1} bytes of "
                f"{part} text, and it has {len(tokens)}."
            )
        return tokens.unfold(0, context + 1, 1)


def pack_library(path: str | Path) -> None:
    """Write the standard library's text into one .zip file, from which `Corpus.from_path` makes the same corpus."""
    name, files = _library()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.comment = name.encode()
        for inside in sorted(files):
            archive.writestr(zipfile.ZipInfo(inside), files[inside], zipfile.ZIP_DEFLATED)


def _library() -> tuple[str, dict[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(root).parts[:-1])]
    return f"Python {platform.python_version()} standard library", _read_all(root, paths)


def _unpacked(path: Path) -> tuple[str, dict[str, bytes]]:
    """Name and files of an archive, but hidden ones; its comment names it, where it has one."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [
                name for name in archive.namelist() if not any(x.startswith(".") for x in name.split("/"))
            ]
            files = {name: archive.read(name) for name in inside if not name.endswith("/")}
            return archive.comment.decode(errors="replace") or path.name, files
    except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} cannot be read as a .zip file: {error}.") from error


def _validation_paths(paths: list[str]) -> frozenset[str]:
    """About one path in twenty, and of two or more always at least one but not all."""
    if len(paths) == 1:
        return frozenset()
    ranked = sorted(paths, key=_path_hash)
    chosen = [path for path in ranked if _path_hash(path) % VALIDATION_SHARE == 0]
    return frozenset(chosen[: len(paths) - 1] or ranked[:1])


def _path_hash(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode(errors="surrogateescape")).digest()[:8])


def _fingerprint(files: dict[str, bytes], paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        # Length first, so that no two different sets of files spell the same bytes.
        digest.update(f"{path}\0{len(files[path])}\0".encode(errors="surrogateescape"))
        digest.update(files[path])
    return digest.hexdigest()


def _is_visible_file(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not path.is_symlink() and not hidden


def _texts(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if b"\0" not in content}


def _read_all(root: Path, paths: Iterable[Path]) -> dict[str, bytes]:
    try:
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    except OSError as error:
        raise ValueError(f"The text cannot be read: {error}.") from error


def _tokens(texts: list[bytes]) -> Tensor:
    # frombuffer wants memory that it may write to, and at least one byte.
    joined = bytearray(b"".join(texts))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)


def _cut(windows: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    chosen = windows[starts].long()
    return chosen[:, :-1], chosen[:, 1:]
