"""P3O-V2: Pairwise Proximal Policy Optimization with joint clipping (Wu et al. 2023, arXiv 2310.00212).

Sample two responses to a prompt, score both, and raise the log-probability of one against the other in proportion to
the difference of their rewards. What is added to all rewards of a prompt cancels, so no value function is needed.

Objective    max_θ  E[ r(x, y) ] − β KL( π_θ ‖ π_ref )            x ~ prompts, y ~ π_θ(·|x)

Pairwise policy gradient, two samples y_1, y_2 ~ π_old(·|x):
    h_i = log π_θ(y_i) − log π_ref(y_i)                            log-ratio to the reference (SFT) policy
    q   = sg[ (r_1 − r_2) − β (h_1 − h_2) ]                        signal: rewards r (centred, scaled) less KL penalty
    ρ_i = π_θ(y_i) / π_old(y_i)                                    sequence-level importance ratio
    w   = sg[ clip(ρ_1 ρ_2, 1/R, R) ]                              importance weight of the pair; sg: no gradient
    Δ   = log ρ_1 − log ρ_2
    L   = ½ · mean over prompts of  max( −q w Δ,  −q w clip(Δ, −ε, ε) )        (V2: one clip for the pair, jointly)

With K > 2 responses a prompt (--num-responses) the mean is over all K(K−1)/2 pairs. Shapes: B prompts, K responses to
each, N = B·K rows, T response tokens, V vocabulary, D hidden size. Prompts and responses are lists of 1-D id tensors,
nothing padded; `logprobs` are per token, `logps` their sums over a response.

    python p3o_v2.py                                                     the embedded world, 2 minutes on a laptop
    python p3o_v2.py --model pythia-1b --dataset hh --dtype bfloat16     one GPU; starts from what the two stages saved
    python p3o_v2.py --model FOLDER --dataset FILE.jsonl --reward-fn my_reward.py:f
"""

import json
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from huggingface_hub import HfApi, constants
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer

TINY = Path(__file__).parent / "tiny"


def pairwise_loss(logps, old_logps, ref_logps, rewards, beta, clip_range, ratio_bound):
    """P3O-V2 loss (paper: algorithm 1 with joint clipping), mean over prompts and the pairs of their K responses.
    logps, old_logps, ref_logps: [B, K], log π_θ(y), log π_old(y), log π_ref(y), nats; rewards: [B, K], scaled;
    beta: β; clip_range: ε, 0 for no clipping; ratio_bound: R. Returns (scalar loss, dict of detached scalars)."""
    first, second = torch.combinations(torch.arange(logps.shape[1], device=logps.device)).T  # the P = K(K−1)/2 pairs
    logratio = logps - old_logps  # log ρ                                            [B, K]
    h = (logps - ref_logps).detach()  # of the current π_θ: the KL penalty enters here and nowhere else  [B, K]
    q = (rewards[:, first] - rewards[:, second]) - beta * (h[:, first] - h[:, second])  # [B, P]
    w = (logratio[:, first] + logratio[:, second]).detach().exp().clamp(1 / ratio_bound, ratio_bound)  # [B, P]
    delta = logratio[:, first] - logratio[:, second]  # Δ                            [B, P]
    losses = -q * w * delta
    clipped_losses = -q * w * delta.clamp(-clip_range, clip_range) if clip_range > 0 else losses
    loss = 0.5 * torch.maximum(losses, clipped_losses).mean()
    ratio = logratio.detach().exp()
    metrics = {"policy/loss": loss.detach(), "policy/clipfrac": (clipped_losses > losses).double().mean()}
    metrics |= {"policy/ratio_mean": ratio.mean(), "policy/ratio_max": ratio.max()}
    metrics |= {"policy/approx_kl": (ratio - 1 - logratio.detach()).mean()}
    metrics |= {"policy/pair_weight_mean": (q * w).mean() / 2, "policy/pair_weight_std": (q * w).std(correction=0) / 2}
    return loss, metrics


