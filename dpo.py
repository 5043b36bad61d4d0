"""DPO: Direct Preference Optimization (Rafailov et al. 2023, 2305.18290).

Learn from labelled pairs without a reward model: β times the log-ratio of the policy to the
reference is an implicit reward, fitted to the labels as a reward model would be.

    minimise   L = −E[ (1−ε) log σ(β (h_w − h_l)) + ε log σ(β (h_l − h_w)) ]

    h = log π_θ(y|x) − log π_ref(y|x)      of a response y to a prompt x: y_w chosen, y_l rejected
    ε                                      the share of labels taken to be wrong (0 in the paper)

Its optimum is that of E[r] − β KL(π_θ ‖ π_ref) for the reward r that explains the labels. log π_ref
of all pairs is computed once, and kept in the run folder.

    python dpo.py                                          # built-in tiny world, 1 minute on a CPU
    python dpo.py --model pythia-1b                        # TL;DR, one GPU
    python dpo.py --model DIR --dataset DATA.jsonl         # columns prompt, chosen and rejected
    accelerate launch --num_processes 8 dpo.py --model pythia-1b

Shapes: B prompts, K = 2 responses to each (chosen, rejected), T response tokens, V vocabulary, D
hidden size. A prompt or a response is a 1-D tensor of token ids without padding; `responses` is a
list of B lists of K responses. `logprobs` are per token, `logps` are their sums over a response.
"""

import json
import math
import os
import runpy
import shutil
import sys
import time
import zlib
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
    GenerationConfig,
)


def preference_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing
):
    """DPO loss (equation 7), mean over pairs.

    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: [B] log π(y|x) in nats under
    π_θ and π_ref; beta: β; label_smoothing: ε
    Returns the scalar loss and a dict of detached scalars.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # β h_w
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)  # β h_l
    margins = chosen_rewards - rejected_rewards
    # −(1−ε) log σ(z) − ε log σ(−z), as log σ(−z) = log σ(z) − z
    loss = (label_smoothing * margins - F.logsigmoid(margins)).mean()
    margins = margins.detach()
    metrics = {
        "policy/loss": loss.detach(),
        "rewards/chosen": chosen_rewards.detach().mean(),
        "rewards/rejected": rejected_rewards.detach().mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins.sign() / 2 + 0.5).mean(),  # a tie counts as half
        # The coefficient of ∇(h_w − h_l)
        "policy/pair_weight_mean": beta * (1 - label_smoothing - margins.sigmoid()).mean(),
    }
    return loss, metrics


@dataclass
class Args:
    # Run
    seed: int = 1  # random seed
    output_dir: str = ""  # run folder (empty: runs/SCRIPT/DATASET/MODEL)
    resume: bool = False  # continue from the last checkpoint in the run folder, if there is one
    overwrite: bool = False  # replace the run in the run folder
    save_every: int = 200  # updates between checkpoints (0: only at the end)
    eval_every: int = 100  # updates between evaluations (0: only before and after training)
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
    data_epochs: int = 1  # passes over the data (0, sft and reward_model only: 1, or 3 for tiny)
    num_updates: int = 0  # updates (0: online scripts 1000, tiny 60; others by --data-epochs)
    minibatch_size: int = 32  # prompts (offline: examples) per optimizer step
    micro_batch_size: int = 16  # prompts per forward pass of one process
    # Optimisation
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls (auto: bfloat16 on a GPU)
    unfrozen_layers: int = 0  # train only the last N layers, and the head if untied (0: all)
    gradient_checkpointing: bool = False  # less memory, more compute
    learning_rate: float = 0.0  # AdamW learning rate (0: 1e-6; sft, reward_model 1e-5; tiny more)
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"  # decay after warm-up
    warmup_updates: int = 0  # optimizer steps of linear warm-up
    weight_decay: float = 1e-6  # AdamW weight decay
    adam_betas: tuple[float, float] = (0.9, 0.95)  # AdamW betas
    max_grad_norm: float = 1.0  # largest gradient norm (0: no clipping)
    # Algorithm
    temperature: float = 1.0  # divides the policy's logits, in sampling and in logprobs
    beta: float = 0.1  # coefficient of the KL penalty, β
    label_smoothing: float = 0.0  # share of labels assumed to be wrong, ε


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
    "seed save_every eval_every num_updates unfrozen_layers warmup_updates weight_decay "
    "max_grad_norm label_smoothing"
).split()
MAY_CHANGE = (  # in a resumed run
    "output_dir resume overwrite save_every eval_every track micro_batch_size "
    "gradient_checkpointing"
).split()


class UserError(Exception):
    """A mistake in the arguments or the data, reported in one sentence without a traceback."""


# ----------------------------------------------------------------- sampling and log-probabilities
def generate_responses(model, prompts, end_ids, args):
    """Sample a response to each prompt from the whole distribution: B lists of one response.

    The library's `generate` is fast enough for the offline scripts. A batch has the same random
    numbers in every call, so that policies are compared with less noise. In bfloat16 the logits are
    rounded, so this samples from π only approximately.
    """
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    own_config = model.generation_config
    model.generation_config = GenerationConfig()  # the model's own may have penalties
    responses = []
    size = 4 * args.micro_batch_size  # more fits without gradients
    for i in range(0, len(prompts), size):
        torch.manual_seed(args.seed + i)
        batch = prompts[i : i + size]
        inputs = pad(batch).to(model.device)
        mask = pad([torch.ones_like(prompt) for prompt in batch]).to(model.device)
        output = model.generate(
            inputs,
            attention_mask=mask,
            do_sample=True,
            temperature=args.temperature,
            top_k=0,
            max_new_tokens=args.max_response_tokens,
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
        )
        for row in output[:, inputs.shape[1] :].cpu():
            is_end = torch.isin(row, torch.tensor(end_ids))
            responses.append([row[: (~is_end).cumprod(0).sum() + 1]])  # to the first end token
    model.generation_config = own_config
    return responses


def head_logits(model, hidden, temperature):
    """Logits [..., V] of hidden states [..., D], in float32 even under autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = model.get_output_embeddings()(hidden.float())
        return logits / temperature if temperature != 1 else logits


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


