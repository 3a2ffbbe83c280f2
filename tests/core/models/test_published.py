"""Facts about published files: what is said of them, what is refused, exact round trips."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ddray.cli import main
from ddray.errors import CheckpointError, ConfigError
from ddray.models.catalog import BUNDLED_MODELS, PUBLISHED
from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.published import describe, export, verify
from ddray.models.zoo import load_masked, load_student, load_teacher
from ddray.storage.checkpoint import read_weights, save_folder
from tests.core.tiny import (
    VAR_SIZES,
    random_state,
    student_config,
    student_state,
    teacher_config,
    tokenizer_state,
)

VAR_CONFIG = {"family": "var", **VAR_SIZES}
CONFIGS = {
    "llamagen": teacher_config(),
    "llamagen-dd": student_config(),
    "var": VAR_CONFIG,
    "var-dd": {**VAR_CONFIG, "family": "var-dd"},
    "masked": {**teacher_config(), "family": "masked"},
}
LAYOUTS = {
    "llamagen": ("model",),
    "llamagen-dd": ("ema",),
    "var": (),
    "var-dd": ("trainer", "ema_parameters"),
    "masked": (),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    config = CONFIGS[request.param]
    path = tmp_path / request.param
    states = [random_state(empty(config)) for empty in (empty_network, empty_tokenizer)]
    save_folder(path, config, model=states[0], tokenizer=states[1])
    return path


def load(path, **options):
    if path.name == "masked":
        return load_masked(path, **options)
    return (load_student if path.name.endswith("-dd") else load_teacher)(path, **options)


@pytest.mark.slow
def test_an_exported_file_gives_the_same_model(folder, tmp_path):
    exported = tmp_path / "exported.pth"
    written = export(str(folder), str(exported))
    container = torch.load(exported, weights_only=True)
    for key in LAYOUTS[folder.name]:
        assert [*container] == [key]
        container = container[key]
    here, there = load(folder), load(folder, checkpoint=exported)
    assert container.keys() == here.model.state_dict().keys()
    assert there.fingerprint == here.fingerprint == written["fingerprint"]


@pytest.mark.slow
def test_a_file_without_what_follows_from_the_sizes_is_enough(folder):
    whole = dict(load(folder).model.state_dict())
    constants = getattr(load(folder).model, "constants", dict)()
    bare = {name: tensor for name, tensor in whole.items() if name not in constants}
    assert load(folder, checkpoint=bare).fingerprint == load(folder).fingerprint


@pytest.mark.slow
def test_a_model_is_verified_by_running_it(folder, capsys):
    found = verify(str(folder), None, None)
    assert found["family"] == folder.name
    assert found["fingerprint"] == load(folder).fingerprint
    assert found["forward"]["shape"] == [1, found["tokens"], 8]
    assert main(["models", "verify", str(folder)]) == 0
    assert found["fingerprint"] in capsys.readouterr().out


def test_weights_that_are_not_finite_are_refused(folder, tmp_path):
    state = dict(load(folder).model.state_dict())
    name = next(name for name in state if name.endswith("weight") and "emb" not in name)
    torch.save({**state, name: torch.full_like(state[name], torch.nan)}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="numbers that are not finite"):
        verify(str(folder), str(tmp_path / "bad.pt"), None)


def test_levels_of_other_scales_are_refused():
    config = VAR_CONFIG
    network, codec = random_state(empty_network(config)), random_state(empty_tokenizer(config))
    constants = empty_network(config).constants()
    constants["lvl_1L"] = constants["lvl_1L"].flip(1)
    with pytest.raises(CheckpointError, match="made for other sizes lvl_1L"):
        load_teacher(config, checkpoint=network | constants, tokenizer=codec)


def test_a_training_checkpoint_of_var_holds_both_networks(tmp_path):
    network, codec = (
        random_state(empty(VAR_CONFIG), seed)
        for seed, empty in enumerate((empty_network, empty_tokenizer))
    )
    both = {"epoch": 1, "trainer": {"var_wo_ddp": network, "vae_local": codec}}
    torch.save(both, tmp_path / "ar-ckpt-best.pth")
    file = tmp_path / "ar-ckpt-best.pth"
    assert read_weights(file).keys() == network.keys()
    assert read_weights(file, tokenizer=True).keys() == codec.keys()
    load_teacher(VAR_CONFIG, checkpoint=file, tokenizer=file)


def test_var_needs_its_tokenizer():
    config = {**VAR_CONFIG, "tokenizer": None}
    state = random_state(empty_network(VAR_CONFIG))
    with pytest.raises(ConfigError, match="a VAR reads sums of codes"):
        load_teacher(config, checkpoint=state)


@pytest.mark.parametrize("name", [*PUBLISHED, *BUNDLED_MODELS])
def test_every_name_says_what_to_download(name):
    described = describe(name)
    if name in PUBLISHED:
        assert PUBLISHED[name].tokenizer.name in described["files"]["tokenizer"]
        assert described["license"] == "MIT"
        assert name in described["load"]


@pytest.mark.parametrize("name", ["llamagen-b-256", "var-dd-d16"])
def test_a_published_name_without_files_says_which(name):
    load = load_student if "-dd-" in name else load_teacher
    file = PUBLISHED[name].checkpoint.name
    with pytest.raises(ConfigError, match=f"checkpoint='{file}'.*ddray models show {name}"):
        load(name)


def test_wrong_exports_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="must end in .pt or .pth"):
        export("digits-llamagen-dd", str(tmp_path / "x.safetensors"))
    with pytest.raises(ConfigError, match="a set of sizes without weights"):
        export("var-d16", str(tmp_path / "x.pth"))
    assert not [*tmp_path.iterdir()]


def test_the_command_line_lists_shows_and_exports(tmp_path, capsys):
    assert main(["models"]) == 0
    assert "llamagen-dd-b-256" in capsys.readouterr().out
    assert main(["models", "show", "var-d30"]) == 0
    assert "var_d30.pth of huggingface.co/FoundationVision/var" in capsys.readouterr().out
    assert main(["models", "show", "var-d3O"]) == 2
    assert "did you mean 'var-d3" in capsys.readouterr().err
    out = tmp_path / "student.pt"
    assert main(["export", "--student", "digits-llamagen-dd", "--out", str(out)]) == 0
    weights = torch.load(out, weights_only=True)["ema"]
    assert weights.keys() == load_student("digits-llamagen-dd").model.state_dict().keys()


def test_shards_of_safetensors_are_one_state_dict(tmp_path):
    state = tokenizer_state()
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for source in (index, tmp_path):
        found = read_weights(source)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names b.safetensors, which is not there"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        read_weights(index)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no index of safetensors shards"):
        read_weights(index)


def test_a_wrapper_of_training_leaves_no_trace_in_the_names():
    state = student_state()
    for prefix in ("module.", "_orig_mod."):
        wrapped = {prefix + name: tensor for name, tensor in state.items()}
        assert read_weights({"model": wrapped}).keys() == state.keys()


def test_what_the_hub_cannot_give_is_said_on_one_line(monkeypatch):
    with pytest.raises(CheckpointError, match="hf://owner/repository/path/of/file"):
        read_weights("hf://FoundationVision/var")
    # The package reads its environment once, at import, which may be long ago.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hf://FoundationVision/var/var_d16.pth") as caught:
        read_weights("hf://FoundationVision/var/var_d16.pth")
    assert "\n" not in str(caught.value)


def test_a_file_of_the_wrong_kind_of_numbers_is_refused(folder):
    state = dict(load(folder).model.state_dict())
    name = next(name for name in state if name.endswith("weight"))
    with pytest.raises(CheckpointError, match=rf"dtypes {name} is torch.int64 instead of"):
        load(folder, checkpoint={**state, name: state[name].long()})


def test_a_callers_own_network_stays_trainable():
    network = empty_network(VAR_CONFIG).to_empty(device="cpu")
    network.init_weights()
    tokenizer = random_state(empty_tokenizer(VAR_CONFIG), 1)
    load_teacher(VAR_CONFIG, checkpoint=dict(network.named_parameters()), tokenizer=tokenizer)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("source", [5, {0: torch.zeros(1)}, {"a": 1}])
def test_what_holds_no_weights_is_refused(source):
    with pytest.raises(CheckpointError):
        read_weights(source)


@pytest.mark.slow
def test_published_files_become_a_folder_that_every_job_takes(folder, tmp_path):
    file, made = str(tmp_path / "published.pth"), tmp_path / "made" / folder.name
    export(str(folder), file)
    written = export(str(folder), str(made), "ddray", checkpoint=file)
    assert written["container"] == "model folder"
    assert load(made).fingerprint == load(folder).fingerprint
    assert load(made).tokenizer.fingerprint == load(folder).tokenizer.fingerprint
    assert {p.name for p in made.iterdir()} == {p.name for p in folder.iterdir()}
