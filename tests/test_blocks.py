"""The parts that the scripts of the first plan share, in p3o_v1.py, on tiny random models of five shapes, against plain one-row computations."""

import json
import math
import random
import sys
from functools import partial

import pytest
import torch
from conftest import V, build, sampled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from p3o_v1 import (
    Args,
    in_batches,
    load_prompts,
    response_kl,
    response_logprobs,
    response_scores,
    text_reward,
)

PROMPT_LENGTHS, RESPONSE_LENGTHS = (1, 9, 4, 2, 6, 3), (7, 2, 1, 12, 5, 3)
NEVER = [V]  # an end id that no model can sample
pytestmark = pytest.mark.usefixtures("one_thread")


def some_ids(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=generator) for n in lengths]


def some_rows():
    return some_ids(PROMPT_LENGTHS, seed=1), some_ids(RESPONSE_LENGTHS, seed=2)


def some_noise(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_distributions(model, prompt, response, temperature):
    """log π(· | x, y_<t) for every t, from a forward of the one row as it is: [T, V]."""
    logits = model(torch.cat([prompt, response])[None]).logits[0]
    return (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]


def plain_logprobs(model, prompt, response, temperature):
    return plain_distributions(model, prompt, response, temperature).gather(1, response[:, None])[
        :, 0
    ]


def gradient_of(model, loss):
    """One vector over all parameters."""
    parameters = list(model.parameters())
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def assert_same_gradient(found, expected):
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert expected.norm() > 0


def test_the_models_are_far_from_uniform(policy):
    """Else much of this file would test little."""
    logprobs = plain_distributions(policy, *(ids[1] for ids in some_rows()), 1.0)
    assert -(logprobs.exp() * logprobs).sum(-1).mean() < 0.8 * math.log(V)


# ------------------------------------------------------------------------------------------ log-probabilities of a text
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_plain_forwards(policy, temperature):
    prompts, responses = some_rows()
    with torch.no_grad():
        found = response_logprobs(policy, prompts, responses, temperature)
        expected = [plain_logprobs(policy, x, y, temperature) for x, y in zip(prompts, responses)]
    assert found.dtype == torch.float32 and found.shape == (len(prompts), max(RESPONSE_LENGTHS))
    torch.testing.assert_close(
        found, pad_sequence(expected, batch_first=True), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("batch_size", [2, 100])
def test_logprobs_do_not_depend_on_order_and_batching(policy, batch_size):
    prompts, responses = some_rows()
    order = random.Random(batch_size).sample(range(len(prompts)), len(prompts))
    function = partial(response_logprobs, policy, temperature=0.7)
    found = in_batches(
        function, [prompts[i] for i in order], [responses[i] for i in order], batch_size
    )
    expected = [plain_logprobs(policy, prompts[i], responses[i], 0.7) for i in order]
    torch.testing.assert_close(
        found, pad_sequence(expected, batch_first=True), rtol=1e-5, atol=1e-5
    )


# ------------------------------------------------------------------------------------- several responses to each prompt
def shared_rows(K):
    """Prompts and K responses to each, of very different lengths. A text of prompt and response has at most 64 tokens,
    as many as learned positions allow, while a prompt with all its responses can be longer."""
    lengths = [7, 1, 3], [24, 2, 23], [60, 3, 59], [5, 12, 12], [1, 1, 1]
    return some_ids([1, 40, 4, 9, 1], seed=1), some_ids(
        [n for row in lengths for n in row[:K]], seed=2
    )


def each(prompts, K):
    return [x for x in prompts for _ in range(K)]


@pytest.mark.parametrize("K", [3])
def test_responses_to_a_prompt_have_the_logprobs_and_gradients_of_plain_forwards(policy, K):
    prompts, responses = shared_rows(K)
    expected = [plain_logprobs(policy, x, y, 0.7) for x, y in zip(each(prompts, K), responses)]
    expected = pad_sequence(expected, batch_first=True)
    found = response_logprobs(policy, prompts, responses, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    assert_same_gradient(
        gradient_of(policy, (weights * found).sum()),
        gradient_of(policy, (weights * expected).sum()),
    )


@pytest.mark.parametrize("K", [3])
def test_responses_to_a_prompt_have_the_scores_and_gradients_of_plain_forwards(reward_network, K):
    prompts, responses = shared_rows(K)
    rows = zip(each(prompts, K), responses)
    expected = torch.stack([reward_network(torch.cat(row)[None]).logits[0, 0] for row in rows])
    found = response_scores(reward_network, prompts, responses)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.arange(len(found)) - 3.0
    found, expected = (
        gradient_of(reward_network, (weights * scores).sum()) for scores in (found, expected)
    )
    assert_same_gradient(found, expected)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_responses_to_a_prompt_may_come_in_any_batches_and_order(policy, batch_size):
    """A batch of fewer than K rows is taken as one prompt."""
    prompts, responses = shared_rows(2)
    order = random.Random(batch_size).sample(range(len(prompts)), len(prompts))
    prompts, responses = (
        [prompts[b] for b in order],
        [responses[2 * b + k] for b in order for k in range(2)],
    )
    found = in_batches(
        partial(response_logprobs, policy, temperature=0.7), prompts, responses, batch_size
    )
    with torch.no_grad():
        expected = [plain_logprobs(policy, x, y, 0.7) for x, y in zip(each(prompts, 2), responses)]
    torch.testing.assert_close(
        found, pad_sequence(expected, batch_first=True), rtol=1e-5, atol=5e-5
    )


@torch.no_grad()
def test_a_prompt_is_read_once_for_its_responses(policy, shape):
    """But for models with a sliding window, which read it with each."""
    read, (prompts, responses) = [], shared_rows(3)
    hook = policy.base_model.register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].shape)
    )
    response_logprobs(policy, prompts, responses, 1.0)
    hook.remove()
    assert read == [(15, 64) if shape == "mistral" else (5, 4 + 60 + 3 + 59)]


