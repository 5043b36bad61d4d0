"""Kill a script again and again, resume it each time, and compare its end with that of a run that nothing disturbed.

    python benchmark/kill.py                     p3o_v2.py, 20 kills
    python benchmark/kill.py --script all        sft.py and reward_model.py too, 5 kills each

Every kill is SIGKILL from outside: the odd ones at a moment drawn from the length of an update, the even ones while a
checkpoint is being written, as seen by its unfinished file. The run is on rows of the embedded world, with a
checkpoint after every update, and long enough to be unfinished at every kill. Printed for each kill: how far the run
was and whether it was inside a save, judged by what the kill left behind. At the end weights, logs (apart from times)
and TensorBoard's scalars must be equal, bit by bit; exit code 1 if they are not.
"""

import json
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
TIMES = ("time/", "samples_per_second", "tokens_per_second")
KILLS = {"p3o_v2": 20, "sft": 5, "reward_model": 5}
FLAGS = {
    "p3o_v2": "--prompts-per-update 8 --minibatch-size 4 --num-epochs 2".split(),
    "sft": "--minibatch-size 8 --data-epochs 1000".split(),
    "reward_model": "--minibatch-size 8 --data-epochs 1000".split(),
}
COMMON = "--output-dir run --dataset rows.jsonl --max-response-tokens 32 --eval-every 10 --eval-prompts 8".split()
MARGIN = 6  # updates that the run may make between two kills, at most: 2 or 3 seen by us, and what we are late


@dataclass
class Args:
    script: Literal["p3o_v2", "sft", "reward_model", "all"] = "p3o_v2"  # what to kill
    kills: int = 0  # of every script (0: 20 of p3o_v2, 5 of the others)
    seed: int = 0  # of the moments


def start(script, updates, folder, *more):
    command = [
        sys.executable,
        ROOT / f"{script}.py",
        *COMMON,
        *FLAGS[script],
        "--num-updates",
        str(updates),
        *more,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(folder / "output.txt", "a") as output:
        options = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": folder, "env": environment}
        return subprocess.Popen(command + ["--save-every", "1"], **options)


def updates_logged(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(condition, process):
    """True once it holds; False where the process ends before."""
    while not (found := condition()) and process.poll() is None:
        time.sleep(0.001)
    return bool(found)


def kill_once(script, updates, folder, draw, in_save):
    """Start or resume the run and kill it after some updates; what was found, or None if the run had ended."""
    run = folder / "run"
    record = run / "args.json"
    before = record.stat().st_mtime_ns if record.exists() else 0
    process = start(script, updates, folder, "--resume")
    wait_until(
        lambda: record.exists() and record.stat().st_mtime_ns != before, process
    )  # the run is opened
    first, rows = updates_logged(run), draw.choice((2, 3))
    wait_until(lambda: updates_logged(run) > first, process)
    began = time.monotonic()
    wait_until(lambda: updates_logged(run) >= first + rows, process)
    if in_save:
        wait_until(lambda: list(run.glob("checkpoint-*.part")), process)
        time.sleep(draw.uniform(0, 0.01))
    else:
        time.sleep(draw.uniform(0, (time.monotonic() - began) / (rows - 1)))
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
    return bool(parts) or len(whole) > 1, f"{at}, {where}"


def rows(file):
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)} for row in found
    ]


def ending(run):
    """{what: value} of all that must be equal."""
    found = {"weights": (run / "model/model.safetensors").read_bytes()}
    found |= {file.name: rows(file) for file in sorted(run.glob("*.jsonl"))}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(TIMES)]
    scalars = {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag)) for tag in tags
    }
    return found | {"TensorBoard": scalars}


def torture(script, kills, seed, folder):
    """Kill, resume, compare; whether all was as it should be."""
    draw, updates, inside, began = (
        random.Random(f"{script} {seed}"),
        MARGIN * (kills + 1),
        0,
        time.monotonic(),
    )
    for name in ("undisturbed", "killed"):
        (folder / name).mkdir(parents=True)
        with open(ROOT / "tiny/data/train.jsonl") as lines:
            (folder / name / "rows.jsonl").write_text(
                "".join(line for line, _ in zip(lines, range(100)))
            )
    print(f"{script}: {updates} updates, a checkpoint after each, {kills} kills", flush=True)
    if start(script, updates, folder / "undisturbed").wait():
        sys.exit((folder / "undisturbed/output.txt").read_text())
    for number in range(1, kills + 1):
        found = kill_once(script, updates, folder / "killed", draw, in_save=number % 2 == 0)
        if found is None:
            print(f"kill {number:2}: the run had ended")
            print((folder / "killed/output.txt").read_text()[-2000:])
            return False
        inside += found[0]
        print(f"kill {number:2}: {found[1]}", flush=True)
    if start(script, updates, folder / "killed", "--resume").wait():
        print((folder / "killed/output.txt").read_text()[-2000:])
        return False
    expected, got = (ending(folder / name / "run") for name in ("undisturbed", "killed"))
    equal = {key: expected.get(key) == got.get(key) for key in expected | got}
    said = ", ".join(f"{key} {'equal' if same else 'DIFFERENT'}" for key, same in equal.items())
    print(
        f"{script}: {kills} kills, {inside} of them inside a save: {said} ({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    if inside < kills / 4:
        print("warning: fewer than a quarter of the kills were inside a save; try another --seed")
    return all(equal.values())


def main(args):
    folder, good = Path(tempfile.mkdtemp()), []
    for script in KILLS if args.script == "all" else [args.script]:
        good.append(torture(script, args.kills or KILLS[script], args.seed, folder / script))
    if all(good):
        shutil.rmtree(folder)
    else:
        print(f"the runs are kept in {folder}")
    return all(good)


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Args, description=__doc__)))
