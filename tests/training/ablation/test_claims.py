"""Claims: lines that are read, and verdicts that follow from the figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mixerzoo.errors import ConfigError
from mixerzoo.training.ablation.claims import Term, judge, overall, parse, seeds_needed, student_interval
from mixerzoo.training.ablation.preset import from_command_line, list_ablations, make, read_preset
from mixerzoo.training.ablation.report.text import markdown


def results_of(scores: dict[str, list[float]], costs: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """What `collect` gives, as far as a verdict needs it."""
    cells = [
        {
            "arm": arm,
            "label": arm,
            "point": {},
            "runs": [{"seed": seed, "value": value} for seed, value in enumerate(values)],
            "costs": (costs or {}).get(arm, {}),
        }
        for arm, values in scores.items()
    ]
    return {"metric": "top1", "higher_is_better": True, "cells": cells, "scaling": None}


def verdict(line: str, results: dict[str, Any]) -> str:
    return judge(parse(line, key="expect[0]"), results).verdict


@pytest.mark.parametrize(
    ("line", "left", "op", "right", "factor", "offset", "at"),
    [
        ("a.top1 > b.top1", "a.top1", ">", "b.top1", 1, 0, None),
        ("  a.top1<=b.top1 ", "a.top1", "<=", "b.top1", 1, 0, None),
        ("a.flops <= 0.5 * b.flops at 32768", "a.flops", "<=", "b.flops", 0.5, 0, 32768),
        ("a.top1 > b.top1 + 0.005", "a.top1", ">", "b.top1", 1, 0.005, None),
        ("a-b:3.top1 >= 2e-1*c.d.top1 - 1", "a-b:3.top1", ">=", "c.d.top1", 0.2, -1, None),
        ("a.top1 >= 0.845", "a.top1", ">=", None, 1, 0.845, None),
        ("a.top1 < -3 at kjv", "a.top1", "<", None, 1, -3, "kjv"),
    ],
)
def test_lines(line: str, left: str, op: str, right: str | None, factor: float, offset: float, at: Any) -> None:
    found = parse(line, key="expect[0]")
    assert (str(found.left), found.op, found.factor, found.offset, found.at) == (left, op, factor, offset, at)
    assert (None if found.right is None else str(found.right)) == right


@pytest.mark.parametrize(
    "line",
    ["", "a > b", "a.top1", "a.top1 == b.top1", "a.top1 > b.top1 * 2", "a.top1 > __import__('os')", "a.top1 > b.top1 +",
     "a.top1 > b.top1 or True", "a.top1 > (b.top1)"],
)  # fmt: skip
def test_other_lines_are_refused_with_their_path(line: Any) -> None:
    preset = {"name": "x", "arms": {"a": {}, "b": {}}, "expect": ["a.top1 > b.top1", line]}
    with pytest.raises(ConfigError, match=r"^ablation\.expect\[1\]"):
        make(preset)


def test_an_unknown_arm_is_refused_with_a_proposal() -> None:
    preset = {"name": "x", "arms": {"pooling": {}, "conv": {}}, "expect": ["poolin.top1 > conv.top1"]}
    with pytest.raises(ConfigError, match=r'^ablation\.expect\[0\]: "poolin" is not known\. Did you mean "pooling"'):
        make(preset)


def test_scores_by_paired_differences() -> None:
    # the arms differ by 0.01 with little noise, though each of them varies by far more over the seeds
    results = results_of({"a": [0.51, 0.712, 0.909], "b": [0.50, 0.70, 0.90]})
    assert verdict("a.top1 > b.top1", results) == "reproduced"
    assert verdict("b.top1 > a.top1", results) == "contradicted"
    assert verdict("a.top1 > b.top1 + 0.02", results) == "contradicted"
    assert verdict("a.score > b.score", results) == "reproduced"
    assert verdict("a.top1 < b.top1", results) == "contradicted"
    assert verdict("a.top1 > 0.3", results) == "undecided"
    assert verdict("a.top1 > -2", results) == "reproduced"


def test_undecided_says_how_many_seeds_would_do() -> None:
    results = results_of({"a": [0.52, 0.50, 0.53], "b": [0.50, 0.51, 0.50]})
    found = judge(parse("a.top1 > b.top1", key="expect[0]"), results)
    differences = [0.02, -0.01, 0.03]
    assert found.verdict == "undecided"
    assert found.low < 0 < found.high
    # half of the interval with n seeds of this deviation: the first n at which it is below the mean
    assert found.needed is not None
    mean, deviation = np.mean(differences), np.std(differences, ddof=1)
    for n in (found.needed - 1, found.needed):
        low = mean - deviation * {9: 2.3060, 10: 2.2622, 11: 2.2281, 12: 2.2010, 13: 2.1788}[n] / math.sqrt(n)
        assert (low > 0) == (n == found.needed)


def test_two_seeds_are_too_few_and_missing_arms_are_said() -> None:
    results = results_of({"a": [0.9, 0.9], "b": [0.1, 0.1], "c": []})
    found = judge(parse("a.top1 > b.top1", key="expect[0]"), results)
    assert (found.verdict, found.needed) == ("undecided", 3)
    assert "c.top1 is missing" in judge(parse("a.top1 > c.top1", key="expect[0]"), results).why
    assert "d.top1 is missing" in judge(parse("a.top1 > d.top1", key="expect[0]"), results).why


def test_only_seeds_that_both_arms_have_count() -> None:
    results = results_of({"a": [0.9, 0.91, 0.92, 0.1], "b": [0.8, 0.81, 0.815]})
    found = judge(parse("a.top1 > b.top1", key="expect[0]"), results)
    assert (found.seeds, found.verdict) == (3, "reproduced")


def test_counted_figures_are_exact() -> None:
    results = results_of({"a": [], "b": []}, {"a": {"flops": 50}, "b": {"flops": 100}})
    assert verdict("a.flops <= 0.5 * b.flops", results) == "reproduced"
    assert verdict("a.flops < 0.5 * b.flops", results) == "contradicted"
    assert verdict("a.flops > b.flops", results) == "contradicted"
    with pytest.raises(ConfigError, match=r'"flop" is not known\. Did you mean "flops"'):
        verdict("a.flop < b.flop", results)


def test_timed_figures_must_agree_with_their_quartiles() -> None:
    def rate(low: float, high: float) -> dict[str, Any]:
        return {"train_throughput": {"median": (low + high) / 2, "p25": low, "p75": high}}

    results = results_of({"a": [], "b": []}, {"a": rate(10, 12), "b": rate(4, 6)})
    assert verdict("a.train_throughput > b.train_throughput", results) == "reproduced"
    assert verdict("a.train_throughput > 2 * b.train_throughput", results) == "undecided"
    assert verdict("a.train_throughput > 4 * b.train_throughput", results) == "contradicted"


def test_points_and_lengths() -> None:
    results = results_of({"a": [0.5], "b": [0.4]})
    results["cells"] = [
        {**cell, "point": {"task.pairs": pairs}, "costs": {"flops": flops * pairs}}
        for cell, flops in zip(results["cells"], (1, 3), strict=True)
        for pairs in (2, 4)
    ]
    assert verdict("a.flops <= 0.5 * b.flops at 4", results) == "reproduced"
    with pytest.raises(ConfigError, match="say where by `at`"):
        verdict("a.flops < b.flops", results)
    with pytest.raises(ConfigError, match=r'"at 3" is not known.*at 2, at 4'):
        verdict("a.flops < b.flops at 3", results)
    scaled = results_of({"a": [], "b": []})
    line = {"length": 512, "infer_seconds": {"median": 1.0, "p25": 0.9, "p75": 1.1}, "flops": 7}
    scaled["scaling"] = {"arms": {"a": [line], "b": [{**line, "flops": 20}]}}
    assert verdict("a.flops <= 0.5 * b.flops at 512", scaled) == "reproduced"


def test_a_crippled_arm_contradicts() -> None:
    """The same claim, with the arm that should win made worse on purpose."""
    sound = results_of({"pooling": [0.80, 0.81, 0.805], "identity": [0.70, 0.72, 0.71]})
    crippled = results_of({"pooling": [0.60, 0.61, 0.605], "identity": [0.70, 0.72, 0.71]})
    line = "pooling.top1 > identity.top1"
    assert (verdict(line, sound), verdict(line, crippled)) == ("reproduced", "contradicted")


def test_students_interval_covers() -> None:
    """Of 10,000 draws of normal noise the interval holds the true mean in 95%, with two seeds, too."""
    generator = np.random.default_rng(0)
    for count in (2, 3, 5, 10):
        draws = generator.normal(size=(2000, count))
        inside = [low < 0 < high for low, high in map(student_interval, draws.tolist())]
        assert 0.94 <= np.mean(inside) <= 0.96
    assert all(math.isnan(end) for end in student_interval([1.0]))
    assert seeds_needed([0.1, -0.1, 0.0]) is None


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "undecided"], "undecided"),
        (["contradicted", "reproduced", "undecided"], "contradicted"),
        ([], "undecided"),
    ],
)
def test_a_claim_of_several_lines(verdicts: list[str], expected: str) -> None:
    assert overall(verdicts) == expected


@pytest.mark.parametrize("name", list_ablations("claim"))
def test_every_stored_claim_is_read(name: str) -> None:
    ablation = from_command_line([f"claim={name}"])
    assert ablation.claim.paper
    assert ablation.claim.says
    assert ablation.expect
    assert set(read_preset(name, "claim")["arms"]) == set(ablation.mixers)
    used = {term.arm for i, e in enumerate(ablation.expect) for term in parse(e, key=f"expect[{i}]").terms}
    assert used == set(ablation.mixers), "an arm that no line asks for"


def test_the_report_says_the_verdict() -> None:
    from dataclasses import asdict

    results = results_of({"a": [0.51, 0.712, 0.909], "b": [0.50, 0.70, 0.90]})
    found = judge(parse("a.top1 > b.top1", key="expect[0]"), results)
    empty = {"title": "t", "description": "", "given": True, "trains": False, "warnings": [], "reference": "a"}
    nothing = {"scaling": None, "controls": [], "unit": "image", "data": None, "git": None, "code": "0" * 12}
    cell = {"point": {}, "mean": 0.1, "command": "c", "costs": {}, "arm": "a", "runs": []}
    environment = {"gpus": [], "torch": "2", "threads": 1, "cpu": "x"}
    page = markdown(
        {**empty, **nothing, "cells": [cell], "environment": environment, "higher_is_better": True, "metric": "top1",
         "claim": {"paper": "A Paper", "arxiv": "2111.11418", "says": "a is better than b.", "published": "3 points"},
         "verdicts": [asdict(found)]}
    )  # fmt: skip
    assert "A Paper (arXiv:2111.11418): a is better than b." in page
    assert "Verdict: **reproduced**" in page
    assert "| `a.top1 > b.top1` | reproduced | 0.7103 against 0.7; the difference is " in page


def test_terms_are_written_as_they_are_read() -> None:
    assert str(Term("a", "top1")) == "a.top1"
