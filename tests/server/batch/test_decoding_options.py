"""Decoding options from a caller to the engine and back, against the reference decoder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from model.decode import Hypothesis, beam_search, greedy, sample
from model.decoding_rules import Rules
from server.client import CallError, Options, Sampling, StreamedGeneration, StreamedText, TransformerClient
from server.client.__main__ import app
from server.engines.in_process import InProcessEngine
from server.requests import GenerationDefaults, Limits
from tests import tiny
from tests.server.batch.test_engine_options import engine
from tests.server.run_server import Running, run_server, served_model

TOKENIZER = tiny.TOKENIZER
MODEL = tiny.model(tiny.shape("encoder_decoder"))
SOURCES = ["harbour", "0", "x9kq2", "lighthouse4", "no7", "zz3zz"]


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    tiny.graphs(tiny.shape("encoder_decoder"))  # exported before the clock of the server's start runs
    real = InProcessEngine("tiny", lambda: cast(Any, engine("encoder_decoder")), lambda stats: None)
    model = served_model(
        cast(Any, real),
        name="tiny",
        tokenizer=TOKENIZER,
        vocab_size=TOKENIZER.vocab_size,
        limits=Limits(max_inputs=8, max_text_bytes=200, max_input_tokens=24, max_output_tokens=24, max_beams=8),
        defaults=GenerationDefaults(max_tokens=20),
    )
    async with run_server(model) as running:
        yield running


@pytest.fixture
async def client(running: Running) -> AsyncIterator[TransformerClient]:
    async with TransformerClient(running.target, timeout=20) as client:
        yield client


def ids(text: str) -> list[int]:
    return TOKENIZER.encode_source(text)


def spoken(hypothesis: Hypothesis, rules: Rules) -> str:
    """The text of a hypothesis without what stopped it."""
    tokens = hypothesis.tokens
    begin = rules.stop(tokens)
    text = TOKENIZER.decode(tokens[:-1] if tokens[-1] in rules.stop_tokens else tokens)
    return text if begin is None else text[:begin]


ADJUSTED = {
    "repetition_penalty": 1.4,
    "frequency_penalty": 0.3,
    "presence_penalty": -0.2,
    "no_repeat_ngram": 2,
    "token_bias": {7: 3.0, 20: -4.0},
    "suppressed_tokens": [9, 12],
    "stop_tokens": [15, 30],
    "stop_strings": ["k", "r7", "ab"],
}
RULES = Rules(**ADJUSTED, decode=TOKENIZER.decode)  # type: ignore[arg-type]


async def test_every_option_reaches_every_kind_of_request(client: TransformerClient) -> None:
    adjusted = Options(**ADJUSTED, beams=1)  # type: ignore[arg-type]
    beams = Options(**ADJUSTED, beams=4, hypotheses=4, length_penalty=0.6)  # type: ignore[arg-type]
    drawn = Options(**ADJUSTED, sampling=Sampling(seed=5, min_p=0.1, temperature=1.5), hypotheses=2)  # type: ignore[arg-type]
    found = await asyncio.gather(*(client.generate(SOURCES, one, return_tokens=True) for one in (adjusted, beams, drawn)))
    reasons = set()
    for i, source in enumerate(map(ids, SOURCES)):
        wanted = [
            [greedy(MODEL, source, 20, rules=RULES)],
            beam_search(MODEL, source, beams=4, max_tokens=20, length_penalty=0.6, rules=RULES),
            [
                sample(MODEL, source, max_tokens=20, seed=5 + i, sample_index=n, temperature=1.5, min_p=0.1, rules=RULES)
                for n in range(2)
            ],
        ]
        for results, hypotheses in zip(found, wanted, strict=True):
            for told, want in zip(results[i].hypotheses, hypotheses, strict=True):
                assert [token.id for token in told.tokens] == want.tokens
                assert told.text == spoken(want, RULES)
                assert told.score == pytest.approx(want.score, abs=1e-4)
                assert told.log_probability == pytest.approx(want.log_probability, abs=1e-4)
                reasons.add(told.finish_reason)
    assert reasons >= {"stop", "end_of_text"}


@pytest.mark.parametrize("beams", [1, 4])
async def test_streamed_text_ends_before_the_stop_and_nothing_is_taken_back(client: TransformerClient, beams: int) -> None:
    options = Options(**ADJUSTED, beams=beams)  # type: ignore[arg-type]
    texts = dict.fromkeys(range(len(SOURCES)), "")
    results = {}
    async for event in client.stream(SOURCES, options):
        if isinstance(event, StreamedText):
            assert event.input not in results
            texts[event.input] += event.text
        elif isinstance(event, StreamedGeneration):
            results[event.input] = event.generation
    for i, source in enumerate(map(ids, SOURCES)):
        want = beam_search(MODEL, source, beams=beams, max_tokens=20, rules=RULES)[0]
        assert texts[i] == results[i].text == spoken(want, RULES)


async def test_the_log_probability_is_the_models_own_as_score_gives_it(client: TransformerClient) -> None:
    options = Options(repetition_penalty=2.0, token_bias={5: 4.0}, beams=1, ignore_end_of_text=True, max_tokens=9)
    (result,) = await client.generate(["harbour"], options, return_tokens=True)
    (told,) = result.hypotheses
    assert (told.finish_reason, told.token_count) == ("length", 9)
    (scored,) = await client.score([("harbour", [token.id for token in told.tokens])])
    assert told.log_probability == pytest.approx(scored.log_probability, abs=1e-4)
    assert told.score != pytest.approx(told.log_probability / 9, abs=1e-2)


@pytest.mark.parametrize("beams", [1, 2])
async def test_alternatives_at_a_position(client: TransformerClient, beams: int) -> None:
    options = Options(beams=beams, alternatives=4)
    results = await client.generate(SOURCES, options, target_prefix="ab", return_tokens=True)
    streamed = ["" for _ in range(4)]
    async for event in client.stream(SOURCES[:1], options, target_prefix="ab"):
        if isinstance(event, StreamedText):
            streamed[event.hypothesis] += event.text
    assert streamed == [hypothesis.text for hypothesis in results[0].hypotheses]
    for source, result in zip(map(ids, SOURCES), results, strict=True):
        prefix = TOKENIZER.encode_text("ab")
        firsts = [told.tokens[2] for told in result.hypotheses]
        scores = [token.log_probability for token in firsts]
        assert len({token.id for token in firsts}) == 4
        assert scores == sorted(scores, reverse=True)
        assert firsts[0].id == greedy(MODEL, source, 3, rules=Rules(prefix=prefix)).tokens[2]
        for told, first in zip(result.hypotheses, firsts, strict=True):
            ended = first.id == TOKENIZER.EOS
            rules = Rules(prefix=[*prefix, first.id])
            want = (
                [*prefix, first.id] if ended else beam_search(MODEL, source, beams=beams, max_tokens=20, rules=rules)[0].tokens
            )
            assert [token.id for token in told.tokens] == want


async def test_every_output_contains_the_required_phrases(client: TransformerClient) -> None:
    options = Options(beams=5, hypotheses=5, required_phrases=["zebra", [4, 5], "9"], length_penalty=0.6)
    phrases = [TOKENIZER.encode_text("zebra"), [4, 5], TOKENIZER.encode_text("9")]
    results = await client.generate(SOURCES, options, return_tokens=True)
    for source, result in zip(map(ids, SOURCES), results, strict=True):
        rules = Rules(required_phrases=phrases)
        wanted = beam_search(MODEL, source, beams=5, max_tokens=20, length_penalty=0.6, rules=rules)
        assert [[token.id for token in told.tokens] for told in result.hypotheses] == [want.tokens for want in wanted]
        assert all(part in told.text for told in result.hypotheses for part in ("zebra", TOKENIZER.decode([4, 5]), "9"))


async def test_every_wrong_option_is_named(client: TransformerClient) -> None:
    with pytest.raises(CallError) as error:
        await client.generate(
            ["a"],
            Options(
                repetition_penalty=0.0,
                token_bias={5: 1.0, 40: 1e9},
                suppressed_tokens=[99],
                stop_strings=["", "b"],
                sampling=Sampling(min_p=2.0),
            ),
        )
    assert [violation.field for violation in error.value.violations] == [
        "options.sampling.min_p",
        "options.stop_strings[0]",
        "options.suppressed_tokens",
        "options.token_bias",
        "options.token_bias[1].bias",
        "options.repetition_penalty",
    ]


async def test_options_from_a_terminal(running: Running) -> None:
    def call(*arguments: str) -> str:
        return CliRunner().invoke(app, ["--target", running.target, *arguments]).output

    flags = [
        "--repetition-penalty",
        "1.4",
        "--frequency-penalty",
        "0.3",
        "--presence-penalty",
        "-0.2",
        "--no-repeat-ngram",
        "2",
    ]
    flags += ["--token-bias", "7=3", "--token-bias", "20=-4", "--suppress", "9", "--suppress", "12"]
    flags += ["--stop-token", "15", "--stop-token", "30", "--stop", "k", "--stop", "r7", "--stop", "ab"]
    for source in SOURCES[:3]:
        wanted = spoken(greedy(MODEL, ids(source), 20, rules=RULES), RULES)
        assert await asyncio.to_thread(call, "generate", "--beams", "1", *flags, source) == f"{wanted}\n"
        assert await asyncio.to_thread(call, "stream", "--beams", "1", *flags, source) == f"{wanted}\n"
    told = await asyncio.to_thread(call, "generate", "--beams", "4", "--require", "zebra", "--require", "42", "harbour")
    assert "zebra" in told
    assert "42" in told
    told = await asyncio.to_thread(call, "generate", "--alternatives", "3", "--prefix", "ab", "harbour")
    assert [line.split()[1][:2] for line in told.splitlines()] == ["ab"] * 3
    assert "must be ID=BIAS" in CliRunner().invoke(app, ["generate", "--token-bias", "7", "a"]).stderr
