"""What a run needs, computed: GPU memory by parts in GiB, and the seconds of an update where a speed is given.

    python benchmark/memory.py --model pythia-1b --dtype bfloat16
    python benchmark/memory.py --model FOLDER --script dpo --micro-batch-size 8 --gradient-checkpointing

Only the model's configuration is read; no weight is made. Weights, gradients and optimizer are exact. Activations,
cache and logits are upper bounds, with every prompt and response as long as the limits allow; what CUDA itself and its
allocator take is not counted. docs/recipes.md has the formulas.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from random_model import SHAPES, config_of
from transformers import AutoConfig, AutoModelForCausalLM

ONLINE, PAIRS = ("p3o_v1", "p3o_v2", "ppo", "online_dpo"), ("dpo", "ipo", "mpo", "reward_model")
GIB = 2**30
# Scripts of the second plan: a micro-batch is a number of prompts, the policy shares nothing with its reference, the
# cache is in float32 (rotary keys are, under autocast), logits are made of 128 tokens at a time.
SECOND_PLAN = ("p3o_v2", "sft", "reward_model")
# Bytes that a layer keeps for the backward pass, by token and unit of hidden size, measured by torch's hooks on saved
# tensors (tests/test_docs.py): GPT-NeoX, with a feed-forward part 4 times as wide; Llama, 3.5 times and gated.
KEPT = {("gpt_neox", 4): 74, ("gpt_neox", 2): 39, ("llama", 4): 98, ("llama", 2): 63}
MS_A_LAYER = (
    0.4  # of sampling a token, assumed: small kernels, whose launching takes longer than their work
)


@dataclass
class Args:
    model: str = (
        "pythia-1b"  # pythia-14m … pythia-6.9b, or a folder that has the model's config.json
    )
    script: Literal[(*ONLINE, *PAIRS, "sft")] = "p3o_v2"  # which script
    reward_fn: bool = False  # the reward is a function: no reward model in memory
    sharing: Literal["one", "ddp", "fsdp2", "zero2"] = (
        "one"  # one process, or how several share the work
    )
    processes: int = 1  # GPUs
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # this and what follows as the scripts have them
    )
    gradient_checkpointing: bool = False
    unfrozen_layers: int = 0
    prompts_per_update: int = 32
    num_responses: int = 4
    num_epochs: int = 4
    minibatch_size: int = 0  # 0: the script's own default
    micro_batch_size: int = 0  # 0: the script's own default
    sample_batch_size: int = 64
    max_prompt_tokens: int = 512
    max_response_tokens: int = 128
    eval_prompts: int = 256
    tflops: float = 0  # of a GPU, as reached in training: prints seconds too (about 0.4 of what its maker states)


def count(model, unfrozen):
    """(trained parameters, of these in the trunk's Linear modules, the frozen ones of both kinds, trained tensors)."""
    trunk = model.base_model
    layers = next(part for part in trunk.modules() if isinstance(part, torch.nn.ModuleList))
    model.requires_grad_(not unfrozen)
    if unfrozen:
        model.get_output_embeddings().requires_grad_(True)
        trunk.requires_grad_(False)
        layers[-unfrozen:].requires_grad_(True)
    linear = {
        id(p)
        for part in trunk.modules()
        if isinstance(part, torch.nn.Linear)
        for p in part.parameters()
    }
    numbers = {True: [0, 0], False: [0, 0]}
    for p in model.parameters():
        numbers[p.requires_grad][0] += p.numel()
        numbers[p.requires_grad][1] += p.numel() * (id(p) in linear)
    return *numbers[True], *numbers[False], sum(p.requires_grad for p in model.parameters())


def memory(args, config):
    """{part: bytes} of one GPU while sampling and while training."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    trained, linear, frozen, frozen_linear, tensors = count(model, args.unfrozen_layers)
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    width, online = {"float32": 4, "bfloat16": 2}[args.dtype], args.script in ONLINE
    second_plan = args.script in SECOND_PLAN
    trained_models = 2 if args.script == "ppo" else 1  # the value model is the second
    still = (
        4 * (frozen - frozen_linear) + width * frozen_linear
    )  # the policy's frozen part; the reference shares it
    reference = 4 * (trained - linear) + width * linear
    head = (
        0 if config.tie_word_embeddings else vocabulary * hidden
    )  # a reward or value model has none
    reward = 0 if args.reward_fn else still + reference - 4 * head
    if second_plan:
        reference += still
    n = trained + (trained - head) * (trained_models - 1)
    shards, sharing = max(args.processes, 1), args.sharing

    def common(gradients):
        weights, gradient, adam = 4 * n, 4 * n * gradients, 8 * n + 4 * tensors * trained_models
        parts = {"trained weights": weights, "gradients": gradient, "AdamW": adam}
        if sharing == "fsdp2":
            gathered = (
                4 * n
                if not gradients
                else 4 * trained_models * (trained - linear + 2 * linear // layers)
            )
            parts = {key: value / shards for key, value in parts.items()} | {
                "gathered weights": gathered
            }
        if (
            sharing == "zero2"
        ):  # and DeepSpeed's own copy of its share of the weights, and its bucket of gradients
            parts = {"trained weights": weights + 4 * n / shards, "gradients": gradient / shards}
            parts |= {"AdamW": adam / shards, "buckets": 4 * min(n, 500_000_000) * gradients}
        if sharing == "ddp" and not second_plan:
            parts["buckets"] = 4 * n
        if args.unfrozen_layers:
            parts["frozen weights of the policy"] = still
        if width == 2:
            parts["bfloat16 copies of trained weights"] = 2 * linear * trained_models
        return parts

    # Sampling, and the evaluations: all prompts at once. Then gradients are not there.
    prompts = (
        0
        if args.script in ("sft", "reward_model")
        else max(args.prompts_per_update * online, args.eval_prompts)
    )
    rows = (
        max(args.prompts_per_update * args.num_responses * online, args.eval_prompts)
        if prompts
        else 0
    )
    prompts, rows, heads = (
        math.ceil(prompts / shards),
        math.ceil(rows / shards),
        config.num_attention_heads,
    )
    if second_plan and rows:
        most = args.sample_batch_size
        updates = min(math.ceil(args.prompts_per_update / shards), most) * args.num_responses
        evaluated = min(math.ceil(args.eval_prompts / shards), most)
        prompts, rows = min(prompts, most), max(updates, evaluated)
    head_size = getattr(config, "head_dim", None) or hidden // heads
    keys = head_size * (getattr(config, "num_key_value_heads", None) or heads)
    kept = KEPT["llama" if getattr(config, "hidden_act", "gelu") == "silu" else "gpt_neox", width]
    judges = {"reference": reference, "reward model": reward}
    sampling = common(gradients=False) | judges if rows else {}
    if rows:
        tokens = args.max_prompt_tokens + args.max_response_tokens
        sampling["cache of keys and values"] = (
            2 * (4 if second_plan else width) * layers * keys * rows * tokens
        )
        reading = prompts * args.max_prompt_tokens * kept * hidden
        sampling["a layer reading the prompts, or drawing tokens"] = max(
            reading, 24 * rows * vocabulary
        )

    # Training: rows are x y_1 … y_K, and x is read once.
    group = args.num_responses if online else 2 if args.script in PAIRS else 1
    micro = args.micro_batch_size or (8 if args.script == "p3o_v2" else 32)
    groups = micro if second_plan else max(1, micro // group)
    groups = min(groups, math.ceil((args.minibatch_size or (8 if online else 32)) / shards))
    tokens = groups * (args.max_prompt_tokens + group * args.max_response_tokens)
    training = common(gradients=True) | (judges if online else {})
    depth = min(args.unfrozen_layers or layers, layers)  # what is frozen below keeps nothing
    activations = 4 * depth + kept if args.gradient_checkpointing else kept * depth
    training["activations"] = activations * tokens * hidden * trained_models
    logits = (
        groups * group * args.max_response_tokens * vocabulary * (args.script != "reward_model")
    )
    most = 128 * vocabulary if second_plan else 2**25
    training["logits, in parts"] = 12 * (
        min(logits, most) if second_plan or logits >= 2**27 else logits
    )
    return sampling, training


def seconds(args, config):
    """(sampling, training with scoring) of an update, at most."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    n = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    K = args.num_responses
    tokens = (
        args.prompts_per_update
        * (args.max_prompt_tokens + K * args.max_response_tokens)
        / max(args.processes, 1)
    )
    step = (
        3 if not args.unfrozen_layers else 1 + 2 * args.unfrozen_layers / config.num_hidden_layers
    )
    step += args.gradient_checkpointing
    forwards = (
        args.num_epochs * step * (2 if args.script == "ppo" else 1) + 1 + (not args.reward_fn)
    )
    forwards += args.script == "ppo" or args.dtype == "bfloat16"
    sampling = args.max_response_tokens * config.num_hidden_layers * MS_A_LAYER / 1000
    return sampling, 2 * n * tokens * forwards / (args.tflops * 1e12)


def main(args):
    config = (
        config_of(args.model) if args.model in SHAPES else AutoConfig.from_pretrained(args.model)
    )
    phases = dict(zip(("sampling", "training"), memory(args, config)))
    for name, parts in phases.items():
        if parts:
            print(f"{name}: {sum(parts.values()) / GIB:.1f} GiB")
            print(
                "".join(f"    {size / GIB:7.2f}  {part}\n" for part, size in parts.items() if size),
                end="",
            )
    print(f"peak: {max(sum(parts.values()) for parts in phases.values()) / GIB:.1f} GiB")
    if args.tflops and args.script in ONLINE:
        sampling, training = seconds(args, config)
        print(
            f"an update, at the speeds assumed, at most: {sampling:.1f} s of sampling, {training:.1f} s of the rest"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
