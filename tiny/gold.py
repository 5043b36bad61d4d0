"""The true (gold) reward of the built-in world.

An answer is better the more it gives of what was asked for, politely and without waste.

* Opening: a polite one is worth about a step, a rude one costs as much, none costs half of that.
* Steps: each different step on the prompt's topic earns points up to the number that the prompt
  wants (1 for "Be brief.", 4 for "Give all the steps.", else 2), the first most of all. An answer
  with none of them costs.
* Order: a step after one that it should precede costs.
* Off topic: each such sentence costs, be it small talk or a step of another topic.
* Closing: a good one is worth a bit, a bad one costs. Only a first sentence can open and only a
  last one can close. Openings and closings elsewhere are superfluous and cost.
* Brevity: every sentence between opening and closing beyond the number of steps wanted costs,
  whatever it is, so a fine step too many costs, too.
* Repetition: saying a sentence again costs each time.
* Other text that is no sentence of this world costs per piece and per character.
* Saying nothing is worst of all.
"""

import grammar

OPENING = {"polite": 2.5, "neutral": 0.0, "rude": -2.2, None: -1.1}
CLOSING = {"good": 1.4, "bad": -1.3, None: 0.0}
FIRST_STEP, FURTHER_STEP = 2.5, 2.0  # distinct steps on topic, up to the number wanted
NO_STEP = -2.5  # not one step on topic
OFF_TOPIC = -1.6  # each step of another topic, each sentence of small talk
DISORDER = -0.5  # each on-topic step that follows a later one
BEYOND = -1.0  # each sentence beyond the number of steps wanted
REPETITION = -2.0  # each time a sentence is said again
SUPERFLUOUS = -1.4  # each opening that is not the first sentence, each closing that is not the last
UNKNOWN_PIECE, UNKNOWN_CHARACTER = -1.1, -0.04
WORST, EMPTY = -19.0, -20.0  # the lowest an answer can get; no answer


def gold_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """The true reward of each response to its prompt, defined for any text; see the top."""
    return [_gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _gold(prompt: str, response: str) -> float:
    topic, wanted = grammar.read_prompt(prompt)
    pieces = grammar.sentences(response)
    if not pieces:
        return EMPTY
    body = list(pieces)
    opening = body.pop(0)[1] if body[0][0] == "opening" else None
    closing = body.pop()[1] if body and body[-1][0] == "closing" else None
    steps = [value for kind, value, _ in body if kind == "step"]
    own = list(dict.fromkeys(index for t, index in steps if t == topic))  # each once, in order
    unknown = [text for kind, _, text in body if kind == "unknown"]

    score = OPENING[opening] + CLOSING[closing]
    useful = min(len(own), wanted)
    score += FIRST_STEP + FURTHER_STEP * (useful - 1) if useful else NO_STEP
    score += DISORDER * sum(b < a for a, b in zip(own, own[1:], strict=False))
    score += OFF_TOPIC * sum(t != topic for t, _ in steps)
    score += BEYOND * max(len(body) - wanted, 0)
    score += REPETITION * (len(pieces) - len({text for _, _, text in pieces}))
    score += SUPERFLUOUS * sum(kind in ("opening", "closing") for kind, _, _ in body)
    score += UNKNOWN_PIECE * len(unknown) + UNKNOWN_CHARACTER * sum(map(len, unknown))
    return round(max(score, WORST), 6)  # rounded so that equal sums are ties
