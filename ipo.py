"""IPO: Identity Preference Optimization (Azar et al. 2023, arXiv 2310.12036).

As DPO, learn from labelled pairs by the policy's log-ratio to the reference, but ask for a margin of 1/(2τ) between the
chosen and the rejected one instead of ever more: labels that all agree cannot push π_θ ever further off the reference.

Objective    max_θ  E[ Ψ(p(y ≻ y')) ] − τ KL( π_θ ‖ π_ref )      Ψ the identity; p: probability to be preferred

Loss         L = mean ( (h_w − h_l) − 1/(2τ) )²                  h = log π_θ(y|x) − log π_ref(y|x); their eq. 17

For a pair labelled one way with probability p its minimiser is h_w − h_l = (2p − 1)/(2τ). log π_ref of the pairs is
computed once and kept in runs/cache; the reference model is gone while training, and loaded again only for the
evaluations, which need it for new responses.

Shapes: n pairs, N = 2n responses, T response tokens, V vocabulary, D hidden size. Prompts and responses are lists of
1-D id tensors, nothing padded; `logprobs` are per token, `logps` their sums over a response.

    python ipo.py                                                     the embedded world
    python ipo.py --model pythia-1b --dataset hh --dtype bfloat16     one GPU; after sft.py
    python ipo.py --model FOLDER --dataset FILE.jsonl                 your own: columns prompt, chosen, rejected
"""

import gc
import hashlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
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
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import HfApi, constants
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, StopStringCriteria
from transformers.cache_utils import DynamicCache, DynamicLayer

NAME, TINY = Path(__file__).stem, Path(__file__).parent / "tiny"
PUBLIC = {  # of stage and dataset, for pythia-1b, 2.8b and 6.9b: docs/recipes.md says where they are documented
    "sft/tldr": "trl-lib/pythia-{}-deduped-tldr-sft",
    "reward_model/tldr": "cleanrl/EleutherAI_pythia-{}-deduped__reward__tldr",
}
# Settings that a resumed run may change: what is left of it (num_updates: if lr is constant), memory and speed alone.
MAY_CHANGE = set("args config resume overwrite debug track output_dir num_updates eval_every save_every".split())
MAY_CHANGE |= {"device", "micro_batch_size", "gradient_checkpointing"}


def preference_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, tau):
    """IPO loss (paper: equation 17), mean over pairs; log π(y_w), log π(y_l) of policy and reference, all [n], in nats,
    sums over a response or, with --average-logprobs, means. tau: τ. Returns (loss, dict of detached scalars)."""
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps  # h
    excess = chosen - rejected - 1 / (2 * tau)
    loss = excess.square().mean()
    margins = tau * (chosen - rejected).detach()
    metrics = {"policy/loss": loss.detach(), "policy/pair_weight_mean": -2 * excess.detach().mean()}
    metrics |= {"rewards/chosen": tau * chosen.detach().mean(), "rewards/rejected": tau * rejected.detach().mean()}
    metrics |= {"rewards/margins": margins.mean(), "rewards/accuracies": (margins.sign() / 2 + 0.5).mean()}
    metrics |= {"logps/chosen": chosen_logps.detach().mean(), "logps/rejected": rejected_logps.detach().mean()}
    return loss, metrics


@dataclass
class Args:
    # Run
    seed: int = 1  # of the sampling noise, the order of the data and any new weights
    output_dir: str = ""  # the run's folder (default: runs/SCRIPT/DATASET/MODEL)
    overwrite: bool = False  # replace the run that the folder holds
    resume: bool = False  # go on from the folder's last checkpoint, or from the beginning where there is none
    save_every: int = 200  # updates between checkpoints (0: only at the end, and when stopped by Ctrl-C or SIGTERM)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    dry_run: bool = False  # show two rows as the model sees them, the lengths of all and the memory needed, and stop
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    debug: bool = False  # show the traceback of a mistake too
    config: str = ""  # args.json of a run, whose settings take the place of the defaults (all but its folder)
    # Model, rewards, data
    model: str = "tiny"  # tiny (embedded), a short name (pythia-14m … pythia-12b), a hub id, or a folder
    reward_model: str = ""  # folder or hub id, fed this model's token ids (default: what reward_model.py saved for it)
    reward_fn: str = ""  # FILE.py:f, in place of a model: f(prompts: list[str], responses: list[str]) -> list[float]
    gold_fn: str = ""  # FILE.py:f, the true reward of the same form where one is known; only ever evaluated
    trust_remote_code: bool = False  # run the Python code that a model's folder or hub page brings
    dataset: str = ""  # tiny, hh, tldr, a hub id, a .jsonl[.gz] or .parquet file, a folder (default: hh; tiny for tiny)
    subset: str = ""  # configuration of a hub dataset
    split: str = ""  # TRAIN or TRAIN,HELD-OUT (default: train, or the only one; test or validation, or a tenth of all)
    chat_template: str = ""  # file with the template that renders messages (default: the tokenizer's)
    map: tuple[str, ...] = ()  # prompt=question chosen=best …: columns that have other names than the script's
    max_prompt_tokens: int = 512  # longer prompts are dropped, and counted
    truncate_prompts: bool = False  # cut longer prompts on the left instead
    max_response_tokens: int = 128  # length limit of a response
    stop: tuple[str, ...] = ()  # texts that end a response, no part of its answer (for hh: "\n\nHuman:"; "": none)
    # Sizes
    data_epochs: int = 0  # passes over the training data (0: one; on tiny sft.py and reward_model.py take 3)
    num_updates: int = 0  # rounds of sampling and training (online); optimizer steps at most (offline; 0: all data)
    minibatch_size: int = 32  # prompts with all responses (online), pairs or rows (offline) per optimizer step
    micro_batch_size: int = 32  # sequences in one forward, a prompt's at least; sampling aside; for memory and speed
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products and frozen weights (float16 overflows)
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third slower
    unfrozen_layers: int = 0  # train only this many last layers, and the head if it has its own weights (0: all)
    lora_rank: int = 0  # rank of adapters to those layers, then trained and saved alone (0: train the weights)
    # Optimiser
    learning_rate: float = 0.0  # AdamW's step size (0: 1e-6, for 1B; sft.py, reward_model.py: 1e-5; more for tiny)
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"  # how the learning rate falls over the run
    warmup_updates: int = 0  # updates in which the learning rate rises from 0
    weight_decay: float = 1e-6  # AdamW's, decoupled
    adam_betas: tuple[float, float] = (0.9, 0.95)  # decay rates of AdamW's two moments
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm (0: never)
    # Evaluation on held-out prompts; there is always one before training and one after
    eval_every: int = 100  # updates between evaluations (0: only these two)
    eval_prompts: int = 256  # held-out prompts used, the first ones
    # Algorithm
    temperature: float = 1.0  # of the distribution sampled from, in every log-probability and KL too
    tau: float = 0.1  # τ, the weight of what keeps the policy at the reference
    average_logprobs: bool = False  # log π(y) of chosen and rejected is the mean over tokens, not the sum


class UserError(Exception):
    """A mistake in what the user gave, told in one sentence without a traceback; exit code 2, nothing was changed."""


class RunError(Exception):
    """What ends a run that had begun, told in one sentence; exit code 1, the last checkpoint is kept."""


