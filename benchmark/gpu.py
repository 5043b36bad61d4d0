"""Decoding speed, training speed and memory on a GPU, relative to its peak, with random weights.

python benchmark/speed.py --gpu --output gpu.json

It runs unattended and writes the JSON after every measurement. What fails is written down with its
error, and the rest goes on. Without a GPU it rehearses the same on the CPU with a small model.
"""

import gc
import json
import time
import traceback
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import transformers
from random_model import config_of
from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

import p3o_v2

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
autocast = partial(torch.autocast, DEVICE, torch.bfloat16)  # around a forward, as in the scripts
# FLOP/s of dense bfloat16 products, from datasheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def seconds(function, trials=3):
    """Least of several, after a first one."""
    times = []
    for _ in range(trials + 1):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_gib():
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else None


def machine():
    """Bytes per second of a copy (read and written), FLOP/s of a bfloat16 matrix product."""
    size, n = (2**30, 8192) if CUDA else (2**24, 512)
    source, target = torch.empty(2, size, dtype=torch.uint8, device=DEVICE)
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16)
    name = torch.cuda.get_device_name() if CUDA else "CPU, a rehearsal"
    matmul = 2 * n**3 / seconds(lambda: a @ b, 10)
    return {
        "name": name,
        "copy_bytes_per_s": 2 * size / seconds(lambda: target.copy_(source), 10),
        "matmul_flops": matmul,
        "peak_flops": next((flops for key, flops in PEAK_FLOPS.items() if key in name), matmul),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def build(shape, kind=GPTNeoXForCausalLM, train=False, checkpointing=False):
    """A model with random weights, set up as the scripts do."""
    args = SimpleNamespace(
        dtype="bfloat16", unfrozen_layers=0, gradient_checkpointing=checkpointing
    )
    with torch.device(DEVICE):
        model = kind(config_of(shape, num_labels=1))
    p3o_v2.set_up_model(model, args, train)
    return model


def sizes(model):
    """Parameters of the layers and of the head."""
    trunk = sum(p.numel() for p in model.base_model.layers.parameters())
    return trunk, model.get_output_embeddings().weight.numel()


def some_ids(count, length):
    return list(torch.randint(1, 500, (count, length), generator=torch.Generator().manual_seed(0)))


def decoding(shape, limits, prompts, length, tokens):
    """Seconds a step, prompts aside, and how much of the copy bandwidth its reading takes."""
    model = build(shape, train=True)
    x, noise = some_ids(prompts, length), torch.rand(prompts, 2, tokens, dtype=torch.float64)

    def sample(n):
        with torch.no_grad(), autocast():
            p3o_v2.sample_responses(model, x, noise[:, :, :n], 1.0, [-1])

    whole, few = (seconds(partial(sample, n)) for n in (tokens, tokens // 4))
    step = (whole - few) / (tokens - tokens // 4)
    trunk, head = sizes(model)
    config, rows = model.config, 2 * prompts
    context = length + (tokens + tokens // 4) / 2
    needed = 2 * trunk + 4 * head
    needed += 2 * 2 * config.num_hidden_layers * config.hidden_size * context * rows
    return {
        "rows": rows,
        "step_s": step,
        "tokens_per_s": rows / step,
        "rollout_s": whole,
        "bandwidth_share": needed / step / limits["copy_bytes_per_s"],
    }


def training(shape, limits, rows, length, tokens, checkpointing):
    """Forward and backward of pairs: FLOP/s, without recomputation, as a share of the peak."""
    model = build(shape, train=True, checkpointing=checkpointing)
    prompts, responses = some_ids(rows // 2, length), some_ids(rows, tokens)
    responses = list(zip(responses[::2], responses[1::2]))

    def step():
        with autocast():
            logps = p3o_v2.response_logps(model, prompts, responses, 1.0)
        logps.sum().backward()

    wall = seconds(step)
    config = model.config
    trunk, head = sizes(model)
    positions, attended = length + 2 * tokens, length**2 / 2 + 2 * tokens * (length + tokens / 2)
    flops = 6 * trunk * positions + 6 * head * 2 * tokens
    flops += 12 * config.num_hidden_layers * config.hidden_size * attended
    return {
        "rows": rows,
        "seconds": wall,
        "positions_per_s": positions * rows / 2 / wall,
        "mfu": flops * rows / 2 / wall / limits["peak_flops"],
        "peak_gib": peak_gib(),
    }


def update(shape, rows, length, tokens, micro_batch_size):
    """A whole update: policy with AdamW, reference and a reward model of the same size."""
    policy, reference = build(shape, train=True, checkpointing=True), build(shape)
    scorer = build(shape, GPTNeoXForSequenceClassification)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    prompts = some_ids(rows // 2, length)
    noise = torch.rand(rows // 2, 2, tokens, dtype=torch.float64)
    logps_of = partial(p3o_v2.response_logps, temperature=1.0)
    in_batches = partial(p3o_v2.in_batches, batch_size=micro_batch_size)

    def run():
        with torch.no_grad(), autocast():
            y, _ = zip(*p3o_v2.sample_responses(policy, prompts, noise, 1.0, [-1]))
            r = in_batches(partial(p3o_v2.response_scores, scorer), prompts, y).double()
            ref = in_batches(partial(logps_of, reference), prompts, y)
        for part in torch.arange(len(prompts)).split(micro_batch_size):
            with autocast():
                logps = logps_of(policy, [prompts[b] for b in part], [y[b] for b in part])
            loss, _ = p3o_v2.pairwise_loss(
                logps, logps.detach(), ref[part], r[part], 0.05, 0.2, 10.0
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    wall = seconds(run, 1)
    size = {"rows": rows, "micro_batch_size": micro_batch_size}
    return {**size, "seconds": wall, "peak_gib": peak_gib()}


def main(args, compare):
    """Run everything and write args.output (default gpu.json)."""
    results = {"machine": machine()}
    shapes = ("pythia-160m", "pythia-410m", "pythia-1b", "pythia-2.8b") if CUDA else ("pythia-14m",)
    B, length, tokens = (64, 125, 128) if CUDA else (16, 12, 12)
    torch.set_float32_matmul_precision("high")  # as the scripts do in bfloat16
    torch.backends.cuda.enable_cudnn_sdp(False)

    def measure(name, function, *inputs):
        if CUDA:
            gc.collect()  # a model with checkpointing refers to itself
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            results[name] = function(*inputs)
        except Exception:
            traceback.print_exc()
            results[name] = {"error": traceback.format_exc().splitlines()[-1]}
        print(f"{name}: {results[name]}", flush=True)
        with open(args.output or "gpu.json", "w") as file:
            json.dump(results, file, indent=1)

    print(results["machine"], flush=True)
    limits = results["machine"]
    for shape in shapes:
        for prompts in (B, 4 * B):
            name = f"{shape} decoding {prompts} x 2"
            measure(name, decoding, shape, limits, prompts, length, tokens)
        for rows in (B // 8, B // 2, 2 * B):
            for checkpointing in (False, True):
                name = f"{shape} training {rows} rows{', checkpointing' if checkpointing else ''}"
                measure(name, training, shape, limits, rows, length, tokens // 2, checkpointing)
        measure(f"{shape} update, checkpointing", update, shape, B, length, tokens, 2)
    shape = "pythia-1b" if CUDA else "pythia-14m"
    options = {"prompts": B, "new_tokens": tokens, "micro_batch_size": 16, "tasks": ("p3o_v2",)}
    args = replace(args, model=shape, dtype="bfloat16", updates=2, **options)
    measure("ours and TRL", compare, args)
