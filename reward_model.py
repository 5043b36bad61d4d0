"""Reward model: learn from pairs which of two responses people prefer (Bradley and Terry 1952), RLHF's second stage.

Objective    max_φ  E log σ( r_φ(x, y_w) − r_φ(x, y_l) )

over prompts x with a chosen response y_w and a rejected one y_l. Only differences of scores for the same prompt are
learned: any δ(x) added to r_φ is as good, which is why P3O, built on differences alone, does not mind it.

r_φ is the SFT policy's trunk with a scalar head, read at the last token: end-of-sequence, unless the response was cut.

Shapes: N rows, T response tokens, D hidden size. Prompts and responses are lists of 1-D id tensors, nothing padded.

    python reward_model.py                                                     the embedded world, from its SFT policy
    python reward_model.py --model pythia-1b --dataset hh --dtype bfloat16     one GPU; starts from what sft.py saved
    python reward_model.py --model FOLDER --dataset FILE.jsonl                 your own: prompt, chosen, rejected
"""

import json
import math
import re
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
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TINY = Path(__file__).parent / "tiny"


def bradley_terry_loss(chosen_scores, rejected_scores):
    """−log σ(r(x, y_w) − r(x, y_l)), mean over pairs, and the metrics. Both [N]."""
    margins = chosen_scores - rejected_scores
    loss = -F.logsigmoid(margins).mean()
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    metrics = {"rm/loss": loss.detach(), "rm/accuracy": wins.mean(), "rm/margin": margins.detach().mean()}
    return loss, metrics


@dataclass
class Args:
    # Run
    seed: int = 1  # of the sampling noise, the order of the data and any new weights
    output_dir: str = ""  # the run's folder (default: runs/SCRIPT/DATASET/MODEL)
    overwrite: bool = False  # replace the run that the folder holds
    # Model
    model: str = "tiny"  # tiny (embedded), a short name (pythia-14m … pythia-12b), a hub id, or a folder
    # Data
    dataset: str = ""  # tiny, hh, tldr, a hub id, a .jsonl[.gz] or .parquet file, a folder (default: hh; tiny for tiny)
    max_prompt_tokens: int = 512  # longer prompts are dropped, and counted
    max_response_tokens: int = 128  # length limit of a response
    # Sizes
    data_epochs: int = 1  # passes over the training data
    num_updates: int = 0  # rounds of sampling, with epochs (online); optimizer steps at most (offline; 0: all data)
    minibatch_size: int = 32  # prompts with all responses (online), pairs or rows (offline) per optimizer step
    micro_batch_size: int = 32  # sequences in one forward, sampling aside: changes memory and speed alone
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights, sums and the head stay in float32
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third slower
    unfrozen_layers: int = 0  # train only the last layers, and the head if it has its own weights (0: everything)
    # Optimiser
    learning_rate: float = 0.0  # AdamW's step size (0: the script's choice, see `lr` in main)
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"  # how the learning rate falls over the run
    warmup_updates: int = 0  # updates in which the learning rate rises from 0
    weight_decay: float = 1e-6  # AdamW's, decoupled
    adam_betas: tuple[float, float] = (0.9, 0.95)  # decay rates of AdamW's two moments
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm (0: never)
    # Evaluation on held-out prompts; there is always one before training and one after
    eval_every: int = 200  # updates between evaluations (0: only these two)
    eval_prompts: int = 2000  # held-out prompts used, the first ones


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


