"""Evaluate policies: the KL–reward frontier of runs, the limit of that frontier, head-to-head win rates, samples.

    frontier   Reward over sequence KL(π‖π_ref) of runs: a picture, the reward at chosen KLs, a linear fit.
    limit      The best reward that any policy has at each KL, that of π*_b(y|x) ∝ π_ref(y|x) exp(r(x, y)/b), from N
               samples a prompt of π_ref (self-normalised importance sampling), and that of the best of n samples.
    compare    The same held-out prompts answered by several policies: win rates by reward, gold and a judge.
    samples    The same, side by side, to read.

    Limit      w_i ∝ exp(r_i / b), reward Σ w_i r_i, KL log N + Σ w_i log w_i, effective samples 1/Σ w_i²
    Best of n  KL at most log n − (n−1)/n

Shapes: P prompts, N samples to each, T response tokens. Prompts and responses are lists of 1-D id tensors.

    python evaluate.py limit                                                     the embedded world, 20 minutes
    python evaluate.py frontier runs/p3o_v2/tiny/tiny --limit runs/limit/tiny/tiny/limit.json
    python evaluate.py compare runs/p3o_v2/tiny/tiny tiny                        run folders, models, hub ids
    python evaluate.py compare A B --judge-url http://localhost:8000/v1 --judge-model NAME     (key: OPENAI_API_KEY)
    python evaluate.py samples runs/p3o_v2/tiny/tiny tiny --num 4

Policies answer with the noise of the first run's evaluations, so reward and KL of an online run are its last ones.
"""

import hashlib
import json
import math
import os
import re
import runpy
import sys
import textwrap
import threading
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import HfApi, constants
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, StopStringCriteria
from transformers.cache_utils import DynamicCache, DynamicLayer
from tyro.conf import Positional

NAME, TINY = Path(__file__).stem, Path(__file__).parent / "tiny"
PUBLIC = {  # of stage and dataset, for pythia-1b, 2.8b and 6.9b: docs/recipes.md says where they are documented
    "sft/tldr": "trl-lib/pythia-{}-deduped-tldr-sft",
    "reward_model/tldr": "cleanrl/EleutherAI_pythia-{}-deduped__reward__tldr",
}
# Settings of a run that leave its curve as it is: runs that differ in these alone are one curve.
SAME_CURVE = "seed output_dir overwrite resume save_every device debug config dry_run track trust_remote_code".split()
SAME_CURVE += ["micro_batch_size", "sample_batch_size", "gradient_checkpointing"]
# What decides, with the model, the held-out prompts and the distribution of the responses to them.
TASK = "dataset subset split map chat_template max_prompt_tokens truncate_prompts".split()
TASK += ["max_response_tokens", "stop", "temperature"]
ROUND = 32  # samples a prompt between two saves of the limit; another number gives other samples
SCORES = ("reward", "gold")
Names = Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="NAME …", help_behavior_hint="")]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # told apart by the colour-blind too


def limit_curve(rewards, temperatures, gold=None):
    """Reward, KL and effective sample size of π*_b ∝ π_ref exp(r/b) at each temperature b, means over the prompts.
    rewards: [P, N] of N samples a prompt from π_ref; gold: [P, N], weighted alike. Returns a dict of float64 tensors
    [len(temperatures)]. Too low where samples are few: trust it where ess ≥ 50 and kl < log N − 4.5."""
    rewards, curve = rewards.double(), defaultdict(list)
    for b in temperatures:
        logw = (rewards / b).log_softmax(1)
        w = logw.exp()
        curve["kl"].append(math.log(rewards.shape[1]) + (w * logw).sum(1).mean())
        curve["reward"].append((w * rewards).sum(1).mean())
        curve["ess"].append((1 / w.square().sum(1)).mean())
        if gold is not None:
            curve["gold"].append((w * gold).sum(1).mean())
    return {key: torch.stack(values) for key, values in curve.items()}


def best_of_n(rewards, n, values):
    """Expected value of the sample with the highest reward among n, mean over the prompts: the exact mean over all ways
    to draw n of the N samples without replacement, so without bias. rewards, values: [P, N]."""
    rank = torch.arange(n, rewards.shape[1] + 1, dtype=torch.float64)
    w = (rank.lgamma() - (rank - n + 1).lgamma()).softmax(0)  # C(rank − 1, n − 1) of all C(N, n) draws
    ordered = values.double().gather(1, rewards.argsort(dim=1, stable=True))
    return (ordered[:, n - 1 :] * w).sum(1).mean().item()


def reward_at(points, kappa):
    """The best reward on a path of (kl, reward) points while its KL ≤ κ, the path being straight between two points;
    nan if it is never there."""
    found = [reward for kl, reward in points if kl <= kappa]
    for (kl, reward), (next_kl, next_reward) in pairwise(points):
        if (kl - kappa) * (next_kl - kappa) < 0:
            found.append(reward + (next_reward - reward) * (kappa - kl) / (next_kl - kl))
    return max(found, default=math.nan)


@dataclass
class Frontier:
    """Reward over KL of runs, as a picture, a table and numbers."""

    runs: Names = ()  # run folders; those that differ in the seed, the folder, the device … alone are one curve
    output: Path = Path("runs/frontier.png")  # file to write; beside a picture go its numbers, as .json
    kls: tuple[float, ...] = (1.0, 2.0, 4.0)  # KLs at which rewards are given, nats a response
    limit: str = ""  # limit.json of the subcommand limit, drawn and compared with
    reward: Literal["reward", "gold"] = "reward"  # which of the two is drawn, where gold, the true one, is known
    debug: bool = False  # show the traceback of a mistake too


