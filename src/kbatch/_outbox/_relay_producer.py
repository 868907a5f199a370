"""The producer of a relay: how it is made, what it must be, and how long leases are by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbatch._base_producer import BaseProducer
from kbatch._checks import is_number
from kbatch._config import inherit
from kbatch._errors import ConfigError
from kbatch._producer import Producer
from kbatch._recovery._handle import ProducerHandle, ProducerUse

if TYPE_CHECKING:
    from kbatch._options import RelayOptions

__all__ = ["MARGIN_S", "lease_of", "relay_producer", "use_of"]

MARGIN_S = 1.0  # what is left of a lease when the last outcome of a batch has come
_DELIVERY_TIMEOUT_MS = 30_000
_TRANSACTION_TIMEOUT_MS = 10_000  # with fencing, and of a delivery within it: the lease must be longer than both
_UNNAMED = "kbatch-relay"  # the transactional id until there is one


def relay_producer(config: Mapping[str, Any], room: int = 10_000, *, is_fencing: bool = False) -> Producer:
    """A producer as a relay needs it. Raises ConfigError for one that may lose or reorder records."""
    own: dict[str, Any] = {"delivery.timeout.ms": _DELIVERY_TIMEOUT_MS}
    if is_fencing:
        own = {
            "delivery.timeout.ms": _TRANSACTION_TIMEOUT_MS,
            "transaction.timeout.ms": _TRANSACTION_TIMEOUT_MS,
            "transactional.id": _UNNAMED,
        }
    made = Producer(inherit(own, config) if isinstance(config, Mapping) else config, max_in_flight=max(10_000, room))
    _check_producer(made, own.get("transactional.id"))
    return made


def _check_producer(producer: Producer, own_id: str | None = None) -> None:
    native = producer._parsed.native
    wrong = None
    if native.get("transactional.id") not in (None, "", own_id):
        wrong = "transactional.id, with which each batch would be one transaction"
    elif native.get("enable.idempotence") != "true":
        wrong = "enable.idempotence=false, with which records may be stored twice and in another order"
    if wrong is not None:
        raise ConfigError(f"the producer of a relay must not have {wrong}")


def use_of(producer: Mapping[str, Any] | Producer | ProducerUse, options: RelayOptions) -> ProducerUse:
    """A relay's use of what it was given. Raises ConfigError for a producer that may lose or reorder records."""
    if isinstance(producer, ProducerUse):
        return producer  # of one that `relay_producer` has made; not for users
    if options.is_fencing and isinstance(producer, BaseProducer):
        raise ConfigError("fencing='kafka' needs producers of its own: give their configuration")
    if isinstance(producer, Producer):
        _check_producer(producer)
        return ProducerHandle.of(producer).acquire()
    if isinstance(producer, BaseProducer):
        raise ConfigError(f"a relay takes no {producer._shown}: give its configuration, or a kbatch.Producer")
    made = relay_producer(producer, options.most_in_flight, is_fencing=options.is_fencing)
    return ProducerHandle(made, given=False).acquire()


def lease_of(options: RelayOptions, producer: BaseProducer) -> float:
    """Seconds of a relay's leases. Raises ConfigError for options that contradict the producer."""
    if options.strict_order and producer._parsed.native.get("partitioner") == "random":
        raise ConfigError(
            "strict_order=True contradicts partitioner=random, which spreads a key over partitions; choose another "
            "partitioner"
        )
    return _lease_s(options.lease_s, producer.max_delivery_s())


def _lease_s(lease_s: float | None, max_delivery_s: float) -> float:
    if lease_s is None:
        return max_delivery_s + 5.0
    shortest = max_delivery_s + 2 * MARGIN_S
    if not is_number(lease_s) or not shortest <= lease_s < 1e6:
        raise ConfigError(
            f"lease_s must be seconds, {shortest:g} at least: the longest time that a delivery takes "
            f"({max_delivery_s:g} s by delivery.timeout.ms) and {2 * MARGIN_S:g} s; not {lease_s!r}"
        )
    return float(lease_s)
