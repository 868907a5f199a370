"""``kbatch outbox`` and ``kbatch relay``: their options."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kbatch.cli._place import OutboxPlace
from kbatch.cli._screen import Screen
from kbatch.cli._work import Wire, exit_with, typed

HELP_NAMES = {"help_option_names": ["-h", "--help"]}

outbox_app = typer.Typer(
    help="Make an outbox's tables, and look after what is in it.",
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
dead_app = typer.Typer(
    help="Messages that were given up.", no_args_is_help=True, context_settings=HELP_NAMES, rich_markup_mode=None
)
later_app = typer.Typer(
    help="Messages that wait, for their next attempt or for their time.",
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    rich_markup_mode=None,
)
outbox_app.add_typer(dead_app, name="dead")
outbox_app.add_typer(later_app, name="later")

Outbox = Annotated[
    str | None,
    typer.Option(
        "--outbox",
        "-o",
        metavar="PATH|URL",
        help="A SQLite file, or a URL: postgresql://user@host/database, sqlite:///shop.db. Else KBATCH_OUTBOX, or "
        "outbox in the --config FILE: a password is no secret in a command line.",
    ),
]
Prefix = Annotated[str | None, typer.Option(help="What the names of the tables begin with; kbatch_ by default.")]
Schema = Annotated[str | None, typer.Option(help="Where the tables are in PostgreSQL; public by default.")]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A relay's settings, TOML: outbox, prefix and schema.")
]
Json = Annotated[bool, typer.Option("--json", help="For programs: a JSON object on each line.")]
Which = Annotated[list[str] | None, typer.Argument(metavar="NUMBER|ID", help="Which messages, by number or id.")]
Topic = Annotated[str | None, typer.Option("--topic", "-t", help="Those to this topic.")]
Type = Annotated[str | None, typer.Option("--type", help="Those of this message type.")]
Error = Annotated[str | None, typer.Option(metavar="TEXT", help="Those with this in their last error.")]
Older = Annotated[
    str | None, typer.Option(metavar="AGE", help="Those that died so long ago (90s, 15m, 2h, 7d) or before.")
]
Newer = Annotated[str | None, typer.Option(metavar="AGE", help="Those that died since.")]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask no question.")]
Limit = Annotated[int, typer.Option(min=0, help="How many at most; 0 for all.")]
Summary = Annotated[bool, typer.Option("--summary", help="Count those of one topic, type and error.")]
Offset = Annotated[int, typer.Option(min=0, help="How many to leave out before.")]
WireOption = Annotated[Wire, typer.Option(help="The format of the headers, as the application's outbox has it.")]


def _place(
    outbox: str | None, prefix: str | None, schema: str | None, config: Path | None, wire: Wire = Wire.KBATCH
) -> OutboxPlace:
    from kbatch.cli._relay_file import RelayFile

    return _place_by(RelayFile(config).values, outbox, prefix, schema, wire)


def _place_by(
    file: Mapping[str, Any], outbox: str | None, prefix: str | None, schema: str | None, wire: Wire = Wire.KBATCH
) -> OutboxPlace:
    name = None if outbox is None else typed("--outbox", outbox)
    return OutboxPlace.find(name, prefix, schema, file, wire=wire.value, notify=bool(file.get("notify")))


@outbox_app.command()
def create(outbox: Outbox = None, prefix: Prefix = None, schema: Schema = None, config: Config = None) -> None:
    """Make the tables, and a SQLite file, as far as they are missing."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._tables import create as run

        return run(_place(outbox, prefix, schema, config), screen)

    exit_with(work, screen)


@outbox_app.command()
def ddl(outbox: Outbox = None, prefix: Prefix = None, schema: Schema = None, config: Config = None) -> None:
    """Print the statements that make the tables, for those who execute them themselves. The outbox need not exist."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._tables import ddl as run

        return run(_place(outbox, prefix, schema, config), screen)

    exit_with(work, screen, prints=True)


@outbox_app.command()
def status(
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    count_up_to: Annotated[int, typer.Option(min=1, help="Of each kind count no more.")] = 100_000,
    json: Json = False,
) -> None:
    """Show how much is to be sent, what waits, what died, and how many relays are at work."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import status as run

        return run(_place(outbox, prefix, schema, config), count_up_to, json, screen)

    exit_with(work, screen, prints=True)


