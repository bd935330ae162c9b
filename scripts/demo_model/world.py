"""The small invented world that the demo's corpus and instructions talk about.

Everything is plain data: lists of common words and the few relations between
them (kinds, opposites, orders). The corpus states these relations in running
text; the instructions ask for them.
"""

from __future__ import annotations

NAMES = ("Tom", "Mia", "Sam", "Ann", "Ben", "Eva", "Max", "Lily", "Jack", "Rosa", "Noah", "Ella")

KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "fox", "bear", "horse", "cow", "pig", "duck", "frog", "mouse", "owl", "wolf"),
    "food": (
        "apple", "bread", "cake", "cheese", "egg", "grape", "honey", "lemon", "milk", "nut", "plum", "rice",
    ),
    "thing": (
        "ball", "book", "box", "bell", "chair", "cup", "drum", "fork", "key", "lamp", "mirror", "umbrella",
    ),
    "garment": ("boot", "cap", "dress", "glove", "hat", "jacket", "scarf", "sock"),
    "place": ("beach", "castle", "farm", "garden", "hill", "island", "market", "school"),
    "plant": ("bush", "fern", "grass", "ivy", "moss", "oak", "reed", "tree"),
}  # fmt: skip

KIND_OF: dict[str, str] = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}
NOUNS: tuple[str, ...] = tuple(KIND_OF)

#: Things that a person can own: the nouns of the fact sentences.
GOODS: tuple[str, ...] = KINDS["thing"] + KINDS["garment"]
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")

OPPOSITE_PAIRS = (
    ("big", "small"), ("hot", "cold"), ("old", "new"), ("fast", "slow"), ("happy", "sad"),
    ("hard", "soft"), ("long", "short"), ("light", "dark"), ("rich", "poor"), ("full", "empty"),
    ("wet", "dry"), ("good", "bad"), ("high", "low"), ("open", "closed"), ("strong", "weak"),
    ("loud", "quiet"), ("clean", "dirty"), ("thick", "thin"), ("wide", "narrow"), ("near", "far"),
    ("early", "late"), ("sweet", "sour"), ("brave", "afraid"), ("cheap", "dear"), ("deep", "shallow"),
    ("sharp", "blunt"), ("kind", "cruel"), ("wild", "tame"), ("right", "wrong"), ("smooth", "rough"),
)  # fmt: skip
OPPOSITE: dict[str, str] = {a: b for pair in OPPOSITE_PAIRS for a, b in (pair, pair[::-1])}

#: Words that say how an animal or a thing in a story is.
QUALITIES = ("big", "small", "old", "new", "strong", "weak", "quiet", "loud", "clean", "dirty", "wet", "dry")

NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")

#: The orders in which "what comes next" has an answer.
SEQUENCES: dict[str, tuple[str, ...]] = {
    "number": NUMBERS,
    "number down": NUMBERS[::-1],
    "even number": NUMBERS[1::2],
    "odd number": NUMBERS[0::2],
    "letter": LETTERS,
    "letter down": LETTERS[::-1],
    "day": DAYS + DAYS[:3],
    "month": MONTHS + MONTHS[:3],
}


def join(words: tuple[str, ...] | list[str]) -> str:
    """Writes a list the way the whole demo does: ``a b c``."""
    return " ".join(words)


def article(noun: str) -> str:
    """``a cup`` or ``an apple``."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
