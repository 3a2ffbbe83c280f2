"""Facts about locations: one spelling for each, right wherever it is read, or refused in words."""

import os
import pkgutil
import pwd
import typing
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import ddray.config
from ddray.cli import main
from ddray.config import base
from ddray.config.base import Job
from ddray.config.distillation import DistillConfig
from ddray.config.doctor import DoctorConfig
from ddray.config.evaluation import EvaluateConfig
from ddray.config.loading import load_config
from ddray.config.sampling import SampleConfig
from ddray.config.serving import ServeConfig
from ddray.errors import ConfigError
from ddray.locations import absolute, is_bundled, model_location, same_place
from ddray.models.catalog import BUNDLED_MODELS
from ddray.models.zoo import load_student
from ddray.runtime.quickstart import QuickstartConfig, parts
from ddray.storage import open_beside, open_storage
from ddray.text.t5 import FLAN_T5_XL

LOCATION_TYPES = (base.Location, base.LocalFile, base.ModelName, base.EncoderName)
# Texts that are no locations, and what they are.
NO_LOCATIONS = {
    "ServeConfig.host": "an address to listen at",
    "ServeConfig.cors_origins": "origins of web pages",
    "GenerateConfig.schedule": "numbers of stages",
    "GenerateConfig.labels": "words",
    "EvaluateConfig.schedules": "numbers of stages",
    "EvaluateConfig.sweep": "numbers",
    "metrics": "words",
    "EvaluateConfig.rows": "words",
    "EvaluateConfig.labels": "words",
    "column": "its name",
    "caption_column": "its name",
    "node_pool": "a label of nodes, in every config",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a current one below it."""
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


# What is one place is one text: (spelling, the place below the home folder).
SPELLINGS = [
    ("runs/x", "here/runs/x"),
    ("runs/x/", "here/runs/x"),
    ("./runs//x/.", "here/runs/x"),
    ("../x", "x"),
    (".", "here"),
    ("..", ""),
    ("~", ""),
    ("~/x", "x"),
    ("~/x/", "x"),
    ("./~/x", "here/~/x"),
    ("a b/ c", "here/a b/ c"),
    ("50%25", "here/50%25"),
    ("a#b?c&d+e", "here/a#b?c&d+e"),
    ("f\u00fcr/\u732b", "here/f\u00fcr/\u732b"),
    ("run:3", "here/run:3"),
    ("./s3:x", "here/s3:x"),
    ("-x", "here/-x"),
    ("file://{home}/a%20b%25%23%C3%BC", "a b%#\u00fc"),
    ("file://localhost{home}/x/", "x"),
    ("{home}/%41", "%41"),
]


@pytest.mark.parametrize(("spelling", "place"), SPELLINGS)
def test_every_spelling_of_a_place_becomes_its_absolute_path(
    home: Path, spelling: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = str(home / place)
    found = absolute(spelling.format(home=home))
    assert found == wanted
    assert SampleConfig(out=spelling.format(home=home)).out == wanted
    monkeypatch.chdir("/")
    # In a worker, which reads a config that was resolved elsewhere.
    assert absolute(found) == open_storage(found).uri == wanted


@pytest.mark.parametrize("uri", ["s3://b", "s3://b/x", "s3://b/a b%20#+\u00fc~/x", "s3://b/~/x:y"])
def test_an_s3_uri_stays_as_it_is_but_for_slashes_at_its_ends(uri: str) -> None:
    assert absolute(uri) == absolute(f"{uri}/") == uri


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("", "uri is empty; give a path, file:///path or s3://bucket/prefix"),
        (" \t", "is empty; give a path"),
        ("C:\\data\\set", "is a path of Windows; give the path that this machine has for it"),
        ("d:/set", "is a path of Windows"),
        ("\\\\server\\set", "is a path of Windows"),
        ("S3://bucket/x", "write 's3://bucket/x'"),
        ("s3:/bucket/x", "write 's3://bucket/x'"),
        ("s3:bucket/x", "write 's3://bucket/x', or './s3:bucket/x' for a path of that name"),
        ("s3a://bucket/x", "write 's3://bucket/x'"),
        ("file:runs/x", "write 'runs/x', or './file:runs/x' for a path of that name"),
        ("file:/data/x", "write 'file:///data/x'"),
        ("FILE:///data/x", "write 'file:///data/x'"),
        ("file://runs/x", "names a host or a relative path; use file:///path"),
        ("file:///a%0Ab", "holds '\\n', which no location may"),
        ("file:///a%FFb", "is no UTF-8 text"),
        ("https://bucket/x", "has the scheme 'https'; give a path"),
        ("hf://owner/name", "has the scheme 'hf'; give a path"),
        ("runs/x\n", "holds '\\n', which no location may; check quotes and line ends"),
        ("runs\0x", "holds '\\x00'"),
        ("s3://bucket/a\nb", "holds '\\n'"),
        ("~no-such-user/x", "there is no user 'no-such-user' here; write './~no-such-user/x'"),
        ("s3://bucket/a//b", "has an empty part, '.' or '..' in its key"),
        ("s3://bucket/../b", "has an empty part, '.' or '..' in its key"),
    ],
)
def test_what_cannot_be_one_place_is_refused_with_what_to_write(
    spelling: str, message: str
) -> None:
    for take in (
        absolute,
        open_storage,
        lambda text: load_config(SampleConfig, flags={"out": text}),
    ):
        with pytest.raises(ConfigError) as caught:
            take(spelling)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_home_of_another_user_and_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    user = pwd.getpwuid(os.getuid())
    assert absolute(f"~{user.pw_name}/x") == os.path.normpath(f"{user.pw_dir}/x")
    monkeypatch.delenv("HOME")
    assert absolute("~/x") == os.path.normpath(f"{user.pw_dir}/x")


def test_a_folder_above_a_link_is_that_of_its_target(home: Path) -> None:
    (home / "far" / "deep").mkdir(parents=True)
    Path("link").symlink_to(home / "far" / "deep")
    Path("link/../x").write_text("of far")
    assert Path(absolute("link/../x")).read_text() == "of far"
    assert absolute("link/x") == str(home / "here" / "link" / "x")


def test_a_current_folder_that_is_gone_is_told(home: Path) -> None:
    (home / "here").rmdir()
    with pytest.raises(ConfigError, match="'runs' is relative to the current folder, which is no"):
        absolute("runs")
    assert absolute("/runs") == "/runs"


def test_a_secret_in_a_config_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--out", "s3://key:hunter2@bucket/x"]) == 2
    told = capsys.readouterr().err
    assert "out: an s3 uri holds credentials" in told
    assert "hunter2" not in told


def test_names_of_models_stay_and_folders_become_absolute(home: Path) -> None:
    for name in (*BUNDLED_MODELS, "var-d16", "hf://owner/name/file.pt", "mine"):
        assert model_location(name) == name
    for name in ("mine", "var-d16", "digits-llamagen"):
        Path(name).mkdir()
    assert model_location("mine") == str(home / "here" / "mine")
    assert model_location("var-d16") == str(home / "here" / "var-d16")
    # As in every verb: what is bundled cannot be hidden by a folder that lies about.
    assert model_location("digits-llamagen") == "digits-llamagen"
    assert model_location("runs/x/student") == str(home / "here" / "runs" / "x" / "student")
    assert all(map(is_bundled, BUNDLED_MODELS))
    assert not any(map(is_bundled, ("", ".", "..", "digits-classifier", "../models")))


def test_an_encoder_is_a_folder_or_a_name_of_the_hub(home: Path) -> None:
    assert SampleConfig(text_encoder="google/flan-t5-xl").text_encoder == "google/flan-t5-xl"
    assert SampleConfig(text_encoder="~/t5").text_encoder == str(home / "t5")
    assert SampleConfig(text_encoder="./t5").text_encoder == str(home / "here" / "t5")
    Path("google/flan-t5-xl").mkdir(parents=True)
    assert SampleConfig(text_encoder="google/flan-t5-xl").text_encoder.startswith(str(home))


def test_lists_and_paths_of_python_are_spelled_likewise(home: Path) -> None:
    config = ServeConfig(student="digits-llamagen-dd,~/x/student,s3://b/y", api_keys_file=Path("k"))
    assert config.student == ("digits-llamagen-dd", str(home / "x" / "student"), "s3://b/y")
    assert config.api_keys_file == str(home / "here" / "k")
    assert DoctorConfig(uri=[Path("a"), "~"], model=Path("m/n")) == DoctorConfig(
        uri=(str(home / "here" / "a"), str(home)), model=(str(home / "here" / "m" / "n"),)
    )
    with pytest.raises(ConfigError, match="api_keys_file: uri 's3://b/k' must be a file on disk"):
        load_config(ServeConfig, flags={"api_keys_file": "s3://b/k"})


def test_files_flags_and_settings_give_one_config(home: Path) -> None:
    file = Path("job.yaml")
    file.write_text("teacher: ~/t\nperceptual: {distance: lpips, weights_file: vgg.pth}\n")
    named = {"distance": "lpips", "weights_file": "~/here/vgg.pth"}
    wanted = DistillConfig(teacher=str(home / "t"), perceptual=named)
    assert wanted.data == str(home / "here" / "runs" / "sample" / "trajectories")
    assert load_config(DistillConfig, file="~/here/job.yaml") == wanted
    settings = ["teacher=~/t", "perceptual.distance=lpips", "perceptual.weights_file=vgg.pth"]
    assert load_config(DistillConfig, settings=settings) == wanted
    assert load_config(DistillConfig, flags={"teacher": "../t", "perceptual": named}) == wanted


def test_the_parts_of_a_quickstart_lie_below_its_absolute_folder(home: Path) -> None:
    for part in parts(QuickstartConfig(out="~/q")):
        assert part.out.startswith(str(home / "q"))


def test_one_file_at_a_location(home: Path) -> None:
    for uri, folder in (("x.png", home / "here"), ("~/x.png", home), ("file:///x.png", Path("/"))):
        storage, name = open_beside(uri)
        assert (storage.uri, name) == (str(folder), "x.png")
    storage, name = open_beside("s3://b/a/x.pt")
    assert (storage.uri, name) == ("s3://b/a", "x.pt")
    for uri in ("/", "x/", "s3://b", "s3://b/"):
        with pytest.raises(ConfigError, match="names no file"):
            open_beside(uri)


def test_weights_and_pictures_are_found_by_any_spelling(home: Path) -> None:
    (home / "w").symlink_to(Path(load_student.__code__.co_filename).parent / "bundled")
    folder = "~/w/digits-llamagen-dd"
    student = load_student(
        folder,
        checkpoint=f"{folder}/model.safetensors",
        tokenizer=f"file://{home}/w/digits-llamagen-dd/tokenizer.safetensors",
        device="cpu",
    )
    assert student.name == str(home / "w" / "digits-llamagen-dd")
    with pytest.raises(ConfigError, match="uri 's3://b/x.pt' must be a file on disk"):
        load_student(folder, checkpoint="s3://b/x.pt", device="cpu")


@pytest.mark.parametrize(
    ("earlier", "now", "same"),
    [
        ("models/t", "/elsewhere/models/t", True),
        ("./models/t/", "/elsewhere/models/t", True),
        ("odels/t", "/elsewhere/models/t", False),
        ("models/u", "/elsewhere/models/t", False),
        ("/other/models/t", "/elsewhere/models/t", False),
        ("~/t", os.path.expanduser("~/t"), True),
        ("file:///a%20b", "/a b", True),
        ("s3://b/x/", "s3://b/x", True),
        ("digits-llamagen", "/elsewhere/digits-llamagen", False),
        ("0.5", "0.6", False),
        ("s3:/x", "/x", False),
        (None, "/x", False),
        (3, 4, False),
    ],
)
def test_what_an_earlier_run_wrote_is_compared_as_a_place(
    earlier: object, now: object, same: bool
) -> None:
    assert same_place(earlier, now) is same


# Every key of every config.


def config_classes() -> list[type[Job]]:
    for module in pkgutil.iter_modules(ddray.config.__path__):
        import_module(f"ddray.config.{module.name}")
    found, todo = [], [Job]
    while todo:
        kinds = todo.pop().__subclasses__()
        found += kinds
        todo += kinds
    return [kind for kind in found if kind.__module__.startswith("ddray.config.")]


def unspelled(hint: Any) -> bool:
    """Whether a type holds texts or paths that no type of location has spelled."""
    if any(hint == kind for kind in LOCATION_TYPES) or get_origin(hint) is typing.Literal:
        return False
    if hint in (str, bytes, Path, Any):
        return True
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return True
    inner = get_args(hint)[:1] if get_origin(hint) is typing.Annotated else get_args(hint)
    return any(map(unspelled, inner))


def test_every_text_of_every_config_is_a_location_or_known_to_be_none() -> None:
    kinds = config_classes()
    assert {EvaluateConfig, QuickstartConfig, DoctorConfig} < set(kinds)
    found = set()
    for kind in kinds:
        for key, hint in get_type_hints(kind, include_extras=True).items():
            if key in kind.model_fields and unspelled(hint):
                found.add(key if key in NO_LOCATIONS else f"{kind.__name__}.{key}")
    assert found == set(NO_LOCATIONS)


def test_every_default_that_is_a_path_is_absolute(home: Path) -> None:
    for kind in config_classes():
        for key, value in kind().model_dump().items():
            # A name on the Hub is no path.
            if isinstance(value, str) and "/" in value and value != FLAN_T5_XL:
                assert value.startswith(f"{home}/here/runs/"), f"{kind.__name__}.{key}={value}"
