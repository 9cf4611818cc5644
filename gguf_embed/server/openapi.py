"""The OpenAPI description of all routes, made from the shapes that check requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from gguf_embed import __version__
from gguf_embed.server.answers import JSON
from gguf_embed.server.dialect import Dialect, Endpoint

_PARAMETER: Final = re.compile(r"\{(\w+)(:\w+)?\}")


def description(spoken: Sequence[Dialect]) -> dict[str, object]:
    """OpenAPI 3.1."""
    shapes = [
        endpoint.request
        for dialect in spoken
        for endpoint in dialect.endpoints
        if endpoint.request is not None
    ]
    shapes = list(dict.fromkeys(shapes))
    schemas, components = msgspec.json.schema_components(
        shapes, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(shapes, schemas, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for dialect in spoken:
        for endpoint in dialect.endpoints:
            path = _PARAMETER.sub(r"{\1}", endpoint.path)
            operations = paths.setdefault(path, {})
            operations.setdefault(endpoint.method.lower(), _operation(dialect, endpoint, schema_of))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gguf-embed",
            "version": __version__,
            "description": "Text embeddings in the dialects of OpenAI, Ollama, "
            "text-embeddings-inference and Cohere.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(dialect: Dialect, endpoint: Endpoint, schema_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": [dialect.title],
        "summary": endpoint.summary,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.path}").strip("_"),
        "responses": {
            "200": {
                "description": "The answer",
                "content": {endpoint.media: {"schema": {}}},
            },
            "default": {
                "description": f"An error, in the shape of {dialect.title}",
                "content": {JSON: {"schema": {"type": "object"}}},
            },
        },
    }
    if names := [found[1] for found in _PARAMETER.finditer(endpoint.path)]:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if endpoint.request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": schema_of[endpoint.request]}},
        }
    return operation
