"""Records of comparisons that never took place: what the proof card and the terminal print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fulltune.records.comparison import (
    Comparison,
    Decision,
    Difference,
    Expectation,
    Finding,
    Look,
    MethodRow,
    Search,
    TestRowsUse,
)
from fulltune.records.scores import Estimate, Scores
from fulltune.report.format.words import MetricFormatter

HOSTILE = (
    "\"</script><img src=x onerror=alert(1)>\" & 'l' | `x` $\\frac{1$ [red]😀 \x1b[31m\u202e שלום\nsecond **line**"
)
MIB = 2**20


@dataclass(frozen=True)
class Method:
    """One method in a line; ratios are to full."""

    name: str
    kind: str
    metric: float
    half: float
    trained: int
    rate: float | None = None
    seeds: int = 3
    time: float = 1.0
    memory: float = 1.0
    saved: float = 1.0
    drift: float | None = None
    waited: bool = False


CLASSIFICATION = (
    Method("base", "base", 0.013, 0.004, 0, seeds=0),
    Method("head", "head", 0.8114, 0.012, 177_485, 3.2e-3, time=0.41, memory=0.3, saved=0.008, drift=0.0),
    Method("full", "full", 0.9249, 0.0085, 22_743_245, 2e-4, drift=0.0712),
    Method("lora", "lora", 0.9215, 0.0088, 973_133, 2e-3, time=0.86, memory=0.62, saved=0.043, drift=0.0489),
    Method("adapter", "adapter", 0.9227, 0.0086, 403_661, 2e-3, time=0.83, memory=0.57, saved=0.018, drift=0.0521),
    Method("prompt", "prompt", 0.7802, 0.03, 7_680, 3e-2, 2, 0.95, 0.71, 0.0004, 0.0102, True),
)
LANGUAGE = (
    Method("base", "base", 2.8713, 0.031, 0, seeds=0),
    Method("full", "full", 1.9034, 0.022, 134_515_008, 5e-5, drift=0.2214),
    Method("lora", "lora", 1.9462, 0.0225, 4_884_480, 5e-4, time=0.91, memory=0.55, saved=0.036, drift=0.0817),
    Method("lora-r64", "lora", 1.9158, 0.022, 19_537_920, 5e-4, time=0.99, memory=0.6, saved=0.145, drift=0.1102),
)


def comparison(methods: Sequence[Method] = CLASSIFICATION, **changes: Any) -> Comparison:
    """A comparison of these methods; keywords replace fields of the record, `decision` those of its decision."""
    loss = changes.pop("metric", "accuracy") == "loss"
    metric, sign = ("loss", -1) if loss else ("accuracy", 1)
    full = next(method for method in methods if method.kind == "full")
    base = next((method for method in methods if method.kind == "base"), None)
    rows = tuple(_row(method, full, base, sign) for method in methods)
    differences = tuple(_difference(method, full, sign) for method in methods if method.kind not in ("full", "base"))
    differences = tuple(one for one in differences if one.decides) + tuple(
        one for one in differences if not one.decides
    )
    decision = Decision(
        verdict="EQUIVALENT",
        recommended="lora",
        metric=metric,
        greater_is_better=not loss,
        margin=0.01,
        confidence=0.95,
        alpha=0.05,
        num_rows=3080,
        scores={row.method: row.metric for row in rows},
        values={method.name: (method.metric,) * method.seeds for method in methods},
        seed_sds={method.name: 0.002 for method in methods},
        differences=differences,
        headline="Use lora: it is as good as full within the margin and trains fewer weights.",
        because=tuple(
            f"full minus {one.method}: {MetricFormatter(metric, 0.01).adjusted(one)}"
            for one in differences if one.decides
        ),
    ).model_copy(update=changes.pop("decision", {}))  # fmt: skip
    values: dict[str, Any] = {
        "name": "banking77-2026-11-24-1530",
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "task": "text-classification",
        "train_rows": 9002,
        "eval_rows": 1001,
        "test_rows": 3080,
        "decision": decision,
        "rows": rows,
        "baselines": (_baseline(metric, not loss, 2.871, "before training"),) if loss
        else (_baseline(metric, True, 0.013), _baseline(metric, True, 0.62, "nearest centroid")),
        "expectation": Expectation(methods=tuple(method.name for method in methods if method.kind != "base"),
                                   num_seeds=5, most_seeds=5, num_search_trials=25, seconds=4000.0,
                                   detectable=None if loss else (0.0097, 0.021)),
        "looks": (_look(1, False), _look(2, False), _look(3, True)),
        "findings": (),
        "openings": (_opening(),),
        "drift_unit": "nats per token" if loss else "1 - cosine",
        "generic_text": "docstrings of the Python standard library",
        "seconds": 2712.0,
        "cores": 2,
        "device": "cpu",
        "data_fingerprint": "9f86d081884c7d659a2feaa0c55ad015",
        "command": "fulltune compare examples/compare-banking77.yaml",
        "versions": {"fulltune": "0.2.0", "python": "3.11.9", "torch": "2.9.1", "peft": "0.21.0"},
    }  # fmt: skip
    return Comparison(**(values | changes))


def language(**changes: Any) -> Comparison:
    """Of a language model: a loss, without bound and smaller is better."""
    decision = {
        "verdict": "FULL",
        "recommended": "full",
        "headline": "Updating every parameter is worth it here: full beats every other method by at least the margin.",
    }
    found = {"model": "HuggingFaceTB/SmolLM2-135M", "task": "causal-lm", "name": "chat"}
    return comparison(LANGUAGE, metric="loss", **({"decision": decision} | found | changes))


def undecided(**changes: Any) -> Comparison:
    decision = {
        "verdict": "UNDECIDED",
        "recommended": "",
        "headline": "These rows and seeds cannot distinguish the methods.",
        "would_decide": (
            "lora: 9,240 test rows or 12 seeds per method would decide, if the true difference equals the estimate",
        ),
        "notes": ("adapter: one seed; its spread between seeds is taken from the other methods",),
    }
    return comparison(**({"decision": decision} | changes))


def hostile() -> Comparison:
    """Text in every place where text can come from outside."""
    methods = tuple(replace(method, name=HOSTILE) if method.name == "lora" else method for method in CLASSIFICATION)
    return comparison(
        methods,
        decision={"recommended": HOSTILE, "verdict": "PEFT", "headline": HOSTILE, "because": (HOSTILE,),
                  "notes": (HOSTILE,)},
        name=HOSTILE,
        model=HOSTILE,
        command=HOSTILE,
        findings=(finding("unfair", HOSTILE),),
        openings=(_opening(), _opening()),
        generic_text=HOSTILE,
        device=HOSTILE,
        notes=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        baselines=(_baseline("accuracy", True, 0.5, HOSTILE),),
    )  # fmt: skip


def finding(level: str = "unfair", where: str = "full") -> Finding:
    return Finding.model_validate(
        {
            "rule": "edge-of-grid",
            "level": level,
            "where": where,
            "what": "the best rate, 0.0002, is the highest one tried; a rate beyond it may be better",
            "to_do": "add higher rates to its `learning_rates`",
        }
    )


def openings(count: int) -> tuple[TestRowsUse, ...]:
    return tuple(_opening(seeds=number + 1) for number in range(count))


def _row(method: Method, full: Method, base: Method | None, sign: int) -> MethodRow:
    trained = method.kind != "base"
    whole = 271.3 if sign > 0 else 1933.0
    return MethodRow(
        method=method.name,
        kind=method.kind,
        num_parameters=full.trained,
        num_trainable=method.trained,
        search=_search(method, method.rate) if method.rate else None,
        seeds=tuple(range(42, 42 + method.seeds)),
        metric=Estimate(value=method.metric, low=method.metric - method.half, high=method.metric + method.half),
        gain_share=None if base is None else (method.metric - base.metric) / (full.metric - base.metric),
        train_seconds=whole * method.time if trained else 0.0,
        tokens_per_second=2133.0 / method.time if trained else 0.0,
        train_flops=3.1e13 * (0.68 if method.kind not in ("full", "head") else method.time) if trained else 0.0,
        peak_memory_bytes=round(1480 * MIB * (0.5 + method.memory / 2)) if trained else 0,
        memory_growth_bytes=round(912 * MIB * method.memory) if trained else 0,
        saved_bytes=round(90.9e6 * method.saved) if trained else 0,
        drift=None
        if method.drift is None
        else Estimate(value=method.drift, low=method.drift * 0.9, high=method.drift * 1.1),
        seconds_per_row=0.00124 if trained else None,
        waited=method.waited,
    )


def _difference(method: Method, full: Method, sign: int) -> Difference:
    apart = sign * (full.metric - method.metric)
    return Difference.model_validate(
        {
            "method": method.name,
            "kind": method.kind,
            "decides": method.kind not in ("base", "head"),
            "cheaper": True,
            "num_seeds": method.seeds,
            "estimate": apart,
            "adjusted_low": apart - 0.0061,
            "adjusted_high": apart + 0.0061,
            "equivalent": abs(apart) < 0.004,
            "not_worse": apart < 0.004,
            "full_better": apart > 0.01,
            "other_better": False,
            "seeds_known": True,
            "detectable": 0.0102,
        }
    )


def _search(method: Method, rate: float) -> Search:
    tried = {rate * step: method.metric * 0.8 for step in (0.32, 1, 3.2)}
    whole = {rate * step: method.metric * 0.9 for step in (1, 3.2)}
    on_edge = method.name == "head"
    why = "best of 3 rates on the eval rows after 6% of the steps" + ", at the edge of the rates tried" * on_edge
    return Search(method=method.name, tried=tried, share=0.06, whole=whole, chosen=rate, reason=why, on_edge=on_edge)


def _look(seeds: int, enough: bool) -> Look:
    wanted = {} if enough else {"full": seeds + 1}
    reason = "every answer is clear" if enough else "lora and adapter are open"
    return Look(num_seeds=seeds, spent=0.01, reason=reason, wanted_seeds=wanted, waiting=("prompt",))


def _opening(seeds: int = 1) -> TestRowsUse:
    trials = tuple(f"full-seed{42 + number}" for number in range(seeds))
    return TestRowsUse(time="2026-11-24T16:12:03+01:00", trials=trials, alpha=0.025, left=0.025)


def _baseline(metric: str, greater: bool, value: float, name: str = "majority class") -> Scores:
    estimate = Estimate(value=value, low=value - 0.004, high=value + 0.004)
    return Scores(name=name, kind="baseline", rows=3080, metrics={metric: estimate}, main_metric=metric,
                  greater_is_better=greater, confidence=0.95)  # fmt: skip