def split_dialogue(row):
    """A row of HH, whose chosen and rejected are whole dialogues, as prompt and responses.

    A response whose dialogue does not begin with the prompt of chosen is left empty.
    """
    prompt = "".join(row["chosen"].rpartition("\n\nAssistant:")[:2])
    parts = {"prompt": prompt}
    for key in ("chosen", "rejected"):
        text = row.get(key) or ""
        parts[key] = text.removeprefix(prompt) if text.startswith(prompt) else ""
    return parts


def encode_responses(tokenizer, texts, end_ids, longest, counts):
    """Token ids of responses, 1-D tensors. Counts in `counts` what is cut.

    A response ends at the first end token in its text, or else at an EOS that is added. A response
    longer than `longest` tokens is cut, and then has no end token.
    """
    responses = []
    for ids in tokenizer(texts, add_special_tokens=False).input_ids:
        ids = [*ids, tokenizer.eos_token_id]
        length = 1 + next(t for t, token in enumerate(ids) if token in end_ids)
        # Nothing is lost where the text ends with its end token, before the EOS added here.
        counts["texts cut at an end token"] += length < len(ids) - 1
        counts[f"responses cut at {longest} tokens"] += length > longest
        responses.append(torch.tensor(ids[: min(length, longest)]))
    return responses


def load_examples(tokenizer, end_ids, longest, keys, args):
    """Held-out and training examples, pairs of a prompt and a list of its responses, and their CRC.

    The rows have the columns `keys` (completion defaults to chosen), or chosen and rejected alone,
    as in HH. Prompts of more than `longest` tokens are dropped. Raises UserError for data in
    another form.
    """
    parts, held_out, crc = [], set(), 0
    for name, split in zip(("held-out", "training"), load_splits(args)):
        counts, rows, examples = Counter(), [], []
        for row in split:
            if "prompt" not in row and isinstance(row.get("chosen"), str):
                row = split_dialogue(row)
            row.setdefault("completion", row.get("chosen"))
            texts = [row.get(key) for key in keys]
            if not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"--dataset {args.dataset} lacks a text column of {keys}: run prepare_data.py"
                )
            if not all(texts):
                counts["dropped: empty text or no common prompt"] += 1
            elif texts[0] in held_out:
                counts["dropped: held-out prompt"] += 1
            elif args.dataset == "tldr" and not texts[0].startswith("SUBREDDIT"):
                counts["dropped: news article"] += 1
            else:
                rows.append(texts)
        held_out.update(texts[0] for texts in rows)
        crc = zlib.crc32(repr(rows).encode(), crc)
        prompts = encode_prompts(tokenizer, [texts[0] for texts in rows])
        for prompt, texts in zip(prompts, rows):
            if len(prompt) > longest:
                counts[f"dropped: prompt longer than {longest} tokens"] += 1
            else:
                group = encode_responses(
                    tokenizer, texts[1:], end_ids, args.max_response_tokens, counts
                )
                examples.append((prompt, group))
        PartialState().print(
            f"{name:13} {len(examples)} examples; {dict(+counts) or 'none dropped'}"
        )
        if not examples:
            raise UserError(f"--dataset {args.dataset} has no usable {name} examples")
        parts.append(examples)
    return *parts, crc


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


