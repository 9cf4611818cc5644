"""A model that another process serves: `gguf-embed serve` there, the same engine here.

    with Embedder.connect("http://127.0.0.1:11434") as embedder: ...

Prompts, cuts and order are decided here as ever; texts are tokenized there, and token ids are
computed there, in microbatches that other clients share.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np

from gguf_embed.catalog import catalog
from gguf_embed.engine.address import KEY_VARIABLE, Address
from gguf_embed.engine.backend import BatchLimits, Head, Outcome
from gguf_embed.engine.opening import Opened
from gguf_embed.engine.tokenizer import RunTooLong
from gguf_embed.engine.tune_record import Target
from gguf_embed.errors import (
    BadInput,
    BadText,
    DoesNotFit,
    FetchFailed,
    ModelNotFound,
    NativeFailed,
)
from gguf_embed.gguf.header import Header
from gguf_embed.machine.measured import LevelFigures
from gguf_embed.machine.selftest import SafePaths
from gguf_embed.native.model import Tokens
from gguf_embed.plan.candidate import Candidate
from gguf_embed.plan.mode import EmbedMode
from gguf_embed.plan.plan import Plan
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.store.local import Source
from gguf_embed.system.closing import Closes
from gguf_embed.vectors import Pooling

# A request holds what takes the server about a second; so many are under way at a time.
LIMITS: Final = BatchLimits(max_tokens=8192, max_seqs=512, n_contexts=4)
TRIES_WHEN_BUSY: Final = 30
TOKENIZED_TOGETHER: Final = 256  # texts of a request
ROUTE: Final = "/gguf-embed/v1"

_T = TypeVar("_T")


class Client:
    """Asks one server, over connections that are used again. Safe to use from several threads."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def ask(self, route: str, body: Mapping[str, object]) -> dict[str, Any]:
        """The answer to a POST. Raises FetchFailed where the server is not reached, else what it
        says went wrong.
        """
        said = {"model": self.address.model, **body}
        raw = json.dumps(said).encode()
        status, headers, answer = self._sent(route, raw)
        for _ in range(TRIES_WHEN_BUSY):
            if status != 429:
                break
            with suppress(ValueError):
                time.sleep(min(60.0, float(headers.get("retry-after", "1"))))
            status, headers, answer = self._sent(route, raw)
        try:
            value: Any = json.loads(answer)
        except ValueError:
            value = None
        if status == 200 and isinstance(value, dict):
            return cast("dict[str, Any]", value)
        raise self._error(status, value)

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _sent(self, route: str, raw: bytes) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"content-type": "application/json"}
        if key := self.address.api_key or os.environ.get(KEY_VARIABLE):
            headers["authorization"] = f"Bearer {key}"
        while True:
            with self._lock:
                used = self._idle.pop() if self._idle else None
            connection = used or self.address.connection()
            try:
                connection.request("POST", f"{ROUTE}/{route}", raw, headers)
                response = connection.getresponse()
                answer = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if used is not None and not isinstance(error, TimeoutError):
                    continue  # it was closed while it was idle
                raise FetchFailed(
                    f"{self.address.url} does not answer ({error or type(error).__name__}); is "
                    "`gguf-embed serve` running there?"
                ) from error
            if response.will_close:
                connection.close()
            else:
                with self._lock:
                    self._idle.append(connection)
            return response.status, dict(response.headers.items()), answer

    def _error(self, status: int, value: Any) -> Exception:
        told = cast("dict[str, object]", value) if isinstance(value, dict) else {}
        code, message = told.get("code"), told.get("error")
        if not isinstance(message, str):
            return FetchFailed(
                f"{self.address.url} answers {status}, and not as `gguf-embed serve` does; check "
                "the address"
            )
        text = f"{self.address.url}: {message}"
        row, reason = told.get("row"), told.get("reason")
        if isinstance(row, int) and isinstance(reason, str):
            return BadText(row, reason)
        match code:
            case "invalid_request" | "invalid_text" | "text_too_long" | "request_too_large":
                return BadInput(text)
            case "model_not_found":
                return ModelNotFound(text)
            case "model_does_not_fit":
                return DoesNotFit(text, needed_bytes=0, free_bytes=0)
            case "engine_failed" | "internal_error":
                return NativeFailed(text)
            case _:
                return FetchFailed(text)


