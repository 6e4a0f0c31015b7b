"""The corpus: the same bytes and batches every time, files apart, and one sentence where there is no text."""

import json
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres import Corpus
from attnres.corpus import pack_library

FILES = {f"package/module_{i}.py": bytes([i]) * 100 for i in range(1, 61)}


@pytest.fixture(scope="module")
def library():
    return Corpus.standard_library()


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_standard_library_is_text_without_tests(library):
    description = library.describe()
    assert description["bytes"] == len(library.train) + len(library.validation) > 1_000_000
    assert "argparse.py" in library.paths
    folders = {part for path in library.paths for part in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}
    assert 0.01 < len(library.validation) / description["bytes"] < 0.15


def test_a_description_has_no_absolute_path(library, folder):
    assert set(library.describe()) == {"name", "files", "bytes", "sha256"}
    assert str(folder.parent) not in json.dumps(Corpus.from_path(folder).describe())


def test_the_same_files_are_the_same_corpus(folder):
    one, other = Corpus.from_path(folder), Corpus.from_path(str(folder))
    assert one.describe() == other.describe()
    assert torch.equal(one.train, other.train)
    (folder / "package/module_7.py").write_bytes(b"changed")
    assert Corpus.from_path(folder).sha256 != one.sha256


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.binary(max_size=5), min_size=1, max_size=60))
def test_no_file_is_in_both_parts_and_none_is_lost(files):
    marked = {path: content + b"." for path, content in files.items()}
    corpus = Corpus("drawn", marked)
    train = [path for path in sorted(marked) if path not in corpus.validation_paths]
    validation = [path for path in sorted(marked) if path in corpus.validation_paths]
    assert bytes(corpus.train.tolist()) == b"".join(marked[path] for path in train)
    assert bytes(corpus.validation.tolist()) == b"".join(marked[path] for path in validation)
    assert bool(train) and bool(validation) == (len(marked) > 1)


def test_an_archive_of_the_library_is_the_library(library, tmp_path):
    pack_library(tmp_path / "text.zip")
    packed = Corpus.from_path(tmp_path / "text.zip")
    assert packed.describe() == library.describe()
    assert torch.equal(packed.train, library.train) and torch.equal(packed.validation, library.validation)
    assert (tmp_path / "text.zip").stat().st_size < 5e6
    assert sum(packed.composition().values()) == packed.describe()["bytes"]
    assert "asyncio" in packed.composition() and "." in packed.composition()


def test_an_archive_is_read_as_its_folder_is(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("archives") / "text.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**FILES, ".git/config": b"hidden", "picture.png": b"\x89PNG\0\0"}.items():
            archive.writestr(name, content)
    packed = Corpus.from_path(path)
    assert packed.sha256 == Corpus.from_path(folder).sha256 and packed.name == "text.zip"
    assert packed.composition() == {"package": 6000}
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"text.zip cannot be read as a \.zip file"):
        Corpus.from_path(path)


def test_a_file_keeps_its_part_when_others_come():
    fewer = {path: content for path, content in FILES.items() if not path.endswith("5.py")}
    assert Corpus("some", fewer).validation_paths == Corpus("all", FILES).validation_paths & fewer.keys()


def test_the_end_of_a_single_file_is_validation(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(200)))
    corpus = Corpus.from_path(tmp_path / "text.txt")
    assert corpus.name == "text.txt"
    assert corpus.train.tolist() == list(range(190))
    assert corpus.validation.tolist() == list(range(190, 200))


def test_hidden_linked_binary_and_empty_files_are_left_out(folder):
    before = Corpus.from_path(folder).describe()
    (folder / ".git").mkdir()
    (folder / ".git/config").write_bytes(b"hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "link.py").symlink_to(folder / "package/module_1.py")
    (folder / "empty.py").write_bytes(b"")
    assert Corpus.from_path(folder).describe() == before


def test_batches_are_windows_of_the_text_shifted_by_one():
    corpus = Corpus("counting", {"one": bytes(range(250)), "two": bytes(range(250))})
    inputs, targets = corpus.train_batch(step=3, batch=5, context=16)
    assert inputs.shape == targets.shape == (5, 16)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_training_batches_depend_on_seed_and_step_only(library):
    first, _ = library.train_batch(0, 4, 32)
    torch.manual_seed(99)
    library.train_batch(1, 4, 32)
    again, _ = library.train_batch(0, 4, 32)
    assert torch.equal(first, again)
    others = [library.train_batch(step, 4, 32, seed)[0] for step, seed in ((1, 0), (0, 1), (1, 1))]
    assert not any(torch.equal(first, other) for other in others)


def test_validation_batches_are_fixed_and_spread_over_the_text(library):
    one, other = (library.validation_batches(3, 2, 64) for _ in range(2))
    assert [inputs.shape for inputs, _ in one] == [(2, 64)] * 3
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
    assert torch.equal(one[0][0][0], library.validation[:64].long())
    assert torch.equal(one[-1][1][-1], library.validation[-64:].long())


def test_without_text_there_is_one_clear_sentence(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^There is no file or folder '.*nowhere' to take text from\.$"):
        Corpus.from_path(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^The corpus 'empty.txt' has no text in it\.$"):
        Corpus.from_path(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="has no text in it"):
        Corpus.from_path(tmp_path)


def test_an_unreadable_file_is_one_clear_sentence(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_bytes(b"text")

    def refuse(path):
        raise PermissionError(13, "Permission denied", "secret.txt")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(ValueError, match=r"^The text cannot be read: .*Permission denied"):
        Corpus.from_path(tmp_path)


def test_too_little_text_says_how_much_is_needed():
    corpus = Corpus("small", {"a": b"x" * 400})
    with pytest.raises(ValueError, match="a context of 64 needs 65 bytes of validation text, and it has 20"):
        corpus.validation_batches(1, 1, 64)
    with pytest.raises(ValueError, match="needs 513 bytes of training text, and it has 380"):
        corpus.train_batch(0, 1, 512)
