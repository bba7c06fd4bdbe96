"""Plain forward and backward of model.py beside transformers' Qwen3: same weights, same tokens, in turn.

python bench/dense.py            # the laptop's shape on a CPU, Qwen3-0.6B's on a GPU; fp32 and bf16

transformers runs its "sdpa" attention, its fastest that is everywhere. Prints a line per shape and dtype: seconds of each and
ours / theirs (below 1: ours is faster). On a GPU it also says which attention kernel ran and fails if it is not flash.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from measure import seconds
from shapes import build, card
from torch.profiler import ProfilerActivity, profile

from model import Qwen3

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = build("0.6B" if device.type == "cuda" else "laptop")
print(card(config))
for dtype in (torch.float32, torch.bfloat16):
    ours = Qwen3.from_config(config, dtype, device)
    with torch.device(device):
        theirs = transformers.Qwen3ForCausalLM._from_config(
            transformers.Qwen3Config(**config.to_dict(dtype)), attn_implementation="sdpa", dtype=dtype
        )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for rows, length in ((4, 512), (1, 4096)):
        ids = torch.randint(0, config.vocab_size, (rows, length), device=device)

        def run(model, logits):
            logits(model(ids)).mean().backward()
            model.zero_grad()

        def run_ours():
            run(ours, lambda result: result)

        def run_theirs():
            run(theirs, lambda result: result.logits)

        slow = device.type == "cpu" and dtype == torch.bfloat16  # CPUs without bf16 units take half a minute a run
        mine, other = seconds(run_ours, run_theirs, rounds=2 if slow else 12)
        print(f"{str(dtype):15} {rows} x {length}: ours {mine:.3f} s, transformers {other:.3f} s, ratio {mine / other:.2f}")
    if device.type == "cuda" and dtype == torch.bfloat16:
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            run_ours()
        kernels = sorted({event.key for event in record.key_averages() if "flash" in event.key})
        print("attention kernels:", *kernels or ["none of them flash"], sep="\n  ")
        sys.exit(not kernels)
