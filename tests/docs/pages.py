"""The pages: README and docs, with their blocks of code."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^>]*?) -->\n)?^```(?P<language>[\w{}-]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment before it."""

    page: str
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in some languages."""
    found = []
    for path in PAGES:
        content = path.read_text()
        for match in _BLOCK.finditer(content):
            line = content.count("\n", 0, match.start("language")) + 1
            name = path.relative_to(ROOT).as_posix()
            found.append(Block(name, line, match["language"], match["text"], match["note"] or ""))
    return [block for block in found if block.language in languages]


def commands(block: Block) -> list[str]:
    """The lines of a block of commands, without comments."""
    lines = (line.split(" #")[0].strip() for line in block.text.replace("\\\n", "").splitlines())
    return [line for line in lines if line and not line.startswith("#")]
