r"""Convert a dataset in any common format to the JSON Lines that the training scripts read.

    python prepare_data.py --dataset HuggingFaceH4/ultrafeedback_binarized \
        --split train_prefs,test_prefs --tokenizer Qwen/Qwen2.5-0.5B-Instruct --output-dir data/uf
    python prepare_data.py --dataset my.csv --map prompt=question chosen=best rejected=worst \
        --output-dir data/mine
    python sft.py --model ... --dataset data/mine       # or any other training script

It reads a hub id, a folder, a .jsonl, .json, .csv (each also .gz) or .parquet file, or a saved
dataset, and writes train.jsonl, test.jsonl and info.json. The columns may be

    prompt, chosen, rejected     preferences; without prompt, chosen and rejected are dialogues
    prompt, completion           demonstrations
    messages or conversations    dialogues; the last message becomes the completion
    prompt                       prompts alone
    system, tools                beside any of these: a system message, the tools of a dialogue

Each is a text, or messages {"role", "content"} or {"from", "value"}. If any row has messages or a
system prompt, the chat template of --tokenizer renders every row: the prompt ends with the
template's generation prompt, and a response is what follows it. Otherwise texts stay as they are.
With --tokenizer, the BOS that it adds itself and a final EOS are removed: the training scripts add
both.

Rows that cannot be used are dropped and counted by reason. Prompts of the test split are removed
from the train split. Without a test split, the hash of a prompt decides whether it is held out, so
a prompt is held out of every dataset that has it.
"""

import csv
import gzip
import hashlib
import json
import logging
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import huggingface_hub
import tyro
from transformers import AutoTokenizer

SHORT_NAMES = {"hh": "Anthropic/hh-rlhf", "tldr": "trl-lib/tldr-preference"}
COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "system", "tools")
OUTPUTS = ("train.jsonl", "test.jsonl", "info.json")
TEST_NAMES = ("test", "validation", "valid", "val", "eval", "dev")
HH_ANSWER = "\n\nAssistant:"
TEXT_FILE = re.compile(r"\.(jsonl?|csv)(\.gz)?$")
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass
class Args:
    dataset: str  # hub id, folder or file; hh is Anthropic/hh-rlhf, tldr is trl-lib/tldr-preference
    output_dir: str  # folder for train.jsonl, test.jsonl and info.json
    subset: str = ""  # configuration of a hub dataset
    split: str = ""  # TRAIN or TRAIN,TEST (empty: guessed); with TRAIN alone, a share is held out
    map: tuple[str, ...] = ()  # rename columns: prompt=question chosen=best ...
    tokenizer: str = ""  # hub id or folder; needed for messages, and for lengths in tokens
    chat_template: str = ""  # file with a template for messages (empty: the tokenizer's)
    held_out: float = 0.1  # share of the prompts to hold out if the dataset has no test split
    strict: bool = False  # stop at the first row that cannot be used instead of dropping it
    overwrite: bool = False  # replace the three files in the output folder
    max_prompt_tokens: int = 512  # of the training run; the table says how many are longer
    max_response_tokens: int = 128  # of the training run; the table says how many are longer


class UserError(Exception):
    """A mistake in the arguments or the data, reported in one sentence without a traceback."""


class DropError(Exception):
    """A row that cannot be used; the message is the reason under which it is counted."""


# ------------------------------------------------------------------------------------- reading
def first_line(error):
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def open_tokenizer(args):
    """The tokenizer with its chat template, and the BOS text that it puts before a prompt itself.

    Returns (None, "") without --tokenizer. Raises UserError, or OSError for the template's file.
    """
    if not args.tokenizer:
        if args.chat_template:
            raise UserError(f"--chat-template {args.chat_template}: also pass --tokenizer")
        return None, ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except Exception as error:
        raise UserError(f"--tokenizer {args.tokenizer}: {first_line(error)}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"--tokenizer {args.tokenizer}: it has no end-of-sequence token")
    if args.chat_template:
        try:
            tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(f"--chat-template {args.chat_template}: {first_line(error)}") from error
    bos = ""
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        bos = tokenizer.bos_token
    return tokenizer, bos


def open_dataset(args):
    """Returns {split: Dataset, or list of paths or URLs of JSON and CSV files}.

    Raises UserError.
    """
    source = SHORT_NAMES.get(args.dataset, args.dataset)
    path = Path(source)
    is_text = TEXT_FILE.search(source)
    if path.is_file() and is_text:
        return {"train": [source]}
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"--dataset {source}: expected .jsonl, .json, .csv (or .gz) or .parquet")
    if not path.exists() and (is_text or path.suffix == ".parquet"):
        raise UserError(f"--dataset {source}: no such file")
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    try:
        if path.is_file():
            splits = datasets.Dataset.from_parquet(source)
        elif saved:
            splits = datasets.load_from_disk(source)
        else:
            builder = datasets.load_dataset_builder(source, args.subset or None)
            splits = builder.config.data_files or {}
            files = [file for name in splits for file in splits[name]]
            # read_rows parses text files: the library would make dates, numbers or nulls of some.
            if not files or not all(TEXT_FILE.search(file) for file in files):
                splits = datasets.load_dataset(source, args.subset or None)
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__
        raise UserError(f"--dataset {args.dataset}: {first_line(error)}") from error
    if isinstance(splits, datasets.Dataset):
        return {"train": splits}
    return {str(name): splits[name] for name in splits}


