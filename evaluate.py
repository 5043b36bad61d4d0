"""Compare policies: they answer the same held-out prompts with the same random numbers.

A policy is the folder of a run, the folder or the hub id of a model, or tiny, the built-in SFT
policy. Each answers every prompt once. The first table has means over prompts and standard errors:

    reward, gold       r(x, y), and the true reward where one is known
    kl                 KL(π ‖ π_ref) of a response, in nats, exact over the vocabulary at each token
    length, eos_rate   tokens of a response, and the share of responses with an end token

The others have win rates: the share p of the n prompts on which one policy has a higher reward than
another. A tie or the same response is half a win. The interval is Wilson's 95 % interval,

    (p + v/2 ± √(v p (1 − p) + v²/4)) / (1 + v)          v = 1.96² / n; with ties it is too wide

With --judge-model the better answer is also chosen by a language model, which sees each pair in
both orders. Its replies are cached on disk.

Settings that are not given, and the reward model, come from the first run among the policies. But a
Python file runs only if it is named on the command line, because a run may come from anyone.

    python evaluate.py runs/p3o_v2/tiny/tiny tiny --show 4
    python evaluate.py runs/p3o_v2/mine/model runs/ppo/mine/model --reward-fn reward.py:score
    python evaluate.py A B --judge-model NAME --judge-url http://localhost:8000/v1

Shapes: B prompts, K = 1 response to each, T response tokens, V vocabulary, D hidden size. A prompt
or a response is a 1-D tensor of token ids without padding; `responses` is a list of B lists of K.
"""

import json
import os
import re
import runpy
import sys
import textwrap
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Literal

import datasets
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import PartialState
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
)


def win_rate(wins):
    """The mean of wins (1, ½ or 0) on n prompts, [n], and both ends of its 95 % interval."""
    p = wins.mean().item()
    v = 1.96**2 / len(wins)
    half = (v * p * (1 - p) + v**2 / 4) ** 0.5
    return p, (p + v / 2 - half) / (1 + v), (p + v / 2 + half) / (1 + v)


@dataclass
class Args:
    policies: tyro.conf.Positional[tuple[str, ...]] = ()  # run or model folders, hub ids, or tiny
    reference: str = ""  # reference policy (empty: that of the first run, else the last policy)
    show: int = 0  # number of prompts to print with all responses
    # Judge
    judge_model: str = ""  # name of the judge on its server (empty: no judge)
    judge_url: str = ""  # OpenAI-compatible server (empty: OpenAI); key from OPENAI_API_KEY
    judge_replies: str = "runs/judge.jsonl"  # file that caches its replies
    # Rewards
    reward_model: str = ""  # hub id or folder (empty: that of the first run, or tiny's)
    reward_fn: str = ""  # FILE.py:FUNCTION that scores prompts and responses, instead of a model
    gold_fn: str = ""  # FILE.py:FUNCTION, the true reward if known; logged, never trained on
    # Prompts and sampling, as in the first run
    seed: int = 1  # random seed
    dataset: str = ""  # tiny, hh, tldr, a hub id, a file or a folder
    eval_prompts: int = 256  # held-out prompts to evaluate on
    max_prompt_tokens: int = 512  # longer prompts are dropped
    max_response_tokens: int = 128  # longer responses are cut
    temperature: float = 1.0  # divides the policy's logits, in sampling and in logprobs
    # Speed
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matmuls (auto: bfloat16 on a GPU)
    micro_batch_size: int = 16  # prompts per forward pass
    sample_batch_size: int = 256  # prompts per sampling batch


SCRIPT = Path(__file__).stem
TINY = Path(__file__).parent / "tiny"
DATASETS = {
    "tiny": str(TINY / "data"),
    "hh": "Anthropic/hh-rlhf",
    "tldr": "trl-lib/tldr-preference",
}
MAY_BE_ZERO = ("seed", "show")
OF_THE_RUN = (  # settings taken from the first run: nothing that names a Python file
    "seed dataset eval_prompts max_prompt_tokens max_response_tokens temperature"
).split()
QUESTION = """\
Two assistants were given the text below. Which of them wrote the better continuation? Judge what \
a reader would find more helpful, correct and to the point; the order in which they are shown \
means nothing.

[Text]
{}

[Continuation A]
{}

[Continuation B]
{}

Reply with one word: A, B or tie."""


