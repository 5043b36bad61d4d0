"""The loss of P3O-V2, and the reward pipeline in p3o_v1.py, against the formulas, written out here in plain float64."""

import itertools
import math

import pytest
import torch

from p3o_v1 import centre_and_scale
from p3o_v2 import pairwise_loss

R = 10.0
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def random_batch(B, K, seed=0, spread=0.3, dtype=torch.float64):
    """log π_θ, log π_old, log π_ref, rewards; `spread` is how far π_θ has moved away from π_old, in nats."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, B, K, dtype=torch.float64, generator=generator).to(dtype)
    logps = -40 + 10 * normal[0]
    return logps, logps - spread * normal[1], logps + 10 * normal[2], normal[3]


def loss_and_gradient(logps, *others):
    """pairwise_loss and its gradient with respect to log π_θ."""
    logps = logps.clone().requires_grad_()
    loss, _ = pairwise_loss(logps, *others)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def plain(logps, old_logps, ref_logps, rewards, beta, clip_range, ratio_bound):
    """The formulas of P3O-V2, a pair at a time: the value, the gradient, and (q, w, Δ, is it clipped) of every pair."""
    l, old, ref, r = (x.tolist() for x in (logps, old_logps, ref_logps, rewards))
    B, K = logps.shape
    pairs = list(itertools.combinations(range(K), 2))
    value, gradient, seen = 0.0, [[0.0] * K for _ in range(B)], []
    for b in range(B):
        for i, j in pairs:
            q = (r[b][i] - r[b][j]) - beta * ((l[b][i] - ref[b][i]) - (l[b][j] - ref[b][j]))
            log_ratio_i, log_ratio_j = l[b][i] - old[b][i], l[b][j] - old[b][j]
            w = min(
                max(math.exp(log_ratio_i) * math.exp(log_ratio_j), 1 / ratio_bound), ratio_bound
            )
            delta = log_ratio_i - log_ratio_j
            loss = -q * w * delta
            clipped_loss = -q * w * min(max(delta, -clip_range), clip_range) if clip_range else loss
            is_clipped = clipped_loss > loss
            value += 0.5 * max(loss, clipped_loss) / (B * len(pairs))
            if not is_clipped:
                gradient[b][i] -= 0.5 * q * w / (B * len(pairs))
                gradient[b][j] += 0.5 * q * w / (B * len(pairs))
            seen.append((q, w, delta, is_clipped))
    return value, torch.tensor(gradient, dtype=torch.float64), seen


# ------------------------------------------------------------------------------------------------- against the formulas
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0])
def test_value_gradient_and_metrics_are_those_of_the_formulas(K, clip_range, spread):
    batch = random_batch(B=20, K=K, spread=spread)
    options = (0.05, clip_range, R)
    value, gradient, seen = plain(*batch, *options)
    found_value, found_gradient = loss_and_gradient(*batch, *options)
    torch.testing.assert_close(found_value.item(), value, **CLOSE)
    torch.testing.assert_close(found_gradient, gradient, **CLOSE)

    _, metrics = pairwise_loss(*batch, *options)
    ratios = (batch[0] - batch[1]).exp()
    weights = torch.tensor([0.5 * q * w for q, w, _, _ in seen], dtype=torch.float64)
    expected = {
        "policy/loss": value,
        "policy/clipfrac": sum(is_clipped for *_, is_clipped in seen) / len(seen),
        "policy/pair_weight_mean": weights.mean().item(),
        "policy/pair_weight_std": weights.std(correction=0).item(),
        "policy/ratio_mean": ratios.mean().item(),
        "policy/ratio_max": ratios.max().item(),
    }
    torch.testing.assert_close({key: metrics[key].item() for key in expected}, expected, **CLOSE)


def test_the_random_batches_meet_every_case():
    """Both signs of q, products of ratios on both sides of [1/R, R], Δ on both sides of ±ε, clipped or not."""
    seen = plain(*random_batch(B=20, K=3, spread=2.0), 0.05, 0.2, R)[2]
    assert {(q > 0, is_clipped) for q, _, _, is_clipped in seen} == set(
        itertools.product([True, False], repeat=2)
    )
    assert {w for _, w, _, _ in seen} >= {R, 1 / R}
    assert {(q > 0, delta > 0) for q, _, delta, _ in seen if abs(delta) > 0.2} == set(
        itertools.product([True, False], repeat=2)
    )


def test_metrics_are_detached_scalars():
    logps, *others = random_batch(B=4, K=3)
    loss, metrics = pairwise_loss(logps.requires_grad_(), *others, 0.05, 0.2, R)
    assert loss.ndim == 0 and loss.requires_grad
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    loss, gradient = loss_and_gradient(*random_batch(B=4, K=2, dtype=dtype), 0.05, 0.2, R)
    assert loss.dtype == gradient.dtype == dtype


# ------------------------------------------------------------------------------------------------------- its properties
@pytest.mark.parametrize("K", [2, 3, 4])
def test_what_is_added_to_all_scores_of_a_prompt_has_no_effect(K):
    """Property 1, through the reward pipeline, over several updates: rewards, loss and gradient."""
    running, shifted_running = [0.0, 0], [0.0, 0]
    for update in range(3):
        logps, old_logps, ref_logps, scores = random_batch(B=6, K=K, seed=update)
        delta = 20 * torch.randn(
            6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(update)
        )
        rewards, _ = centre_and_scale(scores, running)
        shifted_rewards, _ = centre_and_scale(scores + delta, shifted_running)
        torch.testing.assert_close(shifted_rewards, rewards, rtol=0, atol=1e-12)
        before = loss_and_gradient(logps, old_logps, ref_logps, rewards, 0.05, 0.2, R)
        after = loss_and_gradient(logps, old_logps, ref_logps, shifted_rewards, 0.05, 0.2, R)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("K", [2, 4])
def test_the_invariance_is_exact_where_the_sums_are(K):
    """Scores in float32 that are small multiples of 1/8, and δ(x) of whole numbers: nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-40, 40, (8, K), generator=generator).float() / 8
    delta = torch.randint(-1000, 1000, (8, 1), generator=generator).float()
    assert torch.equal(
        centre_and_scale(scores, [0.0, 0])[0], centre_and_scale(scores + delta, [0.0, 0])[0]
    )


