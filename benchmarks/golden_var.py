"""VAR's golden cases: every quantity of the fixtures beside ddray's own."""

from typing import Any

import torch
from golden_cases import (
    Pairs,
    Tensors,
    continued,
    data_as_logits,
    forced,
    initialised,
    jumps_of,
    some,
    stages_of,
    weights,
    with_null,
    with_teacher,
)

from ddray.method.guidance import filter_logits, top_p_filter_from_below
from ddray.method.student import Student, given_tokens, keep_data
from ddray.method.teacher import Teacher
from ddray.models.var import VAR
from ddray.models.var_blocks import VARConfig
from ddray.models.var_dd import VARStudent, VARStudentConfig
from ddray.models.var_vq import MultiScaleQuantizer, VARVQConfig, phi_of_scale
from ddray.models.zoo import load_student, load_teacher
from ddray.storage.checkpoint import load_into

_VAR = ("depth", "embed_dim", "num_heads", "mlp_ratio", "attn_l2_norm", "num_classes", "patch_nums")
_VAR_VQ = ("vocab_size", "z_channels", "ch", "ch_mult", "num_res_blocks", "patch_nums")


def _var(config: dict[str, Any], vae: dict[str, Any]) -> Teacher:
    spec = {"family": "var", **some(config, _VAR), "tokenizer": some(vae, _VAR_VQ)}
    return load_teacher(spec, checkpoint=weights("var"), tokenizer=weights("var_vae"), device="cpu")


def _var_student(config: dict[str, Any], vae: dict[str, Any]) -> Student:
    names = (*_VAR, "n_d_embed_enable", "layerwise_n_d_embed")
    spec = {"family": "var-dd", **some(config, names), "tokenizer": some(vae, _VAR_VQ)}
    source = {"trainer": {"ema_parameters": weights("var_dd")}}
    return load_student(spec, checkpoint=source, tokenizer=weights("var_vae"), device="cpu")


