"""Images from a student, and from its teacher if there is one: the class behind all serving.

The same request must give the same bytes whatever shares its batch, and float32 results vary in
their last bits with the number of rows of a pass. But not with every number: on a CPU, passes of
one row alone sum in another order. So a renderer measures at its start which sizes of a pass agree
bit by bit, and uses no others.

Shapes: N images, C channels (1 or 3), H and W pixels, L tokens, E code width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.config.base import decoder_dtype
from ddray.errors import ConfigError
from ddray.method.memory import in_memory
from ddray.method.schedule import TEACHER_ALONE
from ddray.method.seeding import noise
from ddray.method.student import Student
from ddray.method.teacher import AskedFor, Teacher
from ddray.models.zoo import load_student, load_teacher
from ddray.sets.images.orders import RowsOrder
from ddray.text.encoder import TextEncoder
from ddray.text.loading import load_text_encoder, own_encoder

# Rows of the largest pass. More rows gain a CPU nothing (measured on digits: 8.4 ms an image at 8,
# 7.8 at 64, 14 at 1), and a pass of a GPU is as fast with 16 as with one.
_CPU_ROWS = 8
_GPU_ROWS = 16

# Captions whose features are kept. Those of flan-t5-xl, 120 x 2048 in bfloat16, take half a MB.
_KEPT_CAPTIONS = 256

_EncoderT = TypeVar("_EncoderT")


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image: all that decides its bytes, beside the student.

    Attributes:
        prompt: class id or caption.
        index: of its noise.
        seed: of its noise.
    """

    prompt: int | str = field(repr=False)
    index: int
    seed: int


