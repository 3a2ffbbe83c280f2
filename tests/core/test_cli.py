"""Facts about the command line: quick help, exit codes, one line for whatever is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ddray.cli import main
from ddray.config.base import Job
from ddray.config.distillation import DistillConfig
from ddray.config.encoding import EncodeConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.config.quickstart import QuickstartConfig
from ddray.config.reference import ReferenceConfig
from ddray.config.sampling import SampleConfig
from ddray.config.serving import ServeConfig
from ddray.models.zoo import load_teacher
from ddray.sets.images.image_set import ImageSet
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.making import make_plan, sample_rows
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage.checkpoint import MODEL_FILE, save_folder
from tests.core.sets.images.test_image_set import PLAN as IMAGE_PLAN
from tests.core.tiny import student_config, student_state, tokenizer_state
from tests.patience import PATIENCE_S

JOBS: dict[str, type[Job]] = {
    "quickstart": QuickstartConfig,
    "sample": SampleConfig,
    "encode": EncodeConfig,
    "distill": DistillConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "reference": ReferenceConfig,
    "serve": ServeConfig,
}

QUICK_HELP = """
import sys
from ddray.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "ray", "deepspeed", "pyarrow", "numpy", "pydantic", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder: default outputs are relative paths."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _fails(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """Run a command that must end with `status`; return its one line."""
    assert main(arguments) == status
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("ddray: error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    return stderr


def _resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--dry-run"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    return dict(yaml.safe_load(stdout))


def test_help_loads_nothing_heavy_and_names_every_verb() -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUICK_HELP], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for verb in (*JOBS, "inspect", "models"):
        assert f"\n    {verb}" in done.stdout


@pytest.mark.parametrize("verb", JOBS)
def test_the_help_of_a_job_shows_every_key_with_its_default(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, field in JOBS[verb].model_fields.items():
        default = field.get_default()
        if isinstance(default, Job):
            continue
        start = next(
            i for i, x in enumerate(lines) if x.strip().startswith(f"--{name}".replace("_", "-"))
        )
        text = " ".join(lines[start : start + 3])
        if default is not None and not isinstance(default, bool | tuple):
            assert f"(default: {default})" in text
    for flag in ("--config FILE", "--set KEY.PATH=VALUE", "--dry-run", "--preset"):
        assert any(flag in line for line in lines)


COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_ddray
echo "${COMPREPLY[@]}"
"""


