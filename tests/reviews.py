"""Short reviews made from templates: words of praise and blame, in a quarter of them turned round by the rest."""

import csv
import random
from pathlib import Path

THINGS = ["film", "plot", "acting", "music", "ending", "script", "camera work", "dialogue", "cast", "pace", "story"]
GOOD = """brilliant moving funny gripping clever charming superb fresh thoughtful lively wonderful delightful
excellent graceful touching witty stunning masterful joyful rewarding""".split()
BAD = """dull clumsy boring shallow weak tedious messy stale silly hollow dreadful annoying terrible lifeless
forgettable lazy ugly painful tiresome pointless""".split()
FRAMES = [
    "The {a} is {x}.",
    "What a {x} {a}, and the {b} fits it.",
    "We saw it twice; the {a} and the {b} are {x}.",
    "Its {a} was {x} from the first minute.",
    "I went for the {b} and found a {x} {a}.",
]
TURNED = [
    "The {a} is not {x}.",
    "Nobody could call the {a} {x}.",
    "They promised a {x} {a}; it is the opposite.",
    "The {a} is far from {x}, and so is the {b}.",
    "I hoped for a {x} {a} and did not get one.",
]


def reviews(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Text and label, neg or pos in turn; in a quarter of the texts the opinion is turned round by the rest of it."""
    rng = random.Random(seed)
    made: dict[str, str] = {}
    while len(made) < number:
        label = ("neg", "pos")[len(made) % 2]
        turned = rng.random() < 0.25
        word = rng.choice(GOOD if (label == "pos") != turned else BAD)
        a, b = rng.sample(THINGS, 2)
        made.setdefault(rng.choice(TURNED if turned else FRAMES).format(a=a, b=b, x=word), label)
    return list(made.items())


def write_reviews(path: Path, number: int, seed: int = 0) -> Path:
    """A CSV file with columns text and label."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *reviews(number, seed)])
    return path
