"""The study: its tables in docs/results.md are its stored results, and these are of the runs that it names."""

import json
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import study  # noqa: E402
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


def test_variances_are_those_that_are_stored():
    torch = study_variance.torch
    probs, rewards = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    found, shifted = (study_variance.variances(probs, rewards + shift) for shift in (0, 7))
    assert found["PPG"] == pytest.approx(shifted["PPG"]) and shifted["VPG"] > 10 * found["VPG"]
    samples = torch.multinomial(probs, 400_000, replacement=True, generator=torch.Generator().manual_seed(0)).view(
        -1, 4
    )
    scores = torch.eye(3).double() - probs
    for K in (2, 4):  # drawn instead of summed
        r, s = rewards[samples[:, :K]], scores[samples[:, :K]]
        i, j = torch.combinations(torch.arange(K)).T
        drawn = ((r[:, i] - r[:, j])[..., None] * (s[:, i] - s[:, j]) / 2).mean(1)
        name = "PPG" if K == 2 else f"PPG, {K}"
        assert found[name] == pytest.approx(K / 2 * drawn.var(0).sum().item(), rel=0.02), K
    study_variance.PROMPTS = 3  # the page's own are of 200
    assert [row["s"] for row in study_figures.stored("variance")] == list(study_variance.SHIFTS)
