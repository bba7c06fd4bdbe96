"""Ours as an entrant of bench/peers.py: the parts of train.py's step, on the job's completions or vLLM's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import safetensors.torch
import torch
from peer_turns import Turns
from torch.nn.utils import clip_grad_norm_

import dapo
import grpo
import saliency
from base import processes
from core import schedule
from model import Qwen3, compile_elementwise
from prompts import chat
from rollout import Completion, Group, Rollout

turns = Turns()
job = turns.job
G, R, device = job["completions"], job["max_completion"], torch.device("cpu")
model = Qwen3.from_pretrained(job["model"])
if job["how"] == "compile":
    compile_elementwise()
tokenizer = chat.load_tokenizer(job["model"], model.config.vocab_size)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # every turn does the same work
if "gradients" not in job:
    processes.rank_and_device()
    processes.connect(device)
    engine = Rollout(job["model"], max(len(each["prompt"]) for each in job["groups"]) + R, "float32")


def given(number, group):
    completions = [Completion(ids, [0.0] * len(ids), True) for ids in group["completions"]]
    return Group(number, group["prompt"], completions, torch.tensor(group["rewards"]))


def sample():
    """Groups from vLLM, with rewards."""
    prompts = [group["prompt"] for group in job["groups"]]
    seeds = [i * 2**20 for i in range(len(prompts))]
    sampled = engine.generate(prompts, G, 1.0, R, seeds, chat.stop_ids(tokenizer))
    groups = []
    for number, (group, completions) in enumerate(zip(job["groups"], sampled, strict=True)):
        texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
        rewards = torch.tensor([float(text.strip() == group["answer"]) for text in texts])
        groups.append(Group(number, group["prompt"], completions, rewards))
    return groups


def train(groups):
    """Forward and backward of all groups, as train.py's train_group and train_pass -> the loss."""
    totals, losses = grpo.Totals(len(groups) * G, sum(sum(group.lengths) for group in groups), R), []
    for group, passes, _ in schedule.work_for_rank(groups, 0, 1, 8192):
        advantages = grpo.advantages(group.rewards, eps=1e-4)  # TRL's
        prompt = model.read(torch.tensor(group.prompt))
        leaves = prompt.detach()
        for part in passes:
            logprobs, _ = model.completion_logprobs(leaves, group.completion_ids(part, device))
            lengths = [group.lengths[i] for i in part]
            of_tokens = advantages[part].repeat_interleave(torch.tensor(lengths))
            loss, _ = dapo.loss(logprobs, logprobs.detach(), of_tokens, lengths, totals)
            loss.backward()
            losses.append(loss.item())
        prompt.backward(leaves)
    return sum(losses)


turns.ready(torch=torch.__version__)
first = True
while True:
    turns.wait()
    groups = [given(i, group) for i, group in enumerate(job["groups"])] if "gradients" in job else sample()
    with saliency.Tracker(model) as tracker:
        loss = train(groups)
    if first and "gradients" in job:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        safetensors.torch.save_file(gradients, job["gradients"])
    masks = saliency.select_rows(tracker.magnitudes())
    squares = saliency.mask_gradients(model, masks)
    clip_grad_norm_(model.parameters(), 1e9)
    saliency.masked_step(optimizer, model, masks, squares)
    optimizer.zero_grad()
    if "gradients" not in job:
        engine.sync(model)
    turns.done(loss=loss, tokens=sum(group.tokens for group in groups))
    first = False
