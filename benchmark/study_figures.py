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
RESULTS, FIGURES, PAGE = (
    ROOT / "benchmark" / "results",
    ROOT / "docs" / "figures",
    ROOT / "docs" / "results.md",
)
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
COLOURS = dict(
    zip(NAMES, ("#e07b00", "#c1121f", "#1b6ca8", "#2a9d5c", "#7b4fa3", "#8a5a3c", "#6c757d"))
)


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


def last_value(points, kl, key="gold"):
    """The value where a path of frontier points has this KL or less for the last time, linear between two points."""
    if points[-1]["kl"] <= kl:
        return points[-1][key]
    a, b = next((a, b) for a, b in reversed([*zip(points, points[1:])]) if a["kl"] <= kl)
    return a[key] + (b[key] - a[key]) * (kl - a["kl"]) / (b["kl"] - a["kl"])


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
    half = (
        STUDENT[len(values)] * stdev(values) / len(values) ** 0.5
        if len(values) > 1
        else float("nan")
    )
    return mean(values), half


def cell(values, digits=2, scale=1):
    """Mean and interval; of one or two seeds, which give none, the values."""
    values = sorted(values)
    if len(values) < 3:
        return " to ".join(dict.fromkeys(f"{scale * value:.{digits}f}" for value in values))
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
    of_script = groups(
        [run for run in runs if setting(run, "script") == script], "learning_rate", "beta"
    )
    return max(
        of_script.items(), key=lambda item: mean(share(run, kl) for run in item[1] for kl in KLS)
    )


# -------------------------------------------------------------------------------------------------------------- figures
BEST = "Reward over KL: each algorithm at its best setting"


def frontier_figure(key="reward", file="frontier.png", title=BEST, part="seeds"):
    runs, limit = stored(part), stored("limit")
    figure, axes = plt.subplots(figsize=(8.4, 5.4))
    curve, start = limit_curve(), limit[f"ref_{key}"]
    axes.plot(
        [0, *(r["kl"] for r in curve)], [start, *(r[key] for r in curve)], color="black", lw=2
    )
    note = (
        "the limit: no policy has more"
        if key == "reward"
        else "the policy that is the limit of the learned reward"
    )
    at = min(curve, key=lambda row: abs(row["kl"] - 2.6))
    axes.text(2.5, at[key] + 0.25, note, fontsize=10, ha="right")
    best_of = [row for row in limit["best_of_n"] if row["kl"] <= 5.6]
    axes.plot(
        [r["kl"] for r in best_of],
        [r[key] for r in best_of],
        ":",
        color="black",
        lw=1.2,
        label="best of n",
    )
    for script in [
        script for script in NAMES if any(setting(run, "script") == script for run in runs)
    ]:
        (lr, beta), found = best_setting(script, runs)
        path = mean_path(found, "kl", key)
        label = f"{NAMES[script]}  (lr {lr:g}, {'τ' if script == 'ipo' else 'β'} {beta:g})"
        style = {
            "color": COLOURS[script],
            "marker": "o" if script in ("p3o_v1", "p3o_v2") else "s",
            "ms": 4,
        }
        style["ls"] = "-" if script in ("p3o_v1", "p3o_v2", "ppo", "online_dpo") else "--"
        axes.errorbar(
            path["kl"], path[key], path[f"{key}_se"], label=label, elinewidth=0.9, **style
        )
        axes.errorbar(
            path["kl"],
            path[key],
            None,
            path["kl_se"],
            fmt="none",
            color=COLOURS[script],
            alpha=0.25,
        )
    axes.set_xlim(0, 5.6)
    axes.set_xlabel("KL from the SFT policy, nats a response")
    axes.set_ylabel(
        "reward of held-out prompts' responses" if key == "reward" else "true (gold) reward"
    )
    axes.set_title(
        f"{title}\nmeans of {len(found)} seeds with 95 % intervals, same budget, embedded world",
        fontsize=11,
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
                axis.plot(
                    [p["kl"] for p in points],
                    [p[key] for p in points],
                    color=colour,
                    lw=0.8,
                    alpha=0.6,
                )
        axis.set_title(NAMES[script], fontsize=10)
        axis.set_xlim(0, 12)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].axis("off")
    axes.flat[-1].text(
        0,
        0.5,
        "coloured: true (gold) reward\ngrey: learned reward\none line a run: the whole grid\nand all seeds",
    )
    figure.supxlabel("KL from the SFT policy, nats a response", fontsize=10)
    figure.tight_layout()
    figure.savefig(FIGURES / "gold.png", dpi=110)
    plt.close(figure)


