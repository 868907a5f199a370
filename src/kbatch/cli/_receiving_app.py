"""``kbatch listen``, ``consume``, ``replay`` and ``dead-topic``: their options."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._screen import Screen
from kbatch.cli._work import Wire, exit_with, typed

if TYPE_CHECKING:
    from kbatch.cli._replay import Letters
    from kbatch.cli._settings import Settings

dead_topic_app = typer.Typer(
    help="Look at a dead letter topic, and send back what is in it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

Setting = Annotated[
    list[str] | None,
    typer.Option("-X", metavar="KEY=VALUE", help="A setting of librdkafka, such as bootstrap.servers. Repeatable."),
]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Settings of librdkafka, a line key=value each; # comments.")
]
Json = Annotated[bool, typer.Option("--json", help="For programs: a JSON object on each line.")]
From = Annotated[
    str,
    typer.Option("--from", metavar="POINT", help="beginning, end, an offset, an age (15m, 2h) or a time in RFC 3339."),
]
Until = Annotated[
    str,
    typer.Option(
        "--until",
        metavar="POINT",
        help="end, an offset, an age or a time: what is there is left out. By default what is there now.",
    ),
]
Partition = Annotated[int | None, typer.Option(min=0, help="Only this partition.")]
Key = Annotated[str | None, typer.Option("--key", "-k", help="Only records with this key.")]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, help="So many and no more.")]
WireOption = Annotated[Wire, typer.Option(help="The format of the headers.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a broker to answer.")]
Which = Annotated[list[str] | None, typer.Argument(metavar="PARTITION:OFFSET", help="Which records, by their place.")]
ErrorText = Annotated[str | None, typer.Option("--error", metavar="TEXT", help="Those with this in their error.")]
Origin = Annotated[str | None, typer.Option("--origin", metavar="TOPIC", help="Those that came from this topic.")]
To = Annotated[
    str | None, typer.Option("--to", metavar="TOPIC", help="Where they go; by default where each came from.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count what would be sent, and send nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask no question.")]


def listen(
    context: typer.Context,
    topics: Annotated[
        list[str] | None, typer.Argument(metavar="TOPIC", help="Which topics; else those of FILE.")
    ] = None,
    handler: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="What is called with each envelope, such as shop.billing:handle."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings, TOML: handler, topics, reject_on, inbox, prefix, schema, and the tables types, listener, "
            "retry and kafka.",
        ),
    ] = None,
    transactional_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="What the handler sends by its Transaction is committed with its records. Each process has its own.",
        ),
    ] = None,
    setting: Setting = None,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            show_default="close_timeout_s of FILE, or 30",
            help="Seconds that a signal leaves to handlers; a second one does not wait.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No live line on a terminal.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="For programs: each line of the log, and the counters at the end, as JSON.")
    ] = False,
) -> None:
    """Hand the records of topics to a function, as a member of a group, until a signal.

    Settings of librdkafka, group.id among them, come from -X, else from the environment (KBATCH_GROUP_ID is group.id),
    else from the table kafka of the --config FILE. Keep secrets out of -X: others can see command lines.

    The tables of the FILE's inbox must be there: kbatch inbox create. KBATCH_INBOX, if it is set, says where that is.

    Ctrl-C, SIGTERM and SIGHUP wait for the handlers that run, commit what is done and leave the group.

    Exit status: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP; 0 if the handler's program ended it; 1 if it
    cannot go on; 2 if a file, a setting or an option is wrong.
    """
    screen = Screen(quiet=quiet)

    def work() -> int:
        from kbatch.cli._listen import ListenJob, run_listener
        from kbatch.cli._listen_file import ListenFile
        from kbatch.cli._settings import Settings

        file = ListenFile(config)
        settings = Settings.collect([typed("-X", each) for each in setting or []], file.kafka(), os.environ)
        names = [typed("TOPIC", each) for each in topics or []]
        return run_listener(ListenJob(handler, names, settings, file, transactional_id, grace, json), screen)

    exit_with(work, screen)


def consume(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="Whose records.")],
    begin: From = "beginning",
    until: Until = "end",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    partition: Partition = None,
    key: Key = None,
    count: Count = None,
    json: Json = False,
    values: Annotated[
        bool, typer.Option("--values", help="Print the values alone, a line each, as kbatch produce reads them.")
    ] = False,
    group: Annotated[
        str | None,
        typer.Option(help="With --from committed and --commit: whose offsets. It does not become a member."),
    ] = None,
    commit: Annotated[
        bool, typer.Option("--commit", help="Commit for the group what was printed; not with --key.")
    ] = False,
    wire: WireOption = Wire.KBATCH,
    setting: Setting = None,
    config: Config = None,
    connect_timeout: Timeout = 10.0,
) -> None:
    """Print the records of a topic, without being a member of a group.

    It ends where the topic ended when it began, unless --follow. Nothing is committed unless --commit.

    Exit status: 0; 1 if the broker does not answer, or what is printed cannot be written; 2 if an option is wrong; 130
    after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    screen = Screen()

    def work() -> int:
        from kbatch.cli._consume import ConsumeJob
        from kbatch.cli._consume import consume as run
        from kbatch.cli._topic_reader import Range

        if json and values:
            raise Failure("--json and --values are two forms; give one", USAGE)
        if commit and group is None:
            raise Failure("--commit is for a --group", USAGE)
        if commit and key is not None:  # an offset covers all before it
            raise Failure("--commit passes by what --key leaves out: the group would never handle it", USAGE)
        wanted = Range(
            typed("TOPIC", topic), begin, until, partition, None if key is None else typed("--key", key), count, follow
        )
        form = "json" if json else "values" if values else "text"
        job = ConsumeJob(wanted, _settings(setting, config), wire.value, form, group, commit, connect_timeout)
        return run(job, screen)

    exit_with(work, screen, prints=True)