@dataclass
class Args:
    # Run
    seed: int = 1  # of the sampling noise, the order of the data and any new weights
    output_dir: str = ""  # the run's folder (default: runs/SCRIPT/DATASET/MODEL)
    overwrite: bool = False  # replace the run that the folder holds
    # Model, rewards, data
    model: str = "tiny"  # tiny (embedded), a short name (pythia-14m … pythia-12b), a hub id, or a folder
    reward_model: str = ""  # folder or hub id, fed this model's token ids (default: what reward_model.py saved for it)
    reward_fn: str = ""  # FILE.py:f, in place of a model: f(prompts: list[str], responses: list[str]) -> list[float]
    gold_fn: str = ""  # FILE.py:f, the true reward of the same form where one is known; only ever evaluated
    dataset: str = ""  # tiny, hh, tldr, a hub id, a .jsonl[.gz] or .parquet file, a folder (default: hh; tiny for tiny)
    max_prompt_tokens: int = 512  # longer prompts are dropped, and counted
    max_response_tokens: int = 128  # length limit of a response
    # Sizes
    num_updates: int = 60  # rounds of sampling, with epochs (online); optimizer steps at most (offline; 0: all data)
    prompts_per_update: int = 64  # prompts sampled in an update
    num_responses: int = 2  # responses sampled to each prompt, K
    num_epochs: int = 4  # passes over the samples of an update
    minibatch_size: int = 16  # prompts with all responses (online), pairs or rows (offline) per optimizer step
    micro_batch_size: int = 32  # sequences in one forward, sampling aside: changes memory and speed alone
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights, sums and the head stay in float32
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third slower
    unfrozen_layers: int = 0  # train only the last layers, and the head if it has its own weights (0: everything)
    # Optimiser
    learning_rate: float = 0.0  # AdamW's step size (0: the script's choice, see `lr` in main)
    weight_decay: float = 1e-6  # AdamW's, decoupled
    adam_betas: tuple[float, float] = (0.9, 0.95)  # decay rates of AdamW's two moments
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm (0: never)
    # Evaluation on held-out prompts; there is always one before training and one after
    eval_every: int = 20  # updates between evaluations (0: only these two)
    eval_prompts: int = 256  # held-out prompts used, the first ones
    # Algorithm
    temperature: float = 1.0  # of the distribution sampled from, in every log-probability and KL too
    missing_eos_penalty: float = 0.0  # subtracted from the score of a response cut at the length limit
    beta: float = 0.05  # coefficient of the KL penalty
    clip_range: float = 0.2  # ε (0: no clipping)
    ratio_bound: float = 10.0  # R, importance weights are kept in [1/R, R]


class UserError(Exception):
    """A mistake in what the user gave, told in one sentence without a traceback; exit code 2."""


# -------------------------------------------------------------------------------------------------------- find and load
def short_name(path):
    """Last part of a path or hub id without its ending; a model that a run saved keeps the name of its base."""
    record = Path(path).parent / "args.json"
    saved = json.loads(record.read_text()) if record.is_file() else {}
    return saved.get("base_name") or re.sub(r"(\.jsonl|\.json|\.parquet)?(\.gz)?$", "", Path(path).resolve().name)


def find_stage(stage, model, dataset):
    """The model that an earlier stage (sft, reward_model) saved for this base model and dataset: a folder, or None."""
    if model == "tiny":
        return f"{TINY}/{stage}"
    run = Path("runs") / stage / short_name(dataset) / short_name(model)
    saved = json.loads((run / "args.json").read_text()) if (run / "model").is_dir() else {"base_name": None}
    same = saved["base_name"] == short_name(model) and saved["args"]["dataset"] == dataset
    return f"{run}/model" if same and (stage != "sft" or saved["args"]["model"] == model) else None


def fetch(kind, name, flag, load):
    """load(), a hub id only after one request of at most 10 s has found it. Raises UserError with the reason."""
    try:
        if not Path(name).exists() and not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(name, repo_type="dataset" if kind == "dataset" else "model", timeout=10)
        return load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        where = "can be read from there" if Path(name).exists() else "is there, on this machine or on huggingface.co"
        raise UserError(f"{flag} {name}: no {kind} {where} ({reason}). Pass a local path: {flag} PATH") from error


def load_model(auto_class, name, flag, device, args, train=False, new_head=False, **options):
    """A model in evaluation mode, so without dropout, from a folder or the hub; see set_up_model. Raises UserError."""
    options |= {"dtype": torch.float32, "output_loading_info": True}
    model, info = fetch("model", name, flag, lambda: auto_class.from_pretrained(name, **options))
    if info["missing_keys"] and not new_head:
        raise UserError(f"{flag} {name}: it is no {auto_class.__name__[4:]}, it lacks {sorted(info['missing_keys'])}.")
    head, ids = model.get_output_embeddings(), torch.tensor([[0, 1, 2]])
    with torch.no_grad():
        if head and not torch.allclose(model(ids).logits, head(model.base_model(ids).last_hidden_state), atol=1e-4):
            raise UserError(f"{flag} {name}: it scales or caps its logits, which is not supported; use another model.")
    return set_up_model(model.to(device), args, train)


