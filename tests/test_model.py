"""model.py against transformers' Qwen3 and against its own dense layout."""

import json

import pytest
import torch
import transformers
from conftest import FAMILIES, LLAMA3, SMALL, make_small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base.cli import BadInput
from core import attention, checkpoint
from model import Head, Qwen3, Qwen3Config
from saliency import Tracker

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def reference(model, path, **kwargs):
    model.save_pretrained(path)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)


@pytest.mark.parametrize(
    "family, tied, rope",
    [
        ("qwen3", True, None),
        ("qwen3", False, YARN),
        ("qwen3", True, {**YARN, "factor": 2.5, "beta_fast": 16, "truncate": False}),
        ("llama", True, LLAMA3),
        ("llama", False, {"rope_type": "linear", "factor": 4.0}),
        ("qwen2", True, None),
        ("qwen2", False, YARN),
    ],
)
def test_logits_and_every_gradient_agree_with_transformers(family, tied, rope, tmp_path):
    """The logits to the bit: both call the same attention kernel."""
    ours = make_small(tied, **{**FAMILIES[family], "rope_scaling": rope})
    theirs = reference(ours, tmp_path / "checkpoint", attn_implementation="sdpa")
    assert type(theirs).__name__ == checkpoint.FAMILIES[family]
    ids = torch.randint(0, 101, (2, 200))
    logits, expected = ours(ids), theirs(ids).logits
    assert torch.equal(logits, expected)
    weights = torch.randn(logits.shape)
    (logits * weights).mean().backward()
    (expected * weights).mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        {"rope_parameters": {"rope_theta": 5e5, **YARN}},
        {"rope_parameters": {"rope_theta": 5e5, **YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {"rope_parameters": {"rope_theta": 5e5, **YARN, "attention_factor": 1.5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_rope_of_old_and_new_configs_equals_transformers(raw):
    config = {**SMALL, "tie_word_embeddings": True, "model_type": "qwen3", **raw}
    frequencies, factor = attention.rope_frequencies(Qwen3Config.from_dict(config))
    rotary = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(transformers.Qwen3Config(**config))
    torch.testing.assert_close(frequencies, rotary.inv_freq, atol=0, rtol=1e-6)
    assert factor == pytest.approx(rotary.attention_scaling)


def test_yarn_of_the_model_card_has_the_published_constants():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = Qwen3Config(*checkpoint.SIZES["8B"], rope_scaling=yarn)
    plain, _ = attention.rope_frequencies(Qwen3Config.preset("8B"))
    frequencies, factor = attention.rope_frequencies(config)
    assert factor == pytest.approx(1.138629, abs=1e-6)
    torch.testing.assert_close(frequencies[:24], plain[:24])
    torch.testing.assert_close(frequencies[40:], plain[40:] / 4)
    assert config.context_length == 131072


@pytest.mark.parametrize(
    "name, millions",
    [
        ("0.6B", 596.0),
        ("1.7B", 1720.6),
        ("4B-Base", 4022.5),
        ("8B", 8190.7),
        ("14B-Base", 14768.3),
        ("32B", 32762.1),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = Qwen3(Qwen3Config.preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert Qwen3Config.preset(name).eos_token_id == (151643 if name.endswith("Base") else 151645)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "smollm3"}, "smollm3"),  # layers without RoPE
        ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "SequenceClassification"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3 needs low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be less than high_freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "linear needs factor"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_theta": None}, "rope_theta"),
        ({"num_key_value_heads": 3}, "share"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "hidden_size": 50}, "no multiple of 4 heads"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "sliding-window"),
        ({"model_type": "qwen2"}, "head_dim 16 is not hidden_size / num_attention_heads, 12"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, word):
    config = {**SMALL, "tie_word_embeddings": True, "model_type": "qwen3", "rope_theta": 1e6}
    Qwen3Config.from_dict(config)
    with pytest.raises(BadInput, match=word):
        Qwen3Config.from_dict({**config, **change})


@pytest.mark.parametrize(
    "family, theirs", [("llama", transformers.LlamaConfig), ("qwen2", transformers.Qwen2Config)]
)
def test_keys_that_old_files_lack_are_what_transformers_takes_for_them(family, theirs):
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    raw = {key: SMALL[key] for key in kept} | {"num_key_value_heads": None, "rope_theta": 1e4}
    ours = Qwen3Config.from_dict({**raw, "model_type": family})
    theirs = theirs(**{**raw, "num_key_value_heads": 4})
    assert ours.head_dim == 12
    for key in ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert Qwen3Config.from_dict({**raw, "model_type": "llama", "rope_theta": 1e4}).rope_theta == 1e4


def test_missing_config_keys_are_named():
    with pytest.raises(BadInput, match="hidden_size, num_hidden_layers missing"):
        raw = {**SMALL, "tie_word_embeddings": True, "model_type": "qwen3", "rope_theta": 1e6}
        del raw["hidden_size"], raw["num_hidden_layers"]
        Qwen3Config.from_dict(raw)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    "family, tied, dtype",
    [
        ("qwen3", True, torch.float32),
        ("qwen3", False, torch.bfloat16),
        ("llama", False, torch.float32),
        ("qwen2", True, torch.bfloat16),
    ],
)
def test_sharded_checkpoints_round_trip_and_load_in_transformers(family, tied, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    ours = make_small(tied, **FAMILIES[family])
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "tokenizer.json").write_text("{}")
    ours.save_pretrained(tmp_path / "checkpoint", dtype, companions_from=tmp_path / "from")
    ours.save_pretrained(
        tmp_path / "checkpoint", dtype, companions_from=tmp_path / "from"
    )  # replaces the first
    index = json.loads((tmp_path / "checkpoint" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "from"]
    assert (tmp_path / "checkpoint" / "tokenizer.json").exists()
    again = Qwen3.from_pretrained(tmp_path / "checkpoint")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = parameter.to(dtype).float()
        assert torch.equal(dict(again.named_parameters())[name], expected), name
        assert torch.equal(theirs[name], expected), name


@pytest.mark.parametrize(
    "family, rope", [("qwen3", YARN), ("llama", LLAMA3), ("qwen2", {"rope_type": "default"})]
)
def test_a_checkpoint_written_by_transformers_loads(family, rope, tmp_path):
    sizes = {**SMALL, "hidden_size": 64, "tie_word_embeddings": family == "qwen3"}
    config = transformers.AutoConfig.for_model(family, **sizes, rope_parameters={"rope_theta": 5e5, **rope})
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ours = Qwen3.from_pretrained(tmp_path)
    ids = torch.randint(0, 101, (1, 50))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-4)


def drop(tensors, config):
    del tensors["model.norm.weight"]
    return "lacks tensor model.norm.weight"


def misshape(tensors, config):
    tensors["model.norm.weight"] = torch.ones(47)
    return r"model.norm.weight has shape \[47\], config.json makes it \[48\]"


def extra(tensors, config):
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(3)
    return "unexpected tensor model.layers.9"


@pytest.mark.parametrize("damage", [drop, misshape, extra])
def test_missing_misshapen_and_unexpected_tensors_are_named(damage, small, tmp_path):
    small.save_pretrained(tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    message = damage(tensors, None)
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    with pytest.raises(BadInput, match=message):
        Qwen3.from_pretrained(tmp_path / "c")


def test_broken_directories_are_named(small, tmp_path):
    with pytest.raises(BadInput, match="no config.json"):
        Qwen3.from_pretrained(tmp_path / "nothing")
    small.save_pretrained(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(BadInput, match="not a readable safetensors"):
        Qwen3.from_pretrained(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="neither model.safetensors nor"):
        Qwen3.from_pretrained(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(BadInput, match="gone.safetensors is missing"):
        Qwen3.from_pretrained(tmp_path / "c")


# ---------------------------------------------------------------------------------------------- shared prefix


def dense(model, prompt, completions, temperature):
    """One row per completion, full logits, no sharing -> list of log-probabilities and of entropies."""
    logprobs, entropies = [], []
    for completion in completions:
        logits = model(torch.cat((prompt, completion))[None])[0, len(prompt) - 1 : -1] / temperature
        table = logits.log_softmax(-1)
        logprobs.append(table.gather(-1, completion[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    return logprobs, entropies


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 50),
    st.sampled_from([*FAMILIES]),
)
def test_group_logprobs_equal_the_dense_layout(
    prompt_length, lengths, temperature, tied, checkpointing, chunk, family
):
    model = make_small(tied, **FAMILIES[family])
    model.checkpointing, model.lm_head.chunk = checkpointing, chunk
    prompt = torch.randint(0, 101, (prompt_length,))
    completions = [torch.randint(0, 101, (n,)) for n in lengths]
    expected, expected_entropies = dense(model, prompt, completions, temperature)
    weights = [torch.randn(n) for n in lengths]

    def gradients(logprobs, entropies):
        model.zero_grad()
        sum(
            (w * (lp + 0.3 * e)).sum() for w, lp, e in zip(weights, logprobs, entropies, strict=True)
        ).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected_gradients = gradients(expected, expected_entropies)
    logprobs, entropies = model.group_logprobs(prompt, completions, temperature, entropy=True)
    assert [lp.dtype for lp in logprobs] == [torch.float32] * len(lengths)
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-4, rtol=1e-4)
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in gradients(logprobs, entropies).items():
        torch.testing.assert_close(
            gradient / scale, expected_gradients[name] / scale, atol=1e-5, rtol=1e-4, msg=name
        )


def test_the_prompt_passes_through_the_network_once(small):
    seen = []
    small.model.layers[0].mlp.register_forward_hook(
        lambda module, args, out: seen.append(out.shape[:2].numel())
    )
    last, heads = [], []
    small.model.layers[-1].mlp.register_forward_hook(
        lambda module, args, out: last.append(out.shape[:2].numel())
    )
    small.lm_head.register_forward_hook(lambda module, args, out: heads.append(out[0].shape[0]))
    small.group_logprobs(torch.arange(50), [torch.arange(n) + 1 for n in (3, 7, 5)])
    assert seen == [50, 15]
    assert last == [1, 15]  # the last layer's keys and values of a prompt are wanted, and its last token
    assert heads == [15]  # logits of completion tokens only


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(["qwen3 proj", "qwen3 norm", "llama proj", "qwen2 proj"]),
    st.randoms(use_true_random=False),
)
def test_two_stage_backward_equals_one_pass(prompt_length, lengths, passes, checkpointing, which, rng):
    """Any split of the completions, in any order: the same log-probabilities, gradients and magnitudes."""
    family, site = which.split()
    model = make_small(tied=rng.random() < 0.5, **FAMILIES[family])
    prompt = torch.randint(0, 101, (prompt_length,))
    completions = [torch.randint(0, 101, (n,)) for n in lengths]
    weights = [torch.randn(n) for n in lengths]

    def loss(indices, logprobs, entropies):
        return sum(
            (weights[i] * (lp + 0.3 * e)).sum() for i, lp, e in zip(indices, logprobs, entropies, strict=True)
        )

    def outcome(tracker):
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        return gradients, tracker.magnitudes()

    with Tracker(model, site) as tracker:
        expected, entropies = model.group_logprobs(prompt, completions, 1.3, entropy=True)
        loss(range(len(lengths)), expected, entropies).backward()
    expected_gradients, expected_magnitudes = outcome(tracker)

    model.checkpointing, model.attention_recompute = checkpointing, rng.random() < 0.5
    order = rng.sample(range(len(lengths)), len(lengths))
    parts = [part for i in range(passes) if (part := order[i::passes])]
    with Tracker(model, site) as tracker:
        read = model.read(prompt)
        leaves = read.detach()
        for part in parts:
            results = model.completion_logprobs(leaves, [completions[i] for i in part], 1.3)
            logprobs, entropies = (list(result.split([lengths[i] for i in part])) for result in results)
            torch.testing.assert_close(logprobs, [expected[i] for i in part], atol=1e-5, rtol=1e-5)
            loss(part, logprobs, entropies).backward()
        read.backward(leaves)
    gradients, magnitudes = outcome(tracker)
    torch.testing.assert_close(magnitudes, expected_magnitudes, rtol=1e-5, atol=0)
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient / scale, expected_gradients[name] / scale, atol=1e-5, rtol=1e-4, msg=name
        )


def test_attention_that_is_kept_changes_no_bit_of_a_gradient():
    """It is the same kernel's result, the second time from memory."""
    gradients = []
    for again in (True, False):
        model = make_small()
        model.checkpointing, model.attention_recompute = True, again
        completions = [torch.arange(n) + 3 for n in (7, 1, 12)]
        torch.cat(model.group_logprobs(torch.arange(60), completions)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_untied_head_gets_no_embedding():
    """FSDP2 makes a gradient of zeros of whatever a module is given and does not use."""
    given = []
    for tied in (True, False):
        model = make_small(tied)
        model.lm_head.register_forward_pre_hook(
            lambda module, args, named: given.extend([*args, named]), with_kwargs=True
        )
        model.group_logprobs(torch.arange(5), [torch.arange(3)])
        has = [x for x in given if x is model.model.embed_tokens.weight]
        assert len(has) == tied


def test_logprobs_of_masked_tokens_equal_full_logits(small):
    ids, mask = torch.randint(0, 101, (3, 20)), torch.rand(3, 20) < 0.4
    mask[:, 0] = False
    table = small(ids).log_softmax(-1)[:, :-1]
    expected = table.gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:]]
    torch.testing.assert_close(small.logprobs(ids, mask), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from([*FAMILIES]),
)
def test_packed_documents_equal_documents_alone(lengths, tied, checkpointing, seed, family):
    """Values and gradients of one row of documents, against each document as a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    model = make_small(tied, seed=seed % 7, **FAMILIES[family])
    model.lm_head.chunk = 7
    documents = [torch.randint(0, 101, (n,), generator=generator) for n in (2, *lengths)]
    masks = [torch.rand(len(ids), generator=generator) < 0.6 for ids in documents]
    for mask in masks:
        mask[0] = False  # nothing predicts it, least of all the document before
    masks[0][1] = True
    alone = torch.cat(
        [model.logprobs(ids[None], mask[None]) for ids, mask in zip(documents, masks) if mask.any()]
    )
    weights = torch.randn(len(alone), generator=generator)
    (weights * alone).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.checkpointing = checkpointing
    packed = model.logprobs(
        torch.cat(documents)[None], torch.cat(masks)[None], [len(ids) for ids in documents]
    )
    (weights * packed).sum().backward()
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    scale = max(g.abs().max() for g in expected.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad / scale, expected[name] / scale, atol=1e-5, rtol=1e-4, msg=name
        )


def test_packing_makes_no_mask_of_all_pairs_and_no_logits_of_all_tokens(small):
    small.lm_head.chunk = 7
    lengths = [3, 50, 1, 46]
    ids, mask = torch.randint(0, 101, (1, 100)), torch.ones(1, 100, dtype=torch.bool)
    mask[0, [0, 3, 53, 54]] = False
    with LargestTensor() as largest:
        small.logprobs(ids, mask, lengths).sum().backward()
    assert largest.elements == 100 * 80  # the MLP; all pairs would be 100 * 100, all logits 100 * 101


@pytest.mark.parametrize("prompt, completions", [(0, [3]), (3, [2, 0]), (3, [])])
def test_empty_prompts_and_completions_are_refused(small, prompt, completions):
    with pytest.raises(ValueError, match="at least one token"):
        small.group_logprobs(torch.arange(prompt), [torch.arange(n) for n in completions])


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_never_holds_more_logits_than_a_chunk(temperature):
    """7 does not divide 60; the chunked head gives the values and gradients of all logits at once."""
    head = Head(Qwen3Config(**SMALL, tie_word_embeddings=False))
    torch.nn.init.normal_(head.weight)
    head.chunk = 7
    hidden, targets = torch.randn(60, 48, requires_grad=True), torch.randint(0, 101, (60,))
    weights = torch.randn(2, 60)
    with LargestTensor() as largest:
        logprobs, entropies = head(hidden, targets, temperature)
        (weights[0] * logprobs + weights[1] * entropies).sum().backward()
    assert largest.elements == 48 * 101  # the gradient of the weight; all logits would be 60 * 101
    gradients = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    table = (head(hidden) / temperature).log_softmax(-1)
    expected = table.gather(-1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
    (weights[0] * expected[0] + weights[1] * expected[1]).sum().backward()
    torch.testing.assert_close((logprobs, entropies), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, (hidden.grad, head.weight.grad), atol=1e-5, rtol=1e-5)
