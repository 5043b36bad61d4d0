"""Every loss against its formula, written out here in plain float64 arithmetic a number at a time, and its properties.

P3O-V2's own value, gradient and clipping, and the pairwise reward pipeline, are in test_p3o_loss.py.
"""

import itertools
import math

import pytest
import torch

import dpo
import ipo
import mpo
import online_dpo
import p3o_v1
import p3o_v2
import ppo
import reward_model
import sft

pytestmark = pytest.mark.usefixtures("one_thread")

R = 10.0
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NUMERICAL = {"rtol": 1e-6, "atol": 1e-6}  # of a gradient by finite differences
nan, inf = math.nan, math.inf


# -------------------------------------------------------------------------------------------------------- plain numbers
def mean(numbers):
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


def variance(numbers):
    """Around their own mean, over their number."""
    centre = mean(numbers)
    return mean((x - centre) ** 2 for x in numbers)


def clip(x, low, high):
    return min(max(x, low), high)


def log_sigmoid(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def won(x):
    """1 for a positive margin, ½ for a tie."""
    return 0.5 * ((x > 0) + (x >= 0))


# -------------------------------------------------------------------------------------------------------------- tensors
def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def random_pairs(B, K, seed=0, spread=0.3, dtype=torch.float64):
    """log π_θ, log π_old, log π_ref, rewards, [B, K]; `spread`: how far π_θ has moved away from π_old, in nats."""
    noise = normal(4, B, K, seed=seed)
    logps = -40 + 10 * noise[0]
    return [
        x.to(dtype) for x in (logps, logps - spread * noise[1], logps + 10 * noise[2], noise[3])
    ]


def random_labelled(n, seed=0, spread=1.0, dtype=torch.float64):
    """log π_θ(y_w), log π_θ(y_l), log π_ref(y_w), log π_ref(y_l), [n], differences of about `spread` nats; pair 0 is a
    tie, at the reference."""
    noise = normal(4, n, seed=seed)
    logps = -40 + spread * noise
    logps[:, 0] = -40
    return list(logps.to(dtype))


def random_tokens(B=5, T=7, seed=0, dtype=torch.float64):
    """Four tensors [B, T] of standard normal numbers and a mask [B, T] of responses of random lengths, one of them 1
    token and one T."""
    lengths = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(seed))
    lengths[0], lengths[-1] = 1, T
    return *normal(4, B, T, seed=seed, dtype=dtype), torch.arange(T) < lengths[:, None]


def loss_and_gradients(function, inputs, options=(), trained=(0,)):
    """The loss, detached, and its gradients with respect to the inputs in these places."""
    inputs = list(inputs)
    for i in trained:
        inputs[i] = inputs[i].clone().requires_grad_()
    loss, _ = function(*inputs, *options)
    return loss.detach(), *torch.autograd.grad(loss, [inputs[i] for i in trained])


def numerical_gradient(function, x, step=1e-5):
    """Of a function of nested lists of numbers, by central differences around x, a tensor."""
    gradient = torch.zeros_like(x)
    for index in itertools.product(*map(range, x.shape)):
        values = []
        for sign in (1, -1):
            moved = x.clone()
            moved[index] += sign * step
            values.append(function(moved.tolist()))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


def assert_metrics(metrics, expected, **tolerance):
    """All metrics and no other."""
    torch.testing.assert_close(
        {k: v.item() for k, v in metrics.items()}, expected, **(tolerance or CLOSE)
    )


# ----------------------------------------------------------------------------------------------------------- every loss
# name: (function, make(dtype, seed) -> inputs, list of options, which inputs are trained)
def preference_inputs(dtype=torch.float64, seed=0):
    return random_labelled(6, seed, dtype=dtype)


def token_inputs(count):
    def make(dtype=torch.float64, seed=0):
        *numbers, mask = random_tokens(seed=seed, dtype=dtype)
        return [*numbers[:count], mask]

    return make


LOSSES = {
    "p3o_v1": (
        p3o_v1.pairwise_loss,
        lambda dtype=torch.float64, seed=0: random_pairs(5, 2 + seed % 3, seed, dtype=dtype),
        [(0.05, 0.2, R), (0.05, 0.0, R)],
        [0],
    ),
    "p3o_v2": (
        p3o_v2.pairwise_loss,
        lambda dtype=torch.float64, seed=0: random_pairs(5, 2 + seed % 3, seed, dtype=dtype),
        [(0.05, 0.2, R), (0.05, 0.0, R)],
        [0],
    ),
    "online_dpo": (
        online_dpo.pairwise_loss,
        lambda dtype=torch.float64, seed=0: random_pairs(5, 2 + seed % 3, seed, dtype=dtype)[1:],
        [(0.1, False), (0.1, True)],
        [0],
    ),
    "dpo": (dpo.preference_loss, preference_inputs, [(0.1, 0.0), (0.1, 0.3)], [0, 1]),
    "ipo": (ipo.preference_loss, preference_inputs, [(0.1,), (1.0,)], [0, 1]),
    "mpo": (
        mpo.preference_loss,
        lambda dtype=torch.float64, seed=0: [
            *preference_inputs(dtype, seed),
            normal(6, 2, seed=seed, dtype=dtype),
        ],
        [(0.1, 0.01), (0.0, 0.0)],
        [0, 1, 4],
    ),
    "ppo_policy": (ppo.policy_loss, token_inputs(3), [(0.2,), (0.0,)], [0]),
    "ppo_value": (ppo.value_loss, token_inputs(3), [(0.2,), (0.0,)], [0]),
    "reward_model": (
        reward_model.bradley_terry_loss,
        lambda dtype=torch.float64, seed=0: list(normal(2, 6, seed=seed, dtype=dtype)),
        [()],
        [0, 1],
    ),
    "sft": (sft.sft_loss, token_inputs(1), [()], [0]),
}


def every_sign(size, *shape):
    """Every way for so many numbers to be ±size: [2^(product of shape), *shape]."""
    return size * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=math.prod(shape)))).view(
        -1, *shape
    )


def extreme_inputs(name):
    """Sums of ±10⁴ nats in every combination, rewards, advantages and scores of ±10³; one row of each."""
    if name in ("p3o_v1", "p3o_v2", "online_dpo"):
        sums, rewards = every_sign(1e4, 3, 2), every_sign(1e3, 2)
        rows = [(*x, r) for x in sums for r in rewards]
        inputs = [torch.stack(column) for column in zip(*rows)]
        return inputs[1:] if name == "online_dpo" else inputs
    if name in ("dpo", "ipo", "mpo"):
        return [*every_sign(1e4, 4).T, *([every_sign(1e4, 1)] if name == "mpo" else [])]
    if name in ("ppo_policy", "ppo_value"):
        inputs = list(every_sign(1e4, 3).T[:, None])  # one row of 8 tokens
        inputs[2] = inputs[2] / 10 if name == "ppo_policy" else inputs[2]
        return [*inputs, torch.ones(1, 8)]
    if name == "reward_model":
        return [*every_sign(1e3, 2).T]
    return [torch.tensor([[-1e4, 0.0, -1e4]]), torch.ones(1, 3)]