@dataclass
class Args:
    # Run
    seed: int = 1  # of the sampling noise, the order of the data and any new weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    debug: bool = False  # show the traceback of a mistake too
    # Rewards, data
    reward_model: str = ""  # folder or hub id, fed this model's token ids (default: what reward_model.py saved for it)
    reward_fn: str = ""  # FILE.py:f, in place of a model: f(prompts: list[str], responses: list[str]) -> list[float]
    gold_fn: str = ""  # FILE.py:f, the true reward of the same form where one is known; only ever evaluated
    trust_remote_code: bool = False  # run the Python code that a model's folder or hub page brings
    dataset: str = ""  # tiny, hh, tldr, a hub id, a .jsonl[.gz] or .parquet file, a folder (default: hh; tiny for tiny)
    subset: str = ""  # configuration of a hub dataset
    split: str = ""  # TRAIN or TRAIN,HELD-OUT (default: train, or the only one; test or validation, or a tenth of all)
    chat_template: str = ""  # file with the template that renders messages (default: the tokenizer's)
    map: tuple[str, ...] = ()  # prompt=question chosen=best …: columns that have other names than the script's
    eval_prompts: int = 256  # held-out prompts used, the first ones
    max_prompt_tokens: int = 512  # longer prompts are dropped, and counted
    truncate_prompts: bool = False  # cut longer prompts on the left instead
    max_response_tokens: int = 128  # length limit of a response
    stop: tuple[str, ...] = ()  # texts that end a response, no part of its answer (for hh: "\n\nHuman:"; "": none)
    temperature: float = 1.0  # of the distribution sampled from, in every log-probability and KL too
    # Sizes
    micro_batch_size: int = 32  # sequences in one forward, a prompt's at least; sampling aside; for memory and speed
    sampling_batch_size: int = 512  # responses sampled at once: changes memory and speed alone
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products and frozen weights (float16 overflows)


@dataclass
class Limit(Args):
    """The best reward that any policy has at each KL, for a reference, a reward and the prompts of a dataset."""

    model: str = "tiny"  # tiny (embedded), a short name (pythia-14m … pythia-12b), a hub id, or a folder
    num_samples: int = 2048  # samples a prompt, N; more, later, go on from those that are there
    b_values: tuple[float, ...] = ()  # temperatures b of the tilt (default: 121, 100 to 0.01 times the rewards' spread)
    output_dir: str = ""  # the run's folder (default: runs/SCRIPT/DATASET/MODEL)
    overwrite: bool = False  # replace the run that the folder holds


@dataclass
class Compare(Args):
    """Win rates of policies against each other. Settings not given (reward, dataset, lengths, seed …) are those of the
    first run among them."""

    models: Names = ()  # run folders, model folders, hub ids, or tiny (the embedded SFT policy)
    reference: str = ""  # π_ref of the KL, one of the same forms (default: where the first run started, or the first)
    output: Path = Path("runs/compare.json")  # file to write; beside a picture go its numbers, as .json
    judge_url: str = ""  # an OpenAI-compatible server, as http://localhost:8000/v1; its key from OPENAI_API_KEY
    judge_model: str = ""  # name of the judge on that server
    judge_timeout: float = 60.0  # seconds to wait for a reply
    judge_retries: int = 3  # of a request without a verdict; after them the pair is unjudged, and counted
    judge_workers: int = 8  # requests in flight
    judge_max_tokens: int = 16  # length limit of a reply (0: the server's)
    judge_cache: Path = Path("runs/cache/judge.jsonl")  # replies so far, never asked for again


@dataclass
class Samples(Args):
    """The same prompts answered by several policies side by side. Settings not given are those of the first run."""

    models: Names = ()  # run folders, model folders, hub ids, or tiny (the embedded SFT policy)
    num: int = 8  # prompts shown, the first ones
    output: Path = Path("runs/samples.md")  # file to write; beside a picture go its numbers, as .json


class UserError(Exception):
    """A mistake in what the user gave, told in one sentence without a traceback; exit code 2, nothing was changed."""


class RunError(Exception):
    """What ends a run that had begun, told in one sentence; exit code 1, the last checkpoint is kept."""


# ----------------------------------------------------------------------------------------------- set up, find and load
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


def load_frozen(auto_class, name, flag, device, args):
    """A frozen model without dropout, from a folder or the hub; its trunk multiplies in --dtype. Raises UserError."""
    options = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": args.trust_remote_code}
    model, info = fetch("model", name, flag, auto_class.from_pretrained, **options)
    if info["missing_keys"]:
        raise UserError(f"{flag} {name}: it is no {auto_class.__name__[4:]}, it lacks {sorted(info['missing_keys'])}.")
    head, trunk, ids = model.get_output_embeddings(), model.base_model, torch.tensor([[0, 1, 2]])
    with torch.no_grad():
        if head and not torch.allclose(model(ids).logits, head(trunk(ids).last_hidden_state), 0, 1e-4, True):
            raise UserError(f"{flag} {name}: it scales or caps its logits, which is not supported; use another model.")
    if args.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # for the head: float32 in and out, TF32 products
        trunk.forward = torch.autocast(device.type, torch.bfloat16)(trunk.forward)
        for part in trunk.modules():
            if isinstance(part, torch.nn.Linear) and part.weight.dtype == torch.float32:
                part.to(torch.bfloat16)
    return model.requires_grad_(False).to(device)


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


def load_prompts(tokenizer, args):
    """(train, --eval-prompts held-out) prompts as 1-D ids, each once; prints what is left out. Raises UserError."""
    parts, length = read_dataset(tokenizer, args, ()), args.max_prompt_tokens
    for i, name in enumerate(("train", "held-out")):
        texts, empty = [*dict.fromkeys(x for x, *_ in parts[i] if x.strip())], sum(not x.strip() for x, *_ in parts[i])
        ids = tokenizer(texts).input_ids if texts else []
        long, done = sum(len(x) > length for x in ids), "cut on the left" if args.truncate_prompts else "dropped"
        parts[i] = [torch.tensor(x[-length:]) for x in ids if args.truncate_prompts or len(x) <= length]
        print(f"{'':14}{len(parts[i]):,} different {name} prompts; {long:,} too long, {done}; {empty:,} empty, dropped")
        if not parts[i]:
            raise UserError(f"--dataset {args.dataset}: no {name} prompts are left.")
    return parts[0], parts[1][: args.eval_prompts]


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