# ------------------------------------------------------------------------------------------------ set up, find and load
def set_up(args):
    """The accelerator; args completed. Raises UserError, for a number out of range before all else."""
    at_least_1 = "micro_batch_size minibatch_size prompts_per_update num_responses num_epochs ratio_bound"
    at_least_1 += " max_prompt_tokens max_response_tokens ref_samples_per_prompt"
    lowest = dict.fromkeys(at_least_1.split(), 1) | {"eval_prompts": 2, "temperature": 0.001}
    for name, value in vars(args).items():
        low, high = lowest.get(name, 0), 1 if name in ("adam_betas", "label_smoothing") else 2**63
        if not all(low <= x < high for x in (value if isinstance(value, tuple) else [value]) if not isinstance(x, str)):
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {low}, below {high:.3g}.")
    if "tiny" in (args.model, args.dataset) and not TINY.is_dir():
        raise UserError("tiny/ lies beside the scripts in the repository: pass --model, --dataset and --reward-fn.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; pass --device cpu, or leave it out.")
    if args.track:
        import wandb  # noqa: F401  optional: if it is missing, no run is touched
    args.dataset = args.dataset or ("tiny" if args.model == "tiny" else "hh")
    if re.fullmatch(r"pythia-[\d.]+[mb](-deduped)?", args.model) and not Path(args.model).exists():
        args.model = f"EleutherAI/{args.model}"
    if "stop" in vars(args):
        args.stop = tuple(x.replace(r"\n", "\n") for x in args.stop) or ("\n\nHuman:",) * (args.dataset == "hh")
    accelerator = Accelerator(cpu=args.device == "cpu" or not torch.cuda.is_available(), mixed_precision="no")
    size, prompts, processes = args.minibatch_size, vars(args).get("prompts_per_update"), accelerator.num_processes
    if prompts and (prompts % size or size % processes):
        wanted = f"a multiple of --minibatch-size {size}, itself one of the number of processes, {processes}"
        raise UserError(f"--prompts-per-update {prompts}: expected {wanted}.")
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")
    return accelerator


def short_name(path):
    """Last part of a path or hub id without its ending; a model that a run saved keeps the name of its base."""
    try:
        record = json.loads((Path(path).parent / "args.json").read_text())
        base = record["base_name"] if "base_name" in record else record["model"].removesuffix("/model")
        return os.path.basename(os.path.abspath(base))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no record, or none of a run
        return re.sub(r"(\.jsonl|\.json|\.parquet)?(\.gz)?$", "", os.path.basename(os.path.abspath(path)))


def find_stage(stage, model, dataset):
    """The model that an earlier stage (sft, reward_model) saved for this base model and dataset, or else a public one:
    a folder, a hub id, or None."""
    if model == "tiny":
        return f"{TINY}/{stage}"
    for name in (Path(dataset).name, short_name(dataset)):  # sft.py and reward_model.py keep its ending
        run, models = Path("runs") / stage / name / short_name(model), (model, model.removeprefix("EleutherAI/"))
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # no record, or none of a run
            saved = json.loads((run / "args.json").read_text())
            there = saved.get("args", saved)
            fits = short_name(f"{run}/model") == short_name(model) and (run / "model").is_dir()
            if fits and there["dataset"] == dataset and (stage != "sft" or there["model"] in models):
                return f"{run}/model"
    size = re.fullmatch(r"EleutherAI/pythia-(1b|2\.8b|6\.9b)(-deduped)?", model)
    return PUBLIC.get(f"{stage}/{dataset}", "").format(size[1]) or None if size else None


def fetch(kind, name, flag, load, **options):
    """load(name, **options), a hub id only after one request of at most 10 s has found it. Raises UserError."""
    try:
        if kind in ("model", "tokenizer", "dataset") and not Path(name).exists() and not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(name, repo_type="dataset" if kind == "dataset" else "model", timeout=10)
        return load(name, **options)
    except Exception as error:
        error = error.__cause__ or error  # the datasets library wraps the real one
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        where = "can be read from there" if Path(name).exists() else "is there, nor on huggingface.co; pass a path"
        raise UserError(f"{flag} {name}: no {kind} {where} ({reason}).") from error


