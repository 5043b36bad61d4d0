"""The built-in world: a small English help desk in the format of Anthropic's HH.

A person asks how to do one of 30 everyday things, in one of 8 phrasings and with one of 5 wishes
for length:

    "\\n\\nHuman: How do I make tea? Be brief.\\n\\nAssistant:"

and the desk answers with one opening, one to four steps and at most one closing, drawn at random:

    " Happy to help! Boil water for the tea. Put the tea in the pot. Hope that helps!"

It may be rude, may make small talk where a step is due, may mix up the order and may repeat itself:
`sample_response` says how often. gold.py says how good an answer is. Every sentence ends in one of
". ! ?" and has none of them inside, so an answer is easy to split. Every sentence belongs to one
kind (opening, step, closing) only, and every step to one topic or to small talk.
"""

import random
import re
from dataclasses import dataclass

# The probabilities of an answer.
OPENING_WEIGHTS = {"polite": 0.30, "neutral": 0.40, "rude": 0.30}
CLOSING_WEIGHTS = {"good": 0.25, "bad": 0.25, None: 0.50}
NUM_STEPS_WEIGHTS = {  # number of steps wanted -> weights of giving 1, 2, 3, 4; a weak influence
    1: (0.42, 0.35, 0.20, 0.03),
    2: (0.25, 0.47, 0.24, 0.04),
    4: (0.14, 0.30, 0.44, 0.12),
}
ON_TOPIC = 0.70  # each step on its own; otherwise it is small talk
ORDERED = 0.85  # the on-topic steps come in their natural order; otherwise in a random one
REPEATED = 0.05  # an answer of two steps or more ends its steps with one that it has already given

PHRASINGS = (
    "How do I {}?",
    "How can I {}?",
    "I want to {}.",
    "Can you help me {}?",
    "Please tell me how to {}.",
    "What is a good way to {}?",
    "I need to {} today.",
    "My friend wants to {}.",
)
LENGTH_WISHES = {
    "Be brief.": 1,
    "Keep it short.": 1,
    "": 2,
    "Give all the steps.": 4,
    "Tell me everything.": 4,
}

OPENINGS = {
    "polite": (
        "Happy to help!",
        "Sure, I can help with that.",
        "Of course, here is how.",
        "Thank you for asking.",
        "What a good question!",
        "I would love to help.",
    ),
    "neutral": (
        "Okay.",
        "Here is how.",
        "Here is what to do.",
        "This is one way.",
        "Let us see.",
        "Do it like this.",
    ),
    "rude": (
        "Not this again.",
        "You should know this.",
        "What a silly question.",
        "I have no time for this.",
        "Fine, if I must.",
        "Can you not do it on your own?",
    ),
}
CLOSINGS = {
    "good": (
        "Hope that helps!",
        "Good luck!",
        "You can do it!",
        "Tell me how it goes.",
        "Ask me if you need more.",
    ),
    "bad": (
        "Now go away.",
        "Do not ask me again.",
        "I am done here.",
        "Leave me alone.",
        "That is all you get.",
    ),
}

# What has nothing to do with any question.
SMALL_TALK = (
    "It is a nice day.",
    "I like cold milk.",
    "My cat is very old.",
    "The bus was late again.",
    "I saw a good movie.",
    "My sister lives far away.",
    "It may rain tomorrow.",
    "I had rice for lunch.",
    "The moon was big last night.",
    "My phone is new.",
    "I want to go home.",
    "Blue is a fine color.",
    "My feet hurt today.",
    "I know a funny story.",
    "We won the game.",
    "Monday is not my day.",
)

