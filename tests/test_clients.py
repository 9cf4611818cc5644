"""Clients of larger frameworks against a server on a port (extra `clients`)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_serve import (  # noqa: F401
    KEY,
    MODEL,
    TEXTS,
    Process,
    address_in,
    close,
    collected,
    direct,
    equal,
    rerankers,
    url,
)

from gguf_embed import Reranker, Settings

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("default")]


def test_langchain_openai(url: str, direct: np.ndarray):  # noqa: F811
    from langchain_openai import OpenAIEmbeddings
    from pydantic import SecretStr

    made = OpenAIEmbeddings(
        base_url=f"{url}/v1",
        api_key=SecretStr(KEY),
        model=MODEL,
        check_embedding_ctx_length=False,  # else it sends ids of OpenAI's own tokenizer
    )
    equal(made.embed_documents(TEXTS), direct)
    close([made.embed_query(TEXTS[0])], direct[:1])
    equal(asyncio.run(made.aembed_documents(TEXTS)), direct)


def test_langchain_ollama(url: str, direct: np.ndarray):  # noqa: F811
    from langchain_ollama import OllamaEmbeddings

    headers = {"headers": {"authorization": f"Bearer {KEY}"}}
    made = OllamaEmbeddings(base_url=url, model=MODEL, client_kwargs=headers)
    equal(made.embed_documents(TEXTS), direct)
    close([made.embed_query(TEXTS[0])], direct[:1])
    equal(asyncio.run(made.aembed_documents(TEXTS)), direct)


def test_llama_index_ollama(url: str, direct: np.ndarray):  # noqa: F811
    from llama_index.embeddings.ollama import OllamaEmbedding

    headers = {"headers": {"authorization": f"Bearer {KEY}"}}
    made = OllamaEmbedding(model_name=MODEL, base_url=url, client_kwargs=headers)
    close(made.get_text_embedding_batch([text or "x" for text in TEXTS])[:2], direct[:2])
    close([made.get_query_embedding(TEXTS[0])], direct[:1])
    close([asyncio.run(made.aget_text_embedding(TEXTS[1]))], direct[1:2])


@pytest.mark.mteb
def test_mteb(rerankers: list[Path], tmp_path: Path, direct: np.ndarray):  # noqa: F811
    """Its wrappers ask for the list of models without a key: a server of its own."""
    wrappers = pytest.importorskip("mteb.models.openai_wrappers")
    command = ["-m", "gguf_embed", "serve", "--port", "0", "--no-tune", "--preload"]
    for model in (MODEL, *rerankers):
        command += ["--model", str(model)]
    running = Process(command, tmp_path)
    try:
        url = running.address_in(lambda: address_in(running.errors.read_text()))
        where: dict[str, Any] = {"task_metadata": None, "hf_split": "", "hf_subset": ""}
        encoder = wrappers.OpenAIAPIEncodeWrapper(url, MODEL, use_chat_template=False)
        equal(encoder.encode([{"text": TEXTS}], **where), direct)
        judge = wrappers.OpenAIAPIRerankWrapper(url, rerankers[0].stem)
        scores = judge.predict([{"text": [TEXTS[1]]}], [{"text": [TEXTS[0]]}], **where)
        with Reranker.open(rerankers[0], settings=Settings(tune=False)) as reranker:
            np.testing.assert_array_equal(scores, reranker.score(TEXTS[1], TEXTS[:1]))
    finally:
        running.end()
