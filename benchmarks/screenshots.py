"""Pictures of the console under load: `python benchmarks/screenshots.py docs/images`.

    tolserve serve --port 18000 --device-cache 10% &
    python benchmarks/screenshots.py --url http://127.0.0.1:18000 docs/images

A few clients keep the server busy; each continues its own text. Needs Chromium on the PATH and the package playwright.
"""

import argparse
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, sync_playwright

# What keeps Chromium quiet in a container without a GPU: it must talk to the server alone.
CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
OPENINGS = ("The captain of the ship", "In the old house there was", "“My dear,” said the lady,", "He went to the door")
WARM_UP_SECONDS = 45
PROMPT_CHARACTERS = 900


def keep_busy(url: str, number: int, stop: threading.Event) -> None:
    rng = random.Random(number)
    text = OPENINGS[number % len(OPENINGS)]
    with httpx.Client(base_url=url, timeout=60) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        while not stop.is_set():
            body = {"model": model, "prompt": text[-PROMPT_CHARACTERS:], "max_tokens": rng.randrange(20, 120)}
            text += http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            if rng.random() < 0.2:  # a new text, so that prompts are short and long
                text = rng.choice(OPENINGS)
            stop.wait(rng.random() * 2)


def take(browser: Browser, url: str, path: Path, view: dict[str, Any], memory: bool) -> None:
    """One picture: a completion by the playground, a token under inspection, charts of the last minute."""
    page = browser.new_page(**view, locale="en-GB")
    page.goto(url)
    time.sleep(WARM_UP_SECONDS)
    page.get_by_role("button", name="Run").click()
    page.locator("#usage dt").first.wait_for(timeout=60_000)
    if memory:
        page.get_by_label("memory").check()
    page.locator(".token:not(.prompt)").nth(16).hover()
    time.sleep(2)
    page.screenshot(path=path)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    threads = [threading.Thread(target=keep_busy, args=(args.url, i, stop)) for i in range(args.clients)]
    for thread in threads:
        thread.start()
    desktop = {"viewport": {"width": 1360, "height": 900}, "color_scheme": "light"}
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "is_mobile": True, "has_touch": True}
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
            take(browser, args.url, args.out / "console-desktop.png", desktop, memory=False)
            take(browser, args.url, args.out / "console-phone.png", phone, memory=True)
            browser.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
