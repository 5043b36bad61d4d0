"""Every loss against its formula, written out in plain loops over Python's float64 numbers.

The losses of P3O and RLOO, and what they have in common, are in test_p3o_loss.py.
"""

import itertools
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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

pytestmark = pytest.mark.usefixtures("one_thread")

R = 10.0  # the bound of importance weights
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NUMERICAL = {"rtol": 1e-6, "atol": 1e-7}  # of a gradient by finite differences
each_clip_range = pytest.mark.parametrize("clip_range", [0.0, 0.2])


# ------------------------------------------------------------------------------ plain numbers
def mean(numbers):
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


def deviation(numbers):
    """The standard deviation around their own mean, over their number."""
    centre = mean(numbers)
    return mean((x - centre) ** 2 for x in numbers) ** 0.5


def clip(x, low, high):
    return min(max(x, low), high)


def log_sigmoid(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def won(x):
    """1 for a positive margin, ½ for a tie."""
    return 0.5 * ((x > 0) + (x >= 0))


def clipped_loss(A, log_ratio, clip_range):
    """max( −A ρ, −A clip(ρ, 1−ε, 1+ε) ), and whether clipping makes it larger."""
    loss = most = -A * math.exp(log_ratio)
    if clip_range:
        most = max(loss, -A * clip(math.exp(log_ratio), 1 - clip_range, 1 + clip_range))
    return most, most > loss


def ratio_metrics(loss, log_ratios, clipped):
    """What every loss that clips ratios returns: the loss, and metrics of its ratios."""
    ratios = [math.exp(x) for x in log_ratios]
    return {
        "policy/loss": loss,
        "policy/clipfrac": mean(clipped),
        "policy/ratio_mean": mean(ratios),
        "policy/ratio_max": max(ratios),
        "policy/approx_kl": mean(ratio - 1 - x for ratio, x in zip(ratios, log_ratios)),
    }


# ------------------------------------------------------------------------------------ tensors
def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def random_pairs(B, K, seed=0, spread=0.3):
    """log π_θ, log π_old, log π_ref and rewards [B, K]; π_θ is `spread` nats away from π_old."""
    noise = normal(4, B, K, seed=seed)
    logps = -40 + 10 * noise[0]
    return [logps, logps - spread * noise[1], logps + 10 * noise[2], noise[3]]


def random_labelled(n, seed=0, spread=1.0):
    """log π_θ of y_w and y_l, then log π_ref of them, [n]; pair 0 is a tie at the reference."""
    logps = -40 + spread * normal(4, n, seed=seed)
    logps[:, 0] = -40
    return list(logps)


def random_tokens(seed=0, B=3, K=2, T=6):
    """Four tensors [B, K, T], and the mask of responses of 1 to T tokens."""
    lengths = torch.randint(1, T + 1, (B, K), generator=torch.Generator().manual_seed(seed))
    lengths[0, 0], lengths[-1, -1] = 1, T
    return *normal(4, B, K, T, seed=seed), torch.arange(T) < lengths[..., None]


def loss_and_gradients(function, inputs, options=(), trained=(0,)):
    """The loss, detached, and its gradients by the inputs in these places."""
    inputs = list(inputs)
    for i in trained:
        inputs[i] = inputs[i].clone().requires_grad_()
    loss, _ = function(*inputs, *options)
    return loss.detach(), *torch.autograd.grad(loss, [inputs[i] for i in trained])


def gradients_of(*case):
    return loss_and_gradients(*case)[1:]


def numerical_gradient(function, x, step=1e-5):
    """Of a function of nested lists of numbers, by central differences around the tensor x."""
    gradient = torch.zeros_like(x)
    for index in itertools.product(*map(range, x.shape)):
        move = torch.zeros_like(x)
        move[index] = step
        difference = function((x + move).tolist()) - function((x - move).tolist())
        gradient[index] = difference / (2 * step)
    return gradient


def assert_formula(function, plain, inputs, options=(), trained=(0,)):
    """Loss, metrics and gradients are those of `plain`, and it returns the metrics.

    plain: a function of the same inputs as nested lists, returning all metrics, first the loss
    """
    lists = [x.tolist() for x in inputs]
    expected = plain(*lists, *options)
    loss, metrics = function(*inputs, *options)
    found = {key: value.item() for key, value in metrics.items()}
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(loss.item(), next(iter(expected.values())), **CLOSE)

    for i, gradient in zip(trained, gradients_of(function, inputs, options, trained)):

        def plain_loss(x, i=i):
            metrics = plain(*lists[:i], x, *lists[i + 1 :], *options)
            return next(iter(metrics.values()))

        torch.testing.assert_close(gradient, numerical_gradient(plain_loss, inputs[i]), **NUMERICAL)
    return expected


# --------------------------------------------------------------------------------- every loss
PAIRS, LABELLED = random_pairs(20, 3), random_labelled(20)
*NUMBERS, MASK = random_tokens()
# name: function, inputs, options, places of the inputs that are trained, and a factor for inputs
# that are extreme: differences of ten thousand nats, or hundreds where the formula has ratios.
LOSSES = {
    "p3o_v1": (p3o_v1.pairwise_loss, PAIRS, (0.05, 0.2, R), [0], 100),
    "p3o_v2": (p3o_v2.pairwise_loss, PAIRS, (0.05, 0.2, R), [0], 1e4),
    "rloo": (rloo.policy_loss, PAIRS, (0.05, 0.2), [0], 100),
    "grpo": (grpo.policy_loss, [*NUMBERS[:3], NUMBERS[3][..., 0], MASK], (0.04, 0.2), [0], 100),
    "ppo, policy": (ppo.policy_loss, [*NUMBERS[:3], MASK], (0.2,), [0], 100),
    "ppo, value": (ppo.value_loss, [*NUMBERS[:3], MASK], (0.2,), [0], 1e4),
    "online_dpo": (online_dpo.pairwise_loss, PAIRS[1:], (0.1, False), [0], 1e4),
    "dpo": (dpo.preference_loss, LABELLED, (0.1, 0.3), [0, 1], 1e4),
    "ipo": (ipo.preference_loss, LABELLED, (0.1,), [0, 1], 1e4),
    "mpo": (mpo.preference_loss, [*LABELLED, normal(20, 2)], (0.1, 0.01), [0, 1, 4], 1e4),
    "reward_model": (reward_model.bradley_terry_loss, [*normal(2, 20)], (), [0, 1], 1e4),
    "sft": (sft.sft_loss, [NUMBERS[0], MASK], (), [0], 1e4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_gradients_and_metrics_are_finite_and_metrics_detached_scalars(name):
    """For extreme inputs, too; the first of the metrics is the loss."""
    function, inputs, options, trained, factor = LOSSES[name]
    for scale in (1, factor):
        scaled = [x if x.dtype == torch.bool else scale * x for x in inputs]
        assert all(x.isfinite().all() for x in gradients_of(function, scaled, options, trained))
        scaled = [x.clone().requires_grad_(i in trained) for i, x in enumerate(scaled)]
        loss, metrics = function(*scaled, *options)
        assert loss.requires_grad and torch.equal(next(iter(metrics.values())), loss)
        for value in metrics.values():
            assert value.isfinite() and value.ndim == 0 and not value.requires_grad


# --------------------------------------------------------------------------------------- GRPO
def group_advantages(rewards, divide=True):
    """Rewards [B, K] less their mean, over their standard deviation, a prompt at a time."""
    advantages = []
    for row in rewards.tolist():
        gains = [r - mean(row) for r in row]
        std = math.sqrt(math.fsum(x * x for x in gains) / (len(row) - 1))
        advantages.append([x / (std + 1e-4) if divide else x for x in gains])
    return torch.tensor(advantages, dtype=torch.float64)


def grpo_inputs(spread, K=3, divide=True):
    """π_θ is `spread` nats away from π_old in every token; one group has equal scores."""
    noise, old_noise, ref_noise, _, mask = random_tokens(K=K)
    logprobs = noise - 2
    rewards = 3 * normal(3, K, seed=1) + 5
    rewards[0] = 0.7
    advantages = group_advantages(rewards, divide)
    return [logprobs, logprobs - spread * old_noise, logprobs + ref_noise, advantages, mask]


def plain_grpo(logprobs, old, ref, advantages, mask, beta, clip_range, divide=True):
    """Without `divide` that of Dr. GRPO: the sum over the tokens of a response."""
    losses, log_ratios, clipped = [], [], []
    for b, k in itertools.product(range(len(mask)), range(len(mask[0]))):
        length, total = sum(mask[b][k]), 0.0
        for t in range(length):
            log_ratio = logprobs[b][k][t] - old[b][k][t]
            loss, is_clipped = clipped_loss(advantages[b][k], log_ratio, clip_range)
            x = ref[b][k][t] - logprobs[b][k][t]
            total += loss + beta * (math.exp(x) - x - 1)
            log_ratios.append(log_ratio)
            clipped.append(is_clipped)
        losses.append(total / length if divide else total)
    return ratio_metrics(mean(losses), log_ratios, clipped)


@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.04, 2.0])
@each_clip_range
def test_grpo_is_its_formula(beta, clip_range, spread):
    inputs = grpo_inputs(spread)
    metrics = assert_formula(grpo.policy_loss, plain_grpo, inputs, (beta, clip_range))
    assert (metrics["policy/clipfrac"] > 0) == (clip_range > 0)


def test_the_kl_penalty_of_grpo_is_the_kl_on_average_over_tokens_of_the_policy():
    logp, ref_logp = normal(2, 6, 1, 1).log_softmax(1)
    zero, mask = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    penalties = [
        grpo.policy_loss(x, x, ref_x, zero, mask, 1.0, 0.2)[0] for x, ref_x in zip(logp, ref_logp)
    ]
    average = sum(x.exp().item() * penalty for x, penalty in zip(logp, penalties))
    torch.testing.assert_close(average, (logp.exp() * (logp - ref_logp)).sum(), **CLOSE)


def dr_grpo_loss():
    """The loss of grpo.py without the line that divides by the length of a response."""
    line = "    response_losses = response_losses / mask.sum(-1)\n"
    text = Path(grpo.__file__).read_text()
    assert text.count(line) == 1
    namespace = {"__name__": "dr_grpo", "__file__": grpo.__file__}
    exec(text.replace(line, ""), namespace)
    return namespace["policy_loss"]


@each_clip_range
def test_grpo_without_its_two_divisions_is_dr_grpo(clip_range):
    inputs = grpo_inputs(1.0, divide=False)
    plain = partial(plain_grpo, divide=False)
    assert_formula(dr_grpo_loss(), plain, inputs, (0.04, clip_range))


# ---------------------------------------------------------------------------------------- PPO
def response_tokens(mask):
    """Places of the response tokens of nested lists."""
    return [
        (b, k, t)
        for b, k in itertools.product(range(len(mask)), range(len(mask[0])))
        for t in range(sum(mask[b][k]))
    ]


def plain_ppo(logprobs, old, advantages, mask, clip_range):
    log_ratios, terms = [], []
    for b, k, t in response_tokens(mask):
        log_ratios.append(logprobs[b][k][t] - old[b][k][t])
        terms.append(clipped_loss(advantages[b][k][t], log_ratios[-1], clip_range))
    losses, clipped = zip(*terms)
    return ratio_metrics(mean(losses), log_ratios, clipped)


@pytest.mark.parametrize("spread", [0.3, 1.0])
@each_clip_range
def test_the_policy_loss_of_ppo_is_its_formula(clip_range, spread):
    """A mean over tokens and not over responses."""
    logprobs, noise, advantages, _, mask = random_tokens()
    inputs = [logprobs, logprobs - spread * noise, advantages, mask]
    metrics = assert_formula(ppo.policy_loss, plain_ppo, inputs, (clip_range,))
    assert (metrics["policy/clipfrac"] > 0) == (clip_range > 0)


def plain_value_loss(values, old, returns, mask, clip_range):
    losses, clipped, found = [], [], []
    for b, k, t in response_tokens(mask):
        V, V_old, target = values[b][k][t], old[b][k][t], returns[b][k][t]
        near = clip(V, V_old - clip_range, V_old + clip_range) if clip_range else V
        losses.append(max((V - target) ** 2, (near - target) ** 2))
        clipped.append((near - target) ** 2 > (V - target) ** 2)
        found.append(V)
    return {
        "value/loss": 0.5 * mean(losses),
        "value/clipfrac": mean(clipped),
        "value/mean": mean(found),
    }


@pytest.mark.parametrize("spread", [0.05, 1.0])
@each_clip_range
def test_the_value_loss_of_ppo_is_its_formula(clip_range, spread):
    values, noise, returns, _, mask = random_tokens(seed=1)
    inputs = [values, values - spread * noise, returns, mask]
    metrics = assert_formula(ppo.value_loss, plain_value_loss, inputs, (clip_range,))
    assert (metrics["value/clipfrac"] > 0) == (clip_range > 0 and spread == 1)


@pytest.mark.parametrize("name", ["grpo", "ppo, policy", "ppo, value", "sft"])
@pytest.mark.parametrize("filling", [-300.0, 0.0, 300.0])
def test_padding_is_ignored_whatever_finite_numbers_it_holds(name, filling):
    """Loss, gradient and metrics; the gradient of padding is 0."""
    function, inputs, options, *_ = LOSSES[name]
    mask = inputs[-1]
    filled = [
        x.masked_fill(~mask, filling * (-1) ** i) if x.shape == mask.shape else x
        for i, x in enumerate(inputs[:-1])
    ]
    loss, gradient = loss_and_gradients(function, inputs, options)
    found = loss_and_gradients(function, [*filled, mask], options)
    torch.testing.assert_close(found, (loss, gradient), **CLOSE)
    assert not mask.all() and (found[1][~mask] == 0).all()
    metrics = function(*inputs, *options)[1]
    torch.testing.assert_close(function(*filled, mask, *options)[1], metrics, **CLOSE)


def plain_gae(rewards, values, gamma, lam):
    """Σ_l (γλ)^l δ_(t+l) of one response, V = 0 after its last token."""
    T, values = len(rewards), [*values, 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(T)]
    return [math.fsum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, T)) for t in range(T)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_all_that_follows(gamma, lam):
    """0 on padding, whatever finite numbers that holds; returns are advantages plus values."""
    rewards, values, _, _, mask = random_tokens()
    expected = torch.zeros_like(rewards)
    for b, k in itertools.product(*map(range, mask.shape[:2])):
        here = mask[b, k]
        row = plain_gae(rewards[b, k, here].tolist(), values[b, k, here].tolist(), gamma, lam)
        expected[b, k, here] = torch.tensor(row, dtype=torch.float64)
    for filling in (0.0, 1e9):
        padded = [x.masked_fill(~mask, filling) for x in (rewards, values)]
        advantages, returns = ppo.gae(*padded, mask, gamma, lam)
        torch.testing.assert_close(advantages, expected, **CLOSE)
        torch.testing.assert_close(returns[mask], (expected + values)[mask], **CLOSE)


