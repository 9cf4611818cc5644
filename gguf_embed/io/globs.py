"""Patterns of file names: those of options, and those of .gitignore. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gguf_embed.errors import BadOption


@dataclass(frozen=True, slots=True, kw_only=True)
class IgnoreRule:
    """A line of a .gitignore file."""

    regex: re.Pattern[str]  # of a path relative to the file's folder, with slashes
    negated: bool
    folders_only: bool


def compile_globs(option: str, patterns: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """Patterns that a user gave: each matches the end of a path, or a folder on the way.

    "*.rst" is any such file, "docs" all below a folder of that name, "docs/*.md" the files in it,
    "docs/**/*.md" those below, too. Raises BadOption for what is no pattern.
    """
    for pattern in patterns:
        if not pattern.strip("/."):
            raise BadOption(f"{option} {pattern!r}: is no pattern; write one such as '*.rst'")
    return tuple(
        re.compile(f"(?:.*/)?{path_regex(pattern.strip('/'))}(?:/.*)?", re.DOTALL)
        for pattern in patterns
    )


def matches(path: str, globs: Sequence[re.Pattern[str]]) -> bool:
    """Whether one of them matches a path with slashes."""
    return any(glob.fullmatch(path) for glob in globs)


def parse_ignore(text: str) -> tuple[IgnoreRule, ...]:
    """The rules of a .gitignore file, in order."""
    rules: list[IgnoreRule] = []
    for line in text.splitlines():
        pattern = re.sub(r"(?<!\\)[ \t]+$", "", line)
        negated = pattern.startswith("!")
        pattern = pattern[1:] if negated else pattern
        if not pattern.strip("/") or line.startswith("#"):
            continue
        folders_only = pattern.endswith("/")
        pattern = pattern.rstrip("/")
        anchored = "/" in pattern
        regex = path_regex(pattern.removeprefix("/"))
        rules.append(
            IgnoreRule(
                regex=re.compile(regex if anchored else f"(?:.*/)?{regex}", re.DOTALL),
                negated=negated,
                folders_only=folders_only,
            )
        )
    return tuple(rules)


def is_ignored(
    path: str, *, is_folder: bool, levels: Sequence[tuple[str, Sequence[IgnoreRule]]]
) -> bool:
    """Whether the rules leave a file or folder out: the last that matches decides.

    `levels` are the .gitignore files above it from the outermost on, each with the path of its
    folder ("" for the top). What lies in a folder that is left out is not asked about.
    """
    ignored = False
    for folder, rules in levels:
        relative = path[len(folder) + 1 :] if folder else path
        for rule in rules:
            if (is_folder or not rule.folders_only) and rule.regex.fullmatch(relative):
                ignored = not rule.negated
    return ignored


def path_regex(pattern: str) -> str:
    """The regular expression of a glob in which * does not cross a slash and ** does."""
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        begins = at == 0 or pattern[at - 1] == "/"
        if begins and pattern.startswith("**/", at):
            parts.append("(?:.*/)?")
            at += 3
        elif begins and pattern[at:] == "**":
            parts.append(".+")
            at += 2
        elif pattern[at] == "*":
            parts.append("[^/]*")
            at += 1
        elif pattern[at] == "?":
            parts.append("[^/]")
            at += 1
        elif pattern[at] == "[" and (
            found := re.compile(r"\[([!^]?)(\]?[^\]]*)\]").match(pattern, at)
        ):
            inside = found[2].replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
            parts.append(f"(?!/)[{'^' if found[1] else ''}{inside}]")
            at = found.end()
        elif pattern[at] == "\\" and at + 1 < len(pattern):
            parts.append(re.escape(pattern[at + 1]))
            at += 2
        else:
            parts.append(re.escape(pattern[at]))
            at += 1
    return "".join(parts)
