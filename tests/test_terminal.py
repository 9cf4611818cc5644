"""Text and tables in the width that there is: nothing lost, words whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gguf_embed.cli.layout import pairs, reflow, table

word = st.text("abcdef-/", min_size=1, max_size=12)
cell = st.lists(word, max_size=6).map(" ".join)


@given(st.lists(st.tuples(cell, cell, cell), max_size=5), st.integers(20, 120))
def test_a_table_loses_no_word_and_fits(rows: list[tuple[str, str, str]], width: int):
    lines = list(table(("one", "two", "three"), rows, width))
    said = " ".join(lines).replace(";", " ").split()
    for row in rows:
        for text in row:
            for part in text.split():
                assert part in said
    assert all(len(line) <= width for line in lines)


def test_a_cell_goes_on_below_itself():
    rows = [("a", "some long words here", "x"), ("b", "short", "y")]
    assert list(table(("n", "text", "z"), rows, 16)) == [
        "n  text        z",
        "a  some long   x",
        "   words here",
        "b  short       y",
    ]
    assert len(list(table(("n", "text", "z"), rows, 100))) == 3


def test_a_row_that_fits_nowhere_is_a_list():
    rows = [("a-name-that-is-long", "embedder", ""), ("b", "", "Q8_0")]
    assert list(table(("model", "kind", "here"), rows, 24)) == [
        "a-name-that-is-long",
        "  kind embedder",
        "b",
        "  here Q8_0",
    ]


def test_values_stand_in_one_column():
    assert list(pairs([("a", "one two three"), ("long", "x")], 12)) == [
        "a     one",
        "      two",
        "      three",
        "long  x",
    ]


TEXT = """\
A paragraph that
goes on.

list:
  first     a remark that is
            continued
  second    short
After it.

examples:
  gguf-embed search "two words" a.md      finds
  gguf-embed models"""


def test_wide_text_stays_as_it_is_but_for_paragraphs():
    assert list(reflow(TEXT, 100)) == [
        "A paragraph that goes on.",
        "",
        "list:",
        "  first     a remark that is continued",
        "  second    short",
        "After it.",
        "",
        "examples:",
        '  gguf-embed search "two words" a.md      finds',
        "  gguf-embed models",
    ]


def test_narrow_text_keeps_columns_and_whole_words():
    assert list(reflow(TEXT, 28)) == [
        "A paragraph that goes on.",
        "",
        "list:",
        "  first     a remark that is",
        "            continued",
        "  second    short",
        "After it.",
        "",
        "examples:",
        "  gguf-embed search \\",
        '      "two words" a.md',
        "        finds",
        "  gguf-embed models",
    ]