each_world = pytest.mark.parametrize("world", [1, 2])


def processes(world):
    """An accelerator's part in sums over processes that all hold the same numbers."""
    return SimpleNamespace(num_processes=world, reduce=lambda x: world * x)


@each_world
@pytest.mark.parametrize("beta, gamma, lam", [(0.0, 1.0, 0.95), (0.2, 1.0, 0.95), (3.0, 0.9, 0.5)])
def test_token_advantages_have_the_score_at_the_last_token_and_are_whitened(
    beta, gamma, lam, world
):
    """Over the response tokens alone; returns are not, and the deviation is that of before."""
    log_ratios, values, _, _, mask = random_tokens()
    rewards, plain, expected_returns = normal(3, 2, seed=1), [], []
    for b, k in itertools.product(range(3), range(2)):
        length = int(mask[b, k].sum())
        token_rewards = [-beta * x for x in log_ratios[b, k, :length].tolist()]
        token_rewards[-1] += rewards[b, k].item()
        row = values[b, k, :length].tolist()
        advantages = plain_gae(token_rewards, row, gamma, lam)
        plain += advantages
        expected_returns += [a + v for a, v in zip(advantages, row)]
    centre, std = mean(plain), deviation(plain)
    padded = [x.masked_fill(~mask, 1e3) for x in (log_ratios, values)]
    args = SimpleNamespace(beta=beta, gamma=gamma, lam=lam)
    found = ppo.token_advantages(processes(world), rewards, *padded, mask, args)
    advantages, returns, metrics = found
    whitened = [(x - centre) / std for x in plain]
    torch.testing.assert_close(advantages[mask].tolist(), whitened, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(returns[mask].tolist(), expected_returns, **CLOSE)
    assert metrics["value/advantage_std"].item() == pytest.approx(std, rel=1e-7)
    explained = 1 - (std / deviation(expected_returns)) ** 2
    assert metrics["value/explained_variance"].item() == pytest.approx(explained, rel=1e-7)


def scale_all(updates, world=1):
    """Rewards and scale of every update in turn."""
    state = {"count": 0, "sum": 0.0, "square_sum": 0.0}
    return [ppo.scale_scores(processes(world), scores, state) for scores in updates]


@each_world
@pytest.mark.parametrize("centre, spread", [(0.0, 1.0), (-100.0, 0.1), (1000.0, 1.0)])
def test_scores_are_divided_by_the_standard_deviation_of_all_so_far(centre, spread, world):
    """The present update included; the mean is not subtracted, but ±10 are counted from it."""
    updates = [centre + (n + 1) * spread * normal(60, 2, seed=n) for n in range(4)]
    updates[2][0, 0] = -1e4
    updates = [scores.float().double() for scores in updates]  # as reward models give them
    seen = []
    for scores, (rewards, scale) in zip(updates, scale_all(updates, world)):
        seen += scores.flatten().tolist()
        assert scale == pytest.approx(deviation(seen), rel=1e-6)
        low, high = mean(seen) - 10 * deviation(seen), mean(seen) + 10 * deviation(seen)
        expected = [clip(x, low, high) / deviation(seen) for x in scores.flatten().tolist()]
        torch.testing.assert_close(rewards.flatten().tolist(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.7, -3.0, 0.1])
def test_equal_scores_are_not_scaled(value):
    """A rest of rounding in place of their deviation would make them ±10."""
    scores = torch.full((50, 3), value).double()  # scores are in float32 first
    assert all(scale == 1 and torch.equal(r, scores) for r, scale in scale_all([scores] * 3))


# --------------------------------------------------------------------------------- online DPO
def plain_online_dpo(logps, ref_logps, rewards, beta, hard_labels):
    losses, accuracies, margins, weights = [], [], [], []
    for l, ref, r in zip(logps, ref_logps, rewards):
        for i, j in itertools.combinations(range(len(r)), 2):
            margin, z = r[i] - r[j], beta * ((l[i] - ref[i]) - (l[j] - ref[j]))
            s = won(margin) if hard_labels else sigmoid(margin)
            losses.append(-(s * log_sigmoid(z) + (1 - s) * log_sigmoid(-z)))
            accuracies.append(won(margin * z))
            margins.append(z * (2 * won(margin) - 1))
            weights.append(beta * (s - sigmoid(z)))
    return {
        "policy/loss": mean(losses),
        "rewards/accuracies": mean(accuracies),
        "rewards/margins": mean(margins),
        "policy/pair_weight_std": mean(x**2 for x in weights) ** 0.5,
    }


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("hard_labels", [False, True])
@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_online_dpo_is_its_formula(K, hard_labels, beta):
    """With soft and hard labels; a tie of rewards or of implicit rewards is half a win."""
    _, logps, ref_logps, rewards = random_pairs(5, K)
    rewards[0] = 0.7
    ref_logps[1] = logps[1]
    inputs = (logps, ref_logps, rewards)
    assert_formula(online_dpo.pairwise_loss, plain_online_dpo, inputs, (beta, hard_labels))


@pytest.mark.parametrize("hard_labels, smoothing", [(True, 0.0), (False, 0.3)])
def test_online_dpo_is_dpo_on_its_own_samples(hard_labels, smoothing):
    """y_w has the higher reward; soft labels smooth by ε if r_w − r_l = log((1 − ε)/ε)."""
    _, logps, ref_logps, _ = random_pairs(10, 2)
    rewards = math.log(0.7 / 0.3) * torch.eye(2, dtype=torch.float64).repeat(5, 1)
    order = rewards.argsort(1, descending=True)
    loss, gradient = loss_and_gradients(
        online_dpo.pairwise_loss, (logps, ref_logps, rewards), (0.1, hard_labels)
    )
    labelled = [*logps.gather(1, order).T, *ref_logps.gather(1, order).T]
    found = loss_and_gradients(dpo.preference_loss, labelled, (0.1, smoothing), (0, 1))
    torch.testing.assert_close(found, (loss, *gradient.gather(1, order).T), **CLOSE)


# ----------------------------------------------------------------- DPO and IPO: labelled pairs
def metrics_of_pairs(w, l, ref_w, ref_l, scale):
    """The metrics that all losses of labelled pairs have; implicit rewards are scale × h."""
    h_w, h_l = [a - b for a, b in zip(w, ref_w)], [a - b for a, b in zip(l, ref_l)]
    return {
        "rewards/chosen": scale * mean(h_w),
        "rewards/rejected": scale * mean(h_l),
        "rewards/margins": scale * mean(a - b for a, b in zip(h_w, h_l)),
        "rewards/accuracies": mean(won(a - b) for a, b in zip(h_w, h_l)),
    }


def plain_dpo(w, l, ref_w, ref_l, beta, smoothing):
    z = [beta * ((a - c) - (b - d)) for a, b, c, d in zip(w, l, ref_w, ref_l)]
    return {
        "policy/loss": -mean(
            (1 - smoothing) * log_sigmoid(x) + smoothing * log_sigmoid(-x) for x in z
        ),
        "policy/pair_weight_mean": mean(
            beta * ((1 - smoothing) * sigmoid(-x) - smoothing * sigmoid(x)) for x in z
        ),
        **metrics_of_pairs(w, l, ref_w, ref_l, beta),
    }


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("beta, smoothing", [(0.1, 0.0), (0.1, 0.2), (1.0, 0.5)])
def test_dpo_is_its_formula(spread, beta, smoothing):
    inputs = random_labelled(9, spread=spread)
    assert_formula(dpo.preference_loss, plain_dpo, inputs, (beta, smoothing), (0, 1))


@pytest.mark.parametrize("smoothing", [0.05, 0.3, 0.5])
def test_dpo_with_label_smoothing_asks_for_the_odds_of_the_labels(smoothing):
    """Its minimiser is β (h_w − h_l) = log((1 − ε)/ε), which for ε = ½ is the reference."""
    zeros = torch.zeros(3, dtype=torch.float64)
    margins = math.log((1 - smoothing) / smoothing) / 0.1 + torch.tensor([-1.0, 0.0, 1.0]).double()
    inputs = (margins, zeros, zeros, zeros)
    (gradient,) = gradients_of(dpo.preference_loss, inputs, (0.1, smoothing))
    assert gradient[0] < 0 and abs(gradient[1]) < 1e-12 and gradient[2] > 0


def plain_ipo(w, l, ref_w, ref_l, tau):
    losses = [((a - c) - (b - d) - 1 / (2 * tau)) ** 2 for a, b, c, d in zip(w, l, ref_w, ref_l)]
    return {"policy/loss": mean(losses), **metrics_of_pairs(w, l, ref_w, ref_l, tau)}


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_is_its_formula(spread, tau):
    inputs = random_labelled(9, spread=spread)
    assert_formula(ipo.preference_loss, plain_ipo, inputs, (tau,), (0, 1))


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.75, 1.0])
def test_ipo_asks_for_the_margin_of_the_probability_of_a_label(p, tau):
    """(2p − 1)/(2τ): any other margin has a loss that is larger by the squared distance."""
    zero, optimum = torch.zeros(1, dtype=torch.float64), (2 * p - 1) / (2 * tau)

    def expected_loss(margin):  # of a pair labelled the other way with probability 1 − p
        losses = [
            ipo.preference_loss(zero + x, zero, zero, zero, tau)[0] for x in (margin, -margin)
        ]
        return (p * losses[0] + (1 - p) * losses[1]).item()

    for away in (-3.0, -0.1, 0.1, 2.0):
        assert expected_loss(optimum + away) - expected_loss(optimum) == pytest.approx(away**2)