def finish(figure, file):
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FIGURES / file, dpi=110)
    plt.close(figure)


def labels_figure():
    """Gold and KL over epochs; the lines are means over seeds."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey="row")
    for (script, lr, beta), runs in groups(
        stored("labels"), "script", "learning_rate", "beta"
    ).items():
        column = axes[:, ("dpo", "ipo", "mpo").index(script)]
        style = {"ls": "--" if column[0].lines else "-", "marker": "o", "ms": 3}
        for (dataset,), found in groups(runs, "dataset").items():
            path = mean_path(found, "kl", "gold")
            colour = "#c1121f" if flipped(dataset) else "#1b6ca8"
            label = f"lr {lr:g}, {'τ' if script == 'ipo' else 'β'} {beta:g}, {flipped(dataset)} % flipped"
            for axis, key in zip(column, ("gold", "kl")):
                axis.plot(path[key], color=colour, label=label, **style)
        column[0].set_title(NAMES[script], fontsize=10)
        column[1].legend(loc="lower right", frameon=False, fontsize=7)
        column[1].set_yscale("symlog", linthresh=0.1)
        column[1].set_xlabel("epochs")
    axes[0, 0].set_ylabel("true (gold) reward")
    axes[1, 0].set_ylabel("KL from the SFT policy, nats")
    finish(figure, "labels.png")


def rewards_figure():
    """Gold over KL with each reward model; the lines are means over seeds, the bars 95 % intervals."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), sharex=True, sharey=True)
    models, found = reward_models(), groups(stored("rewards"), "reward_model", "script")
    for (model, script), runs in sorted(
        found.items(), key=lambda item: [*models].index(item[0][0])
    ):
        path, known = mean_path(runs, "kl", "gold"), models[model]
        colour = (
            "#c1121f" if known["flipped"] else plt.cm.Blues(0.35 + 0.2 * [*models].index(model))
        )
        axis = axes[("p3o_v2", "ppo", "online_dpo").index(script)]
        label = f"{learned_from(known)}: {100 * known['rm/eval_accuracy']:.1f} % right"
        axis.errorbar(
            path["kl"],
            path["gold"],
            path["gold_se"],
            label=label,
            color=colour,
            marker="o",
            ms=3,
            lw=1.5,
        )
        axis.set_title(NAMES[script], fontsize=10)
        axis.set_xlabel("KL from the SFT policy, nats")
    axes[0].set_ylabel("true (gold) reward")
    axes[0].legend(loc="lower right", frameon=False, fontsize=8)
    finish(figure, "rewards.png")


# --------------------------------------------------------------------------------------------------------------- tables
def shares_table():
    rows = []
    for (script, lr, beta), runs in groups(
        stored("seeds"), "script", "learning_rate", "beta"
    ).items():
        end = [run["frontier"][-1] for run in runs]
        row = [NAMES[script], f"{lr:g}", f"{beta:g}"]
        for kl in KLS:
            reached = sum(max(p["kl"] for p in run["frontier"]) >= kl for run in runs)
            mark = "" if reached == len(runs) else f" ({reached} of {len(runs)} get there)"
            row.append(cell((share(run, kl) for run in runs), 0, 100) + mark)
        rows.append([*row, *(cell(p[key] for p in end) for key in ("kl", "reward", "gold"))])
    head = [
        "algorithm",
        "lr",
        "β (IPO: τ)",
        *(f"% of the limit's gain at KL ≤ {kl:g}" for kl in KLS),
    ]
    return table([*head, "KL at the end", "reward", "gold"], rows)