def set_up_model(model, args, train):
    """Freeze the whole model or, if `train`, all but its last --unfrozen-layers and head (0: freeze nothing). Its trunk
    multiplies in --dtype; weights stay float32, but frozen Linear ones are rounded to it. Raises UserError."""
    trunk, unfrozen = model.base_model, args.unfrozen_layers if train else 0
    layers = next(part for part in trunk.modules() if isinstance(part, torch.nn.ModuleList))
    if not 0 <= unfrozen <= len(layers):
        raise UserError(f"--unfrozen-layers {unfrozen}: the model has {len(layers)}; pass 0 to train everything.")
    model.requires_grad_(train)
    if unfrozen:
        trunk.requires_grad_(False)
        layers[-unfrozen:].requires_grad_(True)
    for layer in layers if train and args.gradient_checkpointing else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if args.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # for the head: float32 in and out, TF32 products
        trunk.forward = torch.autocast(model.device.type, torch.bfloat16)(trunk.forward)
        for part in trunk.modules():
            if isinstance(part, torch.nn.Linear) and not part.weight.requires_grad:
                part.to(torch.bfloat16)
    return model


def read_dataset(name, flag):
    """The splits of a file, folder or hub dataset, training data first, held-out data next. Raises UserError."""
    path = {"tiny": f"{TINY}/data", "hh": "Anthropic/hh-rlhf", "tldr": "trl-lib/tldr-preference"}.get(name, name)
    where, files = ("parquet" if path.endswith(".parquet") else "json", path) if Path(path).is_file() else (path, None)
    splits = fetch("dataset", path, flag, lambda: datasets.load_dataset(where, data_files=files))
    return [splits[key] for key in ("train", "test", "validation") if key in splits] or list(splits.values())


