"""Configurations and command lines of any text: a checked configuration, or the mistakes, one line each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import at_most, damaged, examples, hold
from hypothesis import strategies as st
from launching import ROOT

from condense import condense_script, condense_script_text, image_job, text_job
from config import ConfigError, LocalPath, Option, Section, add_args_from_yaml, flatten, nested, parse_command_line
from distill_feat import buffer, dc, mtt
from kd import kd_config

FILES = ROOT / "config"
SCHEMAS: dict[str, tuple[type[Section], Sequence[Option], Path]] = {
    "images": (image_job.ImageConfig, condense_script.OPTIONS, FILES / "ipc10" / "digits.yaml"),
    "texts": (text_job.TextConfig, condense_script_text.OPTIONS, FILES / "ipc10" / "reuters.yaml"),
    "experts": (buffer.BufferConfig, buffer.OPTIONS, FILES / "distill_feat" / "buffer" / "digits.yaml"),
    "gradients": (dc.DcConfig, dc.DC_OPTIONS, FILES / "distill_feat" / "dc" / "digits_ipc1.yaml"),
    "trajectories": (mtt.TrajectoryRunConfig, mtt.TRAJECTORY_OPTIONS, FILES / "distill_feat" / "mtt" / "base.yaml"),
    "students": (kd_config.KdConfig, kd_config.OPTIONS, FILES / "kd" / "digits" / "base.yaml"),
}


def load(schema: type[Section], path: Path, overrides: Sequence[str] = ()) -> Section | None:
    """What a program does with a configuration before it begins; None where it was refused."""
    try:
        config = add_args_from_yaml(schema, path, overrides, ROOT).config
    except ConfigError as error:
        lines = str(error).split("\n")
        assert all(line.strip() for line in lines) and len(lines) == len(set(lines))
        return None
    flatten(config)
    yaml.safe_load(yaml.safe_dump(nested(config)))
    return config


def keys(schema: type[Section], trail: str = "") -> list[str]:
    """Dotted keys of sections and values."""
    found = []
    for name, field in schema.model_fields.items():
        found.append(trail + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += keys(field.annotation, f"{trail}{name}.")
    return found


scalars = st.one_of(
    st.sampled_from([
        "", "~", "true", "1", "-1", "0", "1e400", ".nan", "-.inf", "1_0", "0x" + "f" * 5000, "9" * 30, "9" * 5000,
        "[]", "{}", "[1, [2, {a: 3}]]", "{a: {b: 1}}", "{1: 2, null: 3}", '"\\0"', '"~\\0"', "~nobody_here/x", "'", "[",
        "!!timestamp x", "!!bool x", "!!int ''", "!!int 0x" + "f" * 5000, "!!float x", "!!binary x", "!!set {a, b}",
        "!!omap [a: 1]", "!!python/object/apply:os.system [ls]", "&a [*a]", "&a 1", "*a", "? [a]", "2001-01-01", "a: b",
    ]),
    st.text("[]{}:,-&*!?|>'\"%@`# \n\ta01.e~\\", max_size=12), st.text(max_size=8),
)  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_shipped_file_is_read(name: str) -> None:
    schema, _, path = SCHEMAS[name]
    assert load(schema, path) is not None


@pytest.mark.parametrize("name", SCHEMAS)
@examples(12)
def test_a_shipped_file_that_is_damaged_is_read_or_refused(tmp_path: Path, name: str, count: int) -> None:
    schema, _, path = SCHEMAS[name]
    base = yaml.safe_dump({"base": str(path)}).encode()
    known = keys(schema)
    lines = st.lists(st.tuples(st.sampled_from(known), scalars).map(lambda pair: f"{pair[0]}: {pair[1]}"), max_size=2)

    def claim(case: tuple[bytes, list[str]]) -> None:
        content, more = case
        (tmp_path / "x.yaml").write_bytes(content + "\n".join(more).encode(errors="surrogatepass"))
        load(schema, tmp_path / "x.yaml")

    hold(count, claim, st.tuples(st.one_of(damaged(path.read_bytes()), st.just(base), st.binary(max_size=50)), lines))


@pytest.mark.parametrize("name", SCHEMAS)
@examples(20)
def test_overrides_of_any_value_are_read_or_refused(name: str, count: int) -> None:
    schema, _, path = SCHEMAS[name]
    override = st.tuples(st.one_of(st.sampled_from(keys(schema)), st.text(max_size=4)), scalars)
    hold(
        count, lambda case: load(schema, path, [f"{key}={value}" for key, value in case]),
        st.lists(override, min_size=1, max_size=3),
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
@examples(80)
def test_any_words_are_understood_or_refused(name: str, count: int) -> None:
    schema, options, _ = SCHEMAS[name]
    flags = st.sampled_from(
        ["--" + option.name for option in options] + ["--config_path", "--gpu", "--debug", "--tf32"]
    )
    raw = st.text(st.characters(exclude_characters="\0"), max_size=8)  # no word of a process has a NUL
    word = st.one_of(
        flags, raw, st.tuples(flags, st.one_of(raw, scalars)).map("=".join),
        st.tuples(st.sampled_from(keys(schema)), raw).map("=".join),
        st.sampled_from([
            "-", "--", "--=", "=", "-1", "--set=x=1", "--config_path='", "x" * 5000, "--config_path=" + "x" * 5000,
            "--config_path=~nobody_here/x", "A.B", "--help=1", "-h1",
        ]),
    ).filter(lambda text: text not in ("-h", "--help"))  # fmt: skip

    def claim(words: list[str]) -> None:
        try:
            parse_command_line(words, "doc", options, Path("x.yaml"))
        except ConfigError as error:
            assert all(line.strip() for line in str(error).split("\n"))

    hold(count, claim, st.lists(word, max_size=4))


BAD: dict[str, tuple[str, str]] = {
    "lists too deep": ("a: " + "[" * 2000, "not valid YAML"),
    "mappings too deep": ("".join(" " * i + "a:\n" for i in range(3000)), "not valid YAML"),
    "aliases of aliases": (
        "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        "more than 100000 values",
    ),
    "an alias in itself": ("seed: &a [*a]", "not valid YAML"),
    "an integer of many bits": ("seed: 0x" + "f" * 5000, "20000 bits"),
    "a truth that is none": ("debug: !!bool x", "not valid YAML"),
    "a time that is none": ("seed: !!timestamp x", "not valid YAML"),
    "an integer of no digits": ("seed: !!int ''", "not valid YAML"),
    "a base of no name": ('base: "\\0"', "name of one YAML file"),
    "a path of no name": ('data_dir: "a\\0b"', "NUL"),
    "a home of no name": ('data_dir: "~\\0"', "NUL"),
    "a call": ("seed: !!python/object/apply:os.mkdir [ran]", "not valid YAML"),
}  # fmt: skip


class Small(Section):
    seed: int = 0
    debug: bool = False
    data_dir: LocalPath = Path("data")


@pytest.mark.parametrize("kind", BAD)
def test_what_no_configuration_holds_is_one_line(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, said = BAD[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    with at_most(200), pytest.raises(ConfigError, match=said):
        add_args_from_yaml(Small, tmp_path / "x.yaml", (), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_line_breaks_in_keys_and_values_make_no_lines(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError) as caught:
        add_args_from_yaml(Small, tmp_path / "x.yaml", ["a\nb=1", "seed=[\n" + "x" * 5000], tmp_path)
    assert len(str(caught.value).splitlines()) == 2 and len(str(caught.value)) < 500
    with pytest.raises(ConfigError) as caught:
        parse_command_line(["a\nb", "--c\nd"], "doc", (), Path("x.yaml"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("word", ["--config_path=" + "x" * 5000, "--config_path='a", "--config_path=~nobody_here"])
def test_a_file_of_no_possible_name_is_one_line(word: str) -> None:
    with pytest.raises(ConfigError):
        load_words(lambda: parse_command_line([word], "doc", ()))


def load_words(parse: Callable[[], Any]) -> None:
    for path, _ in parse().configs:
        add_args_from_yaml(Small, path, (), Path.cwd())