# -------------------------------------------------------------------------------------- training
def lr_factor(update, args):
    """The factor of --learning-rate at an update, counted from 1."""
    if update <= args.warmup_updates:
        return update / args.warmup_updates
    done = (update - 1 - args.warmup_updates) / (args.num_updates - args.warmup_updates)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return factors[args.lr_schedule]


def clip_gradients(accelerator, model, max_norm):
    """Average the gradients over the processes and clip them. Returns the norm before clipping."""
    for weight in model.parameters():
        if accelerator.num_processes > 1 and weight.grad is not None:
            weight.grad = accelerator.reduce(weight.grad, "mean")
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or torch.inf)
    if not norm.isfinite():
        raise UserError(f"the gradient norm is {norm}: try a lower --learning-rate")
    return norm


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
    args.learning_rate = args.learning_rate or (1e-4 if is_tiny else 1e-6)
    on_cpu = not torch.cuda.is_available()
    if args.dtype == "auto":
        args.dtype = "float32" if on_cpu else "bfloat16"
    folder = Path(args.output_dir or stage_folder(SCRIPT, args))
    accelerator = Accelerator(cpu=on_cpu, log_with="tensorboard", project_dir=folder.parent)
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    check_numbers(args)
    if args.minibatch_size % world:
        raise UserError(
            f"--minibatch-size {args.minibatch_size} must be a multiple of the {world} processes"
        )

    # Run folder
    policy_name = find_model("sft", args)
    reward_name = args.reward_fn or args.reward_model or find_model("reward_model", args)
    record = {"script": SCRIPT, "policy": policy_name, "reward": reward_name, **asdict(args)}
    saved = find_checkpoint(folder, record, args)
    accelerator.print(
        f"policy        {policy_name}, also the reference\n"
        f"reward        {reward_name or 'none'} (only for evaluation)\n"
        f"dataset       {args.dataset}\n"
        f"learning rate {args.learning_rate:g}\n"
        f"run folder    {folder}{f', resumed from {saved.name}' if saved else ''}"
    )

    # Policy, reference, rewards and pairs
    policy = load_model(AutoModelForCausalLM, policy_name, device, args, trainable=True)
    reference = load_model(AutoModelForCausalLM, policy_name, device, args)
    tokenizer, end_ids = load_tokenizer(policy_name, policy)
    reward_fns = load_rewards(reward_name, tokenizer, device, args)
    longest = min(
        args.max_prompt_tokens,
        getattr(policy.config, "max_position_embeddings", sys.maxsize) - args.max_response_tokens,
    )
    eval_examples, examples, data_crc = load_examples(
        tokenizer, end_ids, longest, ("prompt", "chosen", "rejected"), args
    )
    examples.sort(key=lambda example: len(example[0]))  # neighbours have similar lengths
    # One pair for each held-out prompt
    eval_examples = list({tuple(x.tolist()): (x, pair) for x, pair in eval_examples}.values())
    eval_size = min(args.eval_prompts, len(eval_examples)) // world * world
    eval_examples = eval_examples[rank:eval_size:world]
    eval_prompts = [x for x, _ in eval_examples]
    N = len(examples)
    args.num_updates = args.num_updates or math.ceil(args.data_epochs * N / args.minibatch_size)

    # Optimizer and checkpoint
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        args.learning_rate,
        args.adam_betas,
        weight_decay=args.weight_decay,
        fused=True,
    )
    state = {"update": 0, "data_crc": data_crc}
    if saved:
        state = torch.load(saved, "cpu")
        if state["data_crc"] != data_crc:
            raise UserError(f"--dataset {args.dataset} has changed since {saved}")
        policy.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    accelerator.wait_for_everyone()  # all have read the folder, before it changes
    if is_main:
        start_run(accelerator, folder, record, state, args)

    autocast = partial(torch.autocast, device.type, torch.bfloat16, args.dtype == "bfloat16")

    @autocast()
    def logps_of(model, examples):
        """log π(y|x) of the responses of n examples under a model, [n, K] float64."""
        return in_batches(
            partial(response_logps, model, temperature=args.temperature),
            *zip(*examples),
            batch_size=args.micro_batch_size,
        )

    @autocast()
    def answer(model):
        """A model's responses to the held-out prompts, with their rewards and texts."""
        responses = generate_responses(model, eval_prompts, end_ids, args)
        rewards = {name: function(eval_prompts, responses) for name, function in reward_fns.items()}
        return responses, rewards, decode_texts(tokenizer, eval_prompts, responses)

    # log π_ref of all pairs, which a resumed run loads, and the responses of the reference
    with torch.no_grad():
        if saved:
            ref_logps = torch.load(folder / "reference.pt", device.type)
        else:
            ref_logps = torch.zeros(N, 2, device=device).double()
            ref_logps[rank::world] = logps_of(reference, examples[rank::world])
            ref_logps = accelerator.reduce(ref_logps)  # the sum of all shares
            if is_main:
                torch.save(ref_logps, folder / "reference.pt")
        _, sft_rewards, sft_samples = answer(reference)

    @torch.no_grad()
    def evaluate(update):
        """Log a point of the KL-reward frontier, from one response to each held-out prompt."""
        reference.to(device)
        responses, rewards, samples = answer(policy)
        answers = list(zip(eval_prompts, responses))
        # Estimated from the sampled tokens alone, so noisier than kl in p3o_v2.py (there: kl_k1)
        values = {"kl": logps_of(policy, answers) - logps_of(reference, answers), **rewards}
        if reward_name:  # a tie counts as half
            values["win_rate_vs_sft"] = (rewards["reward"] - sft_rewards["reward"]).sign() / 2 + 0.5
        values["length"] = torch.tensor([len(y) for [y] in responses])
        values["eos_rate"] = torch.tensor([y[-1] in end_ids for [y] in responses])
        h = logps_of(policy, eval_examples) - logps_of(reference, eval_examples)  # [n, 2]
        values["accuracy"] = 0.5 - h.diff().sign() / 2  # 1 where h_w > h_l, ½ at a tie
        for row, sft_row in zip(samples, sft_samples):
            row["sft_response"] = sft_row["response"]
        log_evaluation(accelerator, folder, update, values, samples)

    if not saved:
        evaluate(0)
    torch.manual_seed(args.seed)  # the same order after a resume
    passes = [torch.randperm(N) for _ in range(args.num_updates * args.minibatch_size // N + 1)]
    batches = torch.cat(passes).split(args.minibatch_size)
    # A bar of the main process; None hides it where there is no terminal
    progress = tqdm(range(state["update"] + 1, args.num_updates + 1), disable=not is_main or None)
    for update in progress:
        start = time.perf_counter()
        state["update"] = update
        reference.to("cpu")  # not needed while training

        # 1. One optimizer step on a minibatch, cut into micro-batches of pairs of similar length
        minibatch = batches[update - 1][rank::world].sort(descending=True).values
        stats = []
        for micro in minibatch.split(args.micro_batch_size):
            logps = logps_of(policy, [examples[i] for i in micro])  # [B, 2]
            loss, metrics = preference_loss(
                *logps.T, *ref_logps[micro].T, args.beta, args.label_smoothing
            )
            (loss * len(micro) / len(minibatch)).backward()
            stats.append(metrics)
        grad_norm = clip_gradients(accelerator, policy, args.max_grad_norm)
        lr = args.learning_rate * lr_factor(update, args)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # 2. Log, evaluate, and save a checkpoint
        metrics = {key: torch.stack([row[key] for row in stats]).mean() for key in stats[0]}
        metrics["grad_norm"] = grad_norm
        metrics = accelerator.reduce(metrics, "mean")
        metrics["lr"] = lr
        metrics["time/update"] = time.perf_counter() - start
        log(accelerator, folder / "metrics.jsonl", update, metrics)
        progress.set_postfix_str(
            f"loss {metrics['policy/loss']:.3f}, accuracy {metrics['rewards/accuracies']:.2f}"
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
