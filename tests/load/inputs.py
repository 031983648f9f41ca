"""What is sent: dates as people write them, made by code, or the lines of a file."""

from __future__ import annotations

import random
from datetime import date, timedelta
from pathlib import Path

MAX_FILE_BYTES = 64 * 2**20

_MONTHS = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
}
_FORMATS = [
    ("en", "{month} {d}, {y}"),
    ("en", "{d} {month} {y}"),
    ("en", "{short} {d} {y}"),
    ("de", "{d}. {month} {y}"),
    ("de", "{d:02}.{m:02}.{y}"),
    ("fr", "{d} {month} {y}"),
    ("es", "{d} de {month} de {y}"),
    ("en", "{y}/{m:02}/{d:02}"),
]


class InputError(ValueError):
    """A file of inputs that cannot be used; one line, what and where."""


def dates(count: int, seed: int) -> list[str]:
    """``count`` dates between 1950 and 2050 in a handful of languages and formats, for the built-in dates model."""
    choose = random.Random(seed)
    first = date(1950, 1, 1)
    texts = []
    for _ in range(count):
        day = first + timedelta(days=choose.randrange(36_500))
        language, form = choose.choice(_FORMATS)
        month = _MONTHS[language].split()[day.month - 1]
        texts.append(form.format(d=day.day, m=day.month, y=day.year, month=month, short=month[:3]))
    return texts


def read_lines(path: Path) -> list[str]:
    """The file's lines that are not blank.

    Raises:
        InputError: when there is nothing to read or it is not UTF-8 text.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    texts = [line for line in lines if line]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return texts
