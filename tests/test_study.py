"""The study: tables are the stored results, runs those of the settings, your script is ranked."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "study")]
import figures  # noqa: E402
import models  # noqa: E402
import settings  # noqa: E402
import variance  # noqa: E402

import p3o_v2  # noqa: E402

FIGURES = {f"{name}.png" for name in "frontier frontier_gold seeds epochs labels rewards".split()}


def has(part):
    """Are all runs of a part stored?"""
    known = [run["settings"] for run in figures.stored(part)]
    return all(flags in known for flags in settings.PARTS[part]())


COMPLETE = [part for part in settings.PARTS if has(part)]


# --------------------------------------------------------------------------------- stored results
def test_tables_of_both_pages_are_the_stored_results():
    figures.main(only_check=True)
    for page in figures.PAGES:
        shown = re.findall(r"<!-- table (\w+) -->", page.read_text())
        assert len(shown) == len({*shown})
    shown = re.findall(r"<!-- table (\w+) -->", figures.PAGES[0].read_text())
    assert {*shown} == {*figures.TABLES}


def test_a_table_that_is_not_of_the_results_is_found(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table limit -->\n| 1 |\n<!-- end -->\nb\n")
    monkeypatch.setattr(figures, "PAGES", [page])
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="page.md differs"):
        figures.main(only_check=True)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)  # nothing is stored there
    expected = "a\n<!-- table limit -->\n\nNot run yet.\n\n<!-- end -->\nb\n"
    assert figures.with_tables(page.read_text()) == expected


def test_figures_of_stored_runs_are_drawn_and_no_others_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    figures.draw_figures()
    drawn = {file.name for file in tmp_path.iterdir()}
    kept = {file.name for file in (ROOT / "docs/figures").iterdir()}
    assert {"seeds.png", "labels.png", "rewards.png"} <= drawn <= kept <= FIGURES


@pytest.mark.parametrize("part", COMPLETE)
def test_stored_runs_are_those_of_the_settings_each_once(part):
    found = [json.dumps(run["settings"], sort_keys=True) for run in figures.stored(part)]
    asked = [json.dumps(flags, sort_keys=True) for flags in settings.PARTS[part]()]
    assert sorted(found) == sorted(asked)


@pytest.mark.skipif("search" not in COMPLETE, reason="the search is not complete")
def test_the_settings_of_the_budget_are_the_best_of_the_search():
    for script, runs in figures.by_script(figures.stored("search")).items():
        best = max(runs, key=figures.mean_share)["settings"]
        assert settings.FOUND[script] == (best["learning_rate"], best["beta"])


def test_the_settings_of_the_seeds_are_the_best_two_of_the_grid():
    def mean_reward(run):  # the criterion of the time; shares came later
        best_within = figures.plot_frontier.best_within
        return mean(best_within(run["frontier"], kl)["reward"] for kl in settings.KLS)

    for script, runs in figures.by_script(figures.stored("grid")).items():
        best = sorted(runs, key=mean_reward)[-2:]
        assert {*settings.SMALL_BEST[script]} == {*figures.by_pair(best)}
        assert settings.SMALL_BEST[script][0] in figures.by_pair(best[1:])


@pytest.mark.parametrize("part", settings.PARTS)
def test_settings_name_no_absolute_path_and_only_data_that_can_be_made(part):
    runs = settings.PARTS[part]()
    assert not [value for run in runs for value in run.values() if str(value).startswith("/")]
    assert models.needed(runs) <= {*settings.PAIRS, *models.trainings()}


def test_the_example_of_the_benchmark_shows_stored_results():
    text = (ROOT / "docs/benchmark.md").read_text()
    runs = {"P3O-V2": figures.by_script(figures.stored("budget"))["p3o_v2"]}
    for name, found in {**runs, "rebel": figures.stored("rebel")}.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"{name}  ")]
        *expected, _ = map(str, figures.row_of(name, found))  # without the seconds
        assert line.split() == " ".join(expected).split()


def test_share_is_1_on_the_limit_and_0_at_the_reference_with_straight_lines_between():
    limit = figures.stored("limit")
    curve = [{"kl": 0.0, "reward": limit["ref_reward"]}]
    curve += [{"kl": row["kl"], "reward": row["reward"]} for row in limit["curve"]]
    assert [figures.share({"frontier": curve}, kl) for kl in (1, 2, 4)] == pytest.approx([1, 1, 1])
    assert figures.mean_share({"frontier": curve[:1]}) == 0
    frontier = [{"kl": kl, "reward": reward} for kl, reward in ((0, 1), (2, 3), (1, 4), (5, 8))]
    best = [figures.share({"frontier": frontier}, kl) * figures.limit_gain(kl) for kl in (1, 2, 4)]
    expected = [4, 5, 7]  # a path may come back to a smaller KL
    assert [x + limit["ref_reward"] for x in best] == pytest.approx(expected)


# ------------------------------------------------------------------------------ what parts are of
def test_pairs_are_tinys_with_the_labels_that_are_asked_for(tmp_path):
    data, found = ROOT / "tiny/data", {}
    rows = [json.loads(line) for line in open(data / "train.jsonl")][:200]
    for asked in ((200, False, 0), (200, False, 30), (200, True, 0), (200, True, 30)):
        models.write_pairs(tmp_path, *asked)
        found[asked[1:]] = [json.loads(line) for line in open(tmp_path / "train.jsonl")]
        assert (tmp_path / "test.jsonl").read_bytes() == (data / "test.jsonl").read_bytes()
        assert [row["prompt"] for row in found[asked[1:]]] == [row["prompt"] for row in rows]
    assert found[False, 0] == rows
    gold = models.gold.gold_reward
    for row in found[True, 0]:
        right, wrong = gold([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert right > wrong
    for by_gold in (False, True):
        pairs = zip(found[by_gold, 0], found[by_gold, 30])
        changed = [(a, b) for a, b in pairs if a != b]
        assert len(changed) == 60 and all(a["chosen"] == b["rejected"] for a, b in changed)


def test_shifted_rewards_are_the_reward_models_scores_plus_one_number_a_prompt():
    rewards = importlib.import_module("rewards")  # loads its model
    rows = [json.loads(line) for line in open(ROOT / "tiny/data/test.jsonl")][:6]
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    responses = [row[key] for row in rows for key in ("chosen", "rejected")]
    tensor, end = rewards.torch.tensor, [rewards.tokenizer.eos_token_id]
    xs = [tensor(ids) for ids in rewards.tokenizer(prompts).input_ids]
    ys = [[tensor(ids + end)] for ids in rewards.tokenizer(responses).input_ids]
    with rewards.torch.no_grad():
        expected = p3o_v2.response_scores(rewards.model, xs, ys).flatten().tolist()
    assert rewards.scores(prompts, responses) == pytest.approx(expected, abs=1e-4)
    shifts = [b - a for a, b in zip(expected, rewards.shift_10(prompts, responses))]
    assert shifts[::2] == pytest.approx(shifts[1::2], abs=1e-3) and len({*shifts}) > 5


def test_variances_are_those_of_drawn_samples_and_without_shift():
    torch = variance.torch
    probs, rewards = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    found, shifted = (variance.variances(probs, rewards + shift) for shift in (0, 7))
    assert found["PPG"] == pytest.approx(shifted["PPG"]) and shifted["VPG"] > 10 * found["VPG"]
    generator = torch.Generator().manual_seed(0)
    samples = torch.multinomial(probs, 400_000, replacement=True, generator=generator).view(-1, 4)
    scores = torch.eye(3).double() - probs
    for K in (2, 4):  # drawn instead of summed
        r, s = rewards[samples[:, :K]], scores[samples[:, :K]]
        i, j = torch.combinations(torch.arange(K)).T
        drawn = ((r[:, i] - r[:, j])[..., None] * (s[:, i] - s[:, j]) / 2).mean(1)
        name = "PPG" if K == 2 else f"PPG, {K}"
        assert found[name] == pytest.approx(K / 2 * drawn.var(0).sum().item(), rel=0.02), K
    assert [row["s"] for row in figures.stored("variance")] == list(variance.SHIFTS)


# ----------------------------------------------------------------------------- your own algorithm
SCRIPT = """
import json, sys, time
from pathlib import Path

