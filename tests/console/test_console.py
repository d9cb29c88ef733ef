"""The console in a real browser, against a real server."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Response, Route, expect

from console.conftest import Visits
from e2e.conftest import KEY, Running
from tiny import tiny_config
from tolserve.model.config import ModelConfig

PROMPT = "The old house — café\n漢字 stood"


def run(page: Page, prompt: str = PROMPT, **fields: object) -> Response:
    """Fill the form, press Run, wait for the end; the page's own answer from the server."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, text in fields.items():
        page.locator(f"#{name}").fill(str(text))
    with page.expect_response(lambda response: response.url.endswith("/v1/completions")) as answered:
        page.get_by_role("button", name="Run").click()
    expect(page.locator("#run-status")).to_have_text(re.compile("done"))
    return answered.value


def chunks_of(response: Response) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in response.text().splitlines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def parts(page: Page) -> dict[str, str]:
    """What the inspector says."""
    found = page.locator("#inspector dd").all()
    return {str(part.get_attribute("data-part")): str(part.text_content()) for part in found}


def test_a_completion_is_shown_as_the_server_sent_it(page: Page, server: Running) -> None:
    expect(page.locator("#model")).to_have_text("tiny")
    response = run(page, max_tokens=40, temperature=1, seed=7)
    chunks = chunks_of(response)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    labels = [label for choice in choices for label in choice["logprobs"]["tokens"]]
    logprobs = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    hits = [hit for choice in choices for hit in choice["tol"]["hits"]]
    usage = chunks[-1]["usage"]

    tokens = page.locator("#tokens .token")
    classes = [str(token.get_attribute("class")).split() for token in tokens.all()]
    prompt_tokens = sum("prompt" in names for names in classes)
    assert prompt_tokens == usage["prompt_tokens"]
    assert len(classes) == usage["total_tokens"] == len(hits) + 1
    kinds = {True: "hit", False: "miss", None: "kept"}
    assert all(kinds[hit] in names for hit, names in zip(hits, classes[:-1], strict=True))
    assert hits.count(None) == usage["prompt_tokens_details"]["cached_tokens"]
    assert "never" in classes[-1]
    texts = tokens.all_text_contents()
    assert "".join(texts[:prompt_tokens]) == PROMPT
    assert "".join(texts[prompt_tokens:]).removesuffix("<|endoftext|>") == "".join(c["text"] for c in choices)

    for position in (0, len(labels) // 2):
        token = tokens.nth(prompt_tokens + position)
        token.hover()
        said = parts(page)
        assert float(said["logprob"]) == pytest.approx(logprobs[position], abs=6e-4)
        assert said["memory"].startswith("hit" if hits[prompt_tokens + position] else "miss")
        assert page.locator("#inspector li").count() >= 5
        if not labels[position].startswith("bytes:"):
            expect(page.locator("[data-part=id]")).to_have_text(re.compile(r"\d"))
            with server.http() as http:
                (number,) = http.post("/tokenize", json={"prompt": labels[position]}).json()["tokens"]
            assert parts(page)["id"] == str(number)

    facts = [page.locator(f"#usage {kind}").all_text_contents() for kind in ("dt", "dd")]
    shown = dict(zip(*facts, strict=True))
    assert shown["Lookups"] == str(usage["tol"]["lookups"])
    assert shown["Hits"].startswith(f"{usage['tol']['hits']} (")
    assert shown["Answer"] == f"{usage['completion_tokens']} tokens"
    assert shown["Kept"] == f"{usage['prompt_tokens_details']['cached_tokens']} of them"

    asked = json.loads(response.request.post_data or "") | {"stream": False}
    with server.http() as http:
        again = http.post("/v1/completions", json=asked | {"stream_options": None}).json()["choices"][0]
    assert again["logprobs"]["tokens"] == labels
    assert again["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)  # its prompt was kept in part


def test_memory_is_told_by_lines_as_well_as_by_colour(page: Page) -> None:
    run(page, max_tokens=12, seed=3, temperature=1)
    style = "node => getComputedStyle(node).borderBottomStyle"
    page.get_by_label("memory").check()
    kinds = ("hit", "miss", "never")
    found = [page.locator(f"#tokens .{kind}").first for kind in kinds if page.locator(f"#tokens .{kind}").count()]
    assert len({token.evaluate(style) for token in found}) == len(found) >= 2
    ground = "node => getComputedStyle(node).backgroundColor"
    page.get_by_label("probability").check()
    answer = page.locator("#tokens .token:not(.prompt)").all()
    assert len({token.evaluate(ground) for token in answer}) > 2


def test_a_key_is_asked_for_and_kept_from_view(visits: Visits) -> None:
    visits.expected = ["status of 401"]
    page = visits.open(key=None)
    expect(page.locator("#key-error")).to_have_text("The server asks for a key.")
    count = len(visits.asked)
    for given, answer in (("wrong key", "no spaces"), ("wrong", "refuses")):
        page.get_by_label("API key").fill(given)
        page.get_by_role("button", name="Use").click()
        expect(page.locator("#key-error")).to_contain_text(answer)
    page.get_by_label("Prompt", exact=True).fill("a")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#run-error")).to_contain_text("a valid API key is needed")
    page.wait_for_timeout(2500)
    assert len([url for url in visits.asked[count:] if not url.endswith("/ready")]) <= 4, "it must not knock on and on"

    page.locator("#key").fill(KEY)
    page.locator("#key").press("Enter")
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#key-state")).to_have_text("set")
    expect(page.locator("#key")).to_be_hidden()
    run(page, max_tokens=2)
    assert not [url for url in visits.asked if KEY in url]
    assert KEY not in page.content()
    assert page.evaluate("[localStorage.length, document.cookie, document.querySelector('#key').value]") == [0, "", ""]
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")


def test_errors_stand_where_they_happen(page: Page, visits: Visits) -> None:
    visits.expected = ["status of 400"]
    for name, text, says in (("temperature", "9", "temperature"), ("max_tokens", "99999", "max_tokens: 99999")):
        page.locator(f"#{name}").fill(text)
        page.get_by_role("button", name="Run").click()
        expect(page.locator("#run-error")).to_contain_text(says)
        expect(page.locator("#run-status")).to_have_text("failed")
        expect(page.locator(f"#{name}")).to_have_attribute("aria-invalid", "true")
        expect(page.locator(f"#{name}")).to_be_focused()
        page.locator(f"#{name}").fill("1")
    page.locator("#seed").fill("9007199254740993")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#run-error")).to_contain_text("seed")
    run(page, seed=1)
    expect(page.locator("#run-error")).to_be_hidden()
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def never_end(route: Route) -> None:
    """Sends what the page asks for on, with a field that the page hasn't: an answer goes on past its end token."""
    route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))


