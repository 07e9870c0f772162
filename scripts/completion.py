"""Print a script that completes the programs' options, keys and values in bash and zsh.

    python -m scripts.completion > ~/.distill_lab_completion    # then in ~/.bashrc: source ~/.distill_lab_completion
    eval "$(python -m scripts.completion)"                      # this shell alone

For `python PROGRAM.py`, `python -m PROGRAM` and `torchrun ... PROGRAM.py` it knows options, their choices, YAML files
after --config_path and --cfg, keys of the configuration, and the values of a key that has few. All else that is typed
after python and torchrun completes as before. In zsh, run `autoload -U compinit bashcompinit; compinit; bashcompinit`
first. The script imports nothing, so it is quick; write it anew when programs change or the repository moves.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from config import Section
from config.cli import Parser, command_parser, options_of
from config.document import parse
from config.schema import as_section
from utils.run_folder import REPOSITORY

# {CASES}: for a program, `list` becomes its words: --flag, --option=, --option=value, key=, key=value, or a bare word.
SCRIPT = r"""# The programs of {ROOT}, by `python -m scripts.completion`
_distill_lab_words() {
    case $1 in
{CASES}
    esac
}

_distill_lab() {
    local IFS=$' \t\n' list='' name='' value='' lead='' found='' head cur prev file folder word i n typed
    if [[ -n ${ZSH_VERSION-} ]]; then
        typed=("${COMP_WORDS[@]:0:$((COMP_CWORD + 1))}")
    else  # not COMP_WORDS, which are split at = and : as well
        read -ra typed <<< "${COMP_LINE:0:COMP_POINT}"
        [[ ${COMP_LINE:0:COMP_POINT} == *[[:space:]] ]] && typed+=("")
    fi
    n=$((${#typed[@]} - 1)); cur=${typed[n]}; prev=${typed[n - 1]}
    for ((i = 1; i < n; i++)); do
        [[ -n $list || ${typed[i]} == -c || ${typed[i - 1]} == *.py ]] && break
        if [[ ${typed[i]} == -m ]]; then
            word=${typed[i + 1]}; _distill_lab_words "${word//.//}.py"
        elif [[ ${typed[i]} == *.py ]]; then
            file=${typed[i]/#\~\//$HOME/}; folder=${file%/*}; [[ $folder == "$file" ]] && folder=.
            file=$(CDPATH= cd -- "${folder:-/}" &> /dev/null && pwd -P)/${file##*/}
            _distill_lab_words "${file#{ROOT}/}"
        fi
    done
    if [[ -z $list || $prev == -m ]]; then
        word=${_distill_lab_before[${1##*/}]-}; [[ -n $word ]] && "$word" "$@"
        [[ $prev == -m ]] && for word in {MODULES}; do [[ $word == "$cur"* ]] && COMPREPLY+=("$word"); done
        return
    fi
    if [[ $cur == *=* ]]; then
        name=${cur%%=*}; value=${cur#*=}; lead=$name=
    elif [[ $prev == [-[:upper:]]* && " $list " == *" $prev= "* ]]; then  # --option value, KEY value
        name=$prev; value=$cur
    fi
    if [[ $name == --config_path || $name == --cfg ]]; then
        compopt -o filenames 2> /dev/null
        value=${value/#\~\//$HOME/}
        for word in "$value"*/ "$value"*.y*ml "$value"*args.log; do
            [[ -e $word ]] && found+=$lead${word%/}$'\n'
        done
    else
        for word in $list; do
            if [[ -n $name ]]; then
                [[ $word == "$name=$value"* && $word != *= ]] && found+=$lead${word#"$name="}$'\n'
            elif [[ $word == "$cur"* && $word != *=?* && ($cur == -* || $word != -*) ]]; then
                [[ $word == --* ]] && word=${word%=}
                found+=$word$'\n'
            fi
        done
    fi
    head=$cur  # of what is typed, all to the last = or : where the shell splits there: it replaces the rest
    [[ $COMP_WORDBREAKS == *=* ]] && head=${head##*=}
    [[ $COMP_WORDBREAKS == *:* ]] && head=${head##*:}
    head=${cur%"$head"}; IFS=$'\n'
    for word in $found; do COMPREPLY+=("${word#"$head"}"); done
    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2> /dev/null
}

typeset -gA _distill_lab_before  # what has completed these commands so far
if [[ -n ${ZSH_VERSION-} ]]; then
    complete -o nospace -o default -F _distill_lab python python3 torchrun
else
    for REPLY in python python3 torchrun; do
        declare -F _completion_loader > /dev/null && _completion_loader $REPLY
        [[ $(complete -p $REPLY 2> /dev/null) =~ \ -F\ ([^ ]+) && ${BASH_REMATCH[1]} != _distill_lab ]] &&
            _distill_lab_before[$REPLY]=${BASH_REMATCH[1]}
    done
    complete -o bashdefault -o default -F _distill_lab python python3 torchrun
fi
"""


def programs() -> dict[str, ModuleType]:
    """Modules that say what their command line takes: by a `command_line()`, or by TAKES, a schema and options."""
    files = sorted(file for package in REPOSITORY.glob("*/__init__.py") for file in package.parent.glob("*.py"))
    names = [file for file in files if re.search(r"^(TAKES = |def command_line\()", file.read_text(), re.M)]
    return {f"{file.parent.name}/{file.name}": import_module(f"{file.parent.name}.{file.stem}") for file in names}


def values_of(kind: Any) -> Iterator[str]:
    """What can stand for an annotation, as far as it can be listed: booleans, and Literals that YAML reads as such."""
    if kind is bool:
        yield from ("true", "false")
    elif get_origin(kind) is Literal:
        yield from (str(value) for value in get_args(kind) if parse(str(value), "", Path(), []) == value)
    elif get_origin(kind) in (Annotated, Union, UnionType):
        for part in get_args(kind):
            yield from values_of(part)


def keys_of(schema: type[Section], trail: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every dotted key of a configuration, with the values that can be listed."""
    for name, field in schema.model_fields.items():
        inner, _ = as_section(field.annotation)
        if inner:
            yield from keys_of(inner, f"{trail}{name}.")
        else:
            yield trail + name, [*values_of(field.annotation)]


def words_of(program: ModuleType) -> list[str]:
    """What can be typed after it."""
    schema, options = getattr(program, "TAKES", (Section, ()))
    parser = program.command_line() if schema is Section else command_parser("", options)
    keys = dict(keys_of(schema))
    listed = {f"--{option.name}": option.choices or [*option.expands] or keys[option.key] for option in options}
    words = [f"{key}={value}" for key, values in keys.items() for value in ("", *values)]
    for name, action in options_of(parser).items():
        if action.nargs == 0:
            words.append(name)
        else:
            values = action.choices or listed.get(name, ())
            words += [f"{name}={value}" for value in ("", *values)] if name.startswith("-") else values
    return words


def script(known: Mapping[str, Sequence[str]]) -> str:
    """The script for programs with their words."""
    cases = "\n".join(f"        {name}) list={shlex.quote(' '.join(words))} ;;" for name, words in known.items())
    modules = " ".join(name.removesuffix(".py").replace("/", ".") for name in known)
    filled = {"{ROOT}": shlex.quote(str(REPOSITORY)), "{CASES}": cases, "{MODULES}": modules}
    return re.sub(r"\{[A-Z]+\}", lambda found: filled[found[0]], SCRIPT)


def command_line() -> Parser:
    """No options but --help."""
    return Parser(__doc__)


def main() -> int:
    """Exit status."""
    command_line().parse_args()
    print(script({name: words_of(program) for name, program in programs().items()}), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