def load_model(auto_class, name, flag, device, args, train=False, new_head=False, **options):
    """A model in evaluation mode, so without dropout, from a folder or the hub; see set_up_model. Raises UserError."""
    options |= {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": args.trust_remote_code}
    model, info = fetch("model", name, flag, auto_class.from_pretrained, **options)
    if info["missing_keys"] and not new_head:
        raise UserError(f"{flag} {name}: it is no {auto_class.__name__[4:]}, it lacks {sorted(info['missing_keys'])}.")
    if train and getattr(model, "peft_config", None):
        raise UserError(f"{flag} {name}: it is an adapter; merge it into its model first, see docs/recipes.md.")
    head, ids = model.get_output_embeddings(), torch.tensor([[0, 1, 2]])
    with torch.no_grad():
        if head and not torch.allclose(model(ids).logits, head(model.base_model(ids).last_hidden_state), 0, 1e-4, True):
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
    if train and vars(args).get("lora_rank"):
        from peft import LoraConfig  # optional

        which = [k.removesuffix(".weight") for k, w in layers.named_parameters() if w.ndim == 2 and w.requires_grad]
        options = {"target_modules": which, "modules_to_save": ["score"] * hasattr(model, "score") or None}
        options |= {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, "task_type": "CAUSAL_LM"}
        model.add_adapter(LoraConfig(**options))
    for layer in layers if train and args.gradient_checkpointing else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if args.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # for the head: float32 in and out, TF32 products
        trunk.forward = torch.autocast(model.device.type, torch.bfloat16)(trunk.forward)
        for part in trunk.modules():
            if isinstance(part, torch.nn.Linear) and (w := part.weight).dtype == torch.float32 and not w.requires_grad:
                part.to(torch.bfloat16)
    return model


def load_tokenizer(name, model, args):
    """The tokenizer of a policy, and the ids that end its responses. Raises UserError."""
    options = {"trust_remote_code": args.trust_remote_code}
    tokenizer = fetch("tokenizer", name, "--model", AutoTokenizer.from_pretrained, **options)
    if args.chat_template:
        tokenizer.chat_template = fetch("chat template", Path(args.chat_template), "--chat-template", Path.read_text)
    if not tokenizer("Hi").input_ids:  # what the library makes up where there is none
        raise UserError(f"--model {name}: no tokenizer is there; save the model's own in that folder.")
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(f"--model {name}: its tokenizer has {len(tokenizer):,} tokens, its embeddings {vocabulary:,}.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no end-of-sequence token, which ends a response.")
    generation = getattr(model, "generation_config", None)
    with suppress(OSError, ValueError):  # a classifier made of a policy has none
        generation = generation or transformers.GenerationConfig.from_pretrained(name)
    ends = (tokenizer.eos_token_id, model.config.eos_token_id, getattr(generation, "eos_token_id", None))
    return tokenizer, sorted({i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None})


def to_texts(row, columns, tokenizer):
    """Texts [prompt, *columns] of a row; chosen stands in for completion. Without a prompt the responses begin with it:
    the first up to its last "Assistant:" (HH), or all its messages but the last; one that does not is left empty. The
    chat template renders messages, less BOS and EOS, which are added later. Raises ValueError."""
    if "messages" in row and not {"chosen", "completion"} & {*row}:
        row = {"chosen": row["messages"]} | {key: x for key, x in row.items() if key != "prompt"}  # their first turn
    columns = columns or ("completion",) * isinstance(row.get("chosen", row.get("completion")), list)
    keys = ("prompt", *columns) if columns or "prompt" in row else ("prompt", "chosen")
    prompt, *responses = values = [{"prompt": "", "completion": row.get("chosen"), **row}.get(key) for key in keys]
    for key, x in zip(keys, values):
        if not isinstance(x, str) and not (isinstance(x, list) and {*map(type, x)} == {dict}):
            names = key if "prompt" in row else f"prompt=COLUMN {key}"
            found = f"found {x!r:.60} (columns: {', '.join(row)}); --map {names}=COLUMN names another"
            raise ValueError(f"expected text or messages in {key}; {found}")
    if any(isinstance(x, list) for x in values):
        if not tokenizer.chat_template:
            raise ValueError("messages need a chat template, which the tokenizer lacks: pass --chat-template FILE")
        responses = [[{"role": "assistant", "content": y}] if isinstance(y, str) else y for y in responses]
        dialogue = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        dialogue = dialogue if prompt else responses[0][:-1]
        if prompt and dialogue[-1].get("role") == "assistant":
            raise ValueError("the messages of the prompt end with an answer; --map completion=COLUMN if they hold both")
        if any(y[-1].get("role") in ("user", "system", "developer", "tool") for y in responses):
            raise ValueError("the last message is not the assistant's answer; --map prompt=COLUMN if all is the prompt")
        render = partial(tokenizer.apply_chat_template, tokenize=False)
        # A response of one message lacks the dialogue before it.
        responses = [render(y if y[1:] or not prompt else dialogue + y).rstrip() for y in responses]
        bos = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("").input_ids else ""
        prompt = render(dialogue, add_generation_prompt=True).removeprefix(bos)
        responses = [y.removeprefix(bos).removesuffix(tokenizer.eos_token) for y in responses]
    elif "prompt" in row:
        return values
    else:
        prompt = "".join(responses[0].rpartition("\n\nAssistant:")[:2])
    return [prompt, *(y[len(prompt) :] if y.startswith(prompt) else "" for y in responses)]


def read_dataset(tokenizer, args, columns):
    """(train, held-out) rows of texts, see to_texts; --map names columns. Held-out prompts are not trained on; if none
    are given a tenth of all (at most 1,000) is held out. JSON lines are parsed here: the library would turn text that
    looks like a date into one. Raises UserError."""
    path = {"tiny": f"{TINY}/data", "hh": "Anthropic/hh-rlhf", "tldr": "trl-lib/tldr-preference"}
    path, flag, subset = path.get(args.dataset, args.dataset), f"--dataset {args.dataset}", args.subset or None
    loader, files = ("parquet" if path.endswith(".parquet") else "json", path) if Path(path).is_file() else (path, None)
    if files and not os.path.getsize(path):
        raise UserError(f"{flag}: the file is empty.")

    def load(path):
        if any(Path(path, x).is_file() for x in ("state.json", "dataset_dict.json")):  # of save_to_disk
            found = datasets.load_from_disk(path)
            return found if isinstance(found, dict) else {"train": found}, False
        builder = datasets.load_dataset_builder(loader, subset, data_files=files)
        is_json = type(builder).__name__.startswith("Json")  # in a folder its name goes on with the folder's
        source = ("text", None, None, builder.config.data_files) if is_json else (loader, subset, None, files)
        return datasets.load_dataset(*source), is_json

    splits, is_json = fetch("dataset", path, "--dataset", load)
    first, *held = args.split.split(",") if args.split else ["train" if len(splits) > 1 else [*splits][0]]
    if not {first, *held} <= {*splits} or held[1:] or first in held:
        raise UserError(f"--split {','.join((first, *held))}: {flag} has the splits {', '.join(splits)}.")
    names = [x for x in dict.fromkeys((first, *held, "test", "validation")) if x in splits]
    parts, renamed = [[] for _ in names[:2]], [x.partition("=")[::2] for x in args.map]
    for name, part in zip(names, parts):
        for number, row in enumerate(splits[name], 1):
            try:
                if not is_json or row["text"].strip():
                    row = {**json.loads(row["text"])} if is_json else row
                    if wrong := [f"{k}={x}" for k, x in renamed if x not in row and (k != "rejected" or k in columns)]:
                        raise ValueError(f"--map {' '.join(wrong)}: the columns are {', '.join(row)}")
                    mapped = {key: row.get(x) for key, x in renamed}
                    if "prompt" in mapped:  # goes before messages
                        row.pop("messages", None)
                    part.append(to_texts(row | mapped, columns, tokenizer))
            except Exception as error:  # a chat template raises what it likes
                raise UserError(f"{flag}: row {number} of {name}: {type(error).__name__}: {error}.") from error
    if args.dataset == "tldr":
        posts = [[row for row in part if row[0].startswith("SUBREDDIT")] for part in parts]
        print(f"{'':14}{sum(map(len, parts)) - sum(map(len, posts)):,} rows dropped: of CNN/DM, no Reddit posts")
        parts = posts
    held = {x for x, *_ in parts[-1]} - {""}
    if len(parts) == 1:  # a tenth of the prompts, the same in every script
        held = {*sorted(held, key=lambda x: hashlib.sha256(x.encode()).digest())[: min(max(len(held) // 10, 2), 1000)]}
        parts.append([row for row in parts[0] if row[0] in held])
    elif dropped := sum(row[0] in held for row in parts[0]):
        print(f"{'':14}{dropped:,} train rows dropped: their prompts are held out")
    return [[row for row in parts[0] if row[0] not in held], parts[1]]


def load_rows(tokenizer, end_ids, args, columns):
    """(train, held-out) rows of 1-D id tensors, {"prompt", *columns}, responses with one end (EOS where they have none
    of `end_ids`); prints what is left out. Prompt and response are tokenised apart, as in use. Raises UserError."""
    parts, keys = read_dataset(tokenizer, args, columns), ("prompt", *columns)
    longest, last = (args.max_prompt_tokens, args.max_response_tokens), tokenizer.eos_token_id
    for i, name in enumerate(("train", "held-out")):
        counts, texts, rows = Counter(), [], []
        for row in parts[i]:
            if not all(map(str.strip, row)):
                counts["dropped: empty prompt or response, or no prompt in common"] += 1
            else:
                texts.append(row)
        ids = [tokenizer([*x], add_special_tokens=k == 0).input_ids for k, x in enumerate(zip(*texts))]
        for prompt, *responses in zip(*ids):
            done = f"{'cut' if args.truncate_prompts else 'dropped'}: prompt of more than {longest[0]} tokens"
            counts[done] += len(prompt) > longest[0]
            if args.truncate_prompts or len(prompt) <= longest[0]:
                responses = [y if y[-1] in end_ids else [*y, last] for y in responses]
                counts[f"cut: response of more than {longest[1]} tokens"] += sum(len(y) > longest[1] for y in responses)
                row = [prompt[-longest[0] :], *(y[: longest[1]] for y in responses)]
                equal = len({*map(tuple, row[1:])}) < len(columns)
                counts["dropped: chosen and rejected are equal"] += equal
                rows += [] if equal else [{key: torch.tensor(values) for key, values in zip(keys, row)}]
        print(f"{'':14}{len(rows):,} {name} rows" + "".join(f"; {n:,} {what}" for what, n in counts.items() if n))
        if not rows:
            raise UserError(f"--dataset {args.dataset}: no {name} rows are left; see the counts above.")
        parts[i] = rows
    return parts


def show_rows(tokenizer, rows, models):
    """--dry-run: two rows token by token, prompts grey and responses, which are trained on, green; the length of the
    parts of all rows; the memory of the models' weights, gradients and AdamW's moments. rows: lists of 1-D ids."""
    for row in rows[:2]:
        until = [tokenizer.decode(torch.cat(row)[:n]) for n in range(sum(map(len, row)) + 1)]
        tokens = [repr(x[len(os.path.commonprefix((w, x))) :])[1:-1] for w, x in zip(until, until[1:])]
        for part, ids in enumerate(row):
            print(f"\033[{32 if part else 90}m{'|'.join(tokens[: len(ids)])}\033[0m")
            tokens = tokens[len(ids) :]
        print()
    for part, lengths in enumerate(zip(*(map(len, row) for row in rows))):
        at = ", ".join(str(sorted(lengths)[int(share * (len(rows) - 1))]) for share in (0, 0.05, 0.5, 0.95, 1))
        print(f"{'response' if part else 'prompt':14}{at} tokens: shortest, 5 %, median, 95 %, longest")
    weights = {weight.data_ptr(): weight for model in models for weight in model.parameters()}.values()  # shared: once
    size = sum(weight.nbytes * (4 if weight.requires_grad else 1) for weight in weights) / 2**30
    print(f"memory        {size:.2f} GiB for weights, gradients and AdamW; activations and logits come on top")


def text_reward(spec, flag, tokenizer):
    """The function of (prompts, responses) -> [N] float32 that "FILE.py:f" computes from their texts, which are decoded
    without special tokens, responses with their leading space. Raises UserError."""
    path, _, name = spec.rpartition(":")
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        function = runpy.run_path(path).get(name) if Path(path).is_file() else None
    except (Exception, SystemExit) as error:
        raise UserError(f"{flag} {spec}: the file does not run ({error!r}).") from error
    if not callable(function):
        raise UserError(f"{flag} {spec}: expected FILE.py:FUNCTION; {'not found' if path else ':FUNCTION is missing'}.")

    def checked(rows, found=None):
        try:
            found = function(*map(list, zip(*rows)))
            with suppress(TypeError, ValueError, RuntimeError):  # of what is no number
                values = torch.tensor(list(found), dtype=torch.float32)
                if values.shape == (len(rows),) and values.isfinite().all():
                    return values
            count = getattr(found, "__len__", lambda: "no list")()
            raise ValueError(f"expected {len(rows)} finite numbers, found {count}: {found!s:.60}")
        except (Exception, SystemExit) as error:
            for row in rows if len(rows) > 1 and (found is None or count == len(rows)) else ():  # which one is it?
                checked([row])
            where = "" if len(rows) > 1 else ", for the prompt {!r} and response {!r}".format(*rows[0])
            raise RunError(f"{flag} {spec}: {error!r}{where}.") from error

    def score(prompts, responses):
        prompts = [x for x in prompts for _ in range(len(responses) // len(prompts))]
        texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        whole = tokenizer.batch_decode([torch.cat(row) for row in zip(prompts, responses)], skip_special_tokens=True)
        rows = [(x, y[len(x) :]) for x, y in zip(texts, whole)]
        # By one process: if it draws random numbers, all still see the same rewards.
        return broadcast_object_list([checked(rows) if PartialState().is_main_process else None])[0]

    return score


def stored(accelerator, make, **inputs):
    """make(), a dict of tensors, from runs/cache/HASH if it was made of the same inputs before; else it is put there.
    inputs: what it depends on, models and lists of tensors as their fingerprints. Prints where it is, what is new."""
    folder = Path("runs/cache") / hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    file, part = folder / "store.pt", folder / "store.part"
    if not file.is_file():
        records = sorted(folder.parent.glob("*/inputs.json"), key=lambda path: path.stat().st_mtime)
        last = json.loads(records[-1].read_text()) if records else {}
        new = [key for key in inputs if last.get(key) != inputs[key]] if last else ["everything"]
        print(f"store         {folder}: being made, new since the last one: {', '.join(new)}")
        values = make()
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "inputs.json").write_text(json.dumps(inputs, indent=1))
            torch.save(values, part)
            part.rename(file)
        accelerator.wait_for_everyone()
    else:
        print(f"store         {folder}: made before")
    return torch.load(file)


def fingerprint(tensors):
    """A short text that changes with any bit of these tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(str(tensor.shape).encode() + data.tobytes())
    return digest.hexdigest()[:16]


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


def before_stop(y, tokenizer, stop):
    """The answer in a response y, which rewards and people read: y itself or, if a text of `stop` ended it, the tokens
    before that, with EOS. Of a token that only begins before it the rest is tokenised anew."""
    text = tokenizer.decode(y)
    before = min((text.partition(end)[0] for end in stop), key=len)
    if before == text:
        return y
    n = next(n for n in range(len(y), -1, -1) if before.startswith(tokenizer.decode(y[:n])))
    rest = tokenizer(before.removeprefix(tokenizer.decode(y[:n])), add_special_tokens=False).input_ids
    return torch.tensor([*y[:n].tolist(), *rest, tokenizer.eos_token_id])


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # an outer scope: the inner ones share their bfloat16 copies of the weights
def sample_responses(model, prompts, noise, temperature, end_ids, tokenizer=None, stop=()):
    """K responses to each of B prompts, y ~ π(·|x) at this temperature with nothing cut off (no top-k, no top-p).
    `noise`: N = B·K rows [T], the K of a prompt side by side: one random number a token, float64 in [0, 1), so that a
    response depends on its own row alone. Returns N triples on the CPU: a response, its tokens up to and including one
    of `end_ids` or the one that completes a text of `stop`; its log-probabilities, float32; its answer, before_stop."""
    noise, ends, device = torch.stack([*noise]), torch.tensor(end_ids, device=model.device), model.device
    (N, T), K, noise = noise.shape, len(noise) // len(prompts), noise.to(device)
    input_ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(x) for x in prompts], batch_first=True, padding_side="left").to(device)
    stop = [*filter(None, stop)]
    stopped = StopStringCriteria(tokenizer, stop) if stop else None
    cache = DynamicCache(config=model.config)  # a layer with a sliding window, of another type, stays the library's
    cache.layers = [InplaceLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    # A prompt is read once for its K samples. Learned positions (GPT-2) count from its first token, not the padding.
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "past_key_values": cache}
    hidden = model.base_model(input_ids, **inputs).last_hidden_state
    hidden, mask = (v.repeat_interleave(K, 0) for v in (hidden[:, -1:], mask))
    cache.batch_repeat_interleave(K)
    tokens, logprobs, lengths = input_ids.new_zeros(N, T), torch.zeros(N, T, device=device), input_ids.new_zeros(N)
    rows, going = torch.arange(N, device=device), torch.ones(N, dtype=torch.bool, device=device)  # in work; not ended
    for t in range(T):
        probs = (model.get_output_embeddings()(hidden[:, -1].float()) / temperature).softmax(-1)  # [rows, V]
        # The first token whose cumulative probability exceeds the noise; a float32 sum would lose rare tokens.
        cdf = probs.double().cumsum(-1)
        token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        tokens[rows, t], logprobs[rows, t] = token.squeeze(1), probs.gather(1, token).log().squeeze(1)
        lengths[rows] += going
        going &= ~torch.isin(token.squeeze(1), ends)
        if stopped:
            going &= ~stopped(tokens[rows, : t + 1], None)
        if t % 4 == 3 and going.float().mean() < 0.75:  # finished rows leave, several at a time: the cache is copied
            cache.batch_select_indices(going.nonzero().squeeze(1))
            rows, token, mask, going = (v[going] for v in (rows, token, mask, going))
        if t == T - 1 or len(rows) == 0:
            break
        mask = F.pad(mask, (0, 1), value=1)
        inputs = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, "past_key_values": cache}
        hidden = model.base_model(token, **inputs).last_hidden_state
    found = [(y[:n].clone(), p[:n].clone()) for y, p, n in zip(tokens.cpu(), logprobs.cpu(), lengths.tolist())]
    return [(y, p, before_stop(y, tokenizer, stop) if stop and y[-1] not in end_ids else y) for y, p in found]


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
    if K > 1:  # x of 3 tokens, y_1 and y_2 of 2: row x x x a a b b, part 0 0 0 1 1 2 2, positions 0 1 2 3 4 3 4
        part = (column[:, None] >= starts[:, None, 1:]).sum(2)  # [B, L]: 0 in x, k in y_k
        mask = ((part[:, None] == 0) | (part[:, None] == part[:, :, None])).tril()  # [B, query, key]
        shift = (starts - lengths[:, :1]).clamp(min=0).gather(1, part)
        positions = (column - shift) * (column < lengths.sum(1, keepdim=True))
        inputs |= {"attention_mask": mask[:, None], "position_ids": positions}
    hidden = model.base_model(input_ids, **inputs).last_hidden_state  # [B, L, D]
    columns = torch.where(t > 0, starts[:, 1:, None] + t, lengths[:, :1, None]) - 1  # [B, K, T + 1]
    columns = columns.clamp(max=len(column) - 1).flatten(1)[:, :, None].expand(-1, -1, hidden.shape[2])
    # Not hidden[rows, columns]: on a CPU its backward pass adds up in an order that differs from time to time.
    return hidden.gather(1, columns).view(len(responses), -1, hidden.shape[2])


def response_logprobs(model, prompts, responses, temperature, hidden=None):
    """log π(y_t | x, y_<t) of every response token: [N, T] float32, 0 on padding; `hidden`: of response_hidden."""
    hidden = response_hidden(model, prompts, responses) if hidden is None else hidden
    head = model.get_output_embeddings()
    hidden = torch.cat([states[: len(y)] for states, y in zip(hidden, responses)]).float()  # [n, D], of response tokens
    tokens, nll = torch.cat(responses).to(hidden.device), partial(F.cross_entropy, reduction="none")
    logits = head if temperature == 1 else lambda h: head(h) / temperature
    # Logits of many tokens would fill the memory: without gradient, or from 5 parts of 7 million on (2^25 on a GPU),
    # they are made part by part, and again in the backward pass.
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
def in_batches(function, prompts, responses, batch_size=0):
    """function(prompts, responses) -> a result for each response, in batches of like length shared out among processes,
    without gradient. Every process returns all results, in the order of responses, on the CPU; tensors as one, [N, …],
    padded with 0. batch_size: responses a call; 0 splits them evenly over the processes. Sampling, which has no
    responses yet, gives its noise in their place."""
    K, N, state, found = len(responses) // len(prompts), len(responses), PartialState(), []
    lengths = torch.tensor([len(x) + sum(map(len, responses[K * b : K * b + K])) for b, x in enumerate(prompts)])
    batches = lengths.argsort().split(max(1, (batch_size or math.ceil(N / state.num_processes)) // K))
    for batch in batches[state.process_index :: state.num_processes]:
        indices = [K * b + k for b in batch.tolist() for k in range(K)]
        results = function([prompts[b] for b in batch], [responses[i] for i in indices])
        found += zip(indices, [row.clone() for row in results.cpu()] if torch.is_tensor(results) else results)
    rows = [row for _, row in sorted(gather_object(found))]  # by their numbers, all different
    if torch.is_tensor(rows[0]):
        return pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)
    return rows


def evaluate(policy, reference, prompts, noise, judges, sft_rewards, settings, batch_size):
    """Returns (point of the KL–reward frontier over B held-out prompts, docs/metrics.md; answers; their rewards [B]).
    `judges`: {"reward", maybe "gold": f(prompts, answers)}; `sft_rewards` [B]: SFT's; `settings`: of sampling."""
    responses, _, answers = zip(*in_batches(partial(sample_responses, policy, **settings), prompts, noise))
    token_kl = partial(response_kl, policy, reference, temperature=settings["temperature"])
    kl, lengths = in_batches(token_kl, prompts, responses, batch_size), torch.tensor([*map(len, responses)])
    values = {"kl": kl[:, 0], "kl_k1": kl[:, 1], **{name: f(prompts, answers) for name, f in judges.items()}}
    values |= {"length": lengths, "eos_rate": torch.tensor([y[-1] in settings["end_ids"] for y in answers])}
    values["win_rate_vs_sft"] = (values["reward"] - sft_rewards).sign() / 2 + 0.5  # a tie is half a win
    point = {name: value.double().mean().item() for name, value in values.items()}
    errors = {f"{k}_se": v.double().std().item() / len(prompts) ** 0.5 for k, v in values.items() if len(prompts) > 1}
    return point | errors, answers, values["reward"]


# ------------------------------------------------------------------------------------------ processes, checkpoints, run
class Trained(torch.nn.Module):
    """What is trained, a module whose forward is function(model, …): DDP, FSDP and DeepSpeed bring gradients together
    in the forward of the module they wrap; calling the inner model's would skip that without a word."""

    def __init__(self, model, function, *others):
        super().__init__()
        self.model, self.others, self.function = model, torch.nn.ModuleList(others), function
        self._no_split_modules = model._no_split_modules

    def forward(self, *inputs, model=None):
        return self.function(model or self.model, *self.others, *inputs)


@contextmanager
def gathered(trained):
    """Within it every process holds all weights, for forwards outside of training. FSDP alone splits them, and gathers
    them by hooks of its own forward, which are off meanwhile; without FSDP it does nothing."""
    parts = [part for part in trained.modules() if isinstance(part, FSDPModule)]
    kept = [(hooks, dict(hooks)) for part in parts for hooks in (part._forward_pre_hooks, part._forward_hooks)]
    for part in parts:
        part.unshard()
    for hooks, _ in kept:
        hooks.clear()
    yield
    for hooks, before in kept:
        hooks.update(before)
    for part in parts:
        part.reshard()


def check_finite(folder, update, tokenizer, prompts, responses, **values):
    """Raises RunError where a value is not finite, after writing all of them, and the batch they are of, to the run's
    folder. values: scalars, or a row for each prompt or each response."""
    bad = {name: value for name, value in values.items() if not value.isfinite().all()}
    if bad:
        rows = sorted({i for v in bad.values() if v.ndim for i in (~v.isfinite()).nonzero()[:, 0].tolist()})
        texts = {"prompts": tokenizer.batch_decode(prompts), "responses": tokenizer.batch_decode(responses)}
        values = {name: value.tolist() for name, value in values.items()}
        file = folder / f"bad_batch_{PartialState().process_index}.json"
        file.write_text(json.dumps({"update": update, "rows": rows, **values, **texts}, indent=1))
        where = f"in rows {rows} of the batch" if rows else "for the whole batch"
        raise RunError(f"update {update}: {', '.join(bad)} not finite {where}, which is in {file}.")


def open_run(accelerator, folder, args, **record):
    """Make the run's folder, or go on in it. Returns `record | state of the last checkpoint`, None if it has ended.
    Raises UserError, before anything is changed, where the folder, its run or its checkpoint does not fit."""
    commit = subprocess.getoutput(f"git -C '{TINY.parent}' rev-parse HEAD 2> /dev/null")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    record |= {"format": 1, **json.loads(json.dumps({"args": asdict(args)}))}
    file, state, last = folder / "args.json", {}, max((folder / "checkpoint").glob("*[0-9]"), default=None)
    taken = folder.is_dir() and any(path.name != "args.part" for path in folder.iterdir())
    if taken and not file.is_file():
        raise UserError(f"{folder} holds files already, and no run; pass another --output-dir.")
    if taken and not args.overwrite:
        where, wrong = file, None
        try:
            saved, where = json.loads(file.read_text()), last or file
            state = torch.load(last / "state.pt") if last else {}
            now, *before = ({**r, **r["args"]} for r in (record, saved, state or saved))
            free = MAY_CHANGE - ({"num_updates"} if now.get("lr_schedule", "constant") != "constant" else set())
            changed = {k: r.get(k) for r in before for k in now.keys() - free if (r.get(k) or None) != (now[k] or None)}
            sizes = [(folder / name, size) for name, size in state.get("files", {}).items()]
            ended = (folder / "model").is_dir() and saved["args"]["num_updates"] == args.num_updates
            if changed:
                wrong = f"is of a run with {', '.join(f'{k} {v!r} (now {now[k]!r})' for k, v in changed.items())}"
            elif short := [path for path, size in sizes if not path.is_file() or path.stat().st_size < size]:
                wrong = f"needs {short[0].name}, which is lost or was cut short"
            elif args.num_updates < state.get("update", 0) and (args.num_updates or "prompts_per_update" in now):
                wrong = f"has made {state['update']} updates, more than --num-updates {args.num_updates}"
            elif not last and not ended and (folder / "model").is_dir():
                wrong = "is of a run with a model and no checkpoint to go on from"
            elif args.resume and last and not ended:
                accelerator.load_state(last)
        except Exception as error:
            wrong = f"is damaged ({type(error).__name__}: {error})"
        if wrong or not (ended or args.resume):
            wrong = wrong or "is of a run that has not ended: --resume goes on with it"
            raise UserError(f"{where} {wrong}. Pass --overwrite to replace the run, or another --output-dir.")
        if ended:
            print("ended         this run was made before (--overwrite makes it again)")
            return None
        print(f"resumed       {f'from {last}' if last else 'from the beginning, there is no checkpoint yet'}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ours = r"^model|\.jsonl$|tfevents|\.gone$" + ("" if state else "|^checkpoint|^bad_batch")
        try:
            for path in list(folder.iterdir()) if taken else ():
                if path.name in state.get("files", {}):  # files that grow are cut back to the checkpoint
                    os.truncate(path, state["files"][path.name])
                elif re.search(ours, path.name):
                    gone = path.rename(f"{path}.{time.time_ns()}.gone")  # at once: never taken for what it was
                    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            written = {**record, "versions": versions, "git_commit": commit}
            (folder / "args.part").write_text(json.dumps(written, indent=1))
            (folder / "args.part").rename(file)
        except OSError as error:
            raise UserError(f"--output-dir {folder}: nothing can be written there ({error}).") from error
    accelerator.wait_for_everyone()
    return record | state


def open_writer(folder, args, run, *measures):
    """TensorBoard's writer, of the main process; a new run's settings go to its HPARAMS tab, beside these measures.
    With --track Weights & Biases gets all of it too (WANDB_MODE=offline keeps it in the run's folder)."""
    if args.track:
        import wandb  # optional

        project = os.environ.get("WANDB_PROJECT", "p3o")
        wandb.init(project=project, name=str(folder), dir=folder, config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(folder)
    settings = {key: v if type(v) in (int, float) else str(v) for key, v in vars(args).items()}
    for summary in hparams(settings, dict.fromkeys(measures, 0)) if "update" not in run else ():
        writer.file_writer.add_summary(summary)
    return writer


def save_checkpoint(accelerator, folder, writer, state):
    """All that a resume needs, in folder/checkpoint/UPDATE; the one before goes when this is whole. Raises RunError."""
    new = folder / f"checkpoint/{state['update']:08}"
    part, main = new.with_suffix(".part"), accelerator.is_main_process
    try:
        accelerator.save_state(part, safe_serialization=False)
        if main:
            writer.flush()
            files = [*folder.glob("*.jsonl"), *folder.glob("*tfevents*")]
            torch.save({**state, "files": {file.name: file.stat().st_size for file in files}}, part / "state.pt")
        accelerator.wait_for_everyone()
        if main:
            part.rename(new)
            for other in {*new.parent.iterdir()} - {new}:
                shutil.rmtree(other, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"{new} could not be written; is the disk full? ({type(error).__name__}: {error})") from error


def save_model(accelerator, trained, auto_class, tokenizer, folder, args, inputs):
    """The model in folder/model, plain files of transformers, put there once they are whole and, loaded again, give the
    same (to 1e-5 relative) as `trained` does of `inputs`. Raises RunError."""
    part, weights, inner = folder / "model.part", accelerator.get_state_dict(trained), accelerator.unwrap_model(trained)
    with torch.no_grad(), gathered(inner):
        expected = inner(*inputs)
        if accelerator.is_main_process:
            try:
                weights = {name[6:]: weight.float() for name, weight in weights.items() if name[:6] == "model."}
                inner.model.save_pretrained(part, state_dict=weights)
                tokenizer.save_pretrained(part)
                files = [folder / "args.json", *folder.glob("evaluations.jsonl"), *folder.glob("frontier.jsonl")]
                card = "".join(f"\n{file.name}\n```\n{file.read_text()}\n```\n" for file in files)
                (part / "README.md").write_text(
                    f"---\nlibrary_name: transformers\n---\n# {short_name(args.model)}, trained by {NAME}.py\n{card}"
                )
                found = inner(*inputs, model=load_model(auto_class, part, "--output-dir", inner.model.device, args))
            except Exception as error:
                raise RunError(f"{part} could not be written ({type(error).__name__}: {error}).") from error
            if not (found - expected).abs().max() <= 1e-5 * expected.abs().max():
                raise RunError(f"{part}, loaded again, computes other numbers: {found} instead of {expected}.")
            part.rename(folder / "model")
    accelerator.wait_for_everyone()
    print(f"saved in      {folder}/model, for {auto_class.__name__}.from_pretrained")


def log(file, writer, step, values):
    """Append a line to a .jsonl file of the run, and its values, without standard errors, to TensorBoard."""
    if writer:
        with open(file, "a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            if not isinstance(value, list) and not key.endswith("_se"):
                writer.add_scalar(f"eval/{key}" if file.stem == "frontier" else key, value, step)
        if columns := {key: value for key, value in values.items() if isinstance(value, list)}:
            rows = [[*columns], ["---"] * len(columns), *zip(*columns.values())]
            rows = [[f"{x:.2f}" if isinstance(x, float) else x.replace("|", r"\|") for x in row] for row in rows]
            writer.add_text(file.stem, "\n".join(" | ".join(" ".join(x.split()) for x in row) for row in rows), step)


# ----------------------------------------------------------------------------------------------------------------- main
def main(args):
    # ------------------------------------------------------------------------- policy, pairs
    accelerator = set_up(args)
    if not args.tau:
        raise UserError("--tau 0: expected more than 0, 1/(2τ) is the margin that IPO asks for.")
    policy_path = find_stage("sft", args.model, args.dataset) or args.model
    policy = load_model(AutoModelForCausalLM, policy_path, "--model", accelerator.device, args, train=True)
    tokenizer, end_ids = load_tokenizer(policy_path, policy, args)
    reward_path = args.reward_fn or args.reward_model or find_stage("reward_model", args.model, args.dataset)
    gold_fn = args.gold_fn or (f"{TINY}/gold.py:gold_reward" if args.dataset == "tiny" else "")
    why = "no SFT run for it" if policy_path == args.model else f"for --model {args.model}"
    print(f"policy        {policy_path} ({why}); the reference is the same, frozen")
    print(f"reward        {reward_path or 'none, nothing is sampled'}, for evaluation (--reward-model, --reward-fn)")
    print(f"dataset       {args.dataset} (--dataset changes it)" + f"; {args.stop} ends a response" * any(args.stop))
    with accelerator.local_main_process_first():  # one process of a machine fills the cache of datasets
        rows, eval_rows = load_rows(tokenizer, end_ids, args, ("chosen", "rejected"))
    prompts, responses = [row["prompt"] for row in rows], [row[y] for row in rows for y in ("chosen", "rejected")]
    eval_prompts = [torch.tensor(x) for x in dict.fromkeys(tuple(row["prompt"].tolist()) for row in eval_rows)]
    eval_rows, eval_prompts = eval_rows[: args.eval_prompts], eval_prompts[: args.eval_prompts]
    eval_pairs = [row["prompt"] for row in eval_rows], [row[y] for row in eval_rows for y in ("chosen", "rejected")]
    if args.dry_run:
        return show_rows(tokenizer, [[*row.values()] for row in rows], [policy])

    # ------------------------------------------------------------------------- reference, reward
    def load_judges():
        """The reference and the functions that score responses, in memory only while they are needed."""
        reference = load_model(AutoModelForCausalLM, policy_path, "--model", accelerator.device, args)
        judges = {}
        if args.reward_fn:
            judges["reward"] = text_reward(args.reward_fn, "--reward-fn", tokenizer)
        elif reward_path:
            classifier = partial(load_model, AutoModelForSequenceClassification)
            reward_model = classifier(reward_path, "--reward-model", accelerator.device, args)
            options = {"trust_remote_code": args.trust_remote_code}
            own = fetch("tokenizer", reward_path, "--reward-model", AutoTokenizer.from_pretrained, **options)
            same = not own("Hi").input_ids or tokenizer.get_vocab().items() <= own.get_vocab().items()
            found = reward_model.config.num_labels, reward_model.get_input_embeddings().num_embeddings
            if found[0] != 1 or found[1] < len(tokenizer) or not hasattr(reward_model, "score") or not same:
                wanted = f"expected a score and the policy's {len(tokenizer)} tokens, found {found[0]} and {found[1]}"
                raise UserError(f"--reward-model {reward_path}: {wanted}{' others' * (not same)}; see docs/recipes.md.")
            judges["reward"] = partial(in_batches, partial(response_scores, reward_model), batch_size=max_rows)
        return reference, judges | ({"gold": text_reward(gold_fn, "--gold-fn", tokenizer)} if gold_fn else {})

    def counts_of(responses):
        """What log π(y) of pairs is divided by, [n, 2]: the response's length with --average-logprobs, else 1."""
        return torch.tensor([len(y) if args.average_logprobs else 1 for y in responses]).view(-1, 2)

    def logps_of(model, *inputs):
        logprobs = in_batches(partial(response_logprobs, model, temperature=args.temperature), *inputs, max_rows)
        return logprobs.double().sum(1).view(-1, 2)  # [n, 2]

    def make_store():
        return {"train": logps_of(reference, prompts, responses), "eval": logps_of(reference, *eval_pairs)}

    max_rows, T = args.micro_batch_size, args.max_response_tokens
    settings = {"temperature": args.temperature, "end_ids": end_ids, "tokenizer": tokenizer, "stop": args.stop}
    reference, judges = load_judges()

    # ------------------------------------------------------------------------- optimiser, run folder
    epochs = args.data_epochs or 1
    num_updates = min(args.num_updates or math.inf, epochs * math.ceil(len(rows) / args.minibatch_size))
    args.learning_rate = lr = args.learning_rate or (1e-4 if args.model == "tiny" else 1e-6)
    print(f"training      {num_updates} updates, learning rate {lr:g} (--num-updates, --data-epochs, --learning-rate)")
    optimizer = torch.optim.AdamW(policy.parameters(), lr, args.adam_betas, weight_decay=args.weight_decay, fused=True)
    schedule = args.lr_schedule.replace("constant", "constant_with_warmup")
    scheduler = transformers.get_scheduler(schedule, optimizer, args.warmup_updates, num_updates)
    trained, optimizer = accelerator.prepare(Trained(policy, response_logprobs), optimizer)
    base = "tiny" if args.model == "tiny" else short_name(args.model)
    folder = Path(args.output_dir or f"runs/{NAME}/{short_name(args.dataset)}/{base}")
    print(f"run folder    {folder} (--output-dir changes it)")
    run = open_run(accelerator, folder, args, script=NAME, base_name=base, policy=policy_path, reward=reward_path)
    if run is None:
        return json.loads((folder / "frontier.jsonl").read_text().splitlines()[-1])
    writer = open_writer(folder, args, run, "eval/reward", "eval/kl") if accelerator.is_main_process else None
    order = torch.Generator().manual_seed(args.seed)

    # ------------------------------------------------------------------------- what the reference says, once
    config = {k: v for k, v in json.loads(reference.config.to_json_string()).items() if k != "_name_or_path"}
    inputs = {"reference": fingerprint(reference.state_dict().values()), "config": config, "format": 1}
    inputs |= {"device": policy.device.type, "dtype": args.dtype, "temperature": args.temperature}
    inputs |= {"rows": fingerprint([*prompts, *responses]), "eval_rows": fingerprint([*eval_pairs[0], *eval_pairs[1]])}
    ref_logps, eval_ref_logps = stored(accelerator, make_store, kind="log-probabilities of pairs", **inputs).values()
    counts, eval_counts = counts_of(responses), counts_of(eval_pairs[1])
    ref_logps, eval_ref_logps = ref_logps / counts, eval_ref_logps / eval_counts
    generator = torch.Generator().manual_seed(args.seed)
    sft_noise, eval_noise = torch.rand(2, len(eval_prompts), T, dtype=torch.float64, generator=generator)
    if reward_path:
        sample = partial(sample_responses, reference, **settings)
        _, _, sft_answers = zip(*in_batches(sample, eval_prompts, sft_noise))
        sft_rewards = judges["reward"](eval_prompts, sft_answers)
    reference = judges = sample = None  # out of memory while training
    gc.collect()

    # ------------------------------------------------------------------------- training
    lengths = torch.tensor([sum(map(len, row.values())) for row in rows])
    options = (args.tau,)
    start, queue = run.get("update", 0), run.get("queue", [])
    order.set_state(run.get("order", order.get_state()))
    scheduler.load_state_dict(run.get("scheduler", scheduler.state_dict()))
    processes, rank, caught = accelerator.num_processes, accelerator.process_index, []

    def stop_later(number, frame):  # the third at once: launchers pass each on a second time
        if len(caught) > 1:
            signal.default_int_handler(number, frame)
        caught.append(number)
        with suppress(OSError):  # of a terminal that is gone
            os.write(2, b"\nstopping after this update\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_later)
    progress = tqdm(total=num_updates, initial=start, desc=NAME, unit="update", disable=writer is None)
    for update in range(start, num_updates + 1):  # the last round only saves and evaluates
        # 0. Every so often save what a resume needs, and evaluate on held-out pairs and prompts.
        halt = gather_object(caught)
        if update > start and (halt or update == num_updates or args.save_every and update % args.save_every == 0):
            state = {"update": update, "queue": queue, "order": order.get_state(), "scheduler": scheduler.state_dict()}
            save_checkpoint(accelerator, folder, writer, run | state)
        if halt:
            print(f"\nstopped after {update} updates: the same command with --resume goes on", file=sys.stderr)
            sys.exit(128 + halt[0])
        if update in (0, num_updates) or args.eval_every and update % args.eval_every == 0:
            with gathered(trained):
                logps = logps_of(policy, *eval_pairs) / eval_counts
            _, metrics = preference_loss(*logps.T, *eval_ref_logps.T, *options)
            point = {key: value.item() for key, value in metrics.items()}
            if reward_path:
                try:
                    reference, judges = load_judges()
                except UserError as error:  # the run has begun
                    raise RunError(str(error)) from error
                evaluation = (eval_prompts, eval_noise, judges, sft_rewards, settings, max_rows)
                with gathered(trained):
                    frontier, answers, rewards = evaluate(policy, reference, *evaluation)
                del reference, judges, evaluation
                gc.collect()  # autocast's wrapper makes a model a cycle
                point = frontier | point
                columns = {"prompts": eval_prompts, "sft_responses": sft_answers, "responses": answers}
                texts = {key: tokenizer.batch_decode(ids, skip_special_tokens=True) for key, ids in columns.items()}
                log(folder / "samples.jsonl", writer, update, {**texts, "rewards": rewards.tolist()})
                shown = [" ".join(column[update % len(eval_prompts)].split()) for column in texts.values()]
            log(folder / "frontier.jsonl", writer, update, point)
            means = ", ".join(f"{k} {v:.3g}" for k, v in point.items() if k[-3:] != "_se" and k[:6] != "policy")
            tqdm.write(f"\nafter {update} updates: {means}")
            if reward_path:
                tqdm.write("   prompt {}\n   before {}\n   now    {}".format(*shown))
        if update == num_updates:
            break

        # 1. One optimizer step on a minibatch, in micro-batches of pairs of like length.
        clock = time.perf_counter()
        if not queue:
            queue = list(torch.randperm(len(rows), generator=order).split(args.minibatch_size))
        minibatch = queue.pop(0)
        shares = [minibatch[lengths[minibatch].argsort()][p::processes] for p in range(processes)]
        size = max(1, max_rows // 2)
        own = [part for part in shares[rank].split(size) if len(part)]
        micros = [*own, minibatch[:1]][: math.ceil(len(shares[0]) / size)]  # as many in all, for FSDP: a filler
        stats, all_logps = Counter(), []
        for micro in micros:
            accelerator.sync_gradients = micro is micros[-1]  # gradients cross processes once, with the last
            with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(trained):
                inputs = [prompts[i] for i in micro], [responses[2 * i + k] for i in micro for k in (0, 1)]
                logps = trained(*inputs, args.temperature).double().sum(1).view(-1, 2)  # [n, 2]: chosen, rejected
                logps = logps / counts[micro].to(logps.device)
                loss, metrics = preference_loss(*logps.T, *ref_logps[micro].to(logps.device).T, *options)
                # The loss is a mean over the whole minibatch, in which a filler row counts 0.
                share = len(micro) / len(minibatch) * (len(all_logps) < len(own))
                accelerator.backward(loss * share * processes)  # gradients: mean over the processes
            all_logps.append(logps.detach())
            stats.update({key: value.item() * share for key, value in metrics.items()})
        mine, parts = torch.cat(micros), gather_object([stats])
        stats = {key: sum(part[key] for part in parts) for key in stats}
        grad_norm = torch.as_tensor(accelerator.clip_grad_norm_(trained.parameters(), args.max_grad_norm or math.inf))
        values = {"logps": torch.cat(all_logps), "loss": torch.tensor(stats["policy/loss"]), "gradient": grad_norm}
        inputs = [prompts[i] for i in mine], [responses[2 * i + k] for i in mine for k in (0, 1)]
        check_finite(folder, update + 1, tokenizer, *inputs, **values)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

        # 2. Log.
        seconds = time.perf_counter() - clock
        metrics = {**stats, "grad_norm": grad_norm.item(), "lr": lr, "time/update": seconds}
        metrics |= {"samples_per_second": len(minibatch) / seconds}
        log(folder / "metrics.jsonl", writer, update + 1, metrics)
        shown_metrics = {"loss": f"{stats['policy/loss']:.3f}", "accuracy": f"{stats['rewards/accuracies']:.2f}"}
        progress.set_postfix(shown_metrics | {"pairs/s": f"{len(minibatch) / seconds:.0f}"})
        progress.update()
    progress.close()
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, usual)
    inputs = eval_pairs[0][:4], eval_pairs[1][:8], args.temperature
    save_model(accelerator, trained, AutoModelForCausalLM, tokenizer, folder, args, inputs)
    return point


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    threading.excepthook = lambda _: None  # of TensorBoard's thread, whose error the next write to it raises again
    parse = partial(tyro.cli, Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    args = parse()
    try:
        if args.config:  # the flags of that run, then these
            run = fetch("run", args.config, "--config", lambda file: json.load(open(file))["args"].items())
            run = {k: v for k, v in run if k not in ("config", "resume", "overwrite", "output_dir") and v is not False}
            run = {k.replace("_", "-"): v if isinstance(v, list) else [v] * (v is not True) for k, v in run.items()}
            args = parse(args=[*(str(x) for k, v in run.items() for x in (f"--{k}", *v)), *sys.argv[1:]])
        main(args)
    except (UserError, RunError, OSError, ImportError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if args.debug:
            raise
        codes = {UserError: 2, ModuleNotFoundError: 2, KeyboardInterrupt: 130}
        code, said = codes.get(type(error), 1), f"{NAME}.py: {str(error) or 'interrupted'}"
        if code == 1:
            said += "\nWhat was saved is kept: mend this (--debug: where), and the same command with --resume goes on."
        if isinstance(error, torch.OutOfMemoryError):
            said += "\nLess memory: --micro-batch-size, --gradient-checkpointing, --dtype bfloat16, --unfrozen-layers"
        tqdm.write(said, file=sys.stderr)
        sys.exit(code)
