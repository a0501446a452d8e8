"""Reports in headless Chromium: everything is drawn, fits a phone, can be read, and nothing is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nblora.certificate import Certificate
from nblora.reporting import comparison_report, finetune_report
from report_samples import LLAMA, METHODS, certificate, comparison, finetuning, language_finetuning

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

TIMEOUT = 120_000  # milliseconds; a busy machine is no reason to fail
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def job(metrics: dict[str, Any], measured: Certificate) -> Callable[[Path], Path]:
    return lambda out: finetune_report(metrics, json.loads(measured.to_json()), out)


def without_kept() -> dict[str, Any]:
    nothing = {"keep": None, "history": [], "spectra": []}
    return finetuning(before={"target": {}}, after={"target": {"score": 0.5}}, **nothing)


REPORTS: dict[str, tuple[Callable[[Path], Path], int]] = {  # how it is written, number of figures
    "classifier": (job(finetuning(), certificate()), 6),
    "language-model": (job(language_finetuning(), certificate(40, LLAMA, "model.layers", 16)), 5),
    "one-layer": (job(without_kept(), certificate(1, ("a" * 90,))), 1),
    "comparison": (lambda out: comparison_report(comparison(), out), 3),
    "comparison-in-nats": (lambda out: comparison_report(comparison("nats"), out), 3),
    "comparison-of-one-seed": (lambda out: comparison_report(comparison(kept=False, seeds=1), out), 1),
}


class Tab:
    """A page with what went wrong and what was asked of a network."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def evaluate(self, code: str) -> Any:
        return self.page.evaluate(code)

    def until(self, condition: str) -> None:
        """Wait; Playwright's own way evaluates text in the page, which the report's policy forbids."""
        for _ in range(TIMEOUT // 50):
            if self.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never came true: {condition}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)  # a fresh profile
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, written = tmp_path_factory.mktemp("reports"), {}

    def file(name: str) -> Path:
        if name not in written:
            write, _ = REPORTS[name]
            written[name] = write(folder / f"{name}.html")
        return written[name]

    return file


@pytest.fixture
def visit(browser: Any, files: Callable[[str], Path]) -> Iterator[Callable[..., Tab]]:
    contexts = []

    def open_report(name: str, width: int = 1280, scheme: str = "light") -> Tab:
        phone = width < 500
        contexts.append(
            browser.new_context(
                viewport={"width": width, "height": 800},
                color_scheme=scheme,
                has_touch=phone,
                is_mobile=phone,
            )
        )
        contexts[-1].set_default_timeout(TIMEOUT)
        tab = Tab(contexts[-1].new_page())
        tab.page.goto(files(name).as_uri())
        tab.until("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))")
        return tab

    yield open_report
    for context in contexts:
        context.close()


DRAWN = """[...document.querySelectorAll('.plot')].map(plot => {
    const box = plot.querySelector('.main-svg').getBoundingClientRect();
    const marks = plot.querySelectorAll('.trace path, .trace .point, .bars .point');
    return {name: plot.dataset.figure, width: box.width, height: box.height, marks: marks.length,
            right: box.right, texts: plot.querySelectorAll('.xtick text').length};
})"""

# text whose colour does not stand out from what is behind it: 4.5 by WCAG, 3 for marks
FAINT = """(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgba = color => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = color => {
        const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const [r, g, b] = color.map(v => linear(v / 255));
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const behind = element => {
        for (let at = element; at; at = at.parentElement) {
            const color = rgba(getComputedStyle(at).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255, 255];
    };
    const faint = [];
    let seen = 0;
    for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || ['SCRIPT', 'NOSCRIPT'].includes(element.tagName)) continue;
        if (element.closest('.modebar, noscript')) continue;
        const style = getComputedStyle(element);
        const ink = rgba(element.closest('svg') ? style.fill : style.color);
        const [high, low] = [luminance(ink), luminance(behind(element))].sort((a, b) => b - a);
        const ratio = (high + .05) / (low + .05);
        seen += 1;
        if (ratio < (element.ariaHidden ? 3 : 4.5)) faint.push([element.textContent.slice(0, 40), ratio]);
    }
    return {faint, seen};
})()"""


def check_view(tab: Tab, name: str, width: int) -> None:
    """Every figure is drawn, the page fits, and all text can be read."""
    drawn = tab.evaluate(DRAWN)
    assert len(drawn) == REPORTS[name][1]
    for plot in drawn:
        assert plot["width"] > 200, plot
        assert plot["height"] > 250, plot
        assert plot["marks"] > 0, plot
        assert plot["texts"] > 0, plot
        assert plot["right"] <= width, plot
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "wider than the screen"
    faint = tab.evaluate(FAINT)
    assert faint["seen"] > 40
    assert not faint["faint"]
    assert not tab.messages
    assert [url.partition(":")[0] for url in tab.requests] == ["file"], "the report and nothing else"


@pytest.mark.parametrize("name", REPORTS)
def test_on_a_phone(name: str, visit: Callable[..., Tab]) -> None:
    check_view(visit(name, 360), name, 360)


@pytest.mark.parametrize("name", REPORTS)
def test_on_a_desk(name: str, visit: Callable[..., Tab]) -> None:
    tab = visit(name, 1280, "dark")
    check_view(tab, name, 1280)
    tab.page.emulate_media(color_scheme="light")
    tab.page.set_viewport_size({"width": 700, "height": 900})
    tab.until("[...document.querySelectorAll('.plot')].every(plot => plot._fullLayout.width < 700)")
    check_view(tab, name, 700)