class RemoteModel(Closes):
    """The `Backend` whose model is served elsewhere. Safe to use from several threads."""

    def __init__(self, client: Client, *, dim: int, specials: frozenset[int]) -> None:
        self.client = client
        self._dim = dim
        self._specials = specials

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._dim

    @property
    def specials(self) -> frozenset[int]:
        """The model's special tokens."""
        return self._specials

    @property
    def limits(self) -> BatchLimits:
        """Of a request: the server packs its own microbatches."""
        return LIMITS

    def tokenize(self, text: str) -> Tokens:
        """Token ids of one text."""
        try:
            return self.tokenize_many([text])[0]
        except BadText as error:
            raise RunTooLong(error.reason) from error

    def tokenize_many(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of several texts in few requests."""
        ids: list[Tokens] = []
        for start in range(0, len(texts), TOKENIZED_TOGETHER):
            part = list(texts[start : start + TOKENIZED_TOGETHER])
            for text in part:
                text.encode()  # UnicodeEncodeError here rather than there
            answer = self.client.ask("tokens", {"texts": part})
            flat = np.frombuffer(base64.b64decode(answer["ids"]), "<i4").astype(np.int32)
            ids += np.split(flat, np.cumsum(answer["lengths"])[:-1])
        return ids

    def contexts_for(self, n_tokens: int, head: Head) -> int:
        """One: a request is a request."""
        return 1

    def run(
        self,
        sequences: Sequence[Tokens],
        *,
        head: Head = Head.POOLED,
        n_prefix: int = 0,
        n_contexts: int = 1,
    ) -> Outcome:
        """See `Backend.run`."""
        if head is Head.RANK:
            raise BadInput("scores are not asked of a server that way; use its /rerank")
        flat = np.concatenate(sequences).astype("<i4")
        answer = self.client.ask(
            "run",
            {
                "ids": base64.b64encode(flat.tobytes()).decode(),
                "lengths": [len(sequence) for sequence in sequences],
                "tokens": head is Head.TOKENS,
            },
        )
        vectors = np.frombuffer(base64.b64decode(answer["vectors"]), "<f4").astype(np.float32)
        return Outcome(
            vectors=vectors.reshape(-1, self._dim),
            bad=tuple(answer["bad"]),
            died=tuple(answer["died"]),
        )

    def close(self) -> None:
        """Close the connections; the model stays where it is."""
        self.client.close()


def open_remote(address: Address) -> Opened:
    """The embedder that a server has at that address. Raises what asking it raises."""
    client = Client(address)
    try:
        return asked_of(client, "model", {}, lambda facts: served_as(address, client, facts))
    except BaseException:
        client.close()
        raise


def asked_of(
    client: Client, route: str, body: Mapping[str, object], read: Callable[[Mapping[str, Any]], _T]
) -> _T:
    """What `read` makes of an answer. Raises FetchFailed for one of another version."""
    answer = client.ask(route, body)
    try:
        return read(answer)
    except (KeyError, TypeError, ValueError) as error:
        raise FetchFailed(
            f"{client.address.url} speaks another version of gguf-embed ({error!r}); install the "
            "same version on both sides"
        ) from error


def served_as(address: Address, client: Client, facts: Mapping[str, Any]) -> Opened:
    """What it says of the model, as if it were opened here."""
    name, file = str(facts["id"]), str(facts["file"])
    card = catalog.find(str(facts["card"])) if facts["card"] else None
    if card is not None:
        card = replace(card, prompts=dict(facts["prompts"]))
    architecture = str(facts["architecture"])
    header = Header(
        source=file,
        version=3,
        metadata={
            "general.architecture": architecture,
            "general.file_type": int(facts["file_type"]),
            f"{architecture}.vocab_size": int(facts["n_vocab"]),
        },
        tensors=(),
        header_bytes=0,
        file_bytes=0,
    )
    run = RunSettings(n_ctx=int(facts["n_ctx"]))
    quant, reason = str(facts["quant"]), f"served at {address.url}"
    row = Candidate(
        quant=quant,
        tier="cpu",
        where=address.url,
        fit="fits",
        needed_bytes=0,
        free_bytes=0,
        reason="takes no memory here",
        run=run,
        memory={},
        measured=LevelFigures(),
    )
    made = Plan(
        model=name,
        quant=quant,
        reason=reason,
        file=None,
        tier="cpu",
        fit="fits",
        devices=("CPU",),
        run=run,
        memory={},
        considered=(row,),
        why=(reason,),
    )
    mode = EmbedMode(
        pooling=Pooling[str(facts["pooling"]).upper()],
        causal=bool(facts["causal"]),
        encoder=bool(facts["encoder"]),
    )
    path, safe = Path(file), SafePaths(flash=True, repack=True, remark=None)
    backend = partial(
        RemoteModel, dim=int(facts["dim"]), specials=frozenset(map(int, facts["specials"]))
    )
    reopen: Callable[[], RemoteModel] = lambda: backend(Client(address))  # noqa: E731
    return Opened(
        source=Source(name=name, card=card, file=file, sha256=str(facts["sha256"])),
        path=path,
        header=header,
        card=card,
        plan=made,
        settings=Settings(),
        run=run,
        mode=mode,
        remarks=(),
        target=Target(path=path, header=header, mode=mode, safe=safe, n_cores=1, start=run),
        backend=backend(client),
        reopen=reopen,
        remote=address,
    )
