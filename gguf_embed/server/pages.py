"""Pages for people, and the description for programs. Nothing in them comes from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources

from gguf_embed.server.answers import HTML, Answer, answered
from gguf_embed.server.dialect import Dialect
from gguf_embed.server.openapi import description

# A page loads nothing and speaks to nobody but this server.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def pages(spoken: Sequence[Dialect]) -> Callable[[str], Answer]:
    """A function from a path to its page."""

    @cache
    def page(path: str) -> Answer:
        if path == "/openapi.json":
            return answered(description(spoken))
        name = "docs.html" if path == "/docs" else "page.html"
        body = resources.files("gguf_embed.server").joinpath(name).read_bytes()
        return Answer(
            body=body,
            media=HTML,
            headers={"content-security-policy": POLICY, "referrer-policy": "no-referrer"},
        )

    return page
