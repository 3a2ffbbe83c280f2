"""Facts about loading models: names, dictionaries, folders, and what is refused with which hint."""

import itertools

import pytest
import torch

from ddray.errors import CheckpointError, ConfigError
from ddray.models.catalog import PUBLISHED
from ddray.models.families import empty_network, empty_tokenizer
from ddray.models.zoo import (
    BUNDLED,
    continue_student,
    image_side,
    load_student,
    load_teacher,
    new_student,
)
from ddray.storage.checkpoint import read_config, save_folder
from tests.core.tiny import (
    student_config,
    student_state,
    teacher_config,
    teacher_state,
    tiny_student,
    tiny_teacher,
    tokenizer_state,
)

CONFIG, STATE, CODEC = teacher_config(), teacher_state(), tokenizer_state()


def load(config=CONFIG, checkpoint=STATE, tokenizer=CODEC, **options):
    return load_teacher(config, checkpoint=checkpoint, tokenizer=tokenizer, **options)


def test_a_teacher_says_what_it_is():
    teacher = load({**CONFIG, "default_cfg": 2, "default_top_p": 0.5})
    assert teacher.stages == (1,) * 4
    assert teacher.conditioning == "class"
    assert teacher.num_classes == 3
    assert teacher.default_cfg == 2.0
    assert isinstance(teacher.default_cfg, float)
    assert teacher.default_top_p == 0.5
    assert teacher.codebook.shape == (8, 4)
    assert tiny_teacher().default_cfg == tiny_teacher().default_top_p == 1.0
    assert not any(module.training for module in teacher.model.modules())


def test_files_and_memory_give_the_same_model(tmp_path):
    torch.save({"model": STATE}, tmp_path / "net.pt")
    torch.save({"model": CODEC}, tmp_path / "vq.pt")
    a, b = load(), load(checkpoint=tmp_path / "net.pt", tokenizer=str(tmp_path / "vq.pt"))
    assert a.fingerprint == b.fingerprint
    assert a.tokenizer.fingerprint == b.tokenizer.fingerprint
    assert torch.equal(a.sample([0, 1, 2]), b.sample([0, 1, 2]))


def test_a_folder_holds_the_whole_model(tmp_path):
    save_folder(tmp_path / "t", CONFIG, model=STATE, tokenizer=CODEC)
    teacher = load_teacher(tmp_path / "t")
    assert teacher.fingerprint == load().fingerprint
    assert teacher.config == CONFIG
    assert load_teacher(str(tmp_path / "t")).fingerprint == teacher.fingerprint
    changed = load_teacher(tmp_path / "t", checkpoint=teacher_state(5))
    assert changed.fingerprint == load(checkpoint=teacher_state(5)).fingerprint
    assert changed.tokenizer.fingerprint == teacher.tokenizer.fingerprint


def test_a_student_survives_its_folder(tmp_path):
    student = tiny_student()
    config = {**student.config, "schedule": [0, 2], "split": 3, "step": 100, "teacher": "x"}
    save_folder(
        tmp_path,
        config,
        model=student.model.state_dict(),
        tokenizer=student.tokenizer.module.state_dict(),
    )
    loaded = load_student(tmp_path)
    assert loaded.config == config
    assert loaded.fingerprint == student.fingerprint
    expected = student.generate([0, 1], split=3)
    assert torch.equal(loaded.generate([0, 1]), expected)


def test_a_new_student_can_be_saved_and_loaded(tmp_path):
    teacher = tiny_teacher()
    network, config = new_student(teacher)
    save_folder(
        tmp_path,
        config,
        model=network.state_dict(),
        tokenizer=teacher.tokenizer.module.state_dict(),
    )
    student = load_student(tmp_path)
    assert student.stages == teacher.stages
    assert student.config == config
    assert torch.equal(student.codebook, teacher.codebook)
    assert student.tokenizer.fingerprint == teacher.tokenizer.fingerprint


def test_a_new_student_has_from_its_teacher_what_people_and_captions_need(tmp_path):
    said = {"default_cfg": 3.0, "class_names": ["a", "b", "c"], "text_encoder": "words"}
    said |= {"example_captions": ["red apple"]}
    save_folder(tmp_path, {**teacher_config(), **said}, model=STATE, tokenizer=CODEC)
    _, config = new_student(load_teacher(tmp_path))
    assert {name: config[name] for name in said} == said


