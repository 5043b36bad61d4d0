"""Run the study, or benchmark an algorithm of your own.

    python study/run.py --list                     parts of the study, and what is missing
    python study/run.py                            make the runs that are missing
    python study/run.py --parts search budget      only of these parts
    python study/run.py --script my_algorithm.py   search, three seeds, a row and a figure

Each run is a script with flags on one core. What the figures need of it is stored as soon as it
ends, so the study can be stopped at any time and goes on with the same command. Results of parts go
to study/results, those of your own script to runs/study/NAME. settings.py says what is run.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import figures
import models
import settings
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
POINT = "kl kl_se kl_k1 reward reward_se gold gold_se length eos_rate win_rate_vs_sft".split()
METRICS = (
    "policy/clipfrac policy/ratio_max grad_norm objective/beta_raw rewards/accuracies "
    "policy/pair_weight_mean policy/pair_weight_std time/update"
).split()


class UserError(Exception):
    """A mistake in the arguments, reported in one sentence without a traceback."""


@dataclass
class Args:
    script: str = ""  # FILE.py of your own, to be compared with the stored results
    parts: tuple[str, ...] = ()  # parts to run, in this order (empty: all)
    list: bool = False  # only list the parts and how many of their runs are stored
    workers: int = 2  # runs at a time, one core each
    output_dir: str = "runs/study"  # for runs, and for the results of --script


# ------------------------------------------------------------------------------------------ runs
def start(flags, folder):
    """Start a script with these flags on one core. Returns the process; its output is in a .log."""
    name = flags["script"]
    file = ROOT / f"{name}.py" if name.isidentifier() else Path(name)
    command = [sys.executable, str(file), f"--output-dir={folder}", "--overwrite"]
    for key, value in flags.items():
        if key not in ("script", "crc"):
            command.append(f"--{key.replace('_', '-')}={value}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "w") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )


def last_line(folder):
    """The last line that a run has printed, which names the error of one that failed."""
    lines = Path(f"{folder}.log").read_text().strip().splitlines()
    return f"{lines[-1] if lines else ''}\n    the whole output: {folder}.log"


def problem(folder, code):
    """Why a run that ended cannot be stored, or None if it can."""
    if code:
        return last_line(folder)
    points = read_lines(folder / "frontier.jsonl")
    if not points:
        return f"no evaluation in {folder}/frontier.jsonl"
    for key in ("kl", "reward", "gold"):
        if not math.isfinite(points[-1].get(key, math.nan)):
            return f"no finite {key} in the last line of {folder}/frontier.jsonl"
    return None


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def chosen(row, keys):
    return {key: short(row[key]) for key in ("step", *keys) if key in row}


def outcome(flags, folder, seconds):
    """What is stored of a run: its frontier, and its metrics at the evaluations."""
    frontier = [chosen(row, POINT) for row in read_lines(folder / "frontier.jsonl")]
    steps = {1} | {point["step"] for point in frontier}
    metrics = [chosen(row, METRICS) for row in read_lines(folder / "metrics.jsonl")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "commit": commit,
        "settings": flags,
        "seconds": round(seconds, 1),
        "frontier": frontier,
        "metrics": [row for row in metrics if row["step"] in steps],
    }


def run_all(jobs, workers):
    """Run jobs, (flags, folder), a few at a time, with a bar of their updates.

    Yields flags, folder, seconds and the exit code of each as it ends.
    """
    waiting, running, done = list(jobs), [], 0
    try:
        with tqdm(total=len(waiting), unit="run", smoothing=0, disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < workers:
                    flags, folder = waiting.pop(0)
                    running.append((start(flags, folder), flags, folder, time.perf_counter()))
                time.sleep(0.2)
                for job in list(running):
                    process, flags, folder, began = job
                    if process.poll() is not None:
                        running.remove(job)
                        done += 1
                        bar.update(done - bar.n)
                        yield flags, folder, time.perf_counter() - began, process.returncode
                shares = [share_done(folder) for _, _, folder, _ in running]
                bar.n = done + round(sum(shares), 2)
                bar.refresh()
    finally:  # nothing goes on behind an error
        for process, *_ in running:
            process.terminate()


def share_done(folder):
    """The part of its updates that a run has made."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return 0
    total = json.loads((folder / "args.json").read_text()).get("num_updates")
    # Offline scripts go through all pairs by default: 375 updates on tiny
    return min(1, file.read_text().count("\n") / (total or 375))


def write(file, text):
    """Write a file whole or not at all."""
    part = file.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text)
    part.rename(file)


def make(runs, file, folder, workers):
    """Make those of the runs that are not stored in the file yet, and store them there.

    Returns what is stored of them, and the settings of those that failed. Stored runs that are not
    among these are dropped from the file.
    """
    stored = json.loads(file.read_text()) if file.exists() else []
    stored = [row for row in stored if row["settings"] in runs]
    known = [row["settings"] for row in stored]
    missing = [flags for flags in runs if flags not in known]
    jobs = [(flags, folder / f"{file.stem}_{i}") for i, flags in enumerate(missing)]
    if stored:
        print(f"{len(stored)} of {len(runs)} runs are stored", flush=True)
    failed = []
    for flags, place, seconds, code in run_all(jobs, workers):
        words = [f"{key}={value}" for key, value in flags.items() if key not in ("script", "crc")]
        label = " ".join([Path(flags["script"]).stem, *words])
        if found := problem(place, code):
            tqdm.write(f"failed: {label}\n    {found}")
            failed.append(flags)
            continue
        stored.append(outcome(flags, place, seconds))
        rows = ",\n".join(map(json.dumps, stored))
        write(file, f"[\n{rows}\n]\n")
        end = stored[-1]["frontier"][-1]
        values = ", ".join(f"{key} {end[key]:.2f}" for key in ("kl", "reward", "gold"))
        tqdm.write(f"{label}: {values}, {seconds:.0f} s")
        shutil.rmtree(place)
        Path(f"{place}.log").unlink()
    return stored, failed


