"""Options: one name everywhere, a fixed order of precedence, and nothing ignored."""

import json
from pathlib import Path
from typing import Any

import pytest

from tolserve.settings import (
    GenerateSettings,
    OptionError,
    Options,
    ServeSettings,
    TableExportSettings,
    TrainSettings,
)


def load(*argv: object, command: type[Options] = ServeSettings) -> Any:
    return command.load([str(word) for word in argv], "tolserve test")


def test_flag_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "options.toml"
    file.write_text('port = 1\nmax-num-seqs = 2\ndevice_cache = "50%"\nhost-cache = "1GiB"')
    monkeypatch.setenv("TOLSERVE_PORT", "3")
    monkeypatch.setenv("TOLSERVE_MAX_NUM_SEQS", "4")
    settings = load("--config", file, "--port", 5)
    assert settings.port == 5
    assert settings.max_num_seqs == 4
    assert (settings.device_cache, settings.host_cache) == ("50%", "1GiB")
    assert settings.max_queue == 256
    monkeypatch.setenv("TOLSERVE_CONFIG", str(file))
    assert load().device_cache == "50%"


def test_a_file_may_be_json(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"model": "m", "max-model-len": 7}))
    settings = load("--config", file)
    assert (settings.model, settings.max_model_len) == (Path("m"), 7)


def test_keyword_arguments_do_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLSERVE_PORT", "3")
    assert ServeSettings().port == 8000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "65536"], "--port"),
        (["--port", "-1"], "--port"),
        (["--port", "x"], "--port"),
        (["--device", "tpu"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--weights", "bfloat16"], "--weights"),
        (["--device-cache", "ten"], "--device-cache: must be records"),
        (["--host-cache", "-5"], "--host-cache"),
        (["--device-cache", "1.5"], "--device-cache"),
        (["--kv-cache", "12"], "--kv-cache"),
        (["--tol-policy", "magic"], "--tol-policy"),
        (["--tol-encoding", "int3"], "--tol-encoding"),
        (["--tol-io", "mmap"], "--tol-io"),
        (["--tol-read-depth", "0"], "--tol-read-depth"),
        (["--tol-read-depth", "257"], "--tol-read-depth"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--max-model-len", "0"], "--max-model-len"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "two words"], "--api-key"),
        (["--api-key", "a", "--api-key-file", "b"], "not both"),
        (["--api-key-file", "/nowhere/key"], "--api-key-file"),
        (["--config", "/nowhere/file"], "--config"),
    ],
)
def test_bad_values_are_refused_by_their_flag(argv: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load(*argv)


@pytest.mark.parametrize("text", ["12826", "2GiB", "1.5 GB", "10%", "12.5%", "100%", "0", "512mib"])
def test_sizes(text: str) -> None:
    assert load("--device-cache", text).device_cache == text


def test_unknown_options_are_refused_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        load("--device-cach", "10%")
    assert exit_.value.code == 2
    assert "--device-cach" in capsys.readouterr().err
    file = tmp_path / "options.json"
    for options, message in (
        ({"device-cach": "10%"}, "unknown option 'device_cach'"),
        ({"device-cache": "1", "device_cache": "2"}, "twice"),
        ({"config": "other"}, "config"),
        ([], "object"),
    ):
        file.write_text(json.dumps(options))
        with pytest.raises(OptionError, match=message):
            load("--config", file)
    monkeypatch.setenv("TOLSERVE_DEVICE_CACH", "10%")
    with pytest.raises(OptionError, match="TOLSERVE_DEVICE_CACH"):
        load()


def test_another_commands_variable_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLSERVE_PEAK_LR", "0.1")
    assert load().port == 8000


def test_the_key_may_come_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    assert load("--api-key-file", file).key() == "s3cret"
    settings = load("--api-key", "s3cret")
    assert settings.key() == "s3cret"
    assert "s3cret" not in repr(settings)
    with pytest.raises(OptionError) as raised:
        load("--api-key", "s3cret with spaces")
    assert "s3cret" not in str(raised.value)
    options = tmp_path / "options.json"
    options.write_text('{"api-key": ["s3cret"]}')
    with pytest.raises(OptionError, match="--api-key") as raised:
        load("--config", options)
    assert "s3cret" not in str(raised.value)


def test_the_prefix_cache_can_be_turned_off(tmp_path: Path) -> None:
    assert load(tmp_path).engine_json()["prefix_cache"] is True
    assert load(tmp_path, "--no-prefix-cache").engine_json()["prefix_cache"] is False


def test_the_engine_gets_its_part_as_plain_json(tmp_path: Path) -> None:
    options = load(tmp_path, "--table", "t", "--device-cache", "64").engine_json()
    assert set(options) == {
        *(
            "model",
            "table",
            "device",
            "dtype",
            "weights",
            "device_cache",
            "host_cache",
            "tol_policy",
            "tol_frequencies",
            "tol_save_frequencies",
            "tol_trace",
            "tol_encoding",
            "tol_io",
            "tol_read_depth",
        ),
        *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queue", "cache_dir", "kv_cache"),
        *("prefix_cache", "threads", "log_level", "log_format", "packs", "pack_memory"),
    }
    assert options == json.loads(json.dumps(options))
    assert (options["model"], options["table"], options["device_cache"]) == (str(tmp_path), "t", "64")
    assert options["max_model_len"] is None


def test_other_commands() -> None:
    generate = load("m", "-p", "hi, you", "--json", command=GenerateSettings)
    assert (generate.prompt, generate.json_output, generate.model) == ("hi, you", True, Path("m"))
    train = load("--data", "a", "--data", "b", "--out", "o", command=TrainSettings)
    assert train.data == [Path("a"), Path("b")]
    export = load("a", "b", command=TableExportSettings)
    assert (export.model, export.out) == (Path("a"), Path("b"))
    with pytest.raises(OptionError, match="--data is required"):
        load("--out", "o", command=TrainSettings)
    with pytest.raises(OptionError, match="--prompt is required"):
        load("m", command=GenerateSettings)


def test_memory_for_packs_without_packs_is_refused(tmp_path: Path) -> None:
    assert load("--packs", tmp_path, "--pack-memory", "1GiB").pack_memory == "1GiB"
    with pytest.raises(OptionError, match="--packs"):
        load("--pack-memory", "1GiB")