@pytest.mark.parametrize("name", ["dpo", "ipo", "mpo", "reward_model"])
def test_what_is_added_to_both_responses_of_a_pair_has_no_effect(name):
    """To their scores, or to log π of either model: the gradient of the pair is the same."""
    function, inputs, options, *_ = LOSSES[name]
    expected = gradients_of(function, inputs, options, (0, 1))
    for places in ((0, 1), (2, 3)):
        moved = [x + 20 * normal(20) if i in places else x for i, x in enumerate(inputs)]
        found = gradients_of(function, moved, options, (0, 1))
        torch.testing.assert_close(found, expected, **CLOSE)


# ---------------------------------------------------------------------------------------- MPO
def plain_mpo(w, l, ref_w, ref_l, ref_samples, beta, tau):
    terms, preferences, kls, weights = [], [], [], []
    for a, b, c, d in zip(w, l, ref_w, ref_l):
        z, ref_z, kl = a - b, c - d, 0.0
        for sign, label in ((1, 1.0), (-1, 0.0)):  # the actions y_w ≻ y_l and y_l ≻ y_w
            p, log_ratio = sigmoid(sign * z), log_sigmoid(sign * z) - log_sigmoid(sign * ref_z)
            terms.append(-label * p + beta * p * log_ratio)
            kl += p * log_ratio
        preferences.append(sigmoid(z))
        kls.append(kl)
        weights.append(0.5 * sigmoid(z) * sigmoid(-z) * (1 - beta * (z - ref_z)))
    ref_sample_logps = mean(itertools.chain(*ref_samples))
    return {
        "policy/loss": mean(terms) - tau * ref_sample_logps,
        "policy/preference": mean(preferences),
        "policy/preference_kl": mean(kls),
        "policy/saturated_frac": mean(max(p, 1 - p) > 0.999 for p in preferences),
        "policy/pair_weight_mean": mean(weights),
        "policy/ref_sample_logps": ref_sample_logps,
        **metrics_of_pairs(w, l, ref_w, ref_l, 1),
    }


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("beta, tau", [(0.1, 0.01), (0.0, 0.0), (2.0, 0.5)])
def test_mpo_is_its_formula(spread, beta, tau):
    """A mean over pairs and both actions, less one over the samples of the reference."""
    inputs = [*random_labelled(9, spread=spread), -30 + normal(5, 2)]
    assert_formula(mpo.preference_loss, plain_mpo, inputs, (beta, tau), (0, 1, 4))


