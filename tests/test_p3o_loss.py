"""The losses of P3O-V1, P3O-V2 and RLOO against their formulas, and the properties they share."""

import itertools
import math
from functools import partial

import pytest
import torch
from test_losses import (
    CLOSE,
    R,
    assert_formula,
    clip,
    clipped_loss,
    deviation,
    each_clip_range,
    gradients_of,
    loss_and_gradients,
    mean,
    normal,
    random_labelled,
    random_pairs,
    ratio_metrics,
)

import dpo
import grpo
import p3o_v1
import p3o_v2
import ppo
import rloo

pytestmark = pytest.mark.usefixtures("one_thread")


# -------------------------------------------------------------------------------- the formulas
def pair_q(l, ref, r, i, j, beta):
    return (r[i] - r[j]) - beta * ((l[i] - ref[i]) - (l[j] - ref[j]))


def plain_v1(l, old, ref, r, beta, clip_range, ratio_bound, stopped=None):
    """P3O-V1 of lists [B][K]. `stopped`: log π_θ in q and w, through which no gradient passes."""
    losses, clipped, weights = [], [], []
    for b, stop in enumerate(stopped or l):
        w = [clip(math.exp(x - y), 1 / ratio_bound, ratio_bound) for x, y in zip(stop, old[b])]
        for i, j in itertools.combinations(range(len(stop)), 2):
            q, terms = pair_q(stop, ref[b], r[b], i, j, beta), []
            for sign, one, other in ((1, i, j), (-1, j, i)):
                log_ratio = l[b][one] - old[b][one]
                term, is_clipped = clipped_loss(sign * q * w[other], log_ratio, clip_range)
                terms.append(term)
                clipped.append(is_clipped)
                weights.append(0.5 * sign * q * w[i] * w[j])  # of the pair in either order
            losses.append(0.5 * sum(terms))
    return pair_metrics(mean(losses), l, old, clipped, weights)


def plain_v2(l, old, ref, r, beta, clip_range, ratio_bound, stopped=None):
    """P3O-V2 of lists [B][K]. `stopped`: log π_θ in q and w, through which no gradient passes."""
    losses, clipped, weights = [], [], []
    for b, stop in enumerate(stopped or l):
        for i, j in itertools.combinations(range(len(stop)), 2):
            q = pair_q(stop, ref[b], r[b], i, j, beta)
            w = math.exp(stop[i] - old[b][i]) * math.exp(stop[j] - old[b][j])
            w = clip(w, 1 / ratio_bound, ratio_bound)
            delta = (l[b][i] - old[b][i]) - (l[b][j] - old[b][j])
            loss = most = -q * w * delta
            if clip_range:
                most = max(loss, -q * w * clip(delta, -clip_range, clip_range))
            losses.append(0.5 * most)
            clipped.append(most > loss)
            weights.append(0.5 * q * w)
    return pair_metrics(mean(losses), l, old, clipped, weights)


def pair_metrics(loss, l, old, clipped, weights):
    log_ratios = [x - y for row, old_row in zip(l, old) for x, y in zip(row, old_row)]
    metrics = ratio_metrics(loss, log_ratios, clipped)
    return metrics | {"policy/pair_weight_std": mean(x**2 for x in weights) ** 0.5}


def plain_rloo(l, old, ref, r, beta, clip_range):
    log_ratios, advantages, terms = [], [], []
    for b, row in enumerate(l):
        K = len(row)
        penalised = [r[b][i] - beta * (old[b][i] - ref[b][i]) for i in range(K)]
        for i in range(K):
            advantages.append(penalised[i] - mean(penalised[j] for j in range(K) if j != i))
            log_ratios.append(row[i] - old[b][i])
            terms.append(clipped_loss(advantages[-1], log_ratios[-1], clip_range))
    losses, clipped = zip(*terms)
    metrics = ratio_metrics(mean(losses), log_ratios, clipped)
    return metrics | {"policy/advantage_std": deviation(advantages)}


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize("name", ["p3o_v1", "p3o_v2", "rloo"])
@each_clip_range
def test_a_loss_is_its_formula(name, K, clip_range, spread):
    """Value, metrics and gradient, pair by pair or response by response."""
    batch = random_pairs(8, K, spread=spread)
    if name == "rloo":
        metrics = assert_formula(rloo.policy_loss, plain_rloo, batch, (0.05, clip_range))
    else:
        function, plain = {
            "p3o_v1": (p3o_v1.pairwise_loss, plain_v1),
            "p3o_v2": (p3o_v2.pairwise_loss, plain_v2),
        }[name]
        plain = partial(plain, stopped=batch[0].tolist())
        metrics = assert_formula(function, plain, batch, (0.05, clip_range, R))
    assert (metrics["policy/clipfrac"] > 0) == (clip_range > 0)


