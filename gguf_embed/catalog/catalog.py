"""The known models: what their files do not say, one `models/NAME.toml` each, as ModelCard values.

A wrong pooling, prompt or end token gives wrong vectors in silence, so these are data with a
source, not code. A fact without a source is left out of the file; the GGUF header or the Hub
answers it at run time. Scores name where they were published, and over how many of a benchmark's
tasks the mean was taken.

A file is pinned to a full commit hash of its repository. Where none is known `revision` is
"main": an abbreviated hash is no pin, because huggingface_hub does not resolve one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, Literal, TypeVar, cast

from gguf_embed.catalog import BUILTIN
from gguf_embed.errors import BadOption, GgufEmbedError
from gguf_embed.gguf import quants
from gguf_embed.gguf.header import Header
from gguf_embed.gguf.layout import QUANTS, Shape
from gguf_embed.vectors import Pooling

Kind = Literal["embedder", "reranker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One published quality figure; `tasks` is "41/41" where the mean is over that many."""

    benchmark: str
    value: float  # 0 to 100
    source: str
    tasks: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One GGUF of a model; without a repository it is part of this package."""

    quant: str  # as llama-quantize names it
    repo: str  # "owner/name" on the Hub, "" for the built-in file
    revision: str  # 40 hex digits, or "main"; "" for the built-in file
    name: str  # path inside the repository
    n_bytes: int | None
    sha256: str | None

    @property
    def builtin(self) -> bool:
        """Whether it is installed with this package (builtin_path)."""
        return not self.repo

    @property
    def pinned(self) -> bool:
        """Whether its bytes cannot change: it ships here, or its commit is known."""
        return self.revision != "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known of one model. None: not known, ask the file's header."""

    id: str  # the name of its TOML file
    title: str
    kind: Kind
    family: str | None  # the sizes of one model; their vectors do not mix
    aliases: tuple[str, ...]
    source_repo: str  # the original weights
    licence: str  # SPDX identifier where there is one
    licence_url: str | None
    commercial: bool  # whether the licence permits commercial use
    architecture: str  # as in GGUF
    shape: Shape | None
    parameters: int | None  # of the original weights
    pooling: Pooling
    causal: bool
    add_bos: bool | None
    add_eos: bool | None  # the text must end with eos_id, also when it was cut
    bos_token: str | None  # [CLS] in BERT vocabularies, <s> in XLM-R
    bos_id: int | None
    eos_token: str | None  # [SEP] in BERT vocabularies, </s> in XLM-R
    eos_id: int | None
    # name -> what is put in front of the text; rerankers: none
    prompts: Mapping[str, str] = field(hash=False)
    task_prompt: str | None  # the query prompt with "{task}", where the task can be chosen
    default_task: str | None
    rerank_template: str | None  # with "{task}", "{query}", "{document}"; None: a plain pair
    dim: int  # length of a vector; 1 for a reranker's score
    mrl_min: int | None  # vectors may be cut to any length from here up
    mrl_dims: tuple[int, ...]  # or to these lengths, longest first
    max_tokens: int  # longest text the model was made for, special tokens included
    languages: str
    scores: tuple[Score, ...]
    files: tuple[ModelFile, ...]  # best quality first, one per quantization
    notes: str
    header_names: tuple[str, ...]  # further values of general.name or general.basename

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that find() knows it by: id, aliases, original and GGUF repositories."""
        repos = (file.repo for file in self.files if not file.builtin)
        return tuple(dict.fromkeys((self.id, *self.aliases, self.source_repo, *repos)))

    def prompt(self, name: str, task: str | None = None) -> str:
        """What goes in front of a text, as it is: no space is added between them.

        `task` describes, in English, what the query is for; only the "query" prompt of
        instruction-tuned models takes one. Raises BadOption.
        """
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none, it is a reranker"
            raise BadOption(f"{self.id} has no prompt {name!r}; its prompts: {known}")
        if task is None:
            return self.prompts[name]
        if name != "query" or self.task_prompt is None:
            raise BadOption(
                f"the prompt {name!r} of {self.id} is fixed and takes no task; leave the task out"
            )
        return self.task_prompt.replace("{task}", task)

    def file(self, quant: str) -> ModelFile:
        """The file of that quantization, in any case of letters. Raises BadOption."""
        for file in self.files:
            if file.quant == quants.parse(quant):
                return file
        known = ", ".join(file.quant for file in self.files) or "none"
        raise BadOption(f"{self.id} has no file in {quant!r}; known quantizations: {known}")


def models_dir() -> Path:
    """Where the cards and the built-in model are, in an installation or in a checkout."""
    installed = Path(__file__).parents[1] / "models"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "models"


def builtin_path() -> Path:
    """The GGUF that ships with this package."""
    return models_dir() / f"{BUILTIN}-Q8_0.gguf"


@cache
def cards() -> tuple[ModelCard, ...]:
    """All known models, by id; read once."""
    return load_cards(models_dir())


def find(name: str) -> ModelCard | None:
    """The model of that id, alias, original or GGUF repository; case and ":latest" don't count."""
    return _by_name().get(name.strip().lower().removesuffix(":latest"))


