"""Chunks of documents: nothing is lost, none is too long, and places are right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gguf_embed import BadInput, BadOption, Embedder, Settings
from gguf_embed.io.split import Chunk, Kind, kind_of_file, split
from gguf_embed.testing import FakeEmbedder

PIECE = re.compile(r"\w{1,4}|\s+|[^\w\s]")


def count(texts: Sequence[str]) -> list[int]:
    """Pieces of words, blanks and marks, with a token at each end."""
    return [len(PIECE.findall(text)) + 2 for text in texts]


def count_more_together(texts: Sequence[str]) -> list[int]:
    """A tokenizer that makes more of a whole than of its parts."""
    return [n + (n - 2) // 5 for n in count(texts)]


def check(document: str, chunks: Sequence[Chunk], max_tokens: int, counter=count) -> None:  # type: ignore[no-untyped-def]
    covered = 0
    for chunk in chunks:
        assert document[chunk.start : chunk.end] == chunk.text
        assert chunk.start <= covered < chunk.end  # no gap, and each goes on
        covered = chunk.end
        assert chunk.n_tokens == counter([chunk.text])[0] <= max_tokens
        assert chunk.first_line == document.count("\n", 0, chunk.start) + 1
        assert chunk.last_line == document.count("\n", 0, chunk.end - 1) + 1
    assert covered == len(document)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
marks = st.sampled_from(
    [
        *("\n", "\n\n", "\n\n\n", " ", ". ", "! ", "。", "\r\n", "\t"),
        *("\n# One\n", "\n## Two ##\n", "\n```python\n", "\n```\n", "\n- entry ", "\n1. "),
        *(
            "\nTitle\n=====\n",
            "\n====\nOver\n====\n",
            "\n    indented",
            "é",
            "e\u0301",
            "👩‍👩‍👧",
            "x" * 80,
        ),
    ]
)
documents = st.lists(st.one_of(words, marks), max_size=60).map("".join)
KINDS: list[Kind] = ["markdown", "rst", "text", "code"]


@given(documents, st.integers(18, 60), st.floats(0, 0.5), st.sampled_from(KINDS), st.booleans())
@example("```\n# no heading\n```\n# a heading", 18, 0.5, "markdown", False)
@example("\n\n\n", 18, 0.0, "text", False)
@example("a" * 500, 18, 0.5, "text", True)
def test_every_character_is_in_a_chunk_and_none_is_too_long(
    document: str, max_tokens: int, share: float, kind: Kind, strange: bool
):
    counter = count_more_together if strange else count
    overlap = int((max_tokens - 2) * share)
    chunks = list(
        split(document, count_tokens=counter, max_tokens=max_tokens, overlap=overlap, kind=kind)
    )
    check(document, chunks, max_tokens, counter)
    for before, after in pairwise(chunks):
        shared = document[after.start : before.end]
        assert not overlap or sum(count([shared])) - 2 <= 2 * overlap + 2
        assert overlap or after.start == before.end


BOOK = """\
Preface that is short.

# Boats

A boat floats. It has a keel! Does it sink? No.

## Sails

The sail is white. It takes the wind.

- one entry of a list
- another entry of it

```python
# this is no heading

def f(): return 1
```

After the code.

# Bread

