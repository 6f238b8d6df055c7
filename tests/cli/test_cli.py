"""The command as a user or a scheduler meets it."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from softshard.cli import main
from softshard.cli.commands.registry import COMMANDS
from softshard.cli.job_or_output import job_named
from softshard.corpus.manifest import read_corpus_manifest
from softshard.shard.manifest import read_manifest
from softshard.stages import STAGES
from softshard.storage import LocalStore

ROOT = Path(__file__).parents[2]
NAMES = [command.name for command in COMMANDS]


def softshard(*arguments, **options):
    command = [sys.executable, "-m", "softshard.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def loaded_by(statement):
    script = f"import sys; {statement}; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_softshard_and_asking_for_help_load_nothing_heavy():
    heavy = {"torch", "transformers", "pyarrow", "polars", "pydantic", "dask", "numpy", "peft", "datasets"}
    assert not heavy & loaded_by("import softshard")
    help_asked = (
        "import softshard.cli, contextlib\nwith contextlib.suppress(SystemExit): softshard.cli.main(['--help'])"
    )
    assert not heavy & loaded_by(f"exec({help_asked!r})")


@pytest.mark.parametrize("command", NAMES)
def test_every_command_has_help_with_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "75 try" in capsys.readouterr().out


def test_there_is_a_command_for_every_stage():
    assert NAMES[: 1 + len(STAGES)] == ["run", *STAGES]


def test_readme_or_docs_explain_every_command():
    """Each flag is in the generated `docs/commands.md`, which `softshard schema --check` compares."""
    pages = [ROOT / "README.md", *(page for page in (ROOT / "docs").glob("*.md") if page.name != "commands.md")]
    text = "".join(page.read_text() for page in pages)
    assert [name for name in NAMES if not re.search(rf"softshard {name}\b|`{name}`", text)] == []


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["run"], ["show", "x"], ["plan", "j.yaml", "--price-per-hour", "-1"]]
)
def test_wrong_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_wrong_job_file_is_one_line_on_stderr_and_2(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nout: b\nteacher: {model: m}\ncorpus: {sources: [], colour: red}\n")
    result = softshard("run", path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"softshard: {path}: line 4, corpus.colour: unknown key; line 4, corpus.sources")
    assert result.stderr.count("\n") == 1


def test_missing_model_is_named_with_its_line_and_2(tiny_job, tmp_path, capsys):
    path = tiny_job(tmp_path, teacher={"model": str(tmp_path / "no-model")})
    assert main(["corpus", str(path), "--quiet"]) == 2
    assert re.fullmatch(
        rf"softshard: {path}: line \d+, teacher\.model: {tmp_path}/no-model: no such folder\n", capsys.readouterr().err
    )


def test_folder_that_cannot_be_written_is_named_and_2(tiny_job, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main(["corpus", str(tiny_job(tmp_path, out=str(tmp_path / "file/out"))), "--quiet"]) == 2
    assert f"{tmp_path}/file/out" in capsys.readouterr().err


def test_reader_that_has_read_enough_is_no_error(finished):
    command = f"{sys.executable} -m softshard.cli show {finished} --sequence '' | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "0"
    assert result.stderr == ""


def test_work_goes_on_when_nobody_listens_to_its_progress(tiny_job, tmp_path):
    command = (
        f"{sys.executable} -m softshard.cli corpus {tiny_job(tmp_path)} 2>&1 >/dev/null | true; exit ${{PIPESTATUS[0]}}"
    )
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert (tmp_path / "out/corpus/manifest.json").exists()


def test_status_of_a_truncated_part_is_3_and_names_it(finished, tmp_path, capsys):
    import shutil

    shutil.copytree(finished, tmp_path / "out")
    part = tmp_path / "out/targets" / read_manifest(finished / "targets").parts[0].path
    part.write_bytes(part.read_bytes()[:-10])
    assert main(["status", str(tmp_path / "out")]) == 3
    assert str(part) in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["status", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_status_is_readable_at_80_columns_and_is_json_when_asked(finished, capsys):
    assert main(["status", str(finished)]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()[1:-1]) <= 80
    assert main(["status", str(finished), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in status["stages"] if stage["complete"]] == [
        "corpus",
        "teacher",
        "targets",
        "train",
        "evaluate",
    ]
    manifest = read_manifest(finished / "targets")
    assert status["stages"][2]["figures"]["parts"] == len(manifest.parts)


def test_a_job_is_named_by_its_file_or_by_its_output_alike(finished, tmp_path, capsys):
    by_output, by_file = [], []
    for command, said in (("status", by_output), ("run", by_output), ("status", by_file), ("run", by_file)):
        named = finished if said is by_output else finished / "job.yaml"
        assert main([command, str(named), "--json", *(["--quiet"] if command == "run" else [])]) == 0
        said.append({**json.loads(capsys.readouterr().out), "seconds": None})
    assert by_output[0]["job"] == "tiny"
    assert by_output[1]["manifest"] == read_manifest(finished / "targets").digest
    assert by_file == [{**by_output[0], "out": str(finished)}, by_output[1]]


def test_an_output_that_was_moved_is_the_output_of_its_job(finished, tmp_path):
    (tmp_path / "moved").mkdir()
    shutil.copy(finished / "job.yaml", tmp_path / "moved")
    assert job_named(str(tmp_path / "moved")).out == str(tmp_path / "moved")
    assert job_named(str(finished)).out == str(finished)


def test_a_folder_without_a_job_is_2(tmp_path, capsys):
    assert main(["run", str(tmp_path)]) == 2
    assert f"{tmp_path}/job.yaml: cannot be read" in capsys.readouterr().err


def test_verify_of_a_whole_output_is_0_and_of_a_damaged_one_3(finished, tmp_path, capsys):
    import shutil

    assert main(["verify", str(finished), "--deep"]) == 0
    assert capsys.readouterr().out.endswith("no problems found\n")
    shutil.copytree(finished, tmp_path / "out")
    part = tmp_path / "out/targets" / read_manifest(finished / "targets").parts[1].path
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)
    assert main(["verify", str(tmp_path / "out"), "--json"]) == 3
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert str(part) in problem


def test_show_has_every_label_at_80_columns(finished, capsys):
    main(["status", str(finished), "--json"])
    sequence = json.loads(capsys.readouterr().out)["sequences"][0]
    assert main(["show", str(finished), "--sequence", sequence[:10]]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert main(["show", str(finished), "--sequence", sequence, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    places = [int(match) for match in re.findall(r"^ +(\d+)  \S.* p ", text, flags=re.MULTILINE)]
    assert places == [position["place"] for position in shown["positions"]]
    assert all(0 <= position["label_probability"] <= 1.02 for position in shown["positions"])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)


def test_entries_of_a_position_are_never_broken_between_lines():
    from softshard.cli.terminal import packed

    assert packed(["' a'", "' long one'", "' b'"], indent=60) == [" " * 60 + "' a'  ' long one'", " " * 60 + "' b'"]
    (cut,) = packed(["word " * 40], indent=7)
    assert len(cut) <= 80
    assert packed([], indent=7) == []


def test_show_of_an_unknown_sequence_is_3(finished, capsys):
    assert main(["show", str(finished), "--sequence", "zzz"]) == 3
    assert "'zzz'" in capsys.readouterr().err


def test_plan_names_the_files_that_are_not_read(tiny_job, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    rows = "".join(json.dumps({"text": f"Letter {number}. It rained all day."}) + "\n" for number in range(30))
    (tmp_path / "texts/a.jsonl").write_text(rows)
    (tmp_path / "texts/b.csv").touch()
    (tmp_path / "texts/c.csv").write_text("text\n")
    source = {"name": "s", "uri": str(tmp_path / "texts"), "style": "plain", "license": "MIT", "rights_basis": "owned"}
    path = tiny_job(tmp_path, corpus={"sources": [source]})
    assert main(["plan", str(path), "--quiet", "--tokens-per-second", "100"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert f"Source s: 2 files not read: 2 .csv (first: file://{tmp_path}/texts/b.csv)" in shown
    assert main(["plan", str(path), "--json", "--quiet", "--tokens-per-second", "100"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["not_read"] == {"s": f"2 files not read: 2 .csv (first: file://{tmp_path}/texts/b.csv)"}


def test_plan_counts_what_the_run_then_makes(finished, tiny_job, tmp_path, capsys):
    path = tiny_job(tmp_path)
    assert main(["plan", str(path), "--json", "--quiet", "--tokens-per-second", "100", "--price-per-hour", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    manifest = read_manifest(finished / "targets")
    assert plan["parts"] == len(manifest.parts)
    assert plan["positions"] == sum(part.num_labels for part in manifest.parts)
    assert plan["sequences"] == sum(part.num_sequences for part in manifest.parts)
    assert plan["speed_is"] == "given"
    assert plan["num_trainings"] == 3
    assert plan["cost"] == pytest.approx(2 * (plan["scoring_hours"] + plan["training_hours"]))
    # A teacher of one short epoch is nearly the model as it is, which is what the plan measured.
    assert plan["bytes"] == pytest.approx(sum(part.num_bytes for part in manifest.parts), rel=0.05)
    assert not (tmp_path / "out").exists()


def test_plan_names_the_hold_out_the_times_and_what_is_not_measured(finished, tiny_job, tiny_model, tmp_path, capsys):
    """Counts are those of a run, times follow from them at 20 tokens a second, and the weights are float32."""
    from softshard.models import load_model

    job = tiny_job(tmp_path, train={"optimizer": {"batch_tokens": 100_000, "epochs": 1}})
    assert main(["plan", str(job), "--quiet", "--tokens-per-second", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:15].strip(): line[16:] for line in lines if line[:1].isalpha()}
    slices = read_corpus_manifest(LocalStore(finished / "corpus")).slices
    train, test = (sum(part.num_tokens for part in slices if part.split == split) for split in ("train", "test"))
    documents = sum(part.num_documents for part in slices if part.split == "test")
    assert rows["hold-out"] == f"{documents} document(s), {test:,} tokens"
    assert rows["targets"] == f"{(train + 2 * test) / 20 / 60:.0f} min"
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert rows["memory"].startswith(f"{weights / 1000:.0f} kB of weights per worker")
    assert rows["training"].startswith("1 step(s) each; all ")
    assert rows["evaluation"].endswith("; the report's samples: not measured")
    assert any(line.startswith("Warning: a training with `train.optimizer` is one step") for line in lines)
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []


def test_committed_schemas_and_reference_are_what_the_code_gives(capsys):
    assert main(["schema", "--check", "schemas"]) == 0, capsys.readouterr().out


def test_drifted_schema_is_3_and_named(tmp_path, capsys):
    assert main(["schema", "--write", str(tmp_path / "schemas")]) == 0
    (tmp_path / "schemas/job.schema.json").write_text("{}")
    capsys.readouterr()
    assert main(["schema", "--check", str(tmp_path / "schemas")]) == 3
    assert "job.schema.json" in capsys.readouterr().out


def test_job_schema_holds_the_defaults(capsys):
    assert main(["schema", "job"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["TrainSettings"]["properties"]["alpha"]["default"] == 0.75
    assert schema["additionalProperties"] is False


def test_summary_of_a_finished_run_is_json_when_asked(finished, capsys):
    assert main(["run", str(finished / "job.yaml"), "--json", "--quiet"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["manifest"] == read_manifest(finished / "targets").digest
    assert summary["adapter_folder"].startswith(str(finished))
    assert {"base", "ce", "adapter"} <= set(summary)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_ends_with_75_and_goes_on_to_its_end(tiny_job, tmp_path, number):
    optimizer = {"epochs": 10, "batch_tokens": 128, "checkpoint_steps": 5}
    path = tiny_job(tmp_path, teacher={"optimizer": optimizer}, cluster={})
    process = subprocess.Popen(
        [sys.executable, "-m", "softshard.cli", "run", str(path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("teacher/.checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.strip().splitlines()[-1].startswith(f"softshard: stopped by {signal.Signals(number).name}")
    assert "committed parts are kept" in errors
    assert "Traceback" not in errors
    assert main(["run", str(tiny_job(tmp_path, teacher={"optimizer": optimizer})), "--quiet"]) == 0
    assert (tmp_path / "out/report/index.html").exists()
