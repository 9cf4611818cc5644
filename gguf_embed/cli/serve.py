"""`gguf-embed serve`: vectors over HTTP, in the dialects that clients speak."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_embed.cli import console, options
from gguf_embed.cli.commands import COMMANDS
from gguf_embed.errors import BadOption

if TYPE_CHECKING:
    from gguf_embed.server.indexes import IndexOffer
    from gguf_embed.server.offers import Offer
    from gguf_embed.server.run import ServeOptions

NEEDED = ("httptools", "msgspec", "orjson", "prometheus_client", "starlette", "uvicorn")
KEYS_VARIABLE = "GGUF_EMBED_API_KEYS"

DESCRIPTION = """\
Serve vectors over HTTP to clients of OpenAI, Ollama, text-embeddings-inference and Cohere: only the
address changes. With no --model the built-in model is the default, and every model on this machine
can be asked for by its name; with --model those, and no others. Rerankers give scores at /rerank,
/v1/rerank and /v2/rerank.

Requests share microbatches; a short query overtakes long documents. The model runs in a child
process: a text that llama.cpp dies of costs its own request only. Ctrl-C or SIGTERM lets requests
in flight end; a second one ends at once."""

EPILOG = """\
who may ask:
  Only this machine, unless --host says otherwise; another host needs keys, or --insecure.
  Keys stand in --api-key-file, or in GGUF_EMBED_API_KEYS, one a line. Clients send
  "Authorization: Bearer KEY". Neither keys nor texts are logged.

