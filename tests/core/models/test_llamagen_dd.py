"""Facts about the student's network: upstream's numbers, its jumps, its start from the teacher."""

import pytest
import torch

from ddray.method.student import Student, given_tokens, keep_data
from ddray.models.llamagen_dd import LlamaGenStudent, LlamaGenStudentConfig
from ddray.models.zoo import load_student, new_student
from tests.core.tiny import assert_golden, golden, golden_weights, tiny_student, tiny_teacher

SIZE_NAMES = ("dim", "n_layer", "n_head", "multiple_of", "vocab_size", "num_classes", "block_size")
VQ_NAMES = ("codebook_size", "codebook_embed_dim", "z_channels", "ch", "ch_mult", "num_res_blocks")


@pytest.fixture(scope="module")
def upstream():
    config, tensors = golden("lg_dd")
    spec = {
        "family": "llamagen-dd",
        **{name: config[name] for name in (*SIZE_NAMES, "codebook_dim")},
        "tokenizer": {name: config["vq"][name] for name in VQ_NAMES},
        "split": config["split_t"],
    }
    student = load_student(
        spec,
        checkpoint={"ema": golden_weights("lg_dd"), "model": {"not": torch.zeros(1)}},
        tokenizer={"model": golden_weights("lg_vq")},
        device="cpu",
    )
    return config, tensors, student


def test_the_codebook_matches_upstream(upstream):
    _, tensors, student = upstream
    assert_golden(student.codebook, tensors["out/codebook"])


def test_both_heads_match_upstream_at_every_t(upstream):
    _, tensors, student = upstream
    for dtype in (torch.float32, torch.int64):
        t = tensors["in/forward.t"].to(dtype)
        logits, codes = student.predict(tensors["in/forward.x"], tensors["in/forward.label"], t)
        assert_golden(logits, tensors["out/forward.logits"])
        assert_golden(codes, tensors["out/forward.tokens"])


def test_x_t_matches_upstream(upstream):
    _, tensors, student = upstream
    x, t = tensors["in/forward.x"], tensors["in/forward.t"]
    noise = tensors["in/noise"][:1].expand_as(x)
    given = given_tokens(student.stages, t)
    assert torch.equal(keep_data(x, noise, given), tensors["out/perturb.out"])


def test_the_nearest_codes_match_upstream(upstream):
    _, tensors, student = upstream
    nearest = student.tokenizer.module.nearest(tensors["in/forward.x"])
    assert torch.equal(nearest, tensors["out/final_predict.idx"])


@pytest.mark.parametrize(("schedule", "name", "last"), [("0", "step1", 0), ("0,5", "step2", 1)])
def test_jumps_with_fixed_noise_match_upstream(upstream, schedule, name, last):
    config, tensors, student = upstream
    noise, label = tensors["in/noise"], tensors["in/label"]
    codes = student.generate(label, noise=noise, schedule=schedule)
    assert_golden(codes, tensors[f"out/{name}.{last}.sequence"])
    explicit = student.generate(label, noise=noise, schedule=schedule, split=config["split_t"])
    assert torch.equal(explicit, codes)
    assert_golden(student.decode(codes), tensors[f"out/{name}.image"].clamp(0, 1))


def test_split_zero_reads_the_code_head_alone(upstream):
    _, tensors, student = upstream
    codes = student.generate(tensors["in/label"], noise=tensors["in/noise"], split=0)
    assert_golden(codes, tensors["out/step1.0.tokens"])


def test_an_output_sees_its_own_token_and_those_before():
    student = tiny_student()
    x = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 2] += 1
    t = torch.tensor([0])
    for before, after in zip(
        student.predict(x, [1], t), student.predict(changed, [1], t), strict=True
    ):
        assert torch.equal(before[:, :2], after[:, :2])
        assert (before[:, 2:] != after[:, 2:]).any(-1).all()


def test_t_says_which_positions_are_data():
    student = tiny_student()
    x = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)).expand(5, 4, 4)
    logits, _ = student.predict(x, [1] * 5, torch.arange(5))
    for t in range(4):
        # Only position t becomes data: outputs before it stay, the others change.
        assert torch.equal(logits[t, :t], logits[t + 1, :t])
        assert (logits[t, t:] != logits[t + 1, t:]).any(-1).all()


def test_a_student_starts_as_its_teacher():
    teacher = tiny_teacher(3, vocab_size=32, block_size=9)
    network, config = new_student(teacher)
    own = ("tok_embeddings", "n_d_embed", "final_layer_conti")
    source = teacher.model.state_dict()
    copied = [name for name in network.state_dict() if not name.startswith(own)]
    assert copied
    for name in copied:
        assert torch.equal(network.state_dict()[name], source[name]), name
        assert network.state_dict()[name].data_ptr() != source[name].data_ptr()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert config["family"] == "llamagen-dd"
    assert config["codebook_dim"] == teacher.codebook.shape[1]
    assert config["tokenizer"] == teacher.config["tokenizer"]


def test_the_input_layer_is_the_least_squares_fit_of_the_teachers_embedding():
    teacher = tiny_teacher(3, vocab_size=32)
    network, _ = new_student(teacher)
    target = teacher.model.tok_embeddings.weight
    x = teacher.codebook
    error = (network.tok_embeddings(x) - target).detach()
    # No error is left in the span of the inputs, the constant included ...
    assert (x.T @ error).abs().max() < 1e-4
    assert error.sum(0).abs().max() < 1e-4
    # ... and so a layer of zeros is worse.
    assert error.square().sum() < 0.95 * target.square().sum()


def test_a_linear_embedding_is_carried_over_exactly():
    teacher = tiny_teacher(3, vocab_size=32)
    generator = torch.Generator().manual_seed(0)
    matrix, shift = torch.randn(4, 16, generator=generator), torch.randn(16, generator=generator)
    teacher.model.tok_embeddings.weight.copy_(teacher.codebook @ matrix + shift)
    network, _ = new_student(teacher)
    embedded = network.tok_embeddings(teacher.codebook)
    torch.testing.assert_close(embedded, teacher.model.tok_embeddings.weight, atol=1e-4, rtol=1e-4)


def test_a_student_can_train_after_it_has_generated():
    teacher = tiny_teacher()
    network, config = new_student(teacher)
    Student(network, teacher.tokenizer, config, "new").generate([0])
    logits, codes = network(torch.zeros(1, 4, 4), torch.tensor([0]), torch.tensor([0]))
    (logits.sum() + codes.sum()).backward()
    assert network.cls_embedding.embedding_table.weight.grad is not None


def test_parameters_have_the_published_names_and_count():
    with torch.device("meta"):
        model = LlamaGenStudent(LlamaGenStudentConfig(dim=768, n_layer=12, n_head=12))
    assert len(model.state_dict()) == 93
    assert sum(p.numel() for p in model.parameters()) == 98_321_672
