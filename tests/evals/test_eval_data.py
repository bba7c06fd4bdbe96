"""eval_data.py with real vLLM on assets/tiny: own rows and reward, a file of another kind, a task."""

import json

import pytest
from conftest import ROOT, output_of, refusal, rows_of, run_here

from prompts import tasks
from prompts.chat import encode_prompt, load_tokenizer

TINY = ROOT / "assets" / "tiny"
REWARD = """
import signal

def first(answer, row):
    assert row["bonus"] == 0.5
    return row["bonus"] + 0.75 * answer.startswith(row["answer"][:5])

def hangs(answer, row):
    if answer and row["id"] == "row 3":
        signal.pause()
    return 1
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Two files of rows, on passages of the tiny model's task, and a module with a reward."""
    folder = tmp_path_factory.mktemp("own")
    source = tasks.Source("recall", "mine", 4, 2)
    rows = [{**source[i], "id": f"row {i}", "bonus": 0.5} for i in range(8)]
    for name, part in (("a.jsonl", rows[:5]), ("b.jsonl", rows[5:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "my_first.py").write_text(REWARD)
    return folder, rows


def test_own_data_and_reward(own, tmp_path, monkeypatch):
    folder, rows = own
    monkeypatch.setenv("PYTHONPATH", str(folder))
    command = ["eval_data.py", TINY, "--data", folder / "a.jsonl", folder / "b.jsonl"]
    command += [
        "--reward",
        "my_first:first",
        "rewards:exact",
        "my_first:hangs",
        *("--reward-workers", 1, "--reward-timeout", 5, "--reward-on-timeout", "zero"),
        "--max-tokens",
        24,
        "--out",
        tmp_path,
    ]
    stdout = output_of(*command, "--log-prompts")
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    tokenizer, by_id = load_tokenizer(TINY, 896), {row["id"]: row for row in rows}
    assert [r["id"] for r in records] == [f"row {i}" for i in range(8)]
    for r in records:
        row = by_id[r["id"]]
        ids = encode_prompt(tokenizer, row, False, 4000)
        assert r["prompt"] == tokenizer.decode(ids, skip_special_tokens=False)
        assert r["answer"] == r["prediction"].strip() and r["expected"] == row["answer"]
        exact = r["answer"].lower() == row["answer"].lower()
        late = r["id"] == "row 3"
        assert r["rewards"] == [0.5 + 0.75 * r["answer"].startswith(row["answer"][:5]), exact, not late]
        assert r["rewards_timed_out"] is late
        assert r["score"] == (r["rewards"][0] >= 1)
        assert r["task"] == ("b" if r["id"] > "row 4" else "a") + ".jsonl"
    right = sum(r["score"] for r in records)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["rewards_timed_out"] == 1 and "- a reward of 1 of 8 answers timed out" in stdout
    assert right > 0 and report["accuracy"]["all"]["score"] == 100 * right / 8
    table = rows_of(stdout)
    assert table["all"][1] == f"{0.5 + 0.75 * right / 8:.3f}" and table["b.jsonl"][4] == "3"
    assert stdout.startswith((tmp_path / "results.md").read_text())
    # Another reward is another evaluation, and so is its file in another version; a copy without the reward's
    # key is named before an engine starts.
    monkeypatch.syspath_prepend(str(folder))
    assert "other settings: reward [" in refusal(*command, "--reward", "rewards:exact")
    with (folder / "my_first.py").open("a") as file:
        file.write("# another version")
    assert "other settings: reward source" in refusal(*command)
    (tmp_path / "c.jsonl").write_text(json.dumps({**rows[0], "bonus": 1}))
    said = refusal(*command[:3], tmp_path / "c.jsonl", *command[5:7], "--out", tmp_path / "new")
    assert "failed on row row 0" in said and not (tmp_path / "new").exists()


def test_samples_are_a_draw_and_a_smaller_one_is_part_of_it(own, tmp_path):
    from evals import subject

    draws = [subject.drawn(list(range(100)), n, "x") for n in (10, 20, 0)]
    assert draws[0] == sorted(draws[0]) and set(draws[0]) < set(draws[1]) and draws[2] == list(range(100))
    folder, _ = own
    command = ["eval_data.py", TINY, "--max-tokens", 9, "--out", tmp_path / "out", "--data"]
    assert "--samples 9: --data has only 8" in refusal(
        *command, folder / "a.jsonl", folder / "b.jsonl", "--samples", 9
    )
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((folder / "a.jsonl").read_bytes())
    said = refusal(*command, folder / "a.jsonl", copy)
    assert "the id 'row 0' is in a.jsonl and in copy.jsonl" in said


def test_help_names_what_it_takes():
    text = run_here("eval_data.py", "--help")
    assert "--truncate-prompts" in text and "--task" in text and "--log-prompts" in text
