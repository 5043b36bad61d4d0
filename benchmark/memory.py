"""What a run needs, computed: GPU memory in GiB by parts, and seconds an update at a given speed.

    python benchmark/memory.py --model pythia-1b --dtype bfloat16
    python benchmark/memory.py --model FOLDER --script dpo --gradient-checkpointing

Only the model's configuration is read; no weight is made. Weights, gradients and optimizer are
exact. Activations, cache and logits are upper bounds, with every prompt and response as long as the
limits allow. What CUDA itself and its allocator take is not counted. docs/recipes.md has the
formulas.
"""

import math
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
import tyro
from random_model import SHAPES, config_of
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of the scripts
ONLINE = ("p3o_v2", "p3o_v1", "rloo", "grpo", "ppo", "online_dpo")
PAIRS = ("dpo", "ipo", "mpo")
GIB = 2**30
# Bytes that a layer keeps for the backward pass, by token and unit of hidden size, measured by
# torch's hooks on saved tensors (tests/test_memory.py): GPT-NeoX, with a feed-forward part 4 times
# as wide; Llama, 3.5 times and gated.
KEPT = {("gpt_neox", 4): 74, ("gpt_neox", 2): 39, ("llama", 4): 98, ("llama", 2): 63}
# Milliseconds of sampling a token, assumed: launching small kernels takes longer than their work.
MS_A_LAYER = 0.4


@dataclass
class Args:
    model: str = "pythia-1b"  # pythia-14m ... pythia-6.9b, or a folder with the config.json
    script: Literal[(*ONLINE, *PAIRS, "sft", "reward_model")] = "p3o_v2"  # which script
    reward_fn: bool = False  # the reward is a function: no reward model in memory
    processes: int = 1  # GPUs
    sharing: Literal["ddp", "fsdp2"] = "ddp"  # each GPU trains all weights, or holds its share
    tflops: float = 0  # reached in training, about 0.4 of a datasheet's: to print seconds, too
    # As the script has them (0: its default)
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    unfrozen_layers: int = 0
    prompts_per_update: int = 0
    num_responses: int = 0
    num_epochs: int = 0
    minibatch_size: int = 0
    micro_batch_size: int = 0
    sample_batch_size: int = 0
    max_prompt_tokens: int = 0
    max_response_tokens: int = 0
    eval_prompts: int = 0


def fill_in(args):
    """Replace sizes that are 0 by the script's defaults."""
    own = vars(import_module(args.script).Args())
    for name, value in vars(args).items():
        if value == 0 and own.get(name):
            setattr(args, name, own[name])


def count(model, unfrozen):
    """Numbers of parameters: trained ones, of these in the trunk's Linear modules; frozen ones, of
    these in the trunk's Linear modules; and the number of trained tensors."""
    trunk = model.base_model
    layers = next(part for part in trunk.modules() if isinstance(part, torch.nn.ModuleList))
    if unfrozen:
        trunk.requires_grad_(False)
        layers[-unfrozen:].requires_grad_(True)
    linear = set()
    for module in trunk.modules():
        if isinstance(module, torch.nn.Linear):
            linear.update(module.parameters())
    numbers = {True: [0, 0], False: [0, 0]}
    for weight in model.parameters():
        numbers[weight.requires_grad][0] += weight.numel()
        if weight in linear:
            numbers[weight.requires_grad][1] += weight.numel()
    return *numbers[True], *numbers[False], sum(p.requires_grad for p in model.parameters())