@outbox_app.command()
def demo(
    count: Annotated[int, typer.Option(min=1, max=400_000, help="How many orders to add.")] = 100_000,
    kills: Annotated[int, typer.Option(min=0, max=5, help="How often to kill the relay.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the sizes of transactions, and which are rolled back.")] = 7,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")] = False,
) -> None:
    """Add orders to an outbox, kill its relay twice, and compare what arrives with what was committed.

    Needs no broker: the relay, a process of its own, sends to the mock cluster of librdkafka, which is another one.
    The SQLite file is in a temporary folder.

    Exit status 0 if every order that was committed arrived, unchanged and in the order of its key, nothing else did,
    and only those came twice that were unrecorded when a relay was killed; else 1.
    """
    screen = Screen(quiet=quiet)

    def work() -> int:
        from kbatch.cli._outbox_demo import OutboxPlan, run_outbox_demo

        return run_outbox_demo(OutboxPlan(count, kills, seed), screen)

    exit_with(work, screen)


@dead_app.command("list")
def dead_list(
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    which: Which = None,
    topic: Topic = None,
    type: Type = None,
    error: Error = None,
    older_than: Older = None,
    newer_than: Newer = None,
    limit: Limit = 50,
    offset: Offset = 0,
    summary: Summary = False,
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
) -> None:
    """List dead letters, those first that died first."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import Selection, count_dead, list_dead

        place = _place(outbox, prefix, schema, config, wire)
        selection = Selection(which or (), topic, type, error, older_than, newer_than)
        if summary:
            return count_dead(place, selection, json, screen)
        return list_dead(place, selection, limit, offset, json, screen)

    exit_with(work, screen, prints=True)


@dead_app.command("show")
def dead_show(
    which: Annotated[list[str], typer.Argument(metavar="NUMBER|ID", help="Which messages, by number or id.")],
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
) -> None:
    """Show everything about dead letters, their headers and bodies included."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import Selection, show_dead

        return show_dead(_place(outbox, prefix, schema, config, wire), Selection(which), json, screen)

    exit_with(work, screen, prints=True)


@dead_app.command("replay")
def dead_replay(
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    which: Which = None,
    topic: Topic = None,
    type: Type = None,
    error: Error = None,
    older_than: Older = None,
    newer_than: Newer = None,
    all: All = False,
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
) -> None:
    """Have dead letters sent again, as if they had never been sent.

    They go back to their old places: of each key they are sent in the order in which they were added, and before those
    that no relay had handed over yet. Relays at work notice at once. What has expired stays dead.

    Exit status: 0 if all that was named will be sent; 1 if not; 2 if an option is wrong.
    """
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import Selection, replay_dead

        selection = Selection(which or (), topic, type, error, older_than, newer_than, all)
        return replay_dead(_place(outbox, prefix, schema, config, wire), selection, json, screen)

    exit_with(work, screen)


@dead_app.command("discard")
def dead_discard(
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    which: Which = None,
    topic: Topic = None,
    type: Type = None,
    error: Error = None,
    older_than: Older = None,
    newer_than: Newer = None,
    all: All = False,
    yes: Yes = False,
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
) -> None:
    """Delete dead letters for good, after a question.

    Exit status: 0 if all that was named is deleted; 1 if not; 2 if an option is wrong, or nobody can be asked and
    --yes is missing.
    """
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import Selection, discard_dead

        selection = Selection(which or (), topic, type, error, older_than, newer_than, all)
        return discard_dead(_place(outbox, prefix, schema, config, wire), selection, yes, json, screen)

    exit_with(work, screen)


@dead_app.command("edit")
def dead_edit(
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="Which message, by its number.")],
    body: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its new body, as it goes to Kafka; - is standard input.")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="TOPIC", help="Its new topic.")] = None,
    key: Annotated[str | None, typer.Option(help="Its new key.")] = None,
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
) -> None:
    """Have a dead letter sent again with another body, topic or key; the rest of it stays.

    It takes its old place, as by dead replay. `dead show --json` has the old body.

    Exit status: 0 if it will be sent; 1 if not; 2 if an option is wrong.
    """
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import edit_dead

        return edit_dead(_place(outbox, prefix, schema, config, wire), number, body, to, key, json, screen)

    exit_with(work, screen)


