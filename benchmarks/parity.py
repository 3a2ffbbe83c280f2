"""How far ddray is from the published code: every golden case, quantity by quantity.

    python benchmarks/parity.py [--markdown]

The fixtures in tests/golden hold what the public modules computed on tiny random models (see its
README). Floats pass within 2e-4 + 1e-4 |expected|; integers, booleans and infinities exactly.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ddray.method.conditioning import concatenate, left_padded
from ddray.method.flow import full_float32
from ddray.method.guidance import filter_logits, top_p_filter_from_below
from ddray.method.student import Student, given_tokens, keep_data
from ddray.method.teacher import Teacher
from ddray.models.llamagen import LlamaGen, LlamaGenConfig, rope_table
from ddray.models.llamagen_dd import LlamaGenStudent, LlamaGenStudentConfig
from ddray.models.var import VAR, VARConfig
from ddray.models.var_dd import VARStudent, VARStudentConfig
from ddray.models.var_vq import MultiScaleQuantizer, VARVQConfig, phi_of_scale
from ddray.models.zoo import load_student, load_teacher
from ddray.storage.checkpoint import load_into

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
ABSOLUTE, RELATIVE = 2e-4, 1e-4

Tensors = dict[str, Tensor]
Pairs = Iterator[tuple[str, Tensor, Tensor]]
"""Name of a quantity, ddray's value, upstream's."""

_LLAMAGEN = ("dim", "n_layer", "n_head", "multiple_of", "vocab_size", "block_size", "norm_eps")
_LLAMAGEN_CLASSES = (*_LLAMAGEN, "num_classes", "rope_base")
_LLAMAGEN_VQ = ("codebook_size", "codebook_embed_dim", "z_channels", "ch", "ch_mult")
_VAR = ("depth", "embed_dim", "num_heads", "mlp_ratio", "attn_l2_norm", "num_classes", "patch_nums")
_VAR_VQ = ("vocab_size", "z_channels", "ch", "ch_mult", "num_res_blocks", "patch_nums")


def weights(name: str) -> Tensors:
    """A state dict of the fixtures."""
    return load_file(GOLDEN / "weights" / f"{name}.safetensors")


def _some(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: config[name] for name in names}


def _llamagen(config: dict[str, Any], vq: dict[str, Any] | None = None) -> Teacher:
    spec = {"family": "llamagen", **_some(config, _LLAMAGEN_CLASSES), "tokenizer": None}
    if vq:
        spec["tokenizer"] = _some(vq, _LLAMAGEN_VQ)
    tokenizer = weights("lg_vq") if vq else None
    return load_teacher(spec, checkpoint=weights("lg_c2i"), tokenizer=tokenizer, device="cpu")


def _llamagen_student(config: dict[str, Any], split: int) -> Student:
    vq = config["vq"]
    spec = {"family": "llamagen-dd", **_some(config, (*_LLAMAGEN_CLASSES, "codebook_dim"))}
    spec |= {"tokenizer": _some(vq, _LLAMAGEN_VQ), "split": split}
    source = {"ema": weights("lg_dd")}
    return load_student(spec, checkpoint=source, tokenizer=weights("lg_vq"), device="cpu")


def _var(config: dict[str, Any], vae: dict[str, Any]) -> Teacher:
    spec = {"family": "var", **_some(config, _VAR), "tokenizer": _some(vae, _VAR_VQ)}
    return load_teacher(spec, checkpoint=weights("var"), tokenizer=weights("var_vae"), device="cpu")


def _var_student(config: dict[str, Any], vae: dict[str, Any]) -> Student:
    names = (*_VAR, "n_d_embed_enable", "layerwise_n_d_embed")
    spec = {"family": "var-dd", **_some(config, names), "tokenizer": _some(vae, _VAR_VQ)}
    source = {"trainer": {"ema_parameters": weights("var_dd")}}
    return load_student(spec, checkpoint=source, tokenizer=weights("var_vae"), device="cpu")


def _stages_of(tensors: Tensors, prefix: str, count: int) -> Tensor:
    """Ids of all scales, int64 [B, L]."""
    return torch.cat([tensors[f"{prefix}.{k}"] for k in range(count)], 1)


def _forced(
    teacher: Teacher, cond: Any, tokens: Tensor, prefix: Tensor | None = None, **options: bool
) -> Tensor:
    """Logits of every stage of a cached decoder that is told the tokens, [B, l, V]."""
    starts = teacher.stage_starts()
    decoder = teacher.model.decoder(cond, prefix, **options)
    first = 0 if prefix is None else starts.index(prefix.shape[1])
    rows, at, stage = [], 0, first
    while at < tokens.shape[1]:
        rows.append(decoder.logits())
        decoder.append(tokens[:, at : at + teacher.stages[stage]])
        at += teacher.stages[stage]
        stage += 1
    return torch.cat(rows, 1)


def _with_null(teacher: Teacher, cond: Tensor) -> Tensor:
    return torch.cat((cond, torch.full_like(cond, teacher.num_classes)))


def lg_c2i(config: dict[str, Any], t: Tensors) -> Pairs:
    """LlamaGen for classes."""
    teacher = _llamagen(config)
    codes = t["in/train.codes"]
    logits = teacher.guided_logits(t["in/train.cond"], codes)
    yield "training logits", logits, t["out/train.logits"]
    yield "loss", F.cross_entropy(logits.flatten(0, 1), codes.flatten())[None], t["out/train.loss"]
    table = rope_table(teacher.model.config, torch.device("cpu"))
    yield "rotary table", table, t["out/freqs_cis"]
    cond = t["in/gen.cond"]
    for name, settings in config["gen"].items():
        tokens, cfg = t[f"out/gen.{name}.tokens"], settings["cfg_scale"]
        both = _with_null(teacher, cond) if cfg > 1 else cond
        yield (
            f"{name}: cached logits",
            _forced(teacher, both, tokens),
            t[f"out/gen.{name}.raw_logits"],
        )
        greedy = teacher.sample(cond, cfg=cfg, top_k=1, cfg_interval=settings["cfg_interval"])
        yield f"{name}: greedy ids", greedy, tokens
        guided = teacher.guided_logits(cond, tokens, cfg)
        if settings["cfg_interval"] >= 0:
            first = settings["cfg_interval"] + 2
            guided[:, first:] = teacher.guided_logits(cond, tokens)[:, first:]
        yield f"{name}: guided logits", guided, t[f"out/gen.{name}.combined_logits"]


def lg_t2i(config: dict[str, Any], t: Tensors) -> Pairs:
    """LlamaGen for captions."""
    sizes = _some(config, (*_LLAMAGEN, "caption_dim", "cls_token_num"))
    spec = {"family": "llamagen", **sizes, "tokenizer": None}
    teacher = load_teacher(spec, checkpoint={"model": weights("lg_t2i")}, device="cpu")
    features, mask = t["in/caption.raw_right_padded"], t["in/caption.raw_mask"]
    captions = left_padded((features, mask), 120, config["caption_dim"], teacher.device)
    yield "left padding", captions.features_BTD, t["out/caption.left_padded"]
    yield "mask of the caption", captions.mask_BT.long(), t["out/caption.left_mask"]
    projected = teacher.model.cls_embedding(captions)
    yield "caption tokens", projected, t["out/train.caption_tokens"]
    length = config["cls_token_num"] + config["block_size"]
    allowed = teacher.model.attention_mask(captions, length)
    yield "attention mask", allowed, t["out/train.attn_mask"]
    asked, codes = (features, mask), t["in/train.codes"]
    logits = teacher.guided_logits(asked, codes)
    yield "training logits", logits, t["out/train.logits"]
    loss = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(1)
    valid = t["in/train.valid"]
    yield "loss", (loss * valid).sum()[None] / valid.sum(), t["out/train.loss_valid"]
    # Upstream without a mask reads the left-padded rows as they are: all of them valid.
    unmasked = (captions.features_BTD, torch.ones_like(mask))
    logits = teacher.guided_logits(unmasked, codes)
    yield "logits, no mask", logits, t["out/train_nomask.logits"]
    loss = F.cross_entropy(logits.transpose(1, 2), codes)[None]
    yield "loss, no mask", loss, t["out/train_nomask.loss"]
    for name, settings in config["gen"].items():
        given = asked if settings.get("use_mask", True) else unmasked
        tokens, cfg = t[f"out/gen.{name}.tokens"], settings["cfg_scale"]
        cond = teacher.condition(given)
        both = concatenate(cond, teacher.model.null(cond)) if cfg > 1 else cond
        raw = _forced(teacher, both, tokens)
        yield f"{name}: cached logits", raw, t[f"out/gen.{name}.raw_logits"]
        guided = teacher.guided_logits(given, tokens, cfg)
        yield f"{name}: guided logits", guided, t[f"out/gen.{name}.combined_logits"]
        yield f"{name}: greedy ids", teacher.sample(given, cfg=cfg, top_k=1), tokens


def _rows(cells: Tensor) -> Tensor:
    """[B, E, g, g] to [B, L, E] in raster order."""
    return cells.flatten(2).transpose(1, 2)


def lg_vq(config: dict[str, Any], t: Tensors) -> Pairs:
    """LlamaGen's tokenizer."""
    network = {"dim": 16, "n_layer": 1, "n_head": 2, "num_classes": 1, "vocab_size": 96}
    spec = {
        "family": "llamagen",
        **network,
        "block_size": 16,
        "tokenizer": _some(config, _LLAMAGEN_VQ),
    }
    sizes = LlamaGenConfig(**network, block_size=16)
    net = LlamaGen(sizes).state_dict()
    teacher = load_teacher(
        spec, checkpoint=net, tokenizer={"model": weights("lg_vq")}, device="cpu"
    )
    module = teacher.tokenizer.module
    yield "codebook", teacher.codebook, t["out/codebook_normalised"]
    ids = t["in/decode_code.indices"]
    yield "codes of ids", teacher.codebook[ids], _rows(t["out/decode_code.embeddings"])
    yield "image from ids", module.decode(teacher.codebook[ids]), t["out/decode_code.image"]
    codes = _rows(t["in/decode.embeddings"])
    yield "image from vectors", module.decode(codes), t["out/decode.image"]
    image = t["in/encode.image"]
    yield "latent", module.quant_conv(module.encoder(image)), t["out/encode.latent"]
    found = module.encode(image)
    yield "ids from image", found, t["out/encode.indices"]
    yield "codes of the image", teacher.codebook[found], _rows(t["out/encode.quant"])


