"""Make the quickstart's rows: a plain request in, one tool call as JSON out, for eight functions.

    python examples/make_toolcalls.py    # toolcalls_train.jsonl and toolcalls_eval.jsonl in examples/data

Sentences and words stand in examples/data/toolcalls.yaml. Two things keep a good score from being memory:
every value (name, place, number, date, time, text) belongs to one split alone, and over a quarter of the eval rows use
sentences that training never shows. The same seed gives the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import yaml

DATA = Path(__file__).parent / "data"
SEED = 1
EVAL_VALUES = 0.3  # share of the values that eval keeps for itself
UNSEEN_TEMPLATES = 1 / 4  # share of the eval rows, rounded up for each function
COMPOSED = 0.6  # share of the words that are put together from two parts, so that few are seen twice

Split = Literal["train", "eval"]

ROWS: dict[Split, int] = {"train": 800, "eval": 120}
# Requests in a row: training asks several things of one system prompt.
EXCHANGES: dict[Split, int] = {"train": 4, "eval": 1}

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August"]
MONTHS += ["September", "October", "November", "December"]
ORDERS = (
    *("{}", "{}", "{}.", "please {}", "please {}.", "can you {}?", "could you {}?", "could you please {}?"),
    *("hey, {}.", "I'd like you to {}.", "I want you to {}.", "{}, please.", "{} please", "{}, thanks."),
)
GREETINGS = ("", "", "", "hey, ", "hi, ")
OPEN_ENDED = ("text", "title", "label")  # an order that ends with one of these takes no "please" behind it


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request, the call that answers it, and the sentence template that it was made from."""

    request: str
    function: str
    arguments: dict[str, Any]
    template: str

    def turns(self) -> list[dict[str, str]]:
        """The user's turn, and the assistant's: the call as compact JSON."""
        call = {"name": self.function, "arguments": self.arguments}
        answer = json.dumps(call, ensure_ascii=False, separators=(",", ":"))
        return [{"role": "user", "content": self.request}, {"role": "assistant", "content": answer}]


def chat(system: str, exchanges: Iterable[Exchange]) -> dict[str, list[dict[str, str]]]:
    """A row of the data: the system prompt, then request and call by turns."""
    turns = [turn for exchange in exchanges for turn in exchange.turns()]
    return {"messages": [{"role": "system", "content": system}, *turns]}


@cache
def kept_by_eval(seed: int, key: str) -> bool:
    """Whether a value is eval's: seed and key alone decide."""
    return random.Random(f"{seed} {key}").random() < EVAL_VALUES


class Words:
    """The values of one split, drawn at random."""

    def __init__(self, words: dict[str, Any], split: Split, seed: int, rng: random.Random) -> None:
        self.pools: dict[str, list[Any]] = {name: pool for name, pool in words.items() if name != "parts"}
        self.parts: dict[str, dict[str, Any]] = words["parts"]
        self.split, self.seed, self.rng = split, seed, rng

    def ours(self, key: object) -> bool:
        """Whether the value known by `key` is of this split: seed and key alone decide."""
        return kept_by_eval(self.seed, str(key).casefold()) == (self.split == "eval")

    def pick(self, pool: list[Any], key: Callable[[Any], object] = str) -> Any:
        return self.rng.choice([value for value in pool if self.ours(key(value))])

    def word(self, pool: str) -> str:
        """A word of a pool, or one put together from its parts ("First Last") where it has any."""
        parts = self.parts.get(pool)
        if parts is None or (pool in self.pools and self.rng.random() >= COMPOSED):
            return self.pick(self.pools[pool])
        while not self.ours(word := parts["as"].format(self.pick(parts["one"]), self.pick(parts["two"]))):
            pass
        return word

    def number(self, draw: Callable[[], float]) -> float:
        while not self.ours(f"{(value := draw()):g}"):
            pass
        return value

    def time(self, first: int, last: int) -> str:
        """A time between two hours; "6:45", "6:45 am", "6:45 pm" and "18:45" are in one split."""
        hour, minute = divmod(self.pick(list(range(first * 60, last * 60, 5)), key=lambda minutes: minutes % 720), 60)
        if self.rng.random() < 0.25:
            return f"{hour}:{minute:02}"
        shown = (hour - 1) % 12 + 1
        return f"{shown}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"

    def date(self) -> str:
        return self.pick([f"{month} {day}" for month in MONTHS for day in range(1, 29)])

    def amount(self) -> float:
        """Money: small change, a plain number or a round one."""
        kind = self.rng.randrange(3)
        if kind == 0:
            return self.number(lambda: self.rng.randint(1, 400) + self.rng.choice((0.25, 0.5, 0.75, 0.95)))
        return self.number(lambda: self.rng.randint(2, 999) if kind == 1 else 50 * self.rng.randint(4, 180))

    def currencies(self) -> tuple[str, str]:
        form = self.rng.randrange(2)  # two codes or two names
        pool = [pair for pair in self.pools["currencies"] if self.ours(pair[0])]
        one, other = self.rng.sample(pool, 2)
        return one[form], other[form]

    def shopping(self) -> tuple[list[str], str]:
        themes = [theme for theme in self.pools["lists"] if any(map(self.ours, theme["names"]))]
        theme = self.rng.choice(themes)
        items = [item for item in theme["items"] if self.ours(item)]
        return self.rng.sample(items, self.rng.randint(1, 3)), self.pick(theme["names"])


