"""Figures and tables of the study, from study/results/*.json alone; nothing is run.

    python study/figures.py           # draw docs/figures/*.png, write the tables into the pages
    python study/figures.py --check   # only say whether the pages have the tables of the results

A table stands in study/README.md or docs/results.md between <!-- table NAME --> and <!-- end -->.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
from settings import KLS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import plot_frontier  # noqa: E402

RESULTS = ROOT / "study/results"
FIGURES = ROOT / "docs/figures"
PAGES = (ROOT / "study/README.md", ROOT / "docs/results.md")
NAMES = {script: name for script, (name, _, _) in plot_frontier.STYLES.items()}


# --------------------------------------------------------------------------------------- results
def stored(part):
    """What is stored of a part: a list of runs; of `limit` a dict."""
    file = RESULTS / f"{part}.json"
    return json.loads(file.read_text()) if file.exists() else []


def by_script(runs):
    """{script: its runs}, in the order of the legend."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["settings"]["script"]].append(run)
    return {script: groups[script] for script in NAMES if script in groups}


def limit_gain(kl, key="reward"):
    """What the limit gains over the reference at this KL."""
    limit = stored("limit")
    start = limit[f"ref_{key}"]
    points = [(0.0, start)] + [(row["kl"], row[key]) for row in limit["curve"]]
    return np.interp(kl, *zip(*sorted(points))) - start


def share(run, kl):
    """The part of the limit's gain at this KL that a run reached with at most this KL.

    Both are counted from the reference's mean reward over the samples of the limit.
    """
    best = plot_frontier.best_within(run["frontier"], kl)["reward"]
    return (best - stored("limit")["ref_reward"]) / limit_gain(kl)


def mean_share(run):
    return mean(share(run, kl) for kl in KLS)


def interval(values):
    """Mean and half-width of the 95 % interval over three or more seeds, by Student's t."""
    values = list(values)
    width = plot_frontier.STUDENT.get(len(values), 2.23)
    return mean(values), width * np.std(values, ddof=1) / len(values) ** 0.5


def cell(values, digits=2, scale=1):
    """Mean ± interval; of two seeds, which have none, both values."""
    values = sorted(scale * value for value in values)
    if len(values) < 3:
        return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in values))
    middle, half = interval(values)
    return f"{middle:.{digits}f} ± {half:.{digits}f}"


def ends(runs, key):
    return [run["frontier"][-1][key] for run in runs]


# ---------------------------------------------------------------------------------------- tables
def row_of(name, runs):
    """The row of an algorithm: setting, shares of the limit's gain, where it ends, seconds."""
    flags = runs[0]["settings"]
    strength = flags.get("beta", flags.get("tau", "–"))
    row = [name, len(runs), f"{flags['learning_rate']:g}", f"{strength}"]
    row += [cell((share(run, kl) for run in runs), 0, 100) for kl in KLS]
    row += [cell(ends(runs, key)) for key in ("kl", "reward", "gold")]
    return [*row, f"{mean(run['seconds'] for run in runs):.0f}"]


HEAD = ["algorithm", "seeds", "lr", "β or τ", *(f"% of gain, KL ≤ {kl:g}" for kl in KLS)]
HEAD += ["KL at the end", "reward", "gold", "seconds"]


def print_rows(curves):
    """Print the rows of {script: runs} in columns."""
    rows = [row_of(NAMES.get(script, script), runs) for script, runs in curves.items()]
    plot_frontier.print_table([HEAD, *([str(value) for value in row] for row in rows)])
    print("% of the limit's gain over the reference within a KL; ± 95 % interval over seeds")


# --------------------------------------------------------------------------------------- figures
def draw_frontier(curves, file, title, value="reward"):
    """Reward or gold over KL of {script: runs}, with the limit, by plot_frontier.py."""
    limit = stored("limit")
    start = {"kl": 0.0, value: limit[f"ref_{value}"], "trusted": True}
    limit["curve"] = [start, *limit["curve"]]
    args = plot_frontier.Args(kls=KLS, value=value)
    drawn = {}
    for script, runs in curves.items():
        group = [(run["settings"], run["frontier"]) for run in runs]
        drawn[NAMES.get(script, script)] = plot_frontier.curve_numbers(group, args)
    file.parent.mkdir(parents=True, exist_ok=True)
    plot_frontier.draw(file, title, value, drawn, limit)
