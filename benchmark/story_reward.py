"""A reward of texts for short children's stories: happy ones, told in few words."""

import re

HAPPY = set(
    "happy smiled smile laughed fun love loved friends friend hug hugged proud glad".split()
)


def happy(prompts: list[str], responses: list[str]) -> list[float]:
    """Different happy words in a response, less a tenth of a point for every word beyond 60."""
    words = [re.findall(r"[a-z]+", response.lower()) for response in responses]
    return [len(HAPPY & set(found)) - 0.1 * max(len(found) - 60, 0) for found in words]