CASES = [(name, options) for name, (_, _, several, _) in LOSSES.items() for options in several]
each_case = pytest.mark.parametrize(
    "name, options", CASES, ids=[f"{name}{list(options)}" for name, options in CASES]
)
each_loss = pytest.mark.parametrize("name", LOSSES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@each_case
@each_dtype
def test_a_loss_and_its_gradient_keep_the_dtype(name, options, dtype):
    function, make, _, trained = LOSSES[name]
    found = loss_and_gradients(function, make(dtype), options, trained)
    assert [x.dtype for x in found] == [dtype] * len(found)


@each_case
@each_dtype
def test_metrics_are_detached_scalars_and_the_first_is_the_loss(name, options, dtype):
    function, make, _, trained = LOSSES[name]
    inputs = make(dtype)
    for i in trained:
        inputs[i].requires_grad_()
    loss, metrics = function(*inputs, *options)
    assert loss.ndim == 0 and loss.requires_grad
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    first = next(iter(metrics))
    assert first.endswith("/loss") and torch.equal(metrics[first], loss)


@each_loss
def test_every_input_gives_the_same_metrics(name):
    """Whatever the options, the number of responses, the dtype and the size of the numbers."""
    function, make, several, _ = LOSSES[name]
    batches = [make(dtype, seed) for dtype in (torch.float32, torch.float64) for seed in range(3)]
    batches += [
        extreme_inputs(name),
        [torch.zeros_like(x) if i < 3 else x for i, x in enumerate(make())],
    ]
    keys = {tuple(function(*inputs, *options)[1]) for inputs in batches for options in several}
    assert len(keys) == 1 and len(set(*keys)) == len(*keys)


def test_the_two_losses_of_ppo_have_no_metric_in_common():
    inputs = token_inputs(3)()
    assert not ppo.policy_loss(*inputs, 0.2)[1].keys() & ppo.value_loss(*inputs, 0.2)[1].keys()


@each_case
@each_dtype
def test_extreme_inputs_give_a_finite_loss_gradient_and_metrics(name, options, dtype):
    function, _, _, trained = LOSSES[name]
    inputs = [x.to(dtype) for x in extreme_inputs(name)]
    assert all(x.isfinite().all() for x in loss_and_gradients(function, inputs, options, trained))
    _, metrics = function(*inputs, *options)
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(
    "name", ["online_dpo", "dpo", "ipo", "mpo", "ppo_policy", "ppo_value", "reward_model", "sft"]
)
def test_gradients_are_those_of_finite_differences(name):
    """Of the losses without a stop-gradient, at several random places."""
    function, make, several, trained = LOSSES[name]
    for options, seed in itertools.product(several, range(3)):
        inputs = make(seed=seed)

        def loss(*values, inputs=inputs, options=options):
            mixed = dict(enumerate(inputs)) | dict(zip(trained, values))
            return function(*mixed.values(), *options)[0]

        assert torch.autograd.gradcheck(loss, [inputs[i].clone().requires_grad_() for i in trained])


# --------------------------------------------------------------------------------------------------------------- P3O-V1
def plain_v1(l, old, ref, r, beta, clip_range, ratio_bound, sg=None):
    """P3O-V1 of lists [B][K], and what its pairs met: [(q, w_1, w_2, is y_1's term clipped, y_2's)]. `sg`: log π_θ in
    q and w, through which no gradient passes."""
    sg, terms, seen = sg or l, [], []
    for b in range(len(l)):
        for i, j in itertools.combinations(range(len(l[b])), 2):
            q = (r[b][i] - r[b][j]) - beta * ((sg[b][i] - ref[b][i]) - (sg[b][j] - ref[b][j]))
            w = {
                k: clip(math.exp(sg[b][k] - old[b][k]), 1 / ratio_bound, ratio_bound)
                for k in (i, j)
            }
            total, stopped = 0.0, []
            for sign, one, other in ((-1, i, j), (+1, j, i)):
                rho = math.exp(l[b][one] - old[b][one])
                term = clipped_term = sign * q * w[other] * rho
                if clip_range:
                    clipped_term = sign * q * w[other] * clip(rho, 1 - clip_range, 1 + clip_range)
                total += max(term, clipped_term)
                stopped.append(clipped_term > term)
            terms.append(0.5 * total)
            seen.append((q, w[i], w[j], *stopped))
    return mean(terms), seen


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_p3o_v1_is_its_formula(K, clip_range, spread):
    """Value, gradient and all metrics."""
    batch, options = random_pairs(8, K, spread=spread), (0.05, clip_range, R)
    plain = [x.tolist() for x in batch]
    value, seen = plain_v1(*plain, *options)
    loss, gradient = loss_and_gradients(p3o_v1.pairwise_loss, batch, options)
    torch.testing.assert_close(loss.item(), value, **CLOSE)
    expected = numerical_gradient(
        lambda l: plain_v1(l, *plain[1:], *options, sg=plain[0])[0], batch[0]
    )
    torch.testing.assert_close(gradient, expected, **NUMERICAL)

    log_ratios = (batch[0] - batch[1]).flatten().tolist()
    weights = [0.5 * q * w_1 * w_2 for q, w_1, w_2, *_ in seen]
    expected = {
        "policy/loss": value,
        "policy/clipfrac": mean(mean(stopped) for *_, stopped in ((*s[:3], s[3:]) for s in seen)),
        "policy/ratio_mean": mean(map(math.exp, log_ratios)),
        "policy/ratio_max": max(map(math.exp, log_ratios)),
        "policy/approx_kl": mean(math.exp(x) - 1 - x for x in log_ratios),
        "policy/pair_weight_mean": mean(weights),
        "policy/pair_weight_std": variance(weights) ** 0.5,
    }
    assert_metrics(p3o_v1.pairwise_loss(*batch, *options)[1], expected)


def test_the_random_batches_of_p3o_v1_meet_every_case():
    """Both signs of q with neither, one or the other term clipped; ratios inside [1/R, R] and beyond both ends."""
    seen = plain_v1(*(x.tolist() for x in random_pairs(40, 3, spread=2.0)), 0.05, 0.2, R)[1]
    assert {(q > 0, *stopped) for q, _, _, *stopped in seen} == set(
        itertools.product([True, False], repeat=3)
    )
    weights = {w for _, *pair, _, _ in seen for w in pair}
    assert weights >= {R, 1 / R} and len(weights) > 2


@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_p3o_v1_is_the_same_when_responses_are_exchanged(clip_range):
    """Exactly; the gradient goes with its response."""
    batch, options = random_pairs(8, 2, spread=1.0), (0.05, clip_range, R)
    swapped = [x.flip(1) for x in batch]
    loss, gradient = loss_and_gradients(p3o_v1.pairwise_loss, batch, options)
    swapped_loss, swapped_gradient = loss_and_gradients(p3o_v1.pairwise_loss, swapped, options)
    assert swapped_loss == loss and torch.equal(swapped_gradient.flip(1), gradient)
    metrics, swapped_metrics = (p3o_v1.pairwise_loss(*x, *options)[1] for x in (batch, swapped))
    metrics["policy/pair_weight_mean"] *= -1  # which is of h_1 − h_2
    torch.testing.assert_close(swapped_metrics, metrics, **CLOSE)


def test_the_order_of_many_responses_does_not_matter_to_p3o_v1():
    batch, order = random_pairs(8, 4, spread=1.0), torch.tensor([2, 0, 3, 1])
    loss, gradient = loss_and_gradients(p3o_v1.pairwise_loss, batch, (0.05, 0.2, R))
    found = loss_and_gradients(p3o_v1.pairwise_loss, [x[:, order] for x in batch], (0.05, 0.2, R))
    torch.testing.assert_close(found, (loss, gradient[:, order]), **CLOSE)


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_on_policy_both_forms_of_p3o_have_the_gradient_of_the_pairwise_policy_gradient(
    K, clip_range
):
    """−½ q ∇(log π_θ(y_1) − log π_θ(y_2)), a mean over prompts and pairs; clipping has no effect yet."""
    logps, _, ref_logps, rewards = random_pairs(8, K)
    batch, beta = (logps, logps.clone(), ref_logps, rewards), 0.05
    expected, h = torch.zeros(8, K, dtype=torch.float64), logps - ref_logps
    for i, j in itertools.combinations(range(K), 2):
        q = (rewards[:, i] - rewards[:, j]) - beta * (h[:, i] - h[:, j])
        expected[:, i] -= 0.5 * q / (8 * math.comb(K, 2))
        expected[:, j] += 0.5 * q / (8 * math.comb(K, 2))
    for module in (p3o_v1, p3o_v2):
        _, gradient = loss_and_gradients(module.pairwise_loss, batch, (beta, clip_range, R))
        torch.testing.assert_close(gradient, expected, **CLOSE)


def test_on_policy_p3o_v1_has_the_gradient_of_a_regression_on_reward_differences():
    """(1/4β) mean [(r_1 − r_2) − β (h_1 − h_2)]²."""
    logps, _, ref_logps, rewards = random_pairs(8, 2)
    batch, beta = (logps, logps.clone(), ref_logps, rewards), 0.05
    _, gradient = loss_and_gradients(p3o_v1.pairwise_loss, batch, (beta, 0.0, R))
    h = logps.requires_grad_() - ref_logps
    regression = ((rewards[:, 0] - rewards[:, 1]) - beta * (h[:, 0] - h[:, 1])).square().mean() / (
        4 * beta
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(regression, logps)[0], **CLOSE)


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_expected_gradient_of_p3o_v1_is_the_objectives(K, on_policy):
    """−∇(E[r] − β KL), by exact sums on a policy over 4 responses; of another policy's samples too, R out of reach."""
    noise = normal(4, 4)
    logits, ref_logps, rewards, beta = (
        noise[0].requires_grad_(),
        noise[1].log_softmax(0),
        2 * noise[2],
        0.3,
    )
    old_logps = (logits.detach() if on_policy else noise[3]).log_softmax(0)
    logps, expected_loss = logits.log_softmax(0), 0.0
    for draw in itertools.product(range(4), repeat=K):
        row = [x[list(draw)][None] for x in (logps, old_logps, ref_logps, rewards)]
        probability = old_logps[list(draw)].sum().exp()
        expected_loss = expected_loss + probability * p3o_v1.pairwise_loss(*row, beta, 0.0, 1e9)[0]
    found, logps = torch.autograd.grad(expected_loss, logits)[0], logits.log_softmax(0)
    objective = (logps.exp() * (rewards - beta * (logps - ref_logps))).sum()
    torch.testing.assert_close(found, torch.autograd.grad(-objective, logits)[0], **CLOSE)


@pytest.mark.parametrize("K", [2, 3])
def test_what_is_added_to_all_scores_of_a_prompt_has_no_effect_on_p3o_v1(K):
    """Through the reward pipeline, over several updates: rewards, loss and gradient."""
    running, shifted_running = [0.0, 0], [0.0, 0]
    for update in range(3):
        *logps, scores = random_pairs(6, K, seed=update, spread=1.0)
        rewards, _ = p3o_v1.centre_and_scale(scores, running)
        shifted, _ = p3o_v1.centre_and_scale(
            scores + 20 * normal(6, 1, seed=update), shifted_running
        )
        torch.testing.assert_close(shifted, rewards, rtol=0, atol=1e-12)
        before, after = (
            loss_and_gradients(p3o_v1.pairwise_loss, [*logps, r], (0.05, 0.2, R))
            for r in (rewards, shifted)
        )
        torch.testing.assert_close(after, before, rtol=0, atol=1e-11)


@pytest.mark.parametrize("q", [1.0, -1.0])
@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("log_ratio", [-25.0, -3.0, -0.23, -0.22, 0.0, 0.18, 0.19, 3.0, 15.0, 25.0])
def test_p3o_v1_stops_a_response_that_has_moved_far_enough_the_way_q_wants(q, moved, log_ratio):
    """And never one that has moved the other way, however far; nor the other response. log 0.8 = −0.223, log 1.2 =
    0.182."""
    logps = torch.full((1, 2), -50.0, dtype=torch.float64)
    old, rewards = logps.clone(), torch.tensor([[q, 0.0]], dtype=torch.float64)
    logps[0, moved] += log_ratio
    batch = (logps, old, logps, rewards)
    _, gradient = loss_and_gradients(p3o_v1.pairwise_loss, batch, (0.05, 0.2, R))
    wanted = q if moved == 0 else -q  # the way that q moves this response
    stopped = log_ratio > math.log(1.2) if wanted > 0 else log_ratio < math.log(0.8)
    assert (gradient[0, moved] * wanted < 0) == (not stopped)
    assert (gradient[0, moved] == 0) == stopped
    w = clip(math.exp(log_ratio), 1 / R, R)
    assert gradient[0, 1 - moved].item() == pytest.approx(0.5 * wanted * w)
    assert p3o_v1.pairwise_loss(*batch, 0.05, 0.2, R)[1]["policy/clipfrac"] == stopped / 2


def test_without_a_clip_range_p3o_v1_never_clips():
    """As with a range out of reach."""
    batch = random_pairs(20, 3, spread=3.0)
    found, expected = (
        loss_and_gradients(p3o_v1.pairwise_loss, batch, (0.05, x, R)) for x in (0.0, 1e9)
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found[1] != 0).all()
    assert p3o_v1.pairwise_loss(*batch, 0.05, 0.0, R)[1]["policy/clipfrac"] == 0


# ------------------------------------------------------------------------------------------------------ the note's view
def implicit_reward(logps, ref_logps, beta):
    """δ_r = β (h_1 − h_2) of [B, 2], and the gradient of its entries with respect to log π_θ, a row for a row: ∇δ_r."""
    h = logps - ref_logps
    return beta * (h[:, :1] - h[:, 1:]), beta * torch.tensor([[1.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("module", [p3o_v1, p3o_v2])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_implicit_rewards_alone_have_the_notes_gradient(module, clip_range):
    """β = 0 and rewards βh, on-policy: −(1/2β) δ_r ∇δ_r, a mean over prompts."""
    logps, _, ref_logps, _ = random_pairs(8, 2)
    delta_r, gradient_of_delta_r = implicit_reward(logps, ref_logps, 0.1)
    batch = logps, logps.clone(), ref_logps, 0.1 * (logps - ref_logps)
    _, gradient = loss_and_gradients(module.pairwise_loss, batch, (0.0, clip_range, R))
    torch.testing.assert_close(
        gradient, -1 / (2 * 0.1) * delta_r * gradient_of_delta_r / 8, **CLOSE
    )


@pytest.mark.parametrize("module", [p3o_v1, p3o_v2])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
def test_rewards_less_implicit_rewards_have_the_notes_gradient(module, clip_range):
    """Rewards r, on-policy: −(1/2β) (Δr − δ_r) ∇δ_r, a mean over prompts."""
    logps, _, ref_logps, rewards = random_pairs(8, 2)
    delta_r, gradient_of_delta_r = implicit_reward(logps, ref_logps, 0.1)
    _, gradient = loss_and_gradients(
        module.pairwise_loss, (logps, logps.clone(), ref_logps, rewards), (0.1, clip_range, R)
    )
    difference = rewards[:, :1] - rewards[:, 1:]
    torch.testing.assert_close(
        gradient, -1 / (2 * 0.1) * (difference - delta_r) * gradient_of_delta_r / 8, **CLOSE
    )


def test_dpo_has_the_notes_gradient():
    """−σ(−δ_r) ∇δ_r, a mean over pairs."""
    logps, _, ref_logps, _ = random_pairs(8, 2)
    delta_r, gradient_of_delta_r = implicit_reward(logps, ref_logps, 0.1)
    _, *gradients = loss_and_gradients(
        dpo.preference_loss, (*logps.T, *ref_logps.T), (0.1, 0.0), (0, 1)
    )
    expected = -torch.sigmoid(-delta_r) * gradient_of_delta_r / 8
    torch.testing.assert_close(torch.stack(gradients, 1), expected, **CLOSE)


# ----------------------------------------------------------------------------------------- the weight of a pair, logged
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
@pytest.mark.parametrize("name", ["p3o_v1", "p3o_v2", "online_dpo", "online_dpo, hard labels"])
def test_pair_weight_online_is_the_ascent_coefficient(name, clip_range):
    """On-policy: mean and standard deviation of what ∇(h_1 − h_2) is multiplied with, a pair at a time by autograd, and
    the formulas ½ q and β(s − σ(βd))."""
    logps, _, ref_logps, rewards = random_pairs(8, 3)
    h, beta = logps - ref_logps, 0.1
    if name.startswith("p3o"):
        function, batch = (
            {"p3o_v1": p3o_v1, "p3o_v2": p3o_v2}[name].pairwise_loss,
            (logps, logps, ref_logps, rewards),
        )
        options = (beta, clip_range, R)
    else:
        function, batch, options = (
            online_dpo.pairwise_loss,
            (logps, ref_logps, rewards),
            (beta, "hard" in name),
        )
    measured, formula = [], []
    for i, j in itertools.combinations(range(3), 2):
        pair = [x[:, [i, j]] for x in batch]
        _, gradient = loss_and_gradients(function, pair, options)
        torch.testing.assert_close(
            gradient[:, 0], -gradient[:, 1], **CLOSE
        )  # it is a gradient of h_1 − h_2
        measured += (-8 * gradient[:, 0]).tolist()
        for r, d in zip((rewards[:, i] - rewards[:, j]).tolist(), (h[:, i] - h[:, j]).tolist()):
            label = won(r) if "hard" in name else sigmoid(r)
            formula.append(
                0.5 * (r - beta * d) if "p3o" in name else beta * (label - sigmoid(beta * d))
            )
    torch.testing.assert_close(measured, formula, **CLOSE)
    _, metrics = function(*batch, *options)
    assert metrics["policy/pair_weight_mean"].item() == pytest.approx(mean(measured), rel=1e-10)
    assert metrics["policy/pair_weight_std"].item() == pytest.approx(
        variance(measured) ** 0.5, rel=1e-10
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("dpo", (0.1, 0.0)),
        ("dpo", (0.1, 0.3)),
        ("ipo", (0.1,)),
        ("ipo", (1.0,)),
        ("mpo", (0.1, 0.01)),
        ("mpo", (2.0, 0)),
    ],
)
def test_pair_weight_of_labelled_pairs_is_the_ascent_coefficient(name, options):
    """By autograd, and the formula: DPO's is β σ(−δ_r)."""
    function, make, *_ = LOSSES[name]
    inputs = make(seed=3)
    _, chosen, rejected = loss_and_gradients(function, inputs, options, (0, 1))
    torch.testing.assert_close(chosen, -rejected, **CLOSE)
    found = function(*inputs, *options)[1]["policy/pair_weight_mean"].item()
    assert found == pytest.approx(-chosen.sum().item(), rel=1e-10)
    if name == "dpo" and options[1] == 0:
        w, l, ref_w, ref_l = (x.tolist() for x in inputs)
        margins = [0.1 * ((a - c) - (b - d)) for a, b, c, d in zip(w, l, ref_w, ref_l)]
        assert found == pytest.approx(mean(0.1 * sigmoid(-x) for x in margins), rel=1e-10)


# ----------------------------------------------------------------------------------------------------------- online DPO
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("hard_labels", [False, True])
@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_online_dpo_is_its_formula(K, hard_labels, beta):
    """Value and all metrics, with ties of rewards and of implicit rewards among the pairs: a tie is half a win."""
    _, logps, ref_logps, rewards = random_pairs(8, K)
    rewards[0] = 0.7
    ref_logps[1] = logps[1]
    losses, weights, margins, agree = [], [], [], []
    for l, ref, r in zip(logps.tolist(), ref_logps.tolist(), rewards.tolist()):
        for i, j in itertools.combinations(range(K), 2):
            difference, z = r[i] - r[j], beta * ((l[i] - ref[i]) - (l[j] - ref[j]))
            s = won(difference) if hard_labels else sigmoid(difference)
            losses.append(-(s * log_sigmoid(z) + (1 - s) * log_sigmoid(-z)))
            weights.append(beta * (s - sigmoid(z)))
            margins.append(z * (2 * won(difference) - 1))
            agree.append(won(z * difference))
    expected = {
        "policy/loss": mean(losses),
        "rewards/accuracies": mean(agree),
        "rewards/margins": mean(margins),
        "policy/pair_weight_mean": mean(weights),
        "policy/pair_weight_std": variance(weights) ** 0.5,
    }
    loss, metrics = online_dpo.pairwise_loss(logps, ref_logps, rewards, beta, hard_labels)
    torch.testing.assert_close(loss.item(), expected["policy/loss"], **CLOSE)
    assert_metrics(metrics, expected)


def test_hard_labels_are_the_sign_of_the_difference_and_half_at_a_tie():
    """With β d = 0 the ascent coefficient is β (s − ½)."""
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    rewards = torch.tensor([[1e-9, 0.0], [0.0, 1e-9], [5.0, 5.0]], dtype=torch.float64)
    _, gradient = loss_and_gradients(online_dpo.pairwise_loss, (zeros, zeros, rewards), (0.1, True))
    torch.testing.assert_close(
        -3 * gradient[:, 0], 0.1 * torch.tensor([0.5, -0.5, 0.0]).double(), **CLOSE
    )


@pytest.mark.parametrize("hard_labels", [False, True])
def test_only_differences_of_rewards_enter_online_dpo_and_the_order_does_not_matter(hard_labels):
    _, *batch = random_pairs(8, 3)
    loss, gradient = loss_and_gradients(online_dpo.pairwise_loss, batch, (0.1, hard_labels))
    batch[2] = batch[2] + 20 * normal(8, 1)
    order = torch.tensor([2, 0, 1])
    found = loss_and_gradients(
        online_dpo.pairwise_loss, [x[:, order] for x in batch], (0.1, hard_labels)
    )
    torch.testing.assert_close(found, (loss, gradient[:, order]), **CLOSE)


def test_online_dpo_with_hard_labels_is_dpo_on_its_own_samples():
    """y_w the sample of the higher reward, y_l the other: loss, gradient, and the metrics that both have."""
    _, logps, ref_logps, rewards = random_pairs(10, 2)
    better = rewards.argmax(1)
    assert 0 < better.sum() < 10
    order = torch.stack([better, 1 - better], 1)
    loss, gradient = loss_and_gradients(
        online_dpo.pairwise_loss, (logps, ref_logps, rewards), (0.1, True)
    )
    labelled = [*logps.gather(1, order).T, *ref_logps.gather(1, order).T]
    dpo_loss, chosen, rejected = loss_and_gradients(
        dpo.preference_loss, labelled, (0.1, 0.0), (0, 1)
    )
    torch.testing.assert_close(loss, dpo_loss, **CLOSE)
    torch.testing.assert_close(
        gradient.gather(1, order), torch.stack([chosen, rejected], 1), **CLOSE
    )
    _, metrics = online_dpo.pairwise_loss(logps, ref_logps, rewards, 0.1, True)
    _, dpo_metrics = dpo.preference_loss(*labelled, 0.1, 0.0)
    for key in ("policy/loss", "rewards/margins", "rewards/accuracies"):
        torch.testing.assert_close(metrics[key], dpo_metrics[key], **CLOSE)


def test_online_dpo_with_soft_labels_of_one_probability_is_dpo_with_label_smoothing():
    """r_w − r_l = log((1 − ε)/ε)."""
    _, logps, ref_logps, _ = random_pairs(10, 2)
    rewards = torch.tensor([[math.log(0.7 / 0.3), 0.0]], dtype=torch.float64).expand(10, 2)
    loss, gradient = loss_and_gradients(
        online_dpo.pairwise_loss, (logps, ref_logps, rewards), (0.1, False)
    )
    labelled = (*logps.T, *ref_logps.T)
    dpo_loss, chosen, rejected = loss_and_gradients(
        dpo.preference_loss, labelled, (0.1, 0.3), (0, 1)
    )
    torch.testing.assert_close(
        (loss, gradient), (dpo_loss, torch.stack([chosen, rejected], 1)), **CLOSE
    )


# --------------------------------------------------------------------------------------------- DPO, IPO: labelled pairs
def plain_margins(inputs):
    """h_w and h_l of every pair."""
    w, l, ref_w, ref_l = (x.tolist() for x in inputs)
    return [a - b for a, b in zip(w, ref_w)], [a - b for a, b in zip(l, ref_l)]


def metrics_of_pairs(inputs, scale):
    """The metrics that all losses of labelled pairs have, implicit rewards being scale × h."""
    h_w, h_l = plain_margins(inputs)
    return {
        "rewards/chosen": scale * mean(h_w),
        "rewards/rejected": scale * mean(h_l),
        "rewards/margins": mean(scale * (a - b) for a, b in zip(h_w, h_l)),
        "rewards/accuracies": mean(won(a - b) for a, b in zip(h_w, h_l)),
        "logps/chosen": mean(inputs[0].tolist()),
        "logps/rejected": mean(inputs[1].tolist()),
    }


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("beta, smoothing", [(0.1, 0.0), (0.1, 0.2), (1.0, 0.5)])
def test_dpo_is_its_formula(spread, beta, smoothing):
    """Value and all metrics."""
    inputs = random_labelled(9, spread=spread)
    z = [beta * (a - b) for a, b in zip(*plain_margins(inputs))]
    value = mean(-((1 - smoothing) * log_sigmoid(x) + smoothing * log_sigmoid(-x)) for x in z)
    weight = mean(beta * ((1 - smoothing) * sigmoid(-x) - smoothing * sigmoid(x)) for x in z)
    loss, metrics = dpo.preference_loss(*inputs, beta, smoothing)
    torch.testing.assert_close(loss.item(), value, **CLOSE)
    expected = {
        "policy/loss": value,
        "policy/pair_weight_mean": weight,
        **metrics_of_pairs(inputs, beta),
    }
    assert_metrics(metrics, expected)


def margin_gradient(function, margin, options):
    """∂L / ∂(h_w − h_l) of pairs with such a margin, both ways: [(labelled so, gradient), (labelled otherwise, …)]."""
    zero, margin = torch.zeros(1, dtype=torch.float64), torch.tensor([margin], dtype=torch.float64)
    _, forward = loss_and_gradients(function, (margin, zero, zero, zero), options)
    _, backward = loss_and_gradients(function, (zero, margin, zero, zero), options, (1,))
    return forward.item(), backward.item()


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_dpo_with_label_smoothing_asks_for_the_odds_of_the_labels(smoothing):
    """Its minimiser is β (h_w − h_l) = log((1 − ε)/ε)."""
    margin = math.log((1 - smoothing) / smoothing) / 0.1
    assert margin_gradient(dpo.preference_loss, margin, (0.1, smoothing))[0] == pytest.approx(
        0, abs=1e-12
    )


def test_half_the_labels_wrong_leaves_dpo_at_the_reference():
    assert margin_gradient(dpo.preference_loss, 0.0, (0.1, 0.5))[0] == 0


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_is_its_formula(spread, tau):
    """Value and all metrics."""
    inputs = random_labelled(9, spread=spread)
    excess = [a - b - 1 / (2 * tau) for a, b in zip(*plain_margins(inputs))]
    value = mean(x * x for x in excess)
    loss, metrics = ipo.preference_loss(*inputs, tau)
    torch.testing.assert_close(loss.item(), value, **CLOSE)
    expected = {
        "policy/loss": value,
        "policy/pair_weight_mean": -2 * mean(excess),
        **metrics_of_pairs(inputs, tau),
    }
    assert_metrics(metrics, expected)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_ipo_with_labels_always_the_same_way_stops_at_its_margin(tau):
    """h_w − h_l = 1/(2τ): there the loss and its gradient are 0; below it pulls up, above it pulls down."""
    margin, zero = (
        torch.tensor([1 / (2 * tau)], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
    )
    assert ipo.preference_loss(margin, zero, zero, zero, tau)[0] == 0
    assert margin_gradient(ipo.preference_loss, margin.item(), (tau,))[0] == 0
    assert margin_gradient(ipo.preference_loss, margin.item() - 0.1, (tau,))[0] < 0
    assert margin_gradient(ipo.preference_loss, margin.item() + 0.1, (tau,))[0] > 0


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("right, of", [(1, 2), (3, 4), (9, 10), (1, 5), (7, 7)])
def test_ipo_with_labels_both_ways_stops_at_the_margin_of_their_probability(tau, right, of):
    """One pair, labelled y_1 ≻ y_2 in a share p of the rows: (2p − 1)/(2τ), the loss least there."""
    p = right / of
    optimum = (2 * p - 1) / (2 * tau)

    def loss_of(h):  # of log π_θ(y_1) − log π_ref(y_1) = h, and 0 for y_2
        first, second = h.expand(of), torch.zeros(of, dtype=torch.float64)
        is_right = torch.arange(of) < right
        logps = torch.where(is_right, first, second), torch.where(is_right, second, first)
        return ipo.preference_loss(*logps, torch.zeros(of).double(), torch.zeros(of).double(), tau)[
            0
        ]

    h = torch.tensor(optimum, dtype=torch.float64, requires_grad=True)
    loss = loss_of(h)
    assert torch.autograd.grad(loss, h)[0].item() == pytest.approx(0, abs=1e-12)
    assert loss_of(h + 0.1) > loss and loss_of(h - 0.1) > loss


@pytest.mark.parametrize("name", ["dpo", "ipo", "mpo"])
def test_what_both_models_add_to_a_pair_has_no_effect(name):
    """log π of a pair's prompt, in both its responses or in both its models, cancels in the gradient of the pair."""
    function, make, several, _ = LOSSES[name]
    inputs, shift = make(), 20 * normal(6)
    _, *expected = loss_and_gradients(function, inputs, several[0], (0, 1))
    for places in ((0, 1), (2, 3)):
        moved = [x + shift if i in places else x for i, x in enumerate(inputs)]
        _, *found = loss_and_gradients(function, moved, several[0], (0, 1))
        torch.testing.assert_close(found, expected, **CLOSE)


# ------------------------------------------------------------------------------------------------------------------ MPO
def plain_mpo(inputs, beta, tau):
    """The loss, and of every pair (p_1, I_1 p_1, KL(p ‖ p_ref), β-term's and label's ascent coefficient)."""
    w, l, ref_w, ref_l = (x.tolist() for x in inputs[:4])
    terms, seen = [], []
    for z, ref_z in zip((a - b for a, b in zip(w, l)), (a - b for a, b in zip(ref_w, ref_l))):
        kl = 0.0
        for sign, label in ((1, 1.0), (-1, 0.0)):  # the two actions
            p, log_ratio = sigmoid(sign * z), log_sigmoid(sign * z) - log_sigmoid(sign * ref_z)
            terms.append(-label * p + beta * p * log_ratio)
            kl += p * log_ratio
        p = sigmoid(z)
        seen.append((p, kl, p * sigmoid(-z) * (1 - beta * (z - ref_z)) / 2))
    return mean(terms) - tau * mean(inputs[4].flatten().tolist()), seen


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("beta, tau", [(0.1, 0.01), (0.0, 0.0), (2.0, 0.5)])
def test_mpo_is_its_formula(spread, beta, tau):
    """Value and all metrics."""
    inputs = [*random_labelled(9, spread=spread), -30 + normal(9, 2)]
    value, seen = plain_mpo(inputs, beta, tau)
    loss, metrics = mpo.preference_loss(*inputs, beta, tau)
    torch.testing.assert_close(loss.item(), value, **CLOSE)
    expected = {
        "policy/loss": value,
        "policy/pair_weight_mean": mean(weight for *_, weight in seen),
        "policy/preference": mean(p for p, *_ in seen),
        "policy/preference_kl": mean(kl for _, kl, _ in seen),
        "policy/saturated_frac": mean(max(p, 1 - p) > 0.999 for p, *_ in seen),
        **metrics_of_pairs(inputs[:4], 1),
        "logps/ref_samples": mean(inputs[4].flatten().tolist()),
    }
    assert_metrics(metrics, expected)


def test_the_beta_term_of_mpo_vanishes_at_the_reference():
    """Value and gradient are 0 at π_θ = π_ref, where the policy's differences are: what is left is the preference."""
    logps, samples = random_labelled(6, spread=3.0)[:2], normal(6)
    with_beta, without = (
        loss_and_gradients(mpo.preference_loss, (*logps, *logps, samples), (beta, 0.01), (0, 1, 4))
        for beta in (5.0, 0.0)
    )
    torch.testing.assert_close(with_beta, without, **CLOSE)
    assert (
        mpo.preference_loss(*logps, *logps, samples, 5.0, 0.01)[1]["policy/preference_kl"].abs()
        < 1e-12
    )
    away = [logps[0] + 1, logps[1], *logps, samples]
    assert mpo.preference_loss(*away, 5.0, 0.01)[0] > mpo.preference_loss(*away, 0.0, 0.01)[0]


def test_the_mean_over_both_actions_halves_the_preference():
    """β = 0, τ = 0: the loss is −½ p_1, so that τ counts double against the paper's equation 32."""
    inputs = [*random_labelled(6), normal(6)]
    expected = -0.5 * mean(sigmoid(a - b) for a, b in zip(inputs[0].tolist(), inputs[1].tolist()))
    assert mpo.preference_loss(*inputs, 0.0, 0.0)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(5,), (6, 1), (6, 3)])
def test_mpo_raises_the_reference_samples_by_tau_over_their_number(shape):
    """However many there are to a pair, and independently of the pairs."""
    inputs = [*random_labelled(6), normal(*shape)]
    _, *gradients = loss_and_gradients(mpo.preference_loss, inputs, (0.1, 0.03), (0, 1, 4))
    torch.testing.assert_close(
        gradients[2], torch.full(shape, -0.03 / math.prod(shape), dtype=torch.float64), **CLOSE
    )
    _, *others = loss_and_gradients(
        mpo.preference_loss, [*inputs[:4], normal(2, seed=1)], (0.1, 0.0), (0, 1)
    )
    torch.testing.assert_close(gradients[:2], others, **CLOSE)


def test_exchanging_the_responses_of_mpos_pairs_exchanges_the_label_alone():
    """p_1 becomes 1 − p_1: without β and τ the two losses sum to −½ and have the same gradient, each response's being
    the other's negative; the KL of the two actions stays."""
    w, l, ref_w, ref_l = random_labelled(6)
    pairs, exchanged = (w, l, ref_w, ref_l, normal(6)), (l, w, ref_l, ref_w, normal(6))
    loss, chosen, rejected = loss_and_gradients(mpo.preference_loss, pairs, (0.0, 0.0), (0, 1))
    other_loss, *others = loss_and_gradients(mpo.preference_loss, exchanged, (0.0, 0.0), (0, 1))
    assert (loss + other_loss).item() == pytest.approx(-0.5, rel=1e-12)
    torch.testing.assert_close(others, [chosen, rejected], **CLOSE)
    metrics, other_metrics = (mpo.preference_loss(*x, 0.1, 0.01)[1] for x in (pairs, exchanged))
    for key in ("policy/preference_kl", "policy/saturated_frac", "logps/ref_samples"):
        torch.testing.assert_close(metrics[key], other_metrics[key], **CLOSE)
    torch.testing.assert_close(
        metrics["policy/preference"], 1 - other_metrics["policy/preference"], **CLOSE
    )


def test_saturated_pairs_have_an_action_more_probable_than_0_999():
    """log(0.999/0.001) = 6.9068."""
    z = torch.tensor([6.90, 6.91, -6.90, -6.91, 0.0, 300.0, -300.0, 1.0], dtype=torch.float64)
    zeros = torch.zeros_like(z)
    assert (
        mpo.preference_loss(z, zeros, zeros, zeros, zeros, 0.1, 0.01)[1]["policy/saturated_frac"]
        == 4 / 8
    )


# ------------------------------------------------------------------------------------------------------------------ PPO
def beyond(mask, x, filling):
    """x with `filling` where the mask is 0."""
    return x.masked_fill(~mask, filling)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gae_is_the_discounted_sum_of_all_that_follows(gamma, lam, seed):
    """Σ_l (γλ)^l δ_(t+l) over the tokens of the response, V = 0 after the last; 0 on padding, whatever that holds."""
    rewards, values, _, _, mask = random_tokens(B=7, seed=seed)
    lengths, expected = mask.sum(1).tolist(), torch.zeros_like(rewards)
    for b, length in enumerate(lengths):
        r, v = rewards[b, :length].tolist(), [*values[b, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[b, t] = math.fsum(
                (gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)
            )
    for filling in (0.0, nan, inf, -inf):
        for form in (mask, mask.long(), mask.double()):
            advantages, returns = ppo.gae(
                beyond(mask, rewards, filling), beyond(mask, values, filling), form, gamma, lam
            )
            torch.testing.assert_close(advantages, expected, **CLOSE)
            assert (advantages[~mask] == 0).all() and returns.isfinite().all()
            torch.testing.assert_close(returns[mask], (expected + values)[mask], **CLOSE)


def test_returns_without_discount_are_the_sums_of_future_rewards():
    """γ = 1, λ = 1: whatever the values are."""
    rewards, values, _, _, mask = random_tokens()
    _, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    for b, length in enumerate(mask.sum(1).tolist()):
        expected = [math.fsum(rewards[b, t:length].tolist()) for t in range(length)]
        torch.testing.assert_close(returns[b, :length].tolist(), expected, **CLOSE)


def test_right_values_leave_no_advantage():
    """V_t the sum of future rewards: every δ is 0, and returns are the values."""
    rewards, zeros, _, _, mask = random_tokens()
    values = ppo.gae(rewards, torch.zeros_like(zeros), mask, 1.0, 1.0)[1]
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), **CLOSE)
    torch.testing.assert_close(returns, values, **CLOSE)


@pytest.mark.parametrize("clip_range", [0.0, 0.2])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_ppos_policy_loss_is_its_formula(clip_range, spread):
    """Value, gradient and all metrics, means over tokens and not over responses."""
    logprobs, moved, advantages, _, mask = random_tokens()
    old = logprobs - spread * moved

    def plain(logprobs, seen=None):
        losses = []
        for b, t in mask.nonzero().tolist():
            log_ratio, A = logprobs[b][t] - old[b, t].item(), advantages[b, t].item()
            loss = clipped = -A * math.exp(log_ratio)
            if clip_range:
                clipped = -A * clip(math.exp(log_ratio), 1 - clip_range, 1 + clip_range)
            losses.append(max(loss, clipped))
            if seen is not None:
                seen.append((log_ratio, clipped > loss))
        return mean(losses)

    value = plain(logprobs.tolist(), seen := [])
    loss, gradient = loss_and_gradients(
        ppo.policy_loss, (logprobs, old, advantages, mask), (clip_range,)
    )
    torch.testing.assert_close(loss.item(), value, **CLOSE)
    torch.testing.assert_close(gradient, numerical_gradient(plain, logprobs), **NUMERICAL)
    ratios, stopped = [math.exp(x) for x, _ in seen], [is_clipped for _, is_clipped in seen]
    assert any(stopped) == (clip_range > 0)
    expected = {
        "policy/loss": value,
        "policy/clipfrac": mean(stopped),
        "policy/ratio_mean": mean(ratios),
        "policy/ratio_max": max(ratios),
        "policy/approx_kl": mean(math.exp(x) - 1 - x for x, _ in seen),
    }
    assert_metrics(ppo.policy_loss(logprobs, old, advantages, mask, clip_range)[1], expected)


@pytest.mark.parametrize("clip_range", [0.0, 0.2])
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_ppos_value_loss_is_its_formula(clip_range, spread):
    """Value, gradient and all metrics."""
    values, moved, returns, _, mask = random_tokens(seed=1)
    old = values - spread * moved

    def plain(values, seen=None):
        losses = []
        for b, t in mask.nonzero().tolist():
            V, V_old, target = values[b][t], old[b, t].item(), returns[b, t].item()
            clipped = clip(V, V_old - clip_range, V_old + clip_range) if clip_range else V
            losses.append(max((V - target) ** 2, (clipped - target) ** 2))
            if seen is not None:
                seen.append((V, target, (clipped - target) ** 2 > (V - target) ** 2))
        return 0.5 * mean(losses)

    value = plain(values.tolist(), seen := [])
    loss, gradient = loss_and_gradients(ppo.value_loss, (values, old, returns, mask), (clip_range,))
    torch.testing.assert_close(loss.item(), value, **CLOSE)
    torch.testing.assert_close(gradient, numerical_gradient(plain, values), **NUMERICAL)
    targets, stopped = [target for _, target, _ in seen], [is_clipped for *_, is_clipped in seen]
    assert any(stopped) == (clip_range > 0 and spread == 1)
    expected = {
        "value/loss": value,
        "value/clipfrac": mean(stopped),
        "value/mean": mean(V for V, *_ in seen),
        "value/explained_variance": 1
        - variance([target - V for V, target, _ in seen]) / variance(targets),
    }
    assert_metrics(ppo.value_loss(values, old, returns, mask, clip_range)[1], expected)


@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [-25.0, -3.0, -0.23, -0.22, 0.0, 0.18, 0.19, 3.0, 15.0, 25.0])
def test_ppo_stops_a_token_that_has_moved_far_enough_the_way_its_advantage_wants(A, log_ratio):
    """And never one that has moved the other way, however far."""
    logprobs = torch.tensor([[log_ratio - 30]], dtype=torch.float64)
    old, advantages = torch.full_like(logprobs, -30), torch.full_like(logprobs, A)
    _, gradient = loss_and_gradients(
        ppo.policy_loss, (logprobs, old, advantages, torch.ones(1, 1)), (0.2,)
    )
    stopped = log_ratio > math.log(1.2) if A > 0 else log_ratio < math.log(0.8)
    assert (gradient.item() == 0) == stopped
    assert (gradient.item() * A < 0) == (not stopped)


@pytest.mark.parametrize("function", [ppo.policy_loss, ppo.value_loss])
@pytest.mark.parametrize("clip_range", [0.0, 0.2])
@pytest.mark.parametrize("filling", [1e30, nan, inf, -inf])
def test_padding_is_ignored_whatever_it_holds(function, clip_range, filling):
    """Loss, gradient and metrics, for every form of mask; the gradient of padding is 0."""
    *inputs, _, mask = random_tokens()
    assert not mask.all()
    loss, gradient = loss_and_gradients(function, (*inputs, mask), (clip_range,))
    _, metrics = function(*inputs, mask, clip_range)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[~mask] == 0).all()
    filled = [beyond(mask, x, filling) for x in inputs]
    for form in (mask, mask.long(), mask.double()):
        found_loss, found_gradient = loss_and_gradients(function, (*filled, form), (clip_range,))
        assert torch.equal(found_loss, loss) and torch.equal(found_gradient, gradient)
        assert function(*filled, form, clip_range)[1] == metrics