# ------------------------------------------------------------------------------------------- policies, rewards, prompts
def check(args):
    """Settles the device. Raises UserError for a number out of range, a GPU that is not there, several processes."""
    at_least_1 = "max_prompt_tokens max_response_tokens micro_batch_size sampling_batch_size num judge_workers".split()
    lowest = dict.fromkeys(at_least_1, 1) | {"eval_prompts": 2, "num_samples": 2}
    lowest |= {"temperature": 0.001, "judge_timeout": 0.001, "kls": 1e-9, "b_values": 1e-9}
    for name, value in vars(args).items():
        low, values = lowest.get(name, 0), value if isinstance(value, tuple) else [value]
        if not all(low <= x < 2**63 for x in values if isinstance(x, int | float)):
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {low:g}, below {2**63:.3g}.")
    if isinstance(args, Args):
        args.stop = tuple(x.replace(r"\n", "\n") for x in args.stop)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU; pass --device cpu, or leave it out.")
        if PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available()).num_processes > 1:
            raise UserError("evaluation runs in one process: start it with python.")


def read_record(run):
    """args.json of a run's folder, with the settings as "args": p3o_v2.py, sft.py and reward_model.py have them beside
    the rest. Raises UserError."""
    file = Path(run) / "args.json"
    if not file.is_file():
        what = "no run, it has no args.json" if Path(run).is_dir() else "no such folder"
        raise UserError(f"{run}: {what}; expected the folder of a run, as runs/p3o_v2/tiny/tiny.")
    try:
        record = json.loads(file.read_text())
        if "args" not in record:
            settings = {k: v for k, v in record.items() if k not in ("script", "policy", "reward")}
            settings["stop"] = [""] if record["dataset"] == "hh" else []  # they know none
            short = re.fullmatch(r"pythia-[\d.]+[mb](-deduped)?", record["model"]) and not Path(record["model"]).exists()
            settings["model"] = "EleutherAI/" * bool(short) + record["model"]
            record = {k: record[k] for k in ("script", "policy", "reward") if k in record} | {"args": settings}
            record["base_name"] = short_name(f"{run}/model")
        record["script"], record["args"]["dataset"], record["args"]["model"], record["args"]["seed"]  # noqa: B018
        return record
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}).") from error


def first_record(models):
    """The record of the first run among policies, given by its folder or by the model/ in it; {} if there is none."""
    folders = [folder for name in models if Path(name).exists() for folder in (Path(name), Path(name).parent)]
    return next((read_record(folder) for folder in folders if (folder / "args.json").is_file()), {})


def settings_of_run(args):
    """What the first run of args.models sets, less what belongs to its dataset or reward where another is given."""
    if not (record := first_record(args.models)):
        return {}
    settings, names = record["args"], {*TASK, "seed", "eval_prompts", "dtype", "gold_fn"}
    if args.dataset not in ("", settings["dataset"]):
        names -= {"dataset", "subset", "split", "map", "gold_fn"}
    values = {name: settings[name] for name in names if name in settings}
    if not args.reward_fn and not args.reward_model:
        values["reward_fn"] = settings.get("reward_fn", "")
        embedded = settings["model"] == "tiny" and not settings.get("reward_model")
        values["reward_model"] = "" if values["reward_fn"] or embedded else record.get("reward") or ""
    return values


def find_policy(name):
    """Folder or hub id of the policy that a name on the command line stands for. Raises UserError."""
    if name == "tiny":
        return f"{TINY}/sft"
    if (Path(name) / "args.json").is_file():
        if not (Path(name) / "model").is_dir():
            raise UserError(f"{name}: the run has saved no model yet; it does so at its end.")
        return f"{name}/model"
    short = re.fullmatch(r"pythia-[\d.]+[mb](-deduped)?", name) and not Path(name).exists()
    return f"EleutherAI/{name}" if short else name


def reward_of(record):
    """The reward of a run or limit, the embedded one by its name wherever the project lies."""
    reward = record.get("reward") or "none"
    return "tiny" if Path(reward).parts[-2:] == ("tiny", "reward_model") else reward


def load_judges(args, model, tokenizer, device, needed=True):
    """{"reward", maybe "gold": function of (prompts, responses) -> [N]}, where each is from, and the reward model where
    there is one. Raises UserError."""
    path = args.reward_fn or args.reward_model or find_stage("reward_model", model, args.dataset)
    judges, reward_model = {}, None
    gold_fn = args.gold_fn or (f"{TINY}/gold.py:gold_reward" if args.dataset == "tiny" else "")
    if not path and needed:
        raise UserError("no reward: run reward_model.py on this dataset, or pass --reward-model or --reward-fn.")
    if args.reward_fn:
        judges["reward"] = text_reward(args.reward_fn, "--reward-fn", tokenizer)
    elif path:
        reward_model = load_frozen(AutoModelForSequenceClassification, path, "--reward-model", device, args)
        options = {"trust_remote_code": args.trust_remote_code}
        own = fetch("tokenizer", path, "--reward-model", AutoTokenizer.from_pretrained, **options)
        same = not own("Hi").input_ids or tokenizer.get_vocab().items() <= own.get_vocab().items()
        found = reward_model.config.num_labels, reward_model.get_input_embeddings().num_embeddings
        if found[0] != 1 or found[1] < len(tokenizer) or not hasattr(reward_model, "score") or not same:
            wanted = f"expected a score and the policy's {len(tokenizer)} tokens, found {found[0]} and {found[1]}"
            raise UserError(f"--reward-model {path}: {wanted}{' others' * (not same)}; see docs/recipes.md.")
        judges["reward"] = partial(in_batches, partial(response_scores, reward_model), batch_size=args.micro_batch_size)
    if gold_fn:
        judges["gold"] = text_reward(gold_fn, "--gold-fn", tokenizer)
    print(f"reward        {path or 'none'} (--reward-model or --reward-fn change it)")
    print(f"dataset       {args.dataset} (--dataset changes it)")
    return judges, {"reward": path, "gold": gold_fn}, reward_model


