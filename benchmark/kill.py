"""Kill a script again and again, resume it each time, and compare its end with a run left alone.

    python benchmark/kill.py                     p3o_v2.py, 20 kills
    python benchmark/kill.py --script all        all training scripts, the others 5 kills each

Every kill is SIGKILL from outside: the odd ones at a moment drawn from the length of an update, the
even ones while a checkpoint is being written, as seen by its unfinished file. The run is on rows of
the built-in world, with a checkpoint after every update, and long enough to be unfinished at every
kill. Printed for each kill: how far the run was and whether it was inside a save, judged by what
the kill left behind. At the end weights, logs (apart from times) and TensorBoard's scalars must be
equal, bit by bit; exit code 1 if they are not.
"""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
ONLINE = ("p3o_v2", "p3o_v1", "rloo", "grpo", "ppo", "online_dpo")
SCRIPTS = (*ONLINE, "dpo", "ipo", "mpo", "sft", "reward_model")
COMMON = "--output-dir run --dataset rows.jsonl --save-every 1 --eval-every 10 --eval-prompts 8"
COMMON += " --max-response-tokens 32"
# Updates between two kills, at most: 2 or 3 that are waited for, and those that we are late.
MARGIN = 6


@dataclass
class Args:
    script: Literal[(*SCRIPTS, "all")] = "p3o_v2"  # what to kill
    kills: int = 0  # of every script (0: 20 of p3o_v2, 5 of the others)
    seed: int = 0  # of the moments


def start(script, updates, folder, *more):
    """The script as a process in a folder, which has run/ and what it says in output.txt."""
    sizes = "--minibatch-size 8"
    if script in ONLINE:
        sizes = "--prompts-per-update 8 --minibatch-size 4 --num-epochs 2"
    command = [sys.executable, ROOT / f"{script}.py", *COMMON.split(), *sizes.split(), *more]
    command += ["--num-updates", str(updates)]
    cache = folder.parent / "cache"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=env
        )


def updates_logged(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(condition, process):
    """Returns once the condition holds or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.001)


def kill_once(script, updates, folder, draw, in_save):
    """Start or resume the run and kill it after some updates.

    Returns whether that was inside a save, and a sentence; None if the run had ended before.
    """
    run = folder / "run"
    before = sorted(run.glob("events.*"))
    process = start(script, updates, folder, "--resume")
    # Until the run is opened, its logs are those of the run before
    wait_until(lambda: sorted(run.glob("events.*")) != before, process)
    first, more = updates_logged(run), draw.choice((2, 3))
    wait_until(lambda: updates_logged(run) > first, process)
    began = time.monotonic()
    wait_until(lambda: updates_logged(run) >= first + more, process)
    if in_save:
        wait_until(lambda: list(run.glob("checkpoint-*.part")), process)
        time.sleep(draw.uniform(0, 0.01))
    else:
        time.sleep(draw.uniform(0, (time.monotonic() - began) / (more - 1)))
    process.kill()
    if process.wait() >= 0:
        return None
    parts = sorted(run.glob("checkpoint-*.part"))
    whole = sorted(path.name for path in run.glob("checkpoint-*.pt"))
    where = "outside of saves"
    if parts:
        where = f"inside a save: {parts[-1].name} had {parts[-1].stat().st_size:,} bytes"
    elif len(whole) > 1:
        where = f"inside a save: {whole[-1]} was in place, {', '.join(whole[:-1])} not removed"
    at = f"resumed after {first:3} updates, killed after {updates_logged(run):3}"
    return where != "outside of saves", f"{at}, {where}"


def ending(run):
    """{what: value} of all that must be equal."""
    found = {"weights": (run / "model/model.safetensors").read_bytes()}
    for file in sorted(run.glob("*.jsonl")):
        found[file.name] = rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row.pop("time/update", None)
    logging.getLogger("tensorboard").setLevel("ERROR")  # it reports every resume
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found["TensorBoard"] = scalars = {}
    for tag in set(events.Tags()["scalars"]) - {"time/update"}:
        scalars[tag] = sorted((event.step, event.value) for event in events.Scalars(tag))
    return found


def torture(script, kills, seed, folder):
    """Kill, resume, compare; whether all was as it should be."""
    draw, updates, inside = random.Random(f"{script} {seed}"), MARGIN * (kills + 1), 0
    began = time.monotonic()
    alone, killed = folder / "alone", folder / "killed"
    rows = (ROOT / "tiny/data/train.jsonl").read_text().splitlines(keepends=True)[:100]
    for part in (alone, killed):
        part.mkdir(parents=True)
        (part / "rows.jsonl").write_text("".join(rows))
    print(f"{script}: {updates} updates, a checkpoint after each, {kills} kills", flush=True)
    if start(script, updates, alone).wait():
        sys.exit((alone / "output.txt").read_text())
    for number in range(1, kills + 1):
        found = kill_once(script, updates, killed, draw, in_save=number % 2 == 0)
        if found is None:
            print(f"kill {number:2}: the run had ended")
            print((killed / "output.txt").read_text()[-2000:])
            return False
        inside += found[0]
        print(f"kill {number:2}: {found[1]}", flush=True)
    if start(script, updates, killed, "--resume").wait():
        print((killed / "output.txt").read_text()[-2000:])
        return False
    expected, got = ending(alone / "run"), ending(killed / "run")
    equal = {key: expected.get(key) == got.get(key) for key in expected | got}
    said = ", ".join(f"{key} {'equal' if same else 'DIFFERENT'}" for key, same in equal.items())
    seconds = time.monotonic() - began
    print(f"{script}: {kills} kills, {inside} inside a save: {said} ({seconds:.0f} s)", flush=True)
    if inside < kills / 4:
        print("warning: fewer than a quarter of the kills were inside a save; try another --seed")
    return all(equal.values())


def main(args):
    folder, good = Path(tempfile.mkdtemp()), []
    for script in SCRIPTS if args.script == "all" else [args.script]:
        kills = args.kills or (20 if script == "p3o_v2" else 5)
        good.append(torture(script, kills, args.seed, folder / script))
    if all(good):
        shutil.rmtree(folder)
    else:
        print(f"the runs are kept in {folder}")
    return all(good)


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Args, description=__doc__)))