def test_explained_variance_is_1_for_right_values_and_0_for_their_mean():
    _, _, returns, _, mask = random_tokens()
    centre = torch.full_like(returns, returns[mask].mean())
    for values, expected in (
        (returns, 1.0),
        (returns + 5, 1.0),
        (centre, 0.0),
        (2 * centre - returns, -3.0),
    ):
        found = ppo.value_loss(values, values, returns, mask, 0.2)[1][
            "value/explained_variance"
        ].item()
        assert found == pytest.approx(expected, abs=1e-12)


@each_dtype
@pytest.mark.parametrize("centre, spread", [(0.0, 1.0), (3.0, 2.0), (-100.0, 0.1), (1000.0, 1.0)])
def test_scores_are_divided_by_the_standard_deviation_of_all_so_far(dtype, centre, spread):
    """That of torch, over all updates, the present one included; their mean stays."""
    running, seen = [0.0, 0.0, 0.0], []
    for update in range(4):
        scores = (centre + (update + 1) * spread * normal(5, 2, seed=update)).to(dtype)
        seen.append(scores.double())
        expected = torch.cat(seen).std().item()
        rewards, scale = ppo.scale_by_std(scores, running)
        assert scale == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(
            rewards, (scores.double() / expected).clamp(-10, 10), rtol=1e-6, atol=1e-6
        )


