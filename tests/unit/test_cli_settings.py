"""The command line's settings: file, environment and options. No broker."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kbatch
from kbatch._config import _CANONICAL
from kbatch.cli._app import app
from kbatch.cli._failure import Failure
from kbatch.cli._settings import Settings

SECRET = "hunter2-hunter2"
NAMES: dict[str, set[str]] = {}
for _alias, _name in _CANONICAL.items():
    NAMES.setdefault(_name, {_name}).add(_alias)
SOURCES = ("file", "environment", "options")  # a later one counts


def variable(key: str) -> str:
    return "KBATCH_" + key.replace("_", "__").replace(".", "_").upper()


def collect(folder: Path, **given: list[tuple[str, str]]) -> Settings:
    """Settings of the pairs of each source."""
    file = folder / "settings"
    file.write_text("".join(f"{key}={value}\n" for key, value in given.get("file", [])))
    return Settings.collect(
        [f"{key}={value}" for key, value in given.get("options", [])],
        file,
        {variable(key): value for key, value in given.get("environment", [])},
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("weaker", "stronger"), list(itertools.combinations(SOURCES, 2)))
def test_an_option_counts_before_a_variable_before_a_line_by_whichever_names(
    weaker: str, stronger: str, name: str, tmp_path: Path
) -> None:
    for first, second in itertools.product(sorted(NAMES[name]), repeat=2):
        settings = collect(tmp_path, **{weaker: [(first, "weak")], stronger: [(second, "strong")]})
        assert settings.values == {second: "strong"}
        for key in NAMES[name]:
            found = settings.find(key)
            assert found is not None
            origin = {"environment": variable(second), "options": "-X"}[stronger]
            assert (found.key, found.value, found.origin) == (second, "strong", origin)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_counts_before_both_others(name: str, tmp_path: Path) -> None:
    for file, environment, option in itertools.product(sorted(NAMES[name]), repeat=3):
        settings = collect(tmp_path, file=[(file, "A")], environment=[(environment, "B")], options=[(option, "C")])
        assert settings.values == {option: "C"}


@pytest.mark.parametrize("name", NAMES)
def test_the_last_of_two_options_and_of_two_lines_counts(name: str, tmp_path: Path) -> None:
    for first, second in itertools.product(sorted(NAMES[name]), repeat=2):
        for source in ("file", "options"):
            assert collect(tmp_path, **{source: [(first, "A"), (second, "B")]}).values == {second: "B"}


@pytest.mark.parametrize("name", NAMES)
def test_two_variables_of_one_setting_must_agree(name: str, tmp_path: Path) -> None:
    first, second = sorted(NAMES[name])[:2]
    assert collect(tmp_path, environment=[(first, "A"), (second, "A")]).values in ({first: "A"}, {second: "A"})
    with pytest.raises(Failure, match=f"{variable(first)} and {variable(second)} are two names of one") as caught:
        collect(tmp_path, environment=[(first, SECRET), (second, "B")])
    assert SECRET not in str(caught.value)


def test_an_option_names_the_cluster_that_is_asked(tmp_path: Path) -> None:
    file, lines = tmp_path / "settings", tmp_path / "lines"
    file.write_text("bootstrap.servers=127.0.0.1:1\n")
    lines.write_text("1\n")
    arguments = ["produce", str(lines), "-t", "t", "--config", str(file), "--connect-timeout", "0.5"]
    environment = {"KBATCH_METADATA_BROKER_LIST": "127.0.0.1:2"}
    done = CliRunner().invoke(app, [*arguments, "-X", "bootstrap.servers=127.0.0.1:3"], env=environment)
    assert "127.0.0.1:3" in done.stderr
    assert "127.0.0.1:2" not in done.stderr
    done = CliRunner().invoke(app, [*arguments, "--embedded", "-X", "metadata.broker.list=127.0.0.1:3"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--embedded brings its own broker" in done.stderr
    arguments[-1] = "30"
    done = CliRunner().invoke(app, [*arguments, "--embedded"], env=environment)
    assert done.exit_code == 0, done.stderr


SERVICE_LINKS = {
    "KBATCH_SERVICE_HOST": "10.0.0.1",
    "KBATCH_SERVICE_PORT": "9092",
    "KBATCH_SERVICE_PORT_METRICS": "8080",
    "KBATCH_PORT": "tcp://10.0.0.1:9092",
    "KBATCH_PORT_9092_TCP": "tcp://10.0.0.1:9092",
    "KBATCH_PORT_9092_TCP_PROTO": "tcp",
    "KBATCH_PORT_9092_TCP_PORT": "9092",
    "KBATCH_PORT_9092_TCP_ADDR": "10.0.0.1",
    "KBATCH_PORT_53_UDP": "udp://10.0.0.1:53",
}


def test_what_kubernetes_sets_for_a_service_called_kbatch_is_no_setting() -> None:
    for name, value in SERVICE_LINKS.items():
        assert Settings.collect([], None, {name: value}).values == {}
    environment = {**SERVICE_LINKS, "KBATCH_ACKS": "all"}
    assert Settings.collect([], None, environment).values == {"acks": "all"}
    of_another = {name.replace("KBATCH_", "KBATCH_API_GATEWAY_", 1): value for name, value in environment.items()}
    assert Settings.collect([], None, of_another).values == {"api.gateway.acks": "all"}


def test_what_names_a_database_is_no_setting() -> None:
    for name in ("KBATCH_OUTBOX", "KBATCH_INBOX", "KBATCH_TEST_POSTGRES"):
        assert Settings.collect([], None, {name: "postgresql://u:secret@h/d"}).values == {}


@pytest.mark.parametrize(
    "name",
    [
        "KBATCH_PORTS",
        "KBATCH_PORT_9092",
        "KBATCH_PORT_9092_HTTP",
        "KBATCH_PORT_X_TCP",
        "KBATCH_PORT_9092_TCP_HOST",
        "KBATCH_SERVICE",
        "KBATCH_SERVICE_HOSTS",
        "KBATCH_SERVICE_HOST_X",
        "KBATCH_BOOTSTRAP_PORT",  # there is no KBATCH_BOOTSTRAP_SERVICE_HOST
    ],
)
def test_a_name_of_another_form_is_refused_as_a_key(name: str, tmp_path: Path) -> None:
    assert Settings.collect([], None, {name: "x"}).values == {name[7:].lower().replace("_", "."): "x"}


def test_no_setting_of_librdkafka_has_a_name_of_that_form() -> None:
    kept = ("bootstrap.servers", "socket.timeout.ms", "sasl.kerberos.service.name", "log_level", "ssl.providers")
    environment = {**SERVICE_LINKS, **{variable(key): "x" for key in kept}}
    assert set(Settings.collect([], None, environment).values) == set(kept)


@pytest.mark.parametrize(
    ("arguments", "file", "environment", "told"),
    [
        (
            ["-X", f"sasl.password: {SECRET}=="],
            "",
            {},
            "sasl.password… is not a configuration key of librdkafka (from -X)",
        ),
        (["-X", f"sasl.password:{SECRET}"], "", {}, "-X takes KEY=VALUE"),
        (
            [],
            f"acks=all\nsasl.password: {SECRET}==\n",
            {},
            "sasl.password… is not a configuration key of librdkafka (from ",
        ),
        ([], f"sasl.password: {SECRET}\n", {}, "line 1: expected key=value"),
        ([], f"security.protocol={SECRET}\n", {}, "security.protocol: not a valid value (from "),
        (
            [],
            "",
            {f"KBATCH_SASL_PASSWORD:{SECRET}": "="},
            "is not a configuration key of librdkafka (from KBATCH_SASL_PASSWORD…)",
        ),
        (
            [],
            "",
            {"KBATCH_SASL_MECHANISM": SECRET, "KBATCH_SECURITY_PROTOCOL": "sasl_plaintext"},
            "Unsupported SASL mechanism: …",
        ),
        (["-X", f"bootstrap.servers=me:{SECRET}@kafka"], "", {}, "'@' is in no broker's name"),
        (["-X", "sasl.password", SECRET], "", {}, "-X takes KEY=VALUE"),
        (["-X", "sasl.password=", SECRET], "", {}, "-X takes KEY=VALUE as one argument"),
    ],
)
def test_a_password_that_stands_in_the_wrong_place_is_not_shown(
    arguments: list[str], file: str, environment: dict[str, str], told: str, tmp_path: Path
) -> None:
    config, lines = tmp_path / "settings", tmp_path / "lines"
    config.write_text(file)
    lines.write_text("1\n")
    done = CliRunner().invoke(
        app,
        ["produce", str(lines), "-t", "t", "--config", str(config), "-X", "bootstrap.servers=127.0.0.1:1", *arguments],
        env=environment,
    )
    assert done.exit_code == 2
    assert SECRET not in done.stdout + done.stderr
    assert told in done.stderr.replace(f"{config}, ", "")


def test_settings_show_no_values_and_no_keys() -> None:
    settings = Settings.collect([f"sasl.password: {SECRET}=="], None, {"KBATCH_SASL_PASSWORD": SECRET})
    shown: list[Any] = [settings, vars(settings)]
    assert not any(SECRET in repr(thing) for thing in shown[:1])
    with pytest.raises(kbatch.ConfigError) as caught:
        kbatch.Producer({"bootstrap.servers": "127.0.0.1:1", **settings.values})
    assert SECRET.encode() not in pickle.dumps(caught.value)