def test_stop_aborts_the_request_on_the_server(
    visits: Visits, start_server: Callable[..., Running], model_dir_of: Callable[[ModelConfig], Path]
) -> None:
    limit = 30_000  # many seconds' work, so that Stop comes before its end
    server = start_server(model=model_dir_of(tiny_config(max_position_embeddings=2**15))).wait_ready()
    page = visits.open(url=server.url)
    page.locator("#max_tokens").fill(str(limit))
    page.route("**/v1/completions", never_end)
    before = server.metric("tolserve_generation_tokens_total")
    page.get_by_role("button", name="Run").click()
    page.locator("#tokens .token:not(.prompt)").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#run-status")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    deadline = time.monotonic() + 20
    while server.metric("tolserve_num_requests_running"):
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)
    assert server.metric("tolserve_generation_tokens_total") - before < limit
    page.unroute("**/v1/completions")
    assert run(page, max_tokens=3).status == 200


def test_charts_get_data(page: Page, server: Running) -> None:
    expect(page.locator("#running")).to_have_text(re.compile(r"\d"))
    run(page, max_tokens=60, temperature=1)
    for title in ("Hit rate", "Stall", "Tokens per second", "Latency", "Requests", "Memory"):
        value = page.locator(".chart", has=page.get_by_role("heading", name=title)).locator("b").first
        expect(value).to_have_text(re.compile(r"\d"))
    used, slots = (int(server.metric(f'tolserve_tol_{name}{{tier="device"}}')) for name in ("slots_used", "slots"))
    expect(page.locator("#slots")).to_contain_text(f"{used} / {slots}")
    lines = """() => [...document.querySelectorAll('.plot canvas')].map((canvas) => {
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let coloured = 0;  // axes and grid are grey
        for (let i = 0; i < data.length; i += 4) {
          const pixel = data.subarray(i, i + 3);
          coloured += data[i + 3] > 0 && Math.max(...pixel) - Math.min(...pixel) > 80;
        }
        return coloured;
    })"""
    deadline = time.monotonic() + 30
    drawn = page.evaluate(lines)
    while not all(drawn):
        assert time.monotonic() < deadline, drawn
        run(page, max_tokens=60, temperature=1)
        drawn = page.evaluate(lines)
    assert len(drawn) == 6


