import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer, TokenizerError

TEXTS = ["the lower the newest", "wide wider widest", "März, 3. Mär 2026", "naïve café — 東京 🙂", "low lower lowest"]
READABLE = st.text(st.characters(exclude_categories=["Cs"]))


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Sennrich et al. 2016, algorithm 1, with the end of the word on its last letter as in subword-nmt 0.2."""
    words = Counter((*word[:-1], word[-1] + "</w>") for text in texts for word in text.split(" "))
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, frequency in words.items():
            for pair in pairwise(word):
                pairs[pair] += frequency
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = Counter({tuple(merge(list(word), merges[-1])): frequency for word, frequency in words.items()})
    return merges


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """From left to right; a piece made here is not merged again."""
    merged, i = list[str](), 0
    while i < len(pieces):
        size = 2 if tuple(pieces[i : i + 2]) == pair else 1
        merged.append("".join(pieces[i : i + size]))
        i += size
    return merged


def segment(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """subword-nmt's way: the earliest merge that applies, everywhere in the word, until none does."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while applicable := [pair for pair in pairwise(pieces) if pair in merges]:
        pieces = merge(pieces, min(applicable, key=merges.index))
    return pieces


MERGES = learn_merges(TEXTS, 25)
CODES = ["#version: 0.2", *(f"{left} {right}" for left, right in MERGES), ""]
TOKENIZERS = {
    "bpe": Tokenizer.train_bpe(TEXTS * 3, 300),
    "bpe with a space in front": Tokenizer.train_bpe(TEXTS * 3, 300, prefix_space=True),
    "characters": Tokenizer.train_characters(TEXTS),
    "subword_nmt": Tokenizer.from_subword_nmt(CODES, TEXTS),
}
every_kind = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))


@given(READABLE)
def test_byte_level_bpe_takes_any_text_there_and_back(text: str) -> None:
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


@given(st.text("".join(sorted(set("".join(TEXTS))))))
def test_known_characters_go_there_and_back(text: str) -> None:
    tokenizer = TOKENIZERS["characters"]
    ids = tokenizer.encode_text(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


@every_kind
@given(data=st.data())
def test_a_stream_says_what_decode_says(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any ids, special and impossible ones too, in pieces of any size: broken UTF-8 must not lose or double a character."""
    chunks = data.draw(st.lists(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=4)))
    stream = tokenizer.stream()
    text = "".join([stream.push(chunk) for chunk in chunks]) + stream.flush()
    assert text == tokenizer.decode([i for chunk in chunks for i in chunk])


@given(READABLE)
def test_a_stream_never_splits_a_character(text: str) -> None:
    tokenizer = TOKENIZERS["bpe"]
    stream = tokenizer.stream()
    pushed = [stream.push([i]) for i in tokenizer.encode_text(text)]
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pushed)
        assert stream.flush() == ""


def test_special_tokens_have_fixed_ids_and_no_text() -> None:
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.pieces([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<unk>"]
        assert tokenizer.decode([0, 1, 2, 3]) == ""
        assert tokenizer.encode_source("low")[-1] == tokenizer.EOS
        assert tokenizer.EOS not in tokenizer.encode_text("low")


@every_kind
def test_the_spelling_of_a_special_token_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text("</s> <pad> <end-of-vocabulary>")
    assert len(ids) > 3
    assert not {tokenizer.PAD, tokenizer.BOS, tokenizer.EOS} & set(ids)


def test_a_first_word_can_be_spelled_as_any_other() -> None:
    tokenizer = TOKENIZERS["bpe with a space in front"]
    assert tokenizer.encode_text("lower") * 2 == tokenizer.encode_text("lower lower")
    assert tokenizer.decode(tokenizer.encode_text("lower lower")) == "lower lower"


def test_each_unknown_character_is_unk() -> None:
    tokenizer = TOKENIZERS["characters"]
    assert tokenizer.encode_text("l☃☃o") == [*tokenizer.encode_text("l"), 3, 3, *tokenizer.encode_text("o")]


def test_normalization_joins_what_looks_alike() -> None:
    tokenizer = Tokenizer.train_characters(["März 3"], "nfkc")
    assert tokenizer.encode_text("Ma\u0308rz ３") == tokenizer.encode_text("März 3")


@given(st.text("lowernstid", min_size=1, max_size=12))
def test_subword_nmt_segments_as_subword_nmt(word: str) -> None:
    tokenizer = TOKENIZERS["subword_nmt"]
    known = set(tokenizer.pieces(range(tokenizer.vocab_size)))
    expected = [piece if piece in known else "<unk>" for piece in segment(word, MERGES)]
    assert tokenizer.pieces(tokenizer.encode_text(word)) == expected


def test_subword_nmt_keeps_the_pieces_in_use_most_frequent_first() -> None:
    used = Counter(piece for text in TEXTS for word in text.split(" ") for piece in segment(word, MERGES))
    tokenizer = TOKENIZERS["subword_nmt"]
    pieces = tokenizer.pieces(range(4, tokenizer.vocab_size))
    assert set(pieces) == set(used)
    assert [used[piece] for piece in pieces] == sorted(used.values(), reverse=True)
    assert all(tokenizer.decode(tokenizer.encode_text(text)) == text for text in TEXTS)


@pytest.mark.parametrize(
    ("codes", "problem"),
    [([], "version"), (["l o", "lo w"], "version"), (["#version: 0.2", "l o w"], "line 2")],
)
def test_damaged_merges_are_refused(codes: list[str], problem: str) -> None:
    with pytest.raises(TokenizerError, match=problem):
        Tokenizer.from_subword_nmt(codes, TEXTS)


@every_kind
def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == tokenizer.vocab_size
    assert [loaded.encode_text(text) for text in TEXTS] == tokenizer.encode_texts(TEXTS)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_damaged_file_is_refused_with_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as refusal:
        Tokenizer.load(path)
    assert "\n" not in str(refusal.value)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(TokenizerError, match="at least 260"):
        Tokenizer.train_bpe(TEXTS, 100)


def test_training_again_gives_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Tokenizer.train_bpe(TEXTS * 3, 300).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_tokenizer_needs_no_torch() -> None:
    code = "import sys, model.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
