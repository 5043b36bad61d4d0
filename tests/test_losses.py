"""Every loss against its formula, written otherwise, and the identities that make it what it is."""

import math
from functools import partial
from itertools import product
from statistics import fmean, pstdev
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

import dpo
import grpo
import ipo
import mpo
import online_dpo
import p3o_v1
import p3o_v2
import ppo
import reward_model
import rloo
import sft

R = 10.0  # the bound of importance weights
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
RESPONSES = list(product(range(3), range(2)))  # places of those in random_tokens


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# ------------------------------------------------------------------------------- the formulas
def won(x):
    """1 for a positive margin, ½ for a tie."""
    return ((x > 0).double() + (x >= 0).double()) / 2


def clipped(A, x, low, high):
    """−A x, which stops where x has moved as far as A wants, and whether it has."""
    far = (A > 0) & (x > high) | (A < 0) & (x < low)
    stopped = torch.where(A > 0, -A * high, -A * low)
    return torch.where(far, stopped, -A * x), far.double()


def bounds(clip_range):
    """Of a ratio."""
    return (1 - clip_range, 1 + clip_range) if clip_range else (-math.inf, math.inf)


def ratio_metrics(loss, log_ratios, far):
    """What every loss that clips ratios returns: the loss, and metrics of its ratios."""
    ratios = log_ratios.exp()
    return {
        "policy/loss": loss,
        "policy/clipfrac": far,
        "policy/ratio_max": ratios.max(),
        "policy/approx_kl": (ratios - 1 - log_ratios).mean(),
    }


def difference(x):
    """x_i − x_j of all pairs: [B, K, K]."""
    return x[:, :, None] - x[:, None]


def pair_mean(x):
    """Over pairs in both orders, of [B, K, K]."""
    return x[:, ~torch.eye(x.shape[1], dtype=torch.bool)].mean()


def plain_v1(l, old, ref, r, beta, clip_range, bound):
    """The two orders of a pair are the two terms of L."""
    q = difference(r - beta * (l - ref)).detach()
    ratios = (l - old).exp()
    w = ratios.detach().clip(1 / bound, bound)
    losses, far = clipped(q * w[:, None], ratios[:, :, None], *bounds(clip_range))
    metrics = ratio_metrics(pair_mean(losses), l - old, pair_mean(far))
    weights = q * w[:, None] * w[:, :, None] / 2
    return metrics | {"policy/pair_weight_std": pair_mean(weights**2).sqrt()}


def plain_v2(l, old, ref, r, beta, clip_range, bound):
    """The two orders of a pair are the same."""
    q = difference(r - beta * (l - ref)).detach()
    ratios = (l - old).exp().detach()
    w = (ratios[:, None] * ratios[:, :, None]).clip(1 / bound, bound)
    limit = clip_range or math.inf
    losses, far = clipped(q * w, difference(l - old), -limit, limit)
    metrics = ratio_metrics(pair_mean(losses) / 2, l - old, pair_mean(far))
    return metrics | {"policy/pair_weight_std": pair_mean((q * w / 2) ** 2).sqrt()}


def plain_rloo(l, old, ref, r, beta, clip_range):
    """A penalised reward less the mean of the others is K/(K−1) times it less the mean of all."""
    penalised, K = r - beta * (old - ref), l.shape[1]
    advantages = K / (K - 1) * (penalised - penalised.mean(1, keepdim=True))
    losses, far = clipped(advantages, (l - old).exp(), *bounds(clip_range))
    metrics = ratio_metrics(losses.mean(), l - old, far.mean())
    return metrics | {"policy/advantage_std": (advantages**2).mean().sqrt()}


def plain_ppo(logprobs, old, advantages, mask, clip_range):
    """A mean over tokens."""
    log_ratios = (logprobs - old)[mask]
    losses, far = clipped(advantages[mask], log_ratios.exp(), *bounds(clip_range))
    return ratio_metrics(losses.mean(), log_ratios, far.mean())


