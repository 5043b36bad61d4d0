"""What the scripts compute with models, on tiny random ones of four shapes, against plain forwards
of one unpadded row."""

import copy
import math
from collections import Counter
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COMMON, SIZES, TINY, V, build
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
)

from dpo import generate_responses
from grpo import padded_logprobs, response_logprobs
from p3o_v2 import (
    UserError,
    check_agreement,
    clip_gradients,
    in_batches,
    lengths_and_ends,
    load_model,
    response_kl,
    response_logps,
    response_scores,
    sample_responses,
    seeded,
    set_up_model,
    shuffled,
)
from ppo import response_values
from reward_model import evaluate_pairs
from sft import lr_factor

pytestmark = pytest.mark.usefixtures("one_thread")
NEVER = [V]  # an end id that no model can sample
PROMPT_LENGTHS = (1, 30, 4, 9, 1)
RESPONSE_LENGTHS = ([33, 1, 12], [1, 34, 24], [60, 3, 59], [5, 12, 12], [1, 1, 1])  # K = 3


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "gpt2", "qwen2"])
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def policy(shape):
    return build(shape, "policy", seed=1)


@pytest.fixture(scope="module")
def reference(shape):
    return build(shape, "policy", seed=2)


@pytest.fixture(scope="module")
def reward_network(shape):
    return build(shape, "score", seed=3)


def some_ids(length, seed, high=V):
    return torch.randint(0, high, (length,), generator=torch.Generator().manual_seed(seed))


def some_rows(K):
    """Prompts, and K responses to each; none of the pairs is longer than 64 tokens."""
    prompts = [some_ids(n, i) for i, n in enumerate(PROMPT_LENGTHS)]
    responses = []
    for i, lengths in enumerate(RESPONSE_LENGTHS):
        responses.append([some_ids(n, 100 + 10 * i + k) for k, n in enumerate(lengths[:K])])
    return prompts, responses


