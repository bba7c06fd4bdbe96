"""Flags, TOML and one-line errors, for every script of this repository.

A script describes itself in one dataclass whose fields are made by `option`; `parse` turns it into command-line flags
(--learning-rate for learning_rate), reads --config FILE.toml with the same keys, and refuses what it does not know.
Order of precedence: the flag, then the file, then the default.
"""

import argparse
import dataclasses
import math
import os
import sys
import tomllib
import typing
from pathlib import Path


class BadInput(ValueError):
    """The user's input is wrong; the message is one line that names what, where, and the mend."""


def option(default, help, choices=None, least=None, above=None):
    """A dataclass field with its line of --help; `choices` lists the allowed values. A number must be at least `least`,
    or greater than `above`, and finite."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least, "above": above})


def parse(config_class, doc, argv=None):
    """Command line (default: sys.argv) -> an instance of `config_class`; `doc` opens --help. Raises BadInput for numbers
    out of range and for a wrong --config file."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the keys below (underscores)")
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        boolean = types[field.name] is bool
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            choices=field.metadata["choices"],
            help=_help(field),
            **({"action": argparse.BooleanOptionalAction} if boolean else {"type": types[field.name]}),
        )
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    values = {**(_read_toml(Path(path), config_class, types) if path else {}), **given}
    for field in dataclasses.fields(config_class):
        if field.name in values:
            _check_number(field, values[field.name])
    return config_class(**values)


def _check_number(field, value):
    flag, least, above = "--" + field.name.replace("_", "-"), field.metadata["least"], field.metadata["above"]
    if least is not None and not least <= value < math.inf:
        raise BadInput(f"{flag} must be at least {least}, not {value}")
    if above is not None and not above < value < math.inf:
        raise BadInput(f"{flag} must be more than {above}, not {value}")


def _help(field):
    text = field.metadata["help"]
    return (text if "(default" in text else f"{text} (default: {field.default!r})").replace("%", "%%")


def _read_toml(path, config_class, types):
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path}: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in fields:
            raise BadInput(f"--config {path}: unknown key {key!r}; --help lists the keys")
        if types[key] is float and type(value) is int:
            values[key] = value = float(value)
        if type(value) is not types[key]:
            raise BadInput(f"--config {path}: {key} must be a {types[key].__name__}, not {value!r}")
        choices = fields[key].metadata["choices"]
        if choices and value not in choices:
            raise BadInput(f"--config {path}: {key} must be one of {', '.join(choices)}, not {value!r}")
    return values


def one_line_errors():
    """From here on a BadInput ends the process with its one line and exit code 1; other errors keep their traceback."""

    def hook(kind, error, traceback):
        if not issubclass(kind, BadInput):
            return sys.__excepthook__(kind, error, traceback)
        rank = os.environ.get("RANK", "0")
        where = Path(sys.argv[0]).name + (f" (rank {rank})" if rank != "0" else "")
        print(f"{where}: error: {error}", file=sys.stderr, flush=True)

    sys.excepthook = hook