def grid_table():
    cells = groups(stored("grid"), "script", "learning_rate", "beta")
    columns = sorted({key[1:] for key in cells})
    rows = []
    for script in NAMES:
        values = {
            c: mean(share(cells[(script, *c)][0], kl) for kl in KLS)
            for c in columns
            if (script, *c) in cells
        }
        best = sorted(values.values())[-2:]
        texts = [f"{100 * values[c]:.0f}" if c in values else "" for c in columns]
        rows.append(
            [
                NAMES[script],
                *(f"**{t}**" if values.get(c) in best else t for c, t in zip(columns, texts)),
            ]
        )
    return table(["algorithm", *(f"{lr:g}, {beta:g}" for lr, beta in columns)], rows)


def limit_table():
    limit, curve, rows = stored("limit"), limit_curve(), []
    rows.append(["0", *(f"{limit[f'ref_{key}']:.2f}" for key in ("reward", "gold")), "", ""])
    for kl in (0.5, 1, 2, 3, 4):
        near = min(curve, key=lambda row: abs(row["kl"] - kl))
        values = (limit[f"ref_{key}"] + limit_gain(kl, key) for key in ("reward", "gold"))
        rows.append(
            [
                f"{kl:g}",
                *(f"{x:.2f}" for x in values),
                f"{near['ess']:.0f}",
                f"{near['more_than_half']:.3f}",
            ]
        )
    for row in limit["best_of_n"]:
        if row["n"] in (4, 16, 64, 256):
            rows.append(
                [
                    f"best of {row['n']}, ≤ {row['kl']:.2f}",
                    f"{row['reward']:.2f}",
                    f"{row['gold']:.2f}",
                    "",
                    "",
                ]
            )
    head = [
        "KL",
        "reward",
        "gold of the same policy",
        "effective samples a prompt",
        "more than with half of them",
    ]
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
        start = (
            f"{mean(falls):.1f} ({min(falls):.1f} to {max(falls):.1f})" if falls else "none fell"
        )
        rows.append(
            [NAMES[script], len(runs), f"{top['gold']:.2f} at {top['kl']:.1f}", len(falls), start]
        )
    return table(
        [
            "algorithm",
            "runs",
            "highest gold, at KL",
            "runs whose gold falls",
            "KL where it begins to",
        ],
        rows,
    )


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
            rows.append(
                [
                    NAMES[script],
                    s,
                    gains,
                    *(cell(end[key] for _, end in ends) for key in ("gold", "kl")),
                ]
            )
    rows = sorted(
        {tuple(row) for row in rows}, key=lambda row: ([*NAMES.values()].index(row[0]), row[1])
    )
    return table(["algorithm", "s", "gain in reward", "gold", "KL"], rows)


def clipping_table():
    rows = []
    for (script, lr, clip), runs in groups(
        stored("clipping"), "script", "learning_rate", "clip_range"
    ).items():
        ends = [run["frontier"][-1] for run in runs]
        clipped = [run["metrics"][-1]["policy/clipfrac"] for run in runs]
        row = [
            NAMES[script],
            f"{lr:g}",
            f"{clip:g}",
            *(cell((share(r, kl) for r in runs), 0, 100) for kl in KLS),
        ]
        row += [cell(p[key] for p in ends) for key in ("kl", "reward", "gold")]
        rows.append([*row, f"{100 * mean(clipped):.0f}"])
    head = ["algorithm", "lr", "ε", *(f"% of the limit's gain at KL ≤ {kl:g}" for kl in KLS)]
    return table([*head, "KL at the end", "reward", "gold", "% clipped, last update"], rows)


def responses_table():
    rows = []
    for (k,), runs in groups(stored("responses"), "num_responses").items():
        ends = [run["frontier"][-1] for run in runs]
        row = [k, *(cell((share(run, kl) for run in runs), 0, 100) for kl in KLS)]
        rows.append([*row, *(cell(p[key] for p in ends) for key in ("kl", "reward", "gold"))])
    head = ["K", *(f"% of the limit's gain at KL ≤ {kl:g}" for kl in KLS)]
    return table([*head, "KL at the end", "reward", "gold"], rows)


