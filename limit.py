"""The limit of the KL-reward frontier: the highest reward that any policy can have at each KL.

No policy, however it is trained, has a higher reward at the same KL(π ‖ π_ref) than one of these:

    π*_b(y|x) ∝ π_ref(y|x) exp(r(x, y) / b)                     b > 0, the temperature of the tilt

Its reward and KL are estimated from N samples y_i ~ π_ref(·|x) to each prompt, and averaged:

    w_i = exp(r_i / b) / Σ_j exp(r_j / b)
    reward  Σ w_i r_i      KL  log N + Σ w_i log w_i      effective sample size  1 / Σ w_i²

A finite N misses the best responses, so the estimate is too low. It is trusted where the effective
sample size is at least 50 and KL < log N − 4.5. The column more_than_half says how much more reward
N samples give than N/2 at the same KL. A second curve, best-of-n sampling, needs no training; its
KL is at most log n − (n−1)/n.

    python limit.py                                        # tiny world, up to an hour on a CPU
    python limit.py --num-samples 8192                     # keeps the samples, and adds to them
    python limit.py --model pythia-1b --dataset tldr
    python plot_frontier.py runs/p3o_v2/tiny/tiny --limit runs/limit/tiny/tiny/limit.json

An interrupted run resumes where it stopped. It writes limit.json, and samples.pt with all rewards.

Shapes: B prompts, K responses to each at a time, N in all, T response tokens, V vocabulary, D
hidden size. A prompt or a response is a 1-D tensor of token ids without padding; `responses` is a
list of B lists of K responses.
"""

import json
import math
import runpy
import sys
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import PartialState
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


def limit_curve(values, temperatures):
    """KL, effective sample size, reward and gold of π*_b, means over prompts, for each b.

    values: {"reward": [B, N], maybe "gold": [B, N]} of N samples from π_ref to each prompt
    Returns a table with the columns b, kl, ess, reward and maybe gold.
    """
    rows = []
    for b in temperatures:
        logw = (values["reward"] / b).log_softmax(1)
        w = logw.exp()
        row = {"b": b, "kl": math.log(w.shape[1]) + (w * logw).sum(1).mean().item()}
        row["ess"] = (1 / w.square().sum(1)).mean().item()
        for name, value in values.items():
            row[name] = (w * value).sum(1).mean().item()
        rows.append(row)
    return pd.DataFrame(rows)


def best_of_n(values, n):
    """Reward and gold of the response with the highest reward among n, means over prompts.

    Exact, over all subsets of n of the N samples: C(k−1, n−1) of them have rank k as their best
    (rank 1 is the worst sample, N the best).
    """
    order = values["reward"].argsort(stable=True, dim=1)[:, n - 1 :]  # ranks n to N
    rank = torch.arange(n, n + order.shape[1], dtype=torch.float64)
    w = (rank.lgamma() - (rank - n + 1).lgamma()).softmax(0)  # C(k−1, n−1) over their sum
    return {name: (value.gather(1, order) @ w).mean().item() for name, value in values.items()}


@dataclass
class Args:
    # Run
    seed: int = 1  # random seed
    output_dir: str = ""  # folder for the results (empty: runs/limit/DATASET/MODEL)
    num_samples: int = 2048  # samples per prompt, N, rounded up to a multiple of 16
    eval_prompts: int = 256  # held-out prompts to evaluate on
    # Models and data
    model: str = "tiny"  # tiny, pythia-14m ... pythia-12b, a hub id or a folder
    reward_model: str = ""  # hub id or folder (empty: run of reward_model.py, else a public one)
    reward_fn: str = ""  # FILE.py:FUNCTION that scores prompts and responses, instead of a model
    gold_fn: str = ""  # FILE.py:FUNCTION, the true reward if known; logged, never trained on
    dataset: str = ""  # tiny, hh, tldr, hub id, file or folder (empty: tiny for tiny, else tldr)
    max_prompt_tokens: int = 512  # longer prompts are dropped
    max_response_tokens: int = 128  # longer responses are cut
    temperature: float = 1.0  # divides the policy's logits, in sampling and in logprobs
    # Speed
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls (auto: bfloat16 on a GPU)
    micro_batch_size: int = 4  # prompts per forward pass, each with 16 responses
    sample_batch_size: int = 16  # prompts per sampling batch, each with 16 responses


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
MAY_BE_ZERO = ["seed"]
MAY_CHANGE = ("output_dir", "num_samples", "micro_batch_size", "sample_batch_size")
ROUND = 16  # samples per prompt that are drawn, and saved, at a time


class UserError(Exception):
    """A mistake in the arguments or the data, reported in one sentence without a traceback."""


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


# -------------------------------------------------------------------------- sampling and scoring
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


