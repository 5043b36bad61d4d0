"""RLOO: REINFORCE leave-one-out (Ahmadian et al. 2024, 2402.14740), with PPO's clipping added.

Sample several responses to a prompt, score them, and raise the log-probability of the better ones
relative to the worse ones, in proportion to the difference in their rewards. Adding a constant to
all rewards of a prompt changes nothing, so no value function is needed.

    maximise   E[ r(x, y) ] − β KL(π_θ ‖ π_ref)             x ~ prompts, y ~ π_θ(·|x)

π_old is the policy at the start of an update, which samples all responses of the update; π(y) is
short for π(y|x). For K responses y_1, ..., y_K to a prompt, minimise L:

    r_i = (score_i − mean over the prompt) / s              s: numerator's running std; |r_i| ≤ 10
    p_i = r_i − β (log π_old(y_i) − log π_ref(y_i))         less the KL penalty of π_old
    A_i = p_i − mean of p_j over j ≠ i                      leave-one-out baseline
    ρ_i = π_θ(y_i) / π_old(y_i)                             sequence-level importance ratio
    L   = E max( −A_i ρ_i, −A_i clip(ρ_i, 1−ε, 1+ε) )

At the first step of an update π_θ = π_old, and the gradient is P3O's (p3o_v2.py) for every K. Later
P3O clips pairs jointly, weights them by both ratios, and takes the KL penalty of the current π_θ.
Dividing by s is not in the paper. It lets one β suit any reward.

    python rloo.py                                         # built-in tiny world, 2 minutes on a CPU
    python rloo.py --model pythia-1b                       # TL;DR, one GPU
    python rloo.py --model DIR --dataset DATA.jsonl --reward-fn reward.py:score
    accelerate launch --num_processes 8 rloo.py --model pythia-1b

Shapes: B prompts of one process, K responses to each, T response tokens, V vocabulary, D hidden
size. A prompt or a response is a 1-D tensor of token ids without padding; `responses` is a list of
B lists of K responses. `logprobs` are per token, `logps` are their sums over a response.
"""

import json
import os
import runpy
import shutil
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)


def policy_loss(logps, old_logps, ref_logps, rewards, beta, clip_range):
    """RLOO loss, mean over prompts and over their K responses.

    logps, old_logps, ref_logps: [B, K] log π(y|x) in nats under π_θ, π_old and π_ref
    rewards: [B, K] r, centred and scaled; beta: β; clip_range: ε (0: no clipping)
    Returns the scalar loss and a dict of detached scalars.
    """
    penalised = rewards - beta * (old_logps - ref_logps)  # p, [B, K]
    others = penalised.sum(1, keepdim=True) - penalised
    advantages = penalised - others / (logps.shape[1] - 1)  # A, [B, K]
    logratio = logps - old_logps  # log ρ, [B, K]
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range) if clip_range else ratio
    unclipped = -advantages * ratio
    clipped = -advantages * clipped_ratio
    losses = torch.maximum(unclipped, clipped)
    loss = losses.mean()
    ratio = logratio.detach().clamp(max=20).exp()  # for the metrics, without overflow
    metrics = {
        "policy/loss": loss.detach(),
        "policy/clipfrac": (losses > unclipped).double().mean(),
        "policy/ratio_max": ratio.max(),  # of a micro-batch; logged is their mean
        "policy/approx_kl": (ratio - 1 - logratio.detach()).mean(),  # KL(π_old ‖ π_θ)
        "policy/advantage_std": advantages.std(correction=0),
    }
    return loss, metrics


@dataclass
class Args:
    # Run
    seed: int = 1  # random seed
    output_dir: str = ""  # run folder (empty: runs/SCRIPT/DATASET/MODEL)
    resume: bool = False  # continue from the last checkpoint in the run folder, if there is one
    overwrite: bool = False  # replace the run in the run folder
    save_every: int = 20  # updates between checkpoints (0: only at the end)
    eval_every: int = 20  # updates between evaluations (0: only before and after training)
    eval_prompts: int = 256  # held-out prompts to evaluate on
    track: bool = False  # also log to Weights & Biases
    # Models and data
    model: str = "tiny"  # tiny, pythia-14m ... pythia-12b, a hub id or a folder
    reward_model: str = ""  # hub id or folder (empty: run of reward_model.py, else a public one)
    reward_fn: str = ""  # FILE.py:FUNCTION that scores prompts and responses, instead of a model
    gold_fn: str = ""  # FILE.py:FUNCTION, the true reward if known; logged, never trained on
    dataset: str = ""  # tiny, hh, tldr, hub id, file or folder (empty: tiny for tiny, else tldr)
    max_prompt_tokens: int = 512  # longer prompts are dropped
    max_response_tokens: int = 128  # longer responses are cut
    # Sizes, over all processes unless noted
    num_updates: int = 0  # updates (0: online scripts 1000, tiny 60; others by --data-epochs)
    prompts_per_update: int = 32  # prompts per update, each with K responses
    num_responses: int = 4  # responses per prompt, K
    num_epochs: int = 4  # passes over the responses of an update
    minibatch_size: int = 8  # prompts (offline: examples) per optimizer step
    micro_batch_size: int = 8  # prompts per forward pass of one process
    sample_batch_size: int = 64  # prompts per sampling batch of one process
    # Optimisation
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls (auto: bfloat16 on a GPU)
    unfrozen_layers: int = 0  # train only the last N layers, and the head if untied (0: all)
    gradient_checkpointing: bool = False  # less memory, more compute
    learning_rate: float = 0.0  # AdamW learning rate (0: 1e-6; sft, reward_model 1e-5; tiny more)
    weight_decay: float = 1e-6  # AdamW weight decay
    adam_betas: tuple[float, float] = (0.9, 0.95)  # AdamW betas
    max_grad_norm: float = 1.0  # largest gradient norm (0: no clipping)
    # Algorithm
    temperature: float = 1.0  # divides the policy's logits, in sampling and in logprobs
    missing_eos_penalty: float = 0.0  # subtracted from the score of a response without an end token
    beta: float = 0.2  # coefficient of the KL penalty, β
    clip_range: float = 0.2  # clipping range, ε (0: no clipping)


