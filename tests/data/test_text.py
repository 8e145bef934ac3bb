"""Finding sources: what is refused before anything is read."""

import dataclasses

import pytest

from jmoe.config.data import DataConfig, SourceConfig
from jmoe.data import digests, text


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def open_paths(*paths, **fields):
    sources = tuple(SourceConfig(path=str(path), **fields) for path in paths)
    return text.open_sources(DataConfig(sources=sources))


@pytest.mark.parametrize("name", ["absent.txt", "*.jsonl"])
def test_what_matches_no_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="No file matches.*" + name[1:]):
        open_paths(tmp_path / name)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty.txt: the file is empty"):
        open_paths(tmp_path / "*.txt")


@pytest.mark.parametrize("name", ["table.csv", "folder.txt"])
def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path, name):
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=rf"{name}.*\.txt\.gz.*\.parquet"):
        open_paths(tmp_path / name)


def test_a_glob_reads_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "c", "a"):
        (tmp_path / f"{name}.txt").write_text(f"from {name}")
    (source,) = open_paths(tmp_path / "*.txt")
    assert list(source.documents()) == ["from a", "from b", "from c"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path):
    (tmp_path / "book [1].txt").write_text("one")
    (source,) = open_paths(tmp_path / "book [1].txt")
    assert list(source.documents()) == ["one"]


def test_a_glob_goes_through_a_directory_whose_name_looks_like_one(tmp_path):
    folder = tmp_path / "run [1]*" / "deep[er]"
    folder.mkdir(parents=True)
    (tmp_path / "run 1").mkdir()
    for name in ("b", "a"):
        (folder / f"{name}1.txt").write_text(f"from {name}")
    (source,) = open_paths(folder / "[ab]1.txt")
    assert list(source.documents()) == ["from a", "from b"]
    (source,) = open_paths(tmp_path / "run [1]*" / "**" / "?1.txt")
    assert list(source.documents()) == ["from a", "from b"]


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "b.jsonl").write_text('{"text": "one"}')
    (tmp_path / "c.jsonl").write_text('{"text": "two"}')
    a, b, c = open_paths(*(tmp_path / f"{name}.jsonl" for name in "abc"))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    (other_field,) = open_paths(tmp_path / "a.jsonl", text_field="body")
    assert other_field.fingerprint != a.fingerprint


def test_a_file_changed_in_place_gets_another_fingerprint(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    (before,) = open_paths(path)
    path.write_text("another one")
    (after,) = open_paths(path)
    assert before.fingerprint != after.fingerprint


def test_the_whole_builtin_corpus_is_its_domains_in_a_row():
    whole, arithmetic = open_paths("builtin", "builtin:arithmetic")
    last = list(arithmetic.documents())
    assert list(whole.documents())[-len(last) :] == last
    assert whole.fingerprint != arithmetic.fingerprint


def test_a_file_is_hashed_once_for_all_starts(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    (first,) = open_paths(tmp_path / "a.txt")
    digests._remembered.cache_clear()
    monkeypatch.delattr(digests, "_read")
    (second,) = open_paths(tmp_path / "a.txt")
    assert first.fingerprint == second.fingerprint


def test_a_file_without_text_is_refused_unless_corrupt_ones_are_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "blank.txt").write_text(" \n \n")
    (source,) = open_paths(tmp_path / "*.txt")
    with pytest.raises(ValueError, match="blank.txt: the file holds no text"):
        list(source.documents())
    source = dataclasses.replace(source, on_corrupt="skip")
    assert list(source.documents()) == ["text"]
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"\*.txt: it holds no text"):
        list(source.documents())
