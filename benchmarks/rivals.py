"""Who takes part in the comparison of others, with the settings that are tried out for each, the best known first."""

from collections.abc import Iterator
from typing import Any

from benchmarks.turns import Contender

BATCH = 1_000
#: messages in flight across batches
WINDOW = 5_000
#: until the JVM has compiled what is called often
JAVA_WARM_UP_S = 5.0
#: each turn of ProducerPerformance connects anew
PERFORMANCE_TURN_S = 2.0


def config(*, linger_ms: float | None = None, codec: str | None = None, requests: int | None = None) -> dict[str, Any]:
    """Options that the C loop and kbatch understand."""
    settings = {
        "linger.ms": linger_ms,
        "compression.type": codec,
        "max.in.flight.requests.per.connection": requests,
    }
    return {"config": {key: str(value) for key, value in settings.items() if value is not None}}


def rivals(headers: int, class_path: str | None) -> Iterator[tuple[str, list[Contender]]]:
    """Each rival that carries so many headers, kbatch and the C loops first."""
    own = {"kbatch": "kbatch", "C loop": "cloop"} | ({"C loop, recycling": "recycling"} if headers else {})
    for name, side in own.items():
        yield (
            name,
            [
                Contender(_label(linger, window), side, BATCH, window, config(linger_ms=linger))
                for linger, window in ((0, WINDOW), (0, 4 * WINDOW), (5, 4 * WINDOW))
            ],
        )
    for name, form in (("an outcome for each", "callback"), ("told of errors only", "errors-only")):
        yield (
            f"confluent-kafka, {name}",
            _trials("confluent", {"form": form}, (5, 50_000), (0, 5_000), (5, 5_000), (50, 50_000)),
        )
    yield "aiokafka, send", _trials("aiokafka", {}, (0, 2_000), (0, 5_000), (5, 5_000))
    yield "aiokafka, send_batch", _trials("aiokafka", {"form": "send_batch"}, (0, 5_000), (0, 2_000))
    if class_path:
        java = [_java(class_path, linger, window) for linger, window in ((5, 5_000), (0, 5_000), (5, 50_000))]
        yield "Java producer, nothing mapped", java
    if headers:
        return
    if class_path:
        yield "Java, ProducerPerformance, no keys", [_performance(class_path, linger) for linger in (5, 0)]
    batch_call = {"call": "produce_batch", "poll_every": BATCH}
    yield "confluent-kafka, produce_batch", _trials("confluent", batch_call, (5, 50_000), (0, 5_000), (5, 5_000))
    yield "confluent-kafka, AIOProducer", _trials("aioproducer", {}, (0, 5_000), (0, 1_000), (5, 50_000))
    for over, settings in (("aiokafka", ((0, 5_000), (0, 2_000))), ("confluent-kafka", ((0, 5_000), (5, 5_000)))):
        yield f"FastStream over {over}, publish_batch", _trials("faststream", {"over": over}, *settings)


def _label(linger_ms: int, window: int) -> str:
    return f"linger {linger_ms} ms, {window:,} in flight"


def _trials(side: str, options: dict[str, Any], *settings: tuple[int, int]) -> list[Contender]:
    return [
        Contender(_label(linger, window), side, BATCH, window, {"linger_ms": linger, **options})
        for linger, window in settings
    ]


def _java_config(linger_ms: int) -> dict[str, str]:
    return {"linger.ms": str(linger_ms), "batch.size": "1000000", "buffer.memory": str(64 << 20)}


def _java(class_path: str, linger_ms: int, window: int) -> Contender:
    options = {"class_path": class_path, "config": _java_config(linger_ms)}
    return Contender(_label(linger_ms, window), "java", BATCH, window, options, warm_up_s=JAVA_WARM_UP_S)


def _performance(class_path: str, linger_ms: int) -> Contender:
    options = {"class_path": class_path, "form": "performance", "config": _java_config(linger_ms)}
    return Contender(
        f"linger {linger_ms} ms, 64 MiB in flight",
        "java",
        BATCH,
        options=options,
        warm_up_s=JAVA_WARM_UP_S,
        seconds=PERFORMANCE_TURN_S,
    )
