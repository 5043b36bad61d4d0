"""The study: its tables in docs/results.md are its stored results, and these are of the runs that it names."""

import json
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import study  # noqa: E402
import study_data  # noqa: E402
import study_figures  # noqa: E402
import study_variance  # noqa: E402

STORED = [part for part in study.PARTS if study_figures.stored(part)]


def test_tables_of_the_page_are_the_stored_results():
    page = study_figures.PAGE.read_text()
    shown = re.findall(r"<!-- study (\w+) -->", page)
    assert {*STORED, "limit", "variance"} <= {*shown} and len(shown) == len({*shown})
    assert study_figures.with_tables(page) == page


@pytest.mark.parametrize("part", STORED)
def test_stored_runs_are_those_of_the_study_each_once(part):
    found = [json.dumps(run["settings"], sort_keys=True) for run in study_figures.stored(part)]
    wanted = [json.dumps(settings, sort_keys=True) for settings in study.PARTS[part]()]
    assert sorted(found) == sorted(wanted)


def test_value_on_a_path_is_the_best_within_a_kl():
    points = [{"kl": kl, "reward": reward} for kl, reward in ((0, 1), (2, 3), (1, 4), (5, 8))]
    for kl, best in ((0, 1), (0.5, 1.5), (1, 4), (2, 5), (3, 6), (5, 8), (9, 8)):
        assert study_figures.path_value(points, kl) == pytest.approx(best), kl


def test_last_value_on_a_path_is_that_of_its_last_point_within_a_kl():
    points = [{"kl": kl, "gold": gold} for kl, gold in ((0, 1), (2, 3), (1, 4), (5, 8))]
    for kl, last in ((0, 1), (0.5, 1.5), (1, 4), (3, 6), (5, 8), (9, 8)):
        assert study_figures.last_value(points, kl) == pytest.approx(last), kl


def test_a_part_without_results_has_no_table(monkeypatch, tmp_path):
    monkeypatch.setattr(study_figures, "RESULTS", tmp_path)
    text = "{}<!-- study labels -->\n{}<!-- end -->\n"
    assert study_figures.with_tables(text.format("a", "\n| b |\n\n")) == text.format("a", "")


def test_tables_and_figures_of_what_needs_data_are_made_of_their_runs(monkeypatch, tmp_path):
    """The runs are made up: the settings of each part with the frontier of a stored run."""
    parts = {part: study.PARTS[part]() for part in ("labels", "rewards", "scale", "clipping")}
    run = study_figures.stored("seeds")[0]
    frontier = [run["frontier"][i] | {"step": 100 * i} for i in range(7)]
    runs = {
        part: [{**run, "settings": x, "frontier": frontier} for x in flags]
        for part, flags in parts.items()
    }
    models = [
        x[key]
        for flags in parts.values()
        for x in flags
        for key in ("model", "reward_model")
        if key in x
    ]
    known = {"parameters": 9, "pairs": 1200, "flipped": 30, "rm/eval_accuracy": 0.5}
    files = {**runs, "made": dict.fromkeys(models, known), "limit": study_figures.stored("limit")}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(study_figures, "RESULTS", tmp_path)
    monkeypatch.setattr(study_figures, "FIGURES", tmp_path)
    for part, rows in {"labels": 12, "rewards": 12, "scale": 6, "clipping": 16}.items():
        lines = study_figures.TABLES[part]().splitlines()
        assert sum(line.startswith("| ") for line in lines) == rows + 2, part
    study_figures.labels_figure(), study_figures.rewards_figure()
    assert {path.name for path in tmp_path.glob("*.png")} == {"labels.png", "rewards.png"}


@pytest.mark.parametrize("part", study.PARTS)
def test_settings_name_no_place_of_this_machine_and_only_data_that_can_be_made(part):
    runs = study.PARTS[part]()
    assert not [x for run in runs for x in run.values() if str(x).startswith("/")]
    assert study_data.needed(runs) <= {*study_data.PAIRS, *study_data.trainings()}


def test_pairs_are_tinys_with_the_labels_that_are_asked_for(tmp_path):
    data, found = ROOT / "tiny/data", {}
    rows = [json.loads(line) for line in open(data / "train.jsonl")][:200]
    for asked in ((200, False, 0), (200, False, 30), (200, True, 0), (200, True, 30)):
        study_data.write_pairs(tmp_path, *asked)
        found[asked[1:]] = [json.loads(line) for line in open(tmp_path / "train.jsonl")]
        assert (tmp_path / "test.jsonl").read_bytes() == (data / "test.jsonl").read_bytes()
        assert [row["prompt"] for row in found[asked[1:]]] == [row["prompt"] for row in rows]
    assert found[False, 0] == rows
    gold = study_data.gold.gold_reward
    right = [
        gold([r["prompt"]], [r["chosen"]]) > gold([r["prompt"]], [r["rejected"]])
        for r in found[True, 0]
    ]
    assert all(right)
    for by_gold in (False, True):
        pairs = zip(found[by_gold, 0], found[by_gold, 30])
        changed = [(a, b) for a, b in pairs if a != b]
        assert len(changed) == 60 and all(a["chosen"] == b["rejected"] for a, b in changed)


def test_variances_are_those_that_are_stored():
    torch = study_variance.torch
    probs, rewards = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    found, shifted = (study_variance.variances(probs, rewards + shift) for shift in (0, 7))
    assert found["PPG"] == pytest.approx(shifted["PPG"]) and shifted["VPG"] > 10 * found["VPG"]
    samples = torch.multinomial(
        probs, 400_000, replacement=True, generator=torch.Generator().manual_seed(0)
    ).view(-1, 4)
    scores = torch.eye(3).double() - probs
    for K in (2, 4):  # drawn instead of summed
        r, s = rewards[samples[:, :K]], scores[samples[:, :K]]
        i, j = torch.combinations(torch.arange(K)).T
        drawn = ((r[:, i] - r[:, j])[..., None] * (s[:, i] - s[:, j]) / 2).mean(1)
        name = "PPG" if K == 2 else f"PPG, {K}"
        assert found[name] == pytest.approx(K / 2 * drawn.var(0).sum().item(), rel=0.02), K
    study_variance.PROMPTS = 3  # the page's own are of 200
    assert [row["s"] for row in study_figures.stored("variance")] == list(study_variance.SHIFTS)
