"""Figures and tables of the study, from study/results/*.json alone; nothing is run.

    python study/figures.py           # draw docs/figures/*.png, write the tables into the pages
    python study/figures.py --check   # only say whether the pages have the tables of the results

A table stands in study/README.md or docs/results.md between <!-- table NAME --> and <!-- end -->.
"""

import json
import re
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import settings
from matplotlib.figure import Figure
from settings import FOLDER, KLS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import plot_frontier  # noqa: E402

RESULTS = ROOT / "study/results"
FIGURES = ROOT / "docs/figures"
PAGES = (ROOT / "study/README.md", ROOT / "docs/results.md")
NAMES = {script: name for script, (name, _, _) in plot_frontier.STYLES.items()}
SHOWN = {  # what tables and figures say of a setting; they are in this order
    **NAMES,
    "none": "0",
    "study/rewards.py:shift_10": "10",
    f"{FOLDER}/gold_flipped_0": "right labels",
    f"{FOLDER}/gold_flipped_30": "30 % flipped",
    f"{FOLDER}/reward_pairs_1200/model": "1,200 pairs",
    f"{FOLDER}/reward_pairs_3600/model": "3,600 pairs",
    f"{FOLDER}/reward_pairs_12000/model": "12,000 pairs",
    f"{FOLDER}/reward_pairs_12000_flipped_30/model": "12,000 pairs, 30 % flipped",
    f"{FOLDER}/policy_100k/model": "0.1 M",
    "tiny/sft": "0.5 M",
    f"{FOLDER}/policy_1200k/model": "1.1 M",
}


# --------------------------------------------------------------------------------------- results
def stored(part):
    """What is stored of a part: a list of runs; of `limit` and `made` a dict."""
    file = RESULTS / f"{part}.json"
    return json.loads(file.read_text()) if file.exists() else []


def groups(runs, *keys):
    """{values of these settings: runs}, in order. `beta` is IPO's τ, too."""
    found = defaultdict(list)
    for run in runs:
        flags = run["settings"]
        flags = {"num_epochs": 4, "reward_fn": "none", "beta": flags.get("tau"), **flags}
        found[tuple(flags[key] for key in keys)].append(run)
    rank = {value: i for i, value in enumerate(SHOWN)}
    return dict(sorted(found.items(), key=lambda item: [rank.get(x, x) for x in item[0]]))


def by_script(runs):
    """{script: its runs}, in the order of the legend."""
    return {script: found for (script,), found in groups(runs, "script").items()}


def by_pair(runs):
    """{(learning rate, β): runs}."""
    return groups(runs, "learning_rate", "beta")


def with_same_seeds(part, others):
    """Runs of a part, and those of the others that have one of its seeds."""
    runs = stored(part)
    seeds = {run["settings"]["seed"] for run in runs}
    return runs + [run for run in others if run["settings"]["seed"] in seeds]


def off_policy():
    """Runs of the part `epochs`, and those of `budget` with the same setting and 4 epochs."""
    same = by_pair(stored("budget")).get(settings.FOUND["p3o_v2"], [])
    compared = [run for run in same if run["settings"]["script"] in ("p3o_v2", "rloo")]
    return with_same_seeds("epochs", compared)


def translated():
    """Runs of the part `translation`, and those of `budget` without δ."""
    return with_same_seeds("translation", stored("budget"))


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


# --------------------------------------------------------------------------------- cells of tables
def cell(values, digits=2, scale=1):
    """Mean ± 95 % interval over seeds, by Student's t; of two seeds both values."""
    values = sorted(scale * value for value in values)
    if len(values) < 3:
        return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in values))
    width = plot_frontier.STUDENT.get(len(values), 2.23) / len(values) ** 0.5
    return f"{mean(values):.{digits}f} ± {width * np.std(values, ddof=1):.{digits}f}"


def share_at(kl):
    return lambda runs: cell((share(run, kl) for run in runs), 0, 100)


def best_at(kl, key):
    """Of the policy with the highest reward within this KL."""
    return lambda runs: cell(plot_frontier.best_within(run["frontier"], kl)[key] for run in runs)


def at(index, key):
    """At an evaluation: 0 is before training, -1 at the end."""
    return lambda runs: cell(run["frontier"][index][key] for run in runs)


def gain(runs):
    return cell(run["frontier"][-1]["reward"] - run["frontier"][0]["reward"] for run in runs)


