"""The study: every algorithm on the embedded world with the same prompts, samples and grid, over several seeds.

    python benchmark/study.py                       all parts that are not stored yet, two runs at a time
    python benchmark/study.py --parts grid seeds    these alone
    python benchmark/study.py --list                what there is, how many runs of it are stored

A run is a script with flags, on one core. What is kept of it (its frontier, a few metrics) goes to
benchmark/results/PART.json as soon as it ends, and a run that is stored there is not made again: the study can stop
at any moment. The data and models that runs need are made before them (benchmark/study_data.py). What the study shows
is drawn and written into docs/results.md by benchmark/study_figures.py.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import accelerate  # noqa: F401  imported once, before a run forks: seconds less for each
import datasets  # noqa: F401
import study_data
import torch.utils.tensorboard
import transformers.cache_utils  # noqa: F401
import tyro
from study_figures import KLS, RESULTS, ROOT, path_value, stored

# One budget for all: 320 optimizer steps of 16 pairs. Online 20 updates of 64 prompts x 2 samples, 4 epochs (2,560
# samples); offline 5,120 labelled pairs, once. Evaluated five times and before, on the first 256 held-out prompts.
ONLINE = {"num_updates": 20, "eval_every": 4, "save_every": 0}
ONLINE |= {"num_responses": 2, "prompts_per_update": 64, "minibatch_size": 16}
OFFLINE = {
    "num_updates": 320,
    "minibatch_size": 16,
    "eval_every": 64,
    "save_every": 0,
    "lr_schedule": "constant",
}
SCRIPTS = {"p3o_v1": ONLINE, "p3o_v2": ONLINE, "ppo": ONLINE, "online_dpo": ONLINE}
SCRIPTS |= {"dpo": OFFLINE, "ipo": OFFLINE, "mpo": OFFLINE}
LEARNING_RATES, BETAS = (
    (1e-4, 2e-4, 4e-4),
    (0.05, 0.2, 0.8),
)  # the grid; ipo.py's τ takes the place of β
SEEDS = (2, 3, 4, 5, 6)
LONG = {"num_updates": 60, "eval_every": 4}
SIZES = {2: {}}  # of K responses, with as many samples an update and an optimizer step
SIZES |= {
    k: {"num_responses": k, "prompts_per_update": 128 // k, "minibatch_size": 32 // k}
    for k in (4, 8)
}
KEPT = (
    "kl",
    "kl_se",
    "kl_k1",
    "reward",
    "reward_se",
    "gold",
    "gold_se",
    "length",
    "eos_rate",
    "win_rate_vs_sft",
)
METRICS = (
    "policy/pair_weight_mean",
    "policy/pair_weight_std",
    "policy/clipfrac",
    "policy/ratio_max",
    "grad_norm",
)
METRICS += ("objective/beta_raw", "rewards/accuracies", "time/update")


def settings(script, learning_rate, beta, seed, **flags):
    """A run: the script and its flags, by name."""
    strength = {"tau" if script == "ipo" else "beta": beta}
    return {
        "script": script,
        **SCRIPTS[script],
        "learning_rate": learning_rate,
        **strength,
        **flags,
        "seed": seed,
    }


def best(script, count=1):
    """The settings (learning rate, β) of a script that were best on the grid's one seed: by the mean of the rewards
    at KL 1, 2 and 4."""
    runs = [run for run in stored("grid") if run["settings"]["script"] == script]
    if len(runs) < len(LEARNING_RATES) * len(BETAS):
        raise SystemExit(
            f"study.py: this part needs the grid, which has {len(runs)} of its runs of {script}.py"
        )
    runs.sort(key=lambda run: -sum(path_value(run["frontier"], kl) for kl in KLS))
    name = "tau" if script == "ipo" else "beta"
    return [(run["settings"]["learning_rate"], run["settings"][name]) for run in runs[:count]]


# ------------------------------------------------------------------------------------------------------------ the parts
def grid():
    """(a) to (c): learning rate and β of each algorithm, one seed."""
    return [
        settings(script, *pair, 1) for script in SCRIPTS for pair in product(LEARNING_RATES, BETAS)
    ]


def seeds():
    """(a) to (c), (h): the best two settings of each, five fresh seeds, evaluated twice as often."""
    often = {script: {"eval_every": flags["eval_every"] // 2} for script, flags in SCRIPTS.items()}
    chosen = [(script, pair) for script in SCRIPTS for pair in best(script, 2)]
    return [
        settings(script, *pair, seed, **often[script]) for seed in SEEDS for script, pair in chosen
    ]


def translation():
    """(d): a number of its own added to all rewards of a prompt, δ(x) ~ N(0, s²), s = 1, 10 (0: the seeds)."""
    scripts, often = ("p3o_v1", "p3o_v2", "online_dpo", "ppo"), {"eval_every": 10}
    reward = "benchmark/study_rewards.py:shift_{}"
    return [
        settings(script, *best(script)[0], seed, reward_fn=reward.format(s), **often)
        for s, seed, script in product((10, 1), SEEDS, scripts)
    ]


def clipping():
    """(e): ε of the two ways to clip, at two learning rates."""
    runs = product(SEEDS[:2], (0.0, 0.1, 0.2, 0.5), (2e-4, 4e-4), ("p3o_v1", "p3o_v2"))
    return [
        settings(script, lr, best("p3o_v2")[0][1], seed, clip_range=clip)
        for seed, clip, lr, script in runs
    ]


def responses():
    """(f): K responses to a prompt, 126 to 128 samples an update and 30 to 32 an optimizer step whatever K."""
    sizes = {2: (64, 16), 3: (42, 14), 4: (32, 8), 8: (16, 4)}
    return [
        settings(
            "p3o_v2",
            *best("p3o_v2")[0],
            seed,
            num_responses=k,
            prompts_per_update=b,
            minibatch_size=m,
        )
        for seed in SEEDS
        for k, (b, m) in sizes.items()
    ]


def search():
    """At the default budget, 60 updates and 7,680 samples: settings tried on one seed, (learning rate, β, K)."""
    tried = {
        "p3o_v2": [
            (2e-4, 0.2, 4),
            (1e-4, 0.2, 4),
            (2e-4, 0.4, 4),
            (1e-4, 0.1, 4),
            (1e-4, 0.3, 4),
            (1e-4, 0.2, 2),
            (2e-4, 0.2, 8),
        ],
        "p3o_v1": [(1e-4, 0.2, 4)],
        "ppo": [(2e-4, 0.2, 2), (1e-4, 0.05, 2), (2e-4, 0.2, 4), (4e-4, 0.2, 2), (2e-4, 0.4, 2)],
        "online_dpo": [
            (1e-4, 0.8, 2),
            (1e-4, 0.2, 2),
            (1e-4, 0.4, 2),
            (1e-4, 0.4, 4),
            (2e-4, 0.4, 2),
        ],
    }
    runs = [
        settings(script, lr, beta, 1, **LONG, **SIZES[k])
        for script in tried
        for lr, beta, k in tried[script]
    ]
    more = {"num_epochs": 2}, {"minibatch_size": 16}
    return runs + [
        settings("p3o_v2", 2e-4, 0.2, 1, **{**LONG, **SIZES[4], **flags}) for flags in more
    ]


def tails():
    """Where P3O-V2's path loses at KL 2: a larger step, a wider clip range or none, two seeds, until 36 updates."""
    flags = LONG | {"num_updates": 36, "clip_range": 0.2} | SIZES[4]
    changes = {}, {"learning_rate": 2e-4}, {"clip_range": 0.5}, {"clip_range": 0.0}
    return [
        settings("p3o_v2", 1e-4, 0.2, seed, **flags) | change
        for seed in SEEDS[:2]
        for change in changes
    ]


