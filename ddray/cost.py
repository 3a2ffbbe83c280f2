"""What jobs cost, as far as their sizes tell: operations, memory, GPU hours, bytes, passes.

Arithmetic on sizes, for networks on the meta device too. A multiplication and an addition count as
two operations; what is no matrix product is left out, and causal attention counts as full, as is
usual for figures of utilisation.

Shapes: B rows of a step, T condition tokens, L image tokens, S = T + L, V codebook size, C model
width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ddray.config.distillation import DistillConfig
from ddray.config.encoding import EncodeConfig
from ddray.config.evaluation import ROWS, EvaluateConfig
from ddray.config.generation import GenerateConfig
from ddray.config.sampling import SampleConfig
from ddray.config.serving import ServeConfig
from ddray.errors import DDRayError, ShardError, StorageError, one_line
from ddray.method.schedule import num_steps, parse_schedule
from ddray.models.catalog import BUNDLED_MODELS
from ddray.models.sizes import (
    ModelSizes,
    blocks_of,
    forward_flops,
    lengths_of,
    model_sizes,
    step_flops,
    vocabulary_of,
    width_of,
)
from ddray.models.zoo import empty_masked, empty_student
from ddray.sets.batch_size import batch_size, image_bytes
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage
from ddray.storage.checkpoint import MODEL_FILE
from ddray.text.loading import caption_cost, own_encoder, own_folders

# Peak operations a second without sparsity, in 16 and in 32 bits, by a part of the device's name;
# from NVIDIA's data sheets. The first that fits counts.
_PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
}
_ASSUMED_MFU = 0.4
# Decoding one stage after the other is bound by memory and by launches, not by arithmetic.
_ASSUMED_SAMPLING_MFU = 0.02
# Evaluations of the transport's velocity at the published sizes of codebook, at most.
_EVALUATIONS = 48
# Of a caption of ten words, with the end of the text.
_CAPTION_POSITIONS = 15
# That every published T5 knows.
_T5_PIECES = 32128

# Bytes that a block keeps for its backward pass, for each position and unit of C; of a logit and
# what becomes of it in the loss; and of all else. Measured (tests/core/test_cost.py).
_BLOCK_BYTES = {"float32": 94, "bfloat16": 57, "float16": 57}
# Attention of a CPU stays in float32 (`ddray.models.attention.attend`).
_WIDER_ATTENTION_BYTES = 8
_LOGIT_BYTES = {"float32": 12, "bfloat16": 14, "float16": 14}
_REST_BYTES = 21


def mfu(
    flops_per_step: float, seconds_per_step: float, device_name: str, workers: int
) -> float | None:
    """Share of the devices' 16-bit peak that a training reaches; None for an unknown device.

    Args:
        flops_per_step: over all workers.
        seconds_per_step: measured.
        device_name: as `torch.cuda.get_device_name()` gives it.
        workers: devices.
    """
    peaks = _peaks(device_name)
    return None if peaks is None else flops_per_step / seconds_per_step / peaks[0] / workers


def _peaks(device_name: str) -> tuple[float, float] | None:
    return next((peaks for part, peaks in _PEAKS.items() if part in device_name), None)


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    Attributes:
        weights: float32, as the network has them.
        masters: ZeRO's float32 copy that the optimizer moves.
        gradients: float32.
        moments: AdamW's two.
        average: the moving average.
        autocast: 16-bit copies of the weights, where the forward pass is in 16 bits.
        activations: what the backward pass needs, about.
        offloaded: of these, on the CPU.
    """

    weights: float
    masters: float
    gradients: float
    moments: float
    average: float
    autocast: float
    activations: float
    offloaded: float

    @property
    def on_device(self) -> float:
        """What must fit on the worker's device, beside buffers of DeepSpeed and fragments."""
        states = self.weights + self.masters + self.gradients + self.moments + self.average
        return states + self.autocast + self.activations - self.offloaded


def memory(student: nn.Module, config: DistillConfig, workers: int) -> Memory:
    """What a worker holds, by ZeRO stage.

    Args:
        student: network, on any device.
        config: the job.
        workers: over which ZeRO parts it.
    """
    whole = 4.0 * sum(parameter.numel() for parameter in student.parameters())
    part = whole / workers if config.zero else whole
    masters = part if config.zero else 0.0
    gradients = {0: whole, 1: whole + part, 2: part, 3: part}[config.zero]
    on_cpu = masters + 2 * part + part if config.offload_optimizer else 0.0
    return Memory(
        weights=part if config.zero == 3 else whole,
        masters=masters,
        gradients=gradients,
        moments=2 * part,
        average=part,
        autocast=0.0 if config.precision == "float32" else whole / 2,
        activations=_activation_bytes(student, config, workers),
        offloaded=on_cpu,
    )


def _activation_bytes(student: nn.Module, config: DistillConfig, workers: int) -> float:
    rows = config.batch_size // workers // config.accumulation
    condition, tokens = lengths_of(student)
    block, depth = _BLOCK_BYTES[config.precision], len(blocks_of(student))
    if config.precision != "float32" and not config.use_gpu:
        block += _WIDER_ATTENTION_BYTES
    # With checkpointing a block keeps its input, in a VAR also the marks of noise and data, and
    # one block at a time the rest.
    inputs = 8 if hasattr(student, "layerwise_n_d_embed") else 4
    kept = inputs * depth + block if config.activation_checkpointing else block * depth
    hidden = (condition + tokens) * width_of(student) * (kept + _REST_BYTES)
    return float(rows * (hidden + tokens * vocabulary_of(student) * _LOGIT_BYTES[config.precision]))


def estimate_sample(
    config: SampleConfig, assumed_mfu: float = _ASSUMED_SAMPLING_MFU
) -> dict[str, Any]:
    """What a set of trajectories will write and take, for `--dry-run`.

    Args:
        config: the job; the teacher's sizes are enough.
        assumed_mfu: share of a GPU's peak that is reached.

    Returns:
        Values by name, for people.

    Raises:
        ConfigError: for an unknown teacher.
    """
    try:
        student = empty_student(config.teacher)
    except StorageError as error:
        return {"cost": f"unknown without the teacher: {one_line(error)}"}
    tokens, codes = sum(student.stages), vocabulary_of(student)
    bytes_per_token = 2 if codes <= 2**16 else 4
    told: dict[str, Any] = {
        "shards": -(-config.count // config.shard_rows),
        "batch_size": _batch(config, student),
        "stages_per_image": len(student.stages),
        "megabytes": round(config.count * tokens * bytes_per_token / 1e6, 2),
    }
    if config.num_gpus:
        # Guidance takes every stage twice; an evaluation is two products with the codebook.
        evaluations = config.num_evals or _EVALUATIONS
        transport = evaluations * 4 * codes * student.config.codebook_dim * tokens
        flops = config.count * (2 * forward_flops(student) + transport)
        workers = math.ceil(round(config.workers[1] * config.num_gpus, 4))
        told["gpu_hours"] = _gpu_hours(flops, config.dtype, workers, assumed_mfu)
        told["assumed"] = f"{assumed_mfu:.0%} of the GPU's peak in {config.dtype}; not measured"
    if student.conditioning == "text":
        encoder = config.text_encoder or own_encoder(model_sizes(config.teacher).config)
        told |= _encoding(encoder, 2 * forward_flops(student))
    return told


def _encoding(encoder: str, flops: float) -> dict[str, str]:
    """The text encoder's operations beside those of the model that it works for, if it has any.

    Args:
        encoder: name or folder.
        flops: of the model, for an image.
    """
    try:
        own = caption_cost(encoder, _CAPTION_POSITIONS).flops
    except DDRayError as error:
        return {"text_encoder": f"{encoder}; not counted: {one_line(error)}"}
    if not own:
        return {}
    return {
        "text_encoder": f"{encoder}, {own / (own + flops):.1%} of all operations where a caption "
        f"has {_CAPTION_POSITIONS} positions; none where features are given"
    }


def estimate_encode(config: EncodeConfig, assumed_mfu: float = _ASSUMED_MFU) -> dict[str, Any]:
    """What features of captions will take, for `--dry-run`.

    Args:
        config: the job.
        assumed_mfu: share of a GPU's peak that is reached.

    Returns:
        Values by name, for people.
    """
    positions = min(_CAPTION_POSITIONS, config.length)
    try:
        cost, padded = (caption_cost(config.text_encoder, n) for n in (positions, config.length))
    except DDRayError as error:
        return {"cost": f"unknown without the encoder: {one_line(error)}"}
    gigabytes = [_rounded(2 * config.count * x.numbers / 1e9) for x in (cost, padded)]
    told: dict[str, Any] = {
        "shards": -(-config.count // config.shard_rows),
        "gigabytes": f"{gigabytes[0]:g} where a caption has {positions} positions; padded to "
        f"{config.length}, as they are not, {gigabytes[1]:g}",
    }
    if config.num_gpus and cost.flops:
        workers = math.ceil(round(config.workers[1] * config.num_gpus, 4))
        told["gpu_hours"] = _gpu_hours(config.count * cost.flops, "bfloat16", workers, assumed_mfu)
        told["assumed"] = f"{assumed_mfu:.0%} of the GPU's peak in bfloat16; not measured"
    return told


def estimate_generate(config: GenerateConfig) -> dict[str, Any]:
    """What a set of images will write and take, for `--dry-run`.

    Args:
        config: the job; the student's sizes are enough.

    Returns:
        Values by name, for people; of images their pixels, as their files depend on what they show.
    """
    try:
        model = model_sizes(config.student)
        steps = num_steps(parse_schedule(config.schedule or "0", len(model.stages)))
    except DDRayError as error:
        return {"cost": f"unknown without the student: {one_line(error)}"}
    told: dict[str, Any] = {
        "shards": -(-config.count // config.shard_rows),
        "batch_size": _batch(config, model.network),
        "forward_passes_per_image": steps,
        "gigabytes_an_actor": _weights(model.gigabytes, _encoders(config, [model])),
    }
    if config.content == "tokens":
        told["megabytes"] = _rounded(config.count * sum(model.stages) * model.token_bytes / 1e6)
    else:
        told["megabytes_of_pixels"] = _rounded(config.count * model.pixels / 1e6)
        told["files"] = f"{config.image_format}, so smaller than their pixels; not estimated"
    if model.network.conditioning == "text":
        encoder = config.text_encoder or own_encoder(model.config)
        told |= _encoding(encoder, steps * forward_flops(model.network))
    return told


def estimate_serve(config: ServeConfig) -> dict[str, Any]:
    """What a service will hold and ask for, for `--dry-run`; how much it makes has to be measured.

    Args:
        config: the job; the students' sizes are enough.

    Returns:
        Values by name, for people.
    """
    try:
        students = [model_sizes(name) for name in config.student]
        teachers = [model_sizes(name) for name in _teachers(config, students)]
    except DDRayError as error:
        return {"cost": f"unknown without the students: {one_line(error)}"}
    held = sorted((model.gigabytes for model in students), reverse=True)
    weights = sum(held[: config.models_per_replica]) + sum(model.gigabytes for model in teachers)
    fewest, most = config.replicas
    number = f"{fewest} to {most}" if fewest < most else str(most)
    told = {
        "replicas": f"{number}, each of {config.threads} CPUs and {config.num_gpus:g} GPUs",
        "gigabytes_a_replica": _weights(weights, _encoders(config, students)),
        "images_admitted_at_a_time": config.admission_limit,
        "forward_passes_per_image": "1 a jump of the request's schedule",
    }
    stages = [len(model.stages) for model in teachers]
    if stages:
        told["forward_passes_of_the_teacher"] = " or ".join(map(str, sorted({*stages})))
    return told


def estimate_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """What an evaluation will make, for `--dry-run`: values by name, for people.

    Args:
        config: the job; the sizes of both models are enough.
    """
    if config.samples is not None:
        return {"cost": "one pass of the feature network for each image"}
    try:
        student = model_sizes(config.student)
        teacher = model_sizes(config.teacher or student.teacher or config.student)
    except DDRayError as error:
        return {"cost": f"unknown without the student: {one_line(error)}"}
    stages, sweep = len(teacher.stages), math.prod(map(len, config.sampling_sweep.values()))
    wanted = config.rows or ROWS
    passes = {
        "teacher": stages * sweep,
        "transport": 0 if config.data else stages,  # a set holds them already
        "skip": sum(stages - skip + 1 for skip in config.skip) * sweep,
    }
    steps = [num_steps(parse_schedule(schedule, stages)) for schedule in config.student_schedules]
    jumps = (steps or range(1, student.jumps + 1)) if "student" in wanted else [0]
    return {
        "images_of_every_generator": config.num_images,
        "forward_passes_of_the_teacher": f"{sum(passes[row] for row in passes if row in wanted)} "
        "for each image",
        "forward_passes_of_the_student": " + ".join(map(str, jumps)) + " for each image",
        "gigabytes": _weights(student.gigabytes + teacher.gigabytes, _encoders(config, [student])),
        "speed": f"{len(config.speed_batches)} figures a row, each of "
        f"{config.speed_seconds:g} s or 4 runs, whichever is longer",
    }


def _encoders(
    config: GenerateConfig | ServeConfig | EvaluateConfig, models: Sequence[ModelSizes]
) -> list[str]:
    """Text encoders that models of captions read, each once, however many read it."""
    of_captions = [model for model in models if model.network.conditioning == "text"]
    return sorted({config.text_encoder or own_encoder(model.config) for model in of_captions})


def _weights(gigabytes: float, encoders: Sequence[str]) -> str:
    """Gigabytes of models and of what reads their captions."""
    try:
        read = sum(map(_encoder_gigabytes, encoders))
    except DDRayError as error:
        return f"{_rounded(gigabytes):g} of weights, without the text encoder: {one_line(error)}"
    named = f", {_rounded(read):g} of these of {' and '.join(encoders)}" if encoders else ""
    return f"{_rounded(gigabytes + read):g} of weights{named}"


def _encoder_gigabytes(encoder: str) -> float:
    """Weights of a text encoder where it works: a T5's in bfloat16, ours in float32."""
    if folders := own_folders(encoder):
        # float16 on the disk
        return sum(2 * open_storage(folder).list()[MODEL_FILE] / 1e9 for folder in folders)
    cost = caption_cost(encoder, 1)
    # A weight is multiplied and added once for a position, and pieces are looked up.
    return 2 * (cost.flops / 2 + _T5_PIECES * cost.numbers) / 1e9


def _batch(config: SampleConfig | GenerateConfig, network: nn.Module) -> str:
    """Rows of a batch, and on a GPU what they need there."""
    rows = batch_size(config, network)
    if not config.num_gpus:
        return str(rows)
    needed = rows * image_bytes(config, network) / 1e9
    return f"{rows} ({_rounded(needed):g} GB beside the weights)"


def _teachers(config: ServeConfig, students: Sequence[ModelSizes]) -> list[str]:
    """Teachers that a service loads beside its students."""
    bundled = set(config.student) <= set(BUNDLED_MODELS)
    wanted = bundled if config.teacher is None else config.teacher
    return sorted({student.teacher for student in students if student.teacher}) if wanted else []


def estimate_distill(config: DistillConfig, assumed_mfu: float = _ASSUMED_MFU) -> dict[str, Any]:
    """What a run will take, for `--dry-run`.

    Args:
        config: the job; its set need not be there if it names a teacher.
        assumed_mfu: share of a GPU's peak that is reached, recomputation counted as work.

    Returns:
        Values by name, for people.

    Raises:
        ConfigError: for an unknown teacher.
    """
    plan, teacher = None, config.teacher
    try:
        plan = TrajectorySet.open(config.data).plan
        teacher = teacher or plan.teacher
    except (ShardError, StorageError) as error:
        if teacher is None:
            return {"cost": f"unknown without set or teacher: {one_line(error)}"}
    assert teacher is not None
    empty = empty_student if config.objective == "distilled" else empty_masked
    student, workers = empty(teacher), config.workers[1]
    flops, needed = step_flops(student, config.batch_size), memory(student, config, workers)
    rows = config.steps * config.batch_size
    told: dict[str, Any] = {
        "student": f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f} million parameters",
        "rows": f"{rows} ({rows / plan.count:.1f} epochs of {plan.count})" if plan else rows,
        "teraflops_per_step": _rounded(flops / 1e12),
        "exaflops": _rounded(flops * config.steps / 1e18),
        "gigabytes_a_worker": _gigabytes(needed),
    }
    if config.use_gpu:
        again = 4 / 3 if config.activation_checkpointing else 1.0
        told["gpu_hours"] = _gpu_hours(
            flops * config.steps * again, config.precision, workers, assumed_mfu
        )
        told["assumed"] = f"{assumed_mfu:.0%} of the GPU's peak in {config.precision}; not measured"
    if plan and plan.text_encoder:
        told |= _encoding(plan.text_encoder, step_flops(student, 1))
    return told


def _gigabytes(needed: Memory) -> str:
    parts = {
        "weights and optimizer": needed.on_device - needed.activations,
        "activations": needed.activations,
        "on the CPU": needed.offloaded,
    }
    return ", ".join(f"{_rounded(x / 1e9):g} {what}" for what, x in parts.items() if x)


def _gpu_hours(flops: float, precision: str, workers: int, assumed_mfu: float) -> str:
    which = int(precision == "float32")
    parts = []
    for name in ("H100", "A100"):
        hours = flops / (_PEAKS[name][which] * assumed_mfu) / 3600
        parts.append(
            f"{_rounded(hours):g} of {name}s ({_rounded(hours / workers):g} h on {workers})"
        )
    return " or ".join(parts)


def _rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")
