"""A server from its options to its end: sockets, signals, models loaded at the start."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import stat
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn

from gguf_embed.engine.embedder import Embedder
from gguf_embed.engine.reranker import Reranker
from gguf_embed.errors import BadOption, GgufEmbedError
from gguf_embed.jobs.cache import VectorCache
from gguf_embed.machine import probe as hardware
from gguf_embed.plan.settings import Settings
from gguf_embed.server.app import application
from gguf_embed.server.indexes import Indexes, IndexOffer
from gguf_embed.server.limits import Limits
from gguf_embed.server.meters import Meters
from gguf_embed.server.models import Models, Open
from gguf_embed.server.offers import Offer, Offers, offers_here
from gguf_embed.server.protocol import patient
from gguf_embed.server.pull import Puller
from gguf_embed.server.safety import Keys, hosts_for, is_local
from gguf_embed.server.service import Service
from gguf_embed.server.traces import traces

_log = logging.getLogger(__name__)

PORT: Final = 11434  # Ollama's
_PORTS_TRIED: Final = 16
N_THREADS: Final = 8  # for tokenizing and for opening models
BACKLOG: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the person who starts a server says."""

    offers: tuple[Offer, ...]  # the default first
    only_these: bool  # else also what is found on this machine
    settings: Settings = field(default_factory=Settings)
    host: str = "127.0.0.1"
    port: int | None = None  # None: PORT, or the next that is free
    unix_socket: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    keys: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    preload: bool = False
    keep_alive_s: float = 300.0
    allow_pull: bool = False
    indexes: tuple[IndexOffer, ...] = ()
    cache: bool = False  # vectors of texts that were embedded before come from the user's cache

    def check(self) -> None:
        """Raise BadOption for what would be open to everybody."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise BadOption("TLS takes two files: pass --tls-cert and --tls-key")
        if self.unix_socket is not None or is_local(self.host) or self.keys or self.insecure:
            return
        raise BadOption(
            f"--host {self.host} lets other machines in, and no key is set; pass --api-key-file "
            "FILE (or set GGUF_EMBED_API_KEYS), or --insecure if everybody may use it"
        )


def serve(
    options: ServeOptions,
    on_started: Callable[[str], None],
    *,
    open_model: Open | None = None,
) -> None:
    """Serve until a signal ends it; `on_started` gets the address once requests are taken.

    Raises BadOption where the address cannot be had.
    """
    options.check()
    listening = _listen(options)
    address = _address(options, listening)
    try:
        _Running(options, open_model).run(listening, lambda: on_started(address))
    finally:
        listening.close()
        if options.unix_socket is not None:
            options.unix_socket.unlink(missing_ok=True)


class _Running:
    """One server, from its first request to its last."""

    def __init__(self, options: ServeOptions, open_model: Open | None) -> None:
        self._options = options
        self._open_model = open_model or _opener(options.settings)
        self._meters = Meters()
        self._threads = ThreadPoolExecutor(N_THREADS, thread_name_prefix="gguf-embed-serve")
        self._service: Service | None = None

    def run(self, listening: socket.socket, on_started: Callable[[], None]) -> None:
        """Until the end."""
        options = self._options
        offers = Offers(options.offers, here=None if options.only_these else offers_here)
        models = Models(
            offers,
            self._open_model,
            threads=self._threads,
            keep_alive_s=options.keep_alive_s,
            memory_bytes=_memory(options.settings),
            on_microbatch=self._meters.microbatch,
        )
        self._service = service = Service(models, options.limits, threads=self._threads)
        service.puller = Puller(self._threads) if options.allow_pull else None
        service.indexes = Indexes.open(options.indexes)
        service.cache = VectorCache.open() if options.cache else None
        bound = None if options.unix_socket is not None else options.host
        app = application(
            service,
            self._meters,
            keys=Keys(options.keys),
            hosts=hosts_for(bound, options.allowed_hosts),
            origins=options.origins,
            traces=traces(),
            lifespan=self._living,
        )
        limits = options.limits
        config = uvicorn.Config(
            app,
            http=patient(head_s=limits.read_s, write_s=limits.write_s),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=int(limits.idle_s),
            timeout_graceful_shutdown=int(limits.request_s),
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
        try:
            _Server(config, service, on_started, options.unix_socket).run(sockets=[listening])
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _living(self) -> AsyncGenerator[None]:
        """Around all requests."""
        service = self._service
        assert service is not None, "made by run"
        loading = asyncio.ensure_future(self._preload(service))
        try:
            yield
        finally:
            service.ending = True
            loading.cancel()
            with suppress(asyncio.CancelledError):
                await loading
            await service.models.close()
            service.indexes.close()
            if service.cache is not None:
                service.cache.close()

    async def _preload(self, service: Service) -> None:
        """Load what should be there from the start."""
        for offer in self._options.offers if self._options.preload else ():
            try:
                async with service.models.lease(offer.id, scores=None):
                    pass
            except GgufEmbedError as error:
                _log.error("%s is not loaded: %s", offer.id, error)
                return  # never ready: whoever looks after the server sees it
        service.ready = True


class _Server(uvicorn.Server):
    """The first signal drains, the second ends at once."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        on_started: Callable[[], None],
        unix_socket: Path | None,
    ) -> None:
        super().__init__(config)
        self._service = service
        self._on_started = on_started
        self._unix_socket = unix_socket

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell that requests are taken."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: uvicorn's own way needs SIGINT as the second one."""
        if self.should_exit:
            if self._unix_socket is not None:
                self._unix_socket.unlink(missing_ok=True)
            os._exit(128 + sig)  # the child that computes ends when its pipe closes
        self._service.ending = True
        self.should_exit = True
        _log.info("%s: no new requests; those in flight end", signal.Signals(sig).name)