def budget():
    """At the default budget with four responses a prompt, the setting of each that was best there, five fresh seeds."""
    chosen = {"p3o_v2": (2e-4, 0.2), "ppo": (2e-4, 0.2), "online_dpo": (1e-4, 0.4)}
    return [
        settings(script, *chosen[script], seed, **LONG, **SIZES[4])
        for seed in range(4, 9)
        for script in chosen
    ]


def labels():
    """(g): four epochs of the same 1,600 pairs offline, labels of the gold reward, all right or 30 % flipped."""
    flags = {"num_updates": 400, "data_epochs": 4, "eval_every": 100}  # 100 updates an epoch
    flags |= {
        "model": "tiny",
        "reward_model": "tiny/reward_model",
        "gold_fn": "tiny/gold.py:gold_reward",
    }
    return [
        settings(
            script, *pair, seed, dataset=f"{study_data.FOLDER}/gold_flipped_{flipped}", **flags
        )
        for seed, script in product(SEEDS[:2], ("dpo", "ipo", "mpo"))
        for pair in (best(script)[0], (2e-4, 0.1))  # the second is a usual one
        for flipped in (
            0,
            30,
        )  # last: runs side by side then have other data, and do not make the same store
    ]


def rewards():
    """(i): reward models of 10, 30 and 100 % of the pairs, and of all with 30 % of the labels flipped."""
    runs = product(SEEDS[:3], study_data.REWARD_MODELS, ("p3o_v2", "ppo", "online_dpo"))
    model = f"{study_data.FOLDER}/{{}}/model"
    return [
        settings(script, *best(script)[0], seed, reward_model=model.format(name))
        for seed, name, script in runs
    ]