flags = dict(word[2:].split("=") for word in sys.argv[1:] if "=" in word)
rate, beta = float(flags.get("learning-rate", 1e-3)), float(flags.get("beta", 0.5))
seed, folder = int(flags.get("seed", 1)), Path(flags["output-dir"])
with open(Path(__file__).parents[1] / "made", "a") as made:
    made.write(f"{rate:g} {beta:g} {seed} {'first' * ('num-updates' in flags)}\\n")
while seed > 1 and (Path(__file__).parents[1] / "wait").exists():
    time.sleep(0.05)
if (rate, beta) == (2e-3, 2):
    sys.exit("diverged")
folder.mkdir(parents=True, exist_ok=True)
record = {"learning_rate": rate, "beta": beta, "num_updates": 2, "prompts_per_update": 4}
(folder / "args.json").write_text(json.dumps(record))
gain = 5 - abs(rate - 2e-3) * 1000 - abs(beta - 0.5) + seed / 100
keys = "kl_se kl_k1 reward_se gold_se length eos_rate win_rate_vs_sft".split()
with open(folder / "frontier.jsonl", "w") as frontier, open(folder / "metrics.jsonl", "w") as log:
    for step, kl in enumerate((0.0, 1.0, 4.5)):
        point = {"step": step, "kl": kl, "reward": 1 + step / 2 * gain, "gold": 1 + step}
        frontier.write(json.dumps(point | dict.fromkeys(keys, 0.1)) + "\\n")
        log.write(json.dumps({"step": step, "time/update": 0.1}) + "\\n")
