"""Cutting long texts: nothing lost, nothing too long, lines right."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from gguf_embed.io.chunks import PASSAGE_CHARS, split_markdown, split_to_fit


def split(text: str) -> list[tuple[int, str]]:
    return [(p.first_line, p.text) for p in split_markdown(text.split("\n"))]


def test_sections_carry_their_headings():
    text = "intro\n\n# A\n\none\ntwo\n\nthree\n## B\n### C\n\nfour\n# D"
    assert split(text) == [
        (1, "intro"),
        (3, "# A\n\none\ntwo\n\nthree"),
        (9, "## B\n### C\n\nfour"),
        (13, "# D"),
    ]


def test_a_passage_knows_its_last_line():
    text = "intro\n\n# A\n\none\ntwo\n\nthree\n\n## B\n### C\n\nfour\n\n# D"
    lines = [(p.first_line, p.last_line) for p in split_markdown(text.split("\n"))]
    assert lines == [(1, 1), (3, 8), (10, 13), (15, 15)]
    long = "\n".join(f"line {i} " + "x" * 60 for i in range(40))
    passages = list(split_markdown(long.split("\n")))
    assert [p.first_line for p in passages[1:]] == [p.last_line + 1 for p in passages[:-1]]
    assert passages[-1].last_line == 40


def test_long_sections_are_cut_between_paragraphs_and_keep_their_heading():
    paragraph = "word " * 100
    text = f"# A\n\n{paragraph}\n\n{paragraph}\n\n{paragraph}"
    passages = split(text)
    assert [line for line, _ in passages] == [1, 5, 7]
    assert all(passage.startswith("# A\n\nword") for _, passage in passages)


def test_long_paragraphs_are_cut_between_lines():
    lines = [f"line {i} " + "x" * 60 for i in range(40)]
    for line, passage in split("\n".join(lines)):
        assert passage.split("\n")[0] == lines[line - 1]


def test_code_between_fences_is_one_paragraph():
    text = "```sh\n# no heading\n\nrun\n```\n# A\n~~~\n```\n# none\n~~~\n`` `x` ``"
    assert split(text) == [
        (1, "```sh\n# no heading\n\nrun\n```"),
        (6, "# A\n\n~~~\n```\n# none\n~~~\n`` `x` ``"),
    ]


def test_what_only_looks_like_a_heading_is_none():
    for text in ["#hashtag", "####### seven", "# " + "x" * 300, "    # code"]:
        long = "word " * 90
        (_, first), (_, second) = split(f"{text}\n\n{long}\n\n{long}")
        assert first.startswith(text)
        assert second.startswith("word"), "not repeated as a heading is"


def test_a_blank_text_has_no_passage():
    assert split("") == []
    assert split("\n \n\t\n") == []


marks = st.sampled_from(["\n", "\n\n", " ", "# ", "```", "~~~", "word", "x" * 300, "é", "\t"])


@given(st.lists(marks | st.text(max_size=5)).map("".join))
@example("# a\n" * 500)
@example("x" * 5000)
@example("# h\n" + "word " * 500)
def test_no_word_is_lost_and_no_passage_too_long(text: str):
    lines = text.split("\n")
    parts = list(split_markdown(lines))
    for part in parts:
        assert part.first_line <= part.last_line <= len(lines)
        assert part.text.rstrip().endswith(lines[part.last_line - 1].rstrip()[-10:])
    passages = [(part.first_line, part.text) for part in parts]
    # In reading order every word of the text appears in the words of the passages.
    out = iter("".join("".join(passage.split()) for _, passage in passages))
    assert all(char in out for char in "".join(text.split()))
    for line, passage in passages:
        assert lines[line - 1].strip(), "begins on a line with something on it"
        assert passage.split()[0][:10] in lines[line - 1] or passage.startswith((" ", "#"))
        headings = sum(len(h) + 2 for h in passage.split("\n") if h.lstrip(" ").startswith("#"))
        n_parts = passage.count("\n\n") + 1
        assert len(passage) <= PASSAGE_CHARS + headings + 2 * n_parts
    assert [line for line, _ in passages] == sorted(line for line, _ in passages)


@given(st.text(), st.integers(1, 20))
def test_parts_fit_and_together_are_the_text(text: str, most: int):
    parts = list(split_to_fit(text, count_tokens=len, max_tokens=most))
    assert "".join("".join(parts).split()) == "".join(text.split()) or not text.strip()
    assert all(len(part) <= most for part in parts if len(text) > 1)
    if len(text) <= most:
        assert parts == [text]
    else:
        assert all(part.strip() for part in parts)


def test_parts_end_at_lines_then_words():
    parts = list(split_to_fit("one two\nthree four", count_tokens=len, max_tokens=12))
    assert parts == ["one two\n", "three four"]
    assert list(split_to_fit("aaaa bbbb", count_tokens=len, max_tokens=5)) == ["aaaa ", "bbbb"]


def test_a_single_character_is_never_cut():
    assert list(split_to_fit("ab", count_tokens=lambda text: 9, max_tokens=1)) == ["a", "b"]