def load_prompts(tokenizer, dataset, max_prompt_tokens):
    """(train, held-out) prompts as 1-D id tensors, each once: the column `prompt`, or the dialogues in `chosen` up
    to their last "Assistant:" (HH). Without held-out data a tenth (at most 1,000) is held out. Raises UserError."""
    parts = read_dataset(dataset, "--dataset")[:2]
    for i, part in enumerate(parts):
        column = next((name for name in ("prompt", "chosen") if name in part.column_names), None)
        if column is None or not all(isinstance(x, str) for x in part[:1][column]):
            raise UserError(f"--dataset {dataset}: expected strings in prompt or chosen; found {part.features}.")
        ends = [len(x) if column == "prompt" else x.rfind("\n\nAssistant:") + 12 for x in part[column]]
        parts[i] = list(dict.fromkeys(x[:end] for x, end in zip(part[column], ends) if column == "prompt" or end > 11))
    if len(parts) == 1:
        shuffled = [parts[0][i] for i in torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0))]
        cut = min(max(len(shuffled) // 10, 1), 1000)
        parts = [shuffled[cut:], shuffled[:cut]]
    for i, name in enumerate(("train", "held-out")):
        ids = [torch.tensor(x) for x in tokenizer(parts[i]).input_ids]
        parts[i] = [x for x in ids if 0 < len(x) <= max_prompt_tokens]
        print(f"{'':14}{len(parts[i]):,} different {name} prompts; {len(ids) - len(parts[i]):,} too long, dropped")
        if not parts[i]:
            raise UserError(f"--dataset {dataset}: no {name} prompts are left.")
    return parts


def text_reward(spec, flag, tokenizer):
    """The function of (prompts, responses) -> [N] float32 that "FILE.py:f" computes from their texts, which are decoded
    without special tokens, responses with their leading space. Raises UserError."""
    path, _, name = spec.rpartition(":")
    sys.path.insert(0, str(Path(path).resolve().parent))
    function = runpy.run_path(path).get(name) if Path(path).is_file() else None
    if not callable(function):
        raise UserError(f"{flag} {spec}: expected FILE.py:function; there is no such file or no such function in it.")

    def score(prompts, responses):
        prompts = [x for x in prompts for _ in range(len(responses) // len(prompts))]
        texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        whole = tokenizer.batch_decode([torch.cat(row) for row in zip(prompts, responses)], skip_special_tokens=True)
        return torch.tensor(function(texts, [y[len(x) :] for x, y in zip(texts, whole)]), dtype=torch.float32)

    return score


# ------------------------------------------------------------------------------------- sample, log-probabilities, score
class InplaceLayer(DynamicLayer):
    """Keys and values of a layer in buffers with room for more; the library's layer copies them all at every token."""

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:  # the prompts: [B, heads, tokens, head size]; autocast leaves rotary keys float32
            self.buffers = super().update(keys.to(values.dtype), values)
            return self.buffers
        start, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        if len(self.keys) != len(self.buffers[0]) or end > self.buffers[0].shape[2]:  # other rows, or full
            self.buffers = [F.pad(states, (0, 0, 0, 32)) for states in (self.keys, self.values)]
        for buffer, states in zip(self.buffers, (keys, values)):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # only a scope: the trunk's autocasts inside it share the weights they round
def sample_responses(model, prompts, noise, temperature, end_ids):
    """K responses to each of B prompts, y ~ π(·|x) at this temperature with nothing cut off (no top-k, no top-p).
    `noise` [B, K, T]: the one random number behind each token, float64 in [0, 1): a row depends on its own noise alone.
    Returns N = B·K responses, the K of a prompt side by side, up to and including an id of `end_ids`, and the
    log-probabilities of their tokens, [N, T] float32, 0 on padding."""
    (B, K, T), device = noise.shape, model.device
    noise, end_ids = noise.view(B * K, T).to(device), torch.tensor(end_ids, device=device)
    input_ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(x) for x in prompts], batch_first=True, padding_side="left").to(device)
    cache = DynamicCache(config=model.config)  # a layer with a sliding window, of another type, stays the library's
    cache.layers = [InplaceLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    # A prompt is read once for its K samples. Learned positions (GPT-2) count from its first token, not the padding.
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "past_key_values": cache}
    hidden = model.base_model(input_ids, **inputs).last_hidden_state
    hidden, mask = (v.repeat_interleave(K, 0) for v in (hidden[:, -1:], mask))
    cache.batch_repeat_interleave(K)
    tokens, logprobs = input_ids.new_zeros(B * K, T), torch.zeros(B * K, T, device=device)
    rows, going = torch.arange(B * K, device=device), torch.ones(B * K, dtype=torch.bool, device=device)  # kept
    for t in range(T):
        probs = (model.get_output_embeddings()(hidden[:, -1].float()) / temperature).softmax(-1)  # [rows, V]
        # The first token whose cumulative probability exceeds the noise; a float32 sum would lose rare tokens.
        cdf = probs.double().cumsum(-1)
        token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        tokens[rows, t], logprobs[rows, t] = token.squeeze(1), probs.gather(1, token).log().squeeze(1)
        going &= ~torch.isin(token.squeeze(1), end_ids)
        if t % 4 == 3 and going.float().mean() < 0.75:  # finished rows leave, several at a time: the cache is copied
            cache.batch_select_indices(going.nonzero().squeeze(1))
            rows, token, mask, going = (v[going] for v in (rows, token, mask, going))
        if t == T - 1 or len(rows) == 0:
            break
        mask = F.pad(mask, (0, 1), value=1)
        inputs = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, "past_key_values": cache}
        hidden = model.base_model(token, **inputs).last_hidden_state
    over = F.pad(torch.isin(tokens, end_ids).cumsum(1), (1, 0))[:, :T] > 0  # [N, T], what follows the end of a response
    lengths = T - over.sum(1)
    return [y[:n] for y, n in zip(tokens.cpu(), lengths)], logprobs.masked_fill(over, 0)[:, : lengths.max()]


def response_hidden(model, prompts, responses):
    """Last hidden states after 0, 1 … T tokens of each response, arbitrary beyond its end: [N, T + 1, D].
    The K = N/B responses to a prompt share a row x y_1 … y_K, and x is read once: positions in y_k follow x, and y_k
    sees x and itself. Rows are padded on the right, where causal attention never looks: K = 1 needs no mask at all."""
    K, config, inputs = len(responses) // len(prompts), model.config, {"use_cache": False}
    kinds = {config._attn_implementation, *(getattr(config, "layer_types", None) or ["full_attention"])}
    if kinds != {"sdpa", "full_attention"} or getattr(config, "sliding_window", None):  # others take no mask of ours
        prompts, K = [x for x in prompts for _ in range(K)], 1
    rows = [[x, *responses[K * b : K * b + K]] for b, x in enumerate(prompts)]
    input_ids = pad_sequence([torch.cat(row) for row in rows], batch_first=True).to(model.device)  # [B, L]
    lengths = torch.tensor([[len(part) for part in row] for row in rows], device=model.device)  # [B, 1 + K]
    starts = lengths.cumsum(1) - lengths
    column, t = (torch.arange(n, device=model.device) for n in (input_ids.shape[1], lengths[:, 1:].max() + 1))
    if K > 1:
        part = (column[:, None] >= starts[:, None, 1:]).sum(2)  # [B, L]: 0 in x, k in y_k
        mask = ((part[:, None] == 0) | (part[:, None] == part[:, :, None])).tril()  # [B, query, key]
        shift = (starts - lengths[:, :1]).clamp(min=0).gather(1, part)
        positions = (column - shift) * (column < lengths.sum(1, keepdim=True))
        inputs |= {"attention_mask": mask[:, None], "position_ids": positions}
    hidden = model.base_model(input_ids, **inputs).last_hidden_state  # [B, L, D]
    columns = torch.where(t > 0, starts[:, 1:, None] + t, lengths[:, :1, None]) - 1  # [B, K, T + 1]
    return hidden[torch.arange(len(rows))[:, None, None], columns.clamp(max=len(column) - 1)].flatten(0, 1)


def response_logprobs(model, prompts, responses, temperature):
    """log π(y_t | x, y_<t) of every response token: [N, T] float32, 0 on padding."""
    hidden, head = response_hidden(model, prompts, responses), model.get_output_embeddings()
    hidden = torch.cat([states[: len(y)] for states, y in zip(hidden, responses)]).float()  # [n, D], of response tokens
    tokens, nll = torch.cat(responses).to(hidden.device), partial(F.cross_entropy, reduction="none")
    logits = head if temperature == 1 else lambda h: head(h) / temperature
    # Logits of many tokens would fill the memory: from 5 parts on, each is made again in the backward pass.
    count = len(tokens) * len(head.weight) // (2**25 if hidden.is_cuda else 7_000_000) + 1
    if count < 5 and torch.is_grad_enabled():
        losses = [nll(logits(hidden), tokens)]
    else:
        parts = zip(hidden.chunk(count), tokens.chunk(count))
        losses = [checkpoint(lambda h, y: nll(logits(h), y), *part, use_reentrant=False) for part in parts]
    return pad_sequence((-torch.cat(losses)).split([len(y) for y in responses]), batch_first=True)


def response_kl(policy, reference, prompts, responses, temperature):
    """[N, 2], sums over a response, nats: KL(π_θ ‖ π_ref) over the whole vocabulary; log π_θ(y) − log π_ref(y)."""
    models, sums = (policy, reference), torch.zeros(len(responses), 2, dtype=torch.float64, device=policy.device)
    hidden = [response_hidden(model, prompts, responses) for model in models]  # twice [N, T + 1, D]
    for i, y in enumerate(responses):
        logits = (model.get_output_embeddings()(states[i, : len(y)].float()) for model, states in zip(models, hidden))
        logp, ref_logp = (F.log_softmax(part / temperature, dim=-1) for part in logits)  # [T, V]
        sums[i, 0] = F.kl_div(ref_logp, logp, log_target=True, reduction="none").sum(1).clamp(min=0).double().sum()
        sums[i, 1] = (logp - ref_logp).gather(1, y[:, None].to(policy.device)).double().sum()
    return sums


def response_scores(reward_model, prompts, responses):
    """r(x, y), the reward model's output at the last token of each response: [N] float32."""
    hidden = zip(response_hidden(reward_model, prompts, responses), responses)
    return reward_model.score(torch.stack([states[len(y)] for states, y in hidden]).float()).squeeze(-1)


@torch.no_grad()
def in_batches(function, prompts, responses, batch_size):
    """function(prompts, responses) -> [rows, …] in batches of like length, no gradient; [N, …] in order, padded."""
    K, rows = len(responses) // len(prompts), [None] * len(responses)
    lengths = torch.tensor([len(x) + sum(map(len, responses[K * b : K * b + K])) for b, x in enumerate(prompts)])
    for part in lengths.argsort().split(max(1, batch_size // K)):
        indices = [K * b + k for b in part for k in range(K)]
        for i, row in zip(indices, function([prompts[b] for b in part], [responses[i] for i in indices])):
            rows[i] = row
    return pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)


def centre_and_scale(scores, running):
    """Rewards [B, K]: scores less the prompt's mean, over their running root mean square, clipped to ±10; that scale.
    What is added to all scores of a prompt has no effect. `running`: [sum of squares, degrees of freedom] so far."""
    deviations = scores.double() - scores.double().mean(1, keepdim=True)
    running[0] += deviations.square().sum().item()
    running[1] += deviations.numel() - len(deviations)
    scale = (running[0] / running[1]) ** 0.5 or 1.0
    return (deviations / scale).clamp(-10, 10), scale


def evaluate(policy, reference, prompts, noise, judges, sft_rewards, temperature, end_ids, batch_size):
    """A point of the KL–reward frontier over B held-out prompts (docs/metrics.md), the responses, their rewards [B].
    `judges`: {"reward", maybe "gold": function of (prompts, responses)}; `sft_rewards` [B]: of the SFT policy's."""
    responses, _ = sample_responses(policy, prompts, noise, temperature, end_ids)
    kl = in_batches(partial(response_kl, policy, reference, temperature=temperature), prompts, responses, batch_size)
    values = {"kl": kl[:, 0], "kl_k1": kl[:, 1], **{name: f(prompts, responses) for name, f in judges.items()}}
    values["length"], values["eos_rate"] = torch.tensor([(len(y), y[-1] in end_ids) for y in responses]).T
    values["win_rate_vs_sft"] = (values["reward"] - sft_rewards).sign() / 2 + 0.5  # a tie is half a win
    point = {name: value.double().mean().item() for name, value in values.items()}
    errors = {f"{name}_se": value.double().std().item() / len(prompts) ** 0.5 for name, value in values.items()}
    return point | errors, responses, values["reward"]


def open_run(folder, args, **record):
    """Make the run's folder: args.json now; .jsonl files, TensorBoard's, model/ follow. UserError if it is taken."""
    if folder.is_dir() and any(folder.iterdir()) and not (args.overwrite and (folder / "args.json").is_file()):
        raise UserError(f"{folder} holds files already. Pass --overwrite to replace a run, or another --output-dir.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    git = subprocess.run(f"git -C '{TINY.parent}' rev-parse HEAD", shell=True, capture_output=True, text=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    record |= {"args": asdict(args), "versions": versions, "git_commit": git.stdout.strip()}
    (folder / "args.json").write_text(json.dumps(record, indent=1))


def log(file, writer, step, values):
    """Append a line to a .jsonl file of the run, and its numbers to TensorBoard."""
    with open(file, "a") as stream:
        stream.write(json.dumps({"step": step, **values}) + "\n")
    for key, value in values.items():
        if not isinstance(value, list):
            writer.add_scalar(f"eval/{key}" if file.stem == "frontier" else key, value, step)


# ----------------------------------------------------------------------------------------------------------------- main
def main(args):
    # ------------------------------------------------------------------------- policy, reference, reward, prompts
    args.dataset = args.dataset or ("tiny" if args.model == "tiny" else "hh")
    if re.fullmatch(r"pythia-[\d.]+[mb](-deduped)?", args.model) and not Path(args.model).exists():
        args.model = f"EleutherAI/{args.model}"
    if args.num_responses < 2:
        raise UserError(f"--num-responses {args.num_responses}: P3O compares responses to a prompt, at least 2.")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # Apple's GPU has no float64
    policy_path = find_stage("sft", args.model, args.dataset) or args.model
    policy = load_model(AutoModelForCausalLM, policy_path, "--model", accelerator.device, args, train=True)
    reference = load_model(AutoModelForCausalLM, policy_path, "--model", accelerator.device, args)
    for weight, ref_weight in zip(policy.parameters(), reference.parameters()):
        ref_weight.data = ref_weight.data if weight.requires_grad else weight.data  # what is frozen, once in memory
    tokenizer = fetch("tokenizer", policy_path, "--model", lambda: AutoTokenizer.from_pretrained(policy_path))
    ends = (tokenizer.eos_token_id, policy.config.eos_token_id, policy.generation_config.eos_token_id)
    end_ids = sorted({i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None})
    reward_path = args.reward_fn or args.reward_model or find_stage("reward_model", args.model, args.dataset)
    if not reward_path:
        raise UserError("no reward: run reward_model.py on this dataset, or pass --reward-model or --reward-fn.")
    print(f"policy        {policy_path} (for --model {args.model}); the reference is the same, frozen")
    print(f"reward        {reward_path} (--reward-model or --reward-fn change it)")
    if args.reward_fn:
        score = text_reward(args.reward_fn, "--reward-fn", tokenizer)
    else:
        classifier = partial(load_model, AutoModelForSequenceClassification, num_labels=1)
        reward_model = classifier(reward_path, "--reward-model", accelerator.device, args)
        score = partial(in_batches, partial(response_scores, reward_model), batch_size=args.micro_batch_size)
    gold_fn = args.gold_fn or (f"{TINY}/gold.py:gold_reward" if args.dataset == "tiny" else "")
    judges = {"reward": score} | ({"gold": text_reward(gold_fn, "--gold-fn", tokenizer)} if gold_fn else {})
    print(f"dataset       {args.dataset} (--dataset changes it)")
    prompts, eval_prompts = load_prompts(tokenizer, args.dataset, args.max_prompt_tokens)
    eval_prompts = eval_prompts[: args.eval_prompts]

    # ------------------------------------------------------------------------- run folder, optimiser, randomness
    base = "tiny" if args.model == "tiny" else short_name(policy_path)
    folder = Path(args.output_dir or f"runs/p3o_v2/{short_name(args.dataset)}/{base}")
    open_run(folder, args, script="p3o_v2", base_name=base, policy=policy_path, reward=reward_path)
    print(f"run folder    {folder} (--output-dir changes it)")
    writer = SummaryWriter(folder)
    lr = args.learning_rate or (1.5e-4 if args.model == "tiny" else 1e-6)  # 1e-6: the authors' for Pythia-1B
    optimizer = torch.optim.AdamW(policy.parameters(), lr, args.adam_betas, weight_decay=args.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(args.seed)  # of the order of prompts and minibatches, training's noise
    uniform = partial(torch.rand, dtype=torch.float64, generator=generator)

    # ------------------------------------------------------------------------- training
    B, K, T, max_rows = args.prompts_per_update, args.num_responses, args.max_response_tokens, args.micro_batch_size
    sft_noise, eval_noise = uniform(2, len(eval_prompts), 1, T, generator=torch.Generator().manual_seed(args.seed))
    sft_responses, _ = sample_responses(reference, eval_prompts, sft_noise, args.temperature, end_ids)
    sft_rewards = score(eval_prompts, sft_responses)
    queue, running, progress = [], [0.0, 0], tqdm(total=args.num_updates, desc="p3o_v2", unit="update")
    for update in range(args.num_updates + 1):
        # 0. Every so often, evaluate the policy as it is after so many updates.
        if update in (0, args.num_updates) or args.eval_every and update % args.eval_every == 0:
            evaluation = (eval_prompts, eval_noise, judges, sft_rewards, args.temperature, end_ids, max_rows)
            point, responses, rewards = evaluate(policy, reference, *evaluation)
            log(folder / "frontier.jsonl", writer, update, point)
            columns = {"prompts": eval_prompts, "sft_responses": sft_responses, "responses": responses}
            texts = {key: tokenizer.batch_decode(ids, skip_special_tokens=True) for key, ids in columns.items()}
            writer.add_text("samples", "\n\n".join(" | ".join(map(repr, row)) for row in zip(*texts.values())), update)
            log(folder / "samples.jsonl", writer, update, {**texts, "rewards": rewards.tolist()})
            means = ", ".join(f"{key} {value:.3g}" for key, value in point.items() if not key.endswith("_se"))
            shown = [" ".join(column[update % len(eval_prompts)].split()) for column in texts.values()]
            tqdm.write("\nafter {} updates: {}\n   prompt {}\n   before {}\n   now    {}".format(update, means, *shown))
        if update == args.num_updates:
            break

        # 1. Sample K responses to each of B prompts from the policy as it is now, π_old.
        clock = [time.perf_counter()]
        while len(queue) < B:
            queue += torch.randperm(len(prompts), generator=generator).tolist()
        batch, queue = [prompts[i] for i in queue[:B]], queue[B:]
        y, sampled_logprobs = sample_responses(policy, batch, uniform(B, K, T), args.temperature, end_ids)
        clock.append(time.perf_counter())

        # 2. Score them; a constant added to the scores of a prompt does not reach the rewards.
        scores = score(batch, y).to(policy.device).view(B, K)
        ended = torch.tensor([row[-1] in end_ids for row in y], device=policy.device).view(B, K)
        r, scale = centre_and_scale(scores - args.missing_eos_penalty * ~ended, running)  # [B, K]
        clock.append(time.perf_counter())

        # 3. log π_ref of the responses. log π_old was recorded while sampling, but bfloat16 rounds otherwise there:
        # then training's own forward gives it, here for all but the first minibatch, which gets it in its own step.
        logprobs_of = partial(response_logprobs, temperature=args.temperature)
        ref_logprobs = in_batches(partial(logprobs_of, reference), batch, y, max_rows)
        sampled_logps, ref_logps = (p.double().sum(1).view(B, K) for p in (sampled_logprobs, ref_logprobs))
        old_logps, groups = sampled_logps.clone(), [y[K * b : K * b + K] for b in range(B)]
        epochs = [torch.randperm(B, generator=generator).split(args.minibatch_size) for _ in range(args.num_epochs)]
        for later in epochs[0][1:] if args.dtype == "bfloat16" else ():
            inputs = [batch[b] for b in later], [row for b in later for row in groups[b]]
            old_logps[later] = in_batches(partial(logprobs_of, policy), *inputs, max_rows).double().sum(1).view(-1, K)
        clock.append(time.perf_counter())

        # 4. Several epochs over minibatches of prompts, these in micro-batches of like length.
        lengths = torch.tensor([len(x) + sum(map(len, rows)) for x, rows in zip(batch, groups)])
        stats, options = Counter(), (args.beta, args.clip_range, args.ratio_bound)
        for step, minibatch in enumerate(minibatch for epoch in epochs for minibatch in epoch):
            minibatch, new_logps = minibatch[lengths[minibatch].argsort()], []
            for micro in minibatch.split(max(1, max_rows // K)):
                inputs = [batch[b] for b in micro], [row for b in micro for row in groups[b]]
                new_logps.append(logprobs_of(policy, *inputs).double().sum(1).view(-1, K))
                if step == 0 and args.dtype == "bfloat16":
                    old_logps[micro] = new_logps[-1].detach()
                loss, _ = pairwise_loss(new_logps[-1], *(v[micro] for v in (old_logps, ref_logps, r)), *options)
                accelerator.backward(loss * (len(micro) / len(minibatch)))
            new_logps = torch.cat(new_logps).detach()  # metrics are of the whole minibatch, however it was cut
            _, metrics = pairwise_loss(new_logps, *(v[minibatch] for v in (old_logps, ref_logps, r)), *options)
            stats.update({key: value.item() * len(minibatch) / B / args.num_epochs for key, value in metrics.items()})
            if step == 0:  # no gradient step yet: sampling and training should agree
                ratio_init_error = ((new_logps - sampled_logps[minibatch]).exp() - 1).abs().max().item()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        clock.append(time.perf_counter())

        # 5. Log.
        seconds, tokens = clock[-1] - clock[0], sum(len(row) for row in y)
        d = (ref_logprobs - sampled_logprobs).double()  # for the k3 estimate of the KL, which is never negative
        metrics = {"objective/reward": scores.mean().item(), "objective/reward_std": scores.std().item()}
        metrics |= {"objective/kl": (d.exp() - 1 - d).sum(1).mean().item(), "objective/kl_k1": -d.sum(1).mean().item()}
        metrics |= {"objective/entropy": -sampled_logps.sum().item() / tokens, "objective/beta_raw": args.beta * scale}
        metrics |= {"objective/length": tokens / len(y), "objective/eos_rate": ended.double().mean().item(), **stats}
        metrics |= {"val/ratio_init_error": ratio_init_error, "grad_norm": grad_norm.item(), "lr": lr}
        phases = zip(("sample", "score", "logprobs", "train"), clock, clock[1:])
        metrics |= {f"time/{name}": end - start for name, start, end in phases} | {"time/update": seconds}
        metrics |= {"samples_per_second": len(y) / seconds, "tokens_per_second": tokens / seconds}
        log(folder / "metrics.jsonl", writer, update + 1, metrics)
        progress.set_postfix_str(f"reward {scores.mean():.2f}, KL {-d.sum(1).mean():.1f}, {len(y) / seconds:.0f}/s")
        progress.update()
    writer.close()
    for part in (policy.float(), tokenizer):
        part.save_pretrained(folder / "model.tmp")
    (folder / "model.tmp").rename(folder / "model")  # so that it is whole or not there
    tqdm.write(f"policy saved in {folder}/model; load it with AutoModelForCausalLM.from_pretrained")
    return point


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except UserError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
