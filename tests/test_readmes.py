"""The two front pages say the same, and what they show is there."""

import importlib
import re
import shlex

import pytest
from launching import ROOT
from PIL import Image

from config import add_args_from_yaml, parse_command_line

ENGLISH, CHINESE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))

TOUR = re.search(r"## Quick tour\n(.*?)\n## ", ENGLISH, re.DOTALL)[1]  # type: ignore[index]
KILOBYTES, ALL_KILOBYTES = 80, 300


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


@pytest.mark.parametrize("command", re.findall(r"^ {4}(python (?:.*\\\n)*.*)", TOUR, re.MULTILINE))
def test_a_command_of_the_tour_names_a_program_and_configurations_that_load(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, program, *words = shlex.split(command.replace("\\\n", ""))
    assert (ROOT / program).is_file()
    schema, options = importlib.import_module(program.removesuffix(".py").replace("/", ".")).TAKES
    asked = parse_command_line(words, "", options)
    folder = ROOT if program.startswith("kd/") else (ROOT / program).parent
    for path, own in asked.configs:
        add_args_from_yaml(schema, path, (*asked.overrides, *own), folder)
    assert asked.configs


def test_every_system_of_the_tour_has_commands_and_a_picture() -> None:
    systems = re.split(r"^\*\*", TOUR, flags=re.MULTILINE)[1:]
    assert len(systems) == 5
    assert all(re.search(r"^ {4}python ", part, re.MULTILINE) and "<img " in part for part in systems)


def test_both_show_the_same_pictures_which_are_there_opaque_and_small() -> None:
    shown = re.findall(r'<img src="([^"]+)" width="(\d+)"', ENGLISH)
    assert shown == re.findall(r'<img src="([^"]+)" width="(\d+)"', CHINESE)
    files = [ROOT / name for name, _ in shown]
    assert sorted(files) == sorted((ROOT / "docs" / "tour").iterdir())
    sizes = [file.stat().st_size / 1000 for file in files]
    assert max(sizes) < KILOBYTES and sum(sizes) < ALL_KILOBYTES
    for file, (_, width) in zip(files, shown, strict=True):
        with Image.open(file) as picture:
            assert picture.format == "PNG" and not picture.has_transparency_data and picture.width >= int(width)