def find_split(names, words):
    """The names that may be meant: the first word that is a name, else all that begin with one."""
    for word in words:
        if word in names:
            return [word]
    return [name for name in names if name.startswith(words)]


def choose_splits(names, args):
    """Choose the train and test splits: {"train": name} or {"train": name, "test": name}.

    Raises UserError where the names do not decide it.
    """
    there = f"--dataset {args.dataset} has the splits {', '.join(names)}"
    if args.split:
        chosen = args.split.split(",")
        unique = set(chosen)
        if len(chosen) > 2 or len(unique) < len(chosen) or not unique <= set(names):
            raise UserError(f"--split {args.split}: expected TRAIN or TRAIN,TEST; {there}")
        return dict(zip(("train", "test"), chosen))
    if len(names) == 1:
        return {"train": names[0]}
    train = find_split(names, ("train",))
    test = find_split(names, TEST_NAMES)
    if len(train) != 1 or len(test) > 1:
        raise UserError(f"--split TRAIN or --split TRAIN,TEST is needed: {there}")
    return dict(zip(("train", "test"), train + test))


def open_text(path):
    """A text file, plain or compressed by gzip, without its byte order mark."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    opener = gzip.open if is_gzip else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def read_json(path):
    """The objects of a JSON file, one a line or all in one array. Raises ValueError."""
    with open_text(path) as file:
        text = file.read()
    rows = []
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            try:
                if line.strip():
                    rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object with columns")
    return rows


def read_csv(path):
    """The rows of a CSV file, in which every value is a text. Raises csv.Error."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path) as file:
        return list(csv.DictReader(file))


def read_rows(split):
    """The rows of a split as dicts; split: as in open_dataset. Raises UserError."""
    if isinstance(split, datasets.Dataset):
        return list(split)
    rows = []
    for file in split:
        try:
            path = datasets.DownloadManager().download(file)
            is_csv = TEXT_FILE.search(file)[1] == "csv"
            rows += read_csv(path) if is_csv else read_json(path)
        except Exception as error:
            raise UserError(f"--dataset {file}: {first_line(error)}") from error
    return rows


def column_names(tables):
    """The names of all columns of all rows; tables: {"train": rows, ...}."""
    names = {}
    for rows in tables.values():
        for row in rows:
            names.update(dict.fromkeys(row))
    return [str(name) for name in names]


def rename_columns(tables, there, args):
    """The tables with the names in COLUMNS alone; there: the names they have. Raises UserError."""
    names = {column: column for column in COLUMNS}
    if "messages" not in there:
        names["messages"] = "conversations"
    mapped = set()
    for item in args.map:
        column, _, name = item.partition("=")
        if column not in COLUMNS:
            raise UserError(f"--map {item}: expected COLUMN=NAME, COLUMN in {', '.join(COLUMNS)}")
        if name not in there:
            raise UserError(f"--map {item}: no column {name!r}, only {', '.join(there)}")
        names[column] = name
        mapped.add(column)
    # A column named by --map takes precedence over conflicting columns.
    conflicting = ()
    if "completion" in mapped:
        conflicting = ("chosen", "rejected", "messages")
    elif "messages" in mapped:
        conflicting = ("prompt", "chosen", "rejected", "completion")
    elif "prompt" in mapped or "chosen" in mapped:
        conflicting = ("messages",)
    for column in conflicting:
        if column not in mapped:
            del names[column]
    renamed = {}
    for kind, rows in tables.items():
        renamed[kind] = [{c: row.get(name) for c, name in names.items()} for row in rows]
    return renamed


