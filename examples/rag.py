"""Answer a question from notes: the passages come from here, the words from a local LLM.

    python examples/rag.py notes.txt "when is the rent due?"
    LLM_URL=http://localhost:8080/v1 python examples/rag.py notes.txt "when is the rent due?"

LLM_URL is any server that speaks OpenAI's chat, such as llama-server. Without it a stub answers,
which repeats the best passage.
"""

import json
import os
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from gguf_embed import Embedder


def retrieve(passages: Sequence[str], question: str, top: int = 3) -> list[str]:
    """The passages nearest to the question, the best first."""
    with Embedder.open() as embedder:
        scores = embedder.encode_document(passages) @ embedder.encode_query([question])[0]
    return [passages[i] for i in scores.argsort()[::-1][:top]]


def prompt(passages: Sequence[str], question: str) -> str:
    """What the LLM reads."""
    listed = "\n".join(f"- {passage}" for passage in passages)
    return f"Answer from these notes alone.\n\n{listed}\n\nQuestion: {question}\nAnswer:"


def ask(text: str) -> str:
    """The LLM's answer; the stub's where no server is named."""
    url = os.environ.get("LLM_URL")
    if url is None:
        return text.split("\n- ")[1].partition("\n")[0]
    body = {"model": "local", "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        f"{url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    notes = [line for line in Path(sys.argv[1]).read_text("utf-8").splitlines() if line.strip()]
    print(ask(prompt(retrieve(notes, sys.argv[2]), sys.argv[2])))
