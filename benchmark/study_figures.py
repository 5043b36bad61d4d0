"""Figures and tables of the study, from benchmark/results/*.json alone; no run is made.

    python benchmark/study_figures.py           draws docs/figures/*.png, writes the tables into docs/results.md
    python benchmark/study_figures.py --check   only says whether docs/results.md has the tables that the results give

A table stands in docs/results.md between <!-- study NAME --> and <!-- end -->.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES, PAGE = ROOT / "benchmark" / "results", ROOT / "docs" / "figures", ROOT / "docs" / "results.md"
KLS = (1.0, 2.0, 4.0)
STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    10: 2.262,
}  # of n values: Student's t at 97.5 %
NAMES = {"p3o_v1": "P3O-V1", "p3o_v2": "P3O-V2", "ppo": "PPO", "online_dpo": "online DPO"}
NAMES |= {"dpo": "DPO", "ipo": "IPO", "mpo": "MPO"}
COLOURS = dict(zip(NAMES, ("#e07b00", "#c1121f", "#1b6ca8", "#2a9d5c", "#7b4fa3", "#8a5a3c", "#6c757d")))


def stored(part):
    file = RESULTS / f"{part}.json"
    return json.loads(file.read_text()) if file.is_file() else []


def groups(runs, *keys):
    """Runs by the values of these settings, in the order they have there; 'beta' also finds ipo.py's τ."""
    found = defaultdict(list)
    for run in runs:
        found[tuple(setting(run, key) for key in keys)].append(run)
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def order(key):
    return tuple(list(NAMES).index(part) if part in NAMES else part for part in key)


def setting(run, key):
    values = run["settings"]
    return values.get(key, values.get("tau") if key == "beta" else 0)


def path_value(points, kl, key="reward"):
    """The best value that a path of frontier points reached with at most this KL, linear between two points."""
    best = points[0][key]
    for a, b in zip(points, points[1:]):
        best = max([best] + [p[key] for p in (a, b) if p["kl"] <= kl])
        if min(a["kl"], b["kl"]) < kl < max(a["kl"], b["kl"]):
            best = max(best, a[key] + (b[key] - a[key]) * (kl - a["kl"]) / (b["kl"] - a["kl"]))
    return best


def share(run, kl):
    """Part of the gain in reward that the limit has at this KL which a run reached with at most this KL; both from the
    reference's mean reward, which the limit's samples give more precisely than a run's first evaluation."""
    reference = stored("limit")["ref_reward"]
    return (path_value(run["frontier"], kl) - reference) / limit_gain(kl)


def limit_curve():
    """The limit's points, as far as half of the samples give the same reward at the same KL to 0.02."""
    rows = [row for row in stored("limit")["curve"] if abs(row.get("more_than_half") or 0) < 0.02]
    return sorted(rows, key=lambda row: row["kl"])


def limit_gain(kl, key="reward"):
    start = {"kl": 0.0, key: stored("limit")[f"ref_{key}"]}
    return path_value([start, *limit_curve()], kl, key) - start[key]


def interval(values):
    """Mean and the half-width of its 95 % interval over seeds."""
    values = list(values)
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return mean(values), half


def cell(values, digits=2, scale=1):
    middle, half = interval(values)
    return f"{scale * middle:.{digits}f} ± {scale * half:.{digits}f}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_path(runs, *keys):
    """At each evaluation the means over seeds: {key: [steps]}, standard errors as key_se."""
    steps = list(zip(*(run["frontier"] for run in runs)))
    found = {key: [mean(p[key] for p in step) for step in steps] for key in keys}
    for key in keys:
        found[f"{key}_se"] = [interval(p[key] for p in step)[1] for step in steps]
    return found


def best_setting(script, runs):
    """Of a script's settings that were run over seeds the one whose mean share over the three KLs is highest."""
    of_script = groups([run for run in runs if setting(run, "script") == script], "learning_rate", "beta")
    return max(of_script.items(), key=lambda item: mean(share(run, kl) for run in item[1] for kl in KLS))


