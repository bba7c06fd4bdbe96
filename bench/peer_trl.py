"""TRL's GRPOTrainer as an entrant of bench/peers.py, which starts it with .venv-peers' Python.

It is trainer.train() itself, stopped before each step until its turn comes. A job with completions has them
put in by TRL's rollout_func; without, transformers generates. Blocks are not recomputed, which is faster.
"""

import datasets
import safetensors.torch
import torch
import transformers
import trl
from peer_turns import Turns

turns = Turns()
job = turns.job
groups, G, R = job["groups"], job["completions"], job["max_completion"]
tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
losses, tokens = [], []


def fixed(prompts, trainer):
    """The job's completions of each prompt, in its order; prompts are numbers of groups."""
    rows = [(int(number), i % G) for i, number in enumerate(prompts)]
    return {
        "prompt_ids": [groups[number]["prompt"] for number, _ in rows],
        "completion_ids": [groups[number]["completions"][i] for number, i in rows],
        "logprobs": None,
        "given": [groups[number]["rewards"][i] for number, i in rows],
    }


def given_rewards(given, **unused):
    return given


def exact(completions, answer, **unused):
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


class WhenAsked(transformers.TrainerCallback):
    def on_step_begin(self, *unused, **unused_too):
        losses.clear()
        tokens.clear()
        turns.wait()

    def on_pre_optimizer_step(self, args, state, control, model, **unused):
        if "gradients" in job and not state.global_step:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            safetensors.torch.save_file(gradients, job["gradients"])

    def on_step_end(self, *unused, **unused_too):
        turns.done(loss=sum(losses), tokens=sum(tokens))


class Trainer(trl.GRPOTrainer):
    """It only notes what passes by."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        losses.append(loss.item())
        tokens.append(inputs["prompt_ids"].numel() + inputs["completion_ids"].numel())
        return loss


args = trl.GRPOConfig(
    output_dir=job["directory"],
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    per_device_train_batch_size=job["micro_batch"],
    gradient_accumulation_steps=len(groups) * G // job["micro_batch"],
    num_generations=G,
    max_completion_length=R,
    loss_type="dapo",
    epsilon_high=0.28,
    beta=0.0,
    max_grad_norm=1e9,  # the norm is computed as ever, and the gradient stays as it is
    learning_rate=0.0,  # every turn does the same work
    lr_scheduler_type="constant",
    max_steps=job["turns"],
    shuffle_dataset=False,
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
if "gradients" in job:
    how = {"rollout_func": fixed, "reward_funcs": given_rewards}
    rows = [{"prompt": str(number)} for number in range(len(groups))]
else:
    how = {"reward_funcs": exact}
    rows = [{"prompt": group["text"], "answer": group["answer"]} for group in groups]
    if any(tokenizer(group["text"])["input_ids"] != group["prompt"] for group in groups):
        raise ValueError("transformers' tokenizer reads other tokens than ours: not the same work")
model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
trainer = Trainer(
    model=model,
    args=args,
    train_dataset=datasets.Dataset.from_list(rows * job["turns"]),
    processing_class=tokenizer,
    callbacks=[WhenAsked()],
    **how,
)
turns.ready(trl=trl.__version__, transformers=transformers.__version__, torch=torch.__version__)
trainer.train()
