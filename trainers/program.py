"""A trainer as a program: a YAML file and a command line become its options, and what is wrong with them a line."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from trainers.config import InputError, TrainerConfig
from trainers.processes import processes
from trainers.testbeds import with_testbed

Config = TypeVar("Config", bound=TrainerConfig)


def run(
    config_class: type[Config], train: Callable[[Config], None], description: str, argv: Sequence[str] | None = None
) -> None:
    """`train` with the options of the command line, among the processes that were launched.

    An `InputError` ends the program with its message alone.
    """
    config = parse(config_class, sys.argv[1:] if argv is None else list(argv), description)
    try:
        with processes():
            train(with_testbed(config))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


class _Parser(HfArgumentParser):
    def add_argument(self, *names: str, bounds: Any = None, **options: Any) -> argparse.Action:
        """As argparse's; bounds are looked at when all options are there."""
        return super().add_argument(*names, **options)


def parse(config_class: type[Config], argv: list[str], description: str) -> Config:
    """The config that `argv` describes; ``--config file.yaml`` gives values which the other arguments override.

    A wrong option or value ends the program with a message that names it, and for the file its name.
    """
    parser = _Parser(
        config_class, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # a list may be empty
    parser.usage = "%(prog)s [--config FILE] [--option VALUE ...]"
    parser.add_argument("--config", help="YAML file with any of these options")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path, given = finder.parse_known_args(argv)
    try:
        in_file = _yaml_arguments(Path(path.config), config_class) if path.config else []
        if in_file:  # alone first, so that what is wrong in it is blamed on it
            prog, parser.prog = parser.prog, f"{parser.prog}: {path.config}"
            parser.parse_args(in_file)
            parser.prog = prog
        parser.parse_args([*in_file, *given])
        (config, _) = parser.parse_args_into_dataclasses([*in_file, *given], look_for_args_file=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return config


def _yaml_arguments(path: Path, config_class: type) -> list[str]:
    """The options of a YAML file as command-line arguments, so that both are read and checked alike."""
    try:
        values = yaml.load(path.read_bytes(), yaml.BaseLoader)  # text, for argparse to read: 1e-4 is a number there
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold options as `name: value`")
    known = [entry.name for entry in fields(config_class)]
    arguments: list[str] = []
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise InputError(
                f"{path}: there is no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        if isinstance(value, dict) or value in ("", "~", "null"):
            raise InputError(f"{path}: {name} has no value; leave it out for the default")
        if isinstance(value, list):
            arguments += [f"--{name}", *value]
        else:
            arguments.append(f"--{name}={value}")
    return arguments
