"""The built-in task: a date as people write it -> ISO 8601.

    3. März 2026      2026-03-03
    mar. 3 mars 2026  2026-03-03
    03/04/26          2026-03-04 in the United States, 2026-04-03 in Britain

Month and weekday names, and each country's own formats, come from Unicode CLDR through Babel; case, accents, ordinals,
separators, spaces and typing errors are varied as people do. Every 37th day is never trained on: held-out pairs use only those.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from random import Random

from babel import Locale
from babel.dates import format_date

LOCALES = {
    "en_US": 5, "en_GB": 3, "de": 2, "fr": 2, "es": 2, "it": 1, "pt": 1, "nl": 1,
    "sv": 1, "da": 1, "fi": 1, "pl": 1, "tr": 1, "ru": 1, "ja": 1, "zh": 1,
}  # fmt: skip
"""Locale -> how often it is drawn."""

FIRST_DAY, LAST_DAY = date(1900, 1, 1), date(2099, 12, 31)
SHORT_YEARS = range(1950, 2050)
"""Years that may be written with two digits, so that '49 is 2049 and '50 is 1950."""
_HELD_OUT_EVERY, _HELD_OUT_PHASE = 37, 5

_YEAR_FIRST = ("y-MM-dd", "y-MM-dd", "y/MM/dd", "y.MM.dd", "yMMdd")
_WRITTEN = ("d MMMM y", "d MMM y", "d. MMMM y", "d-MMM-y", "EEE d MMM y", "EEEE d MMMM y", "d LLLL y")
_WRITTEN_IN_ENGLISH = (
    "MMMM d y", "MMMM d, y", "MMM d, y", "MMM d y", "d 'of' MMMM y", "'the' d 'of' MMMM, y", "MMMM 'the' d, y",
    "EEE MMM d, y", "y MMMM d",
)  # fmt: skip
_NOT_DECOMPOSED = str.maketrans("łŁøØıæÆ", "lLoOiaA")


@dataclass(frozen=True, slots=True)
class Example:
    source: str
    target: str
    readings: tuple[str, ...]
    """Every right answer: two when only the writer knows which number is the month."""


def training_pairs(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Ambiguous sources come with the reading of whoever wrote them, so a model learns how likely each is."""
    random = Random(f"dates, training, {seed}")
    for _ in range(count):
        example = make_example(random, held_out=False)
        yield example.source, example.target


def held_out_pairs(seed: int, count: int) -> Iterator[tuple[str, str]]:
    random = Random(f"dates, held out, {seed}")
    while count > 0:
        example = make_example(random, held_out=True)
        if len(example.readings) == 1:
            yield example.source, example.target
            count -= 1


def is_held_out(day: date) -> bool:
    return day.toordinal() % _HELD_OUT_EVERY == _HELD_OUT_PHASE


def make_example(random: Random, *, held_out: bool) -> Example:
    day = _random_day(random)
    while is_held_out(day) != held_out:
        day = _random_day(random)
    locale = random.choices(list(LOCALES), list(LOCALES.values()))[0]
    pattern = random.choice(random.choice(_patterns(locale)))
    readings = {day.isoformat()}
    if _is_ambiguous(pattern) and day.day <= 12:
        readings.add(date(day.year, day.day, day.month).isoformat())
    pattern = _vary_day(_vary_year(pattern, day, random), day, locale, random)
    text = _vary_text(format_date(day, pattern, locale=locale), random)
    return Example(text, day.isoformat(), tuple(sorted(readings)))


def misspellings(word: str) -> list[str]:
    """Every slip of one key: two letters swapped, one struck twice; in long words one missed (in short ones, juli is juni)."""
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)]
    doubled = [word[:i] + word[i] + word[i:] for i in range(len(word))]
    missed = [word[:i] + word[i + 1 :] for i in range(len(word))] if len(word) >= 7 else []
    return swapped + doubled + missed


