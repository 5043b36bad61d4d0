r"""A reward model that has other tokens than the policy, as most on the hub, for --reward-fn: it reads text.

    python p3o_v2.py --model pythia-1b --dataset hh --reward-fn docs/examples/classifier.py:score

For another model change NAME in a copy: a run records the file that its reward is from, and no more. It can be any
sequence classifier with one output, and gets, by what it is,
* with a chat template: the turns of the dialogue where the prompt has HH's form ("\n\nHuman: …"), else one each. A
  prompt of messages arrives as the policy's template wrote it, without special tokens: as_read is the place to undo it,
  and refuses what looks so;
* an encoder: prompt and response as a pair, as in tokenizer(x, y);
* a decoder: prompt and response as one text, and nothing after it. Its card says whether that is what it was made for.

One row at a time, so that no other row and no padding changes a score; with several processes, by the first alone.
"""

import os
import re

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

NAME = "Ray2333/gpt2-large-helpful-reward_model"
tokenizer = AutoTokenizer.from_pretrained(NAME, truncation_side="left")
model = AutoModelForSequenceClassification.from_pretrained(NAME, dtype=torch.float32)
if torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
    model.to("cuda")
if model.config.num_labels != 1:
    raise ValueError(f"{NAME} has {model.config.num_labels} outputs, expected 1, a score")
model.config.pad_token_id = (
    None  # of a row alone it is the last token that a decoder is read at, whatever it is
)
LONGEST = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2**30))
OPTIONS = {
    "add_special_tokens": not tokenizer.chat_template,
    "truncation": True,
    "max_length": LONGEST,
}
read = pipeline(
    "text-classification", model, tokenizer=tokenizer, function_to_apply="none", **OPTIONS
)


def as_read(prompt, response):
    if tokenizer.chat_template:
        if re.match(r"\s*(system|user)\n", prompt):
            raise ValueError(
                "the prompt is a dialogue as the policy's template wrote it: let as_read take it apart"
            )
        turns = ["Human", prompt, "Assistant", response]
        if prompt.startswith("\n\nHuman:"):
            turns = re.split(r"\n\n(Human|Assistant):", prompt + response)[1:]
        roles = ["user" if who == "Human" else "assistant" for who in turns[::2]]
        chat = [{"role": role, "content": said.strip()} for role, said in zip(roles, turns[1::2])]
        return {"text": tokenizer.apply_chat_template(chat, tokenize=False)}
    if hasattr(model, "score"):  # a decoder
        return {"text": prompt + response}
    return {"text": prompt, "text_pair": response}


def score(prompts, responses):
    rows = [as_read(*row) for row in zip(prompts, responses)]
    special = {"add_special_tokens": OPTIONS["add_special_tokens"]}
    cut = sum(len(tokenizer(**row, **special).input_ids) > LONGEST for row in rows)
    if cut:
        print(
            f"{cut} of {len(rows)} texts cut on the left to the {LONGEST} tokens that {NAME} reads"
        )
    return [found["score"] for found in read(rows)]