def values_for(function: str, words: Words) -> dict[str, Any]:
    """A value for every slot that the templates of `function` may have."""
    match function:
        case "set_alarm":
            return {"time": words.time(4, 12), "label": words.word("labels")}
        case "send_message":
            return {"to": words.word("names"), "text": words.word("texts")}
        case "get_weather":
            return {"city": words.word("cities"), "day": words.word("days")}
        case "create_event":
            return {"title": words.word("titles"), "date": words.date(), "time": words.time(7, 22)}
        case "play_music":
            if words.rng.random() < COMPOSED:
                return {"song": words.word("made_up_songs"), "artist": words.word("artists")}
            song, artist = words.pick(words.pools["songs"], key=lambda pair: pair[1])
            return {"song": song, "artist": artist}
        case "convert_currency":
            one, other = words.currencies()
            return {"amount": words.amount(), "from": one, "to": other}
        case "set_light":
            return {"room": words.word("rooms"), "percent": words.number(lambda: words.rng.randint(1, 100))}
        case "add_to_list":
            items, name = words.shopping()
            return {"items": items, "list": name}
    raise ValueError(f"no values for the function {function}")


def spoken(value: str | float | list[str]) -> str:
    """A value as it stands in a sentence: a list as "a, b and c"."""
    if isinstance(value, list):
        return " and ".join([", ".join(value[:-1]), value[-1]] if value[1:] else value)
    return str(value)


def sentence(template: str, rng: random.Random) -> str:
    """The template with the politeness, greeting and full stop of one speaker; the slots stay."""
    if template.endswith((".", "?")):
        greeting = rng.choice(GREETINGS)
        return greeting + (template.rstrip(".") if rng.random() < 0.3 else template)
    orders = ORDERS
    if template.endswith(tuple(f"{{{slot}}}" for slot in OPEN_ENDED)):
        orders = tuple(order for order in ORDERS if order.rstrip(".?").endswith("{}"))
    return rng.choice(orders).replace("{}", template)


def make_exchange(function: str, template: str | dict[str, Any], words: Words) -> Exchange:
    """One request and its call from a template, filled with words of the split."""
    say, fixed = (template, {}) if isinstance(template, str) else (template["say"], template["fixed"])
    values = values_for(function, words)
    slots = re.findall(r"{(\w+)}", say)
    arguments = {name: value for name, value in values.items() if name in slots} | fixed
    request = sentence(say, words.rng).format_map({name: spoken(value) for name, value in values.items()})
    return Exchange(request[0].upper() + request[1:], function, arguments, say)


def templates_for(function: dict[str, Any], split: Split, rows: int, rng: random.Random) -> Iterator[Any]:
    """As many templates as rows, each as often as the next; over a quarter of those for eval are held out."""
    unseen = math.ceil(rows * UNSEEN_TEMPLATES) if split == "eval" else 0
    for templates, count in ((function["templates"], rows - unseen), (function["held_out"], unseen)):
        yield from islice(cycle(rng.sample(templates, len(templates))), count)


def make_exchanges(source: dict[str, Any], split: Split, count: int, seed: int = SEED) -> list[Exchange]:
    """Exchanges of one split in random order, no request twice, as many for each function.

    Args:
        source: What examples/data/toolcalls.yaml holds.
        split: Which templates and which values may be used.
        count: How many; a multiple of the number of functions.
        seed: Decides everything random, and which split a value belongs to.
    """
    rng = random.Random(f"{seed} {split}")
    words = Words(source["words"], split, seed, rng)
    made: dict[str, Exchange] = {}
    for name, function in source["functions"].items():
        for template in templates_for(function, split, count // len(source["functions"]), rng):
            row = make_exchange(name, template, words)
            while row.request.casefold() in made:
                row = make_exchange(name, template, words)
            made[row.request.casefold()] = row
    return rng.sample(list(made.values()), len(made))


def statement(functions: dict[str, Any]) -> str:
    """The system prompt: each function with its arguments."""
    lines = [f"{name}({function['arguments']})" for name, function in functions.items()]
    return "\n".join(["Answer with one JSON tool call:", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's train and eval rows.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: examples/data)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    options = parser.parse_args()
    source = yaml.safe_load((DATA / "toolcalls.yaml").read_text(encoding="utf-8"))
    system = statement(source["functions"])
    for split, rows in ROWS.items():
        path = options.out / f"toolcalls_{split}.jsonl"
        made = make_exchanges(source, split, rows * EXCHANGES[split], options.seed)
        chats = [chat(system, made[at : at + EXCHANGES[split]]) for at in range(0, len(made), EXCHANGES[split])]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chats), encoding="utf-8")
        print(f"{path}: {len(chats)} rows, {len(made)} requests")


if __name__ == "__main__":
    main()
