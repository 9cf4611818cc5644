"""Opening a model: one corridor from its name to a backend that computes vectors.

    name
      -> sources -> header, checked -> plan        choice.choose
      -> file, fetched and verified                _fetched
      -> proved safe to load here                  proved.prove_choice
      -> loaded, here or in a child                loaded.load, isolated.IsolatedModel
      -> Opened

Every caller comes in here: `Embedder.open`, `Reranker.open`, the lab, bundles, `tune`. What fails
on the way leaves nothing loaded behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from gguf_embed.catalog.card import ModelCard
from gguf_embed.engine.address import Address
from gguf_embed.engine.ahead import Ahead
from gguf_embed.engine.backend import Backend
from gguf_embed.engine.choice import Choice, choose, choose_file
from gguf_embed.engine.fetching import announced
from gguf_embed.engine.learning import Learning, learning_for
from gguf_embed.engine.loaded import load, load_again
from gguf_embed.engine.proved import Proved, prove_choice
from gguf_embed.engine.trier import started_trier
from gguf_embed.engine.tune_record import Target
from gguf_embed.gguf.header import Header
from gguf_embed.machine import probe as hardware
from gguf_embed.plan.mode import EmbedMode, check_no_reranker, embed_mode, is_reranker
from gguf_embed.plan.plan import Plan
from gguf_embed.plan.reranker import check_is_reranker, rerank_mode
from gguf_embed.plan.settings import RunSettings, Settings
from gguf_embed.store import download, hub
from gguf_embed.store.local import Source
from gguf_embed.system.child import Worker

_log = logging.getLogger(__name__)

Status: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model ready to compute, with all that was proved and chosen on the way."""

    source: Source  # where the file came from
    path: Path
    header: Header
    card: ModelCard | None
    plan: Plan  # what was considered, and why this
    settings: Settings  # what the user said
    run: RunSettings  # how it runs
    mode: EmbedMode
    remarks: tuple[str, ...]  # for the user: what had to be given up
    target: Target  # what a measurement would start from
    backend: Backend
    reopen: Callable[[], Backend]  # the same one again, in the child of a fork
    learning: Learning | None = None  # what a long run may try; None: nothing
    remote: Address | None = None  # of a model that is served elsewhere

    @classmethod
    def of(
        cls, proved: Proved, run: RunSettings, backend: Backend, reopen: Callable[[], Backend]
    ) -> Opened:
        """What was proved, with the backend that runs so, and what makes it again."""
        remark = proved.safe.remark
        return cls(
            source=proved.choice.source,
            path=proved.path,
            header=proved.header,
            card=proved.choice.card,
            plan=proved.choice.plan,
            settings=proved.settings,
            run=run,
            mode=proved.mode,
            remarks=(remark,) if remark else (),
            target=proved.target,
            learning=learning_for(proved.target, run, proved.settings),
            backend=backend,
            reopen=reopen,
        )

    @property
    def prompts(self) -> Mapping[str, str]:
        """Those of the catalog."""
        return self.card.prompts if self.card else {}

    @property
    def again(self) -> tuple[str | Path, Settings, bool]:
        """Model, settings and `isolated` that open the same file again, elsewhere too."""
        if self.source.where in (None, "file"):
            return self.path, self.settings, self.isolated
        name = self.plan.model if self.card else self.source.name
        return name, replace(self.settings, quant=self.plan.quant), self.isolated

    @property
    def isolated(self) -> bool:
        """Whether the model is in a child process."""
        return hasattr(self.backend, "n_deaths")

    def close(self) -> None:
        """Free the model."""
        self.backend.close()


def open_model(
    name: str | Path,
    settings: Settings | None = None,
    *,
    isolated: bool = False,
    on_status: Status | None = None,
    on_download: download.OnDownload | None = None,
    worker: Worker | None = None,
) -> Opened:
    """A model by catalog name, Hub repository, path, or "auto", ready to compute.

    See `Embedder.open` for the arguments and what is raised, `prove_model` for `worker`.
    """
    with Ahead() as ahead:
        proved = prove_model(
            name,
            settings or Settings(),
            on_status=on_status,
            on_download=on_download,
            worker=worker,
            ahead=None if isolated else ahead,
        )
        return _opened(proved, isolated=isolated, ahead=ahead)