SCRIPT = Path(__file__).stem
TINY = Path(__file__).parent / "tiny"
DATASETS = {
    "tiny": str(TINY / "data"),
    "hh": "Anthropic/hh-rlhf",
    "tldr": "trl-lib/tldr-preference",
}
# Public models for TL;DR (1b, 2.8b, 6.9b), used where there is no local run of the stage.
PUBLIC_MODELS = {
    "sft": "trl-lib/pythia-{}-deduped-tldr-sft",
    "reward_model": "cleanrl/EleutherAI_pythia-{}-deduped__reward__tldr",
}
LOGS = ("metrics.jsonl", "frontier.jsonl", "samples.jsonl")
CHECKPOINT = f"checkpoint-{'[0-9]' * 6}"  # a glob pattern
MAY_BE_ZERO = (  # all other numbers must be above 0
    "seed save_every eval_every unfrozen_layers weight_decay max_grad_norm missing_eos_penalty "
    "beta clip_range"
).split()
MAY_CHANGE = (  # in a resumed run
    "output_dir resume overwrite save_every eval_every track num_updates micro_batch_size "
    "sample_batch_size gradient_checkpointing"
).split()


class UserError(Exception):
    """A mistake in the arguments or the data, reported in one sentence without a traceback."""


# ----------------------------------------------------------------- sampling and log-probabilities
def head_logits(model, hidden, temperature):
    """Logits [..., V] of hidden states [..., D], in float32 even under autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = model.get_output_embeddings()(hidden.float())
        return logits / temperature if temperature != 1 else logits


def sample_responses(model, prompts, noise, temperature, end_ids):
    """Sample K responses to each of B prompts from the full distribution (no top-k or top-p).

    This replaces `generate`: it reads a prompt once for its K responses, drops finished responses
    from the batch, and records their log-probabilities, which are needed anyway.

    noise: [B, K, T] uniform numbers; a response depends on its own T, not on the rest of the batch
    Returns B tuples: the K responses, up to and including an end token, and their logprobs [K, T].
    """
    device = model.device
    B, K, T = noise.shape
    noise = noise.reshape(B * K, T).to(device)
    ends = torch.tensor(end_ids, device=device)
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    mask = pad([torch.ones_like(prompt) for prompt in prompts]).to(device)
    cache = DynamicCache(config=model.config)
    # Under autocast, keys come in float32 and values in bfloat16: cache both in bfloat16.
    cache.update = lambda k, v, layer: DynamicCache.update(cache, k.type_as(v), v, layer)

    def next_logits(input_ids, mask):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = model.base_model(
            input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache
        )
        return head_logits(model, output.last_hidden_state[:, -1], temperature)

    logits = next_logits(pad(prompts).to(device), mask).repeat_interleave(K, 0)  # [B·K, V]
    mask = mask.repeat_interleave(K, 0)
    cache.batch_repeat_interleave(K)

    tokens = torch.full((B * K, T), -1, device=device)
    logprobs = torch.zeros(B * K, T, device=device)
    rows = torch.arange(B * K, device=device)  # of the responses that have not ended
    for t in range(T):
        probs = logits.softmax(-1)  # [rows, V]
        # Inverse transform sampling, in float64 so that rare tokens keep their probability.
        cdf = probs.double().cumsum(-1)
        token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:])  # [rows, 1]
        tokens[rows, t] = token[:, 0]
        logprobs[rows, t] = probs.gather(1, token)[:, 0].log()
        active = (~torch.isin(token[:, 0], ends)).nonzero()[:, 0]
        if len(active) < len(rows):
            rows, token, mask = rows[active], token[active], mask[active]
            cache.batch_select_indices(active)
        if len(rows) == 0 or t == T - 1:
            break
        mask = F.pad(mask, (0, 1), value=1)
        logits = next_logits(token, mask)
    responses = [[y[y >= 0] for y in group] for group in tokens.view(B, K, T).cpu()]
    return list(zip(responses, logprobs.view(B, K, T)))


def response_hidden(model, prompts, responses):
    """Last hidden states of responses: B·K tensors [T + 1, D].

    State t predicts token t of the response; the last state is that of its last token. The K
    responses to a prompt share one row, so that the prompt is read once. The prompt's last token z
    predicts the first token of a response, so each response starts with a copy of z. A response
    sees the prompt and itself, and its positions continue those of the prompt:

        row        x x z a a z b b
        segment    0 0 1 1 1 2 2 2
        position   0 1 2 3 4 2 3 4
    """
    rows, segments, positions, sizes = [], [], [], []
    for x, group in zip(prompts, responses):
        parts = [x[:-1]] + [torch.cat([x[-1:], y]) for y in group]
        size = [len(part) for part in parts]
        position = torch.cat([torch.arange(n) for n in size])
        position[size[0] :] += size[0]
        rows.append(torch.cat(parts))
        segments.append(torch.repeat_interleave(torch.tensor(size)))
        positions.append(position)
        sizes.append(size)
    pad = partial(pad_sequence, batch_first=True)
    segment = pad(segments).to(model.device)  # [B, row length]
    # A query sees earlier keys of the prompt (segment 0) and of its own response. Padding is last,
    # so only padding sees it.
    mask = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])
    output = model.base_model(
        pad(rows).to(model.device),
        attention_mask=mask.tril()[:, None],  # [B, 1, query, key]
        position_ids=pad(positions).to(model.device),
        use_cache=False,
    )
    hidden = []
    for states, size in zip(output.last_hidden_state, sizes):
        hidden += states[: sum(size)].split(size)[1:]
    return hidden


def response_logps(model, prompts, responses, temperature):
    """log π(y | x) of each response, the sum over its tokens: [B, K] float64."""
    hidden = response_hidden(model, prompts, responses)
    hidden = torch.cat([states[:-1] for states in hidden])  # [tokens, D]
    targets = [y for group in responses for y in group]

    def token_logprobs(hidden, targets):
        return -F.cross_entropy(head_logits(model, hidden, temperature), targets, reduction="none")

    # Logits of 128 tokens at a time fit a CPU's cache. Those of many tokens are recomputed in
    # the backward pass, so that a tensor [B, K, T, V] never exists.
    if len(hidden) > 1024:
        token_logprobs = partial(checkpoint, token_logprobs, use_reentrant=False)
    parts = map(token_logprobs, hidden.split(128), torch.cat(targets).to(hidden.device).split(128))
    logprobs = torch.cat(list(parts)).split([len(y) for y in targets])
    return torch.stack([row.double().sum() for row in logprobs]).view(len(prompts), -1)


def response_kl(policy, reference, prompts, responses, temperature):
    """KL(π_θ ‖ π_ref) over the whole vocabulary, summed over the tokens of a response: [B, K]."""
    kls = []
    hidden = response_hidden(policy, prompts, responses)
    ref_hidden = response_hidden(reference, prompts, responses)
    for states, ref_states in zip(hidden, ref_hidden):
        logp = head_logits(policy, states[:-1], temperature).log_softmax(-1)  # [T, V]
        ref_logp = head_logits(reference, ref_states[:-1], temperature).log_softmax(-1)
        kls.append(F.kl_div(ref_logp, logp, reduction="sum", log_target=True))
    return torch.stack(kls).double().view(len(prompts), -1)


def response_scores(reward_model, prompts, responses):
    """Reward model scores at the last token of each response: [B, K] float32."""
    hidden = response_hidden(reward_model, prompts, responses)
    last = torch.stack([states[-1] for states in hidden]).float()  # [B·K, D]
    with torch.autocast(last.device.type, enabled=False):
        return reward_model.score(last).view(len(prompts), -1)


def in_batches(function, *columns, batch_size):
    """Apply a function to slices of rows, and join the results: a list, or one stacked tensor."""
    results = []
    for start in range(0, len(columns[0]), batch_size):
        results += function(*(column[start : start + batch_size] for column in columns))
    return torch.stack(results) if torch.is_tensor(results[0]) else results


def lengths_and_ends(responses, end_ids, device):
    """Lengths of responses in tokens, and whether they end with an end token: [2, B, K] float64."""
    lengths = [[len(y) for y in group] for group in responses]
    ended = [[y[-1] in end_ids for y in group] for group in responses]
    return torch.tensor([lengths, ended]).to(device).double()


def check_agreement(logps, sampled_logps, args):
    """The largest difference in nats between log π(y|x) in training and in sampling, both [B, K].

    Raises UserError if they cannot come from the same policy. Rounding errors grow like √T.
    """
    error = (logps - sampled_logps).abs().max().item()
    per_token = 0.2 if args.dtype == "bfloat16" else 0.05
    if not error < per_token * args.max_response_tokens**0.5:
        raise UserError(
            f"--model {args.model}: logprobs in sampling and training differ by {error:.2g} nats; "
            f"sliding windows, ALiBi and recurrence are not supported"
        )
    return error


def clip_gradients(accelerator, model, max_norm):
    """Average the gradients over the processes and clip them. Returns the norm before clipping."""
    for weight in model.parameters():
        if accelerator.num_processes > 1 and weight.grad is not None:
            weight.grad = accelerator.reduce(weight.grad, "mean")
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or torch.inf)
    if not norm.isfinite():
        raise UserError(f"the gradient norm is {norm}: try a lower --learning-rate")
    return norm


def seeded(*purpose):
    """A generator seeded by its purpose, so that no random state has to be saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(purpose).encode()))


