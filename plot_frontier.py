"""Plot reward against KL for any runs: a figure, a table and the numbers behind them.

A run is its folder, or the frontier.jsonl in it. Its value at κ is the highest reward that it had
while KL(π ‖ π_ref) ≤ κ, on straight lines between its evaluations, so no curve falls or turns back.

    value(κ) = max { reward of a point on the path : KL of the point ≤ κ }

Runs that differ only in the seed form one curve, their mean. Its band is a 95 % interval: Student's
t over the runs if there are three or more, else over the prompts of an evaluation. --value gold
plots the true reward of the same points. It falls where the policy exploits the reward model.

    python plot_frontier.py runs/p3o_v2/tiny/tiny runs/ppo/tiny/tiny
    python plot_frontier.py runs/*/tiny/tiny/frontier.jsonl --limit runs/limit/tiny/tiny/limit.json

With the limit.json of limit.py, the figure shades the region that no policy can reach, as far as
the limit is trusted. The table says what share of the limit's gain over the reference each curve
has. Beyond that, the limit is dotted and too low, so the true share is at most the one shown (≤).
For gold, limit and best-of-n show the gold of the policies with the highest reward.
"""

import json
import sys
import textwrap
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # folders of runs, or their frontier.jsonl
    limit: str = ""  # limit.json of limit.py (empty: none)
    output: str = "runs/frontier.png"  # .png, .pdf or .svg; the numbers go beside it, as .json
    value: Literal["reward", "gold"] = "reward"  # what to draw; gold is the true reward
    kls: tuple[float, ...] = (1.0, 2.0, 4.0)  # KLs in the table, nats per response
    title: str = ""  # title of the figure (empty: the dataset)


SCRIPT = Path(__file__).stem
STYLES = {  # name, colour and marker of each script, the same in every figure
    "p3o_v2": ("P3O-V2", "#b2182b", "o"),
    "p3o_v1": ("P3O-V1", "#ef8a3c", "s"),
    "ppo": ("PPO", "#2166ac", "D"),
    "rloo": ("RLOO", "#5aa5d6", "^"),
    "grpo": ("GRPO", "#14144f", "v"),
    "online_dpo": ("online DPO", "#1b8a3c", "P"),
    "dpo": ("DPO", "#762a83", "X"),
    "ipo": ("IPO", "#b58fc9", "<"),
    "mpo": ("MPO", "#8c6d31", ">"),
}
LINES = ("-", "--", ":", "-.")  # for the curves of one script
SAME_CURVE = (  # settings in which the runs of a curve may differ
    "seed output_dir resume overwrite save_every eval_every track micro_batch_size "
    "sample_batch_size gradient_checkpointing"
).split()
MUST_AGREE = "dataset reward temperature max_prompt_tokens max_response_tokens".split()
STUDENT = dict(zip(range(3, 11), (4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)))  # 97.5 %


class UserError(Exception):
    """A mistake in the arguments or the data, reported in one sentence without a traceback."""


# ------------------------------------------------------------------------------------------ runs
def read_run(name, value):
    """The settings of a run and the points of its frontier. Raises UserError."""
    folder = Path(name)
    if folder.name == "frontier.jsonl":
        folder = folder.parent
    try:
        record = json.loads((folder / "args.json").read_text())
        lines = (folder / "frontier.jsonl").read_text().splitlines()
        points = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{folder} has a damaged file: {error}") from error
    if not points or any(key not in point for key in ("kl", "reward", value) for point in points):
        raise UserError(f"{folder}/frontier.jsonl has no points with kl, reward and {value}")
    return with_short_names(record), points


def with_short_names(record):
    """The record with only the ends of model paths: the same model may be in another folder."""
    names = {key: "/".join(Path(record.get(key, "")).parts[-2:]) for key in ("policy", "reward")}
    return {**record, **names}


def best_within(points, kappa):
    """The point of the highest reward on the path while its KL ≤ κ; the start always counts."""
    found = [points[0]]
    for a, b in pairwise(points):
        if b["kl"] <= kappa:
            found.append(b)
        if min(a["kl"], b["kl"]) < kappa < max(a["kl"], b["kl"]):
            t = (kappa - a["kl"]) / (b["kl"] - a["kl"])
            found.append({key: a[key] + t * (b[key] - a[key]) for key in a})
    return max(found, key=lambda point: point["reward"])


