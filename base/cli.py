"""Flags, TOML and one-line errors, for every script of this repository.

A script describes its settings in one dataclass whose fields are made by `option`. `parse` turns each field
into a command-line flag (--learning-rate for learning_rate), reads --config FILE.toml ... with the same keys,
and refuses unknown ones. A flag overrides the files, a later file overrides earlier ones, and any of them
overrides the default.
"""

import argparse
import dataclasses
import difflib
import errno
import json
import os
import sys
import time
import tomllib
import typing
from pathlib import Path

from base import bars, limits

LONGEST = 1500  # characters of a message
# Bounds of numbers whose option names no other. Integers must fit into the 32 bits that libraries have.
MOST = {int: 2**31 - 1, float: 1e9}


class BadInput(ValueError):
    """The user's input is wrong. The message is one line: what is wrong, where, and the fix."""

    def __init__(self, message):
        line = " ".join(message.splitlines())  # a quoted library may have written several
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        if len(shown) > LONGEST:
            shown = f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"
        super().__init__(shown)


class Parser(argparse.ArgumentParser):
    """argparse would print a hundred lines of usage and exit with code 2."""

    def error(self, message):
        raise BadInput(f"{message}; --help lists the flags")


def option(default, help, choices=None, least=None, above=None, most=None, positional=False):
    """A dataclass field with its line of --help.

    choices: the allowed values. least, above, most: bounds of a number, or of each number of a list: at least
    `least`, more than `above`, at most `most`, or MOST. A field whose type is a list takes its values after
    one flag: --lengths 1 2. positional: given without a flag; optional.
    """
    limits = {"least": least, "above": above, "most": most}
    metadata = {"help": help, "choices": choices, "positional": positional, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(config_class, doc, argv=None):
    """Command line (default: sys.argv) -> an instance of `config_class`. `doc` opens --help.

    Raises BadInput for wrong flags, numbers out of range, and a wrong --config file. --help exits with code
    0.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    more = "TOML files with any of the keys below (underscores); later files override earlier ones"
    parser.add_argument("--config", metavar="FILE", nargs="+", default=[], help=more)
    types = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    inherited = [field for field in fields if field.name not in config_class.__annotations__]
    own = [field for field in fields if field not in inherited]
    for field in own + inherited:
        kind = types[field.name]
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is list:
            how = {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:
            how = {"type": kind, **({"nargs": "?"} if field.metadata["positional"] else {})}
        parser.add_argument(
            field.name if field.metadata["positional"] else "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            choices=field.metadata["choices"],
            help=_help(field),
            **how,
        )
    given, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        what = f"unknown flag {word}" if word.startswith("-") else f"{word!r} follows no flag"
        known = ["--" + field.name.replace("_", "-") for field in fields]
        raise BadInput(f"{what}; {_nearest(word, known)}--help lists the flags")
    values, given = {}, vars(given)
    for path in given.pop("config"):
        values |= _read_toml(path, config_class, types)
    for key, value in given.items():
        if value == []:  # argparse takes "--" for the end of the values, also after "="
            parser.error(f"argument --{key.replace('_', '-')}: expected one argument")
    values |= given
    for field in fields:
        if field.name in values:
            _check(field, values[field.name])
    return config_class(**values)


def _nearest(word, known):
    """A hint for a misspelt word, or ""."""
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}? " if near else ""


def _check(field, value):
    """Raises BadInput for a number out of range, and for text that is not UTF-8."""
    flag = "--" + field.name.replace("_", "-")
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str):
            try:
                each.encode()
            except UnicodeEncodeError as error:
                raise BadInput(f"{flag} {each!r} is not UTF-8") from error
        if type(each) in MOST:
            check_number(flag, each, field.metadata)


def check_number(flag, number, limits):
    least, above, most = (limits[key] for key in ("least", "above", "most"))
    most = MOST[type(number)] if most is None else most
    if above is not None and not number > above:
        raise BadInput(f"{flag} must be more than {above}, not {number}")
    least = -most if least is None else least
    if not number >= least:
        raise BadInput(f"{flag} must be at least {least}, not {number}")
    if not number <= most:
        raise BadInput(f"{flag} must be at most {most}, not {number}")


def _help(field):
    text = field.metadata["help"]
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    shown = " ".join(map(str, default)) if isinstance(default, list) else repr(default)
    plain = "(default" in text or field.metadata["positional"]
    return (text if plain else f"{text} (default: {shown})").replace("%", "%%")


def _read_toml(path, config_class, types):
    try:
        values = tomllib.loads(limits.read_text(path))
    except (OSError, ValueError, RecursionError) as error:  # not TOML and not UTF-8 are ValueErrors
        raise BadInput(f"--config {path}: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in fields:
            raise BadInput(
                f"--config {path}: unknown key {key!r}; {_nearest(key, fields)}--help lists the keys"
            )
        if types[key] is float:
            values[key] = value = _as_float(value)
        kind = types[key]
        if typing.get_origin(kind) is list:
            item = typing.get_args(kind)[0]
            value = value if isinstance(value, list) else [value]  # a list of one, as after a flag
            values[key] = value = [_as_float(v) for v in value] if item is float else value
            if not value or any(type(v) is not item for v in value):
                raise BadInput(f"--config {path}: {key} must be a list of {item.__name__}, not {value!r}")
        elif type(value) is not kind:
            raise BadInput(f"--config {path}: {key} must be a {kind.__name__}, not {value!r}")
        if "\\x00" in repr(value):
            raise BadInput(f"--config {path}: {key} has a zero byte, which no path or name can have")
        choices = fields[key].metadata["choices"]
        if choices and value not in choices:
            raise BadInput(f"--config {path}: {key} must be one of {', '.join(choices)}, not {value!r}")
    return values


def _as_float(value):
    """An integer that a float can hold -> that float; anything else unchanged."""
    return float(value) if type(value) is int and abs(value) < 2**1023 else value


def brief(value, longest=120):
    """A value as JSON, for a message; cut off if it has more than `longest` characters."""
    text = json.dumps(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


# A disk that is full, over its quota or a file's size limit, or one that we may not write to; too many open
# files, processes, or bytes in use; a path that is too long, or a loop; a standard output that is closed.
MACHINE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EBADF, errno.EPIPE),
)


def one_line_errors():
    """From here on a BadInput, or a limit of the machine, ends the process with one line and exit code 1.
    Other errors keep their traceback.

    Before ranks are connected (base/processes.py) all of a node find the same error; the first prints it.
    """

    def hook(kind, error, traceback):
        others = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
        if not is_expected(error) or not others:
            print_error(kind, error, traceback)
        tell_torchrun(one_line(error))

    sys.excepthook = hook


def is_expected(error):
    """Whether the user can fix the error without its traceback."""
    return isinstance(error, BadInput) or getattr(error, "errno", None) in MACHINE_ERRORS


def one_line(error):
    """An error as one line of text."""
    if is_expected(error):
        return f"{Path(sys.argv[0]).name}: error: {BadInput(str(error))}"
    return f"{type(error).__name__}: {error}"


def print_error(kind, error, traceback):
    """To standard error: one line for an error that is expected, else the traceback."""
    bars.clear()
    if is_expected(error):
        # torch prefixes what goes to sys.stderr now with the rank, once it has connected the ranks.
        print(one_line(error), file=sys.__stderr__, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


def tell_torchrun(text):
    """Give torchrun the reason why this rank ends. It prints that last, as the root cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        report = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": report}))