def choose_columns(tables, there):
    """The columns to write, and the tables with these columns, system and tools alone.

    tables: from rename_columns; there: the names before it, for a mistake. Raises UserError.
    """
    filled = set()
    for rows in tables.values():
        for row in rows:
            filled.update(column for column in row if row[column] is not None)
    columns = ["prompt"]
    if "chosen" in filled and "rejected" in filled:
        columns += ["chosen", "rejected"]
    elif "completion" in filled or "messages" in filled:
        columns += ["completion"]
    elif "chosen" in filled:
        raise UserError("--map completion=chosen or rejected=NAME is needed: no column rejected")
    elif "prompt" not in filled:
        wanted = "prompt, chosen and rejected, completion or messages"
        raise UserError(f"--map is needed: no {wanted} among the columns {', '.join(there)}")
    as_dialogue = "completion" in columns and "completion" not in filled
    chosen = {}
    for kind, rows in tables.items():
        chosen[kind] = []
        for row in rows:
            new = {column: row.get(column) for column in columns}
            if as_dialogue:
                new = {"completion": row["messages"]}
            elif "prompt" not in filled:
                del new["prompt"]
            new.update(system=row["system"], tools=row["tools"])
            chosen[kind].append(new)
    return columns, chosen


# ------------------------------------------------------------------------------ rows to texts
def is_messages(value):
    """Whether a value is a message or a list of messages."""
    if isinstance(value, list) and value:
        return all(isinstance(message, dict) for message in value)
    return isinstance(value, dict)


def without_nulls(value):
    """A value without None: Parquet gives every message the keys of all messages."""
    if isinstance(value, dict):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    if isinstance(value, list):
        return [without_nulls(x) for x in value]
    return value


def join_parts(content):
    """The text of a message whose content is a list of parts. Raises DropError for an image."""
    text = ""
    for part in content:
        if isinstance(part, dict):
            part = part.get("text")
        if not isinstance(part, str):
            raise DropError("a message has parts that are not text")
        text += part
    return text


def to_messages(column, value, speaker):
    """The messages of a value: a text of this speaker, a message, or a list of messages.

    Raises DropError.
    """
    if value is None:
        raise DropError(f"{column} is missing")
    if isinstance(value, str):
        value = [{"role": speaker, "content": value}]
    if not is_messages(value):
        raise DropError(f"{column} is {type(value).__name__}, neither text nor messages")
    if isinstance(value, dict):
        value = [value]
    messages = []
    for message in without_nulls(value):
        content = message.pop("value", message.get("content", ""))
        name = message.pop("from", message.get("role"))
        role = ROLES.get(str(name).lower())
        if role is None:
            raise DropError(f"unknown role {name!r} in {column}")
        if isinstance(content, list):
            content = join_parts(content)
        if not isinstance(content, str):
            raise DropError(f"{column} has a message of type {type(content).__name__}")
        messages.append({**message, "role": role, "content": content})
    last = messages[-1]
    if not last["content"].strip() and "tool_calls" not in last:
        raise DropError(f"{column} is empty")
    return messages