def test_swapping_two_responses_changes_nothing_else():
    """Property 2; the gradient goes with its response."""
    batch = random_batch(B=8, K=2, spread=1.0)
    loss, gradient = loss_and_gradient(*batch, 0.05, 0.2, R)
    swapped_loss, swapped_gradient = loss_and_gradient(*(x.flip(1) for x in batch), 0.05, 0.2, R)
    assert swapped_loss == loss
    assert torch.equal(swapped_gradient.flip(1), gradient)


def test_the_order_of_many_responses_does_not_matter():
    batch = random_batch(B=8, K=4, spread=1.0)
    order = torch.tensor([2, 0, 3, 1])
    loss, gradient = loss_and_gradient(*batch, 0.05, 0.2, R)
    other_loss, other_gradient = loss_and_gradient(*(x[:, order] for x in batch), 0.05, 0.2, R)
    torch.testing.assert_close((other_loss, other_gradient), (loss, gradient[:, order]), **CLOSE)


@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_on_policy_the_gradient_is_the_pairwise_policy_gradient(clip_range):
    """Property 3: that of PPG and of P3O-V1, whose losses are written here."""
    logps, _, ref_logps, rewards = random_batch(B=8, K=2)
    old_logps, beta = logps.clone(), 0.05
    _, gradient = loss_and_gradient(logps, old_logps, ref_logps, rewards, beta, clip_range, R)

    logps.requires_grad_()
    h = (logps - ref_logps).detach()
    q = (rewards[:, 0] - rewards[:, 1]) - beta * (h[:, 0] - h[:, 1])
    ppg = -0.5 * (q * (logps[:, 0] - logps[:, 1])).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(ppg, logps)[0], **CLOSE)

    ratio = (logps - old_logps).exp()
    w = ratio.detach().clamp(1 / R, R)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) if clip_range else ratio
    v1 = 0.5 * (
        torch.maximum(-q * w[:, 1] * ratio[:, 0], -q * w[:, 1] * clipped[:, 0])
        + torch.maximum(q * w[:, 0] * ratio[:, 1], q * w[:, 0] * clipped[:, 1])
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(v1.mean(), logps)[0], **CLOSE)


def test_on_policy_the_gradient_is_that_of_a_regression_on_reward_differences():
    """Property 4."""
    logps, _, ref_logps, rewards = random_batch(B=8, K=2)
    beta = 0.05
    _, gradient = loss_and_gradient(logps, logps.clone(), ref_logps, rewards, beta, 0.0, R)
    h = logps.requires_grad_() - ref_logps
    errors = (rewards[:, 0] - rewards[:, 1]) - beta * (h[:, 0] - h[:, 1])
    regression = errors.square().mean() / (4 * beta)
    torch.testing.assert_close(gradient, torch.autograd.grad(regression, logps)[0], **CLOSE)


