"""From a YAML file and a command line to one frozen, checked configuration."""

from config.cli import CommandLine, Option, parse_command_line
from config.loader import PythonSection, Resolved, add_args_from_yaml, flatten, named, nested
from config.schema import ConfigError, LocalPath, ModelPath, Section

__all__ = [
    "CommandLine",
    "ConfigError",
    "LocalPath",
    "ModelPath",
    "Option",
    "PythonSection",
    "Resolved",
    "Section",
    "add_args_from_yaml",
    "flatten",
    "named",
    "nested",
    "parse_command_line",
]
