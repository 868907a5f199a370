"""The loop of the fuzzer."""

import argparse
import faulthandler
import sys
import time
from collections import Counter
from typing import Any

from tests.fuzz import corpus
from tests.fuzz.generate import Nasty
from tests.fuzz.replay import Replay
from tests.reference import Setting, Spec


def shrunk(setting: Setting, specs: list[Spec]) -> list[Spec]:
    """As few envelopes and arguments as still fail."""

    def fails(some: list[Spec]) -> bool:
        try:
            Replay().batch(setting, some)
        except AssertionError:
            return True
        return False

    for index in reversed(range(len(specs))):
        without = specs[:index] + specs[index + 1 :]
        if fails(without):
            specs = without
    for index, spec in enumerate(specs):
        for name in list(spec.arguments):
            rest = {other: value for other, value in specs[index].arguments.items() if other != name}
            fewer = [*specs[:index], Spec(rest, spec.tombstone), *specs[index + 1 :]]
            if fails(fewer):
                specs = fewer
    return specs


def seen_of(answer: Any, specs: list[Spec]) -> int:
    """How many envelopes the mapping looked at: it ends at the first that is bad."""
    if isinstance(answer, str):
        return 0
    return len(specs) if isinstance(answer, list) else answer.index + 1


def describe(answer: Any) -> str:
    if isinstance(answer, list):
        return "expired" if None in answer else "mapped"
    return answer if isinstance(answer, str) else f"refused: {answer.field.partition('[')[0]}"


def run(options: argparse.Namespace, at: Any) -> None:
    faulthandler.enable()
    replay = Replay()
    answers: Counter[str] = Counter()
    kept: dict[tuple[Any, ...], str] = {}
    envelopes, number, start, told = 0, options.first, time.monotonic(), time.monotonic()
    while envelopes < options.envelopes:
        at.value = number
        setting, specs = Nasty(options.seed, number).batch()
        try:
            answer = replay.batch(setting, specs)
        except AssertionError as error:
            specs = shrunk(setting, specs)
            file = corpus.FOLDER / f"found-{options.seed}-{number}.jsonl"
            file.write_text(corpus.written(setting, specs) + "\n", encoding="ascii")
            print(f"seed {options.seed}, batch {number}: {error}\nkept in {file}: {specs}", file=sys.stderr)
            sys.exit(1)
        answers[describe(answer)] += 1
        if options.keep is not None and len(specs) == 1:
            # The shortest of each kind of envelope and answer.
            shape = (
                setting.wire,
                type(setting.encoder),
                tuple(specs[0].arguments)[:1],
                specs[0].tombstone,
                describe(answer),
            )
            line = corpus.written(setting, specs)
            if shape not in kept or len(line) < len(kept[shape]):
                kept[shape] = line
        envelopes += seen_of(answer, specs)
        number += 1
        if time.monotonic() > told + 30:
            told = time.monotonic()
            print(f"{envelopes:,} envelopes, {envelopes / (told - start):,.0f}/s", file=sys.stderr, flush=True)
    if options.keep is not None:
        options.keep.write_text("".join(f"{line}\n" for line in sorted(kept.values())), encoding="ascii")
    batches = f"seed {options.seed}, batches {options.first} to {number - 1}"
    print(f"{envelopes:,} envelopes mapped as the reference does: {batches}")
    print("batches: " + ", ".join(f"{count:,} {answer}" for answer, count in answers.most_common()))
