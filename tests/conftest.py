"""What the tests share: the scripts on the path, and tiny random models of five shapes with sharp distributions."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

sys.path.insert(0, str(Path(__file__).parent.parent))

V = 100  # vocabulary
COMMON = {"vocab_size": V, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "num_labels": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LONGEST = {"max_position_embeddings": 64}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.0}
WINDOW = 8  # of mistral: shorter than most rows of the tests
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SHAPES = {
    "gpt_neox": (
        GPTNeoXConfig(**COMMON, **SIZES, **LONGEST, **NO_DROPOUT),
        {"policy": GPTNeoXForCausalLM, "score": GPTNeoXForSequenceClassification},
    ),
    "llama": (  # with grouped-query attention
        LlamaConfig(**COMMON, **SIZES, **LONGEST, num_key_value_heads=2, attention_dropout=0.0),
        {"policy": LlamaForCausalLM, "score": LlamaForSequenceClassification},
    ),
    "gpt2": (  # learned positions, embeddings tied to the output
        GPT2Config(**COMMON, **GPT2, attn_pdrop=0.0, summary_first_dropout=0.0),
        {"policy": GPT2LMHeadModel, "score": GPT2ForSequenceClassification},
    ),
    "qwen2": (  # with biases in its attention
        Qwen2Config(**COMMON, **SIZES, **LONGEST, num_key_value_heads=2, attention_dropout=0.0),
        {"policy": Qwen2ForCausalLM, "score": Qwen2ForSequenceClassification},
    ),
    "mistral": (  # with a sliding window
        MistralConfig(**COMMON, **SIZES, **LONGEST, num_key_value_heads=2, sliding_window=WINDOW),
        {"policy": MistralForCausalLM, "score": MistralForSequenceClassification},
    ),
}


def build(shape, kind, seed, **changes):
    """A model in float32 with weights of standard deviation 0.4, so that its next token is far from uniform."""
    config, classes = SHAPES[shape]
    config = copy.deepcopy(config)
    config.update(changes)
    torch.manual_seed(seed)
    model = classes[kind](config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.4)
    return model


@pytest.fixture(scope="module")
def one_thread():
    """On models as small as these, threads only wait for each other: ten times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(scope="session")
def policy(shape):
    return build(shape, "policy", seed=1)


@pytest.fixture(scope="session")
def reference(shape):
    return build(shape, "policy", seed=2)


@pytest.fixture(scope="session")
def reward_network(shape):
    return build(shape, "score", seed=3)
