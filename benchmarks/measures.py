"""What is measured, and against which target. README.md says what each figure shows and what it does not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks import relays, senders
from benchmarks.awaiting import awaitings
from benchmarks.figures import Figure, Section, figure, latency_line, lines, percentile_us, standing_still
from benchmarks.inbox import half_loads, handlings, inboxes
from benchmarks.outbox import outboxes
from benchmarks.outbox_postgres import postgres_outboxes
from benchmarks.plan import TRIAL, Plan
from benchmarks.reading import memory_of_reading, rates, readings, still
from benchmarks.recovery import recoveries
from benchmarks.requests import send_batches
from benchmarks.rivals import BATCH, WINDOW, config, rivals
from benchmarks.serializers import serializers
from benchmarks.sides.base import Result
from benchmarks.turns import Contender, Effort, Score, pairs, rate_ratio
from benchmarks.verify import same_bytes
from benchmarks.whole_way import whole_ways

LATENCY_SIZES = (1, 100, 1_000)
LARGE_BATCH = 200_000
#: so that the mock cluster, which keeps 5 MiB of each, loses nothing of it
LARGE_PARTITIONS = 32
AWAITED_RTT_MS = 5
ROUND_TRIPS_MS = (0, 1, 5)
LINGERS_MS = (0, 1, 5)
REQUESTS_IN_FLIGHT = (5, 2, 1)  # the first is librdkafka's default for an idempotent producer
FAR_ROUND_TRIPS_MS = (None, 1, 5, 20)
#: librdkafka takes fractions, of which it makes little
LINGER_TRIALS_MS = (0, 0.2, 1, 5)
CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
CODEC_SIZES = (1_000, 10_000)
REQUESTS_SIZES = (1, 10, 100, 1_000, 10_000)
#: several threads that each await small batches on one producer
THREADS, SMALL_BATCH = 8, 10

# The targets, of batches of so many where they differ.
ONE_AT_A_TIME = {100: 0.95, 1_000: 1.3, 10_000: 1.2}  # to the C loop that makes its header lists anew
IN_FLIGHT = {100: 1.4, 1_000: 1.5, 10_000: 1.4}
IN_FLIGHT_RECYCLING = {100: 0.87, 1_000: 0.93, 10_000: 0.87}  # to the one that uses them again
CONFLUENT = 8.0  # with an outcome for each message
CONFLUENT_LEAST = 1.0  # where librdkafka itself is not so much faster, nobody above it can be
AIOKAFKA = 12.0
AIOPRODUCER = 8.0
FASTSTREAM = 5.0
JAVA_RATE, JAVA_CPU = 1.1, 1.2  # on a real Kafka
AWAITED = 500.0
GIL_US = 0.45
PLAIN_VALUES = 0.85  # of the C loop
GROWTH_MIB = 4.0
LATENCY_OF_C_LOOP = 1.2
LATENCY_OF_CONFLUENT = 1.0
RECOVERY_S = 1.0


def _cpu_ratio(mine: Result, its: Result) -> float:
    return mine.cpu_us / its.cpu_us


def _cpu_difference(mine: Result, its: Result) -> float:
    return mine.cpu_us - its.cpu_us


def _call_p50(mine: Result, its: Result) -> float:
    return percentile_us(mine.served_ns, 0.5) / percentile_us(its.served_ns, 0.5)


def _call_p99(mine: Result, its: Result) -> float:
    return percentile_us(mine.served_ns, 0.99) / percentile_us(its.served_ns, 0.99)


def _due_p50(mine: Result, its: Result) -> float:
    return percentile_us(mine.latencies_ns, 0.5) / percentile_us(its.latencies_ns, 0.5)


def _due_p99(mine: Result, its: Result) -> float:
    return percentile_us(mine.latencies_ns, 0.99) / percentile_us(its.latencies_ns, 0.99)


def check_bytes(plan: Plan) -> Iterator[Section]:
    section = Section("The same keys, values and headers on all sides", "bytes")
    for headers in plan.headers:
        sides: list[tuple[str, dict[str, Any]]] = [
            ("cloop", {}), ("recycling", {}), ("kbatch", {}), ("kbatch", {"just_in_time": True}), ("confluent", {}),
            ("confluent", {"form": "callback"}), ("aiokafka", {}), ("aiokafka", {"form": "send_batch"}),
        ]  # fmt: skip
        if not headers:
            sides += [("confluent", {"call": "produce_batch"}), ("aioproducer", {})]
        else:
            sides += [("produce", {}), ("produce", {"form": "callback"})]
            sides += [("sender", {}), ("sender_aio", {}), ("sender", {"form": "inline"})]
        if plan.class_path:
            sides.append(("java", {"class_path": plan.class_path}))
        body, header_bytes = same_bytes(plan.open_broker, headers, sides)
        section.notes.append(
            f"{headers} headers: read back and compared; bodies of {body:.0f} bytes, header names and values together "
            f"{header_bytes:.0f} bytes"
        )
    yield section


def tune_confluent(plan: Plan, batch: int, form: str, headers: int = 8) -> Contender:
    """The rival's best settings, by trial: linger and messages in flight."""
    trials = [
        Contender(f"linger {linger} ms, {window:,} in flight", "confluent", batch, window,
                  {"linger_ms": linger, "form": form})
        for linger, window in ((5, 10 * WINDOW), (0, WINDOW), (5, WINDOW), (50, 10 * WINDOW))
    ]  # fmt: skip
    return plan.best(trials, headers)


