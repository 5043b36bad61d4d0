"""Write a folder with a model of a Pythia's shape and random weights, for runs without the hub.

python benchmark/random_model.py --tokenizer FOLDER --output FOLDER/pythia-14m
"""

from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

SHAPES = {  # hidden size, layers, heads
    "pythia-14m": (128, 6, 4),
    "pythia-70m": (512, 6, 8),
    "pythia-160m": (768, 12, 12),
    "pythia-410m": (1024, 24, 16),
    "pythia-1b": (2048, 16, 8),
    "pythia-2.8b": (2560, 32, 32),
    "pythia-6.9b": (4096, 32, 32),
}


@dataclass
class Args:
    tokenizer: str  # folder of the GPT-NeoX tokenizer that all Pythia models use
    output: str  # folder to write
    shape: Literal[tuple(SHAPES)] = "pythia-14m"  # whose sizes to take
    seed: int = 0  # of the weights


def config_of(shape, **options):
    """The configuration of a Pythia model."""
    hidden, layers, heads = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=2048,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.manual_seed(args.seed)
    model = GPTNeoXForCausalLM(config_of(args.shape))
    model.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.output)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"{args.output}: {millions:.1f} M parameters, random weights")