def plain_grpo(logprobs, old, ref, advantages, mask, beta, clip_range):
    """A mean over responses of means over tokens."""
    A, x = advantages[..., None].expand(mask.shape), ref - logprobs
    losses, _ = clipped(A, (logprobs - old).exp(), *bounds(clip_range))
    losses = losses + beta * (x.exp() - x - 1)
    means = [losses[i][mask[i]].mean() for i in RESPONSES]
    metrics = plain_ppo(logprobs, old, A, mask, clip_range)
    return metrics | {"policy/loss": torch.stack(means).mean()}


def plain_value_loss(values, old, returns, mask, clip_range):
    """Half the larger one of two squared errors; the second, of a value near the old one."""
    V, V_old, target = (x[mask] for x in (values, old, returns))
    limit = clip_range or math.inf
    errors = (V - target) ** 2
    clipped_errors = (V.clip(V_old - limit, V_old + limit) - target) ** 2
    return {
        "value/loss": torch.maximum(errors, clipped_errors).mean() / 2,
        "value/clipfrac": (clipped_errors > errors).double().mean(),
        "value/mean": V.mean(),
    }


def plain_online_dpo(l, ref, r, beta, hard_labels):
    z, s = difference(beta * (l - ref)), difference(r)
    labels = won(s) if hard_labels else s.sigmoid()
    return {
        "policy/loss": pair_mean(-labels * logsigmoid(z) - (1 - labels) * logsigmoid(-z)),
        "rewards/accuracies": pair_mean(won(s * z)),
        "rewards/margins": pair_mean(z * (2 * won(s) - 1)),
        "policy/pair_weight_std": beta * pair_mean((labels - z.sigmoid()) ** 2).sqrt(),
    }


def pair_metrics(w, l, ref_w, ref_l, scale):
    """What all losses of labelled pairs return; implicit rewards are scale × h."""
    return {
        "rewards/chosen": scale * (w - ref_w).mean(),
        "rewards/rejected": scale * (l - ref_l).mean(),
        "rewards/margins": scale * ((w - l) - (ref_w - ref_l)).mean(),
        "rewards/accuracies": won((w - l) - (ref_w - ref_l)).mean(),
    }


def plain_dpo(w, l, ref_w, ref_l, beta, smoothing):
    z = beta * ((w - l) - (ref_w - ref_l))
    losses = -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)
    weights = beta * ((1 - smoothing) * (-z).sigmoid() - smoothing * z.sigmoid())
    metrics = {"policy/loss": losses.mean(), "policy/pair_weight_mean": weights.mean()}
    return metrics | pair_metrics(w, l, ref_w, ref_l, beta)


def plain_ipo(w, l, ref_w, ref_l, tau):
    losses = ((w - l) - (ref_w - ref_l) - 1 / (2 * tau)) ** 2
    return {"policy/loss": losses.mean()} | pair_metrics(w, l, ref_w, ref_l, tau)


def plain_mpo(w, l, ref_w, ref_l, ref_samples, beta, tau):
    """A mean over pairs and both actions, y_w ≻ y_l and y_l ≻ y_w."""
    p, kls = (w - l).sigmoid(), 0.0
    for sign in (1, -1):
        logp, ref_logp = logsigmoid(sign * (w - l)), logsigmoid(sign * (ref_w - ref_l))
        kls = kls + logp.exp() * (logp - ref_logp)
    margins = (w - l) - (ref_w - ref_l)
    return {
        "policy/loss": (beta * kls - p).mean() / 2 - tau * ref_samples.mean(),
        "policy/preference": p.mean(),
        "policy/preference_kl": kls.mean(),
        "policy/saturated_frac": ((p > 0.999) | (p < 0.001)).double().mean(),
        "policy/pair_weight_mean": (p * (1 - p) * (1 - beta * margins)).mean() / 2,
        "policy/ref_sample_logps": ref_samples.mean(),
        **pair_metrics(w, l, ref_w, ref_l, 1),
    }