def loops(plan: Plan) -> Iterator[Section]:
    """kbatch against both C loops and both forms of confluent-kafka, for each size and header count."""
    for batch in plan.sizes:
        best = {form: tune_confluent(plan, batch, form) for form in ("callback", "errors-only")}
        for headers in plan.headers:
            yield _loop(plan, batch, headers, best)


CONFLUENT_FORMS = {
    "callback": "confluent-kafka, an outcome for each",
    "errors-only": "confluent-kafka, told of errors only",
}


def _loop(plan: Plan, batch: int, headers: int, best: dict[str, Contender]) -> Section:
    official = headers == 8
    pair = {"one batch at a time": 0, f"{WINDOW:,} in flight": WINDOW}
    sides = {"C loop": "cloop", "kbatch": "kbatch"} | ({"C loop, recycling": "recycling"} if headers else {})
    contenders = [Contender(f"{name}, {how}", side, batch, window)
                  for how, window in pair.items() for name, side in sides.items()]  # fmt: skip
    contenders += [replace(best[form], label=label) for form, label in CONFLUENT_FORMS.items()]
    scores = plan.take_turns(contenders, plan.effort if official else plan.less, headers=headers)
    section = Section(
        f"Batches of {batch:,}, {headers} headers", "loops", {"batch": batch, "headers": headers}, lines(scores)
    )
    for how, targets in zip(pair, ((ONE_AT_A_TIME, {}), (IN_FLIGHT, IN_FLIGHT_RECYCLING)), strict=True):
        mine = scores[f"kbatch, {how}"]
        loop_targets = dict(zip(("C loop", "C loop, recycling"), targets, strict=True))
        for name in sides:
            if name == "kbatch":
                continue
            its = scores[f"{name}, {how}"]
            section.figures += [
                figure(f"kbatch / {name}, {how}", pairs(mine, its, rate_ratio),
                       target=loop_targets[name].get(batch) if official else None),
                figure(f"  CPU more than the {name}, {how}", pairs(mine, its, _cpu_difference), unit=" µs"),
            ]  # fmt: skip
    faster, loop = (
        max((scores[f"{name}, {how}"] for how in pair), key=lambda score: median(score.rates))
        for name in ("kbatch", "C loop")
    )
    for form, label in CONFLUENT_FORMS.items():
        section.figures += [
            figure(f"kbatch / {label}, each at its best", pairs(faster, scores[label], rate_ratio),
                   target=CONFLUENT if official and form == "callback" else None, least=CONFLUENT_LEAST),
            figure(f"  C loop / {label}", pairs(loop, scores[label], rate_ratio)),
        ]  # fmt: skip
        section.notes.append(f"{label}: {best[form].label}")
    section.notes.append(_phases(scores["kbatch, one batch at a time"]))
    return section


