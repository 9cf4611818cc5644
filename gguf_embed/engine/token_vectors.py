"""One vector per token of a text, before any pooling."""

from __future__ import annotations

from collections.abc import Sequence

from gguf_embed.engine import arguments
from gguf_embed.engine.backend import Head
from gguf_embed.engine.options import Truncate
from gguf_embed.engine.running import Running
from gguf_embed.engine.stream import no_vector, why_no_vector
from gguf_embed.engine.turns import Caller
from gguf_embed.errors import TextTooLong
from gguf_embed.vectors import Vectors, unusable


def token_vectors(
    running: Running, text: str | Sequence[int], n_vocab: int, truncate: Truncate
) -> Vectors:
    """Those of a text or of its ids, shape (n tokens, dim). See `Embedder.token_vectors`."""
    if arguments.is_token_ids(text):
        ids = arguments.check_token_ids([text])
        prepared = running.preparer.given(ids, n_vocab=n_vocab, truncate=truncate)
    else:
        prepared = running.preparer.rows([arguments.check_text(text)], 0, truncate=truncate)
    if prepared.too_long:
        raise TextTooLong(prepared.too_long, running.preparer.n_ctx)
    caller = Caller()
    try:
        ticket = running.scheduler.submit(caller, prepared.tokens, Head.TOKENS)
        (done,) = ticket.results()
    finally:
        running.scheduler.cancel(caller)
    if done.bad or len(unusable(done.vectors)):
        raise no_vector(0, len(prepared.tokens[0]), why_no_vector(died=bool(done.died)))
    return done.vectors
