"""Long sentences of the README, the changelog and the docs: `python -m tests.sentences [WORDS]`.

Code, HTML comments and numbers in tables are no prose. A code span, a formula or the text of a link counts as its words
as they are read: a span of code is one word.
"""

import re
import sys
from collections.abc import Iterator

from tests.conftest import ROOT

LOGS = ("decisions.md", "_registration.md")  # what was said on a day, and is not rewritten
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|et al|vs|cf|approx|no|fig|eq)\.$", re.IGNORECASE)
END = re.compile(r"(?<=[.!?])[\"”)’*]*\s+(?=[\"“(*\[]*[A-Z0-9ΔΣθκλμτ∂`$\[“(])")
MARK = re.compile(r"^\s*(?:[-*+]|\d+\.|#+|>)\s+")


def pages() -> dict[str, str]:
    """The README, the changelog and every page of docs/ by name, logs left out."""
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {file.name: file.read_text(encoding="utf-8") for file in files if not file.name.endswith(LOGS)}


def sentences(page: str) -> Iterator[str]:
    """The sentences of a page of Markdown, in order: of paragraphs, list items, headings and cells of tables."""
    for block in _blocks(page):
        start = 0
        for end in END.finditer(block):
            if ABBREVIATION.search(block[start : end.start()]):
                continue
            yield block[start : end.start()].strip()
            start = end.end()
        yield block[start:].strip()


def words(sentence: str) -> int:
    """How many words a sentence has."""
    return sum(any(sign.isalnum() for sign in word) for word in sentence.split())


def long_sentences(page: str, most: int) -> list[str]:
    """The sentences of more than `most` words."""
    return [s for s in sentences(page) if words(s) > most]


def _blocks(page: str) -> Iterator[str]:
    page = re.sub(r"^ *```.*?^ *```", "\n", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"<!--.*?-->|\$\$.*?\$\$", "\n", page, flags=re.DOTALL)
    page = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", page)
    page = re.sub(r"`+[^`]+`+", "`code`", page)
    lines: list[str] = []
    for line in [*page.splitlines(), ""]:
        new = MARK.match(line) or line.startswith("|") or not line.strip()
        if new and lines:
            yield " ".join(lines)
            lines = []
        if line.startswith("#"):
            yield line.lstrip("# ")
        elif line.startswith("|"):
            yield from line.strip("|").split("|")
        elif line.strip():
            lines.append(MARK.sub("", line).strip())


def main(most: int = 40) -> None:
    """Prints the long sentences of each page, then how many there are."""
    found = pages()
    for name, page in found.items():
        for sentence in long_sentences(page, most):
            print(f"{name}: {words(sentence)} words: {sentence}")
    print(f"\n{'page':<24}{'over 30':>8}{'over 40':>8}{'words':>8}")
    rows = [
        (name, len(long_sentences(page, 30)), len(long_sentences(page, 40)), sum(map(words, sentences(page))))
        for name, page in found.items()
    ]
    for row in [*rows, ("all", *(sum(row[n] for row in rows) for n in (1, 2, 3)))]:
        print("{:<24}{:>8}{:>8}{:>8}".format(*row))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