def _phase_us(stats: dict[str, int]) -> tuple[float, float]:
    """Microseconds per envelope in phases 1 and 2, by the wall clock."""
    return stats["map_ns"] / stats["envelopes"] / 1000, stats["enqueue_ns"] / stats["envelopes"] / 1000


def _phases(score: Score) -> str:
    rounds = [_phase_us(final["stats"]) for final in score.finals]
    mapping, enqueueing = (median(both[number] for both in rounds) for number in (0, 1))
    return (
        f"kbatch, one batch at a time: phase 1 {mapping:.2f} µs, phase 2 {enqueueing:.2f} µs per envelope (wall clock)"
    )


def awaited(plan: Plan) -> Iterator[Section]:
    """One awaited produce per message against batches, with a round trip of 1 ms."""
    single = Contender("confluent-kafka, produce + flush each", "confluent", 1, options={"linger_ms": 0})
    own = Contender("kbatch, send_batch of one", "kbatch", 1)
    others = [
        Contender("aiokafka, send_and_wait each", "aiokafka", 1),
        Contender("AIOProducer, produce + flush each, no headers", "aioproducer", 1, headers=0),
        Contender("FastStream (aiokafka), publish_batch of one, no headers", "faststream", 1, headers=0),
    ]
    batches = [Contender(f"kbatch, send_batch of {batch:,}", "kbatch", batch) for batch in (1_000, 10_000)]
    scores = plan.take_turns((single, own, *others, *batches), rtt_ms=1)
    section = Section(
        "One awaited produce per message, round trip 1 ms, 8 headers", "awaited", {"rtt_ms": 1}, lines(scores)
    )
    section.figures = [
        figure(f"{batch.label} / produce + flush", pairs(scores[batch.label], scores[single.label], rate_ratio),
               digits=0, target=AWAITED if batch.batch == 10_000 else None)
        for batch in batches
    ]  # fmt: skip
    yield section


def latency(plan: Plan) -> Iterator[Section]:
    """p50 and p99 of batches that are due at fixed times, at half the highest load; one at a time."""
    for batch in LATENCY_SIZES:
        yield _latency(plan, batch)


def _latency(plan: Plan, batch: int) -> Section:
    loop, mine = Contender("C loop", "cloop", batch), Contender("kbatch, send_batch", "kbatch", batch)
    rivals = [
        Contender(f"confluent-kafka, {form}, {wait}", "confluent", batch, 0,
                  {"linger_ms": 0, "form": form, "wait": wait})
        for form, wait in (("callback", "poll"), ("callback", "flush"), ("errors-only", "flush"))
    ]  # fmt: skip
    highest = plan.take_turns((loop, mine, *rivals), TRIAL, split=True)
    rates = {label: median(score.rates) / batch for label, score in highest.items()}
    rival = max(rivals, key=lambda trial: rates[trial.label])
    section = Section(f"Latency, batches of {batch:,} at half the highest load, 8 headers", "latency", {"batch": batch})
    half, its_half = rates[loop.label] / 2, rates[rival.label] / 2
    contenders = [
        replace(loop, label="C loop, at half its highest load", batches_per_s=half),
        replace(mine, label="kbatch, as often", batches_per_s=half),
        replace(rival, label="confluent-kafka, at half its highest load", batches_per_s=its_half),
        replace(mine, label="kbatch, as often as that", batches_per_s=its_half),
    ]
    # twice as many where they are short, so that the 99th percentile rests on more of them
    effort = replace(plan.latency, batches=plan.latency.batches * (2 if batch == 1 else 1))
    scores = plan.take_turns(contenders, effort, split=True)
    section.latencies = [latency_line(each.label, each.batches_per_s, scores[each.label]) for each in contenders]
    c_loop, as_c_loop, confluent, as_confluent = scores.values()
    for name, ratio in (("p50", _call_p50), ("p99", _call_p99)):
        section.figures += [
            figure(f"kbatch / C loop, {name} of the call", pairs(as_c_loop, c_loop, ratio),
                   target=LATENCY_OF_C_LOOP, at_most=True),
            figure(f"kbatch / confluent-kafka, {name} of the call", pairs(as_confluent, confluent, ratio),
                   target=LATENCY_OF_CONFLUENT, at_most=True),
        ]  # fmt: skip
    for name, ratio in (("p50", _due_p50), ("p99", _due_p99)):
        section.figures += [
            figure(f"  {name} since due, kbatch / C loop", pairs(as_c_loop, c_loop, ratio), at_most=True),
            figure(
                f"  {name} since due, kbatch / confluent-kafka", pairs(as_confluent, confluent, ratio), at_most=True
            ),
        ]
    section.notes.append(
        "highest load, batches/s: " + "; ".join(f"{label} {rate:,.0f}" for label, rate in rates.items())
    )
    return section


