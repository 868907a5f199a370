"""Messages that come one at a time: `BatchedSender` and `InlineSender` against others. README.md says how."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.figures import Figure, Section, figure, latency_line, line, lines, percentile_us, standing_still
from benchmarks.plan import TRIAL, Plan
from benchmarks.rivals import BATCH, WINDOW
from benchmarks.sides.base import Result
from benchmarks.turns import Contender, Effort, Score, pairs, rate_ratio

ROUND_TRIPS_MS = (0, 1, 5)
THREADS = (1, 2, 4)
TASKS = (1, 100)
TIMEOUTS_MS = (0, 1, 5)
#: concurrent callers of InlineSender, and the round trip they share
INLINE_THREADS, INLINE_TASKS, INLINE_RTT_MS = (8, 32), 100, 1
#: messages in each half of a turn of `cost`; the buffer has room for all of them. kbatch's are so many that other
#: threads have their turn with the GIL meanwhile, which changes hands every 5 ms.
COST_MESSAGES, OWN_COST_MESSAGES = 50_000, 250_000
GIL_MESSAGES, GIL_PRODUCED = 50_000, 5_000

# The targets of issue 5.
CONFLUENT = 5.0
OF_SEND_BATCH = 0.8
SEND_US = 0.5
INLINE_OF_CONFLUENT = 1.0

LATENCY = Effort(rounds=1, turns=7, seconds=0.3)
INLINE_LATENCY = Effort(rounds=1, turns=9, seconds=0.1, batches=200)
COST = Effort(rounds=1, turns=7, seconds=0)

Tuned = tuple[Contender, Contender, Contender]


def _label(linger_ms: int, queue: int) -> str:
    return f"linger {linger_ms} ms, queue of {queue:,}"


def _produce_trials(form: str, *settings: tuple[int, int]) -> list[Contender]:
    return [
        Contender(_label(linger, queue), "produce", 1, options={"form": form, "linger_ms": linger, "queue": queue})
        for linger, queue in settings
    ]


def tune(plan: Plan, rtt_ms: int) -> Tuned:
    """The rivals' best settings with one thread or task, by trial: confluent-kafka's two forms, and aiokafka's."""
    best = []
    for trials in (
        _produce_trials("errors-only", (5, 100_000), (5, 10_000), (0, 10_000)),
        _produce_trials("callback", (5, 100_000), (5, 10_000)),
        [
            Contender(f"linger {linger} ms, {window:,} in flight", "aiokafka", 100, window, {"linger_ms": linger})
            for linger, window in ((0, 2_000), (5, 5_000))
        ],
    ):
        best.append(plan.best(trials, rtt_ms=rtt_ms))
    errors_only, callback, aiokafka = best
    return errors_only, callback, aiokafka


def _several(of: Contender, label: str, **options: Any) -> Contender:
    return replace(of, label=label, options=of.options | options)


def senders(plan: Plan) -> Iterator[Section]:
    """One `send` after the other, from threads and on event loops, to a broker further and further away."""
    for rtt_ms in ROUND_TRIPS_MS:
        yield _senders(plan, rtt_ms)


