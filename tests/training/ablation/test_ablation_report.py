"""The report in a browser: what is there, that it sorts, and that it asks the network for nothing."""

import math
import shutil

import pytest
from mixerzoo.training.ablation.report.html import page
from mixerzoo.training.ablation.report.text import markdown, results_csv

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def cell(arm, pairs, i, reference):
    values = [0.5 + 0.1 * i + 0.01 * seed - 0.02 * pairs for seed in range(3)]
    mean = sum(values) / 3
    costs = {"parameters": 10_000 + 10 * i, "flops": 2_000_000 * (i + 1), "activation_bytes": 30_000 * (i + 1)}
    costs["train_throughput"] = {"median": 900.0 / (i + 1), "p25": 850.0 / (i + 1), "p75": 950.0 / (i + 1), "count": 7}
    costs |= {"time_exponent": 1.0 + i / 3, "memory_exponent": 1.0, "inference_exponent": 1.0}
    return {
        "arm": arm,
        "label": f"{arm}, num_kv_pairs={pairs}",
        "point": {"task.num_kv_pairs": pairs},
        "status": "done",
        "lr": 1e-3,
        "rates": [{"lr": 1e-3, "val": mean}, {"lr": 3e-3, "val": math.nan}],
        "runs": [{"seed": s, "value": v, "val": v, "seconds": 3.0, "folder": arm} for s, v in enumerate(values)],
        "mean": mean,
        "sd": 0.01,
        "low": mean - 0.01,
        "high": mean + 0.01,
        "matched": {
            "count": 10_000 + 10 * i,
            "target": 10_000,
            "own": 9_000,
            "difference": i / 1000,
            "within": arm != "identity",
            "settings": {},
            "why": "no width fits </script><script>alert(1)</script>" if arm == "identity" else "",
        },
        "costs": costs,
        "curve": [
            {"step": s, "mean": mean * s / 30, "low": mean * s / 32, "high": mean * s / 29, "loss": 2 / s}
            for s in (10, 20, 30)
        ],
        "failures": [],
        "difference": None
        if arm == reference
        else {"mean": 0.1 * i, "low": 0.0, "high": 0.2, "pairs": 3, "p": 0.01, "p_holm": 0.02},
        "command": f"python train.py mixer={arm}",
        "config": f"mixer:\n  name: {arm}\n",
    }


def made_up():
    """Figures of a finished ablation, without the training."""
    arms = ["attention", "pooling", "identity", "mamba2"]
    lengths = [512, 1024, 2048]
    grown = {
        f"{arm}, num_kv_pairs=2": [
            {
                "length": n,
                "train_seconds": {"median": n / 1000, "p25": n / 1100, "p75": n / 900, "count": 3},
                "infer_seconds": {"median": n / 3000, "p25": n / 3300, "p75": n / 2900, "count": 3},
                "activation_bytes": 100 * n,
                "peak_bytes": 130 * n,
            }
            for n in lengths
        ]
        for arm in arms
    }
    return {
        "folder": "runs/ablation-made-up",
        "name": "made-up",
        "title": "A made-up <ablation>",
        "description": "For the test & nothing else.",
        "reference": "attention",
        "controls": ["identity"],
        "vary": {"task.num_kv_pairs": [2, 8]},
        "seeds": [0, 1, 2],
        "rates": [1e-3, 3e-3],
        "lr_seeds": 1,
        "match": "parameters",
        "tolerance": 0.02,
        "code": "0" * 64,
        "git": None,
        "given": False,
        "trains": True,
        "scaling": {"lengths": lengths, "batch_size": 1, "arms": grown, "stopped": {}},
        "measured_on": None,
        "measured_with": None,
        "metric": "accuracy",
        "higher_is_better": True,
        "split": "test",
        "task": "mqar",
        "unit": "tokens",
        "environment": {"torch": "2", "threads": 1, "cpu": "x86_64", "gpus": []},
        "data": {"sha256": "f" * 64},
        "warnings": ["identity: not matched"],
        "cells": [cell(arm, pairs, i, "attention") for pairs in (2, 8) for i, arm in enumerate(arms)],
    }


def test_text_and_table_hold_all_arms():
    results = made_up()
    text = markdown(results, ["pareto.png"])
    assert text.count("`mamba2`") == 1 + 2  # once over the points, once at each
    assert "| `mamba2` | 0.7700 ± 0.0100 | 0.6500 ± 0.0100 |" in text
    assert "![pareto](pareto.png)" in text
    assert len(results_csv(results).splitlines()) == 1 + 8