def recovery(plan: Plan) -> Iterator[Section]:
    """From a broker's return to the first acknowledgement, on kbatch and on the C loop."""
    quiet = {"config": {"log_level": "0"}}  # that the broker is gone is no news
    contenders = [
        Contender("C loop", "cloop", 100, options=quiet),
        Contender("kbatch, send_batch", "kbatch", 100, options=quiet),
    ]
    found = recoveries(contenders, plan.outages)
    section = Section("First acknowledgement after a broker's return, batches of 100, round trip 20 ms", "recovery")
    for label, outages in found.items():
        section.figures.append(figure(label, [delay for delays in outages for delay in delays], unit=" s"))
    its, mine = found.values()
    section.figures.append(
        figure("kbatch later than the C loop, medians of each outage",
               [median(later) - median(delays) for later, delays in zip(mine, its, strict=True)], unit=" s",
               target=RECOVERY_S, at_most=True)
    )  # fmt: skip
    section.details["seconds"] = found
    yield section


def loop_pauses(plan: Plan) -> Iterator[Section]:
    """What an event loop's other tasks notice of a large batch, and how long one envelope takes that is awaited."""
    names = {"aio": "await kbatch.aio.Producer.send_batch", "submit": "await kbatch.Producer.submit"}
    large = [Contender(name, "kbatch_aio", LARGE_BATCH, options={"form": form}) for form, name in names.items()]
    scores = plan.take_turns(
        large,
        Effort(1, 5, 0),
        partitions=LARGE_PARTITIONS,
        counts=lambda contender: contender.batch,
        patient=False,  # a turn is long, and shows by itself what else the machine did
    )
    section = Section(
        f"Event loop: pauses while a batch of {LARGE_BATCH:,} is sent, 8 headers", "pauses", lines=lines(scores)
    )
    for contender in large:
        turns = scores[contender.label].turns
        section.figures.append(
            figure(f"{contender.label}: longest pause", [turn.extra["longest_ms"] for turn in turns], unit=" ms",
                   at_most=True)
        )  # fmt: skip
        section.figures.append(
            figure("  the same with nothing sent", [turn.extra["alone_ms"] for turn in turns], unit=" ms")
        )
    yield section
    singles = [
        Contender("C loop", "cloop", 1),
        Contender("kbatch, send_batch", "kbatch", 1),
        *(Contender(name, "kbatch_aio", 1, options={"form": form}) for form, name in names.items()),
    ]
    paced = [replace(each, batches_per_s=500 / AWAITED_RTT_MS) for each in singles]
    effort = Effort(1, 5, 0, batches=50)
    scores = plan.take_turns(paced, effort, rtt_ms=AWAITED_RTT_MS)
    section = Section(f"Event loop: one envelope awaited, round trip {AWAITED_RTT_MS} ms, 8 headers", "one_awaited")
    section.latencies = [latency_line(each.label, each.batches_per_s, scores[each.label]) for each in paced]
    for each in paced[1:]:
        section.figures.append(
            figure(f"{each.label} / C loop, p50", pairs(scores[each.label], scores["C loop"], _call_p50),
                   target=LATENCY_OF_C_LOOP, at_most=True)
        )  # fmt: skip
    yield section


