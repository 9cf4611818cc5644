"""Clients of larger frameworks against a server on a port: `pytest -m clients`, extra `clients`."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from test_serve import KEY, MODEL, TEXTS, close, collected, direct, equal, url  # noqa: F401

pytestmark = [
    pytest.mark.clients,
    pytest.mark.native,
    pytest.mark.filterwarnings("default"),
]


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