def load_rows(tokenizer, dataset, columns, max_prompt_tokens, max_response_tokens):
    """(train, held-out) rows of 1-D id tensors, {"prompt", *columns}, responses with one EOS; prints what is left out.

    Data of pairs give demonstrations by their chosen responses. Without a column `prompt`, chosen and rejected are
    dialogues that share all up to the last "\n\nAssistant:", as in HH. Without held-out data a tenth of the prompts (at
    most 1,000) is held out. Prompt and response are tokenised apart, as sampling sees them. Raises UserError."""
    parts, counts = read_dataset(dataset, "--dataset")[:2], Counter()
    for i, part in enumerate(parts):
        found, texts = part.column_names, []
        needs = [{"prompt", *columns}, {"chosen", "rejected"}] + [{"prompt", "chosen"}] * ("rejected" not in columns)
        if not any(need <= {*found} for need in needs):
            wanted = f"the columns prompt, {', '.join(columns)}, or chosen and rejected"
            raise UserError(f"--dataset {dataset}: expected {wanted}; found {found}.")
        for key in {"prompt", "chosen", "rejected", *columns} & {*found}:
            if not all(isinstance(x, str) for x in part[key]):
                raise UserError(
                    f"--dataset {dataset}: column {key} holds {part.features[key]} or null, expected strings."
                )
        for row in part:
            if "prompt" not in found:
                at = row["chosen"].rfind("\n\nAssistant:") + 12
                if at == 11 or row["chosen"][:at] != row["rejected"][:at]:
                    counts["dropped: chosen and rejected have no prompt in common"] += 1
                    continue
                row = {"prompt": row["chosen"][:at], "chosen": row["chosen"][at:], "rejected": row["rejected"][at:]}
            texts.append({key: row.get(key, row.get("chosen")) for key in ("prompt", *columns)})
        parts[i] = texts
    if len(parts) == 1:
        prompts = list(dict.fromkeys(row["prompt"] for row in parts[0]))
        shuffled = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
        held = {prompts[i] for i in shuffled[: min(max(len(prompts) // 10, 1), 1000)]}
        parts = [[row for row in parts[0] if (row["prompt"] in held) == out] for out in (False, True)]
    for i, name in enumerate(("train", "held-out")):
        if not parts[i]:
            raise UserError(f"--dataset {dataset}: there are no {name} rows.")
        keys, rows = ("prompt", *columns), []
        ids = [tokenizer([row[key] for row in parts[i]], add_special_tokens=key == "prompt").input_ids for key in keys]
        for prompt, *responses in zip(*ids):
            if not prompt or not all(responses):
                counts["dropped: empty prompt or response"] += 1
            elif len(prompt) > max_prompt_tokens:
                counts[f"dropped: prompt of more than {max_prompt_tokens} tokens"] += 1
            else:
                responses = [y if y[-1] == tokenizer.eos_token_id else [*y, tokenizer.eos_token_id] for y in responses]
                counts[f"cut at {max_response_tokens} tokens"] += sum(len(y) > max_response_tokens for y in responses)
                row = [prompt, *(y[:max_response_tokens] for y in responses)]
                rows.append({key: torch.tensor(values) for key, values in zip(keys, row)})
        print(f"{'':14}{len(rows):,} {name} rows" + "".join(f"; {n:,} {what}" for what, n in counts.items() if n))
        if not rows:
            raise UserError(f"--dataset {dataset}: no {name} rows are left; see the counts above.")
        parts[i], counts = rows, Counter()
    return parts


# ---------------------------------------------------------------------------------------------------------------- score
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


def evaluate_pairs(chosen_scores, rejected_scores):
    """How far to trust the scores of held-out pairs, both [N]: accuracy, also by tenths of |margin|, and calibration.

    rm/eval_ece, expected calibration error: ten bins' |share of wins − mean σ(|margin|)|, weighted by their pairs."""
    margins = (chosen_scores - rejected_scores).double()
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    by_size = wins[margins.abs().argsort()]
    scores = torch.cat([chosen_scores, rejected_scores]).double()
    point = {
        "rm/eval_loss": -F.logsigmoid(margins).mean().item(),
        "rm/eval_accuracy": wins.mean().item(),
        "rm/eval_score_mean": scores.mean().item(),
        "rm/eval_score_std": scores.std().item(),
    }
    for i, part in enumerate(by_size.tensor_split(min(10, len(by_size)))):
        point[f"rm/eval_accuracy_decile_{i}"] = part.mean().item()
    confidence = margins.abs().sigmoid()  # of the model in the response that it prefers
    bins = ((confidence - 0.5) * 20).long().clamp(max=9)
    errors = [(bins == i).sum() * (wins[bins == i].mean() - confidence[bins == i].mean()).abs() for i in bins.unique()]
    return {**point, "rm/eval_ece": (sum(errors) / len(margins)).item()}


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
    # ------------------------------------------------------------------------- model, data
    args.dataset = args.dataset or ("tiny" if args.model == "tiny" else "hh")
    if re.fullmatch(r"pythia-[\d.]+[mb](-deduped)?", args.model) and not Path(args.model).exists():
        args.model = f"EleutherAI/{args.model}"
    torch.manual_seed(args.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # Apple's GPU has no float64
    policy_path = find_stage("sft", args.model, args.dataset) or args.model
    print(f"model         {policy_path} ({'no SFT run' if policy_path == args.model else 'SFT'}), new scalar head")
    classifier = partial(load_model, AutoModelForSequenceClassification, num_labels=1, new_head=True)
    reward_model = classifier(policy_path, "--model", accelerator.device, args, train=True)
    tokenizer = fetch("tokenizer", policy_path, "--model", lambda: AutoTokenizer.from_pretrained(policy_path))
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) and len(tokenizer) < reward_model.config.vocab_size:
        tokenizer.add_special_tokens(
            {"pad_token": "[PAD]"}
        )  # an id of its own: transformers scores the last non-pad token
    reward_model.config.pad_token_id = tokenizer.pad_token_id
    print(f"dataset       {args.dataset} (--dataset changes it)")
    limits = (args.max_prompt_tokens, args.max_response_tokens)
    rows, eval_rows = load_rows(tokenizer, args.dataset, ("chosen", "rejected"), *limits)
    eval_rows = eval_rows[: args.eval_prompts]

    # ------------------------------------------------------------------------- run folder, optimiser
    base = "tiny" if args.model == "tiny" else short_name(policy_path)
    folder = Path(args.output_dir or f"runs/reward_model/{short_name(args.dataset)}/{base}")
    open_run(folder, args, script="reward_model", base_name=base, policy=policy_path)
    print(f"run folder    {folder} (--output-dir changes it)")
    writer = SummaryWriter(folder)
    per_epoch = math.ceil(len(rows) / args.minibatch_size)
    num_updates = min(args.num_updates or math.inf, args.data_epochs * per_epoch)
    lr = args.learning_rate or (1e-3 if args.model == "tiny" else 1e-5)
    optimizer = torch.optim.AdamW(
        reward_model.parameters(), lr, args.adam_betas, weight_decay=args.weight_decay, fused=True
    )
    scheduler = transformers.get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, num_updates)
    order = torch.Generator().manual_seed(args.seed)

    # ------------------------------------------------------------------------- training
    eval_pairs = [row["prompt"] for row in eval_rows], [row[y] for row in eval_rows for y in ("chosen", "rejected")]
    lengths = torch.tensor([sum(map(len, row.values())) for row in rows])
    queue, progress = [], tqdm(total=num_updates, desc="reward_model", unit="update")
    for update in range(num_updates + 1):
        # 0. Every so often, evaluate on held-out pairs.
        if update in (0, num_updates) or args.eval_every and update % args.eval_every == 0:
            scores = in_batches(partial(response_scores, reward_model), *eval_pairs, args.micro_batch_size)
            point = evaluate_pairs(*scores.view(-1, 2).T)
            log(folder / "evaluations.jsonl", writer, update, point)
            accuracy, ece = point["rm/eval_accuracy"], point["rm/eval_ece"]
            tqdm.write(f"after {update} updates: held-out accuracy {accuracy:.1%}, calibration error {ece:.1%}")
        if update == num_updates:
            break

        # 1. One optimizer step on a minibatch, in micro-batches of pairs of like length.
        start = time.perf_counter()
        if not queue:
            queue = list(torch.randperm(len(rows), generator=order).split(args.minibatch_size))
        minibatch = queue.pop(0)
        stats = Counter()
        for micro in minibatch[lengths[minibatch].argsort()].split(max(1, args.micro_batch_size // 2)):
            pairs = [rows[i]["prompt"] for i in micro], [rows[i][y] for i in micro for y in ("chosen", "rejected")]
            chosen_scores, rejected_scores = response_scores(reward_model, *pairs).view(-1, 2).T
            loss, metrics = bradley_terry_loss(chosen_scores, rejected_scores)
            share = len(micro) / len(minibatch)
            accelerator.backward(loss * share)
            stats.update({key: value.item() * share for key, value in metrics.items()})
        grad_norm = torch.nn.utils.clip_grad_norm_(reward_model.parameters(), args.max_grad_norm or math.inf)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

        # 2. Log.
        seconds = time.perf_counter() - start
        metrics = {**stats, "grad_norm": grad_norm.item(), "lr": lr, "time/update": seconds}
        metrics |= {"samples_per_second": len(minibatch) / seconds}
        log(folder / "metrics.jsonl", writer, update + 1, metrics)
        shown = {"loss": f"{stats['rm/loss']:.3f}", "accuracy": f"{stats['rm/accuracy']:.2f}"}
        progress.set_postfix(shown | {"pairs/s": f"{len(minibatch) / seconds:.0f}"})
        progress.update()

    progress.close()
    writer.close()
    if point["rm/eval_accuracy"] <= 0.5:
        print("warning: on held-out pairs it is no better than chance; do not optimise this reward")
    for part in (reward_model.float(), tokenizer):
        part.save_pretrained(folder / "model.tmp")
    (folder / "model.tmp").rename(folder / "model")  # so that it is whole or not there
    print(f"reward model saved in {folder}/model; load it with AutoModelForSequenceClassification.from_pretrained")
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