def answer(args, num, reference=None):
    """The first `num` held-out prompts answered by each of args.models, with the noise of a training run's evaluations.
    Returns the texts of P prompts, [texts of P responses] of each policy, [{"reward", "gold", "length", …: [P]}] of
    each, where rewards are from. With a `reference`, "" for where the first run started, "kl" too. Raises UserError."""
    device, record = PartialState().device, first_record(args.models)
    base = args.models[0] if args.models[0] == "tiny" else find_policy(args.models[0])
    base = record["args"]["model"] if record else base
    args.dataset = args.dataset or ("tiny" if base == "tiny" else "hh")
    args.stop = args.stop or ("\n\nHuman:",) * (args.dataset == "hh")
    paths = [find_policy(name) for name in args.models]
    for path in paths:  # before the first answers: is the last one there?
        options = {"trust_remote_code": args.trust_remote_code}
        fetch("model", path, "policy", AutoTokenizer.from_pretrained, **options)  # an adapter lacks an AutoConfig
    if reference is not None:
        start = record["policy"] if record and base != "tiny" else base
        reference_path = find_policy(reference or start)
        reference = load_frozen(AutoModelForCausalLM, reference_path, "--reference", device, args)
        print(f"reference     {reference_path} (--reference changes it)")
    for i, path in enumerate(paths):
        policy = load_frozen(AutoModelForCausalLM, path, "policy", device, args)
        tokenizer, end_ids = load_tokenizer(path, policy, args)
        print(f"policy {i + 1:<6} {path}")
        if i == 0:
            needed = isinstance(args, Compare) and not args.judge_url
            judges, sources, _ = load_judges(args, base, tokenizer, device, needed)
            prompts, vocabulary = load_prompts(tokenizer, args)[1], tokenizer.get_vocab()
            size, generator = (2, len(prompts), args.max_response_tokens), torch.Generator().manual_seed(args.seed)
            _, noise = torch.rand(size, dtype=torch.float64, generator=generator)  # a run's sft_noise, eval_noise
            prompts, noise, texts, values = prompts[:num], noise[:num], [], []
        if tokenizer.get_vocab() != vocabulary:
            raise UserError(f"{path}: its tokens are not those of {paths[0]}; only like can be compared.")
        if reference and policy.config.vocab_size != reference.config.vocab_size:
            raise UserError(f"{path}: its tokens are not those of the reference; pass --reference.")
        options = {"temperature": args.temperature, "end_ids": end_ids, "tokenizer": tokenizer, "stop": args.stop}
        sample = partial(sample_responses, policy, **options)
        responses, _, answers = zip(*in_batches(sample, prompts, noise, args.sampling_batch_size))
        values.append({name: judge(prompts, answers).double() for name, judge in judges.items()})
        values[i]["length"] = torch.tensor([*map(len, responses)])
        values[i]["eos_rate"] = torch.tensor([y[-1] in end_ids for y in answers])
        if reference:
            token_kl = partial(response_kl, policy, reference, temperature=args.temperature)
            values[i]["kl"] = in_batches(token_kl, prompts, responses, args.micro_batch_size)[:, 0]
        decode = partial(tokenizer.batch_decode, skip_special_tokens=True)
        prompt_texts, whole = decode(prompts), decode([torch.cat(row) for row in zip(prompts, answers)])
        texts.append([y[len(x) :] for x, y in zip(prompt_texts, whole)])
    return prompt_texts, texts, values, sources | {"dataset": args.dataset}


def plus_minus(mean, se, digits):
    """A mean with its standard error, where there is one."""
    return f"{mean:.{digits}f}" + ("" if se is None else f" ± {se:.{digits}f}")


def table(header, rows):
    """A markdown table that is a table in the terminal too."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def write(file, text):
    """A file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(text)
    part.rename(file)


# ------------------------------------------------------------------------------------------------------------- frontier
def read_run(folder, key):
    """The record of a run, and its frontier as a list of points. Raises UserError."""
    record, file, points = read_record(folder), Path(folder) / "frontier.jsonl", []
    if not file.is_file():
        raise UserError(f"{folder}: the run has no frontier.jsonl, so it evaluated nothing yet or is of another kind.")
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            points.append(json.loads(line))
            if wrong := [k for k in ("step", "kl", key) if not math.isfinite(points[-1].get(k, math.nan))]:
                raise ValueError(f"no number for {', '.join(wrong)}; found {', '.join(points[-1])}")
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{file}: line {number} is no point of a frontier ({error}).") from error
    if not points:
        raise UserError(f"{file} is empty: the run evaluated nothing yet.")
    return record, points


def group_runs(runs, key):
    """{label: [(seed, points)]}: runs that differ in SAME_CURVE alone are one curve, labelled with the script and with
    what the curves of the same script differ in. runs: [(folder, record, points)]. Raises UserError."""
    folder, first, _ = runs[0]
    for other, record, _ in runs:
        wanted, found = ({"dataset": r["args"]["dataset"], "reward": reward_of(r)} for r in (first, record))
        if key == "gold":
            wanted["gold_fn"], found["gold_fn"] = (r["args"].get("gold_fn") for r in (first, record))
        if differing := [f"{k} {found[k]!r}, not {wanted[k]!r}" for k in found if found[k] != wanted[k]]:
            raise UserError(f"{other} cannot be drawn with {folder}: it has {' and '.join(differing)}.")
    groups = defaultdict(list)  # by their settings
    for folder, record, points in runs:
        kept = {k: v for k, v in record["args"].items() if k not in SAME_CURVE} | {"script": record["script"]}
        group = groups[json.dumps(kept, sort_keys=True)]
        if record["args"]["seed"] in [seed for seed, _ in group]:
            raise UserError(f"{folder}: another of the runs has the same settings and the same seed.")
        group.append((record["args"]["seed"], points))
    curves, settings = {}, [json.loads(text) for text in groups]
    for kept, group in zip(settings, groups.values()):
        siblings = [other for other in settings if other["script"] == kept["script"]]
        differing = [k for k in set().union(*siblings) if any(other.get(k) != kept.get(k) for other in siblings)]
        flags = [f"--{k.replace('_', '-')} {kept.get(k)}" for k in sorted(differing)]
        curves[" ".join([kept["script"], *flags])] = sorted(group, key=lambda run: run[0])
    return curves