Flour and water, and an oven.
"""


def test_cuts_are_at_the_strongest_places():
    chunks = list(split(BOOK, count_tokens=count, max_tokens=42))
    check(BOOK, chunks, 42)
    assert chunks[0].text.startswith("Preface that is short.")
    starts = [chunk.text.split("\n")[0] for chunk in chunks]
    assert "# Boats" in starts
    assert "## Sails" in starts
    assert "# Bread" in starts
    paths = {chunk.text.split("\n")[0]: chunk.headings for chunk in chunks}
    assert paths["# Boats"] == ("Boats",)
    assert paths["## Sails"] == ("Boats", "Sails")
    assert paths["# Bread"] == ("Bread",)
    assert chunks[0].headings == ()
    assert not any("this is no heading" in title for chunk in chunks for title in chunk.headings)


def test_what_fits_is_one_chunk():
    (chunk,) = split(BOOK, count_tokens=count, max_tokens=1000, source="book.md")
    assert (chunk.text, chunk.start, chunk.end, chunk.source) == (BOOK, 0, len(BOOK), "book.md")
    assert (chunk.first_line, chunk.last_line) == (1, BOOK.count("\n"))
    assert list(split("", count_tokens=count, max_tokens=100)) == []


def test_sentences_then_words_then_characters():
    text = "One two three four five. Six seven eight nine ten. " * 4
    chunks = list(split(text, count_tokens=count, max_tokens=40, kind="text"))
    assert {chunk.text.strip()[-1] for chunk in chunks} == {"."}
    words_only = "word " * 60
    for chunk in split(words_only, count_tokens=count, max_tokens=24, kind="text"):
        assert set(chunk.text.split()) == {"word"}
    pieces = [c.text for c in split("x" * 300, count_tokens=count, max_tokens=24, kind="text")]
    assert "".join(pieces) == "x" * 300
    marked = "e\u0301" * 200
    assert all(c.text[0] == "e" for c in split(marked, count_tokens=count, max_tokens=24))


def test_an_overlap_begins_at_a_sentence():
    text = "".join(f"Sentence number {n} ends. " for n in range(30))
    chunks = list(split(text, count_tokens=count, max_tokens=60, overlap=15, kind="text"))
    check(text, chunks, 60)
    for before, after in pairwise(chunks):
        shared = text[after.start : before.end]
        assert shared.startswith("Sentence")
        assert count([shared])[0] - 2 <= 15


def test_titles_of_restructured_text():
    rst = "=====\nTitle\n=====\n\nText.\n\nPart\n----\n\nWords of it.\n\nOther\n-----\n\nMore.\n"
    chunks = list(split(rst, count_tokens=count, max_tokens=22, kind="rst"))
    check(rst, chunks, 22)
    paths = [chunk.headings for chunk in chunks]
    assert paths[0] == ("Title",)
    assert paths[-1] == ("Title", "Other")
    setext = "Title\n=====\n\ntext\n\nPart\n---\n\nnot\na\n---\n"
    (whole,) = split(setext, count_tokens=count, max_tokens=99)
    assert whole.headings == ("Title",)


def test_code_is_cut_between_functions():
    code = "".join(f"def f{n}(x):\n    y = x + {n}\n\n    return y\n\n\n" for n in range(12))
    chunks = list(split(code, count_tokens=count, max_tokens=80, kind="code"))
    check(code, chunks, 80)
    assert {chunk.text[:5] for chunk in chunks} == {"def f"}


def test_kinds_by_ending():
    found = [kind_of_file(name) for name in ("a.MD", "b.txt", "c.rst", "d.py", "-", "Makefile")]
    assert found == ["markdown", "text", "rst", "code", "text", "code"]


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"max_tokens": 17}, "allow at least 18"),
        ({"max_tokens": 40, "overlap": 20}, "half of a chunk, 19"),
        ({"max_tokens": 40, "overlap": -1}, "half of a chunk"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, int], complaint: str):
    with pytest.raises(BadOption, match=complaint):
        list(split("a text", count_tokens=count, **sizes))


def test_a_character_of_many_tokens():
    def many(texts: Sequence[str]) -> list[int]:
        return [2 + sum(40 if char == "ﷺ" else 1 for char in text) for text in texts]

    with pytest.raises(BadInput, match="character 3 of the document alone has 40 tokens"):
        list(split("abcﷺ", count_tokens=many, max_tokens=20))
    assert len(list(split("abcﷺ", count_tokens=many, max_tokens=50))) == 1


def test_an_embedder_counts():
    with FakeEmbedder.open() as embedder:
        chunks = list(split(BOOK, count_tokens=embedder.count_tokens, max_tokens=20))
        assert max(int(embedder.count_tokens([chunk.text])[0]) for chunk in chunks) <= 20


@pytest.mark.native
def test_the_built_in_models_tokens():
    with Embedder.open(settings=Settings(tune=False)) as embedder:
        for kind in KINDS:
            chunks = list(
                split(BOOK * 3, count_tokens=embedder.count_tokens, max_tokens=24, kind=kind)
            )
            counts = embedder.count_tokens([chunk.text for chunk in chunks])
            assert counts.tolist() == [chunk.n_tokens for chunk in chunks]
            assert counts.max() <= 24
