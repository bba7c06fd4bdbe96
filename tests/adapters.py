"""Run by core/test_lora.py in a process that has imported vLLM: PEFT and vLLM read an adapter directory.

    python tests/adapters.py BASE OUT

BASE: a checkpoint; OUT: what a model of it with an update wrote, OUT/adapter; OUT/expected.safetensors has
its ids, logits and factors.
"""

import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

base, out = map(Path, sys.argv[1:])
expected = load_file(out / "expected.safetensors")
ids, logits = expected.pop("ids"), expected.pop("logits")

model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, out / "adapter")
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
factors = {name: each for name, each in model.named_parameters() if "lora_" in name}
assert len(factors) == len(expected)

helper = PEFTHelper.from_local_dir(str(out / "adapter"), max_position_embeddings=256)
modules = {name.rsplit(".", 3)[1] for name in expected}
loaded = LoRAModel.from_local_checkpoint(str(out / "adapter"), modules, helper, device="cpu")
assert helper.vllm_lora_scaling_factor == 2 and 2 * len(loaded.loras) == len(expected)
for name, both in loaded.loras.items():
    assert torch.equal(both.lora_a, expected[f"{name}.lora_A.weight"])
    assert torch.equal(both.lora_b, expected[f"{name}.lora_B.weight"])
print(f"{len(expected)} factors, twice")