def value_at(paths, kappa, value):
    """The mean over the runs of a curve at κ, and the ends of its 95 % interval."""
    points = [best_within(points, kappa) for points in paths]
    values = [point[value] for point in points]
    half = 1.96 * np.mean([point.get(f"{value}_se", 0) for point in points])
    if len(paths) > 2:
        half = STUDENT.get(len(paths), 2.23) * np.std(values, ddof=1) / len(paths) ** 0.5
    mean = np.mean(values)
    return {"kl": kappa, value: mean, "low": mean - half, "high": mean + half}


def group_runs(runs):
    """{label: [(record, points)]}: runs with the same settings but for the seed are a curve.

    The label is the script, and those settings in which its curves differ. Raises UserError.
    """
    groups = defaultdict(list)
    for record, points in runs:
        kept = {key: record[key] for key in sorted(record) if key not in SAME_CURVE}
        group = groups[json.dumps(kept)]
        if record["seed"] in [other["seed"] for other, _ in group]:
            raise UserError(f"two runs of {record['script']} have the same settings and seed")
        group.append((record, points))
    curves = {}
    settings = [json.loads(text) for text in groups]
    for kept, group in zip(settings, groups.values()):
        siblings = [other for other in settings if other["script"] == kept["script"]]
        label = STYLES.get(kept["script"], [kept["script"]])[0]
        for key in kept:
            if any(other.get(key) != kept[key] for other in siblings):
                label += f", {key} {kept[key]}"
        curves[label] = group
    return curves


def read_limit(file, value):
    """limit.json, with the reference as the first point of its curve. Raises UserError."""
    try:
        limit = json.loads(Path(file).read_text())
        start = {"kl": 0.0, value: limit[f"ref_{value}"], "trusted": True}
        limit["curve"] = [start, *limit["curve"]]
        return with_short_names(limit)
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} is not a limit.json with {value}: {error!r}") from error


def check_alike(records, keys):
    """Raises UserError unless the settings that rewards depend on are the same in all."""
    for key in keys:
        found = {str(record.get(key)) for record in records}
        if len(found) > 1:
            raise UserError(f"runs cannot be compared: {key} is {' or '.join(sorted(found))}")


# ----------------------------------------------------------------------------------------- figure
def spread(heights, gap):
    """Heights in rising order, moved apart to distances of about `gap`."""
    heights = list(heights)
    for _ in range(200):
        for i in range(1, len(heights)):
            overlap = max(0, gap - (heights[i] - heights[i - 1]))
            heights[i - 1] -= overlap / 2
            heights[i] += overlap / 2
    return heights


def draw_limit(axes, limit, value, largest):
    """Best-of-n, and the limit: a line as far as it is trusted, then dots. Returns their labels."""
    labels = []
    for name, rows, style in (
        ("limit", limit["curve"], ":"),
        ("", [row for row in limit["curve"] if row["trusted"]], "-"),
        ("best of n", limit["best_of_n"], "x:"),
    ):
        rows = [row for row in rows if row["kl"] <= largest]
        kl = [row["kl"] for row in rows]
        heights = [row[value] for row in rows]
        axes.plot(kl, heights, style, color="0.4", markersize=4, linewidth=1.2)
        if name:
            labels.append((kl[-1], heights[-1], name, "0.4", ""))
    return labels