class UserError(Exception):
    """A mistake in the arguments or the data, reported in one sentence without a traceback."""


# ----------------------------------------------------------------------------- policies and runs
def first_run(policies):
    """The args.json of the first policy that is a run with a reward; {} if there is none."""
    for name in policies:
        file = Path(name) / "args.json"
        record = json.loads(file.read_text()) if file.is_file() else {}
        if "reward" in record:
            return record
    return {}


def with_defaults(args):
    """Args with the settings and the models of the first run among the policies as defaults."""
    record = first_run(args.policies)
    for name in OF_THE_RUN:
        setattr(args, name, record.get(name, getattr(args, name)))
    if not record and "tiny" in args.policies:
        args.dataset = "tiny"
    args.reference = record.get("policy", "")
    if not record.get("reward_fn"):
        args.reward_model = record.get("reward", "")
    elif not args.reward_fn:
        print(f"The first run used {record['reward_fn']}: to use it here, pass --reward-fn.")
    return args


def find_policy(name):
    """Where to load a policy that was named on the command line from: a folder or a hub id."""
    if name == "tiny":
        return str(TINY / "sft")
    if not (Path(name) / "args.json").is_file():
        return name
    if not (Path(name) / "model").is_dir():
        raise UserError(f"{name} has no model yet: a run saves it when it ends")
    return f"{name}/model"


# ------------------------------------------------------------------------------ models and data
def check_numbers(args):
    """Raises UserError for a negative number, or a zero where it makes no sense."""
    for name, value in vars(args).items():
        lowest = 0 if name in MAY_BE_ZERO else 1e-9  # anything positive
        if type(value) in (int, float) and not value >= lowest:
            raise UserError(
                f"--{name.replace('_', '-')} {value} must be {'above' if lowest else 'at least'} 0"
            )


