"""Seconds per update of our scripts, of TRL's trainers, and of a lower bound, the floor.

    python benchmark/speed.py --tokenizer FOLDER --dataset FILE.jsonl.gz     pythia-14m's shape, HH
    python benchmark/speed.py --model tiny                                   the built-in world
    python benchmark/speed.py --gpu --output gpu.json                        a GPU's limits (gpu.py)

Every measurement is a process of its own, and the sides take turns: ours, TRL's, the floor, ours,
... All have the same model, rows, limits of length, micro-batches and precision, one optimizer step
an update and, online, two responses to a prompt, which are sampled anew for every update. Seconds
are the median over the updates after the first; the table has the median over the repeats and, in
brackets, the least and the most.

The log-probabilities of the reference that dpo, ipo and mpo need count once for every pair: our
scripts compute them once in a run, and their time is added to that of an update ("once"). TRL's
DPOTrainer computes them in every update, or once with --trl-precompute, which is then added, too.
TRL has no P3O, PPO or MPO. Beside the first two stands its RLOO, which has no value model, beside
the last DPO, which trains on two responses where MPO has three.

The floor is run by plain transformers on rows of equal length without padding: the forward of every
new token, without choosing it; trunk and, at response tokens, head, forward and backward. It reads
a prompt once for every response, while our scripts read it once for all, and may be faster. It has
no optimizer, no metrics and no data.

TRL is needed for the comparison alone: pip install trl==1.16.0. Without it only ours and the floor
are timed. OMP_WAIT_POLICY=PASSIVE gives numbers that repeat on a machine that does other things.
"""

import gzip
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    TrainerCallback,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
ONLINE = ("p3o_v2", "p3o_v1", "rloo", "grpo", "ppo", "online_dpo")
PAIRS = ("dpo", "ipo", "mpo")
TASKS = ("sft", "reward_model", *ONLINE, *PAIRS)
TRAINERS = {
    "sft": "SFTTrainer",
    "reward_model": "RewardTrainer",
    "grpo": "GRPOTrainer",
    "online_dpo": "OnlineDPOTrainer",
    **dict.fromkeys(PAIRS, "DPOTrainer"),
}  # else RLOOTrainer
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@dataclass
class Args:
    gpu: bool = False  # measure a GPU's decoding, training and memory, and ours against TRL there
    output: str = ""  # JSON file for the results (empty: none, or gpu.json for --gpu)
    model: str = "pythia-14m"  # tiny, or the shape of a Pythia, with random weights
    tokenizer: str = str(ROOT / "tiny/sft")  # folder of the tokenizer for a Pythia's shape
    dataset: str = str(ROOT / "tiny/data/train.jsonl")  # prompt, chosen, rejected; or as in HH
    tasks: tuple[str, ...] = TASKS  # scripts to time
    repeats: int = 3  # of ours, TRL's, floor
    updates: int = 3  # timed in every repeat, after one that is not
    prompts: int = 16  # prompts, rows (sft) or pairs in an update
    micro_batch_size: int = 4  # of these in a forward
    max_prompt_tokens: int = 256  # rows with longer prompts are not used
    max_response_tokens: int = 128  # nor are those with longer responses
    new_tokens: int = 64  # limit of sampled responses
    trl_batch_size: int = 0  # of prompts in a forward of TRL (0: as ours)
    trl_precompute: bool = False  # TRL's DPOTrainer computes log π_ref once, as our scripts do
    dtype: str = "float32"  # or bfloat16, on both sides
    worker: str = ""  # internal: what a process of its own does