def mean_and_se(values):
    """Mean, and its standard error, None for a single value."""
    values = np.asarray(values, dtype=float)
    return values.mean().item(), values.std(ddof=1).item() / len(values) ** 0.5 if len(values) > 1 else None


def curve_numbers(group, key, kls):
    """The numbers of a curve: its mean path over the seeds, the reward at each of the KLs, a linear fit."""
    by_step = [{point["step"]: point for point in points} for _, points in group]
    path = []
    for step in sorted(set.intersection(*map(set, by_step))):
        points = [run[step] for run in by_step]
        (kl, kl_se), (reward, reward_se) = (mean_and_se([point[k] for point in points]) for k in ("kl", key))
        if len(points) == 1:
            kl_se, reward_se = points[0].get("kl_se"), points[0].get(f"{key}_se")
        path.append({"step": step, "kl": kl, "kl_se": kl_se, "reward": reward, "reward_se": reward_se})
    paths = [[(point["kl"], point[key]) for point in points] for _, points in group]
    largest = min(max(kl for kl, _ in points) for points in paths)
    rewards = {}
    for kappa in kls:
        reward, se = mean_and_se([reward_at(points, kappa) for points in paths])
        reward, se = (None, None) if math.isnan(reward) else (reward, se)  # a seed was never at this KL or below
        rewards[f"{kappa:g}"] = {"reward": reward, "reward_se": se, "reached": largest >= kappa, "largest_kl": largest}
    x, y = np.array([point for points in paths for point in points]).T
    fit = None
    if np.ptp(x) > 0:
        b, a = np.polyfit(x, y, 1).tolist()
        fit = {"a": a, "b": b, "r2": 1 - float(np.var(y - a - b * x) / (np.var(y) or 1))}
    return {"seeds": [seed for seed, _ in group], "path": path, "reward_at": rewards, "fit": fit}


def read_limit(file, runs, key):
    """limit.json, the reference as its first point, if it is of the runs' model, task, reward. Raises UserError."""
    try:
        limit = json.loads(Path(file).read_text())
        found = limit["args"] | {"reward": reward_of(limit), "model": limit["base_name"]}
        reference = {name: limit[f"ref_{name}"] for name in SCORES if name in limit["curve"][0]}
        limit["curve"].insert(0, {"kl": 0.0, "trusted": True, **reference})
        limit["best_of_n"][0]["kl"], limit["num_samples"]  # noqa: B018
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--limit {file}: it is no limit.json ({type(error).__name__}: {error}).") from error
    for folder, record, _ in runs:
        wanted = record["args"] | {"reward": reward_of(record), "model": record.get("base_name")}
        for name in ("model", "reward", *TASK, *(["gold_fn"] if key == "gold" else [])):
            if name in found and found[name] != wanted.get(name, found[name]):
                raise UserError(f"--limit {file}: it has {name} {found[name]!r}, {folder} has {wanted[name]!r}.")
        if found.get("eval_prompts") != wanted.get("eval_prompts"):
            print(f"note: --limit {file} is of other --eval-prompts than {folder}, so they differ by chance too")
    if key not in reference:
        raise UserError(f"--limit {file}: it has no {key}.")
    return limit