def load_model(auto_class, name, device, args, trainable=False):
    """A model from a folder or the hub. Raises UserError if it cannot be used here."""
    try:
        model, info = auto_class.from_pretrained(
            name, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except Exception as error:  # the libraries raise many kinds
        raise UserError(f"cannot load {name}, a folder or a hub id: {error}") from error
    if info["missing_keys"]:
        raise UserError(
            f"{name} is not a complete {auto_class.__name__}: no {sorted(info['missing_keys'])}"
        )
    # response_hidden and head_logits must give the model's own logits. They would not for scaled
    # logits, or if the second of two equal responses (any tokens) could see the first.
    head = model.get_output_embeddings()
    x = torch.arange(3)
    with torch.no_grad():
        _, hidden = response_hidden(model, [x[:1]], [[x[1:], x[1:]]])
        if head and not head(hidden).allclose(model(x[None]).logits, atol=1e-3):
            raise UserError(f"{name} is not supported: scaled logits, ALiBi or recurrence")
    set_up_model(model, args, trainable)
    return model.to(device)


def set_up_model(model, args, trainable):
    """Turn dropout off, choose the weights to train, and round the others to --dtype."""
    model.eval().requires_grad_(trainable)
    # The first ModuleList holds the transformer's layers.
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    if trainable and args.unfrozen_layers:
        model.base_model.requires_grad_(False)
        layers[-args.unfrozen_layers :].requires_grad_(True)
    if trainable and args.gradient_checkpointing:  # transformers' own is off in evaluation mode
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if args.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")  # the head stays in float32, with TF32 products
        # cuDNN's attention plans every new shape anew, and may give NaN with a mask.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Frozen weights are rounded as autocast rounds the trained ones.
        for module in model.base_model.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(torch.bfloat16)


def load_tokenizer(name, model):
    """The tokenizer of a policy, and the ids that end its responses."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None or not tokenizer("a").input_ids:
        raise UserError(f"{name} has no tokenizer, or one without an end-of-sequence token")
    ends = getattr(model, "generation_config", model.config).eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return tokenizer, sorted({tokenizer.eos_token_id, *ends} - {None})


def load_splits(args):
    """Held-out and training rows of a dataset; a tenth is held out if train is the only split."""
    path = DATASETS.get(args.dataset, args.dataset)
    try:
        file = Path(path).absolute()  # load_dataset cannot read a file in "."
        if file.is_file():
            splits = datasets.load_dataset(str(file.parent), data_files=file.name)
        else:
            splits = datasets.load_dataset(path)
        if list(splits) == ["train"]:
            splits = splits["train"].train_test_split(test_size=0.1, seed=0)
    except (datasets.exceptions.DatasetsError, ValueError, StopIteration) as error:
        raise UserError(f"--dataset {path}: {error.__cause__ or error!r}") from error
    test = {"test", "validation", "valid"} & set(splits)
    if "train" not in splits or not test:
        raise UserError(
            f"--dataset {path} has splits {list(splits)}, not train and test: run prepare_data.py"
        )
    return splits[min(test)], splits["train"]  # test comes before valid and validation


def encode_prompts(tokenizer, texts):
    """Token ids of prompts, 1-D tensors, without the EOS that some tokenizers add to every text."""
    adds_end = tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    ids = tokenizer(texts).input_ids if texts else []
    return [torch.tensor(row[:-1] if adds_end else row) for row in ids]


def load_prompts(tokenizer, longest, args):
    """Held-out and training prompts of at most `longest` tokens, each once.

    They are read from the column prompt or, as in HH, from chosen without its last answer.
    Raises UserError for data in another form.
    """
    prompts, held_out = [], {}
    for name, split in zip(("held-out", "training"), load_splits(args)):
        column = "prompt" if "prompt" in split.column_names else "chosen"
        texts = split[column] if column in split.column_names else [None]  # fails the check below
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"--dataset {args.dataset} has no text in prompt or chosen: run prepare_data.py"
            )
        if column == "chosen":
            texts = ["".join(text.rpartition("\n\nAssistant:")[:2]) for text in texts]
        unique = dict.fromkeys(texts)
        texts = [text for text in unique if text and text not in held_out]
        if args.dataset == "tldr":  # the rest are news articles
            texts = [text for text in texts if text.startswith("SUBREDDIT")]
        held_out = unique
        ids = encode_prompts(tokenizer, texts)
        kept = [row for row in ids if 0 < len(row) <= longest]
        PartialState().print(
            f"{name:13} {len(kept)} prompts. Dropped from {len(split)} rows: "
            f"{len(split) - len(unique)} duplicate prompts, "
            f"{len(unique) - len(texts)} empty, held out or (tldr) news articles, "
            f"{len(ids) - len(kept)} longer than {longest} tokens"
        )
        if not kept:
            raise UserError(
                f"--dataset {args.dataset} has no {name} prompts of up to {longest} tokens"
            )
        prompts.append(kept)
    return prompts


def load_function(spec):
    """The function that "FILE.py:FUNCTION" names."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{spec}: expected FILE.py:FUNCTION, found no file {path!r}")
    sys.path.insert(0, str(Path(path).parent))  # for what it imports
    functions = runpy.run_path(path)
    if name not in functions:
        raise UserError(f"{spec}: {path} has no function {name!r}")
    return functions[name]


def decode_texts(tokenizer, prompts, responses):
    """The texts of the B·K responses and of their prompts, without special tokens."""
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    rows = []
    for prompt, group in zip(prompts, responses):
        text = decode(prompt)
        for response in group:
            # Decoded alone, a response would lose its leading space with some tokenizers.
            whole = decode(torch.cat([prompt, response]))
            rows.append({"prompt": text, "response": whole[len(text) :]})
    return rows