def gil(plan: Plan) -> Iterator[Section]:
    """How long a competing pure-Python thread stands still per envelope."""
    effort = replace(plan.less, seconds=2 * plan.less.seconds)
    mine = [
        Contender(f"kbatch, batches of {batch:,}", "kbatch", batch, WINDOW, competitor=True)
        for batch in (1_000, 10_000)
    ]
    # What of it is the encoder's time, and what else phase 1 takes.
    encoded = Contender("kbatch, batches of 1,000, bodies that are bytes", "kbatch", 1_000, WINDOW, {"encoded": True},
                        competitor=True)  # fmt: skip
    rival = Contender("confluent-kafka, mapped in Python", "confluent", 1_000, 10 * WINDOW, {"linger_ms": 5},
                      competitor=True)  # fmt: skip
    control = Contender("control: the C loop in another process", "control", 1_000, WINDOW, competitor=True)
    scores = plan.take_turns((*mine, encoded, rival, control), effort, apart=True)
    section = Section("GIL per envelope: what a competing thread loses, 8 headers", "gil", lines=lines(scores))
    standing_still(section, scores, {each.label: GIL_US for each in mine})
    for each in (*mine, encoded):
        (final,) = scores[each.label].finals
        section.notes.append(f"{each.label}: phase 1 takes {_phase_us(final['stats'])[0]:.2f} µs per envelope")
    yield section


def cold_envelopes(plan: Plan) -> Iterator[Section]:
    """What it costs in phase 1 that envelopes were made long before, and are no longer in a cache."""
    for headers in (8, 0):
        contenders = [
            Contender(f"{bodies}, made {when}", "kbatch", BATCH, 0,
                      {"encoded": bodies == "bytes", "just_in_time": when == "just before"})
            for bodies in ("messages", "bytes")
            for when in ("long before", "just before")
        ]  # fmt: skip
        scores = plan.take_turns(contenders, headers=headers)
        section = Section(
            f"Phase 1: envelopes made long before and just before, batches of {BATCH:,}, one at a time, "
            + (f"{headers} headers" if headers else 'wire="raw", a key'),
            "cold",
            {"headers": headers},
            lines(scores),
        )
        for each in contenders:
            phases = [_phase_us(final["stats"]) for final in scores[each.label].finals]
            section.figures += [
                figure(f"{each.label}: phase {number}", [both[number - 1] for both in phases], unit=" µs")
                for number in (1, 2)
            ]
        yield section


def plain_values(plan: Plan) -> Iterator[Section]:
    """Bodies of 100 bytes, no key, no headers, wire="raw"."""
    contenders = [
        Contender("kbatch, 10,000 at a time", "kbatch", 10_000),
        Contender(f"kbatch, {WINDOW:,} in flight", "kbatch", 1_000, WINDOW),
        Contender(f"kbatch, {4 * WINDOW:,} in flight", "kbatch", 10_000, 4 * WINDOW),
        Contender("C loop, 10,000 at a time", "cloop", 10_000),
        Contender(f"C loop, {WINDOW:,} in flight", "cloop", 1_000, WINDOW),
        Contender("confluent-kafka", "confluent", 1_000, 10 * WINDOW, {"linger_ms": 5}),
    ]
    scores = plan.take_turns(contenders, values=100)
    section = Section('Plain values of 100 bytes, wire="raw"', "values", lines=lines(scores))
    section.figures = [
        figure(f"kbatch / C loop, {its.label.removeprefix('C loop, ')}",
               pairs(scores[mine.label], scores[its.label], rate_ratio), target=PLAIN_VALUES)
        for mine, its in zip(contenders[:2], contenders[3:5], strict=True)
    ]  # fmt: skip
    yield section


