"""What every data set is described by."""

from pydantic import Field

from config import LocalPath, Section


class DataConfig(Section):
    """Which samples, and how many of a class are drawn at once."""

    dataset: str
    nclass: int = Field(ge=2)
    data_dir: LocalPath | None = None
    load_memory: bool = True  # keep all samples on the device (files: decoded); false: fetch every batch
    batch_real: int = Field(256, ge=1)
    val_fraction: float = Field(0.1, gt=0, lt=0.5)  # of train, where the data set has no validation part
