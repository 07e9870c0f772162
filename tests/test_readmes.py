"""The two front pages say the same."""

import re

from launching import ROOT

ENGLISH, CHINESE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))


def commands(text: str) -> list[str]:
    """Indented lines without their comments."""
    return [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    ")]


def test_both_have_the_same_commands() -> None:
    assert commands(ENGLISH) == commands(CHINESE)


def test_both_have_the_same_sections_tables_and_links() -> None:
    for pattern in (r"^#+ ", r"^\|", r"\]\((?!README)([^)]+)\)", r"<!-- table: ([\w-]+) -->"):
        english, chinese = (re.findall(pattern, text, re.MULTILINE) for text in (ENGLISH, CHINESE))
        assert english == chinese and english, pattern


def test_both_have_the_same_numbers() -> None:
    english, chinese = (sorted(re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", text)) for text in (ENGLISH, CHINESE))
    assert english == chinese
