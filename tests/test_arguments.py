"""Whatever is given to the public calls: only our own errors come out; they say what to pass."""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gguf_embed import (
    BadInput,
    BadOption,
    BadText,
    Embedder,
    GgufEmbedError,
    Pooling,
    Priority,
    Settings,
)
from gguf_embed.engine.arguments import EncodeOptions
from gguf_embed.testing import FakeEmbedder

# 100,000 were tried before this was written; a test run tries some of them.
N_CALLS = int(os.environ.get("GGUF_EMBED_RANDOM_CALLS", "4000"))


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeEmbedder]:
    with FakeEmbedder.open() as embedder:
        yield embedder


@dataclass
class DataFrame:
    """What a table of pandas or polars looks like from here."""

    columns: tuple[str, ...] = ("a", "b")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("texts", "hint"),
    [
        (None, "texts are None; pass one str"),
        (7, "texts are an int; pass one str"),
        (1.5, "texts are a float"),
        (b"bytes", "bytes.decode"),
        (bytearray(b"bytes"), "bytes.decode"),
        ({"a": "b"}, r"a mapping; pass list\(texts.values\(\)\)"),
        (OrderedDict(a="b"), "a mapping"),
        ({"a", "b"}, "a set, which has no order; pass a list"),
        (frozenset("ab"), "a set"),
        (DataFrame(), "a DataFrame; pass one column"),
        (np.array("text"), r"an array of shape \(\)"),
        (np.array([["a"], ["b"]]), r"an array of shape \(2, 1\)"),
        (Path("file.txt"), "texts are a PosixPath"),
        (len, "texts are a builtin_function_or_method"),
    ],
)
def test_what_are_no_texts(texts: Any, hint: str, fake: FakeEmbedder):
    calls: list[Callable[[Any], object]] = [
        fake.encode,
        fake.encode_query,
        fake.encode_document,
        fake.stream,
        fake.count_tokens,
    ]
    for call in calls:
        with pytest.raises(BadInput, match=hint):
            call(texts)


@pytest.mark.parametrize("texts", [[1], [None], [b"a"], [["a"]], np.array([1.5]), iter([b"x"])])
def test_what_is_no_text_among_texts(texts: Any, fake: FakeEmbedder):
    with pytest.raises(BadText, match=r"row 0: is a .*, not a str"):
        fake.encode(texts)


def test_texts_of_other_kinds(fake: FakeEmbedder):
    expected = fake.encode(["a", "b"])
    for texts in (("a", "b"), iter("ab"), np.array(["a", "b"]), {"a": 0, "b": 0}.keys()):
        np.testing.assert_array_equal(fake.encode(texts), expected)
    assert fake.count_tokens(text for text in ("a", "b c")).tolist() == [3, 4]
    assert fake.encode(np.str_("a")).shape == (64,)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"dimensions": "128"}, "dimensions='128': pass a whole number"),
        ({"dimensions": True}, "dimensions=True: pass a whole number"),
        ({"dimensions": 1.5}, "dimensions=1.5"),
        ({"dimensions": np.float32(8)}, "dimensions="),
        ({"max_tokens": 2}, "max_tokens=2: pass a whole number from 3"),
        ({"normalize": "no"}, "normalize='no': pass True or False"),
        ({"normalize": None}, "normalize=None"),
        ({"truncate": True}, "truncate=True: choose 'error', 'end' or 'start'"),
        ({"truncate": ["end"]}, "truncate="),
        ({"prompt": 7}, "prompt=7: pass a str"),
        ({"prompt_name": ["query"]}, "prompt_name="),
        ({"priority": 1}, "priority=1: choose Priority.QUERY"),
        ({"on_progress": "print"}, "on_progress='print': pass a function"),
        ({"batch_size": 32}, "no option 'batch_size'; the options are dimensions, max_tokens, "),
        ({"window": 0}, "window=0: pass a whole number from 1"),
        ({"window": 2.0}, "window=2.0"),
    ],
)
def test_what_are_no_options(options: dict[str, Any], hint: str, fake: FakeEmbedder):
    with pytest.raises(BadOption, match=hint):
        fake.stream(["a"], **options)
    if "window" not in options:
        with pytest.raises(BadOption, match=hint):
            fake.encode("a", **options)


def test_numbers_of_numpy_are_numbers(fake: FakeEmbedder):
    vectors = fake.encode(["a"], dimensions=np.int64(9), normalize=np.True_)
    assert vectors.shape == (1, 9)
    assert len(list(fake.stream(["a", "b"], window=np.int32(1)))) == 2
    assert len(list(fake.stream(["a", "b"], window=2**70))) == 1