def test_a_shell_completes_verbs_flags_and_choices(tmp_path: Path) -> None:
    code = (
        "import sys; from ddray.cli import main; main(['completion', 'bash']); "
        "assert not {'torch', 'ray', 'pyarrow'} & set(sys.modules)"
    )
    script = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    (tmp_path / "completion").write_bytes(script)
    for words, completed in (
        (["ge"], "generate"),
        (["generate", "--for"], "--format"),
        (["generate", "--format", ""], "parquet webdataset images flat npz coco geneval"),
        (["serve", "--no-"], "--no-teacher --no-access-log --no-log-prompts"),
        (["distill", "--perceptual.dist"], "--perceptual.distance"),
        (["quickstart", "--preset", "t"], "tiny"),
        (["models", ""], "list show verify"),
    ):
        command = ["bash", "-c", COMPLETE, "bash", str(tmp_path / "completion"), "ddray", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == completed, done


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown, stderr = capsys.readouterr()
    assert stderr == ""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert shown == capsys.readouterr().out


@pytest.mark.parametrize("verb", ["cluster", "inspect", "models"])
def test_the_other_verbs_have_help_too(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"usage: ddray {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", JOBS)
def test_a_dry_run_prints_the_config_and_writes_nothing(
    verb: str, capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    values = _resolved(capsys, verb, "--preset", "tiny")
    assert JOBS[verb].model_validate(values).model_dump(mode="json") == values
    assert list(empty_folder.iterdir()) == []


def test_the_cost_of_sampling_is_a_comment_behind_the_config(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sample", "--preset", "tiny", "--dry-run"]) == 0
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert comments == [
        "# shards: 2",
        "# batch_size: 50",
        "# stages_per_image: 49",
        "# megabytes: 0.02",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate",), ["shards: 2", "forward_passes_per_image: 1", "megabytes_of_pixels: 0.784"]),
        (
            ("generate", "--schedule", "0,20", "--content", "tokens"),
            ["forward_passes_per_image: 2", "megabytes: 0.098"],
        ),
        (("generate", "--student", "runs/later"), ["cost: unknown without the student: no model"]),
        (
            ("serve", "--replicas", "0:2", "--num-gpus", "0.5"),
            ["replicas: 0 to 2, each of 1 CPUs and 0.5 GPUs", "images_admitted_at_a_time: 1024"],
        ),
        (("serve", "--no-teacher"), ["gigabytes_a_replica: 0.00956 of weights"]),
        (("serve", "--teacher"), ["forward_passes_of_the_teacher: 49"]),
        (
            ("evaluate", "--count", "100"),
            ["images_of_every_generator: 100", "forward_passes_of_the_teacher: 98 for each"],
        ),
        (
            ("evaluate", "--rows", "teacher,skip,student", "--skip", "20", "--sweep", "cfg=1,2"),
            ["forward_passes_of_the_teacher: 158 for", "forward_passes_of_the_student: 1 + 2 for"],
        ),
        (("evaluate", "--data", "runs/x"), ["forward_passes_of_the_teacher: 49 for each"]),
        (("quickstart",), ["sample.shards: 20", "distill.exaflops", "evaluate.images: 5000"]),
        (
            ("encode", "--count", "1000000"),
            ["gigabytes: 61.4 where a caption has 15 positions; padded to 120, as they are not, "],
        ),
        (("encode", "--num-gpus", "1"), ["shards: 2", "gpu_hours: "]),
        (("reference",), ["cost: unknown without the images: reference takes SOURCE"]),
        (("reference", "nowhere"), ["cost: unknown without the images: /"]),
        (("doctor",), ["cost: none"]),
    ],
)
def test_every_verb_says_what_it_costs(
    arguments: tuple[str, ...], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--dry-run"]) == 0
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    for text in told:
        assert any(line.startswith(f"# {text}") for line in comments), (text, comments)


def test_names_are_printed_as_they_are_where_that_can_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _fill(tmp_path / "häuser 猫")
    assert main(["inspect", str(tmp_path / "häuser 猫")]) == 0
    assert 'häuser 猫"' in capsys.readouterr().out
    assert main(["sample", "--out", "häuser 猫", "--dry-run"]) == 0
    assert "/häuser 猫\n" in capsys.readouterr().out
    command = [sys.executable, "-m", "ddray.cli", "doctor", "--uri", "häuser 猫", "--dry-run"]
    done = subprocess.run(
        command,
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    )
    assert yaml.safe_load(done.stdout.decode("ascii"))["uri"] == [str(tmp_path / "häuser 猫")]


def test_keys_that_could_be_guessed_are_refused_before_ray_starts(
    tmp_path: Path,
) -> None:
    (tmp_path / "keys").write_text("secret\n")
    code = (
        "import sys; from ddray.cli import main; "
        "assert main(['serve', '--api-keys-file', 'keys']) == 2; assert 'ray' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"key 1 in {tmp_path}/keys must have at least 16 characters" in done.stderr


def test_the_largest_seed_is_exact_and_has_one_after_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    largest = 2**63 - 1
    assert _resolved(capsys, "quickstart", "--seed", str(largest))["generate"]["seed"] == 0
    for seed in (2**53 + 1, largest):
        for given in (("--seed", str(seed)), ("--set", f"seed={seed}")):
            assert _resolved(capsys, "sample", *given)["seed"] == seed
        assert TrajectoryPlan.from_json(replace(PLAN, seed=seed).to_json()).seed == seed
    assert "seed='9223372036854775808'" in _fails(capsys, 2, "sample", "--seed", str(2**63))


def test_what_a_dry_run_prints_can_be_given_back_as_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = _resolved(capsys, "quickstart", "--preset", "tiny", "--set", "sample.workers=1:2")
    assert first["sample"]["workers"] == [1, 2]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(first))
    assert _resolved(capsys, "quickstart", "--config", str(tmp_path / "job.yaml")) == first


def test_flags_win_over_set_and_set_over_the_file_and_that_over_the_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("count: 2\nseed: 2\nbatch_size: 2\n")
    arguments = ["--preset", "tiny", "--config", str(file), "--set", "seed=3", "--set"]
    values = _resolved(capsys, "generate", *arguments, "batch_size=3", "--batch-size", "4")
    found = [values[key] for key in ("shard_rows", "count", "seed", "batch_size")]
    assert found == [50, 2, 3, 4]


def test_a_pair_of_workers_is_a_pair_from_everywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text("workers: 1:2\n")
    for arguments in (
        ("--set", "workers=1:2"),
        ("--workers", "1:2"),
        ("--config", str(tmp_path / "job.yaml")),
    ):
        assert _resolved(capsys, "generate", *arguments)["workers"] == [1, 2]
    assert _resolved(capsys, "generate", "--workers", "3")["workers"] == [3, 3]


@pytest.mark.parametrize("arguments", [("--classes", "0,0,1"), ("--set", "classes=[0,0,1]")])
def test_classes_are_a_list_from_everywhere(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _resolved(capsys, "sample", *arguments)["classes"] == [0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smple",), "invalid choice: 'smple' (choose from 'quickstart', 'sample'"),
        (("sample", "--cuont", "3"), "unrecognized arguments: --cuont 3; see ddray sample --help"),
        (("sample", "--count"), "argument --count: expected one argument"),
        (("sample", "extra"), "unrecognized arguments: extra"),
        (("models", "--all"), "unrecognized arguments: --all"),
        (("inspect",), "the following arguments are required: uri"),
        (("sample", "--preset", "tinny"), "unknown preset 'tinny'; did you mean 'tiny'?"),
        (("sample", "--teacher", "digits-lamagen"), "did you mean 'digits-llamagen'?"),
        (("sample", "--set", "cuont=3"), "unknown key 'cuont'; did you mean 'count'?"),
        (("sample", "--set", "count"), "--set 'count' is not of the form key.path=value"),
        (("sample", "--count", "0"), "count='0': input should be greater than 0"),
        (("sample", "--count", "many"), "count='many': input should be a valid integer"),
        (("sample", "--workers", "3:1"), "workers 3:1 must be MIN:MAX"),
        (("sample", "--classes", "1,10"), "classes=[1, 10] holds 10; the teacher's classes are 0"),
        (("sample", "--set", "classes=[0,x]"), "classes.1='x': input should be a valid integer"),
        (("sample", "--captions", "a.jsonl"), "but digits-llamagen is conditioned on classes"),
        (("sample", "--config", "absent.yaml"), "--config absent.yaml: No such file or directory"),
        (("sample", "--out", "gs://bucket/x"), "uri 'gs://bucket/x' has the scheme 'gs'"),
        (("distill", "--schedule", "0,16,8"), "schedule=[0, 16, 8] must increase"),
        (("generate", "--student", "nowhere"), "no model 'nowhere': it is no folder with a config"),
        (("generate", "--student", "digits-llamagen"), "'llamagen', which is no student"),
        (("evaluate", "--student", "nowhere"), "no model 'nowhere'"),
        (("inspect", "x", "--recompute", "9"), "--recompute has no effect without --verify"),
        (("inspect", "x", "--workers", "1:2"), "--workers has no effect without --repair"),
        (("inspect", "x", "--verify", "--recompute", "-1"), "a number of rows is 0 or more"),
        (("inspect", "x", "--picture", "x.jpg"), "only PNG is written; give a name that ends in"),
        (("inspect", "x", "--repair", "--workers", "2:1"), "workers 2:1 must be MIN:MAX"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    empty_folder: Path,
) -> None:
    assert message in _fails(capsys, 2, *arguments)
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1,\n b: }", "is not YAML: "), ("- 1\n- 2\n", "must hold keys and values, not list")],
)
def test_a_bad_config_file_is_one_line_and_status_2(
    text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    assert message in _fails(capsys, 2, "sample", "--config", str(tmp_path / "job.yaml"))


def test_a_student_folder_without_config_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "student").mkdir()
    line = _fails(capsys, 2, "generate", "--student", str(tmp_path / "student"))
    assert "it is no folder with a config.json" in line


def test_truncated_weights_are_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    save_folder(folder, student_config(), model=student_state(), tokenizer=tokenizer_state())
    weights = (folder / MODEL_FILE).read_bytes()
    (folder / MODEL_FILE).write_bytes(weights[: len(weights) // 2])
    line = _fails(capsys, 1, "generate", "--student", str(folder))
    assert f"{folder / MODEL_FILE} is truncated or no safetensors file" in line


def test_an_out_below_a_file_is_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = _fails(capsys, 1, "sample", "--out", str(tmp_path / "file" / "set"))
    assert "a part of the path is not a directory" in line


def test_no_trace_reaches_the_terminal_from_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddray.cli", "sample", "--count", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "ddray: error: count='0': input should be greater than 0\n"


def test_an_interrupt_ends_with_status_130(tmp_path: Path) -> None:
    pipe = tmp_path / "job.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "ddray.cli", "sample", "--config", str(pipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    with pipe.open("w"):  # opens when the command has begun to read, and then keeps it waiting
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert stderr == "ddray: interrupted; a rerun goes on from what is written\n"


@pytest.mark.parametrize("name", ["digits-llamagen-dd", "digits-var"])
def test_a_bundled_model_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", name]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["image size"] == "28 x 28, grey"
    assert shown["conditioned on"] == "10 classes"
    assert shown["stages"] in ("49 of 1 tokens", "5 of 1, 4, 9, 25, 49 tokens")
    assert shown.get("schedule") == ([0, 20] if name.endswith("-dd") else None)
    assert shown["parameters"].endswith(" million")
    assert shown["kind"] == ("student" if name.endswith("-dd") else "teacher")


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "digits-llamagen " in capsys.readouterr().out


PLAN = TrajectoryPlan(
    teacher="tiny",
    teacher_fingerprint="a" * 64,
    tokenizer_fingerprint="b" * 64,
    conditioning="class",
    num_classes=3,
    seed=0,
    noise_scheme="philox-1",
    cfg=None,
    top_k=0,
    top_p=1.0,
    temperature=1.0,
    solver="ab2",
    num_evals=4,
    dtype="float32",
    threads=1,
    count=25,
    shard_rows=10,
    batch_size=5,
    stages=(1,) * 4,
    vocab_size=8,
)


def _fill(uri: Path) -> list[int]:
    trajectories = TrajectorySet.create(str(uri), PLAN)
    missing = trajectories.missing()
    for k in missing:
        index = np.asarray(PLAN.shard_range(k))
        tokens = (index[:, None] + np.arange(4)) % 8
        trajectories.write_shard(k, index, PLAN.label(index), tokens)
    return missing


def _inspect(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> tuple[Any, str]:
    """The JSON part of the output and the lines behind it."""
    assert main(["inspect", *arguments]) == status
    stdout, stderr = capsys.readouterr()
    # Nothing but progress.
    assert all(line.startswith(("verify: ", "recompute: ")) for line in stderr.splitlines())
    values, end = json.JSONDecoder().raw_decode(stdout)
    return values, stdout[end:].strip()


def test_inspect_of_no_set_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"no trajectory set at {tmp_path}" in _fails(capsys, 1, "inspect", str(tmp_path))


def test_inspect_says_what_is_there_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _fill(tmp_path)
    verify = (str(tmp_path), "--verify", "--recompute", "0")
    values, lines = _inspect(capsys, 0, *verify)
    assert (values["rows"], values["rows_planned"], values["shards"]) == (25, 25, 3)
    assert lines == "verified: every index once, every hash right"
    (tmp_path / shard_name(0)).unlink()
    values, lines = _inspect(capsys, 0, str(tmp_path))
    assert (values["rows"], values["shards"], lines) == (15, 2, "")
    _, lines = _inspect(capsys, 1, *verify)
    assert lines == f"missing: {shard_name(0)}"


def test_without_the_teacher_nothing_is_recomputed_unless_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _fill(tmp_path)
    _, lines = _inspect(capsys, 0, str(tmp_path), "--verify")
    verified, note = lines.splitlines()
    assert verified == "verified: every index once, every hash right"
    assert note.startswith("not recomputed: no model 'tiny': ")
    assert main(["inspect", str(tmp_path), "--verify", "--recompute", "9"]) == 2
    assert capsys.readouterr().err.endswith("`ddray models` lists the names\n")


@pytest.mark.slow
def test_rows_of_the_bundled_teacher_are_recomputed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = SampleConfig(out=str(tmp_path), count=4, shard_rows=4, batch_size=2, num_evals=2)
    teacher = load_teacher(config.teacher, device="cpu")
    trajectories = TrajectorySet.create(str(tmp_path), make_plan(config, teacher))
    plan, index = trajectories.plan, np.arange(4)
    tokens = np.concatenate([sample_rows(teacher, plan, batch) for batch in plan.batches(0)])
    trajectories.write_shard(0, index, plan.label(index), tokens)
    picture = str(tmp_path / "p.png")
    arguments = (str(tmp_path), "--verify", "--recompute", "3", "--picture", picture)
    _, lines = _inspect(capsys, 0, *arguments)
    assert re.match(r"recomputed 4 rows \(2 batches\) on CPU \w+: all", lines.splitlines()[1])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    tokens[:, -1] ^= 1
    trajectories.write_shard(0, index, plan.label(index), tokens)
    _, lines = _inspect(capsys, 1, str(tmp_path), "--verify")
    assert lines.splitlines()[0] == "verified: every index once, every hash right"
    assert ": 4 rows and 4 of 196 tokens differ" in lines.splitlines()[1]
    assert len(lines.splitlines()) == 2 + 4


def test_damage_is_found_and_nothing_is_moved_where_it_cannot_be_refilled(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _fill(tmp_path)
    shard = tmp_path / shard_name(1)
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 3] ^= 0xFF
    shard.write_bytes(damaged)
    _, lines = _inspect(capsys, 1, str(tmp_path), "--verify", "--recompute", "0")
    assert lines.startswith(f"damaged: {shard_name(1)}: ")
    assert "\n" not in lines
    assert main(["inspect", str(tmp_path), "--repair"]) == 2
    assert "no model 'tiny': " in capsys.readouterr().err
    assert shard.read_bytes() == damaged


def test_repair_of_what_has_no_gaps_needs_no_teacher(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _fill(tmp_path)
    _, lines = _inspect(capsys, 0, str(tmp_path), "--repair")
    assert lines == "nothing to mend"
    (tmp_path / "shards" / "stray.parquet").write_bytes(b"")
    _, lines = _inspect(capsys, 0, str(tmp_path), "--repair", "--verify", "--recompute", "0")
    assert lines.splitlines() == [
        "shards/stray.parquet moved to quarantine/stray.parquet.bad",
        "verified: every index once, every hash right",
    ]


def test_a_set_of_images_is_inspected_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    images = ImageSet.create(str(tmp_path), IMAGE_PLAN)
    for k in range(2):
        label = IMAGE_PLAN.label(IMAGE_PLAN.shard_range(k))
        images.write_shard(k, label, [b"an image"] * len(label))
    told, lines = _inspect(capsys, 0, str(tmp_path), "--verify")
    assert (told["student"], told["rows"]) == ("tiny", 7)
    assert lines == "verified: every index once, every hash right"
    assert main(["inspect", str(tmp_path), "--verify", "--recompute", "5"]) == 2
    assert "--recompute is for trajectories" in capsys.readouterr().err
    (tmp_path / images.shard_name(1)).write_bytes(b"PAR1 and no more")
    _, lines = _inspect(capsys, 1, str(tmp_path), "--verify")
    assert lines.startswith("damaged: shards/shard-00001.parquet: damaged or truncated")
    assert main(["inspect", str(tmp_path), "--repair"]) == 2
    assert "no model 'tiny': " in capsys.readouterr().err