def test_at_the_reference_the_kl_term_of_mpo_is_0_and_has_no_gradient():
    chosen, rejected, *_ = random_labelled(6)
    inputs = [chosen, rejected, chosen.clone(), rejected.clone(), normal(6)]
    found, expected = (
        loss_and_gradients(mpo.preference_loss, inputs, (beta, 0.01), (0, 1, 4))
        for beta in (5.0, 0.0)
    )
    torch.testing.assert_close(found, expected, **CLOSE)


# ------------------------------------------------------------------------- the two first stages
def plain_bradley_terry(chosen, rejected):
    margins = [a - b for a, b in zip(chosen, rejected)]
    return {
        "rm/loss": -mean(map(log_sigmoid, margins)),
        "rm/accuracy": mean(map(won, margins)),
        "rm/margin": mean(margins),
    }


def test_the_loss_of_the_reward_model_is_its_formula():
    """A tie is half a win."""
    chosen, rejected = 3 * normal(2, 9)
    rejected[0] = chosen[0]
    assert_formula(
        reward_model.bradley_terry_loss, plain_bradley_terry, (chosen, rejected), (), (0, 1)
    )


def test_the_loss_of_sft_is_a_mean_over_all_response_tokens():
    """Every token has the same weight, in whatever response it is."""

    def plain(logprobs, mask):
        logprobs = [x for row, is_token in zip(logprobs, mask) for x in row[: sum(is_token)]]
        return {"sft/loss": -mean(logprobs)}

    logprobs, _, _, _, mask = random_tokens()
    assert_formula(sft.sft_loss, plain, (logprobs[:, 0], mask[:, 0]))
