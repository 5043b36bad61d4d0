"""Time our scripts and TRL's trainers on the same rows, model and lengths, taking turns in one run, beside the floor.

    python benchmark/speed.py --tokenizer FOLDER --dataset FILE.jsonl.gz     random weights of pythia-14m's shape, HH
    python benchmark/speed.py --model tiny                                   the embedded world
    python benchmark/speed.py --gpu --output gpu.json                        what a GPU does of what it could (gpu.py)

Every measurement is a process of its own: ours, TRL's, the floor, ours, TRL's, … For each it prints seconds an update
(median over the updates after the first, and the spread over the repeats), CPU seconds, peak memory, and the split into
phases. The floor is the work nobody can leave out, run by plain transformers on rows of equal length without padding:
each new token's forward through a preallocated cache, without sampling; trunk and, at response tokens, head, forward
and backward; two rows a prompt, though ours read a prompt once for both. No optimizer, no metrics, no data.

TRL is needed for the comparison alone: pip install trl==1.16.0; without it only ours and the floor are timed.
Set OMP_WAIT_POLICY=PASSIVE for numbers that repeat on a machine that does other things too.
"""

import gzip
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
TASKS = ("p3o_v2", "sft", "reward_model")
ONLINE, PAIRS = ("p3o_v1", "p3o_v2", "ppo", "online_dpo"), ("dpo", "ipo", "mpo")
PROMPTS = {
    "p3o_v2": 2,
    "sft": 1,
    "reward_model": 2,
}  # sequences a prompt where micro-batches count prompts


@dataclass
class Args:
    gpu: bool = False  # measure decoding, training and memory on a GPU, then ours against TRL in bfloat16 there
    output: str = ""  # JSON file for the results (default: none; gpu.json for --gpu)
    model: str = "pythia-14m"  # tiny, or the shape of a Pythia, with random weights
    tokenizer: str = str(ROOT / "tiny/sft")  # folder of the tokenizer for a Pythia's shape
    dataset: str = str(
        ROOT / "tiny/data/train.jsonl"
    )  # pairs: prompt, chosen, rejected, or dialogues as in HH
    tasks: tuple[str, ...] = TASKS  # scripts to time; also p3o_v1, ppo, online_dpo, dpo, ipo, mpo
    repeats: int = 3  # of ours, TRL's, floor
    updates: int = 3  # timed in every repeat, after one that is not
    prompts: int = 16  # prompts (online, with two responses each), rows (sft) or pairs in an update
    max_prompt_tokens: int = 256  # rows with longer prompts are not used
    max_response_tokens: int = 128  # nor are those with longer responses
    new_tokens: int = 64  # length limit of what is sampled
    micro_batch_size: int = 8  # sequences in one of our forwards
    trl_batch_size: int = 0  # sequences in one of TRL's forwards (0: all of an update)
    dtype: str = "float32"  # or bfloat16, on both sides
    worker: str = ""  # internal: what a process of its own does