# ----------------------------------------------------------------------------------------- on a policy over 5 responses
def enumerable():
    """The policy's five logits, log π_old and log π_ref of the responses, their rewards."""
    normal = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (
        normal[0].requires_grad_(),
        normal[1].log_softmax(0),
        normal[2].log_softmax(0),
        2 * normal[3],
    )


def expected_gradient(logits, old_logps, ref_logps, rewards, beta, clip_range, ratio_bound, K=2):
    """The mean gradient over all (y_1, …, y_K) drawn from π_old, by an exact sum."""
    logps, total = logits.log_softmax(0), 0.0
    for draw in itertools.product(range(5), repeat=K):
        row = [x[list(draw)][None] for x in (logps, old_logps, ref_logps, rewards)]
        total = (
            total
            + old_logps[list(draw)].sum().exp()
            * pairwise_loss(*row, beta, clip_range, ratio_bound)[0]
        )
    return torch.autograd.grad(total, logits)[0]


def objective_gradient(logits, ref_logps, rewards, beta):
    """∇ −(E[r] − β KL(π_θ ‖ π_ref)), exactly."""
    logps = logits.log_softmax(0)
    objective = (logps.exp() * (rewards - beta * (logps - ref_logps))).sum()
    return torch.autograd.grad(-objective, logits)[0]


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_the_expected_gradient_is_the_objectives(K, clip_range):
    """Property 5."""
    logits, _, ref_logps, rewards = enumerable()
    on_policy = logits.detach().log_softmax(0)
    found = expected_gradient(logits, on_policy, ref_logps, rewards, 0.3, clip_range, R, K)
    torch.testing.assert_close(found, objective_gradient(logits, ref_logps, rewards, 0.3), **CLOSE)


def test_importance_weights_keep_the_expected_gradient_unbiased_off_policy():
    """Samples of π_old, no clipping and a bound out of reach: still the gradient at π_θ."""
    logits, old_logps, ref_logps, rewards = enumerable()
    found = expected_gradient(logits, old_logps, ref_logps, rewards, 0.3, 0.0, 1e9)
    torch.testing.assert_close(found, objective_gradient(logits, ref_logps, rewards, 0.3), **CLOSE)


# ------------------------------------------------------------------------------------------------------ the note's view
def test_implicit_reward_alone_has_the_notes_gradient():
    """β = 0 and rewards βh: −(1/2β) δ_r ∇δ_r."""
    logps, _, ref_logps, _ = random_batch(B=8, K=2)
    beta = 0.1
    rewards = beta * (logps - ref_logps)
    _, gradient = loss_and_gradient(logps, logps.clone(), ref_logps, rewards, 0.0, 0.0, R)
    h = logps.requires_grad_() - ref_logps
    delta_r = beta * (h[:, 0] - h[:, 1])
    expected = torch.autograd.grad(-(delta_r.detach() * delta_r).mean() / (2 * beta), logps)[0]
    torch.testing.assert_close(gradient, expected, **CLOSE)


def test_reward_less_implicit_reward_has_the_notes_gradient():
    """Rewards r: −(1/2β) (Δr − δ_r) ∇δ_r."""
    logps, _, ref_logps, rewards = random_batch(B=8, K=2)
    beta = 0.1
    _, gradient = loss_and_gradient(logps, logps.clone(), ref_logps, rewards, beta, 0.0, R)
    h = logps.requires_grad_() - ref_logps
    delta_r = beta * (h[:, 0] - h[:, 1])
    q = (rewards[:, 0] - rewards[:, 1] - delta_r).detach()
    expected = torch.autograd.grad(-(q * delta_r).mean() / (2 * beta), logps)[0]
    torch.testing.assert_close(gradient, expected, **CLOSE)


def test_implicit_reward_alone_pushes_away_from_the_reference():
    """In expectation its gradient is that of −β KL(π_θ ‖ π_ref)."""
    logits, _, ref_logps, _ = enumerable()
    logps, beta = logits.detach().log_softmax(0), 0.1
    found = expected_gradient(logits, logps, ref_logps, beta * (logps - ref_logps), 0.0, 0.0, R)
    away = -objective_gradient(logits, ref_logps, torch.zeros(5), beta)
    torch.testing.assert_close(found, away, **CLOSE)