def nearest(name: str, n: int = 3) -> tuple[str, ...]:
    """Ids of up to n models with names like this one, the likeliest first; may be none."""
    wanted = _plain(name)
    spellings = {_plain(spelling): card.id for spelling, card in _by_name().items()}
    inside = [spelling for spelling in spellings if len(wanted) > 2 and wanted in spelling]
    close = difflib.get_close_matches(wanted, spellings, n=4 * n)
    return tuple(dict.fromkeys(spellings[spelling] for spelling in (*inside, *close)))[:n]


def by_header(header: Header) -> ModelCard | None:
    """The known model that a GGUF is a conversion of, so that its facts apply; None if unsure.

    The name in the header and the shape must both agree, and the pooling unless the file is
    silent about it. A fine-tune, a chat model or a reranker of the same shape is another model.
    """
    name = header.name
    if not name and "general.finetune" not in header.metadata:
        basename = header.metadata.get("general.basename")
        name = basename if isinstance(basename, str) else None
    if not name:
        return None
    wanted = _plain(name)
    found = [card for card in cards() if wanted in _header_names(card) and _alike(card, header)]
    return found[0] if len(found) == 1 else None


def _header_names(card: ModelCard) -> set[str]:
    return {_plain(name) for name in (card.id, card.source_repo, *card.header_names)}


def _alike(card: ModelCard, header: Header) -> bool:
    if header.architecture != card.architecture or header.pooling not in (None, card.pooling):
        return False
    if card.shape is None:
        return header.n_embd == card.dim
    # Converters may drop the unused rows that pad a vocabulary to a multiple of 64.
    padding = card.shape.n_vocab - header.n_vocab
    ours = (card.shape.n_layer, card.shape.n_embd)
    return (header.n_layer, header.n_embd) == ours and 0 <= padding < 64


_PACKAGING: Final = re.compile(rf"[\s._:-]+(gguf|hf|latest|{quants.PATTERN})$", re.IGNORECASE)


def _plain(name: str) -> str:
    """A name without owner, punctuation, case, and words that only tell how it is packaged."""
    name = name.lower().rpartition("/")[2]
    while (shorter := _PACKAGING.sub("", name)) != name:
        name = shorter
    return re.sub(r"[^a-z0-9]", "", name)


@cache
def _by_name() -> Mapping[str, ModelCard]:
    return {name.lower(): card for card in cards() for name in card.names}


def load_cards(directory: Path) -> tuple[ModelCard, ...]:
    """The cards of a directory, by id. Raises GgufEmbedError, naming the file and the key."""
    loaded = tuple(_card(path) for path in sorted(directory.glob("*.toml")))
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
_KINDS: Final[Mapping[str, Kind]] = {"embedder": "embedder", "reranker": "reranker"}
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


def _card(path: Path) -> ModelCard:
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
        max_tokens=top.positive("max_tokens"),
        languages=top.take("languages", str),
        scores=tuple(map(_score, top.tables("scores"))),
        files=_files(top),
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
    top: _Table, kind: Kind, task_prompt: str | None, default_task: str | None
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
        top.check(card.max_tokens <= longest, "max_tokens", f"above shape.n_ctx_train, {longest}")
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