def test_one_text_is_one_str(fake: FakeEmbedder):
    calls: list[Callable[[Any], object]] = [fake.tokenize, fake.token_vectors]
    for call in calls:
        for text in (["a"], None, 7, b"a"):
            with pytest.raises(BadInput, match=r"the text is .*; pass one str"):
                call(text)


@pytest.mark.parametrize("name", ["max_seq_length", "n_ctx", "pooling", "prompts", "dimensions"])
def test_what_has_no_effect_cannot_be_set(name: str, fake: FakeEmbedder):
    """sentence-transformers takes some of them."""
    with pytest.raises(BadOption, match=rf"{name} of an Embedder cannot be set.*Settings\(n_ctx"):
        setattr(fake, name, 128)
    with pytest.MonkeyPatch.context() as patch:  # a test may still put a method in place
        patch.setattr(fake, "encode", lambda texts: texts)
        assert fake.encode("a") == "a"


@pytest.mark.parametrize(
    ("a", "b", "hint"),
    [
        (np.ones(3), np.ones(4), "vectors of 3 and of 4 values"),
        (np.ones((2, 3)), [[1, 2, np.nan]], "row 0 of b has NaN"),
        ([[1.0], [np.inf]], [[1.0]], "row 1 of a has NaN or an infinite value"),
        ([[1e300]], [[1.0]], "row 0 of a"),
        (np.ones(0), np.ones(0), "shape"),
        (1.0, np.ones(1), "shape"),
        (np.ones((2, 2, 2)), np.ones(2), "shape"),
        (None, np.ones(2), "object"),
        ([[1.0], [1.0, 2.0]], np.ones(2), "no array"),
        (["a"], ["b"], "<U1"),
        (np.array([True]), np.ones(1), "bool"),
        ([1j], np.ones(1), "complex"),
    ],
)
def test_what_has_no_cosine(a: Any, b: Any, hint: str, fake: FakeEmbedder):
    with pytest.raises(BadInput, match=hint):
        fake.similarity(a, b)


def test_a_cosine_is_at_most_one(fake: FakeEmbedder):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 64)).astype(np.float32)
    scores = fake.similarity(vectors, np.concatenate([vectors, -vectors]))
    assert np.abs(scores).max() <= 1
    assert fake.similarity(vectors, np.empty((0, 64))).shape == (500, 0)
    assert fake.similarity([3, 4], [[3.0, 4.0]]).shape == (1, 1)


@pytest.mark.parametrize("model", [None, 7, b"model", ["a"], 1.5])
def test_what_is_no_model(model: Any):
    with pytest.raises(BadInput, match="pass the name of a model or the path"):
        Embedder.open(model)


@pytest.mark.parametrize(
    "given", [{"settings": {"n_ctx": 9}}, {"on_status": "print"}, {"on_download": 7}]
)
def test_what_does_not_open(given: dict[str, Any]):
    with pytest.raises(BadOption, match=next(iter(given))):
        Embedder.open(**given)


# ---------------------------------------------------------------------------- whatever is given


class Hostile:
    """Raises at whatever is asked of it."""

    def __repr__(self) -> str:
        raise ZeroDivisionError

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]


def anything(rng: random.Random, depth: int = 0) -> Any:
    """Any value, often one that is nearly right."""
    simple: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.choice([0, 1, -1, 3, 9, 64, 65, 2**31, 2**63, 2**70, -(2**70)]),
        lambda: rng.choice([0.0, 1.5, -2.0, float("nan"), float("inf")]),
        lambda: rng.choice(["", "a", "error", "end", "query", "a b c", "x " * 40, "\ud800", "\0"]),
        lambda: "".join(chr(rng.choice([rng.randrange(0x110000), 65])) for _ in range(4)),
        lambda: rng.choice([b"", b"a", bytearray(b"\xff"), memoryview(b"a")]),
        lambda: rng.choice([np.int64(3), np.float32(2), np.str_("a"), np.bool_(True)]),
        lambda: rng.choice([Priority.QUERY, Pooling.MEAN, Settings(), Path(), len, object]),
        lambda: rng.choice([1j, Decimal("1.5"), Fraction(1, 3), range(3), Ellipsis]),
        lambda: rng.choice([Hostile(), SimpleNamespace(shape=(1,)), DataFrame(), object()]),
    ]
    nested: list[Callable[[], Any]] = [
        lambda: [anything(rng, depth + 1) for _ in range(rng.randrange(4))],
        lambda: tuple(rng.choice(["a", "b", 1]) for _ in range(rng.randrange(4))),
        lambda: {"a": anything(rng, depth + 1)},
        lambda: {rng.choice("abc") for _ in range(3)},
        lambda: iter([anything(rng, depth + 1)]),
        lambda: (text for text in ("a", anything(rng, depth + 1))),
        lambda: np.ones(rng.choice([(), (0,), (3,), (64,), (2, 64), (2, 0), (1, 1, 1)])),
        lambda: np.array(rng.choice([["a", "b"], [["a"]], "a", [1, None]]), dtype=object),
        lambda: np.array(["a", "b"]),
    ]
    return rng.choice(simple if depth > 1 else [*simple, *nested])()


