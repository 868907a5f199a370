"""``kbatch inbox``: its options."""

from typing import Annotated

import typer

from kbatch.cli._outbox_app import HELP_NAMES
from kbatch.cli._screen import Screen
from kbatch.cli._work import exit_with

inbox_app = typer.Typer(
    help="What a listener's inbox does.",
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@inbox_app.callback()
def _options() -> None:
    pass


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
