"""Questions to an index over HTTP, for the page and for programs; a dialect of our own."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from gguf_embed.engine.embedder import Embedder
from gguf_embed.index.agent_tools import hit_dict
from gguf_embed.index.index import Hit
from gguf_embed.server.answers import Answer, answered
from gguf_embed.server.asked import RerankRequest
from gguf_embed.server.call import Call
from gguf_embed.server.dialect import Dialect, Endpoint
from gguf_embed.server.native import failed

MOST_HITS: Final = 100
CANDIDATES: Final = 50  # that a reranker judges


class Search(msgspec.Struct, kw_only=True):
    """The body of POST /gguf-embed/v1/search."""

    query: str
    index: str | None = None  # None: the first that is served
    top: Annotated[int, msgspec.Meta(ge=1, le=MOST_HITS)] = 10
    by: Literal["both", "meaning", "words"] = "both"
    paths: list[str] = []  # patterns of file names
    where: list[str] = []  # on metadata: "lang=en", "date>=2024-05"; all must hold
    min_score: float | None = None
    rerank: bool = False  # judged anew by a reranker that is served
    reranker: str | None = None  # which; None: the first


async def search(call: Call) -> Answer:
    """POST /gguf-embed/v1/search: passages, the best first, with file and lines."""
    body = await call.json(Search)
    service = call.service
    service.limits.check_texts([body.query])
    offer, index = service.indexes.find(body.index)

    def found(embedder: Embedder | None) -> list[Hit]:
        return index.search(
            body.query,
            embedder,
            top=max(body.top, CANDIDATES) if body.rerank else body.top,
            by=body.by,
            paths=body.paths,
            where=body.where,
            min_score=None if body.rerank else body.min_score,
        )

    if body.by == "words":
        hits = await service.in_thread(lambda: found(None))
    else:
        hits = await service.with_embedder(offer.model, found)
    scores = [hit.score for hit in hits]
    if body.rerank and hits:
        asked = RerankRequest(
            query=body.query,
            documents=[hit.passage.text for hit in hits],
            model=body.reranker,
            truncate="end",
        )
        judged = (await call.rerank(asked)).best(body.top)
        least = -1.0 if body.min_score is None else body.min_score
        judged = [(row, score) for row, score in judged if score >= least]
        hits, scores = [hits[row] for row, _ in judged], [score for _, score in judged]
    results = [
        hit_dict(hit, score)
        | {"similarity": _rounded(hit.similarity), "words": _rounded(hit.words)}
        for hit, score in zip(hits, scores, strict=True)
    ]
    return answered({"index": offer.name, "model": offer.model, "by": body.by, "results": results})


async def indexes(call: Call) -> Answer:
    """GET /gguf-embed/v1/indexes: those that are served, the default first."""

    def told() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for offer, index in call.service.indexes.all():
            status = index.status()
            rows.append(
                {
                    "name": offer.name,
                    "model": offer.model,
                    "n_files": status.n_files,
                    "n_passages": status.n_passages,
                    "updated_at": status.updated_at,
                    "n_unfinished": status.unfinished,
                    "metadata_keys": list(status.metadata_keys),
                    "folders": [folder.about or folder.path.name for folder in status.folders],
                }
            )
        return rows

    return answered({"indexes": await call.service.in_thread(told)})


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


SEARCHING: Final = Dialect(
    name="search",
    title="Search in indexes",
    endpoints=(
        Endpoint(
            path="/gguf-embed/v1/search",
            handler=search,
            summary="Passages that answer a question",
            request=Search,
        ),
        Endpoint(
            path="/gguf-embed/v1/indexes",
            handler=indexes,
            summary="The indexes that are served",
            method="GET",
        ),
    ),
    failed=failed,
)
