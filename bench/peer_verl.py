"""verl's actor (DataParallelPPOActor) as an entrant of bench/peers.py, which starts it with the Python of
.venv-peers.

verl 0.7.1 is the last release that has this actor and the first with a prefix grouper. As released its
updates do not work with it, and are made to here: (1) update_policy takes a dictionary from the forward,
the prefix grouper's gives a pair; (2) with transformers' "sdpa" attention, the only one for a CPU that verl
names, the prefix grouper's masks of padding reach the kernel as they are, and nothing is causal (gradients
differ by three times their norm); (3) apply_monkey_patch imports what TRL has no longer. The model is
transformers', not sharded, as one process needs no FSDP.
"""

import numpy
import safetensors.torch
import torch
import transformers
from peer_turns import Turns
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from verl import DataProto
from verl.models.transformers.monkey_patch import apply_prefix_grouper_patch
from verl.trainer.ppo import prefix_grouper_utils
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig

turns = Turns()
job = turns.job
groups, G = job["groups"], job["completions"]
prefix, rows = job["how"] == "prefix", len(groups) * G
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
if prefix:
    sdpa, forward = (
        ALL_ATTENTION_FUNCTIONS["sdpa"],
        prefix_grouper_utils.forward_micro_batch_with_prefix_grouper,
    )

    def causal(module, query, key, value, mask, **more):
        if mask is not None and mask.dim() == 2:  # (B, S): which keys are none of padding
            T, S = query.size(2), key.size(2)
            mask = mask[:, None, None] & torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return sdpa(module, query, key, value, mask, **more)

    def dictionary(**inputs):
        entropy, log_probs = forward(**inputs)
        return {"log_probs": log_probs, "entropys": entropy}

    ALL_ATTENTION_FUNCTIONS["sdpa"] = causal
    prefix_grouper_utils.forward_micro_batch_with_prefix_grouper = dictionary
    apply_prefix_grouper_patch()  # it wraps the attention above
config = FSDPActorConfig(
    strategy="fsdp",
    rollout_n=G,
    ppo_mini_batch_size=rows,
    ppo_micro_batch_size_per_gpu=job["micro_batch"],
    clip_ratio_high=0.28,
    clip_ratio_c=10.0,
    use_torch_compile=False,
    use_prefix_grouper=prefix,
    grad_clip=1e9,
    fsdp_config=FSDPEngineConfig(dtype="float32", use_torch_compile=False),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
actor = DataParallelPPOActor(config, model, optimizer)

prompts = torch.tensor([group["prompt"] for group in groups for _ in range(G)])
responses = torch.tensor([ids for group in groups for ids in group["completions"]])
rewards = torch.tensor([group["rewards"] for group in groups])
advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)  # as TRL's
ids = torch.cat((prompts, responses), 1)
tensors = {
    "prompts": prompts,
    "responses": responses,
    "response_mask": torch.ones_like(responses),
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "position_ids": torch.arange(ids.size(1)).expand_as(ids).clone(),
    "old_log_probs": torch.zeros(responses.shape),
    "advantages": advantages.flatten()[:, None].expand(responses.shape).clone(),
}
uid = numpy.array([str(i // G) for i in range(rows)], dtype=object)
# A token id that no prompt has: the prefix grouper takes every pad token of a prompt for padding.
data = DataProto.from_dict(tensors, {"uid": uid}, {"temperature": 1.0, "pad_token_id": -1})
gradients = {}


def note(optimizer, args, kwargs):
    gradients.update({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    safetensors.torch.save_file(gradients, job["gradients"])
    hook.remove()


hook = optimizer.register_step_pre_hook(note)
per_group = prompts.size(1) + G * responses.size(1)
tokens = len(groups) * per_group * max(1, G // job["micro_batch"]) if prefix else ids.numel()
turns.ready(verl="0.7.1", transformers=transformers.__version__, torch=torch.__version__)
while True:
    turns.wait()
    metrics = actor.update_policy(data)
    turns.done(loss=metrics["actor/pg_loss"], tokens=tokens)
