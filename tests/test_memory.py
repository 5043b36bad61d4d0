"""docs/recipes.md's figures of memory and time: exact where they say so, and those of the formulas."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import build
from transformers import AutoConfig, AutoModelForCausalLM

import p3o_v2

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import memory  # noqa: E402
from random_model import config_of  # noqa: E402

each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@each_dtype
@pytest.mark.parametrize("unfrozen", [0, 1])
def test_computed_bytes_of_what_is_trained_and_frozen_are_exact(dtype, unfrozen):
    folder = ROOT / "tiny/sft"
    args = SimpleNamespace(unfrozen_layers=unfrozen, dtype=dtype, gradient_checkpointing=False)
    policy, reference = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
    p3o_v2.set_up_model(policy, args, True)
    p3o_v2.set_up_model(reference, args, False)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-4, fused=True)
    with torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16"):
        policy(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    frozen = [weight for weight in policy.parameters() if not weight.requires_grad]
    real = {
        "trained weights": nbytes(trained),
        "gradients": nbytes(weight.grad for weight in trained),
        "AdamW": sum(nbytes(state.values()) for state in optimizer.state.values()),
        "reference": nbytes(reference.parameters()),
    }
    if unfrozen:
        real["frozen weights of the policy"] = nbytes(frozen)
    options = memory.Args(script="p3o_v2", dtype=dtype, unfrozen_layers=unfrozen)
    _, computed = memory.memory(options, AutoConfig.from_pretrained(folder))
    assert {name: computed[name] for name in real} == real


@each_dtype
@pytest.mark.parametrize("shape", ["gpt_neox", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_computed_activations_are_those_that_torch_keeps(shape, dtype, checkpointing):
    hidden = 256
    args = SimpleNamespace(unfrozen_layers=0, dtype=dtype, gradient_checkpointing=checkpointing)
    found = []
    for layers in (1, 2):
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 2}
        sizes["intermediate_size"] = int(hidden * (4 if shape == "gpt_neox" else 3.5))
        sizes |= {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 256}
        model = build(shape, "policy", 1, **sizes)
        p3o_v2.set_up_model(model, args, True)
        weights = {weight.numel() for weight in model.parameters() if weight.ndim == 2}
        owned = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept, alive = {}, []

        def keep(tensor, owned=owned, kept=kept, alive=alive, weights=weights):
            alive.append(tensor)  # so that no address is used twice
            storage = tensor.untyped_storage()
            is_copy = tensor.ndim == 2 and tensor.numel() in weights
            if storage.data_ptr() not in owned and not is_copy:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        prompts, responses = [torch.arange(71)] * 2, [[torch.arange(32)] * 2] * 2
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16"):
            p3o_v2.response_hidden(model, prompts, responses)
        found.append(sum(kept.values()))
    expected = 4 if checkpointing else memory.KEPT[shape, 4 if dtype == "float32" else 2]
    per_layer = found[1] - found[0]
    assert per_layer / (2 * (70 + 2 * 33) * hidden) == pytest.approx(expected, rel=0.05)


def test_the_tables_of_memory_and_time_are_computed():
    recipes = (ROOT / "docs/recipes.md").read_text()
    rows, speed = 0, 0
    for line in recipes.splitlines():
        speed = (re.findall(r"at (\d+) TFLOP/s", line) or [speed])[0]
        pattern = r"\| `(.*?)(\w+)\.py (--model pythia.*)` \| (.*) \| (.*) \| (.*) \|"
        match = re.fullmatch(pattern, line)
        if not match:
            continue
        launcher, script, flags, *shown = match.groups()
        flags = re.sub(r" --dataset \w+", "", flags).split()
        options = ["--script", script, "--tflops", speed, *flags]
        if processes := re.search(r"--num_processes (\d+)", launcher):
            options += ["--processes", processes[1]]
        args = tyro.cli(memory.Args, args=options, config=(tyro.conf.FlagCreatePairsOff,))
        config = config_of(args.model)
        numbers = [sum(parts.values()) / 2**30 for parts in memory.memory(args, config)]
        assert max(numbers) < (23 if int(speed) < 100 else 77), line
        is_online = script in memory.ONLINE
        numbers.append(sum(memory.seconds(args, config)) if is_online else 0)
        assert shown == [f"{number:.1f}" if number else "–" for number in numbers], line
        rows += 1
    assert rows == len(re.findall(r"^\| `[^`]*\.py --model pythia", recipes, re.M)) > 0
