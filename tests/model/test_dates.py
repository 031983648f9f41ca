from collections import defaultdict
from datetime import date
from random import Random

import pytest
from babel import Locale

from model.tasks import dates


def test_pairs_depend_on_the_seed_alone() -> None:
    assert list(dates.training_pairs(7, 50)) == list(dates.training_pairs(7, 50))
    assert list(dates.training_pairs(7, 50)) != list(dates.training_pairs(8, 50))


def test_held_out_days_are_never_trained_on() -> None:
    trained = {date.fromisoformat(target) for _, target in dates.training_pairs(1, 3000)}
    held_out = {date.fromisoformat(target) for _, target in dates.held_out_pairs(1, 300)}
    assert not any(map(dates.is_held_out, trained))
    assert all(map(dates.is_held_out, held_out))


def test_held_out_sources_have_one_reading() -> None:
    """No held-out source may also be written for another day: the longest list of numbers shows it first."""
    readings = defaultdict(set)
    random = Random(1)
    for _ in range(30_000):
        example = dates.make_example(random, held_out=True)
        readings[example.source.strip(" .").casefold()].add(example.target)
    for source, target in dates.held_out_pairs(1, 3000):
        assert readings[source.strip(" .").casefold()] <= {target}


def test_ambiguous_sources_are_trained_with_both_readings() -> None:
    random = Random(1)
    examples = [dates.make_example(random, held_out=False) for _ in range(5000)]
    ambiguous = [example for example in examples if len(example.readings) == 2]
    assert all(example.target in example.readings for example in examples)
    month_first = sum(example.source.strip().startswith(f"{int(example.target[5:7]):02}") for example in ambiguous)
    assert len(ambiguous) > 300
    assert 0.1 < month_first / len(ambiguous) < 0.9


def test_no_name_or_slip_of_one_month_is_another_month() -> None:
    months = defaultdict(set)
    for name in dates.LOCALES:
        names = Locale.parse(name).months
        for form in ("format", "stand-alone"):
            for width in ("wide", "abbreviated"):
                for month, spelled in names[form][width].items():
                    word = spelled.casefold().strip(".")
                    for variant in {word, dates.without_accents(word)}:
                        months[variant].add(month)
                        if len(variant) >= 5:
                            for slip in dates.misspellings(variant):
                                months[slip].add(month)
    assert {spelled: numbers for spelled, numbers in months.items() if len(numbers) > 1} == {}


@pytest.mark.parametrize("locale", dates.LOCALES)
def test_every_locale_writes_dates(locale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dates, "LOCALES", {locale: 1})
    random = Random(2)
    for _ in range(200):
        example = dates.make_example(random, held_out=False)
        digits = "".join(letter for letter in example.source if letter.isdigit())
        assert example.target[2:4] in digits
        assert example.target[8:].lstrip("0") in digits
        assert len(example.source) <= 64


@pytest.mark.parametrize(
    ("text", "plain"), [("März", "Marz"), ("août", "aout"), ("października", "pazdziernika"), ("lørdag", "lordag")]
)
def test_accents_can_go_missing(text: str, plain: str) -> None:
    assert dates.without_accents(text) == plain
