"""README and docs/: every command parses, every name in them exists, every link resolves.

A command is a line of a fenced block without a language, or a code span that begins as one. It is parsed by
its own script's Config, make's by the Makefile, torchrun's by torchrun, so a wrong flag, choice or number in
a document fails here. In a page that a program has written ("<!-- Written by") blocks also show text; there
a line is a command if it begins as one.
"""

import argparse
import ast
import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT
from test_house import MAY_IMPORT
from torch.distributed.run import get_args_parser

from base import cli
from prompts import judge, rewards
from run import config as run_config
from run import metrics

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = "curl cp hf lm_eval mkdir pip vllm".split()  # programs that are not ours
DATA = "json jsonl parquet".split()  # train.jsonl is a file, not an attribute of train.py
# How a command begins.
COMMAND = r"(\.venv/bin/)?(make|python|torchrun) [^ ]|(\w+=\w+ )?python -m|-m \w|\w+\.py [^ ]"
NOT_OURS = "mine.py ppo.py dp_actor.py prefix_grouper_kernel.py run.toml more.toml".split()


@cache
def tracked():
    """Files of the repository, those that are not committed yet among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\n") if (ROOT / name).is_file()}


# -------------------------------------------------------------------------------------------------- documents


def blocks(text):
    """[(language, body), ...] of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def written(text):
    """Whether a document is a program's work."""
    return text.startswith("<!-- Written by")


