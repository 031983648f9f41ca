"""What the dashboard shows: every panel in a few words, each with the question it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

MODEL = 'namespace=~"$namespace", model=~"$model"'
QUANTILES = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
OUTCOME_COLOURS = {
    "ok": "green",
    "invalid": "light-yellow",
    "not_found": "yellow",
    "cancelled": "light-blue",
    "deadline": "orange",
    "rejected": "purple",
    "failed": "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel; ``queries`` pairs a PromQL expression with its legend."""

    title: str
    description: str
    queries: list[tuple[str, str]]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    colours: dict[str, str] = field(default_factory=dict)
    thresholds: tuple[tuple[float | None, str], ...] = ((None, "text"),)
    top: float | None = None
    """The axis ends here; None lets the data decide."""


def quantiles(histogram: str, by: str = "") -> list[tuple[str, str]]:
    """p50, p90 and p99 over all pods: histograms add up, percentiles of pods do not."""
    group = f"le, {by}" if by else "le"
    prefix = f"{{{{{by}}}}} " if by else ""
    return [
        (
            f"histogram_quantile({q}, sum by ({group}) (rate({histogram}_bucket{{{MODEL}}}[$__rate_interval])))",
            f"{prefix}{name}",
        )
        for q, name in QUANTILES
    ]


def rate(counter: str, more: str = "") -> str:
    return f"rate({counter}{{{MODEL}{more}}}[$__rate_interval])"