# --------------------------------------------------------------------------------------------------------------- memory
class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made within, in forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(made) if isinstance(part, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("shape", ["llama"])
def test_the_logits_of_all_tokens_are_never_in_memory(shape):
    """Nor kept in parts for the backward pass; the gradients are those of a plain computation, which has them all."""
    model = build(shape, "policy", seed=5, vocab_size=60_000)
    prompts, responses = some_ids([5] * 36), some_ids([30] * 36)
    with Largest() as plain:
        rows = torch.stack([torch.cat(row) for row in zip(prompts, responses)])
        logits = model(rows).logits[:, 4:-1]
        expected = (
            (logits / 0.7).log_softmax(-1).gather(2, torch.stack(responses)[:, :, None]).squeeze(2)
        )
        expected_gradient = gradient_of(model, expected.square().sum())
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda v: kept.append(v.numel()) or v, lambda v: v
    )
    with Largest() as forward, hooks:
        found = response_logprobs(model, prompts, responses, 0.7)
    with Largest() as backward:
        gradient = gradient_of(model, found.square().sum())
    with Largest() as kl, torch.no_grad():
        response_kl(model, model, prompts, responses, 0.7)
    assert plain.elements >= 36 * 30 * 60_000
    assert max(forward.elements, backward.elements, kl.elements, sum(kept)) < plain.elements / 2
    assert forward.elements > 60_000 and backward.elements > 60_000
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    assert_same_gradient(gradient, expected_gradient)


# ------------------------------------------------------------------------------------------------------------- sampling
def two_end_ids(policy, prompts, noise):
    """Two tokens that the policy samples often, as end ids, and what it samples where nothing ends a response."""
    endless, _ = sampled(policy, prompts, noise, 1.0, NEVER)
    counts = torch.bincount(torch.cat(endless), minlength=V)
    return counts.topk(4).indices[2:].tolist(), endless


@pytest.mark.parametrize("K, temperature", [(2, 0.7), (3, 1.0)])
def test_recorded_logprobs_are_those_of_the_responses(policy, K, temperature):
    """Also once trained upon: the first ratios are 1."""
    prompts, noise = some_ids(PROMPT_LENGTHS), some_noise(len(PROMPT_LENGTHS), K, 16)
    end_ids, _ = two_end_ids(policy, prompts, noise)
    responses, recorded = sampled(policy, prompts, noise, temperature, end_ids)
    assert len({len(y) for y in responses}) > 2
    lengths = torch.tensor([len(y) for y in responses])
    assert recorded.dtype == torch.float32 and recorded.shape == (len(prompts) * K, lengths.max())
    assert (recorded[torch.arange(recorded.shape[1]) >= lengths[:, None]] == 0).all()
    logps = response_logprobs(policy, prompts, responses, temperature).double().sum(1)
    old_logps = recorded.double().sum(1)
    torch.testing.assert_close(logps.detach(), old_logps, rtol=0, atol=1e-4)
    torch.testing.assert_close((logps - old_logps).exp(), torch.ones_like(logps), rtol=0, atol=1e-3)
    assert ((logps - logps.detach()).exp() == 1).all()


