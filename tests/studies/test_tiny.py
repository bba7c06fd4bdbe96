"""studies/tiny.py: how assets/tiny is made, in small."""

import json
import random

from conftest import ROOT, run_here

from model import Qwen3
from prompts import chat
from studies import tiny

TINY = ROOT / "assets" / "tiny"


def test_the_curriculum_makes_a_model_without_data(tmp_path):
    """A step of each stage; its conversations are the text of the chat template, its answers what is trained
    on."""
    flags = "--copy-until 99 --steps 2 --batch 2 --vocab-size 600 --hidden-size 16".split()
    run_here("studies/tiny.py", "--out", tmp_path / "new", *flags)
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["copy", "recall", "recall"]
    made = tmp_path / "new" / "checkpoint"
    assert Qwen3.from_pretrained(made).config.vocab_size == 600
    tokenizer, config = chat.load_tokenizer(TINY, 10**6), tiny.Config()
    ids, trained = tiny.conversation(tokenizer, random.Random(0), config, 0.5)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    answers = tokenizer.decode([i for i, t in zip(ids, trained) if t], skip_special_tokens=False).split(
        "<|im_end|>"
    )
    turns = text.split("</think>\n\n")[1:]
    assert len(turns) > 1 and answers == [*(turn.split("<|im_end|>")[0] for turn in turns), ""]