SECTIONS: list[tuple[str, list[Panel]]] = [
    (
        "At a glance",
        [
            Panel(
                title="Ready pods",
                description="Pods that answer calls now.",
                queries=[('sum(transformer_ready{namespace=~"$namespace"})', "ready")],
                kind="stat",
                width=4,
                height=4,
                thresholds=((None, "red"), (1, "green")),
            ),
            Panel(
                title="Calls/s",
                description="All methods, whatever their outcome.",
                queries=[(f"sum({rate('transformer_requests_total')})", "calls")],
                unit="reqps",
                kind="stat",
                width=4,
                height=4,
            ),
            Panel(
                title="Output tokens/s",
                description="What the engines emit.",
                queries=[(f"sum({rate('transformer_output_tokens_total')})", "tokens")],
                kind="stat",
                width=4,
                height=4,
            ),
            Panel(
                title="Calls without an answer",
                description="failed, rejected and deadline, as a share of the calls that could have been answered; 5 minutes.",
                queries=[(f"max(model:transformer_unavailable:ratio_rate5m{{{MODEL}}})", "share")],
                unit="percentunit",
                kind="stat",
                width=4,
                height=4,
                thresholds=((None, "green"), (0.001, "orange"), (0.0144, "red")),
            ),
            Panel(
                title="First token, p99",
                description="Streaming calls.",
                queries=quantiles("transformer_time_to_first_token_seconds")[-1:],
                unit="s",
                kind="stat",
                width=4,
                height=4,
                thresholds=((None, "green"), (0.5, "orange"), (1, "red")),
            ),
            Panel(
                title="Rows in use",
                description="Live rows over the rows there is room for. Requests wait once this is full.",
                queries=[(f"max(model:transformer_rows:utilization{{{MODEL}}})", "rows")],
                unit="percentunit",
                kind="stat",
                width=4,
                height=4,
                thresholds=((None, "green"), (0.75, "orange"), (0.95, "red")),
            ),
        ],
    ),
    (
        "What callers feel",
        [
            Panel(
                title="Time to first token",
                description="Streaming calls: from the call's arrival to its first token, queue included.",
                queries=quantiles("transformer_time_to_first_token_seconds"),
                unit="s",
            ),
            Panel(
                title="Inter-token latency",
                description="Streaming calls: between one token and the next. Peaks where prefill work joins decode steps.",
                queries=quantiles("transformer_inter_token_latency_seconds"),
                unit="s",
            ),
            Panel(
                title="Whole call, by method",
                description="From arrival to the end of the call, however it ended; p50 and p99.",
                queries=[
                    pair
                    for pair in quantiles("transformer_request_duration_seconds", by="method")
                    if not pair[1].endswith("p90")
                ],
                unit="s",
            ),
            Panel(
                title="Calls by outcome",
                description="rejected is overload, failed is ours, invalid and not_found are the caller's.",
                queries=[(f"sum by (outcome) ({rate('transformer_requests_total')})", "{{outcome}}")],
                unit="reqps",
                stacked=True,
                colours=OUTCOME_COLOURS,
                width=12,
            ),
            Panel(
                title="Errors by method and outcome",
                description="Everything but ok.",
                queries=[
                    (
                        "sum by (method, outcome) (" + rate("transformer_requests_total", ', outcome!="ok"') + ")",
                        "{{method}} {{outcome}}",
                    )
                ],
                unit="reqps",
                width=12,
            ),
        ],
    ),
    (
        "Queue and batch",
        [
            Panel(
                title="Requests running and waiting",
                description="Running requests own rows of the batch; waiting ones have been admitted and have none yet.",
                queries=[
                    (f"sum(transformer_requests_running{{{MODEL}}})", "running"),
                    (f"sum(transformer_requests_waiting{{{MODEL}}})", "waiting"),
                ],
            ),
            Panel(
                title="Input tokens waiting, by pod",
                description="What the HorizontalPodAutoscaler scales on.",
                queries=[(f"sum by (pod) (transformer_tokens_waiting{{{MODEL}}})", "{{pod}}")],
            ),
            Panel(
                title="Time in the queue",
                description="How long an input waited before it joined the batch.",
                queries=quantiles("transformer_queue_duration_seconds"),
                unit="s",
            ),
            Panel(
                title="Rows running and capacity",
                description="A row is one live hypothesis. At the capacity, requests wait.",
                queries=[
                    (f"sum(transformer_rows_running{{{MODEL}}})", "running"),
                    (f"sum(transformer_rows_capacity{{{MODEL}}})", "capacity"),
                ],
                colours={"capacity": "red"},
            ),
            Panel(
                title="Rows per step",
                description="The batch that a step really carried: the more rows share a step, the cheaper each token.",
                queries=[
                    (
                        f"sum by (model) ({rate('transformer_step_rows_total')})"
                        f" / (sum by (model) ({rate('transformer_steps_total')}) > 0)",
                        "{{model}}",
                    )
                ],
            ),
            Panel(
                title="Rows in use, by pod",
                description="Uneven pods mean clients that hold on to old connections.",
                queries=[
                    (
                        f"sum by (pod) (transformer_rows_running{{{MODEL}}})"
                        f" / (sum by (pod) (transformer_rows_capacity{{{MODEL}}}) > 0)",
                        "{{pod}}",
                    )
                ],
                unit="percentunit",
                top=1,
            ),
        ],
    ),
    (
        "Engine",
        [
            Panel(
                title="Step time",
                description="One iteration over all live rows.",
                queries=quantiles("transformer_step_duration_seconds"),
                unit="s",
            ),
            Panel(
                title="Where the step goes",
                description="runtime: inside ONNX Runtime. host: scheduling, choosing tokens, handing over.",
                queries=[
                    (
                        f"sum by (part) ({rate('transformer_step_seconds_total')})"
                        f" / scalar(sum({rate('transformer_step_seconds_total')}) > 0)",
                        "{{part}}",
                    )
                ],
                unit="percentunit",
                stacked=True,
                top=1,
            ),
            Panel(
                title="Time spent in steps, by pod",
                description="Share of the wall clock; near 100 % the device never rests.",
                queries=[(f"sum by (pod) ({rate('transformer_step_seconds_total')})", "{{pod}}")],
                unit="percentunit",
            ),
            Panel(
                title="Engines",
                description="Engines that can answer. One that is lost is replaced within seconds.",
                queries=[(f"sum by (model, pod) (transformer_engines_up{{{MODEL}}})", "{{model}} {{pod}}")],
            ),
            Panel(
                title="Engine processes replaced",
                description="Lost because they died, or stalled with work in hand. The server's log has the reason.",
                queries=[
                    (
                        f"sum by (model, reason) (increase(transformer_engine_restarts_total{{{MODEL}}}[5m]))",
                        "{{model}} {{reason}}",
                    )
                ],
            ),
            Panel(
                title="Front ends",
                description="Processes that take calls, and serve. One that is lost is replaced within seconds.",
                queries=[("sum by (pod) (transformer_front_ends_up)", "{{pod}}")],
            ),
            Panel(
                title="Front ends replaced",
                description="Lost because they died, or said nothing any more; only with --front-ends above 1.",
                queries=[("sum by (reason) (increase(transformer_front_end_restarts_total[5m]))", "{{reason}}")],
            ),
            Panel(
                title="Silence of an engine with work",
                description="Time since its last step. Its process is replaced when this reaches --stall-seconds.",
                queries=[(f"max by (model, pod) (transformer_engine_progress_age_seconds{{{MODEL}}})", "{{model}} {{pod}}")],
                unit="s",
            ),
            Panel(
                title="Tokens/s",
                description="Input tokens encoded or prefilled, output tokens emitted, and those of callers who left.",
                queries=[
                    (f"sum({rate('transformer_input_tokens_total')})", "input"),
                    (f"sum({rate('transformer_output_tokens_total')})", "output"),
                    (f"sum({rate('transformer_wasted_tokens_total')})", "wasted"),
                ],
            ),
            Panel(
                title="Input tokens of a request",
                description="What callers send.",
                queries=quantiles("transformer_request_input_tokens"),
            ),
            Panel(
                title="Output tokens of a hypothesis",
                description="What callers get.",
                queries=quantiles("transformer_request_output_tokens"),
            ),
        ],
    ),
    (
        "Objectives and models",
        [
            Panel(
                title="Error budget, burn rate",
                description="1 spends a month's budget (99.9 % answered) in a month. Pages at 14.4 (1 h) and 6 (6 h).",
                queries=[
                    (f"model:transformer_unavailable:ratio_rate{window}{{{MODEL}}} / 0.001", f"{{{{model}}}} {window}")
                    for window in ("1h", "6h", "3d")
                ],
            ),
            Panel(
                title="Latency budget, burn rate",
                description="1 spends a month's budget (99 % begin to answer in time) in a month.",
                queries=[
                    (f"model:transformer_slow:ratio_rate{window}{{{MODEL}}} / 0.01", f"{{{{model}}}} {window}")
                    for window in ("1h", "6h", "3d")
                ],
            ),
            Panel(
                title="Models",
                description="Equal fingerprints mean equal answers.",
                queries=[
                    (
                        f"count by (model, family, task, precision, device, fingerprint) (transformer_model_info{{{MODEL}}})",
                        "",
                    )
                ],
                kind="table",
            ),
        ],
    ),
]