def _opener(settings: Settings) -> Open:
    def open_model(offer: Offer, left_bytes: int | None) -> Embedder | Reranker:
        chosen = replace(
            settings,
            quant=offer.quant or settings.quant,
            memory_bytes=left_bytes if left_bytes is not None else settings.memory_bytes,
        )
        kind = Reranker if offer.is_reranker else Embedder
        model = kind.open(
            offer.model,
            settings=chosen,
            isolated=True,
            on_status=lambda line: _log.info("%s: %s", offer.id, line),
        )
        for remark in model.remarks:
            _log.warning("%s: %s", offer.id, remark)
        return model

    return open_model


def _memory(settings: Settings) -> int | None:
    """What all models together may take: pages of a file that is in use still count as free."""
    free = hardware.probe().ram_available_bytes
    return min(free, settings.memory_bytes) if settings.memory_bytes is not None else free


def _listen(options: ServeOptions) -> socket.socket:
    """A socket that listens. Raises BadOption."""
    if options.unix_socket is not None:
        return _listen_unix(options.unix_socket)
    if options.port is not None:
        return _bind(options.host, options.port)
    for port in range(PORT, PORT + _PORTS_TRIED):
        with suppress(BadOption):
            return _bind(options.host, port)
    return _bind(options.host, 0)


def _bind(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, place = found[0]
        listening = socket.socket(family, kind, proto)
    except OSError as error:
        raise BadOption(
            f"--host {host}: {error.strerror or error}; name one of this machine"
        ) from None
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        why = "something else listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise BadOption(f"{host}:{port}: {why}; choose another with --port") from None
    return listening


def _listen_unix(path: Path) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise BadOption("this system has no Unix sockets; leave --unix-socket out")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            if _answers(path):
                raise BadOption(f"{path}: another server listens there; name another file")
            path.unlink()  # left behind by a server that was killed
        before = os.umask(0o077)  # for this user alone
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise BadOption(f"{path}: {error.strerror or error}; name another file") from None
    except BadOption:
        listening.close()
        raise
    return listening


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _address(options: ServeOptions, listening: socket.socket) -> str:
    if options.unix_socket is not None:
        return f"unix:{options.unix_socket}"
    port = listening.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{'https' if options.tls_cert else 'http'}://{host}:{port}"
