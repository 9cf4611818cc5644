"""Quantization names: one table, one order, one parser."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import sources
from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.catalog import catalog
from gguf_embed.gguf import layout, quants
from gguf_embed.gguf.quants import QUANTS, TENSOR_TYPES
from gguf_embed.plan import speed
from gguf_embed.store import local

NUMBERS = {"I8", "I16", "I32", "I64", "F64"}  # plain types of numbers, which others name too
NAMES = {*QUANTS, *TENSOR_TYPES} - NUMBERS
OWNER = "gguf/quants.py"
FIGURES = "plan/speed.py"  # what was measured, by name


def tables(source: str) -> Iterator[str]:
    """Literal collections that hold three or more names of quantizations or tensor types."""
    for node in sources.nodes(source):
        inside: list[ast.expr | None] = []
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            inside = [*node.elts]
        elif isinstance(node, ast.Dict):
            inside = [*node.keys, *node.values]
        strings = [
            inner.value
            for item in inside
            if item is not None
            for inner in ast.walk(item)
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
        ]
        if sum(text.upper() in NAMES for text in strings) >= 3:
            yield ast.unparse(node)


def test_there_is_no_second_table():
    found = {path: list(tables(source)) for path, source in sources.files().items()}
    others = found.keys() - {OWNER, FIGURES}
    assert {path: found[path] for path in others if found[path]} == {}


def test_figures_are_kept_by_names_of_the_table():
    assert all(family.rates.keys() <= QUANTS.keys() for family in speed.FAMILIES)


@pytest.mark.parametrize(
    "source",
    [
        '("F32", "F16", "BF16")',
        '{"Q4_K", "Q5_K", "Q6_K"}',
        '{"F32": 1, "F16": 2, "BF16": 3}',
        'frozenset(["q4_0", "Q8_0", "iq4_nl"])',
        'f(x=(*("F32", "F16"), ("Q8_0",)))',
    ],
)
def test_a_second_table_is_caught(source: str):
    assert list(tables(source))


def test_the_table_agrees_with_itself():
    assert all(quant.mostly in TENSOR_TYPES for quant in QUANTS.values())
    assert all(kind.fallback in {None, *TENSOR_TYPES} for kind in TENSOR_TYPES.values())
    assert len(quants.FILE_TYPES) == len(QUANTS), "two quantizations share a number"
    assert len(quants.TYPE_NAMES) == len(TENSOR_TYPES), "two types share a number"
    assert {quant.name for quant in QUANTS.values() if quant.exact} == set(quants.EXACT)
    plain = [name.replace("_", "") for name in QUANTS]
    assert len(set(plain)) == len(plain), "two names differ in underscores alone"


def test_one_order_of_quality():
    assert [quants.rank(name) for name in QUANTS] == list(range(len(QUANTS)))
    assert quants.rank("Q9_K_XL") == len(QUANTS)
    assert list(layout.QUANTS) == sorted(layout.QUANTS, key=quants.rank)
    assert set(layout.QUANTS) >= {*quants.USUAL, quants.FLOOR, quants.SPEED_FLOOR, *quants.EXACT}
    published = [quant.percent for quant in QUANTS.values() if quant.percent is not None]
    assert published == sorted(published, reverse=True)


def test_what_it_knows_of_each():
    q4 = QUANTS["Q4_K_M"]
    assert (q4.file_type, q4.mostly, q4.bits, q4.k_quant, q4.exact) == (
        15,
        "Q4_K",
        4.5,
        True,
        False,
    )
    assert quants.percent("Q4_K_M") == 99.7
    assert quants.percent("Q9_K_XL") is None
    assert quants.repack_pays("Q4_0")
    assert not quants.repack_pays("Q4_K_M")
    assert not quants.repack_pays("Q9_K_XL")


@st.composite
def spellings(draw: st.DrawFn) -> tuple[str, str]:
    """A name of the table, and the same in other letters with other separators."""
    name = draw(st.sampled_from(sorted(QUANTS)))
    separator = draw(st.sampled_from(("_", "-", "")))
    cases = draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name)))
    letters = (c.lower() if low else c for c, low in zip(name, cases, strict=True))
    return name, "".join(letters).replace("_", separator)


@given(spellings())
def test_every_spelling_is_one_name(case: tuple[str, str]):
    name, spelling = case
    assert quants.parse(spelling) == name
    assert quants.parse(quants.parse(spelling)) == name


@given(st.text(max_size=20))
def test_parsing_twice_changes_nothing(text: str):
    assert quants.parse(quants.parse(text)) == quants.parse(text)
    assert quants.parse_type(quants.parse_type(text)) == quants.parse_type(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(("fp16", "F16"), ("FP32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")),
        *((" bf16 ", "BF16"), ("Q4-K-M", "Q4_K_M"), ("q4_k", "Q4_K_M"), ("mxfp4", "MXFP4_MOE")),
        *(("q4_k_xl", "Q4_K_XL"), ("Q8-0", "Q8_0")),
    ],
)
def test_spellings_that_people_use(text: str, name: str):
    assert quants.parse(text) == name
    assert re.fullmatch(quants.PATTERN, text.strip(), re.IGNORECASE)


def test_a_tensor_type_is_no_quantization():
    assert [quants.parse_type(name.lower()) for name in TENSOR_TYPES] == list(TENSOR_TYPES)
    assert quants.parse_type("fp16") == "F16"


@given(spellings())
def test_file_names_tell_them(case: tuple[str, str]):
    name, spelling = case
    if "_" in name and not set("_-") & set(spelling):
        return  # "model-Q4KM.gguf": nobody writes it
    assert local.quant_of(f"some-model-v1.5-{spelling}.gguf") == name
    assert local.quant_of(f"some-model.{spelling}.gguf") == name


def test_a_card_takes_every_spelling():
    card = catalog.find("qwen3-embedding-0.6b")
    assert card is not None
    assert card.file("fp16") == card.file("F16")
    assert card.file("q8-0") == card.file("Q8_0")