@torch.autocast("cuda", enabled=False)  # a user's model keeps its precision
def text_rewards(function, tokenizer, prompts, responses):
    """Rewards [B, K] by a user's function of texts. Raises UserError unless each is one number."""
    rows = decode_texts(tokenizer, prompts, responses)
    rewards = function([row["prompt"] for row in rows], [row["response"] for row in rows])
    rewards = torch.as_tensor(rewards).float()
    if rewards.shape != (len(rows),) or not rewards.isfinite().all():
        raise UserError(
            f"{len(rows)} responses, scores {[*rewards.shape]}, {rewards.isfinite().sum()} finite"
        )
    return rewards.view(len(prompts), -1)


def load_rewards(reward_name, tokenizer, device, args):
    """{"reward": f, "gold": f}: functions f(prompts, responses) -> [B, K]; gold where it is known.

    Raises UserError for a reward model with other tokens or more than one output.
    """
    functions = {}
    if args.reward_fn:
        functions["reward"] = partial(text_rewards, load_function(args.reward_fn), tokenizer)
    elif reward_name:
        model = load_model(AutoModelForSequenceClassification, reward_name, device, args)
        vocabulary = AutoTokenizer.from_pretrained(reward_name).get_vocab()
        if model.config.num_labels != 1 or not tokenizer.get_vocab().items() <= vocabulary.items():
            raise UserError(
                f"{reward_name} must have one output (it has {model.config.num_labels}) and the "
                "policy's tokenizer; use docs/examples/classifier.py for another tokenizer"
            )
        score = partial(response_scores, model)
        functions["reward"] = partial(in_batches, score, batch_size=args.micro_batch_size)
    gold_fn = args.gold_fn or (f"{TINY}/gold.py:gold_reward" if args.dataset == "tiny" else "")
    if gold_fn:
        functions["gold"] = partial(text_rewards, load_function(gold_fn), tokenizer)
    return functions