# ------------------------------------------------------------------------------------------------ clipping and extremes
@pytest.mark.parametrize("q", [1.0, -1.0])
@pytest.mark.parametrize("delta", [-3.0, -0.21, -0.19, 0.0, 0.19, 0.21, 3.0])
def test_clipping_stops_a_pair_that_has_moved_far_enough_the_way_q_wants(q, delta):
    """And never one that has moved the other way, however far."""
    logps = torch.tensor([[-5.0 + delta / 2, -5.0 - delta / 2]], dtype=torch.float64)
    others = torch.full_like(logps, -5.0), logps, torch.tensor([[q, 0.0]], dtype=torch.float64)
    _, gradient = loss_and_gradient(logps, *others, 0.05, 0.2, R)
    _, metrics = pairwise_loss(logps, *others, 0.05, 0.2, R)
    stopped = delta > 0.2 if q > 0 else delta < -0.2
    expected = (
        torch.zeros(1, 2) if stopped else torch.tensor([[-0.5 * q, 0.5 * q]])
    )  # w is 1: the ratios cancel
    torch.testing.assert_close(gradient, expected.double(), **CLOSE)
    assert metrics["policy/clipfrac"] == stopped


def test_clip_range_0_never_stops_a_gradient():
    batch = random_batch(B=20, K=3, spread=5.0)
    assert (loss_and_gradient(*batch, 0.05, 0.0, R)[1] != 0).all()
    assert pairwise_loss(*batch, 0.05, 0.0, R)[1]["policy/clipfrac"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_extreme_log_probabilities_stay_finite(dtype, clip_range):
    """Every way for the three sums of two responses to be ±10⁴ nats."""
    sums = torch.tensor(list(itertools.product([-1e4, 1e4], repeat=6)), dtype=dtype).view(-1, 3, 2)
    rewards = torch.tensor([10.0, -10.0], dtype=dtype).expand(len(sums), 2)
    loss, gradient = loss_and_gradient(*sums.unbind(1), rewards, 0.05, clip_range, R)
    assert loss.isfinite() and gradient.isfinite().all()


# -------------------------------------------------------------------------------------------------- the reward pipeline
@pytest.mark.parametrize("K", [2, 3, 4])
def test_centre_and_scale_is_centred_over_the_running_root_mean_square_and_clipped(K):
    """Against plain loops: deviations of all updates, the present one included, K − 1 degrees of freedom."""
    generator = torch.Generator().manual_seed(K)
    running, sum_of_squares, degrees = [0.0, 0], 0.0, 0
    for update in range(4):
        scores = (update + 1) * torch.randn(5, K, dtype=torch.float64, generator=generator) + 3
        rewards, scale = centre_and_scale(scores, running)
        deviations = [[score - sum(row) / K for score in row] for row in scores.tolist()]
        sum_of_squares += sum(d * d for row in deviations for d in row)
        degrees += 5 * (K - 1)
        expected = math.sqrt(sum_of_squares / degrees)
        assert scale == pytest.approx(expected, rel=1e-12)
        clipped = [[min(max(d / expected, -10.0), 10.0) for d in row] for row in deviations]
        torch.testing.assert_close(
            rewards, torch.tensor(clipped, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


def test_the_scale_is_an_unbiased_estimate_of_the_standard_deviation_within_prompts():
    """Prompts of very different means, scores of standard deviation 3 around them."""
    generator = torch.Generator().manual_seed(0)
    scores = 100 * torch.randn(20_000, 1, generator=generator) + 3 * torch.randn(
        20_000, 2, generator=generator
    )
    assert centre_and_scale(scores, [0.0, 0])[1] == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("K", [2, 3, 4, 7])
def test_equal_scores_give_rewards_of_zero(K):
    """Exactly: a rest of rounding over a root mean square of rounding would be a reward of 1."""
    running = [0.0, 0]
    for value in (0.0, 1.7, -3.0, 0.1):
        rewards, scale = centre_and_scale(torch.full((4, K), value), running)
        assert (rewards == 0).all() and math.isfinite(scale) and scale > 0
    rewards, _ = centre_and_scale(torch.tensor([[1.0, -1.0]]), running)
    assert rewards.isfinite().all() and rewards[0, 0] > 0 > rewards[0, 1]


def test_rewards_are_clipped_at_10():
    scores = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    scores[0] = torch.tensor([1e4, -1e4])
    rewards, _ = centre_and_scale(scores, [0.0, 0])
    assert rewards[0].tolist() == [10, -10]
    assert rewards[1:].abs().max() < 1
