"""What a GPU does of what it could: decoding, training and memory, for random weights of several Pythia shapes.

python benchmark/speed.py --gpu --output gpu.json

It runs unattended and writes the JSON after every measurement; what fails is written down with its error, and the rest
goes on. Without a GPU it rehearses the same steps on the CPU with a small model. Decoding is also timed by
`graph_sample_responses`, a candidate for the scripts' sampler on CUDA: the same tokens from static shapes and a CUDA
graph of one step. It moves into the scripts when a GPU has shown it to be right and faster.
"""

import json
import time
import traceback
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from random_model import config_of
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
from transformers.cache_utils import DynamicLayer

import p3o_v2 as p3o

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
autocast = partial(torch.autocast, DEVICE, torch.bfloat16)  # around a forward, as in the scripts
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}  # dense bfloat16, datasheets


class StaticLayer(DynamicLayer):
    """Keys and values of a layer in buffers of the final length, written at the index that `at` holds."""

    def __init__(self, layer, room, at):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = (
            F.pad(states, (0, 0, 0, room)) for states in (layer.keys, layer.values)
        )
        self.at = at

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.at, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, values.to(self.values.dtype))
        return self.keys, self.values


@torch.no_grad()
def graph_sample_responses(model, prompts, noise, temperature, end_ids):
    """What sample_responses returns, for full-attention models: every step has the same shapes and tensors, so that on
    CUDA one is captured as a graph and replayed. No row leaves; the loop ends when all rows have ended."""
    (B, K, T), device = noise.shape, model.device
    N, noise = B * K, noise.view(B * K, T).to(device)
    end_ids = torch.tensor(end_ids, device=device)
    input_ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)
    mask = pad_sequence(
        [torch.ones_like(x) for x in prompts], batch_first=True, padding_side="left"
    ).to(device)
    cache = DynamicCache(config=model.config)
    inputs = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "past_key_values": cache,
    }
    hidden = model.base_model(input_ids, **inputs).last_hidden_state[:, -1:].repeat_interleave(K, 0)
    cache.batch_repeat_interleave(K)
    mask = mask.repeat_interleave(K, 0)
    t, at = (torch.tensor([n], device=device) for n in (0, input_ids.shape[1]))
    cache.layers = [StaticLayer(layer, T, at) for layer in cache.layers]
    positions, seen = (
        mask.sum(1, keepdim=True),
        F.pad(mask.bool(), (0, T))[:, None, None],
    )  # [N, 1, 1, L]
    tokens, logprobs = input_ids.new_zeros(N, T), torch.zeros(N, T, device=device)
    token, ended = tokens[:, :1].clone(), torch.zeros(N, dtype=torch.bool, device=device)
    hidden = hidden.float().clone()

    def choose():
        probs = p3o.head_logits(model, hidden[:, -1], temperature).softmax(-1)
        cdf = probs.double().cumsum(-1)
        found = torch.searchsorted(cdf, noise.index_select(1, t) * cdf[:, -1:], right=True)
        token.copy_(found.clamp(max=cdf.shape[1] - 1))
        tokens.index_copy_(1, t, token)
        logprobs.index_copy_(1, t, probs.gather(1, token).log())
        ended.logical_or_(torch.isin(token.squeeze(1), end_ids))
        t.add_(1)

    def step():
        seen.index_fill_(3, at, True)
        inputs = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache}
        hidden.copy_(model.base_model(token, **inputs).last_hidden_state)
        positions.add_(1)
        at.add_(1)
        choose()

    choose()
    advance = step
    for i in range(1, T):
        if (
            CUDA and i == 4 and T > 8
        ):  # the steps before have warmed up; capturing records a step without doing it
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            advance = graph.replay
        advance()
        if i % 8 == 0 and ended.all():
            break
    over = F.pad(torch.isin(tokens, end_ids).cumsum(1), (1, 0))[:, :T] > 0
    lengths = (T - over.sum(1)).view(B, K).tolist()
    responses = [
        [y[:n] for y, n in zip(*group)] for group in zip(tokens.view(B, K, T).cpu(), lengths)
    ]
    return list(zip(responses, (logprobs * ~over).view(B, K, T)))


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