# ------------------------------------------------------------------------ sampling and measuring
def head_logits(model, hidden, temperature):
    """Logits [..., V] of hidden states [..., D], in float32 even under autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = model.get_output_embeddings()(hidden.float())
        return logits / temperature if temperature != 1 else logits


def sample_responses(model, prompts, noise, temperature, end_ids):
    """Sample K responses to each of B prompts from the full distribution (no top-k or top-p).

    This replaces `generate`: it reads a prompt once for its K responses, drops finished responses
    from the batch, and records their log-probabilities, which are needed anyway.

    noise: [B, K, T] uniform numbers; a response depends on its own T, not on the rest of the batch
    Returns B tuples: the K responses, up to and including an end token, and their logprobs [K, T].
    """
    device = model.device
    B, K, T = noise.shape
    noise = noise.reshape(B * K, T).to(device)
    ends = torch.tensor(end_ids, device=device)
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    mask = pad([torch.ones_like(prompt) for prompt in prompts]).to(device)
    cache = DynamicCache(config=model.config)
    # Under autocast, keys come in float32 and values in bfloat16: cache both in bfloat16.
    cache.update = lambda k, v, layer: DynamicCache.update(cache, k.type_as(v), v, layer)

    def next_logits(input_ids, mask):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = model.base_model(
            input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache
        )
        return head_logits(model, output.last_hidden_state[:, -1], temperature)

    logits = next_logits(pad(prompts).to(device), mask).repeat_interleave(K, 0)  # [B·K, V]
    mask = mask.repeat_interleave(K, 0)
    cache.batch_repeat_interleave(K)

    tokens = torch.full((B * K, T), -1, device=device)
    logprobs = torch.zeros(B * K, T, device=device)
    rows = torch.arange(B * K, device=device)  # of the responses that have not ended
    for t in range(T):
        probs = logits.softmax(-1)  # [rows, V]
        # Inverse transform sampling, in float64 so that rare tokens keep their probability.
        cdf = probs.double().cumsum(-1)
        token = torch.searchsorted(cdf, noise[rows, t, None] * cdf[:, -1:])  # [rows, 1]
        tokens[rows, t] = token[:, 0]
        logprobs[rows, t] = probs.gather(1, token)[:, 0].log()
        active = (~torch.isin(token[:, 0], ends)).nonzero()[:, 0]
        if len(active) < len(rows):
            rows, token, mask = rows[active], token[active], mask[active]
            cache.batch_select_indices(active)
        if len(rows) == 0 or t == T - 1:
            break
        mask = F.pad(mask, (0, 1), value=1)
        logits = next_logits(token, mask)
    responses = [[y[y >= 0] for y in group] for group in tokens.view(B, K, T).cpu()]
    return list(zip(responses, logprobs.view(B, K, T)))


def response_hidden(model, prompts, responses):
    """Last hidden states of responses: B·K tensors [T + 1, D].

    State t predicts token t of the response; the last state is that of its last token. The K
    responses to a prompt share one row, so that the prompt is read once. The prompt's last token z
    predicts the first token of a response, so each response starts with a copy of z. A response
    sees the prompt and itself, and its positions continue those of the prompt:

        row        x x z a a z b b
        segment    0 0 1 1 1 2 2 2
        position   0 1 2 3 4 2 3 4
    """
    rows, segments, positions, sizes = [], [], [], []
    for x, group in zip(prompts, responses):
        parts = [x[:-1]] + [torch.cat([x[-1:], y]) for y in group]
        size = [len(part) for part in parts]
        position = torch.cat([torch.arange(n) for n in size])
        position[size[0] :] += size[0]
        rows.append(torch.cat(parts))
        segments.append(torch.repeat_interleave(torch.tensor(size)))
        positions.append(position)
        sizes.append(size)
    pad = partial(pad_sequence, batch_first=True)
    segment = pad(segments).to(model.device)  # [B, row length]
    # A query sees earlier keys of the prompt (segment 0) and of its own response. Padding is last,
    # so only padding sees it.
    mask = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])
    output = model.base_model(
        pad(rows).to(model.device),
        attention_mask=mask.tril()[:, None],  # [B, 1, query, key]
        position_ids=pad(positions).to(model.device),
        use_cache=False,
    )
    hidden = []
    for states, size in zip(output.last_hidden_state, sizes):
        hidden += states[: sum(size)].split(size)[1:]
    return hidden


def response_kl(policy, reference, prompts, responses, temperature):
    """KL(π_θ ‖ π_ref) over the whole vocabulary, summed over the tokens of a response: [B, K]."""
    kls = []
    hidden = response_hidden(policy, prompts, responses)
    ref_hidden = response_hidden(reference, prompts, responses)
    for states, ref_states in zip(hidden, ref_hidden):
        logp = head_logits(policy, states[:-1], temperature).log_softmax(-1)  # [T, V]
        ref_logp = head_logits(reference, ref_states[:-1], temperature).log_softmax(-1)
        kls.append(F.kl_div(ref_logp, logp, reduction="sum", log_target=True))
    return torch.stack(kls).double().view(len(prompts), -1)


def response_scores(reward_model, prompts, responses):
    """Reward model scores at the last token of each response: [B, K] float32."""
    hidden = response_hidden(reward_model, prompts, responses)
    last = torch.stack([states[-1] for states in hidden]).float()  # [B·K, D]
    with torch.autocast(last.device.type, enabled=False):
        return reward_model.score(last).view(len(prompts), -1)


def in_batches(function, *columns, batch_size):
    """Apply a function to slices of rows, and join the results: a list, or one stacked tensor."""
    results = []
    for start in range(0, len(columns[0]), batch_size):
        results += function(*(column[start : start + batch_size] for column in columns))
    return torch.stack(results) if torch.is_tensor(results[0]) else results


def lengths_and_ends(responses, end_ids, device):
    """Lengths of responses in tokens, and whether they end with an end token: [2, B, K] float64."""
    lengths = [[len(y) for y in group] for group in responses]
    ended = [[y[-1] in end_ids for y in group] for group in responses]
    return torch.tensor([lengths, ended]).to(device).double()


def seeded(*purpose):
    """A generator seeded by its purpose, so that no random state has to be saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(purpose).encode()))