class TextEncoders:
    """Text encoders of several students: each is held once, and as long as one of them reads it."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[tuple[str, int, str], TextEncoder] = WeakValueDictionary()

    def load(self, source: str, *, length: int, device: str | torch.device) -> TextEncoder:
        """As `load_text_encoder`, but for those that are there."""
        key = (source, length, str(device))
        encoder = self._held.get(key)
        if encoder is None:
            encoder = self._held[key] = load_text_encoder(source, length=length, device=device)
        return encoder


class Renderer:
    """A student on one device.

    Args:
        student: the student.
        teacher: for schedules in which it takes part.
        encoder: of captions, for a student of texts; online it reads a caption once while that is
            in use.
        rows: of the largest pass; None = what suits the device.
        text_encoder: name or folder of the encoder; empty where there is none.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None = None,
        encoder: TextEncoder | None = None,
        rows: int | None = None,
        text_encoder: str = "",
    ):
        self.student, self.teacher = student, teacher
        self._text_encoder = text_encoder
        # Around the encoder and no method: a renderer that held itself would not leave its GPU when
        # it is dropped. Threads that ask for a new caption at once may each encode it, to the same
        # bits.
        self._encode = None
        if encoder is not None:
            self._encode = lru_cache(_KEPT_CAPTIONS)(partial(_encoded_alone, encoder))
        self._encoder = encoder
        self._encoded_in_bulk, self._encodings_told = 0, 0
        on_cpu = student.device.type == "cpu"
        largest = rows or (_CPU_ROWS if on_cpu else _GPU_ROWS)
        self._largest = 1 << (largest.bit_length() - 1)
        # The passes of a student and a teacher in turn vary in more ways than could be measured.
        self._sizes_of_both = (min(2, self._largest) if on_cpu else self._largest,)
        if not on_cpu:
            # Few rows are another kernel of the transport, whose tokens differ once in thousands.
            self._sizes_of_teacher = self._sizes_of_both

    @classmethod
    def load(
        cls,
        student: str,
        *,
        teacher: bool = False,
        text_encoder: str | None = None,
        encoders: TextEncoders | None = None,
        rows: int | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        decode_dtype: str | None = None,
    ) -> "Renderer":
        """Load a student by its name or folder, and if wanted the teacher that its config names.

        Args:
            student: bundled name or model folder.
            teacher: whether to load it.
            text_encoder: of captions; None = the one that the student was trained with.
            encoders: that other students read already; None = of none.
            rows: see the class.
            device: where to compute.
            dtype: of the networks; "auto" as `load_student` means it.
            decode_dtype: of the decoder; None = `decoder_dtype(dtype)`.

        Raises:
            ConfigError: if there is no such model, or the config names no teacher.
            CheckpointError: if a model or the text encoder cannot be loaded.
        """
        pixels = decode_dtype or decoder_dtype(dtype)
        loaded = load_student(student, device=device, dtype=dtype, decode_dtype=pixels)
        encoder, source = None, ""
        if loaded.conditioning == "text":
            length = loaded.model.config.cls_token_num
            source = text_encoder or own_encoder(loaded.config)
            shared = encoders or TextEncoders()
            encoder = shared.load(source, length=length, device=loaded.device)
        name = loaded.config.get("teacher")
        if teacher and not name:
            raise ConfigError(f"the config of {student} names no teacher that could be deployed")
        if not teacher:
            return cls(loaded, None, encoder, rows, source)
        beside = load_teacher(str(name), device=device, dtype=dtype, decode_dtype=pixels)
        return cls(loaded, beside, encoder, rows, source)

    @property
    def held(self) -> dict[str, str]:
        """What decides the rows of a data set, named as in its plan."""
        codec = self.student.tokenizer
        return {
            "student_fingerprint": self.student.fingerprint,
            "tokenizer_fingerprint": codec.fingerprint,
            "decode_dtype": str(codec.decode_dtype).removeprefix("torch."),
            "text_encoder": self._text_encoder,
        }

    @cached_property
    def schedule(self) -> str:
        """Stages at which the student has learnt to jump."""
        return ",".join(map(str, self.student.config.get("schedule", (0,))))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows that a pass of the student may have, ascending; measured when first asked for."""
        return self._agreeing(self.schedule)

    @cached_property
    def _sizes_of_teacher(self) -> tuple[int, ...]:
        return self._agreeing(TEACHER_ALONE)

    def _agreeing(self, schedule: str) -> tuple[int, ...]:
        """Sizes of a pass whose results agree bit by bit.

        That they agree on one batch proves it for all: the order in which numbers are summed
        depends on shapes alone, and in thousands of random pixels another order would show.
        """
        prompts = self.some_prompts
        jobs = [ImageJob(prompts[k % len(prompts)], k, 0) for k in range(self._largest)]
        expected = self._pass(jobs, schedule)
        sizes = [1 << k for k in range(self._largest.bit_length())]
        agreeing = []
        for size in sizes:
            # Backwards: a row must not depend on its place either.
            order = list(range(self._largest))[::-1][:size]
            if torch.equal(self._pass([jobs[k] for k in order], schedule), expected[order]):
                agreeing.append(size)
        # Where even the same size gives other bits elsewhere, a row must be alone.
        return tuple(agreeing) if sizes[-1] in agreeing else (1,)

    def images(self, jobs: Sequence[ImageJob], schedule: str) -> npt.NDArray[np.uint8]:
        """Pixels of a mixed batch; each image's depend on its own job alone.

        Args:
            jobs: at least one, of any prompts and indices; of any seeds too, unless the teacher
                takes part.
            schedule: such as "0", "0,16" or "0,teacher:8-16,16", or `TEACHER_ALONE`.

        Returns:
            uint8 [N, H, W], or [N, H, W, 3].
        """
        if "teacher" not in schedule:
            sizes = self.sizes
        else:
            sizes = self._sizes_of_teacher if schedule == TEACHER_ALONE else self._sizes_of_both
        parts, done = [], 0
        while done < len(jobs):
            left = len(jobs) - done
            size = max((size for size in sizes if size <= left), default=sizes[0])
            part = [*jobs[done : done + size]]
            padded = part + part[-1:] * (size - len(part))
            parts.append(self._pass(padded, schedule)[: len(part)])
            done += len(part)
        return _pixels(torch.cat(parts))

    def rows(self, order: RowsOrder) -> npt.NDArray[Any]:
        """Rows of a data set in one pass, as its plan cuts them.

        Returns:
            Pixels as `images`, or tokens int64 [N, L].
        """
        jobs = [
            ImageJob(prompt, index, order.seed)
            for prompt, index in zip(order.labels.tolist(), order.index.tolist(), strict=True)
        ]
        advice = "make the set anew with a smaller batch_size"
        with in_memory(len(jobs), self.student.device, advice):
            codes = self._codes(jobs, order.schedule, self._asked(order))
            if order.content == "pixels":
                return _pixels(self.student.decode(codes))
        if not codes.is_floating_point():
            return codes.cpu().numpy()
        tokens: Tensor = self.student.tokenizer.module.nearest(codes)
        return tokens.cpu().numpy()

    def _asked(self, order: RowsOrder) -> AskedFor:
        """Condition of the rows; their captions are read in one call, each bit follows from that.

        Few captions of a data set come again, and as many calls would wait for weights as often.
        """
        if order.features is not None:
            features_NTD, mask_NT = map(torch.from_numpy, order.features)
            return features_NTD, mask_NT
        if self.student.conditioning == "class":
            return torch.tensor(order.labels.tolist())
        captions = [str(caption) for caption in order.labels]
        encoder = self._needed(self._encoder)
        self._encoded_in_bulk += len(captions)
        return encoder(captions)

    def _pass(self, jobs: Sequence[ImageJob], schedule: str) -> Tensor:
        """Images float32 [N, C, H, W] of one forward pass."""
        advice = "lower max_batch_size, or give dtype=bfloat16"
        with in_memory(len(jobs), self.student.device, advice):
            condition = self._condition([job.prompt for job in jobs])
            return self.student.decode(self._codes(jobs, schedule, condition))

    def _codes(self, jobs: Sequence[ImageJob], schedule: str, condition: AskedFor) -> Tensor:
        """Codes float32 [N, L, E], or the teacher's tokens int64 [N, L].

        Args:
            jobs: the images.
            schedule: as `images`.
            condition: what the prompts stand for.
        """
        if "teacher" not in schedule:
            return self.student.generate(condition, noise=self._noise(jobs), schedule=schedule)
        assert self.teacher is not None
        (seed,) = {job.seed for job in jobs}
        index = torch.tensor([job.index for job in jobs])
        rules = self.teacher.recommended
        if schedule == TEACHER_ALONE:
            return self.teacher.trajectories(condition, index, seed=seed, **rules)
        return self.student.generate(
            condition, seed=seed, index=index, schedule=schedule, teacher=self.teacher, **rules
        )

    def _noise(self, jobs: Sequence[ImageJob]) -> Tensor:
        """float32 [N, L, E]."""
        shape = (self.student.num_tokens, self.student.codebook.shape[1])
        seeds, index = [job.seed for job in jobs], [job.index for job in jobs]
        return noise(seeds, index, shape, self.student.device)

    def _condition(self, prompts: Sequence[int | str]) -> AskedFor:
        if self.student.conditioning == "class":
            return torch.tensor(prompts)
        encode = self._needed(self._encode)
        features, masks = zip(*(encode(str(prompt)) for prompt in prompts), strict=True)
        return torch.cat(features), torch.cat(masks)  # copies, also of one: what is kept stays

    def _needed(self, encoder: _EncoderT | None) -> _EncoderT:
        if encoder is None:
            raise ConfigError(f"{self.student.name} takes captions, which needs a text encoder")
        return encoder

    def new_encodings(self) -> int:
        """Captions that the encoder has read since this was last asked."""
        read = self._encoded_in_bulk
        if self._encode is not None:
            read += self._encode.cache_info().misses
        new, self._encodings_told = read - self._encodings_told, read
        return new

    @property
    def some_prompts(self) -> list[int | str]:
        """Prompts to warm the student up, or to see whether it works."""
        if self.student.conditioning == "text":
            return ["a photo"]
        return list(range(self.student.num_classes))


def _encoded_alone(encoder: TextEncoder, caption: str) -> tuple[Tensor, Tensor]:
    """Features and mask of one caption, by a call of its own.

    An encoder's last bits vary with its company too, and what is kept may be used in any.
    """
    return encoder([caption])


def _pixels(images: Tensor) -> npt.NDArray[np.uint8]:
    """Images float32 [N, C, H, W] in [0, 1] as uint8 [N, H, W] or [N, H, W, 3].

    Rounded where they are: a quarter of the bytes leave the device, all in one copy.

    Raises:
        ConfigError: for values that are not a number.
    """
    levels = images.mul(255).round().to(torch.uint8).movedim(1, -1)
    broken = images.isnan().any().to(torch.uint8)
    *pixels, is_broken = torch.cat((levels.flatten(), broken[None])).cpu().split(levels.numel())
    if is_broken:
        raise ConfigError("images hold NaN; look at the model that made them")
    array: npt.NDArray[np.uint8] = pixels[0].view(levels.shape).numpy()
    return array[..., 0] if array.shape[-1] == 1 else array