# ----------------------------------------------------------------------------------- the same rows
def make_models(folder, args):
    """Folders of the policy and of the reward model."""
    if args.model == "tiny":
        return ROOT / "tiny/sft", ROOT / "tiny/reward_model"
    policy, reward_model = folder / args.model, folder / "reward_model"
    command = [sys.executable, ROOT / "benchmark/random_model.py", "--shape", args.model]
    command += ["--tokenizer", args.tokenizer, "--output", policy]
    subprocess.run(command, check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    for part in (model, tokenizer):
        part.save_pretrained(reward_model)
    return policy, reward_model


def write_rows(folder, policy, args):
    """Write FOLDER/data with the rows of one update (train) and two more (test)."""
    tokenizer, rows = AutoTokenizer.from_pretrained(policy), {}
    open_text = gzip.open if args.dataset.endswith(".gz") else open
    with open_text(args.dataset, "rt") as lines:
        for row in map(json.loads, lines):
            if "prompt" not in row:  # a dialogue of HH
                at = row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
                row = {"prompt": row["chosen"][:at], **{key: row[key][at:] for key in row}}
            row = {key: row[key] for key in ("prompt", "chosen", "rejected")}
            prompt, *responses = [len(tokenizer(text).input_ids) for text in row.values()]
            fits = prompt <= args.max_prompt_tokens and max(responses) < args.max_response_tokens
            if fits and min(prompt, *responses) > 0:
                rows.setdefault(row["prompt"], {**row, "completion": row["chosen"]})
            if len(rows) == args.prompts + 2:
                break
    if len(rows) < args.prompts + 2:
        raise SystemExit(f"{args.dataset} has {len(rows)} prompts within the limits")
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    (folder / "data").mkdir()
    (folder / "data/train.jsonl").write_text("".join(lines[:-2]))
    (folder / "data/test.jsonl").write_text("".join(lines[-2:]))


# -------------------------------------------------------------------------------- one process each
class Clock:
    """Wall and CPU seconds between moments, and the peak of memory at the last."""

    def __init__(self):
        self.moments = []

    def tick(self, *_):
        if CUDA:
            torch.cuda.synchronize()
        self.moments.append(moment())
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if CUDA:
            self.peak = torch.cuda.max_memory_allocated() / 2**30

    def result(self, once=(0.0, 0.0)):
        """Medians of the time between two moments, with what is done once added."""
        found = {"once": once[0], "peak_gib": self.peak}
        for i, name in enumerate(("wall", "cpu")):
            spans = [b[i] - a[i] for a, b in zip(self.moments, self.moments[1:])]
            found[name] = statistics.median(spans) + once[i]
        return found


def moment():
    """Wall and CPU seconds so far."""
    return time.perf_counter(), time.process_time()


def since(start):
    """Wall and CPU seconds since a moment."""
    return [b - a for a, b in zip(start, moment())]


def run_ours(task, args, policy, reward_model, folder):
    """The script itself, on a dataset of as many rows as an update takes."""
    script, clock = importlib.import_module(task), Clock()
    plain_log, plain_start, plain_save = script.log, script.start_run, torch.save
    lengths, opened, once = [], [], [0.0, 0.0]

    def log(accelerator, file, update, values, **options):
        if file.name == "metrics.jsonl":
            clock.tick()
            lengths.append(float(values.get("objective/length", 0)))
        plain_log(accelerator, file, update, values, **options)

    def start_run(*inputs):
        plain_start(*inputs)
        opened[:] = moment()

    def save(content, file):
        if file.name == "reference.pt":  # what the reference says, computed since start_run
            once[:] = since(opened)
        plain_save(content, file)

    script.log, script.start_run, torch.save = log, start_run, save
    options = {
        "model": policy,
        "dataset": str(folder / "data"),
        "output_dir": str(folder / "run"),
        "overwrite": True,
        "num_updates": args.updates + 1,
        "eval_every": 0,
        "eval_prompts": 2,
        "dtype": args.dtype,
        "minibatch_size": args.prompts,
        "micro_batch_size": args.micro_batch_size,
        "learning_rate": 1e-5,
        "max_prompt_tokens": args.max_prompt_tokens,
        "max_response_tokens": args.max_response_tokens,
    }
    if task in ONLINE:
        options |= {"prompts_per_update": args.prompts, "num_responses": 2, "num_epochs": 1}
        options |= {"reward_model": reward_model, "max_response_tokens": args.new_tokens}
    script.main(script.Args(**options))
    if task == "mpo":
        _, samples = torch.load(folder / "run/reference.pt")
        lengths = [len(y) for y in samples]
    return clock.result(once) | {"sampled": statistics.mean(lengths)}


def run_trl(task, args, policy, reward_model, folder):
    """TRL's trainer with the same sizes, without its defaults of bfloat16 and checkpointing."""
    import trl
    from datasets import load_dataset

    clock, once = Clock(), [0.0, 0.0]
    callback = TrainerCallback()
    callback.on_step_end = lambda *_, **__: clock.tick()
    rows = load_dataset("json", data_files=str(folder / "data/train.jsonl"), split="train")
    K = 1 if task == "online_dpo" or task not in ONLINE else 2  # these trainers count responses
    batch = args.trl_batch_size or args.micro_batch_size
    options = {
        "output_dir": str(folder / "trl"),
        "max_steps": args.updates + 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": batch * K,
        "gradient_accumulation_steps": args.prompts // batch,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not CUDA,
        "bf16": args.dtype == "bfloat16",
        "gradient_checkpointing": False,
    }
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    rewards = {"reward_funcs": reward_model}
    limit = {"max_length": args.max_prompt_tokens + args.max_response_tokens}
    if task == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig as Config
        from trl.experimental.online_dpo import OnlineDPOTrainer as Trainer

        options |= {**sampling, "max_new_tokens": args.new_tokens, "beta": [0.1]}
        options |= {"max_length": args.max_prompt_tokens + args.new_tokens}
        model = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
        rewards = {
            "reward_funcs": model,
            "reward_processing_classes": AutoTokenizer.from_pretrained(reward_model),
        }
    else:
        name = TRAINERS.get(task, "RLOOTrainer")
        Trainer, Config = getattr(trl, name), getattr(trl, name.replace("Trainer", "Config"))
    if task in ONLINE:
        columns = ["prompt"]
        if task != "online_dpo":
            options |= {**sampling, "max_completion_length": args.new_tokens, "beta": 0.05}
            options |= {"num_generations": 2, "generation_batch_size": 2 * args.prompts}
        if task == "grpo":
            options["loss_type"] = "grpo"
    else:
        rewards = {}
        columns = ["prompt", "completion"] if task == "sft" else ["prompt", "chosen", "rejected"]
        options |= limit
    if task in PAIRS:
        options |= {"loss_type": ["ipo" if task == "ipo" else "sigmoid"], "beta": 0.1}
        options["precompute_ref_log_probs"] = args.trl_precompute
        compute = Trainer._precompute_ref_logps

        def timed(*inputs):
            start = moment()
            result = compute(*inputs)
            once[:] = since(start)
            return result

        Trainer._precompute_ref_logps = timed
    model = reward_model if task == "reward_model" else policy
    trainer = Trainer(
        model,
        args=Config(**options),
        train_dataset=rows.select_columns(columns),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[callback],
        **rewards,
    )
    trainer.train()
    return clock.result(once)


def run_floor(task, args, policy, reward_model, folder):
    """The least seconds of every part of the work over several trials; see the top."""
    model = AutoModelForCausalLM.from_pretrained(policy).float().to(DEVICE)
    scorer = AutoModelForSequenceClassification.from_pretrained(reward_model).float().to(DEVICE)
    head = model.get_output_embeddings()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = [json.loads(line) for line in open(folder / "data/train.jsonl")]

    def mean_length(key):
        return statistics.mean(len(tokenizer(row[key]).input_ids) for row in rows)

    sampled = float((folder / "sampled").read_text())
    pair = [mean_length("chosen") + 1, mean_length("rejected") + 1]  # with their end tokens
    lengths = {"sft": pair[:1], "mpo": [*pair, sampled]}.get(task, pair)
    if task in ONLINE:
        lengths = [sampled] * 2
    B, P, T = args.prompts, round(mean_length("prompt")), round(statistics.mean(lengths))
    ids = torch.randint(0, 500, (B * len(lengths), P + T), device=DEVICE)
    micro_batches = ids.split(args.micro_batch_size * len(lengths))

    def trunk(network, ids):
        return network.base_model(ids, use_cache=False).last_hidden_state

    def logps(ids):
        logits = head(trunk(model, ids)[:, P - 1 : -1]).flatten(0, 1)
        return F.cross_entropy(logits, ids[:, P:].flatten(), reduction="sum")

    def scores(ids):
        return scorer.score(trunk(scorer, ids)[:, -1]).sum()

    def forward(function):
        with torch.no_grad():
            for ids in micro_batches:
                function(ids)

    def train(function):
        for ids in micro_batches:
            function(ids).backward()

    @torch.no_grad()
    def sample():
        cache = DynamicCache(config=model.config)
        head(model.base_model(ids[:B, :P], past_key_values=cache).last_hidden_state[:, -1])
        rows = 2 * B if task in ONLINE else B
        cache.batch_repeat_interleave(rows // B)
        for t in range(round(sampled) - 1):
            output = model.base_model(ids[:rows, t : t + 1], past_key_values=cache)
            head(output.last_hidden_state[:, -1])

    parts = [partial(train, scores if task == "reward_model" else logps)]
    if task in (*ONLINE, "mpo"):
        parts.append(sample)
    if task in (*ONLINE, *PAIRS):
        parts.append(partial(forward, logps))  # of the reference
    if task in ONLINE:
        parts.append(partial(forward, scores))
    if task == "ppo":  # values
        parts += [partial(forward, scores), partial(train, scores)]
    clocks = []
    for part in parts:
        trials = []
        for _ in range(5):
            model.zero_grad()
            scorer.zero_grad()
            clock = Clock()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                clock.tick()
                part()
                clock.tick()
            trials.append(clock.result())
        clocks.append({key: min(trial[key] for trial in trials) for key in ("wall", "cpu")})
    total = {key: sum(part[key] for part in clocks) for key in ("wall", "cpu")}
    return total | {"once": 0.0, "peak_gib": clock.peak}


WORKERS = {"ours": run_ours, "trl": run_trl, "floor": run_floor}


# ------------------------------------------------------------------------------------- the results
def compare(args):
    """{task: {"ours" | "trl" | "floor": [result of each repeat]}}; prints the table."""
    if args.prompts % args.micro_batch_size or args.prompts % (args.trl_batch_size or 1):
        raise SystemExit("--prompts must be a multiple of --micro-batch-size and --trl-batch-size")
    sides = [side for side in WORKERS if side != "trl" or importlib.util.find_spec("trl")]
    results = {task: {side: [] for side in sides} for task in args.tasks}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [str(path) for path in make_models(folder, args)]
        write_rows(folder, paths[0], args)
        turns = [(task, side) for task in args.tasks for _ in range(args.repeats) for side in sides]
        for number, (task, side) in enumerate(tqdm(turns, desc=args.model)):
            spec = {"task": task, "side": side, "paths": paths, "folder": name}
            command = [sys.executable, __file__, "--worker", json.dumps(spec | asdict(args))]
            env = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_CACHE": f"{name}/cache-{number}",  # TRL keeps log π_ref there
                "TOKENIZERS_PARALLELISM": "false",
            }
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
            if done.returncode:
                said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
                raise SystemExit(f"{task}, {side} failed:\n{said}")
            result = json.loads(done.stdout.splitlines()[-1])
            if side == "ours":
                (folder / "sampled").write_text(str(result["sampled"]))
            results[task][side].append(result)
    policy = os.environ.get("OMP_WAIT_POLICY")
    print(f"\n{args.model}, {args.prompts} prompts, {args.dtype}, OMP_WAIT_POLICY={policy}\n")
    print("| | ours, s | of it once | TRL, s | TRL / ours | floor, s | ours / floor ", end="")
    print("| CPU s, ours / TRL | peak GiB, ours / TRL |\n" + "|---" * 9 + "|")
    for task, runs in results.items():
        print(table_row(task, runs))
    return results


def table_row(task, runs):
    """A row of the table, in Markdown."""

    def shown(values):
        return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"

    def ratio(side, other):
        return shown([x["wall"] / y["wall"] for x, y in zip(runs[side], runs[other])])

    def middle(key):
        found = [statistics.median(run[key] for run in runs[side]) for side in ("ours", "trl")]
        return " / ".join(f"{value:.3g}" for value in found)

    runs = {"trl": [dict.fromkeys(("wall", "cpu", "peak_gib"), float("nan"))], **runs}
    once = statistics.median(run["once"] for run in runs["ours"])
    cells = [
        f"`{task}.py`, {TRAINERS.get(task, 'RLOOTrainer')}",
        shown([run["wall"] for run in runs["ours"]]),
        f"{once:.3g}" if once else "–",
        shown([run["wall"] for run in runs["trl"]]),
        ratio("trl", "ours"),
        shown([run["wall"] for run in runs["floor"]]),
        ratio("ours", "floor"),
        middle("cpu"),
        middle("peak_gib"),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if args.worker:
        spec = json.loads(args.worker)
        task, side, paths, folder = (spec.pop(key) for key in ("task", "side", "paths", "folder"))
        print(json.dumps(WORKERS[side](task, Args(**spec), *paths, Path(folder))))
    elif args.gpu:
        import gpu

        gpu.main(args, compare)
    else:
        results = compare(args)
        if args.output:
            content = {"args": asdict(args), "results": results}
            Path(args.output).write_text(json.dumps(content, indent=1))