def answer_prompts(policy, reference, prompts, end_ids, reward_fns, args):
    """Answer the prompts. Returns the responses, B lists of one, and {measure: [B] float64}."""
    noise = torch.rand(
        (len(prompts), 1, args.max_response_tokens),
        dtype=torch.float64,
        generator=seeded(args.seed, "eval"),  # as in the training scripts' evaluations
    )
    sampler = partial(sample_responses, policy, temperature=args.temperature, end_ids=end_ids)
    responses, _ = zip(*in_batches(sampler, prompts, noise, batch_size=args.sample_batch_size))
    values = {name: function(prompts, responses) for name, function in reward_fns.items()}
    kl = partial(response_kl, policy, reference, temperature=args.temperature)
    values["kl"] = in_batches(kl, prompts, responses, batch_size=args.micro_batch_size)
    values["length"], values["eos_rate"] = lengths_and_ends(responses, end_ids, policy.device)
    return responses, {name: value[:, 0].double().cpu() for name, value in values.items()}


# ----------------------------------------------------------------------------------------- judge
def read_verdict(reply):
    """What the last line of a judge's reply names: A, B or tie; unclear if not one of them."""
    named = set(re.findall(r"\b(?:A|B|tie)\b", reply.strip().rpartition("\n")[2]))
    return named.pop() if len(named) == 1 else "unclear"


def ask_judge(questions, args):
    """{question: reply}: those in the file of replies already, and the rest from the server."""
    import openai  # optional

    file = Path(args.judge_replies)
    judge = [args.judge_url, args.judge_model]
    replies = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        row = json.loads(line)
        if row["judge"] == judge:
            replies[row["question"]] = row["reply"]
    client = openai.OpenAI(
        base_url=args.judge_url or None,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),  # local servers need none
    )

    def ask(question):
        # At the judge's own temperature and length limit: some accept no other.
        answer = client.chat.completions.create(
            model=args.judge_model, messages=[{"role": "user", "content": question}]
        )
        return answer.choices[0].message.content or ""

    new = [question for question in dict.fromkeys(questions) if question not in replies]
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", buffering=1) as stream, ThreadPoolExecutor(8) as pool:
        try:
            for question, reply in zip(new, tqdm(pool.map(ask, new), "judge", len(new))):
                replies[question] = reply
                row = {"judge": judge, "question": question, "reply": reply}
                stream.write(json.dumps(row) + "\n")
        except openai.OpenAIError as error:
            raise UserError(f"judge {args.judge_model}: {error}; its replies are kept") from error
    return replies


def judge_wins(prompts, texts, args):
    """{(i, j): wins [B] of policy i over j}, means over both orders of asking.

    prompts: B texts; texts: each policy's B answers. The same answer ties, without a question.
    """
    pairs = list(permutations(range(len(texts)), 2))
    questions = {}
    for i, j in pairs:
        for b, prompt in enumerate(prompts):
            if texts[i][b] != texts[j][b]:
                questions[i, j, b] = QUESTION.format(prompt, texts[i][b], texts[j][b])
    replies = ask_judge(questions.values(), args)
    wins = {pair: torch.full((len(prompts),), 0.5) for pair in pairs}
    verdicts = Counter()
    for (i, j, b), question in questions.items():
        verdict = read_verdict(replies[question])
        verdicts[verdict] += 1
        gain = {"A": 0.25, "B": -0.25}.get(verdict, 0)  # each of the two orders moves ½ by ¼
        wins[i, j][b] += gain
        wins[j, i][b] -= gain
    print(f"\nVerdicts of the judge, in both orders: {dict(verdicts)}")
    return wins


# ---------------------------------------------------------------------------------------- output
def print_means(values, names):
    """Print the means and standard errors of all measures; values: each policy's {measure: [B]}."""
    rows = []
    for measures in values:
        row = {}
        for key, value in measures.items():
            se = value.std(correction=0) / len(value) ** 0.5
            row[key] = f"{value.mean():.3f} ± {se:.3f}"
        rows.append(row)
    print(pd.DataFrame(rows, names).to_string())