def test_scaled_scores_are_clipped_at_10():
    """After the division: the unit is the standard deviation."""
    scores = normal(2000, 1)
    scores[0], scores[1] = 1e3, -1e3
    rewards, scale = ppo.scale_by_std(scores, [0.0, 0.0, 0.0])
    assert rewards[:2].flatten().tolist() == [10, -10]
    torch.testing.assert_close(rewards[2:], scores[2:] / scale, **CLOSE)


@pytest.mark.parametrize("size", [1, 2, 8, 100])
@pytest.mark.parametrize("value", [0.0, 1.7, -3.0, 0.1])
def test_equal_scores_are_left_as_they_are(value, size):
    """Nothing to divide by: a scale that is a rest of rounding would make them ±10."""
    running = [0.0, 0.0, 0.0]
    for _ in range(3):
        scores = torch.full((size, 1), value)
        rewards, scale = ppo.scale_by_std(scores, running)
        assert scale == 1
        torch.testing.assert_close(rewards, scores.double(), **CLOSE)


# ------------------------------------------------------------------------------------------------- the two first stages
def test_the_reward_models_loss_is_its_formula():
    """Value, gradient and all metrics; a tie is half a win."""
    chosen, rejected = 3 * normal(2, 9)
    rejected[0] = chosen[0]
    margins = (chosen - rejected).tolist()
    expected = {
        "rm/loss": mean(-log_sigmoid(x) for x in margins),
        "rm/accuracy": mean(map(won, margins)),
    }
    expected |= {"rm/margin": mean(margins)}
    loss, *gradients = loss_and_gradients(
        reward_model.bradley_terry_loss, (chosen, rejected), (), (0, 1)
    )
    assert loss.item() == pytest.approx(expected["rm/loss"], rel=1e-12)
    slope = torch.tensor([-sigmoid(-x) / 9 for x in margins], dtype=torch.float64)
    torch.testing.assert_close(gradients, [slope, -slope], **CLOSE)
    assert_metrics(reward_model.bradley_terry_loss(chosen, rejected)[1], expected)


