"""Text to token ids and back: the same code in training and in the server, so it needs no torch.

A tokenizer is one ``tokenizer.json`` of the `tokenizers` library. Three kinds are made here: byte-level BPE, characters, and
the BPE of subword-nmt (Sennrich et al. 2016) from a published file of merges. Ids 0 to 3 are the same in all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
_END_OF_VOCABULARY = "<end-of-vocabulary>"
_WORD_END = "</w>"

Normalization = Literal["none", "nfc", "nfkc"]


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or made, in one line."""


class Tokenizer:
    """Encodes text to ids and decodes ids to text; ``decode(encode_text(text)) == text`` up to normalisation and <unk>."""

    PAD, BOS, EOS, UNK = 0, 1, 2, 3

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        if any(library.token_to_id(token) != i for i, token in enumerate(SPECIAL_TOKENS)):
            raise TokenizerError(f"ids 0 to 3 must be {' '.join(SPECIAL_TOKENS)}")
        library.encode_special_tokens = True  # "</s>" in a text is four characters, never the end of the text
        self._library = library
        end = library.token_to_id(_END_OF_VOCABULARY)
        self.vocab_size = library.get_vocab_size() if end is None else end
        """Number of ids (V). Ids from here on are steps on the way to longer pieces, unseen in training: they become <unk>."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Raises TokenizerError for a file that is missing, damaged or not made by this module."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path}: {getattr(error, 'strerror', None) or error}") from error

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"not a tokenizer: {error}") from error
        return cls(library)

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, normalization: Normalization = "none", *, prefix_space: bool = False
    ) -> Tokenizer:
        """Byte-level BPE (Radford et al. 2019): any text can be encoded, nothing is unknown, decoding is exact.

        Args:
            prefix_space: spell the first word of a text as any other, with a space in front, which decoding takes off again.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < len(SPECIAL_TOKENS) + len(alphabet):
            raise TokenizerError(f"vocab_size must be at least {len(SPECIAL_TOKENS) + len(alphabet)}, not {vocab_size}")
        library = tokenizers.Tokenizer(models.BPE())
        _normalize(library, normalization)
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        library.decoder = decoders.ByteLevel()
        if prefix_space:
            library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=list(SPECIAL_TOKENS), show_progress=False
        )
        library.train_from_iterator(texts, trainer)
        return cls(library)

    @classmethod
    def train_characters(cls, texts: Iterable[str], normalization: Normalization = "none") -> Tokenizer:
        """One id for each character of ``texts``, in code point order; any other character is <unk>."""
        library = tokenizers.Tokenizer(models.BPE())
        _normalize(library, normalization)
        normalizer = library.normalizer
        characters = {c for text in texts for c in (normalizer.normalize_str(text) if normalizer else text)}
        vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(characters)))}
        library.model = models.BPE(vocabulary, [], unk_token=SPECIAL_TOKENS[cls.UNK])
        library.add_special_tokens(list(SPECIAL_TOKENS))
        library.decoder = decoders.Fuse()
        return cls(library)

    @classmethod
    def from_subword_nmt(cls, codes: Iterable[str], texts: Iterable[str], *, every_piece: bool = False) -> Tokenizer:
        """The segmentation of subword-nmt, for text that is already tokenised and separated by single spaces.

        The vocabulary is the pieces that occur in ``texts``, the most frequent first, as fairseq's dictionary.

        Args:
            codes: lines of a subword-nmt file of merges, version 0.2.
            every_piece: then all others that merging may leave, for texts that are segmented with dropout.
        """
        merges = _read_merges(codes)
        words = Counter(word for text in texts for word in text.split(" ") if word)
        letters = sorted({letter for word in words for letter in word})
        steps = [letter + end for letter in letters for end in ("", _WORD_END)]
        steps += [piece for left, right in merges for piece in (left, right, left + right)]
        everything = _subword_nmt_library([*SPECIAL_TOKENS, *dict.fromkeys(steps)], merges)

        frequency: Counter[str] = Counter()
        for word, count in words.items():
            for piece in everything.encode(word).tokens:
                frequency[piece] += count
        used = [piece for piece, _ in frequency.most_common()]
        if every_piece:
            used += steps
        return cls(_subword_nmt_library([*SPECIAL_TOKENS, *used, _END_OF_VOCABULARY, *steps], merges))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """``from_json`` gives it back."""
        return str(self._library.to_str())

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a target or a prompt, without special tokens."""
        return self._known(self._library.encode(text, add_special_tokens=False).ids)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode_text`` of many texts, on all cores."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._known(encoding.ids) for encoding in encodings]

    def encode_source(self, text: str) -> list[int]:
        """What an encoder reads: the tokens of a source, then </s>."""
        return [*self.encode_text(text), self.EOS]

    def words(self, text: str) -> list[str]:
        """``text``, normalised and in the spelling of the vocabulary, cut where nothing is ever merged."""
        normalizer, splitter = self._library.normalizer, self._library.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        return [word for word, _ in splitter.pre_tokenize_str(text)] if splitter else [text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens leave nothing behind."""
        return self._library.decode(self._spoken(ids), skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own spelling of each id, for eyes and for the axes of an attention map."""
        return [self._library.id_to_token(i) or SPECIAL_TOKENS[self.UNK] for i in ids]

    def stream(self) -> TextStream:
        return TextStream(self.decode, self._spoken)

    def _known(self, ids: list[int]) -> list[int]:
        size = self.vocab_size
        return [i if i < size else self.UNK for i in ids]

    def _spoken(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if len(SPECIAL_TOKENS) <= i < self.vocab_size]


class TextStream:
    """Decodes ids as they come. What all calls return, joined, is ``decode`` of all ids; a character is never split."""

    def __init__(self, decode: Callable[[list[int]], str], spoken: Callable[[Iterable[int]], list[int]]) -> None:
        self._decode = decode
        self._spoken = spoken
        self._window: list[int] = []
        """The last id whose text is out (it decides about a space before the next one), then those still to be shown."""
        self._shown = 0
        """Characters of the window's text that are out."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become final. The first bytes of an unfinished character wait for its last one."""
        self._window += self._spoken(ids)
        text = self._decode(self._window)
        unfinished = text.endswith("\ufffd")
        new = text[self._shown : len(text) - unfinished]
        self._shown += len(new)
        if not unfinished and self._window:
            self._window = self._window[-1:]
            self._shown = len(self._decode(self._window))
        return new

    def copy(self) -> TextStream:
        """The same text so far, from here on continued by itself."""
        twin = TextStream(self._decode, self._spoken)
        twin._window, twin._shown = self._window.copy(), self._shown
        return twin

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        rest = self._decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return rest


def _normalize(library: tokenizers.Tokenizer, normalization: Normalization) -> None:
    if normalization != "none":
        library.normalizer = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}[normalization]()


def _read_merges(codes: Iterable[str]) -> list[tuple[str, str]]:
    lines = [line for line in codes if line.strip()]
    if not lines or lines[0].strip() != "#version: 0.2":
        raise TokenizerError("the first line of the merges must be '#version: 0.2'")
    merges: dict[tuple[str, str], None] = {}
    for number, line in enumerate(lines[1:], 2):
        pair = line.rstrip("\r\n ").split(" ")
        if len(pair) != 2:
            raise TokenizerError(f"line {number} of the merges must be two pieces, not {line!r}")
        merges.setdefault((pair[0], pair[1]))
    return list(merges)


def _subword_nmt_library(pieces: Iterable[str], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocabulary, merges, unk_token=SPECIAL_TOKENS[Tokenizer.UNK], end_of_word_suffix=_WORD_END)
    library = tokenizers.Tokenizer(model)
    library.add_special_tokens([token for token in (*SPECIAL_TOKENS, _END_OF_VOCABULARY) if token in vocabulary])
    library.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    library.decoder = decoders.BPEDecoder(suffix=_WORD_END)
    return library