# -------------------------------------------------------------------------------------------------------------- figures
def frontier_figure(key="reward", file="frontier.png", title="Reward over KL: each algorithm at its best setting"):
    runs, limit = stored("seeds"), stored("limit")
    figure, axes = plt.subplots(figsize=(8.4, 5.4))
    curve, start = limit_curve(), limit[f"ref_{key}"]
    axes.plot([0, *(r["kl"] for r in curve)], [start, *(r[key] for r in curve)], color="black", lw=2)
    note = "the limit: no policy has more" if key == "reward" else "the policy that is the limit of the learned reward"
    at = min(curve, key=lambda row: abs(row["kl"] - 2.6))
    axes.text(2.5, at[key] + 0.25, note, fontsize=10, ha="right")
    best_of = [row for row in limit["best_of_n"] if row["kl"] <= 5.6]
    axes.plot([r["kl"] for r in best_of], [r[key] for r in best_of], ":", color="black", lw=1.2, label="best of n")
    for script in NAMES:
        (lr, beta), found = best_setting(script, runs)
        path = mean_path(found, "kl", key)
        label = f"{NAMES[script]}  (lr {lr:g}, {'τ' if script == 'ipo' else 'β'} {beta:g})"
        style = {"color": COLOURS[script], "marker": "o" if script in ("p3o_v1", "p3o_v2") else "s", "ms": 4}
        style["ls"] = "-" if script in ("p3o_v1", "p3o_v2", "ppo", "online_dpo") else "--"
        axes.errorbar(path["kl"], path[key], path[f"{key}_se"], label=label, elinewidth=0.9, **style)
        axes.errorbar(path["kl"], path[key], None, path["kl_se"], fmt="none", color=COLOURS[script], alpha=0.25)
    axes.set_xlim(0, 5.6)
    axes.set_xlabel("KL from the SFT policy, nats a response")
    axes.set_ylabel("reward of held-out prompts' responses" if key == "reward" else "true (gold) reward")
    axes.set_title(
        f"{title}\nmeans of {len(found)} seeds with 95 % intervals, same budget, embedded world", fontsize=11
    )
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FIGURES / file, dpi=130)
    plt.close(figure)