def memory(args, config):
    """{part: bytes} of one GPU while sampling and while training."""
    fill_in(args)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    trained, linear, frozen, frozen_linear, tensors = count(model, args.unfrozen_layers)
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    width = {"float32": 4, "bfloat16": 2}[args.dtype]
    online, samples = args.script in ONLINE, args.script in (*ONLINE, *PAIRS)
    trained_models = 2 if args.script == "ppo" else 1  # the value model is the second
    frozen_bytes = 4 * (frozen - frozen_linear) + width * frozen_linear
    reference = frozen_bytes + 4 * (trained - linear) + width * linear
    # A reward or value model has no head
    head = 0 if config.tie_word_embeddings else vocabulary * hidden
    judges = {"reference": reference}
    if not args.reward_fn:
        judges["reward model"] = reference - 4 * head
    n = trained + (trained - head) * (trained_models - 1)

    def common(gradients):
        """Parts of the policy and the optimizer; with gradients in training, not in sampling."""
        parts = {
            "trained weights": 4 * n,
            "gradients": 4 * n * gradients,
            "AdamW": 8 * n + 4 * tensors * trained_models,
        }
        if args.sharing == "fsdp2":
            parts = {key: value / args.processes for key, value in parts.items()}
            gathered = trained - linear + 2 * linear // layers if gradients else n
            parts["gathered weights"] = 4 * trained_models * gathered
        if args.unfrozen_layers:
            parts["frozen weights of the policy"] = frozen_bytes
        if width == 2:
            parts["bfloat16 copies of trained weights"] = 2 * linear * trained_models
        return parts

    # Sampling and evaluation, without gradients
    sampling = {}
    if samples:
        prompts = math.ceil(args.eval_prompts / args.processes)
        most = args.sample_batch_size or 4 * args.micro_batch_size  # of generate_responses
        prompts = rows = min(prompts, most)
        if online:
            own = min(math.ceil(args.prompts_per_update / args.processes), most)
            prompts, rows = max(prompts, own), max(rows, own * args.num_responses)
        head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        tokens = rows * (args.max_prompt_tokens + args.max_response_tokens)
        reading = prompts * args.max_prompt_tokens * KEPT[family(config), width] * hidden
        sampling = common(gradients=False) | judges
        cached = width if online else 4  # generate keeps float32, as rotary embeddings make keys
        sampling["cache of keys and values"] = 2 * cached * layers * heads * head_size * tokens
        sampling["a layer reading the prompts, or drawing tokens"] = max(
            reading, 24 * rows * vocabulary
        )

    # Training: rows are x y_1 … y_K, and x is read once.
    training = common(gradients=True)
    if online:
        training |= judges
    elif samples and not args.reward_fn:  # the reference waits on the CPU
        training["reward model"] = judges["reward model"]
    groups = min(args.micro_batch_size, math.ceil(args.minibatch_size / args.processes))
    responses = groups * responses_of(args) * args.max_response_tokens
    tokens = groups * args.max_prompt_tokens + responses
    depth = args.unfrozen_layers or layers  # what is frozen below keeps nothing
    kept = KEPT[family(config), width]
    activations = 4 * depth + kept if args.gradient_checkpointing else kept * depth
    training["activations"] = activations * tokens * hidden * trained_models
    if args.script != "reward_model":
        # Log-probabilities of up to 1,024 tokens are kept; logits are made 128 at a time.
        training["logits, in parts"] = vocabulary * (
            4 * min(responses, 1024) + 8 * min(responses, 128)
        )
    return sampling, training


def family(config):
    """The nearest of the two shapes that were measured."""
    return "llama" if getattr(config, "hidden_act", "gelu") == "silu" else "gpt_neox"


def responses_of(args):
    """Responses to a prompt in training."""
    others = {"sft": 1, "mpo": 3}  # a pair and a sample of the reference
    return args.num_responses or others.get(args.script, 2)


def seconds(args, config):
    """(sampling, training with scoring) of an update of an online script, at most."""
    fill_in(args)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    n = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    tokens = args.max_prompt_tokens + args.num_responses * args.max_response_tokens
    tokens *= args.prompts_per_update / args.processes
    step = 3  # a forward, and a backward of twice its work
    if args.unfrozen_layers:
        step = 1 + 2 * args.unfrozen_layers / config.num_hidden_layers
    step += args.gradient_checkpointing
    forwards = args.num_epochs * step * (2 if args.script == "ppo" else 1)
    forwards += 1 + (not args.reward_fn)  # reference and reward model
    forwards += (args.script == "ppo") + (args.dtype == "bfloat16")  # values; log π_old again
    sampling = args.max_response_tokens * config.num_hidden_layers * MS_A_LAYER / 1000
    return sampling, 2 * n * tokens * forwards / (args.tflops * 1e12)


def main(args):
    if args.model in SHAPES:
        config = config_of(args.model)
    else:
        config = AutoConfig.from_pretrained(args.model)
    peak = 0
    for name, parts in zip(("sampling", "training"), memory(args, config)):
        if parts:
            print(f"{name}: {sum(parts.values()) / GIB:.1f} GiB")
        for part, size in parts.items():
            if size:
                print(f"    {size / GIB:7.2f}  {part}")
        peak = max(peak, sum(parts.values()) / GIB)
    print(f"peak: {peak:.1f} GiB")
    if args.tflops and args.script in ONLINE:
        sampling, training = seconds(args, config)
        print(f"an update, at most: {sampling:.1f} s of sampling, {training:.1f} s of the rest")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
