"""A checkpoint as train.py writes it, in lm-evaluation-harness. Skipped where that is not installed:
requirements-lm-eval.txt says how, and why `make test` does without."""

import pytest
import torch
from conftest import ROOT

from model import Qwen3
from prompts.chat import load_tokenizer
from prompts.chat import render as chat

pytest.importorskip("lm_eval", reason="needs requirements-lm-eval.txt")

TINY = ROOT / "assets" / "tiny"
PASSAGE = "The code for Maria is lamp river stone. What is the code for Maria?"


def test_our_checkpoint_is_read_by_lm_evaluation_harness(tmp_path):
    """Its log-likelihoods, its greedy completion and its chat template are ours."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = Qwen3.from_pretrained(TINY), load_tokenizer(TINY, 896)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)  # not assets/tiny's own file
    model.save_pretrained(tmp_path / "checkpoint", companions_from=TINY)
    lm = HFLM(
        pretrained=str(tmp_path / "checkpoint"),
        device="cpu",
        dtype="float32",
        batch_size=1,
        enable_thinking=False,
    )

    prompt = lm.apply_chat_template([{"role": "user", "content": PASSAGE}])
    assert prompt == chat(tokenizer, [{"role": "user", "content": PASSAGE}], thinking=False)

    begun = tokenizer.encode(
        PASSAGE, add_special_tokens=False
    ).ids  # the harness takes space at a text's end from it
    answers = [" lamp river stone", " stone river lamp", " The"]
    asked = [Instance("loglikelihood", {}, (PASSAGE, answer), i) for i, answer in enumerate(answers)]
    for answer, (found, greedy) in zip(answers, lm.loglikelihood(asked, disable_tqdm=True)):
        end = tokenizer.encode(answer, add_special_tokens=False).ids
        with torch.no_grad():
            logits = model(torch.tensor([begun + end]))[0, len(begun) - 1 : -1]  # (answer tokens, V)
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(end)[:, None]).sum().item()
        assert found == pytest.approx(wanted, abs=1e-3) and greedy == (logits.argmax(-1).tolist() == end)

    ids, ours = tokenizer.encode(prompt, add_special_tokens=False).ids, []
    how = {"until": ["<|im_end|>"], "max_gen_toks": 8, "do_sample": False}
    [completion] = lm.generate_until([Instance("generate_until", {}, (prompt, how), 0)], disable_tqdm=True)
    with torch.no_grad():
        while len(ours) < 8 and ours[-1:] != [tokenizer.token_to_id("<|im_end|>")]:
            ours.append(model(torch.tensor([ids + ours]))[0, -1].argmax().item())
    assert completion == tokenizer.decode(ours, skip_special_tokens=True) != ""