def var_vae(config: dict[str, Any], t: Tensors) -> Pairs:
    """VAR's tokenizer."""
    scales = len(config["patch_nums"])
    spec = {"family": "var", "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 1}
    spec |= {"patch_nums": config["patch_nums"], "tokenizer": some(config, _VAR_VQ)}
    sizes = VARConfig(
        depth=1,
        embed_dim=16,
        num_heads=2,
        num_classes=1,
        patch_nums=tuple(config["patch_nums"]),
        vocab_size=config["vocab_size"],
        codebook_dim=config["z_channels"],
    )
    teacher = load_teacher(
        spec, checkpoint=VAR(sizes).state_dict(), tokenizer=weights("var_vae"), device="cpu"
    )
    module = teacher.tokenizer.module
    yield "phi of each scale", torch.tensor(phi_of_scale(scales, 4)), t["out/phi_index"]
    tokens = stages_of(t, "in/idx", scales)
    codes = teacher.codebook[tokens]
    for k, latent in enumerate(module.quantize.latents(codes)):
        yield f"latent after scale {k}", latent, t[f"out/embed_to_fhat.{k}"]
    yield "latent after all scales", latent, t["out/embed_to_fhat.last"]
    yield "inputs", module.quantize.inputs(codes), t["out/idxBl_to_var_input"]
    latents = [*module.quantize.latents(codes)]
    for k in range(scales - 1):
        side = config["patch_nums"][k + 1]
        cells = module.quantize.seen_by(latents[k], k + 1).transpose(1, 2)
        yield f"input after scale {k}", cells.unflatten(-1, (side, side)), t[f"out/next_input.{k}"]
    decoded = module.decoder(module.post_quant_conv(t["in/fhat_to_img.f_hat"])).clamp(-1, 1)
    yield "image from a latent", decoded, t["out/fhat_to_img.image"]
    yield "image from ids", module.decode(codes), t["out/idxBl_to_img.last"]
    image = t["in/encode.image"]
    latent = module.quant_conv(module.encoder(image))
    yield "latent of an image", latent, t["out/encode.latent"]
    found = module.encode(image)
    yield "ids from image", found, stages_of(t, "out/img_to_idxBl", scales)
    *_, latent = module.quantize.latents(teacher.codebook[found])
    yield "quantised latent", latent, t["out/img_to_fhat.last"]
    rebuilt = module.decode(teacher.codebook[found])
    yield "reconstruction", rebuilt, t["out/img_to_reconstructed_img.last"]


def var_quant10(config: dict[str, Any], t: Tensors) -> Pairs:
    """The quantiser with the official ten scales."""
    sizes = VARVQConfig(
        ch=32,
        vocab_size=config["vocab_size"],
        z_channels=config["z_channels"],
        patch_nums=config["patch_nums"],
    )
    quantizer = MultiScaleQuantizer(sizes)
    load_into(quantizer, weights("var_quant10"), "var_quant10", frozenset({"ema_vocab_hit_SV"}))
    yield "phi of each scale", torch.tensor(phi_of_scale(10, 4)), t["out/phi_index"]
    found = quantizer.encode(t["in/f"])
    yield "ids", found, stages_of(t, "out/f_to_idxBl", 10)
    *_, latent = quantizer.latents(quantizer.codebook[found])
    yield "quantised latent", latent, t["out/f_to_fhat.last"]
    codes = quantizer.codebook[stages_of(t, "in/idx", 10)]
    *_, latent = quantizer.latents(codes)
    yield "latent", latent, t["out/embed_to_fhat.last"]
    yield "inputs", quantizer.inputs(codes), t["out/idxBl_to_var_input"]


def var(config: dict[str, Any], t: Tensors) -> Pairs:
    """VAR."""
    teacher = _var(config, config["vae"])
    scales = len(config["patch_nums"])
    tokens = stages_of(t, "in/train.idx", scales)
    inputs = teacher.model.quantizer.inputs(teacher.codebook[tokens])
    yield "inputs", inputs, t["out/train.x_BLCv_wo_first_l"]
    yield (
        "training logits",
        teacher.guided_logits(t["in/train.label"], tokens),
        t["out/train.logits"],
    )
    label = t["in/gen.label"]
    for name, settings in config["gen"].items():
        ids = stages_of(t, f"out/gen.{name}.ids", scales)
        raw = forced(teacher, with_null(teacher, label), ids)
        yield f"{name}: cached logits", raw, t[f"out/gen.{name}.raw_logits"]
        guided = teacher.guided_logits(label, ids, settings["cfg"])
        yield f"{name}: guided logits", guided, t[f"out/gen.{name}.combined_logits"]
        greedy = teacher.sample(label, cfg=settings["cfg"], top_k=1)
        yield f"{name}: greedy ids", greedy, ids
        *_, latent = teacher.model.quantizer.latents(teacher.codebook[ids])
        yield f"{name}: latent", latent, t[f"out/gen.{name}.f_hat"]
        if f"out/gen.{name}.image" in t:
            yield f"{name}: image", teacher.decode(ids), t[f"out/gen.{name}.image"]


def var_filter(config: dict[str, Any], t: Tensors) -> Pairs:
    """VAR's filters; there 0 turns top-p off."""
    for name, s in config["settings"].items():
        filtered = filter_logits(
            t["in/logits"], 1.0, s["top_k"], s["top_p"] or 1.0, top_p_filter_from_below
        )
        yield f"{name}: filtered", filtered, t[f"out/{name}.filtered"]


def var_dd(config: dict[str, Any], t: Tensors) -> Pairs:
    """The student of VAR."""
    student = _var_student(config, config["vae"])
    x, label, steps = t["in/forward.x"], t["in/forward.label"], t["in/forward.t"]
    allowed = student.model.attn_bias_for_masking[0, 0] == 0
    yield "attention mask", allowed, t["out/attn_allowed"]
    logits, codes = student.predict(x, label, steps)
    yield "logits", logits, t["out/forward.x_BLV"]
    yield "codes", codes, t["out/forward.x_BLCv"]
    given = given_tokens(student.stages, steps)
    at = given_tokens(student.stages, steps.clamp_max(len(student.stages) - 1))
    x_t = keep_data(x, t["in/noise"][:1].expand_as(x), at)
    yield "X_t", x_t, t["out/perturb.out"]
    yield "codes, data kept", keep_data(x, codes, given), t["out/final_predict.conti"]
    kept = data_as_logits(student, x, logits, given)
    yield "logits, data kept", kept, t["out/final_predict.logits"]
    for name, (schedule, split) in config["t_lists"].items():
        yield from jumps_of(student, t, name, schedule, split)


def var_dd_init(config: dict[str, Any], t: Tensors) -> Pairs:
    """A VAR student's start from its teacher, as published; rows drawn at random are left out."""
    sizes = some(config, ("depth", "embed_dim", "num_heads", "num_classes", "patch_nums"))
    vae = config["vae"]
    sizes |= {"vocab_size": vae["vocab_size"], "codebook_dim": vae["z_channels"]}
    student, teacher = VARStudent(VARStudentConfig(**sizes)), VAR(VARConfig(**sizes))
    after = initialised(student, "var_init_before", teacher, "var_init_teacher")
    for name, value in after.items():
        expected = t[f"out/after/{name}"]
        if name == "n_d_embed.weight":
            continue
        if name in ("class_emb.weight", "pos_1LC"):
            rows = [k for k in range(expected.shape[-2]) if k != 1]
            value, expected = value[..., rows, :], expected[..., rows, :]
        yield name, value, expected


def var_teacher(config: dict[str, Any], t: Tensors) -> Pairs:
    """VAR students with a part of the teacher, its prefix unmasked as upstream's and masked."""
    teacher = _var(config["var"], config["vae"])
    starts = teacher.stage_starts()
    for name, s in config["continuation"].items():
        first, last = s["start_t"], s["end_point"]
        prefix = t["in/prefix_ids"][:, : starts[first]] if first else None
        ids = t[f"out/continuation.{name}.ids"]
        both = with_null(teacher, t["in/label"])
        logits = forced(teacher, both, ids, prefix, unmasked_prefix=prefix is not None)
        guided = torch.cat(
            [
                teacher.model.guide(*part.chunk(2), s["cfg"], first + k)
                for k, part in enumerate(logits.split(teacher.stages[first:last], 1))
            ],
            1,
        )
        yield f"{name}: guided logits", guided, t[f"out/continuation.{name}.combined_logits"]
        empty = t["in/prefix_ids"][:, :0]
        start = empty if prefix is None else prefix
        found = continued(teacher, t, start, last, cfg=s["cfg"], unmasked_prefix=True)
        yield f"{name}: greedy ids", found[:, starts[first] :], ids
        codes = teacher.codebook[found]
        yield f"{name}: codes", codes, t[f"out/continuation.{name}.sequence"]
        if last == len(teacher.stages):
            yield f"{name}: image", teacher.decode(found), t[f"out/continuation.{name}.image"]
        if prefix is None:
            continue
        masked = forced(teacher, both, ids[:, : teacher.stages[first]], prefix)
        masked = teacher.model.guide(*masked.chunk(2), s["cfg"], first)
        expected = t[f"out/continuation.{name}.block_causal_first_scale_logits"]
        yield f"{name}: logits, masked prefix", masked, expected
    student = _var_student(config["dd"], config["vae"])
    for name, s in config["pipelines"].items():
        last, start = s["t_list"][1], s["t_teacher_start"]
        codes = student.generate(
            t["in/label"],
            noise=t["in/noise"],
            schedule=with_teacher(start, last),
            split=s["split_t"],
            teacher=teacher,
            cfg=s["cfg"],
            top_k=1,
            unmasked_prefix=True,
        )
        yield f"{name}: codes", codes, t[f"out/{name}.sequence"]
        yield f"{name}: image", student.decode(codes), t[f"out/{name}.image"]