def spans(text):
    """Code spans outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def commands(text):
    """Word lists of every command in a document."""
    for language, body in blocks(text):
        lines = body.replace("\\\n", " ").splitlines()
        if lines and lines[0].startswith("$ "):  # a command and what it prints
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        if written(text):
            lines = [line for line in lines if re.match(COMMAND, line)]
        for line in lines if not language else []:
            yield from parts(line)
    for span in spans(text):
        if re.match(COMMAND, span):
            yield from parts(span)


def parts(line):
    """The commands of a line of shell, joined by &&, as words, without "..."."""
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        yield words[:end]
        words = words[end + 1 :]


# --------------------------------------------------------------------------------------------------- commands


class Configured(Exception):
    """A script has come to where it parses its flags."""


def asks_for_flags(path):
    return bool(re.search(r"parse\(Config, ", (ROOT / path).read_text()))


@cache
def config_of(path):
    """The Config of a script below ROOT; None for a file that asks for no flags."""
    if not asks_for_flags(path):
        return None
    import rollout  # noqa: F401  (it sets variables for vLLM, which the patch below would take back)

    def parse(config_class, *_):
        raise Configured(config_class)

    state = mock.patch.multiple(sys, argv=[path], path=[str(ROOT / "bench"), *sys.path])
    hook = mock.patch.object(sys, "excepthook", sys.excepthook)
    with state, hook, mock.patch.dict(os.environ), mock.patch.object(cli, "parse", parse):
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except Configured as found:
            return found.args[0]
    raise AssertionError(f"{path} does not parse its flags")


def check(words):
    """Raises AssertionError or BadInput for a command that cannot be run as it is written."""
    while words and re.fullmatch(r"\w+=.*", words[0], re.S):  # variables of the environment
        words = words[1:]
    if not words:
        return
    program, *words = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        check_make(words)
    elif program == "torchrun":
        launched = [word for word in words if word.endswith(".py")]
        assert launched, f"torchrun {words} starts nothing"
        with mock.patch.object(argparse.ArgumentParser, "error", refuse):
            how = get_args_parser().parse_args(words)
        ranks = int(how.nproc_per_node) * int(how.nnodes.split(":")[0])
        check_script(launched[0], words[words.index(launched[0]) + 1 :], ranks)
    elif program == "python" and words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:])
    elif program == "python" and words[:1] != ["-m"]:
        check_script(words[0], words[1:])
    elif program in ("python", "-m"):
        module, *words = words[1:] if program == "python" else words
        check_script(module.replace(".", "/") + ".py", words)
    elif program.endswith(".py"):
        check_script(program, words)
    else:
        assert program in ELSEWHERE, f"{program}: neither ours nor one that is known"


def check_script(path, words, ranks=1):
    assert path in tracked(), f"{path} does not exist"
    if path == "studies/perturb.py" and "--" in words:  # evaluations follow
        own = words.index("--")
        for command in shlex.join(words[own + 1 :]).split(" -- "):
            check(shlex.split(command))
        words = words[:own]
    config_class = config_of(path)
    if config_class is None:
        text = (ROOT / path).read_text()
        assert '__name__ == "__main__"' in text, f"{path} is not a program"
        assert "it is a part, not a program" not in text, f"{path} is not a program"
        assert not [word for word in words if word.startswith("-")], f"{path} takes no flags"
        return
    if words == ["--help"]:
        return
    with contextlib.chdir(ROOT):
        config = cli.parse(config_class, "", words)
    if path == "train.py":  # flags that contradict each other
        run_config.check(config, config.ranks or ranks, cuda=True)
    if getattr(config, "train", None):
        check_script("train.py", shlex.split(config.train))


def refuse(parser, message):
    raise AssertionError(message)


def check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            assert re.search(rf"^{name} \?=", makefile, re.M), f"make has no variable {name}"
            assert name != "ROW" or value == "sft" or f"recipes/{value}.toml" in tracked(), f"no row {value}"
        else:
            assert word in targets or word == "-n", f"make has no target {word}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_command_in_the_docs_parses(path):
    wrong = []
    for words in commands(path.read_text()):
        try:
            check(words)
        except (AssertionError, cli.BadInput) as error:
            wrong.append(f"{shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_there_are_commands():
    """So that a change of how they are found does not leave nothing to check."""
    found = [words for path in DOCS for words in commands(path.read_text())]
    assert len(found) > 70
    for program in (
        "train.py",
        "sft.py",
        "studies.ablation",
        "studies.perturb",
        "prompts.inspect",
        "base.plot",
    ):
        assert any(program in words for words in found), program


@pytest.mark.parametrize(
    "line, message",
    [
        ("python train.py --tokens all", "unknown flag --tokens"),
        ("python train.py --rule topp", "invalid choice"),
        ("torchrun --nproc-per-node 2 train.py --steps 0", "--steps must be at least 1"),
        ("python train.py --config recipes/rll.toml", "rll.toml"),
        ("torchrun --nproc-per-node 2 train.py --step 3", "unknown flag --step"),
        ("torchrun --nproc-per-node 3 train.py", "--prompts 16 cannot be shared"),
        ("python train.py --algorithm dapo --beta 0.1", "--beta needs --algorithm grpo"),
        ("torchrun --nprocs 2 train.py", "unrecognized arguments: --nprocs"),
        ("python saliency.py assets/tiny", "saliency.py is not a program"),
        ("python perturb.py assets/tiny", "perturb.py does not exist"),
        (
            "python -m studies.perturb assets/tiny -- eval_data.py --sample 3",
            "unknown flag --sample",
        ),
        ('python -m studies.ablation sweep --train "--lr 1"', "unknown flag --lr"),
        ("python -m studies.longbench_sample --out x", "unknown flag --out"),
        ("make trains", "no target trains"),
        ("make row ROW=dapo-longer", "no row dapo-longer"),
        ("make row RAW=dapo", "no variable RAW"),
        ("nosuch train.py", "neither ours"),
    ],
)
def test_a_wrong_command_is_found(line, message):
    [words] = commands(f"```\n{line}\n```\n")
    with pytest.raises((AssertionError, cli.BadInput, SystemExit), match=message):
        check(words)


# ------------------------------------------------------------------------------------------------------ names


@cache
def flags():
    """Every flag of our scripts, with --no- before the switches, and torchrun's."""
    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    for path in tracked():
        if path.endswith(".py") and not path.startswith("tests/") and config_of(path):
            fields = config_of(path).__dataclass_fields__.values()
            known |= {"--" + field.name.replace("_", "-") for field in fields}
            known |= {"--no-" + field.name.replace("_", "-") for field in fields if field.type is bool}
    return known | {"--config", "--help"}


