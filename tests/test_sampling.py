"""Responses are drawn from the policy, each on its own; what decides is a seed with a purpose."""

import copy
import math
from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch
from conftest import V, build
from test_logprobs import assert_near, each, each_shape, plain_logprobs, some_ids, some_rows
from transformers import DynamicCache, GenerationConfig

import p3o_v2
from dpo import Args, generate_responses
from p3o_v2 import UserError, check_agreement, lengths_and_ends, response_logps, sample_responses
from sft import seeded, shuffled

NEVER = [V]  # an end id that no model can sample
drawing = partial(Args, micro_batch_size=2, max_response_tokens=12)


def some_noise(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def cut(y, end_ids):
    """A response up to its first end token."""
    ends = torch.isin(y, torch.tensor(end_ids)).nonzero()
    return y[: ends[0] + 1] if len(ends) else y


def two_end_ids(responses):
    """Two tokens, each the last one of a response where these end it, that do not end all."""
    ranked = torch.cat(responses).bincount(minlength=V).argsort(descending=True)
    for i in range(V):
        ends = ranked[i : i + 2].tolist()
        if set(ends) < {cut(y, ends)[-1].item() for y in responses}:
            return ends


# ------------------------------------------------------------------------------- sample_responses
def inverted(model, x, noise, temperature):
    """Each token the first whose cumulative probability exceeds the noise, without a cache."""
    ids = x
    for u in noise:
        cdf = (model(ids[None]).logits[0, -1] / temperature).softmax(0).cumsum(0)
        ids = torch.cat([ids, (cdf > u).nonzero()[0]])
    return ids[len(x) :]


@each_shape
@torch.no_grad()
def test_a_response_is_the_same_alone_and_in_any_batch(shape):
    """It depends on its own noise. Recorded logprobs are those of plain forwards, and training."""
    policy = build(shape, "policy", seed=1)
    exact = copy.deepcopy(policy).double()
    prompts, noise = some_rows(1)[0], some_noise(5, 3, 12)
    whole = [inverted(exact, x, row, 0.9) for x, rows in zip(prompts, noise) for row in rows]
    end_ids = two_end_ids(whole)
    responses, logprobs = zip(*sample_responses(policy, prompts, noise, 0.9, end_ids))
    logprobs = torch.stack(logprobs)
    for (x, y), y_whole, recorded in zip(each(prompts, responses), whole, logprobs.flatten(0, 1)):
        assert torch.equal(y, cut(y_whole, end_ids))
        assert_near(recorded[: len(y)], plain_logprobs(policy, x, y, 0.9))
        assert (recorded[len(y) :] == 0).all()
    assert_near(logprobs.double().sum(-1), response_logps(policy, prompts, responses, 0.9))


@torch.no_grad()
def test_rare_tokens_keep_their_share():
    """One of probability 1e-8: noise around it in steps of 1e-10."""
    policy, head = build("llama", "policy", seed=4), torch.nn.Linear(32, V)
    head.weight.data.zero_()
    head.bias.data.fill_(-1e9)
    head.bias.data[:3] = torch.tensor([0.5, 1e-8, 0.5]).log()
    policy.set_output_embeddings(head)
    noise = (0.5 + torch.arange(-5000, 5000, dtype=torch.float64) * 1e-10).view(1, -1, 1)
    [(responses, _)] = sample_responses(policy, [some_ids(3, 0)], noise, 1, NEVER)
    tokens = torch.cat(responses)
    assert tokens.unique().tolist() == [0, 1, 2] and (tokens.diff() >= 0).all()
    assert (tokens == 1).sum().item() == pytest.approx(100, abs=2)


@torch.no_grad()
def test_a_prompt_is_read_once_for_its_responses():
    policy, shapes = build("llama", "policy", seed=1), []
    policy.base_model.register_forward_pre_hook(lambda _, ids: shapes.append((*ids[0].shape,)))
    prompts, responses = some_rows(3)
    sample_responses(policy, prompts, some_noise(5, 3, 3), 1.0, NEVER)
    response_logps(policy, prompts, responses, 1.0)
    assert shapes == [(5, 30), (15, 1), (15, 1), (5, 3 + 61 + 4 + 60)]


@each_shape
@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_keys_and_values_are_kept_in_the_precision_of_autocast(shape, bf16, monkeypatch):
    caches = []
    note = {"batch_repeat_interleave": lambda cache, _: caches.append(cache)}  # K is 1
    kept = type("Kept", (DynamicCache,), note)
    monkeypatch.setattr(p3o_v2, "DynamicCache", kept)
    policy, prompts = build(shape, "policy", seed=1), some_rows(1)[0]
    with torch.autocast("cpu", torch.bfloat16, bf16):
        sample_responses(policy, prompts, some_noise(5, 1, 3), 1, [])
    types = {x.dtype for layer in caches[0].layers for x in (layer.keys, layer.values)}
    assert types == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.parametrize("dtype, limit", [("float32", 0.5), ("bfloat16", 2)])
def test_a_policy_that_is_not_the_one_that_sampled_is_refused(dtype, limit):
    args = Args(dtype=dtype, model="a_model", max_response_tokens=100)
    logps = torch.tensor([[-40.0, -50.0], [-60.0, -70.0]], dtype=torch.float64)
    others = logps.clone()
    others[1, 0] -= 0.9 * limit
    assert check_agreement(logps, others, args) == pytest.approx(0.9 * limit)
    for wrong in (1.1 * limit, math.nan):
        others[1, 0] = logps[1, 0] + wrong
        with pytest.raises(UserError, match="a_model"):
            check_agreement(logps, others, args)


# ------------------------------------------------------------- sampling by the library's generate
@each_shape
@pytest.mark.parametrize("vocabulary, length", [(100, 1), (6, 2)])
@torch.no_grad()
def test_generated_responses_have_the_distribution_of_the_policy(shape, vocabulary, length):
    """Of all texts of a length. What the model's own generation_config asks for is left out."""
    model = build(shape, "policy", seed=1, vocab_size=vocabulary)
    traps = {"repetition_penalty": 5.0, "top_k": 2, "top_p": 0.5, "suppress_tokens": [1]}
    own = model.generation_config = GenerationConfig(**traps, do_sample=True)
    prompts, n = [some_ids(3, 0, vocabulary), some_ids(9, 1, vocabulary)], 4000
    args = drawing(temperature=5.0, micro_batch_size=500, max_response_tokens=length)
    responses = generate_responses(model, prompts * n, [vocabulary], args)
    assert model.generation_config is own and own.top_k == 2
    for i, prompt in enumerate(prompts):
        counts, found = Counter(tuple(y.tolist()) for [y] in responses[i::2]), []
        for text in product(range(vocabulary), repeat=length):
            logprobs = plain_logprobs(model, prompt, torch.tensor(text), 5.0)
            found.append((n * logprobs.double().sum().exp(), counts[text]))
        expected, found = torch.tensor(sorted(found)).view(-1, 4, 2).sum(1).T  # rare ones together
        # Pearson's chi-square test at p = 1e-4, with the approximation of Wilson and Hilferty
        chi_square, degrees = ((found - expected) ** 2 / expected).sum(), len(found) - 1
        shift, variance = 1 - 2 / (9 * degrees), 2 / (9 * degrees)
        assert (chi_square / degrees) ** (1 / 3) < shift + 3.72 * math.sqrt(variance)


@each_shape
def test_generated_responses_end_with_their_first_end_token_or_are_cut(shape):
    policy, prompts = build(shape, "policy", seed=1), some_rows(1)[0] * 4
    endless = [y for [y] in generate_responses(policy, prompts, NEVER, drawing())]
    assert [len(y) for y in endless] == [12] * 20
    end_ids = two_end_ids(endless)

    def generate(seed):
        return [y for [y] in generate_responses(policy, prompts, end_ids, drawing(seed=seed))]

    responses = generate(1)
    assert {y[-1].item() for y in responses} > set(end_ids)
    for y in responses:
        assert torch.equal(y, cut(y, end_ids)) and (len(y) == 12 or y[-1] in end_ids)
    assert all(map(torch.equal, generate(1), responses))
    assert not all(map(torch.equal, generate(2), responses))


# --------------------------------------------------------------------- what runs count and draw
def test_lengths_and_ends_are_those_of_the_responses():
    responses = [[torch.tensor([5, 0]), torch.tensor([0, 5])], [torch.tensor([9]), torch.arange(3)]]
    lengths, ended = lengths_and_ends(responses, [0, 9], "cpu")
    assert lengths.tolist() == [[2, 2], [1, 3]] and ended.tolist() == [[1, 0], [1, 0]]


def test_every_row_comes_once_in_every_pass_however_many_are_asked_for():
    order = shuffled(10, 35, seed=1)
    passes = order[:30].view(3, 10)
    assert (passes.sort().values == torch.arange(10)).all() and len(order[30:].unique()) == 5
    assert not torch.equal(passes[0], passes[1])
    for total in (1, 9, 10, 11, 20):
        assert torch.equal(shuffled(10, total, seed=1), order[:total])
    assert not torch.equal(shuffled(10, 35, seed=2), order)


def test_generators_differ_by_any_part_of_their_purpose():
    purposes = [(1, "eval"), (2, "eval"), (1, "sample", 1), (1, "sample", 2), (1, "sample", 11)]
    draws = [torch.rand(4, generator=seeded(*purpose)).tolist() for purpose in purposes]
    assert len(set(map(tuple, draws))) == len(purposes)
    assert torch.rand(4, generator=seeded(1, "eval")).tolist() == draws[0]
