"""cli.py and bars.py: what is refused gets one line, which stands alone; every number has bounds."""

import dataclasses
import fcntl
import os
import pty
import runpy
import struct
import subprocess
import sys
import termios
import typing

import pytest
from conftest import ROOT, refusal
from test_docs import asks_for_flags, config_of
from test_house import tracked

from base import cli, processes

PROGRAMS = [str(path.relative_to(ROOT)) for path in tracked()]

FLAGS = {
    "--learning-rat 3": "unknown flag --learning-rat; did you mean --learning-rate? --help lists the flags",
    "--learning-rate=x": "argument --learning-rate: invalid float value: 'x'; --help lists the flags",
    "--steps": "argument --steps: expected one argument; --help lists the flags",
    "--steps=--": "argument --steps: expected one argument; --help lists the flags",
    "--rule best": "argument --rule: invalid choice: 'best'",
    "assets/tiny": "'assets/tiny' follows no flag; --help lists the flags",
    "--learning-rate 1e300": "--learning-rate must be at most 1, not 1e+300",
    "--reward-timeout 1e300": "--reward-timeout must be at most 1000000000.0, not 1e+300",
    "--adam-beta2=-inf": "--adam-beta2 must be at least -1000000000.0, not -inf",
    "--eval-prompts 1000000000": "--eval-prompts must be at most 100000, not 1000000000",
    "--steps 99999999999": "--steps must be at most 2147483647, not 99999999999",
    "--name \udcff": r"--name '\udcff' is not UTF-8",
    "--data \x1b[2J": r"\x1b[2J cannot be read",
}


@pytest.mark.parametrize("line, message", FLAGS.items(), ids=map(ascii, FLAGS))
def test_a_wrong_flag_is_one_line(line, message):
    assert message in refusal("train.py", *line.split(" "))


@pytest.mark.parametrize("path", list(filter(asks_for_flags, PROGRAMS)))
def test_every_number_has_bounds_that_a_machine_could_have(path):
    """And its default is within them."""
    config_class = config_of(path)
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = (typing.get_args(types[field.name]) or [types[field.name]])[0]
        if kind in cli.MOST:
            for number in (kind(10**300), -kind(10**300)):
                with pytest.raises(cli.BadInput, match="must be"):
                    cli.check_number("--flag", number, field.metadata)


@pytest.mark.parametrize("variables, message", [
    ({"RANK": "x"}, "RANK is 'x' in the environment; torchrun sets it to a number: unset it"),
    ({"RANK": ""}, "RANK is '' in the environment"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2 in the environment"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE 0 in the environment"),
    ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK is set in the environment and LOCAL_RANK is not"),
    ({"TORCHELASTIC_MAX_RESTARTS": "x"}, "TORCHELASTIC_MAX_RESTARTS is 'x' in the environment"),
])  # fmt: skip
def test_an_environment_that_torchrun_does_not_make_is_refused(variables, message, monkeypatch):
    for name in (*processes.TORCHRUN, "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "RANK" not in variables:  # set by the program then, and not unset by monkeypatch
        monkeypatch.setenv("RANK", "0")
        for name in processes.TORCHRUN:
            monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    assert message in refusal("train.py", "--plan")


def test_a_message_is_one_line_of_printable_text_and_not_too_long():
    line = str(cli.BadInput("a\nb\x1b[2J\ud800" + "x" * 10**6))
    assert line.startswith("a b\\x1b[2J\\ud800xxx") and len(line) < cli.LONGEST + 9


def test_components_that_are_run_say_what_to_run():
    with pytest.raises(SystemExit, match="run python -m studies.magnitudes CHECKPOINT"):
        runpy.run_path(ROOT / "saliency.py", run_name="__main__")


IN_A_BAR = """
import os, sys
from base import bars, cli
cli.one_line_errors()
for row in bars.bar(range(4), desc="rows", ncols=40, mininterval=0, leave=sys.argv[1] == "leave"):
    if row == 2:
        raise cli.BadInput("the third row is wrong")
"""


@pytest.mark.parametrize("leave", ["leave", "clear"])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_stands_alone_on_its_line(leave, terminal):
    command = [sys.executable, "-c", IN_A_BAR, leave]
    if not terminal:
        printed = subprocess.run(command, cwd=ROOT, capture_output=True).stderr
        assert b"\r" not in printed
    else:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        subprocess.run(command, cwd=ROOT, stderr=theirs)
        printed = os.read(ours, 99999)
        for descriptor in (ours, theirs):
            os.close(descriptor)
    assert b"rows:  50%" in printed
    [line] = [line for line in shown(printed.decode()) if "error" in line]
    assert line == "-c: error: the third row is wrong"


def shown(printed):
    """The lines that a terminal shows: a carriage return goes back to a line's start."""
    lines = []
    for written in printed.replace("\r\n", "\n").split("\n"):
        line = ""
        for part in written.split("\r"):
            line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines
