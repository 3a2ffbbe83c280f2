"""LlamaGen's golden cases: every quantity of the fixtures beside ddray's own."""

from typing import Any

import torch
import torch.nn.functional as F
from golden_cases import (
    Pairs,
    Tensors,
    continued,
    data_as_logits,
    forced,
    initialised,
    jumps_of,
    some,
    weights,
    with_null,
    with_teacher,
)
from torch import Tensor

from ddray.method.conditioning import concatenate, left_padded
from ddray.method.guidance import filter_logits
from ddray.method.student import Student, given_tokens, keep_data
from ddray.method.teacher import Teacher
from ddray.models.llamagen import LlamaGen, LlamaGenConfig, rope_table
from ddray.models.llamagen_dd import LlamaGenStudent, LlamaGenStudentConfig
from ddray.models.zoo import load_student, load_teacher

_LLAMAGEN = ("dim", "n_layer", "n_head", "multiple_of", "vocab_size", "block_size", "norm_eps")
_LLAMAGEN_CLASSES = (*_LLAMAGEN, "num_classes", "rope_base")
_LLAMAGEN_VQ = ("codebook_size", "codebook_embed_dim", "z_channels", "ch", "ch_mult")


def _llamagen(config: dict[str, Any], vq: dict[str, Any] | None = None) -> Teacher:
    spec = {"family": "llamagen", **some(config, _LLAMAGEN_CLASSES), "tokenizer": None}
    if vq:
        spec["tokenizer"] = some(vq, _LLAMAGEN_VQ)
    tokenizer = weights("lg_vq") if vq else None
    return load_teacher(spec, checkpoint=weights("lg_c2i"), tokenizer=tokenizer, device="cpu")


def _llamagen_student(config: dict[str, Any], split: int) -> Student:
    vq = config["vq"]
    spec = {"family": "llamagen-dd", **some(config, (*_LLAMAGEN_CLASSES, "codebook_dim"))}
    spec |= {"tokenizer": some(vq, _LLAMAGEN_VQ), "split": split}
    source = {"ema": weights("lg_dd")}
    return load_student(spec, checkpoint=source, tokenizer=weights("lg_vq"), device="cpu")


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
        both = with_null(teacher, cond) if cfg > 1 else cond
        yield (
            f"{name}: cached logits",
            forced(teacher, both, tokens),
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
    sizes = some(config, (*_LLAMAGEN, "caption_dim", "cls_token_num"))
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
        raw = forced(teacher, both, tokens)
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
        "tokenizer": some(config, _LLAMAGEN_VQ),
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
    kept = data_as_logits(student, x, logits, given)
    yield "logits, data kept", kept, t["out/final_predict.logits"]
    yield "nearest ids", student.tokenizer.module.nearest(x), t["out/final_predict.idx"]
    for name, schedule in config["t_lists"].items():
        yield from jumps_of(student, t, name, schedule, config["split_t"])


def lg_dd_init(config: dict[str, Any], t: Tensors) -> Pairs:
    """A LlamaGen student's start from its teacher, as published."""
    names = ("dim", "n_layer", "n_head", "multiple_of", "vocab_size", "block_size", "num_classes")
    sizes = some(config, names)
    student = LlamaGenStudent(LlamaGenStudentConfig(**sizes, codebook_dim=config["codebook_dim"]))
    after = initialised(
        student, "lg_init_before", LlamaGen(LlamaGenConfig(**sizes)), "lg_init_teacher"
    )
    for name, value in after.items():
        yield name, value, t[f"out/after/{name}"]


def lg_teacher(config: dict[str, Any], t: Tensors) -> Pairs:
    """LlamaGen students with a part of the teacher."""
    teacher = _llamagen(config["gpt"], config["vq"])
    prefix = t["in/prefix"]
    yield "codebook", teacher.codebook, t["out/codebook"]
    for name, s in config["continuation"].items():
        tokens = t[f"out/continuation.{name}.tokens"]
        count = s["max_new_tokens"]
        both = with_null(teacher, t["in/label"])
        raw = forced(teacher, both, tokens[:, prefix.shape[1] :], prefix)
        yield f"{name}: cached logits", raw, t[f"out/continuation.{name}.raw_logits"]
        conditional, null = raw.chunk(2)
        guided = teacher.model.guide(conditional, null, s["cfg_scale"], None)
        if s["cfg_interval"] >= 0:
            guided[:, s["cfg_interval"] + 2 :] = conditional[:, s["cfg_interval"] + 2 :]
        yield f"{name}: guided logits", guided, t[f"out/continuation.{name}.combined_logits"]
        settings = {"cfg": s["cfg_scale"], "cfg_interval": s["cfg_interval"]}
        found = continued(teacher, t, prefix, prefix.shape[1] + count, **settings)
        yield f"{name}: greedy ids", found, tokens
    for name, s in config["pipelines"].items():
        student = _llamagen_student({**config["dd"], "vq": config["vq"]}, s["split_t"])
        last, start = s["t_list"][1], s["teacher_start_t"]
        codes = student.generate(
            t["in/label"],
            noise=t["in/noise"],
            schedule=with_teacher(start, last),
            teacher=teacher,
            cfg=s["cfg_scale"],
            top_k=1,
        )
        yield f"{name}: codes", codes, t[f"out/{name}.sequence"]
        yield f"{name}: image", student.decode(codes), t[f"out/{name}.image"].clamp(0, 1)
