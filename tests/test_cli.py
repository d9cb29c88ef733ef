"""The command line from outside: what it prints, where, and its exit status."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tolserve import __version__
from tolserve.cli import COMMANDS, main
from tolserve.settings import DEMO_MODEL
from tolserve.tol.frequencies import read_frequencies, write_frequencies


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(" ".join(words) in shown for words in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tolserve {__version__}\n"


@pytest.mark.parametrize("words", [*COMMANDS])
def test_every_command_explains_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--help"])
    assert exit_.value.code == 0
    assert f"tolserve {' '.join(words)}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["fly"], ["table"], ["table", "shake"], ["study"], ["serve", "--port", "x"]])
def test_wrong_words_end_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["table", "inspect", "/nowhere"],
        ["table", "build", "/nowhere"],
        ["serve", "/nowhere"],
        ["train", "--data", "/nowhere", "--out", "/dev/null/out"],  # the operating system's own error
    ],
)
def test_failures_end_with_1_and_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("tolserve: ")
    assert "Traceback" not in "".join(error)


def test_tables_from_the_command_line(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table"
    assert main(["table", "build", str(tiny_model_dir), "--out", str(table), "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert main(["table", "inspect", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == built
    assert main(["table", "verify", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["table", "build", str(tiny_model_dir), "--out", str(table)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["table", "build", str(tiny_model_dir), "--out", str(table), "--force"]) == 0
    capsys.readouterr()
    serving = tmp_path / "serving"
    assert main(["table", "export", str(tiny_model_dir), str(serving), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == built["fingerprint"]
    assert main(["table", "verify", str(serving)]) == 0
    capsys.readouterr()
    (shard,) = table.glob("records-*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    assert main(["table", "verify", str(table)]) == 1
    assert "checksum" in capsys.readouterr().err


def test_training_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old house stood at the end of the lane. " * 200)
    options = {"vocab-size": 270, "hidden-size": 16, "intermediate-size": 24, "num-hidden-layers": 1}
    options |= {"num-attention-heads": 2, "num-key-value-heads": 1, "batch": 2, "length": 16, "steps": 3}
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "run"
    assert main(["train", "--data", str(text), "--held-out", str(text), "--out", str(out), *argv, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["training_tokens"] == 3 * 2 * 16
    assert figures["held_out"]["bits_per_byte"] > 0
    assert (out / "model.safetensors").exists()
    assert main(["train", "--data", str(text), "--out", str(out), "--steps", "4"]) == 1
    assert "another recipe" in capsys.readouterr().err


def test_the_papers_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "params", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 15
    assert main(["study", "params"]) == 0
    assert "flex" in capsys.readouterr().out


def test_replay_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.npz"
    # The second half goes round through five tokens: LRU with four slots misses them all, the optimum does not.
    np.savez(trace, tokens=[0] * 40 + [1, 2, 3, 4, 5] * 8, offsets=[0, 80], vocab_size=40)
    argv = ["table", "replay", "--trace", str(trace), "--sequences", "1"]
    assert main([*argv, "--cache", "10%", "--policy", "half-pinned", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["policy"], shown["slots"], shown["sequences"]) == ("half-pinned", 4, 1)
    assert shown["lru_hit_rate"] == 0 <= shown["hit_rate"] <= shown["oracle_hit_rate"] < 1
    assert shown["oracle_hit_rate"] > 0.5
    assert main([*argv, "--cache", "5"]) == 0
    assert "12.5%" in capsys.readouterr().out
    assert main([*argv, "--cache", "0"]) == 1
    assert "0 slots do not hold" in capsys.readouterr().err
    assert main([*argv, "--cache", "1GiB"]) == 2
    assert "--cache" in capsys.readouterr().err
    assert main(["table", "replay", "--trace", str(tmp_path)]) == 1
    assert "no trace" in capsys.readouterr().err


def test_the_curve_has_a_line_for_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.npz"
    np.savez(trace, tokens=np.arange(600) % 37, offsets=[0, 300, 600], vocab_size=200)
    assert main(["table", "replay", "--trace", str(trace), "--sequences", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["slots", "2", "10", "20", "40"]


def test_a_plan_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, other = tmp_path / "trace.npz", tmp_path / "other.npz"
    tokens = np.random.default_rng(0).geometric(0.005, 3000) % 8192
    np.savez(trace, tokens=tokens, offsets=[0, 1000, 2000, 3000], vocab_size=8192)
    np.savez(other, tokens=[1, 2], offsets=[0, 2], vocab_size=40)
    counts = tmp_path / "counts.npz"
    write_frequencies(counts, np.bincount(tokens, minlength=8192))
    shape = tmp_path / "model"
    shape.mkdir()
    shutil.copy2(DEMO_MODEL / "config.json", shape)
    argv = ["table", "plan", str(shape), "--sequences", "2", "--device-cache", "300,50%", "--json"]
    rates = {}
    for source in ([], ["--trace", str(trace)], ["--frequencies", str(counts), "--host-cache", "1000"]):
        assert main([*argv, *source]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert [row["slots"] for row in plan["rows"]] == [81, 300, 409, 720, 819, 1638, 4096]
        rates[plan["notes"][0]] = [row["hit_rate"] for row in plan["rows"]]
        assert rates[plan["notes"][0]] == sorted(rates[plan["notes"][0]])
        assert {row["host_fills"] > 0 for row in plan["rows"][:3]} == {"--host-cache" in source}
    assert len(rates) == 3, "each source gives its own rates and says which it is"
    # Of 300 slots the pager keeps one free.
    assert main(["table", "replay", "--trace", str(trace), "--sequences", "2", "--cache", "299", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)["hit_rate"]
    assert replayed in [pytest.approx(row[1]) for row in rates.values()]
    none = tmp_path / "none.npz"
    write_frequencies(none, np.zeros(8192, np.int64))
    for words, status, message in (
        (["--trace", str(other)], 1, "vocabulary of 40 tokens, the model has 8,192"),
        (["--frequencies", str(other)], 1, "no frequency list"),
        (["--policy", "static"], 2, "--policy static needs --frequencies"),
        (["--frequencies", str(none)], 2, "holds no counts yet"),
        (["--trace", str(trace), "--frequencies", str(counts)], 2, "give one of them"),
        (["--device-cache", "0"], 1, "--device-cache 0"),
        (["--encoding", "lowrank"], 1, "table build"),
        (["--encoding", "int3"], 2, "int3"),
        (["--table", str(tmp_path)], 1, "manifest"),
    ):
        assert main([*argv[:3], *words]) == status
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err


def test_a_frequency_list_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The lake was cold. The lake was wide.")
    out = tmp_path / "list.npz"
    argv = ["table", "freq", str(text), "--tokenizer", str(DEMO_MODEL), "--out", str(out), "--json"]
    assert main(argv) == 0
    shown = json.loads(capsys.readouterr().out)
    counts = read_frequencies(out, shown["vocab_size"])
    assert counts.sum() == shown["tokens"] > shown["distinct"] == np.count_nonzero(counts)
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    assert counts[tokenizer.encode(" lake").ids[0]] == 2
    assert main([*argv[:3], "--tokenizer", str(tmp_path), "--out", str(out)]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
