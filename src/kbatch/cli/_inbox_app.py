"""``kbatch inbox``: its options."""

from pathlib import Path
from typing import Annotated

import typer

from kbatch.cli._outbox_app import HELP_NAMES, Json, Prefix, Schema, Yes
from kbatch.cli._place import InboxPlace
from kbatch.cli._screen import Screen
from kbatch.cli._work import exit_with, typed

inbox_app = typer.Typer(
    help="Make an inbox's tables, and look after what is in it.",
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Inbox = Annotated[
    str | None,
    typer.Option(
        "--inbox",
        "-i",
        metavar="PATH|URL",
        help="A SQLite file, or a URL: postgresql://user@host/database, sqlite:///shop.db. Else KBATCH_INBOX, or "
        "inbox in the --config FILE: a password is no secret in a command line.",
    ),
]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A listener's settings, TOML: inbox, prefix and schema.")
]


def _place(inbox: str | None, prefix: str | None, schema: str | None, config: Path | None) -> InboxPlace:
    from kbatch.cli._listen_file import ListenFile

    name = None if inbox is None else typed("--inbox", inbox)
    return InboxPlace.find(name, prefix, schema, ListenFile(config).values)


@inbox_app.command()
def create(inbox: Inbox = None, prefix: Prefix = None, schema: Schema = None, config: Config = None) -> None:
    """Make the tables, and a SQLite file, as far as they are missing."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._tables import create as run

        return run(_place(inbox, prefix, schema, config), screen)

    exit_with(work, screen)


@inbox_app.command()
def ddl(inbox: Inbox = None, prefix: Prefix = None, schema: Schema = None, config: Config = None) -> None:
    """Print the statements that make the tables, for those who execute them themselves. The inbox need not exist."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._tables import ddl as run

        return run(_place(inbox, prefix, schema, config), screen)

    exit_with(work, screen, prints=True)


@inbox_app.command()
def status(
    inbox: Inbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    count_up_to: Annotated[int, typer.Option(min=1, help="Count no more ids.")] = 100_000,
    json: Json = False,
) -> None:
    """Show how many ids it knows, and up to when each group has committed all that it had handled."""
    screen = Screen()

    def work() -> int:
        from kbatch.cli._inbox import status as run

        return run(_place(inbox, prefix, schema, config), count_up_to, json, screen)

    exit_with(work, screen, prints=True)


@inbox_app.command()
def purge(
    inbox: Inbox = None,
    prefix: Prefix = None,
    schema: Schema = None,
    config: Config = None,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Ids that were handled so long ago (90s, 15m, 2h, 7d) or before.")
    ] = "7d",
    committed: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP=TIME",
            help="All that this group had handled by TIME is committed: now, or as 2030-01-31T12:00:00Z, with a time "
            "zone. This counts more than what listeners have told. Repeatable.",
        ),
    ] = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete old ids for good, after a question. A copy that comes later is handled again.

    An id stays while its record may be read again, as far as listeners have told; of a group of which none has,
    all stay, unless --committed says what may go.

    Exit status: 0 if it is done; 1 if not; 2 if an option is wrong, or nobody can be asked and --yes is missing.
    """
    screen = Screen()

    def work() -> int:
        from kbatch.cli._inbox import purge as run

        claims = [typed("--committed", each) for each in committed or ()]
        return run(_place(inbox, prefix, schema, config), older_than, claims, yes, json, screen)

    exit_with(work, screen)


@inbox_app.command()
def demo(
    count: Annotated[int, typer.Option(min=1, max=400_000, help="How many orders to add.")] = 100_000,
    relay_kills: Annotated[int, typer.Option(min=0, max=5, help="How often to kill the relay.")] = 1,
    listener_kills: Annotated[int, typer.Option(min=0, max=9, help="How often to kill the listener.")] = 3,
    one_at_a_time: Annotated[
        int, typer.Option(min=0, max=10_000, help="How many to send by a relay that awaits each, for comparison.")
    ] = 1_000,
    seed: Annotated[int, typer.Option(help="Of the sizes of transactions, and which are rolled back.")] = 7,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")] = False,
) -> None:
    """Bring orders from one database through Kafka into another, kill whoever is at work, and look for what is wrong.

    An application commits orders with its outbox; a relay sends them; a listener writes an invoice for each, in the
    transaction of its inbox. Needs no broker: relay and listener, processes of their own, use the mock cluster of
    librdkafka, which is another one. The SQLite files are in a temporary folder.

    Exit status 0 if every order that was committed has one invoice, and those of a customer are in their order; else 1.
    """
    screen = Screen(quiet=quiet)

    def work() -> int:
        from kbatch.cli._inbox_demo import InboxPlan, run_inbox_demo

        return run_inbox_demo(InboxPlan(count, relay_kills, listener_kills, one_at_a_time, seed), screen)

    exit_with(work, screen)