def end_share(run):
    """Part of the limit's gain at the KL where a run ends."""
    end = run["frontier"][-1]
    return (end["reward"] - stored("limit")["ref_reward"]) / limit_gain(end["kl"])


def tails_table():
    rows = []
    for (lr, clip, seed), (run,) in groups(
        stored("tails"), "learning_rate", "clip_range", "seed"
    ).items():
        worst = max(run["frontier"], key=lambda p: p["kl_se"])
        row = [f"{lr:g}", f"{clip:g}", seed, *(f"{100 * share(run, kl):.0f}" for kl in KLS[:2])]
        rows.append(
            [
                *row,
                f"{worst['kl']:.2f} ± {worst['kl_se']:.2f}",
                f"{256 * (1 - worst['eos_rate']):.0f}",
            ]
        )
    head = ["lr", "ε", "seed", *(f"% of the limit's gain at KL ≤ {kl:g}" for kl in KLS[:2])]
    return table([*head, "the KL of the widest standard error", "responses of 256 cut there"], rows)


def budget_table():
    rows = []
    for (script, lr, beta), runs in groups(
        stored("budget"), "script", "learning_rate", "beta"
    ).items():
        ends = [run["frontier"][-1] for run in runs]
        row = [
            NAMES[script],
            f"{lr:g}",
            f"{beta:g}",
            *(cell((share(run, kl) for run in runs), 0, 100) for kl in KLS),
        ]
        row += [
            cell((end_share(run) for run in runs), 0, 100),
            *(cell(p[key] for p in ends) for key in ("kl", "gold")),
        ]
        rows.append(row)
    head = ["algorithm", "lr", "β", *(f"% of the limit's gain at KL ≤ {kl:g}" for kl in KLS)]
    return table([*head, "at the KL where it ends", "this KL", "gold there"], rows)