def open_reranker(
    name: str | Path,
    settings: Settings,
    *,
    isolated: bool = False,
    on_status: Status | None = None,
    on_download: download.OnDownload | None = None,
) -> Opened:
    """`open_model` for a model that scores pairs. See `Reranker.open`."""
    proved = prove_model(
        name, settings, reranker=True, on_status=on_status, on_download=on_download
    )
    return _opened(proved, isolated=isolated)


def open_file(
    path: Path,
    card: ModelCard | None,
    settings: Settings,
    *,
    rerankers: bool = False,
    on_status: Status | None = None,
) -> Opened:
    """A file on this machine as the model that the caller says it is.

    With `rerankers` a file that scores pairs is opened too: its vectors tell whether it is intact.
    """
    return _opened(prove_file(path, card, settings, rerankers=rerankers, on_status=on_status))


def prove_file(
    path: Path,
    card: ModelCard | None,
    settings: Settings,
    *,
    rerankers: bool = False,
    on_status: Status | None = None,
) -> Proved:
    """`open_file` without its last part: nothing is loaded."""
    choice = choose_file(path, card, hardware.probe(), settings)
    mode_of = partial(embed_mode, rerankers=rerankers)
    return prove_choice(choice, path, settings, on_status, mode_of=mode_of)


def prove_model(
    name: str | Path,
    settings: Settings,
    *,
    reranker: bool | None = False,
    on_status: Status | None = None,
    on_download: download.OnDownload | None = None,
    worker: Worker | None = None,
    ahead: Ahead | None = None,
) -> Proved:
    """The first part of the corridor: a file that is here and safe to load, and nothing loaded.

    `reranker` None takes a model of either kind, as the one that it is. `worker` is what tries the
    file, where the caller has started it; it is ended here. `ahead` is what `load` takes.
    """
    if settings.n_threads and (remark := hardware.check_threads(settings.n_threads)):
        _log.warning("%s", remark)
    with worker or started_trier() as used:
        choice = choose(name, hardware.probe(), settings)
        if reranker is None:
            reranker = is_reranker(choice.card, choice.header)
        mode_of = rerank_mode if reranker else embed_mode
        check_kind = check_is_reranker if reranker else check_no_reranker
        # What is another kind of model is refused before gigabytes move.
        if choice.header is not None:
            mode_of(choice.header, choice.card, settings)
        check_kind(choice.card, choice.plan.model)
        if on_status is not None and choice.source.where != "package":
            on_status(choice.plan.in_short)
        path = _fetched(choice, on_status, on_download)
        return prove_choice(
            choice, path, settings, on_status, mode_of=mode_of, worker=used, ahead=ahead
        )


def _fetched(
    choice: Choice, on_status: Status | None, on_download: download.OnDownload | None
) -> Path:
    """The file on this machine, verified; downloaded if need be."""
    source = choice.source
    if source.path is not None and source.where == "package":
        return source.path
    at = hub.places()
    if source.path is None and not at.offline:
        download.check_licence(source)
        if on_status is not None:
            plan = choice.plan
            on_download = announced(source, plan, at, on_status=on_status, on_download=on_download)
    return download.fetch(source, progress=on_download)


def _opened(proved: Proved, *, isolated: bool = False, ahead: Ahead | None = None) -> Opened:
    """The last part of the corridor: loaded, with the fastest settings that are known."""
    backend: Backend
    reopen: Callable[[], Backend]
    if isolated:
        from gguf_embed.engine.isolated import IsolatedModel

        backend = in_child = IsolatedModel(proved)
        proved, run = in_child.proved, in_child.run_settings
        reopen = partial(IsolatedModel, proved)
    else:
        proved, backend = load(proved, ahead=ahead)
        run = backend.runner.settings
        reopen = partial(load_again, proved, run)
    try:
        return Opened.of(proved, run, backend, reopen)
    except BaseException:
        backend.close()
        raise
