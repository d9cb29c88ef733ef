"""The two dashboards, and the JSON that Grafana reads.

    python deploy/grafana/dashboards.py [FOLDER]

writes cache.json and serving.json, by default into `dashboards` beside this file. What is drawn stands in CACHE
and SERVING; the rest is Grafana's wrapping, the same for every panel.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH = 24  # of Grafana's grid
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECT = 'job="$job",instance=~"$instance"'


@dataclass(frozen=True)
class Panel:
    """One picture. `lines` maps a legend to a PromQL expression, in which SELECT stands for the chosen servers."""

    title: str
    description: str
    unit: str
    lines: dict[str, str]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stack: bool = False
    most: float | None = None


def rate(metric: str, *by: str) -> str:
    """Per second, summed over servers and every label but `by`."""
    grouping = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouping} (rate(tolserve_{metric}{{SELECT}}[$__rate_interval]))"


def quantiles(histogram: str) -> dict[str, str]:
    """Three quantiles over the chosen servers. `>= 0` leaves the NaN of "no observation" out."""
    return {
        f"p{100 * q:.0f}": f"histogram_quantile({q}, {rate(f'{histogram}_bucket', 'le')}) >= 0"
        for q in (0.5, 0.95, 0.99)
    }


def fill_quantile(q: float) -> str:
    """By source; zero for a source that nothing came from, so that the panel of a cache that holds all is not empty."""
    quantile = f"histogram_quantile({q}, {rate('tol_fill_seconds_bucket', 'source', 'le')})"
    return f"({quantile} >= 0) or 0 * {rate('tol_fill_seconds_count', 'source')}"


CACHE = [
    Panel(
        "Hit rate",
        "Share of lookups whose record was in the device tier. It is low while the cache fills after a start. If it "
        "falls against its day, the text has changed or more sequences run together: give the device tier more.",
        "percentunit",
        {
            "{{instance}}": "sum by (instance) (rate(tolserve_tol_hits_total{SELECT}[$__rate_interval]))"
            " / (sum by (instance) (rate(tolserve_tol_lookups_total{SELECT}[$__rate_interval])) > 0)",
            "{{instance}}, its day": "instance:tolserve_tol_hit_rate:ratio_rate1d{SELECT}",
        },
        width=12,
        most=1,
    ),
    Panel(
        "Stall share",
        "Seconds that steps waited for rows, per second of wall time. A low hit rate costs time only as far as this "
        "rises. If it does: more device cache, then a host cache, then a faster disk.",
        "percentunit",
        {
            "{{instance}}": rate("tol_stall_seconds_total", "instance"),
        },
        width=12,
    ),
    Panel(
        "Lookups",
        "Distinct tokens of each step, by what was found. Hits and misses together follow the load.",
        "ops",
        {"hits": rate("tol_hits_total"), "misses": rate("tol_misses_total")},
        stack=True,
    ),
    Panel(
        "Misses by source",
        "Where the record was when the step asked. Many from disk: a host cache would answer them faster. Many "
        "inflight: a prefetch or another step had asked already, and the disk is behind.",
        "ops",
        {"{{source}}": rate("tol_misses_total", "source")},
        stack=True,
    ),
    Panel(
        "Fills by cause",
        "Records that arrived in the device tier. Demand fills keep a step waiting, prefetch fills do so only if they "
        "come late; preload happens at the start alone.",
        "ops",
        {"{{cause}}, from {{source}}": rate("tol_fills_total", "source", "cause")},
        stack=True,
    ),
    Panel(
        "Evictions by tier",
        "Records that made room for others. The device tier evicts once it is full; as many evictions as fills are "
        "normal then. If both are near the number of lookups, the tier is far too small.",
        "ops",
        {"{{tier}}": rate("tol_evictions_total", "tier")},
    ),
    Panel(
        "Steps",
        "Steps a second, and those that waited for rows. If nearly every step waits although the hit rate is high, "
        "one missing record among many tokens is enough: look at the fill time.",
        "ops",
        {"all": rate("iteration_tokens_total_count"), "waited for rows": rate("tol_stalled_steps_total")},
    ),
    Panel(
        "Stall per step",
        "Seconds that a step waited for rows, on average, and over the last day. Unlike the stall share it does not "
        "move with the load: if it leaves its day, more lookups miss or the disk is slower. Twice its day is an alarm.",
        "s",
        {
            "{{instance}}": f"{rate('tol_stall_seconds_total', 'instance')}"
            f" / ({rate('iteration_tokens_total_count', 'instance')} > 0)",
            "{{instance}}, its day": "instance:tolserve_tol_stall_seconds_per_step:rate1d{SELECT}",
        },
    ),
    Panel(
        "Fill time",
        "Reading, checking and copying one record, without queueing. Zero for a source that nothing came from. If the "
        "disk's rises, something else uses the disk, or the reads no longer bypass a slow page cache.",
        "s",
        {"p50 {{source}}": fill_quantile(0.5), "p99 {{source}}": fill_quantile(0.99)},
    ),
    Panel(
        "Bytes read by source",
        "Bytes moved to fill the device tier; from disk in whole pages. Compare it with what the disk can do.",
        "Bps",
        {"{{source}}": rate("tol_read_bytes_total", "source")},
    ),
    Panel(
        "Read errors",
        "Failed attempts to read a record, per second, those that a second try made good included. Anything above "
        "zero is worth a look: io points to the disk, checksum and short to a damaged table (`tolserve table verify`).",
        "ops",
        {"{{kind}}": rate("tol_read_errors_total", "kind")},
    ),
    Panel(
        "Table changed",
        "1 while the table's files are not those that the server opened: replaced (reopen them), written to, or gone. "
        "An alarm is raised after 5 minutes.",
        "short",
        {"{{instance}}": "max by (instance) (tolserve_tol_table_changed{SELECT})"},
        most=1,
    ),
    Panel(
        "Slots by tier",
        "Records that a tier can hold and holds, and those that are protected. Numbers are taken between two steps, "
        "when no step protects any: pinned records that stay above zero are a fault.",
        "short",
        {
            "{{tier}}, size": "sum by (tier) (tolserve_tol_slots{SELECT})",
            "{{tier}}, used": "sum by (tier) (tolserve_tol_slots_used{SELECT})",
            "{{tier}}, pinned": "sum by (tier) (tolserve_tol_slots_pinned{SELECT})",
        },
    ),
    Panel(
        "Bytes by tier",
        "Memory that records take. A tier never exceeds its size; if the device tier's use stays below it, it is "
        "larger than what the text needs.",
        "bytes",
        {
            f"{{{{tier}}}}, {word}": f"sum by (tier) (tolserve_tol_{metric}{{SELECT}}"
            " * on (job, instance) group_left () tolserve_tol_record_bytes{SELECT})"
            for word, metric in (("size", "slots"), ("used", "slots_used"))
        },
    ),
]

SERVING = [
    Panel(
        "Engines up",
        "Engines that answer, of all chosen servers. Below the number of servers, requests get 503.",
        "short",
        {"up": "sum(tolserve_engine_up{SELECT})"},
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Tokens",
        "Generated tokens a second, over 5 minutes.",
        "short",
        {"generated": "sum(instance:tolserve_generation_tokens:rate5m{SELECT})"},
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "First token, p95",
        "Of the slowest chosen server, over 5 minutes.",
        "s",
        {"p95": "max(instance:tolserve_time_to_first_token_seconds:p95_rate5m{SELECT})"},
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Between tokens, p95",
        "Of the slowest chosen server, over 5 minutes.",
        "s",
        {"p95": "max(instance:tolserve_inter_token_latency_seconds:p95_rate5m{SELECT})"},
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "In the queue, p95",
        "Of the slowest chosen server, over 5 minutes. An alarm is raised above 10 seconds.",
        "s",
        {"p95": "max(instance:tolserve_request_queue_time_seconds:p95_rate5m{SELECT})"},
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Errors",
        "Answers on /v1 with a status of 500 or above, over 5 minutes, of the worst chosen server. An alarm is raised "
        "above 5%.",
        "percentunit",
        {"errors": "max(instance:tolserve_http_errors:ratio_rate5m{SELECT})"},
        kind="stat",
        width=4,
        height=4,
    ),
    Panel(
        "Tokens per second",
        "Prompt tokens count when their request gets its first answer. If generation falls while requests wait, look "
        "at the stall share and at preemptions.",
        "short",
        {"prompt": rate("prompt_tokens_total"), "generated": rate("generation_tokens_total")},
    ),
    Panel(
        "Time to first token",
        "From arrival to the first token, queueing included. If it rises with the queue time, the server is full; if "
        "alone, prompts are longer or their records are missing.",
        "s",
        quantiles("time_to_first_token_seconds"),
    ),
    Panel(
        "Time between tokens",
        "What a reading user feels. It rises with the sequences in a step and with waiting for rows; lower "
        "--max-num-seqs or --max-num-batched-tokens, or give the cache more.",
        "s",
        quantiles("inter_token_latency_seconds"),
    ),
    Panel(
        "Time of a whole request",
        "From arrival to the last token. It follows the length of the answers; read it beside the two before.",
        "s",
        quantiles("e2e_request_latency_seconds"),
    ),
    Panel(
        "Requests",
        "Running in the batch, and waiting. A queue that does not empty needs another server; an alarm is raised when "
        "it has not for 20 minutes.",
        "short",
        {
            "running": "sum(tolserve_num_requests_running{SELECT})",
            "waiting": "sum(tolserve_num_requests_waiting{SELECT})",
        },
    ),
    Panel(
        "Time in the queue",
        "From arrival to the first step, of requests that were started. If it rises while the batch is not full, KV "
        "blocks or cache slots are what is short.",
        "s",
        quantiles("request_queue_time_seconds"),
    ),
    Panel(
        "Tokens per step",
        "Mean size of a step. Near --max-num-batched-tokens prompts are what the engine works on; near the number of "
        "running requests it is decoding.",
        "short",
        {"tokens": f"{rate('iteration_tokens_total_sum')} / ({rate('iteration_tokens_total_count')} > 0)"},
    ),
    Panel(
        "KV blocks in use",
        "Of each server. At 100% sequences are preempted and computed again: give --kv-cache more, or lower "
        "--max-num-seqs.",
        "percentunit",
        {"{{instance}}": "max by (instance) (tolserve_kv_cache_usage_perc{SELECT})"},
        most=1,
    ),
    Panel(
        "Preemptions",
        "Sequences that gave their KV blocks back, per second. Their work is done twice; it should be zero nearly "
        "always.",
        "ops",
        {"preemptions": rate("num_preemptions_total")},
    ),
    Panel(
        "Prompt tokens found in the prefix cache",
        "Share of looked-up prompt tokens whose keys and values were there from an earlier request. It is as high as "
        "prompts begin alike; if it falls while they do, --kv-cache is too small to keep them.",
        "percentunit",
        {"share": f"{rate('prefix_cache_hits_total')} / ({rate('prefix_cache_queries_total')} > 0)"},
        most=1,
    ),
    Panel(
        "Order changed for the cache",
        "Requests that started before earlier ones because their records were there, and steps that a request let pass "
        "while its record came from disk, per second.",
        "ops",
        {"overtakes": rate("num_overtakes_total"), "sat out": rate("num_sat_out_total")},
    ),
    Panel(
        "HTTP answers by status",
        "429 is a full queue, 499 a client that left, 503 a server that starts, stops or lost its engine. 401 and 400 "
        "are the clients'.",
        "reqps",
        {"{{status}}": rate("http_requests_total", "status")},
        stack=True,
    ),
    Panel(
        "Failures",
        "Answers of status 500 and above on /v1, and requests that failed while they waited or ran, by cause: table (a "
        "record could not be read), dead (the engine died or hung), stopping (cut off when the time to stop was up). A "
        "stream that fails midway has status 200 and counts only there.",
        "reqps",
        {
            "HTTP 5xx": 'sum(rate(tolserve_http_requests_total{SELECT,route=~"/v1/.*",status=~"5.."}'
            "[$__rate_interval])) or vector(0)",
            "{{kind}}": rate("request_failure_total", "kind"),
        },
    ),
    Panel(
        "Engine",
        "Whether each server's engine answers, and its restarts. After a restart the cache is cold; the log says why "
        "the engine ended.",
        "short",
        {
            "{{instance}}, up": "max by (instance) (tolserve_engine_up{SELECT})",
            "{{instance}}, restarts ({{reason}})": "sum by (instance, reason) "
            "(increase(tolserve_engine_restarts_total{SELECT}[$__rate_interval]))",
        },
    ),
    Panel(
        "Resident memory",
        "Of each process. It grows while the tiers fill and must then stay; a line that climbs for hours is a leak.",
        "bytes",
        {"{{instance}}, {{process}}": "sum by (instance, process) (tolserve_resident_memory_bytes{SELECT})"},
    ),
    Panel(
        "Open files",
        "File descriptors of each process: a few dozen, and one for each open connection.",
        "short",
        {"{{instance}}, {{process}}": "sum by (instance, process) (tolserve_open_fds{SELECT})"},
    ),
    Panel(
        "Threads and tasks",
        "Threads of each process, and the API's asyncio tasks, of which each open request has a few. They return to "
        "their old level when the load ends.",
        "short",
        {
            "{{instance}}, {{process}} threads": "sum by (instance, process) (tolserve_threads{SELECT})",
            "{{instance}}, tasks": "sum by (instance) (tolserve_api_tasks{SELECT})",
        },
    ),
]


def drawn(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    """Grafana's form of a panel."""
    custom = {"fillOpacity": 10, "showPoints": "never", "stacking": {"mode": "normal" if panel.stack else "none"}}
    defaults = {"unit": panel.unit, "min": 0} | ({"max": panel.most} if panel.most is not None else {})
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults | ({"custom": custom} if panel.kind == "timeseries" else {})},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expression.replace("SELECT", SELECT),
                "legendFormat": legend,
            }
            for index, (legend, expression) in enumerate(panel.lines.items())
        ],
    }


def query_variable(name: str, query: str, *, several: bool) -> dict[str, Any]:
    many = {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,  # whenever the time range changes, so that new servers show up
        "sort": 1,
    } | (many if several else {})


def dashboard(name: str, title: str, panels: list[Panel]) -> dict[str, Any]:
    """Panels from left to right, a new row where the next one does not fit."""
    placed = []
    x = y = row = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > WIDTH:
            x, y, row = 0, y + row, 0
        placed.append(drawn(number, panel, x, y))
        x, row = x + panel.width, max(row, panel.height)
    return {
        "uid": f"tolserve-{name}",
        "title": title,
        "tags": ["tolserve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"},
                query_variable("job", "label_values(tolserve_engine_up, job)", several=False),
                query_variable("instance", 'label_values(tolserve_engine_up{job="$job"}, instance)', several=True),
            ]
        },
        "links": [
            {"type": "dashboards", "title": "tolserve", "tags": ["tolserve"], "keepTime": True, "includeVars": True}
        ],
        "panels": placed,
    }


def write(folder: Path) -> None:
    for name, title, panels in (("cache", "tolserve: cache", CACHE), ("serving", "tolserve: serving", SERVING)):
        text = json.dumps(dashboard(name, title, panels), indent=1)
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards")
