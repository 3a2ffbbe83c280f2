"""Facts about job configurations: what overlays what, what YAML means, what is refused and how."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddray.config.distillation import DistillConfig
from ddray.config.encoding import EncodeConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.config.loading import in_todays_keys, load_config
from ddray.config.presets import PRESETS, preset
from ddray.config.quickstart import QuickstartConfig
from ddray.config.reference import ReferenceConfig
from ddray.config.sampling import SampleConfig
from ddray.config.serving import ServeConfig
from ddray.errors import ConfigError
from tests.paths import ROOT

KINDS = {
    "sample": SampleConfig,
    "encode": EncodeConfig,
    "distill": DistillConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "reference": ReferenceConfig,
    "serve": ServeConfig,
    "quickstart": QuickstartConfig,
}


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    file = _file(tmp_path, "count: 2\nseed: 2\ntop_k: 2\n")
    config = load_config(
        SampleConfig,
        preset={"count": 1, "seed": 1, "top_k": 1, "shard_rows": 1},
        file=file,
        settings=["seed=3", "top_k=3"],
        flags={"top_k": "4"},
    )
    assert (config.shard_rows, config.count, config.seed, config.top_k) == (1, 2, 3, 4)
    assert config.batch_size == SampleConfig().batch_size == "auto"


def test_nested_keys_are_merged_not_replaced(tmp_path: Path) -> None:
    file = _file(tmp_path, "distill: {steps: 7}\nsample: {count: 70}\n")
    config = load_config(
        QuickstartConfig,
        preset=preset("quickstart", "tiny"),
        file=file,
        settings=["sample.count=80", "sample.workers=1:2"],
    )
    assert (config.distill.steps, config.distill.batch_size) == (7, 16)
    assert (config.sample.count, config.sample.shard_rows) == (80, 100)
    assert config.sample.workers == (1, 2)


def test_merging_leaves_the_presets_alone() -> None:
    for _ in range(2):
        load_config(
            QuickstartConfig,
            preset=preset("quickstart", "tiny"),
            settings=["sample.count=5", "evaluate.speed_batches=[3]"],
        )
    assert PRESETS["sample"]["tiny"]["count"] == 200
    assert PRESETS["evaluate"]["tiny"]["speed_batches"] == [1, 8]


@pytest.mark.parametrize("verb", KINDS)
@pytest.mark.parametrize("name", ["default", "tiny"])
def test_every_preset_is_a_valid_config(verb: str, name: str) -> None:
    load_config(KINDS[verb], preset=preset(verb, name))


def test_an_actor_has_one_gpu_or_a_part_of_one() -> None:
    assert load_config(SampleConfig, flags={"num_gpus": "0.5"}).num_gpus == 0.5
    assert load_config(SampleConfig, flags={"num_gpus": 1}).num_gpus == 1
    for kind in (SampleConfig, GenerateConfig, EvaluateConfig):
        with pytest.raises(ConfigError, match="num_gpus=2 is more than one: a worker computes on"):
            load_config(kind, flags={"num_gpus": 2})


@pytest.mark.parametrize(
    ("given", "workers"),
    [("1:2", (1, 2)), ("3", (3, 3)), (3, (3, 3)), ([2], (2, 2)), ([1, 4], (1, 4))],
)
def test_workers_are_a_pair_however_they_are_given(given: Any, workers: tuple[int, int]) -> None:
    assert load_config(SampleConfig, flags={"workers": given}).workers == workers


@pytest.mark.parametrize("source", ["file", "settings"])
def test_a_pair_in_yaml_is_no_number_of_base_60(source: str, tmp_path: Path) -> None:
    if source == "file":
        config = load_config(SampleConfig, file=_file(tmp_path, "workers: 1:2\n"))
    else:
        config = load_config(SampleConfig, settings=["workers=1:2"])
    assert config.workers == (1, 2)


@pytest.mark.parametrize("given", ["lr=1e-3", "lr=0.001", "lr=1.0e-3", "lr=.001", "lr=+1E-3"])
def test_numbers_are_read_as_people_write_them(given: str) -> None:
    assert load_config(DistillConfig, settings=[given]).lr == pytest.approx(1e-3)


@pytest.mark.parametrize("given", ["schedule=0,8,12", "schedule=[0, 8, 12]"])
def test_a_schedule_is_a_list_or_numbers_with_commas(given: str) -> None:
    assert load_config(DistillConfig, settings=[given]).schedule == (0, 8, 12)


@pytest.mark.parametrize(
    ("given", "classes"),
    [("1,5,7", (1, 5, 7)), ("[0, 0, 1]", (0, 0, 1)), ("[0,0,1]", (0, 0, 1)), ("3", (3,))],
)
def test_classes_are_a_list_or_numbers_with_commas(given: str, classes: tuple[int, ...]) -> None:
    assert load_config(SampleConfig, settings=[f"classes={given}"]).classes == classes
    if "[" not in given:
        assert load_config(SampleConfig, flags={"classes": given}).classes == classes
    assert SampleConfig().classes == ()


def test_absent_values_can_be_said() -> None:
    config = load_config(SampleConfig, preset={"cfg": 2.0}, settings=["cfg=null"])
    assert config.cfg is None


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(SampleConfig, file=_file(tmp_path, "# nothing\n")) == SampleConfig()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SampleConfig, ["cuont=3"], "unknown key 'cuont'; did you mean 'count'?"),
        (QuickstartConfig, ["sample.cuont=3"], "unknown key 'sample.cuont'; did you mean 'count'?"),
        (
            SampleConfig,
            ["qqq=3"],
            "unknown key 'qqq'; known are batch_size, caption_column, captions, cfg",
        ),
        (SampleConfig, ["count=0"], "count=0: input should be greater than 0"),
        (SampleConfig, ["count=1.5"], "count=1.5: input should be a valid integer"),
        (SampleConfig, ["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
        (SampleConfig, [f"seed={2**63}"], f"seed={2**63}: input should be less than"),
        (SampleConfig, ["solver=ab3"], "solver='ab3': input should be 'ab4', 'ab2', 'euler'"),
        (SampleConfig, ["top_p=0"], "top_p=0: input should be greater than 0"),
        (SampleConfig, ["classes=1,-2"], "classes.1='-2': input should be greater than or equal"),
        (SampleConfig, ["classes=1,x"], "classes.1='x': input should be a valid integer"),
        (SampleConfig, ["classes=true"], "classes=True: input should be a valid tuple"),
        (SampleConfig, ["workers=3:1"], "workers 3:1 must be MIN:MAX"),
        (SampleConfig, ["workers=0"], "workers.0=0: input should be greater than 0"),
        (SampleConfig, ["workers=1:2:3"], "workers="),
        (DistillConfig, ["schedule=0,16,8"], "schedule=[0, 16, 8] must increase"),
        (DistillConfig, ["schedule=0,8,8"], "schedule=[0, 8, 8] must increase"),
        (DistillConfig, ["schedule=4,8"], "schedule=[4, 8] must begin with 0"),
        (DistillConfig, ["batch_size=9", "workers=2"], "must be a multiple of workers=2"),
        *(
            (DistillConfig, ["objective=masked", *told], f"{told[-1]} does not apply to objective=")
            for told in (
                ["init=x"],
                ["logits_weight=2.0"],
                ["code_precision=4.0"],
                ["score.weight=1.0"],
                ["adversary.weight=1.0"],
                ["perceptual.distance=tokenizer"],
                ["checkpoint_every=5", "evaluate_every=5"],
            )
        ),
        (DistillConfig, ["objective=masked", "schedule=0,2"], "schedule=(0, 2) does not apply"),
        (DistillConfig, ["masked.label_smoothing=0.1"], "label_smoothing=0.1 does not apply"),
        (QuickstartConfig, ["distill.objective=masked"], "a quickstart makes a student"),
        (DistillConfig, ["zero=4"], "zero=4: input should be less than or equal to 3"),
        *(
            (kind, [f"batch_size={value}"], "must be auto, or a whole number from 1 on")
            for kind in (SampleConfig, GenerateConfig)
            for value in ("0", "-3", "1.5", "many", "true")
        ),
        (SampleConfig, ["gpu_gb=0"], "gpu_gb=0: input should be greater than 0"),
        (GenerateConfig, ["format=zip"], "format='zip': input should be 'parquet'"),
        (
            GenerateConfig,
            ["content=tokens", "format=webdataset"],
            "content=tokens is written as",
        ),
        (GenerateConfig, ["content=tokens", "statistics=true"], "content=tokens has no images: no"),
        (
            GenerateConfig,
            ["content=tokens", "compression=fast"],
            "content=tokens has no images: no",
        ),
        (GenerateConfig, ["format=npz", "image_format=webp"], "format=npz holds pixels, not files"),
        (GenerateConfig, ["quality=80"], "quality=80 is of image_format=webp; png has no loss"),
        (GenerateConfig, ["image_format=webp", "quality=0"], "quality=0: input should be greater"),
        (GenerateConfig, ["engine=actors"], "engine='actors': input should be 'serve' or 'data'"),
        (ServeConfig, ["port=70000"], "port=70000: input should be less than or equal to 65535"),
        (ServeConfig, ["replicas=3:1"], "replicas=3:1 must be MIN:MAX"),
        (ServeConfig, ["replicas=0"], "replicas.1=0: input should be greater than 0"),
        (ServeConfig, ["replicas=-1:2"], "replicas.0='-1': input should be greater than or equal"),
        (ServeConfig, ["student="], "student"),
        (
            ServeConfig,
            ["max_batch_size=8", "max_ongoing_requests=7"],
            "max_ongoing_requests=7 is below max_batch_size=8: batches would never fill",
        ),
        (ServeConfig, ["max_images=63"], "max_images=63 is below max_batch_size=64"),
        (
            ServeConfig,
            ["max_batch_size=1", "max_images=31", "ingress_replicas=2"],
            "max_images=31 is below max_batch_size=1 or the 16 images of one request to each of 2",
        ),
        (
            ServeConfig,
            ["images_uri=/srv/images"],
            "images_uri='/srv/images' must be s3://: links are made by S3",
        ),
        (
            ServeConfig,
            ["log_prompts=true", "access_log=false"],
            "log_prompts=True is of the access log, which access_log=False turns off",
        ),
        (ServeConfig, ["url_expires_s=604801"], "url_expires_s=604801 is more than a week, 604800"),
        (ServeConfig, ["batch_wait_s=-1"], "batch_wait_s=-1: input should be greater than or"),
        (ServeConfig, ["request_timeout_s=0"], "request_timeout_s=0: input should be greater"),
        (SampleConfig, ["count"], "--set 'count' is not of the form key.path=value"),
        (SampleConfig, ["=3"], "--set '=3' is not of the form"),
        (SampleConfig, ["a..b=3"], "--set 'a..b=3' is not of the form"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    kind: Any, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(kind, settings=settings)
    assert str(refusal.value).startswith(message) or message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_service_admits_what_its_replicas_can_take_and_one_whole_request_at_least() -> None:
    assert (ServeConfig().ongoing_limit, ServeConfig().admission_limit) == (128, 512)
    grown = ServeConfig(max_batch_size=8, replicas=(0, 3))
    assert (grown.ongoing_limit, grown.admission_limit) == (16, 192)
    assert ServeConfig(max_batch_size=1).admission_limit == 16
    assert ServeConfig(max_batch_size=1, ingress_replicas=3).admission_limit == 48
    assert ServeConfig(max_batch_size=8, max_images=40).admission_limit == 40


def test_replicas_are_a_number_or_a_range() -> None:
    for text, replicas in (("2", (2, 2)), ("1:4", (1, 4)), ("0:2", (0, 2))):
        assert load_config(ServeConfig, settings=[f"replicas={text}"]).replicas == replicas


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "must hold keys and values, not list"),
        ("3: 4\n", "must hold keys and values"),
        ("just words\n", "must hold keys and values, not str"),
        ("a: [1, 2\nb: }\n", "is not YAML: "),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML: could not determine"),
        ("\x00", "is not YAML: "),
    ],
)
def test_a_file_of_anything_else_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(SampleConfig, file=_file(tmp_path, text))
    assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"--config {path}: "):
            load_config(SampleConfig, file=path)


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'tinny'; did you mean 'tiny'"):
        preset("sample", "tinny")


def test_configs_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SampleConfig().count = 3  # type: ignore[misc]


JOBS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_every_job_in_the_repository_is_one_and_says_how_it_is_submitted(file: Path) -> None:
    model, _, verb = file.stem.rpartition("-")
    command = f"--working-dir jobs -- python {verb}.py --config configs/{file.name}"
    assert command in file.read_text()
    assert (file.parents[1] / f"{verb}.py").is_file()
    if verb == "pipeline":
        parts = yaml.safe_load(file.read_text())
        assert isinstance(parts.pop("overlap"), bool)
        assert parts == {stage: f"{model}-{stage}.yaml" for stage in parts}
        assert all(file.with_name(name).is_file() for name in parts.values())
        return
    config = load_config(KINDS[verb], file=file)
    if isinstance(config, SampleConfig):
        return
    sampled = load_config(SampleConfig, file=file.with_name(f"{model}-sample.yaml"))
    if isinstance(config, DistillConfig):
        assert config.data == sampled.out
        return
    trained = load_config(DistillConfig, file=file.with_name(f"{model}-distill.yaml"))
    student = config.student  # type: ignore[attr-defined]
    assert student in (f"{trained.out}/student", (f"{trained.out}/student",))
    if isinstance(config, EvaluateConfig):
        assert config.data == sampled.out


MOVED = {"score_weight": 0.5, "imitator_lr": 0.1, "adversary_width": 8, "perceptual": "tokenizer"}


@pytest.mark.parametrize("key", MOVED)
@pytest.mark.parametrize(("kind", "part"), [(DistillConfig, ""), (QuickstartConfig, "distill.")])
def test_a_key_of_before_is_answered_by_what_it_is_called_now(key, kind, part) -> None:
    now = re.escape(f"'{part}{key}' is '{part}{DistillConfig.MOVED[key]}' now")
    with pytest.raises(ConfigError, match=now):
        load_config(kind, settings=[f"{part}{key}={MOVED[key]}"])


def test_every_moved_key_is_one_that_exists() -> None:
    for path in DistillConfig.MOVED.values():
        outer, inner = path.split(".")
        assert inner in type(getattr(DistillConfig(), outer)).model_fields


def test_what_was_written_before_is_read_under_the_names_of_today() -> None:
    today = in_todays_keys(DistillConfig, {**MOVED, "steps": 7, "lanes": 8})
    assert (today["score"]["weight"], today["score"]["imitator_lr"]) == (0.5, 0.1)
    assert (today["adversary"]["width"], today["perceptual"]["distance"]) == (8, "tokenizer")
    assert (today["steps"], today["lanes"]) == (7, 8)
    assert today["score"]["start"] == DistillConfig().score.start, "as it is by default"
    nested = in_todays_keys(QuickstartConfig, {"distill": MOVED, "sample": {"count": 3}})
    assert nested["distill"]["score"]["weight"] == 0.5
    assert (nested["sample"]["count"], nested["sample"]["seed"]) == (3, 0)


def test_an_old_key_is_noticed_also_where_a_later_source_would_hide_it(tmp_path: Path) -> None:
    file = _file(tmp_path, "perceptual: tokenizer\n")
    with pytest.raises(ConfigError, match="'perceptual' is 'perceptual.distance' now"):
        load_config(DistillConfig, file=file, flags={"perceptual": {"weight": 2}})
    with pytest.raises(ConfigError, match="'score' is no key but holds some: score.imitator_lr, "):
        load_config(DistillConfig, settings=["score=3"])


@pytest.mark.parametrize(
    "data",
    [
        b"count: 3\nout: h\xc3\xa4\n",
        b"\xef\xbb\xbfcount: 3\r\nout: h\xc3\xa4\r\n",
        "count: 3\nout: h\u00e4\n".encode("utf-16"),
    ],
)
def test_a_file_may_have_the_marks_and_line_ends_of_windows(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(data)
    config = load_config(SampleConfig, file=tmp_path / "job.yaml")
    assert (config.count, Path(config.out).name) == (3, "h\u00e4")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"sample:\n\tcount: 3\n", "is not YAML: .*; indent by spaces, not by tabs"),
        (b"count: 2026-99-99\n", "is not YAML: .*month must be in 1..12"),
        (b"a: &a {b: *a}\n", "holds itself, by an alias"),
        (b"a: &a [*a]\n", "holds itself, by an alias"),
        (b"[" * 500, "is not YAML"),
        (b"out: h\xe4\n", "is not YAML: .*invalid continuation byte"),
        (b"count: 3\0\n", "is not YAML: .*special characters are not allowed"),
        (b"<!DOCTYPE html><html></html>", "must hold keys and values, not str: it is an HTML page"),
    ],
)
def test_what_is_no_file_of_keys_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"^--config \S*job.yaml {message}") as refusal:
        load_config(SampleConfig, file=tmp_path / "job.yaml")
    assert "\n" not in str(refusal.value)


def test_a_setting_that_is_no_yaml_is_a_text() -> None:
    config = load_config(SampleConfig, settings=["out=2026-99-99"])
    assert Path(config.out).name == "2026-99-99"
    with pytest.raises(ConfigError, match="holds itself, by an alias"):
        load_config(SampleConfig, settings=["out=&a {b: *a}"])
    with pytest.raises(ConfigError, match=r"^--config 'a.x00': "):
        load_config(SampleConfig, file="a\0")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", ".nan", "1e999"])
def test_numbers_must_be_finite(value: str) -> None:
    for kind, key in ((SampleConfig, "cfg"), (EvaluateConfig, "cfg"), (DistillConfig, "lr")):
        with pytest.raises(ConfigError, match=f"^{key}="):
            load_config(kind, flags={key: value})


@pytest.mark.parametrize("num_gpus", ["1.5", "0.00001"])
def test_a_replica_has_one_gpu_or_a_part_of_one(num_gpus: str) -> None:
    with pytest.raises(ConfigError, match=f"^num_gpus={float(num_gpus):g} "):
        load_config(ServeConfig, flags={"num_gpus": num_gpus})


def test_what_is_too_little_for_a_distance_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="^count='1': input should be greater than or equal to 2"):
        load_config(EvaluateConfig, flags={"count": "1"})
    with pytest.raises(ConfigError, match="^sample.count=1: the evaluation needs at least 2"):
        load_config(QuickstartConfig, settings=["sample.count=1"])
    with pytest.raises(ConfigError, match="^statistics needs at least 2 images, not count=1"):
        load_config(GenerateConfig, flags={"count": "1", "statistics": True})
