#!/usr/bin/env python3
"""Compares api-together with a bare Pingora proxy, nginx and other gateways: throughput, latency, CPU time.

Every contender runs between the same load generator (oha) and the same endpoint (benches/endpoint.rs), which have other
processor cores. Contenders take turns in rounds, and the medians of one run are compared. Prints tables, and writes them
into BENCHMARKS.md with --write. `make bench` builds and installs everything that is needed.
"""

import argparse
import dataclasses
import pathlib
import shutil
import statistics
import sys
import time

from harness import LOG_OFF, Bench, cell, first_line, json_body, table, write

BARE = "bare Pingora"


@dataclasses.dataclass
class Scenario:
    """One kind of load."""

    name: str
    title: str
    body_bytes: int
    stream: bool = False
    connections: int = 32
    headers: dict = dataclasses.field(default_factory=dict)
    # Requests a second; None for as many as possible.
    rate: int = None
    # Events of one answer; None if requests are counted.
    events: int = None


SATURATED = [
    Scenario("json-1k", "JSON, 1 KB request", 1024),
    Scenario("json-64k", "JSON, 64 KB request", 64 * 1024),
    Scenario("json-5m", "JSON, 5 MB request", 5 * 1024 * 1024, connections=8),
    Scenario("sse-burst", "SSE, 200 events at once", 1024, stream=True, events=200),
    # 25,000 events a second, whichever contender is in between.
    Scenario("sse-paced", "SSE, 200 events 20 ms apart", 1024, True, 500, {"x-pace-ms": "20"}, events=200),
]
# Requests a second: a low rate, and a rate for which others publish latencies.
FIXED_RATES = [1_000, 3_000]


@dataclasses.dataclass
class Run:
    """Results of one run of the load generator."""

    rate: float
    p50: float
    p99: float
    cpu_per_1000: float
    cores_used: float
    # Resident memory at the end, in MiB.
    memory: float
    # The mean of the contender's own share of a request, in µs; None if it does not report it.
    own: float
    failed: int


def measure(bench, options, contender, scenario, seconds):
    body = bench.folder / f"{scenario.name}.json"
    body.write_bytes(json_body(scenario.body_bytes, scenario.stream))
    command = [options.oha, "--no-tui", "--output-format", "json", "-z", f"{seconds}s", "-w", "-m", "POST", "-D", body]
    command += ["-c", scenario.connections]
    for name, value in (contender.all_headers() | scenario.headers).items():
        command += ["-H", f"{name}: {value}"]
    if scenario.rate:
        command += ["-q", scenario.rate, "--latency-correction"]
    own = contender.own_seconds() if contender.tells_own else None
    cpu, begun = contender.cpu_seconds(), time.monotonic()
    told = bench.on_load_cores([*command, contender.url], seconds * 3 + 120)
    cpu, wall = contender.cpu_seconds() - cpu, time.monotonic() - begun
    if own:
        own_seconds, own_requests = (after - before for before, after in zip(own, contender.own_seconds()))
        own = own_seconds / max(own_requests, 1) * 1e6
    statuses = told["statusCodeDistribution"]
    answered = statuses.get("200", 0)
    return Run(
        rate=answered / told["summary"]["total"],
        p50=(told["latencyPercentiles"]["p50"] or 0) * 1e6,
        p99=(told["latencyPercentiles"]["p99"] or 0) * 1e6,
        cpu_per_1000=cpu / max(answered, 1) * 1000,
        cores_used=cpu / wall,
        memory=contender.memory_bytes() / 2**20,
        own=own,
        failed=sum(statuses.values()) - answered + sum(told["errorDistribution"].values()),
    )


class Results:
    """Runs by scenario and contender."""

    def __init__(self):
        self.runs = {}

    def add(self, scenario, contender, run):
        self.runs.setdefault(scenario.name, {}).setdefault(contender.name, []).append(run)

    def of(self, scenario, name):
        return self.runs.get(scenario.name, {}).get(name, [])

    def median(self, scenario, name, field):
        told = [value for run in self.of(scenario, name) if (value := getattr(run, field)) is not None]
        return statistics.median(told) if told else None

    def against(self, scenario, name, base, field, compare):
        """A value for each round, in which both met the same machine (except gateways, which come last)."""
        pairs = zip(self.of(scenario, name), self.of(scenario, base))
        return [compare(getattr(ours, field), getattr(theirs, field)) for ours, theirs in pairs if getattr(theirs, field)]

    def ratios(self, scenario, name, base, field):
        return self.against(scenario, name, base, field, lambda ours, theirs: ours / theirs)

    def added(self, scenario, name, base, field):
        return self.against(scenario, name, base, field, lambda ours, theirs: ours - theirs)

    def failed(self):
        for scenario, by_name in self.runs.items():
            for name, runs in by_name.items():
                if failed := sum(run.failed for run in runs):
                    yield f"{name} in {scenario}: {failed}"


def middle(values, form):
    """Returns the median."""
    return form.format(statistics.median(values)) if values else ""


def spread(values, form):
    """Returns the median and the range of the middle half."""
    if len(values) < 4:
        return middle(values, form)
    low, _, high = (form.format(quartile) for quartile in statistics.quantiles(values, n=4))
    return middle(values, form) + (f" ({low} to {high})" if low != high else "")


