"""What the partners' files share: a model by its name, that travels, and is opened when used."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import threading

import numpy as np
import pytest

from gguf_embed import (
    BadInput,
    BadOption,
    Embedder,
    Pooling,
    Priority,
    Reranker,
    Settings,
    TextTooLong,
)
from gguf_embed.integrations.held import HeldEmbedder, HeldReranker, settings_dict, settings_of
from gguf_embed.plan.settings import RunSettings
from gguf_embed.testing import FakeBackend, FakeEmbedder, FakeReranker

CHOICES = {"truncate": "end", "dimensions": 8, "settings": {"n_ctx": 64, "pooling": "CLS"}}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Embedder | Reranker]:
    """What `open` has opened, which are fakes."""
    made: list[Embedder | Reranker] = []

    def open_fake(model: str, **options: object) -> Embedder:
        made.append(FakeEmbedder.open(model, **options))  # type: ignore[arg-type]
        return made[-1]  # type: ignore[return-value]

    monkeypatch.setattr(Embedder, "open", open_fake)
    monkeypatch.setattr(Reranker, "open", FakeReranker.open)
    return made


def test_it_is_opened_once_when_it_is_first_used(opened: list[Embedder]):
    held = HeldEmbedder("fake", settings=Settings(n_ctx=99))
    assert opened == []
    with held:
        threads = [threading.Thread(target=held.documents, args=(["a"],)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        copy.deepcopy(held).queries(["a"])
        assert len(opened) == 1
        assert opened[0].settings.n_ctx == 99
    with pytest.raises(BadInput, match="is closed"):
        held.documents(["a"])


def test_what_the_caller_has_opened_stays_open():
    with FakeEmbedder.open() as fake:
        with HeldEmbedder(fake) as held:
            held.documents(["a"])
        fake.encode("a")
        with pytest.raises(BadOption, match="settings are those of the open model"):
            HeldEmbedder(fake, settings=Settings(n_ctx=9))
        with pytest.raises(BadOption, match="give the name"):
            held.as_dict()
        again = pickle.loads(pickle.dumps(held))
        np.testing.assert_array_equal(again.documents(["a"]), held.documents(["a"]))


def test_prompts_shapes_and_no_thread_waits():
    with FakeEmbedder.open() as fake:
        held = HeldEmbedder(fake)
        for texts in (["a b", "c"], []):
            documents, queries = fake.encode_document(texts), fake.encode_query(texts)
            np.testing.assert_array_equal(held.documents(texts), documents)
            np.testing.assert_array_equal(held.queries(texts), queries)
            np.testing.assert_array_equal(asyncio.run(held.adocuments(texts)), documents)
            np.testing.assert_array_equal(asyncio.run(held.aqueries(texts)), queries)


def test_a_query_overtakes_other_work():
    said: list[object] = []

    class Watched(FakeEmbedder):
        def stream(self, texts, **options):  # type: ignore[no-untyped-def]
            said.append(options.get("priority"))
            return super().stream(texts, **options)

    with Watched.open() as fake:
        held = HeldEmbedder(fake)
        held.queries(["a"])
        held.documents(["a"])
    assert said == [Priority.QUERY, None]


def test_a_text_that_is_too_long_is_an_error_or_told(caplog: pytest.LogCaptureFixture):
    texts = ["a", "b " * 99, "c"]
    with FakeEmbedder.open(n_ctx=32) as fake:
        held = HeldEmbedder(fake)
        with pytest.raises(TextTooLong, match="row 1"):
            held.documents(texts)
        with pytest.raises(TextTooLong, match="row 1"):
            asyncio.run(held.adocuments(texts))
        caplog.set_level(logging.WARNING, "gguf_embed.integrations.held")
        held = HeldEmbedder(fake, truncate="end", max_tokens=9)
        np.testing.assert_array_equal(held.documents(texts), asyncio.run(held.adocuments(texts)))
        assert caplog.messages == ["1 of 3 texts cut to 9 tokens (first: row 1)"] * 2


def test_a_call_that_is_given_up_leaves_nothing_behind():
    begun, go = threading.Event(), threading.Event()

    class Slow(FakeBackend):
        def run(self, sequences, **options):  # type: ignore[no-untyped-def]
            begun.set()
            go.wait(60)
            return super().run(sequences, **options)

    async def give_up(held: HeldEmbedder) -> None:
        call = asyncio.create_task(held.adocuments([f"text {n}" for n in range(500)]))
        await asyncio.to_thread(begun.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    backend = Slow()
    with FakeEmbedder.open(backend=backend) as fake:
        asyncio.run(give_up(HeldEmbedder(fake)))
        go.set()
        fake.encode("after it")
        assert sum(len(batch) for batch in backend.microbatches) < 500


def test_json_keeps_it():
    held = HeldEmbedder("minilm", **CHOICES)  # type: ignore[arg-type]
    kept = json.loads(json.dumps(held.as_dict()))
    assert kept == {"model": "minilm", **CHOICES}
    again = HeldEmbedder.of(kept)
    assert again.settings == Settings(n_ctx=64, pooling=Pooling.CLS)
    for same in (again, pickle.loads(pickle.dumps(held)), copy.copy(held)):
        assert same.as_dict() == held.as_dict()
    assert HeldEmbedder().as_dict() == {"model": "all-minilm-l6-v2"}
    ranks = HeldReranker("bge-reranker-v2-m3", task="Judge", isolated=True)
    assert HeldReranker.of(ranks.as_dict()).as_dict() == ranks.as_dict()


def test_settings_of_json():
    said = {"quant": "Q8_0", "tune": False, "pooling": "MEAN"}
    settings = settings_of(said)
    assert settings == Settings(quant="Q8_0", tune=False, pooling=Pooling.MEAN)
    assert settings_dict(settings) == said
    assert settings_dict(Settings()) == {}
    assert settings_dict(Settings(run=RunSettings())) == {}  # it is this machine's
    with pytest.raises(BadOption, match=r"settings have no 'quantum'; they are .*quant"):
        settings_of({"quantum": "Q8_0"})
    with pytest.raises(BadOption, match="pooling='MAX': choose NONE, MEAN"):
        settings_of({"pooling": "MAX"})


@pytest.mark.parametrize("kind", [HeldEmbedder, HeldReranker])
def test_what_is_no_choice_is_refused(kind: type[HeldEmbedder | HeldReranker]):
    with pytest.raises(BadOption, match="no option 'batch_size'"):
        kind("minilm", batch_size=3)  # type: ignore[call-arg]
    with pytest.raises(BadInput, match="pass the name of a model"):
        kind(7)  # type: ignore[arg-type]


def test_the_best_come_first_and_equal_ones_as_given():
    with FakeReranker.open() as fake:
        held = HeldReranker(fake)
        documents = ["x", "a", "b", "a b"]
        for best in (
            held.best("a b", documents, 3),
            asyncio.run(held.abest("a b", documents, 3)),
        ):
            assert [row for row, _ in best] == [3, 1, 2]
            assert best[0][1] == pytest.approx(0.88, abs=0.01)
        assert held.best("a b", [], None) == []