def clipped(runs):
    """% of terms clipped in the last update."""
    return cell((run["metrics"][-1]["policy/clipfrac"] for run in runs), 0, 100)


def largest_ratio(runs):
    """In the last update, of all seeds."""
    ratios = [run["metrics"][-1]["policy/ratio_max"] for run in runs]
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


def accuracy(runs):
    """Of the reward model on held-out pairs."""
    known = stored("made")[runs[0]["settings"]["reward_model"]]
    return f"{100 * known['rm/eval_accuracy']:.1f} %"


def seconds(runs):
    """Of an update."""
    return f"{mean(row['time/update'] for run in runs for row in run['metrics']):.1f}"


def highest_gold(runs):
    points = [point for run in runs for point in run["frontier"]]
    top = max(points, key=lambda point: point["gold"])
    return f"{top['gold']:.2f} at {top['kl']:.1f}"


def falls(runs):
    """KLs of the highest gold of runs that end more than two standard errors below it."""
    found = []
    for run in runs:
        end, top = run["frontier"][-1], max(run["frontier"], key=lambda point: point["gold"])
        if top["gold"] - end["gold"] > 2 * (end["gold_se"] ** 2 + top["gold_se"] ** 2) ** 0.5:
            found.append(top["kl"])
    return ", ".join(f"{kl:.1f}" for kl in sorted(found)) or "–"


# ------------------------------------------------------------------------------------------ tables
# A column of settings: what the head says, and the setting. Others: a function of runs.
PAIR = {"algorithm": "script", "lr": "learning_rate", "β or τ": "beta"}
MEASURES = {f"% of gain, KL ≤ {kl:g}": share_at(kl) for kl in KLS}
MEASURES |= {"KL at the end": at(-1, "kl"), "reward": at(-1, "reward"), "gold": at(-1, "gold")}
SECONDS = {"seconds": lambda runs: f"{mean(run['seconds'] for run in runs):.0f}"}
WHOLE = {"seeds": len, **MEASURES, **SECONDS}
CLIPPED = {"% clipped": clipped, "largest ratio": largest_ratio}
ENDS = {"gold": at(-1, "gold"), "KL at the end": at(-1, "kl")}
REWARDS = {f"reward, KL ≤ {kl:g}": best_at(kl, "reward") for kl in KLS}
GOLDS = {f"gold, KL ≤ {kl:g}": best_at(kl, "gold") for kl in KLS}
BEFORE = {"reward before": at(0, "reward"), "gold before": at(0, "gold")}
EPOCHS = {f"gold after {n}": at(n, "gold") for n in (1, 2, 4)}  # an evaluation an epoch
PEAKS = {"runs": len, "highest gold, at KL": highest_gold, "it falls from KL": falls}


def row_of(name, runs):
    """The row of an algorithm: setting, measures, seconds."""
    flags = runs[0]["settings"]
    row = [name, f"{flags['learning_rate']:g}", flags.get("beta", flags.get("tau", "–"))]
    return row + [column(runs) for column in WHOLE.values()]


def print_rows(curves):
    """Print the rows of {script: runs} in columns."""
    rows = [row_of(NAMES.get(script, script), runs) for script, runs in curves.items()]
    plot_frontier.print_table([[*PAIR, *WHOLE], *([str(value) for value in row] for row in rows)])
    print("% of the limit's gain over the reference within a KL; ± 95 % interval over seeds")