def machine():
    """Measured limits: bytes per second of a copy (read and written), FLOP/s of a bfloat16 matrix product."""
    size = 2**30 if CUDA else 2**24
    source, target = torch.empty(2, size, dtype=torch.uint8, device=DEVICE)
    n = 8192 if CUDA else 512
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16)
    name = torch.cuda.get_device_name() if CUDA else "CPU, a rehearsal"
    matmul = 2 * n**3 / seconds(lambda: a @ b, 10)
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), matmul)
    copy = 2 * size / seconds(lambda: target.copy_(source), 10)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "name": name,
        "copy_bytes_per_s": copy,
        "matmul_flops": matmul,
        "peak_flops": peak,
        **versions,
    }


def build(shape, kind, train=False, checkpointing=False):
    settings = SimpleNamespace(
        dtype="bfloat16", unfrozen_layers=0, gradient_checkpointing=checkpointing
    )
    auto_class = {"policy": GPTNeoXForCausalLM, "score": GPTNeoXForSequenceClassification}[kind]
    with torch.device(DEVICE):
        model = auto_class(config_of(shape, num_labels=1))
    p3o.set_up_model(model, settings, train)
    return model


def some_ids(count, length):
    return list(torch.randint(1, 500, (count, length), generator=torch.Generator().manual_seed(0)))