# A topic: what is asked for, then five steps in their natural order. Each step names its object.
TOPIC_TABLE = """
bake a cake: Heat the oven for the cake. Mix the cake with a spoon. Pour the cake into a pan. Bake
    the cake for an hour. Let the cake get cool.
bake bread: Mix flour for the bread. Add salt to the bread. Let the bread rest for an hour. Bake
    the bread until it is brown. Let the bread get cool.
boil an egg: Put the egg in a pot. Cover the egg with water. Boil the egg for six minutes. Put the
    egg in cold water. Take the shell off the egg.
build a kite: Find two sticks for the kite. Cut paper to fit the kite. Glue the paper to the kite.
    Add a tail to the kite. Tie a string to the kite.
catch a fish: Find a lake with fish. Put out food for the fish. Wait for the fish to bite. Pull
    the fish in slowly. Lift the fish with a net.
clean a window: Wipe the dust off the window. Mix soap for the window. Wash the window with a
    cloth. Dry the window with a towel. Rub the window with paper.
clean shoes: Brush the mud off the shoes. Wash the shoes with a cloth. Put oil on the shoes. Rub
    the oil into the shoes. Brush the shoes until they shine.
cook rice: Wash the rice in cold water. Put the rice in a pot. Cover the rice with water. Cook the
    rice on low heat. Let the rice rest for six minutes.
feed a cat: Wash the bowl of the cat. Open a can for the cat. Put out food for the cat. Call the
    cat by its name. Give the cat fresh water.
fix a tap: Turn the tap off. Open the tap with a tool. Take the ring out of the tap. Put a new
    ring in the tap. Turn the tap on again.
grow tomatoes: Put the tomatoes in small pots. Keep the tomatoes warm. Give the tomatoes fresh
    water. Tie the tomatoes to sticks. Pick the tomatoes when they are red.
hang a picture: Find a wall for the picture. Mark a spot for the picture. Put in a nail for the
    picture. Hang the picture on the nail. Check that the picture is straight.
light a fire: Find a safe place for the fire. Put small sticks on the fire. Put paper under the
    fire. Light the fire with a match. Add big sticks to the fire.
make a bed: Take the old sheet off the bed. Put a new sheet on the bed. Fold the sheet under the
    bed. Spread a cover on the bed. Put a pillow on the bed.
make a boat: Find paper for the boat. Fold the boat in the middle. Fold the front of the boat.
    Fold the back of the boat. Pull the boat open.
make jam: Wash the fruit for the jam. Add sugar to the jam. Cook the jam on low heat. Test the jam
    with a spoon. Pour the jam into jars.
make soup: Cut an onion for the soup. Put the soup in a pot. Add salt to the soup. Cook the soup
    for an hour. Test the soup with a spoon.
make tea: Boil water for the tea. Warm the pot for the tea. Put the tea in the pot. Wait until the
    tea is dark. Pour the tea into a cup.
mow the lawn: Pick the stones off the lawn. Start at the back of the lawn. Cut the lawn in
    straight lines. Clear the leaves off the lawn. Give the lawn fresh water.
pack a bag: Make a list for the bag. Find a big bag. Put shirts in the bag. Put a book on top of
    the bag. Close the bag and lift it.
paint a wall: Wash the wall with soap. Let the wall get dry. Put tape around the wall. Paint the
    wall with a brush. Take the tape off the wall.
plant a tree: Find a safe place for the tree. Dig a hole for the tree. Put the tree in the hole.
    Cover the tree with soil. Give the tree fresh water.
ride a bike: Find a small bike. Check the air in the bike. Sit on the bike. Push the bike with one
    foot. Stop the bike slowly.
save money: Make a list of your money. Make a plan for your money. Put some money in a jar. Count
    the money twice. Take the money to the bank.
set up a tent: Find a dry spot for the tent. Spread the tent on the floor. Put sticks in the tent.
    Lift the tent slowly. Tie the tent to a tree.
wash a dog: Brush the mud off the dog. Cover the dog with water. Wash the dog with soap. Rub the
    dog with a cloth. Dry the dog with a towel.
wash a plate: Clear the food off the plate. Put the plate in hot water. Wash the plate with soap.
    Rub the plate with a cloth. Dry the plate with a towel.
water a cactus: Wait until the cactus is dry. Put the cactus in the sink. Give the cactus fresh
    water. Let the cactus rest for an hour. Put the cactus in the sun.
wrap a gift: Find a box for the gift. Put the gift in the box. Cut paper to fit the gift. Fold the
    paper around the gift. Tie a string to the gift.
write a letter: Find paper for the letter. Put a name on the letter. Write the letter slowly. Read
    the letter twice. Take the letter to the post.
"""
TOPICS = {
    topic: tuple(re.findall(r"[A-Z][^.]*\.", " ".join(steps.split())))
    for topic, steps in re.findall(r"(?m)^(\S[^:]*):([^:]+)$", TOPIC_TABLE)
}