def defined(path):
    """Names that a module defines, and those in its classes as Class.name."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        names |= {each.id for each in targets if isinstance(each, ast.Name)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return names


def is_there(span):
    """False for a code span that names a file, flag, function or reward that the repository does not have."""
    reward = re.fullmatch(r"(rewards|judge):(\w+)", span)
    attribute = re.fullmatch(r"(\w+)\.([A-Za-z_][\w.]*)(\(.*\))?", span)
    if span.split("/")[0] in {name.split("/")[0] for name in tracked() if "/" in name} and "/" in span:
        return bool(re.search(r"[ *{]", span)) or (ROOT / span).exists()
    if re.fullmatch(r"[\w.-]+\.(py|toml)", span):
        return span in NOT_OURS or span in {Path(name).name for name in tracked()}
    if span.startswith("--"):
        return set(re.findall(r"(?<!\S)--\w[\w-]*", span)) <= flags()
    if reward:
        return hasattr({"rewards": rewards, "judge": judge}[reward[1]], reward[2])
    if attribute and f"{attribute[1]}.py" in tracked() and attribute[2] not in DATA:
        return attribute[2] in defined(f"{attribute[1]}.py")
    return True


def unknown(text):
    return [span for span in spans(text) if not is_there(span)]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_the_docs_name_exists(path):
    assert not unknown(path.read_text())


def test_a_wrong_name_is_found():
    wrong = ["core/losses.py", "curriculum.py", "dapo-long.toml", "--tokens-a-pass 3", "rewards:exactly"]
    wrong += ["saliency.pick_rows", "model.Qwen3.reads"]
    right = ["core/parallel.py", "tiny.py", "--no-normalize-std", "judge:by_source", "model.Qwen3.read"]
    right += ["train.jsonl", "runs/mine"]
    assert unknown("".join(f"`{name}` " for name in wrong + right)) == wrong


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_tables_of_flags_are_of_train(path):
    """A flag of some script is not enough where a table's left column lists train.py's."""
    listed = set(re.findall(r"^\| `--([\w-]+)` \|", path.read_text(), re.M))
    listed = {flag.removeprefix("no-") for flag in listed}  # that turn off what is on
    assert {flag.replace("-", "_") for flag in listed} <= set(config_of("train.py").__dataclass_fields__)
    assert listed or path.name != "README.md"


def anchors(path):
    """What GitHub makes of a document's headings, and of a source's lines."""
    if path.suffix != ".md":
        return {f"L{n + 1}" for n in range(len(path.read_text().splitlines()))}
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path):
    return re.findall(r"\]\(([^)\s]+)\)", path.read_text())


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_and_their_anchors_resolve(path):
    for link in links(path):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.is_file(), link
        places = re.findall(r"L\d+", anchor) if re.fullmatch(r"L\d+(-L\d+)?", anchor) else [anchor]
        assert not anchor or set(places) <= anchors(target), link


def test_readme_is_short_and_leads_to_every_document():
    readme = ROOT / "README.md"
    lines = readme.read_text().splitlines()
    assert len(lines) <= 180
    assert {f"docs/{path.name}" for path in DOCS[1:]} <= set(links(readme))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_lines_have_at_most_110_columns(path):
    """But for tables, which cannot be broken, and what a command prints."""
    lines = re.sub(r"^```\n\$ .*?^```$", "", path.read_text(), flags=re.M | re.S).splitlines()
    assert written("\n".join(lines)) or not [x for x in lines if len(x) > 110 and not x.startswith("|")]


# -------------------------------------------------------------------------------- what documents hold in step


def test_the_house_in_the_docs_is_the_house():
    text = (ROOT / "docs" / "house.md").read_text()
    told = {}
    for rooms, may in re.findall(r"^\| (`[^|]*`) \|[^|]*\| ([^|]*) \|$", text, re.M):
        for name in re.findall(r"`(\w+)(?:/|\.py)`", rooms):
            told[name] = set() if may == "nothing" else set(may.split(", "))
    assert told == {name: set(may.split()) for name, may in MAY_IMPORT.items()}
    named = set(spans(text))
    files = {name for name in tracked() if name.endswith(".py") and not name.startswith("tests/")}
    assert not {name for name in files - named if not name.endswith("__init__.py")}


def documented(docstring):
    """Keys in the left column of a docstring's list of metrics."""
    names = re.findall(r"^ *((?:\w+, )*\w+)  +\S", docstring.partition("metrics.jsonl")[2], re.M)
    return {name for line in names for name in line.split(", ")}


def keys_of(path, name):
    """Constant keys of the dictionaries that are assigned to `name` in a script."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Assign | ast.AugAssign) and ast.unparse(node).startswith(name):
            dicts = [each for each in ast.walk(node.value) if isinstance(each, ast.Dict)]
            found |= {key.value for each in dicts for key in each.keys if key}
    return found


def test_every_metric_is_explained_and_no_other():
    completion = SimpleNamespace(ids=[1], finished=True)
    group = SimpleNamespace(completions=[completion] * 2, tokens=3, known_lengths=[1, 1], prompt=[1])
    group.rewards, group.scores, group.values = torch.ones(2), torch.ones(2), torch.ones(2, 2)
    clock = metrics.Clock(torch.device("cpu")).metrics(3)
    written = {*metrics.of_rollout([group], [group], ["a", "b"]), *metrics.of_updates([], 1), *clock}
    of_best = {"held_out"}  # run/best.py adds it
    assert documented(metrics.__doc__) == written | keys_of("run/metrics.py", "line ") | of_best
    sft = ast.get_docstring(ast.parse((ROOT / "sft.py").read_text()))
    assert documented(sft) == keys_of("sft.py", "metrics = ")


def test_the_license_is_the_one_that_readme_names():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text and "Version 2.0, January 2004" in text
    assert "Apache-2.0" in (ROOT / "README.md").read_text()