def gold_figure():
    runs = stored("grid") + stored("seeds")
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.6), sharex=True, sharey=True)
    for axis, script in zip(axes.flat, NAMES):
        for run in [run for run in runs if setting(run, "script") == script]:
            points = run["frontier"]
            for key, colour in (("reward", "#999999"), ("gold", COLOURS[script])):
                axis.plot([p["kl"] for p in points], [p[key] for p in points], color=colour, lw=0.8, alpha=0.6)
        axis.set_title(NAMES[script], fontsize=10)
        axis.set_xlim(0, 12)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].axis("off")
    axes.flat[-1].text(
        0, 0.5, "coloured: true (gold) reward\ngrey: learned reward\none line a run: the whole grid\nand all seeds"
    )
    figure.supxlabel("KL from the SFT policy, nats a response", fontsize=10)
    figure.tight_layout()
    figure.savefig(FIGURES / "gold.png", dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------- tables
def shares_table():
    rows = []
    for (script, lr, beta), runs in groups(stored("seeds"), "script", "learning_rate", "beta").items():
        end = [run["frontier"][-1] for run in runs]
        row = [NAMES[script], f"{lr:g}", f"{beta:g}"]
        for kl in KLS:
            reached = sum(max(p["kl"] for p in run["frontier"]) >= kl for run in runs)
            mark = "" if reached == len(runs) else f" ({reached} of {len(runs)} get there)"
            row.append(cell((share(run, kl) for run in runs), 0, 100) + mark)
        rows.append([*row, *(cell(p[key] for p in end) for key in ("kl", "reward", "gold"))])
    head = ["algorithm", "lr", "β (IPO: τ)", *(f"% of the limit's gain at KL ≤ {kl:g}" for kl in KLS)]
    return table([*head, "KL at the end", "reward", "gold"], rows)


def grid_table():
    cells = groups(stored("grid"), "script", "learning_rate", "beta")
    columns = sorted({key[1:] for key in cells})
    rows = []
    for script in NAMES:
        values = {c: mean(share(cells[(script, *c)][0], kl) for kl in KLS) for c in columns if (script, *c) in cells}
        best = sorted(values.values())[-2:]
        texts = [f"{100 * values[c]:.0f}" if c in values else "" for c in columns]
        rows.append([NAMES[script], *(f"**{t}**" if values.get(c) in best else t for c, t in zip(columns, texts))])
    return table(["algorithm", *(f"{lr:g}, {beta:g}" for lr, beta in columns)], rows)


def limit_table():
    limit, curve, rows = stored("limit"), limit_curve(), []
    rows.append(["0", *(f"{limit[f'ref_{key}']:.2f}" for key in ("reward", "gold")), "", ""])
    for kl in (0.5, 1, 2, 3, 4):
        near = min(curve, key=lambda row: abs(row["kl"] - kl))
        values = (limit[f"ref_{key}"] + limit_gain(kl, key) for key in ("reward", "gold"))
        rows.append([f"{kl:g}", *(f"{x:.2f}" for x in values), f"{near['ess']:.0f}", f"{near['more_than_half']:.3f}"])
    for row in limit["best_of_n"]:
        if row["n"] in (4, 16, 64, 256):
            rows.append(
                [f"best of {row['n']}, ≤ {row['kl']:.2f}", f"{row['reward']:.2f}", f"{row['gold']:.2f}", "", ""]
            )
    head = ["KL", "reward", "gold of the same policy", "effective samples a prompt", "more than with half of them"]
    return table(head, rows)


def gold_table():
    rows = []
    for script in NAMES:
        runs = [run for run in stored("grid") + stored("seeds") if setting(run, "script") == script]
        points = [p for run in runs for p in run["frontier"]]
        top = max(points, key=lambda p: p["gold"])
        falls = []
        for run in runs:
            peak = max(run["frontier"], key=lambda p: p["gold"])
            end = run["frontier"][-1]
            if end["gold"] < peak["gold"] - 2 * (end["gold_se"] ** 2 + peak["gold_se"] ** 2) ** 0.5:
                falls.append(peak["kl"])
        start = f"{mean(falls):.1f} ({min(falls):.1f} to {max(falls):.1f})" if falls else "none fell"
        rows.append([NAMES[script], len(runs), f"{top['gold']:.2f} at {top['kl']:.1f}", len(falls), start])
    return table(["algorithm", "runs", "highest gold, at KL", "runs whose gold falls", "KL where it begins to"], rows)


def translation_table():
    """With s = 0: the runs of the part `seeds` that had the same learning rate and β."""
    shifted, rows = groups(stored("translation"), "script", "reward_fn"), []
    plain = groups(stored("seeds"), "script", "learning_rate", "beta")
    for (script, reward_fn), runs in shifted.items():
        found = {int(reward_fn.rpartition("_")[2]): runs}
        found[0] = plain[(script, setting(runs[0], "learning_rate"), setting(runs[0], "beta"))]
        for s in found:
            ends = [(run["frontier"][0], run["frontier"][-1]) for run in found[s]]
            gains = cell(end["reward"] - start["reward"] for start, end in ends)
            rows.append([NAMES[script], s, gains, *(cell(end[key] for _, end in ends) for key in ("gold", "kl"))])
    rows = sorted({tuple(row) for row in rows}, key=lambda row: ([*NAMES.values()].index(row[0]), row[1]))
    return table(["algorithm", "s", "gain in reward", "gold", "KL"], rows)


def clipping_table():
    rows = []
    for (script, lr, clip), runs in groups(stored("clipping"), "script", "learning_rate", "clip_range").items():
        ends = [run["frontier"][-1] for run in runs]
        clipped = [run["metrics"][-1]["policy/clipfrac"] for run in runs]
        row = [NAMES[script], f"{lr:g}", f"{clip:g}", *(cell((share(r, kl) for r in runs), 0, 100) for kl in (1, 2))]
        row += [cell(p[key] for p in ends) for key in ("kl", "reward", "gold")]
        rows.append([*row, f"{100 * mean(clipped):.0f}"])
    head = ["algorithm", "lr", "ε", "% of the limit's gain at KL ≤ 1", "at KL ≤ 2", "KL at the end", "reward", "gold"]
    return table([*head, "% clipped, last update"], rows)


def responses_table():
    rows = []
    for (k,), runs in groups(stored("responses"), "num_responses").items():
        ends = [run["frontier"][-1] for run in runs]
        row = [k, *(cell((share(run, kl) for run in runs), 0, 100) for kl in KLS)]
        rows.append([*row, *(cell(p[key] for p in ends) for key in ("kl", "reward", "gold"))])
    head = ["K", *(f"% of the limit's gain at KL ≤ {kl:g}" for kl in KLS)]
    return table([*head, "KL at the end", "reward", "gold"], rows)


def weights_table():
    rows = []
    for script in NAMES:
        (lr, beta), runs = best_setting(script, stored("seeds"))
        cells = []
        for update in (0, -1):
            found = [run["metrics"][update] for run in runs]
            for key in ("policy/pair_weight_mean", "policy/pair_weight_std"):
                cells.append(f"{mean(row[key] for row in found):.3f}" if key in found[0] else "")
        if any(cells):
            rows.append([NAMES[script], f"{lr:g}", f"{beta:g}", *cells])
    head = ["algorithm", "lr", "β", "weight, first update", "its deviation", "weight, last update", "its deviation"]
    return table(head, rows)


def variance_table():
    rows = stored("variance")
    head = [f"{key} responses" if key[-1].isdigit() else key for key in rows[0]]
    return table(head, [[f"{row.pop('s'):g}", *(f"{value:.2f}" for value in row.values())] for row in rows])


TABLES = {
    "limit": limit_table,
    "grid": grid_table,
    "seeds": shares_table,
    "gold": gold_table,
    "translation": translation_table,
    "clipping": clipping_table,
    "responses": responses_table,
    "weights": weights_table,
    "variance": variance_table,
}


def with_tables(page):
    """The page with every table made anew; a name without a table is an error."""

    def made(match):
        return f"{match[1]}\n\n{TABLES[match[2]]()}\n\n{match[3]}"

    return re.sub(r"(<!-- study (\w+) -->)\n.*?(<!-- end -->)", made, page, flags=re.S)


if __name__ == "__main__":
    before = PAGE.read_text()
    after = with_tables(before)
    if "--check" in sys.argv:
        sys.exit(None if after == before else "docs/results.md differs from benchmark/results")
    FIGURES.mkdir(exist_ok=True)
    PAGE.write_text(after)
    frontier_figure()
    frontier_figure("gold", "frontier_gold.png", "The true reward of the same runs, which none of them saw")
    gold_figure()
