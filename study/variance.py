"""Exact variance of policy-gradient estimates, on a policy whose responses can be enumerated.

    python study/variance.py

A softmax policy over 30 responses to each of 200 prompts. Rewards are N(0, 2²) within a prompt,
plus δ(x) ~ N(0, s²) of the prompt. An estimate uses two responses y_1, y_2 ~ π. Its variance is the
trace of its covariance, averaged over prompts. All estimates have the same mean, ∇E[r].

    VPG                 ½ Σ_i r_i ∇log π(y_i)
    VPG, prompt mean    ½ Σ_i (r_i − E[r|x]) ∇log π(y_i)      the baseline of a perfect value model
    PPG                 ½ (r_1 − r_2) ∇(log π(y_1) − log π(y_2))
    PPG, K              K/2 times its mean over all pairs of K responses, so per two responses

Writes study/results/variance.json.
"""

import json
from pathlib import Path

import torch

PROMPTS, RESPONSES, SHIFTS = 200, 30, (0.0, 1.0, 3.0, 10.0)


def variances(probs, rewards):
    """Trace of the covariance of the three estimates for one prompt; probs, rewards: [M]. Exact."""
    scores = torch.eye(len(probs), dtype=probs.dtype) - probs  # ∇log π(y) of every response, [M, M]
    pairs = probs[:, None] * probs  # [M, M]
    mean = probs @ rewards
    gradient = (probs * (rewards - mean)) @ scores
    found = {}
    for name, r in (("VPG", rewards), ("VPG, prompt mean", rewards - mean)):
        single = r[:, None] * scores
        estimate = (single[:, None] + single) / 2  # [M, M, M]
        found[name] = estimate
    found["PPG"] = ((rewards[:, None] - rewards)[..., None] * (scores[:, None] - scores)) / 2
    for name, estimate in found.items():
        assert torch.allclose((pairs[..., None] * estimate).sum((0, 1)), gradient, atol=1e-9), name
        found[name] = (pairs * (estimate - gradient).square().sum(-1)).sum().item()
    given_first = (probs[:, None] * estimate).sum(1) - gradient  # of PPG: its mean over y_2, [M, M]
    one = (probs * given_first.square().sum(-1)).sum().item()
    for K in (4, 8):  # Hoeffding's variance of a mean over all pairs
        found[f"PPG, {K}"] = K / 2 * (2 * (K - 2) * one + found["PPG"]) / (K * (K - 1) / 2)
    return found


def main():
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logits, rewards, shifts = (
        1.5 * draw(PROMPTS, RESPONSES),
        2 * draw(PROMPTS, RESPONSES),
        draw(PROMPTS),
    )
    rows = []
    for s in SHIFTS:
        found = [variances(p.softmax(0), r + s * d) for p, r, d in zip(logits, rewards, shifts)]
        rows.append(
            {"s": s, **{name: round(sum(f[name] for f in found) / PROMPTS, 4) for name in found[0]}}
        )
        print(rows[-1])
    file = Path(__file__).parent / "results" / "variance.json"
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