@dataclass(frozen=True)
class Answer:
    """What an answer consists of. Opening and closing are kinds: "polite", "bad", ..."""

    opening: str
    steps: tuple[tuple[str, int], ...]  # (topic, index)
    closing: str | None


def make_prompt(topic: str, phrasing: str, wish: str) -> str:
    """The prompt's text in HH's format."""
    question = f"{phrasing.format(topic)} {wish}".strip()
    return f"\n\nHuman: {question}\n\nAssistant:"


# Tables for reading text back.
PROMPTS = {
    make_prompt(t, p, w): (t, n)
    for t in TOPICS
    for p in PHRASINGS
    for w, n in LENGTH_WISHES.items()
}
SENTENCES = {
    **{text: ("opening", kind) for kind, texts in OPENINGS.items() for text in texts},
    **{
        text: ("step", (topic, i))
        for topic, texts in TOPICS.items()
        for i, text in enumerate(texts)
    },
    **{text: ("step", ("small talk", i)) for i, text in enumerate(SMALL_TALK)},
    **{text: ("closing", kind) for kind, texts in CLOSINGS.items() for text in texts},
}


def all_prompts() -> list[str]:
    """Every prompt of the world, in a fixed order."""
    return list(PROMPTS)


def sample_prompts(num: int, rng: random.Random) -> list[str]:
    """`num` prompts, drawn with replacement."""
    return rng.choices(all_prompts(), k=num)


def read_prompt(prompt: str) -> tuple[str | None, int]:
    """The topic asked for (None: unknown) and the number of steps wanted (2 unless said)."""
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    topic = next((t for t in TOPICS if t in prompt), None)
    return topic, next((n for wish, n in LENGTH_WISHES.items() if wish and wish in prompt), 2)


def sample_response(prompt: str, rng: random.Random) -> str:
    """One answer of the grammar, beginning with a space."""
    topic, wanted = read_prompt(prompt)
    opening = rng.choices(list(OPENING_WEIGHTS), OPENING_WEIGHTS.values())[0]
    closing = rng.choices(list(CLOSING_WEIGHTS), CLOSING_WEIGHTS.values())[0]
    num_steps = rng.choices((1, 2, 3, 4), NUM_STEPS_WEIGHTS[wanted])[0]
    on_topic = [topic is not None and rng.random() < ON_TOPIC for _ in range(num_steps)]
    own = rng.sample(range(5), sum(on_topic))
    if rng.random() < ORDERED:
        own.sort()
    steps = [TOPICS[topic][own.pop(0)] if on else rng.choice(SMALL_TALK) for on in on_topic]
    if num_steps > 1 and rng.random() < REPEATED:
        steps[-1] = rng.choice(steps[:-1])
    ending = [rng.choice(CLOSINGS[closing])] if closing else []
    return "".join(f" {sentence}" for sentence in [rng.choice(OPENINGS[opening]), *steps, *ending])


def sentences(response: str) -> list[tuple[str, object, str]]:
    """Any text as (kind, value, text) pieces, with the kinds and values of SENTENCES.

    A piece that is no sentence of this world has the kind "unknown" and the value None.
    """
    pieces = (piece.strip() for piece in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", response))
    return [(*SENTENCES.get(piece, ("unknown", None)), piece) for piece in pieces if piece]


def parse(response: str) -> Answer | None:
    """The parts of an answer, or None unless it is an opening, 1 to 4 steps, perhaps a closing."""
    pieces = sentences(response)
    kinds = " ".join(kind for kind, _, _ in pieces)
    if not re.fullmatch(r"opening( step){1,4}( closing)?", kinds) or response != "".join(
        f" {p[2]}" for p in pieces
    ):
        return None
    values = [value for _, value, _ in pieces]
    closed = kinds.endswith("closing")
    return Answer(
        values[0], tuple(values[1:-1] if closed else values[1:]), values[-1] if closed else None
    )