def plain_bradley_terry(chosen, rejected):
    margins = chosen - rejected
    losses = margins.neg().exp().log1p()
    return {
        "rm/loss": losses.mean(),
        "rm/accuracy": won(margins).mean(),
        "rm/margin": margins.mean(),
    }


def plain_sft(logprobs, mask):
    """A mean over all tokens, in whatever response they are."""
    return {"sft/loss": -logprobs[mask].mean()}


# ------------------------------------------------------------------- every loss is its formula
P3O, CLIPPED = [(0.05, 0.0, R), (0.05, 0.2, R)], [(0.05, 0.0), (0.05, 0.2), (2.0, 0.2)]
LOSSES = {  # function, all its metrics with the loss first, options, places of trained inputs
    "p3o_v1": (p3o_v1.pairwise_loss, plain_v1, P3O, [0]),
    "p3o_v2": (p3o_v2.pairwise_loss, plain_v2, P3O, [0]),
    "rloo": (rloo.policy_loss, plain_rloo, CLIPPED, [0]),
    "online_dpo": (online_dpo.pairwise_loss, plain_online_dpo, [(0.1, False), (3.0, True)], [0]),
    "grpo": (grpo.policy_loss, plain_grpo, CLIPPED, [0]),
    "ppo": (ppo.policy_loss, plain_ppo, [(0.0,), (0.2,)], [0]),
    "value": (ppo.value_loss, plain_value_loss, [(0.0,), (0.2,)], [0]),
    "sft": (sft.sft_loss, plain_sft, [()], [0]),
    "dpo": (dpo.preference_loss, plain_dpo, [(0.1, 0.0), (0.1, 0.2)], [0, 1]),
    "ipo": (ipo.preference_loss, plain_ipo, [(0.1,), (1.0,)], [0, 1]),
    "mpo": (mpo.preference_loss, plain_mpo, [(0.0, 0.0), (2.0, 0.5)], [0, 1, 4]),
    "rm": (reward_model.bradley_terry_loss, plain_bradley_terry, [()], [0, 1]),
}
CASES = [(name, options) for name in LOSSES for options in LOSSES[name][2]]


def random_pairs(spread, K=4):
    """log π_θ, log π_old, log π_ref and rewards [8, K]; π_θ is `spread` nats away from π_old."""
    logps, old, ref, rewards = normal(4, 8, K)
    rewards[0], ref[1] = 0.7, 0.0  # prompts of equal rewards, and of equal h
    logps = 10 * logps - 40
    return [logps, logps - spread * old, logps + 10 * ref, rewards]


def random_tokens(spread):
    """log π_θ, log π_old and two others [3, 2, 6], and the mask of responses of 1 to 6 tokens."""
    logprobs, old, *others = normal(4, 3, 2, 6)
    lengths = torch.tensor([[1, 4], [2, 3], [5, 6]])
    return [logprobs, logprobs - spread * old, *others, torch.arange(6) < lengths[..., None]]


def random_inputs(name, spread):
    if name in ("p3o_v1", "p3o_v2", "rloo"):
        return random_pairs(spread)
    if name == "online_dpo":
        logps, _, ref_logps, rewards = random_pairs(spread)
        return [logps, ref_logps, rewards]
    if name in ("grpo", "ppo", "value", "sft"):
        logprobs, old, other, advantages, mask = random_tokens(spread)
        first = {"grpo": [old, other, advantages[..., 0]], "sft": []}
        return [logprobs, *first.get(name, [old, advantages]), mask]
    labelled = -40 + 10 * spread * normal(4, 9)  # of y_w and y_l, then of the reference
    labelled[:, 0] = -40  # a tie
    if name == "rm":
        return list(labelled[:2])
    return [*labelled, normal(5, 2)] if name == "mpo" else list(labelled)


