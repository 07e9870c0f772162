"""Where runs and teachers lie, and the chain of runs that a run with assistants is."""

from pathlib import Path

from config import flatten
from kd.kd_config import TERMS, KdConfig
from utils.run_folder import short_hash

LAST, HEADS = "student.safetensors", "heads.safetensors"  # files of a finished run


def plain(network: str) -> str:
    """A network's name without `_sdd`, as folders have it."""
    return network.removesuffix("_sdd").replace(":", "-").replace("/", "-")


def run_name(cfg: KdConfig) -> str:
    """Method and networks, or EXPERIMENT.NAME."""
    d = cfg.DISTILLER
    above = [d.TEACHER, *cfg.ASSISTANTS.NETWORKS] if cfg.distils and d.TEACHER else []
    method = "vanilla" if d.TYPE == "NONE" else d.TYPE
    also = [name for name in ("CTKD", "KCD") if getattr(cfg, name)]
    return cfg.EXPERIMENT.NAME or "_".join(["+".join([method, *also]), *map(plain, [*above, d.STUDENT])])


def run_folder(cfg: KdConfig) -> Path:
    """Folder of a run, which the resolved configuration alone decides; M and seed stand in its name."""
    elsewhere: tuple[str, ...] = (
        "DATASET.ROOT", "DATASET.IN_MEMORY", "DATASET.NUM_WORKERS", "DATASET.TEST.", "DISTILLER.TEACHERS",
        "DISTILLER.TEACHER_PATH", "EXPERIMENT.", "LOG.", "debug", "M",
    )  # fmt: skip
    if cfg.DISTILLER.logit_method == "NONE":
        elsewhere += ("KD.TEMPERATURE", "KD.L", "KD.W", "DKD.", "NKD.", "SDD.", "LSKD.", "COMPAT")
    if not cfg.distils:
        elsewhere += ("DISTILLER.TEACHER", "KD.TEACHER_DTYPE")
    elsewhere += tuple(f"{name}." for name in TERMS if name not in cfg.DISTILLER.parts)
    elsewhere += tuple(n for n in ("CTKD", "KCD") if not getattr(cfg, n))
    elsewhere += () if cfg.ASSISTANTS.NETWORKS else ("ASSISTANTS.",)
    elsewhere += () if cfg.DATASET.VAL_REST else ("DATASET.VAL_REST",)
    values = {key: value for key, value in flatten(cfg).items() if not key.startswith(elsewhere)}
    values["M"] = list(cfg.regions)
    scales = f"_M{'-'.join(map(str, cfg.regions))}" if cfg.distils else ""
    name = f"{run_name(cfg)}{scales}_seed{cfg.SEED}_{short_hash(values)}"
    return cfg.LOG.PREFIX / cfg.EXPERIMENT.PROJECT / cfg.DATASET.TYPE / name


def teacher_folder(cfg: KdConfig, network: str) -> Path:
    """The requirement's place: TEACHERS/models/NAME_vanilla for CIFAR-100, else TEACHERS/DATASET/NAME_vanilla.

    Teachers of HSAKD, which have heads of their own, lie in NAME_hsakd.
    """
    kind = {"cifar100": "models"}.get(cfg.DATASET.TYPE, cfg.DATASET.TYPE)
    phase = "hsakd" if cfg.views == "turned" else "vanilla"
    return cfg.DISTILLER.TEACHERS / kind / f"{plain(network)}_{phase}"


def links(cfg: KdConfig) -> list[KdConfig]:
    """The run of every assistant, in order of training, each taught by the larger ones; then the run itself."""
    d, above = cfg.DISTILLER, cfg.ASSISTANTS
    runs = []
    for number, name in enumerate(above.NETWORKS):
        chain = above.model_copy(update={"NETWORKS": above.NETWORKS[:number]})
        parts = {"DISTILLER": d.model_copy(update={"STUDENT": name}), "ASSISTANTS": chain}
        experiment = cfg.EXPERIMENT.model_copy(update={"NAME": "", "SAVE_AS_TEACHER": False})
        runs.append(cfg.model_copy(update=parts | {"EXPERIMENT": experiment}))
    return [*runs, cfg]
