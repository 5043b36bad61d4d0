"""What models say of responses, against plain forwards of one row; how models are loaded for it."""

import copy
import re
from functools import partial

import pytest
import torch
from conftest import V, build
from scripts import TINY
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from grpo import Args, padded_logprobs, response_logprobs
from p3o_v2 import UserError, load_model, response_kl, response_logps, response_scores, set_up_model
from ppo import response_values

PROMPT_LENGTHS = (1, 30, 4, 9, 1)
RESPONSE_LENGTHS = ([33, 1, 12], [1, 34, 24], [60, 3, 59], [5, 12, 12], [1, 1, 1])  # K = 3
each_shape = pytest.mark.parametrize("shape", ["gpt_neox", "llama", "gpt2", "qwen2"])


def some_ids(length, seed, high=V):
    return torch.randint(0, high, (length,), generator=torch.Generator().manual_seed(seed))


def some_rows(K):
    """Prompts, and K responses to each; none of the pairs is longer than 64 tokens."""
    prompts = [some_ids(n, i) for i, n in enumerate(PROMPT_LENGTHS)]
    responses = []
    for i, lengths in enumerate(RESPONSE_LENGTHS):
        responses.append([some_ids(n, 100 + 10 * i + k) for k, n in enumerate(lengths[:K])])
    return prompts, responses


def each(prompts, responses):
    """All pairs of a prompt and a response."""
    return [(x, y) for x, group in zip(prompts, responses) for y in group]


def assert_near(found, expected, tolerance=1e-5):
    """Equal but for rounding, relative to the largest number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def gradient_of(model, loss):
    """One vector over all parameters."""
    weights = list(model.parameters())
    parts = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


# ---------------------------------------------------------------- against forwards of one row
def plain_distributions(model, x, y, temperature):
    """log π(· | x, y_<t) for every t, from a forward of the one row as it is: [T, V]."""
    logits = model(torch.cat([x, y])[None]).logits[0, len(x) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def plain_logprobs(model, x, y, temperature=0.7):
    return plain_distributions(model, x, y, temperature).gather(1, y[:, None])[:, 0]


def plain_logps(model, x, y):
    return plain_logprobs(model, x, y).double().sum(0, keepdim=True)


def plain_score(model, x, y):
    return model(torch.cat([x, y])[None]).logits[0]


def plain_values(model, x, y):
    """At the last token of the prompt, then at all of the response but its last."""
    [states] = model.base_model(torch.cat([x, y])[None]).last_hidden_state
    return model.score(states[len(x) - 1 : -1])[:, 0]


FUNCTIONS = {  # function, the same of one row, kind of model
    "logprobs": (partial(response_logprobs, temperature=0.7), plain_logprobs, "policy"),
    "padded": (partial(padded_logprobs, temperature=0.7, length=70), plain_logprobs, "policy"),
    "logps": (partial(response_logps, temperature=0.7), plain_logps, "policy"),
    "scores": (response_scores, plain_score, "score"),
    "values": (partial(response_values, length=70), plain_values, "score"),
}


@each_shape
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("K", [1, 3])
def test_what_a_batch_computes_is_what_plain_forwards_do(name, shape, K):
    """So are the gradients. Other rows and padding change nothing."""
    function, plain, kind = FUNCTIONS[name]
    model, rows = build(shape, kind, seed=1), some_rows(K)
    expected = [plain(model, x, y) for x, y in each(*rows)]
    assert K < 3 or sum(len(y) for _, y in each(*rows)) > 256  # more than two chunks of logits
    found = function(model, *rows)
    assert found.shape[:2] == (5, K)
    assert found.dtype == (torch.float32 if name in ("logprobs", "scores") else torch.float64)
    found, lengths = found.view(5 * K, -1), torch.tensor([len(row) for row in expected])
    assert found.shape[1] == (70 if name in ("padded", "values") else lengths.max())
    is_token = torch.arange(found.shape[1]) < lengths[:, None]
    assert name == "values" or (found[~is_token] == 0).all()
    found, expected = found[is_token], torch.cat(expected)
    assert_near(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = [gradient_of(model, (weights * x).sum()) for x in (found, expected)]
    assert gradients[1].abs().max() > 1
    assert_near(*gradients)


@each_shape
@torch.no_grad()
def test_kl_is_the_exact_sum_over_the_vocabulary(shape):
    policy, reference = (build(shape, "policy", seed) for seed in (1, 2))
    rows, expected = some_rows(2), []
    for x, y in each(*rows):
        logp, ref_logp = (plain_distributions(m, x, y, 0.7).double() for m in (policy, reference))
        expected.append((logp.exp() * (logp - ref_logp)).sum())
    found = response_kl(policy, reference, *rows, 0.7)
    assert_near(found, torch.stack(expected).view(-1, 2))
    assert (found > 0).all() and (response_kl(policy, policy, *rows, 0.7) == 0).all()


@pytest.mark.parametrize("function", [response_logprobs, response_logps])
def test_the_logits_of_many_tokens_are_never_in_memory_together(function):
    """Nor kept for the backward pass, which makes them again."""
    policy, made, kept = build("gpt2", "policy", seed=5, vocab_size=10_000), [], []
    head = policy.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: made.append(len(logits)))
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = function(policy, [some_ids(5, 1)] * 40, [[some_ids(30, 2)]] * 40, 0.7)
    gradient_of(policy, found.sum())
    assert sum(made) == 2 * 1200 and max(made) < 600 and sum(kept) < 600 * 10_000


def test_gradients_repeat_to_the_last_bit():
    """Also where threads share the work: an order of sums that is chance would show here."""
    model, gradients = AutoModelForCausalLM.from_pretrained(TINY / "sft"), []
    torch.set_num_threads(4)
    for _ in range(8):
        gradients.append(gradient_of(model, response_logps(model, *some_rows(3), 1.0).sum()))
    torch.set_num_threads(1)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# ------------------------------------------------------------------------------ models as loaded
SCALES = {"gemma2": "final_logit_softcapping", "granite": "logits_scaling", "cohere": "logit_scale"}


@pytest.mark.parametrize("shape", SCALES)
def test_a_model_that_changes_its_logits_is_refused(shape, tmp_path):
    sizes = {"head_dim": 8, "num_key_value_heads": 2, SCALES[shape]: 8.0}
    build(shape, "policy", 1, **sizes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=tmp_path.name):
        load_model(AutoModelForCausalLM, str(tmp_path), "cpu", Args())


@each_shape
@pytest.mark.parametrize("kind", ["policy", "score"])
def test_only_the_last_layers_and_an_untied_head_are_trained(shape, kind):
    """With the gradients that they have in the whole model, checkpointed or not."""
    whole = build(shape, kind, seed=1)
    model = copy.deepcopy(whole)
    set_up_model(model, Args(unfrozen_layers=1, gradient_checkpointing=True), trainable=True)
    function, *_ = FUNCTIONS["logps" if kind == "policy" else "scores"]
    for part in (whole, model):
        function(part, *some_rows(2)).square().sum().backward()
    for name, weight in model.named_parameters():
        is_last = re.search(r"\.(layers|h)\.1\.|^(lm_head|embed_out|score)\.", name)
        assert weight.requires_grad == bool(is_last), name
        if is_last:
            assert_near(weight.grad, whole.get_parameter(name).grad)
    set_up_model(model, Args(unfrozen_layers=1), trainable=False)
    assert not any(weight.requires_grad for weight in model.parameters())
