"""A hook of MkDocs: pages that are read on GitHub too look the same on the site.

GitHub starts a list or a table right behind a line of text, draws `$math$`, and follows links out of docs/. The site's
Markdown wants a blank line, draws no math, and has no files outside docs/.
"""

import re
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r"\|.*\||[-*+] |1\. ")
LEADS_ON = re.compile(r"$|\s|\||[-*+] |\d+\. ")  # a line behind which no blank line is missing
CODE_OR_MATH = re.compile(r"(`+)(?:(?!\1).)+\1|\$([^$`\n]+)\$")
OUTWARD = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page before it is made into HTML."""
    lines: list[str] = []
    fence = ""
    for line in markdown.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif not fence:
            if BLOCK.match(line) and lines and not LEADS_ON.match(lines[-1]):
                lines.append("")
            line = OUTWARD.sub(r"\1 (`\2` in the repository)", CODE_OR_MATH.sub(_drawn, line))
        lines.append(line)
    return "\n".join(lines) + "\n"


def _drawn(found: re.Match[str]) -> str:
    return found[0] if found[1] else str(convert(found[2]))