def test_float16_files_load_as_float32():
    half = {name: tensor.half() for name, tensor in STATE.items()}
    teacher = load(checkpoint=half, tokenizer={name: t.half() for name, t in CODEC.items()})
    assert all(p.dtype == torch.float32 for p in teacher.model.parameters())
    assert teacher.codebook.dtype == torch.float32
    rounded = {name: tensor.half().float() for name, tensor in STATE.items()}
    assert teacher.fingerprint == load(checkpoint=rounded).fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_network_may_run_in_bfloat16_and_the_tokenizer_stays_float32(dtype):
    teacher = load(dtype=dtype)
    assert all(p.dtype == torch.bfloat16 for p in teacher.model.parameters())
    assert all(p.dtype == torch.float32 for p in teacher.tokenizer.module.parameters())
    tokens = teacher.trajectories([0, 1], [0, 1], seed=0, cfg=2.0)
    assert teacher.guided_logits([0, 1], tokens, 2.0).dtype == torch.float32
    assert teacher.decode(tokens).dtype == torch.float32


def test_a_model_without_tokenizer_samples_but_has_no_codes():
    teacher = load({**CONFIG, "tokenizer": None}, tokenizer=None)
    tokens = teacher.sample([0, 1])
    assert torch.equal(tokens, tiny_teacher().sample([0, 1]))
    assert teacher.guided_logits([0, 1], tokens).shape == (2, 4, 8)
    assert teacher.tokenizer.fingerprint == ""
    for call in (
        lambda: teacher.codebook,
        lambda: teacher.decode(tokens),
        lambda: teacher.encode(torch.zeros(1, 3, 4, 4)),
        lambda: teacher.trajectories([0], [0], seed=0),
        lambda: new_student(teacher),
    ):
        with pytest.raises(
            ConfigError, match='"tokenizer": None, .* give tokenizer= to the loader'
        ):
            call()


def test_an_unknown_name_is_refused_with_a_hint(tmp_path):
    with pytest.raises(
        ConfigError, match="no model 'digits-lamagen'.* did you mean 'digits-llamagen'"
    ):
        load_teacher("digits-lamagen")
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=r"no model .*nowhere.* `ddray models` lists"):
        load_teacher(nowhere)
    assert not nowhere.exists()


def test_an_unknown_field_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match="unknown field 'n_layers'; did you mean 'n_layer'"):
        load({**CONFIG, "n_layers": 1})
    vq = {**CONFIG["tokenizer"], "chmult": [1, 1]}
    with pytest.raises(
        ConfigError, match="tokenizer .* unknown field 'chmult'; did you mean 'ch_mult'"
    ):
        load({**CONFIG, "tokenizer": vq})


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="family='lamagen' is unknown; choose .*llamagen"):
        load({**CONFIG, "family": "lamagen"})
    with pytest.raises(ConfigError, match="family=None is unknown"):
        load({name: value for name, value in CONFIG.items() if name != "family"})


def test_a_student_is_no_teacher():
    with pytest.raises(ConfigError, match="is of family 'llamagen-dd', which is no teacher"):
        load(student_config(), student_state())
    with pytest.raises(ConfigError, match="is of family 'llamagen', which is no student"):
        load_student(CONFIG, checkpoint=STATE, tokenizer=CODEC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 18}, "dim=18 with n_head=2: the head width"),
        ({"dim": "16"}, "dim='16' must be a positive integer"),
        ({"vocab_size": 9}, "vocab_size=9, but its tokenizer has vocab_size=8"),
        ({"codebook_dim": 8}, "codebook_dim=8, but its tokenizer has codebook_dim=4"),
        ({"n_head": 0}, "n_head=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load({**CONFIG, **changes})


def test_a_teacher_may_state_the_width_of_its_codes():
    assert load({**CONFIG, "codebook_dim": 4}).fingerprint == load().fingerprint


def test_a_missing_field_is_refused():
    with pytest.raises(ConfigError, match="the config of the given teacher lacks n_layer, n_head"):
        load({n: v for n, v in CONFIG.items() if n not in ("n_layer", "n_head")})


def test_missing_weights_are_refused():
    with pytest.raises(ConfigError, match="a set of sizes without weights; give checkpoint="):
        load(checkpoint=None)
    with pytest.raises(ConfigError, match='has no weights; give tokenizer=, or "tokenizer": None'):
        load(tokenizer=None)
    with pytest.raises(ConfigError, match='"tokenizer": None, so tokenizer= has no effect'):
        load({**CONFIG, "tokenizer": None})


def test_weights_of_another_size_are_refused():
    with pytest.raises(
        CheckpointError, match="the checkpoint of the given teacher does not fit"
    ) as e:
        load({**CONFIG, "n_layer": 2})
    assert "missing layers.1.attention.wqkv.weight" in str(e.value)
    other = teacher_state(num_classes=5)
    message = r"embedding_table.weight is \[6, 16\] instead of \[4, 16\]"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint=other)
    with pytest.raises(CheckpointError, match="the tokenizer of the given teacher does not fit"):
        load(tokenizer={**CODEC, "stranger": torch.zeros(1)})