def lg_filter(config: dict[str, Any], t: Tensors) -> Pairs:
    """LlamaGen's filters."""
    for name, s in config["settings"].items():
        filtered = filter_logits(t["in/logits"], s.get("temperature", 1.0), s["top_k"], s["top_p"])
        yield f"{name}: filtered", filtered, t[f"out/{name}.filtered"]
        yield f"{name}: probabilities", filtered.softmax(-1), t[f"out/{name}.probs"]


def var_filter(config: dict[str, Any], t: Tensors) -> Pairs:
    """VAR's filters; there 0 turns top-p off."""
    for name, s in config["settings"].items():
        filtered = filter_logits(
            t["in/logits"], 1.0, s["top_k"], s["top_p"] or 1.0, top_p_filter_from_below
        )
        yield f"{name}: filtered", filtered, t[f"out/{name}.filtered"]


def _jumps(student: Student, t: Tensors, name: str, steps: list[int], split: int) -> Pairs:
    codes = student.generate(t["in/label"], noise=t["in/noise"], schedule=steps, split=split)
    yield f"{name}: codes", codes, t[f"out/{name}.{len(steps) - 1}.sequence"]
    if f"out/{name}.f_hat" in t:
        *_, latent = student.tokenizer.module.quantize.latents(codes)
        yield f"{name}: latent", latent, t[f"out/{name}.f_hat"]
    if f"out/{name}.image" in t:
        yield f"{name}: image", student.decode(codes), t[f"out/{name}.image"].clamp(0, 1)