def with_gradients(function, inputs, options=(), trained=(0,)):
    """Loss, metrics, and gradients of the loss by the inputs in these places."""
    inputs = [x.clone().requires_grad_(i in trained) for i, x in enumerate(inputs)]
    loss, metrics = function(*inputs, *options)
    gradients = torch.autograd.grad(loss, [inputs[i] for i in trained], retain_graph=True)
    return loss, metrics, gradients


@pytest.mark.parametrize("spread", [0.3, 2.0])
@pytest.mark.parametrize("name, options", CASES)
def test_a_loss_is_its_formula(name, options, spread):
    """With its gradients and metrics, whatever stands on padding."""
    function, plain, _, trained = LOSSES[name]

    def formula(*inputs):
        metrics = plain(*inputs)
        return next(iter(metrics.values())), metrics

    inputs = random_inputs(name, spread)
    found = with_gradients(function, inputs, options, trained)
    expected = with_gradients(formula, inputs, options, trained)
    assert_close(found, expected, **CLOSE)
    assert expected[1].get("policy/clipfrac", 1) > 0 or 0 in options  # there is something to clip


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_inputs_leave_all_numbers_finite_and_metrics_keep_no_graph(name):
    """Ten thousands of nats, or hundreds where the formula has ratios of them."""
    function, _, [*_, options], trained = LOSSES[name]
    factor = 100 if name in ("p3o_v1", "rloo", "grpo", "ppo") else 1e4
    inputs = [x if x.dtype == torch.bool else factor * x for x in random_inputs(name, 0.3)]
    loss, metrics, gradients = with_gradients(function, inputs, options, trained)
    assert all(x.isfinite().all() for x in (loss, *metrics.values(), *gradients))
    assert not any(value.requires_grad for value in metrics.values())


# ----------------------------------------------------------------------- what P3O and RLOO share
FAMILY = {  # functions of log π_θ, log π_old, log π_ref, rewards, β and ε
    "p3o_v1": partial(p3o_v1.pairwise_loss, ratio_bound=R),
    "p3o_v2": partial(p3o_v2.pairwise_loss, ratio_bound=R),
    "rloo": rloo.policy_loss,
}
OWN = [*product(FAMILY, [True]), ("p3o_v1", False), ("p3o_v2", False)]
each_loss = pytest.mark.parametrize("name", FAMILY)


def loss_and_gradient(name, batch):
    loss, _, [gradient] = with_gradients(FAMILY[name], batch, (0.05, 0.2))
    return loss, gradient


@each_loss
def test_what_is_added_to_all_rewards_of_a_prompt_has_no_effect(name):
    """To the bit in P3O where differences are exact, as of multiples of 1/8."""
    *logps, rewards = random_pairs(1.0, K=3)
    rewards, shift = (10 * rewards).round() / 8, (1000 * normal(8, 1)).round()
    expected = loss_and_gradient(name, [*logps, rewards])
    found = loss_and_gradient(name, [*logps, rewards + shift])
    assert_close(found, expected, rtol=0, atol=1e-12 * (name == "rloo"))


