"""The commands and their options."""

import os
from pathlib import Path
from typing import Annotated

import typer

import kbatch
from kbatch.cli._failure import USAGE, Failure
from kbatch.cli._inbox_app import inbox_app
from kbatch.cli._outbox_app import outbox_app, relay
from kbatch.cli._receiving_app import consume, dead_topic_app, listen, replay
from kbatch.cli._screen import Screen
from kbatch.cli._work import Wire, exit_with, typed

app = typer.Typer(
    help="Batches of messages into Kafka, with one answer per batch.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # A traceback with local variables would show secrets.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(value: bool) -> None:
    if value:
        Screen().say(f"kbatch {kbatch.__version__} (librdkafka {kbatch.librdkafka_version})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    count: Annotated[int, typer.Option(min=1, max=400_000, help="How many orders to send.")] = 200_000,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Envelopes in a batch.")] = 1_000,
    in_flight: Annotated[int, typer.Option(min=1, max=100_000, help="Messages in flight across batches.")] = 5_000,
    one_at_a_time: Annotated[
        int, typer.Option(min=0, max=100_000, help="How many of them to send again, one awaited message at a time.")
    ] = 5_000,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")] = False,
) -> None:
    """Send orders to an embedded Kafka, read them back, compare every byte, and show the figures.

    Needs no broker: it starts the mock cluster of librdkafka in a process of its own. Exit status 0 if everything
    arrived, once, unchanged and in order; else 1.
    """
    screen = Screen(quiet=quiet)

    def work() -> int:
        from kbatch.cli._demo import Plan, run

        return run(Plan(count, min(batch_size, in_flight), in_flight, min(one_at_a_time, count)), screen)

    exit_with(work, screen)


@app.command(context_settings={"allow_extra_args": True})
def produce(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file of JSON lines; - reads standard input.")],
    topic: Annotated[str, typer.Option("--topic", "-t", help="Where the lines go.")],
    key: Annotated[
        str | None, typer.Option("--key", "-k", metavar="FIELD", help="The field of each line that is its record key.")
    ] = None,
    records: Annotated[
        bool,
        typer.Option(
            "--records",
            help="Lines are what `kbatch consume --json` printed: send their records again. Partition and time are not "
            "kept.",
        ),
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("-X", metavar="KEY=VALUE", help="A setting of librdkafka, such as bootstrap.servers. Repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of librdkafka, a line key=value each; # comments.")
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Send to an embedded broker that ends with the command.")
    ] = False,
    rejects: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Where lines go that are bad or not acknowledged; a file of an earlier run is replaced at the end. "
            "- is standard output, and the summary then goes to standard error.",
        ),
    ] = None,
    wire: Annotated[Wire, typer.Option(help="The headers; raw is none.")] = Wire.KBATCH,
    message_type: Annotated[str | None, typer.Option(help="The message-type header of every line.")] = None,
    source: Annotated[str | None, typer.Option(help="The source header of every line.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Lines in a batch.")] = 1_000,
    in_flight: Annotated[int, typer.Option(min=1, max=1_000_000, help="Lines in flight across batches.")] = 5_000,
    connect_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a broker to answer.")] = 10.0,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds that Ctrl-C leaves to what is in flight; a second one ends them.")
    ] = 10.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Send every line of a file as a message, its bytes as they are; with --records the record that it describes.

    Settings come from -X, else from the environment (KBATCH_BOOTSTRAP_SERVERS is bootstrap.servers,
    KBATCH_SASL_PASSWORD is sasl.password; two underscores stand for one), else from --config. librdkafka's aliases are
    one setting. What Kubernetes sets for a Service called kbatch (KBATCH_SERVICE_HOST, KBATCH_PORT_9092_TCP, …) is
    none. Keep secrets out of -X: others can see command lines.

    A line that is not JSON, or has no key, is named with its number, goes to --rejects, and the rest is sent. So does
    a line that the broker refuses. The broker refuses it with its whole record batch, so the lines of that are sent
    again one by one, after those already on their way. Blank lines are skipped.

    When no broker answers, librdkafka's reason is shown. Before the first line it ends after --connect-timeout; later
    it is tried again until message.timeout.ms is over.
    Ctrl-C, SIGTERM and SIGHUP wait for what is in flight, keep what was rejected and say where to go on.

    Exit status: 0 if every line was acknowledged; 1 if not; 2 if a file, a setting or an option is wrong; 130 after
    Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    screen = Screen(quiet=quiet)

    def work() -> int:
        if context.args:
            # Not the arguments themselves, as the parser would: one may be a password.
            raise Failure("one FILE is sent at a time, and -X takes KEY=VALUE as one argument, without blanks", USAGE)
        if records and wire is not Wire.KBATCH:
            raise Failure("--records sends keys and headers as they are: leave out --wire", USAGE)
        from kbatch.cli._produce import Job
        from kbatch.cli._produce import produce as run
        from kbatch.cli._settings import Settings

        return run(
            Job(
                input=file,
                topic=topic,
                key_field=None if key is None else typed("--key", key),
                records=records,
                config=config,
                settings=Settings.collect([typed("-X", each) for each in setting or []], config, os.environ),
                embedded=embedded,
                rejects=rejects,
                wire="raw" if records else wire.value,
                message_type=None if message_type is None else typed("--message-type", message_type),
                source=None if source is None else typed("--source", source),
                batch_size=batch_size,
                in_flight=in_flight,
                connect_timeout_s=connect_timeout,
                grace_s=grace,
            ),
            screen,
        )

    exit_with(work, screen)


app.command(context_settings={"allow_extra_args": True})(relay)
app.command()(listen)
app.command()(consume)
app.command()(replay)
app.add_typer(dead_topic_app, name="dead-topic")
app.add_typer(outbox_app, name="outbox")
app.add_typer(inbox_app, name="inbox")