def memory(plan: Plan) -> Iterator[Section]:
    """Resident memory over millions of envelopes, and the counter of pinned buffers at the end."""
    tenth = plan.memory_envelopes // 10
    contender = Contender("kbatch, batches of 1,000", "kbatch", 1_000, WINDOW)
    scores = plan.take_turns(
        (contender,),
        Effort(1, 10, 0),
        counts=lambda _: tenth // 1_000 * 1_000,
        patient=False,
    )
    score = scores[contender.label]
    resident = [turn.rss_end / 2**20 for turn in score.turns]
    pinned = float(sum(final["stats"]["pinned_buffers"] for final in score.finals))
    section = Section(f"Memory over {plan.memory_envelopes:,} envelopes, 8 headers", "memory", lines=lines(scores))
    growth = resident[-1] - resident[0]
    section.figures = [
        Figure("resident memory at the end, more than after the first tenth", growth, growth, growth, " MiB",
               GROWTH_MIB, at_most=True, digits=1),
        Figure("pinned buffers at the end", pinned, pinned, pinned, target=0, at_most=True, digits=0),
    ]  # fmt: skip
    section.notes.append("resident MiB after each tenth: " + " ".join(f"{mib:.1f}" for mib in resident))
    section.details["resident_mib"] = resident
    yield section


def others(plan: Plan) -> Iterator[Section]:
    """What others send in batches of 1,000: first those that carry headers, then all without headers."""
    for headers in (8, 0):
        found = {name: plan.best(trials, headers) for name, trials in rivals(headers, plan.class_path)}
        contenders = [replace(best, label=name) for name, best in found.items()]
        scores = plan.take_turns(contenders, plan.effort, headers=headers)
        section = Section(
            f"Others, batches of {BATCH:,}, {headers or 'no'} headers",
            "rivals",
            {"batch": BATCH, "headers": headers},
            lines(scores),
        )
        for name in found:
            if not name.startswith(("kbatch", "C loop")):
                ratios = pairs(scores["kbatch"], scores[name], rate_ratio)
                section.figures.append(figure(f"kbatch / {name}", ratios, target=_target(name, headers)))
            if name.startswith("Java producer"):
                section.figures.append(
                    figure(f"  CPU, kbatch / {name}", pairs(scores["kbatch"], scores[name], _cpu_ratio),
                           target=JAVA_CPU if headers else None, at_most=True)
                )  # fmt: skip
        section.notes.append("; ".join(f"{name}: {best.label}" for name, best in found.items()))
        yield section


def _target(rival: str, headers: int) -> float | None:
    for start, target in (
        ("confluent-kafka, an outcome", CONFLUENT if headers else None),
        ("confluent-kafka, AIOProducer", AIOPRODUCER),
        ("aiokafka, send", AIOKAFKA if rival == "aiokafka, send" else None),
        ("FastStream over aiokafka", FASTSTREAM),
        ("Java producer", JAVA_RATE if headers else None),
    ):
        if rival.startswith(start):
            return target
    return None


def round_trips(plan: Plan) -> Iterator[Section]:
    """Batches of 1,000 to a broker further and further away, with each linger time."""
    for rtt_ms in ROUND_TRIPS_MS:
        contenders = [
            Contender("C loop, one batch at a time", "cloop", BATCH),
            Contender(f"C loop, {WINDOW:,} in flight", "cloop", BATCH, WINDOW),
        ]
        for linger_ms in LINGERS_MS:
            contenders += [
                replace(each, label=f"{each.label}, linger {linger_ms} ms", options=config(linger_ms=linger_ms))
                for each in (
                    Contender("kbatch, one batch at a time", "kbatch", BATCH),
                    Contender(f"kbatch, {WINDOW:,} in flight", "kbatch", BATCH, WINDOW),
                )
            ]
        contenders.append(
            Contender(f"confluent-kafka, linger 5 ms, {10 * WINDOW:,} in flight", "confluent", BATCH, 10 * WINDOW,
                      {"linger_ms": 5})
        )  # fmt: skip
        scores = plan.take_turns(contenders, rtt_ms=rtt_ms)
        section = Section(
            f"Round trip {rtt_ms} ms more, batches of {BATCH:,}, 8 headers",
            "round_trips",
            {"rtt_ms": rtt_ms, "batch": BATCH},
            lines(scores),
        )
        one, flight = (
            scores[f"kbatch, {how}, linger 0 ms"] for how in ("one batch at a time", f"{WINDOW:,} in flight")
        )
        section.figures = [
            figure("kbatch / C loop, one batch at a time", pairs(one, scores[contenders[0].label], rate_ratio)),
            figure("kbatch / C loop, in flight", pairs(flight, scores[contenders[1].label], rate_ratio)),
        ]
        yield section


