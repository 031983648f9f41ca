from __future__ import annotations

import threading
from typing import Any

import pytest

from model.tokenizer import Tokenizer
from server.edge.door import Door
from server.requests import DecodingOptions, InvalidRequest, Limits, SamplingOptions
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import TOKENIZER, served_model


def door(**changes: Any) -> Door:
    return Door(served_model(FakeEngine(), **changes))


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode_text(text))


async def test_an_encoder_reads_text_with_its_end_and_ids_as_they_are() -> None:
    text, given = await door().check_generation("c", ["abc", (7, 8)], DecodingOptions())
    assert text.input_ids == (*ids("abc"), Tokenizer.EOS)
    assert given.input_ids == (7, 8)


async def test_a_decoder_only_model_reads_a_prompt_without_special_tokens() -> None:
    (request,) = await door(family="decoder_only").check_generation("c", ["abc"], DecodingOptions())
    assert request.input_ids == ids("abc")
    assert request.decoding.max_tokens == 47, "the default is shortened to what the context of 50 leaves"


async def test_request_ids_are_unique_even_where_callers_choose_the_same() -> None:
    shared = door()
    requests = await shared.check_generation("same", ["a", "b"], DecodingOptions())
    requests += await shared.check_generation("same", ["a"], DecodingOptions())
    assert len({request.id for request in requests}) == 3
    assert all(request.id.startswith("same#") for request in requests)


async def test_input_i_draws_with_seed_plus_i() -> None:
    options = DecodingOptions(sampling=SamplingOptions(seed=2**64 - 1))
    requests = await door().check_generation("c", ["a", "b", "c"], options)
    assert [request.decoding.sampling and request.decoding.sampling.seed for request in requests] == [2**64 - 1, 0, 1]


async def test_without_a_seed_each_call_draws_its_own() -> None:
    options, shared = DecodingOptions(sampling=SamplingOptions()), door()
    seeds = set()
    for _ in range(5):
        (request,) = await shared.check_generation("c", ["a"], options)
        assert request.decoding.sampling is not None
        seeds.add(request.decoding.sampling.seed)
    assert len(seeds) == 5


async def test_a_target_prefix_is_forced_on_every_output() -> None:
    requests = await door().check_generation("c", ["a", "b"], DecodingOptions(), target_prefix=" 20")
    assert [request.forced for request in requests] == [ids(" 20")] * 2


@pytest.mark.parametrize(
    ("family", "prefix", "max_tokens"),
    [("decoder_only", "a", 9), ("encoder_decoder", "abc", 3), ("encoder_decoder", "a\0", 9), ("encoder_decoder", "a" * 300, 9)],
)
async def test_a_target_prefix_that_cannot_be_forced_is_refused(family: str, prefix: str, max_tokens: int) -> None:
    with pytest.raises(InvalidRequest, match="^target_prefix: "):
        await door(family=family).check_generation("c", ["a"], DecodingOptions(max_tokens=max_tokens), target_prefix=prefix)


async def test_every_wrong_input_and_option_is_named_at_once() -> None:
    with pytest.raises(InvalidRequest) as refused:
        await door().check_generation("c", ["ok", "", None, (), "a\0"], DecodingOptions(beams=0))
    assert [violation.field for violation in refused.value.violations] == [
        "inputs[1].text",
        "inputs[2]",
        "inputs[3].tokens",
        "inputs[4].text",
        "options.beams",
    ]


async def test_tokens_are_counted_after_the_text_is_tokenised() -> None:
    with pytest.raises(InvalidRequest) as refused:
        await door().check_generation("c", ["a" * 40, (5,) * 41, (TOKENIZER.vocab_size,)], DecodingOptions())
    assert [(violation.field, violation.description) for violation in refused.value.violations] == [
        ("inputs[0].text", "has 41 tokens, more than the limit of 40"),
        ("inputs[1].tokens", "has 41 tokens, more than the limit of 40"),
        ("inputs[2].tokens", f"token id {TOKENIZER.vocab_size} is not in the vocabulary of {TOKENIZER.vocab_size}"),
    ]


async def test_nothing_is_tokenised_before_the_cheap_checks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Tokenizer, "encode_text", lambda self, text: seen.append(text) or [5])
    with pytest.raises(InvalidRequest):
        await door().check_generation("c", ["fine", "x" * 201], DecodingOptions())
    with pytest.raises(InvalidRequest):
        await door().check_generation("c", ["fine"], DecodingOptions(beams=0))
    with pytest.raises(InvalidRequest):
        await door().check_generation("c", ["fine"] * 9, DecodingOptions())
    assert seen == []


