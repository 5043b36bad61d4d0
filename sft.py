"""SFT: supervised fine-tuning on demonstrations, the first stage of RLHF.

The later stages start from the resulting policy, and keep it as their reference policy.

    minimise   L = − Σ log π_θ(y_t | x, y_<t) / (number of response tokens)

over prompts x and demonstrated responses y, each with its end token. The loss is a mean over the
tokens of the whole minibatch, so it does not depend on micro-batches or the number of processes.
Prompt tokens have no loss.

    python sft.py                                           # built-in tiny world, 1 minute on a CPU
    python sft.py --model pythia-1b                         # TL;DR, one GPU
    python sft.py --model DIR --dataset DATA.jsonl          # columns prompt, completion (or chosen)

Shapes: B prompts, N responses, T response tokens, V vocabulary, D hidden size. A prompt or a
response is a 1-D tensor of token ids without padding; `responses` is a list of B lists of K = 1
response, since functions shared with other scripts take K responses to a prompt.
"""

import json
import math
import os
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
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def sft_loss(logprobs, mask):
    """Negative log-likelihood in nats per response token, and a dict of detached scalars.

    logprobs: [N, T] log π_θ(y_t|x, y_<t); mask: [N, T], 1 on response tokens and 0 on padding
    """
    loss = -(logprobs * mask).sum() / mask.sum()
    return loss, {"sft/loss": loss.detach()}


@dataclass
class Args:
    # Run
    seed: int = 1  # random seed
    output_dir: str = ""  # run folder (empty: runs/SCRIPT/DATASET/MODEL)
    resume: bool = False  # continue from the last checkpoint in the run folder, if there is one
    overwrite: bool = False  # replace the run in the run folder
    save_every: int = 200  # updates between checkpoints (0: only at the end)
    eval_every: int = 200  # updates between evaluations (0: only before and after training)
    eval_prompts: int = 256  # held-out prompts to evaluate on
    track: bool = False  # also log to Weights & Biases
    # Model and data
    model: str = "tiny"  # tiny, pythia-14m ... pythia-12b, a hub id or a folder
    dataset: str = ""  # tiny, hh, tldr, hub id, file or folder (empty: tiny for tiny, else tldr)
    max_prompt_tokens: int = 512  # longer prompts are dropped
    max_response_tokens: int = 128  # longer responses are cut
    # Sizes, over all processes unless noted
    data_epochs: int = 0  # passes over the data (0, sft and reward_model only: 1, or 3 for tiny)
    num_updates: int = 0  # updates (0: online scripts 1000, tiny 60; others by --data-epochs)
    minibatch_size: int = 32  # prompts (offline: examples) per optimizer step
    micro_batch_size: int = 32  # prompts per forward pass of one process
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


SCRIPT = Path(__file__).stem
TINY = Path(__file__).parent / "tiny"
DATASETS = {"tiny": str(TINY / "data"), "hh": "Anthropic/hh-rlhf", "tldr": "trl-lib/tldr"}
LOGS = ("metrics.jsonl", "evaluations.jsonl")
CHECKPOINT = f"checkpoint-{'[0-9]' * 6}"  # a glob pattern
MAY_BE_ZERO = (  # all other numbers must be above 0
    "seed save_every eval_every num_updates unfrozen_layers warmup_updates weight_decay "
    "max_grad_norm"
).split()
MAY_CHANGE = (  # in a resumed run
    "output_dir resume overwrite save_every eval_every track micro_batch_size "
    "gradient_checkpointing"
).split()


class UserError(Exception):
    """A mistake in the arguments or the data, reported in one sentence without a traceback."""


# ------------------------------------------------------------------------------ log-probabilities
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


def response_logprobs(model, prompts, responses, temperature):
    """log π(y_t | x, y_<t) of every response token: [B, K, T] float32, 0 on padding."""
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
    return pad_sequence(logprobs, batch_first=True).unflatten(0, (len(prompts), -1))


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