# ------------------------------------------------------------------------------------------------------- the same rows
def write_rows(folder, args):
    """Model folders and FOLDER/data with the rows of one update (train) and two more (test)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if args.model == "tiny":
        policy, reward_model = ROOT / "tiny/sft", ROOT / "tiny/reward_model"
    else:
        policy, reward_model = folder / args.model, folder / "reward_model"
        options = ["--tokenizer", args.tokenizer, "--output", policy, "--shape", args.model]
        subprocess.run(
            [sys.executable, ROOT / "benchmark/random_model.py", *options],
            check=True,
            capture_output=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(policy)
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        for part in (model, tokenizer):
            part.save_pretrained(reward_model)
    tokenizer, rows = AutoTokenizer.from_pretrained(policy), []
    with (
        gzip.open(args.dataset, "rt")
        if args.dataset.endswith(".gz")
        else open(args.dataset) as lines
    ):
        for line in lines:
            row = json.loads(line)
            if "prompt" not in row:
                at = row["chosen"].rfind("\n\nAssistant:") + 12
                row = {
                    "prompt": row["chosen"][:at],
                    "chosen": row["chosen"][at:],
                    "rejected": row["rejected"][at:],
                }
            lengths = [
                len(tokenizer(row[key]).input_ids) for key in ("prompt", "chosen", "rejected")
            ]
            fits = (
                lengths[0] <= args.max_prompt_tokens and max(lengths[1:]) < args.max_response_tokens
            )
            if min(lengths) > 0 and fits and row["prompt"] not in {r["prompt"] for r in rows}:
                rows.append(
                    {
                        **{key: row[key] for key in ("prompt", "chosen", "rejected")},
                        "completion": row["chosen"],
                    }
                )
            if len(rows) == args.prompts + 2:
                break
    (folder / "data").mkdir()
    for name, part in (("train", rows[: args.prompts]), ("test", rows[args.prompts :])):
        (folder / "data" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part)
        )
    return str(policy), str(reward_model)


# ---------------------------------------------------------------------------------------------------- one process each
class Clock:
    """Wall and CPU seconds between the ends of updates, and the peak of memory at the last."""

    def __init__(self):
        self.ticks = []

    def tick(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ticks.append((time.perf_counter(), time.process_time()))
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated() / 2**30

    def result(self, **more):
        wall, cpu = ([b[i] - a[i] for a, b in zip(self.ticks, self.ticks[1:])] for i in (0, 1))
        return {
            "wall": statistics.median(wall),
            "cpu": statistics.median(cpu),
            "peak_gib": self.peak,
            **more,
        }


def run_ours(task, args, policy, reward_model, folder):
    """The script itself, on a dataset of as many rows as an update takes."""
    script, clock = __import__(task), Clock()
    plain_log, lines = script.log, []

    def log(*inputs, **options):
        if any(isinstance(file, Path) and file.stem == "metrics" for file in inputs):
            clock.tick()
            lines.append(inputs[-1])
        plain_log(*inputs, **options)

    def stored(
        accelerator, make, **inputs
    ):  # log π_ref of the update's pairs, made once for each time they are used
        def timed():
            start = time.perf_counter(), time.process_time()
            values = make()
            once.extend((time.perf_counter() - start[0], time.process_time() - start[1]))
            return values

        shutil.rmtree("runs", ignore_errors=True)
        return plain_stored(accelerator, timed, **inputs)

    script.log, once = log, []
    if hasattr(script, "stored"):
        plain_stored, script.stored = script.stored, stored
    options = {
        "model": policy,
        "dataset": str(folder / "data"),
        "output_dir": str(folder / "run"),
        "overwrite": True,
    }
    options |= {
        "num_updates": args.updates + 1,
        "eval_every": 0,
        "eval_prompts": 2,
        "dtype": args.dtype,
    }
    options |= {
        "micro_batch_size": args.micro_batch_size // PROMPTS.get(task, 1),
        "minibatch_size": args.prompts,
        "learning_rate": 1e-5,
    }
    options |= {
        "max_prompt_tokens": args.max_prompt_tokens,
        "max_response_tokens": args.max_response_tokens,
    }
    if task in ONLINE:
        options |= {"prompts_per_update": args.prompts, "num_responses": 2, "num_epochs": 1}
        options |= {"reward_model": reward_model}
        options |= {"max_response_tokens": args.new_tokens}
    else:
        options |= {"data_epochs": args.updates + 1, "lr_schedule": "constant"}
    script.main(script.Args(**options))
    phases = {
        k[5:]: statistics.median(line[k] for line in lines[1:])
        for k in lines[0]
        if k.startswith("time/")
    }
    lengths = [round(line["objective/length"], 1) for line in lines[1:]] if task in ONLINE else []
    result = clock.result(phases=phases, lengths=lengths)
    if once:
        result["wall"], result["cpu"] = result["wall"] + once[0], result["cpu"] + once[1]
        result["phases"] |= {"train": result["phases"]["update"], "reference": once[0]}
    return result


def run_trl(task, args, policy, reward_model, folder):
    """TRL's trainer with the same batch and lengths, its CPU-slowing defaults (bf16, checkpointing) as ours are."""
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback

    clock, spent = Clock(), {}

    class Ticks(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()
            if len(clock.ticks) == 1:
                spent.clear()

    def timed(name, function):
        def run(*inputs, **options):
            start = time.perf_counter()
            out = function(*inputs, **options)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            return out

        return run

    rows = load_dataset("json", data_files=str(folder / "data/train.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    sequences = args.prompts * (
        2 if task in ("p3o_v1", "p3o_v2", "ppo") else 1
    )  # RLOO counts responses
    batch = args.trl_batch_size or sequences
    options = {
        "output_dir": str(folder / "trl"),
        "max_steps": args.updates + 1,
        "learning_rate": 1e-5,
    }
    options |= {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": sequences // batch,
    }
    options |= {
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    options |= {"use_cpu": not torch.cuda.is_available(), "bf16": args.dtype == "bfloat16"}
    options |= {"gradient_checkpointing": False, "lr_scheduler_type": "constant"}
    common = {"processing_class": tokenizer, "callbacks": [Ticks()]}
    if task in ("p3o_v1", "p3o_v2", "ppo"):
        rows = rows.remove_columns(["chosen", "rejected", "completion"])
        options |= {
            "num_generations": 2,
            "max_completion_length": args.new_tokens,
            "beta": 0.05,
            "temperature": 1.0,
        }
        options |= {"top_k": 0, "generation_batch_size": sequences}
        trainer = trl.RLOOTrainer(policy, reward_model, trl.RLOOConfig(**options), rows, **common)
        parts = {
            "generate": "_generate",
            "score": "_calculate_rewards",
            "logprobs": "_get_per_token_logps_and_entropies",
        }
    elif task == "online_dpo":
        from transformers import AutoModelForSequenceClassification
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        rows = rows.remove_columns(["chosen", "rejected", "completion"])
        options |= {
            "max_new_tokens": args.new_tokens,
            "beta": [0.1],
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
        }
        options |= {"max_length": args.max_prompt_tokens + args.new_tokens}
        scorer = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
        scorers = {
            "reward_funcs": scorer,
            "reward_processing_classes": AutoTokenizer.from_pretrained(reward_model),
        }
        trainer = OnlineDPOTrainer(
            policy, args=OnlineDPOConfig(**options), train_dataset=rows, **scorers, **common
        )
        parts = {"generate": "_generate", "logprobs": "_forward"}
    elif task in PAIRS:
        rows, loss = rows.remove_columns(["completion"]), {"ipo": "ipo"}.get(task, "sigmoid")
        options |= {
            "max_length": args.max_prompt_tokens + args.max_response_tokens,
            "loss_type": [loss],
            "beta": 0.1,
        }
        trainer, parts = (
            trl.DPOTrainer(policy, args=trl.DPOConfig(**options), train_dataset=rows, **common),
            {},
        )
    elif task == "sft":
        rows = rows.remove_columns(["chosen", "rejected"])
        options |= {"max_length": args.max_prompt_tokens + args.max_response_tokens}
        trainer, parts = (
            trl.SFTTrainer(policy, trl.SFTConfig(**options), train_dataset=rows, **common),
            {},
        )
    else:
        rows, tokenizer = (
            rows.remove_columns(["completion"]),
            AutoTokenizer.from_pretrained(reward_model),
        )
        common["processing_class"] = tokenizer
        options |= {"max_length": args.max_prompt_tokens + args.max_response_tokens}
        trainer, parts = (
            trl.RewardTrainer(
                reward_model, trl.RewardConfig(**options), train_dataset=rows, **common
            ),
            {},
        )
    for name, method in parts.items():
        setattr(trainer, method, timed(name, getattr(trainer, method)))
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    trainer.train()
    return clock.result(phases={name: seconds / args.updates for name, seconds in spent.items()})


def run_floor(task, args, policy, reward_model, folder):
    """Least seconds of every part of the work over several trials, on rows of the mean length; see the top."""
    import torch.nn.functional as F
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DynamicCache,
    )

    from p3o_v1 import InplaceLayer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(policy, **load).to(device)
    scorer = AutoModelForSequenceClassification.from_pretrained(reward_model, **load).to(device)
    head, rows = (
        model.get_output_embeddings(),
        (folder / "data/train.jsonl").read_text().splitlines(),
    )
    tokenizer = AutoTokenizer.from_pretrained(policy)
    texts = [json.loads(row) for row in rows]
    count = {
        key: sum(len(tokenizer(row[key]).input_ids) for row in texts)
        for key in ("prompt", "chosen", "rejected")
    }
    B, T = args.prompts, args.new_tokens
    if task in ONLINE:
        sampled = json.loads((folder / "lengths.json").read_text())
        responses, total = round(2 * B * statistics.mean(sampled)), 2 * count["prompt"]
        T = round(statistics.mean(sampled))
    elif task == "sft":
        responses, total = count["chosen"] + B, count["prompt"]
    else:
        responses = count["chosen"] + count["rejected"] + 2 * B if task in PAIRS else 0
        total = 2 * count["prompt"] + count["chosen"] + count["rejected"] + 2 * B - responses
    N = B if task == "sft" else 2 * B
    length = round((total + responses) / N)
    ids = torch.randint(0, 500, (N, length), device=device)
    targets = torch.randint(0, 500, (responses,), device=device)

    def trunk(network):
        return network.base_model(ids, use_cache=False).last_hidden_state

    def logprobs(network):  # the head at as many positions as there are response tokens
        return -F.cross_entropy(
            head(trunk(network).flatten(0, 1)[:responses]), targets, reduction="none"
        )

    @torch.no_grad()
    def sample():
        cache = DynamicCache(config=model.config)
        cache.layers = [InplaceLayer() for _ in cache.layers]
        head(
            model.base_model(
                ids[:B, : round(count["prompt"] / B)], past_key_values=cache
            ).last_hidden_state[:, -1]
        )
        cache.batch_repeat_interleave(2)
        for _ in range(T - 1):
            head(model.base_model(ids[:, :1], past_key_values=cache).last_hidden_state[:, -1])

    if task in PAIRS:
        parts = {
            "reference": torch.no_grad()(partial(logprobs, model)),
            "train": lambda: logprobs(model).sum().backward(),
        }
    elif task in ONLINE:
        parts = {"sample": sample, "score": torch.no_grad()(partial(trunk, scorer))}
        parts |= {
            "logprobs": torch.no_grad()(partial(logprobs, model)),
            "train": lambda: logprobs(model).sum().backward(),
        }
        if task == "ppo":
            parts |= {"values": torch.no_grad()(partial(trunk, scorer))}
            parts |= {"train values": lambda: scorer.score(trunk(scorer)).sum().backward()}
    elif task == "sft":
        parts = {"train": lambda: logprobs(model).sum().backward()}
    else:
        parts = {"train": lambda: scorer.score(trunk(scorer)[:, -1]).sum().backward()}
    phases, cpu = {}, 0.0
    for name, part in parts.items():
        trials = []
        for _ in range(5):
            model.zero_grad()
            scorer.zero_grad()
            clock = Clock()
            with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                clock.tick()
                part()
                clock.tick()
            trials.append([b - a for a, b in zip(*clock.ticks)])
        phases[name], cpu = min(wall for wall, _ in trials), cpu + min(cpu for _, cpu in trials)
    return {"wall": sum(phases.values()), "cpu": cpu, "peak_gib": clock.peak, "phases": phases}


WORKERS = {"ours": run_ours, "trl": run_trl, "floor": run_floor}


# ------------------------------------------------------------------------------------------------------------- compare
def compare(args):
    """{task: {"ours" | "trl" | "floor": [result of each repeat]}}, and prints the table."""
    sides = [side for side in WORKERS if side != "trl" or importlib.util.find_spec("trl")]
    results = {task: {side: [] for side in sides} for task in args.tasks}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_rows(Path(folder), args)
        turns = [(task, side) for task in args.tasks for _ in range(args.repeats) for side in sides]
        for task, side in tqdm(turns, desc=args.model):
            spec = json.dumps(
                {"task": task, "side": side, "paths": paths, "folder": folder, "args": asdict(args)}
            )
            env = os.environ | {
                "PYTHONPATH": str(ROOT),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            command = [sys.executable, __file__, "--worker", spec]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
            if done.returncode:
                raise SystemExit(
                    f"{task}, {side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
                )
            results[task][side].append(json.loads(done.stdout.splitlines()[-1]))
            if "lengths" in results[task][side][-1]:
                (Path(folder) / "lengths.json").write_text(
                    json.dumps(results[task][side][-1]["lengths"] or [0])
                )
    print(
        f"\n{args.model}, {args.prompts} prompts, {args.dtype}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY')}"
    )
    for task, runs in results.items():
        for side, repeats in runs.items():
            wall, cpu, peak = ([run[key] for run in repeats] for key in ("wall", "cpu", "peak_gib"))
            split = {
                k: statistics.median(run["phases"][k] for run in repeats)
                for k in repeats[0]["phases"]
            }
            shares = ", ".join(
                f"{key} {value:.3g}" for key, value in split.items() if key != "update"
            )
            memory = "" if side == "floor" else f", peak {max(peak):.2f} GiB"
            spread = f"{statistics.median(wall):.3f} s ({min(wall):.3f} to {max(wall):.3f})"
            print(
                f"{task:13} {side:6} {spread}, CPU {statistics.median(cpu):.3f} s{memory}; {shares}"
            )
        for name, a, b in (("TRL / ours", "trl", "ours"), ("ours / floor", "ours", "floor")):
            if a in runs and b in runs:
                for key in ("wall", "cpu"):
                    ratios = [x[key] / y[key] for x, y in zip(runs[a], runs[b])]
                    low, high = min(ratios), max(ratios)
                    print(
                        f"{'':14}{name} by {key}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
                    )
    return results


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if args.worker:
        spec = json.loads(args.worker)
        args = Args(**spec["args"])
        print(
            json.dumps(
                WORKERS[spec["side"]](spec["task"], args, *spec["paths"], Path(spec["folder"]))
            )
        )
    elif args.gpu:
        import gpu

        gpu.main(args, compare)
    else:
        results = compare(args)
        if args.output:
            Path(args.output).write_text(
                json.dumps({"args": asdict(args), "results": results}, indent=1)
            )