@later_app.command("list")
def later_list(
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    which: Which = None,
    topic: Topic = None,
    type: Type = None,
    error: Error = None,
    limit: Limit = 50,
    offset: Offset = 0,
    summary: Summary = False,
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
) -> None:
    """List messages that wait, those first that are due first."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import Selection, count_later, list_later

        place = _place(outbox, prefix, schema, config, wire)
        selection = Selection(which or (), topic, type, error)
        if summary:
            return count_later(place, selection, json, screen)
        return list_later(place, selection, limit, offset, json, screen)

    exit_with(work, screen, prints=True)


@later_app.command("cancel")
def later_cancel(
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    which: Which = None,
    topic: Topic = None,
    type: Type = None,
    error: Error = None,
    all: All = False,
    yes: Yes = False,
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
) -> None:
    """Delete messages that wait for good, after a question. Later ones of their keys go on.

    What a relay has on its way just then may be sent nevertheless.

    Exit status: as of dead discard.
    """
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import Selection, cancel_later

        selection = Selection(which or (), topic, type, error, is_all=all)
        return cancel_later(_place(outbox, prefix, schema, config, wire), selection, yes, json, screen)

    exit_with(work, screen)


@later_app.command("reschedule")
def later_reschedule(
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="When: as 2030-01-31T12:00:00Z, with a time zone.")
    ] = None,
    within: Annotated[str | None, typer.Option("--in", metavar="AGE", help="Or in how long: 0s, 15m, 2h, 7d.")] = None,
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    which: Which = None,
    topic: Topic = None,
    type: Type = None,
    error: Error = None,
    all: All = False,
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
) -> None:
    """Have messages that wait sent at another time, by the database's clock; --in 0s is at once.

    What waits for its next attempt should not be put off longer than the relays' longest back-off: they send it at
    once then.

    Exit status: 0 if all that was named is rescheduled; 1 if not; 2 if an option is wrong.
    """
    screen = Screen()

    def work() -> int:
        from kbatch.cli._outbox import Selection, reschedule_later

        selection = Selection(which or (), topic, type, error, is_all=all)
        return reschedule_later(_place(outbox, prefix, schema, config, wire), selection, at, within, json, screen)

    exit_with(work, screen)


def relay(
    context: typer.Context,
    outbox: Outbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings, TOML: outbox, prefix, schema, notify, and the tables relay, retry and kafka.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("-X", metavar="KEY=VALUE", help="A setting of librdkafka, such as bootstrap.servers. Repeatable."),
    ] = None,
    drain: Annotated[
        bool,
        typer.Option(
            "--drain", help="End when the outbox is empty but for dead letters and what is scheduled for later."
        ),
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0.0, help="With --drain: seconds after which it ends anyway.")
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            show_default="close_timeout_s of FILE, or 30",
            help="Seconds that a signal leaves to what is in flight; a second one ends them.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No live line on a terminal.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="For programs: each line of the log, and the counters at the end, as JSON.")
    ] = False,
) -> None:
    """Bring the messages of an outbox to Kafka, until a signal.

    Any number of relays may work on one outbox. When no broker or no database answers, it waits and tries again.

    Settings of librdkafka come from -X, else from the environment (KBATCH_SASL_PASSWORD is sasl.password), else from
    the table kafka of the --config FILE. Keep secrets out of -X: others can see command lines.

    Ctrl-C, SIGTERM and SIGHUP wait for what is in flight and hand the buckets back, so that other relays go on at
    once. What is given up by a second signal is sent again by the next relay.

    Exit status: 0 if --drain found the outbox empty; 3 if --timeout was over before; 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP; 1 if it cannot go on; 2 if a file, a setting or an option is wrong.
    """
    screen = Screen(quiet=quiet)

    def work() -> int:
        from kbatch.cli._failure import USAGE, Failure
        from kbatch.cli._relay import RelayJob, run_relay
        from kbatch.cli._relay_file import RelayFile
        from kbatch.cli._settings import Settings

        if context.args:
            # Not the arguments themselves, as the parser would: one may be a password.
            raise Failure("-X takes KEY=VALUE as one argument, without blanks", USAGE)
        if timeout is not None and not drain:
            raise Failure("--timeout is for --drain", USAGE)
        file = RelayFile(config)
        settings = Settings.collect([typed("-X", each) for each in setting or []], file.kafka(), os.environ)
        return run_relay(
            RelayJob(_place_by(file.values, outbox, prefix, schema), settings, file, drain, timeout, grace, json),
            screen,
        )

    exit_with(work, screen)
