"""What saves memory and time: frozen layers, checkpointed activations, bfloat16, micro-batches; in the parts that the
scripts share and in whole runs of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON, SIZES, V, build, sampled
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

import dpo
import p3o_v1
from p3o_v1 import UserError, load_model, response_logprobs, response_scores, set_up_model

TINY = Path(__file__).parent.parent / "tiny"
pytestmark = pytest.mark.usefixtures("one_thread")
each_kind = pytest.mark.parametrize("kind", ["policy", "score"])


def set_up(
    shape,
    kind="policy",
    train=True,
    dtype="float32",
    gradient_checkpointing=False,
    unfrozen_layers=0,
):
    """The model of this shape, always with the same weights, prepared as load_model does."""
    args = SimpleNamespace(
        dtype=dtype, gradient_checkpointing=gradient_checkpointing, unfrozen_layers=unfrozen_layers
    )
    return set_up_model(build(shape, kind, seed=1), args, train)


def some_rows():
    """Prompts and two responses to each."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 9, 1), (7, 2, 12, 5, 1, 9)
    return tuple([torch.randint(0, V, (n,), generator=generator) for n in part] for part in lengths)


def some_samples(model):
    prompts, _ = some_rows()
    noise = torch.rand(3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return prompts, *sampled(model, prompts, noise, 1.0, [7, 8, 9])


def gradients_of(model, values):
    """{name: gradient} of a weighted sum of log-probabilities or scores, of what is trained."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    return dict(zip(named, torch.autograd.grad((weights * values).sum(), list(named.values()))))


def values_of(model):
    """Log-probabilities of a policy, scores of a reward model."""
    if model.get_output_embeddings():
        return response_logprobs(model, *some_rows(), 0.7)
    return response_scores(model, *some_rows())


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------------------- checkpointed activations
def test_checkpointing_changes_memory_alone(shape):
    """Log-probabilities, gradients and samples stay, and less than half as much is kept for the backward pass."""
    found = []
    for checkpointing in (False, True):
        model, kept = set_up(shape, gradient_checkpointing=checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda v, kept=kept: kept.append(v.numel()) or v, lambda v: v
        ):
            logprobs = response_logprobs(model, *some_rows(), 0.7)
        found.append((logprobs, gradients_of(model, logprobs), some_samples(model), sum(kept)))
    (logprobs, gradients, samples, kept), (logprobs_, gradients_, samples_, kept_) = found
    torch.testing.assert_close(logprobs_, logprobs)
    torch.testing.assert_close(gradients_, gradients)
    torch.testing.assert_close(samples_, samples)
    assert kept_ < kept / 2


# -------------------------------------------------------------------------------------------------------- frozen layers
@each_kind
@pytest.mark.parametrize("unfrozen_layers", [1, 2])
def test_the_last_layers_and_the_head_are_trained_alone(shape, kind, unfrozen_layers):
    """With the gradients that they have in the whole model. GPT-2's head stays frozen: it is its embedding too."""
    whole, model = set_up(shape, kind), set_up(shape, kind, unfrozen_layers=unfrozen_layers)
    parts = ("lm_head.", "score.", ".layers.1.", ".h.1.", ".layers.0.", ".h.0.")[
        : 2 + 2 * unfrozen_layers
    ]
    assert trained(model) == {
        name for name in trained(whole) if any(part in f".{name}" for part in parts)
    }
    expected, found = (gradients_of(part, values_of(part)) for part in (whole, model))
    torch.testing.assert_close(found, {name: expected[name] for name in found})


# ------------------------------------------------------------------------------------------------------------- bfloat16
@each_kind
def test_bfloat16_changes_little(shape, kind):
    """Of the values and of the directions of the gradients, which are float32."""
    exact, model = set_up(shape, kind), set_up(shape, kind, dtype="bfloat16")
    expected, found = values_of(exact), values_of(model)
    difference = (found - expected)[expected != 0].abs().mean()
    assert found.dtype == torch.float32 and 1e-4 < difference < 0.2
    expected, found = gradients_of(exact, expected), gradients_of(model, found)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.9


@each_kind
@torch.no_grad()
def test_a_frozen_copy_in_bfloat16_is_the_same_to_the_bit(shape, kind):
    """Though its matrices are stored as they are rounded."""
    policy, reference = (set_up(shape, kind, train, "bfloat16") for train in (True, False))
    assert torch.equal(values_of(policy), values_of(reference))


# ------------------------------------------------------------------------------------------- models that can be loaded
FLOAT32 = SimpleNamespace(
    dtype="float32", gradient_checkpointing=False, unfrozen_layers=0, trust_remote_code=False
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
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="scales or caps its logits"):
        load_model(AutoModelForCausalLM, str(tmp_path), "--model", "cpu", FLOAT32)


# ------------------------------------------------------------------------------------------------------ runs of scripts
SMALL = {
    "num_updates": 1,
    "minibatch_size": 16,
    "max_response_tokens": 32,
    "eval_prompts": 16,
    "learning_rate": 1e-4,
}
ONLINE = {
    "prompts_per_update": 16,
    "num_responses": 2,
    "num_epochs": 2,
    "reward_model": f"{TINY}/reward_model",
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a script on the embedded policy and a few rows of its data, and returns the run's folder."""
    monkeypatch.chdir(tmp_path)
    with open(TINY / "data/train.jsonl") as file, open("rows.jsonl", "w") as few:
        few.writelines(line for line, _ in zip(file, range(200)))

    def run(script, **options):
        folder = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
        options = SMALL | (ONLINE if script is p3o_v1 else {}) | options
        script.main(
            script.Args(
                model=f"{TINY}/sft", dataset="rows.jsonl", output_dir=str(folder), **options
            )
        )
        return folder

    return run


each_script = pytest.mark.parametrize("script", [p3o_v1, dpo], ids=lambda script: script.__name__)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def moved(folder, start=TINY / "sft"):
    """{name: how far training has moved a weight}, of those that the starting model has."""
    before, after = (
        load_file(start / "model.safetensors"),
        load_file(folder / "model/model.safetensors"),
    )
    return {name: after[name] - before[name] for name in before}


def norm(weights):
    return torch.stack([part.norm() for part in weights.values()]).norm().item()


@each_script
def test_micro_batches_and_checkpointing_change_rounding_only(script, run):
    """All metrics stay, and what the steps have made of the weights."""
    whole, *others = (
        run(script, micro_batch_size=size, gradient_checkpointing=size == 8) for size in (64, 8)
    )
    (expected,) = lines(whole / "metrics.jsonl")
    expected = {
        key: value
        for key, value in expected.items()
        if not key.endswith(("_per_second", "accuracies")) and "time/" not in key
    }  # dpo.py's margins are 0 at first, and their signs rounding
    assert expected["grad_norm"] > 0
    for other in others:
        (found,) = lines(other / "metrics.jsonl")
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert norm(moved(other, start=whole / "model")) < 0.01 * norm(moved(whole))


@each_script
def test_only_what_is_not_frozen_has_moved(script, run):
    """The last layer: the embedded policy's head is its embedding too."""
    movement = moved(run(script, unfrozen_layers=1))
    assert {name for name in movement if movement[name].any()} == {
        name for name in movement if ".layers.3." in name
    }


def test_first_ratios_in_bfloat16_are_1_to_the_bit(run):
    """With one minibatch, whatever the micro-batches; the policy starts at the reference, and is saved in float32."""
    folder = run(p3o_v1, dtype="bfloat16", num_epochs=1, micro_batch_size=8)
    (metrics,), (start, end) = lines(folder / "metrics.jsonl"), lines(folder / "frontier.jsonl")
    assert (
        metrics["policy/ratio_max"] == metrics["policy/ratio_mean"] == 1
        and metrics["policy/approx_kl"] == 0
    )
    assert start["kl"] == start["kl_k1"] == 0 < end["kl"]
    assert {v.dtype for v in load_file(folder / "model/model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype, minibatch_size, rows", [("float32", 4, 0), ("bfloat16", 4, 24)])
def test_no_forward_is_spent_on_what_is_known(dtype, minibatch_size, rows, run, monkeypatch):
    """log π_old of 16 prompts: recorded while sampling, or in bfloat16 from the first minibatch's own forward."""
    seen, computed = [], p3o_v1.response_logprobs

    def response_logprobs(model, prompts, responses, temperature):
        if not torch.is_grad_enabled() and trained(model):
            seen.extend(responses)
        return computed(model, prompts, responses, temperature)

    monkeypatch.setattr(p3o_v1, "response_logprobs", response_logprobs)
    monkeypatch.setattr(
        p3o_v1, "save_model", lambda *_: None
    )  # it compares what it saved by a forward of its own
    (metrics,) = lines(run(p3o_v1, dtype=dtype, minibatch_size=minibatch_size) / "metrics.jsonl")
    assert len(seen) == rows
    assert 0 <= metrics["val/ratio_init_error"] < (1e-3 if dtype == "float32" else 0.5)