def replay(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="A dead letter topic, or any other with --to.")],
    to: To = None,
    begin: From = "beginning",
    until: Until = "end",
    partition: Partition = None,
    key: Key = None,
    count: Count = None,
    error: ErrorText = None,
    origin: Origin = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
    setting: Setting = None,
    config: Config = None,
    connect_timeout: Timeout = 10.0,
) -> None:
    """Send the records of a topic back to where they came from, or to another topic, after a question.

    Key, value and headers are as they were; the headers of the failure are taken off. No group's offsets change, and
    the records stay where they are: a second replay sends them a second time.

    A record with a header whose name is not UTF-8 is left out. Ctrl-C and SIGTERM wait for what is in flight; a second
    one does not wait.

    Exit status: 0 if each record was acknowledged; 1 if not, or if one is left out or not there; 2 if an option is
    wrong, if nobody can be asked and --yes is missing, or if a record does not say where it came from and --to is
    missing; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    screen = Screen()

    def work() -> int:
        from kbatch.cli._replay import ReplayJob
        from kbatch.cli._replay import replay as run

        letters = _letters(topic, begin, until, partition, key, count, error, origin, setting, config, connect_timeout)
        return run(ReplayJob(letters, to, dry_run, yes, json), screen)

    exit_with(work, screen)


@dead_topic_app.command("list")
def dead_topic_list(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The dead letter topic.")],
    begin: From = "beginning",
    until: Until = "end",
    partition: Partition = None,
    key: Key = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many at most.")] = 50,
    error: ErrorText = None,
    origin: Origin = None,
    json: Json = False,
    setting: Setting = None,
    config: Config = None,
    connect_timeout: Timeout = 10.0,
) -> None:
    """List dead letters: where they are, where they came from and why."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._replay import list_letters

        letters = _letters(topic, begin, until, partition, key, limit, error, origin, setting, config, connect_timeout)
        return list_letters(letters, json, screen)

    exit_with(work, screen, prints=True)


@dead_topic_app.command("show")
def dead_topic_show(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The dead letter topic.")],
    which: Annotated[list[str], typer.Argument(metavar="PARTITION:OFFSET", help="Which records, by their place.")],
    wire: WireOption = Wire.KBATCH,
    json: Json = False,
    setting: Setting = None,
    config: Config = None,
    connect_timeout: Timeout = 10.0,
) -> None:
    """Show everything about dead letters, their headers and bodies included."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._replay import Letters, show_letters
        from kbatch.cli._topic_reader import Range

        settings = _settings(setting, config)
        letters = Letters(Range(typed("TOPIC", topic)), settings, wire.value, which, connect_timeout_s=connect_timeout)
        return show_letters(letters, json, screen)

    exit_with(work, screen, prints=True)


@dead_topic_app.command("replay")
def dead_topic_replay(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The dead letter topic.")],
    which: Which = None,
    to: To = None,
    key: Key = None,
    error: ErrorText = None,
    origin: Origin = None,
    all: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
    setting: Setting = None,
    config: Config = None,
    connect_timeout: Timeout = 10.0,
) -> None:
    """Send dead letters back to where they came from, after a question: `kbatch replay` of those that are named.

    Exit status: as of replay.
    """
    screen = Screen()

    def work() -> int:
        import dataclasses

        from kbatch.cli._replay import ReplayJob
        from kbatch.cli._replay import replay as run

        if all == bool(which or key or error or origin):
            raise Failure("say which: PARTITION:OFFSET, --key, --error or --origin; or --all", USAGE)
        letters = _letters(
            topic, "beginning", "end", None, key, None, error, origin, setting, config, connect_timeout
        )  # fmt: skip
        return run(ReplayJob(dataclasses.replace(letters, which=which or ()), to, dry_run, yes, json), screen)

    exit_with(work, screen)


def _settings(setting: list[str] | None, config: Path | None) -> "Settings":
    from kbatch.cli._settings import Settings

    return Settings.collect([typed("-X", each) for each in setting or []], config, os.environ)


def _letters(
    topic: str,
    begin: str,
    until: str,
    partition: int | None,
    key: str | None,
    count: int | None,
    error: str | None,
    origin: str | None,
    setting: list[str] | None,
    config: Path | None,
    timeout: float,
) -> "Letters":
    from kbatch.cli._replay import Letters
    from kbatch.cli._topic_reader import Range

    wanted = Range(typed("TOPIC", topic), begin, until, partition, None if key is None else typed("--key", key))
    return Letters(
        wanted, _settings(setting, config), error=error, origin=origin, connect_timeout_s=timeout, count=count
    )