# ----------------------------------------------------------------------------------------- parts
def list_parts():
    """Print the parts, how many of their runs are stored, and what these took."""
    for name, part in settings.PARTS.items():
        known = [row["settings"] for row in figures.stored(name)]
        runs = part()
        found = sum(flags in known for flags in runs)
        seconds = sum(row["seconds"] for row in figures.stored(name))
        state = "complete" if found == len(runs) else f"{len(runs) - found} missing"
        hours = f"{seconds / 3600:.1f} h of a core"
        print(f"{name:12} {found:3} of {len(runs):3} runs, {hours}, {state}: {part.__doc__}")


def run_parts(args):
    """Make what is missing of the parts. Raises UserError if runs failed."""
    failures = 0
    for name in args.parts or settings.PARTS:
        runs = settings.PARTS[name]()
        trained = models.prepare(runs)
        jobs = [(flags, folder) for folder, flags in trained.items()]
        for flags, folder, _, code in run_all(jobs, args.workers):
            if code:
                raise UserError(f"{flags['script']}.py failed: see {folder}.log")
        _, failed = make(
            runs, figures.RESULTS / f"{name}.json", ROOT / args.output_dir, args.workers
        )
        failures += len(failed)
        models.store_facts(runs, figures.RESULTS / "made.json")
    if failures:
        raise UserError(f"{failures} runs failed; run the same command to make them again")


# ------------------------------------------------------------------------------ your own algorithm
def own_values(script, folder):
    """Learning rate, name and value of β or τ (None if neither), budget's flags, by a short run."""
    jobs = [({"script": script, "num_updates": 1, "eval_prompts": 4}, folder / "first")]
    for _, place, _, code in run_all(jobs, 1):
        if found := problem(place, code):
            raise UserError(f"{Path(script).name} failed: {found}")
    file = folder / "first/args.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    if "learning_rate" not in record:
        raise UserError(f"{script} wrote no learning_rate to {file}")
    offline = "prompts_per_update" not in record
    name = next((key for key in ("beta", "tau") if key in record), None)
    flags = settings.OFFLINE_FLAGS if offline else settings.ONLINE_FLAGS
    return record["learning_rate"], name, record.get(name), flags


def benchmark(args):
    """Search learning rate and β of a script, run three fresh seeds, print and draw the result."""
    script = Path(args.script).resolve()
    if not script.is_file():
        raise UserError(f"--script {args.script}: no such file")
    folder = ROOT / args.output_dir / script.stem
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / script.name  # so that it can be edited meanwhile
    copy.write_bytes(script.read_bytes())
    if not (folder / "tiny").exists():  # scripts look for it beside them
        (folder / "tiny").symlink_to(ROOT / "tiny")
    crc = zlib.crc32(copy.read_bytes())  # an edited script starts over
    print(f"check: one update of {script.name}", flush=True)
    rate, name, strength, flags = own_values(str(copy), folder)
    common = {"script": str(copy), "crc": crc, **flags}

    def run(rate, strength, seed):
        values = {name: strength} if name else {}
        return {**common, "learning_rate": rate, **values, "seed": seed}

    pairs = settings.around(rate, strength)
    print(f"search: {len(pairs)} settings of {script.name} on one seed", flush=True)
    runs = [run(*pair, settings.SEARCH_SEED) for pair in pairs]
    stored, _ = make(runs, folder / "search.json", folder, args.workers)
    if not stored:
        raise UserError(f"all runs of {script.name} failed")
    best = max(stored, key=figures.mean_share)["settings"]
    pair = best["learning_rate"], best.get(name)
    seeds = settings.SEEDS[:3]
    text = f"learning rate {pair[0]:g}" + (f", {name} {pair[1]:g}" if name else "")
    print(f"{text}: {len(seeds)} fresh seeds", flush=True)
    runs = [run(*pair, seed) for seed in seeds]
    stored, failed = make(runs, folder / "seeds.json", folder, args.workers)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed; run the same command to make them again"
        )
    curves = figures.by_script(figures.stored("budget"))
    label = f"{script.stem} (yours)" if script.stem in curves else script.stem
    curves[label] = stored
    figures.print_rows(curves)
    file = folder / "frontier.png"
    figures.draw_frontier(curves, file, title=f"{script.name} among the scripts of this repository")
    print(f"figure: {file}")


def main(args):
    unknown = [name for name in args.parts if name not in settings.PARTS]
    if unknown:
        raise UserError(f"--parts {unknown[0]}: one of {', '.join(settings.PARTS)}")
    if args.list:
        list_parts()
    elif args.script:
        benchmark(args)
    else:
        run_parts(args)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command to continue", file=sys.stderr)
        sys.exit(130)