def parse_tools(tools):
    """The tools of a dialogue, a list or the JSON of one, as a list or None. Raises DropError."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DropError("tools is text that is not JSON") from error
    return without_nulls(tools) or None


def to_dialogue(column, prompt, value):
    """The dialogue that ends with a response. Raises DropError.

    prompt: messages, none where the response holds them; value: text or messages
    """
    response = to_messages(column, value, "assistant")
    if response[-1]["role"] != "assistant":
        raise DropError(f"{column} does not end with the assistant's answer")
    if response[0]["role"] == "assistant":
        return prompt + response
    said = [message["content"].strip() for message in response[:-1]]
    for message in prompt:
        if message["content"].strip() not in said:
            raise DropError(f"{column} is a whole dialogue that lacks the prompt")
    return response


def render(messages, is_prompt, tools, tokenizer, args):
    """The text of messages, up to where the assistant speaks in a prompt. Raises DropError."""
    options = {"tools": tools, "tokenize": False, "add_generation_prompt": is_prompt}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template may raise anything
        template = args.chat_template or args.tokenizer
        reason = f"the chat template of {template} rejects it: {first_line(error)}"
        raise DropError(reason) from error


def render_row(row, columns, tokenizer, args):
    """The texts of a row of messages, {column: text}. Raises DropError."""
    prompt = []
    if "prompt" in row:
        prompt = to_messages("prompt", row["prompt"], "user")
    dialogues = []
    for column in columns[1:]:
        dialogues.append(to_dialogue(column, prompt, row[column]))
    if dialogues:
        prompt = dialogues[0][:-1]
    elif prompt[-1]["role"] == "assistant":
        raise DropError("prompt ends with an assistant message")
    if any(dialogue[:-1] != prompt for dialogue in dialogues):
        raise DropError("responses have different prompts")
    if not prompt:
        raise DropError("prompt is missing")
    if row["system"] and prompt[0]["role"] != "system":
        prompt = to_messages("system", row["system"], "system") + prompt

    tools = parse_tools(row["tools"])
    start = render(prompt, True, tools, tokenizer, args)
    whole = []
    for dialogue in dialogues:
        whole.append(render(prompt + dialogue[-1:], False, tools, tokenizer, args))
    if not all(text.startswith(start) for text in whole):
        # Some templates open a thinking block for the model but leave it out of an answer in the
        # data. The prompt then ends before the block, so that both are what the template renders.
        start = re.sub(r"<think>\s*(</think>\s*)?$", "", start)
    if not all(text.startswith(start) for text in whole):
        template = args.chat_template or args.tokenizer
        raise DropError(f"the chat template of {template} alters the prompt before a response")
    texts = [start]
    for text in whole:
        texts.append(text[len(start) :])
    return dict(zip(columns, texts))


def split_row(row, columns):
    """The texts of a row of texts, {column: text}. Raises DropError.

    Without a column prompt, it is the first response up to its last "Assistant:", as in HH.
    """
    texts = {}
    for column in columns:
        if column not in row:
            continue
        if row[column] is None:
            raise DropError(f"{column} is missing")
        if not isinstance(row[column], str):
            raise DropError(f"{column} is {type(row[column]).__name__}, neither text nor messages")
        texts[column] = row[column]
    if "prompt" in texts:
        return texts
    dialogue = texts[columns[1]]
    end = dialogue.rfind(HH_ANSWER)
    if end < 0:
        raise DropError("prompt is missing")
    prompt = dialogue[: end + len(HH_ANSWER)]
    for column in columns[1:]:
        if not texts[column].startswith(prompt):
            raise DropError("no common prompt")
        texts[column] = texts[column][len(prompt) :]
    return {"prompt": prompt, **texts}


def finish(texts, tokenizer, bos, is_chat):
    """Texts without BOS, cut at the first EOS of a response; and whether text after it was lost.

    Raises DropError.
    """
    cut = False
    texts = {**texts, "prompt": texts["prompt"].removeprefix(bos)}
    for column, text in texts.items():
        if tokenizer and column != "prompt":
            text, end, rest = text.partition(tokenizer.eos_token)
            cut = cut or rest.replace(tokenizer.eos_token, "").strip() != ""
            if is_chat and not end:
                text = text.rstrip()  # what separates this turn from the next
            texts[column] = text
        if not text.strip():
            raise DropError(f"{column} is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DropError(f"{column} has an unpaired surrogate") from error
    if "chosen" in texts and texts["chosen"] == texts["rejected"]:
        raise DropError("chosen and rejected are equal")
    return texts, cut


# ------------------------------------------------------------------------------------- showing
def encode(column, texts, tokenizer):
    """The ids that the training scripts make of texts: BOS with a prompt, EOS with a response."""
    is_prompt = column == "prompt"
    rows = tokenizer(texts, add_special_tokens=is_prompt).input_ids
    for text, ids in zip(texts, rows):
        ends = ids[-1:] == [tokenizer.eos_token_id]
        if is_prompt and ends and not text.endswith(tokenizer.eos_token):
            ids.pop()
        elif not is_prompt:
            ids.append(tokenizer.eos_token_id)
    return rows


def show_row(row, tokenizer):
    """Print a row token by token, with ids: prompts grey and responses green on a terminal."""
    prompt = []
    for column, text in row.items():
        tokens = [repr(text)[1:-1]]
        if tokenizer:
            tokens = []
            ids = encode(column, [text], tokenizer)[0]
            before = prompt if column != "prompt" else []
            everything = before + ids
            for i in range(len(before), len(everything)):
                # Decoded alone, some tokens lose their space.
                context = tokenizer.decode(everything[max(i - 4, 0) : i])
                token = tokenizer.decode(everything[max(i - 4, 0) : i + 1])[len(context) :]
                tokens.append(f"{repr(token)[1:-1]} {everything[i]}")
            prompt = prompt or ids
        if len(tokens) > 100:
            tokens[60:-30] = [f"... {len(tokens) - 90} more ..."]
        line = f"[{']['.join(tokens)}]"
        if sys.stdout.isatty():
            line = f"\033[{90 if column == 'prompt' else 32}m{line}\033[0m"
        print(f"{column:12}{line}")
    print()


def measure(rows, columns, tokenizer, args):
    """The lengths of each column over all rows, {column: {"5 %": length, ...}}."""
    found = {}
    for column in columns:
        lengths = []
        for i in range(0, len(rows), 1000):
            texts = [row[column] for row in rows[i : i + 1000]]
            if tokenizer:
                texts = encode(column, texts, tokenizer)
            lengths += [len(text) for text in texts]
        lengths.sort()
        found[column] = {}
        for name, share in (("5 %", 0.05), ("median", 0.5), ("95 %", 0.95), ("longest", 1)):
            found[column][name] = lengths[int(share * (len(lengths) - 1))]
        if tokenizer:
            limit = args.max_prompt_tokens if column == "prompt" else args.max_response_tokens
            over = sum(length > limit for length in lengths)
            found[column]["over the limit"] = over / len(lengths)
    return found


def show_lengths(found, args, has_tokens):
    """Print the table of what measure found."""
    names = ("5 %", "median", "95 %", "longest")
    unit = "tokens" if has_tokens else "characters"
    print(f"{unit:12}" + "".join(f"{name:>9}" for name in names))
    for column, sizes in found.items():
        line = f"{column:12}" + "".join(f"{sizes[name]:9,}" for name in names)
        if has_tokens:
            line += f"   {sizes['over the limit']:.1%} "
            if column == "prompt":
                line += f"dropped by --max-prompt-tokens {args.max_prompt_tokens}"
            else:
                line += f"cut by --max-response-tokens {args.max_response_tokens}"
        print(line)


def shorten(row):
    """The values of a row on one line, with the middle of long ones left out."""
    values = []
    for column, value in row.items():
        if value is not None or column not in ("system", "tools"):
            text = repr(value)
            if len(text) > 70:
                text = f"{text[:40]} ... {text[-25:]}"
            values.append(f"{column} {text}")
    return ", ".join(values)


def show_counts(counts, firsts):
    """Print what became of the rows of each split, with the first row of each reason to drop."""
    for kind, numbers in counts.items():
        for name, number in numbers.items():
            if name != "dropped":
                print(f"{kind:12}{number:9,}  {name}")
                continue
            for reason, rows in number.items():
                print(f"{kind:12}{rows:9,}  dropped: {reason}")
                print(f"{'':23}first: {firsts[kind, reason]}")
    print()


# ---------------------------------------------------------------------------------------- main
def check_arguments(args):
    """Raise UserError for a share out of range or an output folder that must not be overwritten."""
    if not 0 < args.held_out < 1:
        raise UserError(f"--held-out {args.held_out}: expected a share between 0 and 1")
    folder = Path(args.output_dir).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {args.output_dir}: it is not a folder")
    source = Path(args.dataset).resolve()
    for name in OUTPUTS:
        file = folder / name
        if source.exists() and (source == file or source in file.parents):
            raise UserError(f"--output-dir {args.output_dir}: {name} would be part of --dataset")
        if file.exists() and not args.overwrite:
            raise UserError(f"--output-dir {args.output_dir}: pass --overwrite to replace {name}")


def refuse_numbers(row, where):
    """Raise UserError for a number where text is expected; --map may have named a score."""
    for column, value in row.items():
        if isinstance(value, (int, float)):
            kind = type(value).__name__
            raise UserError(f"{where}: {column} is {value}, of type {kind}; expected text")


def hold_out(rows, args):
    """Rows in two parts, {"train": rows, "test": rows}, by their prompts. Raises UserError."""
    shares = {}
    for row in rows:
        digest = hashlib.sha256(row["prompt"].encode()).hexdigest()
        shares[row["prompt"]] = int(digest[:8], 16) / 2**32
    if len(shares) < 2:
        raise UserError(
            f"--held-out: --dataset {args.dataset} has {len(shares)} prompt, 2 are needed"
        )
    prompts = sorted(shares, key=shares.get)
    count = sum(share < args.held_out for share in shares.values())
    count = min(max(count, 1), len(prompts) - 1)
    held_out = set(prompts[:count])
    parts = {"train": [], "test": []}
    for row in rows:
        parts["test" if row["prompt"] in held_out else "train"].append(row)
    return parts


def main(args):
    """Read, convert, divide, write and show a dataset. Raises UserError, OSError."""
    # Phase 1: read
    check_arguments(args)
    tokenizer, bos = open_tokenizer(args)
    splits = open_dataset(args)
    names = choose_splits(list(splits), args)
    tables = {kind: read_rows(splits[name]) for kind, name in names.items()}
    for kind, name in names.items():
        if not tables[kind]:
            raise UserError(f"--dataset {args.dataset}: the split {name} has no rows")
    there = column_names(tables)
    columns, tables = choose_columns(rename_columns(tables, there, args), there)
    is_chat = False  # for all rows or none: mixed forms would be learned
    for rows in tables.values():
        for row in rows:
            if row["system"] or any(is_messages(row.get(column)) for column in columns):
                is_chat = True
    if is_chat and not tokenizer:
        raise UserError(f"--tokenizer is needed: --dataset {args.dataset} holds messages")
    if args.chat_template and not is_chat:
        raise UserError(
            f"--chat-template {args.chat_template}: --dataset {args.dataset} holds texts only"
        )
    if is_chat and not tokenizer.chat_template:
        raise UserError(f"--tokenizer {args.tokenizer}: no chat template; pass --chat-template")

    # Phase 2: convert
    source = SHORT_NAMES.get(args.dataset, args.dataset)
    parts = {}
    counts = {}
    firsts = {}
    for kind, rows in tables.items():
        parts[kind] = []
        counts[kind] = {"read": len(rows)}
        dropped = Counter()
        others = Counter()
        for number, row in enumerate(rows, 1):
            where = f"row {number} of {names[kind]}"
            refuse_numbers(row, f"--dataset {args.dataset}: {where}")
            if "tldr-preference" in source and str(row.get("prompt")).startswith("TITLE:"):
                others["left out: CNN/DM article, not a Reddit post"] += 1
                continue
            try:
                if is_chat:
                    texts = render_row(row, columns, tokenizer, args)
                else:
                    texts = split_row(row, columns)
                texts, is_cut = finish(texts, tokenizer, bos, is_chat)
            except DropError as error:
                reason = str(error)
                first = f"{where}: {reason}: {shorten(row)}"
                if args.strict:
                    raise UserError(f"--strict: {first}") from error
                firsts.setdefault((kind, reason), first)
                dropped[reason] += 1
                continue
            if is_cut:
                others["cut at an EOS inside the response"] += 1
            parts[kind].append(texts)
        if not parts[kind]:
            first = next(iter(firsts.values()), "all are left out")
            said = f"no row of {names[kind]} can be used: {first}"
            raise UserError(f"--dataset {args.dataset}: {said}; the columns are {', '.join(there)}")
        counts[kind]["dropped"] = dict(dropped)
        counts[kind].update(others)

    # Phase 3: divide and write
    if "test" in parts:
        prompts = {row["prompt"] for row in parts["test"]}
        kept = [row for row in parts["train"] if row["prompt"] not in prompts]
        counts["train"]["left out: prompt is in the test split"] = len(parts["train"]) - len(kept)
        parts["train"] = kept
    else:
        parts = hold_out(parts["train"], args)
        counts["test"] = {}
    if not parts["train"]:
        raise UserError(f"--split: every prompt of {names['train']} is also in {names['test']}")
    lengths = measure(parts["train"] + parts["test"], columns, tokenizer, args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, rows in parts.items():
        counts[kind]["written"] = len(rows)
        counts[kind]["prompts"] = len({row["prompt"] for row in rows})
        with open(folder / f"{kind}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    info = {"source": source, "splits": names, "columns": columns, "messages": is_chat}
    info.update(settings=asdict(args), counts=counts, lengths=lengths)
    info["unit"] = "tokens" if tokenizer else "characters"
    with open(folder / "info.json", "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(info, ensure_ascii=False, indent=2) + "\n")

    # Phase 4: show
    form = "texts, unchanged (only messages are rendered by a chat template)"
    if is_chat:
        form = f"messages, rendered by {args.chat_template or args.tokenizer}"
    print(f"{source}: {form}\n")
    show_counts(counts, firsts)
    for row in parts["train"][:2]:
        show_row(row, tokenizer)
    show_lengths(lengths, args, bool(tokenizer))
    print(f"\nWrote {', '.join(OUTPUTS)} to {folder}: pass it as --dataset.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    logging.disable()  # the libraries' warnings
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    try:
        main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    except (UserError, OSError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        sys.exit(2)
