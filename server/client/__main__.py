"""``python -m server.client``: the service from a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from inspect import Signature, signature
from typing import Annotated, Any

import typer

from server.client import show
from server.client.errors import CallError
from server.client.synchronous import SyncTransformerClient
from server.client.types import Options, Sampling, StreamedText

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help="Calls a Transformer service."
)

Texts = Annotated[list[str], typer.Argument(help="One or several texts.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print everything, one JSON object for each result.")]
Beams = Annotated[int | None, typer.Option(help="Width of the beam search.", show_default="model's own")]
Hypotheses = Annotated[int | None, typer.Option(help="Hypotheses (or samples) for each text.", show_default="1")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest output in tokens.", show_default="model's own")]
MinTokens = Annotated[int | None, typer.Option(help="Shortest output in tokens.", show_default="0")]
LengthPenalty = Annotated[float | None, typer.Option(help="Exponent of the length penalty.", show_default="model's own")]
CoveragePenalty = Annotated[
    float | None,
    typer.Option(help="Prefers hypotheses that leave nothing of the source out; needs beams.", show_default="0"),
]
ShowAlignment = Annotated[
    bool, typer.Option("--alignment", help="Show after each output the source token of each of its tokens: source-output.")
]
Temperature = Annotated[float | None, typer.Option(help="Draw at random, logits divided by this.", show_default=False)]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.", show_default=False)]
TopP = Annotated[float | None, typer.Option(help="Draw from the tokens that hold this probability.", show_default=False)]
MinP = Annotated[
    float | None,
    typer.Option(help="Draw from tokens of this share of the best one's probability.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Draw with this seed.", show_default=False)]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1, tokens already written become rarer.", show_default="1")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Taken from a token's logit each time it was written.", show_default="0")
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Taken once from the logit of a token already written.", show_default="0")
]
NoRepeatNgram = Annotated[
    int | None, typer.Option(help="No sequence of this many tokens comes twice.", show_default="0, all may")
]
TokenBias = Annotated[
    list[str], typer.Option(help="Adds to the logit of a token; may be repeated.", metavar="ID=BIAS", show_default=False)
]
Suppress = Annotated[
    list[int], typer.Option(help="A token that is never written; may be repeated.", metavar="ID", show_default=False)
]
StopToken = Annotated[
    list[int], typer.Option(help="A token that ends the output; may be repeated.", metavar="ID", show_default=False)
]
Stop = Annotated[
    list[str], typer.Option(help="A string before which the output ends; may be repeated.", metavar="TEXT", show_default=False)
]
Require = Annotated[
    list[str],
    typer.Option(help="A phrase that every output contains; may be repeated; needs beams.", metavar="TEXT", show_default=False),
]
Alternatives = Annotated[
    int | None,
    typer.Option(help="Complete each of so many next tokens, after --prefix if there is one.", show_default=False),
]
IgnoreEndOfText = Annotated[bool, typer.Option("--ignore-end-of-text", help="Go on to a stop or to the longest output.")]
Prefix = Annotated[str, typer.Option(help="What every output must begin with.", show_default=False)]


@dataclass(frozen=True, slots=True)
class Connection:
    """Where and how to call, given before the command."""

    target: str
    model: str
    timeout: float

    @contextmanager
    def open(self, *, watch_health: bool = True) -> Iterator[SyncTransformerClient]:
        """A failed call becomes one line on standard error: exit code 2 when the caller must change it, 1 when not."""
        try:
            with SyncTransformerClient(
                self.target, model=self.model, timeout=self.timeout, watch_health=watch_health
            ) as client:
                yield client
        except CallError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2 if error.callers_fault else 1) from None


@app.callback()
def connect(
    context: typer.Context,
    target: Annotated[str, typer.Option(help="Address of the service.", metavar="HOST:PORT")] = "localhost:50051",
    model: Annotated[str, typer.Option(help="Model to call; needed when there are several.", show_default=False)] = "",
    timeout: Annotated[float, typer.Option(help="Seconds within which a call must end.", min=0.001)] = 30.0,
) -> None:
    context.obj = Connection(target, model, timeout)


def decoding_options(
    beams: Beams = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    length_penalty: LengthPenalty = None,
    coverage_penalty: CoveragePenalty = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    presence_penalty: PresencePenalty = None,
    no_repeat_ngram: NoRepeatNgram = None,
    token_bias: TokenBias = [],  # noqa: B006 (typer's way to say that there may be none)
    suppress: Suppress = [],  # noqa: B006
    stop_token: StopToken = [],  # noqa: B006
    stop: Stop = [],  # noqa: B006
    ignore_end_of_text: IgnoreEndOfText = False,
    require: Require = [],  # noqa: B006
) -> Options:
    """The flags that every command has that writes text."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    return Options(
        beams=beams,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        length_penalty=length_penalty,
        coverage_penalty=coverage_penalty,
        sampling=None if sampling == Sampling() else sampling,  # any of the five asks for it
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        no_repeat_ngram=no_repeat_ngram,
        token_bias=_biases(token_bias),
        suppressed_tokens=suppress,
        stop_tokens=stop_token,
        stop_strings=stop,
        ignore_end_of_text=ignore_end_of_text or None,
        required_phrases=require,
    )


