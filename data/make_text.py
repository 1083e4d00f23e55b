"""Makes the sample data of text alone: short questions and answers, and web searches about invented places.

    python data/make_text.py [--text data/text] [--websearch data/websearch]

Everything follows from the seeds below. The folders and their formats are described in data/README.md.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import cycle, pairwise
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train.data.functions import WEB_SEARCH, Call, Found, observation_text, system_text

PAIRS = (
    *(("hot", "cold"), ("up", "down"), ("day", "night"), ("fast", "slow"), ("left", "right"), ("new", "old")),
    *(("big", "small"), ("open", "closed"), ("dry", "wet"), ("hard", "soft"), ("full", "empty"), ("rich", "poor")),
)
NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
WORDS = (
    *("banana", "butterfly", "chocolate", "coffee", "computer", "elephant", "football", "garden", "hospital"),
    *("island", "kitchen", "lemon", "mountain", "music", "orange", "piano", "river", "tomato", "umbrella", "window"),
)
FACTS = {
    "opposite": {a: b for pair in PAIRS for a, b in (pair, pair[::-1])},
    "after": dict(pairwise(NUMBERS)),
    "before": dict(zip(NUMBERS[1:], NUMBERS[:-1], strict=True)),
    "repeat": {word: word for word in WORDS},
}
"""What is asked about, and the answer, by task."""
PHRASINGS = {
    "opposite": (
        *("What is the opposite of {}?", "Which word is the opposite of {}?", "Tell me the opposite of {}."),
        *("Name the opposite of {}.", "The opposite of {} is what?"),
    ),
    "after": (
        *("What number comes after {}?", "Which number follows {}?", "Tell me the number after {}."),
        *("Name the number after {}.", "What is {} plus one?"),
    ),
    "before": (
        *("What number comes before {}?", "Which number leads to {}?", "Tell me the number before {}."),
        *("Name the number before {}.", "What is {} minus one?"),
    ),
    "repeat": (
        *("Repeat the word {}.", "Say the word {}.", "Write the word {}."),
        *("Please repeat {}.", "Tell me the word {} again."),
    ),
}
TRAIN_RECORDS = 1000

NAMES = (
    *("Arlo", "Benta", "Corvin", "Dalmo", "Elvas", "Fendra", "Gorlen", "Hestia", "Ivora", "Jorvik", "Kestrel"),
    *("Lumen", "Marvo", "Nesta", "Orvel", "Pinto", "Quarla", "Rendal", "Sorrel", "Tiran"),
)
KINDS = ("tower", "bridge", "museum", "market", "station")
MATERIALS = ("stone", "wood", "brick", "glass", "iron", "marble")
COLORS = ("red", "green", "blue", "yellow", "white", "black")
YEARS = tuple(map(str, range(1850, 1990, 7)))
SENTENCES = {
    "material": ("What is {} made of?", "{} is made of {}"),
    "color": ("What color is {} painted?", "{} is painted {}"),
    "year": ("When did {} open?", "{} opened in {}"),
}
"""The question about a place, and the answer, by attribute."""
RESULTS = 3
"""Most results of a search."""
SEARCHES, DIRECT, PLAIN = 1800, 300, 300
"""Training records that search, that need not although they could, and that could not; a tenth as many are held out."""


@dataclass(frozen=True)
class Place:
    """An invented building, with one value of each attribute."""

    name: str
    kind: str
    attributes: dict[str, str]

    @classmethod
    def draw(cls, name: str, kind: str, random: Random) -> "Place":
        values = {"material": MATERIALS, "color": COLORS, "year": YEARS}
        return cls(name, kind, {attribute: random.choice(choices) for attribute, choices in values.items()})

    @property
    def title(self) -> str:
        return f"{self.name} {self.kind}"

    def sentence(self, attribute: str) -> str:
        return SENTENCES[attribute][1].format(self.title, self.attributes[attribute])

    @property
    def found(self) -> Found:
        """What a search finds about it."""
        return Found(self.title, " ".join(f"{self.sentence(attribute)}." for attribute in SENTENCES))


def text_splits(random: Random) -> dict[str, list[dict]]:
    """Conversations of one to three questions; what is held out asks for a fact in a wording not seen for it."""
    seen: list[tuple[str, str, str]] = []
    held_out: list[dict] = []
    for task, facts in FACTS.items():
        for word, answer in facts.items():
            *kept, other = random.sample(PHRASINGS[task], len(PHRASINGS[task]))
            seen += [(task, phrasing.format(word), answer) for phrasing in kept]
            held_out.append(conversation(task, [(other.format(word), answer)]))
    train = []
    for number in range(TRAIN_RECORDS):
        task, question, answer = seen[number % len(seen)]
        more = [asked[1:] for asked in random.sample(seen, random.choice((0, 0, 1, 2)))]
        train.append(conversation("turns" if more else task, [(question, answer), *more]))
    random.shuffle(train)
    return {"train": train, "heldout": held_out}


def conversation(kind: str, asked: list[tuple[str, str]], system: str | None = None) -> dict:
    """A record of questions and answers."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in asked:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"type": kind, "messages": messages}


