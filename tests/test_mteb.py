"""The model for MTEB: which prompt a task gets, and, with mteb installed, its own mock tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gguf_embed.catalog import catalog
from gguf_embed.engine.embedder import Embedder
from gguf_embed.errors import BadOption
from gguf_embed.integrations.mteb import MtebModel
from gguf_embed.plan.settings import Settings

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What mteb says of a task."""

    name: str = "Some"
    type: str = "Retrieval"
    prompt: str | Mapping[str, str] | None = None


class Prompts:
    """The prompts of a card, as an Embedder has them."""

    def __init__(self, name: str) -> None:
        self.card = catalog.find(name)
        self.prompts = self.card.prompts
        self.prompt = self.card.prompt


@pytest.mark.parametrize(
    ("model", "facts", "prompt_type", "prompt"),
    [
        ("multilingual-e5-large", Facts(), "query", "query: "),
        ("multilingual-e5-large", Facts(), "document", "passage: "),
        ("multilingual-e5-large", Facts(type="STS"), None, ""),
        ("nomic-embed-text-v1.5", Facts(type="Clustering"), None, "clustering: "),
        ("nomic-embed-text-v1.5", Facts(type="Classification"), None, "classification: "),
        ("nomic-embed-text-v1.5", Facts(type="Clustering"), "query", "search_query: "),
        ("all-minilm-l6-v2", Facts(prompt="Find it"), "query", ""),
        (
            "qwen3-embedding-0.6b",
            Facts(prompt="Find the answer"),
            "query",
            "Instruct: Find the answer\nQuery:",
        ),
        ("qwen3-embedding-0.6b", Facts(prompt="Find the answer"), "document", ""),
        (
            "qwen3-embedding-0.6b",
            Facts(prompt={"query": "Ask", "document": "Answer"}),
            "query",
            "Instruct: Ask\nQuery:",
        ),
        (
            "qwen3-embedding-0.6b",
            Facts(type="STS", prompt="Find texts that mean the same"),
            None,
            "Instruct: Find texts that mean the same\nQuery:",
        ),
    ],
)
def test_the_prompt_of_a_task(model: str, facts: Facts, prompt_type: str | None, prompt: str):
    assert MtebModel(Prompts(model)).prompt(facts, prompt_type) == prompt


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Iterator[MtebModel]:
    with MtebModel.open(tiny_model("bert"), settings=Settings(tune=False)) as model:
        yield model


def test_batches_of_texts_become_rows_in_order(model: MtebModel):
    texts = [f"river {'bank ' * i}" for i in range(5)] + ["water " * 500]
    batches = [{"text": texts[:4], "title": ["no"] * 4}, {"text": texts[4:]}]
    vectors = model.encode(
        batches, task_metadata=Facts(), hf_split="test", hf_subset="default", batch_size=32
    )
    with Embedder.open(model.embedder.path, settings=Settings(tune=False)) as embedder:
        np.testing.assert_allclose(vectors, embedder.encode(texts, truncate="end"), atol=1e-5)


def test_other_precisions_are_refused(model: MtebModel):
    with pytest.raises(BadOption, match="precision='int8'"):
        model.encode(
            [], task_metadata=Facts(), hf_split="test", hf_subset="default", precision="int8"
        )


# -- with mteb: pip install -e '.[dev,mteb]', then pytest -m mteb ------------------------------


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")  # mteb's and scikit-learn's own
def test_mtebs_mock_tasks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is fetched
    from mteb.mocks.mock_run import mock_run
    from mteb.models.models_protocols import EncoderProtocol
    from mteb.results import TaskResult

    with MtebModel.open(settings=Settings(tune=False)) as model:
        assert isinstance(model, EncoderProtocol)
        meta = model.mteb_model_meta
        assert meta.name == "gguf_embed/all-minilm-l6-v2-Q8_0"
        assert meta.revision == catalog.find(catalog.BUILTIN).file("Q8_0").sha256
        assert (meta.embed_dim, meta.use_instructions) == (384, False)
        found = mock_run(model)
    ran = {name: status for name, status in found.items() if status is not None}
    assert len(ran) >= 20
    failed = [name for name, status in ran.items() if not isinstance(status, TaskResult)]
    assert failed == []


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")
def test_an_instruction_comes_from_the_kind_of_task():
    """A task of no prompt of its own has that of its kind, as mteb's own models get it."""
    from mteb.mocks import MockRetrievalTask

    facts = MockRetrievalTask().metadata
    assert facts.prompt is None
    prompt = MtebModel(Prompts("qwen3-embedding-0.6b")).prompt(facts, "query")
    assert prompt == "Instruct: Retrieve text based on user query.\nQuery:"


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")
def test_similarities_are_cosines():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    expected = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    model = MtebModel(Prompts("minilm"))
    np.testing.assert_allclose(model.similarity(a, b), expected, atol=1e-5)
    np.testing.assert_allclose(model.similarity_pairwise(a, b), expected.diagonal(), atol=1e-5)
    assert float(model.similarity(a[0], b[0])) == pytest.approx(expected[0, 0], abs=1e-5)