def test_polling_rests_while_the_page_is_hidden(page: Page, visits: Visits) -> None:
    expect(page.locator("#engine")).to_have_text("ready")
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    page.evaluate(hide % "true" + "document.dispatchEvent(new Event('visibilitychange'))")
    deadline = time.monotonic() + 15
    count = -1
    while count != len(visits.asked):
        assert time.monotonic() < deadline, "it goes on asking"
        count = len(visits.asked)
        page.wait_for_timeout(2500)
    page.evaluate(hide % "false" + "document.dispatchEvent(new Event('visibilitychange'))")
    with page.expect_response("**/metrics"):
        pass


def test_a_server_that_is_away_is_reported_and_found_again(page: Page, visits: Visits) -> None:
    visits.expected = ["ERR_INTERNET_DISCONNECTED"]
    expect(page.locator("#engine")).to_have_text("ready")
    page.context.set_offline(True)
    expect(page.locator("#engine")).to_have_text("not reachable")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#run-error")).to_have_text("the server is not reachable")
    page.context.set_offline(False)
    expect(page.locator("#engine")).to_have_text("ready")
    assert run(page, max_tokens=3).status == 200


def test_the_cache_map_agrees_with_the_server(page: Page, server: Running) -> None:
    run(page, "漢字 Who's there 12, 345 naïve Ωμέγα", max_tokens=100, temperature=1.5)
    page.locator("#hot summary").click()
    for _ in range(2):  # the first one may have been asked for before the end
        with page.expect_response(re.compile("tol/cache")):
            pass
    with server.http() as http:
        view = http.get("/v1/tol/cache", params={"limit": 4096}).json()
    expect(page.locator("#map-count")).to_have_text(f"{view['used']} of {view['slots']} slots used")
    rows = [row.locator("td").all_text_contents() for row in page.locator("#hot tbody tr").all()]
    hottest = sorted(view["tokens"], key=lambda token: -token["uses"])[:50]
    assert [int(row[2]) for row in rows] == [token["uses"] for token in hottest]
    by_id = {token["id"]: token for token in view["tokens"]}
    assert all((int(row[2]), row[3]) == (by_id[int(row[1])]["uses"], by_id[int(row[1])]["state"]) for row in rows)
    evicted = page.locator("#evicted li").evaluate_all("nodes => nodes.map((node) => node.title)")
    assert evicted == [f"id {token['id']}" for token in view["evicted"][:40]]
    assert evicted

    seen = {}
    page.locator("#map").focus()
    page.keyboard.press("Home")
    for _ in range(view["slots"]):
        said = str(page.locator("#map-spoken").text_content())
        if match := re.search(r"id (\d+), (\d+) uses?, (\w+)", said):
            seen[int(match[1])] = (int(match[2]), match[3])
        page.keyboard.press("ArrowRight")
    assert seen == {token["id"]: (token["uses"], token["state"]) for token in view["tokens"]}