def lg_dd(config: dict[str, Any], t: Tensors) -> Pairs:
    """The student of LlamaGen."""
    student = _llamagen_student(config, config["split_t"])
    x, label, steps = t["in/forward.x"], t["in/forward.label"], t["in/forward.t"]
    logits, codes = student.predict(x, label, steps)
    yield "logits", logits, t["out/forward.logits"]
    yield "codes", codes, t["out/forward.tokens"]
    yield "codebook", student.codebook, t["out/codebook"]
    given = given_tokens(student.stages, steps)
    x_t = keep_data(x, t["in/noise"][:1].expand_as(x), given)
    yield "X_t", x_t, t["out/perturb.out"]
    yield "codes, data kept", keep_data(x, codes, given), t["out/final_predict.tokens"]
    kept = _data_as_logits(student, x, logits, given)
    yield "logits, data kept", kept, t["out/final_predict.logits"]
    yield "nearest ids", student.tokenizer.module.nearest(x), t["out/final_predict.idx"]
    for name, schedule in config["t_lists"].items():
        yield from _jumps(student, t, name, schedule, config["split_t"])


def var_vae(config: dict[str, Any], t: Tensors) -> Pairs:
    """VAR's tokenizer."""
    scales = len(config["patch_nums"])
    spec = {"family": "var", "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 1}
    spec |= {"patch_nums": config["patch_nums"], "tokenizer": _some(config, _VAR_VQ)}
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
    tokens = _stages_of(t, "in/idx", scales)
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
    yield "ids from image", found, _stages_of(t, "out/img_to_idxBl", scales)
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
    yield "ids", found, _stages_of(t, "out/f_to_idxBl", 10)
    *_, latent = quantizer.latents(quantizer.codebook[found])
    yield "quantised latent", latent, t["out/f_to_fhat.last"]
    codes = quantizer.codebook[_stages_of(t, "in/idx", 10)]
    *_, latent = quantizer.latents(codes)
    yield "latent", latent, t["out/embed_to_fhat.last"]
    yield "inputs", quantizer.inputs(codes), t["out/idxBl_to_var_input"]


def var(config: dict[str, Any], t: Tensors) -> Pairs:
    """VAR."""
    teacher = _var(config, config["vae"])
    scales = len(config["patch_nums"])
    tokens = _stages_of(t, "in/train.idx", scales)
    inputs = teacher.model.quantizer.inputs(teacher.codebook[tokens])
    yield "inputs", inputs, t["out/train.x_BLCv_wo_first_l"]
    yield (
        "training logits",
        teacher.guided_logits(t["in/train.label"], tokens),
        t["out/train.logits"],
    )
    label = t["in/gen.label"]
    for name, settings in config["gen"].items():
        ids = _stages_of(t, f"out/gen.{name}.ids", scales)
        raw = _forced(teacher, _with_null(teacher, label), ids)
        yield f"{name}: cached logits", raw, t[f"out/gen.{name}.raw_logits"]
        guided = teacher.guided_logits(label, ids, settings["cfg"])
        yield f"{name}: guided logits", guided, t[f"out/gen.{name}.combined_logits"]
        greedy = teacher.sample(label, cfg=settings["cfg"], top_k=1)
        yield f"{name}: greedy ids", greedy, ids
        *_, latent = teacher.model.quantizer.latents(teacher.codebook[ids])
        yield f"{name}: latent", latent, t[f"out/gen.{name}.f_hat"]
        if f"out/gen.{name}.image" in t:
            yield f"{name}: image", teacher.decode(ids), t[f"out/gen.{name}.image"]


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
    kept = _data_as_logits(student, x, logits, given)
    yield "logits, data kept", kept, t["out/final_predict.logits"]
    for name, (schedule, split) in config["t_lists"].items():
        yield from _jumps(student, t, name, schedule, split)


def _data_as_logits(student: Student, x: Tensor, logits: Tensor, given: Tensor) -> Tensor:
    """Upstream's logits where a token is given: 0 at the nearest id, -inf elsewhere."""
    nearest = student.tokenizer.module.nearest(x)[..., None]
    sure = torch.full_like(logits, -torch.inf).scatter(-1, nearest, 0.0)
    return torch.where(given[..., None], sure, logits)


def _with_teacher(start: int, last: int) -> str:
    """The schedule in which a teacher writes stages start, ..., last - 1."""
    part = f"teacher:{start}-{last},{last}"
    return f"0,{part}" if start else part


def _continue(teacher: Teacher, t: Tensors, prefix: Tensor, last: int, **settings: Any) -> Tensor:
    label = t["in/label"]
    index = torch.arange(len(label))
    return teacher.continue_from(label, prefix, last, seed=0, index=index, top_k=1, **settings)


def lg_teacher(config: dict[str, Any], t: Tensors) -> Pairs:
    """LlamaGen students with a part of the teacher."""
    teacher = _llamagen(config["gpt"], config["vq"])
    prefix = t["in/prefix"]
    yield "codebook", teacher.codebook, t["out/codebook"]
    for name, s in config["continuation"].items():
        tokens = t[f"out/continuation.{name}.tokens"]
        count = s["max_new_tokens"]
        both = _with_null(teacher, t["in/label"])
        raw = _forced(teacher, both, tokens[:, prefix.shape[1] :], prefix)
        yield f"{name}: cached logits", raw, t[f"out/continuation.{name}.raw_logits"]
        conditional, null = raw.chunk(2)
        guided = teacher.model.guide(conditional, null, s["cfg_scale"], None)
        if s["cfg_interval"] >= 0:
            guided[:, s["cfg_interval"] + 2 :] = conditional[:, s["cfg_interval"] + 2 :]
        yield f"{name}: guided logits", guided, t[f"out/continuation.{name}.combined_logits"]
        settings = {"cfg": s["cfg_scale"], "cfg_interval": s["cfg_interval"]}
        found = _continue(teacher, t, prefix, prefix.shape[1] + count, **settings)
        yield f"{name}: greedy ids", found, tokens
    for name, s in config["pipelines"].items():
        student = _llamagen_student({**config["dd"], "vq": config["vq"]}, s["split_t"])
        last, start = s["t_list"][1], s["teacher_start_t"]
        codes = student.generate(
            t["in/label"],
            noise=t["in/noise"],
            schedule=_with_teacher(start, last),
            teacher=teacher,
            cfg=s["cfg_scale"],
            top_k=1,
        )
        yield f"{name}: codes", codes, t[f"out/{name}.sequence"]
        yield f"{name}: image", student.decode(codes), t[f"out/{name}.image"].clamp(0, 1)


def var_teacher(config: dict[str, Any], t: Tensors) -> Pairs:
    """VAR students with a part of the teacher, its prefix unmasked as upstream's and masked."""
    teacher = _var(config["var"], config["vae"])
    starts = teacher.stage_starts()
    for name, s in config["continuation"].items():
        first, last = s["start_t"], s["end_point"]
        prefix = t["in/prefix_ids"][:, : starts[first]] if first else None
        ids = t[f"out/continuation.{name}.ids"]
        both = _with_null(teacher, t["in/label"])
        logits = _forced(teacher, both, ids, prefix, unmasked_prefix=prefix is not None)
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
        found = _continue(teacher, t, start, last, cfg=s["cfg"], unmasked_prefix=True)
        yield f"{name}: greedy ids", found[:, starts[first] :], ids
        codes = teacher.codebook[found]
        yield f"{name}: codes", codes, t[f"out/continuation.{name}.sequence"]
        if last == len(teacher.stages):
            yield f"{name}: image", teacher.decode(found), t[f"out/continuation.{name}.image"]
        if prefix is None:
            continue
        masked = _forced(teacher, both, ids[:, : teacher.stages[first]], prefix)
        masked = teacher.model.guide(*masked.chunk(2), s["cfg"], first)
        expected = t[f"out/continuation.{name}.block_causal_first_scale_logits"]
        yield f"{name}: logits, masked prefix", masked, expected
    student = _var_student(config["dd"], config["vae"])
    for name, s in config["pipelines"].items():
        last, start = s["t_list"][1], s["t_teacher_start"]
        codes = student.generate(
            t["in/label"],
            noise=t["in/noise"],
            schedule=_with_teacher(start, last),
            split=s["split_t"],
            teacher=teacher,
            cfg=s["cfg"],
            top_k=1,
            unmasked_prefix=True,
        )
        yield f"{name}: codes", codes, t[f"out/{name}.sequence"]
        yield f"{name}: image", student.decode(codes), t[f"out/{name}.image"]


def _initialised(student: nn.Module, before: str, teacher: nn.Module, trained: str) -> Tensors:
    load_into(teacher, weights(trained), trained)
    load_into(student, weights(before), before)
    student.init_from_teacher(teacher, torch.empty(0), faithful_to_upstream=True)
    return dict(student.state_dict())


def lg_dd_init(config: dict[str, Any], t: Tensors) -> Pairs:
    """A LlamaGen student's start from its teacher, as published."""
    names = ("dim", "n_layer", "n_head", "multiple_of", "vocab_size", "block_size", "num_classes")
    sizes = _some(config, names)
    student = LlamaGenStudent(LlamaGenStudentConfig(**sizes, codebook_dim=config["codebook_dim"]))
    after = _initialised(
        student, "lg_init_before", LlamaGen(LlamaGenConfig(**sizes)), "lg_init_teacher"
    )
    for name, value in after.items():
        yield name, value, t[f"out/after/{name}"]


def var_dd_init(config: dict[str, Any], t: Tensors) -> Pairs:
    """A VAR student's start from its teacher, as published; rows drawn at random are left out."""
    sizes = _some(config, ("depth", "embed_dim", "num_heads", "num_classes", "patch_nums"))
    vae = config["vae"]
    sizes |= {"vocab_size": vae["vocab_size"], "codebook_dim": vae["z_channels"]}
    student, teacher = VARStudent(VARStudentConfig(**sizes)), VAR(VARConfig(**sizes))
    after = _initialised(student, "var_init_before", teacher, "var_init_teacher")
    for name, value in after.items():
        expected = t[f"out/after/{name}"]
        if name == "n_d_embed.weight":
            continue
        if name in ("class_emb.weight", "pos_1LC"):
            rows = [k for k in range(expected.shape[-2]) if k != 1]
            value, expected = value[..., rows, :], expected[..., rows, :]
        yield name, value, expected


CASES: dict[str, Callable[[dict[str, Any], Tensors], Pairs]] = {
    case.__name__: case
    for case in (
        lg_c2i, lg_t2i, lg_vq, lg_filter, lg_dd, lg_dd_init, lg_teacher,
        var_vae, var_quant10, var, var_filter, var_dd, var_dd_init, var_teacher,
    )
}  # fmt: skip


class Outputs(dict[str, Tensor]):
    """Tensors of a case that note which of upstream's outputs were read."""

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.unread = {name for name in tensors if name.startswith("out/")}

    def __getitem__(self, name: str) -> Tensor:
        self.unread.discard(name)
        return super().__getitem__(name)


class Deviation(NamedTuple):
    """One quantity of one case.

    Attributes:
        quantity: what was compared.
        exact: whether it had to be equal: integers and booleans.
        largest: largest absolute difference.
        passed: whether every element is within the tolerance.
    """

    quantity: str
    exact: bool
    largest: float
    passed: bool


def compare(quantity: str, actual: Tensor, expected: Tensor) -> Deviation:
    """One comparison, by the pass rule of the fixtures."""
    if actual.shape != expected.shape:
        raise ValueError(f"{quantity}: {[*actual.shape]} instead of {[*expected.shape]}")
    if not expected.is_floating_point():
        return Deviation(quantity, True, float((actual != expected).sum()), actual.equal(expected))
    same = actual == expected  # infinities too
    difference = torch.where(same, 0.0, (actual - expected).abs())
    within = expected.isfinite() & (difference <= ABSOLUTE + RELATIVE * expected.abs())
    return Deviation(quantity, False, float(difference.max()), bool((same | within).all()))


@torch.inference_mode()
def deviations(case: str) -> tuple[list[Deviation], set[str]]:
    """All comparisons of a case, and the outputs that none of them reads.

    Those are steps on the way to an output that is compared: the input, argmax and codes of a
    student's earlier jump, and what a teacher wrote in the middle of a schedule.
    """
    config = json.loads((GOLDEN / "meta" / f"{case}.json").read_text())["config"]
    tensors = Outputs(load_file(GOLDEN / "io" / f"{case}.safetensors"))
    with full_float32(torch.device("cpu")):
        return [compare(*pair) for pair in CASES[case](config, tensors)], tensors.unread


def main() -> None:
    """Print a line a case, or a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="a table for docs/models.md")
    markdown = parser.parse_args().markdown
    if markdown:
        print("| case | what | quantities | exact | not compared | largest deviation | passed |")
        print("|---|---|---:|---:|---:|---:|---|")
    for case, make in CASES.items():
        found, unread = deviations(case)
        title = (make.__doc__ or "").rstrip(".")
        exact = sum(d.exact for d in found)
        largest = max((d.largest for d in found if not d.exact), default=0.0)
        passed = "yes" if all(d.passed for d in found) else "NO"
        if markdown:
            figures = f"{len(found)} | {exact} | {len(unread)} | {largest:.1e} | {passed}"
            print(f"| {case} | {title} | {figures} |")
            continue
        print(f"{case:12} {len(found):3} quantities, largest deviation {largest:.1e}: {passed}")
        if unread:
            print(f"    not compared: {', '.join(sorted(unread))}")
        for deviation in found:
            if not deviation.passed:
                print(f"    {deviation}")


if __name__ == "__main__":
    main()