def draw(file, title, value, curves, limit):
    """Save the figure. A thin line leads from the end of each curve to its label on the right."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    largest = max(curve["path"][-1]["kl"] for curve in curves.values()) or 1.0
    labels = draw_limit(axes, limit, value, largest) if limit else []
    seen = Counter()
    for label, curve in curves.items():
        script = curve["script"]
        other = f"C{zlib.crc32(script.encode()) % 10}"  # a script that STYLES does not know
        _, colour, marker = STYLES.get(script, (script, other, "*"))
        line = LINES[seen[script] % len(LINES)]
        seen[script] += 1
        columns = [[point[key] for point in curve["path"]] for key in ("kl", value, "low", "high")]
        kl, heights, low, high = columns
        axes.plot(kl, heights, line, color=colour, marker=marker, markevery=(20, 20), markersize=5)
        axes.fill_between(kl, low, high, color=colour, alpha=0.12, linewidth=0)
        labels.append((kl[-1], heights[-1], label, colour, marker))
    bottom, top = axes.get_ylim()
    if limit and value == "reward":
        rows = [row for row in limit["curve"] if row["trusted"]]
        kl, heights = zip(*[(row["kl"], row["reward"]) for row in rows])
        axes.fill_between(kl, heights, top, color="0.92", linewidth=0)
        axes.text(0.02, 0.96, "no policy can get here", color="0.4", transform=axes.transAxes)
    labels.sort(key=lambda label: label[1])
    places = spread([height for _, height, *_ in labels], (top - bottom) / 24)
    for (kl, height, text, colour, marker), place in zip(labels, places):
        x = [kl, largest, 1.03 * largest]
        y = [height, height, place]
        style = {"marker": marker, "markevery": [2], "markersize": 5, "linewidth": 0.5}
        axes.plot(x, y, color=colour, clip_on=False, **style)
        text = textwrap.shorten(text, 48, placeholder=" …")
        axes.text(1.045 * largest, place, text, color=colour, va="center", fontsize=9)
    axes.set(xlim=(0, largest), ylim=(bottom, top), title=title)
    axes.set_xlabel("κ, largest KL(π ‖ π_ref) allowed, nats per response")
    axes.set_ylabel(f"{value} of the policy with the highest reward")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


# ----------------------------------------------------------------------------------------- main
def print_table(rows):
    """Print rows of texts in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def curve_numbers(group, args):
    """The numbers of a curve: its path, and its value at the KLs of the table."""
    paths = [points for _, points in group]
    ends = [max(point["kl"] for point in points) for points in paths]
    kappas = np.linspace(0, np.mean(ends), 101)
    numbers = {
        "script": group[0][0]["script"],
        "seeds": [record["seed"] for record, _ in group],
        "path": [value_at(paths, kappa, args.value) for kappa in kappas],
        "reward_at": {},
    }
    for kappa in args.kls:
        found = value_at(paths, kappa, args.value)
        numbers["reward_at"][f"{kappa:g}"] = {**found, "reached": bool(min(ends) >= kappa)}
    return numbers


def add_shares(numbers, limit):
    """Add the share of the limit's gain at each KL of the table to the numbers of a curve."""
    kl, rewards = zip(*[(row["kl"], row["reward"]) for row in limit["curve"]])
    trusted = max(row["kl"] for row in limit["curve"] if row["trusted"])
    for found in numbers["reward_at"].values():
        best = np.interp(found["kl"], kl, rewards)
        gain = best - limit["ref_reward"]
        found["limit"] = best
        found["share"] = (found["reward"] - limit["ref_reward"]) / gain
        found["limit_trusted"] = found["kl"] <= trusted


def main(args):
    if not args.runs:
        raise UserError("no runs: pass their folders, or the frontier.jsonl in them")
    file = Path(args.output)
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output {file} must end in .png, .pdf or .svg")
    runs = [read_run(name, args.value) for name in dict.fromkeys(args.runs)]
    records = [record for record, _ in runs]
    check_alike(records, MUST_AGREE)
    limit = None
    if args.limit:
        limit = read_limit(args.limit, args.value)
        check_alike([*records, limit], (*MUST_AGREE, "policy"))
    curves = {label: curve_numbers(group, args) for label, group in group_runs(runs).items()}
    rows = [["curve", "runs", *(f"KL ≤ {kappa:g}" for kappa in args.kls)]]
    for label, numbers in curves.items():
        if limit and args.value == "reward":
            add_shares(numbers, limit)
        cells = []
        for found in numbers["reward_at"].values():
            cell = f"{found[args.value]:.2f} ± {found['high'] - found[args.value]:.2f}"
            if "share" in found:
                mark = "" if found["limit_trusted"] else "≤ "
                cell += f", {mark}{found['share']:.0%}"
            cells.append(cell if found["reached"] else cell + " *")
        rows.append([label, str(len(numbers["seeds"])), *cells])
    note = "± 95 % interval; * not all runs reach this KL; markers only tell the curves apart"
    if limit:
        note += "; % of the limit's gain over the reference, ≤ where the limit is too low"
        columns = [[row[key] for row in limit["curve"]] for key in ("kl", args.value)]
        heights = np.interp(args.kls, *columns)
        rows.append(["limit", "", *(f"{height:.2f}" for height in heights)])
    print_table(rows)
    print(note)
    file.parent.mkdir(parents=True, exist_ok=True)
    draw(file, args.title or records[0]["dataset"], args.value, curves, limit)
    file.with_suffix(".json").write_text(json.dumps({"curves": curves, "limit": limit}, indent=1))
    print(file)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (UserError, OSError) as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        sys.exit(2)