examples:
  gguf-embed serve
  gguf-embed serve --model qwen3-embedding:0.6b --model qwen3-reranker:0.6b --preload
  gguf-embed serve --host 0.0.0.0 --api-key-file keys.txt --tls-cert cert.pem --tls-key key.pem
  gguf-embed serve --unix-socket /run/gguf-embed/socket
  gguf-embed serve --index handbook --index notes
  gguf-embed serve --cache                          the cache that embed and index use
  gguf-embed serve --json-logs --keep-alive 1h --memory 8GiB"""


def add(commands: Any) -> None:
    """The parser of `serve`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve", help=COMMANDS["serve"], description=DESCRIPTION, epilog=EPILOG
    )
    options.add_model(parser, several=True)
    parser.add_argument(
        "--index",
        action="append",
        default=[],
        metavar="NAME|PATH",
        help="let clients search what `gguf-embed index` has embedded; may be repeated",
    )
    options.add_cache(parser)
    parser.add_argument(
        "--preload", action="store_true", help="load the models now, not when they are asked for"
    )
    parser.add_argument(
        "--keep-alive",
        type=duration,
        metavar="TIME",
        help="unload a model that was not used for so long, such as 30s, 5m or 1h; 0: at once, -1: "
        "never (default: 5m; with --preload: never)",
    )
    parser.add_argument(
        "--allow-pull", action="store_true", help="clients may fetch models (POST /api/pull)"
    )
    group = parser.add_argument_group("address")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen on; 0.0.0.0: of all networks (default: %(default)s)",
    )
    group.add_argument(
        "--port",
        type=port,
        metavar="N",
        help="0: any that is free (default: 11434, Ollama's, or the next that is free)",
    )
    group.add_argument(
        "--unix-socket", metavar="FILE", help="listen on this socket file, for this user alone"
    )
    group.add_argument("--tls-cert", metavar="FILE", help="certificate chain (PEM), for https")
    group.add_argument("--tls-key", metavar="FILE", help="its private key (PEM)")
    group = parser.add_argument_group("who may ask")
    group.add_argument("--api-key-file", metavar="FILE", help="keys, one a line")
    group.add_argument("--insecure", action="store_true", help="another host without a key")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that clients may call this server by; may be repeated",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web pages of this origin may ask, too; may be repeated",
    )
    group = parser.add_argument_group("limits of requests")
    group.add_argument(
        "--max-body", type=options.size, metavar="SIZE", help="of a request (default: 32MiB)"
    )
    group.add_argument(
        "--max-texts", type=options.positive, metavar="N", help="of a request (default: 8192)"
    )
    group.add_argument(
        "--max-text-chars",
        type=options.positive,
        metavar="N",
        help="of a text (default: 1,000,000)",
    )
    group.add_argument(
        "--max-requests", type=options.positive, metavar="N", help="at a time (default: 1024)"
    )
    group.add_argument(
        "--max-queue-tokens",
        type=options.positive,
        metavar="N",
        help="that may wait for a model; then requests are refused with 429 (default: 1048576, or "
        "what the model does in half of --timeout)",
    )
    group.add_argument(
        "--timeout", type=duration, metavar="TIME", help="for a request (default: 10m)"
    )
    group = parser.add_argument_group("report")
    group.add_argument("--json-logs", action="store_true", help="the log as JSON lines")
    group.add_argument("--quiet", action="store_true", help="no line for each request")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns 0."""
    for name in NEEDED:
        if find_spec(name) is None:
            raise BadOption(
                f"{name} is not installed, which the server needs: pip install 'gguf-embed[server]'"
            )
    from gguf_embed.server import logs
    from gguf_embed.server.run import serve

    chosen = _options(args)
    logs.set_up(json_lines=args.json_logs, requests=not args.quiet)
    serve(chosen, lambda address: _say_started(address, chosen))
    return 0


def _options(args: argparse.Namespace) -> ServeOptions:
    from gguf_embed.server.limits import Limits
    from gguf_embed.server.offers import offer_of
    from gguf_embed.server.run import ServeOptions

    settings = options.settings(args)
    given: list[str] = args.model or []
    usual = options.default_model()
    offers = [offer_of(usual)]
    indexes: list[IndexOffer] = []
    if given or args.index:
        brought = [_brought(offer_of(name), args) for name in given or [usual]]
        indexes = [_searched(place, brought, args) for place in args.index]
        offers = [offer for offer, _ in brought]
    defaults = Limits()
    limits = Limits(
        max_body_bytes=args.max_body or defaults.max_body_bytes,
        max_bodies_bytes=max(defaults.max_bodies_bytes, args.max_body or 0),
        max_texts=args.max_texts or defaults.max_texts,
        max_text_chars=args.max_text_chars or defaults.max_text_chars,
        max_requests=args.max_requests or defaults.max_requests,
        max_queue_tokens=args.max_queue_tokens or defaults.max_queue_tokens,
        request_s=args.timeout if (args.timeout or 0) > 0 else defaults.request_s,
    )
    keep_alive = args.keep_alive
    if keep_alive is None:
        keep_alive = -1.0 if args.preload else 300.0
    return ServeOptions(
        offers=tuple(offers),
        only_these=bool(given),
        settings=settings,
        host=args.host,
        port=args.port,
        unix_socket=_path(args.unix_socket),
        tls_cert=_path(args.tls_cert),
        tls_key=_path(args.tls_key),
        keys=_keys(args.api_key_file),
        insecure=args.insecure,
        allowed_hosts=tuple(args.allowed_host),
        origins=tuple(args.cors_origin),
        limits=limits,
        preload=args.preload,
        keep_alive_s=keep_alive,
        allow_pull=args.allow_pull,
        indexes=tuple(indexes),
        cache=args.cache,
    )


def _brought(offer: Offer, args: argparse.Namespace) -> tuple[Offer, str]:
    """The file on this machine and proved, or a refusal, before anybody asks; with its quant."""
    from gguf_embed.engine.opening import prove_model
    from gguf_embed.plan.mode import is_reranker

    settings = options.settings(args)
    settings = replace(settings, quant=offer.quant or settings.quant)
    with console.transfer("fetch", quiet=args.quiet) as moved:
        proved = prove_model(
            offer.model, settings, reranker=None, on_status=console.say, on_download=moved
        )
    kind = is_reranker(proved.choice.card, proved.header)
    return replace(offer, is_reranker=kind), proved.choice.plan.quant


def _searched(place: str, brought: list[tuple[Offer, str]], args: argparse.Namespace) -> IndexOffer:
    """An index, and the offer that embeds its questions, which may come to the others."""
    from gguf_embed.index.index import Index
    from gguf_embed.server.indexes import IndexOffer, index_name, offer_for

    with Index.open(place) as index:
        wanted = offer_for(index.facts)
    name = index_name(place)
    for number, (offer, quant) in enumerate(brought):
        same_card = offer.card is not None and offer.card == wanted.card
        if offer.id == wanted.id or (same_card and quant == wanted.quant):
            brought[number] = replace(offer, quant=wanted.quant), quant  # and no other, later
            return IndexOffer(name=name, place=place, model=offer.id)
    brought.append(_brought(wanted, args))
    return IndexOffer(name=name, place=place, model=wanted.id)


def _keys(file: str | None) -> tuple[str, ...]:
    from gguf_embed.server.safety import keys_in

    if file is not None:
        try:
            text = Path(file).read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8"
            raise BadOption(f"--api-key-file {file}: {reason}") from None
        return keys_in(text, file)
    text = os.environ.get(KEYS_VARIABLE, "")
    return keys_in(text, KEYS_VARIABLE) if text.strip() else ()


def _say_started(address: str, chosen: ServeOptions) -> None:
    name = chosen.offers[0].id
    others = "" if chosen.only_these else ", and every model on this machine"
    names = ", ".join(offer.id for offer in chosen.offers)
    console.say(f"serving {names}{others} at {address}; Ctrl-C ends it")
    if chosen.unix_socket is not None:
        console.say(f"try: curl --unix-socket {chosen.unix_socket} http://localhost/health")
        return
    console.say(
        f"OpenAI clients: base_url {address}/v1; Ollama's: host {address}; a page: {address}/"
    )
    key = " -H 'Authorization: Bearer KEY'" if chosen.keys else ""
    console.say(
        f"try: curl {address}/v1/embeddings{key} -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "input": "a text"}}\''
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float:
    """Seconds of "90", "30s", "5m", "1h"; below 0: never; for argparse."""
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 30s, 5m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def port(text: str) -> int:
    """0 to 65535, for argparse."""
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return number
