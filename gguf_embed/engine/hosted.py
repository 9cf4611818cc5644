"""The child process that holds the model of an isolated engine.

First it gets what to load, then requests, which it answers in any order:

    {"id": 1, "do": "tokenize", "text": "a cat"}
    {"id": 2, "do": "run", "segment": PATH, "lengths": [5, 9], "head": "pooled", ...}

The token ids of a request lie in the segment, end to end; its vectors take their place.
`engine/isolated.py` is the other end.
"""

from __future__ import annotations

import base64
import itertools
import os
import pickle
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gguf_embed.engine.backend import Head
from gguf_embed.engine.loaded import LoadedModel, load
from gguf_embed.engine.segments import Segment
from gguf_embed.engine.stacks import stack_pool
from gguf_embed.engine.tokenizer import RunTooLong
from gguf_embed.errors import GgufEmbedError
from gguf_embed.system.child import do_jobs, take_job, tell

# Tests let texts kill the child: "run:TEXT" or "tokenize:TEXT", with a line for each text; "load:"
# kills it at its start.
FAULT_VARIABLE = "GGUF_EMBED_ISOLATED_FAULT"


class HostedModel:
    """Answers requests with one loaded model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._segments: dict[str, Segment] = {}
        self._mapping = threading.Lock()
        self._stage, _, deadly = os.environ.get(FAULT_VARIABLE, "").partition(":")
        self._deadly = deadly.splitlines()
        self._deadly_ids = [loaded.tokenize(text).tolist() for text in self._deadly]

    def answer(self, request: Mapping[str, Any]) -> None:
        """Compute, and tell what came out."""
        do = self._tokenize if request["do"] == "tokenize" else self._run
        try:
            tell({"id": request["id"], **do(request)})
        except Exception as error:
            known = isinstance(error, (GgufEmbedError, RunTooLong))
            name = type(error).__name__ if known else ""
            message = str(error) if known else repr(error)
            tell({"id": request["id"], "error": name, "message": message})

    def _tokenize(self, request: Mapping[str, Any]) -> dict[str, object]:
        if self._stage == "tokenize" and request["text"] in self._deadly:
            signal.raise_signal(signal.SIGSEGV)  # to this thread: os.kill may come late
        return {"ids": self._loaded.tokenize(request["text"]).tolist()}

    def _run(self, request: Mapping[str, Any]) -> dict[str, object]:
        segment = self._segment(request["segment"])
        lengths: Sequence[int] = request["lengths"]
        ids = segment.tokens(sum(lengths)).copy()
        ends = itertools.accumulate(lengths)
        sequences = [ids[end - n : end] for n, end in zip(lengths, ends, strict=True)]
        if self._stage == "run" and any(each.tolist() in self._deadly_ids for each in sequences):
            signal.raise_signal(signal.SIGSEGV)  # to this thread: os.kill may come late
        outcome = self._loaded.run(
            sequences,
            head=Head(request["head"]),
            n_prefix=request["n_prefix"],
            n_contexts=request["n_contexts"],
        )
        shape = (int(outcome.vectors.shape[0]), int(outcome.vectors.shape[1]))
        segment.vectors(shape)[:] = outcome.vectors
        return {"shape": shape, "bad": [int(row) for row in outcome.bad]}

    def _segment(self, path: str) -> Segment:
        with self._mapping:
            if path not in self._segments:
                self._segments[path] = Segment(Path(path))
            return self._segments[path]


def _main() -> None:
    job = take_job()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    if os.environ.get(FAULT_VARIABLE, "").startswith("load:"):
        signal.raise_signal(signal.SIGSEGV)  # to this thread: os.kill may come late
    proved, run = pickle.loads(base64.b64decode(job["opened"]))  # our parent's
    try:
        proved, loaded = load(proved, run=run)
    except GgufEmbedError as error:
        raised = base64.b64encode(pickle.dumps(error)).decode()
        tell({"failed": raised})
        return
    runner = loaded.runner
    opened = base64.b64encode(pickle.dumps((proved, runner.settings))).decode()
    hosted = HostedModel(loaded)
    tell(
        {
            "ready": opened,
            "dim": loaded.dim,
            "n_scores": loaded.model.n_cls_out,
            "specials": sorted(loaded.specials),
            "ordinary_tokens": runner.ordinary_tokens,
            "tokens_alone": runner.contexts_for(1, Head.TOKENS) > 1,
        }
    )
    n_tokenizers, n_contexts = min(8, os.cpu_count() or 1), runner.settings.n_contexts
    with (
        stack_pool(n_tokenizers, "gguf-embed-tokenize") as tokenizers,
        ThreadPoolExecutor(n_contexts, "gguf-embed-run") as contexts,
        # One thread for all that several contexts compute together: see `Scheduler`.
        ThreadPoolExecutor(1, "gguf-embed-run-together") as together,
    ):

        def do(request: Mapping[str, Any]) -> None:
            if request["do"] == "tokenize":
                threads = tokenizers
            else:
                threads = together if request["n_contexts"] == n_contexts else contexts
            threads.submit(hosted.answer, request)

        do_jobs(do)
    loaded.close()


if __name__ == "__main__":
    _main()