def decoding(shape, limits, sampler, prompts, length, tokens):
    """Seconds a step (prompts aside) and the share of the copy bandwidth at which it reads weights and cache."""
    model = build(shape, "policy", train=True)
    x, noise = some_ids(prompts, length), torch.rand(prompts, 2, tokens, dtype=torch.float64)

    def sample(n):
        with torch.no_grad(), autocast():
            sampler(model, x, noise[:, :, :n].contiguous(), 1.0, [-1])

    whole, few = (seconds(partial(sample, n)) for n in (tokens, tokens // 4))
    step = (whole - few) / (tokens - tokens // 4)
    config, rows = model.config, 2 * prompts
    trunk = sum(p.numel() for p in model.base_model.layers.parameters())
    context = length + (tokens + tokens // 4) / 2
    kv = 2 * 2 * config.num_hidden_layers * config.hidden_size * context * rows
    needed = 2 * trunk + 4 * model.get_output_embeddings().weight.numel() + kv
    share = needed / step / limits["copy_bytes_per_s"]
    return {
        "rows": rows,
        "step_s": step,
        "tokens_per_s": rows / step,
        "rollout_s": whole,
        "bandwidth_share": share,
    }


def same_tokens(shape):
    """Whether the candidate samples what sample_responses samples, in float32."""
    with torch.device(DEVICE):
        model = GPTNeoXForCausalLM(config_of(shape)).eval()
    prompts = [ids[: 9 + i] for i, ids in enumerate(some_ids(8, 24))]
    inputs = (model, prompts, torch.rand(8, 2, 40, dtype=torch.float64), 1.0, [7])
    with torch.no_grad():
        found = p3o.sample_responses(*inputs), graph_sample_responses(*inputs)
    rows = [[row for pair in part for row in zip(*pair)] for part in found]
    pairs = list(zip(*rows))
    same = [(p, q) for (y, p), (z, q) in pairs if torch.equal(y, z)]
    difference = max(((p - q).abs().max().item() for p, q in same), default=None)
    return {"same": len(same), "of": len(pairs), "largest_difference": difference}


def training(shape, limits, rows, length, tokens, checkpointing):
    """Forward and backward of pairs: model FLOP/s (recomputation not counted) as a share of the peak."""
    model = build(shape, "policy", train=True, checkpointing=checkpointing)
    prompts, responses = some_ids(rows // 2, length), some_ids(rows, tokens)
    responses = list(zip(responses[::2], responses[1::2]))
    if CUDA:
        torch.cuda.reset_peak_memory_stats()

    def step():
        with autocast():
            logprobs = p3o.response_logprobs(model, prompts, responses, 1.0)
        logprobs.sum().backward()

    wall = seconds(step)
    config = model.config
    trunk = sum(p.numel() for p in model.base_model.layers.parameters())
    positions, attended = length + 2 * tokens, length**2 / 2 + 2 * tokens * (length + tokens / 2)
    flops = 6 * trunk * positions + 6 * model.get_output_embeddings().weight.numel() * 2 * tokens
    flops = (flops + 12 * config.num_hidden_layers * config.hidden_size * attended) * rows / 2
    mfu = flops / wall / limits["peak_flops"]
    memory = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
    positions_per_s = positions * rows / 2 / wall
    return {
        "rows": rows,
        "seconds": wall,
        "positions_per_s": positions_per_s,
        "mfu": mfu,
        "peak_gib": memory,
    }


def update(shape, rows, length, tokens, micro_batch_size):
    """Peak memory of a whole update: policy with AdamW, reference and a reward model of the same size."""
    policy, reference = build(shape, "policy", True, True), build(shape, "policy")
    scorer, K = build(shape, "score"), 2
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    prompts = some_ids(rows // K, length)
    noise = torch.rand(rows // K, K, tokens, dtype=torch.float64)
    logps_of = partial(p3o.response_logps, temperature=1.0)
    size = {"batch_size": micro_batch_size}

    def run():
        with torch.no_grad(), autocast():
            y, _ = zip(*p3o.sample_responses(policy, prompts, noise, 1.0, [-1]))
            r = p3o.in_batches(partial(p3o.response_scores, scorer), prompts, y, **size)
            ref = p3o.in_batches(partial(logps_of, reference), prompts, y, **size)
        for part in torch.arange(len(prompts)).split(micro_batch_size):
            with autocast():
                logps = logps_of(policy, [prompts[b] for b in part], [y[b] for b in part])
            batch = (logps, logps.detach(), ref[part], r[part].double())
            p3o.pairwise_loss(*batch, 0.05, 0.2, 10.0)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    wall = seconds(run, 1)
    memory = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
    return {"rows": rows, "micro_batch_size": micro_batch_size, "seconds": wall, "peak_gib": memory}


def main(args, compare):
    """Run everything and write args.output (default gpu.json)."""
    output = args.output or "gpu.json"
    results = {"machine": machine()}
    shapes = ("pythia-160m", "pythia-410m", "pythia-1b", "pythia-2.8b") if CUDA else ("pythia-14m",)
    B, length, tokens = (64, 125, 128) if CUDA else (16, 12, 12)
    torch.set_float32_matmul_precision("high")  # as the scripts do in bfloat16

    def measure(name, function, *inputs):
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            results[name] = function(*inputs)
        except Exception:
            traceback.print_exc()
            results[name] = {"error": traceback.format_exc().splitlines()[-1]}
        shown = {
            k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in results[name].items()
        }
        print(f"{name}: {shown}", flush=True)
        with open(output, "w") as file:
            json.dump(results, file, indent=1)

    print(results["machine"], flush=True)
    limits = results["machine"]
    measure("the candidate sampler's tokens", same_tokens, shapes[0])
    for shape in shapes:
        for name, sampler in (("eager", p3o.sample_responses), ("graph", graph_sample_responses)):
            for prompts in (B, 4 * B):
                inputs = (shape, limits, sampler, prompts, length, tokens)
                measure(f"{shape} decoding {name} {prompts} x 2", decoding, *inputs)
        for rows in (B // 8, B // 2, 2 * B):
            for checkpointing in (False, True):
                name = f"{shape} training {rows} rows{', checkpointing' if checkpointing else ''}"
                measure(name, training, shape, limits, rows, length, tokens // 2, checkpointing)
        measure(f"{shape} update, checkpointing", update, shape, B, length, tokens, 2)
    shape = "pythia-1b" if CUDA else "pythia-14m"
    sizes = {"prompts": B, "new_tokens": tokens, "micro_batch_size": 32, "tasks": ("p3o_v2",)}
    measure(
        "ours and TRL", compare, replace(args, model=shape, dtype="bfloat16", updates=2, **sizes)
    )