def without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text.translate(_NOT_DECOMPOSED))
    return "".join(letter for letter in decomposed if unicodedata.category(letter) != "Mn")


def _random_day(random: Random) -> date:
    """Half of the days are recent, as in life."""
    first, last = (FIRST_DAY, LAST_DAY) if random.random() < 0.5 else (date(1990, 1, 1), date(2035, 12, 31))
    return date.fromordinal(random.randint(first.toordinal(), last.toordinal()))


@cache
def _patterns(locale_name: str) -> tuple[tuple[str, ...], ...]:
    """The locale's patterns in the syntax of CLDR, by kind; the kinds are drawn equally often."""
    locale = Locale.parse(locale_name)
    official = [locale.date_formats[width].pattern for width in ("full", "long", "medium", "short")]
    skeletons = [locale.datetime_skeletons.get(name) for name in ("yMMMd", "yMMMEd", "yMd", "yMEd")]
    official += [skeleton.pattern for skeleton in skeletons if skeleton]
    if locale.language in ("ja", "zh"):
        return tuple(official), _YEAR_FIRST
    month_first = locale_name == "en_US"
    orders = (("M", "d"), ("MM", "dd")) if month_first else (("d", "M"), ("dd", "MM"))
    separators = "/-" if month_first else "/-. "  # dots are day first everywhere: 3.4.2026 has one reading
    numeric = [separator.join((*order, "y")) for separator in separators for order in orders]
    written = _WRITTEN + _WRITTEN_IN_ENGLISH if locale.language == "en" else _WRITTEN
    return tuple(official), tuple(official), written, written, tuple(numeric), tuple(numeric), _YEAR_FIRST


def _is_ambiguous(pattern: str) -> bool:
    """Whether the pattern has numbers alone, in an order that other countries read another way."""
    return not _has_year_first(pattern) and re.search("MMM|LLL|[.]", pattern) is None


def _has_year_first(pattern: str) -> bool:
    return re.findall("[yMLd]", pattern)[0] == "y"


def _vary_year(pattern: str, day: date, random: Random) -> str:
    """Two digits only where they are understood: in years near ours, and not at the front."""
    if "yy" in pattern:
        return pattern if day.year in SHORT_YEARS else pattern.replace("yy", "y")
    if _has_year_first(pattern) or day.year not in SHORT_YEARS or random.random() > 0.2:
        return pattern
    return pattern.replace("y", "''yy" if "MMM" in pattern and random.random() < 0.3 else "yy")


def _vary_day(pattern: str, day: date, locale: str, random: Random) -> str:
    """3rd, 1er, 1º: in front of or behind the name of a month."""
    ordinal = ""
    if locale.startswith("en"):
        ordinal = "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    elif day.day == 1:
        ordinal = {"fr": "er", "es": "º", "it": "º", "pt": "º"}.get(locale, "")
    if not ordinal or "MMM" not in pattern or random.random() < 0.6:
        return pattern
    return re.sub(r"(?<!\w)d(?!\w)", f"d'{ordinal}'", pattern)


def _vary_text(text: str, random: Random) -> str:
    """What hands do to a date: case, accents, punctuation, spaces, typing errors."""

    def happens(probability: float) -> bool:
        return random.random() < probability

    if happens(0.25):
        text = random.choice((str.lower, str.lower, str.upper))(text)
    if happens(0.12):
        text = without_accents(text)
    if happens(0.12):
        text = text.replace(",", "")
    if happens(0.12):
        text = re.sub(r"\.(?!\d)", "", text)
    if happens(0.06):
        text = text.replace(". ", ".")
    if happens(0.06) and (words := re.findall(r"[^\W\d_]{5,}", text)):
        word = random.choice(words)
        text = text.replace(word, random.choice(misspellings(word)), 1)
    if happens(0.06):
        text = text.replace(" ", "  ", 1)
    if happens(0.06):
        text = random.choice((" {}", "{} ", "{}.")).format(text)
    return text