def scale():
    """(j): policies of 0.1, 0.5 (the embedded one) and 1.2 M parameters."""
    small, large = (f"{study_data.FOLDER}/{name}/model" for name in study_data.POLICIES)
    flags = {"dataset": "tiny", "reward_model": "tiny/reward_model"}
    runs = product(SEEDS[:2], (small, "tiny/sft", large))
    return [
        settings("p3o_v2", *best("p3o_v2")[0], seed, model=model, **flags) for seed, model in runs
    ]


def limit(samples=2048):
    """The best reward at each KL, by limit.py, and best of n; not runs, but what runs are compared with."""
    folder = ROOT / "runs/limit/tiny/tiny"
    flags = [f"--num-samples={samples}", f"--output-dir={folder}"]
    subprocess.run([sys.executable, "limit.py", *flags], cwd=ROOT, check=True)
    found = json.loads((folder / "limit.json").read_text())
    kept = {
        key: short(found[key]) for key in ("num_samples", "num_prompts", "ref_reward", "ref_gold")
    }
    for name in ("curve", "best_of_n"):
        rows = [{key: short(value) for key, value in row.items()} for row in found[name]]
        kept[name] = [row for row in rows if 0.001 < row["kl"] < 8]
    write("limit", json.dumps(kept))


PARTS = (
    grid,
    seeds,
    translation,
    clipping,
    responses,
    search,
    tails,
    budget,
    labels,
    rewards,
    scale,
)
PARTS = {part.__name__: part for part in PARTS}


# ----------------------------------------------------------------------------------------------------------- the runner
def run(flags, folder):
    """In a process of its own: the script with these flags, its output in folder.log."""
    arguments = [
        f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if name != "script"
    ]
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [f"{flags['script']}.py", *arguments, "--overwrite", f"--output-dir={folder}"]
    runpy.run_path(f"{flags['script']}.py", run_name="__main__")


def short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def record(flags, folder, seconds):
    """What is kept of a run."""
    frontier, metrics = (
        [json.loads(line) for line in (folder / file).read_text().splitlines()]
        for file in ("frontier.jsonl", "metrics.jsonl")
    )
    points = [
        {key: short(point[key]) for key in ("step", *KEPT) if key in point} for point in frontier
    ]
    steps = [point["step"] for point in frontier[1:]]
    values = [{key: short(row[key]) for key in ("step", *METRICS) if key in row} for row in metrics]
    values = [row for row in values if row["step"] in steps or row["step"] == 1]
    return {"settings": flags, "seconds": round(seconds, 1), "frontier": points, "metrics": values}