def test_nothing_in_the_figures_can_become_markup():
    text = page(made_up())
    assert "<script>alert" not in text
    assert "A made-up &lt;ablation&gt;" in text


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as p:
        try:
            started = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync_api.Error as error:  # a browser that is there and does not start is not the report's fault
            pytest.skip(f"{program} does not start: {str(error).splitlines()[0]}")
        yield started
        started.close()


def open_page(browser, path, **options):
    context = browser.new_context(offline=True, **options)
    opened, problems, requests = context.new_page(), [], []
    opened.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda r: requests.append(r.url))
    opened.goto(path.as_uri())
    opened.wait_for_selector("#arms")
    return opened, problems, requests


def column(opened, i):
    return opened.eval_on_selector_all("#arms tbody tr", f"rows => rows.map(r => r.cells[{i}].textContent)")


def test_the_report_in_a_browser(browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page(made_up()))
    opened, problems, requests = open_page(browser, path, viewport={"width": 1200, "height": 900})

    order = lambda: opened.eval_on_selector_all("#arms tbody tr", "rows => rows.map(r => r.dataset.arm)")  # noqa: E731
    assert order() == ["mamba2", "identity", "pooling", "attention"]  # best first
    opened.click('#arms th[data-key="score"]')
    assert order() == ["attention", "pooling", "identity", "mamba2"]
    opened.click('#arms th[data-key="train_throughput"]')
    assert order()[0] == "attention"  # the fastest
    opened.click('#arms th[data-key="arm"]')
    assert order() == ["attention", "identity", "mamba2", "pooling"]
    assert opened.get_attribute('#arms th[data-key="arm"]', "aria-sort") == "ascending"

    for section in ("pareto", "curves", "scaling", "over-task\\.num_kv_pairs"):
        assert opened.locator(f"#{section} svg").count() >= 1, section
    assert opened.locator("#pareto svg circle").count() == 4
    assert opened.locator("#pareto svg polyline.front").count() == 1
    assert opened.locator("#curves svg polyline").count() == 8
    assert opened.locator("#scaling svg polyline").count() == 16
    assert opened.locator("#curves svg polygon").count() == 4  # bands
    opened.click("#pareto button:has-text('FLOPs')")
    assert "FLOPs" in (opened.text_content("#pareto svg") or "")

    before = column(opened, 1)
    opened.click("#points button:nth-of-type(2)")
    assert column(opened, 1) != before
    opened.click('#details details[data-arm="mamba2"] summary')
    assert "python train.py mixer=mamba2" in opened.inner_text('#details details[data-arm="mamba2"]')

    light = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.click("#theme")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert problems == []
    assert requests == [path.as_uri()]


@pytest.mark.parametrize("width", [1400, 700, 390])
def test_no_column_is_cut_off(browser, tmp_path, width):
    results = made_up()
    spread = {"median": 123_456.0, "p25": 123_000.0, "p75": 124_000.0, "count": 7}
    for one in results["cells"]:
        one["costs"] |= {"infer_throughput": spread, "observed_throughput": spread, "peak_bytes": 52_900_000}
        one["costs"] |= {"state_bytes": 333_000, "decode_seconds": 0.00292}
    path = tmp_path / "report.html"
    path.write_text(page(results))
    opened, _, _ = open_page(browser, path, viewport={"width": width, "height": 900})
    inside, whole = opened.evaluate("(() => { const s = document.querySelector('.scroll'); "
                                    "return [s.clientWidth, s.scrollWidth]; })()")  # fmt: skip
    assert whole <= inside
    named = set(opened.evaluate("[...document.querySelectorAll('#arms td')].map((td) => td.dataset.name)"))
    for td in opened.locator("#arms td:not(:empty)").all():
        box = td.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert len(named) == 17
    assert opened.locator("#arms thead").is_visible() == (width == 1400)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_on_a_phone(browser, tmp_path, scheme):
    path = tmp_path / "report.html"
    path.write_text(page(made_up()))
    opened, problems, _ = open_page(browser, path, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    for svg in opened.locator("section svg").all():
        box = svg.bounding_box()
        assert box is None or box["width"] <= 390
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 27)"
    assert dark == (scheme == "dark")
    assert problems == []