def test_tokens_are_those_of_a_plain_sampler(policy):
    """One row at a time, without a cache: the first token whose cumulative probability exceeds its own noise."""
    prompts, noise = some_ids(PROMPT_LENGTHS), some_noise(len(PROMPT_LENGTHS), 2, 6)
    found, _ = sampled(policy, prompts, noise, 1.3, NEVER)
    for row, y in enumerate(found):
        ids = prompts[row // 2]
        for u in noise[row // 2, row % 2]:
            with torch.no_grad():
                probs = (policy(ids[None]).logits[0, -1].double() / 1.3).softmax(0)
            ids = torch.cat([ids, (probs.cumsum(0) > u).nonzero()[0]])
        assert torch.equal(y, ids[len(prompts[row // 2]) :])


def test_responses_end_with_their_first_end_id(policy):
    """And are what is sampled without end ids up to there, whichever rows have ended before."""
    prompts, noise = some_ids(PROMPT_LENGTHS), some_noise(len(PROMPT_LENGTHS), 3, 16)
    end_ids, endless = two_end_ids(policy, prompts, noise)
    assert all(len(y) == 16 for y in endless)
    responses, _ = sampled(policy, prompts, noise, 1.0, end_ids)
    cut = 0
    for y, whole in zip(responses, endless):
        ends = [t for t, token in enumerate(whole.tolist()) if token in end_ids]
        assert torch.equal(y, whole[: ends[0] + 1] if ends else whole)
        cut += not ends
    assert 0 < cut < len(responses)
    assert {y[-1].item() for y in responses} >= set(end_ids)


def test_a_response_does_not_depend_on_the_other_rows(policy):
    prompts, noise = some_ids(PROMPT_LENGTHS), some_noise(len(PROMPT_LENGTHS), 2, 12)
    end_ids, _ = two_end_ids(policy, prompts, noise)
    responses, recorded = sampled(policy, prompts, noise, 1.0, end_ids)
    for i, prompt in enumerate(prompts):
        for k in range(2):
            (alone,), logprobs = sampled(
                policy, [prompt], noise[i : i + 1, k : k + 1], 1.0, end_ids
            )
            assert torch.equal(alone, responses[2 * i + k])
            torch.testing.assert_close(
                logprobs[0], recorded[2 * i + k, : len(alone)], rtol=1e-5, atol=5e-5
            )


def assert_fits(counts, expected):
    """Pearson's chi-square test at p = 1e-4, with the approximation of Wilson and Hilferty."""
    chi_square, degrees = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    z = ((chi_square / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
    assert z < 3.72


@torch.no_grad()
@pytest.mark.parametrize("shape", ["llama"], indirect=True)
def test_nothing_is_cut_off_the_distribution(policy):
    """50,000 first tokens at temperature 5: every token of the vocabulary, by chi-square as often as softmax says."""
    draws, prompt = 50_000, some_ids([2])[0]
    responses, _ = sampled(policy, [prompt], some_noise(1, draws, 1), 5.0, NEVER)
    counts = torch.bincount(torch.cat(responses), minlength=V)
    expected = draws * (policy(prompt[None]).logits[0, -1].double() / 5).softmax(0)
    assert expected.min() > 10 and (counts > 0).all()
    assert_fits(counts, expected)


def policy_with_first_token(shape, probabilities):
    """A model whose next token has these probabilities, for the first tokens of the vocabulary, whatever the text."""
    model, logits = build(shape, "policy", seed=4), torch.full((max(V, len(probabilities)),), -1e9)
    logits[: len(probabilities)] = torch.as_tensor(probabilities, dtype=torch.float64).log().float()
    head = torch.nn.Linear(32, len(logits))
    head.weight.data.zero_()
    head.bias.data.copy_(logits)
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("rare", [1, 2])
def test_a_rare_token_has_its_share_of_the_noise(shape, rare):
    """Of probability 1e-8, amid the cumulative distribution or at its end: noise around it in steps of 1e-10."""
    probabilities = [0.5, 0.5 - 1e-8]
    probabilities.insert(rare, 1e-8)
    steps = torch.arange(-5000, 5000, dtype=torch.float64) * 1e-10
    noise = 0.5 + steps if rare == 1 else 1 - (steps - steps[0]) - 1e-11
    model = policy_with_first_token(shape, probabilities)
    responses, logprobs = sampled(
        model, some_ids([3]), noise.sort().values.view(1, -1, 1), 1.0, NEVER
    )
    tokens = torch.cat(responses)
    assert (tokens.diff() >= 0).all() and set(tokens.tolist()) == (
        {0, 1, 2} if rare == 1 else {1, 2}
    )
    assert (tokens == rare).sum().item() == pytest.approx(100, abs=2)
    torch.testing.assert_close(
        logprobs[tokens == rare].exp().mean().item(), 1e-8, rtol=1e-4, atol=0
    )


# -------------------------------------------------------------------------------------------------------- KL and scores
@torch.no_grad()
def test_kl_is_the_exact_sum_over_the_vocabulary(policy, reference):
    """And beside it the log-ratio of the sampled tokens."""
    prompts, responses = some_rows()
    found = response_kl(policy, reference, prompts, responses, 0.7)
    batched = in_batches(
        partial(response_kl, policy, reference, temperature=0.7), prompts, responses, 2
    )
    for row, (x, y) in enumerate(zip(prompts, responses)):
        logp, ref_logp = (
            plain_distributions(model, x, y, 0.7).double() for model in (policy, reference)
        )
        kl = sum(
            sum(math.exp(a) * (a - b) for a, b in zip(*pair))
            for pair in zip(logp.tolist(), ref_logp.tolist())
        )
        logratio = (logp - ref_logp).gather(1, y[:, None]).sum().item()
        assert found[row].tolist() == pytest.approx([kl, logratio], rel=1e-5, abs=1e-4)
        assert batched[row].tolist() == pytest.approx([kl, logratio], rel=1e-5, abs=1e-4)
        assert kl > 0


@torch.no_grad()
def test_kl_of_a_policy_to_itself_is_0(policy):
    assert (response_kl(policy, policy, *some_rows(), 1.0) == 0).all()


@torch.no_grad()
def test_scores_are_the_reward_models_own(reward_network):
    """Its logits for each row alone and without padding, which transformers reads at the last token."""
    prompts, responses = some_rows()
    expected = torch.stack(
        [reward_network(torch.cat(row)[None]).logits[0, 0] for row in zip(prompts, responses)]
    )
    assert expected.std() > 0.1
    scores = response_scores(reward_network, prompts, responses)
    assert scores.dtype == torch.float32 and scores.shape == (len(prompts),)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    batched = in_batches(partial(response_scores, reward_network), prompts, responses, 4)
    torch.testing.assert_close(batched, expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- rewards of texts
def tokenizer_of(kind):
    """A small one that writes a leading space as Pythia does, or as Llama does, whose decoding drops the first."""
    metaspace = kind == "metaspace"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(False)
    )
    tokenizer.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    alphabet = [] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(
        ["Human: what colour is the sky? Assistant: the sky is blue, I think."], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_a_reward_function_gets_the_texts(tmp_path, monkeypatch, kind):
    """The responses with their leading space, nothing of special tokens; what it returns comes back in float32."""
    (tmp_path / "my_reward.py").write_text(
        "import json, pathlib\n"
        "def lengths(prompts, responses):\n"
        "    pathlib.Path(__file__).with_name('seen.json').write_text(json.dumps([prompts, responses]))\n"
        "    return [len(y) / 3 for y in responses]\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    tokenizer = tokenizer_of(kind)
    texts = ["what colour is the sky?", "Assistant:"], [" blue, I think", " the sky is blue"]
    prompts, responses = (
        [torch.tensor(ids) for ids in tokenizer(part).input_ids] for part in texts
    )
    responses[0] = torch.cat([responses[0], torch.tensor([tokenizer.eos_token_id])])
    score = text_reward(f"{tmp_path}/my_reward.py:lengths", "--reward-fn", tokenizer)
    rewards = score(prompts, responses)
    assert json.loads((tmp_path / "seen.json").read_text()) == [*texts]
    torch.testing.assert_close(rewards, torch.tensor([len(y) / 3 for y in texts[1]]))


# ---------------------------------------------------------------------------------------------------------------- data
def test_prompts_of_any_length_are_kept_and_dialogues_end_at_the_last_turn(tmp_path):
    """Each once; of dialogues without a turn of the assistant there is no prompt."""
    tokenizer, kept = tokenizer_of("byte_level"), ["sky " * n + "is" for n in range(30)]
    assert any(len(x) == 11 for x in [*kept, "Hello world"])
    turns = [
        "\n\nHuman: what?\n\nAssistant: the sky.\n\nHuman: is it?\n\nAssistant:",
        "\n\nHuman: blue?\n\nAssistant:",
    ]
    turns.append("\n\nHuman: green?\n\nAssistant:")
    rows = {
        "prompt": [*kept, "Hello world", kept[0]],
        "chosen": [*(x + " blue" for x in turns), "nobody answers"],
    }
    for column, expected in (("prompt", [*kept, "Hello world"]), ("chosen", turns)):
        file = tmp_path / f"{column}.jsonl"
        file.write_text("".join(json.dumps({column: x}) + "\n" for x in rows[column]))
        train, held_out = load_prompts(tokenizer, Args(dataset=str(file)))
        assert sorted(tokenizer.batch_decode([*train, *held_out])) == sorted(expected)
