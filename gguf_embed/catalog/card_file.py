"""Cards as TOML files: read key by key, each one checked, so that a fault is named by its key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar, cast

from gguf_embed.catalog.card import ModelCard, ModelFile, ModelKind, Score
from gguf_embed.errors import GgufEmbedError
from gguf_embed.gguf.layout import QUANTS, Shape
from gguf_embed.vectors import Pooling


def load_cards(directory: Path) -> tuple[ModelCard, ...]:
    """The cards of a directory, by id. Raises GgufEmbedError, naming the file and the key."""
    loaded = tuple(load_card(path) for path in sorted(directory.glob("*.toml")))
    if not loaded:
        raise GgufEmbedError(f"no model cards (*.toml) in {directory}; reinstall gguf-embed")
    owner: dict[str, str] = {}
    for card in loaded:
        for name in card.names:
            other = owner.setdefault(name.lower(), card.id)
            if other != card.id:
                raise GgufEmbedError(
                    f"{card.id}.toml: the name {name!r} is also one of {other}.toml"
                )
    return loaded


_T = TypeVar("_T")

_DICT: type[dict[str, object]] = dict
_LIST: type[list[object]] = list
_KINDS: Final[Mapping[str, ModelKind]] = {"embedder": "embedder", "reranker": "reranker"}
_MISSING: Final = "is missing"
_REPO: Final = r"[\w.-]+/[\w.-]+"
_COMMIT: Final = r"[0-9a-f]{40}"


class _Table:
    """A TOML table that is read key by key; done() refuses what was not read."""

    def __init__(self, path: Path, where: str, values: Mapping[str, object]) -> None:
        self._path = path
        self._where = where
        self._values = dict(values)

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        """The value, None if absent; its type must be `kind` itself (a bool is no int)."""
        value = self._values.pop(key, None)
        if value is not None and type(value) is not kind:
            got = type(value).__name__
            raise self.wrong(key, f"expected {kind.__name__}, got {got} {value!r}")
        return cast("_T | None", value)

    def take(self, key: str, kind: type[_T]) -> _T:
        """The value, which must be there."""
        value = self.optional(key, kind)
        if value is None:
            raise self.wrong(key, _MISSING)
        return value

    def matching(self, key: str, pattern: str) -> str:
        """A string that the pattern matches from end to end."""
        value = self.take(key, str)
        self.check(re.fullmatch(pattern, value) is not None, key, f"{value!r} is not {pattern}")
        return value

    def positive(self, key: str) -> int:
        """An int above zero."""
        value = self.take(key, int)
        self.check(value > 0, key, f"must be above 0, got {value}")
        return value

    def optional_positive(self, key: str) -> int | None:
        """The same, None if absent."""
        return self.positive(key) if key in self._values else None

    def items(self, key: str, kind: type[_T]) -> tuple[_T, ...]:
        """The elements of an array, none if absent."""
        values = self.optional(key, _LIST) or []
        inner = _Table(self._path, self._where, {f"{key}[{i}]": v for i, v in enumerate(values)})
        return tuple(inner.take(f"{key}[{i}]", kind) for i in range(len(values)))

    def table(self, key: str) -> _Table | None:
        """An inner table, None if absent."""
        values = self.optional(key, _DICT)
        return None if values is None else _Table(self._path, f"{self._where}{key}.", values)

    def tables(self, key: str) -> Sequence[_Table]:
        """An array of tables, none if absent."""
        return [
            _Table(self._path, f"{self._where}{key}[{i}].", values)
            for i, values in enumerate(self.items(key, _DICT))
        ]

    def strings(self) -> dict[str, str]:
        """All of it, when every value is a string."""
        return {key: self.take(key, str) for key in tuple(self._values)}

    def check(self, holds: bool, key: str, reason: str) -> None:
        """Raise GgufEmbedError about this key unless it holds."""
        if not holds:
            raise self.wrong(key, reason)

    def wrong(self, key: str, reason: str) -> GgufEmbedError:
        return GgufEmbedError(f"{self._path.name}: {self._where}{key}: {reason}")

    def done(self) -> None:
        for key in self._values:
            raise self.wrong(key, "unknown key")


def load_card(path: Path) -> ModelCard:
    """The card of one file. Raises GgufEmbedError, naming the file and the key."""
    try:
        with path.open("rb") as file:
            top = _Table(path, "", tomllib.load(file))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise GgufEmbedError(f"{path.name}: {error}") from error
    kind = _one_of(top, "kind", _KINDS)
    architecture = top.take("architecture", str)
    card = ModelCard(
        id=path.stem,
        title=top.take("title", str),
        kind=kind,
        family=top.optional("family", str),
        aliases=top.items("aliases", str),
        source_repo=top.matching("source_repo", _REPO),
        licence=top.take("licence", str),
        licence_url=top.optional("licence_url", str),
        commercial=top.take("commercial", bool),
        architecture=architecture,
        shape=_shape(top.table("shape"), architecture),
        parameters=top.optional_positive("parameters"),
        pooling=_one_of(top, "pooling", Pooling.__members__),
        causal=top.take("causal", bool),
        add_bos=top.optional("add_bos", bool),
        add_eos=top.optional("add_eos", bool),
        bos_token=top.optional("bos_token", str),
        bos_id=top.optional("bos_id", int),
        eos_token=top.optional("eos_token", str),
        eos_id=top.optional("eos_id", int),
        task_prompt=(task_prompt := top.optional("task_prompt", str)),
        default_task=(default_task := top.optional("default_task", str)),
        prompts=_prompts(top, kind, task_prompt, default_task),
        rerank_template=top.optional("rerank_template", str),
        dim=top.positive("dim"),
        mrl_min=top.optional_positive("mrl_min"),
        mrl_dims=top.items("mrl_dims", int),
        max_seq_length=top.positive("max_seq_length"),
        languages=top.take("languages", str),
        scores=tuple(map(_score, top.tables("scores"))),
        files=_files(top),
        build=top.optional("build", str),
        notes=(top.optional("notes", str) or "").strip(),
        header_names=top.items("header_names", str),
    )
    top.done()
    _check(top, card)
    return card


def _one_of(top: _Table, key: str, known: Mapping[str, _T]) -> _T:
    name = top.take(key, str)
    top.check(name in known, key, f"{name!r} is none of {', '.join(known)}")
    return known[name]


def _prompts(
    top: _Table, kind: ModelKind, task_prompt: str | None, default_task: str | None
) -> dict[str, str]:
    table = top.table("prompts")
    prompts = {} if table is None else table.strings()
    if kind == "reranker":
        top.check(not prompts, "prompts", "a reranker has a template instead")
        return prompts
    if task_prompt is not None:
        top.check("{task}" in task_prompt, "task_prompt", "has no {task}")
        top.check("query" not in prompts, "prompts.query", "follows from task_prompt; leave it out")
        if default_task is None:
            raise top.wrong("default_task", _MISSING)
        prompts = {"query": task_prompt.replace("{task}", default_task), **prompts}
    for name in ("query", "document"):
        top.check(name in prompts, f"prompts.{name}", f"{_MISSING} (write an empty one as such)")
    return prompts


def _shape(table: _Table | None, architecture: str) -> Shape | None:
    if table is None:
        return None
    shape = Shape(
        architecture=architecture,
        n_layer=table.positive("n_layer"),
        n_embd=table.positive("n_embd"),
        n_head=table.positive("n_head"),
        n_head_kv=table.positive("n_head_kv"),
        head_dim=table.positive("head_dim"),
        n_ff=table.positive("n_ff"),
        n_vocab=table.positive("n_vocab"),
        n_ctx_train=table.positive("n_ctx_train"),
        n_token_types=table.optional_positive("n_token_types") or 2,
        n_cls_out=table.optional_positive("n_cls_out") or 0,
    )
    table.done()
    table.check(shape.n_head % shape.n_head_kv == 0, "n_head_kv", "does not divide n_head")
    return shape


def _score(table: _Table) -> Score:
    score = Score(
        benchmark=table.take("benchmark", str),
        value=table.take("value", float),
        source=table.take("source", str),
        tasks=table.optional("tasks", str),
    )
    table.done()
    table.check(0 <= score.value <= 100, "value", f"must be from 0 to 100, got {score.value}")
    return score


def _files(top: _Table) -> tuple[ModelFile, ...]:
    builtin = top.table("builtin")
    files = [] if builtin is None else [_file(builtin, repo="", revision="")]
    for table in top.tables("repos"):
        repo = table.matching("repo", _REPO)
        revision = table.matching("revision", f"main|{_COMMIT}")
        files += [_file(file, repo=repo, revision=revision) for file in table.tables("files")]
        table.done()
    quants = [file.quant for file in files]
    for quant in quants:
        top.check(quants.count(quant) == 1, "repos", f"{quant} appears {quants.count(quant)} times")
    return tuple(sorted(files, key=lambda file: QUANTS.index(file.quant)))


def _file(table: _Table, *, repo: str, revision: str) -> ModelFile:
    quant = table.take("quant", str)
    table.check(quant in QUANTS, "quant", f"{quant!r} is none of {', '.join(QUANTS)}")
    sha256 = table.optional("sha256", str)
    if sha256 is not None:
        is_hash = re.fullmatch(r"[0-9a-f]{64}", sha256) is not None
        table.check(is_hash, "sha256", f"expected 64 hex digits, got {len(sha256)}: {sha256!r}")
    file = ModelFile(
        quant=quant,
        repo=repo,
        revision=revision,
        name=table.matching("name", r"[\w./-]+\.gguf"),
        n_bytes=table.optional_positive("bytes"),
        sha256=sha256,
    )
    table.done()
    return file


def _check(top: _Table, card: ModelCard) -> None:
    """What must hold between the facts of one card."""
    reranker = card.kind == "reranker"
    ranks = card.pooling is Pooling.RANK
    top.check(
        ranks == reranker, "pooling", f"{card.pooling.name} is not for a model of kind {card.kind}"
    )
    if card.shape is not None:
        longest = card.shape.n_ctx_train
        top.check(
            card.max_seq_length <= longest, "max_seq_length", f"above shape.n_ctx_train, {longest}"
        )
        fits = reranker or card.dim == card.shape.n_embd
        top.check(fits, "dim", f"{card.dim} is not shape.n_embd, {card.shape.n_embd}")
        heads = card.shape.n_cls_out
        top.check(
            (heads > 0) == reranker, "shape.n_cls_out", f"{heads} in a model of kind {card.kind}"
        )
    for key, number, text, added in (
        ("bos_id", card.bos_id, card.bos_token, card.add_bos),
        ("eos_id", card.eos_id, card.eos_token, card.add_eos),
    ):
        top.check((number is None) == (text is None), key, "needs its token's text, and it this")
        top.check(number is not None or not added, key, _MISSING)
    has_task = "{task}" in (card.task_prompt or card.rerank_template or "")
    top.check(has_task == (card.default_task is not None), "default_task", "goes with {task}")
    if card.rerank_template is not None:
        both = "{query}" in card.rerank_template and "{document}" in card.rerank_template
        top.check(reranker and both, "rerank_template", "needs a reranker, {query} and {document}")
    lengths = (*card.mrl_dims, *(() if card.mrl_min is None else (card.mrl_min,)))
    for length in lengths:
        top.check(0 < length < card.dim, "mrl", f"{length} is not between 0 and dim, {card.dim}")
    one_kind = card.mrl_min is None or not card.mrl_dims
    top.check(one_kind, "mrl_min", "a list of lengths or a least length, not both")
    falling = sorted(set(card.mrl_dims), reverse=True)
    top.check(list(card.mrl_dims) == falling, "mrl_dims", "longest first, each once")