def codecs(plan: Plan) -> Iterator[Section]:
    for batch in CODEC_SIZES:
        contenders = [
            Contender(f"{name}, {codec}", side, batch, WINDOW, config(codec=codec))
            for codec in CODECS
            for name, side in (("C loop", "cloop"), ("kbatch", "kbatch"))
        ]
        scores = plan.take_turns(contenders)
        section = Section(
            f"Codecs, batches of {batch:,}, {WINDOW:,} in flight, 8 headers", "codecs", {"batch": batch}, lines(scores)
        )
        section.figures = [
            figure(
                f"kbatch / C loop, {codec}", pairs(scores[f"kbatch, {codec}"], scores[f"C loop, {codec}"], rate_ratio)
            )
            for codec in CODECS
        ]
        yield section


def linger(plan: Plan) -> Iterator[Section]:
    """Whether another `linger.ms` than 0 would be a better default, for large batches and for small ones."""
    workloads = [
        Contender("batches of 100, one at a time", "kbatch", 100),
        Contender(f"batches of {BATCH:,}, one at a time", "kbatch", BATCH),
        Contender(f"batches of {BATCH:,}, {WINDOW:,} in flight", "kbatch", BATCH, WINDOW),
        Contender(f"batches of {SMALL_BATCH}, {WINDOW:,} in flight", "kbatch", SMALL_BATCH, WINDOW),
        Contender(f"{THREADS} threads, batches of {SMALL_BATCH}", "kbatch", SMALL_BATCH, options={"threads": THREADS}),
        Contender(f"{THREADS} threads, batches of 1", "kbatch", 1, options={"threads": THREADS}),
    ]
    for rtt_ms in (None, 1):
        for workload in workloads:
            contenders = {
                linger_ms: replace(
                    workload, label=f"linger {linger_ms} ms", options=workload.options | config(linger_ms=linger_ms)
                )
                for linger_ms in LINGERS_MS
            }
            scores = plan.take_turns(list(contenders.values()), rtt_ms=rtt_ms)
            section = Section(
                f"Linger: {workload.label}, round trip {rtt_ms} ms more" if rtt_ms else f"Linger: {workload.label}",
                "linger",
                {"rtt_ms": rtt_ms or 0, "workload": workload.label},
                lines(scores),
            )
            zero = scores[contenders[0].label]
            for linger_ms in LINGERS_MS[1:]:
                other = scores[contenders[linger_ms].label]
                section.figures.append(figure(f"linger {linger_ms} ms / 0 ms", pairs(other, zero, rate_ratio)))
            yield section


def in_flight_requests(plan: Plan) -> Iterator[Section]:
    """Whether fewer requests at a time would be a better default, with and without a linger time."""
    for rtt_ms in FAR_ROUND_TRIPS_MS:
        for batch in plan.sizes:
            for how, window in (("one batch at a time", 0), (f"{WINDOW:,} in flight", WINDOW)):
                contenders = [
                    Contender(f"{most} requests, linger {linger_ms} ms", "kbatch", batch, window,
                              config(linger_ms=linger_ms, requests=most))
                    for linger_ms in LINGERS_MS[:2]
                    for most in REQUESTS_IN_FLIGHT
                ]  # fmt: skip
                scores = plan.take_turns(contenders, rtt_ms=rtt_ms)
                section = Section(
                    f"Requests in flight: batches of {batch:,}, {how}, round trip {rtt_ms or 0} ms more, 8 headers",
                    "in_flight_requests",
                    {"rtt_ms": rtt_ms or 0, "batch": batch, "window": window},
                    lines(scores),
                )
                default = scores[contenders[0].label]
                section.figures = [
                    figure(f"{each.label} / {contenders[0].label}", pairs(scores[each.label], default, rate_ratio))
                    for each in contenders[1:]
                ]
                yield section


