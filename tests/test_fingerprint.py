"""The identity of a vector space: what changes it, and that it is cheap to ask for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import Write

from gguf_embed import Embedder, Fingerprint, Pooling, Settings
from gguf_embed.catalog import catalog
from gguf_embed.engine import fingerprint
from gguf_embed.engine.fingerprint import known_sha256
from gguf_embed.testing import FakeEmbedder

QUIET = Settings(tune=False, n_threads=1)


@pytest.mark.native
def test_of_the_builtin_model():
    with Embedder.open(settings=QUIET) as embedder:
        space = embedder.fingerprint()
    assert space == Fingerprint(
        sha256=catalog.find(catalog.BUILTIN).file("Q8_0").sha256,
        pooling="mean",
        causal=False,
        special_tokens=(101, 102),
        prompt="",
        dim=384,
        normalized=True,
    )
    facts = json.loads(json.dumps(space.as_dict()))
    assert facts["id"] == space.id
    assert (len(space.id), int(space.id, 16) >= 0) == (16, True)
    assert facts["special_tokens"] == [101, 102]


@pytest.mark.parametrize(
    "options",
    [{"prompt": "a: "}, {"prompt_name": "query"}, {"dimensions": 9}, {"normalize": False}],
)
def test_an_option_that_changes_the_vectors_changes_it(options: dict[str, Any]):
    with FakeEmbedder.open() as embedder:
        space = embedder.fingerprint()
        other = embedder.fingerprint(**options)
        assert space == embedder.fingerprint()
        assert (space == other, space.id == other.id) == (False, False)
        assert embedder.fingerprint(truncate="end").id == space.id  # changes no vector space


def test_another_file_or_pooling_is_another_space(tiny_model: Write):
    ids: set[str] = set()
    mean = Settings(tune=False, n_threads=1, pooling=Pooling.MEAN)
    for path, settings in (
        (tiny_model("qwen3"), QUIET),
        (tiny_model("qwen3"), mean),
        (tiny_model("qwen3", "Q8_0"), QUIET),
        (tiny_model("qwen3", add_eos=False), mean),
        (tiny_model("bert"), QUIET),
    ):
        with Embedder.open(path, settings=settings) as embedder:
            ids.add(embedder.fingerprint().id)
    assert len(ids) == 5


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their hash."""
    reads: list[Path] = []
    sha256 = fingerprint.file_sha256

    def counted(path: Path) -> str:
        reads.append(path)
        return sha256(path)

    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fingerprint, "file_sha256", counted)
    return reads


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path, reads: list[Path]):
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    first = known_sha256(one)
    assert first == known_sha256(one) == known_sha256(one.parent / "." / "one.gguf")
    assert known_sha256(other) != first
    assert reads == [one, other]
    one.write_bytes(b"two")  # as many bytes
    os.utime(one, ns=(1, 1))
    assert known_sha256(one) != first
    assert reads == [one, other, one]
    known_sha256(other)
    assert len(reads) == 3
    assert len(json.loads((tmp_path / "home" / "hashes.json").read_text())) == 2


@pytest.mark.parametrize(
    "kept", [b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1}', b'{"a": "short"}']
)
def test_what_was_kept_badly_is_computed_anew(kept: bytes, tmp_path: Path, reads: list[Path]):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hashes.json").write_bytes(kept)
    path = tmp_path / "one.gguf"
    path.write_bytes(b"one")
    assert known_sha256(path) == known_sha256(path)
    assert reads == [path]


@pytest.mark.parametrize("value", ["short", None, "g" * 64])
def test_what_is_no_hash_is_computed_anew(value: Any, tmp_path: Path, reads: list[Path]):
    path, hashes = tmp_path / "one.gguf", tmp_path / "home" / "hashes.json"
    path.write_bytes(b"one")
    sha256 = known_sha256(path)
    hashes.write_text(json.dumps(dict.fromkeys(json.loads(hashes.read_text()), value)))
    assert known_sha256(path) == sha256
    assert reads == [path, path]


def test_where_nothing_can_be_kept_it_is_computed_each_time(tmp_path: Path, reads: list[Path]):
    (tmp_path / "home").write_bytes(b"a file where the folder should be")
    path = tmp_path / "one.gguf"
    path.write_bytes(b"one")
    assert known_sha256(path) == known_sha256(path)
    assert reads == [path, path]