def test_a_base_model_has_no_cache_to_show(
    visits: Visits, start_server: Callable[..., Running], model_dir_of: Callable[[ModelConfig], Path]
) -> None:
    visits.expected = ["status of 404"]
    folder = model_dir_of(tiny_config("base", max_position_embeddings=512))
    base = start_server(model=folder).wait_ready()
    page = visits.open(url=base.url)
    expect(page.locator("#map-note")).to_contain_text("no table")
    expect(page.locator("#map")).to_be_hidden()
    run(page, max_tokens=5)
    expect(page.locator(".chart", has_text="Tokens per second").locator("b").first).to_have_text(re.compile(r"\d"))


def test_by_keyboard_alone(page: Page) -> None:
    focused = "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("The old house")
    for name, text in (("max_tokens", "9"), ("temperature", "1"), ("top_p", "1"), ("seed", "5")):
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == name
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type(text)
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "run"
    page.keyboard.press("Enter")
    expect(page.locator("#run-status")).to_contain_text("done")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("memory")).to_be_checked()
    page.keyboard.press("Tab")
    steps = [page.evaluate("document.activeElement.ariaLabel")]
    for key in ("ArrowRight", "ArrowRight", "End", "Home"):
        page.keyboard.press(key)
        steps.append(page.evaluate("document.activeElement.ariaLabel"))
    assert len(set(steps)) == 4
    assert steps[4] == steps[0]
    assert parts(page)["text"] == steps[0].split(",")[0]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    rest = []
    for _ in range(4):
        page.keyboard.press("Tab")
        rest.append(page.evaluate(focused))
    assert rest[:2] == ["map", "SUMMARY"], "one stop for all tokens, and no trap"
    assert "skip" in rest or "BODY" in rest


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_sticks_out_sideways(visits: Visits, width: int) -> None:
    page = visits.open(viewport={"width": width, "height": 800}, has_touch=True)
    run(page, "long" * 40 + " " + PROMPT, max_tokens=40, temperature=1)
    page.locator("#hot summary").click()
    page.locator("#key-box summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inside = """() => [...document.querySelectorAll('main *, header *')].filter((node) =>
        !node.closest('.hidden, .scroll, #evicted, .uplot, svg'))
        .filter((node) => node.getBoundingClientRect().right > innerWidth + 0.5)
        .map((node) => node.outerHTML.slice(0, 80))"""
    assert page.evaluate(inside) == []


# For every element with text of its own: its colour's contrast with the ground it stands on (WCAG 2's formula).
CONTRASTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const written = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.querySelectorAll('body *')]
    .filter((node) => (written(node) || node.matches('input, textarea')) && node.checkVisibility())
    .map((node) => {
      const [a, b] = [light(rgba(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 100)];
    });
}"""


def test_text_is_readable_in_light_and_dark(visits: Visits) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        page = visits.open(color_scheme=scheme)
        run(page, max_tokens=60, temperature=2, seed=3)
        page.locator("#tokens .token").last.hover()
        page.locator("#hot summary").click()
        page.locator("#key-box summary").click()
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for colouring in ("probability", "memory"):
            page.get_by_label(colouring).check()
            found = page.evaluate(CONTRASTS)
            assert len(found) > 150
            assert [entry for entry in found if entry[0] < 4.5] == []
    assert len(grounds) == 2


def test_the_files_are_open_strict_and_cached(server: Running) -> None:
    with httpx.Client(base_url=server.url) as http:  # without the key
        page = http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        names = re.findall(r'(?:href|src)="([^"#]+)"', page.text)
        assert len(names) == 5
        for name in ("/", *(f"/{name}" for name in names)):
            answer = http.get(name)
            policy = answer.headers["content-security-policy"]
            assert answer.status_code == 200
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            again = http.get(name, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert http.get(name, headers={"if-none-match": '"other"'}).status_code == 200
        assert http.get("/console/vendor/uPlot.LICENSE.txt").text.startswith("The MIT License")
        for name in ("/console/", "/console/nothing.js", "/console/..%2fconsole.py", "/console/%2fetc/passwd"):
            assert http.get(name).status_code == 404
        assert http.get("/console").status_code == 401
