"""ruler.build: sets in the cache, made by one process or many, damaged, half made, in the way of each
other."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from plain_ruler import breaks_the_sums, small_data
from tokenizers import Tokenizer

from base.cli import BadInput
from evals.ruler import sets as ruler

QWEN3 = ruler.TEMPLATES["qwen3"]


@pytest.fixture(scope="session")
def tiny():
    return Tokenizer.from_file(str(ROOT / "assets" / "tiny" / "tokenizer.json"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("ruler-data"))


@pytest.fixture(scope="session")
def corpora(data):
    return ruler.Corpora(data)


def build(folder, corpora, samples=3, workers=1, tasks=("vt", "fwe", "qa_1", "niah_single_2"), **changes):
    given = dict(lengths=[2500, 3000], seed=42, template="qwen3") | changes
    return ruler.build(
        folder,
        tasks,
        samples=samples,
        tokenizer_path=ROOT / "assets" / "tiny",
        corpora=corpora,
        workers=workers,
        **given,
    )


def test_build_in_parallel_equals_serial_and_generate(tmp_path, tiny, corpora):
    serial = build(tmp_path / "1", corpora)
    parallel = build(tmp_path / "2", corpora, workers=2)
    assert {k: p.read_bytes() for k, p in serial.items()} == {k: p.read_bytes() for k, p in parallel.items()}
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == sorted(
        ["lock", *(p.name for p in parallel.values())]
    )
    for (name, length), path in parallel.items():
        assert list(ruler.read(path, 3)) == ruler.generate(name, length, 3, 42, tiny, QWEN3, corpora)


def test_cache_is_reused_prefixed_and_keyed(tmp_path, corpora, data):
    def stamps(paths):
        return {path: path.stat().st_mtime_ns for path in paths.values()}

    first = build(tmp_path, corpora, samples=3)
    before = stamps(first)
    assert (
        stamps(build(tmp_path, corpora, samples=3)) == stamps(build(tmp_path, corpora, samples=2)) == before
    )
    two = {key: list(ruler.read(path, 2)) for key, path in first.items()}
    more = build(tmp_path, corpora, samples=4)
    assert more == first and all(stamps(more)[path] != before[path] for path in before)
    assert {key: list(ruler.read(path, 2)) for key, path in more.items()} == two
    for changes in (dict(seed=43), dict(template="base"), dict(answer_prefix=False)):
        assert not set(build(tmp_path, corpora, 1, **changes).values()) & set(first.values())
    other = tmp_path / "data"
    other.mkdir()
    (other / "squad.json").write_text((data / "dev-v2.0.json").read_text() + " ")
    changed = build(tmp_path, ruler.Corpora(other), 1)
    assert {key[0] for key, path in changed.items() if path != first[key]} == {"qa_1"}


def test_a_damaged_set_is_made_anew_with_a_warning(tmp_path, corpora, capfd):
    path = build(tmp_path, corpora, tasks=["vt"], lengths=[2500])["vt", 2500]
    whole = path.read_bytes()
    for damaged in (
        whole[:-20],
        whole[: len(whole) // 2],
        whole.replace(b"VAR", b"RAV", 1),
        b"",
        b"\n",
        whole + b"3\n",
    ):
        path.write_bytes(damaged)
        capfd.readouterr()
        build(tmp_path, corpora, tasks=["vt"], lengths=[2500])
        warnings = [line for line in capfd.readouterr().err.splitlines() if line and "RULER:" not in line]
        assert warnings == [f"warning: {path} is damaged and is made again"] and path.read_bytes() == whole


def test_a_set_is_made_sample_by_sample(tmp_path, corpora, tiny):
    """The bar hears of each; where sums of counts turn out wrong, the set and the bar begin again."""
    told = []
    arguments = ("vt", 2500, 4, 42, tiny, QWEN3, corpora, True)
    ruler._write(tmp_path / "a", arguments, told.append)
    assert told == [2500] * 4 and list(ruler.read(tmp_path / "a", 3)) == ruler.generate(*arguments)[:3]
    told, tokenizer = [], breaks_the_sums("-ba")
    arguments = ("niah_multikey_2", 1000, 8, 42, tokenizer, QWEN3, corpora, True)
    ruler._write(tmp_path / "b", arguments, told.append)
    assert told == [1000] * 3 + [-3000] + [1000] * 8
    assert list(ruler.read(tmp_path / "b", 8)) == ruler.generate(*arguments)


def test_windows_too_small_are_named_together_before_anything_is_made(tmp_path, corpora):
    with pytest.raises(BadInput) as error:
        build(tmp_path, corpora, tasks=["niah_single_1", "cwe", "vt", "fwe"], lengths=[4096, 700, 800])
    assert re.fullmatch(
        r"too few tokens for cwe at 700, 800, 4096 \(1\d+ to 4095, or 5\d+ and more are enough\); vt at "
        r"700, 800 "
        r"\(1\d+ and more are enough\); --tasks niah_single_1 fwe fit", str(error.value)
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"too few tokens for vt at 300 .*; choose other --lengths"):
        build(tmp_path, corpora, workers=2, tasks=["vt"], lengths=[300])
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path, corpora):
    for folder in ("/dev/null/cache", "/dev/full", "/proc"):
        with pytest.raises(BadInput, match=f"{folder} cannot keep samples: "):
            build(folder, corpora, tasks=["vt"])
    path = build(tmp_path, corpora, tasks=["vt"], lengths=[2500])["vt", 2500]
    path.unlink()
    path.mkdir()  # in the place of a set
    for workers in (1, 2):
        with pytest.raises(BadInput, match="cannot keep samples: Is a directory"):
            build(tmp_path, corpora, tasks=["vt"], lengths=[2500, 2600], workers=workers)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a disk that is full after 10 KB
    try:
        for workers in (1, 2):
            with pytest.raises(BadInput, match="cannot keep samples: File too large"):
                build(tmp_path, corpora, tasks=["vt"], lengths=[3500, 3600], workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("vt-3*"))


BUILD = """
from evals.ruler import sets as ruler
ruler.build({folder!r}, ["vt", "fwe"], [4096], 100000, 42, "assets/tiny", "qwen3", ruler.Corpora(), workers=2)
"""


def test_a_killed_build_leaves_no_processes_and_the_next_removes_its_pieces(tmp_path, corpora):
    """And while it lives, another one waits."""
    first = subprocess.Popen(
        [sys.executable, "-c", BUILD.format(folder=str(tmp_path))],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ},
    )
    while len(list(tmp_path.glob("*.tmp"))) < 2:
        assert first.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    second = subprocess.Popen(
        [sys.executable, "-c", BUILD.format(folder=str(tmp_path)).replace("100000", "2")],
        **dict(cwd=ROOT, stderr=subprocess.PIPE, text=True),
    )
    assert "another process makes samples in" in second.stderr.readline() and second.poll() is None
    first.kill()
    first.wait()
    assert len(workers) >= 2
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        time.sleep(0.01)
    second.communicate()
    assert second.returncode == 0
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["fwe", "lock", "vt"]


def test_refusals_of_arguments(tmp_path, corpora):
    with pytest.raises(BadInput, match="'llama' is not a template; they are base, qwen3"):
        build(tmp_path, corpora, template="llama")
    with pytest.raises(BadInput, match="nowhere cannot be read as a tokenizer"):
        ruler.build(tmp_path, ["vt"], [4096], 1, 42, tmp_path / "nowhere", "qwen3", corpora)
    with pytest.raises(BadInput, match="is not a directory"):
        ruler.Corpora(tmp_path / "nowhere")