def seeded(*purpose):
    """A generator seeded by its purpose, so that no random state has to be saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(purpose).encode()))


# --------------------------------------------------------------------------- samples and results
def load_samples(file, record):
    """The rewards in the file, {"reward", maybe "gold": [B, N]}, or {} to start from scratch.

    Raises UserError if they were drawn with other settings.
    """
    if not file.is_file():
        return {}
    saved = torch.load(file)
    for key, value in record.items():
        before = saved["record"].get(key)
        if key not in MAY_CHANGE and before != value:
            raise UserError(f"{file} has {key} {before}, not {value}: pass another --output-dir")
    return saved["values"]


def limit_numbers(values):
    """The contents of limit.json: means, the curve by increasing KL, and best-of-n."""
    B, N = values["reward"].shape
    spread = values["reward"].std(1).mean().item() or 1.0
    temperatures = (spread * np.logspace(2, -2, 121)).tolist()
    curve = limit_curve(values, temperatures)
    curve["trusted"] = (curve.ess >= 50) & (curve.kl < math.log(N) - 4.5)
    half = limit_curve({"reward": values["reward"].reshape(2 * B, N // 2)}, temperatures)
    curve["more_than_half"] = curve.reward - np.interp(curve.kl, half.kl, half.reward)
    best = []
    for k in range(int(math.log2(N)) - 1):
        n = 2**k  # up to a quarter of N
        best.append({"n": n, "kl": math.log(n) - (n - 1) / n, **best_of_n(values, n)})
    means = {f"ref_{name}": value.mean().item() for name, value in values.items()}
    curve = curve.to_dict("records")
    return {"num_samples": N, "num_prompts": B, **means, "curve": curve, "best_of_n": best}


# ------------------------------------------------------------------------------------------ main
def main(args):
    args.dataset = args.dataset or ("tiny" if args.model == "tiny" else "tldr")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.dtype == "auto":
        args.dtype = "float32" if device.type == "cpu" else "bfloat16"
    check_numbers(args)
    folder = Path(args.output_dir or stage_folder(SCRIPT, args))
    file = folder / "samples.pt"

    # Reference, rewards and prompts
    policy_name = find_model("sft", args)
    reward_name = args.reward_fn or args.reward_model or find_model("reward_model", args)
    if not reward_name:
        raise UserError(
            f"no reward for --model {args.model} --dataset {args.dataset}: run sft.py and "
            f"reward_model.py for them, or pass --reward-model or --reward-fn"
        )
    record = {"script": SCRIPT, "policy": policy_name, "reward": reward_name, **asdict(args)}
    print(
        f"reference     {policy_name}\n"
        f"reward        {reward_name}\n"
        f"dataset       {args.dataset}\n"
        f"folder        {folder}"
    )
    reference = load_model(AutoModelForCausalLM, policy_name, device, args)
    tokenizer, end_ids = load_tokenizer(policy_name, reference)
    reward_fns = load_rewards(reward_name, tokenizer, device, args)
    longest = min(
        args.max_prompt_tokens,
        getattr(reference.config, "max_position_embeddings", sys.maxsize)
        - args.max_response_tokens,
    )
    prompts, _ = load_prompts(tokenizer, longest, args)
    prompts = sorted(prompts[: args.eval_prompts], key=len)
    record["data_crc"] = zlib.crc32(torch.cat(prompts).numpy())

    @torch.no_grad()
    @torch.autocast(device.type, torch.bfloat16, args.dtype == "bfloat16")
    def draw(number):
        """The rewards of a round of samples: {"reward", maybe "gold": [B, ROUND]}."""
        generator = seeded(args.seed, "limit", number)
        noise = torch.rand(
            len(prompts), ROUND, args.max_response_tokens, dtype=torch.float64, generator=generator
        )
        sampler = partial(
            sample_responses, reference, temperature=args.temperature, end_ids=end_ids
        )
        responses, _ = zip(*in_batches(sampler, prompts, noise, batch_size=args.sample_batch_size))
        return {name: f(prompts, responses).cpu().double() for name, f in reward_fns.items()}

    # Samples, saved after every round. If there are some, draw the first round again: its rewards
    # tell whether model and reward are still the same. Rounding may change a few.
    values = load_samples(file, record)
    done = values["reward"].shape[1] if values else 0
    if done:
        for name, again in draw(0).items():
            if (again - values[name][:, :ROUND]).abs().median() > 0.05 * values[name].std():
                raise UserError(f"{file} has another model or reward: pass another --output-dir")
    rounds = range(done // ROUND, math.ceil(args.num_samples / ROUND))
    for number in tqdm(rounds, f"after {done} samples"):
        for name, new in draw(number).items():
            values[name] = torch.cat([values[name], new], 1) if number else new
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save({"record": record, "values": values}, part)
        part.rename(file)  # never half written

    result = {**record, **limit_numbers(values)}
    (folder / "limit.json").write_text(json.dumps(result, indent=1))
    # Every fifth row of the middle of the curve
    for rows in (result["curve"][30:100:5], result["best_of_n"]):
        print("\n" + pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (UserError, OSError) as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        sys.exit(2)
