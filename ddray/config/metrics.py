"""By which metrics images are judged, and against which real ones."""

from typing import Literal

from pydantic import Field

from ddray.config.base import Job, LocalFile, Location, Locations, Texts


class MetricsConfig(Job):
    """Real images, metrics, and where the weights of their networks lie."""

    reference: Locations = Field(
        (),
        description="real images: an .npz of `ddray reference`, ADM's, pytorch-fid's, a .pth of "
        "the authors of Distilled Decoding, or images, as samples; absent = the held-out digits",
    )
    metrics: Texts = Field(
        (),
        description="such as fid,sfid,is,kid,precision,recall,fd_dinov2,fd_efficientnet; absent = "
        "fd_digits,class_accuracy of digits, else fid,is",
    )
    inception: Location | None = Field(
        None, description="weights of FID's network; absent = where PyTorch keeps downloads"
    )
    any_inception: bool = Field(False, description="take other weights, whose distance is no FID")
    resize: Literal["pytorch-fid", "tensorflow"] = Field(
        "pytorch-fid",
        description="to Inception's 299 pixels: as pytorch-fid, or as ADM's evaluator and "
        "torch-fidelity",
    )
    splits: Literal["adm", "torch-fidelity"] = Field("adm", description="of the Inception Score")
    efficientnet: Location | None = Field(None, description="weights; absent = of the package")
    dinov2: LocalFile | None = Field(None, description="folder of DINOv2, as transformers has it")
    clip: LocalFile | None = Field(None, description="folder of CLIP, likewise")