def print_win_rates(wins, names):
    """Print a matrix of win rates; wins: {(i, j): wins [B] of policy i over policy j}."""
    table = pd.DataFrame("", names, range(1, len(names) + 1))
    for pair, win in wins.items():
        table.iloc[pair] = "{:.3f} [{:.3f}, {:.3f}]".format(*win_rate(win))
    print(table.to_string())


def print_answers(prompts, texts, values, args):
    """Print some prompts with the responses of all policies and their measures."""
    step = max(1, len(prompts) // args.show)
    for b in range(0, len(prompts), step)[: args.show]:
        print(f"\nPrompt {b + 1}\n{textwrap.indent(prompts[b], '    ')}")
        for name, answers, measures in zip(args.policies, texts, values):
            numbers = [f"{key} {value[b]:.3g}" for key, value in measures.items()]
            print(f"\n{name}: {', '.join(numbers)}\n{textwrap.indent(answers[b], '    ')}")


# ------------------------------------------------------------------------------------------ main
def main(args):
    check_numbers(args)
    if not args.policies or not args.dataset:
        raise UserError(
            f"policies {list(args.policies)}: pass some, and --dataset if none is a run or tiny"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.dtype == "auto":
        args.dtype = "float32" if device.type == "cpu" else "bfloat16"
    paths = [find_policy(name) for name in args.policies]
    reference_path = find_policy(args.reference or args.policies[-1])
    if args.dataset == "tiny" and not args.reward_model:
        args.reward_model = str(TINY / "reward_model")

    print(
        f"reference     {reference_path}\n"
        f"reward        {args.reward_fn or args.reward_model or 'none'}\n"
        f"dataset       {args.dataset}"
    )
    reference = load_model(AutoModelForCausalLM, reference_path, device, args)
    tokenizer, _ = load_tokenizer(reference_path, reference)
    reward_fns = load_rewards(args.reward_model, tokenizer, device, args)
    longest = min(
        args.max_prompt_tokens,
        getattr(reference.config, "max_position_embeddings", sys.maxsize)
        - args.max_response_tokens,
    )
    prompts, _ = load_prompts(tokenizer, longest, args)
    prompts = sorted(prompts[: args.eval_prompts], key=len)  # as the training scripts do
    texts, values = [], []
    for path in paths:
        policy = load_model(AutoModelForCausalLM, path, device, args)
        own_tokenizer, end_ids = load_tokenizer(path, policy)
        if own_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{path} and the reference {reference_path} differ in vocabulary")
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.dtype == "bfloat16"):
            responses, measures = answer_prompts(
                policy, reference, prompts, end_ids, reward_fns, args
            )
        rows = decode_texts(tokenizer, prompts, responses)
        texts.append([row["response"].strip() for row in rows])
        values.append(measures)
    prompt_texts = [row["prompt"].strip() for row in rows]

    # Who wins
    names = [f"{i} {name}" for i, name in enumerate(args.policies, 1)]
    print(f"\nMeans over {len(prompts)} prompts ± standard errors")
    print_means(values, names)
    wins = defaultdict(dict)
    for i, j in permutations(range(len(paths)), 2):
        differ = torch.tensor([a != b for a, b in zip(texts[i], texts[j])])
        for key in reward_fns:
            difference = (values[i][key] - values[j][key]) * differ
            wins[key][i, j] = difference.sign() / 2 + 0.5
    if args.judge_model:
        wins["judge"] = judge_wins(prompt_texts, texts, args)
    for key in wins:
        print(f"\nWin rates by {key}, row over column, with 95 % intervals")
        print_win_rates(wins[key], names)
    if args.show:
        print_answers(prompt_texts, texts, values, args)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    parse = partial(tyro.cli, Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        main(parse(default=with_defaults(parse())))
    except (UserError, OSError, ImportError) as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        sys.exit(2)