def search_table():
    rows = []
    for run in sorted(stored("search"), key=lambda run: order([run["settings"]["script"]])):
        flags, end = run["settings"], run["frontier"][-1]
        k = flags.get("num_responses", 2)
        more = "twice the minibatch" if flags.get("minibatch_size", 32 // k) != 32 // k else ""
        more = "2 epochs" if "num_epochs" in flags else more
        row = [NAMES[flags["script"]], k, f"{flags['learning_rate']:g}", f"{flags['beta']:g}", more]
        rows.append(
            [*row, *(f"{100 * x:.0f}" for x in (*(share(run, kl) for kl in KLS), end_share(run)))]
        )
        rows[-1].append(f"{end['kl']:.2f}")
    head = ["algorithm", "K", "lr", "β", "other", *(f"% at KL ≤ {kl:g}" for kl in KLS)]
    return table([*head, "at the KL where it ends", "this KL"], rows)


def flipped(dataset):
    """Per cent of labels flipped, the end of the folder's name."""
    return int(dataset.rpartition("_")[2])


def labels_table():
    rows = []
    for (script, lr, beta, dataset), runs in groups(
        stored("labels"), "script", "learning_rate", "beta", "dataset"
    ).items():
        row = [
            NAMES[script],
            f"{lr:g}",
            f"{beta:g}",
            f"{flipped(dataset)} % flipped" if flipped(dataset) else "right",
        ]
        for step in (100, 200, 400):
            points = [p for run in runs for p in run["frontier"] if p["step"] == step]
            row.append(
                " / ".join(
                    f"{mean(p[key] for p in points):.2f}" for key in ("reward", "gold", "kl")
                )
            )
        rows.append(row)
    head = [
        "algorithm",
        "lr",
        "β (IPO: τ)",
        "labels",
        "reward / gold / KL after 1 epoch",
        "2 epochs",
        "4 epochs",
    ]
    return "![Gold and KL over epochs](figures/labels.png)\n\n" + table(head, rows)


def reward_models():
    """What is known of the reward models of the part `rewards`, by the number of pairs, flipped labels last."""
    used = {run["settings"]["reward_model"] for run in stored("rewards")}
    found = {model: known for model, known in dict(stored("made")).items() if model in used}
    return dict(sorted(found.items(), key=lambda item: (item[1]["flipped"], item[1]["pairs"])))


def learned_from(known):
    return f"{known['pairs']:,} pairs" + (
        f", {known['flipped']} % flipped" if known["flipped"] else ""
    )


def rewards_table():
    found, rows = groups(stored("rewards"), "reward_model", "script"), []
    for model, known in reward_models().items():
        for script in NAMES:
            if runs := found.get((model, script)):
                values = (cell(last_value(run["frontier"], kl) for run in runs) for kl in KLS)
                row = [
                    learned_from(known),
                    f"{100 * known['rm/eval_accuracy']:.1f} %",
                    NAMES[script],
                    *values,
                ]
                rows.append([*row, cell(run["frontier"][-1]["kl"] for run in runs)])
    head = [
        "reward model of",
        "held-out accuracy",
        "algorithm",
        *(f"gold at KL ≤ {kl:g}" for kl in KLS),
    ]
    return "![Gold over KL](figures/rewards.png)\n\n" + table([*head, "KL at the end"], rows)


def scale_table():
    """The reference is the mean of the evaluations before training, one a seed."""
    made, rows = dict(stored("made")), []
    found = {model: runs for (model,), runs in groups(stored("scale"), "model").items()}
    for model, runs in sorted(found.items(), key=lambda item: made[item[0]]["parameters"]):
        known = made[model]
        loss = f"{known['sft/eval_loss']:.3f}" if "sft/eval_loss" in known else ""
        seconds = mean(row["time/update"] for run in runs for row in run["metrics"])
        for key, value in (("reward", path_value), ("gold", last_value)):
            start = mean(run["frontier"][0][key] for run in runs)
            row = [
                f"{known['parameters'] / 1e6:.2f} M",
                loss,
                f"{seconds:.1f}",
                key,
                f"{start:.2f}",
            ]
            for kl in KLS:
                reached = [value(run["frontier"], kl, key) for run in runs]
                row.append(f"{cell(reached)} ({mean(reached) - start:+.2f})")
            rows.append(row)
    head = ["parameters", "held-out loss", "seconds an update", "what", "before training"]
    return table([*head, *(f"at KL ≤ {kl:g} (gain)" for kl in KLS)], rows)


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
    head = [
        "algorithm",
        "lr",
        "β",
        "weight, first update",
        "its deviation",
        "weight, last update",
        "its deviation",
    ]
    return table(head, rows)


def variance_table():
    rows = stored("variance")
    head = [f"{key} responses" if key[-1].isdigit() else key for key in rows[0]]
    return table(
        head, [[f"{row.pop('s'):g}", *(f"{value:.2f}" for value in row.values())] for row in rows]
    )


TABLES = {
    "limit": limit_table,
    "grid": grid_table,
    "seeds": shares_table,
    "gold": gold_table,
    "translation": translation_table,
    "clipping": clipping_table,
    "responses": responses_table,
    "search": search_table,
    "tails": tails_table,
    "budget": budget_table,
    "labels": labels_table,
    "rewards": rewards_table,
    "scale": scale_table,
    "weights": weights_table,
    "variance": variance_table,
}


def with_tables(page):
    """The page with every table made anew, none where there are no results yet; a name without a table is an error."""

    def made(match):
        if not stored({"gold": "seeds", "weights": "seeds"}.get(match[2], match[2])):
            return f"{match[1]}\n{match[3]}"
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
    frontier_figure(
        "gold", "frontier_gold.png", "The true reward of the same runs, which none of them saw"
    )
    if stored("budget"):
        frontier_figure(
            "reward", "budget.png", "Reward over KL at the scripts' own budget", "budget"
        )
    gold_figure()
    for part, draw in (("labels", labels_figure), ("rewards", rewards_figure)):
        if stored(part):
            draw()
