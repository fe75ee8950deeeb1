"""The page of nanostack watch in a headless Chromium, where there is one."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_watch import LOSS, VAL, record, watching, write

QUIET = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
QUIET += ["disable-background-networking", "disable-component-update", "disable-sync", "window-size=1280,900"]


class Browser:
    """A Chromium that shows what is watched at a port."""

    def __init__(self, driver, port: int):
        self.driver, self.url = driver, f"http://127.0.0.1:{port}/"
        driver.get(self.url)

    def run(self, script: str):
        return self.driver.execute_script(script)

    def wait(self, condition: str, seconds: float = 90):
        """What the script says as soon as it is true in the page; an AssertionError where it does not become so."""
        give_up = time.monotonic() + seconds
        while not (said := self.run(f"return {condition}")):
            assert time.monotonic() < give_up, f"{condition}\n{self.text()}"
            time.sleep(0.05)
        return said

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def ends(self, curve: int) -> dict[str, float]:
        """For each run, at which x its curve ends."""
        script = """return Object.fromEntries([...document.querySelectorAll(`path[data-curve="${arguments[0]}"]`)].map((path) =>
            [path.dataset.run, path.getPointAtLength(path.getTotalLength()).x]))"""
        return self.driver.execute_script(script, curve)


@pytest.fixture
def chromium(tmp_path):
    """Starts a Chromium at a port."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("needs a browser: apt-get install --no-install-recommends chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*QUIET, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    try:
        yield lambda port: Browser(driver, port)
        said = [one["message"] for one in driver.get_log("browser")]
        assert not [one for one in said if "net::ERR_" not in one], "but for polls of a server that has ended"
    finally:
        driver.quit()


@pytest.mark.slow
def test_browser_follows_a_live_run_through_its_growth_and_a_resume(trainer, chromium):
    """The run is killed in its second stage and goes on from the end of the first, with a shorter second stage."""
    out, rows = trainer.folder / "live", "runs[0].rows.length"
    options = ("live", "--save_interval", str(10**6), "--sample.interval", "1024", "--stages.1.tokens")
    with watching(out) as (_, port):
        browser = chromium(port)
        browser.wait("document.body.innerText.includes('live is not there yet; waiting for it')")
        run = trainer.start(*options, str(400 * 256))
        browser.wait(f"runs[0].rows.length > 2 && {rows}")
        assert run.poll() is None, "it is drawn while the run is under way"
        assert trainer.kill_when(run, lambda: browser.run(f"return {rows} > 20"))
        killed = records_of(out)
        browser.wait(f"{rows} === {len(killed)}")
        assert len(browser.ends(LOSS)) == 1 and browser.run("return document.querySelectorAll('.growth').length") == 3

        trainer.good(*options, str(16 * 256), "--resume")
        records = records_of(out)
        seconds = [record["seconds"] for record in records]
        assert seconds[:12] == [record["seconds"] for record in killed[:12]] and seconds[15] != killed[15]["seconds"]
        browser.wait(f"JSON.stringify(runs[0].rows.map((row) => row[4])) === '{json.dumps(seconds, separators=(',', ':'))}'")
        assert browser.run("return document.querySelectorAll('.growth').length") == 3, "one in each panel"
        said = browser.text()
        assert "▲ stack to 4 layers, validation loss " in said and "step 28 of 28, 100.0 %, done" in said
        assert f"{records[-1]['val_loss']:.4f}" in said and f"{records[-1]['loss']:.4f}" in said
        wrote = [record["texts"] for record in records if record.get("texts")]
        assert browser.run("return [...document.querySelectorAll('pre')].map((one) => one.textContent)") == wrote[-1]

        out.rename(trainer.folder / "away")
        browser.wait("document.body.innerText.includes('live is gone')")
        assert browser.run(f"return {rows}") == len(records) and len(browser.ends(LOSS)) == 1
        (trainer.folder / "away").rename(out)
        browser.wait("!document.body.innerText.includes('live is gone')")
        loaded = browser.run("return performance.getEntriesByType('resource').map((one) => one.name)")
        assert loaded and all(name.startswith(browser.url) for name in loaded), "nothing comes from elsewhere"


def records_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.mark.slow
def test_browser_shows_two_runs_over_what_the_reader_chooses(tmp_path, chromium):
    """The second has half of the tokens, a quarter of the FLOPs and the same seconds."""
    stages = [{"tokens": 30 * 256, "growth": None}, {"tokens": 10 * 256, "growth": {"op": "stack"}}]
    header = {"config": {"batch_tokens": 256, "stages": stages}}
    write(tmp_path / "one", *(record(step, val_loss=4.0 - step / 10) for step in range(1, 21)), header=header)
    half = (record(step, val_loss=4.0, tokens=128 * step, flops=2.5e8 * step) for step in range(1, 21))
    write(tmp_path / "two<b>", *half)
    with watching(tmp_path / "one", tmp_path / "two<b>") as (process, port):
        browser = chromium(port)
        browser.wait("runs.length === 2 && document.querySelector('.plot')")
        assert "step 20 of 40, 50.0 %, more than 10 s to go, last record " in browser.text(), "a growth makes steps slower"
        left, right = browser.run("return [LEFT, view.width - RIGHT]")
        begins = {"flops": 2.5e8, "tokens": 128, "seconds": 0.5}
        for axis, (one, two) in {"flops": (2e10, 5e9), "tokens": (5120, 2560), "seconds": (10, 10)}.items():
            browser.run(f"document.querySelector('[value={axis}]').click()")
            ends = browser.ends(VAL)
            share = (two - begins[axis]) / (one - begins[axis])
            assert ends == {"one": pytest.approx(right, abs=1), "two<b>": pytest.approx(left + share * (right - left), abs=1)}

        hover = "new PointerEvent('pointermove', {clientX: document.querySelector('.plot').getBoundingClientRect().right - 12})"
        browser.run(f"document.querySelector('.plot').dispatchEvent({hover})")
        assert browser.run("return $('tip').innerText").split("\n") == [
            *("10 s", "one", "step 20", "validation 2.000", "training 4.800", "rate 1e-3", "tokens/s 512"),
            *("two<b>", "step 20", "validation 4.000", "training 4.800", "rate 1e-3", "tokens/s 512"),
        ]
        browser.run("document.querySelectorAll('.legend')[0].click()")
        assert browser.ends(VAL).keys() == {"two<b>"}

        for width in (390, 1280):
            size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            assert browser.run("return document.documentElement.scrollWidth") <= width, "nothing is beside the screen"
        shades = []
        for mode in ("light", "dark"):
            feature = {"name": "prefers-color-scheme", "value": mode}
            browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            shades.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
        assert shades[0] != shades[1]

        process.send_signal(signal.SIGINT)
        browser.wait("document.body.innerText.includes('nanostack watch does not answer')")
        assert browser.ends(VAL).keys() == {"two<b>"}, "what was drawn stays"