def search_record(place: Place, others: list[Place], attribute: str, system: str) -> dict:
    """A question about a place, the search for it, what was found (the best first), and the cited answer."""
    turns = {
        "user": SENTENCES[attribute][0].format(place.title),
        "call": Call("web_search", {"query": f"{place.title} {attribute}"}).text,
        "observation": observation_text([result.found for result in (place, *others)]),
        "answer": f"{place.sentence(attribute)} [citation:1].",
    }
    roles = {"call": "assistant", "answer": "assistant"}
    messages = [{"role": "system", "content": system}]
    messages += [{"role": roles.get(name, name), "content": content} for name, content in turns.items()]
    return {"type": "search", "messages": messages}


def websearch_splits(random: Random) -> dict[str, list[dict]]:
    """Records that search, and some that do not; places are drawn anew for each, so that nothing is known by heart."""
    splits = {}
    for split, share in (("train", 1.0), ("heldout", 0.1)):
        records = []
        for kind, count in (("search", SEARCHES), ("direct", DIRECT), ("plain", PLAIN)):
            for _ in range(round(count * share)):
                system = system_text([WEB_SEARCH], random_time(random))
                if kind == "search":
                    names = random.sample(NAMES, random.randint(1, RESULTS))
                    kind_of_place = random.choice(KINDS)  # by which a search finds the others too
                    place, *others = [Place.draw(name, kind_of_place, random) for name in names]
                    records.append(search_record(place, others, random.choice(list(SENTENCES)), system))
                else:
                    word, answer = random.choice(list(FACTS["opposite"].items()))
                    asked = [(random.choice(PHRASINGS["opposite"]).format(word), answer)]
                    records.append(conversation(kind, asked, system if kind == "direct" else None))
        random.shuffle(records)
        splits[split] = records
    return splits


def random_time(random: Random) -> datetime:
    return datetime(2026, 1, 1) + timedelta(seconds=random.randrange(365 * 86_400))


def library(random: Random) -> list[Place]:
    """A place of each name, for a local search."""
    return [Place.draw(name, kind, random) for name, kind in zip(NAMES, cycle(KINDS), strict=False)]


def write_list(file: Path, records: list[dict]) -> None:
    """A JSON list with a record a line: the form of MiniCPM's published fine-tuning data."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the sample data of text alone.")
    parser.add_argument("--text", type=Path, default=Path("data/text"), help="folder of questions and answers")
    parser.add_argument("--websearch", type=Path, default=Path("data/websearch"), help="folder of web searches")
    args = parser.parse_args()
    args.text.mkdir(parents=True, exist_ok=True)
    texts = args.websearch / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for split, records in text_splits(Random(1)).items():
        write_list(args.text / f"{split}.json", records)
    for split, records in websearch_splits(Random(2)).items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (args.websearch / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    for place in library(Random(3)):
        found = place.found
        file = texts / f"{place.name}-{place.kind}.txt".lower()
        file.write_text(f"{found.title}\n{found.text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
