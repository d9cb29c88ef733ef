"""The page's own logic, module by module, in the browser that runs it."""

import json
import random
from itertools import pairwise

import pytest
from playwright.sync_api import Page
from prometheus_client.parser import text_string_to_metric_families

from e2e.conftest import Running


def test_a_scrape_is_read_as_prometheus_reads_it(page: Page, server: Running) -> None:
    odd = 'odd{a="x, y=\\"} z",b="\\\\n\\n"} 1\nodd_inf +Inf\nodd_small 1e-05\nodd_timed{x=""} 4 1700000000000\n'
    with server.http() as http:
        text = http.get("/metrics").text + odd
    read = page.evaluate(
        """async (text) => {
          const { parse } = await import('/console/prometheus.js');
          const rows = [...parse(text)].flatMap(([name, series]) =>
            [...series.values()].map(({ labels, value }) => [name, labels, String(value)]));
          return JSON.stringify(rows);
        }""",
        text,
    )
    found = [(name, labels, float(value.replace("Infinity", "inf"))) for name, labels, value in json.loads(read)]
    families = text_string_to_metric_families(text)
    expected = [(s.name, s.labels, float(s.value)) for family in families for s in family.samples]
    assert len(found) > 50
    assert sorted(map(repr, found)) == sorted(map(repr, expected))


RATES = """async ([before, after]) => {
  const { parse, increase, quantile } = await import('/console/prometheus.js');
  const [old, now] = [parse(before), parse(after)];
  return [increase(old, now, 'n', {}), increase(old, now, 'n', { a: '2' }), increase(old, now, 'none'),
    ...[0.5, 0.9, 1].map((q) => quantile(old, now, 'h', q))];
}"""


def histogram(*counts: int) -> str:
    bounds = ("0.1", "0.2", "0.4", "+Inf")
    buckets = "".join(f'h_bucket{{le="{bound}"}} {count}\n' for bound, count in zip(bounds, counts, strict=True))
    return buckets + f"h_count {counts[-1]}\n"


def test_rates_and_quantiles_between_two_scrapes(page: Page) -> None:
    before = 'n{a="1"} 10\nn{a="2"} 5\n' + histogram(1, 1, 1, 1)
    after = 'n{a="1"} 13\nn{a="2"} 5\nn{a="3"} 2\n' + histogram(3, 11, 11, 11)
    assert page.evaluate(RATES, [before, after]) == [5, 0, None, *map(pytest.approx, (0.1375, 0.1875, 0.2))]
    # Counters that fell began anew at zero.
    restarted = 'n{a="1"} 4\nn{a="2"} 6\n' + histogram(0, 0, 4, 5)
    assert page.evaluate(RATES, [after, restarted]) == [5, 1, None, pytest.approx(0.325), 0.4, 0.4]
    # Nothing happened: no quantile.
    assert page.evaluate(RATES, [after, after]) == [0, 0, None, None, None, None]


def test_events_are_read_whatever_the_pieces(page: Page) -> None:
    events = ["a", '{"text": "é\\n: x"}', "two\nlines", "", "[DONE]"]
    rng = random.Random(1)
    for end in ("\n", "\r\n", "\r"):
        text = f": comment{end}event: x{end}"
        for event in events:
            text += "".join(f"data: {line}{end}" for line in event.split("\n")) + end
        # A lone CR at the very end may be half of CR LF; the next event shows that it is not.
        text += f": end{end}"
        cuts = [sorted(rng.sample(range(len(text)), k)) for k in (0, 1, 2, 5, 20) for _ in range(20)]
        cuts.append(list(range(len(text))))
        pieces = [[text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)] for cut in cuts]
        read = page.evaluate(
            """async (trials) => {
              const { EventParser } = await import('/console/api.js');
              return trials.map((pieces) => {
                const parser = new EventParser();
                return pieces.flatMap((piece) => parser.feed(piece));
              });
            }""",
            pieces,
        )
        assert all(found == events for found in read)


def test_a_token_keeps_its_cell(page: Page) -> None:
    rng = random.Random(2)
    size, present, history = 12, list[int](), []
    for _ in range(200):
        present = rng.sample(present, rng.randrange(len(present) + 1))
        present += rng.sample([i for i in range(40) if i not in present], rng.randrange(size - len(present) + 1))
        history.append(list(present))
    cells = page.evaluate(
        """async ([history, size]) => {
          const { Seats } = await import('/console/cachemap.js');
          const seats = new Seats();
          return history.map((ids) => {
            seats.place(ids.map((id) => ({ id })), size);
            return seats.cells.map((token) => token?.id ?? null);
          });
        }""",
        [history, size],
    )
    for now, ids in zip(cells, history, strict=True):
        assert len(now) == size
        assert sorted(id for id in now if id is not None) == sorted(ids)
    for old, new in pairwise(cells):
        assert all(new.index(id) == old.index(id) for id in old if id is not None and id in new)


def test_names_and_labels_of_tokens_are_the_same_bytes(page: Page, server: Running) -> None:
    """The tokenizer's names, as /tokenize lists them, against its text."""
    text = "The café, 漢字 🙂\n\tnaïve Ωμέγα <|endoftext|>“x”"
    with server.http() as http:
        names = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()["token_strs"]
    read = page.evaluate(
        """async (names) => {
          const { bytesOfName, bytesOfLabel, labelOf } = await import('/console/text.js');
          const bytes = names.map(bytesOfName);
          return [bytes.flatMap((part) => [...part]), bytes.map(labelOf).flatMap((label) => [...bytesOfLabel(label)])];
        }""",
        names,
    )
    assert [bytes(part).decode() for part in read] == [text, text]


def test_readings_begin_anew_after_a_gap(page: Page) -> None:
    scrapes = [(float(t), f"tolserve_generation_tokens_total {100 * t}\n") for t in (1, 2, 3, 10, 11, 12)]
    read = page.evaluate(
        """async (scrapes) => {
          const { History } = await import('/console/readings.js');
          const { parse } = await import('/console/prometheus.js');
          const history = new History();
          for (const [time, text] of scrapes) history.add(time, parse(text));
          return history.readings.map(({ time, generated }) => [time, generated ?? null]);
        }""",
        scrapes,
    )
    assert read == [[2, 100], [3, 100], [4, None], [11, 100], [12, 100]]