@each_loss
@pytest.mark.parametrize("order", [[1, 0], [2, 0, 3, 1]])
def test_another_order_of_responses_only_reorders_their_gradients(name, order):
    """Of a prompt, to the bit if there are two."""
    batch = [x[2:3] for x in random_pairs(1.0, len(order))]
    loss, gradient = loss_and_gradient(name, batch)
    found = loss_and_gradient(name, [x[:, order] for x in batch])
    tolerance = 1e-12 * (len(order) > 2)
    assert_close(found, (loss, gradient[:, order]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("K", [2, 4])
def test_before_the_first_step_p3o_and_rloo_have_one_gradient(K):
    first, *others = [loss_and_gradient(name, random_pairs(0.0, K))[1] for name in FAMILY]
    for other in others:
        assert_close(other, first, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name, own", OWN)
def test_the_expected_gradient_is_that_of_the_objective(name, own):
    """Of a policy with 4 responses; P3O's, with no bound, also from samples of another policy."""
    logits, old_logits, ref_logits, rewards = normal(4, 4)
    logits.requires_grad_()
    logps, ref_logps = logits.log_softmax(0), ref_logits.log_softmax(0)
    old_logps = logps.detach() if own else old_logits.log_softmax(0)
    loss = FAMILY[name] if own else partial(FAMILY[name], ratio_bound=1e9)
    average = 0.0
    for draw in product(range(4), repeat=3 if own else 2):
        row = [x[list(draw)][None] for x in (logps, old_logps, ref_logps, rewards)]
        value, _ = loss(*row, 0.3, 0.2 if own else 0.0)
        average = average + old_logps[list(draw)].sum().exp() * value
    objective = (logps.exp() * (rewards - 0.3 * (logps - ref_logps))).sum()
    found = torch.autograd.grad(average, logits, retain_graph=True)
    assert_close(found, torch.autograd.grad(-objective, logits), **CLOSE)


@pytest.mark.parametrize("p", [0.5, 0.75, 0.95])
def test_dpo_and_ipo_ask_for_the_margin_of_the_probability_of_a_label(p):
    """log(p / (1 − p)) / β and (2p − 1) / (2τ): there the expected gradient is 0."""
    for loss, options, margin in (
        (dpo.preference_loss, (0.1, 0.0), math.log(p / (1 - p)) / 0.1),
        (ipo.preference_loss, (0.1,), (2 * p - 1) / (2 * 0.1)),
    ):
        chosen = torch.tensor([margin, -margin], dtype=torch.float64)
        *_, [slopes] = with_gradients(loss, (chosen, *[0 * chosen] * 3), options)
        assert abs(p * slopes[0] - (1 - p) * slopes[1]) < 1e-12


# --------------------------------------------------------------------------- advantages of PPO
# An accelerator's part in sums over two processes that hold the same numbers
TWO = SimpleNamespace(num_processes=2, reduce=lambda x: 2 * x)


def plain_gae(rewards, values, gamma, lam):
    """Σ_l (γλ)^l δ_(t+l) of one response, V = 0 after its last token."""
    T, values = len(rewards), [*values, 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(T)]
    return [math.fsum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, T)) for t in range(T)]


@pytest.mark.parametrize("beta, gamma, lam", [(0.0, 1.0, 0.95), (0.2, 0.9, 0.5), (3.0, 0.99, 0.0)])
def test_advantages_are_whitened_sums_of_all_that_follows(beta, gamma, lam):
    """The score comes with the last token. Returns are not whitened, and padding has no part."""
    log_ratios, _, values, _, mask = random_tokens(1.0)
    rewards, plain, expected_returns = normal(3, 2, seed=1), [], []
    for i in RESPONSES:
        token_rewards = (-beta * log_ratios[i][mask[i]]).tolist()
        token_rewards[-1] += rewards[i].item()
        row = values[i][mask[i]].tolist()
        plain += plain_gae(token_rewards, row, gamma, lam)
        expected_returns += [A + V for A, V in zip(plain[-len(row) :], row)]
    padded = [x.masked_fill(~mask, 1e3) for x in (log_ratios, values)]
    args = SimpleNamespace(beta=beta, gamma=gamma, lam=lam)
    advantages, returns, metrics = ppo.token_advantages(TWO, rewards, *padded, mask, args)
    whitened = [(x - fmean(plain)) / pstdev(plain) for x in plain]
    assert_close(advantages[mask].tolist(), whitened, rtol=1e-7, atol=1e-7)
    assert_close(returns[mask].tolist(), expected_returns, **CLOSE)
    assert metrics["value/advantage_std"].item() == pytest.approx(pstdev(plain), rel=1e-7)
    explained = 1 - (pstdev(plain) / pstdev(expected_returns)) ** 2
    assert metrics["value/explained_variance"].item() == pytest.approx(explained, rel=1e-7)


def scale_all(updates):
    """Rewards and scale of every update in turn."""
    state = {"count": 0, "sum": 0.0, "square_sum": 0.0}
    return [ppo.scale_scores(TWO, scores, state) for scores in updates]


@pytest.mark.parametrize("centre, spread", [(0.0, 1.0), (-100.0, 0.1), (1000.0, 1.0)])
def test_scores_are_divided_by_the_standard_deviation_of_all_so_far(centre, spread):
    """The present update included; the mean is not subtracted, but ±10 are counted from it."""
    updates = [centre + (n + 1) * spread * normal(60, 2, seed=n) for n in range(4)]
    updates[2][0, 0] = -1e4
    updates = [scores.float().double() for scores in updates]  # as reward models give them
    for n, (rewards, scale) in enumerate(scale_all(updates)):
        seen = torch.cat(updates[: n + 1])
        mean, std = seen.mean(), seen.std(correction=0)
        assert scale == pytest.approx(std.item(), rel=1e-6)
        expected = updates[n].clip(mean - 10 * std, mean + 10 * std) / std
        assert_close(rewards, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.7, 3.7])