"""


@pytest.fixture
def mine(tmp_path):
    """A script of one's own that ends at once; twice its learning rate is best."""
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    return script


def start(script):
    command = [sys.executable, ROOT / "study/run.py", "--script", script]
    command += ["--output-dir", script.parent]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True)


def made(script):
    """Learning rate, β and seed of the runs so far, without those that ask for its defaults."""
    file = script.with_name("made")
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.strip() for line in lines if "first" not in line]


def ranked(script):
    """The row of the script, the whole output, and the runs that were made for it."""
    script.with_name("made").unlink(missing_ok=True)
    process = start(script)
    output, error = process.communicate()
    assert process.returncode == 0, error
    rows = output[output.index("\nalgorithm ") :].splitlines()
    [row] = [line for line in rows if line.startswith("mine ")]
    return row, output, made(script)


SEEDS = [f"0.002 0.5 {seed}" for seed in settings.SEEDS[:3]]
FAILED = "0.002 2 1"


def test_a_script_is_ranked_once_and_a_setting_that_fails_is_left_out_and_said(mine):
    row, output, runs = ranked(mine)
    assert len({*runs}) == len(runs) == 9 + 3 and sorted(runs[9:]) == SEEDS
    assert row.split()[1:4] == ["0.002", "0.5", "3"]
    assert "learning_rate=0.002 beta=2.0 seed=1\n    diverged" in output
    assert (mine.parent / "mine/frontier.png").exists()
    again, _, runs = ranked(mine)
    assert again == row and runs == [FAILED]  # tried again
    mine.write_text(SCRIPT + "# edited")
    again, _, runs = ranked(mine)
    assert again == row and len(runs) == 9 + 3


def test_a_ranking_that_was_killed_goes_on(mine):
    wait = mine.with_name("wait")
    wait.touch()
    process = start(mine)
    while len(made(mine)) <= 9:  # until a seed runs
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait.unlink()
    _, _, runs = ranked(mine)
    assert sorted(runs) == sorted([FAILED, *SEEDS])


def test_a_script_that_cannot_be_ranked_ends_with_one_sentence(mine):
    no_evaluation = SCRIPT.replace("(0.0, 1.0, 4.5)", "()")
    no_rate = SCRIPT.replace('"learning_rate": rate, ', "")
    no_gold = SCRIPT.replace('"gold": 1 + step', '"gold": float("nan")')
    texts = {
        None: "no such file",
        no_evaluation: "no evaluation in ",
        no_gold: "no finite gold in ",
    }
    for text, expected in {**texts, no_rate: "wrote no learning_rate to "}.items():
        mine.write_text(text) if text else mine.unlink()
        process = start(mine)
        _, error = process.communicate()
        [line] = [line for line in error.splitlines() if line.startswith("run.py: ")]
        assert process.returncode == 2 and expected in line and "Traceback" not in error
