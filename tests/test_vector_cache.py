"""The cache of vectors, and units of texts that use it."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_command

from gguf_embed.engine.backend import Head, Outcome
from gguf_embed.errors import BadInput, BadText, NativeFailed, OutputFailed, TextTooLong
from gguf_embed.jobs.cache import VectorCache, cache_path
from gguf_embed.jobs.cached import Entry, Space, space_of
from gguf_embed.jobs.encode import begin, encode
from gguf_embed.native.model import Tokens
from gguf_embed.testing import FakeBackend, FakeEmbedder

SPACE = Space(fingerprint="a" * 16, dim=8, label="fake F32")
OTHER = Space(fingerprint="b" * 16, dim=8, label="other F32")
TEXTS = ["a cat sits", "a dog runs", "", "a cat sits"]


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(tmp_path: Path, clock: Clock) -> Iterator[VectorCache]:
    with VectorCache.open(tmp_path / "deep" / "vectors.sqlite", clock=clock) as cache:
        yield cache


def entries(names: Sequence[object], value: float = 1.0, n_tokens: int = 5) -> list[Entry]:
    return [
        Entry(text=str(name), vector=np.full(8, value, np.float32), n_tokens=n_tokens)
        for name in names
    ]


def found(cache: VectorCache, *texts: str, space: Space = SPACE, most: int = 512) -> list[int]:
    return sorted(cache.find(space, texts, max_tokens=most))


def test_what_was_kept_comes_back_to_the_bit(cache: VectorCache):
    vector = np.random.default_rng(0).normal(size=8).astype(np.float32)
    cache.keep(SPACE, [Entry(text="naïve \ud800", vector=vector, n_tokens=3)])
    known = cache.find(SPACE, ["x", "naïve \ud800", "naïve \ud800"], max_tokens=3)
    assert sorted(known) == [1, 2]
    assert known[1].vector.tobytes() == vector.tobytes()
    assert known[1].n_tokens == 3


def test_another_space_and_a_shorter_context_do_not_know_it(cache: VectorCache):
    cache.keep(SPACE, entries(["x"], n_tokens=5))
    assert found(cache, "x", space=OTHER) == []
    assert found(cache, "x", most=4) == []
    assert found(cache, "x", most=5) == [0]


def test_the_first_vector_stays(cache: VectorCache):
    cache.keep(SPACE, entries(["x"], 1.0))
    cache.keep(SPACE, entries(["x", "y"], 2.0))
    known = cache.find(SPACE, ["x", "y"], max_tokens=9)
    assert [known[row].vector[0] for row in (0, 1)] == [1.0, 2.0]


def test_more_texts_than_one_query_takes(cache: VectorCache):
    names = [str(n) for n in range(1203)]
    cache.keep(SPACE, entries(names))
    assert found(cache, *names) == [*range(1203)]


def test_two_that_are_open_share_it(cache: VectorCache):
    with VectorCache.open(cache.path) as second:
        second.keep(SPACE, entries(["x"]))
        threads = [
            threading.Thread(
                target=each.keep, args=(SPACE, entries([f"{n}-{i}" for i in range(50)]))
            )
            for n, each in enumerate([cache, second] * 3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert cache.use().spaces[0].n_vectors == 301


def test_the_oldest_go_where_there_is_a_limit(cache: VectorCache, clock: Clock):
    cache.keep(SPACE, entries(range(2000)))
    size = cache.use().n_bytes
    cache.set_limit(size)
    clock.now += 200_000
    assert found(cache, "7") == [0]  # which notes that it was used
    cache.keep(SPACE, entries(range(2000, 2600)))
    use = cache.use()
    assert use.limit_bytes == size
    assert 0 < use.n_bytes <= size
    assert found(cache, "7", "2599") == [0, 1]
    assert use.spaces[0].n_vectors < 2500


def test_pruning_says_how_many_went_and_makes_the_file_small(cache: VectorCache, clock: Clock):
    cache.keep(SPACE, entries(range(3000)))
    clock.now += 100_000
    cache.keep(OTHER, entries(range(10)))
    before = cache.use().n_bytes
    assert [each.space for each in cache.use().spaces] == [SPACE, OTHER]
    assert cache.prune(unused_s=50_000) == 3000
    assert cache.path.stat().st_size < before / 2
    (left,) = cache.use().spaces
    assert (left.space, left.n_vectors, left.used_at) == (OTHER, 10, clock.now)
    assert cache.prune(space="nothing") == 0
    assert cache.prune(space=OTHER.fingerprint) == 10
    cache.keep(SPACE, entries(range(100)))
    assert cache.prune(to_bytes=0) == 100
    assert cache.use().spaces == ()


def test_moving_takes_all_of_it_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    with VectorCache.open() as cache:
        assert cache.path == cache_path() == tmp_path / "home" / "vectors.sqlite"
        cache.keep(SPACE, entries(["x"]))
        (tmp_path / "taken").touch()
        with pytest.raises(OutputFailed, match="taken: is there already"):
            cache.move(tmp_path / "taken")
        with pytest.raises(BadInput, match="cannot be read or changed"):
            cache.move(tmp_path / "no" / "folder.sqlite")
        assert found(cache, "x") == [0]
        cache.move(tmp_path / "new.sqlite")
    assert not (tmp_path / "home" / "vectors.sqlite").exists()
    with VectorCache.open() as cache:
        assert cache.path == tmp_path / "new.sqlite"
        assert found(cache, "x") == [0]
        (tmp_path / "disk").mkdir()
        assert cache.move(tmp_path / "disk") == tmp_path / "disk" / "new.sqlite"
    with VectorCache.open() as cache:
        assert (cache.path, found(cache, "x")) == (tmp_path / "disk" / "new.sqlite", [0])
        with pytest.raises(OutputFailed, match=r"disk/new\.sqlite: is there already"):
            cache.move(tmp_path / "disk")
        assert found(cache, "x") == [0]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database at all, but long enough to look at" * 20)
    with pytest.raises(BadInput, match=r"notes\.txt: is no cache of vectors"):
        VectorCache.open(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(BadInput, match="a database of something else"):
        VectorCache.open(other)
    newer = tmp_path / "newer.sqlite"
    VectorCache.open(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(BadInput, match="version 9"):
        VectorCache.open(newer)
    with pytest.raises(OutputFailed, match="cannot be made"):
        VectorCache.open(text / "x" / "v.sqlite")
    with pytest.raises(OutputFailed, match="cannot be used"):
        VectorCache.open(tmp_path)


def test_a_cache_that_breaks_is_given_up_once(cache: VectorCache, caplog: pytest.LogCaptureFixture):
    cache.keep(SPACE, entries(["x"]))
    with sqlite3.connect(cache.path) as connection:
        connection.execute("DROP TABLE vectors")
    connection.close()
    with caplog.at_level(logging.WARNING):
        assert found(cache, "x") == []
        cache.keep(SPACE, entries(["y"]))
    assert caplog.text.count("not used any more") == 1
    with pytest.raises(BadInput, match="cannot be read"):
        cache.use()


# -- units -----------------------------------------------------------------------------------


class Failing(FakeBackend):
    """Texts with the word `bad` have no vector."""

    BAD = FakeBackend().tokenize("bad")[1]

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        outcome = super().run(sequences, head=head)
        bad = tuple(row for row, ids in enumerate(sequences) if self.BAD in ids)
        return Outcome(vectors=outcome.vectors, bad=bad)


def test_a_unit_gives_what_encode_gives(cache: VectorCache):
    with FakeEmbedder.open() as embedder:
        expected = embedder.encode(TEXTS, prompt_name="query", dimensions=60)
        for n_cached in (0, 4):
            encoded = encode(
                embedder, TEXTS, {"prompt_name": "query", "dimensions": 60}, cache=cache
            )
            np.testing.assert_array_equal(encoded.vectors, expected)
            assert encoded.token_counts.tolist() == [6, 6, 3, 6]
            assert (encoded.n_cached, encoded.failed) == (n_cached, ())
            assert encoded.n_computed_tokens == (0 if n_cached else 15)
        assert len(embedder.backend.microbatches) == 2
        assert encode(embedder, [], {}).vectors.shape == (0, 64)


def test_only_what_is_not_known_is_computed(cache: VectorCache):
    with FakeEmbedder.open() as embedder:
        encode(embedder, TEXTS[:2], {}, cache=cache)
        before = len(embedder.backend.microbatches)
        encoded = encode(embedder, [*TEXTS, "new"], {}, cache=cache)
        (batch,) = embedder.backend.microbatches[before:]
        assert len(batch) == 2  # "" and "new"
        assert encoded.n_cached == 3
        np.testing.assert_array_equal(encoded.vectors, embedder.encode([*TEXTS, "new"]))


def test_failed_rows_have_reasons_and_are_not_kept(cache: VectorCache):
    texts = ["good", "very bad", "w " * 40, "\ud800", "good", "fine"]
    with FakeEmbedder.open(backend=Failing()) as embedder:
        for n_cached in (0, 3):
            encoded = encode(embedder, texts, {"on_error": "skip"}, cache=cache)
            assert [(each.row, each.n_tokens) for each in encoded.failed] == [
                (1, 4),
                (2, 42),
                (3, None),
            ]
            reasons = [each.reason for each in encoded.failed]
            assert "NaN" in reasons[0]
            assert reasons[1] == "longer than the 32 tokens of the model"
            assert "lone surrogate" in reasons[2]
            assert np.isnan(encoded.vectors[1:4]).all()
            assert not np.isnan(encoded.vectors[[0, 4, 5]]).any()
            assert encoded.n_cached == n_cached


def test_rows_that_are_refused_together_but_not_alone_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
):
    with FakeEmbedder.open() as embedder:
        prepare = embedder.prepare

        def refuse(texts: Sequence[str], **options: Any) -> object:
            if len(texts) > 1:
                raise BadText(1, "is refused in company")
            return prepare(texts, **options)

        monkeypatch.setattr(embedder, "prepare", refuse)
        with pytest.raises(BadText, match="row 1: is refused in company"):
            encode(embedder, TEXTS, {"on_error": "skip"})


def test_rows_of_an_error_are_those_of_all_texts(cache: VectorCache):
    with FakeEmbedder.open(backend=Failing()) as embedder:
        encode(embedder, ["known"], {}, cache=cache)
        with pytest.raises(BadText, match="row 2: character 0"):
            encode(embedder, ["known", "x", "\ud800"], {}, cache=cache)
        with pytest.raises(TextTooLong) as said:
            encode(embedder, ["known", "x", "w " * 40], {}, cache=cache)
        assert said.value.rows == ((2, 42),)
        with pytest.raises(NativeFailed):
            encode(embedder, ["known", "bad"], {}, cache=cache)


def test_a_text_that_was_cut_is_not_kept(cache: VectorCache):
    with FakeEmbedder.open() as embedder:
        for _ in range(2):
            encoded = encode(embedder, ["w " * 40, "x"], {"truncate": "end"}, cache=cache)
            assert encoded.truncated.tolist() == [True, False]
        assert encoded.n_cached == 1
        assert cache.use().spaces[0].space == space_of(embedder)


def test_a_unit_that_is_cancelled_ends():
    with FakeEmbedder.open() as embedder:
        unit = begin(embedder, TEXTS, {})
        unit.cancel()
        unit.submit()
        assert len(unit.result().vectors) == 4


# -- the command -------------------------------------------------------------------------------


def test_the_command_shows_prunes_and_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("GGUF_EMBED_HOME", str(tmp_path / "home"))
    with VectorCache.open() as cache:
        cache.keep(SPACE, entries(range(100)))
        cache.keep(OTHER, entries(range(50)))

    def shown(*arguments: object) -> tuple[int, str, str]:
        return run_command(capsys, "cache", *arguments)

    code, out, _ = shown()
    assert (code, "fake F32" in out, "2,048 MiB" in out) == (0, True, True)
    assert "1,024 MiB" in shown("limit", "1GiB")[1]
    seen = json.loads(shown("--json")[1])
    assert [each["n_vectors"] for each in seen["spaces"]] == [100, 50]
    assert seen["limit_bytes"] == 2**30
    assert "50 vectors forgotten" in shown("prune", "--space", OTHER.fingerprint)[2]
    assert "0 vectors forgotten" in shown("prune", "--unused-days", 5)[2]
    target = tmp_path / "moved.sqlite"
    assert shown("move", target)[0] == 0
    assert json.loads(shown("--json")[1])["file"] == str(target)
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / target.name
    assert f"is {target} from now on" in shown("move", tmp_path / "disk")[2]
    assert json.loads(shown("--json")[1])["file"] == str(target)
    assert "100 vectors forgotten" in shown("prune", "--to", 0)[2]
    for wrong in (["prune"], ["--to", 5], ["limit"], ["show", "x"], ["limit", "much"]):
        code, out, err = shown(*wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)