def run_rounds(bench, options):
    """Runs the chosen scenarios. Returns their results, and the scenarios at saturation and at fixed rates."""
    results = Results()
    quick = [one for one in bench.contenders if not one.is_gateway]

    def warm_up(contender_list):
        """Runs each contender once, so that none is cold in the first round."""
        for contender in contender_list:
            measure(bench, options, contender, SATURATED[0], 2)

    def rounds(scenario_list, contender_list):
        for number in range(options.rounds):
            # The second one finds a warmer machine, so the order changes with each round.
            turn = number % len(contender_list)
            for scenario in scenario_list:
                print(f"round {number + 1} of {options.rounds}: {scenario.title}", file=sys.stderr)
                for contender in contender_list[turn:] + contender_list[:turn]:
                    results.add(scenario, contender, measure(bench, options, contender, scenario, options.seconds))

    warm_up(quick)
    saturated = [one for one in SATURATED if not options.only or one.name in options.only]
    rounds(saturated, quick)
    rates = []
    bare = results.median(SATURATED[0], BARE, "rate")
    if bare and not options.no_rates:
        half = int(bare / 2) // 100 * 100
        rates = [Scenario(f"rate-{rate}", f"1 KB requests at {rate:,} a second", 1024, rate=rate) for rate in FIXED_RATES]
        rates += [
            Scenario("rate-half", f"1 KB requests at {half:,} a second, half of what bare Pingora takes", 1024, rate=half)
        ]
        rounds(rates, quick)
    if SATURATED[0] in saturated and (gateways := bench.start_gateways()):
        warm_up(gateways)
        rounds(SATURATED[:1], gateways)
    return results, saturated, rates


def saturation_table(results, scenario, contenders):
    unit, per = ("events/s", scenario.events) if scenario.events else ("requests/s", 1)
    rows = []
    for name in (one.name for one in contenders):
        rate = results.median(scenario, name, "rate")
        if rate is None:
            continue
        row = [name, f"{rate * per:,.0f}"]
        row.append(spread(results.ratios(scenario, name, BARE, "rate"), "{:.2f}"))
        row.append(middle(results.ratios(scenario, name, "nginx", "rate"), "{:.2f}"))
        if name == "direct":
            row += ["", "", "", ""]
        else:
            row += [
                cell(results.median(scenario, name, "cpu_per_1000"), "{:.3f}"),
                spread(results.ratios(scenario, name, BARE, "cpu_per_1000"), "{:.2f}"),
                cell(results.median(scenario, name, "cores_used"), "{:.2f}"),
                cell(results.median(scenario, name, "memory"), "{:.0f}"),
            ]
        rows.append(row + [f"{results.median(scenario, name, field):,.0f}" for field in ("p50", "p99")])
    head = ["", unit, "of bare", "of nginx", "CPU s per 1,000 requests", "of bare", "cores used", "MiB", "p50 µs", "p99 µs"]
    return f"**{scenario.title}**, {scenario.connections} connections\n\n{table(head, rows)}"


def rate_table(results, scenario, contenders):
    rows = []
    for name in (one.name for one in contenders):
        if results.median(scenario, name, "rate") is None:
            continue
        row = [name] + [f"{results.median(scenario, name, field):,.0f}" for field in ("rate", "p50", "p99")]
        row += [middle(results.added(scenario, name, "direct", field), "{:+,.0f}") for field in ("p50", "p99")]
        row.append(spread(results.added(scenario, name, BARE, "p50"), "{:+,.0f}"))
        row.append(middle(results.added(scenario, name, BARE, "p99"), "{:+,.0f}"))
        row.append("" if name == "direct" else f"{results.median(scenario, name, 'cpu_per_1000'):.3f}")
        rows.append(row + [cell(results.median(scenario, name, "own"), "{:.1f}")])
    head = ["", "requests/s", "p50 µs", "p99 µs", "p50 over direct", "p99 over direct", "p50 over bare", "p99 over bare"]
    head += ["CPU s per 1,000 requests", "own share, mean µs"]
    return f"**{scenario.title}**\n\n{table(head, rows)}"


def report(bench, options, results, saturated, rates):
    versions = f"{first_line([options.oha, '--version'])}, {first_line(['nginx', '-v']).removeprefix('nginx version: ')}"
    preface = f"{bench.preface('make bench')} {options.rounds} rounds of {options.seconds} s each, medians, and in "
    preface += f"brackets the middle half of the rounds; {versions}. MiB is resident memory at the end of a run."
    parts = [preface]
    parts += [saturation_table(results, scenario, bench.contenders) for scenario in saturated]
    parts += [rate_table(results, scenario, bench.contenders) for scenario in rates]
    failed = "; ".join(results.failed())
    for contender in (one for one in bench.contenders if one.tells_own and one.name != LOG_OFF):
        written, dropped = contender.logged()
        parts.append(f"Request log of {contender.name}: {written:,} requests written, {dropped:,} dropped at saturation.")
    parts.append(f"Requests that did not answer 200: {failed}." if failed else "Every request of every run was answered with 200.")
    return "\n\n".join(parts) + "\n"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--seconds", type=int, default=2, help="of each run: the machine changes within seconds, so many short ones")
    arguments.add_argument("--only", nargs="*", metavar="SCENARIO", help=", ".join(one.name for one in SATURATED))
    arguments.add_argument("--contenders", nargs="*", metavar="NAME")
    arguments.add_argument("--no-rates", action="store_true", help="leave the runs at fixed rates out")
    arguments.add_argument("--write", action="store_true", help="write the figures into BENCHMARKS.md")
    arguments.add_argument("--oha", default=shutil.which("oha") or pathlib.Path.home() / ".cargo/bin/oha")
    options = arguments.parse_args()
    with Bench(options.contenders) as bench:
        text = report(bench, options, *run_rounds(bench, options))
    print(text)
    if options.write:
        write("make bench", text)


if __name__ == "__main__":
    main()