def test_the_codebook_statistic_is_optional():
    codec = {name: t for name, t in CODEC.items() if name != "quantize.codebook_used"}
    assert len(codec) < len(CODEC)
    assert load(tokenizer=codec).tokenizer.fingerprint == load().tokenizer.fingerprint


def test_the_fingerprint_changes_with_one_weight():
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    assert load(checkpoint=state).fingerprint == load().fingerprint
    state["output.weight"][3, 5] += 1e-3
    assert load(checkpoint=state).fingerprint != load().fingerprint


def test_an_unknown_device_or_dtype_is_refused():
    with pytest.raises(ConfigError, match="device='gpu' is unknown"):
        load(device="gpu")
    with pytest.raises(
        ConfigError, match="dtype='int8' is not one of auto, float32, tf32, bfloat16, float16"
    ):
        load(dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device='cuda', but there is no CUDA device"):
            load(device="cuda")


def test_a_student_continues_with_its_own_weights_and_only_under_its_own_teacher(tmp_path):
    teacher = tiny_teacher()
    network, card = new_student(teacher)
    for weight in network.parameters():
        weight.data.add_(0.5)
    state = dict(network.state_dict())
    tokenizer = teacher.tokenizer.state_dict()
    card["teacher_fingerprint"] = teacher.fingerprint
    save_folder(tmp_path, card, model=state, tokenizer=tokenizer)
    continued, sizes = continue_student(tmp_path, teacher)
    assert all(torch.equal(value, state[name]) for name, value in continued.state_dict().items())
    assert all(weight.requires_grad for weight in continued.parameters())
    assert sizes["family"] == "llamagen-dd"
    with pytest.raises(ConfigError, match="was distilled from another teacher, not from the given"):
        continue_student(tmp_path, tiny_teacher(seed=5))
    other = tiny_teacher(n_layer=2)
    card["teacher_fingerprint"] = other.fingerprint
    save_folder(tmp_path, card, model=state, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"n_layer=1 \(not 2\)"):
        continue_student(tmp_path, other)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("llamagen-b-256", 256),
        ("llamagen-b-384", 384),
        ("llamagen-dd-l-256", 256),
        ("llamagen-t2i-xl-512", 512),
        ("var-d16", 256),
        ("var-d36", 512),
        ("var-dd-d24", 256),
    ],
)
def test_the_side_of_published_images_follows_from_their_sizes(name, side):
    assert image_side(PUBLISHED[name].config) == side


@pytest.mark.parametrize("make", [tiny_student, tiny_teacher])
def test_the_side_is_that_of_the_images(make):
    model = make(block_size=16)
    codes = model.codebook[torch.zeros(1, 16, dtype=torch.long)]
    assert model.decode(codes).shape[2:] == (image_side(model.config),) * 2


def test_a_model_without_tokenizer_makes_no_images():
    with pytest.raises(ConfigError, match='the given model has "tokenizer": None, so it makes no'):
        image_side({**teacher_config(), "tokenizer": None})


@pytest.mark.parametrize("name", ["digits-llamagen-dd", "digits-var-dd"])
def test_sizes_that_nothing_can_be_made_of_are_one_line(name):
    config, strange = read_config(BUNDLED / name), itertools.cycle([None, "x", -1, [], {}, [[1]]])
    tokenizer = config["tokenizer"]
    cases = [{**config, key: next(strange)} for key in config if key not in ("schedule", "step")]
    cases += [{**config, "tokenizer": {**tokenizer, key: next(strange)}} for key in tokenizer]
    for case in cases:
        try:
            empty_network(case)
            empty_tokenizer(case)
        except ConfigError as error:
            assert "\n" not in str(error)


def test_a_file_of_weights_is_no_model(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="weights.pt is a file; a model is a name, or a folder"):
        load_teacher(tmp_path / "weights.pt")