TEXTS = [lambda: "a b", lambda: ["a", "b"], lambda: iter(["a", "b"]), list]
CALLS = (
    *("encode", "encode_query", "encode_document", "stream", "tokenize", "count_tokens"),
    *("token_vectors", "similarity", "prompt", "fingerprint", "set", "settings", "open"),
)
SETTINGS = [field.name for field in fields(Settings)]
OPTIONS = [*EncodeOptions.__optional_keys__, "on_progress", "progress"]


def some_settings(rng: random.Random) -> Settings:
    """Of some values, each right about half the time."""
    right: dict[str, Any] = {"n_ctx": 64, "pooling": Pooling.MEAN, "prefer": "speed", "tap": True}
    return Settings(
        **{
            name: right.get(name) if rng.random() < 0.5 else anything(rng)
            for name in rng.sample(SETTINGS, rng.randrange(3))
        }
    )


def open_at_random(kind: type[Embedder], rng: random.Random) -> None:
    """Open with one or two wrong arguments, so that nothing is loaded where that takes long."""
    given: dict[str, Any] = {
        name: anything(rng) for name in ("on_status", "on_download", "isolated", "settings")
    }
    if callable(given["on_status"]):
        given["on_status"] = given["on_download"] = None
    if rng.random() < 0.5:
        given["settings"] = some_settings(rng)
    if kind is Embedder:  # a model that does not exist: arguments are checked before it is sought
        kind.open(rng.choice([anything(rng), "/no/such.gguf"]), **given)
    else:
        kind.open(rng.choice([anything(rng), "fake"]), **given).close()


def call_at_random(embedder: Embedder, rng: random.Random) -> None:
    name = rng.choice(CALLS)
    texts = rng.choice(TEXTS)() if rng.random() < 0.5 else anything(rng)
    options = {option: anything(rng) for option in OPTIONS if rng.random() < 0.15}
    if callable(options.get("on_progress")):  # what it raises is its own affair
        options["on_progress"] = lambda _texts, _tokens: None
    match name:
        case "encode" | "encode_document":
            getattr(embedder, name)(texts, **options)
        case "encode_query":
            embedder.encode_query(texts, task=anything(rng), **options)
        case "stream":
            window = 2 if rng.random() < 0.5 else anything(rng)
            list(embedder.stream(texts, window=window, **options))
        case "similarity":
            embedder.similarity(anything(rng), anything(rng))
        case "prompt":
            embedder.prompt(anything(rng), task=anything(rng))
        case "fingerprint":
            options.pop("on_progress", None)
            embedder.fingerprint(**options)
        case "settings":
            some_settings(rng)
        case "open":
            open_at_random(type(embedder), rng)
        case "set":
            setattr(embedder, rng.choice(["n_ctx", "max_seq_length", "device"]), anything(rng))
        case _:
            getattr(embedder, name)(texts)


def try_at_random(embedder: Embedder, n_calls: int) -> int:
    """How many of so many calls were taken; any other error than ours is raised."""
    n_taken = 0
    for seed in range(n_calls):
        try:
            call_at_random(embedder, random.Random(seed))
            n_taken += 1
        except GgufEmbedError:
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
    return n_taken


def test_any_arguments_to_the_fake(fake: FakeEmbedder):
    assert N_CALLS / 10 < try_at_random(fake, N_CALLS) < N_CALLS * 9 / 10


@pytest.mark.native
def test_any_arguments_to_the_builtin_model():
    with Embedder.open(settings=Settings(tune=False)) as embedder:
        n_calls = N_CALLS // 10
        assert n_calls / 10 < try_at_random(embedder, n_calls) < n_calls * 9 / 10