def draw(file, title, key, curves, limit):
    """The picture: reward over KL, a band of ± a standard error; limit and best of n as grey and black references."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    largest = 1.1 * max([point["kl"] for curve in curves.values() for point in curve["path"]] + [0.1])
    if limit:
        best = [row for row in limit["best_of_n"] if row["kl"] <= largest]
        what = "limit: no policy has more reward at this KL" if key == "reward" else "gold at the limit of the reward"
        labels = f"{what} ({limit['num_samples']:,} samples a prompt)", "the same, from too few samples: too low"
        for trusted, style, label in zip((True, False), ("-", ":"), labels):
            if part := [(r["kl"], r[key]) for r in limit["curve"] if r["trusted"] == trusted and r["kl"] <= largest]:
                axes.plot(*zip(*part), style, color="0.55", linewidth=2.5, label=label)
        points = zip(*[(row["kl"], row[key]) for row in best])
        axes.plot(*points, "k--x", linewidth=1, label="best of n samples of the reference, KL at most log n − (n−1)/n")
        for row in best[1:]:
            axes.annotate(f"n = {row['n']}", (row["kl"], row[key]), (4, -12), textcoords="offset points", fontsize=8)
    for i, (label, curve) in enumerate(curves.items()):
        colour, seeds = COLOURS[i % len(COLOURS)], len(curve["seeds"])
        kl, reward, se = (np.array([point[k] or 0 for point in curve["path"]]) for k in ("kl", "reward", "reward_se"))
        style = {"color": colour, "linestyle": ("-", "--", "-.")[i // len(COLOURS) % 3]}
        axes.plot(kl, reward, "o", markersize=4, **style, label=f"{label} ({seeds} seed{'s' * (seeds > 1)})")
        axes.fill_between(kl, reward - se, reward + se, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlim=(0, largest), title=title, ylabel=f"{key}, mean over held-out prompts")
    axes.set_xlabel("KL(π‖π_ref), nats a response: how far the policy has moved from where it started")
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    with SummaryWriter(file.with_suffix(".tensorboard")) as writer:  # for its tab of images
        writer.add_figure(file.stem, figure)


def frontier(args):
    """The subcommand. Returns what it writes."""
    folders = list({Path(run).resolve(): run for run in args.runs}.values())
    if not folders:
        raise UserError("frontier: expected the folder of a run, as runs/p3o_v2/tiny/tiny.")
    if args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: expected a name that ends in .png.")
    key, kls, runs = args.reward, [*dict.fromkeys(args.kls)], [(run, *read_run(run, args.reward)) for run in folders]
    curves = {label: curve_numbers(group, key, kls) for label, group in group_runs(runs, key).items()}
    bound, rows = read_limit(args.limit, runs, key) if args.limit else None, []
    for label, curve in curves.items():
        cells = [label, len(curve["seeds"])]
        for kappa, found in curve["reward_at"].items():
            reached = "" if found["reached"] else f" (KL ≤ {found['largest_kl']:.2f})"
            none = found["reward"] is None
            cells.append("none" if none else plus_minus(found["reward"], found["reward_se"], 2) + reached)
            if bound and key == "reward" and not none:
                best = np.interp(float(kappa), *([row[k] for row in bound["curve"]] for k in ("kl", "reward")))
                found["limit"], gain = best.item(), best.item() - bound["ref_reward"]
                found["share"] = (found["reward"] - bound["ref_reward"]) / gain if gain > 0 else None
                few = float(kappa) > max(row["kl"] for row in bound["curve"] if row["trusted"])
                cells[-1] += f", {found['share']:.0%}{' (limit too low)' * few}" if gain > 0 else ""
        fit, line = curve["fit"], "{:.2f} {} {:.2f}·KL, R² {:.2f}".format
        rows.append([*cells, line(fit["a"], "+−"[fit["b"] < 0], abs(fit["b"]), fit["r2"]) if fit else "none"])
    for name, points in (("limit", bound["curve"]), ("best of n", bound["best_of_n"])) if bound else ():
        x, y = ([row[k] for row in points] for k in ("kl", key))
        trusted = max([row["kl"] for row in points if row.get("trusted", True)], default=0)
        at = [f"{np.interp(k, x, y):.2f}{'' if k <= trusted else ' (too few samples)'}" for k in kls]
        rows.append([name, "", *at, ""])
    dataset, models = runs[0][1]["args"]["dataset"], ", ".join(sorted({str(r[1].get("base_name")) for r in runs}))
    title = f"{key.capitalize()} and KL while training: dataset {short_name(dataset)}, model {models}"
    bands = "bands: ± a standard error over seeds; of a single one, over prompts"
    draw(args.output, f"{title}\n{bands}", key, curves, bound)
    share = ", share of the limit's gain" if bound and key == "reward" else ""
    print(table(["curve", "seeds", *(f"best {key} at KL ≤ {k:g}{share}" for k in kls), "linear fit"], rows))
    result = {"reward": key, "dataset": dataset, "models": models, "curves": curves}
    result |= {"limit": bound and {k: bound[k] for k in ("ref_reward", "num_samples", "curve", "best_of_n")}}
    write(args.output.with_suffix(".json"), json.dumps(result, indent=1))
    print(f"\n{args.output}, {args.output.with_suffix('.json')}")
    return result


# ---------------------------------------------------------------------------------------------------------------- limit
def draw_samples(args, file, inputs, sample, prompts, judges):
    """{"reward", maybe "gold": [P, N]} of --num-samples samples a prompt: those of the file, if they are of the same
    inputs, and then new ones, saved after each round. Raises UserError or, once it samples, RunError."""
    values, wrong = {}, ""
    if file.is_file() and not args.overwrite:
        try:
            before, values = (torch.load(file)[key] for key in ("inputs", "values"))
            new = [k for k in inputs if (before.get(k) or None) != (inputs[k] or None)]
            changed = [f"{k} {before.get(k)!r} (now {inputs[k]!r})" for k in new]
            wrong = f"is of other samples, with {', '.join(changed)}" if changed else ""
        except Exception as error:
            wrong = f"is damaged ({type(error).__name__}: {error})"
    if wrong:
        raise UserError(f"{file} {wrong}. Pass --overwrite to sample anew, or another --output-dir.")
    done = values["reward"].shape[1] if values else 0
    if done:
        print(f"samples       {done:,} a prompt made before")
    rounds = range(done // ROUND, math.ceil(args.num_samples / ROUND))
    fours = [x for x in prompts for _ in range(ROUND // 4)]  # four responses share a row: measured to be fastest
    for number in tqdm(rounds, desc="limit", unit=f"x {ROUND * len(prompts):,} samples", disable=not rounds):
        generator = torch.Generator().manual_seed(args.seed + 1_000_003 * (number + 1))
        noise = torch.rand(len(prompts) * ROUND, args.max_response_tokens, dtype=torch.float64, generator=generator)
        _, _, answers = zip(*in_batches(sample, prompts, noise, args.sampling_batch_size))
        for name, judge in judges.items():
            new = judge(fours, answers).view(len(prompts), ROUND)
            values[name] = torch.cat([values[name], new], 1) if name in values else new
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"inputs": inputs, "values": values}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's, where the disk is full
            raise RunError(f"{file} could not be written ({error!s:.80}).") from error
    return {name: value[:, : args.num_samples].double() for name, value in values.items()}


def limit_numbers(values, b_values):
    """From the values [P, N] of the samples, what limit.json has of them, and the curve at a few KLs to be shown."""
    rewards, N = values["reward"], values["reward"].shape[1]
    spread = rewards.std(1).mean().item() or 1.0
    temperatures = sorted(b_values or (spread * 10 ** np.linspace(2, -2, 121)).tolist(), reverse=True)
    curve = {k: v.tolist() for k, v in limit_curve(rewards, temperatures, values.get("gold")).items()}
    halves = limit_curve(rewards[:, : N // 2 * 2].reshape(-1, N // 2), temperatures)  # [2P, N/2]: each half a prompt

    def rated(row):  # trusted or not; how much more reward than from half of the samples, None beyond their last KL
        inside = row["kl"] <= halves["kl"][-1]
        more = row["reward"] - np.interp(row["kl"], halves["kl"], halves["reward"]) if inside else None
        return row | {"trusted": row["ess"] >= 50 and row["kl"] < math.log(N) - 4.5, "more_than_half": more}

    rows = [rated({"b": b, **dict(zip(curve, row))}) for b, *row in zip(temperatures, *curve.values())]
    shown = [k for k in (0.25, 0.5, 1, 2, 3, 4, 5, 6) if curve["kl"][0] <= k <= curve["kl"][-1]]
    shown = [rated({name: np.interp(k, curve["kl"], curve[name]) for name in curve}) for k in shown]
    best = []
    for n in (2**k for k in range(max(1, N.bit_length() - 2))):  # up to N/4
        found = {name: best_of_n(rewards, n, value) for name, value in values.items()}
        best.append({"n": n, "kl": math.log(n) - (n - 1) / n, **found})
    means = {f"ref_{name}": value.mean().item() for name, value in values.items()}
    return {"num_samples": N, **means, "curve": rows, "best_of_n": best}, shown


def limit(args):
    """The subcommand. Returns what it writes."""
    device = PartialState().device
    args.dataset = args.dataset or ("tiny" if args.model == "tiny" else "hh")
    args.stop = args.stop or ("\n\nHuman:",) * (args.dataset == "hh")
    args.model = args.model if args.model == "tiny" else find_policy(args.model)
    policy_path = find_stage("sft", args.model, args.dataset) or args.model
    reference = load_frozen(AutoModelForCausalLM, policy_path, "--model", device, args)
    tokenizer, end_ids = load_tokenizer(policy_path, reference, args)
    print(f"reference     {policy_path} (--model changes it)")
    judges, sources, reward_model = load_judges(args, args.model, tokenizer, device)
    prompts = load_prompts(tokenizer, args)[1]
    base = "tiny" if args.model == "tiny" else short_name(args.model)
    folder = Path(args.output_dir or f"runs/limit/{short_name(args.dataset)}/{base}")
    print(f"folder        {folder} (--output-dir changes it)")

    record = {"args": json.loads(json.dumps(asdict(args))), "base_name": base, "policy": policy_path}
    record |= {"script": "limit", **sources, "num_prompts": len(prompts)}
    inputs = {k: record["args"][k] for k in ("seed", "temperature", "max_response_tokens", "stop", "dtype")}
    inputs["prompts"] = f"{short_name(args.dataset)} {fingerprint(prompts)}"
    models = {"reference": reference, "reward": reward_model, "gold": None}
    for name, path in {"reference": policy_path, **sources}.items():
        if models[name]:
            tensors = models[name].state_dict().values()
        elif path:  # FILE.py:f
            tensors = [torch.frombuffer(bytearray(Path(path.rpartition(":")[0]).read_bytes()), dtype=torch.uint8)]
        inputs[name] = f"{short_name(path)} {fingerprint(tensors)}" if path else ""
    options = {"temperature": args.temperature, "end_ids": end_ids, "tokenizer": tokenizer, "stop": args.stop}
    sample = partial(sample_responses, reference, **options)
    if args.overwrite:
        (folder / "limit.json").unlink(missing_ok=True)
    values = draw_samples(args, folder / "rewards.pt", inputs, sample, prompts, judges)
    found, shown = limit_numbers(values, args.b_values)
    write(folder / "limit.json", json.dumps(record | found, indent=1))

    trusted = max([row["kl"] for row in found["curve"] if row["trusted"]], default=0.0)
    rows = [["reference", *(f"{found[f'ref_{name}']:.3f}" for name in judges), "", ""]]
    for row in shown:
        note = "" if row["kl"] <= trusted else " (too few samples)"
        more = "" if row["more_than_half"] is None else f"{row['more_than_half']:+.3f}"
        rows.append([f"KL {row['kl']:g}{note}", *(f"{row[name]:.3f}" for name in judges), f"{row['ess']:.0f}", more])
    for row in found["best_of_n"][1:]:
        rows.append([f"best of {row['n']} (KL ≤ {row['kl']:.2f})", *(f"{row[name]:.3f}" for name in judges), "", ""])
    print(table(["limit", *judges, "effective samples", "more than with N/2"], rows))
    print(f"\nN = {args.num_samples:,} samples to each of {len(prompts)} prompts", end="; ")
    print(f"trusted up to KL {trusted:.2f}. {folder}/limit.json")
    return record | found


# -------------------------------------------------------------------------------------------------- compare and samples
def read_verdict(reply):
    """1, 0 or ½ for A, B or tie as the last line of a reply. Raises ValueError."""
    line = re.sub(r"[^a-z]+", " ", ([""] + reply.strip().splitlines())[-1].lower()).strip()
    words = "my |the |final |answer |verdict |response |choice |option |it |is |s "
    match = re.fullmatch(rf"(?:{words})*(a|b|(?:a )?tie)", line)
    if not match:
        raise ValueError(f"no verdict in the reply {reply!r:.60}")
    return {"a": 1.0, "b": 0.0}.get(match[1], 0.5)


def judge_wins(args, rows):
    """Wins of the first answer of each (prompt, answer, other answer): 1, ½ or 0, the mean over both orders of asking,
    None where one stays without a verdict. Equal answers tie unasked. Prints how many are unjudged."""
    url, lock, failures = f"{args.judge_url.rstrip('/')}/chat/completions", threading.Lock(), []
    headers, api_key = {"Content-Type": "application/json"}, os.environ.get("OPENAI_API_KEY")
    headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}
    cache, file = {}, args.judge_cache  # {key: win} of the replies so far
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # of a line that was cut
            row = json.loads(line)
            cache[row["key"]] = read_verdict(row["reply"])
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = open(file, "a", buffering=1)  # a line at a time
    stream.write("\n" if stream.tell() else "")  # the last line may have been cut

    def win(row):
        prompt, a, b = (text.strip() for text in row)
        if a == b:
            return 0.5
        text = f"Which of two answers to the end of this conversation is better?\n\n[Conversation]\n{prompt}\n\n"
        text += f"[Answer A]\n{a}\n\n[Answer B]\n{b}\n\nReply with one word: A, B or tie."
        body = {"model": args.judge_model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        key = hashlib.sha256(json.dumps([url, body["model"], body["messages"]]).encode()).hexdigest()
        body |= {"max_tokens": args.judge_max_tokens} if args.judge_max_tokens else {}
        for attempt in range(0 if key in cache else args.judge_retries + 1):
            time.sleep(min(0.25 * 2**attempt, 8) if attempt else 0)
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=args.judge_timeout) as response:
                    reply = json.load(response)["choices"][0]["message"]["content"]
                with lock:
                    cache[key] = read_verdict(reply)
                    stream.write(json.dumps({"key": key, "reply": reply}) + "\n")
                break
            except Exception as error:  # a server does wrong what it likes
                reason = f"{type(error).__name__}: {error}"
                if getattr(error, "code", 0) in (400, 401, 403, 404):  # the same again would be answered the same
                    break
        if key not in cache:
            failures.append(reason)
        return cache.get(key)

    orders = [order for x, a, b in rows for order in ((x, a, b), (x, b, a))]
    with stream, ThreadPoolExecutor(args.judge_workers) as pool:
        found = list(tqdm(pool.map(win, orders), total=len(orders), desc="judge", unit="reply"))
    wins = [None if None in (a, b) else (a + 1 - b) / 2 for a, b in zip(found[::2], found[1::2])]
    why = f" (the last because of {failures[-1]})" if failures else ""
    print(f"judge         {len(wins):,} pairs, {wins.count(None):,} unjudged{why}")
    return wins


def win_rate(wins):
    """Mean of the wins (0 to 1) of one answer over another, [prompts], and its 95 % interval: Wilson's score interval,
    which ties make too wide, by 40 % where half are ties."""
    if not len(wins):
        return {"win_rate": None, "low": None, "high": None, "prompts": 0}
    share, v = wins.double().mean().item(), 1.96**2 / len(wins)  # v = z²/n
    centre, half = (share + v / 2) / (1 + v), (v * share * (1 - share) + v**2 / 4) ** 0.5 / (1 + v)
    return {"win_rate": share, "low": centre - half, "high": centre + half, "prompts": len(wins)}


def compare(args):
    """The subcommand. Returns what it writes."""
    if len(args.models) < 2:
        raise UserError("compare: expected two policies or more, as runs/p3o_v2/tiny/tiny tiny.")
    if args.judge_url and (not re.match("https?://", args.judge_url) or not args.judge_model):
        raise UserError("--judge-url: expected http://… or https://…, and the judge's name in --judge-model.")
    prompts, texts, values, sources = answer(args, args.eval_prompts, args.reference)
    M, P, names = range(len(texts)), len(prompts), [name for name in SCORES if name in values[0]]
    diff = {(i, j): torch.tensor([a != b for a, b in zip(texts[i], texts[j])]) for i in M for j in M}
    wins = {k: {(i, j): ((values[i][k] - values[j][k]) * diff[i, j]).sign() / 2 + 0.5 for i, j in diff} for k in names}
    if args.judge_url:
        pairs, wins["judge"] = list(combinations(M, 2)), {(i, i): torch.full((P,), 0.5) for i in M}
        judged = judge_wins(args, [row for i, j in pairs for row in zip(prompts, texts[i], texts[j])])
        for n, (i, j) in enumerate(pairs):
            found = torch.tensor([win for win in judged[P * n : P * n + P] if win is not None])
            wins["judge"][i, j], wins["judge"][j, i] = found, 1 - found
    means = [{key: mean_and_se(value) for key, value in found.items()} for found in values]
    rows = [[i + 1, args.models[i], *(plus_minus(*found, 3) for found in means[i].values())] for i in M]
    print("\n" + table(["", "policy", *means[0]], rows))
    matrices = {name: [[win_rate(found[i, j]) for j in M] for i in M] for name, found in wins.items()}
    for name, matrix in matrices.items():
        form = "{win_rate:.3f} [{low:.3f}, {high:.3f}]".format
        rows = [[i + 1, *(form(**x) if x["prompts"] else "none" for x in row)] for i, row in enumerate(matrix)]
        print(f"\nWin rates by {name}: row against column, a tie is half a win [95 % interval over prompts: Wilson]\n")
        print(table(["", *(i + 1 for i in M)], rows))
    policies = [{"policy": name} for name in args.models]
    for policy, found in zip(policies, means):
        policy |= {key: mean for key, (mean, _) in found.items()} | {f"{key}_se": se for key, (_, se) in found.items()}
    result = {"args": json.loads(json.dumps(asdict(args), default=str)), **sources, "num_prompts": P}
    result |= {"policies": policies, "wins": matrices}
    write(args.output, json.dumps(result, indent=1))
    print(f"\n{args.output}")
    return result


def samples(args):
    """The subcommand. Returns the text that it prints and writes."""
    if not args.models:
        raise UserError("samples: expected a policy, as runs/p3o_v2/tiny/tiny.")
    prompts, texts, values, _ = answer(args, args.num)
    wrap, parts = textwrap.TextWrapper(110, initial_indent="    ", subsequent_indent="    ").fill, []
    for i, prompt in enumerate(prompts):
        parts += [f"## Prompt {i + 1}", *map(wrap, prompt.strip().splitlines())]
        for name, responses, found in zip(args.models, texts, values):
            numbers = [f"{key} {found[key][i]:.2f}" for key in SCORES if key in found]
            cut = "" if found["eos_rate"][i] else ", cut at the length limit"
            numbers.append(f"{found['length'][i]:.0f} tokens{cut}")
            parts += [f"**{name}**: {', '.join(numbers)}", *map(wrap, responses[i].strip().splitlines())]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write(args.output, text)
    print(f"\n{text}\n{args.output}")
    return text


# ----------------------------------------------------------------------------------------------------------------- main
def main(args):
    check(args)
    return {Frontier: frontier, Limit: limit, Compare: compare, Samples: samples}[type(args)](args)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    config = (tyro.conf.FlagCreatePairsOff,)
    commands = {"frontier": Frontier, "limit": Limit, "compare": Compare, "samples": Samples}
    args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, config=config)
    try:
        if isinstance(args, Compare | Samples):  # what is not given is as in the first run
            given = {word.partition("=")[0].replace("_", "-") for word in sys.argv}
            for name, value in settings_of_run(args).items():
                if f"--{name.replace('_', '-')}" not in given:
                    setattr(args, name, value)
        main(args)
    except (UserError, RunError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if args.debug:
            raise
        code = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        said = f"{NAME}.py: {error or 'interrupted'}"
        if isinstance(args, Limit) and code != 2:
            said += f"\nWhat was saved is kept: the same command{' less --overwrite' * args.overwrite} goes on."
        if isinstance(error, torch.OutOfMemoryError):
            said += "\nLess memory: --micro-batch-size, --sampling-batch-size, --dtype bfloat16"
        tqdm.write(said, file=sys.stderr)
        sys.exit(code)