def takes_decoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """In place of its parameter ``options`` the command takes the flags of ``decoding_options``."""
    own, flags = (signature(one, eval_str=True).parameters for one in (command, decoding_options))

    @wraps(command)
    def run(**given: Any) -> None:
        options = decoding_options(**{name: given.pop(name) for name in flags})
        command(options=options, **given)

    kept = [parameter for name, parameter in own.items() if name != "options"]
    positional, named = ([p for p in kept if (p.default is p.empty) is needed] for needed in (True, False))
    run.__signature__ = Signature([*positional, *flags.values(), *named])  # type: ignore[attr-defined]  # where typer looks
    return run


@app.command()
@takes_decoding_options
def generate(
    context: typer.Context,
    texts: Texts,
    options: Options,
    hypotheses: Hypotheses = None,
    alternatives: Alternatives = None,
    prefix: Prefix = "",
    alignment: ShowAlignment = False,
    json: Json = False,
) -> None:
    """Prints what the model writes; with several hypotheses or alternatives, each with its probability."""
    options = replace(options, hypotheses=hypotheses, alternatives=alternatives)
    with _client(context) as client:
        results = client.generate(
            texts, options, target_prefix=prefix, return_tokens=json, attention="alignment" if alignment else ""
        )
    typer.echo(show.as_json(results) if json else show.generations(results, every=(hypotheses or alternatives) is not None))


@app.command()
@takes_decoding_options
def stream(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="One text.", show_default=False)],
    options: Options,
    prefix: Prefix = "",
    json: Json = False,
) -> None:
    """Prints what the model writes, while it writes."""
    with _client(context) as client:
        for event in client.stream([text], options, target_prefix=prefix, return_tokens=json):
            if json:
                typer.echo(show.as_json([event]))
            elif isinstance(event, StreamedText):
                typer.echo(event.text, nl=False)
                sys.stdout.flush()
    if not json:
        typer.echo()


@app.command()
def classify(context: typer.Context, texts: Texts, json: Json = False) -> None:
    """Prints the probability of every class."""
    with _client(context) as client:
        results = client.classify(texts)
    typer.echo(show.as_json(results) if json else show.classifications(results))


@app.command()
def embed(
    context: typer.Context,
    texts: Texts,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale each vector to length 1.")] = False,
    json: Json = False,
) -> None:
    """Prints one vector for each text."""
    with _client(context) as client:
        results = client.embed(texts, normalize=normalize)
    typer.echo(show.as_json(results) if json else show.embeddings(results))


@app.command()
def score(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Source or prompt.", show_default=False)],
    target: Annotated[str, typer.Argument(help="What the model is asked to find probable.", show_default=False)],
    json: Json = False,
) -> None:
    """Prints the log-probability of a target."""
    with _client(context) as client:
        results = client.score([(source, target)], return_tokens=json)
    typer.echo(show.as_json(results) if json else show.scores(results))


@app.command()
def tokenize(context: typer.Context, texts: Texts, json: Json = False) -> None:
    """Prints the ids and pieces of each text."""
    with _client(context) as client:
        results = client.tokenize(texts)
    typer.echo(show.as_json(results) if json else show.tokenizations(results))


@app.command()
def models(context: typer.Context, json: Json = False) -> None:
    """Prints the models of the service and their limits."""
    with _client(context) as client:
        results = client.models()
    typer.echo(show.as_json(results) if json else show.models(results))


@app.command()
def health(context: typer.Context) -> None:
    """Prints SERVING, or NOT_SERVING with exit code 1."""
    connection: Connection = context.obj
    with connection.open(watch_health=False) as client:
        status = client.health()
    typer.echo(status)
    raise typer.Exit(0 if status == "SERVING" else 1)


def _client(context: typer.Context) -> AbstractContextManager[SyncTransformerClient]:
    connection: Connection = context.obj
    return connection.open()


def _biases(written: list[str]) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in (one.split("=") for one in written)}
    except ValueError:
        raise typer.BadParameter("must be ID=BIAS, as in 17=-2.5", param_hint="--token-bias") from None


if __name__ == "__main__":
    app(prog_name="python -m server.client")