async def test_long_texts_are_tokenised_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(Tokenizer, "encode_text", lambda self, text: threads.append(threading.current_thread()) or [5])
    roomy = door(limits=Limits(max_text_bytes=10_000, max_input_tokens=9, max_output_tokens=9))
    await roomy.check_generation("c", ["short"], DecodingOptions())
    await roomy.check_generation("c", ["long" * 2000], DecodingOptions())
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


async def test_scoring_forces_the_whole_target_and_its_end() -> None:
    text, given = await door().check_scoring("c", [("ab", "cd"), ((5, 6), (7,))])
    assert (text.input_ids, text.forced) == ((*ids("ab"), Tokenizer.EOS), (*ids("cd"), Tokenizer.EOS))
    assert (given.input_ids, given.forced) == ((5, 6), (7,))
    assert text.forced_only
    assert text.decoding.max_tokens == 3


async def test_a_decoder_only_model_scores_a_continuation_that_fits_its_context() -> None:
    model = door(family="decoder_only")
    (request,) = await model.check_scoring("c", [("ab", "cd")])
    assert (request.input_ids, request.forced) == (ids("ab"), ids("cd"))
    with pytest.raises(InvalidRequest, match=r"^pairs\[0\]\.target\.text: has 30 tokens, more than the limit of 20$"):
        await model.check_scoring("c", [("a" * 30, "b" * 30)])


def phrases(*given: Any, **options: Any) -> DecodingOptions:
    return DecodingOptions(**{"beams": 2, "max_tokens": 10, "required_phrases": given, **options})


async def test_required_phrases_are_tokens_of_a_target_each_once() -> None:
    (request,) = await door().check_generation("c", ["a"], phrases("de", (7, 8), "de"))
    assert request.decoding.required_phrases == (ids("de"), (7, 8))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (phrases("ab", None, "", ()), "options.required_phrases[1]: must have text or tokens"),
        (phrases("ab", ""), "options.required_phrases[1].text: must not be empty or blank"),
        (phrases("ab", ()), "options.required_phrases[1].tokens: must not be empty"),
        (phrases("a" * 11), "options.required_phrases[0].text: has 11 tokens, more than the limit of 10"),
        (phrases((999,)), "options.required_phrases[0].tokens: token id 999 is not in the vocabulary"),
        (phrases("ß"), "options.required_phrases[0].text: has characters that the model cannot write"),
        (phrases((7, 2)), "options.required_phrases[0].tokens: contains token 2, which is suppressed or ends an output"),
        (phrases((7,), suppressed_tokens=(7,)), "contains token 7, which is suppressed or ends an output"),
        (phrases((7,), stop_tokens=(7,)), "contains token 7, which is suppressed or ends an output"),
        (phrases("abcdef", "ghijk"), "options.required_phrases: need 11 tokens, more than the 10 an output has for them"),
        (phrases(*((i,) * 8 for i in range(4, 13)), max_tokens=50), "has 72 tokens, more than the limit of 64"),
    ],
)
async def test_phrases_that_no_output_could_contain_are_refused(options: DecodingOptions, complaint: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await door().check_generation("c", ["a"], options)
    assert complaint in str(refused.value)


async def test_what_a_prefix_has_of_a_phrase_need_not_be_written_again() -> None:
    wanted = phrases("abcde", "fghij")
    await door().check_generation("c", ["a"], wanted)
    with pytest.raises(InvalidRequest, match="need 10 tokens, more than the 9 "):
        await door().check_generation("c", ["a"], wanted, target_prefix="x")
    await door().check_generation("c", ["a"], wanted, target_prefix="abc")


async def test_a_prompt_leaves_less_room_for_phrases() -> None:
    """A default length is shortened to what the context leaves; the promise is about that."""
    options = phrases("abcdef", max_tokens=None)
    await door(family="decoder_only").check_generation("c", ["a" * 40], options)
    with pytest.raises(InvalidRequest, match="need 12 tokens, more than the 10 "):
        await door(family="decoder_only").check_generation("c", ["a" * 40], phrases("abcdef", "ghijkl", max_tokens=None))


async def test_too_many_alternatives_for_the_vocabulary_are_refused() -> None:
    narrow = door(vocab_size=10)
    await narrow.check_generation("c", [(5,)], DecodingOptions(alternatives=4))
    with pytest.raises(InvalidRequest, match=r"^options\.alternatives: leave too few"):
        await narrow.check_generation("c", [(5,)], DecodingOptions(alternatives=4, suppressed_tokens=(4, 5, 6, 7, 8, 9)))


async def test_tokenize_has_no_limit_of_tokens() -> None:
    assert await door().tokenize(["a" * 100]) == [(*ids("a" * 100), Tokenizer.EOS)]
    with pytest.raises(InvalidRequest, match=r"^texts\[1\]: "):
        await door().tokenize(["a", ""])