def each_ended(jobs, workers):
    """Runs the jobs, (flags, folder), so many at a time; yields flags, folder and seconds of each that ends well."""
    context, running = multiprocessing.get_context("fork"), []
    while jobs or running:
        while jobs and len(running) < workers:
            flags, folder = jobs.pop(0)
            folder.parent.mkdir(parents=True, exist_ok=True)
            process = context.Process(target=run, args=(flags, folder))
            process.start()
            running.append((process, flags, folder, time.perf_counter()))
        time.sleep(0.1)
        for job in [job for job in running if not job[0].is_alive()]:
            running.remove(job)
            process, flags, folder, start = job
            if process.exitcode:
                print(f"failed with {process.exitcode}: {flags}; see {folder}.log", flush=True)
            else:
                Path(f"{folder}.log").unlink()
                yield flags, folder, time.perf_counter() - start


def write(name, text):
    """RESULTS/name.json, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.part").write_text(text + "\n")
    (RESULTS / f"{name}.part").rename(RESULTS / f"{name}.json")


def make(runs, workers):
    """The data and models that these runs need and that are not there yet; what is known of the models is stored."""
    jobs = [(flags, folder) for folder, flags in study_data.prepare(runs).items()]
    wanted, ended = len(jobs), 0
    for flags, folder, seconds in each_ended(jobs, workers):
        ended += 1
        print(f"made {folder.name} with {flags['script']}.py in {seconds:.0f} s", flush=True)
    if ended < wanted:
        raise SystemExit(
            f"study.py: {wanted - ended} models were not made; the same command makes them again"
        )
    models = {str(flags.get(key)) for flags in runs for key in ("model", "reward_model")}
    if models := sorted(model for model in models if "/" in model):
        known = {
            x: {key: short(value) for key, value in study_data.facts(x).items()} for x in models
        }
        write("made", json.dumps(dict(stored("made") or {}) | known, indent=1))


@dataclass
class Args:
    parts: tuple[str, ...] = ("limit", *PARTS)  # which parts, in this order
    workers: int = 2  # runs at a time, one core each
    folder: str = "runs/study"  # of the runs themselves, removed as they are recorded
    list: bool = False  # only say what there is


def main(args):
    torch.set_num_threads(1)  # a process with threads can't be forked safely
    for part in args.parts:
        if part == "limit":
            if not args.list and not stored(part):
                limit()
            continue
        done = stored(part)
        if args.list:
            print(
                f"{part:12} {len(done):4} stored, {sum(run['seconds'] for run in done):6.0f} s: {PARTS[part].__doc__}"
            )
            continue
        known = [run["settings"] for run in done]
        waiting = [flags for flags in PARTS[part]() if flags not in known]
        print(f"{part}: {len(waiting)} runs to make, {len(done)} stored", flush=True)
        make(waiting, args.workers)
        jobs = [
            (flags, (ROOT / args.folder / f"{part}_{i}").absolute())
            for i, flags in enumerate(waiting)
        ]
        wanted = len(done) + len(jobs)
        for flags, folder, seconds in each_ended(jobs, args.workers):
            done.append(record(flags, folder, seconds))
            rows = ",\n".join(json.dumps(run) for run in done)
            write(part, f"[\n{rows}\n]")
            end = done[-1]["frontier"][-1]
            print(
                f"{len(done):4} {flags['script']:10} {done[-1]['seconds']:5.0f} s  KL {end['kl']:6.2f}",
                end="",
            )
            print(
                f"  reward {end['reward']:5.2f}  gold {end['gold']:5.2f}  {len(jobs)} wait",
                flush=True,
            )
            shutil.rmtree(folder)
        if failed := wanted - len(done):
            raise SystemExit(
                f"study.py: {failed} runs of {part} failed; the same command makes them again"
            )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