def table(head, rows):
    """Markdown."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        row = [f"{x:g}" if isinstance(x, float) else SHOWN.get(x, x) for x in row]
        lines.append(map(str, row))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percents(runs, pairs, bold):
    """The mean share in % at these settings, one run each; some of them are bold."""
    found, texts = by_pair(runs), []
    for pair in pairs:
        text = f"{100 * mean_share(found[pair][0]):.0f}" if pair in found else ""
        texts.append(f"**{text}**" if pair in bold else text)
    return texts


def search_table():
    rows = []
    for script, runs in by_script(stored("search")).items():
        [best] = by_pair([max(runs, key=mean_share)])
        pairs = settings.around(*settings.OWN[script])
        rows.append([script, *percents(runs, pairs, [best]), *best])
    factors = product(settings.LEARNING_RATE_FACTORS, settings.BETA_FACTORS)
    columns = [f"lr × {x:g}, β × {y:g}" for x, y in factors]
    return table(["algorithm", *columns, "best lr", "its β"], rows)


def grid_table():
    pairs = list(by_pair(stored("grid")))
    rows = []
    for script, runs in by_script(stored("grid")).items():
        rows.append([script, *percents(runs, pairs, settings.SMALL_BEST[script])])
    return table(["algorithm", *(f"{rate:g}, {beta:g}" for rate, beta in pairs)], rows)


def limit_table():
    limit = stored("limit")
    rows = [["0", f"{limit['ref_reward']:.2f}", f"{limit['ref_gold']:.2f}", "", ""]]
    for kl in (0.5, 1, 2, 3, 4):
        near = min(limit["curve"], key=lambda row: abs(row["kl"] - kl))
        reward, gold = (limit[f"ref_{key}"] + limit_gain(kl, key) for key in ("reward", "gold"))
        more = f"{near['more_than_half']:.3f}"
        rows.append([f"{kl:g}", f"{reward:.2f}", f"{gold:.2f}", f"{near['ess']:.0f}", more])
    for row in limit["best_of_n"]:
        if row["n"] in (4, 16, 64, 256):
            name = f"best of {row['n']}, ≤ {row['kl']:.2f}"
            rows.append([name, f"{row['reward']:.2f}", f"{row['gold']:.2f}", "", ""])
    head = ["KL", "reward", "gold of the same policy", "effective samples a prompt"]
    return table([*head, "more than with half of them"], rows)


def variance_table():
    found = stored("variance")
    head = [f"{key} responses" if key[-1].isdigit() else key for key in found[0]]
    rows = [[row.pop("s"), *(f"{value:.2f}" for value in row.values())] for row in found]
    return table(head, rows)


TABLES = {  # a function; or settings and columns: a row for each value of the settings
    "search": search_table,
    "budget": (PAIR, WHOLE),
    "translation": ({"algorithm": "script", "s": "reward_fn"}, {"gain in reward": gain, **ENDS}),
    "epochs": (
        {"epochs": "num_epochs", "lr": "learning_rate", "algorithm": "script"},
        {**MEASURES, **CLIPPED},
    ),
    "limit": limit_table,
    "grid": grid_table,
    "seeds": (PAIR, WHOLE),
    "gold": ({"algorithm": "script"}, PEAKS),
    "clipping": (
        {"algorithm": "script", "lr": "learning_rate", "ε": "clip_range"},
        {**MEASURES, **CLIPPED},
    ),
    "responses": ({"K": "num_responses"}, MEASURES),
    "labels": ({**PAIR, "labels": "dataset"}, {**EPOCHS, "KL at the end": at(-1, "kl")}),
    "rewards": (
        {"reward model of": "reward_model", "algorithm": "script"},
        {"accuracy": accuracy, **GOLDS, **ENDS},
    ),
    "scale": ({"parameters": "model"}, {"s an update": seconds, **BEFORE, **REWARDS, **GOLDS}),
    "variance": variance_table,
}
PARTS_OF = {  # tables of several parts
    "translation": ("translation", "budget"),
    "epochs": ("epochs", "budget"),
    "gold": ("grid", "seeds"),
}
CHOSEN = {"translation": translated, "epochs": off_policy}  # which of their runs


def origin(part):
    """How many runs of a part are stored, their commits, and what they took."""
    runs, asked = stored(part), len(settings.PARTS[part]())
    number = len(runs) if len(runs) == asked else f"{len(runs)} of {asked}"
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    hours = sum(run["seconds"] for run in runs) / 3600
    return f"`{part}`: {number} runs at commit {commits}, {hours:.1f} hours of one core."


def markdown(name):
    """A table and a line on its runs."""
    parts = PARTS_OF.get(name, (name,))
    if not all(stored(part) for part in parts):
        return "Not run yet."
    if callable(TABLES[name]):
        text = TABLES[name]()
    else:
        keys, columns = TABLES[name]
        runs = CHOSEN[name]() if name in CHOSEN else [run for part in parts for run in stored(part)]
        found = groups(runs, *keys.values())
        rows = [
            [*key, *(cells(group) for cells in columns.values())] for key, group in found.items()
        ]
        text = table([*keys, *columns], rows)
    origins = [origin(part) for part in parts if part in settings.PARTS]
    return "\n\n".join([text, " ".join(origins)]).strip()


def with_tables(page):
    """The text of a page with every table made anew."""
    marked = re.compile(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}\n\n{markdown(found[2])}\n\n{found[3]}", page)


# --------------------------------------------------------------------------------------- figures
KL_LABEL = "κ, largest KL(π ‖ π_ref) allowed, nats per response"


def path_of(runs, value):
    """The mean path of runs over KL, as plot_frontier.py draws it."""
    group = [(run["settings"], run["frontier"]) for run in runs]
    return plot_frontier.curve_numbers(group, plot_frontier.Args(kls=KLS, value=value))


def draw_frontier(curves, file, title, value="reward"):
    """Reward or gold over KL of {script: runs}, with the limit, by plot_frontier.py."""
    limit = stored("limit")
    start = {"kl": 0.0, value: limit[f"ref_{value}"], "trusted": True}
    limit["curve"] = [start, *limit["curve"]]
    drawn = {NAMES.get(script, script): path_of(runs, value) for script, runs in curves.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    plot_frontier.draw(file, title, value, drawn, limit)


def over_kl(value):
    """The curve of runs over KL, for draw_panels."""

    def curve(runs):
        path = path_of(runs, value)["path"]
        return *([point[key] for point in path] for key in ("kl", value, "low", "high")), ""

    return curve


def over_epochs(value):
    """The mean of runs over evaluations, one an epoch, for draw_panels."""

    def curve(runs):
        points = zip(*(run["frontier"] for run in runs))
        height = [mean(point[value] for point in of_epoch) for of_epoch in points]
        kl = mean(run["frontier"][-1]["kl"] for run in runs)
        return range(len(height)), height, height, height, f" (KL {kl:.1f} at the end)"

    return curve


def draw_panels(panels, file, curve_of, x_label, y_label):
    """Small figures side by side, {title: runs}, with a curve for each script.

    curve_of(runs) is x, y, the ends of the interval of y, and what the label says beside the name.
    """
    figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
    row = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axes, (title, runs) in zip(row, panels.items()):
        curves = {script: curve_of(found) for script, found in by_script(runs).items()}
        for script in sorted(curves, key=lambda script: -curves[script][1][-1]):  # highest first
            x, y, low, high, text = curves[script]
            label, colour, marker = plot_frontier.STYLES[script]
            style = {"color": colour, "marker": marker, "markevery": max(1, len(x) // 5)}
            axes.plot(x, y, label=label + text, markersize=4, **style)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_title(title, fontsize=9)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set(xlim=(0, None), ylabel=y_label)
    figure.supxlabel(x_label, fontsize=10)
    figure.savefig(file, dpi=130)


def draw_figures():
    """Draw every figure whose runs are stored."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    if curves := by_script(stored("budget")):
        title = "Learned reward over KL, five seeds each"
        draw_frontier(curves, FIGURES / "frontier.png", title)
        title = "True reward of the same runs, never seen in training"
        draw_frontier(curves, FIGURES / "frontier_gold.png", title, "gold")
    curves = {}
    for script, runs in by_script(stored("seeds")).items():  # at the better of two settings
        pairs = by_pair(runs).values()
        curves[script] = max(pairs, key=lambda found: mean(map(mean_share, found)))
    if curves:
        title = "Learned reward over KL at a small, equal budget, five seeds each"
        draw_frontier(curves, FIGURES / "seeds.png", title)
    panels = {}
    for (number, rate), runs in groups(off_policy(), "num_epochs", "learning_rate").items():
        panels[f"{number} epoch{'s' * (number > 1)}, learning rate {rate:g}"] = runs
    if stored("epochs"):
        draw_panels(panels, FIGURES / "epochs.png", over_kl("reward"), KL_LABEL, "reward")
    panels = defaultdict(list)
    for (dataset, beta), runs in groups(stored("labels"), "dataset", "beta").items():
        setting = "β or τ = 0.1" if beta == 0.1 else "best of the grid"
        panels[f"{SHOWN[dataset]}, {setting}"] += runs
    if panels:
        draw_panels(panels, FIGURES / "labels.png", over_epochs("gold"), "epochs", "true reward")
    panels = {}
    for (model,), runs in groups(stored("rewards"), "reward_model").items():
        panels[f"reward model of {SHOWN[model]}"] = runs
    if panels:
        draw_panels(panels, FIGURES / "rewards.png", over_kl("gold"), KL_LABEL, "true reward")


def main(only_check):
    for page in PAGES:
        before = page.read_text()
        after = with_tables(before)
        if not only_check:
            page.write_text(after)
        elif after != before:
            sys.exit(f"{page.relative_to(ROOT)} differs from the results: run study/figures.py")
    if not only_check:
        draw_figures()


if __name__ == "__main__":
    main("--check" in sys.argv)