def some_noise(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def each(prompts, responses):
    """All pairs of a prompt and a response."""
    return [(x, y) for x, group in zip(prompts, responses) for y in group]


def plain_distributions(model, x, y, temperature):
    """log π(· | x, y_<t) for every t, from a forward of the one row as it is: [T, V]."""
    logits = model(torch.cat([x, y])[None]).logits[0, len(x) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def plain_logprobs(model, x, y, temperature):
    return plain_distributions(model, x, y, temperature).gather(1, y[:, None])[:, 0]


def gradient_of(model, loss):
    """One vector over all parameters."""
    weights = list(model.parameters())
    parts = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def assert_near(found, expected, tolerance=1e-5):
    """Equal but for rounding, relative to the largest number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def weights_for(values):
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ log-probabilities and scores
def assert_same(function, model, expected):
    """What a function gives and the gradients of it are what is expected."""
    found = function(model)
    assert_near(found, expected)
    weights = weights_for(found)
    gradients = [gradient_of(model, (weights * x).sum()) for x in (found, expected)]
    assert gradients[1].abs().max() > 1
    assert_near(*gradients)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_logprobs_and_their_gradients_are_those_of_plain_forwards(policy, K):
    """Per token, padded to a length, and summed in float64."""
    prompts, responses = some_rows(K)
    rows = [plain_logprobs(policy, x, y, 0.7) for x, y in each(prompts, responses)]
    expected = pad_sequence(rows, batch_first=True).view(len(prompts), K, -1)
    assert K < 3 or (expected != 0).sum() > 256  # more than two chunks of logits
    options = {"prompts": prompts, "responses": responses, "temperature": 0.7}
    with torch.no_grad():
        found = response_logprobs(policy, **options)
        padded = padded_logprobs(policy, **options, length=70)
    assert found.dtype == torch.float32 and padded.dtype == torch.float64
    assert ((found == 0) == (expected == 0)).all()
    assert torch.equal(padded[..., : found.shape[2]], found.double())
    assert padded.shape == (*found.shape[:2], 70) and (padded[..., found.shape[2] :] == 0).all()
    assert_same(partial(response_logprobs, **options), policy, expected)
    logps = torch.stack([row.double().sum() for row in rows]).view(-1, K)
    assert_same(partial(response_logps, **options), policy, logps)


def test_values_are_read_before_every_token(reward_network):
    """At the last token of the prompt, then at all of the response but its last."""
    prompts, responses = some_rows(2)
    rows = []
    for x, y in each(prompts, responses):
        [states] = reward_network.base_model(torch.cat([x, y])[None]).last_hidden_state
        rows.append(reward_network.score(states[len(x) - 1 : -1])[:, 0].double())
    is_token = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True) == 1
    expected = pad_sequence(rows, batch_first=True)[is_token]

    def values(model):
        found = response_values(model, prompts, responses, 70)
        assert found.shape == (len(prompts), 2, 70) and found.dtype == torch.float64
        return found.flatten(0, 1)[:, : is_token.shape[1]][is_token]

    assert_same(values, reward_network, expected)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_scores_and_their_gradients_are_the_reward_models_own(reward_network, K):
    prompts, responses = some_rows(K)
    expected = [reward_network(torch.cat(pair)[None]).logits for pair in each(prompts, responses)]
    expected = torch.cat(expected).view(len(prompts), K)
    function = partial(response_scores, prompts=prompts, responses=responses)
    assert_same(function, reward_network, expected)


@pytest.mark.parametrize("K", [1, 2])
@torch.no_grad()
def test_kl_is_the_exact_sum_over_the_vocabulary(policy, reference, K):
    prompts, responses = some_rows(K)
    expected = []
    for x, y in each(prompts, responses):
        models = (policy, reference)
        logp, ref_logp = (plain_distributions(m, x, y, 0.7).double() for m in models)
        expected.append((logp.exp() * (logp - ref_logp)).sum())
    found = response_kl(policy, reference, prompts, responses, 0.7)
    assert_near(found, torch.stack(expected).view(-1, K))
    assert (found > 0).all()
    assert (response_kl(policy, policy, prompts, responses, 0.7) == 0).all()


@torch.no_grad()
def test_other_rows_and_more_padding_change_nothing(policy, reward_network):
    prompts, responses = some_rows(3)
    for function in (
        partial(response_logps, policy, temperature=0.7),
        partial(response_scores, reward_network),
    ):
        alone = torch.cat([function([x], [group]) for x, group in zip(prompts, responses)])
        for batch_size in (2, 3, 100):
            order = torch.randperm(len(prompts), generator=seeded(batch_size)).tolist()
            found = in_batches(
                function,
                [prompts[i] for i in order],
                [responses[i] for i in order],
                batch_size=batch_size,
            )
            assert_near(found, alone[order])


@pytest.mark.parametrize("tokens", [127, 128, 129, 256, 257])
@torch.no_grad()
def test_logprobs_are_right_around_the_ends_of_chunks(tokens):
    policy = build("llama", "policy", seed=1)
    lengths = [50] * (tokens // 50) + [tokens % 50]
    prompts = [some_ids(2, i) for i in range(len(lengths))]
    responses = [[some_ids(n, 50 + i)] for i, n in enumerate(lengths)]
    expected = [plain_logprobs(policy, x, y, 1.0) for x, y in each(prompts, responses)]
    found = response_logprobs(policy, prompts, responses, 1.0)[:, 0]
    assert_near(found, pad_sequence(expected, batch_first=True))


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made within."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(made) if isinstance(part, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


def test_the_logits_of_many_tokens_are_never_in_memory_together():
    """Neither in the forward nor in the backward pass, nor kept between them."""
    policy = build("gpt2", "policy", seed=5, vocab_size=10_000)
    prompts, responses = [some_ids(5, 1)] * 40, [[some_ids(30, 2)]] * 40
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda v: kept.append(v.numel()) or v, lambda v: v
    )
    with Largest() as forward, hooks:
        found = response_logprobs(policy, prompts, responses, 0.7)
    with Largest() as backward:
        gradient_of(policy, found.sum())
    assert max(forward.elements, backward.elements, sum(kept)) < 1200 * 10_000 / 2
    assert min(forward.elements, backward.elements) >= 10_000


def test_gradients_repeat_to_the_last_bit():
    """Also where threads share the work: an order of sums that is chance would show here."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "sft")
    prompts = [torch.arange(3, 3 + n) for n in (20, 25, 30, 22, 27)]
    responses = [[torch.arange(40, 58 + b + k) for k in range(3)] for b in range(5)]
    torch.set_num_threads(4)
    gradients = []
    for _ in range(8):
        gradients.append(gradient_of(model, response_logps(model, prompts, responses, 1.0).sum()))
    torch.set_num_threads(1)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# -------------------------------------------------------------------------------------- sampling
def sampled(model, prompts, noise, temperature, end_ids):
    """The responses, and their recorded log-probabilities [B, K, T]."""
    responses, logprobs = zip(*sample_responses(model, prompts, noise, temperature, end_ids))
    return responses, torch.stack(logprobs)


def two_end_ids(responses):
    """Two tokens, each the last one of a response where these end it, that do not end all."""
    rows = [y.tolist() for group in responses for y in group]
    ranked = torch.bincount(torch.tensor(rows).flatten(), minlength=V).argsort(descending=True)
    for i in range(V):
        ends = ranked[i : i + 2].tolist()
        first = [next((token for token in row if token in ends), None) for row in rows]
        if set(first) == {*ends, None}:
            return ends


@torch.no_grad()
def test_tokens_invert_the_distribution_of_a_plain_forward(policy):
    """In float64, a row at a time, without a cache: the first token whose cumulative probability
    exceeds the noise. So a response depends on its own noise alone."""
    prompts, _ = some_rows(1)
    noise = some_noise(len(prompts), 2, 6)
    exact = copy.deepcopy(policy).double()
    responses, logprobs = sampled(policy, prompts, noise, 1.3, NEVER)
    for b, prompt in enumerate(prompts):
        for k in range(2):
            ids = prompt
            for u in noise[b, k]:
                cdf = (exact(ids[None]).logits[0, -1] / 1.3).softmax(0).cumsum(0)
                ids = torch.cat([ids, (cdf > u).nonzero()[0]])
            assert torch.equal(responses[b][k], ids[len(prompt) :])
            expected = plain_logprobs(policy, prompt, responses[b][k], 1.3)
            assert_near(logprobs[b, k], expected)


@torch.no_grad()
def test_responses_end_with_the_first_end_token_or_are_cut(policy):
    """Up to there they are what is sampled when nothing ends them; recorded log-probabilities are
    those of plain forwards, and of training."""
    prompts, _ = some_rows(1)
    noise = some_noise(len(prompts), 3, 20)
    endless, _ = sampled(policy, prompts, noise, 0.9, NEVER)
    assert all(len(y) == 20 for group in endless for y in group)
    end_ids = two_end_ids(endless)
    responses, logprobs = sampled(policy, prompts, noise, 0.9, end_ids)
    cut = 0
    for (x, y), (_, whole), recorded in zip(
        each(prompts, responses), each(prompts, endless), logprobs.flatten(0, 1)
    ):
        ends = [t for t, token in enumerate(whole.tolist()) if token in end_ids]
        cut += not ends
        assert torch.equal(y, whole[: ends[0] + 1] if ends else whole)
        assert_near(recorded[: len(y)], plain_logprobs(policy, x, y, 0.9))
        assert (recorded[len(y) :] == 0).all()
    assert 0 < cut < len(prompts) * 3
    assert {y[-1].item() for _, y in each(prompts, responses)} >= set(end_ids)
    trained = response_logps(policy, prompts, responses, 0.9)
    assert_near(logprobs.double().sum(-1), trained)


def test_a_response_is_the_same_alone_and_in_any_batch(policy):
    prompts, _ = some_rows(1)
    noise = some_noise(len(prompts), 2, 12)
    end_ids = two_end_ids(sampled(policy, prompts, noise, 1.0, NEVER)[0])
    responses, logprobs = sampled(policy, prompts, noise, 1.0, end_ids)
    order = [3, 0, 4, 2, 1]
    shuffled_responses, _ = sampled(policy, [prompts[b] for b in order], noise[order], 1.0, end_ids)
    for b, prompt in enumerate(prompts):
        for k in range(2):
            assert torch.equal(shuffled_responses[order.index(b)][k], responses[b][k])
            [[alone]], recorded = sampled(
                policy, [prompt], noise[b, k].view(1, 1, -1), 1.0, end_ids
            )
            assert torch.equal(alone, responses[b][k])
            assert_near(recorded[0, 0], logprobs[b, k])


@torch.no_grad()
def test_a_grid_of_noise_gives_every_text_its_share(shape):
    """All 16 texts of two tokens from a vocabulary of four, with 64 x 64 evenly spaced noises."""
    policy = build(shape, "policy", seed=1, vocab_size=4)
    prompt, N = torch.tensor([2, 1]), 64
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    noise = torch.cartesian_prod(u, u)[None]
    [responses], _ = sampled(policy, [prompt], noise, 5.0, NEVER)
    found = Counter(tuple(y.tolist()) for y in responses)
    for a in range(4):
        for b in range(4):
            logprobs = plain_logprobs(policy, prompt, torch.tensor([a, b]), 5.0)
            assert found[a, b] / N**2 == pytest.approx(logprobs.sum().exp().item(), abs=2 / N)


def test_rare_tokens_keep_their_share():
    """One of probability 1e-8: noise around it in steps of 1e-10."""
    policy = build("llama", "policy", seed=4)
    head = torch.nn.Linear(32, V)
    head.weight.data.zero_()
    head.bias.data.fill_(-1e9)
    head.bias.data[:3] = torch.tensor([0.5, 1e-8, 0.5]).log()
    policy.set_output_embeddings(head)
    noise = 0.5 + torch.arange(-5000, 5000, dtype=torch.float64) * 1e-10
    [responses], logprobs = sampled(policy, [some_ids(3, 0)], noise.view(1, -1, 1), 1.0, NEVER)
    tokens = torch.cat(responses)
    assert tokens.unique().tolist() == [0, 1, 2] and (tokens.diff() >= 0).all()
    assert (tokens == 1).sum().item() == pytest.approx(100, abs=2)
    assert logprobs.isfinite().all()


def test_a_prompt_is_read_once_for_its_responses(policy):
    prompts, responses = some_rows(3)
    shapes = []
    hook = policy.base_model.register_forward_pre_hook(
        lambda module, inputs: shapes.append(tuple(inputs[0].shape))
    )
    sample_responses(policy, prompts, some_noise(len(prompts), 3, 3), 1.0, NEVER)
    response_logps(policy, prompts, responses, 1.0)
    hook.remove()
    assert shapes == [(5, 30), (15, 1), (15, 1), (5, 3 + 61 + 4 + 60)]


# ------------------------------------------------------------- sampling by the library's generate
def drawing(**changes):
    args = {"seed": 1, "temperature": 1.0, "micro_batch_size": 2, "max_response_tokens": 12}
    return SimpleNamespace(**args | changes)


def assert_fits(counts, expected):
    """Pearson's chi-square test at p = 1e-4, with the approximation of Wilson and Hilferty."""
    chi_square, degrees = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    z = ((chi_square / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
    assert z < 3.72


@pytest.mark.parametrize("vocabulary, length", [(100, 1), (6, 2)])
@torch.no_grad()
def test_generated_responses_have_the_distribution_of_the_policy(shape, vocabulary, length):
    """All texts of a length, after two prompts of different lengths in one batch. What the model's
    own generation_config asks for is left out, and it is as before in the end."""
    model = build(shape, "policy", seed=1, vocab_size=vocabulary)
    traps = {"repetition_penalty": 5.0, "top_k": 2, "top_p": 0.5, "suppress_tokens": [1]}
    own = model.generation_config = GenerationConfig(**traps, do_sample=True)
    prompts, n = [some_ids(3, 0, vocabulary), some_ids(9, 1, vocabulary)], 4000
    args = drawing(temperature=5.0, micro_batch_size=500, max_response_tokens=length)
    responses = generate_responses(model, prompts * n, [vocabulary], args)
    assert model.generation_config is own and own.top_k == 2
    for i, prompt in enumerate(prompts):
        counts = Counter(tuple(y.tolist()) for [y] in responses[i::2])
        found = []
        for text in product(range(vocabulary), repeat=length):
            logprobs = plain_logprobs(model, prompt, torch.tensor(text), 5.0)
            found.append((n * logprobs.double().sum().exp(), counts[text]))
        expected, found = torch.tensor(sorted(found)).view(-1, 4, 2).sum(1).T  # rare ones together
        assert_fits(found, expected)


def test_generated_responses_end_with_their_first_end_token_or_are_cut(policy):
    prompts = some_rows(1)[0] * 4
    args = drawing()
    endless = generate_responses(policy, prompts, NEVER, args)
    assert all(len(y) == 12 for [y] in endless)
    end_ids = two_end_ids(endless)
    responses = generate_responses(policy, prompts, end_ids, args)
    ended = [y[-1].item() in end_ids for [y] in responses]
    assert 0 < sum(ended) < len(prompts) == len(responses)
    assert {y[-1].item() for [y] in responses} >= set(end_ids)
    for [y], is_end in zip(responses, ended):
        assert len(y) == 12 or is_end
        assert not torch.isin(y[:-1], torch.tensor(end_ids)).any()
    again = generate_responses(policy, prompts, end_ids, args)  # with the same random numbers
    assert all(torch.equal(y, z) for [y], [z] in zip(responses, again))
    others = generate_responses(policy, prompts, end_ids, drawing(seed=2))
    assert not all(torch.equal(y, z) for [y], [z] in zip(responses, others))


# ---------------------------------------------------------------------------------- small blocks
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_in_batches_joins_what_a_function_returns(batch_size):
    rows, numbers = list("abcdefg"), torch.arange(7)
    found = in_batches(lambda x, y: list(zip(x, y.tolist())), rows, numbers, batch_size=batch_size)
    assert found == list(zip(rows, range(7)))
    found = in_batches(lambda x: x[:, None] * 2, numbers, batch_size=batch_size)
    assert found.tolist() == [[2 * i] for i in range(7)]


def test_lengths_and_ends_are_those_of_the_responses():
    responses = [[torch.tensor([5, 0]), torch.tensor([0, 5])], [torch.tensor([9]), torch.arange(3)]]
    lengths, ended = lengths_and_ends(responses, [0, 9], "cpu")
    assert lengths.tolist() == [[2, 2], [1, 3]] and ended.tolist() == [[1, 0], [1, 0]]
    assert lengths.dtype == ended.dtype == torch.float64


def test_every_row_comes_once_in_every_pass():
    order = shuffled(10, 35, seed=1)
    assert len(order) == 35
    for start in (0, 10, 20):
        assert sorted(order[start : start + 10].tolist()) == list(range(10))
    assert len(set(order[30:].tolist())) == 5
    assert order[:10].tolist() != order[10:20].tolist()


def test_the_order_does_not_depend_on_how_many_rows_are_asked_for():
    whole = shuffled(10, 95, seed=1)
    for total in (1, 9, 10, 11, 20, 64):
        assert torch.equal(shuffled(10, total, seed=1), whole[:total])
    assert not torch.equal(shuffled(10, 95, seed=2), whole)


def test_generators_differ_by_any_part_of_their_purpose():
    purposes = [(1, "eval"), (2, "eval"), (1, "sample", 1), (1, "sample", 2), (1, "sample", 11)]
    draws = [torch.rand(4, generator=seeded(*purpose)).tolist() for purpose in purposes]
    assert len({tuple(draw) for draw in draws}) == len(purposes)
    assert torch.rand(4, generator=seeded(1, "eval")).tolist() == draws[0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_from_its_first_step_and_follows_its_schedule(schedule):
    args = SimpleNamespace(warmup_updates=4, num_updates=14, lr_schedule=schedule)
    found = [lr_factor(step, args) for step in range(14)]
    assert found[:4] == [1 / 4, 2 / 4, 3 / 4, 1]
    for step in range(10):
        expected = {
            "constant": 1,
            "linear": 1 - step / 10,
            "cosine": (1 + math.cos(math.pi * step / 10)) / 2,
        }
        assert found[4 + step] == pytest.approx(expected[schedule])
    args = SimpleNamespace(warmup_updates=0, num_updates=1, lr_schedule=schedule)
    assert lr_factor(0, args) == 1


def test_a_policy_that_is_not_the_one_that_sampled_is_refused():
    for dtype, limit in (("float32", 0.5), ("bfloat16", 2)):
        args = SimpleNamespace(dtype=dtype, model="a_model")
        logps = torch.tensor([[-40.0, -50.0], [-60.0, -70.0]], dtype=torch.float64)
        assert check_agreement(logps, logps, args) == 0
        for error in (0.9 * limit, 1.1 * limit, math.nan):
            others = logps.clone()
            others[1, 0] -= error
            if error < limit:
                assert check_agreement(logps, others, args) == pytest.approx(error)
            else:
                with pytest.raises(UserError, match="a_model"):
                    check_agreement(logps, others, args)


def test_gradients_are_scaled_down_to_the_largest_norm_and_must_be_numbers():
    model, alone = torch.nn.Linear(2, 1, bias=False), SimpleNamespace(num_processes=1)
    for max_norm, expected in ((1.0, [0.6, 0.8]), (0, [3, 4]), (10.0, [3, 4])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients(alone, model, max_norm) == 5
        assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-5)
    model.weight.grad = torch.tensor([[3.0, math.nan]])
    with pytest.raises(UserError, match="--learning-rate"):
        clip_gradients(alone, model, 1.0)


def test_measures_of_pairs_are_those_computed_by_hand():
    margins = [2.0, -1.0, 0.5, 0.0]
    chosen = torch.tensor(margins, dtype=torch.float64)
    point = evaluate_pairs(chosen, torch.zeros_like(chosen))
    assert point["rm/eval_accuracy"] == 2.5 / 4
    losses = [math.log(1 + math.exp(-m)) for m in margins]
    assert point["rm/eval_loss"] == pytest.approx(sum(losses) / 4)
    # From the smallest |margin|: a tie, a win, a defeat, a win
    deciles = [point[f"rm/eval_accuracy_decile_{i}"] for i in range(4)]
    assert deciles == [0.5, 1, 0, 1]
    assert "rm/eval_accuracy_decile_4" not in point
    # Confidences 0.50, 0.62, 0.73, 0.88 lie in bins of their own.
    confidence = [1 / (1 + math.exp(-abs(m))) for m in margins]
    gaps = [abs(win - c) for win, c in zip([1, 0, 1, 0.5], confidence)]
    assert point["rm/eval_ece"] == pytest.approx(sum(gaps) / 4)
    scores = [*margins, 0, 0, 0, 0]
    assert point["rm/eval_score_mean"] == pytest.approx(np.mean(scores))
    assert point["rm/eval_score_std"] == pytest.approx(np.std(scores, ddof=1))


def test_scores_that_are_as_sure_as_they_are_right_have_no_calibration_error():
    """Of the pairs with confidence c, a share of c is won; a model twice as sure is not so."""
    margins = []
    for tenths in (5, 6, 7, 8, 9):
        margin = math.log(tenths / (10 - tenths))
        margins += [margin] * tenths + [-margin] * (10 - tenths)
    margins = torch.tensor(margins, dtype=torch.float64)
    assert evaluate_pairs(margins, 0 * margins)["rm/eval_ece"] == pytest.approx(0, abs=0.02)
    assert evaluate_pairs(4 * margins, 0 * margins)["rm/eval_ece"] > 0.1


# ---------------------------------------------------------------------------------------- models
def settings(**changes):
    return SimpleNamespace(
        **{"dtype": "float32", "gradient_checkpointing": False, "unfrozen_layers": 0, **changes}
    )


@pytest.mark.parametrize(
    "model_class, config_class, change",
    [
        (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 30.0}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.0625}),
    ],
)
def test_a_model_that_changes_its_logits_is_refused(model_class, config_class, change, tmp_path):
    config = config_class(**COMMON, **SIZES, **change, head_dim=8, num_key_value_heads=2)
    torch.manual_seed(1)
    model = model_class(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    model.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match=tmp_path.name):
            load_model(AutoModelForCausalLM, str(tmp_path), "cpu", settings(dtype=dtype))


def test_models_are_loaded_as_they_were_saved_and_not_in_place_of_others(shape, tmp_path):
    """A causal model is no reward model, and a reward model no policy where its head is lacking."""
    for kind, auto_class in (
        ("policy", AutoModelForCausalLM),
        ("score", AutoModelForSequenceClassification),
    ):
        saved, folder = build(shape, kind, seed=1), str(tmp_path / kind)
        saved.half().float().save_pretrained(folder)
        for trainable in (True, False):
            model = load_model(auto_class, folder, "cpu", settings(), trainable)
            assert not model.training
            assert all(weight.requires_grad == trainable for weight in model.parameters())
            torch.testing.assert_close(model.state_dict(), saved.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="policy"):
        load_model(AutoModelForSequenceClassification, f"{tmp_path}/policy", "cpu", settings())
    if shape != "gpt2":  # its head is its embedding
        with pytest.raises(UserError, match="score"):
            load_model(AutoModelForCausalLM, f"{tmp_path}/score", "cpu", settings())


@pytest.mark.parametrize("unfrozen_layers", [0, 1])
@torch.no_grad()
def test_in_bfloat16_the_reference_equals_the_policy_to_the_bit(shape, unfrozen_layers, tmp_path):
    """Though its matrices are stored in bfloat16; head, norms and embeddings stay in float32."""
    build(shape, "policy", seed=1).save_pretrained(tmp_path)
    args = settings(dtype="bfloat16", unfrozen_layers=unfrozen_layers)
    policy, reference = (
        load_model(AutoModelForCausalLM, str(tmp_path), "cpu", args, trainable)
        for trainable in (True, False)
    )
    for model in (policy, reference):
        frozen = set()
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Linear):
                frozen |= {w for w in module.parameters() if not w.requires_grad}
        assert frozen == {w for w in model.parameters() if w.dtype == torch.bfloat16}
        assert frozen or shape == "gpt2" or model is policy and not unfrozen_layers
    rows = some_rows(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (response_kl(policy, reference, *rows, 1.0) == 0).all()
        logps = [response_logps(model, *rows, 1.0) for model in (policy, reference)]
    assert torch.equal(*logps)


@pytest.mark.parametrize("kind", ["policy", "score"])
def test_only_the_last_layers_and_an_untied_head_are_trained(shape, kind):
    """With the gradients that they have in the whole model, checkpointed or not."""
    whole = build(shape, kind, seed=1)
    model = copy.deepcopy(whole)
    set_up_model(model, settings(unfrozen_layers=1, gradient_checkpointing=True), trainable=True)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    tied = shape == "gpt2"
    head = {"policy": {"lm_head.weight", "embed_out.weight"}, "score": {"score.weight"}}[kind]
    expected = {name for name, _ in whole.named_parameters() if name in head}
    assert len(expected) == (0 if tied and kind == "policy" else 1)
    expected |= {name for name, _ in whole.named_parameters() if ".layers.1." in f".{name}"}
    expected |= {name for name, _ in whole.named_parameters() if ".h.1." in f".{name}"}
    assert trained == expected
    function = response_scores if kind == "score" else partial(response_logps, temperature=0.7)
    for part in (whole, model):
        values = function(part, *some_rows(2))
        (weights_for(values) * values).sum().backward()
    for name, weight in model.named_parameters():
        if name in trained:
            assert_near(weight.grad, whole.get_parameter(name).grad)


@pytest.mark.parametrize("kind", ["policy", "score"])
def test_bfloat16_changes_little(shape, kind):
    """Of the directions of gradients, which stay in float32."""
    model, found = build(shape, kind, seed=1), []
    function = response_scores if kind == "score" else partial(response_logps, temperature=0.7)
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            values = function(model, *some_rows(2))
        (weights_for(values) * values).sum().backward()
        found.append([weight.grad.flatten() for weight in model.parameters()])
    for exact, rounded in zip(*found):
        assert rounded.dtype == torch.float32
        assert torch.cosine_similarity(exact, rounded, dim=0) > 0.9


def test_a_frozen_model_has_nothing_to_train(shape):
    model = build(shape, "policy", seed=1).train()
    set_up_model(model, settings(unfrozen_layers=1, gradient_checkpointing=True), trainable=False)
    assert not any(weight.requires_grad for weight in model.parameters()) and not model.training