def test_equal_scores_are_not_scaled(value):
    """A rest of rounding in place of their deviation would make them ±10."""
    scores = torch.full((50, 3), value).double()  # scores are in float32 first
    assert all(scale == 1 and torch.equal(r, scores) for r, scale in scale_all([scores] * 3))


# --------------------------------------------------------------------------- steps and measures
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_from_its_first_step_and_follows_its_schedule(schedule):
    args = SimpleNamespace(warmup_updates=4, num_updates=14, lr_schedule=schedule)
    done = [step / 10 for step in range(10)]
    expected = {
        "constant": [1] * 10,
        "linear": [1 - x for x in done],
        "cosine": [(1 + math.cos(math.pi * x)) / 2 for x in done],
    }
    found = [sft.lr_factor(update, args) for update in range(1, 15)]
    assert found == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, *expected[schedule]])


def test_gradients_are_scaled_down_to_the_largest_norm_and_must_be_numbers():
    model, alone = torch.nn.Linear(2, 1, bias=False), SimpleNamespace(num_processes=1)
    for max_norm, expected in ((1.0, [0.6, 0.8]), (0, [3, 4]), (10.0, [3, 4])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert p3o_v2.clip_gradients(alone, model, max_norm) == 5
        assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-5)
    model.weight.grad = torch.tensor([[3.0, math.nan]])
    with pytest.raises(p3o_v2.UserError, match="--learning-rate"):
        p3o_v2.clip_gradients(alone, model, 1.0)


@pytest.mark.parametrize("n", [4, 60])
def test_held_out_pairs_are_measured_as_defined(n):
    """One of them is a tie. Less than ten pairs have less than ten deciles."""
    chosen, rejected = 2 * normal(2, n, seed=3)
    rejected[0] = chosen[0]
    margins, scores = chosen - rejected, torch.cat([chosen, rejected])
    expected = {
        "rm/eval_loss": -logsigmoid(margins).mean(),
        "rm/eval_accuracy": won(margins).mean(),
        "rm/eval_score_mean": scores.mean(),
        "rm/eval_score_std": scores.var().sqrt(),
    }
    ranked, size = sorted(margins, key=abs), max(n // 10, 1)
    for i in range(n // size):
        decile = torch.stack(ranked[i * size : (i + 1) * size])
        expected[f"rm/eval_accuracy_decile_{i}"] = won(decile).mean()
    gaps, confidence = 0.0, margins.abs().sigmoid()
    for i in range(10):
        here = (confidence >= 0.5 + i / 20) & (confidence < 0.55 + i / 20)
        gaps += (won(margins) - confidence)[here].sum().abs()
    expected["rm/eval_ece"] = gaps / n
    expected = {key: value.item() for key, value in expected.items()}
    assert reward_model.evaluate_pairs(chosen, rejected) == pytest.approx(expected)