def requests(plan: Plan) -> Iterator[Section]:
    """Into how many requests a batch is cut, by linger time. Needs the mock cluster, which counts them."""
    for rtt_ms in (0, 1):
        section = Section(
            f"Requests per batch, one batch at a time, round trip {rtt_ms} ms more, 8 headers",
            "requests",
            {"rtt_ms": rtt_ms},
        )
        for batch in REQUESTS_SIZES:
            for linger_ms in LINGER_TRIALS_MS:
                found = send_batches(batch, linger_ms, rtt_ms)
                name = f"batches of {batch:,}, linger {linger_ms:g} ms"
                section.figures += [
                    figure(f"{name}: requests", [found.requests], digits=1),
                    figure(f"{name}: from call to answer", found.milliseconds, unit=" ms"),
                ]
        yield section


#: In this order they are run: what is first is there, should a run be broken off.
MEASURES: dict[str, Callable[[Plan], Iterator[Section]]] = {
    "bytes": check_bytes,
    "loops": loops,
    "rivals": others,
    "round-trips": round_trips,
    "linger": linger,
    "in-flight-requests": in_flight_requests,
    "awaited": awaited,
    "codecs": codecs,
    "latency": latency,
    "recovery": recovery,
    "asyncio": loop_pauses,
    "gil": gil,
    "senders": senders.senders,
    "senders-cost": senders.cost,
    "senders-latency": senders.latency,
    "senders-inline": senders.inline,
    "senders-gil": senders.gil,
    "values": plain_values,
    "cold": cold_envelopes,
    "serializers": lambda plan: serializers(plan.all_turns),
    "outbox-sqlite": lambda plan: outboxes(plan.all_turns, plan.open_broker),
    "outbox-postgres": lambda plan: postgres_outboxes(plan.all_turns, plan.open_broker),
    "outbox-awaiting": lambda plan: awaitings(min(5, max(3, plan.all_turns // 3)), plan.open_broker),
    "outbox-whole": lambda plan: whole_ways(plan.way_turns, plan.open_broker),
    "outbox-backlog": lambda plan: relays.backlogs(max(3, plan.all_turns // 2), plan.backlogs, plan.open_broker),
    "outbox-relays": lambda plan: relays.numbers(max(3, plan.all_turns // 3), plan.relay_rows, plan.open_broker),
    "outbox-fencing": lambda plan: relays.fencing(max(3, plan.all_turns // 3), plan.relay_rows // 3, plan.open_broker),
    "reading": lambda plan: readings(plan.all_turns, plan.open_broker),
    "reading-rates": lambda plan: rates(plan.all_turns, plan.read_records, plan.open_broker),
    "reading-gil": lambda plan: still(plan.all_turns, plan.read_records // 2, plan.open_broker),
    "reading-memory": lambda plan: memory_of_reading(plan.memory_envelopes, plan.open_broker),
    "inbox": lambda plan: inboxes(plan.all_turns, plan.open_broker),
    "inbox-handling": lambda plan: handlings(max(3, plan.all_turns // 3), plan.open_broker),
    "inbox-half-load": lambda plan: half_loads(plan.half_load_s, plan.open_broker),
    "requests": requests,
    "memory": memory,
}
#: Those of a run without --only: not what a default was chosen by. On a real broker: not what needs the mock cluster's
#: faults or counts, priorities that a process cannot have back, or gigabytes of disk; nor what sends nothing.
_CHOICES = ("in-flight-requests",)
_OUTBOX = tuple(name for name in MEASURES if name.startswith("outbox"))
_READING = tuple(name for name in MEASURES if name.startswith("reading"))
_INBOX = tuple(name for name in MEASURES if name.startswith("inbox"))
#: What --only takes besides the measures.
GROUPS = {"outbox": _OUTBOX, "reading": _READING, "inbox": _INBOX}
_PROCESSES = ("gil", "senders-gil", "memory", "requests")
_MOCK_ALONE = ("recovery", "asyncio", "serializers", "cold", *_PROCESSES, *_OUTBOX, *_READING, *_INBOX)
ON_MOCK = tuple(name for name in MEASURES if name not in (*_CHOICES, "codecs", "linger"))
ON_KAFKA = tuple(name for name in MEASURES if name not in (*_CHOICES, *_MOCK_ALONE))
