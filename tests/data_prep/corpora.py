"""Documents made up for tests: many short and few long ones, prose, code and scripts of many languages."""

import random
from collections.abc import Iterator

SYLLABLES = ["ba", "con", "der", "el", "fi", "gra", "hu", "in", "ka", "lo", "men", "nor", "pe", "ri", "sta", "tion"]
SCRIPTS = [  # first and last letter of an alphabet, and what separates words
    ("α", "ω", " "),  # Greek
    ("а", "я", " "),  # Cyrillic
    ("ا", "ي", " "),  # Arabic
    ("अ", "ह", " "),  # Devanagari
    ("가", "힣", " "),  # Hangul
    ("一", "龥", ""),  # Chinese
    ("ぁ", "ん", ""),  # Hiragana
]


def varied_documents(characters: int, seed: int = 0) -> Iterator[str]:
    """Documents of about `characters` in all, the same for the same seed.

    Their lengths follow a power law: most have a few hundred characters, a few have tens of thousands.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(2_000)]
    made = 0
    while made < characters:
        length = min(80_000, int(100 * rng.paretovariate(0.9)))
        write = rng.choices([_prose, _code, _other_script], weights=[6, 3, 1])[0]
        document = write(rng, words, length)
        made += len(document)
        yield document


def _prose(rng: random.Random, words: list[str], length: int) -> str:
    text = ""
    while len(text) < length:
        sentence = " ".join(rng.choices(words, k=rng.randint(3, 20)))
        text += sentence.capitalize() + rng.choice([". ", ". ", "? ", ".\n", ".\n\n"])
    return text


def _code(rng: random.Random, words: list[str], length: int) -> str:
    text = ""
    while len(text) < length:
        name, argument, value = rng.choices(words, k=3)
        text += f"def {name}({argument}, n={rng.randint(0, 999)}):\n"
        for _ in range(rng.randint(1, 6)):
            text += f"    {value} = {argument}[{rng.randint(0, 9)}] * 0x{rng.randrange(1 << 16):04X}  # {name}\n"
        text += f"\treturn {value}\n\n\n"
    return text


def _other_script(rng: random.Random, words: list[str], length: int) -> str:
    first, last, space = rng.choice(SCRIPTS)
    letters = [chr(point) for point in range(ord(first), ord(last) + 1)]
    text = ""
    while len(text) < length:
        text += "".join(rng.choices(letters, k=rng.randint(1, 8))) + space
        if rng.random() < 0.05:
            text += rng.choice(["\n", "👩\u200d👧", "e\u0301", "\u3000", "½ ", "123 "])
    return text