# -------------------------------------------------------------------- what they have in common
# name: a function of log π_θ, log π_old, log π_ref, rewards, β and ε
LOSSES = {
    "p3o_v1": partial(p3o_v1.pairwise_loss, ratio_bound=R),
    "p3o_v2": partial(p3o_v2.pairwise_loss, ratio_bound=R),
    "rloo": rloo.policy_loss,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_p3o = pytest.mark.parametrize("loss", [*LOSSES.values()][:2], ids=[*LOSSES][:2])


@each_loss
@pytest.mark.parametrize("K", [2, 3])
def test_what_is_added_to_all_rewards_of_a_prompt_has_no_effect(loss, K):
    """Property 1: to the bit in P3O where differences are exact, as of multiples of 1/8."""
    *logps, rewards = random_pairs(8, K, spread=1.0)
    rewards, shift = (10 * rewards).round() / 8, (1000 * normal(8, 1)).round()
    expected = loss_and_gradients(loss, [*logps, rewards], (0.05, 0.2))
    found = loss_and_gradients(loss, [*logps, rewards + shift], (0.05, 0.2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * (loss is rloo.policy_loss))
    found = loss_and_gradients(loss, [*logps, rewards + shift / 7], (0.05, 0.2))
    torch.testing.assert_close(found, expected, **CLOSE)


@each_loss
@pytest.mark.parametrize("order", [[1, 0], [2, 0, 3, 1]])
@each_clip_range
def test_another_order_of_responses_only_reorders_their_gradients(loss, order, clip_range):
    """Property 2: to the bit for two responses."""
    batch = random_pairs(8, len(order), spread=1.0)
    value, gradient = loss_and_gradients(loss, batch, (0.05, clip_range))
    found = loss_and_gradients(loss, [x[:, order] for x in batch], (0.05, clip_range))
    tolerance = 1e-12 * (len(order) > 2)
    torch.testing.assert_close(found, (value, gradient[:, order]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("K", [2, 3, 5])
@each_clip_range
def test_before_the_first_step_p3o_and_rloo_have_the_pairwise_policy_gradient(K, clip_range):
    """Property 3: −½ q ∇(log π_θ(y_1) − log π_θ(y_2)), the mean over prompts and pairs."""
    logps, _, ref_logps, rewards = random_pairs(6, K)
    l, ref, r = (x.tolist() for x in (logps, ref_logps, rewards))
    expected = torch.zeros_like(logps)
    for b, (i, j) in itertools.product(range(6), itertools.combinations(range(K), 2)):
        weight = 0.5 * pair_q(l[b], ref[b], r[b], i, j, 0.2) / (6 * math.comb(K, 2))
        expected[b, i] -= weight
        expected[b, j] += weight
    for loss in LOSSES.values():
        batch = (logps, logps.clone(), ref_logps, rewards)
        (gradient,) = gradients_of(loss, batch, (0.2, clip_range))
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


@each_loss
def test_before_the_first_step_the_gradient_is_that_of_a_regression_on_reward_differences(loss):
    """Property 4: (1/4β) mean of ((r_1 − r_2) − β (h_1 − h_2))²."""
    logps, _, ref_logps, rewards = random_pairs(8, 2)
    (gradient,) = gradients_of(loss, (logps, logps.clone(), ref_logps, rewards), (0.05, 0.2))
    h = logps.requires_grad_() - ref_logps
    errors = (rewards[:, 0] - rewards[:, 1]) - 0.05 * (h[:, 0] - h[:, 1])
    regression = errors.square().mean() / (4 * 0.05)
    torch.testing.assert_close(gradient, torch.autograd.grad(regression, logps)[0], **CLOSE)


# -------------------------------------------------------------------- on a policy of 4 responses
def enumerable():
    """The policy's logits, log π_old, log π_ref and rewards of the responses."""
    logits, old, ref, rewards = normal(4, 4)
    return logits.requires_grad_(), old.log_softmax(0), ref.log_softmax(0), 2 * rewards


def expected_gradient(loss, K, logits, old_logps, ref_logps, rewards, beta, clip_range):
    """By the logits, averaged exactly over all K responses drawn from π_old."""
    logps, average = logits.log_softmax(0), 0.0
    for draw in itertools.product(range(4), repeat=K):
        row = [x[list(draw)][None] for x in (logps, old_logps, ref_logps, rewards)]
        average = average + old_logps[list(draw)].sum().exp() * loss(*row, beta, clip_range)[0]
    return torch.autograd.grad(average, logits)[0]


def objective_gradient(logits, ref_logps, rewards, beta):
    """∇ −(E[r] − β KL(π_θ ‖ π_ref)), exactly."""
    logps = logits.log_softmax(0)
    objective = (logps.exp() * (rewards - beta * (logps - ref_logps))).sum()
    return torch.autograd.grad(-objective, logits)[0]


@each_loss
@pytest.mark.parametrize("K", [2, 3])
@each_clip_range
def test_the_expected_gradient_is_that_of_the_objective(loss, K, clip_range):
    """Property 5, at π_θ = π_old."""
    logits, _, ref_logps, rewards = enumerable()
    old_logps = logits.detach().log_softmax(0)
    found = expected_gradient(loss, K, logits, old_logps, ref_logps, rewards, 0.3, clip_range)
    torch.testing.assert_close(found, objective_gradient(logits, ref_logps, rewards, 0.3), **CLOSE)


@pytest.mark.parametrize("module", [p3o_v1, p3o_v2])
def test_importance_weights_keep_that_gradient_for_samples_of_another_policy(module):
    """Without clipping, and with a bound out of reach."""
    logits, old_logps, ref_logps, rewards = enumerable()
    loss = partial(module.pairwise_loss, ratio_bound=1e9)
    found = expected_gradient(loss, 2, logits, old_logps, ref_logps, rewards, 0.3, 0.0)
    torch.testing.assert_close(found, objective_gradient(logits, ref_logps, rewards, 0.3), **CLOSE)


# ------------------------------------------------------------------------------- the note's view
def implicit_reward(logps, ref_logps, beta):
    """δ_r = β (h_1 − h_2) of pairs [B, 2], and ∇δ_r by log π_θ of the two."""
    h = logps - ref_logps
    return beta * (h[:, :1] - h[:, 1:]), beta * torch.tensor([[1.0, -1.0]]).double()


@each_p3o
@each_clip_range
def test_p3o_has_the_gradient_of_the_note(loss, clip_range):
    """Before the first step: −(1/2β) (Δr − δ_r) ∇δ_r, and −(1/2β) δ_r ∇δ_r for rewards βh."""
    logps, _, ref_logps, rewards = random_pairs(8, 2)
    delta_r, slope = implicit_reward(logps, ref_logps, 0.1)
    batch = (logps, logps.clone(), ref_logps)
    (gradient,) = gradients_of(loss, (*batch, rewards), (0.1, clip_range))
    expected = -((rewards[:, :1] - rewards[:, 1:]) - delta_r) * slope / (2 * 0.1) / 8
    torch.testing.assert_close(gradient, expected, **CLOSE)
    (gradient,) = gradients_of(loss, (*batch, 0.1 * (logps - ref_logps)), (0.0, clip_range))
    torch.testing.assert_close(gradient, -delta_r * slope / (2 * 0.1) / 8, **CLOSE)


def test_dpo_has_the_gradient_of_the_note():
    """−σ(−δ_r) ∇δ_r."""
    chosen, rejected, ref_chosen, ref_rejected = inputs = random_labelled(8)
    found = gradients_of(dpo.preference_loss, inputs, (0.1, 0.0), (0, 1))
    logps = torch.stack([chosen, rejected], 1), torch.stack([ref_chosen, ref_rejected], 1)
    delta_r, slope = implicit_reward(*logps, 0.1)
    torch.testing.assert_close(torch.stack(found, 1), -(-delta_r).sigmoid() * slope / 8, **CLOSE)


@each_p3o
def test_implicit_rewards_alone_push_away_from_the_reference(loss):
    """Their expected gradient is that of −β KL(π_θ ‖ π_ref)."""
    logits, _, ref_logps, _ = enumerable()
    logps = logits.detach().log_softmax(0)
    rewards = 0.1 * (logps - ref_logps)
    found = expected_gradient(loss, 2, logits, logps, ref_logps, rewards, 0.0, 0.0)
    away = -objective_gradient(logits, ref_logps, torch.zeros(4), 0.1)
    torch.testing.assert_close(found, away, **CLOSE)


# -------------------------------------------------------------------------------------- clipping
def two_responses(log_ratios, reward):
    """Responses that have moved from −50 nats by these; the first has a reward, and h is 0."""
    old = torch.full((1, 2), -50.0, dtype=torch.float64)
    logps = old + torch.tensor([log_ratios], dtype=torch.float64)
    return logps, old, logps, torch.tensor([[reward, 0.0]]).double()


ALONE = {  # losses that clip the ratio of a response or a token alone; A = (q, −q)
    "p3o_v1": lambda logps, old, ref, r: LOSSES["p3o_v1"](logps, old, ref, r, 0.0, 0.2),
    "rloo": lambda logps, old, ref, r: rloo.policy_loss(logps, old, ref, r, 0.0, 0.2),
    "ppo": lambda logps, old, ref, r: ppo.policy_loss(
        logps, old, r - r.flip(1), torch.ones_like(r).bool(), 0.2
    ),
    "grpo": lambda logps, old, ref, r: grpo.policy_loss(
        *(x[..., None] for x in (logps, old, ref)), r - r.flip(1), torch.ones(1, 2, 1), 0.0, 0.2
    ),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("q", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [-25.0, -0.23, -0.22, 0.0, 0.18, 0.19, 3.0, 25.0])
def test_a_ratio_stops_where_it_has_moved_far_enough_as_q_wants(name, q, log_ratio):
    """Never the other way, nor the other response, which V1 weights by this one's ratio.

    log 0.8 = −0.223, log 1.2 = 0.182.
    """
    (gradient,) = gradients_of(ALONE[name], two_responses([log_ratio, 0.0], q))
    stopped = log_ratio > math.log(1.2) if q > 0 else log_ratio < math.log(0.8)
    expected = 0.0 if stopped else -0.5 * q * math.exp(log_ratio)
    assert gradient[0, 0].item() == pytest.approx(expected, rel=1e-10)
    weight = clip(math.exp(log_ratio), 1 / R, R) if name == "p3o_v1" else 1.0
    assert gradient[0, 1].item() == pytest.approx(0.5 * q * weight, rel=1e-10)


@pytest.mark.parametrize("q", [1.0, -1.0])
@pytest.mark.parametrize("delta", [-3.0, -0.21, -0.19, 0.0, 0.19, 0.21, 3.0])
def test_p3o_v2_stops_a_pair_that_has_moved_far_enough_as_q_wants(q, delta):
    """And never one that has moved the other way. w is 1 here: the ratios cancel."""
    batch = two_responses([delta / 2, -delta / 2], q)
    (gradient,) = gradients_of(LOSSES["p3o_v2"], batch, (0.0, 0.2))
    stopped = delta > 0.2 if q > 0 else delta < -0.2
    expected = [0.0, 0.0] if stopped else [-0.5 * q, 0.5 * q]
    torch.testing.assert_close(gradient.tolist(), [expected], **CLOSE)