def shuffled(n, total, seed):
    """`total` row numbers: pass after pass over n rows, each pass in a new order."""
    generator = seeded(seed, "order")
    passes = [torch.randperm(n, generator=generator) for _ in range(total // n + 1)]
    return torch.cat(passes)[:total]


# ------------------------------------------------------------------------------ models and data
def check_numbers(args):
    """Raises UserError for a negative number, or a zero where it makes no sense."""
    for name, value in vars(args).items():
        lowest = 0 if name in MAY_BE_ZERO else 1e-9  # anything positive
        if type(value) in (int, float) and not value >= lowest:
            raise UserError(
                f"--{name.replace('_', '-')} {value} must be {'above' if lowest else 'at least'} 0"
            )


def stage_folder(script, args):
    """Where a script saves its run for this dataset and model unless told otherwise."""
    model = Path(args.model)
    name = model.parent.name if model.name == "model" else model.name  # scripts save RUN/model
    return Path(f"runs/{script}/{Path(args.dataset).name}/{name}")


def find_model(stage, args):
    """Where to load the model of a stage (sft, reward_model) from: a folder, a hub id or "".

    The model tiny is built in. Of others, a local run for this --model and --dataset comes first,
    then a public model. Otherwise the policy is --model itself, and there is no reward model.
    """
    folder = TINY / stage if args.model == "tiny" else stage_folder(stage, args) / "model"
    if folder.is_dir():
        return str(folder)
    size = args.model.removeprefix("pythia-").removesuffix("-deduped")
    if args.dataset == "tldr" and size in ("1b", "2.8b", "6.9b"):
        return PUBLIC_MODELS[stage].format(size)
    if stage == "reward_model":
        return ""
    return f"EleutherAI/{args.model}" if args.model.startswith("pythia-") else args.model


def load_model(auto_class, name, device, args, trainable=False):
    """A model from a folder or the hub. Raises UserError if it cannot be used here."""
    try:
        model, info = auto_class.from_pretrained(
            name, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except Exception as error:  # the libraries raise many kinds
        raise UserError(f"cannot load {name}, a folder or a hub id: {error}") from error
    if info["missing_keys"]:
        raise UserError(
            f"{name} is not a complete {auto_class.__name__}: no {sorted(info['missing_keys'])}"
        )
    # response_hidden and head_logits must give the model's own logits. They would not for scaled
    # logits, or if the second of two equal responses (any tokens) could see the first.
    head = model.get_output_embeddings()
    x = torch.arange(3)
    with torch.no_grad():
        _, hidden = response_hidden(model, [x[:1]], [[x[1:], x[1:]]])
        if head and not head(hidden).allclose(model(x[None]).logits, atol=1e-3):
            raise UserError(f"{name} is not supported: scaled logits, ALiBi or recurrence")
    set_up_model(model, args, trainable)
    return model.to(device)


def set_up_model(model, args, trainable):
    """Turn dropout off, choose the weights to train, and round the others to --dtype."""
    model.eval().requires_grad_(trainable)
    # The first ModuleList holds the transformer's layers.
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    if trainable and args.unfrozen_layers:
        model.base_model.requires_grad_(False)
        layers[-args.unfrozen_layers :].requires_grad_(True)
    if trainable and args.gradient_checkpointing:  # transformers' own is off in evaluation mode
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if args.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # the head stays in float32, with TF32 products
        # cuDNN's attention plans every new shape anew, and may give NaN with a mask.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Frozen weights are rounded as autocast rounds the trained ones.
        for module in model.base_model.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(torch.bfloat16)


def load_tokenizer(name, model):
    """The tokenizer of a policy, and the ids that end its responses."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None or not tokenizer("a").input_ids:
        raise UserError(f"{name} has no tokenizer, or one without an end-of-sequence token")
    ends = getattr(model, "generation_config", model.config).eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return tokenizer, sorted({tokenizer.eos_token_id, *ends} - {None})


def load_splits(args):
    """Held-out and training rows of a dataset; a tenth is held out if train is the only split."""
    path = DATASETS.get(args.dataset, args.dataset)
    try:
        file = Path(path).absolute()  # load_dataset cannot read a file in "."
        if file.is_file():
            splits = datasets.load_dataset(str(file.parent), data_files=file.name)
        else:
            splits = datasets.load_dataset(path)
        if list(splits) == ["train"]:
            splits = splits["train"].train_test_split(test_size=0.1, seed=0)
    except (datasets.exceptions.DatasetsError, ValueError, StopIteration) as error:
        raise UserError(f"--dataset {path}: {error.__cause__ or error!r}") from error
    test = {"test", "validation", "valid"} & set(splits)
    if "train" not in splits or not test:
        raise UserError(
            f"--dataset {path} has splits {list(splits)}, not train and test: run prepare_data.py"
        )
    return splits[min(test)], splits["train"]  # test comes before valid and validation


def encode_prompts(tokenizer, texts):
    """Token ids of prompts, 1-D tensors, without the EOS that some tokenizers add to every text."""
    adds_end = tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    ids = tokenizer(texts).input_ids if texts else []
    return [torch.tensor(row[:-1] if adds_end else row) for row in ids]


def load_prompts(tokenizer, longest, args):
    """Held-out and training prompts of at most `longest` tokens, each once.

    They are read from the column prompt or, as in HH, from chosen without its last answer.
    Raises UserError for data in another form.
    """
    prompts, held_out = [], {}
    for name, split in zip(("held-out", "training"), load_splits(args)):
        column = "prompt" if "prompt" in split.column_names else "chosen"
        texts = split[column] if column in split.column_names else [None]  # fails the check below
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"--dataset {args.dataset} has no text in prompt or chosen: run prepare_data.py"
            )
        if column == "chosen":
            texts = ["".join(text.rpartition("\n\nAssistant:")[:2]) for text in texts]
        unique = dict.fromkeys(texts)
        texts = [text for text in unique if text and text not in held_out]
        if args.dataset == "tldr":  # the rest are news articles
            texts = [text for text in texts if text.startswith("SUBREDDIT")]
        held_out = unique
        ids = encode_prompts(tokenizer, texts)
        kept = [row for row in ids if 0 < len(row) <= longest]
        PartialState().print(
            f"{name:13} {len(kept)} prompts. Dropped from {len(split)} rows: "
            f"{len(split) - len(unique)} duplicate prompts, "
            f"{len(unique) - len(texts)} empty, held out or (tldr) news articles, "
            f"{len(ids) - len(kept)} longer than {longest} tokens"
        )
        if not kept:
            raise UserError(
                f"--dataset {args.dataset} has no {name} prompts of up to {longest} tokens"
            )
        prompts.append(kept)
    return prompts


def load_function(spec):
    """The function that "FILE.py:FUNCTION" names."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{spec}: expected FILE.py:FUNCTION, found no file {path!r}")
    sys.path.insert(0, str(Path(path).parent))  # for what it imports
    functions = runpy.run_path(path)
    if name not in functions:
        raise UserError(f"{spec}: {path} has no function {name!r}")
    return functions[name]


def decode_texts(tokenizer, prompts, responses):
    """The texts of the B·K responses and of their prompts, without special tokens."""
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    rows = []
    for prompt, group in zip(prompts, responses):
        text = decode(prompt)
        for response in group:
            # Decoded alone, a response would lose its leading space with some tokenizers.
            whole = decode(torch.cat([prompt, response]))
            rows.append({"prompt": text, "response": whole[len(text) :]})
    return rows


@torch.autocast("cuda", enabled=False)  # a user's model keeps its precision
def text_rewards(function, tokenizer, prompts, responses):
    """Rewards [B, K] by a user's function of texts. Raises UserError unless each is one number."""
    rows = decode_texts(tokenizer, prompts, responses)
    rewards = function([row["prompt"] for row in rows], [row["response"] for row in rows])
    rewards = torch.as_tensor(rewards).float()
    if rewards.shape != (len(rows),) or not rewards.isfinite().all():
        raise UserError(
            f"{len(rows)} responses, scores {[*rewards.shape]}, {rewards.isfinite().sum()} finite"
        )
    return rewards.view(len(prompts), -1)


def load_rewards(reward_name, tokenizer, device, args):
    """{"reward": f, "gold": f}: functions f(prompts, responses) -> [B, K]; gold where it is known.

    Raises UserError for a reward model with other tokens or more than one output.
    """
    functions = {}
    if args.reward_fn:
        functions["reward"] = partial(text_rewards, load_function(args.reward_fn), tokenizer)
    elif reward_name:
        model = load_model(AutoModelForSequenceClassification, reward_name, device, args)
        vocabulary = AutoTokenizer.from_pretrained(reward_name).get_vocab()
        if model.config.num_labels != 1 or not tokenizer.get_vocab().items() <= vocabulary.items():
            raise UserError(
                f"{reward_name} must have one output (it has {model.config.num_labels}) and the "
                "policy's tokenizer; use docs/examples/classifier.py for another tokenizer"
            )
        score = partial(response_scores, model)
        functions["reward"] = partial(in_batches, score, batch_size=args.micro_batch_size)
    gold_fn = args.gold_fn or (f"{TINY}/gold.py:gold_reward" if args.dataset == "tiny" else "")
    if gold_fn:
        functions["gold"] = partial(text_rewards, load_function(gold_fn), tokenizer)
    return functions


# ------------------------------------------------------------------------------------ run folder
def find_checkpoint(folder, record, args):
    """The checkpoint to resume from, or None to start from scratch. Writes nothing.

    Raises UserError if the folder holds anything but a run, a run with other settings, or one that
    is to be neither resumed nor replaced.
    """
    file = folder / "args.json"
    saved = json.loads(file.read_text()) if file.is_file() else {}
    if "script" not in saved and any(folder.glob("*")):
        raise UserError(f"{folder} is not empty and not a run: pass another --output-dir")
    if not saved or args.overwrite and not args.resume:
        return None
    if not args.resume:
        raise UserError(f"{folder} holds a run: pass --resume, --overwrite or --output-dir")
    for key, value in json.loads(json.dumps(record)).items():  # tuples become lists
        if key not in MAY_CHANGE and saved.get(key) != value:
            raise UserError(
                f"{folder} has {key} {saved.get(key)}, not {value}: keep it or change --output-dir"
            )
    return max(folder.glob(f"{CHECKPOINT}.pt"), default=None)


def start_run(accelerator, folder, record, state, args):
    """Open the run folder: remove an earlier run, or truncate its logs to the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    if "log_sizes" in state:
        for name, size in state["log_sizes"].items():
            os.truncate(folder / name, size)
    else:
        shutil.rmtree(folder / "model", ignore_errors=True)
        for pattern in (*LOGS, "events.out.tfevents.*", f"{CHECKPOINT}.p*t"):
            for path in folder.glob(pattern):
                path.unlink()
        (folder / "args.json").write_text(json.dumps(record, indent=2))
    if args.track:
        import wandb  # optional

        wandb.init(project="p3o", name=str(folder), config=record, sync_tensorboard=True)
    # Drop what was logged after the checkpoint.
    accelerator.init_trackers(
        folder.name, init_kwargs={"tensorboard": {"purge_step": state["update"] + 1}}
    )


def save_checkpoint(folder, model, optimizer, state):
    """Save everything that a resumed run needs, then remove the previous checkpoint."""
    new = folder / f"checkpoint-{state['update']:06}.pt"
    part = new.with_suffix(".part")
    content = {
        **state,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "log_sizes": {name: (folder / name).stat().st_size for name in LOGS},
    }
    torch.save(content, part)
    part.rename(new)  # a checkpoint is never half written
    for old in set(folder.glob(f"{CHECKPOINT}.p*t")) - {new}:  # .pt and .part
        old.unlink()


def log(accelerator, file, update, values, prefix=""):
    """Append a line to a .jsonl file of the run, and add the values to TensorBoard."""
    values = {key: float(values[key]) for key in values}
    if accelerator.is_main_process:
        with open(file, "a") as stream:
            stream.write(json.dumps({"step": update, **values}) + "\n")
    # Standard errors would hide the means in TensorBoard.
    shown = {prefix + key: values[key] for key in values if not key.endswith("_se")}
    accelerator.log(shown, step=update)


def log_evaluation(accelerator, folder, update, values, samples):
    """Log means, standard errors and samples over held-out prompts; print the means and a sample.

    values: {name: [n, 1]} and samples: n dicts, of the prompts of this process
    """
    point = {}
    for name, value in values.items():
        value = accelerator.gather(value.to(accelerator.device).double())
        point[name] = value.mean()
        point[f"{name}_se"] = value.std(correction=0) / len(value) ** 0.5
    log(accelerator, folder / "frontier.jsonl", update, point, prefix="eval/")
    samples = gather_object(samples)
    means = [f"{name} {point[name]:.3g}" for name in values]
    lines = [f"update {update}: {', '.join(means)}"]
    lines += [f"    {key:12} {value!r}" for key, value in samples[update % len(samples)].items()]
    accelerator.log({"sample": "\n\n".join(lines)}, step=update)
    if accelerator.is_main_process:
        tqdm.write("\n".join(lines))
        with open(folder / "samples.jsonl", "a") as stream:
            stream.writelines(json.dumps({"step": update, **row}) + "\n" for row in samples)


# ------------------------------------------------------------------------------------------ main
def main(args):
    is_tiny = args.model == "tiny"
    args.dataset = args.dataset or ("tiny" if is_tiny else "tldr")
    args.num_updates = args.num_updates or (60 if is_tiny else 1000)
    args.learning_rate = args.learning_rate or (2e-4 if is_tiny else 1e-6)
    on_cpu = not torch.cuda.is_available()
    if args.dtype == "auto":
        args.dtype = "float32" if on_cpu else "bfloat16"
    folder = Path(args.output_dir or stage_folder(SCRIPT, args))
    accelerator = Accelerator(cpu=on_cpu, log_with="tensorboard", project_dir=folder.parent)
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    check_numbers(args)
    K, T = args.num_responses, args.max_response_tokens
    if K < 2 or args.prompts_per_update % args.minibatch_size or args.minibatch_size % world:
        raise UserError(
            f"--num-responses {K} must be at least 2, --prompts-per-update "
            f"{args.prompts_per_update} a multiple of --minibatch-size {args.minibatch_size}, and "
            f"--minibatch-size a multiple of the number of processes, {world}"
        )

    # Run folder
    policy_name = find_model("sft", args)
    reward_name = args.reward_fn or args.reward_model or find_model("reward_model", args)
    if not reward_name:
        raise UserError(
            f"no reward for {args.model}, {args.dataset}{'' if TINY.is_dir() else f' (no {TINY})'}"
            ": run sft.py and reward_model.py for them, or pass --reward-model or --reward-fn"
        )
    record = {"script": SCRIPT, "policy": policy_name, "reward": reward_name, **asdict(args)}
    saved = find_checkpoint(folder, record, args)
    accelerator.print(
        f"policy        {policy_name}, also the reference\n"
        f"reward        {reward_name}\n"
        f"dataset       {args.dataset}\n"
        f"learning rate {args.learning_rate:g}, {args.num_updates} updates\n"
        f"run folder    {folder}{f', resumed from {saved.name}' if saved else ''}"
    )

    # Policy, reference, rewards and prompts
    policy = load_model(AutoModelForCausalLM, policy_name, device, args, trainable=True)
    reference = load_model(AutoModelForCausalLM, policy_name, device, args)
    tokenizer, end_ids = load_tokenizer(policy_name, policy)
    reward_fns = load_rewards(reward_name, tokenizer, device, args)
    max_positions = getattr(policy.config, "max_position_embeddings", sys.maxsize)
    longest = min(args.max_prompt_tokens, max_positions - T)
    eval_prompts, prompts = load_prompts(tokenizer, longest, args)
    data_crc = zlib.crc32(torch.cat(eval_prompts + prompts).numpy())
    eval_size = min(args.eval_prompts, len(eval_prompts)) // world * world
    eval_prompts = sorted(eval_prompts[:eval_size], key=len)[rank::world]

    # Optimizer and checkpoint
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        args.learning_rate,
        args.adam_betas,
        weight_decay=args.weight_decay,
        fused=True,
    )
    state = {"update": 0, "square_sum": 0.0, "count": 0, "data_crc": data_crc}
    if saved:
        state = torch.load(saved, "cpu")
        if state["data_crc"] != data_crc:
            raise UserError(f"--dataset {args.dataset} has changed since {saved}")
        policy.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    accelerator.wait_for_everyone()  # all have read the folder, before it changes
    if is_main:
        start_run(accelerator, folder, record, state, args)

    def sample(model, prompts, k, *purpose):
        """k responses to each prompt, and their log π(y|x), [B, k] float64."""
        generator = seeded(args.seed, *purpose)  # numbers for all processes, the same in each
        noise = torch.rand(len(prompts) * world, k, T, dtype=torch.float64, generator=generator)
        sampler = partial(sample_responses, model, temperature=args.temperature, end_ids=end_ids)
        rows = in_batches(sampler, prompts, noise[rank::world], batch_size=args.sample_batch_size)
        responses, logprobs = zip(*rows)
        return responses, torch.stack(logprobs).double().sum(-1)

    def logps_of(model, prompts, responses):
        """log π(y|x) under a model, [B, K] float64."""
        function = partial(response_logps, model, temperature=args.temperature)
        return in_batches(function, prompts, responses, batch_size=args.micro_batch_size)

    autocast = partial(torch.autocast, device.type, torch.bfloat16, args.dtype == "bfloat16")
    with torch.no_grad(), autocast():  # the same random numbers as in evaluate
        sft_responses, _ = sample(reference, eval_prompts, 1, "eval")
        sft_rewards = reward_fns["reward"](eval_prompts, sft_responses)
        sft_samples = decode_texts(tokenizer, eval_prompts, sft_responses)

    @torch.no_grad()
    @autocast()
    def evaluate(update):
        """Log a point of the KL-reward frontier, from one response to each held-out prompt."""
        responses, logps = sample(policy, eval_prompts, 1, "eval")
        kl = partial(response_kl, policy, reference, temperature=args.temperature)
        values = {"kl": in_batches(kl, eval_prompts, responses, batch_size=args.micro_batch_size)}
        # A noisier estimate of the same KL, from the sampled tokens alone
        values["kl_k1"] = logps - logps_of(reference, eval_prompts, responses)
        for name, function in reward_fns.items():
            values[name] = function(eval_prompts, responses)  # [B, 1]
        values["win_rate_vs_sft"] = (values["reward"] - sft_rewards).sign() / 2 + 0.5  # tie: half
        values["length"], values["eos_rate"] = lengths_and_ends(responses, end_ids, device)
        samples = decode_texts(tokenizer, eval_prompts, responses)
        for row, sft_row in zip(samples, sft_samples):
            row["sft_response"] = sft_row["response"]
        log_evaluation(accelerator, folder, update, values, samples)

    if not saved:
        evaluate(0)
    batches = shuffled(len(prompts), args.num_updates * args.prompts_per_update, args.seed)
    batches = batches.split(args.prompts_per_update)
    # A bar of the main process; None hides it where there is no terminal
    progress = tqdm(range(state["update"] + 1, args.num_updates + 1), disable=not is_main or None)
    for update in progress:
        start = time.perf_counter()
        state["update"] = update
        with torch.no_grad(), autocast():
            # 1. The next prompts, sorted to save padding, and K responses to each from π_old
            batch = sorted([prompts[i] for i in batches[update - 1]], key=len)[rank::world]
            responses, sampled_logps = sample(policy, batch, K, "sample", update)

            # 2. Score them. Subtracting a prompt's mean cancels in the loss, but keeps scale and
            # clamp from depending on how hard the prompts are.
            scores = reward_fns["reward"](batch, responses).to(device).double()  # [B, K]
            lengths, ended = lengths_and_ends(responses, end_ids, device)
            rewards = scores - args.missing_eos_penalty * (1 - ended)
            rewards = rewards.float().double()  # so that the mean of equal rewards is exact
            rewards -= rewards.mean(1, keepdim=True)
            state["square_sum"] += accelerator.reduce(rewards.square().sum()).item()
            state["count"] += args.prompts_per_update * (K - 1)  # degrees of freedom
            scale = (state["square_sum"] / state["count"]) ** 0.5 or 1.0
            rewards = (rewards / scale).clamp(-10, 10)

            # 3. log π_ref and log π_old. In bfloat16, sampling rounds differently from training, so
            # log π_old is computed again: ρ must start at 1.
            ref_logps = logps_of(reference, batch, responses)
            old_logps = sampled_logps
            if args.dtype == "bfloat16":
                old_logps = logps_of(policy, batch, responses)

        # 4. Several epochs of minibatches, in micro-batches of prompts of similar length
        generator = seeded(args.seed, "minibatches", update)
        stats = []
        for _ in range(args.num_epochs):
            order = torch.randperm(len(batch), generator=generator)
            for minibatch in order.split(args.minibatch_size // world):
                minibatch = minibatch.sort(descending=True).values  # the longest prompts first
                for micro in minibatch.split(args.micro_batch_size):
                    inputs = ([batch[b] for b in micro], [responses[b] for b in micro])
                    with autocast():
                        logps = response_logps(policy, *inputs, args.temperature)
                    if not stats:  # no step yet: training must agree with sampling
                        init_error = check_agreement(logps, sampled_logps[micro], args)
                    loss, metrics = policy_loss(
                        logps, old_logps[micro], ref_logps[micro], rewards[micro],
                        args.beta, args.clip_range,
                    )  # fmt: skip
                    (loss * len(micro) / len(minibatch)).backward()
                    stats.append(metrics)
                grad_norm = clip_gradients(accelerator, policy, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()

        # 5. Log, evaluate, and save a checkpoint
        metrics = {key: torch.stack([row[key] for row in stats]).mean() for key in stats[0]}
        metrics["objective/reward"] = scores.mean()
        metrics["objective/kl"] = (old_logps - ref_logps).mean()
        metrics["objective/length"] = lengths.mean()
        metrics["objective/eos_rate"] = ended.mean()
        metrics["grad_norm"] = grad_norm  # of the last step
        metrics = accelerator.reduce(metrics, "mean")
        metrics["objective/beta_raw"] = args.beta * scale  # β in units of the score
        metrics["val/ratio_init_error"] = init_error
        metrics["time/update"] = time.perf_counter() - start
        log(accelerator, folder / "metrics.jsonl", update, metrics)
        progress.set_postfix_str(
            f"reward {metrics['objective/reward']:.2f}, KL {metrics['objective/kl']:.2f}"
        )
        is_last = update == args.num_updates
        if is_last or args.eval_every and update % args.eval_every == 0:
            evaluate(update)
        if is_main and (is_last or args.save_every and update % args.save_every == 0):
            save_checkpoint(folder, policy, optimizer, state)

    accelerator.end_training()
    if is_main:
        policy.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (UserError, OSError, KeyboardInterrupt) as error:
        print(f"{SCRIPT}.py: {str(error) or 'stopped; to go on, pass --resume'}", file=sys.stderr)
        sys.exit(2)