def _senders(plan: Plan, rtt_ms: int) -> Section:
    errors_only, callback, aiokafka = tune(plan, rtt_ms)
    batches = Contender(f"kbatch, send_batch of {BATCH:,}", "kbatch", BATCH)
    submit = Contender(f"kbatch, submit of {BATCH:,}", "kbatch", BATCH, WINDOW)
    c_loop = Contender(f"C loop, {WINDOW:,} in flight", "cloop", BATCH, WINDOW)
    mine = {
        number: Contender(_named("kbatch, BatchedSender", number, "thread"), "sender", 1, options={"threads": number})
        for number in THREADS
    }
    rivals = {
        number: _several(errors_only, _named("confluent-kafka, errors only", number, "thread"), threads=number)
        for number in THREADS
    }
    with_callback = _several(callback, _named("confluent-kafka, callback each", 1, "thread"))
    mine_on_loop = {
        number: Contender(_named("kbatch.aio, BatchedSender", number, "task"), "sender_aio", 1,
                          options={"tasks": number})
        for number in TASKS
    }  # fmt: skip
    rivals_on_loop = {
        number: replace(_several(aiokafka, _named("aiokafka, send", number, "task"), tasks=number),
                        batch=aiokafka.batch // min(number, 10))
        for number in TASKS
    }  # fmt: skip
    groups = (mine, rivals, mine_on_loop, rivals_on_loop)
    contenders = [c_loop, batches, submit, with_callback, *(one for group in groups for one in group.values())]
    scores = plan.take_turns(contenders, rtt_ms=rtt_ms)
    section = Section(
        f"One at a time, round trip {rtt_ms} ms more, 8 headers", "senders", {"rtt_ms": rtt_ms}, lines(scores)
    )

    def ratio(one: Contender, other: Contender, target: float | None = None) -> Figure:
        found = pairs(scores[one.label], scores[other.label], rate_ratio)
        return figure(f"{one.label} / {other.label}", found, target=target)

    faster = max((rivals[1], with_callback), key=lambda each: median(scores[each.label].rates))
    for number in THREADS:
        section.figures.append(ratio(mine[number], faster if number == 1 else rivals[number], CONFLUENT))
    for number in TASKS:
        section.figures.append(ratio(mine_on_loop[number], rivals_on_loop[number]))
    for one in (*mine.values(), *mine_on_loop.values()):
        section.figures.append(ratio(one, batches, OF_SEND_BATCH))
    section.figures += [ratio(mine[1], submit), ratio(c_loop, faster)]
    section.notes.append(
        f"at their best: confluent-kafka, errors only, {errors_only.label}; callback each, {callback.label}; aiokafka, "
        f"{aiokafka.label}. kbatch with its defaults"
    )
    section.notes += [_sender_note(one.label, scores[one.label]) for one in mine.values()]
    return section


def _named(name: str, number: int, kind: str) -> str:
    return f"{name}, {number} {kind}{'s' if number > 1 else ''}"


def _sender_note(label: str, score: Score) -> str:
    """What the sender's producer says of its batches."""
    stats = [final["stats"] for final in score.finals]
    envelopes, batches, map_ns = (sum(each[key] for each in stats) for key in ("envelopes", "batches", "map_ns"))
    return f"{label}: {envelopes / batches:,.0f} envelopes in a batch; phase 1 {map_ns / envelopes / 1000:.2f} µs each"


def cost(plan: Plan) -> Iterator[Section]:
    """What one call of `send` takes of its caller while there is room."""
    room = {"max_buffered": 2 * OWN_COST_MESSAGES}
    alone = {"batch_size": 2 * OWN_COST_MESSAGES, "batch_bytes": 1 << 30, "batch_timeout_ms": 60_000.0}
    mine = [
        Contender("BatchedSender.send, no batch is closed", "sender", 1, options={"sender": room | alone}),
        Contender("BatchedSender.send", "sender", 1, options={"sender": room}),
    ]
    on_loop = Contender("await aio.BatchedSender.send", "sender_aio", 1, options={"sender": room})
    rivals = [
        Contender(f"confluent-kafka's produce, {form}", "produce", 1,
                  options={"form": form, "linger_ms": 5, "queue": 10 * COST_MESSAGES})
        for form in ("errors-only", "callback")
    ]  # fmt: skip
    every = [replace(each, options=each.options | {"calls": "cost"}) for each in (*mine, on_loop, *rivals)]
    scores = plan.take_turns(
        every, COST, counts=lambda each: 2 * (COST_MESSAGES if each.side == "produce" else OWN_COST_MESSAGES)
    )
    section = Section("One call of send while there is room, 8 headers", "sender_cost")
    for each in every:
        section.figures += _cost_figures(each.label, scores[each.label], each in every[: len(mine)])
        section.notes.append(_single_calls(each.label, scores[each.label]))
    closing, produce = scores[every[1].label], scores[every[len(mine) + 1].label]
    section.figures.append(
        figure(f"{produce.contender.label} / {closing.contender.label}, CPU of the caller",
               pairs(produce, closing, lambda its, own: its.extra["cpu"] / own.extra["cpu"]))
    )  # fmt: skip
    turns = scores[every[0].label].turns
    for name, what in (("empty", "an empty method"), ("append", "list.append"), ("queue", "queue.SimpleQueue.put")):
        found = [turn.extra[f"{name}_cpu"] / 1000 for turn in turns]
        section.figures.append(figure(f"for comparison: {what}", found, unit=" µs", digits=3))
    yield section


def _cost_figures(label: str, score: Score, promised: bool) -> list[Figure]:
    how: dict[str, Any] = {"unit": " µs", "digits": 3, "at_most": True}
    found = []
    for clock, what in (("cpu", "CPU of the caller"), ("wall", "wall clock")):
        all_of_it = [turn.extra[clock] / 1000 for turn in score.turns]
        more = [(turn.extra[clock] - turn.extra[f"empty_{clock}"]) / 1000 for turn in score.turns]
        found += [
            figure(f"{label}: {what}", all_of_it, target=SEND_US if promised else None, **how),
            figure("  more than an empty method's", more, **how),
        ]
    return found


def _single_calls(label: str, score: Score) -> str:
    def us(prefix: str) -> str:
        names = ("p50", "p99", "p99.9", "max")
        return ", ".join(
            f"{name} {median(turn.extra[prefix + name] for turn in score.turns) / 1000:.2f}" for name in names
        )

    return f"{label}: single calls, µs, between two clocks: {us('')}; of an empty method: {us('empty_')}"


def latency(plan: Plan) -> Iterator[Section]:
    """From `send` to the acknowledgement, at half of the highest load."""
    trials = [
        Contender(f"confluent-kafka, {form}, linger {linger} ms", "produce", 1,
                  options={"form": form, "linger_ms": linger, "queue": 100_000})
        for form, linger in (("errors-only", 0), ("errors-only", 5), ("callback", 0))
    ]  # fmt: skip
    mine = {
        timeout: Contender(f"BatchedSender, batch_timeout_ms={timeout}", "sender", 1,
                           options={"sender": {"batch_timeout_ms": float(timeout)}})
        for timeout in TIMEOUTS_MS
    }  # fmt: skip
    highest = plan.take_turns((*mine.values(), *trials), TRIAL)
    rates = {label: median(score.rates) for label, score in highest.items()}
    half = max(rates[each.label] for each in mine.values()) / 2
    its_half = max(rates[each.label] for each in trials) / 2
    for title, rate, sides in (
        ("half of BatchedSender's highest load", half, list(mine.values())),
        ("half of confluent-kafka's highest load", its_half, [*mine.values(), *trials]),
    ):
        paced = [replace(each, batches_per_s=rate) for each in sides]
        scores = plan.take_turns(paced, LATENCY)
        section = Section(f"From send to acknowledgement at {title}, 8 headers", "sender_latency")
        section.latencies = [latency_line(each.label, rate, scores[each.label]) for each in paced]
        for each in paced:
            turns = scores[each.label].turns
            calls = " ".join(
                f"{name} {median(turn.extra[name] for turn in turns) / 1000:.2f}" for name in ("p50", "p99", "max")
            )
            cpu = scores[each.label].cpu_us
            section.notes.append(f"{each.label}: the call alone, µs: {calls}; CPU of the process {cpu:.2f} µs each")
        yield section


def inline(plan: Plan) -> Iterator[Section]:
    """One envelope, awaited: one caller that waits between its calls, and many at once."""
    mine = Contender("kbatch, InlineSender", "sender", 1, options={"form": "inline", "calls": "awaited"})
    rivals = [
        Contender(f"confluent-kafka, produce, {name}", "produce", 1,
                  options={"form": form, "calls": "awaited", "linger_ms": 0})
        for form, name in (("flush", "flush"), ("future", "future, a thread polls"))
    ]  # fmt: skip
    highest = plan.take_turns((mine, *rivals), TRIAL, split=True)
    rates = {label: median(score.rates) for label, score in highest.items()}
    rival = max(rivals, key=lambda trial: rates[trial.label])
    rate = min(rates[mine.label], rates[rival.label]) / 2
    paced = [replace(each, batches_per_s=rate) for each in (mine, *rivals)]
    scores = plan.take_turns(paced, INLINE_LATENCY, split=True)
    section = Section("One envelope awaited, at half of the highest load, 8 headers", "sender_inline")
    section.latencies = [latency_line(each.label, rate, scores[each.label]) for each in paced]
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        section.figures.append(
            _call_ratio(f"InlineSender / produce + flush, {name} of the call", scores, mine, rivals[0], share)
        )
    section.notes.append("highest load: " + "; ".join(f"{label} {each:,.0f}" for label, each in rates.items()))
    yield section
    yield _many_inline(plan, mine, rivals)


def _call_ratio(name: str, scores: dict[str, Score], one: Contender, other: Contender, share: float) -> Figure:
    def ratio(mine: Result, its: Result) -> float:
        return percentile_us(mine.served_ns, share) / percentile_us(its.served_ns, share)

    found = pairs(scores[one.label], scores[other.label], ratio)
    return figure(name, found, target=INLINE_OF_CONFLUENT, at_most=True)


def _many_inline(plan: Plan, mine: Contender, rivals: Sequence[Contender]) -> Section:
    contenders = [
        _several(each, _named(each.label, number, "thread"), threads=number)
        for number in INLINE_THREADS
        for each in (mine, *rivals)
    ]
    on_loop = [
        Contender(f"kbatch.aio, InlineSender, {INLINE_TASKS} tasks", "sender_aio", 1,
                  options={"form": "inline", "tasks": INLINE_TASKS}),
        Contender(f"aiokafka, send_and_wait, {INLINE_TASKS} tasks", "aiokafka", 1,
                  options={"tasks": INLINE_TASKS, "linger_ms": 0}),
    ]  # fmt: skip
    scores = plan.take_turns((*contenders, *on_loop), rtt_ms=INLINE_RTT_MS)
    section = Section(
        f"One envelope awaited by many at once, round trip {INLINE_RTT_MS} ms more, 8 headers",
        "sender_inline",
        {"rtt_ms": INLINE_RTT_MS},
        lines=[line(each.label, scores[each.label]) for each in (*contenders, *on_loop)],
        latencies=[
            latency_line(each.label, median(scores[each.label].rates), scores[each.label]) for each in contenders
        ],
    )
    each_time = 1 + len(rivals)
    for at in range(0, len(contenders), each_time):
        own, *others = contenders[at : at + each_time]
        faster = max(others, key=lambda each: median(scores[each.label].rates))
        found = pairs(scores[own.label], scores[faster.label], rate_ratio)
        section.figures.append(figure(f"{own.label} / {faster.label}", found))
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            section.figures.append(_call_ratio(f"  {name} of the call", scores, own, faster, share))
    own, other = on_loop
    found = pairs(scores[own.label], scores[other.label], rate_ratio)
    section.figures.append(figure(f"{own.label} / {other.label}", found))
    return section


def gil(plan: Plan) -> Iterator[Section]:
    """As the GIL per envelope of batches, for messages that come one at a time."""
    contenders = [
        Contender("kbatch, BatchedSender", "sender", 1, competitor=True),
        Contender(f"kbatch, submit of {BATCH:,}", "kbatch", BATCH, WINDOW, competitor=True),
        *(
            Contender(f"confluent-kafka, produce, {form}", "produce", 1, competitor=True,
                      options={"form": form, "linger_ms": 5})
            for form in ("errors-only", "callback")
        ),
        Contender("control: the C loop in another process", "control", BATCH, WINDOW, competitor=True),
    ]  # fmt: skip
    # A warm-up by time would end while each flush still waits for the competitor; and who gives the GIL up in each
    # `produce` waits for it in each as well.
    scores = plan.take_turns(
        contenders,
        replace(plan.less, rounds=1),
        apart=True,
        counts=lambda contender: GIL_PRODUCED if contender.side == "produce" else GIL_MESSAGES,
    )
    section = Section("GIL per envelope, one at a time: what a competing thread loses, 8 headers", "sender_gil")
    section.lines = lines(scores)
    standing_still(section, scores)
    yield section
