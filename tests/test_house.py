"""The house: which room may import which, and what may stand where (docs/house.md, README "The files")."""

import ast
import subprocess

import pytest
from conftest import ROOT

COMPONENTS = "model rollout saliency grpo dapo losses".split()
SCRIPTS = "train sft eval_ruler eval_longbench eval_gsm8k eval_data".split()
# Who may import whom. A room may also import itself; nothing imports a script, a study or a measurement.
MAY_IMPORT = {
    "base": "",
    "grpo": "",
    "core": "base",
    "prompts": "base",
    "saliency": "",
    "dapo": "base grpo",
    "losses": "grpo dapo",
    "model": "base core",
    "rollout": "base core",
    "run": "base core prompts saliency grpo dapo losses model",
    "evals": "base core prompts saliency model rollout",
    "studies": "base core prompts run evals " + " ".join(COMPONENTS),
    "bench": "base core prompts run evals studies " + " ".join(COMPONENTS),
    **dict.fromkeys(SCRIPTS, "base core prompts run evals " + " ".join(COMPONENTS)),
}


def tracked():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split() if not name.startswith("tests/")]


def room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path):
    """Top names that a file imports anywhere in it, of ours, with the modules in rooms in full."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in MAY_IMPORT}


@pytest.mark.parametrize("path", tracked(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    allowed = {room(path), *MAY_IMPORT[room(path)].split()}
    if path.parent.name == "bench":
        allowed |= {p.stem for p in path.parent.glob("*.py")}
    wrong = {name for name in imports(path) if name.split(".")[0] not in allowed}
    assert not wrong, f"{path.relative_to(ROOT)} may not import {wrong}"


def test_no_modules_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in tracked()}
    edges = {
        name: {other for other in imports(path) if other in modules} - {name}
        for name, path in modules.items()
    }
    for start in edges:
        seen, todo = set(), set(edges[start])
        while todo:
            seen |= {name := todo.pop()}
            todo |= edges[name] - seen
        assert start not in seen, f"{start} imports itself by {sorted(seen)}"


def test_the_root_holds_what_a_reader_opens_first():
    assert {path.stem for path in tracked() if path.parent == ROOT} == {*COMPONENTS, *SCRIPTS}
    assert not [name for name in ("data", "runs") if (ROOT / name / "__init__.py").exists()]


def test_every_file_can_be_read_in_one_sitting():
    files = [*tracked(), *(ROOT / "tests").rglob("*.py")]
    assert not [path for path in files if len(path.read_text().splitlines()) >= 500]