def seeded(*purpose):
    """A generator seeded by its purpose, so that no random state has to be saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(purpose).encode()))


def shuffled(n, total, seed):
    """`total` row numbers: pass after pass over n rows, each pass in a new order."""
    generator = seeded(seed, "order")
    passes = [torch.randperm(n, generator=generator) for _ in range(total // n + 1)]
    return torch.cat(passes)[:total]


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


# ------------------------------------------------------------------------------------------ main
def main(args):
    is_tiny = args.model == "tiny"
    args.dataset = args.dataset or ("tiny" if is_tiny else "tldr")
    args.data_epochs = args.data_epochs or (3 if is_tiny else 1)
    args.learning_rate = args.learning_rate or (3e-3 if is_tiny else 1e-5)
    on_cpu = not torch.cuda.is_available()
    if args.dtype == "auto":
        args.dtype = "float32" if on_cpu else "bfloat16"
    folder = Path(args.output_dir or stage_folder(SCRIPT, args))
    accelerator = Accelerator(cpu=on_cpu, log_with="tensorboard", project_dir=folder.parent)
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    policy_name = f"{TINY}/init" if is_tiny else args.model
    if args.model.startswith("pythia-"):
        policy_name = f"EleutherAI/{args.model}"
    check_numbers(args)
    if args.minibatch_size % world:
        raise UserError(
            f"--minibatch-size {args.minibatch_size} must be a multiple of the {world} processes"
        )

    # Run folder
    record = {"script": SCRIPT, "policy": policy_name, **asdict(args)}
    saved = find_checkpoint(folder, record, args)
    accelerator.print(
        f"model         {policy_name}\n"
        f"dataset       {args.dataset}\n"
        f"learning rate {args.learning_rate:g}\n"
        f"run folder    {folder}{f', resumed from {saved.name}' if saved else ''}"
    )

    # Policy and data
    if is_tiny:  # the built-in world has only a configuration, so the weights are random
        torch.manual_seed(args.seed)
        policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy_name))
        set_up_model(policy.to(device), args, trainable=True)
    else:
        policy = load_model(AutoModelForCausalLM, policy_name, device, args, trainable=True)
    tokenizer, end_ids = load_tokenizer(policy_name, policy)
    max_positions = getattr(policy.config, "max_position_embeddings", sys.maxsize)
    longest = min(args.max_prompt_tokens, max_positions - args.max_response_tokens)
    eval_examples, examples, data_crc = load_examples(
        tokenizer, end_ids, longest, ("prompt", "completion"), args
    )
    eval_size = min(args.eval_prompts, len(eval_examples)) // world * world
    eval_prompts, eval_responses = zip(*eval_examples[:eval_size][rank::world])
    epoch_updates = math.ceil(len(examples) / args.minibatch_size)
    args.num_updates = args.num_updates or args.data_epochs * epoch_updates

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

    @torch.no_grad()
    @autocast()
    def evaluate(update):
        """Log the loss of held-out examples, and print the greedy response to one prompt."""
        losses = torch.zeros(2, dtype=torch.float64, device=device)  # sum, number of tokens
        for i in range(0, len(eval_prompts), args.micro_batch_size):
            part = slice(i, i + args.micro_batch_size)
            logprobs = response_logprobs(policy, eval_prompts[part], eval_responses[part], 1.0)
            losses[0] -= logprobs.double().sum()
            losses[1] += sum(len(y) for [y] in eval_responses[part])
        losses = accelerator.reduce(losses)
        values = {"sft/eval_loss": losses[0] / losses[1]}
        log(accelerator, folder / "evaluations.jsonl", update, values)
        prompt = eval_prompts[update % len(eval_prompts)].to(device)[None]
        options = {"max_new_tokens": args.max_response_tokens, "eos_token_id": end_ids}
        output = policy.generate(prompt, do_sample=False, pad_token_id=end_ids[0], **options)
        if is_main:
            tqdm.write(f"update {update}: held-out loss {values['sft/eval_loss']:.3f} nats/token")
            tqdm.write(f"    prompt   {tokenizer.decode(prompt[0])!r}")
            tqdm.write(f"    response {tokenizer.decode(output[0, prompt.shape[1] :])!r}")

    if not saved:
        evaluate(0)
    total = args.num_updates * args.minibatch_size
    batches = shuffled(len(examples), total, args.seed).split(args.minibatch_size)
    # A bar of the main process; None hides it where there is no terminal
    progress = tqdm(range(state["update"] + 1, args.num_updates + 1), disable=not is_main or None)
    for update in progress:
        start = time.perf_counter()
        state["update"] = update

        # 1. One optimizer step on a minibatch, cut into micro-batches of prompts of similar length
        minibatch = [examples[i] for i in batches[update - 1]]
        num_tokens = sum(len(y) for _, [y] in minibatch)
        share = sorted(minibatch[rank::world], key=lambda example: len(example[0]))
        losses = []
        for i in range(0, len(share), args.micro_batch_size):
            prompts, responses = zip(*share[i : i + args.micro_batch_size])
            with autocast():
                logprobs = response_logprobs(policy, prompts, responses, 1.0)[:, 0]  # [N, T]
            mask = [torch.ones_like(y) for [y] in responses]
            mask = pad_sequence(mask, batch_first=True).to(device)
            loss, metrics = sft_loss(logprobs, mask)
            # sft_loss is the mean of this micro-batch: weight it by its share of the minibatch.
            # clip_gradients divides by the number of processes.
            weight = mask.sum() / num_tokens * world
            (loss * weight).backward()
            losses.append(metrics["sft/loss"] * weight)
        grad_norm = clip_gradients(accelerator, policy, args.max_grad_norm)
        lr = args.learning_rate * lr_factor(update, args)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        # 2. Log, evaluate, and save a checkpoint
        loss = accelerator.reduce(torch.stack(losses).sum(), "mean")
        metrics = {"sft/loss": loss, "grad_norm": grad_norm, "lr": lr}
        metrics["time/update"] = time.perf_counter() - start
        log(accelerator, folder / "metrics.jsonl", update, metrics)
        progress.set_postfix_str(f"loss {metrics['sft/loss']:.3f}")
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