def test_the_check_of_contrast_sees_faint_text(visit: Callable[..., Tab]) -> None:
    tab = visit("one-layer")
    tab.evaluate("document.querySelector('h1').style.color = '#cccccc'")
    assert len(tab.evaluate(FAINT)["faint"]) == 1


def test_the_policy_stops_what_would_be_loaded(visit: Callable[..., Tab]) -> None:
    """The test of the requests above: nothing in the file could load anything or run another script."""
    tab = visit("one-layer")
    stopped = tab.evaluate(
        """(async () => {
            const image = new Image();
            const failed = new Promise(resolve => { image.onerror = () => resolve(true); });
            image.src = 'https://example.org/a.png';
            const script = document.createElement('script');
            script.textContent = 'window.ran = true';
            document.body.append(script);
            const fetched = await fetch('https://example.org').then(() => true, () => false);
            return [await failed, window.ran === undefined, !fetched];
        })()"""
    )
    assert stopped == [True, True, True]
    assert any("Content Security Policy" in message for message in tab.messages)


@pytest.mark.parametrize("width", [360, 1280])
def test_pointing_at_a_layer_tells_its_name(width: int, visit: Callable[..., Tab]) -> None:
    tab = visit("language-model", width)
    plot = tab.page.locator("[data-figure=figure-spectrum]")
    plot.scroll_into_view_if_needed()
    layers = certificate(40, LLAMA, "model.layers", 16).layers
    place = tab.evaluate(
        """(() => {
            const plot = document.querySelector('[data-figure=figure-spectrum]');
            const {left, top} = plot.getBoundingClientRect();
            const {xaxis, yaxis} = plot._fullLayout;
            return [left + xaxis._offset + xaxis.d2p(200), top + yaxis._offset + yaxis.d2p(20)];
        })()"""
    )
    if width == 360:
        tab.page.touchscreen.tap(*place)
    else:
        tab.page.mouse.move(*place)
    label = tab.page.locator(".hoverlayer .hovertext")
    label.wait_for()
    named = [layer.name for layer in layers if (label.text_content() or "").startswith(layer.name)]
    assert len(named) == 1
    assert abs(layers.index(next(layer for layer in layers if layer.name == named[0])) + 1 - 200) <= 1 + (
        width == 360
    )
    box = label.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_figures_follow_the_scheme(visit: Callable[..., Tab]) -> None:
    tab = visit("comparison")
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = tab.evaluate(ink)
    tab.page.emulate_media(color_scheme="dark")
    tab.until(f"{ink} !== {json.dumps(light)}")
    assert not tab.evaluate(FAINT)["faint"]
    tab.page.emulate_media(color_scheme="light")
    tab.until(f"{ink} === {json.dumps(light)}")
    assert not tab.messages


def test_methods_can_be_hidden_and_shown_alone(visit: Callable[..., Tab]) -> None:
    tab = visit("comparison")
    methods = """[...document.querySelectorAll('.plot')].map(plot => [...new Set(
        plot._fullData.filter(trace => trace.visible === true && trace.meta).map(trace => trace.meta.method)
    )].sort())"""
    everything = sorted(METHODS)
    assert tab.evaluate(methods) == [everything] * 3
    button = tab.page.locator("button[data-method=dora]")
    button.click()
    assert tab.evaluate(methods) == [[method for method in everything if method != "dora"]] * 3
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert tab.evaluate(methods) == [everything] * 3
    button.dblclick()
    assert tab.evaluate(methods) == [["dora"]] * 3
    button.dblclick()
    assert tab.evaluate(methods) == [everything] * 3


def test_outliers_can_be_brought_back(visit: Callable[..., Tab]) -> None:
    """What lies beyond the axis is counted in the caption, and its button shows it."""
    tab = visit("comparison-in-nats")
    figure = tab.page.locator("figure:has([data-figure=figure-kept-by-learning-rate])")
    assert "beyond the axis" in figure.locator("figcaption").inner_text()
    limits = "document.querySelector('[data-figure=figure-kept-by-learning-rate]')._fullLayout.yaxis.range"
    before = tab.evaluate(limits)
    figure.hover()
    figure.locator("[data-title=Autoscale]").click()
    assert max(tab.evaluate(limits)) > 2 * max(before)
    figure.locator("[data-title='Reset axes']").click()
    assert tab.evaluate(limits) == pytest.approx(before)


def test_snippets_are_copied(visit: Callable[..., Tab]) -> None:
    tab = visit("language-model")
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.locator("button.copy").first.click()
    tab.page.get_by_text("Copied").wait_for()
    code = tab.page.locator(".snippet pre").first.text_content()
    assert tab.evaluate("navigator.clipboard.readText()") == code
    assert code is not None
    assert code.startswith("import nblora")


def test_print_is_light_open_and_as_wide_as_paper(visit: Callable[..., Tab]) -> None:
    tab = visit("language-model", scheme="dark")
    state = """(() => ({
        ground: getComputedStyle(document.body).getPropertyValue('--card').trim(),
        open: document.querySelectorAll('details[open]').length,
        widths: [...document.querySelectorAll('.plot')].map(plot => plot._fullLayout.width),
    }))()"""
    screen = tab.evaluate(state)
    tab.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {state}; }})")
    tab.page.pdf(format="A4")
    printed = tab.evaluate("window.printed")
    assert printed["ground"] == "#ffffff" != screen["ground"]
    assert (screen["open"], printed["open"]) == (0, 1)
    assert {*printed["widths"]} == {640}
    tab.until(f"JSON.stringify({state}) === {json.dumps(json.dumps(screen, separators=(',', ':')))}")
    assert not tab.messages
