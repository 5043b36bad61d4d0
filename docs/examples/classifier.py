r"""A reward model with its own tokenizer, like most on the hub, for --reward-fn.

    python p3o_v2.py --model pythia-1b --dataset hh --reward-fn docs/examples/classifier.py:score

Change NAME in a copy for another model. Any sequence classifier with one output will do. What it
reads depends on what it is:
* with a chat template: the turns of the dialogue where the prompt has HH's form ("\n\nHuman: …"),
  else prompt and response as one turn each.
* an encoder: prompt and response as a pair, as in tokenizer(x, y).
* another decoder: prompt and response as one text, with nothing after it. Its card says whether
  that is what it was made for.
A prompt that prepare_data.py wrote with the policy's chat template arrives without its special
tokens. `as_read` stops there: change it to split such a prompt into turns.

It reads one row at a time, so that neither other rows nor padding change a score. With several
processes each reads the responses to its own prompts.
"""

import re
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

NAME = "Ray2333/gpt2-large-helpful-reward_model"
tokenizer = AutoTokenizer.from_pretrained(NAME, truncation_side="left")
model = AutoModelForSequenceClassification.from_pretrained(NAME, dtype=torch.float32)
if torch.cuda.is_available():
    model.to("cuda")  # the device of this process
if model.config.num_labels != 1:
    sys.exit(f"{NAME} has {model.config.num_labels} outputs, expected one, the score")
# Without padding a decoder is read at its last token, whatever that is.
model.config.pad_token_id = None
LONGEST = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2**30))
SPECIAL = {"add_special_tokens": not tokenizer.chat_template}  # a template writes its own
read = pipeline(
    "text-classification",
    model,
    tokenizer=tokenizer,
    device=model.device,
    function_to_apply="none",
    truncation=True,
    max_length=LONGEST,
    **SPECIAL,
)


def as_read(prompt, response):
    """A row in the form that the model reads."""
    if re.match(r"\s*(system|user)\n", prompt):
        sys.exit(
            f"{__file__}: prompts are in the policy's chat template; change as_read to split them "
            f"into turns: {prompt[:60]!r}"
        )
    if tokenizer.chat_template:
        turns = ["Human", prompt, "Assistant", response]
        if prompt.startswith("\n\nHuman:"):
            turns = re.split(r"\n\n(Human|Assistant):", prompt + response)[1:]
        chat = []
        for who, said in zip(turns[::2], turns[1::2]):
            role = "user" if who == "Human" else "assistant"
            chat.append({"role": role, "content": said.strip()})
        return {"text": tokenizer.apply_chat_template(chat, tokenize=False)}
    if hasattr(model, "score"):  # a decoder
        return {"text": prompt + response}
    return {"text": prompt, "text_pair": response}


def score(prompts, responses):
    """The model's score of each response."""
    rows = [as_read(*row) for row in zip(prompts, responses)]
    cut = sum(len(tokenizer(**row, **SPECIAL).input_ids) > LONGEST for row in rows)
    if cut:
        print(
            f"{cut} of {len(rows)} texts cut on the left to the {LONGEST} tokens that {NAME} reads"
        )
    return [found["score"] for found in read(rows)]
