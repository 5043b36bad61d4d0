"""Memory and time in docs/recipes.md: what torch keeps, and what benchmark/memory.py computes."""

import re
import sys

import pytest
import torch
import tyro
from conftest import build
from scripts import ROOT
from torch.autograd.graph import saved_tensors_hooks

from p3o_v2 import response_logps, set_up_model

sys.path.insert(0, str(ROOT / "benchmark"))
import memory  # noqa: E402
from random_model import config_of  # noqa: E402


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}, {"unfrozen_layers": 1}])
@pytest.mark.parametrize("shape, width", memory.KEPT)
def test_weights_and_activations_take_the_computed_bytes(shape, width, flags):
    """Weights exactly. Activations: what a second layer adds, within 5 %."""
    args = memory.Args(dtype={4: "float32", 2: "bfloat16"}[width], micro_batch_size=2, **flags)
    args.num_responses, args.max_prompt_tokens, args.max_response_tokens = 2, 70, 33
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"head_dim": 128, "intermediate_size": {"gpt_neox": 1024, "llama": 896}[shape]}
    found, expected = [], []
    for layers in (1, 2):
        model = build(shape, "policy", 1, num_hidden_layers=layers, **sizes)
        parts = memory.memory(args, model.config)[1]
        set_up_model(model, args, trainable=True)
        real = sum(weight.nbytes for weight in model.parameters())
        assert parts["trained weights"] + parts.get("frozen weights of the policy", 0) == real
        saved = []
        hooks = saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16, width == 2):
            response_logps(model, [torch.arange(71)] * 2, [[torch.arange(32)] * 2] * 2, 1.0)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        copies = {weight.numel() * width for weight in model.parameters()}
        found.append(sum(size for size in storages.values() if size not in copies))
        expected.append(parts["activations"])
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], rel=0.05)


def test_the_tables_of_memory_and_time_are_computed():
    table = (ROOT / "docs/recipes.md").read_text().split("| command |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        _, command, *shown, _ = re.sub(r" --dataset \w+", "", line).split("|")
        if "TFLOP/s" in command:
            speed = int(re.search(r"(\d+) TFLOP/s", command)[1])
            continue
        launcher, script, flags = re.fullmatch(r" `(.*?)(\w+)\.py (.*)` ", command).groups()
        processes = re.search(r"\d+|$", launcher)[0] or 1
        options = f"--script {script} --tflops {speed} --processes {processes} {flags}".split()
        args = tyro.cli(memory.Args, args=options, config=(tyro.conf.FlagCreatePairsOff,))
        config = config_of(args.model)
        numbers = [sum(parts.values()) / 2**30 for parts in memory.memory(args, config)]
        assert max(numbers) < (23 if speed < 100 else 77), line
        numbers.append(sum(memory.seconds(args, config)) if script in memory.ONLINE else 0)
        assert shown == [f" {number:.1f} " if number else " – " for number in numbers], line