def test_what_is_added_to_both_scores_has_no_effect_on_the_reward_model():
    chosen, rejected, shift = normal(3, 9)
    found, expected = (
        loss_and_gradients(reward_model.bradley_terry_loss, (chosen + x, rejected + x), (), (0, 1))
        for x in (20 * shift, 0)
    )
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_loss_of_sft_is_a_mean_over_tokens():
    """Of all responses together, whatever a finite padding holds; every token has the same weight."""
    logprobs, _, _, _, mask = random_tokens()
    tokens = logprobs[mask].tolist()
    for filling in (0.0, 1e6):
        loss, gradient = loss_and_gradients(
            sft.sft_loss, (beyond(mask, logprobs, filling), mask.long())
        )
        assert loss.item() == pytest.approx(-mean(tokens), rel=1e-12)
        torch.testing.assert_close(gradient, -mask.double() / len(tokens), **CLOSE)


def test_parts_of_a_batch_weighted_by_their_tokens_are_the_whole():
    """And a plain mean of their losses is not."""
    logprobs, _, _, _, mask = random_tokens()
    whole, parts = (
        sft.sft_loss(logprobs, mask)[0],
        [sft.sft_loss(*x)[0] for x in zip(logprobs[:, None], mask[:, None])],
    )
    shares = mask.sum(1) / mask.sum()
    torch.testing.assert_close(
        sum(share * part for share, part in zip(shares.double(), parts)), whole, rtol=1e-6, atol=0
    )
    assert (torch.stack(parts).mean() - whole).abs() > 0.01
