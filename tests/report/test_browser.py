"""What users see in a browser: a report, and TensorBoard."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, create_explainability_report
from tests.toy import ToyModule, quiet_trainer, run_toy, toy_loader

pytestmark = pytest.mark.slow

EVIL = ["<script>document.title='broken'</script>", '"><img src=x onerror=alert(1)>', "a & b", "</title>"]

# Nothing outside of this machine is asked for.
QUIET = ("disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, Debian's; `.ci/run` has to have it."""
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists() and "XATTN_CI" not in os.environ:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", *(f"--{one}" for one in QUIET)]
        opened = playwright.chromium.launch(executable_path=str(chromium), args=arguments)
        yield opened
        opened.close()


@contextmanager
def page_of(browser, address):
    """A page, in whose console nothing may be said."""
    said = []
    page = browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert said == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    explainer = ExplainabilityCapture(
        ToyModule(),
        predict=run_toy,
        class_names=EVIL,
        sample_ids=lambda outputs, batch: [f"<b>{i}</b>" for i in range(len(batch[2]))],
    )
    explained = explainer.explain_loader(toy_loader(60, 20), folder / "table", progress=False)
    create_explainability_report(explained, folder / "report.html")
    batch = explainer.explain_batch(next(iter(toy_loader(20, 20))), among=explained)
    create_explainability_report(batch, folder / "batch.html")
    return folder


@pytest.mark.parametrize("name", ["report", "batch"])
def test_a_page_fits_and_whatever_a_name_holds_is_text(browser, report, name):
    with page_of(browser, (report / f"{name}.html").as_uri()) as page:
        assert page.title() == "Cross-modal attention report"
        assert page.locator("script").count() == 1
        assert page.locator("#samples b").count() == 0
        page.locator("nav a[href='#samples']").click()
        assert EVIL[0] in page.locator("#samples").inner_text()
        assert "http" not in json.dumps(page.evaluate("performance.getEntriesByType('resource').map(r => r.name)"))
        for scheme, width, expected in (("light", 320, "rgb(255, 255, 255)"), ("dark", 1600, "rgb(14, 17, 22)")):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            for is_open in ("true", "false"):
                page.evaluate(f"document.querySelectorAll('.part').forEach(one => {{ one.open = {is_open}; }})")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == expected


@pytest.mark.parametrize("name", ["report", "batch"])
def test_samples_are_filtered_sorted_and_opened_by_keyboard(browser, report, name):
    with page_of(browser, (report / f"{name}.html").as_uri()) as page:
        assert page.locator(".sample:visible").count() == 0, "the list is folded"
        page.locator("nav a[href='#samples']").click()
        everything = page.locator(".sample:visible").count()
        assert everything == {"report": 60, "batch": 20}[name]
        page.select_option("#outcome", "correct")
        correct = page.locator(".sample:visible").count()
        assert 0 < correct < everything
        assert page.locator("#shown").inner_text() == f"{correct} of {everything} samples"
        page.select_option("#outcome", "")
        page.select_option("#true", EVIL[1])
        assert 0 < page.locator(".sample:visible").count() < everything
        page.locator("button[type=reset]").click()
        page.wait_for_function(f"document.querySelector('#shown').textContent.startsWith('{everything} of')")
        for way, sign in (("confidence down", -1), ("confidence up", 1)):
            page.select_option("#order", way)
            numbers = page.eval_on_selector_all(".sample", "all => all.map(one => Number(one.dataset.confidence))")
            assert numbers == sorted(numbers, key=lambda x: sign * x)
        page.fill("#words", "<b>7<")
        assert page.locator(".sample:visible").count() == {"report": 3, "batch": 1}[name]
        page.locator("details.sample:visible summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("details.sample[open]").count() == 1
        # All that can be reached has a name that is read aloud.
        unnamed = "all => all.filter(one => !one.labels.length).length"
        assert page.eval_on_selector_all("select, input", unnamed) == 0
        assert page.eval_on_selector_all("img", "all => all.filter(one => !one.alt).length") == 0


def test_folded_parts_are_open_on_paper_and_cut_tables_say_that_they_scroll(browser, report):
    with page_of(browser, (report / "report.html").as_uri()) as page:
        closed = page.locator(".part:not([open])").count()
        assert closed == page.locator(".part").count() > 3
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.locator(".part:not([open])").count() == 0
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert page.locator(".part:not([open])").count() == closed
        page.set_viewport_size({"width": 375, "height": 812})
        page.locator("nav a[href='#samples']").click()
        page.wait_for_selector("#samples .wide.cut")
        hint = "getComputedStyle(document.querySelector('#samples .wide'), '::before').content"
        assert "Scroll sideways" in page.evaluate(hint)
        page.set_viewport_size({"width": 1280, "height": 800})
        page.wait_for_selector("#samples .wide:not(.cut)")


def test_tensorboard_shows_pictures(browser, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    trainer = quiet_trainer(logger=logger, callbacks=[AttentionExplainabilityCallback()], max_epochs=2)
    trainer.fit(ToyModule(), toy_loader(), toy_loader(seed=1))
    logger.finalize("success")
    port = 6000 + os.getpid() % 2000
    address = f"http://localhost:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                if "run" in urllib.request.urlopen(f"{address}/data/runs", timeout=5).read().decode():
                    break
            except OSError:
                time.sleep(0.5)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{address}/#images")
        card = page.locator("text=xattn_card/val/1_modalities >> visible=true").first
        card.wait_for(timeout=60_000)
        assert card.bounding_box()["y"] < 500, "it is the first"
        page.close()
    finally:
        server.terminate()
        server.wait()
